/**
 * The KV cache of a transformer for Deno, Bun and Node: keys and values kept in native memory, attended by Zig kernels.
 *
 * Nothing is read or opened at import; the native library opens on first use. In Deno that takes `--allow-ffi`, or
 * `--allow-ffi=<path of the library>` for everything but zero-copy arrays.
 *
 * @example Prefill a prompt, then decode: 8 query heads share 2 KV heads
 * ```ts
 * import { ContiguousCache } from "@kvern/kvern";
 *
 * const layerCount = 2, qHeadCount = 8, kvHeadCount = 2, headDim = 64;
 * using cache = new ContiguousCache({ layerCount, qHeadCount, kvHeadCount, headDim, maxSeqLen: 2048 });
 * const sequence = cache.sequence(0);
 * const random = (length: number) => Float32Array.from({ length }, () => Math.random() - 0.5);
 *
 * const prompt = 100;
 * for (let layer = 0; layer < layerCount; layer++) {
 *   sequence.append(layer, random(prompt * sequence.kvDim), random(prompt * sequence.kvDim)); // [token][kv_head][head_dim]
 *   sequence.attend(layer, random(prompt * qHeadCount * headDim), { queryCount: prompt }); // causal
 * }
 * sequence.commit(prompt);
 *
 * const into = new Float32Array(qHeadCount * headDim); // reused: a step allocates no output
 * for (let step = 0; step < 10; step++) {
 *   for (let layer = 0; layer < layerCount; layer++) {
 *     sequence.append(layer, random(sequence.kvDim), random(sequence.kvDim));
 *     sequence.attend(layer, random(qHeadCount * headDim), { into });
 *   }
 *   sequence.commit(1);
 * }
 * console.log(`${sequence.seqLen} tokens in a cache of ${cache.memoryBytes} bytes`);
 * ```
 *
 * @module
 */

export { AlignedBuffer } from "./src/aligned_buffer.ts";
export { BlockPool } from "./src/block_pool.ts";
export { BufferPool, type BufferPoolOptions, type BufferPoolStats } from "./src/buffer_pool.ts";
export type {
  AppendResult,
  ContiguousKv,
  ContiguousRun,
  DevicePlacement,
  GatheredRows,
  KvCache,
  NoContiguousRun,
  PackedView,
  Tier,
  View,
} from "./src/cache.ts";
export { ContiguousCache, type ContiguousStats, memoryBytes } from "./src/contiguous_cache.ts";
export {
  type Level,
  readRate,
  type ReadRateOptions,
  setThreadCount,
  type SystemInfo,
  systemInfo,
} from "./src/device.ts";
export { KvError, type KvErrorCode } from "./src/error.ts";
export { loadLibrary, setLibraryPath } from "./src/library.ts";
export {
  type BatchAppendOptions,
  type BatchAttendOptions,
  PagedCache,
  type PagedCacheOptions,
} from "./src/paged_cache.ts";
export {
  dequantizeBlock,
  type DequantizeBlockOptions,
  dequantizeRows,
  type DequantizeRowsOptions,
  packBlock,
  type PackBlockOptions,
  type PlaneShape,
  quantizeBlock,
  type QuantizeBlockOptions,
  quantizeRows,
  type QuantizeRowsOptions,
  type RecordDType,
  unpackBlock,
} from "./src/quantization.ts";
export { Sequence } from "./src/sequence.ts";
export type { PrefixExplanation, PrefixReason } from "./src/memory/explanation.ts";
export type { HeadFidelity, SideFidelity } from "./src/memory/fidelity.ts";
export type { PagedStats, PrefixStats } from "./src/memory/paged_stats.ts";
export type { BlockPoolStats } from "./src/memory/pool.ts";
export type { PrefixEvent } from "./src/memory/prefix_events.ts";
export type { AppendOptions, StoreOptions } from "./src/options/append.ts";
export type { AttendOptions } from "./src/options/attend.ts";
export type { CommitOptions, SequenceCommitOptions } from "./src/options/commit.ts";
export type { ContiguousCacheOptions } from "./src/options/contiguous.ts";
export type { DType, FloatDType, QuantizedDType } from "./src/options/dtype.ts";
export type { KvFormat } from "./src/options/format.ts";
export type { GatherOptions } from "./src/options/gather.ts";
export type { LayoutOptions, RowLayout } from "./src/options/layout.ts";
export { type LayerShape, type PagedOptions, type TailOptions, twoTierDefaults } from "./src/options/paged.ts";
export type { HybridPolicy, LogitErrorOptions, Policy, StoreOnlyPolicy, TailOnlyPolicy } from "./src/options/policy.ts";
export type { BlockPoolOptions } from "./src/options/pool.ts";
export type { PrefixOptions } from "./src/options/prefix.ts";
export type { PromptOptions, TenantOptions } from "./src/options/prompt.ts";
export type { KeepAll, KeepNewest, Retention } from "./src/options/retention.ts";
export type { HalfArray, Rows } from "./src/options/rows.ts";
