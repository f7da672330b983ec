/**
 * One sequence of a contiguous cache, as a `KvCache`.
 *
 * Its rows of a layer are one run, so `contiguousKv` always has them and there is one view at most; there are no packed
 * views, because the rows are token-major.
 *
 * @module
 */

import type { AppendResult, ContiguousKv, DevicePlacement, GatheredRows, KvCache, View } from "../cache.ts";
import { newRecord } from "../ffi/record.ts";
import { countText, refusal } from "../ffi/status.ts";
import { APPEND_NAMES, type AppendOptions } from "../options/append.ts";
import {
  ATTEND_NAMES,
  type AttendOptions,
  attendRefusal,
  givenCount,
  lseCount,
  NO_FLOATS,
  NO_PARENTS,
  readAttend,
  writeAttend,
} from "../options/attend.ts";
import { checkTokens, COMMIT_NAMES, type CommitOptions, pendingText } from "../options/commit.ts";
import { checkCount } from "../options/counts.ts";
import type { GatherOptions } from "../options/gather.ts";
import { givenOptions } from "../options/option_names.ts";
import { inputCount, outputCount, type Rows } from "../options/rows.ts";
import type { ContiguousMemory } from "./contiguous.ts";
import { allViews, appendRows, rangeRules } from "./contiguous_rows.ts";
import { gatherRows, type GatherSource } from "./gather.ts";
import { showAs } from "./inspect.ts";

/** One sequence; made by `ContiguousCache.sequence` and nobody else. */
export class ContiguousSequence implements KvCache {
  readonly #memory: ContiguousMemory;
  readonly #index: number;
  #freed = false;

  static {
    showAs(ContiguousSequence, (sequence) => {
      if (sequence.isFreed) return undefined;
      const { seqLen, maxSeqLen, layerCount, kvHeadCount, headDim } = sequence;
      return { seqLen, maxSeqLen, layerCount, kvHeadCount, headDim };
    });
  }

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
    if (length < 0) throw refusal(length, "read the length of a sequence", this.#memory.freedRule);
    return length;
  }

  /** Every length can be gone back to. */
  get rewindableTo(): number {
    const length = this.#memory.library.kv_contiguous_seq_len(this.#handle, this.#index);
    if (length < 0) throw refusal(length, "read how far a sequence can be rewound", this.#memory.freedRule);
    return 0;
  }

  get isOnGpu(): boolean {
    for (let layer = 0; layer < this.layerCount; layer++) {
      if (this.layerDevice(layer).device === "cpu") return false;
    }
    return true;
  }

  append(layer: number, k: Rows, v: Rows, options?: AppendOptions): AppendResult {
    const { dtype, layout } = givenOptions(options, APPEND_NAMES, "append"); // first, as it may run the caller's code
    return appendRows(this.#memory, this.#handle, layer, this.#index, k, v, dtype, layout);
  }

  commit(n: number, options?: CommitOptions): void {
    const { tokens } = givenOptions(options, COMMIT_NAMES, "commit"); // first, as it may run the caller's code
    checkCount("n", n);
    checkTokens(tokens, n);
    const status = this.#memory.library.kv_contiguous_commit(this.#handle, this.#index, n);
    if (status < 0) {
      throw refusal(status, `commit ${countText(n, "token")}`, {
        ...this.#memory.freedRule,
        commit_mismatch: () =>
          `every layer must have exactly that many rows pending: ${
            pendingText(this.layerCount, (layer) => this.#memory.rowCount(layer, this.#index) - this.seqLen)
          }`,
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

  gather(layer: number, options?: GatherOptions): GatheredRows {
    return gatherRows(this.#copies, layer, options);
  }

  views(layer: number): View[] {
    return allViews(this.#memory, this.#handle, layer, this.#index);
  }

  truncate(n: number): void {
    checkCount("n", n);
    const status = this.#memory.library.kv_contiguous_truncate(this.#handle, this.#index, n);
    if (status < 0) {
      throw refusal(status, `truncate to ${countText(n, "token")}`, {
        ...this.#memory.freedRule,
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

  attend(layer: number, q: Float32Array, options?: AttendOptions): Float32Array {
    const given = readAttend(givenOptions(options, ATTEND_NAMES, "attend")); // first, as it may run the caller's code
    checkCount("layer", layer);
    const memory = this.#memory;
    const record = memory.attendRecord;
    writeAttend(record, q, given);
    const { alibiSlopes = NO_FLOATS, sinkLogits = NO_FLOATS, treeParents = NO_PARENTS, lse = NO_FLOATS } = given;
    const qCount = inputCount("q", q, "attend");
    const output = given.into ?? new Float32Array(qCount);
    const status = memory.library.kv_contiguous_attend(
      this.#handle,
      layer,
      this.#index,
      q,
      qCount,
      record.words,
      record.words.byteLength,
      alibiSlopes,
      givenCount("alibiSlopes", alibiSlopes),
      sinkLogits,
      givenCount("sinkLogits", sinkLogits),
      treeParents,
      givenCount("treeParents", treeParents),
      output,
      outputCount("into", output),
      lse,
      lseCount(lse),
    );
    if (status < 0) {
      throw attendRefusal(
        status,
        layer,
        q,
        given,
        given.queryCount ?? 1,
        memory,
        rangeRules(memory, layer, this.#index),
      );
    }
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

  /** The sequence, as a copy sees it; an option may yet free it, so the handle is asked for at each call. */
  get #copies(): GatherSource {
    const memory = this.#memory, index = this.#index;
    const { library } = memory;
    return {
      residentCount: (layer) => library.kv_contiguous_row_count(this.#handle, layer, index),
      kvDimOf: () => memory.kvDim,
      copyRows: (layer, ...args) => library.kv_contiguous_gather(this.#handle, layer, index, ...args),
      rangeRules: (layer) => rangeRules(memory, layer, index),
    };
  }
}
