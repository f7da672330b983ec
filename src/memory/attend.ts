/**
 * The call of attend: any number of sequences of one cache, one sequence being a batch of one.
 *
 * @module
 */

import type { KvErrorCode } from "../error.ts";
import { type AttendBuffers, attendRefusal, type GivenAttend, givenCount, writeAttend } from "../options/attend.ts";
import { checkCount } from "../options/counts.ts";
import { inputCount, outputCount } from "../options/rows.ts";
import type { CacheMemory } from "./cache.ts";
import type { SequenceMemory } from "./sequence.ts";

/** The sequences of a call, and how many queries each of them has. */
export interface AttendBatch {
  /** The handle of the cache. */
  readonly cache: number;
  /** The handle of each sequence of a paged cache, the index of each of a contiguous one. */
  readonly sequences: Uint32Array;
  readonly queryCounts: Uint32Array;
}

/**
 * Checks a call, makes it, and gives its output. `batchOf` is asked last, when no code of the caller's runs any more;
 * `rulesOf` once the call was refused, with the queries of each sequence.
 */
export function attend(
  memory: CacheMemory,
  layer: number,
  q: Float32Array,
  given: GivenAttend,
  batchOf: (buffers: AttendBuffers) => AttendBatch,
  rulesOf: (queryCounts: Uint32Array) => Partial<Record<KvErrorCode, () => string>>,
): Float32Array {
  checkCount("layer", layer);
  const { attendBuffers } = memory;
  const options = writeAttend(attendBuffers, q, given);
  const { cache, sequences, queryCounts } = batchOf(attendBuffers);
  const { none, noParents } = attendBuffers;
  const { alibiSlopes = none, sinkLogits = none, treeParents = noParents, lse = none } = given;
  const qCount = inputCount("q", q, "attend");
  const output = given.into ?? new Float32Array(qCount);
  const status = memory.library.kv_attend(
    cache,
    layer,
    sequences,
    queryCounts,
    sequences.length,
    options,
    options.byteLength,
    q,
    qCount,
    alibiSlopes,
    givenCount("alibiSlopes", given.alibiSlopes),
    sinkLogits,
    givenCount("sinkLogits", given.sinkLogits),
    treeParents,
    givenCount("treeParents", given.treeParents),
    output,
    outputCount("into", output),
    lse,
    given.lse === undefined ? 0 : outputCount("lse", lse),
  );
  if (status >= 0) return output;
  const queryCount = queryCounts.reduce((sum, count) => sum + count, 0);
  throw attendRefusal(status, layer, q, given, queryCount, memory.shapeOf(layer), rulesOf(queryCounts));
}

/** The batch of one sequence, in the buffers of its cache. */
export function oneOf(memory: SequenceMemory, queries: number, { sequence, queryCount }: AttendBuffers): AttendBatch {
  const { cache, handle, index } = memory;
  sequence[0] = cache.isPaged ? handle : index;
  queryCount[0] = queries;
  return { cache: cache.isPaged ? cache.handle : handle, sequences: sequence, queryCounts: queryCount };
}
