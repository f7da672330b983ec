/**
 * Which typed arrays carry rows, and as which dtype.
 *
 * f32 travels as `Float32Array`. f16 is accepted as `Float16Array` or as its bits in a `Uint16Array`, bf16 as bits
 * only; both are handed out as bits, because JavaScript reads a `Float16Array` up to ten times slower.
 *
 * @module
 */

import { type DType, dtypeCode } from "./config.ts";
import { KvError } from "./error.ts";

/** Rows of keys or values: f32, f16, or the bits of f16 or bf16. */
export type Rows = Float32Array | Float16Array | Uint16Array;

/** The number of the dtype that `k` and `v` are given in. */
export function inputDtype(k: Rows, v: Rows, dtype: DType | undefined): number {
  if (k?.length === 0 || v?.length === 0) {
    checkAttached("k", k);
    checkAttached("v", v);
  }
  if (k instanceof Float32Array && v instanceof Float32Array) {
    if (dtype !== undefined) checkAgrees("a Float32Array", dtype, "f32");
    return 0;
  }
  if (k instanceof Float16Array && v instanceof Float16Array) {
    if (dtype !== undefined) checkAgrees("a Float16Array", dtype, "f16");
    return 1;
  }
  if (!(k instanceof Uint16Array && v instanceof Uint16Array)) {
    throw new TypeError(
      "k and v must both be Float32Array, Float16Array or Uint16Array with a dtype: " +
        `k is ${kindOf(k)}, v is ${kindOf(v)}`,
    );
  }
  if (dtype === undefined) {
    throw new TypeError('The bits in a Uint16Array need { dtype: "f16" } or { dtype: "bf16" }: dtype is undefined');
  }
  const code = dtypeCode("dtype", dtype);
  if (code === 0) checkAgrees("a Uint16Array", dtype, "f16 or bf16");
  return code;
}

/** Detached memory would reach native code as no rows at all. */
export function checkAttached(name: string, array: ArrayBufferView): void {
  const buffer: ArrayBufferLike | undefined = array?.buffer;
  if (buffer instanceof ArrayBuffer && buffer.detached) {
    throw new TypeError(`${name} must not be detached: its buffer was transferred`);
  }
}

/** The array must be a `Float32Array` that still has its memory. */
export function checkFloats(name: string, array: Float32Array): void {
  if (!(array instanceof Float32Array)) throw new TypeError(`${name} must be a Float32Array: ${kindOf(array)}`);
  if (array.length === 0) checkAttached(name, array);
}

/** Two options that contradict each other. */
function checkAgrees(kind: string, given: DType, needed: string): void {
  dtypeCode("dtype", given);
  if (given !== needed) {
    throw new KvError("invalid_config", `Cannot read ${kind} as ${given}: its dtype is ${needed}`);
  }
}

/** A copy's destination must be of the kind the dtype is handed out in; f16 may be a `Float16Array`, too. */
export function checkInto(name: string, into: Rows, dtype: DType): void {
  const fits = dtype === "f32"
    ? into instanceof Float32Array
    : into instanceof Uint16Array || (dtype === "f16" && into instanceof Float16Array);
  if (!fits) throw new TypeError(`${name} must be an array for ${dtype}: ${kindOf(into)}`);
  if (into.length === 0) checkAttached(name, into);
}

/** A new array for `length` elements of `dtype`. */
export function newRows(dtype: DType, length: number): Float32Array | Uint16Array {
  return dtype === "f32" ? new Float32Array(length) : new Uint16Array(length);
}

/** An array over `length` elements of `dtype` in `buffer`, from element `start`. */
export function rowsOver(buffer: ArrayBuffer, dtype: DType, start: number, length: number): Float32Array | Uint16Array {
  return dtype === "f32"
    ? new Float32Array(buffer, start * elementBytes(dtype), length)
    : new Uint16Array(buffer, start * elementBytes(dtype), length);
}

/** Bytes of one element. */
export function elementBytes(dtype: DType): number {
  return dtype === "f32" ? 4 : 2;
}

/** What a wrong argument is, for the text of an error. */
export function kindOf(value: unknown): string {
  return typeof value === "object" && value !== null ? value.constructor?.name ?? "object" : typeof value;
}
