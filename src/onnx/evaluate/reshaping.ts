/**
 * Operators of ONNX that move elements, or make arrays of lengths.
 *
 * @module
 */

import { axisOf, broadcastDims, expanded, fill, type Known, sizeOf, strided, stridesOf, valuesOf } from "./array.ts";
import type { GraphNode } from "../model/node.ts";
import { ELEMENT } from "../model/tensor.ts";

/** What an operator gives, or undefined where it cannot be told. */
type Operator = (inputs: readonly (Known | undefined)[], node: GraphNode) => readonly Known[] | undefined;

const intOf = ({ attributes }: GraphNode, name: string, otherwise: number) => attributes.get(name)?.int ?? otherwise;

/** A list that is an input in newer versions of an operator, and an attribute in older ones. */
function listOf(input: Known | undefined, { attributes }: GraphNode, name: string): readonly number[] | undefined {
  return valuesOf(input) ?? attributes.get(name)?.ints;
}

function reshape(data: Known, wanted: readonly number[], isZeroKept: boolean): Known | undefined {
  const dims = wanted.map((dim, axis) => dim === 0 && isZeroKept ? data.dims[axis] ?? 0 : dim);
  const open = dims.indexOf(-1);
  const size = sizeOf(data.dims);
  if (open !== -1) {
    const others = dims.reduce((product, dim, axis) => axis === open ? product : product * dim, 1);
    if (others <= 0 || size % others !== 0) return undefined;
    dims[open] = size / others;
  }
  return sizeOf(dims) === size ? { ...data, dims } : undefined;
}

function slice(inputs: readonly (Known | undefined)[], node: GraphNode): readonly Known[] | undefined {
  const [data] = inputs;
  const starts = listOf(inputs[1], node, "starts");
  const ends = listOf(inputs[2], node, "ends");
  if (data === undefined || starts === undefined || ends === undefined) return undefined;
  const axes = listOf(inputs[3], node, "axes") ?? starts.map((_, axis) => axis);
  const steps = valuesOf(inputs[4]) ?? starts.map(() => 1);
  const dims = [...data.dims];
  const strides = stridesOf(data.dims);
  let offset = 0;
  for (const [i, start] of starts.entries()) {
    const axis = axisOf(axes[i]!, dims.length);
    const length = data.dims[axis]!;
    const step = steps[i]!;
    if (step < 1) return undefined;
    const clamp = (place: number) => Math.min(Math.max(place < 0 ? place + length : place, 0), length);
    const from = clamp(start);
    dims[axis] = Math.max(0, Math.ceil((clamp(ends[i]!) - from) / step));
    offset += from * strides[axis]!;
    strides[axis] = strides[axis]! * step;
  }
  return [strided(data, dims, strides, offset)];
}

function concat(inputs: readonly (Known | undefined)[], node: GraphNode): readonly Known[] | undefined {
  const parts = inputs.filter((part) => part !== undefined);
  const [first] = parts;
  if (first === undefined || parts.length !== inputs.length) return undefined;
  const axis = axisOf(intOf(node, "axis", 0), first.dims.length);
  if (parts.some(({ dims }) => dims.length !== first.dims.length)) return undefined;
  const dims = first.dims.map((dim, i) => i === axis ? parts.reduce((sum, part) => sum + part.dims[axis]!, 0) : dim);
  if (parts.some(({ values }) => values === undefined)) return [{ type: first.type, dims }];
  const inner = sizeOf(first.dims.slice(axis + 1));
  const widths = parts.map((part) => part.dims[axis]! * inner);
  const width = widths.reduce((sum, each) => sum + each, 0);
  const values = fill(dims, (i) => {
    let at = i % width;
    let part = 0;
    while (at >= widths[part]!) at -= widths[part++]!;
    return parts[part]!.values![Math.floor(i / width) * widths[part]! + at]!;
  });
  return [{ type: first.type, dims, values }];
}

function gather([data, indices]: readonly (Known | undefined)[], node: GraphNode): readonly Known[] | undefined {
  if (data === undefined || indices === undefined) return undefined;
  const axis = axisOf(intOf(node, "axis", 0), data.dims.length);
  const dims = [...data.dims.slice(0, axis), ...indices.dims, ...data.dims.slice(axis + 1)];
  const { type, values } = data;
  if (values === undefined || indices.values === undefined) return [{ type, dims }];
  const inner = sizeOf(data.dims.slice(axis + 1));
  const count = sizeOf(indices.dims);
  const length = data.dims[axis]!;
  return [{
    type,
    dims,
    values: fill(dims, (i) => {
      const index = indices.values![Math.floor(i / inner) % count]!;
      const from = Math.floor(i / (inner * count)) * length + (index < 0 ? index + length : index);
      return values[from * inner + i % inner] ?? NaN;
    }),
  }];
}

function split([data, sizes]: readonly (Known | undefined)[], node: GraphNode): readonly Known[] | undefined {
  if (data === undefined) return undefined;
  const axis = axisOf(intOf(node, "axis", 0), data.dims.length);
  const count = node.outputs.length;
  const each = Math.ceil(data.dims[axis]! / count);
  const lengths = listOf(sizes, node, "split") ??
    node.outputs.map((_, i) => Math.min(each, data.dims[axis]! - i * each));
  const strides = stridesOf(data.dims);
  let start = 0;
  return lengths.map((length) => {
    const part = strided(data, data.dims.map((dim, i) => i === axis ? length : dim), strides, start * strides[axis]!);
    start += length;
    return part;
  });
}

function reduce([data, axes]: readonly (Known | undefined)[], node: GraphNode): readonly Known[] | undefined {
  if (data === undefined) return undefined;
  const rank = data.dims.length;
  const list = listOf(axes, node, "axes") ?? data.dims.map((_, axis) => axis);
  const gone = new Set(list.map((axis) => axisOf(axis, rank)));
  const kept = data.dims.map((dim, axis) => gone.has(axis) ? 1 : dim);
  const dims = intOf(node, "keepdims", 1) === 1 ? kept : kept.filter((_, axis) => !gone.has(axis));
  const { type, values } = data;
  if (values === undefined || node.op === "ReduceMean") return [{ type, dims }];
  const join = { ReduceSum: (a: number, b: number) => a + b, ReduceMax: Math.max, ReduceMin: Math.min }[node.op]!;
  const start = node.op === "ReduceSum" ? 0 : node.op === "ReduceMax" ? -Infinity : Infinity;
  const result = fill(dims, () => start);
  const [from, to] = [stridesOf(data.dims), stridesOf(kept)];
  for (let i = 0; i < values.length; i++) {
    let at = 0;
    for (let axis = 0; axis < rank; axis++) {
      if (!gone.has(axis)) at += Math.floor(i / from[axis]!) % data.dims[axis]! * to[axis]!;
    }
    result[at] = join(result[at]!, values[i]!);
  }
  return [{ type, dims, values: result }];
}

/** The operators by name. */
export const RESHAPING: Readonly<Record<string, Operator>> = {
  Shape: ([data], node) => {
    if (data === undefined) return undefined;
    const values = data.dims.slice(intOf(node, "start", 0), node.attributes.get("end")?.int);
    return [{ type: ELEMENT.int64, dims: [values.length], values }];
  },
  Size: ([data]) => data && [{ type: ELEMENT.int64, dims: [], values: [sizeOf(data.dims)] }],
  Reshape: ([data, dims], node) => {
    const wanted = listOf(dims, node, "shape");
    const result = data && wanted && reshape(data, wanted, intOf(node, "allowzero", 0) === 0);
    return result && [result];
  },
  Flatten: ([data], node) => {
    if (data === undefined) return undefined;
    const axis = intOf(node, "axis", 1);
    const dims = [sizeOf(data.dims.slice(0, axis)), sizeOf(data.dims.slice(axis))];
    return [{ ...data, dims }];
  },
  Unsqueeze: ([data, axes], node) => {
    const list = listOf(axes, node, "axes");
    if (data === undefined || list === undefined) return undefined;
    const rank = data.dims.length + list.length;
    const added = new Set(list.map((axis) => axisOf(axis, rank)));
    const rest = [...data.dims];
    return [{ ...data, dims: Array.from({ length: rank }, (_, axis) => added.has(axis) ? 1 : rest.shift() ?? 1) }];
  },
  Squeeze: ([data, axes], node) => {
    if (data === undefined) return undefined;
    const list = listOf(axes, node, "axes")?.map((axis) => axisOf(axis, data.dims.length));
    return [{ ...data, dims: data.dims.filter((dim, axis) => list === undefined ? dim !== 1 : !list.includes(axis)) }];
  },
  Transpose: ([data], node) => {
    if (data === undefined) return undefined;
    const perm = node.attributes.get("perm")?.ints ?? data.dims.map((_, axis) => data.dims.length - 1 - axis);
    if (perm.length !== data.dims.length) return undefined;
    const strides = stridesOf(data.dims);
    const axes = perm.map((axis) => axisOf(axis, data.dims.length));
    return [strided(data, axes.map((axis) => data.dims[axis]!), axes.map((axis) => strides[axis]!))];
  },
  Expand: ([data, dims]) => {
    const wanted = valuesOf(dims);
    const all = data && wanted && broadcastDims(data.dims, wanted);
    return data && all && [expanded(data, all)];
  },
  Tile: ([data, repeats]) => {
    const times = valuesOf(repeats);
    if (data === undefined || times === undefined) return undefined;
    const dims = data.dims.map((dim, axis) => dim * (times[axis] ?? 1));
    const { type, values } = data;
    if (values === undefined) return [{ type, dims }];
    const [to, from] = [stridesOf(dims), stridesOf(data.dims)];
    const at = (i: number) =>
      dims.reduce((sum, dim, axis) => sum + Math.floor(i / to[axis]!) % dim % data.dims[axis]! * from[axis]!, 0);
    return [{ type, dims, values: fill(dims, (i) => values[at(i)]!) }];
  },
  Range: (inputs) => {
    const [start, limit, delta] = inputs.map((each) => each?.values?.[0]);
    if (start === undefined || limit === undefined || delta === undefined || delta === 0) return undefined;
    const dims = [Math.max(0, Math.ceil((limit - start) / delta))];
    return [{ type: inputs[0]!.type, dims, values: fill(dims, (i) => start + i * delta) }];
  },
  Trilu: ([data, diagonal], node) => {
    if (data === undefined) return undefined;
    const { type, dims, values } = data;
    if (values === undefined) return [{ type, dims }];
    const shift = diagonal?.values?.[0] ?? 0;
    const isUpper = intOf(node, "upper", 1) === 1;
    const [rows, columns] = [dims.at(-2)!, dims.at(-1)!];
    const isKept = (i: number) => {
      const distance = i % columns - Math.floor(i / columns) % rows - shift;
      return isUpper ? distance >= 0 : distance <= 0;
    };
    return [{ type, dims, values: fill(dims, (i) => isKept(i) ? values[i]! : 0) }];
  },
  CumSum: ([data, axis], node) => {
    if (data === undefined || axis?.values === undefined || intOf(node, "reverse", 0) !== 0) return undefined;
    const { type, dims, values } = data;
    if (values === undefined) return [{ type, dims }];
    const at = axisOf(axis.values[0]!, dims.length);
    const stride = stridesOf(dims)[at]!;
    const isExclusive = intOf(node, "exclusive", 0) === 1;
    const sums = fill(dims, () => 0);
    for (let i = 0; i < sums.length; i++) {
      const isFirst = Math.floor(i / stride) % dims[at]! === 0;
      sums[i] = isFirst ? isExclusive ? 0 : values[i]! : sums[i - stride]! + values[isExclusive ? i - stride : i]!;
    }
    return [{ type, dims, values: sums }];
  },
  Slice: slice,
  Concat: concat,
  Gather: gather,
  Split: split,
  ReduceSum: reduce,
  ReduceMax: reduce,
  ReduceMin: reduce,
  ReduceMean: reduce,
};
