/**
 * Arrays of the small computations that a graph makes of lengths and masks, done here to see what they come to.
 *
 * @module
 */

import { cannotCut } from "../model/refusal.ts";

/** An array: always a shape, and elements unless they depend on weights or tokens. */
export interface Known {
  /** One of `ELEMENT`. */
  readonly type: number;
  readonly dims: readonly number[];
  /** Truth as 0 and 1. */
  readonly values?: readonly number[] | Float64Array;
}

/** Most elements of an array: the mask of two tokens behind a long past is far smaller. */
const ELEMENTS_MAX = 1 << 22;

/** The number of elements, which must be one that can be computed here. */
export function sizeOf(dims: readonly number[]): number {
  const size = dims.reduce((product, dim) => product * dim, 1);
  if (dims.some((dim) => dim < 0) || !Number.isSafeInteger(size)) {
    throw cannotCut(`the dimensions of a value must be 0 or more: they are ${dims.join(", ")}`);
  }
  return size;
}

/** Elements by a function of their place; refuses what is too much. */
export function fill(dims: readonly number[], element: (index: number) => number): Float64Array {
  const size = sizeOf(dims);
  if (size > ELEMENTS_MAX) throw cannotCut(`a mask must have at most ${ELEMENTS_MAX} elements: it has ${size}`);
  const values = new Float64Array(size);
  for (let i = 0; i < size; i++) values[i] = element(i);
  return values;
}

/** Elements that each axis is apart. */
export function stridesOf(dims: readonly number[]): number[] {
  const strides = dims.map(() => 1);
  for (let axis = dims.length - 2; axis >= 0; axis--) strides[axis] = strides[axis + 1]! * dims[axis + 1]!;
  return strides;
}

/** The array of `dims` whose element at a place is that of `source` at `offset + sum(place * strides)`. */
export function strided(
  source: Known,
  dims: readonly number[],
  strides: readonly number[],
  offset = 0,
): Known {
  const { type, values } = source;
  if (values === undefined) {
    sizeOf(dims);
    return { type, dims };
  }
  const own = stridesOf(dims);
  const element = (index: number) => {
    let at = offset;
    let rest = index;
    for (let axis = 0; axis < dims.length; axis++) {
      const place = Math.floor(rest / own[axis]!);
      rest -= place * own[axis]!;
      at += place * strides[axis]!;
    }
    return values[at] ?? NaN;
  };
  return { type, dims, values: fill(dims, element) };
}

/** The shape that two shapes have together, or undefined where they have none. */
export function broadcastDims(a: readonly number[], b: readonly number[]): number[] | undefined {
  const rank = Math.max(a.length, b.length);
  const dims: number[] = [];
  for (let axis = 0; axis < rank; axis++) {
    const left = a[axis - rank + a.length] ?? 1;
    const right = b[axis - rank + b.length] ?? 1;
    if (left !== right && left !== 1 && right !== 1) return undefined;
    dims.push(left === 1 ? right : left);
  }
  return dims;
}

/** The array with lengths of 1 repeated to those of `dims`. */
export function expanded(source: Known, dims: readonly number[]): Known {
  if (sizeOf(dims) === sizeOf(source.dims)) return { ...source, dims };
  const missing = dims.length - source.dims.length;
  const strides = stridesOf(source.dims);
  const repeated = dims.map((_, axis) => {
    const from = axis - missing;
    return from < 0 || source.dims[from] === 1 ? 0 : strides[from]!;
  });
  return strided(source, dims, repeated);
}

/** An axis counted from the end as one counted from the start. */
export function axisOf(axis: number, rank: number): number {
  const from = axis < 0 ? axis + rank : axis;
  if (Number.isInteger(from) && from >= 0 && from < rank) return from;
  throw cannotCut(`an axis must be one of ${rank}: it is ${axis}`);
}

/** The elements, where they are known. */
export function valuesOf(array: Known | undefined): readonly number[] | undefined {
  return array?.values === undefined ? undefined : Array.from(array.values);
}
