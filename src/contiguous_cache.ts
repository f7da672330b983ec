/**
 * The contiguous cache: every sequence has room for `maxSeqLen` rows in every layer, in one piece.
 *
 * Layout of keys and of values, outermost first:
 * `[layer][sequence][position][kv_head][head_dim]`, so that
 * `offset(l, s, p, h, d) = (((l * sequences + s) * maxSeqLen + p) * kvHeads + h) * headDim + d`.
 *
 * Memory is reserved when the cache is made and used as rows arrive.
 *
 * @module
 */

import type { AppendResult, KvCache } from "./cache.ts";
import { library } from "./ffi/library.ts";
import { newRecord, recordOf, valuesOf } from "./ffi/record.ts";
import { countText, refusal } from "./ffi/status.ts";
import { appendRows, writeRefusal } from "./memory/append.ts";
import { attachContiguous, ContiguousMemory, createContiguous } from "./memory/contiguous.ts";
import { showAs } from "./memory/inspect.ts";
import type { Side } from "./memory/view.ts";
import { APPEND_NAMES, type AppendOptions, STORE_NAMES, type StoreOptions } from "./options/append.ts";
import { bytesText, type ContiguousCacheOptions, contiguousValues } from "./options/contiguous.ts";
import { checkCount } from "./options/counts.ts";
import type { FloatDType } from "./options/dtype.ts";
import { givenOptions } from "./options/option_names.ts";
import { inputCount, inputDtype, type Rows } from "./options/rows.ts";
import { createSequence, memoryOf, type Sequence } from "./sequence.ts";

/** Where the bytes of a contiguous cache are. */
export interface ContiguousStats {
  /** Sequences. */
  readonly sequenceCount: number;
  /** Bytes of K and V by the formula of {@linkcode memoryBytes}. */
  readonly kvBytes: number;
  /** Bytes reserved for K and V, whole memory pages. */
  readonly reservedBytes: number;
  /** Bytes of lengths and bookkeeping. */
  readonly metadataBytes: number;
  /** `reservedBytes - kvBytes`. */
  readonly paddingBytes: number;
  /** Pieces the reservation consists of. */
  readonly slabCount: number;
}

/**
 * Bytes of K and V a cache of these options holds: `2 * layers * sequences * rows * kv heads * headDim * bytes`.
 *
 * Exact, whether or not this machine could hold it; nothing is allocated. K and V count apart when their
 * dtypes differ.
 *
 * @example GPT-2 small at 2048 tokens: 2 * 12 * 2048 * 12 * 64 * 4 B = 144 MiB
 * ```ts
 * import assert from "node:assert/strict";
 * import { memoryBytes } from "@kvern/kvern";
 *
 * const bytes = memoryBytes({ layerCount: 12, kvHeadCount: 12, headDim: 64, maxSeqLen: 2048 });
 * assert.equal(bytes, 144 * 2 ** 20);
 * ```
 *
 * @throws {TypeError} an option of the wrong type
 * @throws {RangeError} an option that is no count
 * @throws {KvError} `invalid_config` for an option out of its range; `out_of_memory` past 2^53 bytes;
 * `library_unavailable`, `needs_permission`
 */
export function memoryBytes(options: ContiguousCacheOptions): number {
  const action = "plan a cache";
  const values = contiguousValues(options, action);
  const record = recordOf("contiguous", values);
  const bytes = new Float64Array(1);
  const status = library().kv_memory_bytes(record, record.byteLength, bytes, bytes.length);
  if (status < 0) {
    throw refusal(status, action, {
      out_of_memory: () => `a number of bytes is exact up to 2^53: K and V need ${bytesText(values)} bytes`,
    });
  }
  return bytes[0]!;
}

/** The memory of a cache that was made elsewhere, by the options that describe it: how `attach` tells the constructor. */
const attached = new WeakMap<ContiguousCacheOptions, ContiguousMemory>();

/**
 * Keys and values of all layers for a fixed number of sequences of a fixed greatest length.
 *
 * Either token by token, `store` in each layer and then `advance`, or through `sequence(i)`, which appends any number of
 * rows and attends. Free it with `using` or `free`; a dropped one is freed at some garbage collection, and one that a
 * Worker made and left behind when it ended, not before the process ends.
 *
 * @example One token in two layers
 * ```ts
 * import assert from "node:assert/strict";
 * import { ContiguousCache } from "@kvern/kvern";
 *
 * using cache = new ContiguousCache({ layerCount: 2, kvHeadCount: 4, headDim: 8, maxSeqLen: 10 });
 * const row = new Float32Array(4 * 8).fill(0.5);
 * cache.store(0, 0, row, row);
 * cache.store(1, 0, row, row);
 * cache.advance();
 * assert.equal(cache.currentPos, 1);
 * assert.equal(cache.memoryBytes, 2 * 2 * 10 * 4 * 8 * 4 + 4);
 * ```
 */
export class ContiguousCache {
  readonly #memory: ContiguousMemory;
  /** The objects by index, those that were freed since among them. */
  readonly #sequences: Map<number, Sequence> = new Map();

  static {
    showAs(ContiguousCache, (cache) => {
      const { handle, layerCount, sequenceCount, kvHeadCount, headDim, maxSeqLen, dtypeK, dtypeV } = cache;
      if (handle === 0) return undefined;
      const shape = { layerCount, sequenceCount, kvHeadCount, headDim, maxSeqLen, dtypeK, dtypeV };
      return {
        ...shape,
        ...(sequenceCount === 1 ? { seqLen: cache.getSeqLen() } : {}),
        memoryBytes: cache.memoryBytes,
      };
    });
  }

  /**
   * Reserves the memory for all rows; pages are used as rows arrive.
   *
   * @throws {TypeError} an option of the wrong type
   * @throws {RangeError} an option that is no count
   * @throws {KvError} `invalid_config`; `out_of_memory` past the limit; `library_unavailable`, `needs_permission`
   */
  constructor(options: ContiguousCacheOptions) {
    this.#memory = attached.get(options) ?? createContiguous(options);
  }

  /**
   * Opens a cache that was made elsewhere, in a Worker say, by its `handle`.
   *
   * The attached cache owns nothing: dropping or freeing it frees nothing, and zero-copy arrays are refused with
   * `unsupported`, because its owner could not detach them. The owner must outlive its use.
   *
   * @throws {KvError} `stale_handle` if there is no such cache
   */
  static attach(handle: number): ContiguousCache {
    checkCount("handle", handle);
    const memory = attachContiguous(handle);
    const { layerCount, maxSeqLen } = memory;
    const { kvHeadCount, headDim } = memory.shapeOf(0);
    const options = { layerCount, kvHeadCount, headDim, maxSeqLen };
    attached.set(options, memory);
    return new ContiguousCache(options);
  }

  /** The number that opens this cache elsewhere, see {@linkcode ContiguousCache.attach}; 0 once freed. */
  get handle(): number {
    return this.#memory.handle;
  }

  /** Transformer layers. */
  get layerCount(): number {
    return this.#memory.layerCount;
  }

  /** KV heads of a layer. */
  get kvHeadCount(): number {
    return this.#memory.shapeOf(0).kvHeadCount;
  }

  /** Elements of a head. */
  get headDim(): number {
    return this.#memory.shapeOf(0).headDim;
  }

  /** Query heads that `attend` wants; undefined where the length of the queries tells. */
  get qHeadCount(): number | undefined {
    return this.#memory.shapeOf(0).qHeadCount;
  }

  /** Elements of a row: `kvHeadCount * headDim`. */
  get kvDim(): number {
    return this.#memory.kvDimOf(0);
  }

  /** Rows each sequence can hold. */
  get maxSeqLen(): number {
    return this.#memory.maxSeqLen;
  }

  /** Sequences. */
  get sequenceCount(): number {
    return this.#memory.sequenceCount;
  }

  /** How keys are stored. */
  get dtypeK(): FloatDType {
    return this.#memory.dtype.k;
  }

  /** How values are stored. */
  get dtypeV(): FloatDType {
    return this.#memory.dtype.v;
  }

  /**
   * Writes one row of one layer, to count at the next `advance`; a second one before that is refused.
   *
   * `k` and `v` are `[kv_head][head_dim]`.
   *
   * @throws {KvError} in this order: `layer_out_of_range`, `sequence_out_of_range`, `cache_full`, `invalid_size`,
   * `commit_mismatch`, `not_finite`; `invalid_config`, `stale_handle`
   */
  store(layer: number, sequence: number, k: Rows, v: Rows, options?: StoreOptions): void {
    const { dtype } = givenOptions(options, STORE_NAMES, "store"); // first, as it may run the caller's code
    checkCount("layer", layer);
    checkCount("sequence", sequence);
    const inputCode = inputDtype(k, v, dtype);
    const kCount = inputCount("k", k, "store");
    const vCount = inputCount("v", v, "store");
    const { library, handle } = this.#memory;
    const status = library.kv_contiguous_store(handle, layer, sequence, k, kCount, v, vCount, inputCode);
    if (status < 0) throw writeRefusal(status, this.#memory.sequence(sequence), "store", layer, { k, v, dtype });
  }

  /**
   * Commits one row for every sequence that has exactly one pending in every layer; sequences without a new row stay.
   *
   * When a sequence just committed is full now, this throws `cache_full` after committing: the row counts. From then
   * on `store` and `advance` give `cache_full` until `truncate` or `reset`.
   *
   * @throws {KvError} `commit_mismatch` if other rows or none are pending; `cache_full`, `stale_handle`
   */
  advance(): void {
    const status = this.#memory.library.kv_contiguous_advance(this.#memory.handle);
    if (status < 0) {
      throw refusal(status, "advance", {
        ...this.#memory.freedRule,
        cache_full: () => `a sequence holds all its ${this.maxSeqLen} rows now: truncate or reset makes room`,
        commit_mismatch: () => "a sequence needs one row pending in every layer or none, and one of them a new row",
      });
    }
  }

  /**
   * Writes `n = k.length / kvDim` rows of one layer and one sequence; the same as `sequence(sequence).append`.
   *
   * `k` and `v` are `[n][kv_head][head_dim]`; the rows count after `sequence(sequence).commit(n)`.
   *
   * @throws {KvError} `layer_out_of_range`, `sequence_out_of_range`, `cache_full`, `invalid_size`, `not_finite`,
   * `invalid_config`, `stale_handle`
   */
  append(layer: number, sequence: number, k: Rows, v: Rows, options?: AppendOptions): AppendResult {
    const given = givenOptions(options, APPEND_NAMES, "append"); // first, as it may run the caller's code
    checkCount("layer", layer); // before the sequence
    checkCount("sequence", sequence);
    return appendRows(this.#memory.sequence(sequence), layer, k, v, given);
  }

  /**
   * One sequence as a {@linkcode KvCache}: the same object until it is freed.
   *
   * Freeing it empties the sequence, detaches the arrays over it, and leaves the cache as it is.
   *
   * @throws {KvError} `sequence_out_of_range`, `stale_handle`
   */
  sequence(index: number): KvCache {
    this.getSeqLen(index);
    const memory = this.#memory.sequence(index);
    const known = this.#sequences.get(index);
    if (known !== undefined && memoryOf(known) === memory) return known;
    const sequence = createSequence(memory);
    this.#sequences.set(index, sequence);
    return sequence;
  }

  /**
   * The keys of one layer of one sequence without a copy, `[row][kv_head][head_dim]`: committed and pending rows. A cache
   * of one sequence does not need it named.
   *
   * f16 and bf16 come as their bits. The array has length 0 once its sequence or the cache is freed. Do not transfer its
   * buffer at full size: the cache cannot detach the new one.
   *
   * @throws {TypeError} no `sequence` where there are several
   * @throws {KvError} `layer_out_of_range`, `sequence_out_of_range`, `needs_permission` in Deno with a path-scoped
   * `--allow-ffi`, `unsupported` on an attached cache or for more than 4 GiB in Bun, `stale_handle`
   */
  getKeys(layer: number, sequence?: number): Float32Array | Uint16Array {
    return this.#side("k", layer, this.#only(sequence, "keys"));
  }

  /**
   * The values of one layer of one sequence, in every way like the keys.
   *
   * @throws {KvError} as {@linkcode ContiguousCache.getKeys}
   */
  getValues(layer: number, sequence?: number): Float32Array | Uint16Array {
    return this.#side("v", layer, this.#only(sequence, "values"));
  }

  /**
   * Committed rows of one sequence; a cache of one does not need it named.
   *
   * @throws {TypeError} no `sequence` where there are several
   * @throws {KvError} `sequence_out_of_range`, `stale_handle`
   */
  getSeqLen(sequence?: number): number {
    const index = this.#only(sequence, "the length");
    checkCount("sequence", index);
    const length = this.#memory.library.kv_sequence_seq_len(this.#memory.handle, index);
    if (length < 0) throw refusal(length, `read sequence ${index}`, this.#memory.indexRules(0, index));
    return length;
  }

  /**
   * The longest committed length of all sequences.
   *
   * @throws {KvError} `stale_handle`
   */
  get currentPos(): number {
    let longest = 0;
    for (let sequence = 0; sequence < this.sequenceCount; sequence++) {
      longest = Math.max(longest, this.getSeqLen(sequence));
    }
    return longest;
  }

  /**
   * Bytes of K and V by the formula, and 4 more for the length of each sequence.
   *
   * @throws {KvError} `stale_handle`
   */
  get memoryBytes(): number {
    const bytes = new Float64Array(1);
    const status = this.#memory.library.kv_contiguous_memory_bytes(this.#memory.handle, bytes, bytes.length);
    if (status < 0) throw refusal(status, "count the bytes of a cache", this.#memory.freedRule);
    return bytes[0]!;
  }

  /**
   * Where the bytes are: formula, reservation, bookkeeping, padding.
   *
   * @throws {KvError} `stale_handle`
   */
  stats(): ContiguousStats {
    const record = newRecord("contiguousStats");
    const status = this.#memory.library.kv_contiguous_stats(this.#memory.handle, record, record.byteLength);
    if (status < 0) throw refusal(status, "count the bytes of a cache", this.#memory.freedRule);
    return valuesOf("contiguousStats", record);
  }

  /**
   * The element offset of one number in the logical array of all keys, or of all values.
   *
   * Logical, because several slabs may hold it; the positions of one layer and sequence are in one of them.
   *
   * @throws {KvError} `layer_out_of_range`, `sequence_out_of_range`, `position_out_of_range`, also for a head or element
   * past those of a row, `stale_handle`
   */
  offset(layer: number, sequence: number, position: number, kvHead: number, dim: number): number {
    checkCount("layer", layer);
    checkCount("sequence", sequence);
    checkCount("position", position);
    checkCount("kvHead", kvHead);
    checkCount("dim", dim);
    const offset = new Float64Array(1);
    const { library, handle } = this.#memory;
    const status = library.kv_contiguous_offset(handle, layer, sequence, position, kvHead, dim, offset, offset.length);
    if (status < 0) {
      throw refusal(status, "compute an offset", {
        ...this.#memory.indexRules(layer, sequence),
        position_out_of_range: () =>
          `a sequence is [${this.maxSeqLen}][${this.kvHeadCount}][${this.headDim}]: ` +
          `asked for [${position}][${kvHead}][${dim}]`,
      });
    }
    return offset[0]!;
  }

  /**
   * Sets all lengths to 0 and drops pending rows; no K or V byte is touched, old rows are never visible again.
   *
   * @throws {KvError} `stale_handle`
   */
  reset(): void {
    const status = this.#memory.library.kv_contiguous_reset(this.#memory.handle);
    if (status < 0) throw refusal(status, "reset a cache", this.#memory.freedRule);
  }

  /** Detaches every array handed out and gives the memory back; harmless when repeated, later calls are refused. */
  free(): void {
    this.#memory.free();
  }

  /** The same as `free`, for `using`. */
  [Symbol.dispose](): void {
    this.free();
  }

  /** The sequence that was named, or the only one there is. */
  #only(sequence: number | undefined, what: string): number {
    if (sequence !== undefined) return sequence;
    if (this.sequenceCount === 1) return 0;
    const count = countText(this.sequenceCount, "sequence");
    throw new TypeError(
      `Cannot read ${what} as the sequence must be named where a cache has ${count}: it is undefined`,
    );
  }

  #side(side: Side, layer: number, sequence: number): Float32Array | Uint16Array {
    checkCount("layer", layer);
    checkCount("sequence", sequence);
    return this.#memory.sequence(sequence).allRows(layer, side);
  }
}
