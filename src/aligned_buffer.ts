/**
 * A buffer of a pool: native memory for staging, scratch and copies.
 *
 * @module
 */

import { countText, type FreedRule, freedRule, refusal } from "./ffi/status.ts";
import { BUFFER_RULES, BufferMemory } from "./memory/buffer.ts";
import { showAs } from "./memory/inspect.ts";
import { checkFloats, inputCount } from "./options/rows.ts";

const FREED: FreedRule = freedRule("buffer");

/** Makes the object of a native buffer; for the pool that acquired it. */
export let createBuffer: (memory: BufferMemory) => AlignedBuffer;

/**
 * A piece of native memory from a {@linkcode BufferPool}, 64-byte aligned, all zeros when it is acquired.
 *
 * Use it as the target of `gather`, or fill it step by step with `extend`. Give it back with `using` or `free`; a dropped
 * one goes back at some garbage collection. It outlives its pool.
 *
 * @example Copies of a layer, without new arrays for each
 * ```ts
 * import assert from "node:assert/strict";
 * import { BufferPool, ContiguousCache } from "@kvern/kvern";
 *
 * using pool = new BufferPool();
 * using cache = new ContiguousCache({ layerCount: 1, kvHeadCount: 2, headDim: 4, maxSeqLen: 16 });
 * const sequence = cache.sequence(0);
 * sequence.append(0, new Float32Array(8).fill(1), new Float32Array(8).fill(2));
 *
 * using k = pool.acquire(8 * 4), v = pool.acquire(8 * 4);
 * sequence.gather(0, { into: { k: k.f32, v: v.f32 } });
 * assert.deepEqual([k.f32[7], v.f32[7], v.f32[8]], [1, 2, 0]);
 * ```
 */
export class AlignedBuffer {
  readonly #memory: BufferMemory;

  static {
    createBuffer = (memory) => new AlignedBuffer(memory);
    showAs(AlignedBuffer, (buffer) => {
      return buffer.#memory.handle === 0 ? undefined : { capacity: buffer.capacity, length: buffer.length };
    });
  }

  private constructor(memory: BufferMemory) {
    if (!(memory instanceof BufferMemory)) {
      throw new TypeError("an AlignedBuffer is made by the acquire() of a BufferPool");
    }
    this.#memory = memory;
  }

  /** Elements it can hold: those of its size class, at least as many as were asked for. */
  get capacity(): number {
    return this.#memory.capacity;
  }

  /**
   * Elements that were appended by `extend`; what is written to `f32` does not count.
   *
   * @throws {KvError} `stale_handle`
   */
  get length(): number {
    const length = this.#memory.library.kv_buffer_length(this.#memory.handle);
    if (length < 0) throw refusal(length, "read the length of a buffer", FREED);
    return length;
  }

  /**
   * All of its elements in place, `capacity` of them. It has length 0 once the buffer is freed.
   *
   * @throws {KvError} `needs_permission` in Deno with a path-scoped `--allow-ffi`; `unsupported` for more than 4 GiB in
   * Bun; `stale_handle`
   */
  get f32(): Float32Array {
    return this.#memory.arrays().f32;
  }

  /**
   * All of its bytes in place: the memory of `f32`.
   *
   * @throws {KvError} as `f32`
   */
  get bytes(): Uint8Array {
    return this.#memory.arrays().bytes;
  }

  /**
   * Appends `values`, which may lie in this buffer too.
   *
   * @throws {TypeError} anything but a `Float32Array`, or one that is detached
   * @throws {KvError} `invalid_size` past the capacity: nothing is appended then; `stale_handle`
   */
  extend(values: Float32Array): void {
    checkFloats("values", values);
    const count = inputCount("values", values, "extend a buffer");
    const length = this.#memory.library.kv_buffer_extend(this.#memory.handle, values, count);
    if (length >= 0) return;
    throw refusal(length, `extend a buffer by ${countText(count, "element")}`, {
      ...FREED,
      invalid_size: () => `it holds at most ${this.capacity}: its length is ${this.length}`,
    });
  }

  /**
   * Forgets what was appended: the length is 0 again. The bytes stay.
   *
   * @throws {KvError} `stale_handle`
   */
  clear(): void {
    const status = this.#memory.library.kv_buffer_clear(this.#memory.handle);
    if (status < 0) throw refusal(status, "clear a buffer", FREED);
  }

  /**
   * Another buffer of the same pool, with the same capacity, bytes and length.
   *
   * @throws {KvError} `out_of_memory`, `stale_handle`
   */
  clone(): AlignedBuffer {
    const handle = this.#memory.library.kv_buffer_clone(this.#memory.handle);
    if (handle < 0) throw refusal(handle, "clone a buffer", { ...BUFFER_RULES, ...FREED });
    return new AlignedBuffer(new BufferMemory(this.#memory.library, handle));
  }

  /** Detaches the arrays over it and gives the memory back to its pool. Harmless when repeated. */
  free(): void {
    this.#memory.free();
  }

  /** The same as `free`, for `using`. */
  [Symbol.dispose](): void {
    this.free();
  }
}
