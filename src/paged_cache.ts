/**
 * The paged cache: sequences of any length as tables of blocks from a pool.
 *
 * A block holds `blockSize` positions of one sequence in every layer of one shape, head-major:
 * `[layer][keys, values][kv_head][token][head_dim]`, or codes in the place of the last two axes once the block has left
 * the tail (`policy.ts`). Memory is reserved as blocks are needed, blocks are shared between sequences by reference, and
 * several sequences take part in one call.
 *
 * @module
 */

import { attendRefusal, givenCount, lseCount, NO_FLOATS, NO_PARENTS, readAttend, writeAttend } from "./attention.ts";
import {
  BATCH_APPEND_NAMES,
  BATCH_ATTEND_NAMES,
  BATCH_RULES,
  type BatchAppendOptions,
  type BatchAttendOptions,
  batchFreedRule,
  batchOf,
  countsOf,
  lengthsText,
  missingRowsTextOf,
} from "./batch.ts";
import { type BlockPool, type BlockPoolStats, formatWords, poolStatsOf } from "./block_pool.ts";
import { checkCount, type FloatDType } from "./config.ts";
import { KvError } from "./error.ts";
import { newRecord, policyRecord } from "./ffi/record.ts";
import { library } from "./ffi/library.ts";
import { countText, refusal } from "./ffi/status.ts";
import { fidelityOf, type HeadFidelity } from "./fidelity.ts";
import type { KvFormat } from "./format.ts";
import { showAs } from "./inspect.ts";
import { rowsRule } from "./not_finite.ts";
import { checkOptions } from "./option_names.ts";
import { PagedMemory } from "./paged_memory.ts";
import { largestBlock, type LayerShape, type PagedCacheOptions } from "./paged_options.ts";
import { type Policy, policyWords } from "./policy.ts";
import { inputCount, inputDtype, layoutCode, outputCount, type Rows } from "./rows.ts";
import { type PagedStats, pagedStatsOf } from "./paged_stats.ts";
import { createSequence, layerShape, POOL_EMPTY, type Sequence } from "./sequence.ts";
import type { SequenceMemory } from "./sequence_memory.ts";

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

  static {
    showAs(PagedCache, (cache) => {
      if (cache.handle === 0) return undefined;
      const { layerCount, kvHeadCount, headDim, maxSeqLen, blockSize, dtypeK, dtypeV } = cache;
      const { sequenceCount, totalTokens, usedBytes } = cache.stats();
      const shape = { layerCount, kvHeadCount, headDim, maxSeqLen, blockSize, dtypeK, dtypeV };
      return { ...shape, sequenceCount, totalTokens, usedBytes };
    });
  }

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

  /** Query heads that `attend` wants in layer 0; undefined where the length of the queries tells. */
  get qHeadCount(): number | undefined {
    return this.#memory.shapeOf(0).qHeadCount;
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

  /** Rows that stay unseen beyond those that retention and windows keep, see {@linkcode Sequence.rewindableTo}. */
  get rewindTokens(): number {
    return this.#memory.rewindTokens;
  }

  /** How keys of the tail are stored. */
  get dtypeK(): FloatDType {
    return this.#memory.dtype.k;
  }

  /** How values of the tail are stored. */
  get dtypeV(): FloatDType {
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
    const action = "append";
    checkOptions(options, BATCH_APPEND_NAMES, action); // first, as it may run the caller's code
    const { sequences, tokenCounts, dtype, layout } = options;
    const batch = batchOf(sequences);
    for (const sequence of batch) sequence.checkOwn(action);
    const counts = countsOf("tokenCounts", tokenCounts, batch.length, action);
    checkCount("layer", layer);
    const inputCode = inputDtype(k, v, dtype);
    const order = layoutCode(layout);
    const kCount = inputCount("k", k, action);
    const vCount = inputCount("v", v, action);
    const memory = this.#memory;
    const handles = this.#handles(batch, action);
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
        ...batchFreedRule(batch, memory),
        not_finite: () => rowsRule({ k, v, dtype, layout }, memory.shapeOf(layer), memory.storedAs(layer)),
        cache_full: () => `a sequence holds at most ${memory.maxSeqLen}: ${lengthsText(batch, counts, layer)}`,
        invalid_size: () =>
          `k and v must have ${memory.kvDimOf(layer)} elements for each of them: k has ${kCount}, v has ${vCount}`,
        pool_empty: () => POOL_EMPTY,
      });
    }
    batch.forEach((sequence, i) => sequence.hasArrays && sequence.settle(sequence.rowCount(layer) - counts[i]!));
  }

  /**
   * Attends for several sequences in one call; each query sees the rows of its own sequence alone.
   *
   * `q` and the output are `[query][q_head][head_dim]`, the queries of the first sequence, then those of the second, and
   * so on. Every option means what it means in {@linkcode KvCache.attend}, for each sequence: the same bits as one call
   * for each.
   *
   * @throws {KvError} `layer_out_of_range`, `invalid_size`, `invalid_config`, `not_finite`, `position_out_of_range` for a
   * query some of whose rows were let go, `stale_handle`
   */
  attend(layer: number, q: Float32Array, options: BatchAttendOptions): Float32Array {
    const action = "attend";
    checkOptions(options, BATCH_ATTEND_NAMES, action); // first, as it may run the caller's code
    const { sequences, queryCounts } = options;
    const given = readAttend(options);
    const batch = batchOf(sequences);
    checkCount("layer", layer);
    const memory = this.#memory;
    const record = memory.attendRecord;
    writeAttend(record, q, given);
    const counts = countsOf("queryCounts", queryCounts, batch.length, action, given.queryCount);
    const { alibiSlopes = NO_FLOATS, sinkLogits = NO_FLOATS, treeParents = NO_PARENTS, lse = NO_FLOATS } = given;
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
      treeParents,
      givenCount("treeParents", treeParents),
      output,
      outputCount("into", output),
      lse,
      lseCount(lse),
    );
    if (status < 0) {
      const n = counts.reduce((sum, count) => sum + count, 0);
      throw attendRefusal(status, layer, q, given, n, memory.shapeOf(layer), {
        ...memory.layerRules(layer),
        ...batchFreedRule(batch, memory),
        position_out_of_range: () => missingRowsTextOf(batch, counts, layer, given),
      });
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
    for (const beam of batch) beam.checkOwn(action);
    const indices = countsOf("parents", parents, batch.length, action);
    const memory = this.#memory;
    const handles = this.#handles(batch, action);
    const status = memory.library.kv_paged_reorder(memory.handle, handles, indices, handles.length);
    if (status < 0) {
      throw refusal(status, action, {
        ...batchFreedRule(batch, memory),
        commit_mismatch: () => "a beam has rows pending: commit(n) or truncate(seqLen) comes first",
        invalid_config: () =>
          `each beam may stand there once, and a parent is the index of one of ${batch.length}: parents are ${
            [...indices].join(", ")
          }`,
      });
    }
    batch.forEach((beam) => beam.settle());
  }

  /**
   * What the cache holds, and where the bytes are.
   *
   * @throws {KvError} `stale_handle`
   */
  stats(): PagedStats {
    const record = newRecord("pagedStats");
    const status = this.#memory.library.kv_paged_stats(this.#memory.handle, record, record.byteLength);
    if (status < 0) throw refusal(status, "count the rows of a cache", this.#memory.freedRule);
    return pagedStatsOf(record, this.blockSize);
  }

  /**
   * The pool that has the blocks of a layer, and of all layers of its shape, in one format: by default that of the tail.
   *
   * @throws {KvError} `layer_out_of_range`, `invalid_config` for a format these blocks cannot have, `block_too_large`,
   * `stale_handle`
   */
  poolStats(layer: number = 0, format?: KvFormat): BlockPoolStats {
    checkCount("layer", layer);
    const memory = this.#memory;
    const action = `count the blocks of layer ${layer}`;
    const [k, v] = formatWords(format, memory.dtype, memory.shapeOf(layer).headDim, memory.blockSize, action);
    const group = memory.groups[layer] ?? memory.layers.length; // out of range stays out of range
    const record = newRecord("poolStats");
    const status = memory.library.kv_paged_pool_stats(memory.handle, group, k, v, record, record.byteLength);
    if (status < 0) throw refusal(status, action, memory.layerRules(layer));
    return poolStatsOf(record);
  }

  /**
   * What migration did to the rows of a layer so far, by KV head, and how far off a score can be for it; of a cache with
   * `measureFidelity`. See {@linkcode HeadFidelity} for an example.
   *
   * @throws {KvError} `layer_out_of_range`; `unsupported` without `measureFidelity`; `stale_handle`
   */
  fidelity(layer: number): HeadFidelity[] {
    return fidelityOf(this.#memory, layer);
  }

  /**
   * What becomes of old rows now; limits as the 32 bits hold them.
   *
   * @throws {KvError} `stale_handle`
   */
  get policy(): Policy {
    return this.#memory.policy();
  }

  /**
   * Changes what becomes of old rows, from the next commit of each sequence on: blocks of the tail that are older than the
   * new one migrate, and those that have migrated keep their format. How the tail itself is stored stays.
   *
   * @example Keep all in floats at first, then the newest 64 rows only
   * ```ts
   * import assert from "node:assert/strict";
   * import { PagedCache } from "@kvern/kvern";
   *
   * using cache = new PagedCache({ layerCount: 1, kvHeadCount: 2, headDim: 32, maxSeqLen: 1024 });
   * const sequence = cache.sequence();
   * const rows = (n: number) => new Float32Array(n * 64).fill(0.5);
   * sequence.append(0, rows(200), rows(200));
   * sequence.commit(200);
   * cache.updatePolicy({ kind: "hybrid", tail: { tokens: 64 }, store: { k: "i8", v: "i4" } });
   * sequence.append(0, rows(1), rows(1));
   * sequence.commit(1);
   * assert.deepEqual(sequence.blockTiers(0), ["store", "store", "tail", "tail"]);
   * ```
   *
   * @throws {TypeError} a property of the wrong type
   * @throws {RangeError} a property that is no count
   * @throws {KvError} `invalid_config`; `block_too_large` for a block past `maxBytes` or 1 GiB; `out_of_memory`,
   * `stale_handle`
   */
  updatePolicy(policy: Policy): void {
    const action = "update the policy of a cache";
    const memory = this.#memory;
    const { blockSize, retentionTokens, measuresFidelity, layers } = memory;
    const words = policyWords(policy, { action, blockSize, retentionTokens, measuresFidelity, layers });
    const record = policyRecord(words);
    const status = memory.library.kv_paged_update_policy(memory.handle, record, record.byteLength);
    if (status >= 0) return;
    throw refusal(status, action, {
      ...memory.freedRule,
      block_too_large: () => {
        const bytes = largestBlock(layers, blockSize, memory.dtype, words);
        return `a block must fit in maxBytes and in 1 GiB: it would have ${bytes} bytes`;
      },
    });
  }

  /**
   * Empties the cache and gives all blocks back.
   *
   * Sequences made through this object stay and are empty. Those that were made elsewhere are freed, by a Worker on an
   * attached cache say that ended and left them: whoever still has one gets `stale_handle`. An attached cache empties the
   * sequences made through it and no more.
   *
   * @throws {KvError} `stale_handle`
   */
  reset(): void {
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
