/**
 * Which typed arrays carry rows, and as which dtype.
 *
 * f32 travels as `Float32Array`. f16 is accepted as `Float16Array` or as its bits in a `Uint16Array`, bf16 as bits
 * only; both are handed out as bits, because JavaScript reads a `Float16Array` up to ten times slower.
 *
 * @module
 */

import { KvError } from "../error.ts";
import { ENUMS } from "../ffi/exports.ts";
import { type FloatDType, floatDtypeCode } from "./dtype.ts";
import { arrayKind, checkAttached, kindOf, lengthOf, overlaps } from "./typed_array.ts";

/** `Float16Array` where the `lib` of a program has it, and nothing where not: a name it lacks would turn into `any`. */
export type HalfArray = typeof globalThis extends { Float16Array: { prototype: infer Half } } ? Half : never;

/** Rows of keys or values: f32, f16, or the bits of f16 or bf16. */
export type Rows = Float32Array | HalfArray | Uint16Array;

/** A count of elements crosses the boundary in 32 bits. */
const COUNT_MAX = 2 ** 32 - 1;

/** The number of the dtype that `k` and `v` are given in. */
export function inputDtype(k: Rows, v: Rows, dtype: FloatDType | undefined): number {
  const kind = arrayKind(k);
  const isPair = kind !== undefined && kind === arrayKind(v);
  if (!isPair || !(kind === "Float32Array" || kind === "Float16Array" || kind === "Uint16Array")) {
    throw new TypeError(
      "k and v must both be Float32Array, Float16Array or Uint16Array with a dtype: " +
        `k is ${kindOf(k)}, v is ${kindOf(v)}`,
    );
  }
  if (kind === "Float32Array") {
    if (dtype !== undefined) checkAgrees("a Float32Array", dtype, "f32");
    return ENUMS.dtype.f32;
  }
  if (kind === "Float16Array") {
    if (dtype !== undefined) checkAgrees("a Float16Array", dtype, "f16");
    return ENUMS.dtype.f16;
  }
  if (dtype === undefined) {
    throw new TypeError('The bits in a Uint16Array need { dtype: "f16" } or { dtype: "bf16" }: dtype is undefined');
  }
  const code = floatDtypeCode("dtype", dtype);
  if (dtype === "f32") checkAgrees("a Uint16Array", dtype, "f16 or bf16");
  return code;
}

/** The array must be a `Float32Array`. */
export function checkFloats(name: string, array: Float32Array): void {
  if (arrayKind(array) !== "Float32Array") throw new TypeError(`${name} must be a Float32Array: ${kindOf(array)}`);
}

/** The elements of an input, as a word that crosses; more than that must not pass for fewer, nor lost memory for none. */
export function inputCount(name: string, array: ArrayBufferView, action: string): number {
  const length = lengthOf(array);
  if (length === 0) checkAttached(name, array);
  if (length <= COUNT_MAX) return length;
  throw new KvError(
    "invalid_size",
    `Cannot ${action} as one call takes less than 2^32 elements of ${name}: ${name} has ${length}`,
  );
}

/** The elements of a destination, as a word that crosses: those behind the first 2^32 - 1 are never written. */
export function outputCount(name: string, array: ArrayBufferView): number {
  const length = lengthOf(array);
  if (length === 0) checkAttached(name, array);
  return Math.min(length, COUNT_MAX);
}

/**
 * The rule that outputs of a call share memory with nothing else of it: with the names of two that do, where that shows
 * in their buffers.
 */
export function overlapRule(
  outputs: Readonly<Record<string, ArrayBufferView | undefined>>,
  inputs: Readonly<Record<string, ArrayBufferView | undefined>> = {},
): string {
  const all = { ...outputs, ...inputs };
  for (const [name, array] of Object.entries(outputs)) {
    for (const [other, candidate] of Object.entries(all)) {
      if (name === other || array === undefined || candidate === undefined) continue;
      if (overlaps(array, candidate)) return `${name} and ${other} must not share memory`;
    }
  }
  const names = Object.keys(outputs).filter((name) => outputs[name] !== undefined);
  return `${names.join(" and ")} must share memory with nothing else of the call, nor with the rows it reads`;
}

/** Two options that contradict each other. */
function checkAgrees(kind: string, given: FloatDType, needed: string): void {
  floatDtypeCode("dtype", given);
  if (given !== needed) {
    throw new KvError("invalid_config", `Cannot read ${kind} as ${given}: its dtype is ${needed}`);
  }
}

/** A copy's destination must be of the kind the dtype is handed out in; f16 may be a `Float16Array`, too. */
export function checkInto(name: string, into: Rows, dtype: FloatDType): void {
  const kind = arrayKind(into);
  const fits = dtype === "f32"
    ? kind === "Float32Array"
    : kind === "Uint16Array" || (dtype === "f16" && kind === "Float16Array");
  if (!fits) throw new TypeError(`${name} must be an array for ${dtype}: ${kindOf(into)}`);
}

/** A new array for `length` elements of `dtype`. */
export function newRows(dtype: FloatDType, length: number): Float32Array | Uint16Array {
  return dtype === "f32" ? new Float32Array(length) : new Uint16Array(length);
}

/** An array over `length` elements of `dtype` in `buffer`, from element `start`. */
export function rowsOver(
  buffer: ArrayBuffer,
  dtype: FloatDType,
  start: number,
  length: number,
): Float32Array | Uint16Array {
  return dtype === "f32"
    ? new Float32Array(buffer, start * elementBytes(dtype), length)
    : new Uint16Array(buffer, start * elementBytes(dtype), length);
}

/** Bytes of one element. */
export function elementBytes(dtype: FloatDType): number {
  return dtype === "f32" ? 4 : 2;
}
