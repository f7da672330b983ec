/**
 * The native cache behind a `ContiguousCache` and its sequences: handle, geometry, and the arrays over its memory.
 *
 * Memory of one (layer, sequence) is two runs of rows, K and V: `[position][kv_head][head_dim]`. Each run that is looked
 * at gets one ArrayBuffer over all of it, and every array handed out lies on that buffer. So a handful of buffers is
 * all there is to detach before the memory goes, and as long as one of them is alive it keeps this object alive, and
 * with it the memory.
 *
 * @module
 */

import { KvError } from "../error.ts";
import type { Library } from "../ffi/exports.ts";
import { library } from "../ffi/library.ts";
import { type AttendRecord, contiguousWords, newAttendRecord, newRecord, uint64At } from "../ffi/record.ts";
import { adapter } from "../ffi/runtime.ts";
import { CACHE_FREED, type FreedRule, refusal, unknownHandle } from "../ffi/status.ts";
import { bytesText, type ContiguousCacheOptions, recordOf } from "../options/contiguous.ts";
import { type FloatDType, floatDtypeOf } from "../options/dtype.ts";
import { elementBytes, rowsOver } from "../options/rows.ts";
import { byteLengthOf, detach, isDetached } from "../options/typed_array.ts";
import { freeWhenDropped, unwatch } from "./finalization.ts";
import type { Side } from "./view.ts";

/** Which memory an ArrayBuffer lies on: an array alone keeps its cache. */
const owners = new WeakMap<ArrayBuffer, ContiguousMemory>();

/** One native cache, owned or attached. */
export class ContiguousMemory {
  readonly library: Library;
  /** True if this object frees the native cache; an attached one frees nothing. */
  readonly owned: boolean;
  readonly layerCount: number;
  readonly sequenceCount: number;
  readonly kvHeadCount: number;
  readonly headDim: number;
  /** Query heads that every query has, where somebody said. */
  readonly qHeadCount?: number;
  readonly kvDim: number;
  readonly maxSeqLen: number;
  readonly dtype: { readonly k: FloatDType; readonly v: FloatDType };
  /** Reused by each attend. */
  readonly attendRecord: AttendRecord = newAttendRecord();
  #handle: number;
  /** The buffers made over each run, the one in use last; earlier ones may still lie under a caller's array. */
  readonly #runs: Map<string, ArrayBuffer[]> = new Map();

  constructor(native: Library, handle: number, owned: boolean) {
    this.library = native;
    this.#handle = handle;
    this.owned = owned;
    const record = newRecord("contiguous");
    const status = native.kv_contiguous_config(handle, record, record.byteLength);
    if (status < 0) throw refusal(status, `attach the cache of handle ${handle}`, unknownHandle("cache"));
    const words = contiguousWords(record);
    this.layerCount = words.layerCount;
    this.sequenceCount = words.sequenceCount;
    this.kvHeadCount = words.kvHeadCount;
    this.headDim = words.headDim;
    if (words.qHeadCount !== 0) this.qHeadCount = words.qHeadCount;
    this.kvDim = words.kvHeadCount * words.headDim;
    this.maxSeqLen = words.maxSeqLen;
    this.dtype = { k: floatDtypeOf(words.dtypeK), v: floatDtypeOf(words.dtypeV) };
    if (owned) freeWhenDropped(this, freeing(native, handle));
  }

  /** The handle every call takes; 0, which is never valid, once this was freed. */
  get handle(): number {
    return this.#handle;
  }

  /** The rule about what was freed, the same for every call. */
  get freedRule(): FreedRule {
    const isAlive = () => this.library.kv_contiguous_seq_len(this.#handle, 0) >= 0;
    return { stale_handle: () => isAlive() ? "the sequence was freed" : CACHE_FREED };
  }

  /** Committed and pending rows of a layer; a negative status if there are none to speak of. */
  rowCount(layer: number, sequence: number): number {
    return this.library.kv_contiguous_row_count(this.#handle, layer, sequence);
  }

  /** Zero-copy elements of one side: `length` rows from row `start`. The indices must be known to be in range. */
  rows(layer: number, sequence: number, side: Side, start: number, length: number): Float32Array | Uint16Array {
    const dtype = this.dtype[side];
    const rowBytes = this.kvDim * elementBytes(dtype);
    const buffer = this.#run(layer, sequence, side, (start + length) * rowBytes);
    return rowsOver(buffer, dtype, start * this.kvDim, length * this.kvDim);
  }

  /** Detaches the arrays over one sequence, or all of them: from then on they have length 0. */
  detach(sequence?: number): void {
    for (const [key, buffers] of this.#runs) {
      if (sequence !== undefined && !key.startsWith(`${sequence}:`)) continue;
      buffers.forEach(detach);
      this.#runs.delete(key);
    }
  }

  /** Detaches all arrays, then frees the native cache if it is owned; harmless when repeated. */
  free(): void {
    if (this.#handle === 0) return;
    this.detach();
    unwatch(this);
    if (this.owned) this.library.kv_contiguous_free(this.#handle);
    this.#handle = 0;
  }

  /** The buffer over a run, with at least `bytes` bytes. */
  #run(layer: number, sequence: number, side: Side, bytes: number): ArrayBuffer {
    const key = `${sequence}:${layer}:${side}`;
    const buffers = (this.#runs.get(key) ?? []).filter((buffer) => !isDetached(buffer));
    const current = buffers.at(-1);
    // Both conditions matter: an array without rows needs a buffer, too.
    if (current !== undefined && byteLengthOf(current) >= bytes) return current;

    const action = "make an array over native memory";
    if (!this.owned) {
      throw new KvError(
        "unsupported",
        `Cannot ${action} as the cache is attached and its owner could not detach it: use gather() or attend()`,
      );
    }
    const record = newRecord("rows");
    const status = this.library[side === "k" ? "kv_contiguous_keys" : "kv_contiguous_values"](
      this.#handle,
      layer,
      sequence,
      record,
      record.byteLength,
    );
    if (status < 0) throw refusal(status, action, this.freedRule);
    const capacityBytes = uint64At(record, 3);
    // The whole run where the runtime can, so that one buffer serves the cache's whole life.
    const length = capacityBytes <= adapter.viewBytesMax ? capacityBytes : bytes;
    if (length > adapter.viewBytesMax) {
      const max = adapter.viewBytesMax;
      throw new KvError("unsupported", `Cannot ${action} as an ArrayBuffer has at most ${max} bytes here: ${bytes}`);
    }
    const buffer = length === 0 ? new ArrayBuffer(0) : adapter.view(record[1]!, record[2]!, length);
    owners.set(buffer, this);
    buffers.push(buffer);
    this.#runs.set(key, buffers);
    return buffer;
  }
}

/** Makes a native cache of `options`. */
export function createContiguous(options: ContiguousCacheOptions): ContiguousMemory {
  const record = recordOf(options, "create a cache");
  const native = library();
  const handle = native.kv_contiguous_create(record, record.byteLength);
  if (handle < 0) throw refusal(handle, "create a cache", { out_of_memory: () => limitRule(native, record) });
  return new ContiguousMemory(native, handle, true);
}

/** The native cache of `handle`, of whoever made it. */
export function attachContiguous(handle: number): ContiguousMemory {
  return new ContiguousMemory(library(), handle, false);
}

/** Made outside the class, so that the closure cannot hold the object it waits for. */
function freeing(native: Library, handle: number): () => void {
  return () => native.kv_contiguous_free(handle);
}

/** Says how much was asked for and how much there is. */
function limitRule(native: Library, record: Uint32Array): string {
  const system = newRecord("system");
  native.kv_system_info(system, system.byteLength);
  const limit = uint64At(record, 8) || uint64At(system, 4);
  return `the limit of ${limit} bytes would be passed or the system refused: K and V need ${bytesText(record)} bytes`;
}
