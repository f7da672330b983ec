/**
 * Several sequences in one call: which they are, and how many rows or queries each of them has.
 *
 * @module
 */

import type { AttendOptions } from "./attention.ts";
import type { AppendOptions } from "./cache.ts";
import { checkCount } from "./config.ts";
import { KvError } from "./error.ts";
import { CACHE_FREED, countText, type FreedRule } from "./ffi/status.ts";
import { type OptionNames, optionNames } from "./option_names.ts";
import type { AskedRows, PagedMemory } from "./paged_memory.ts";
import { isMissingRows, missingRowsText } from "./retention.ts";
import { memoryOf, type Sequence } from "./sequence.ts";
import type { SequenceMemory } from "./sequence_memory.ts";

/** Which sequences an append is for, and how the rows are stored in their arrays. */
export interface BatchAppendOptions extends AppendOptions {
  /** The sequences, each at most once; their rows stand one after the other. */
  readonly sequences: readonly Sequence[];
  /** Rows of each sequence; one each by default. */
  readonly tokenCounts?: ArrayLike<number>;
}

/** The names of {@linkcode BatchAppendOptions}. */
export const BATCH_APPEND_NAMES: OptionNames = optionNames<BatchAppendOptions>({
  sequences: true,
  tokenCounts: true,
  dtype: true,
  layout: true,
});

/** Which sequences attend, and how. */
export interface BatchAttendOptions extends AttendOptions {
  /** The sequences; their queries stand one after the other. */
  readonly sequences: readonly Sequence[];
  /** Queries of each sequence, where they differ; `queryCount` each by default, and none other where both are given. */
  readonly queryCounts?: ArrayLike<number>;
  /** Queries of every sequence, 1 by default. */
  readonly queryCount?: number;
  /**
   * Parents `[query]` of the trees of drafted tokens, those of the first sequence, then those of the second, and so on:
   * each sequence has a tree of its own, in which `treeParents` counts from its own first query. Otherwise as in
   * {@linkcode AttendOptions}.
   */
  readonly treeParents?: Int32Array;
}

/** The names of {@linkcode BatchAttendOptions}. */
export const BATCH_ATTEND_NAMES: OptionNames = optionNames<BatchAttendOptions>({
  sequences: true,
  queryCounts: true,
  queryCount: true,
  softmaxScale: true,
  causal: true,
  windowTokens: true,
  sinkTokens: true,
  softcap: true,
  alibiSlopes: true,
  sinkLogits: true,
  treeParents: true,
  into: true,
  lse: true,
});

/** The rules about a batch. */
export const BATCH_RULES = {
  invalid_config: () => "each sequence may be named once in a call, and must be of this cache",
};

/** The rule about what was freed, the cache or which of the sequences. */
export function batchFreedRule(batch: readonly SequenceMemory[], cache: PagedMemory): FreedRule {
  return {
    stale_handle: () => {
      const index = batch.findIndex(({ handle }) => cache.library.kv_sequence_seq_len(handle) < 0);
      const rule = cache.freedRule.stale_handle();
      return index < 0 || rule === CACHE_FREED ? rule : `${rule}: it is sequence ${index} of the call`;
    },
  };
}

/** The native sequences of a batch. */
export function batchOf(sequences: readonly Sequence[]): SequenceMemory[] {
  if (!Array.isArray(sequences)) throw new TypeError(`sequences must be an array: ${typeof sequences}`);
  return Array.from(sequences, memoryOf);
}

/** One count for each sequence: `each`, or 1, where none are given; where both are, they must agree. */
export function countsOf(
  name: string,
  given: ArrayLike<number> | undefined,
  length: number,
  action: string,
  each?: number,
): Uint32Array {
  const counts = new Uint32Array(length).fill(each ?? 1);
  if (given === undefined && name !== "parents") return counts;
  if (typeof given !== "object" || given === null) throw new TypeError(`${name} must be an array: ${typeof given}`);
  // Its length before its elements: `{ length: 1e9 }` is a small object and would be a large array.
  const valueCount = given.length;
  if (valueCount !== length) {
    throw new KvError(
      "invalid_size",
      `Cannot ${action} as ${name} must have one for each of ${countText(length, "sequence")}: it has ${
        typeof valueCount === "number" ? valueCount : typeof valueCount
      }`,
    );
  }
  for (let i = 0; i < length; i++) {
    const value = given[i]!;
    checkCount(`${name}[${i}]`, value);
    if (each !== undefined && value !== each) {
      throw new KvError(
        "invalid_config",
        `Cannot ${action} as queryCount and ${name} must agree: queryCount is ${each}, ${name}[${i}] is ${value}`,
      );
    }
    counts[i] = value;
  }
  return counts;
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
