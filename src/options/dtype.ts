/**
 * Element types by name, and by their number in the ABI.
 *
 * @module
 */

import { KvError } from "../error.ts";
import { ENUMS } from "../ffi/exports.ts";
import { nameOf } from "../ffi/record.ts";
import { checkOptions, type OptionNames, optionNames } from "./option_names.ts";

/** The names of what has a value for keys and one for values. */
export const SIDE_NAMES: OptionNames = optionNames<{ k: unknown; v: unknown }>({ k: true, v: true });

/** A float for each element: 4 bytes, 2 bytes (IEEE half), 2 bytes (the upper half of an f32). */
export type FloatDType = "f32" | "f16" | "bf16";

/**
 * Codes of 8, 4 or 2 bits for the elements, with a scale for each group: `x = code * scale` in `q8_0` and `q4_0`, which
 * are ggml's formats, and `code * scale + min` in `i8`, `i4` and `i2`.
 */
export type QuantizedDType = "q8_0" | "q4_0" | "i8" | "i4" | "i2";

/** How elements are stored. */
export type DType = FloatDType | QuantizedDType;

/** The dtypes of floats. */
const FLOAT_DTYPES: readonly FloatDType[] = ["f32", "f16", "bf16"];

/** All dtypes. */
const DTYPES: readonly DType[] = [...FLOAT_DTYPES, "q8_0", "q4_0", "i8", "i4", "i2"];

/** The number of a dtype in the ABI; `among` are those that fit the place. */
export function dtypeCode(name: string, dtype: DType, among: readonly DType[] = DTYPES): number {
  if (typeof dtype !== "string") throw new TypeError(`${name} must be a string: ${typeof dtype}`);
  if (!among.includes(dtype)) {
    throw new KvError("invalid_config", `Cannot use ${name} ${dtype} as it must be one of ${among.join(", ")}`);
  }
  return ENUMS.dtype[dtype];
}

/** The number of a dtype of floats. */
export function floatDtypeCode(name: string, dtype: FloatDType): number {
  return dtypeCode(name, dtype, FLOAT_DTYPES);
}

/** The numbers of the float dtypes of an option: one for both sides, or one for each. */
export function dtypeCodes(
  dtype: FloatDType | { readonly k: FloatDType; readonly v: FloatDType },
  action: string,
): { readonly dtypeK: number; readonly dtypeV: number } {
  const { k, v } = eachSide(dtype, action, "dtype");
  return { dtypeK: floatDtypeCode("dtype.k", k), dtypeV: floatDtypeCode("dtype.v", v) };
}

/** What is given for both sides at once, or for each. */
export function eachSide<Given extends DType>(
  given: Given | { readonly k: Given; readonly v: Given },
  action: string,
  path: string,
): { readonly k: Given; readonly v: Given } {
  if (typeof given !== "object" || given === null) return { k: given, v: given };
  checkOptions(given, SIDE_NAMES, action, path);
  return given;
}

/** The dtype of a number in the ABI. */
export function dtypeOf(code: number): DType {
  return nameOf("dtype", code);
}

/** The dtype of floats of a number in the ABI. */
export function floatDtypeOf(code: number): FloatDType {
  const dtype = FLOAT_DTYPES.find((dtype) => ENUMS.dtype[dtype] === code);
  if (dtype === undefined) {
    throw new Error(`Cannot read floats as the library gave the number of no such dtype: ${code}`);
  }
  return dtype;
}

/** Is an element a code, whose scale it shares with others? */
export function isQuantized(dtype: DType): boolean {
  dtypeCode("dtype", dtype);
  return !FLOAT_DTYPES.some((float) => float === dtype);
}
