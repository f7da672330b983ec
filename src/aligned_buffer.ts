/**
 * A buffer of a pool: native memory for staging, scratch and copies.
 *
 * All arrays over it lie on one ArrayBuffer, which is made when it is first looked at and detached before the memory goes
 * back to the pool. As long as that ArrayBuffer is alive it keeps this object alive, and with it the memory.
 *
 * @module
 */

import { KvError } from "./error.ts";
import type { Library } from "./ffi/exports.ts";
import { adapter, library } from "./ffi/library.ts";
import { newRecord } from "./ffi/record.ts";
import { countText, type FreedRule, freedRule, refusal } from "./ffi/status.ts";
import { freePartWhenDropped, unwatch } from "./finalization.ts";
import { showAs } from "./inspect.ts";
import { checkFloats, inputCount } from "./rows.ts";
import { detach, isDetached } from "./typed_array.ts";

const FREED: FreedRule = freedRule("buffer");

/** Which buffer an ArrayBuffer lies on: an array alone keeps its buffer. */
const owners = new WeakMap<ArrayBuffer, AlignedBuffer>();

/** The arrays over a buffer. */
interface Arrays {
  readonly buffer: ArrayBuffer;
  readonly f32: Float32Array;
  readonly bytes: Uint8Array;
}

/** Makes the object of a native buffer, which it frees; for the pool that acquired it. */
export let takeBuffer: (native: Library, handle: number) => AlignedBuffer;

/** Why there is no buffer. */
export const BUFFER_RULES: { readonly out_of_memory: () => string } = {
  out_of_memory: () =>
    "the limit of the pool would be passed, the system refused memory, or the process has 65535 caches, pools, " +
    "sequences and buffers",
};

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
  readonly #library: Library;
  /** 0 once it was freed. */
  #handle: number;
  readonly #capacity: number;
  readonly #addressLow: number;
  readonly #addressHigh: number;
  #arrays: Arrays | undefined;

  static {
    takeBuffer = (native, handle) => new AlignedBuffer(native, handle);
    showAs(AlignedBuffer, (buffer) => {
      return buffer.#handle === 0 ? undefined : { capacity: buffer.capacity, length: buffer.length };
    });
  }

  private constructor(native: Library, handle: number) {
    if (native !== library()) {
      throw new TypeError("an AlignedBuffer is made by the acquire() of a BufferPool");
    }
    this.#library = native;
    this.#handle = handle;
    const record = newRecord("buffer");
    const status = native.kv_buffer_info(handle, record, record.byteLength);
    if (status < 0) throw refusal(status, "look at a buffer", BUFFER_RULES);
    this.#addressLow = record[1]!;
    this.#addressHigh = record[2]!;
    this.#capacity = record[3]!;
    freePartWhenDropped(this, freeing(native, handle));
  }

  /** Elements it can hold: those of its size class, at least as many as were asked for. */
  get capacity(): number {
    return this.#capacity;
  }

  /**
   * Elements that were appended by `extend`; what is written to `f32` does not count.
   *
   * @throws {KvError} `stale_handle`
   */
  get length(): number {
    const length = this.#library.kv_buffer_length(this.#handle);
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
    return this.#view().f32;
  }

  /**
   * All of its bytes in place: the memory of `f32`.
   *
   * @throws {KvError} as `f32`
   */
  get bytes(): Uint8Array {
    return this.#view().bytes;
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
    const length = this.#library.kv_buffer_extend(this.#handle, values, count);
    if (length >= 0) return;
    throw refusal(length, `extend a buffer by ${countText(count, "element")}`, {
      ...FREED,
      invalid_size: () => `it holds at most ${this.#capacity}: its length is ${this.length}`,
    });
  }

  /**
   * Forgets what was appended: the length is 0 again. The bytes stay.
   *
   * @throws {KvError} `stale_handle`
   */
  clear(): void {
    const status = this.#library.kv_buffer_clear(this.#handle);
    if (status < 0) throw refusal(status, "clear a buffer", FREED);
  }

  /**
   * Another buffer of the same pool, with the same capacity, bytes and length.
   *
   * @throws {KvError} `out_of_memory`, `stale_handle`
   */
  clone(): AlignedBuffer {
    const handle = this.#library.kv_buffer_clone(this.#handle);
    if (handle < 0) throw refusal(handle, "clone a buffer", { ...BUFFER_RULES, ...FREED });
    return new AlignedBuffer(this.#library, handle);
  }

  /** Detaches the arrays over it and gives the memory back to its pool. Harmless when repeated. */
  free(): void {
    if (this.#handle === 0) return;
    if (this.#arrays !== undefined) detach(this.#arrays.buffer);
    this.#arrays = undefined;
    unwatch(this);
    this.#library.kv_buffer_free(this.#handle);
    this.#handle = 0;
  }

  /** The same as `free`, for `using`. */
  [Symbol.dispose](): void {
    this.free();
  }

  #view(): Arrays {
    if (this.#arrays !== undefined && !isDetached(this.#arrays.buffer)) return this.#arrays;
    const action = "make an array over native memory";
    if (this.#handle === 0) throw new KvError("stale_handle", `Cannot ${action} as the buffer was freed`);
    const byteLength = this.#capacity * 4;
    if (byteLength > adapter.viewBytesMax) {
      const max = adapter.viewBytesMax;
      throw new KvError(
        "unsupported",
        `Cannot ${action} as an ArrayBuffer has at most ${max} bytes here: ${byteLength}`,
      );
    }
    const buffer = adapter.view(this.#addressLow, this.#addressHigh, byteLength);
    owners.set(buffer, this);
    return this.#arrays = { buffer, f32: new Float32Array(buffer), bytes: new Uint8Array(buffer) };
  }
}

/** Made outside the class, so that the closure cannot hold the object it waits for. */
function freeing(native: Library, handle: number): () => void {
  return () => native.kv_buffer_free(handle);
}
