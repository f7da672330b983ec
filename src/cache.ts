/**
 * The verbs every cache shares: one sequence of tokens, whatever layout is behind it.
 *
 * A step has two phases. Each layer appends its new rows, and reads of that layer see them at once; when every layer
 * has, `commit` makes them count. A refused call changes nothing.
 *
 * @module
 */

import type { AppendOptions } from "./options/append.ts";
import type { AttendOptions } from "./options/attend.ts";
import type { CommitOptions } from "./options/commit.ts";
import type { DType, FloatDType } from "./options/dtype.ts";
import type { GatherOptions } from "./options/gather.ts";
import type { Rows } from "./options/rows.ts";

/** Where appended rows went. */
export interface AppendResult {
  /** Position of the first appended row. */
  readonly start: number;
  /**
   * Views of the appended rows, made on first read: appending alone needs no permission for views.
   *
   * @throws {KvError} `needs_permission` in Deno with a path-scoped `--allow-ffi`; `unsupported` on an attached cache
   */
  readonly views: View[];
}

/** A copy of rows, in the layout that was asked for: f32, or the bits of f16 or bf16, or the arrays of `into`. */
export interface GatheredRows {
  /** Keys. */
  readonly k: Rows;
  /** Values. */
  readonly v: Rows;
}

/** Where a layer lives. */
export interface DevicePlacement {
  /** The kind of device; no call gives `"cuda"` yet. */
  readonly device: "cpu" | "cuda";
  /** The ordinal of the GPU, -1 on the CPU; no call gives another yet. */
  readonly gpu: number;
}

/**
 * Where a block is: in the `"tail"`, in floats; in the `"store"`, after it left the tail; or left the tail under an
 * earlier policy, in the format that one said: `"warm"`.
 */
export type Tier = "tail" | "store" | "warm";

/**
 * A window on rows in the cache's own memory: element `d` of KV head `h` of row `t` is
 * `k[t * tokenStride + h * headStride + d]`.
 *
 * Where a side of a block is quantized, both strides are 0 and both sides are that of the whole block: the bytes of the
 * codes and scales of all KV heads, or `[kv_head][block_size][head_dim]` for a side in floats. The rows of the view are
 * then those from number `start % blockSize` on.
 *
 * A view is valid until the next append to its layer, a commit that lets blocks go or migrate, and truncate, reset or
 * free of its sequence; each property read checks that and throws a KvError `stale_view` after it. An array taken out of
 * a view is not guarded: it goes on showing the cache's memory, and has length 0 once its block or its sequence is let
 * go. Do not transfer its buffer at full size: the cache cannot detach the new one.
 */
export interface View extends DevicePlacement {
  /** Keys of the rows, bytes where they are quantized; `null` outside host memory, which no call gives yet. */
  readonly k: Float32Array | Uint16Array | Uint8Array | null;
  /** Values of the rows, bytes where they are quantized; `null` outside host memory, which no call gives yet. */
  readonly v: Float32Array | Uint16Array | Uint8Array | null;
  /** Absolute position of the first row. */
  readonly start: number;
  /** Rows in the view. */
  readonly length: number;
  /** How keys are stored. */
  readonly dtypeK: DType;
  /** How values are stored. */
  readonly dtypeV: DType;
  /** Elements from one row to the next; 0 where a side is quantized. */
  readonly tokenStride: number;
  /** Elements from one KV head to the next; 0 where a side is quantized. */
  readonly headStride: number;
  /** Where the block is; `"tail"` in a contiguous cache. */
  readonly tier: Tier;
  /** Positions these rows were shifted by; no call shifts rows yet, so it is 0. */
  readonly delta: number;
}

/**
 * One block, head-major: element `d` of KV head `h` of row `t` is `k[(h * blockSize + t) * headDim + d]`.
 *
 * Valid as long as a {@linkcode View}, and as that one checked at each property read.
 */
export interface PackedView {
  /** Keys `[kv_head][block_size][head_dim]`; rows from `length` on are undefined. */
  readonly k: Float32Array | Uint16Array;
  /** Values `[kv_head][block_size][head_dim]`; rows from `length` on are undefined. */
  readonly v: Float32Array | Uint16Array;
  /** Absolute position of the first row. */
  readonly start: number;
  /** Valid rows, 1 to `blockSize`. */
  readonly length: number;
  /** Rows the block can hold, and so the head stride in rows. */
  readonly blockSize: number;
  /** Elements of a head. */
  readonly headDim: number;
  /** KV heads. */
  readonly kvHeadCount: number;
  /** How keys are stored, and values where `dtypeV` says no other. */
  readonly dtype: FloatDType;
  /** How values are stored. */
  readonly dtypeV: FloatDType;
}

/** The rows of a layer as one run `[row][kv_head][head_dim]`. */
export interface ContiguousRun {
  /** There is such a run. */
  readonly ok: true;
  /** Keys, zero copy. */
  readonly k: Float32Array | Uint16Array;
  /** Values, zero copy. */
  readonly v: Float32Array | Uint16Array;
  /** Rows in the run. */
  readonly length: number;
}

/** Why the rows of a layer are not one run `[row][kv_head][head_dim]`. */
export interface NoContiguousRun {
  /** There is no such run. */
  readonly ok: false;
  /**
   * What stands in the way; `gather` and `attend` work all the same.
   *
   * - `head_major`: blocks of several KV heads and several positions.
   * - `not_adjacent`: blocks that do not follow each other in memory, or that differ in format.
   * - `quantized`: rows in codes.
   * - `evicted`: rows that retention or a window gave up, or hides.
   * - `on_gpu`: rows on a GPU; no call gives it yet.
   */
  readonly reason: "head_major" | "not_adjacent" | "quantized" | "evicted" | "on_gpu";
}

/** The rows of a layer as one run `[row][kv_head][head_dim]`, or why there is no such run. */
export type ContiguousKv = ContiguousRun | NoContiguousRun;

/** One sequence of tokens: what a model needs of a cache, and all it needs. */
export interface KvCache {
  /** Transformer layers. */
  readonly layerCount: number;
  /** KV heads of a layer. */
  readonly kvHeadCount: number;
  /** Elements of a head. */
  readonly headDim: number;
  /** Elements of a row: `kvHeadCount * headDim`. */
  readonly kvDim: number;
  /** Committed tokens. */
  readonly seqLen: number;
  /** Most tokens the sequence can hold. */
  readonly maxSeqLen: number;
  /**
   * The smallest length such that `truncate` may go to it and to every one from it up to `seqLen`; 0 where no row was
   * ever let go.
   */
  readonly rewindableTo: number;
  /** True when every layer is on a GPU; no layer is yet, so it is false. */
  readonly isOnGpu: boolean;

  /**
   * Writes `n = k.length / kvDim` rows behind those layer `layer` has; they count after `commit`.
   *
   * `k` and `v` are of one kind: `Float32Array`, `Float16Array`, or `Uint16Array` with a `dtype`. No row is legal.
   * `{ layout: "head_major", headStride }` takes some of the rows of a longer `[kv_head][length][head_dim]` tensor: `k` and
   * `v` then reach from the first of them to the last one of the last head, and `n` follows from their length.
   *
   * @throws {KvError} `layer_out_of_range`, `cache_full`, `invalid_size`, `not_finite`, `invalid_config`,
   * `stale_handle`
   */
  append(layer: number, k: Rows, v: Rows, options?: AppendOptions): AppendResult;

  /**
   * Makes `n` rows count; every layer must have exactly `n` pending. `commit(0)` does nothing.
   *
   * @throws {KvError} `commit_mismatch`, `invalid_size` if there are not `n` tokens, `stale_handle`
   */
  commit(n: number, options?: CommitOptions): void;

  /**
   * The first `kvLen` rows of a layer as one run, without a copy; by default all committed and pending ones.
   *
   * @throws {KvError} `layer_out_of_range`, `position_out_of_range`, `needs_permission`, `unsupported`, `stale_handle`
   */
  contiguousKv(layer: number, kvLen?: number): ContiguousKv;

  /**
   * Copies the rows of a layer, `[row][kv_head][head_dim]` or `[kv_head][row][head_dim]`, converted to `dtype`, rounded half
   * to even. `start` and `count` choose some of them by their positions.
   *
   * @throws {KvError} `layer_out_of_range`, `position_out_of_range` unless the layer shows all `count` rows, `invalid_size` if
   * `into` is too short, `unsupported` for more than 2^32 elements, `stale_handle`
   */
  gather(layer: number, options?: GatherOptions): GatheredRows;

  /**
   * Windows on the rows of a layer, committed and pending, by ascending position.
   *
   * @throws {KvError} `layer_out_of_range`, `stale_handle`
   */
  views(layer: number): View[];

  /**
   * The blocks of a layer, head-major; all of them, or `null` where one is quantized.
   *
   * Absent where rows are token-major.
   *
   * @throws {KvError} `layer_out_of_range`, `needs_permission`, `stale_handle`
   */
  packedViews?(layer: number): PackedView[] | null;

  /**
   * Rewinds to `n` committed tokens and drops all pending rows; `truncate(seqLen)` abandons a half-done step.
   *
   * Every layer then shows the rows it would show had the sequence never been longer.
   *
   * @throws {KvError} `position_out_of_range` past the end, and before `rewindableTo` unless `n` is 0; `stale_handle`
   */
  truncate(n: number): void;

  /**
   * Where a layer lives.
   *
   * @throws {KvError} `layer_out_of_range`, `stale_handle`
   */
  layerDevice(layer: number): DevicePlacement;

  /**
   * Attends with `q` `[query][q_head][head_dim]` over the committed and pending rows of a layer; gives an output of
   * the same shape.
   *
   * No row to see gives output 0 and lse -Infinity. With `into` and `lse` no array is allocated.
   *
   * Where a paged cache has let rows go, queries belong to the newest committed row or to pending ones: before the
   * commit of a prompt each of its queries sees what it should.
   *
   * @throws {KvError} `layer_out_of_range`, `invalid_size`, `invalid_config`, `not_finite` for such a number in `q`,
   * `position_out_of_range` for a query some of whose rows were let go, `unsupported` for `treeParents` beside slopes or
   * a window, `stale_handle`
   */
  attend(layer: number, q: Float32Array, options?: AttendOptions): Float32Array;

  /** Gives all resources back and detaches the arrays handed out; later calls give `stale_handle`. */
  free(): void;

  /** The same as `free`, for `using`. */
  [Symbol.dispose](): void;
}
