/**
 * The native buffer behind an `AlignedBuffer`, and the arrays over it.
 *
 * All arrays lie on one ArrayBuffer, which is made when it is first looked at and detached before the memory goes back to
 * the pool. As long as that ArrayBuffer is alive it keeps this object alive, and with it the memory.
 *
 * @module
 */

import { KvError } from "../error.ts";
import type { Library } from "../ffi/exports.ts";
import { newRecord, uint64Words, valuesOf } from "../ffi/record.ts";
import { adapter } from "../ffi/runtime.ts";
import { refusal } from "../ffi/status.ts";
import { detach, isDetached } from "../options/typed_array.ts";
import { freePartWhenDropped, unwatch } from "./finalization.ts";

/** Which buffer an ArrayBuffer lies on: an array alone keeps its memory. */
const owners = new WeakMap<ArrayBuffer, BufferMemory>();

/** The arrays over a buffer. */
export interface BufferArrays {
  readonly buffer: ArrayBuffer;
  readonly f32: Float32Array;
  readonly bytes: Uint8Array;
}

/** Why there is no buffer. */
export const BUFFER_RULES: { readonly out_of_memory: () => string } = {
  out_of_memory: () =>
    "the limit of the pool would be passed, the system refused memory, or the process has 65535 caches, pools, " +
    "sequences and buffers",
};

/** One native buffer, which this object frees. */
export class BufferMemory {
  readonly library: Library;
  /** Elements it can hold. */
  readonly capacity: number;
  /** 0 once it was freed. */
  #handle: number;
  readonly #address: number;
  #arrays: BufferArrays | undefined;

  /** Takes over the native buffer of `handle`. */
  constructor(native: Library, handle: number) {
    this.library = native;
    this.#handle = handle;
    const record = newRecord("buffer");
    const status = native.kv_buffer_info(handle, record, record.byteLength);
    if (status < 0) throw refusal(status, "look at a buffer", BUFFER_RULES);
    const { address, capacity } = valuesOf("buffer", record);
    this.#address = address;
    this.capacity = capacity;
    freePartWhenDropped(this, freeing(native, handle));
  }

  /** The handle every call takes; 0, which is never valid, once this was freed. */
  get handle(): number {
    return this.#handle;
  }

  /** The arrays over all of its bytes. */
  arrays(): BufferArrays {
    if (this.#arrays !== undefined && !isDetached(this.#arrays.buffer)) return this.#arrays;
    const action = "make an array over native memory";
    if (this.#handle === 0) throw new KvError("stale_handle", `Cannot ${action} as the buffer was freed`);
    const byteLength = this.capacity * 4;
    if (byteLength > adapter.viewBytesMax) {
      const max = adapter.viewBytesMax;
      throw new KvError(
        "unsupported",
        `Cannot ${action} as an ArrayBuffer has at most ${max} bytes here: ${byteLength}`,
      );
    }
    const buffer = adapter.view(...uint64Words(this.#address), byteLength);
    owners.set(buffer, this);
    return this.#arrays = { buffer, f32: new Float32Array(buffer), bytes: new Uint8Array(buffer) };
  }

  /** Detaches the arrays and gives the memory back to its pool; harmless when repeated. */
  free(): void {
    if (this.#handle === 0) return;
    if (this.#arrays !== undefined) detach(this.#arrays.buffer);
    this.#arrays = undefined;
    unwatch(this);
    this.library.kv_buffer_free(this.#handle);
    this.#handle = 0;
  }
}

/** Made outside the class, so that the closure cannot hold the object it waits for. */
function freeing(native: Library, handle: number): () => void {
  return () => native.kv_buffer_free(handle);
}
