/**
 * The paged cache: sequences of any length as tables of blocks from a pool.
 *
 * A block holds `blockSize` positions of one sequence in every layer of one shape, head-major:
 * `[layer][keys, values][kv_head][token][head_dim]`, or codes in the place of the last two axes once the block has left
 * the tail (`options/policy.ts`). Memory is reserved as blocks are needed, blocks are shared between sequences by reference, and
 * several sequences take part in one call.
 *
 * @module
 */

import { type BlockPool, poolMemoryOf } from "./block_pool.ts";
import { KvError } from "./error.ts";
import { newRecord, recordOf } from "./ffi/record.ts";
import { countText, refusal } from "./ffi/status.ts";
import { POOL_EMPTY } from "./memory/append.ts";
import { attend } from "./memory/attend.ts";
import { BATCH_RULES, batchFreedRule, lengthsText, missingRowsTextOf } from "./memory/batch.ts";
import { explanationOf, type PrefixExplanation } from "./memory/explanation.ts";
import { fidelityOf, type HeadFidelity } from "./memory/fidelity.ts";
import { showAs } from "./memory/inspect.ts";
import { attachPaged, createPaged, EXPLAIN, PagedMemory } from "./memory/paged.ts";
import { type PagedStats, pagedStatsOf } from "./memory/paged_stats.ts";
import { type BlockPoolStats, poolStatsOf } from "./memory/pool.ts";
import { eventsOf, type PrefixEvent } from "./memory/prefix_events.ts";
import { isPaged, newSequence, newSequenceFor, type SequenceMemory } from "./memory/sequence.ts";
import { APPEND_NAMES, type AppendOptions } from "./options/append.ts";
import { ATTEND_NAMES, type AttendOptions, readAttend } from "./options/attend.ts";
import { countsOf } from "./options/batch.ts";
import { checkCount } from "./options/counts.ts";
import type { FloatDType } from "./options/dtype.ts";
import { BLOCK_LIMITS, formatWords, type KvFormat } from "./options/format.ts";
import { batchLengthRule, layoutWords } from "./options/layout.ts";
import { rowsRule } from "./options/not_finite.ts";
import { checkOptions, givenOptions, type OptionNames, optionNames } from "./options/option_names.ts";
import { largestBlock, type LayerShape, type PagedOptions } from "./options/paged.ts";
import { type Policy, policyValues } from "./options/policy.ts";
import { PROMPT_NAMES, promptOf, type PromptOptions, TENANT_NAMES, type TenantOptions } from "./options/prompt.ts";
import { inputCount, inputDtype, type Rows } from "./options/rows.ts";
import { createSequence, layerShape, memoryOf, type Sequence } from "./sequence.ts";

/** What a {@linkcode PagedCache} is made of. */
export interface PagedCacheOptions extends PagedOptions {
  /** Blocks shared with other caches; needs layers of one shape, which with `blockSize` and `dtype` is the pool's. */
  readonly pool?: BlockPool;
}

/** Which sequences an append is for, and how the rows are stored in their arrays. */
export interface BatchAppendOptions extends AppendOptions {
  /** The sequences, each at most once; their rows stand one after the other. */
  readonly sequences: readonly Sequence[];
  /** Rows of each sequence; one each by default. */
  readonly tokenCounts?: ArrayLike<number>;
}

/** The names of {@linkcode BatchAppendOptions}. */
const BATCH_APPEND_NAMES: OptionNames = new Set([
  ...optionNames<Omit<BatchAppendOptions, keyof AppendOptions>>({ sequences: true, tokenCounts: true }),
  ...APPEND_NAMES,
]);

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
const BATCH_ATTEND_NAMES: OptionNames = new Set([
  ...optionNames<Omit<BatchAttendOptions, keyof AttendOptions>>({ sequences: true, queryCounts: true }),
  ...ATTEND_NAMES,
]);

/** The memory of a cache that was made elsewhere, by the options that describe it: how `attach` tells the constructor. */
const attached = new WeakMap<PagedCacheOptions, PagedMemory>();

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
  readonly #pool: BlockPool | undefined;

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
    const known = attached.get(options);
    const { memory, pool } = known === undefined
      ? createPaged(options, poolMemoryOf)
      : { memory: known, pool: undefined };
    this.#memory = memory;
    this.#pool = pool;
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
    const memory = attachPaged(handle);
    const { layers, maxSeqLen } = memory;
    const options = { layers, maxSeqLen };
    attached.set(options, memory);
    return new PagedCache(options);
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
    return this.#pool;
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
   * A new sequence: empty, or with the rows of the longest prefix of `tokens` that is there.
   *
   * Rows are found by the tokens that commits told, in sequences of the same `salt` and `fingerprint`: those of living ones,
   * and with the option `prefix` of the cache those of sequences that have ended, until their memory is wanted. Whole blocks
   * are shared; the one that goes on differently is copied at the first append. At least one token is left to compute, and
   * `seqLen` tells where the sequence starts.
   *
   * @example The second prompt starts where it differs from the first
   * ```ts
   * import assert from "node:assert/strict";
   * import { PagedCache } from "@kvern/kvern";
   *
   * using cache = new PagedCache({ layerCount: 1, kvHeadCount: 1, headDim: 2, maxSeqLen: 64, blockSize: 4, prefix: {} });
   * const prompt = Uint32Array.of(1, 2, 3, 4, 5, 6);
   * const first = cache.sequence({ tokens: prompt });
   * first.append(0, new Float32Array(12), new Float32Array(12));
   * first.commit(6, { tokens: prompt });
   * first.free();
   *
   * assert.equal(cache.sequence({ tokens: Uint32Array.of(1, 2, 3, 4, 5, 7) }).seqLen, 5);
   * assert.equal(cache.sequence({ tokens: prompt }).seqLen, 5); // one is left to compute
   * assert.equal(cache.sequence({ tokens: prompt, salt: "another tenant" }).seqLen, 0);
   * ```
   *
   * @throws {TypeError} an option of the wrong type
   * @throws {KvError} `cache_full` for more tokens than a sequence holds; `invalid_config` for options on a cache with a
   * `pool`, which finds nothing; `out_of_memory`, `stale_handle`
   */
  sequence(options?: PromptOptions): Sequence {
    if (options === undefined) return createSequence(newSequence(this.#memory));
    checkOptions(options, PROMPT_NAMES, "create a sequence");
    return createSequence(newSequenceFor(this.#memory, promptOf(options)));
  }

  /**
   * How many more of these tokens will be found once the sequences of this salt that were made with them have committed
   * them: a scheduler that lets a prompt wait computes them once. A sequence that commits others or tells none, or that goes
   * back, is not waited for.
   *
   * @throws {TypeError} an option of the wrong type
   * @throws {KvError} as {@linkcode PagedCache.sequence}
   */
  pendingPrefix(tokens: Uint32Array, options?: TenantOptions): number {
    const given = givenOptions(options, TENANT_NAMES, "look a prompt up");
    return this.#memory.pendingPrefix(promptOf({ ...given, tokens }));
  }

  /**
   * What a sequence made for these tokens would start with, and why with no more. It changes nothing and counts as no use.
   *
   * It is for the owner of the cache, and tells what became of rows whoever pushed them out; {@linkcode Sequence.explain}
   * is what a tenant may be told.
   *
   * @example Which token is another one
   * ```ts
   * import assert from "node:assert/strict";
   * import { PagedCache } from "@kvern/kvern";
   *
   * using cache = new PagedCache({ layerCount: 1, kvHeadCount: 1, headDim: 2, maxSeqLen: 64, blockSize: 4 });
   * const sequence = cache.sequence();
   * sequence.append(0, new Float32Array(12), new Float32Array(12));
   * sequence.commit(6, { tokens: Uint32Array.of(1, 2, 3, 4, 5, 6) });
   *
   * const { startsAt, reason, differs } = cache.explain(Uint32Array.of(1, 2, 3, 4, 5, 7, 8));
   * assert.deepEqual([startsAt, reason, differs], [5, "differs", { at: 5, id: 6 }]);
   * ```
   *
   * @throws {TypeError} an option of the wrong type
   * @throws {KvError} as {@linkcode PagedCache.sequence}
   */
  explain(tokens: Uint32Array, options?: TenantOptions): PrefixExplanation {
    const given = givenOptions(options, TENANT_NAMES, EXPLAIN);
    return explanationOf(this.#memory.explain(promptOf({ ...given, tokens })));
  }

  /**
   * What became known by its tokens and what is no more, since the last call: for a router that sends prompts where their
   * prefix is. Needs `prefix: { events: true }`.
   *
   * Events are numbered without gaps. When too many wait, what waits is replaced by `cleared` and every block there is.
   *
   * @example
   * ```ts
   * import assert from "node:assert/strict";
   * import { PagedCache } from "@kvern/kvern";
   *
   * const prefix = { events: true };
   * using cache = new PagedCache({ layerCount: 1, kvHeadCount: 1, headDim: 2, maxSeqLen: 64, blockSize: 2, prefix });
   * const sequence = cache.sequence();
   * sequence.append(0, new Float32Array(8), new Float32Array(8));
   * sequence.commit(4, { tokens: Uint32Array.of(5, 6, 7, 8) });
   * cache.reset();
   * assert.deepEqual(cache.events().map(({ kind }) => kind), ["stored", "stored", "cleared"]);
   * ```
   *
   * @throws {KvError} `unsupported` in a cache that keeps none; `out_of_memory`, `stale_handle`
   */
  events(): PrefixEvent[] {
    return eventsOf(this.#memory.takeEvents());
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
    const { sequences, tokenCounts, dtype, layout, headStride } = options;
    const batch = batchOf(sequences);
    for (const sequence of batch) sequence.checkOwn(action);
    const counts = countsOf("tokenCounts", tokenCounts, batch.length, action);
    checkCount("layer", layer);
    const inputCode = inputDtype(k, v, dtype);
    const { order, stride } = layoutWords(layout, headStride, action);
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
      stride,
    );
    if (status < 0) {
      const n = counts.reduce((sum, count) => sum + count, 0);
      throw refusal(status, `append ${countText(n, "token")} to layer ${layer}`, {
        ...memory.indexRules(layer),
        ...BATCH_RULES,
        ...batchFreedRule(batch, memory),
        not_finite: () => rowsRule({ k, v, dtype, layout, headStride }, memory.shapeOf(layer), memory.storedAs(layer)),
        cache_full: () => `a sequence holds at most ${memory.maxSeqLen}: ${lengthsText(batch, counts, layer)}`,
        invalid_size: () =>
          `k and v must have ${batchLengthRule(n, memory.shapeOf(layer), stride)}: k has ${kCount}, v has ${vCount}`,
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
    const { sequences, queryCounts: counts } = options;
    const given = readAttend(options);
    const batch = batchOf(sequences);
    const memory = this.#memory;
    return attend(
      memory,
      layer,
      q,
      given,
      () => {
        const queryCounts = countsOf("queryCounts", counts, batch.length, action, given.queryCount);
        return { cache: memory.handle, sequences: this.#handles(batch, action), queryCounts };
      },
      (queryCounts) => ({
        ...memory.indexRules(layer),
        ...batchFreedRule(batch, memory),
        position_out_of_range: () => missingRowsTextOf(batch, queryCounts, layer, given),
      }),
    );
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
    return pagedStatsOf(record, this.#memory.prefixStats(), this.blockSize);
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
    if (status < 0) throw refusal(status, action, memory.indexRules(layer));
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
    const values = policyValues(policy, { action, blockSize, retentionTokens, measuresFidelity, layers });
    const record = recordOf("policy", values);
    const status = memory.library.kv_paged_update_policy(memory.handle, record, record.byteLength);
    if (status >= 0) return;
    throw refusal(status, action, {
      ...memory.freedRule,
      block_too_large: () => {
        const bytes = largestBlock(layers, blockSize, memory.dtype, values);
        return `a block must fit in ${BLOCK_LIMITS}: it would have ${bytes} bytes`;
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

  /** The handles of a batch, asked for last, when no code of the caller's runs any more. */
  #handles(batch: readonly SequenceMemory[], action: string): Uint32Array {
    const stranger = batch.findIndex(({ cache }) => cache.handle !== this.#memory.handle && cache.handle !== 0);
    if (stranger >= 0 && this.#memory.handle !== 0) {
      throw new KvError("invalid_config", `Cannot ${action} as sequence ${stranger} is of another cache`);
    }
    return Uint32Array.from(batch, ({ handle }) => handle);
  }
}

/** The native sequences of a batch. */
function batchOf(sequences: readonly Sequence[]): SequenceMemory[] {
  if (!Array.isArray(sequences)) throw new TypeError(`sequences must be an array: ${typeof sequences}`);
  return Array.from(sequences, (sequence) => {
    const memory = memoryOf(sequence);
    if (isPaged(memory)) return memory;
    throw new TypeError("a sequence must be one of a PagedCache: it is one of a ContiguousCache");
  });
}
