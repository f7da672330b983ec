/**
 * A pool of blocks that several paged caches share.
 *
 * @module
 */

import { newRecord } from "./ffi/record.ts";
import { countText, freedRule, refusal } from "./ffi/status.ts";
import { showAs } from "./memory/inspect.ts";
import { type BlockPoolStats, createPool, type PoolMemory, poolStatsOf } from "./memory/pool.ts";
import { checkCount } from "./options/counts.ts";
import { formatWords, type KvFormat } from "./options/format.ts";
import type { BlockPoolOptions } from "./options/pool.ts";

/** The native pool of a `BlockPool`; throws TypeError for anything else. */
export let poolMemoryOf: (pool: BlockPool) => PoolMemory;

/**
 * Blocks for several {@linkcode PagedCache}s with layers of one shape, in every format these caches store rows in.
 *
 * Memory is reserved as blocks are asked for, for each format apart and within one limit. A block given back is the
 * first to be used again. Caches keep the blocks of a pool that was freed, until they are freed themselves. A pool
 * that a Worker made and left behind when it ended lasts until the process ends.
 *
 * @example Blocks made ready before the first token
 * ```ts
 * import assert from "node:assert/strict";
 * import { BlockPool, PagedCache } from "@kvern/kvern";
 *
 * const shape = { layerCount: 1, kvHeadCount: 2, headDim: 4, blockSize: 16 };
 * using pool = new BlockPool(shape);
 * pool.prewarm(4);
 * using cache = new PagedCache({ ...shape, maxSeqLen: 1024, pool });
 * const row = new Float32Array(8).fill(0.5);
 * cache.sequence().append(0, row, row);
 * assert.deepEqual([pool.stats().hits, pool.stats().misses], [1, 0]);
 * ```
 */
export class BlockPool {
  readonly #memory: PoolMemory;

  static {
    showAs(BlockPool, (pool) => {
      if (pool.#memory.handle === 0) return undefined;
      const { usedBlocks, totalBlocks, reservedBytes } = pool.stats();
      return { shape: pool.#memory.plan.shape, usedBlocks, totalBlocks, reservedBytes };
    });
    poolMemoryOf = (pool) => {
      if (typeof pool === "object" && pool !== null && #memory in pool) return pool.#memory;
      throw new TypeError(`pool must be a BlockPool: ${pool === null ? "null" : typeof pool}`);
    };
  }

  /**
   * Makes an empty pool; nothing is reserved yet.
   *
   * @throws {TypeError} an option of the wrong type
   * @throws {RangeError} an option that is no count
   * @throws {KvError} `invalid_config`; `block_too_large` for a block past `maxBytes` or 1 GiB; `library_unavailable`,
   * `needs_permission`
   */
  constructor(options: BlockPoolOptions) {
    this.#memory = createPool(options);
  }

  /**
   * Reserves memory for `n` blocks of a format in all, which stays until the pool is gone; less than there is does
   * nothing. The format is by default that of the tail: the option `dtype`.
   *
   * @throws {KvError} `pool_empty` past `maxBytes`, `out_of_memory`, `invalid_config` for a format its blocks cannot
   * have, `block_too_large`, `stale_handle`
   */
  prewarm(n: number, format?: KvFormat): void {
    const action = "prewarm blocks";
    const [k, v] = this.#formatWords(format, action);
    checkCount("n", n);
    const status = this.#memory.library.kv_pool_prewarm(this.#memory.handle, n, k, v);
    if (status < 0) {
      throw refusal(status, `prewarm ${countText(n, "block")}`, {
        ...freedRule("pool"),
        pool_empty: () => "maxBytes would be passed",
      });
    }
  }

  /**
   * What the pool has of a format and what it did; by default of the tail's, the option `dtype`.
   *
   * @throws {KvError} `invalid_config` for a format its blocks cannot have, `block_too_large`, `stale_handle`
   */
  stats(format?: KvFormat): BlockPoolStats {
    const action = "count the blocks of a pool";
    const [k, v] = this.#formatWords(format, action);
    const record = newRecord("poolStats");
    const status = this.#memory.library.kv_pool_stats(this.#memory.handle, k, v, record, record.byteLength);
    if (status < 0) throw refusal(status, action, freedRule("pool"));
    return poolStatsOf(record);
  }

  /** Takes the pool away; its memory goes with the last cache on it. Harmless when repeated. */
  free(): void {
    this.#memory.free();
  }

  /** The same as `free`, for `using`. */
  [Symbol.dispose](): void {
    this.free();
  }

  #formatWords(format: KvFormat | undefined, action: string): [k: number, v: number] {
    const { headDim, blockSize, tail } = this.#memory.plan;
    return formatWords(format, tail, headDim, blockSize, action);
  }
}
