/**
 * The native cache behind a `PagedCache`: handle, geometry, and the sequences that live in it.
 *
 * It knows its sequences weakly, so that one nobody can reach is freed; each of them keeps it.
 *
 * @module
 */

import { KvError } from "../error.ts";
import { ENUMS, type Library } from "../ffi/exports.ts";
import { library } from "../ffi/library.ts";
import { newRecord, newRecords, recordAt, type Values, valuesOf } from "../ffi/record.ts";
import { CACHE_FREED, countText, type FreedRule, refusal, unknownHandle } from "../ffi/status.ts";
import { type AttendBuffers, newAttendBuffers } from "../options/attend.ts";
import { type DType, type FloatDType, floatDtypeOf } from "../options/dtype.ts";
import { BLOCK_LIMITS } from "../options/format.ts";
import {
  groupsOf,
  type LayerShape,
  type PagedLayer,
  pagedLayerOf,
  planOf,
  type PlanOptions,
} from "../options/paged.ts";
import { type Policy, policyOf } from "../options/policy.ts";
import { type Prompt, promptWords } from "../options/prompt.ts";
import type { Sight } from "../options/retention.ts";
import { lengthOf } from "../options/typed_array.ts";
import type { AskedRows, CacheMemory, IndexRules, Resident, SequenceToken } from "./cache.ts";
import { newExplanation } from "./explanation.ts";
import { freePartWhenDropped, freeWhenDropped, unwatch } from "./finalization.ts";
import type { PoolMemory } from "./pool.ts";

/** One native cache, owned or attached; an attached one frees nothing but sequences of its own. */
export class PagedMemory implements CacheMemory {
  readonly library: Library;
  readonly owned: boolean;
  readonly isPaged = true;
  readonly layers: readonly PagedLayer[];
  /** Group of each layer: those of one shape, numbered as they first occur. */
  readonly groups: readonly number[];
  readonly maxSeqLen: number;
  readonly blockSize: number;
  /** How rows of the tail are stored. */
  readonly dtype: { readonly k: FloatDType; readonly v: FloatDType };
  /** 0 keeps all rows. */
  readonly retentionTokens: number;
  readonly retentionSinkTokens: number;
  readonly rewindTokens: number;
  /** True if rows that migrate are compared with what they become. */
  readonly measuresFidelity: boolean;
  /** True if rows are found by the tokens that a commit tells. */
  readonly findsTokens: boolean;
  /** Kept, so that a pool in use is not collected. */
  readonly pool: PoolMemory | undefined;
  readonly attendBuffers: AttendBuffers = newAttendBuffers();
  #handle: number;
  /** Sequences that were not freed yet, those nobody can reach among them. */
  readonly #sequences: Map<SequenceToken, WeakRef<Resident>> = new Map();

  constructor(native: Library, handle: number, owned: boolean, pool?: PoolMemory) {
    this.library = native;
    this.#handle = handle;
    this.owned = owned;
    this.pool = pool;
    const action = `attach the cache of handle ${handle}`;
    const record = newRecord("paged");
    let status = native.kv_paged_config(handle, record, record.byteLength, NO_LAYERS, 0);
    if (status < 0) throw refusal(status, action, unknownHandle("cache"));
    const values = valuesOf("paged", record);
    const layers = newRecords("layer", values.layerCount);
    status = native.kv_paged_config(handle, record, record.byteLength, layers, layers.byteLength);
    if (status < 0) throw refusal(status, action, unknownHandle("cache"));
    this.layers = Array.from(
      { length: values.layerCount },
      (_, layer) => pagedLayerOf(valuesOf("layer", recordAt("layer", layers, layer))),
    );
    this.groups = groupsOf(this.layers);
    this.maxSeqLen = values.maxSeqLen;
    this.blockSize = values.blockSize;
    this.dtype = { k: floatDtypeOf(values.dtypeK), v: floatDtypeOf(values.dtypeV) };
    this.retentionTokens = values.retentionTokens;
    this.retentionSinkTokens = values.retentionSinkTokens;
    this.rewindTokens = values.rewindTokens;
    this.measuresFidelity = values.measuresFidelity !== 0;
    this.findsTokens = values.prefixMode !== ENUMS.prefixMode.none;
    if (owned) freeWhenDropped(this, freeing(native, handle, this.#sequences));
  }

  get handle(): number {
    return this.#handle;
  }

  get layerCount(): number {
    return this.layers.length;
  }

  kvDimOf(layer: number): number {
    const { kvHeadCount, headDim } = this.shapeOf(layer);
    return kvHeadCount * headDim;
  }

  tokenStrideOf(layer: number): number {
    return this.shapeOf(layer).headDim;
  }

  shapeOf(layer: number): LayerShape {
    return this.layers[layer] ?? this.layers[0]!;
  }

  /** What was looked up by tokens. */
  prefixStats(): Uint32Array {
    const record = newRecord("prefixStats");
    const status = this.library.kv_paged_prefix_stats(this.#handle, record, record.byteLength);
    if (status < 0) throw refusal(status, "count what prompts found", this.freedRule);
    return record;
  }

  /** Tokens of a prompt that sequences were made with and have not committed yet. */
  pendingPrefix(prompt: Prompt): number {
    const count = this.library.kv_paged_pending_prefix(this.#handle, ...promptWords(prompt));
    if (count < 0) throw refusal(count, "look a prompt up", this.promptRules(prompt.tokens));
    return count;
  }

  /** Why a prompt would start where it would: an ExplanationRecord. */
  explain(prompt: Prompt): Uint32Array {
    const record = newExplanation();
    const status = this.library.kv_paged_explain(this.#handle, ...promptWords(prompt), record, record.byteLength);
    if (status < 0) throw refusal(status, EXPLAIN, this.promptRules(prompt.tokens));
    return record;
  }

  /** What changed since the last call, as words. */
  takeEvents(): Uint32Array {
    for (let words = new Uint32Array(1024);;) {
      const count = this.library.kv_paged_events(this.#handle, words, words.length);
      if (count < 0) {
        throw refusal(count, "take events", {
          ...this.freedRule,
          unsupported: () => "the cache keeps none: they take prefix: { events: true }",
        });
      }
      if (count <= words.length) return words.subarray(0, count);
      words = new Uint32Array(count);
    }
  }

  /** The rules about a prompt. */
  promptRules(tokens: Uint32Array): Record<"cache_full" | "invalid_config" | "stale_handle", () => string> {
    return {
      ...this.freedRule,
      cache_full: () => `a sequence holds at most ${this.maxSeqLen} rows: tokens has ${lengthOf(tokens)}`,
      invalid_config: () => "a cache on a shared pool does not find rows by their tokens",
    };
  }

  /** What becomes of old rows, as the native cache knows it: others may have changed it. */
  policy(): Policy {
    return policyOf(this.#config("read the policy of a cache"));
  }

  /** The facts of the native cache but its layers, or the refusal of an action. */
  #config(action: string): Values<"paged"> {
    const record = newRecord("paged");
    const status = this.library.kv_paged_config(this.#handle, record, record.byteLength, NO_LAYERS, 0);
    if (status < 0) throw refusal(status, action, this.freedRule);
    return valuesOf("paged", record);
  }

  sightOf(layer: number, { causal, windowTokens = Infinity, sinkTokens }: AskedRows): Sight {
    const { windowTokens: layerWindowTokens = Infinity } = this.shapeOf(layer);
    const newestTokens = this.retentionTokens === 0 ? Infinity : this.retentionTokens - this.retentionSinkTokens;
    return { causal, windowTokens, layerWindowTokens, newestTokens, sinkTokens };
  }

  get freedRule(): FreedRule {
    return { stale_handle: () => this.#isAlive() ? "the sequence was freed" : CACHE_FREED };
  }

  #isAlive(): boolean {
    const record = newRecord("paged");
    return this.library.kv_paged_config(this.#handle, record, record.byteLength, NO_LAYERS, 0) >= 0;
  }

  indexRules(layer: number, index: number = 0): IndexRules {
    return {
      ...this.freedRule,
      layer_out_of_range: () => `the cache has ${countText(this.layers.length, "layer")}: layer is ${layer}`,
      sequence_out_of_range: () => `a sequence of a paged cache has no index: it is ${index}`,
    };
  }

  storedAs(layer: number): { readonly k: readonly DType[]; readonly v: readonly DType[] } {
    const policy = this.policy();
    const store = policy.kind === "tail-only" ? undefined : this.shapeOf(layer).store ?? policy.store;
    if (store === undefined) return { k: [this.dtype.k], v: [this.dtype.v] };
    const { k, v } = typeof store === "string" ? { k: store, v: store } : store;
    return { k: [this.dtype.k, k], v: [this.dtype.v, v] };
  }

  /** Knows a new sequence, and frees it when nobody can reach it any more. */
  enter(resident: Resident, token: SequenceToken): void {
    this.#sequences.set(token, new WeakRef(resident));
    freePartWhenDropped(resident, freeingSequence(this.library, token, this.#sequences));
  }

  leave(resident: Resident, token: SequenceToken): void {
    if (token.handle === 0) return;
    resident.detach();
    unwatch(resident);
    freeingSequence(this.library, token, this.#sequences)();
  }

  /**
   * Empties the sequences made through this object. The owner frees all others with it: those that nobody can reach any
   * more, and those that were made elsewhere.
   */
  reset(): void {
    const reachable: [SequenceToken, Resident][] = [];
    for (const [token, reference] of this.#sequences) {
      const resident = reference.deref();
      if (resident !== undefined) reachable.push([token, resident]);
    }
    if (!this.owned) return this.#resetOwn();
    const kept = Uint32Array.from(reachable, ([{ handle }]) => handle);
    const status = this.library.kv_paged_reset(this.#handle, kept, kept.length);
    if (status < 0) throw refusal(status, RESET, this.freedRule);
    for (const [, resident] of reachable) resident.detach();
    for (const [token, reference] of this.#sequences) {
      if (reference.deref() !== undefined) continue;
      token.handle = 0;
      this.#sequences.delete(token);
    }
  }

  /** Empties the sequences made through this object, which has no arrays over them; the owner may have freed some. */
  #resetOwn(): void {
    this.#config(RESET);
    for (const { handle, index } of this.#sequences.keys()) this.library.kv_sequence_truncate(handle, index, 0);
  }

  /** Detaches all arrays, then frees the native cache if it is owned, or else its own sequences; harmless when repeated. */
  free(): void {
    if (this.#handle === 0) return;
    for (const [token, reference] of this.#sequences) {
      const resident = reference.deref();
      resident?.detach();
      if (resident !== undefined) unwatch(resident);
      if (!this.owned) this.library.kv_sequence_free(token.handle);
      token.handle = 0;
    }
    this.#sequences.clear();
    unwatch(this);
    if (this.owned) this.library.kv_paged_free(this.#handle);
    this.#handle = 0;
  }
}

/** What `explain` does, of a cache and of a sequence. */
export const EXPLAIN = "explain what a prompt finds";

const RESET = "reset a cache";

/** The layers of a config that are not wanted. */
const NO_LAYERS = new Uint32Array(0);

/** Makes a native cache of `options`, on a pool where there is one; `memoryOf` knows what a pool is. */
export function createPaged<Pool>(
  options: PlanOptions<Pool>,
  memoryOf: (pool: Pool) => PoolMemory,
): { readonly memory: PagedMemory; readonly pool: Pool | undefined } {
  const action = "create a cache";
  const { record, layers, pool, blockBytes } = planOf(options, (pool) => {
    const { handle } = memoryOf(pool);
    if (handle !== 0) return handle;
    throw new KvError("stale_handle", `Cannot ${action} as its pool was freed`);
  });
  const poolMemory = pool === undefined ? undefined : memoryOf(pool);
  const native = library();
  const handle = native.kv_paged_create(record, record.byteLength, layers, layers.byteLength);
  if (handle >= 0) return { memory: new PagedMemory(native, handle, true, poolMemory), pool };
  throw refusal(handle, action, {
    invalid_config: () =>
      poolMemory === undefined
        ? "a size of it does not fit"
        : "its layers must have one shape, which with blockSize and dtype must be the pool's: " + poolMemory.plan.shape,
    block_too_large: () => `a block must fit in ${BLOCK_LIMITS}: it has ${blockBytes} bytes`,
  });
}

/** The native cache of `handle`, of whoever made it. */
export function attachPaged(handle: number): PagedMemory {
  return new PagedMemory(library(), handle, false);
}

/** Made outside the class, so that the closure cannot hold the object it waits for. */
function freeing(native: Library, handle: number, sequences: Map<SequenceToken, unknown>): () => void {
  return () => {
    native.kv_paged_free(handle);
    for (const token of sequences.keys()) token.handle = 0; // they went with it
  };
}

function freeingSequence(
  native: Library,
  token: SequenceToken,
  sequences: Map<SequenceToken, unknown>,
): () => void {
  return () => {
    if (token.handle !== 0) native.kv_sequence_free(token.handle);
    token.handle = 0;
    sequences.delete(token);
  };
}
