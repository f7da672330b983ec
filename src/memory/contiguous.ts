/**
 * The native cache behind a `ContiguousCache`: handle, geometry, and the sequences that were looked at.
 *
 * Keys of one layer of one sequence are one piece of memory, `[position][kv_head][head_dim]`, and so are its values. A
 * sequence sees each as one block of `maxSeqLen` positions. It is known by its index for the cache's whole life or until
 * it is freed, so that whoever asks by index and whoever has its object have the same arrays.
 *
 * @module
 */

import type { Library } from "../ffi/exports.ts";
import { library } from "../ffi/library.ts";
import { newRecord, recordOf, type Values, valuesOf } from "../ffi/record.ts";
import { CACHE_FREED, countText, type FreedRule, refusal, unknownHandle } from "../ffi/status.ts";
import { type AttendBuffers, newAttendBuffers } from "../options/attend.ts";
import { bytesText, type ContiguousCacheOptions, contiguousValues } from "../options/contiguous.ts";
import { type DType, type FloatDType, floatDtypeOf } from "../options/dtype.ts";
import type { LayerShape } from "../options/paged.ts";
import type { Sight } from "../options/retention.ts";
import type { AskedRows, CacheMemory, IndexRules, Resident, SequenceToken } from "./cache.ts";
import { freeWhenDropped, unwatch } from "./finalization.ts";
import { SequenceMemory } from "./sequence.ts";

/** One native cache, owned or attached; an attached one frees nothing. */
export class ContiguousMemory implements CacheMemory {
  readonly library: Library;
  readonly owned: boolean;
  readonly isPaged = false;
  readonly findsTokens = false;
  readonly layerCount: number;
  readonly sequenceCount: number;
  readonly maxSeqLen: number;
  readonly dtype: { readonly k: FloatDType; readonly v: FloatDType };
  readonly retentionSinkTokens = 0;
  readonly attendBuffers: AttendBuffers = newAttendBuffers();
  readonly #shape: LayerShape;
  #handle: number;
  /** The sequences by index. */
  readonly #sequences: Map<number, { readonly memory: SequenceMemory; readonly token: SequenceToken }> = new Map();

  constructor(native: Library, handle: number, owned: boolean) {
    this.library = native;
    this.#handle = handle;
    this.owned = owned;
    const record = newRecord("contiguous");
    const status = native.kv_contiguous_config(handle, record, record.byteLength);
    if (status < 0) throw refusal(status, `attach the cache of handle ${handle}`, unknownHandle("cache"));
    const { layerCount, sequenceCount, maxSeqLen, kvHeadCount, headDim, qHeadCount, dtypeK, dtypeV } = valuesOf(
      "contiguous",
      record,
    );
    this.layerCount = layerCount;
    this.sequenceCount = sequenceCount;
    this.maxSeqLen = maxSeqLen;
    this.#shape = { kvHeadCount, headDim, ...(qHeadCount === 0 ? {} : { qHeadCount }) };
    this.dtype = { k: floatDtypeOf(dtypeK), v: floatDtypeOf(dtypeV) };
    if (owned) freeWhenDropped(this, freeing(native, handle));
  }

  get handle(): number {
    return this.#handle;
  }

  get blockSize(): number {
    return this.maxSeqLen;
  }

  get freedRule(): FreedRule {
    const isAlive = () => this.library.kv_sequence_seq_len(this.#handle, 0) >= 0;
    return { stale_handle: () => isAlive() ? "the sequence was freed" : CACHE_FREED };
  }

  shapeOf(_layer: number): LayerShape {
    return this.#shape;
  }

  kvDimOf(_layer: number): number {
    return this.#shape.kvHeadCount * this.#shape.headDim;
  }

  tokenStrideOf(layer: number): number {
    return this.kvDimOf(layer);
  }

  indexRules(layer: number, index: number = 0): IndexRules {
    return {
      ...this.freedRule,
      layer_out_of_range: () => `the cache has ${countText(this.layerCount, "layer")}: layer is ${layer}`,
      sequence_out_of_range: () => `the cache has ${countText(this.sequenceCount, "sequence")}: sequence is ${index}`,
    };
  }

  sightOf(_layer: number, { causal, windowTokens = Infinity, sinkTokens }: AskedRows): Sight {
    return { causal, windowTokens, layerWindowTokens: Infinity, newestTokens: Infinity, sinkTokens };
  }

  storedAs(_layer: number): { readonly k: readonly DType[]; readonly v: readonly DType[] } {
    return { k: [this.dtype.k], v: [this.dtype.v] };
  }

  /** The sequence of an index; calls with one that is out of range are refused. */
  sequence(index: number): SequenceMemory {
    const known = this.#sequences.get(index);
    if (known !== undefined) return known.memory;
    const token = { handle: this.#handle, index };
    const memory = new SequenceMemory(this, token);
    if (index < this.sequenceCount && this.#handle !== 0) this.#sequences.set(index, { memory, token });
    return memory;
  }

  leave(resident: Resident, token: SequenceToken): void {
    if (token.handle === 0) return;
    resident.detach();
    if (this.owned) this.library.kv_sequence_truncate(token.handle, token.index, 0);
    token.handle = 0;
    this.#sequences.delete(token.index);
  }

  /** Detaches all arrays, then frees the native cache if it is owned; harmless when repeated. */
  free(): void {
    if (this.#handle === 0) return;
    for (const { memory, token } of this.#sequences.values()) {
      memory.detach();
      token.handle = 0;
    }
    this.#sequences.clear();
    unwatch(this);
    if (this.owned) this.library.kv_contiguous_free(this.#handle);
    this.#handle = 0;
  }
}

/** Makes a native cache of `options`. */
export function createContiguous(options: ContiguousCacheOptions): ContiguousMemory {
  const action = "create a cache";
  const values = contiguousValues(options, action);
  const record = recordOf("contiguous", values);
  const native = library();
  const handle = native.kv_contiguous_create(record, record.byteLength);
  if (handle < 0) throw refusal(handle, action, { out_of_memory: () => limitRule(native, values) });
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
function limitRule(native: Library, values: Values<"contiguous">): string {
  const system = newRecord("system");
  native.kv_system_info(system, system.byteLength);
  const limit = values.maxBytes || valuesOf("system", system).memoryLimitBytes;
  return `the limit of ${limit} bytes would be passed or the system refused: K and V need ${bytesText(values)} bytes`;
}
