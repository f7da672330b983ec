/**
 * One sequence of a contiguous cache, as a `KvCache`.
 *
 * Its rows of a layer are one run, so `contiguousKv` always has them and there is one view at most; there are no packed
 * views, because the rows are token-major.
 *
 * @module
 */

import { type AttendOptions, NO_FLOATS, writeAttend } from "./attention.ts";
import type {
  AppendOptions,
  AppendResult,
  CommitOptions,
  ContiguousKv,
  DevicePlacement,
  GatheredRows,
  GatherOptions,
  KvCache,
  View,
} from "./cache.ts";
import { checkCount, dtypeCode } from "./config.ts";
import type { ContiguousMemory } from "./contiguous_memory.ts";
import { allViews, appendRows, countText, rangeRules } from "./contiguous_rows.ts";
import { KvError } from "./error.ts";
import { newRecord } from "./ffi/record.ts";
import { refusal } from "./ffi/status.ts";
import { checkAttached, checkInto, newRows, type Rows } from "./rows.ts";

/** Options left out; shared, so that a call without them allocates none. */
const NO_OPTIONS = {};

/** One sequence; made by `ContiguousCache.sequence` and nobody else. */
export class ContiguousSequence implements KvCache {
  readonly #memory: ContiguousMemory;
  readonly #index: number;
  #freed = false;

  constructor(memory: ContiguousMemory, index: number) {
    this.#memory = memory;
    this.#index = index;
  }

  get layerCount(): number {
    return this.#memory.layerCount;
  }

  get kvHeadCount(): number {
    return this.#memory.kvHeadCount;
  }

  get headDim(): number {
    return this.#memory.headDim;
  }

  get kvDim(): number {
    return this.#memory.kvDim;
  }

  get maxSeqLen(): number {
    return this.#memory.maxSeqLen;
  }

  get seqLen(): number {
    const length = this.#memory.library.kv_contiguous_seq_len(this.#handle, this.#index);
    if (length < 0) throw refusal(length, "read the length of a sequence");
    return length;
  }

  get isOnGpu(): boolean {
    for (let layer = 0; layer < this.layerCount; layer++) {
      if (this.layerDevice(layer).device === "cpu") return false;
    }
    return true;
  }

  append(layer: number, k: Rows, v: Rows, options?: AppendOptions): AppendResult {
    return appendRows(this.#memory, this.#handle, layer, this.#index, k, v, options);
  }

  commit(n: number, options: CommitOptions = NO_OPTIONS): void {
    checkCount("n", n);
    const { tokens } = options;
    if (tokens !== undefined) {
      if (!(tokens instanceof Uint32Array)) throw new TypeError("tokens must be a Uint32Array");
      if (tokens.length === 0) checkAttached("tokens", tokens);
      if (tokens.length !== n) {
        const count = tokens.length;
        throw new KvError(
          "invalid_size",
          `Cannot commit ${countText(n, "token")} as each needs an id: tokens has ${count}`,
        );
      }
    }
    const status = this.#memory.library.kv_contiguous_commit(this.#handle, this.#index, n);
    if (status < 0) {
      throw refusal(status, `commit ${countText(n, "token")}`, {
        commit_mismatch: () => `every layer must have exactly that many rows pending: ${this.#pendingText()}`,
      });
    }
  }

  contiguousKv(layer: number, kvLen?: number): ContiguousKv {
    checkCount("layer", layer);
    if (kvLen !== undefined) checkCount("kvLen", kvLen);
    const memory = this.#memory;
    const action = `read layer ${layer} as one run`;
    const rules = rangeRules(memory, layer, this.#index);
    const rows = memory.library.kv_contiguous_row_count(this.#handle, layer, this.#index);
    if (rows < 0) throw refusal(rows, action, rules);
    const record = newRecord("view");
    const length = memory.library.kv_contiguous_contiguous_kv(
      this.#handle,
      layer,
      this.#index,
      kvLen ?? rows,
      record,
      record.byteLength,
    );
    if (length < 0) {
      throw refusal(length, action, {
        ...rules,
        position_out_of_range: () => `it has ${rows} rows: kvLen is ${kvLen}`,
      });
    }
    const k = memory.rows(layer, this.#index, "k", 0, length);
    const v = memory.rows(layer, this.#index, "v", 0, length);
    return { ok: true, k, v, length };
  }

  gather(layer: number, options: GatherOptions = NO_OPTIONS): GatheredRows {
    checkCount("layer", layer);
    const { dtype = "f32", into } = options;
    const code = dtypeCode("dtype", dtype);
    if (into !== undefined) {
      checkInto("into.k", into.k, dtype);
      checkInto("into.v", into.v, dtype);
    }
    const memory = this.#memory;
    const action = `gather layer ${layer}`;
    const rules = rangeRules(memory, layer, this.#index);
    const rows = memory.library.kv_contiguous_row_count(this.#handle, layer, this.#index);
    if (rows < 0) throw refusal(rows, action, rules);
    const count = rows * memory.kvDim;
    if (count >= 2 ** 32) {
      throw new KvError("unsupported", `Cannot ${action} as a copy has less than 2^32 elements a side: ${count}`);
    }
    const k = into?.k ?? newRows(dtype, count);
    const v = into?.v ?? newRows(dtype, count);
    const status = memory.library.kv_contiguous_gather(
      this.#handle,
      layer,
      this.#index,
      k,
      Math.min(k.length, 2 ** 32 - 1),
      v,
      Math.min(v.length, 2 ** 32 - 1),
      code,
    );
    if (status < 0) {
      throw refusal(status, action, {
        ...rules,
        invalid_size: () => `its ${rows} rows have ${count} elements a side: k has ${k.length}, v has ${v.length}`,
      });
    }
    return { k, v };
  }

  views(layer: number): View[] {
    return allViews(this.#memory, this.#handle, layer, this.#index);
  }

  truncate(n: number): void {
    checkCount("n", n);
    const status = this.#memory.library.kv_contiguous_truncate(this.#handle, this.#index, n);
    if (status < 0) {
      throw refusal(status, `truncate to ${countText(n, "token")}`, {
        position_out_of_range: () => `that is past the end: current length is ${this.seqLen}`,
      });
    }
  }

  layerDevice(layer: number): DevicePlacement {
    checkCount("layer", layer);
    const placement = this.#memory.library.kv_contiguous_layer_device(this.#handle, layer);
    if (placement < 0) {
      throw refusal(placement, `place layer ${layer}`, rangeRules(this.#memory, layer, this.#index));
    }
    return placement === 0 ? { device: "cpu", gpu: -1 } : { device: "cuda", gpu: placement - 1 };
  }

  attend(layer: number, q: Float32Array, options: AttendOptions = NO_OPTIONS): Float32Array {
    checkCount("layer", layer);
    const memory = this.#memory;
    const record = memory.attendRecord;
    writeAttend(record, q, options);
    const { alibiSlopes = NO_FLOATS, sinkLogits = NO_FLOATS, lse = NO_FLOATS } = options;
    const output = options.into ?? new Float32Array(q.length);
    const status = memory.library.kv_contiguous_attend(
      this.#handle,
      layer,
      this.#index,
      q,
      q.length,
      record.words,
      record.words.byteLength,
      alibiSlopes,
      alibiSlopes.length,
      sinkLogits,
      sinkLogits.length,
      output,
      output.length,
      lse,
      lse.length,
    );
    if (status < 0) throw this.#attendRefusal(status, layer, q, options);
    return output;
  }

  free(): void {
    if (this.#freed) return;
    if (this.#memory.owned && this.#memory.handle !== 0) {
      this.#memory.detach(this.#index);
      this.truncate(0);
    }
    this.#freed = true;
  }

  [Symbol.dispose](): void {
    this.free();
  }

  /** True once `free` was called, here or on the cache. */
  get isFreed(): boolean {
    return this.#freed || this.#memory.handle === 0;
  }

  /** 0, which native code refuses as stale, once this was freed. */
  get #handle(): number {
    return this.#freed ? 0 : this.#memory.handle;
  }

  /** Which layers have how many rows pending, the first few of them. */
  #pendingText(): string {
    const pending: string[] = [];
    for (let layer = 0; layer < Math.min(this.layerCount, 4); layer++) {
      pending.push(`layer ${layer} has ${this.#memory.rowCount(layer, this.#index) - this.seqLen}`);
    }
    return pending.join(", ");
  }

  #attendRefusal(status: number, layer: number, q: Float32Array, options: AttendOptions): KvError {
    const { queryCount = 1, alibiSlopes, sinkLogits, into, lse } = options;
    return refusal(status, `attend in layer ${layer}`, {
      ...rangeRules(this.#memory, layer, this.#index),
      invalid_size: () => {
        const row = queryCount * this.headDim;
        const given = Object.entries({ q, into, lse, alibiSlopes, sinkLogits })
          .filter(([, array]) => array !== undefined).map(([name, array]) => `${name} has ${array!.length}`);
        return `q must be ${row} elements times a multiple of ${this.kvHeadCount} heads, into as long as q, lse one ` +
          `for each query and head, slopes and logits one for each head: ${given.join(", ")}`;
      },
    });
  }
}
