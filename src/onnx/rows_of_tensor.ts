/**
 * Some rows of a tensor that has one for each token: `[1, row, ...]`, or `[row, ...]` where a graph packs its batch.
 *
 * @module
 */

import type { Ort, OrtTensor } from "./ort.ts";

/** A typed array, as far as rows are taken out of it. */
type Elements = Float32Array | Int32Array | BigInt64Array | Uint8Array;

/** The rows at `indices` of a tensor of `rowCount` rows; undefined for a tensor whose rows cannot be told. */
export function rowsOfTensor(
  ort: Ort,
  { type, dims, data }: OrtTensor,
  rowCount: number,
  indices: Uint32Array,
): OrtTensor | undefined {
  if (dims.length < 2) return undefined;
  const axis = dims[0] === rowCount ? 0 : dims[0] === 1 && dims[1] === rowCount ? 1 : -1;
  if (axis < 0 || !isElements(data)) return undefined;
  const rows = takeRows(data, rowCount, indices);
  const dimsOfRows = dims.map((length, i) => i === axis ? indices.length : length);
  if (type === "float32" && rows instanceof Float32Array) return new ort.Tensor(type, rows, dimsOfRows);
  if (type === "int64" && rows instanceof BigInt64Array) return new ort.Tensor(type, rows, dimsOfRows);
  if (type === "int32" && rows instanceof Int32Array) return new ort.Tensor(type, rows, dimsOfRows);
  if (type === "bool" && rows instanceof Uint8Array) return new ort.Tensor(type, rows, dimsOfRows);
  return undefined;
}

/** The rows at `indices`, one after the other. */
export function takeRows<Rows extends Elements>(all: Rows, rowCount: number, indices: Uint32Array): Rows {
  const width = all.length / rowCount;
  const rows = new (all.constructor as new (length: number) => Rows)(indices.length * width);
  indices.forEach((index, i) => rows.set(all.subarray(index * width, (index + 1) * width) as never, i * width));
  return rows;
}

function isElements(data: unknown): data is Elements {
  return data instanceof Float32Array || data instanceof Int32Array || data instanceof BigInt64Array ||
    data instanceof Uint8Array;
}
