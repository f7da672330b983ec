/**
 * Rows that count from now on, the same for every kind of cache.
 *
 * @module
 */

import { KvError } from "../error.ts";
import { countText, refusal } from "../ffi/status.ts";
import { checkTokens, checkWords, COMMIT_NAMES, rankOf, type SequenceCommitOptions } from "../options/commit.ts";
import { checkCount } from "../options/counts.ts";
import { givenOptions } from "../options/option_names.ts";
import { lengthOf } from "../options/typed_array.ts";
import type { SequenceMemory } from "./sequence.ts";

/** Makes `n` pending rows of a sequence count, or those of them that are kept. */
export function commitRows(memory: SequenceMemory, n: number, options?: SequenceCommitOptions): void {
  // First, as it may run the caller's code.
  const { tokens, kept, ...stay } = givenOptions(options, COMMIT_NAMES, "commit");
  checkCount("n", n);
  checkTokens(tokens, n);
  const { priority, ttlMs } = rankOf({ tokens, priority: stay.priority, ttlMs: stay.ttlMs });
  const library = memory.cache.library;
  const action = `commit ${countText(n, "token")}`;
  memory.checkOwn(action);
  const isTold = tokens !== undefined && memory.cache.findsTokens;
  let status: number;
  if (kept === undefined) {
    status = isTold
      ? library.kv_sequence_commit_tokens(memory.handle, tokens, n, priority, ttlMs)
      : library.kv_sequence_commit(memory.handle, memory.index, n);
  } else {
    checkWords("kept", kept);
    const count = lengthOf(kept);
    if (count !== n) throw new KvError("invalid_size", `Cannot ${action} as kept must have as many rows: ${count}`);
    status = isTold
      ? library.kv_sequence_commit_kept_tokens(memory.handle, kept, count, tokens, n, priority, ttlMs)
      : library.kv_sequence_commit_kept(memory.handle, memory.index, kept, count);
  }
  if (status < 0) {
    const rule = kept === undefined ? "have exactly that many rows pending" : "have equally many rows pending";
    throw refusal(status, action, {
      ...memory.cache.freedRule,
      commit_mismatch: () => `every layer must ${rule}: ${pendingText(memory)}`,
      invalid_size: () => `kept must have indices of pending rows, ascending: ${pendingText(memory)}`,
    });
  }
  memory.settle();
}

/** Which layers have how many rows pending, the first few of them. */
function pendingText(memory: SequenceMemory): string {
  const { cache, handle, index } = memory;
  const length = cache.library.kv_sequence_seq_len(handle, index);
  const shown = Array.from({ length: Math.min(cache.layerCount, 4) }, (_, layer) => layer);
  return shown.map((layer) => `layer ${layer} has ${memory.rowCount(layer) - length}`).join(", ");
}
