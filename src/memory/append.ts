/**
 * Rows written behind those a layer has, the same for every kind of cache.
 *
 * @module
 */

import type { AppendResult } from "../cache.ts";
import type { KvError } from "../error.ts";
import { fieldsOf, type FieldWords, newRecord } from "../ffi/record.ts";
import { countText, refusal } from "../ffi/status.ts";
import type { AppendOptions } from "../options/append.ts";
import { checkCount } from "../options/counts.ts";
import { layoutWords, lengthRule, rowCountIn } from "../options/layout.ts";
import { type AppendedRows, rowsRule } from "../options/not_finite.ts";
import { inputCount, inputDtype, type Rows } from "../options/rows.ts";
import { lengthOf } from "../options/typed_array.ts";
import type { SequenceMemory } from "./sequence.ts";
import { Appended } from "./view.ts";

const APPEND: FieldWords<"append"> = fieldsOf("append");

/** What the library says of the last append; read before any other code runs. */
const appended = newRecord("append");

/** The rule about blocks, the same for every append. */
export const POOL_EMPTY = "no block is free and the byte limit of the pool would be passed";

/** Appends rows to one layer of one sequence; the options were read already. */
export function appendRows(
  memory: SequenceMemory,
  layer: number,
  k: Rows,
  v: Rows,
  { dtype, layout, headStride }: AppendOptions,
): AppendResult {
  const action = "append";
  checkCount("layer", layer);
  const inputCode = inputDtype(k, v, dtype);
  const { order, stride } = layoutWords(layout, headStride, action);
  const kCount = inputCount("k", k, action);
  const vCount = inputCount("v", v, action);
  memory.checkOwn(action);
  const { cache, handle, index } = memory;
  const start = cache.library.kv_sequence_append(
    handle,
    index,
    layer,
    k,
    kCount,
    v,
    vCount,
    inputCode,
    order,
    stride,
    appended,
    appended.byteLength,
  );
  if (start < 0) throw writeRefusal(start, memory, action, layer, { k, v, dtype, layout, headStride });
  const generation = appended[APPEND.generation]!;
  memory.settle(start);
  const rowCount = stride === 0 ? kCount / cache.kvDimOf(layer) : rowCountIn(kCount, cache.shapeOf(layer), stride);
  return new Appended(memory, layer, start, rowCount, generation);
}

/** The refusal of an append or a store, with the values its rule is about. */
export function writeRefusal(
  status: number,
  memory: SequenceMemory,
  verb: "append" | "store",
  layer: number,
  rows: AppendedRows,
): KvError {
  const { cache } = memory;
  const kCount = lengthOf(rows.k), vCount = lengthOf(rows.v);
  const { headStride } = rows;
  const shape = cache.shapeOf(layer);
  const length = verb === "append" ? lengthRule(shape, headStride) : `${cache.kvDimOf(layer)} elements`;
  const tokenCount = Math.max(0, Math.ceil(rowCountIn(kCount, shape, headStride)));
  return refusal(status, `${verb} ${countText(tokenCount, "token")} to layer ${layer}`, {
    ...memory.rules(layer),
    cache_full: () => `the sequence holds at most ${cache.maxSeqLen}: current length is ${memory.rowCount(layer)}`,
    invalid_size: () => `k and v must be equally long, ${length}: k has ${kCount}, v has ${vCount}`,
    commit_mismatch: () => `layer and sequence have a pending row already: advance() comes first`,
    not_finite: () => rowsRule(rows, cache.shapeOf(layer), cache.storedAs(layer)),
    pool_empty: () => POOL_EMPTY,
  });
}
