/**
 * The native pool behind a `BlockPool`. A cache on it keeps this object, so that a pool in use is not collected.
 *
 * @module
 */

import type { Library } from "../ffi/exports.ts";
import { library } from "../ffi/library.ts";
import { valuesOf } from "../ffi/record.ts";
import { refusal } from "../ffi/status.ts";
import { BLOCK_LIMITS } from "../options/format.ts";
import { type BlockPoolOptions, type PoolPlan, poolPlanOf } from "../options/pool.ts";
import { freePartWhenDropped, unwatch } from "./finalization.ts";

/** The blocks of a pool in one format, and what became of the requests for them. */
export interface BlockPoolStats {
  /** Bytes of a block: its positions in every layer, keys and values, rounded up to 64. */
  readonly blockBytes: number;
  /** Blocks there is memory for now. */
  readonly totalBlocks: number;
  /** Blocks nobody uses. */
  readonly freeBlocks: number;
  /** Blocks in use, each counted once however many sequences share it. */
  readonly usedBlocks: number;
  /** Most blocks that were in use at once. */
  readonly peakBlocks: number;
  /** Blocks made ready by `prewarm`. */
  readonly prewarmed: number;
  /** Requests met with a block that was ready. */
  readonly hits: number;
  /** Requests for which memory had to be reserved. */
  readonly misses: number;
  /** Pieces of memory reserved. */
  readonly allocations: number;
  /** Blocks given back. */
  readonly returns: number;
  /** Blocks whose memory went back to the system. */
  readonly drops: number;
  /** `hits / (hits + misses)`, 0 when nothing was asked. */
  readonly hitRate: number;
  /** Bytes reserved for blocks. */
  readonly reservedBytes: number;
  /** Bytes of bookkeeping. */
  readonly metadataBytes: number;
}

/** One native pool. */
export class PoolMemory {
  readonly library: Library;
  readonly plan: PoolPlan;
  #handle: number;

  constructor(native: Library, handle: number, plan: PoolPlan) {
    this.library = native;
    this.#handle = handle;
    this.plan = plan;
    freePartWhenDropped(this, freeing(native, handle));
  }

  /** The handle every call takes; 0, which is never valid, once this was freed. */
  get handle(): number {
    return this.#handle;
  }

  /** Frees the native pool; harmless when repeated. */
  free(): void {
    if (this.#handle === 0) return;
    unwatch(this);
    this.library.kv_pool_free(this.#handle);
    this.#handle = 0;
  }
}

/** Makes a native pool of `options`. */
export function createPool(options: BlockPoolOptions): PoolMemory {
  const action = "create a pool";
  const plan = poolPlanOf(options, action);
  const native = library();
  const handle = native.kv_pool_create(plan.record, plan.record.byteLength);
  if (handle >= 0) return new PoolMemory(native, handle, plan);
  throw refusal(handle, action, {
    block_too_large: () =>
      `a block must fit in ${BLOCK_LIMITS}: it has ${plan.blockBytes} bytes, maxBytes is ${
        plan.maxBytes ?? "not given"
      }`,
  });
}

/** What a PoolStatsRecord says. */
export function poolStatsOf(record: Uint32Array): BlockPoolStats {
  const { hits, misses, ...others } = valuesOf("poolStats", record);
  return { ...others, hits, misses, hitRate: hits + misses === 0 ? 0 : hits / (hits + misses) };
}

/** Made outside the class, so that the closure cannot hold the object it waits for. */
function freeing(native: Library, handle: number): () => void {
  return () => native.kv_pool_free(handle);
}
