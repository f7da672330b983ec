/**
 * Several native sequences in one call, and what is said where one of them refuses it.
 *
 * @module
 */

import { CACHE_FREED, type FreedRule } from "../ffi/status.ts";
import { isMissingRows, missingRowsText } from "../options/retention.ts";
import type { AskedRows } from "./cache.ts";
import type { PagedMemory } from "./paged.ts";
import type { SequenceMemory } from "./sequence.ts";

/** The rules about a batch. */
export const BATCH_RULES = {
  invalid_config: () => "each sequence may be named once in a call, and must be of this cache",
};

/** The rule about what was freed, the cache or which of the sequences. */
export function batchFreedRule(batch: readonly SequenceMemory[], cache: PagedMemory): FreedRule {
  return {
    stale_handle: () => {
      const index = batch.findIndex(({ handle, index }) => cache.library.kv_sequence_seq_len(handle, index) < 0);
      const rule = cache.freedRule.stale_handle();
      return index < 0 || rule === CACHE_FREED ? rule : `${rule}: it is sequence ${index} of the call`;
    },
  };
}

/** The first sequence of which a query would see rows that were let go, and where. */
export function missingRowsTextOf(
  batch: readonly SequenceMemory[],
  counts: Uint32Array,
  layer: number,
  given: AskedRows,
): string {
  const index = batch.findIndex((sequence, i) =>
    counts[i] !== 0 && isMissingRows(sequence.seen(layer), counts[i]!, sequence.cache.sightOf(layer, given))
  );
  const sequence = batch[Math.max(0, index)]!;
  const text = missingRowsText(sequence.seen(layer), counts[Math.max(0, index)]!, sequence.cache.sightOf(layer, given));
  return `${text}, sequence is ${index}`;
}

/** The sequences that would grow past the end, the first few of them. */
export function lengthsText(batch: readonly SequenceMemory[], counts: Uint32Array, layer: number): string {
  const texts = batch.map((sequence, i) => ({ length: sequence.rowCount(layer), count: counts[i]!, i }))
    .filter(({ length, count }) => length + count > batch[0]!.cache.maxSeqLen)
    .map(({ length, count, i }) => `sequence ${i} has ${length} and would get ${count}`);
  return texts.slice(0, 4).join(", ");
}
