/**
 * A pool of blocks that several paged caches share.
 *
 * @module
 */

import {
  checkBytes,
  checkCount,
  checkHeads,
  checkOption,
  dtypeCode,
  dtypeCodes,
  dtypeOf,
  type FloatDType,
} from "./config.ts";
import { KvError } from "./error.ts";
import type { Library } from "./ffi/exports.ts";
import { library } from "./ffi/library.ts";
import { newRecord, poolRecord, uint64At } from "./ffi/record.ts";
import { countText, freedRule, refusal } from "./ffi/status.ts";
import { showAs } from "./inspect.ts";
import { freePartWhenDropped, unwatch } from "./finalization.ts";
import { checkFits, headBytes, type KvFormat, type Sides, sidesOf } from "./format.ts";
import { checkOptions, type OptionNames, optionNames } from "./option_names.ts";

/** The caches a {@linkcode BlockPool} is for, and how large it may grow. */
export interface BlockPoolOptions {
  /** Transformer layers of a cache. */
  readonly layerCount: number;
  /** KV heads of a layer, at least 1. */
  readonly kvHeadCount: number;
  /** Elements of a head, 1 to 256. */
  readonly headDim: number;
  /** Positions a block holds: a power of two, 1 to 256; 64 by default. */
  readonly blockSize?: number;
  /** How elements of the tail are stored, for K and V together or apart; `"f16"` by default. */
  readonly dtype?: FloatDType | { readonly k: FloatDType; readonly v: FloatDType };
  /** Most bytes the pool may reserve, for blocks of all formats; by default what this machine or its cgroup has. */
  readonly maxBytes?: number;
}

const POOL_NAMES: OptionNames = optionNames<BlockPoolOptions>({
  layerCount: true,
  kvHeadCount: true,
  headDim: true,
  blockSize: true,
  dtype: true,
  maxBytes: true,
});

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

/** The handle of a pool, for the cache that is made on it; 0 once it was freed. */
export let poolHandle: (pool: BlockPool) => number;

/** The shape of a pool in words. */
export let poolShape: (pool: BlockPool) => string;

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
  readonly #library: Library;
  readonly #options: { readonly headDim: number; readonly blockSize: number; readonly tail: Sides };
  readonly #shape: string;
  #handle: number;

  static {
    showAs(BlockPool, (pool) => {
      if (pool.#handle === 0) return undefined;
      const { usedBlocks, totalBlocks, reservedBytes } = pool.stats();
      return { shape: pool.#shape, usedBlocks, totalBlocks, reservedBytes };
    });
    poolShape = (pool) => pool.#shape;
    poolHandle = (pool) => {
      if (typeof pool !== "object" || pool === null || !(#handle in pool)) {
        throw new TypeError(`pool must be a BlockPool: ${pool === null ? "null" : typeof pool}`);
      }
      return pool.#checkedHandle();
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
    const action = "create a pool";
    checkOptions(options, POOL_NAMES, action);
    const { blockSize = 64, dtype = "f16", maxBytes } = options;
    const words = {
      layerCount: checkOption("layerCount", options.layerCount, action),
      ...checkHeads(options.kvHeadCount, options.headDim, action),
      blockSize: checkBlockSize(blockSize, action),
      ...dtypeCodes(dtype, action),
      maxBytes: maxBytes === undefined ? 0 : checkBytes("maxBytes", maxBytes, action),
    };
    const { layerCount, kvHeadCount, headDim } = words;
    const tail = { k: dtypeOf(words.dtypeK), v: dtypeOf(words.dtypeV) };
    this.#options = { headDim, blockSize, tail };
    this.#shape = `${countText(layerCount, "layer")}, ${kvHeadCount} KV heads of ${headDim}, blocks of ${blockSize}, ` +
      `keys in ${tail.k} and values in ${tail.v}`;
    const record = poolRecord(words);
    this.#library = library();
    this.#handle = this.#library.kv_pool_create(record, record.byteLength);
    if (this.#handle < 0) {
      throw refusal(this.#handle, action, {
        block_too_large: () => {
          const bytes = layerCount * kvHeadCount * headBytes(tail, headDim, blockSize);
          return `a block must fit in maxBytes and in 1 GiB: it has ${bytes} bytes, maxBytes is ${
            maxBytes ?? "not given"
          }`;
        },
      });
    }
    freePartWhenDropped(this, freeing(this.#library, this.#handle));
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
    const status = this.#library.kv_pool_prewarm(this.#handle, n, k, v);
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
    const status = this.#library.kv_pool_stats(this.#handle, k, v, record, record.byteLength);
    if (status < 0) throw refusal(status, action, freedRule("pool"));
    return poolStatsOf(record);
  }

  /** Takes the pool away; its memory goes with the last cache on it. Harmless when repeated. */
  free(): void {
    if (this.#handle === 0) return;
    unwatch(this);
    this.#library.kv_pool_free(this.#handle);
    this.#handle = 0;
  }

  /** The same as `free`, for `using`. */
  [Symbol.dispose](): void {
    this.free();
  }

  #formatWords(format: KvFormat | undefined, action: string): [k: number, v: number] {
    const { headDim, blockSize, tail } = this.#options;
    return formatWords(format, tail, headDim, blockSize, action);
  }

  #checkedHandle(): number {
    if (this.#handle === 0) throw new KvError("stale_handle", "Cannot create a cache as its pool was freed");
    return this.#handle;
  }
}

/** What a PoolStatsRecord says. */
export function poolStatsOf(record: Uint32Array): BlockPoolStats {
  const hits = uint64At(record, 8), misses = uint64At(record, 10);
  return {
    blockBytes: uint64At(record, 6),
    totalBlocks: record[1]!,
    freeBlocks: record[2]!,
    usedBlocks: record[3]!,
    peakBlocks: record[4]!,
    prewarmed: record[5]!,
    hits,
    misses,
    allocations: uint64At(record, 12),
    returns: uint64At(record, 14),
    drops: uint64At(record, 16),
    hitRate: hits + misses === 0 ? 0 : hits / (hits + misses),
    reservedBytes: uint64At(record, 18),
    metadataBytes: uint64At(record, 20),
  };
}

/** A count of positions that a block can hold. */
export function checkBlockSize(blockSize: number, action: string): number {
  checkCount("blockSize", blockSize);
  if (blockSize >= 1 && blockSize <= 256 && Number.isInteger(Math.log2(blockSize))) return blockSize;
  throw new KvError(
    "invalid_config",
    `Cannot ${action} as blockSize must be a power of two from 1 to 256: blockSize is ${blockSize}`,
  );
}

/** The numbers of the dtypes of a format that blocks of such heads can have; `tail` where none is given. */
export function formatWords(
  format: KvFormat | undefined,
  tail: Sides,
  headDim: number,
  blockSize: number,
  action: string,
): [k: number, v: number] {
  const sides = format === undefined ? tail : sidesOf("format", format, action);
  checkFits("format", sides, headDim, blockSize, action);
  return [dtypeCode("format.k", sides.k), dtypeCode("format.v", sides.v)];
}

/** Made outside the class, so that the closure cannot hold the object it waits for. */
function freeing(native: Library, handle: number): () => void {
  return () => native.kv_pool_free(handle);
}
