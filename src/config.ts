/**
 * Options, their defaults and range checks, and the memory formula.
 *
 * The FFI layer of either runtime checks nothing (a -1 may arrive as 4294967295), so every number is checked here
 * before a call, and again in native code.
 *
 * @module
 */

import { KvError } from "./error.ts";
import { library } from "./ffi/library.ts";
import { contiguousRecord, contiguousWords } from "./ffi/record.ts";
import { refusal } from "./ffi/status.ts";
import { checkOptions, type OptionNames, optionNames } from "./option_names.ts";

/** A float for each element: 4 bytes, 2 bytes (IEEE half), 2 bytes (the upper half of an f32). */
export type FloatDType = "f32" | "f16" | "bf16";

/**
 * Codes of 8, 4 or 2 bits for the elements, with a scale for each group: `x = code * scale` in `q8_0` and `q4_0`, which
 * are ggml's formats, and `code * scale + min` in `i8`, `i4` and `i2`.
 */
export type QuantizedDType = "q8_0" | "q4_0" | "i8" | "i4" | "i2";

/** How elements are stored. */
export type DType = FloatDType | QuantizedDType;

/** The dtypes by their number in the ABI; those of floats come first. */
const DTYPES: readonly DType[] = ["f32", "f16", "bf16", "q8_0", "q4_0", "i8", "i4", "i2"];
const FLOAT_DTYPES = DTYPES.slice(0, 3) as readonly FloatDType[];

/** The geometry of a {@linkcode ContiguousCache}, and how it stores its elements. */
export interface ContiguousCacheOptions {
  /** Transformer layers, at least 1. */
  readonly layerCount: number;
  /** KV heads of a layer, at least 1; with grouped-query attention fewer than query heads. */
  readonly kvHeadCount: number;
  /** Elements of a head, 1 to 256, the same for K and V; multiples of 32 are fast. */
  readonly headDim: number;
  /** Query heads, a multiple of `kvHeadCount`: where given, `attend` refuses queries that do not have as many. */
  readonly qHeadCount?: number;
  /** Rows each sequence can hold, 1 to 2^31 - 1. */
  readonly maxSeqLen: number;
  /** Sequences, at least 1; 1 by default. */
  readonly sequenceCount?: number;
  /** How elements are stored, for K and V together or apart; `"f32"` by default. */
  readonly dtype?: FloatDType | { readonly k: FloatDType; readonly v: FloatDType };
  /** Most bytes the cache may reserve; by default what this machine or its cgroup has. */
  readonly maxBytes?: number;
}

const CONTIGUOUS_NAMES: OptionNames = optionNames<ContiguousCacheOptions>({
  layerCount: true,
  kvHeadCount: true,
  headDim: true,
  qHeadCount: true,
  maxSeqLen: true,
  sequenceCount: true,
  dtype: true,
  maxBytes: true,
});

/** The names of what has a value for keys and one for values. */
export const SIDE_NAMES: OptionNames = optionNames<{ k: unknown; v: unknown }>({ k: true, v: true });

/** Head dimensions the kernels are built for. */
export const HEAD_DIM_MAX = 256;

/** A position, and a count of rows, must fit a result of the ABI. */
export const SEQ_LEN_MAX: number = 2 ** 31 - 1;

/**
 * Bytes of K and V a cache of these options holds: `2 * layers * sequences * rows * kv heads * headDim * bytes`.
 *
 * Exact, whether or not this machine could hold it; nothing is allocated. K and V count apart when their
 * dtypes differ.
 *
 * @example GPT-2 small at 2048 tokens: 2 * 12 * 2048 * 12 * 64 * 4 B = 144 MiB
 * ```ts
 * import assert from "node:assert/strict";
 * import { memoryBytes } from "@kvern/kvern";
 *
 * const bytes = memoryBytes({ layerCount: 12, kvHeadCount: 12, headDim: 64, maxSeqLen: 2048 });
 * assert.equal(bytes, 144 * 2 ** 20);
 * ```
 *
 * @throws {TypeError} an option of the wrong type
 * @throws {RangeError} an option that is no count
 * @throws {KvError} `invalid_config` for an option out of its range; `out_of_memory` past 2^53 bytes;
 * `library_unavailable`, `needs_permission`
 */
export function memoryBytes(options: ContiguousCacheOptions): number {
  const record = recordOf(options, "plan a cache");
  const bytes = new Float64Array(1);
  const status = library().kv_memory_bytes(record, record.byteLength, bytes, bytes.length);
  if (status < 0) {
    throw refusal(status, "plan a cache", {
      out_of_memory: () => `a number of bytes is exact up to 2^53: K and V need ${bytesText(record)} bytes`,
    });
  }
  return bytes[0]!;
}

/** Bytes of K and V in digits, by the formula: a product that no number of 64 bits need hold. */
export function bytesText(record: Uint32Array): string {
  const { layerCount, sequenceCount, maxSeqLen, kvHeadCount, headDim, dtypeK, dtypeV } = contiguousWords(record);
  const elementBytes = [dtypeK, dtypeV].reduce((sum, code) => sum + (dtypeOf(code) === "f32" ? 4 : 2), 0);
  const factors = [layerCount, sequenceCount, maxSeqLen, kvHeadCount, headDim, elementBytes];
  return String(factors.reduce((product, factor) => product * BigInt(factor), 1n));
}

/** The checked record of `options`; `action` begins the text of a refusal. */
export function recordOf(options: ContiguousCacheOptions, action: string): Uint32Array {
  checkOptions(options, CONTIGUOUS_NAMES, action);
  const { layerCount, kvHeadCount, headDim, qHeadCount, dtype = "f32", sequenceCount = 1, maxBytes } = options;
  return contiguousRecord({
    layerCount: checkOption("layerCount", layerCount, action),
    sequenceCount: checkOption("sequenceCount", sequenceCount, action),
    ...checkHeads(kvHeadCount, headDim, action),
    qHeadCount: qHeadCount === undefined ? 0 : checkQueryHeads(qHeadCount, kvHeadCount, action),
    maxSeqLen: checkOption("maxSeqLen", options.maxSeqLen, action, SEQ_LEN_MAX),
    ...dtypeCodes(dtype, action),
    maxBytes: maxBytes === undefined ? 0 : checkBytes("maxBytes", maxBytes, action),
  });
}

/** A count of at least 1, and at most `max`. */
export function checkOption(name: string, value: number, action: string, max: number = 2 ** 32 - 1): number {
  checkCount(name, value);
  if (value < 1 || value > max) {
    const range = max < 2 ** 32 - 1 ? `1 to ${max}` : "at least 1";
    throw new KvError("invalid_config", `Cannot ${action} as ${name} must be ${range}: ${name} is ${value}`);
  }
  return value;
}

/** The heads of a layer, whose row must be countable in 32 bits; `path` is where the options stand. */
export function checkHeads(
  kvHeadCount: number,
  headDim: number,
  action: string,
  path: string = "",
): { readonly kvHeadCount: number; readonly headDim: number } {
  checkOption(`${path}kvHeadCount`, kvHeadCount, action);
  checkOption(`${path}headDim`, headDim, action, HEAD_DIM_MAX);
  if (kvHeadCount * headDim < 2 ** 32) return { kvHeadCount, headDim };
  throw new KvError(
    "invalid_config",
    `Cannot ${action} as a row of ${path}kvHeadCount times headDim elements must be below 2^32: ` +
      `kvHeadCount is ${kvHeadCount}, headDim is ${headDim}`,
  );
}

/** A count of query heads: each KV head serves equally many. */
export function checkQueryHeads(qHeadCount: number, kvHeadCount: number, action: string, path: string = ""): number {
  checkOption(`${path}qHeadCount`, qHeadCount, action);
  if (qHeadCount % kvHeadCount === 0) return qHeadCount;
  throw new KvError(
    "invalid_config",
    `Cannot ${action} as ${path}qHeadCount must be a multiple of kvHeadCount: ` +
      `qHeadCount is ${qHeadCount}, kvHeadCount is ${kvHeadCount}`,
  );
}

/** Bytes travel in 64 bits, so they have a wider range than other counts. */
export function checkBytes(name: string, value: number, action: string): number {
  if (typeof value !== "number") throw new TypeError(`${name} must be a number: ${typeof value}`);
  if (!Number.isSafeInteger(value) || value < 0) {
    throw new RangeError(`${name} must be a whole number from 0 to ${Number.MAX_SAFE_INTEGER}: ${value}`);
  }
  if (value === 0) throw new KvError("invalid_config", `Cannot ${action} as ${name} must be at least 1: ${name} is 0`);
  return value;
}

/** Refuses what is no count: only a whole number of 32 bits may cross the boundary. */
export function checkCount(name: string, value: number): void {
  if (typeof value !== "number") {
    throw new TypeError(`${name} must be a number: ${value === null ? "null" : typeof value}`);
  }
  if (value >>> 0 !== value || Object.is(value, -0)) { // Deno takes no -0 for an integer
    const shown = Object.is(value, -0) ? "-0" : value;
    throw new RangeError(`${name} must be a whole number from 0 to 4294967295: ${shown}`);
  }
}

/** The number of a dtype in the ABI; `among` are those that fit the place. */
export function dtypeCode(name: string, dtype: DType, among: readonly DType[] = DTYPES): number {
  if (typeof dtype !== "string") throw new TypeError(`${name} must be a string: ${typeof dtype}`);
  if (!among.includes(dtype)) {
    throw new KvError("invalid_config", `Cannot use ${name} ${dtype} as it must be one of ${among.join(", ")}`);
  }
  return DTYPES.indexOf(dtype);
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
  const dtype = DTYPES[code];
  if (dtype === undefined) throw new Error(`Cannot read a dtype as the library gave an unknown number: ${code}`);
  return dtype;
}
