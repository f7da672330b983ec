/**
 * The paged cache: sequences of any length as tables of blocks from a pool.
 *
 * A block holds `blockSize` positions of one sequence in every layer of one shape, head-major:
 * `[layer][keys, values][kv_head][token][head_dim]`. Memory is reserved as blocks are needed, blocks are shared between
 * sequences by reference, and several sequences take part in one call.
 *
 * @module
 */

import {
  type AttendOptions,
  attendRefusal,
  givenCount,
  lseCount,
  NO_FLOATS,
  readAttend,
  writeAttend,
} from "./attention.ts";
import { type BlockPool, type BlockPoolStats, poolStatsOf } from "./block_pool.ts";
import type { AppendOptions } from "./cache.ts";
import { checkCount, type DType } from "./config.ts";
import { KvError } from "./error.ts";
import { newRecord, uint64At } from "./ffi/record.ts";
import { library } from "./ffi/library.ts";
import { countText, refusal } from "./ffi/status.ts";
import { PagedMemory } from "./paged_memory.ts";
import type { LayerShape, PagedCacheOptions } from "./paged_options.ts";
import { inputCount, inputDtype, layoutCode, outputCount, type Rows } from "./rows.ts";
import { createSequence, layerShape, memoryOf, POOL_EMPTY, type Sequence } from "./sequence.ts";
import type { SequenceMemory } from "./sequence_memory.ts";

/** Which sequences an append is for, and how the rows are stored in their arrays. */
export interface BatchAppendOptions extends AppendOptions {
  /** The sequences, each at most once; their rows stand one after the other. */
  readonly sequences: readonly Sequence[];
  /** Rows of each sequence; one each by default. */
  readonly tokenCounts?: ArrayLike<number>;
}

/** Which sequences attend, and how. */
export interface BatchAttendOptions extends Omit<AttendOptions, "queryCount" | "treeParents"> {
  /** The sequences; their queries stand one after the other. */
  readonly sequences: readonly Sequence[];
  /** Queries of each sequence; one each by default. */
  readonly queryCounts?: ArrayLike<number>;
}

/** What a paged cache holds, and where the bytes are. */
export interface PagedStats {
  /** Committed rows that are there, of all sequences; rows that several share count in each. */
  readonly totalTokens: number;
  /** Blocks in use in the pools of the cache, each counted once; of a shared pool all of them. */
  readonly blockCount: number;
  /** Blocks in the tables of all sequences; a block that several share counts in each. */
  readonly tableEntries: number;
  /** Positions a block holds. */
  readonly tokensPerBlock: number;
  /** Sequences that were not freed. */
  readonly sequenceCount: number;
  /** Rows that retention and windows let go. */
  readonly evictions: number;
  /** Bytes of the blocks in use. */
  readonly usedBytes: number;
  /** Bytes reserved for blocks. */
  readonly reservedBytes: number;
  /** Bytes of tables and bookkeeping. */
  readonly metadataBytes: number;
}

/**
 * Keys and values of all layers for any number of sequences, which share what they have in common.
 *
 * Free it with `using` or `free`; a dropped one is freed at some garbage collection, and one that a Worker made and left
 * behind when it ended, not before the process ends. A sequence keeps its cache.
 *
 * @example A batch of sequences of different lengths
 * ```ts
 * import assert from "node:assert/strict";
 * import { PagedCache } from "@kvern/kvern";
 *
 * using cache = new PagedCache({ layerCount: 1, kvHeadCount: 2, headDim: 4, maxSeqLen: 1024 });
 * const first = cache.sequence(), second = cache.sequence();
 * const sequences = [first, second];
 * const rows = new Float32Array(5 * 8).fill(0.5);
 * cache.append(0, rows, rows, { sequences, tokenCounts: [3, 2] });
 * first.commit(3);
 * second.commit(2);
 *
 * const output = cache.attend(0, new Float32Array(2 * 8).fill(1), { sequences });
 * assert.equal(output.length, 2 * 8);
 * assert.equal(cache.stats().totalTokens, 5);
 * ```
 */
export class PagedCache {
  readonly #memory: PagedMemory;

  /**
   * Makes an empty cache; nothing is reserved before the first row.
   *
   * @throws {TypeError} an option of the wrong type
   * @throws {RangeError} an option that is no count
   * @throws {KvError} `invalid_config`; `block_too_large` for a block past `maxBytes` or 1 GiB; `stale_handle` for a
   * pool that was freed; `library_unavailable`, `needs_permission`
   */
  constructor(options: PagedCacheOptions) {
    // An attached memory is taken as it is.
    this.#memory = options instanceof PagedMemory ? options : PagedMemory.create(options);
  }

  /**
   * Opens a cache that was made elsewhere, in a Worker say, by its `handle`.
   *
   * The attached cache does not own the other one: dropping or freeing it frees the sequences made through it and no
   * more, and zero-copy arrays are refused with `unsupported`, because the owner could not detach them. The owner must
   * outlive its use.
   *
   * @throws {KvError} `stale_handle` if there is no such cache
   */
  static attach(handle: number): PagedCache {
    checkCount("handle", handle);
    const memory: unknown = new PagedMemory(library(), handle, false);
    return new PagedCache(memory as PagedCacheOptions);
  }

  /** The number that opens this cache elsewhere, see {@linkcode PagedCache.attach}; 0 once freed. */
  get handle(): number {
    return this.#memory.handle;
  }

  /** Transformer layers. */
  get layerCount(): number {
    return this.#memory.layers.length;
  }

  /** KV heads of layer 0. */
  get kvHeadCount(): number {
    return this.#memory.shapeOf(0).kvHeadCount;
  }

  /** Elements of a head of layer 0. */
  get headDim(): number {
    return this.#memory.shapeOf(0).headDim;
  }

  /** Elements of a row of layer 0. */
  get kvDim(): number {
    return this.#memory.kvDimOf(0);
  }

  /** Rows each sequence can hold, evicted ones included. */
  get maxSeqLen(): number {
    return this.#memory.maxSeqLen;
  }

  /** Positions a block holds. */
  get blockSize(): number {
    return this.#memory.blockSize;
  }

  /** Groups of layers of one shape; each has blocks of its own. */
  get groupCount(): number {
    return Math.max(...this.#memory.groups) + 1;
  }

  /** How keys are stored. */
  get dtypeK(): DType {
    return this.#memory.dtype.k;
  }

  /** How values are stored. */
  get dtypeV(): DType {
    return this.#memory.dtype.v;
  }

  /** The pool that was given, if one was. */
  get pool(): BlockPool | undefined {
    return this.#memory.pool;
  }

  /**
   * The heads and the window of a layer.
   *
   * @throws {KvError} `layer_out_of_range`
   */
  layerShape(layer: number): LayerShape {
    return layerShape(this.#memory, layer);
  }

  /**
   * A new, empty sequence.
   *
   * @throws {KvError} `out_of_memory`, `stale_handle`
   */
  sequence(): Sequence {
    return createSequence(this.#memory);
  }

  /**
   * Writes rows of one layer behind those of several sequences: all of them or none.
   *
   * `k` and `v` hold the rows of the first sequence, then those of the second, and so on; with `head_major` layout they
   * are `[kv_head][row][head_dim]` over all of these rows. Each sequence commits for itself.
   *
   * @throws {KvError} `layer_out_of_range`, `cache_full`, `invalid_size`, `not_finite`, `pool_empty`, `out_of_memory`,
   * `invalid_config` for a sequence named twice or of another cache, `stale_handle`
   */
  append(layer: number, k: Rows, v: Rows, options: BatchAppendOptions): void {
    const { sequences, tokenCounts, dtype, layout } = options; // first, as it may run the caller's code
    const action = "append";
    const batch = batchOf(sequences);
    const counts = countsOf("tokenCounts", tokenCounts, batch.length, action);
    checkCount("layer", layer);
    const inputCode = inputDtype(k, v, dtype);
    const order = layoutCode(layout);
    const kCount = inputCount("k", k, action);
    const vCount = inputCount("v", v, action);
    const memory = this.#memory;
    const handles = this.#handles(batch, action);
    const before = batch.map((sequence) => sequence.mayShare ? sequence.before() : undefined);
    const status = memory.library.kv_paged_append(
      memory.handle,
      layer,
      handles,
      counts,
      handles.length,
      k,
      kCount,
      v,
      vCount,
      inputCode,
      order,
    );
    if (status < 0) {
      const n = counts.reduce((sum, count) => sum + count, 0);
      throw refusal(status, `append ${countText(n, "token")} to layer ${layer}`, {
        ...memory.layerRules(layer),
        ...BATCH_RULES,
        cache_full: () => `a sequence holds at most ${memory.maxSeqLen}: ${lengthsText(batch, counts, layer)}`,
        invalid_size: () =>
          `k and v must have ${memory.kvDimOf(layer)} elements for each of them: k has ${kCount}, v has ${vCount}`,
        pool_empty: () => POOL_EMPTY,
      });
    }
    batch.forEach((sequence, i) => before[i] && sequence.after(before[i]));
  }

  /**
   * Attends for several sequences in one call; each query sees the rows of its own sequence alone.
   *
   * `q` and the output are `[query][q_head][head_dim]`, the queries of the first sequence, then those of the second, and
   * so on. The same bits as one call for each.
   *
   * @throws {KvError} `layer_out_of_range`, `invalid_size`, `invalid_config`, `not_finite`, `stale_handle`
   */
  attend(layer: number, q: Float32Array, options: BatchAttendOptions): Float32Array {
    const { sequences, queryCounts } = options; // first, as it may run the caller's code
    const given = { ...readAttend(options), queryCount: 1, treeParents: undefined };
    const action = "attend";
    const batch = batchOf(sequences);
    const counts = countsOf("queryCounts", queryCounts, batch.length, action);
    checkCount("layer", layer);
    const memory = this.#memory;
    const record = memory.attendRecord;
    writeAttend(record, q, given);
    const { alibiSlopes = NO_FLOATS, sinkLogits = NO_FLOATS, lse = NO_FLOATS } = given;
    const handles = this.#handles(batch, action);
    const qCount = inputCount("q", q, action);
    const output = given.into ?? new Float32Array(qCount);
    const status = memory.library.kv_paged_attend(
      memory.handle,
      layer,
      handles,
      counts,
      handles.length,
      q,
      qCount,
      record.words,
      record.words.byteLength,
      alibiSlopes,
      givenCount("alibiSlopes", alibiSlopes),
      sinkLogits,
      givenCount("sinkLogits", sinkLogits),
      output,
      outputCount("into", output),
      lse,
      lseCount(lse),
    );
    if (status < 0) {
      const n = counts.reduce((sum, count) => sum + count, 0);
      throw attendRefusal(status, layer, q, given, n, memory.shapeOf(layer), memory.layerRules(layer));
    }
    return output;
  }

  /**
   * `beams[i]` becomes what `beams[parents[i]]` was, for all at once: tables and references only, no row is copied.
   *
   * @throws {KvError} `commit_mismatch` if a beam has rows pending; `invalid_config` for a parent there is not, a beam
   * named twice or of another cache; `invalid_size` if there is not a parent for each beam; `stale_handle`
   */
  reorder(beams: readonly Sequence[], parents: ArrayLike<number>): void {
    const action = "reorder beams";
    const batch = batchOf(beams);
    const indices = countsOf("parents", parents, batch.length, action);
    const memory = this.#memory;
    const handles = this.#handles(batch, action);
    const before = batch.map((beam) => beam.before());
    const status = memory.library.kv_paged_reorder(memory.handle, handles, indices, handles.length);
    if (status < 0) {
      throw refusal(status, action, {
        ...BATCH_RULES,
        commit_mismatch: () => "a beam has rows pending: commit(n) or truncate(seqLen) comes first",
        invalid_config: () =>
          `each beam may stand there once, and a parent is the index of one of ${batch.length}: parents are ${
            [...indices].join(", ")
          }`,
      });
    }
    batch.forEach((beam, i) => {
      beam.share();
      beam.after(before[i]!);
    });
  }

  /**
   * What the cache holds, and where the bytes are.
   *
   * @throws {KvError} `stale_handle`
   */
  stats(): PagedStats {
    const record = newRecord("pagedStats");
    const status = this.#memory.library.kv_paged_stats(this.#memory.handle, record, record.byteLength);
    if (status < 0) throw refusal(status, "count the rows of a cache");
    return {
      totalTokens: uint64At(record, 2),
      blockCount: record[10]!,
      tableEntries: uint64At(record, 4),
      tokensPerBlock: this.blockSize,
      sequenceCount: record[1]!,
      evictions: uint64At(record, 6),
      usedBytes: uint64At(record, 12),
      reservedBytes: uint64At(record, 14),
      metadataBytes: uint64At(record, 8),
    };
  }

  /**
   * The pool that has the blocks of a layer, and of all layers of its shape.
   *
   * @throws {KvError} `layer_out_of_range`, `stale_handle`
   */
  poolStats(layer: number = 0): BlockPoolStats {
    checkCount("layer", layer);
    const memory = this.#memory;
    const group = memory.groups[layer] ?? memory.layers.length; // out of range stays out of range
    const record = newRecord("poolStats");
    const status = memory.library.kv_paged_pool_stats(memory.handle, group, record, record.byteLength);
    if (status < 0) throw refusal(status, `count the blocks of layer ${layer}`, memory.layerRules(layer));
    return poolStatsOf(record);
  }

  /**
   * Empties every sequence made through this object and gives their blocks back; the sequences stay.
   *
   * @throws {KvError} `stale_handle`
   */
  reset(): void {
    if (this.#memory.handle === 0) throw new KvError("stale_handle", "Cannot reset a cache as it was freed");
    this.#memory.reset();
  }

  /** Detaches every array handed out and frees all sequences with the cache; harmless when repeated. */
  free(): void {
    this.#memory.free();
  }

  /** The same as `free`, for `using`. */
  [Symbol.dispose](): void {
    this.free();
  }

  /** To be asked for last, when no code of the caller's runs any more. */
  #handles(batch: readonly SequenceMemory[], action: string): Uint32Array {
    const stranger = batch.findIndex(({ cache }) => cache.handle !== this.#memory.handle && cache.handle !== 0);
    if (stranger >= 0 && this.#memory.handle !== 0) {
      throw new KvError("invalid_config", `Cannot ${action} as sequence ${stranger} is of another cache`);
    }
    return Uint32Array.from(batch, ({ handle }) => handle);
  }
}

/** The rules about a batch. */
const BATCH_RULES = {
  invalid_config: () => "a sequence may stand there once",
  stale_handle: () => "the cache or one of the sequences was freed",
};

function batchOf(sequences: readonly Sequence[]): SequenceMemory[] {
  if (!Array.isArray(sequences)) throw new TypeError(`sequences must be an array: ${typeof sequences}`);
  return Array.from(sequences, memoryOf);
}

/** One count for each sequence; 1 where none are given. */
function countsOf(name: string, given: ArrayLike<number> | undefined, length: number, action: string): Uint32Array {
  const counts = new Uint32Array(length).fill(1);
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
    counts[i] = value;
  }
  return counts;
}

/** The sequences that would grow past the end, the first few of them. */
function lengthsText(batch: readonly SequenceMemory[], counts: Uint32Array, layer: number): string {
  const texts = batch.map((sequence, i) => ({ length: sequence.rowCount(layer), count: counts[i]!, i }))
    .filter(({ length, count }) => length + count > batch[0]!.cache.maxSeqLen)
    .map(({ length, count, i }) => `sequence ${i} has ${length} and would get ${count}`);
  return texts.slice(0, 4).join(", ");
}
