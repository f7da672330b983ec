/**
 * Operators of ONNX that compute each element by itself.
 *
 * @module
 */

import { broadcastDims, expanded, fill, type Known } from "./array.ts";
import { ELEMENT } from "../model/tensor.ts";

/** Numbers of two arrays; whole ones are divided as integers are. */
const BINARY: Readonly<Record<string, (a: number, b: number, isWhole: boolean) => number>> = {
  Add: (a, b) => a + b,
  Sub: (a, b) => a - b,
  Mul: (a, b) => a * b,
  Div: (a, b, isWhole) => isWhole ? Math.trunc(a / b) : a / b,
  Mod: (a, b) => a - b * Math.floor(a / b),
  Pow: (a, b) => a ** b,
  Min: (a, b) => Math.min(a, b),
  Max: (a, b) => Math.max(a, b),
  Equal: (a, b) => Number(a === b),
  Greater: (a, b) => Number(a > b),
  GreaterOrEqual: (a, b) => Number(a >= b),
  Less: (a, b) => Number(a < b),
  LessOrEqual: (a, b) => Number(a <= b),
  And: (a, b) => Number(a !== 0 && b !== 0),
  Or: (a, b) => Number(a !== 0 || b !== 0),
  Xor: (a, b) => Number((a !== 0) !== (b !== 0)),
};

/** Those whose result is a truth. */
const TRUTHS = /^(Equal|Greater|GreaterOrEqual|Less|LessOrEqual|And|Or|Xor|Not|IsNaN|IsInf)$/;

const UNARY: Readonly<Record<string, (a: number) => number>> = {
  Identity: (a) => a,
  Neg: (a) => -a,
  Abs: Math.abs,
  Sqrt: Math.sqrt,
  Floor: Math.floor,
  Ceil: Math.ceil,
  Not: (a) => Number(a === 0),
  IsNaN: (a) => Number(Number.isNaN(a)),
  IsInf: (a) => Number(Math.abs(a) === Infinity),
};

/** Is it an operator of this file? */
export function isArithmetic(op: string): boolean {
  return op in BINARY || op in UNARY || op === "Cast" || op === "Where" || op === "Clip";
}

/** The result of an operator; undefined where the shapes do not fit. */
export function compute(op: string, inputs: readonly Known[], castTo: number): Known | undefined {
  const [first, ...others] = inputs;
  if (first === undefined) return undefined;
  if (op === "Where") return where(inputs);
  if (op === "Cast") return unary(first, castTo, castOf(castTo));
  if (op === "Clip") {
    const [low = -Infinity, high = Infinity] = others.map(({ values }) => values?.[0]);
    return unary(first, first.type, (a) => Math.min(Math.max(a, low), high));
  }
  const type = TRUTHS.test(op) ? ELEMENT.bool : first.type;
  if (op in UNARY) return unary(first, type, UNARY[op]!);
  return others.reduce<Known | undefined>((a, b) => a && binary(op, a, b, type), first);
}

function unary(a: Known, type: number, element: (value: number) => number): Known {
  const { dims, values } = a;
  return { type, dims, ...(values === undefined ? {} : { values: fill(dims, (i) => element(values[i]!)) }) };
}

function binary(op: string, a: Known, b: Known, type: number): Known | undefined {
  const dims = broadcastDims(a.dims, b.dims);
  if (dims === undefined) return undefined;
  if (a.values === undefined || b.values === undefined) return { type, dims };
  const isWhole = a.type === ELEMENT.int64 || a.type === ELEMENT.int32;
  const [left, right] = [expanded(a, dims).values!, expanded(b, dims).values!];
  return { type, dims, values: fill(dims, (i) => BINARY[op]!(left[i]!, right[i]!, isWhole)) };
}

function where([condition, a, b]: readonly Known[]): Known | undefined {
  if (condition === undefined || a === undefined || b === undefined) return undefined;
  const pair = broadcastDims(a.dims, b.dims);
  const dims = pair && broadcastDims(pair, condition.dims);
  if (dims === undefined) return undefined;
  if (condition.values === undefined || a.values === undefined || b.values === undefined) return { type: a.type, dims };
  const [test, left, right] = [condition, a, b].map((each) => expanded(each, dims).values!);
  return { type: a.type, dims, values: fill(dims, (i) => test![i] !== 0 ? left![i]! : right![i]!) };
}

function castOf(type: number): (value: number) => number {
  switch (type) {
    case ELEMENT.bool:
      return (value) => Number(value !== 0);
    case ELEMENT.int64:
    case ELEMENT.int32:
      return Math.trunc;
    case ELEMENT.float32:
      return Math.fround;
    default:
      return (value) => value;
  }
}
