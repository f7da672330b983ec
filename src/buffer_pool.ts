/**
 * A pool of buffers for staging, scratch and copies; keys and values of a cache never lie in one.
 *
 * @module
 */

import { type AlignedBuffer, createBuffer } from "./aligned_buffer.ts";
import { KvError } from "./error.ts";
import { type Library, VALUES } from "./ffi/exports.ts";
import { library } from "./ffi/library.ts";
import { newRecord, recordOf, valuesOf } from "./ffi/record.ts";
import { countText, freedRule, refusal } from "./ffi/status.ts";
import { BUFFER_RULES, BufferMemory } from "./memory/buffer.ts";
import { freePartWhenDropped, unwatch } from "./memory/finalization.ts";
import { showAs } from "./memory/inspect.ts";
import { checkBytes, checkCount } from "./options/counts.ts";
import { givenOptions, type OptionNames, optionNames } from "./options/option_names.ts";

/** How much a {@linkcode BufferPool} keeps, and how large it may grow. */
export interface BufferPoolOptions {
  /** Free buffers kept of each size class; 32 by default. */
  readonly buffersPerClass?: number;
  /** Most bytes of all its buffers, used or free; by default what this machine or its cgroup has. */
  readonly maxBytes?: number;
}

const BUFFER_POOL_NAMES: OptionNames = optionNames<BufferPoolOptions>({
  buffersPerClass: true,
  maxBytes: true,
});

/** What became of the requests for buffers, and what is kept. */
export interface BufferPoolStats {
  /** Requests met with a buffer that was kept. */
  readonly hits: number;
  /** Requests for which memory had to be allocated. */
  readonly misses: number;
  /** Buffers allocated: the misses, and those of `prewarm`. */
  readonly allocations: number;
  /** Buffers given back that were kept. */
  readonly returns: number;
  /** Buffers given back whose memory went back to the system: too many of their class, or larger than every class. */
  readonly drops: number;
  /** Free buffers of each class, by the bytes of the class: `freeBuffers[4096]`. */
  readonly freeBuffers: Readonly<Record<number, number>>;
  /** `hits / (hits + misses)`, 0 when nothing was asked. */
  readonly hitRate: number;
  /** Bytes of all buffers, used and free. */
  readonly reservedBytes: number;
}

/** Bytes of each size class. */
const CLASSES: readonly number[] = VALUES.bufferClassBytes;

/** Elements of a buffer are counted in 31 bits. */
const BUFFER_BYTES_MAX = (2 ** 31 - 1) * 4;

/**
 * Buffers of 1, 4, 16, 64 and 256 KiB and of 1, 4 and 16 MiB that are used again; larger ones are made as they are asked
 * for and not kept.
 *
 * Memory is allocated as buffers are acquired. Each is zeroed before it is handed out, so that nobody finds what an
 * earlier owner left there. Buffers outlive a pool that was freed. `using` or `free` gives back what the pool keeps; a
 * dropped pool does that at some garbage collection, and one that a Worker made and left behind when it ended, with its
 * buffers, not before the process ends.
 *
 * @example A buffer that is used again
 * ```ts
 * import assert from "node:assert/strict";
 * import { BufferPool } from "@kvern/kvern";
 *
 * using pool = new BufferPool();
 * for (let step = 0; step < 4; step++) {
 *   using buffer = pool.acquire(3000);
 *   assert.equal(buffer.capacity, 1024); // the class of 4 KiB
 *   buffer.extend(Float32Array.of(1, 2, 3));
 *   assert.equal(buffer.length, 3);
 * }
 * const { misses, hits, hitRate, freeBuffers } = pool.stats();
 * assert.deepEqual([misses, hits, hitRate, freeBuffers[4096]], [1, 3, 0.75, 1]);
 * ```
 */
export class BufferPool {
  static {
    showAs(BufferPool, (pool) => {
      if (pool.#handle === 0) return undefined;
      const { hits, misses, reservedBytes } = pool.stats();
      return { hits, misses, reservedBytes };
    });
  }

  readonly #library: Library;
  readonly #buffersPerClass: number;
  /** 0 once it was freed. */
  #handle: number;

  /**
   * Makes an empty pool.
   *
   * @throws {TypeError} an option of the wrong type
   * @throws {RangeError} an option that is no count
   * @throws {KvError} `invalid_config` for a `maxBytes` of 0; `out_of_memory`; `library_unavailable`, `needs_permission`
   */
  constructor(options?: BufferPoolOptions) {
    const action = "create a buffer pool";
    const { buffersPerClass = 32, maxBytes } = givenOptions(options, BUFFER_POOL_NAMES, action);
    checkCount("buffersPerClass", buffersPerClass);
    const limit = maxBytes === undefined ? 0 : checkBytes("maxBytes", maxBytes, action);
    const record = recordOf("bufferPool", { buffersPerClass, maxBytes: limit });
    this.#buffersPerClass = buffersPerClass;
    this.#library = library();
    this.#handle = this.#library.kv_buffer_pool_create(record, record.byteLength);
    if (this.#handle < 0) throw refusal(this.#handle, action, BUFFER_RULES);
    freePartWhenDropped(this, freeing(this.#library, this.#handle));
  }

  /**
   * A buffer of zeros of the smallest class with `byteLength` bytes, or of just those bytes past 16 MiB.
   *
   * @throws {TypeError} `byteLength` is no number
   * @throws {RangeError} `byteLength` is no count
   * @throws {KvError} `invalid_size` past 8 GiB; `out_of_memory` past `maxBytes`, or if the system refused; `stale_handle`
   */
  acquire(byteLength: number): AlignedBuffer {
    if (typeof byteLength !== "number") throw new TypeError(`byteLength must be a number: ${typeof byteLength}`);
    if (!Number.isSafeInteger(byteLength) || byteLength < 0) {
      throw new RangeError(`byteLength must be a whole number from 0 to ${Number.MAX_SAFE_INTEGER}: ${byteLength}`);
    }
    const handle = this.#library.kv_buffer_acquire(this.#handle, byteLength);
    if (handle < 0) {
      throw refusal(handle, `acquire a buffer of ${byteLength} bytes`, {
        ...POOL_RULES,
        invalid_size: () => `a buffer has at most ${BUFFER_BYTES_MAX} bytes`,
      });
    }
    return createBuffer(new BufferMemory(this.#library, handle));
  }

  /**
   * Makes buffers of one class ready: at least `n` of them are free then.
   *
   * @throws {TypeError} an argument that is no number
   * @throws {RangeError} an argument that is no count
   * @throws {KvError} `invalid_config` if there is no class of `classBytes` bytes, or `n` is more than `buffersPerClass`;
   * `out_of_memory`, with nothing allocated; `stale_handle`
   */
  prewarm(classBytes: number, n: number): void {
    checkCount("classBytes", classBytes);
    checkCount("n", n);
    const action = `prewarm ${countText(n, "buffer")} of ${classBytes} bytes`;
    if (!CLASSES.includes(classBytes)) {
      throw new KvError(
        "invalid_config",
        `Cannot ${action} as the size classes are ${CLASSES.join(", ")}: classBytes is ${classBytes}`,
      );
    }
    const status = this.#library.kv_buffer_pool_prewarm(this.#handle, classBytes, n);
    if (status < 0) throw refusal(status, action, this.#prewarmRules(n));
  }

  /**
   * Makes buffers of every class ready: at least `n` of each are free then, 21.3 MiB for each `n`.
   *
   * @throws {TypeError} `n` is no number
   * @throws {RangeError} `n` is no count
   * @throws {KvError} `invalid_config` if `n` is more than `buffersPerClass`; `out_of_memory`, with nothing allocated;
   * `stale_handle`
   */
  prewarmAll(n: number): void {
    checkCount("n", n);
    const status = this.#library.kv_buffer_pool_prewarm_all(this.#handle, n);
    if (status < 0) throw refusal(status, `prewarm ${countText(n, "buffer")} of every class`, this.#prewarmRules(n));
  }

  /**
   * Gives the memory of all free buffers back to the system.
   *
   * @throws {KvError} `stale_handle`
   */
  clear(): void {
    const status = this.#library.kv_buffer_pool_clear(this.#handle);
    if (status < 0) throw refusal(status, "clear a buffer pool", POOL_RULES);
  }

  /**
   * What the pool did, and what it keeps.
   *
   * @throws {KvError} `stale_handle`
   */
  stats(): BufferPoolStats {
    const record = newRecord("bufferPoolStats");
    const status = this.#library.kv_buffer_pool_stats(this.#handle, record, record.byteLength);
    if (status < 0) throw refusal(status, "count the buffers of a pool", POOL_RULES);
    const { hits, misses, freeBuffers, ...others } = valuesOf("bufferPoolStats", record);
    return {
      ...others,
      hits,
      misses,
      freeBuffers: Object.fromEntries(CLASSES.map((bytes, i) => [bytes, freeBuffers[i]!])),
      hitRate: hits + misses === 0 ? 0 : hits / (hits + misses),
    };
  }

  /** Takes the pool away with all it keeps; buffers in use stay what they are. Harmless when repeated. */
  free(): void {
    if (this.#handle === 0) return;
    unwatch(this);
    this.#library.kv_buffer_pool_free(this.#handle);
    this.#handle = 0;
  }

  /** The same as `free`, for `using`. */
  [Symbol.dispose](): void {
    this.free();
  }

  #prewarmRules(n: number) {
    return {
      ...POOL_RULES,
      invalid_config: () => `the pool keeps at most ${this.#buffersPerClass} of a class: n is ${n}`,
    };
  }
}

const POOL_RULES = { ...BUFFER_RULES, ...freedRule("pool") };

/** Made outside the class, so that the closure cannot hold the object it waits for. */
function freeing(native: Library, handle: number): () => void {
  return () => native.kv_buffer_pool_free(handle);
}
