/**
 * One sequence of a paged cache: a table of blocks that it may share with others.
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
import { newRecord, VIEW } from "./ffi/record.ts";
import { countText, refusal } from "./ffi/status.ts";
import { gatherRows, type GatherSource } from "./memory/gather.ts";
import { showAs } from "./memory/inspect.ts";
import { packedViewsOf } from "./memory/packed_view.ts";
import type { PagedMemory } from "./memory/paged.ts";
import { attachSequence, forkSequence, newSequence, SequenceMemory } from "./memory/sequence.ts";
import { Appended, tierOf, viewsOf } from "./memory/view.ts";
import { APPEND_NAMES, type AppendOptions } from "./options/append.ts";
import {
  ATTEND_NAMES,
  type AttendOptions,
  attendRefusal,
  givenCount,
  lseCount,
  NO_FLOATS,
  NO_PARENTS,
  readAttend,
  writeAttend,
} from "./options/attend.ts";
import {
  checkTokens,
  checkWords,
  pendingText,
  SEQUENCE_COMMIT_NAMES,
  type SequenceCommitOptions,
} from "./options/commit.ts";
import { checkCount } from "./options/counts.ts";
import type { GatherOptions } from "./options/gather.ts";
import { type AppendedRows, rowsRule } from "./options/not_finite.ts";
import { givenOptions } from "./options/option_names.ts";
import type { LayerShape } from "./options/paged.ts";
import { missingRowsText } from "./options/retention.ts";
import { inputCount, inputDtype, layoutCode, outputCount, type Rows } from "./options/rows.ts";
import { lengthOf } from "./options/typed_array.ts";

/** Why there is no run, by its number in the ABI. */
const REASONS = [undefined, "head_major", "not_adjacent", "quantized", "evicted", "on_gpu"] as const;

/** Makes an empty sequence. */
export let createSequence: (cache: PagedMemory) => Sequence;

/** The native sequence of a `Sequence`; throws TypeError for anything else. */
export let memoryOf: (sequence: Sequence) => SequenceMemory;

/**
 * One token stream in a {@linkcode PagedCache}, made by its `sequence` or by `fork`.
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
    showAs(Sequence, (sequence) => {
      if (sequence.#memory.handle === 0) return undefined;
      const { seqLen, maxSeqLen, layerCount, kvHeadCount, headDim } = sequence;
      return { seqLen, residentTokens: sequence.residentTokens(), maxSeqLen, layerCount, kvHeadCount, headDim };
    });
    createSequence = (cache) => new Sequence(newSequence(cache));
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

  /** The number that opens this sequence elsewhere, see {@linkcode Sequence.attach}; 0 once freed. */
  get handle(): number {
    return this.#memory.handle;
  }

  /** Transformer layers. */
  get layerCount(): number {
    return this.#memory.cache.layers.length;
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
    const length = this.#library.kv_sequence_seq_len(this.#memory.handle);
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
    const length = this.#library.kv_sequence_rewindable_to(this.#memory.handle);
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
   * @throws {KvError} as {@linkcode KvCache.append}; `pool_empty`, `out_of_memory` if there is no block for them
   */
  append(layer: number, k: Rows, v: Rows, options?: AppendOptions): AppendResult {
    const { dtype, layout } = givenOptions(options, APPEND_NAMES, "append"); // first, as it may run the caller's code
    checkCount("layer", layer);
    const inputCode = inputDtype(k, v, dtype);
    const order = layoutCode(layout);
    const kCount = inputCount("k", k, "append");
    const vCount = inputCount("v", v, "append");
    const memory = this.#memory;
    memory.checkOwn("append");
    const start = this.#library.kv_sequence_append(memory.handle, layer, k, kCount, v, vCount, inputCode, order);
    if (start < 0) throw this.#appendRefusal(start, layer, { k, v, dtype, layout });
    memory.settle(start);
    return new Appended(memory, layer, start, kCount / memory.cache.kvDimOf(layer));
  }

  /**
   * Makes `n` rows count, hides what the cache's retention and windows no longer want, lets go what is too far back to be
   * rewound to, and lets blocks migrate that the tail has no room for. Where there is no memory for that they stay in the
   * tail, and the next commit tries again.
   *
   * @throws {KvError} `commit_mismatch`, `invalid_size` if there are not `n` tokens or `n` rows to keep, `stale_handle`
   */
  commit(n: number, options?: SequenceCommitOptions): void {
    const { tokens, kept } = givenOptions(options, SEQUENCE_COMMIT_NAMES, "commit"); // first, as it may run the caller's code
    checkCount("n", n);
    checkTokens(tokens, n);
    const memory = this.#memory;
    const library = this.#library;
    const action = `commit ${countText(n, "token")}`;
    memory.checkOwn(action);
    let status: number;
    if (kept === undefined) {
      status = library.kv_sequence_commit(memory.handle, n);
    } else {
      checkWords("kept", kept);
      const count = lengthOf(kept);
      if (count !== n) throw new KvError("invalid_size", `Cannot ${action} as kept must have as many rows: ${count}`);
      status = library.kv_sequence_commit_kept(memory.handle, kept, count);
    }
    if (status < 0) {
      const rule = kept === undefined ? "have exactly that many rows pending" : "have equally many rows pending";
      throw refusal(status, action, {
        ...memory.cache.freedRule,
        commit_mismatch: () => `every layer must ${rule}: ${this.#pendingText()}`,
        invalid_size: () => `kept must have indices of pending rows, ascending: ${this.#pendingText()}`,
      });
    }
    memory.settle();
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
    const rules = memory.cache.layerRules(layer);
    const action = `read layer ${layer} as one run`;
    const rows = memory.rowCount(layer);
    if (rows < 0) throw refusal(rows, action, rules);
    const record = newRecord("view");
    const length = this.#library.kv_sequence_contiguous_kv(
      memory.handle,
      layer,
      kvLen ?? rows,
      record,
      record.byteLength,
    );
    if (length < 0) {
      throw refusal(length, action, {
        ...rules,
        position_out_of_range: () => `it has ${countText(rows, "row")}: kvLen is ${kvLen}`,
      });
    }
    const reason = REASONS[record[VIEW.reason]!];
    if (reason !== undefined) return { ok: false, reason };
    const k = memory.run(layer, "k", record, length);
    const v = memory.run(layer, "v", record, length);
    return { ok: true, k, v, length };
  }

  /**
   * Copies the rows of a layer that are seen, `[row][kv_head][head_dim]`.
   *
   * @throws {KvError} as {@linkcode KvCache.gather}
   */
  gather(layer: number, options?: GatherOptions): GatheredRows {
    return gatherRows(this.#copies, layer, options);
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
    const status = this.#library.kv_sequence_truncate(memory.handle, n);
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
    const placement = this.#library.kv_sequence_layer_device(this.#memory.handle, layer);
    if (placement < 0) throw refusal(placement, `place layer ${layer}`, this.#memory.cache.layerRules(layer));
    return placement === 0 ? { device: "cpu", gpu: -1 } : { device: "cuda", gpu: placement - 1 };
  }

  /**
   * Attends with `q` `[query][q_head][head_dim]` over the rows of a layer that are seen.
   *
   * @throws {KvError} as {@linkcode KvCache.attend}
   */
  attend(layer: number, q: Float32Array, options?: AttendOptions): Float32Array {
    const given = readAttend(givenOptions(options, ATTEND_NAMES, "attend")); // first, as it may run the caller's code
    checkCount("layer", layer);
    const { cache, handle } = this.#memory;
    const record = cache.attendRecord;
    writeAttend(record, q, given);
    const { alibiSlopes = NO_FLOATS, sinkLogits = NO_FLOATS, treeParents = NO_PARENTS, lse = NO_FLOATS } = given;
    const qCount = inputCount("q", q, "attend");
    const output = given.into ?? new Float32Array(qCount);
    const status = cache.library.kv_sequence_attend(
      handle,
      layer,
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
      const { queryCount = 1 } = given;
      throw attendRefusal(status, layer, q, given, queryCount, cache.shapeOf(layer), {
        ...cache.layerRules(layer),
        position_out_of_range: () => missingRowsText(this.#memory.seen(layer), queryCount, cache.sightOf(layer, given)),
      });
    }
    return output;
  }

  /**
   * A new sequence that begins as a copy of the committed rows: all blocks are shared, no row is copied.
   *
   * A shared block is copied at the first append into it, by whichever sequence comes first.
   *
   * @throws {KvError} `out_of_memory`, `stale_handle`
   */
  fork(): Sequence {
    return new Sequence(forkSequence(this.#memory));
  }

  /**
   * The blocks of a layer's rows in order: the block of positions `i * blockSize` and on, -1 where none of them is seen.
   *
   * @throws {KvError} `layer_out_of_range`, `stale_handle`
   */
  blockTable(layer: number): Int32Array {
    checkCount("layer", layer);
    return this.#memory.blocks(layer, "kv_sequence_block_table");
  }

  /**
   * How many sequences have each of the blocks of `blockTable`, to see or to be rewound to; 0 where none of its rows is
   * seen.
   *
   * @throws {KvError} `layer_out_of_range`, `stale_handle`
   */
  blockReferences(layer: number): Int32Array {
    checkCount("layer", layer);
    return this.#memory.blocks(layer, "kv_sequence_block_references");
  }

  /**
   * Where each of the blocks of `blockTable` is; `null` where none of its rows is seen.
   *
   * @throws {KvError} `layer_out_of_range`, `stale_handle`
   */
  blockTiers(layer: number): (Tier | null)[] {
    checkCount("layer", layer);
    const tiers = this.#memory.blocks(layer, "kv_sequence_block_tiers");
    return Array.from(tiers, (tier) => tier < 0 ? null : tierOf(tier));
  }

  /**
   * Rows of a layer that are seen, committed and pending.
   *
   * @throws {KvError} `layer_out_of_range`, `stale_handle`
   */
  residentTokens(layer: number = 0): number {
    checkCount("layer", layer);
    const rows = this.#library.kv_sequence_resident_count(this.#memory.handle, layer);
    if (rows < 0) throw refusal(rows, `count the rows of layer ${layer}`, this.#memory.cache.layerRules(layer));
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

  get #library(): PagedMemory["library"] {
    return this.#memory.cache.library;
  }

  /** The sequence, as a copy sees it; an option may yet free it, so the handle is asked for at each call. */
  get #copies(): GatherSource {
    const memory = this.#memory;
    const { cache } = memory;
    const { library } = cache;
    return {
      residentCount: (layer) => library.kv_sequence_resident_count(memory.handle, layer),
      kvDimOf: (layer) => cache.kvDimOf(layer),
      copyRows: (layer, ...args) => library.kv_sequence_gather(memory.handle, layer, ...args),
      rangeRules: (layer) => cache.layerRules(layer),
    };
  }

  #pendingText(): string {
    const length = this.seqLen;
    return pendingText(this.layerCount, (layer) => this.#memory.rowCount(layer) - length);
  }

  #appendRefusal(status: number, layer: number, rows: AppendedRows): KvError {
    const { cache } = this.#memory;
    const kCount = lengthOf(rows.k), vCount = lengthOf(rows.v);
    const n = Math.ceil(kCount / cache.kvDimOf(layer));
    return refusal(status, `append ${countText(n, "token")} to layer ${layer}`, {
      ...cache.layerRules(layer),
      cache_full: () =>
        `the sequence holds at most ${cache.maxSeqLen}: current length is ${this.#memory.rowCount(layer)}`,
      invalid_size: () =>
        `k and v must be equally long, a multiple of ${
          cache.kvDimOf(layer)
        } elements: k has ${kCount}, v has ${vCount}`,
      not_finite: () => rowsRule(rows, cache.shapeOf(layer), cache.storedAs(layer)),
      pool_empty: () => POOL_EMPTY,
    });
  }
}

/** The rule about blocks, the same for every append. */
export const POOL_EMPTY = "no block is free and the byte limit of the pool would be passed";

/** The shape of a layer. */
export function layerShape(cache: PagedMemory, layer: number): LayerShape {
  checkCount("layer", layer);
  const shape = cache.layers[layer];
  if (shape !== undefined) return shape;
  throw new KvError("layer_out_of_range", `Cannot read a shape as ${cache.layerRules(layer).layer_out_of_range()}`);
}
