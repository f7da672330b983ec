/**
 * Rows written into a contiguous cache, and the views of them.
 *
 * A contiguous cache keeps the rows of a (layer, sequence) in one run, so there is one view at most, and all its facts
 * follow from where it starts and how long it is.
 *
 * @module
 */

import type { AppendResult, View } from "../cache.ts";
import type { KvError } from "../error.ts";
import { newRecord, VIEW } from "../ffi/record.ts";
import { countText, refusal } from "../ffi/status.ts";
import type { AppendOptions } from "../options/append.ts";
import { checkCount } from "../options/counts.ts";
import { type AppendedRows, rowsRule } from "../options/not_finite.ts";
import { inputCount, inputDtype, layoutCode, type Rows } from "../options/rows.ts";
import { lengthOf } from "../options/typed_array.ts";
import type { ContiguousMemory } from "./contiguous.ts";
import { Appended, type Side, viewsOf, type ViewSource } from "./view.ts";

/** Appends rows to one layer of one sequence; `handle` is 0 if the sequence object was freed. */
export function appendRows(
  memory: ContiguousMemory,
  handle: number,
  layer: number,
  sequence: number,
  k: Rows,
  v: Rows,
  dtype: AppendOptions["dtype"],
  layout: AppendOptions["layout"],
): AppendResult {
  checkCount("layer", layer);
  checkCount("sequence", sequence);
  const inputCode = inputDtype(k, v, dtype);
  const order = layoutCode(layout);
  const kCount = inputCount("k", k, "append");
  const vCount = inputCount("v", v, "append");
  const { library } = memory;
  const start = library.kv_contiguous_append(handle, layer, sequence, k, kCount, v, vCount, inputCode, order);
  if (start < 0) throw writeRefusal(start, memory, "append", layer, sequence, { k, v, dtype, layout });
  return new Appended(new ContiguousRun(memory, sequence), layer, start, kCount / memory.kvDim);
}

/** The refusal of an append or a store, with the values its rule is about. */
export function writeRefusal(
  status: number,
  memory: ContiguousMemory,
  verb: "append" | "store",
  layer: number,
  sequence: number,
  rows: AppendedRows,
): KvError {
  const kCount = lengthOf(rows.k), vCount = lengthOf(rows.v);
  const n = Math.ceil(kCount / memory.kvDim);
  const length = verb === "append" ? `a multiple of ${memory.kvDim} elements` : `${memory.kvDim} elements`;
  return refusal(status, `${verb} ${countText(n, "token")} to layer ${layer}`, {
    ...rangeRules(memory, layer, sequence),
    cache_full: () =>
      `the sequence holds at most ${memory.maxSeqLen}: current length is ${memory.rowCount(layer, sequence)}`,
    invalid_size: () => `k and v must be equally long, ${length}: k has ${kCount}, v has ${vCount}`,
    commit_mismatch: () => `layer and sequence have a pending row already: advance() comes first`,
    not_finite: () => rowsRule(rows, memory, { k: [memory.dtype.k], v: [memory.dtype.v] }),
  });
}

/** The rules about indices, the same for every call. */
export function rangeRules(
  memory: ContiguousMemory,
  layer: number,
  sequence: number,
): Record<"layer_out_of_range" | "sequence_out_of_range" | "stale_handle", () => string> {
  return {
    ...memory.freedRule,
    layer_out_of_range: () => `the cache has ${countText(memory.layerCount, "layer")}: layer is ${layer}`,
    sequence_out_of_range: () =>
      `the cache has ${countText(memory.sequenceCount, "sequence")}: sequence is ${sequence}`,
  };
}

/** The view of all rows a layer has now; none if there are no rows. */
export function allViews(memory: ContiguousMemory, handle: number, layer: number, sequence: number): View[] {
  checkCount("layer", layer);
  const record = newRecord("view");
  const views = memory.library.kv_contiguous_views(handle, layer, sequence, record, record.byteLength);
  if (views < 0) throw refusal(views, `view layer ${layer}`, rangeRules(memory, layer, sequence));
  return views === 0 ? [] : viewsOf(new ContiguousRun(memory, sequence), layer, [record]);
}

/** One sequence, as windows see it: its rows of a layer are one run. */
class ContiguousRun implements ViewSource {
  readonly #memory: ContiguousMemory;
  readonly #sequence: number;

  constructor(memory: ContiguousMemory, sequence: number) {
    this.#memory = memory;
    this.#sequence = sequence;
  }

  generation(layer: number): number {
    const { library, handle } = this.#memory;
    return library.kv_contiguous_generation(handle, layer, this.#sequence);
  }

  array(layer: number, side: Side, record: Uint32Array): Float32Array | Uint16Array {
    return this.#memory.rows(layer, this.#sequence, side, record[VIEW.start]!, record[VIEW.length]!);
  }

  windows(layer: number, start: number, length: number): Uint32Array[] {
    const record = newRecord("view");
    const { library, handle } = this.#memory;
    library.kv_contiguous_views(handle, layer, this.#sequence, record, record.byteLength);
    record[VIEW.start] = start;
    record[VIEW.length] = length;
    return [record];
  }
}
