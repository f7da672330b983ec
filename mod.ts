/**
 * The KV cache of a transformer for Deno and Bun: keys and values kept in native memory, attended by Zig kernels.
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
export type { AttendOptions } from "./src/attention.ts";
export type { BatchAppendOptions, BatchAttendOptions } from "./src/batch.ts";
export type {
  AppendOptions,
  AppendResult,
  CommitOptions,
  ContiguousKv,
  ContiguousRun,
  DevicePlacement,
  GatheredRows,
  GatherOptions,
  KvCache,
  NoContiguousRun,
  PackedView,
  Tier,
  View,
} from "./src/cache.ts";
export {
  type ContiguousCacheOptions,
  type DType,
  type FloatDType,
  memoryBytes,
  type QuantizedDType,
} from "./src/config.ts";
export { BlockPool, type BlockPoolOptions, type BlockPoolStats } from "./src/block_pool.ts";
export { BufferPool, type BufferPoolOptions, type BufferPoolStats } from "./src/buffer_pool.ts";
export { ContiguousCache, type ContiguousStats, type StoreOptions } from "./src/contiguous_cache.ts";
export {
  type Level,
  readRate,
  type ReadRateOptions,
  setThreadCount,
  type SystemInfo,
  systemInfo,
} from "./src/device.ts";
export { KvError, type KvErrorCode } from "./src/error.ts";
export type { HeadFidelity, SideFidelity } from "./src/fidelity.ts";
export type { KvFormat } from "./src/format.ts";
export { PagedCache } from "./src/paged_cache.ts";
export { type LayerShape, type PagedCacheOptions, type TailOptions, twoTierDefaults } from "./src/paged_options.ts";
export type { PagedStats } from "./src/paged_stats.ts";
export type { HybridPolicy, LogitErrorOptions, Policy, StoreOnlyPolicy, TailOnlyPolicy } from "./src/policy.ts";
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
export type { KeepAll, KeepNewest, Retention } from "./src/retention.ts";
export type { HalfArray, Rows } from "./src/rows.ts";
export { Sequence, type SequenceCommitOptions } from "./src/sequence.ts";
