/**
 * One sequence of a cache, whatever layout is behind it.
 *
 * What only a paged cache can do is refused on a sequence of a contiguous one.
 *
 * @module
 */

import type {
  AppendResult,
  ContiguousKv,
  DevicePlacement,
  GatheredRows,
  KvCache,
  PackedView,
  Tier,
  View,
} from "./cache.ts";
import { KvError } from "./error.ts";
import type { Library } from "./ffi/exports.ts";
import { nameOf, newRecord } from "./ffi/record.ts";
import { countText, refusal } from "./ffi/status.ts";
import { appendRows } from "./memory/append.ts";
import { attend, oneOf } from "./memory/attend.ts";
import type { CacheMemory } from "./memory/cache.ts";
import { commitRows } from "./memory/commit.ts";
import { explanationOf, newExplanation, type PrefixExplanation } from "./memory/explanation.ts";
import { gatherRows } from "./memory/gather.ts";
import { showAs } from "./memory/inspect.ts";
import { packedViewsOf } from "./memory/packed_view.ts";
import { EXPLAIN } from "./memory/paged.ts";
import { attachSequence, forkSequence, isPaged, type PagedSequence, SequenceMemory } from "./memory/sequence.ts";
import { VIEW, viewsOf } from "./memory/view.ts";
import { APPEND_NAMES, type AppendOptions } from "./options/append.ts";
import { ATTEND_NAMES, type AttendOptions, readAttend } from "./options/attend.ts";
import { checkWords, type SequenceCommitOptions } from "./options/commit.ts";
import { checkCount } from "./options/counts.ts";
import type { GatherOptions } from "./options/gather.ts";
import { givenOptions } from "./options/option_names.ts";
import type { LayerShape } from "./options/paged.ts";
import { missingRowsText } from "./options/retention.ts";
import type { Rows } from "./options/rows.ts";
import { lengthOf } from "./options/typed_array.ts";

/** Makes the object of a native sequence. */
export let createSequence: (memory: SequenceMemory) => Sequence;

/** The native sequence of a `Sequence`; throws TypeError for anything else. */
export let memoryOf: (sequence: Sequence) => SequenceMemory;

/**
 * One token stream in a {@linkcode PagedCache}, made by its `sequence` or by `fork`; a sequence of a
 * {@linkcode ContiguousCache} is one, too, with the verbs of {@linkcode KvCache}.
 *
 * Free it with `using` or `free`; a dropped one is freed at some garbage collection. It keeps its cache.
 *
 * @example Two continuations of one prompt
 * ```ts
 * import assert from "node:assert/strict";
 * import { PagedCache } from "@kvern/kvern";
 *
 * using cache = new PagedCache({ layerCount: 1, kvHeadCount: 2, headDim: 4, maxSeqLen: 1024, blockSize: 4 });
 * const rows = (n: number) => new Float32Array(n * 8).fill(0.5);
 * using prompt = cache.sequence();
 * prompt.append(0, rows(6), rows(6));
 * prompt.commit(6);
 * using other = prompt.fork();
 * other.append(0, rows(1), rows(1));
 * other.commit(1);
 * assert.deepEqual([prompt.seqLen, other.seqLen], [6, 7]);
 * assert.equal(cache.stats().blockCount, 3); // one block is shared, the other was copied
 * ```
 */
export class Sequence implements KvCache {
  readonly #memory: SequenceMemory;

  static {
    showAs(
      Sequence,
      (sequence) => {
        const { handle, cache } = sequence.#memory;
        if (handle === 0) return undefined;
        const { seqLen, maxSeqLen, layerCount, kvHeadCount, headDim } = sequence;
        const residents = cache.isPaged ? { residentTokens: sequence.residentTokens() } : {};
        return { seqLen, ...residents, maxSeqLen, layerCount, kvHeadCount, headDim };
      },
      (sequence) => sequence.#memory.cache.isPaged ? "Sequence" : "ContiguousSequence",
    );
    createSequence = (memory) => new Sequence(memory);
    memoryOf = (sequence) => {
      if (typeof sequence === "object" && sequence !== null && #memory in sequence) return sequence.#memory;
      throw new TypeError(`a sequence must be a Sequence: ${sequence === null ? "null" : typeof sequence}`);
    };
  }

  private constructor(memory: SequenceMemory) {
    if (!(memory instanceof SequenceMemory)) {
      throw new TypeError("a Sequence is made by the sequence() of a PagedCache");
    }
    this.#memory = memory;
    // KvCache has none where rows are token-major, and programs ask whether there is one.
    if (!memory.cache.isPaged) Object.defineProperty(this, "packedViews", { value: undefined });
  }

  /**
   * Opens a sequence that was made elsewhere, in a Worker say, by its `handle`.
   *
   * It can be read and forked here, while its owner goes on; a fork belongs to whoever made it. `append`, `commit`,
   * `truncate` and `free` are the owner's, and so are zero-copy arrays: all of them are `unsupported`. Dropping it or the
   * end of `using` does nothing. The owner must outlive its use.
   *
   * @example A continuation in another thread, which would get the number in a message
   * ```ts
   * import assert from "node:assert/strict";
   * import { PagedCache, Sequence } from "@kvern/kvern";
   *
   * using cache = new PagedCache({ layerCount: 1, kvHeadCount: 2, headDim: 4, maxSeqLen: 1024 });
   * const rows = new Float32Array(3 * 8).fill(0.5);
   * const prompt = cache.sequence();
   * prompt.append(0, rows, rows);
   * prompt.commit(3);
   *
   * const attached = Sequence.attach(prompt.handle);
   * using continuation = attached.fork();
   * continuation.append(0, rows, rows);
   * continuation.commit(3);
   * assert.deepEqual([attached.seqLen, continuation.seqLen], [3, 6]);
   * ```
   *
   * @throws {KvError} `stale_handle` if there is no such sequence
   */
  static attach(handle: number): Sequence {
    checkCount("handle", handle);
    return new Sequence(attachSequence(handle));
  }

  /**
   * The number that opens this sequence elsewhere, see {@linkcode Sequence.attach}; 0 once freed.
   *
   * @throws {KvError} `unsupported` in a contiguous cache, which is attached as a whole
   */
  get handle(): number {
    return this.#paged("open a sequence elsewhere").handle;
  }

  /** Transformer layers. */
  get layerCount(): number {
    return this.#memory.cache.layerCount;
  }

  /** KV heads of layer 0. */
  get kvHeadCount(): number {
    return this.#memory.cache.shapeOf(0).kvHeadCount;
  }

  /** Elements of a head of layer 0. */
  get headDim(): number {
    return this.#memory.cache.shapeOf(0).headDim;
  }

  /** Elements of a row of layer 0. */
  get kvDim(): number {
    return this.#memory.cache.kvDimOf(0);
  }

  /** Most tokens the sequence can hold, evicted ones included. */
  get maxSeqLen(): number {
    return this.#memory.cache.maxSeqLen;
  }

  /**
   * Committed tokens.
   *
   * @throws {KvError} `stale_handle`
   */
  get seqLen(): number {
    const length = this.#library.kv_sequence_seq_len(this.#memory.handle, this.#memory.index);
    if (length < 0) throw refusal(length, "read the length of a sequence", this.#memory.cache.freedRule);
    return length;
  }

  /**
   * The smallest length such that `truncate` may go to it and to every one from it up to `seqLen`.
   *
   * 0 where no row was ever let go. Otherwise it is the greatest length so far less the cache's `rewindTokens`: a layer
   * that sees `w` rows then has `w + rewindTokens` in its blocks.
   *
   * @example Drafted tokens are rejected in a layer that sees 16 rows
   * ```ts
   * import assert from "node:assert/strict";
   * import { PagedCache } from "@kvern/kvern";
   *
   * using cache = new PagedCache({
   *   layerCount: 1, kvHeadCount: 1, headDim: 1, windowTokens: 16, maxSeqLen: 1024, blockSize: 4, rewindTokens: 5,
   * });
   * const sequence = cache.sequence();
   * sequence.append(0, new Float32Array(100), Float32Array.from({ length: 100 }, (_, i) => i));
   * sequence.commit(100);
   * assert.equal(sequence.rewindableTo, 95);
   * sequence.truncate(95);
   * sequence.append(0, Float32Array.of(0), Float32Array.of(95));
   * assert.equal(sequence.attend(0, Float32Array.of(1))[0], 87.5); // the mean of 80 to 95
   * ```
   *
   * @throws {KvError} `stale_handle`
   */
  get rewindableTo(): number {
    const length = this.#library.kv_sequence_rewindable_to(this.#memory.handle, this.#memory.index);
    if (length < 0) throw refusal(length, "read how far a sequence can be rewound", this.#memory.cache.freedRule);
    return length;
  }

  /**
   * True when every layer is on a GPU; no layer is yet, so it is false.
   *
   * @throws {KvError} `stale_handle`
   */
  get isOnGpu(): boolean {
    for (let layer = 0; layer < this.layerCount; layer++) {
      if (this.layerDevice(layer).device === "cpu") return false;
    }
    return true;
  }

  /**
   * The heads of a layer.
   *
   * @throws {KvError} `layer_out_of_range`
   */
  layerShape(layer: number): LayerShape {
    return layerShape(this.#memory.cache, layer);
  }

  /**
   * Writes `n` rows behind those layer `layer` has; they count after `commit`.
   *
   * @example Rows 2 and 3 of a tensor `[kv_head][4][head_dim]`, where they lie
   * ```ts
   * import assert from "node:assert/strict";
   * import { PagedCache } from "@kvern/kvern";
   *
   * const kvHeadCount = 2, headDim = 3, length = 4;
   * const headStride = length * headDim;
   * const tensor = Float32Array.from({ length: kvHeadCount * headStride }, (_, i) => i);
   * using cache = new PagedCache({ layerCount: 1, kvHeadCount, headDim, maxSeqLen: 64 });
   * const sequence = cache.sequence();
   * const rows = tensor.subarray(2 * headDim);
   * sequence.append(0, rows, rows, { layout: "head_major", headStride });
   * assert.deepEqual([...sequence.gather(0).k], [6, 7, 8, 18, 19, 20, 9, 10, 11, 21, 22, 23]);
   * ```
   *
   * @throws {KvError} as {@linkcode KvCache.append}; `pool_empty`, `out_of_memory` if there is no block for them
   */
  append(layer: number, k: Rows, v: Rows, options?: AppendOptions): AppendResult {
    const given = givenOptions(options, APPEND_NAMES, "append"); // first, as it may run the caller's code
    return appendRows(this.#memory, layer, k, v, given);
  }

  /**
   * Makes `n` rows count, hides what the cache's retention and windows no longer want, lets go what is too far back to be
   * rewound to, and lets blocks migrate that the tail has no room for. Where there is no memory for that they stay in the
   * tail, and the next commit tries again.
   *
   * @throws {KvError} `commit_mismatch`, `invalid_size` if there are not `n` tokens or `n` rows to keep, `stale_handle`
   */
  commit(n: number, options?: SequenceCommitOptions): void {
    commitRows(this.#memory, n, options);
  }

  /**
   * What a sequence of the same salt and fingerprint, made for these tokens, would start with, and why with no more.
   *
   * It tells a tenant nothing that depends on others: rows that had to go are `not_stored`.
   *
   * @throws {KvError} `cache_full` for more tokens than a sequence holds; `unsupported` in a contiguous cache, and in one
   * with a `pool`; `out_of_memory`, `stale_handle`
   */
  explain(tokens: Uint32Array): PrefixExplanation {
    checkWords("tokens", tokens);
    const memory = this.#memory;
    if (!isPaged(memory) || !memory.cache.findsTokens) {
      throw new KvError("unsupported", `Cannot ${EXPLAIN} as this cache does not find rows by their tokens`);
    }
    const record = newExplanation();
    const status = this.#library.kv_sequence_explain(
      memory.handle,
      tokens,
      lengthOf(tokens),
      record,
      record.byteLength,
    );
    if (status < 0) throw refusal(status, EXPLAIN, memory.cache.promptRules(tokens));
    return explanationOf(record);
  }

  /**
   * The first `kvLen` rows of a layer as one run, without a copy: for one block of one KV head or of one position.
   *
   * @throws {KvError} as {@linkcode KvCache.contiguousKv}
   */
  contiguousKv(layer: number, kvLen?: number): ContiguousKv {
    checkCount("layer", layer);
    if (kvLen !== undefined) checkCount("kvLen", kvLen);
    const memory = this.#memory;
    const rules = memory.rules(layer);
    const action = `read layer ${layer} as one run`;
    const rows = memory.rowCount(layer);
    if (rows < 0) throw refusal(rows, action, rules);
    const record = newRecord("view");
    const length = memory.contiguousKv(layer, kvLen ?? rows, record);
    if (length < 0) {
      throw refusal(length, action, {
        ...rules,
        position_out_of_range: () => `it has ${countText(rows, "row")}: kvLen is ${kvLen}`,
      });
    }
    const reason = nameOf("reason", record[VIEW.reason]!);
    if (reason !== "none") return { ok: false, reason };
    const k = memory.run(layer, "k", record, length);
    const v = memory.run(layer, "v", record, length);
    return { ok: true, k, v, length };
  }

  /**
   * Copies the rows of a layer that are seen, `[row][kv_head][head_dim]` by default.
   *
   * @example The first rows of a conversation as a `past_key_values` tensor, `[kv_head][row][head_dim]`
   * ```ts
   * import assert from "node:assert/strict";
   * import { PagedCache } from "@kvern/kvern";
   *
   * using cache = new PagedCache({ layerCount: 1, kvHeadCount: 2, headDim: 1, maxSeqLen: 64 });
   * const sequence = cache.sequence();
   * sequence.append(0, Float32Array.of(1, 10, 2, 20, 3, 30), new Float32Array(6)); // three rows of two heads
   * sequence.commit(3);
   * const { k } = sequence.gather(0, { layout: "head_major", start: 0, count: 2 });
   * assert.deepEqual([...k], [1, 2, 10, 20]);
   * ```
   *
   * @throws {KvError} as {@linkcode KvCache.gather}
   */
  gather(layer: number, options?: GatherOptions): GatheredRows {
    return gatherRows(this.#memory, layer, options);
  }

  /**
   * A window on each block of a layer that has rows, by ascending position.
   *
   * @throws {KvError} as {@linkcode KvCache.views}
   */
  views(layer: number): View[] {
    checkCount("layer", layer);
    return viewsOf(this.#memory, layer, this.#memory.windows(layer, 0));
  }

  /**
   * The blocks of a layer, head-major; all that have rows, or `null` where one of them is quantized.
   *
   * @throws {KvError} `layer_out_of_range`, `needs_permission`, `unsupported` on an attached cache, `stale_handle`
   */
  packedViews(layer: number): PackedView[] | null {
    checkCount("layer", layer);
    return packedViewsOf(this.#memory, layer);
  }

  /**
   * Rewinds to `n` committed tokens, drops all pending rows and gives back the blocks behind them.
   *
   * Every layer then shows the rows that retention and its window keep of `n`. No row is copied. Where the last one is in
   * a quantized block, the next append turns that block back into floats of the tail, where it stays for good, on top of
   * `tail.tokens`: no row is rounded twice, however often an answer is cut and written again.
   *
   * @throws {KvError} `position_out_of_range` past the end, and before `rewindableTo` unless `n` is at most the sinks that
   * retention keeps; `stale_handle`
   */
  truncate(n: number): void {
    checkCount("n", n);
    const memory = this.#memory;
    memory.checkOwn(`truncate to ${countText(n, "token")}`);
    const status = this.#library.kv_sequence_truncate(memory.handle, memory.index, n);
    if (status < 0) {
      throw refusal(status, `truncate to ${countText(n, "token")}`, {
        ...memory.cache.freedRule,
        position_out_of_range: () => {
          const length = this.seqLen;
          if (n > length) return `that is past the end: current length is ${length}`;
          return `rows there were evicted: rewindableTo is ${this.rewindableTo}, current length is ${length}`;
        },
      });
    }
    memory.settle();
  }

  /**
   * Where a layer lives.
   *
   * @throws {KvError} `layer_out_of_range`, `stale_handle`
   */
  layerDevice(layer: number): DevicePlacement {
    checkCount("layer", layer);
    const placement = this.#library.kv_sequence_layer_device(this.#memory.handle, this.#memory.index, layer);
    if (placement < 0) throw refusal(placement, `place layer ${layer}`, this.#memory.rules(layer));
    return placement === 0 ? { device: "cpu", gpu: -1 } : { device: "cuda", gpu: placement - 1 };
  }

  /**
   * Attends with `q` `[query][q_head][head_dim]` over the rows of a layer that are seen.
   *
   * @throws {KvError} as {@linkcode KvCache.attend}
   */
  attend(layer: number, q: Float32Array, options?: AttendOptions): Float32Array {
    const given = readAttend(givenOptions(options, ATTEND_NAMES, "attend")); // first, as it may run the caller's code
    const memory = this.#memory;
    const { cache } = memory;
    const { queryCount = 1 } = given;
    return attend(cache, layer, q, given, (buffers) => oneOf(memory, queryCount, buffers), () => ({
      ...memory.rules(layer),
      position_out_of_range: () => missingRowsText(memory.seen(layer), queryCount, cache.sightOf(layer, given)),
    }));
  }

  /**
   * A new sequence that begins as a copy of the committed rows: all blocks are shared, no row is copied.
   *
   * A shared block is copied at the first append into it, by whichever sequence comes first.
   *
   * @throws {KvError} `out_of_memory`, `stale_handle`; `unsupported` in a contiguous cache
   */
  fork(): Sequence {
    const memory = this.#paged("fork a sequence");
    return new Sequence(forkSequence(memory.cache, memory));
  }

  /**
   * The blocks of a layer's rows in order: the block of positions `i * blockSize` and on, -1 where none of them is seen.
   *
   * @throws {KvError} `layer_out_of_range`, `stale_handle`; `unsupported` in a contiguous cache
   */
  blockTable(layer: number): Int32Array {
    checkCount("layer", layer);
    return this.#paged("read the blocks of a sequence").blocks(layer, "kv_sequence_block_table");
  }

  /**
   * How many sequences have each of the blocks of `blockTable`, to see or to be rewound to, and one more where a whole block
   * is known by its tokens; 0 where none of its rows is seen.
   *
   * @throws {KvError} `layer_out_of_range`, `stale_handle`; `unsupported` in a contiguous cache
   */
  blockReferences(layer: number): Int32Array {
    checkCount("layer", layer);
    return this.#paged("read the blocks of a sequence").blocks(layer, "kv_sequence_block_references");
  }

  /**
   * Where each of the blocks of `blockTable` is; `null` where none of its rows is seen.
   *
   * @throws {KvError} `layer_out_of_range`, `stale_handle`; `unsupported` in a contiguous cache
   */
  blockTiers(layer: number): (Tier | null)[] {
    checkCount("layer", layer);
    const tiers = this.#paged("read the blocks of a sequence").blocks(layer, "kv_sequence_block_tiers");
    return Array.from(tiers, (tier) => tier < 0 ? null : nameOf("tier", tier));
  }

  /**
   * Rows of a layer that are seen, committed and pending.
   *
   * @throws {KvError} `layer_out_of_range`, `stale_handle`
   */
  residentTokens(layer: number = 0): number {
    checkCount("layer", layer);
    const rows = this.#memory.residentCount(layer);
    if (rows < 0) throw refusal(rows, `count the rows of layer ${layer}`, this.#memory.rules(layer));
    return rows;
  }

  /**
   * Gives all blocks back and detaches the arrays handed out; harmless when repeated, later calls are refused.
   *
   * @throws {KvError} `unsupported` on an attached sequence
   */
  free(): void {
    this.#memory.checkOwn("free a sequence");
    this.#memory.free();
  }

  /** The same as `free`, for `using`; does nothing on an attached sequence. */
  [Symbol.dispose](): void {
    if (!this.#memory.isAttached) this.free();
  }

  get #library(): Library {
    return this.#memory.cache.library;
  }

  /** What only a sequence of a paged cache has, or the refusal of an action. */
  #paged(action: string): PagedSequence {
    const memory = this.#memory;
    if (isPaged(memory)) return memory;
    throw new KvError("unsupported", `Cannot ${action} as it is one of a contiguous cache: a PagedCache has such`);
  }
}

/** The shape of a layer. */
export function layerShape(cache: CacheMemory, layer: number): LayerShape {
  checkCount("layer", layer);
  if (layer < cache.layerCount) return cache.shapeOf(layer);
  throw new KvError("layer_out_of_range", `Cannot read a shape as ${cache.indexRules(layer).layer_out_of_range()}`);
}
