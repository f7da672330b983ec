/**
 * Codecs without a cache: floats to quantized bytes and back.
 *
 * There are two layouts. *Records* are ggml's: groups of 32 adjacent values, each a scale in f16 and then the codes,
 * 34 bytes in `q8_0` and 18 in `q4_0`. A *plane* is the keys or values of one KV head in one block of a cache, with codes
 * and scales where integer dot products want them; a `View` of a quantized block shows planes. `packBlock` and
 * `unpackBlock` move records into planes and back, bit for bit.
 *
 * A value is `code * scale`, in `q4_0` `(code - 8) * scale`, and in `i8`, `i4` and `i2` `code * scale + min`. Codes are
 * rounded half to even, but for `q4_0`, which rounds `x / scale + 8.5` down; the bytes do not depend on the CPU.
 *
 * @module
 */

import { KvError } from "./error.ts";
import { ENUMS, VALUES } from "./ffi/exports.ts";
import { library } from "./ffi/library.ts";
import { refusal } from "./ffi/status.ts";
import { checkCount } from "./options/counts.ts";
import { type DType, dtypeCode, type QuantizedDType } from "./options/dtype.ts";
import { planeBytes } from "./options/format.ts";
import { notFiniteRule } from "./options/not_finite.ts";
import { checkOptions, type OptionNames, optionNames } from "./options/option_names.ts";
import { checkFloats, inputCount, outputCount } from "./options/rows.ts";
import { arrayKind, kindOf } from "./options/typed_array.ts";

/** The formats that ggml has, too, and that records can have. */
export type RecordDType = "q8_0" | "q4_0";

/** How values become records. */
export interface QuantizeRowsOptions {
  /** The format. */
  readonly dtype: RecordDType;
  /** Where to write: at least the bytes of the records. A new array by default. */
  readonly into?: Uint8Array;
}

/** How records become values. */
export interface DequantizeRowsOptions {
  /** The format. */
  readonly dtype: RecordDType;
  /** Where to write: at least 32 values for each record. A new array by default. */
  readonly into?: Float32Array;
}

/** What the plane of a block is. */
export interface PlaneShape {
  /** Keys or values: the layouts differ, and so do the groups of `i8`, `i4` and `i2`. */
  readonly side: "k" | "v";
  /** Tokens: 64, 128 or 256. */
  readonly blockSize: number;
  /** Elements of a row, a multiple of 32 up to 256. */
  readonly headDim: number;
}

/** How rows become a plane. */
export interface QuantizeBlockOptions extends PlaneShape {
  /** The format. */
  readonly dtype: QuantizedDType;
  /** Where to write: at least the bytes of the plane. A new array by default. */
  readonly into?: Uint8Array;
}

/** How a plane becomes rows. */
export interface DequantizeBlockOptions extends PlaneShape {
  /** The format. */
  readonly dtype: QuantizedDType;
  /** Where to write: at least `blockSize * headDim` values. A new array by default. */
  readonly into?: Float32Array;
}

/** How records become a plane, or a plane records. */
export interface PackBlockOptions extends PlaneShape {
  /** The format. */
  readonly dtype: RecordDType;
  /** Where to write: at least as many bytes as are read. A new array by default. */
  readonly into?: Uint8Array;
}

/** The names of {@linkcode QuantizeRowsOptions} and of {@linkcode DequantizeRowsOptions}. */
const ROWS_NAMES: OptionNames = optionNames<QuantizeRowsOptions & DequantizeRowsOptions>({
  dtype: true,
  into: true,
});

/** The names of the options of every call about blocks. */
const BLOCK_NAMES: OptionNames = optionNames<QuantizeBlockOptions & DequantizeBlockOptions & PackBlockOptions>({
  dtype: true,
  side: true,
  blockSize: true,
  headDim: true,
  into: true,
});

const RECORD_DTYPES: readonly RecordDType[] = ["q8_0", "q4_0"];
const QUANTIZED_DTYPES: readonly QuantizedDType[] = [...RECORD_DTYPES, "i8", "i4", "i2"];
const RECORD_BYTES: Readonly<Record<RecordDType, number>> = { q8_0: 34, q4_0: 18 };
const RECORD_VALUES = 32;

/**
 * The records of values: for each 32 of them a scale in f16, and the codes.
 *
 * Away from rounding ties the bytes are those of ggml's `quantize_row_q8_0_ref` and `quantize_row_q4_0_ref`. Of a group
 * whose scale `d` is a normal f16 (from 2^-14 on), no value of `q8_0` moves by more than `0.57 * d` and none of `q4_0` by
 * more than `0.51 * d`, or `1.01 * d` opposite to the largest; `d` is the largest magnitude over 127, or over 8.
 *
 * @param rows any number of values that 32 divides
 * @returns `into` if it was given, else a new array of 34 or 18 bytes for each 32 values
 *
 * @example 32 values, 34 bytes: the scale 1, and the values themselves
 * ```ts
 * import assert from "node:assert/strict";
 * import { dequantizeRows, quantizeRows } from "@kvern/kvern";
 *
 * const rows = Float32Array.from({ length: 32 }, (_, i) => 127 - i);
 * const records = quantizeRows(rows, { dtype: "q8_0" });
 * assert.equal(records.length, 34);
 * assert.deepEqual(records.subarray(2), Uint8Array.from(rows));
 * assert.deepEqual(dequantizeRows(records, { dtype: "q8_0" }), rows);
 * ```
 *
 * @throws {TypeError} `rows` that is no `Float32Array`, `into` that is no `Uint8Array`, or one that is detached
 * @throws {KvError} `invalid_config` for another dtype, or memory that overlaps; `invalid_size` for a length that 32 does
 * not divide, or an `into` too short; `not_finite` for NaN, an infinity, or a value past the largest scale
 */
export function quantizeRows(rows: Float32Array, options: QuantizeRowsOptions): Uint8Array {
  checkOptions(options, ROWS_NAMES, "quantize rows");
  const { dtype, into } = options;
  const code = dtypeCode("dtype", dtype, RECORD_DTYPES);
  const action = `quantize rows as ${dtype}`;
  checkFloats("rows", rows);
  if (into !== undefined) checkByteArray("into", into);
  const count = inputCount("rows", rows, action);
  if (count % RECORD_VALUES !== 0) {
    throw new KvError("invalid_size", `Cannot ${action} as a record has ${RECORD_VALUES} values: rows has ${count}`);
  }
  const needed = count / RECORD_VALUES * RECORD_BYTES[dtype];
  checkCrosses(needed, action);
  const records = into ?? new Uint8Array(needed);
  const byteCount = roomFor(needed, "bytes", records, action);
  const status = library().kv_rows_quantize(code, rows, count, records, byteCount);
  if (status < 0) throw refusal(status, action, { ...overlap("rows"), not_finite: () => valuesRule(rows, dtype) });
  return records;
}

/**
 * The values of records.
 *
 * @param records any number of whole records
 * @returns `into` if it was given, else a new array of 32 values for each record
 *
 * @example A record of ggml's `q4_0`: the scale 0.5, and codes from 0 to 15 that stand for -8 to 7
 * ```ts
 * import assert from "node:assert/strict";
 * import { dequantizeRows } from "@kvern/kvern";
 *
 * const half = [0x00, 0x38]; // 0.5 as f16
 * const record = Uint8Array.from([...half, 0xf0, ...new Array(15).fill(0x88)]);
 * const rows = dequantizeRows(record, { dtype: "q4_0" });
 * assert.deepEqual([rows[0], rows[1], rows[16]], [-4, 0, 3.5]);
 * ```
 *
 * @throws {TypeError} `records` that is no `Uint8Array`, `into` that is no `Float32Array`, or one that is detached
 * @throws {KvError} `invalid_config` for another dtype, or memory that overlaps; `invalid_size` for records that are not
 * whole, or an `into` too short; `not_finite` for a scale that is NaN or an infinity
 */
export function dequantizeRows(records: Uint8Array, options: DequantizeRowsOptions): Float32Array {
  checkOptions(options, ROWS_NAMES, "dequantize rows");
  const { dtype, into } = options;
  const code = dtypeCode("dtype", dtype, RECORD_DTYPES);
  const action = `dequantize rows of ${dtype}`;
  checkByteArray("records", records);
  if (into !== undefined) checkFloats("into", into);
  const byteCount = inputCount("records", records, action);
  if (byteCount % RECORD_BYTES[dtype] !== 0) {
    throw new KvError(
      "invalid_size",
      `Cannot ${action} as a record has ${RECORD_BYTES[dtype]} bytes: records has ${byteCount}`,
    );
  }
  const needed = byteCount / RECORD_BYTES[dtype] * RECORD_VALUES;
  checkCrosses(needed, action);
  const rows = into ?? new Float32Array(needed);
  const count = roomFor(needed, "values", rows, action);
  const status = library().kv_rows_dequantize(code, records, byteCount, rows, count);
  if (status < 0) throw refusal(status, action, { ...overlap("records"), not_finite: scaleRule });
  return rows;
}

/**
 * The plane of rows `[token][headDim]`: codes and scales as a cache stores them.
 *
 * Keys of `i8`, `i4` and `i2` have one scale and min for each channel (a dim, over all tokens), because channels differ
 * in size far more than tokens do ([KIVI](https://arxiv.org/abs/2402.02750)); values have one for each token and 64 dims,
 * or 32 where 64 does not divide `headDim`. `q8_0` and `q4_0` have the groups of records, on both sides.
 *
 * With `step` the exact scale, no value of `i8`, `i4` or `i2` moves by more than `step / 2`, and what scale and min lose
 * as f16: `code * |step - scale| + |exact min - min|`.
 *
 * @param rows `blockSize * headDim` values, `[token][headDim]`
 * @returns `into` if it was given, else a new array of the plane's bytes
 *
 * @example 64 tokens of 128 dims in 4.5 bits: 64 * 128 / 2 codes, and 2 * 2 bytes for each of 128 channels
 * ```ts
 * import assert from "node:assert/strict";
 * import { dequantizeBlock, quantizeBlock } from "@kvern/kvern";
 *
 * const shape = { dtype: "i4", side: "k", blockSize: 64, headDim: 128 } as const;
 * const rows = Float32Array.from({ length: 64 * 128 }, (_, i) => i % 128 + Math.floor(i / 128) % 16);
 * const plane = quantizeBlock(rows, shape);
 * assert.equal(plane.length, 4608);
 * assert.deepEqual(dequantizeBlock(plane, shape), rows); // 16 values in each channel, a step of 1
 * ```
 *
 * @throws {TypeError} `rows` that is no `Float32Array`, `into` that is no `Uint8Array`, one that is detached, or an option
 * of the wrong type
 * @throws {RangeError} an option that is no count
 * @throws {KvError} `invalid_config` for an option out of its range, or memory that overlaps; `invalid_size` for another
 * number of values, or an `into` too short; `not_finite` for NaN, an infinity, or a value past the largest scale or min
 */
export function quantizeBlock(rows: Float32Array, options: QuantizeBlockOptions): Uint8Array {
  checkOptions(options, BLOCK_NAMES, "quantize a block");
  const { dtype, side, blockSize, headDim, into } = options;
  const action = `quantize a block as ${dtype}`;
  const plane = planeOf({ dtype, side, blockSize, headDim }, QUANTIZED_DTYPES, action);
  checkFloats("rows", rows);
  if (into !== undefined) checkByteArray("into", into);
  const count = inputCount("rows", rows, action);
  checkExact(count, plane.values, "values", "rows", plane, action);
  const bytes = into ?? new Uint8Array(plane.bytes);
  const byteCount = roomFor(plane.bytes, "bytes", bytes, action);
  const status = library().kv_block_quantize(...plane.words, rows, count, bytes, byteCount);
  if (status < 0) throw refusal(status, action, { ...overlap("rows"), not_finite: () => valuesRule(rows, dtype) });
  return bytes;
}

/**
 * The rows `[token][headDim]` of a plane.
 *
 * @param bytes the whole plane
 * @returns `into` if it was given, else a new array of `blockSize * headDim` values
 *
 * @example A constant is exact
 * ```ts
 * import assert from "node:assert/strict";
 * import { dequantizeBlock, quantizeBlock } from "@kvern/kvern";
 *
 * const shape = { dtype: "i2", side: "v", blockSize: 64, headDim: 64 } as const;
 * const rows = new Float32Array(64 * 64).fill(1.5);
 * const into = new Float32Array(rows.length);
 * dequantizeBlock(quantizeBlock(rows, shape), { ...shape, into });
 * assert.deepEqual(into, rows);
 * ```
 *
 * @throws {TypeError} `bytes` that is no `Uint8Array`, `into` that is no `Float32Array`, one that is detached, or an option
 * of the wrong type
 * @throws {RangeError} an option that is no count
 * @throws {KvError} `invalid_config` for an option out of its range, or memory that overlaps; `invalid_size` for another
 * number of bytes, or an `into` too short; `not_finite` for a scale or min that is NaN or an infinity
 */
export function dequantizeBlock(bytes: Uint8Array, options: DequantizeBlockOptions): Float32Array {
  checkOptions(options, BLOCK_NAMES, "dequantize a block");
  const { dtype, side, blockSize, headDim, into } = options;
  const action = `dequantize a block of ${dtype}`;
  const plane = planeOf({ dtype, side, blockSize, headDim }, QUANTIZED_DTYPES, action);
  checkByteArray("bytes", bytes);
  if (into !== undefined) checkFloats("into", into);
  const byteCount = inputCount("bytes", bytes, action);
  checkExact(byteCount, plane.bytes, "bytes", "bytes", plane, action);
  const rows = into ?? new Float32Array(plane.values);
  const count = roomFor(plane.values, "values", rows, action);
  const status = library().kv_block_dequantize(...plane.words, bytes, byteCount, rows, count);
  if (status < 0) throw refusal(status, action, { ...overlap("bytes"), not_finite: scaleRule });
  return rows;
}

/**
 * The plane of records `[token][headDim / 32]`, code for code: rows that ggml quantized go into a cache as they are.
 *
 * @param records the records of `blockSize` rows
 * @returns `into` if it was given, else a new array of as many bytes as the records have
 *
 * @example There and back
 * ```ts
 * import assert from "node:assert/strict";
 * import { packBlock, quantizeRows, unpackBlock } from "@kvern/kvern";
 *
 * const shape = { dtype: "q4_0", side: "k", blockSize: 64, headDim: 64 } as const;
 * const records = quantizeRows(Float32Array.from({ length: 64 * 64 }, (_, i) => Math.sin(i)), { dtype: "q4_0" });
 * const plane = packBlock(records, shape);
 * assert.notDeepEqual(plane, records);
 * assert.deepEqual(unpackBlock(plane, shape), records);
 * ```
 *
 * @throws {TypeError} `records` or `into` that is no `Uint8Array` or is detached, or an option of the wrong type
 * @throws {RangeError} an option that is no count
 * @throws {KvError} `invalid_config` for an option out of its range, or memory that overlaps; `invalid_size` for another
 * number of bytes, or an `into` too short; `not_finite` for a scale that is NaN or an infinity
 */
export function packBlock(records: Uint8Array, options: PackBlockOptions): Uint8Array {
  return moveBlock("kv_block_pack", "records", records, options);
}

/**
 * The records `[token][headDim / 32]` of a plane, code for code: what ggml reads.
 *
 * @param bytes the whole plane
 * @returns `into` if it was given, else a new array of as many bytes as the plane has
 *
 * @example The values do not change on the way
 * ```ts
 * import assert from "node:assert/strict";
 * import { dequantizeBlock, dequantizeRows, quantizeBlock, unpackBlock } from "@kvern/kvern";
 *
 * const shape = { dtype: "q8_0", side: "v", blockSize: 64, headDim: 32 } as const;
 * const plane = quantizeBlock(Float32Array.from({ length: 64 * 32 }, (_, i) => Math.cos(i)), shape);
 * const rows = dequantizeRows(unpackBlock(plane, shape), { dtype: "q8_0" });
 * assert.deepEqual(rows, dequantizeBlock(plane, shape));
 * ```
 *
 * @throws {TypeError} `bytes` or `into` that is no `Uint8Array` or is detached, or an option of the wrong type
 * @throws {RangeError} an option that is no count
 * @throws {KvError} `invalid_config` for an option out of its range, or memory that overlaps; `invalid_size` for another
 * number of bytes, or an `into` too short
 */
export function unpackBlock(bytes: Uint8Array, options: PackBlockOptions): Uint8Array {
  return moveBlock("kv_block_unpack", "bytes", bytes, options);
}

function moveBlock(
  name: "kv_block_pack" | "kv_block_unpack",
  sourceName: string,
  source: Uint8Array,
  options: PackBlockOptions,
): Uint8Array {
  const verb = name === "kv_block_pack" ? "pack" : "unpack";
  checkOptions(options, BLOCK_NAMES, `${verb} a block`);
  const { dtype, side, blockSize, headDim, into } = options;
  const action = `${verb} a block of ${dtype}`;
  const plane = planeOf({ dtype, side, blockSize, headDim }, RECORD_DTYPES, action);
  checkByteArray(sourceName, source);
  if (into !== undefined) checkByteArray("into", into);
  const count = inputCount(sourceName, source, action);
  checkExact(count, plane.bytes, "bytes", sourceName, plane, action);
  const destination = into ?? new Uint8Array(plane.bytes);
  const byteCount = roomFor(plane.bytes, "bytes", destination, action);
  const status = library()[name](...plane.words, source, count, destination, byteCount);
  if (status < 0) throw refusal(status, action, { ...overlap(sourceName), not_finite: scaleRule });
  return destination;
}

/** A checked plane: its words, and what it holds. */
interface Plane {
  readonly words: readonly [dtype: number, side: number, blockSize: number, headDim: number];
  readonly values: number;
  readonly bytes: number;
}

function planeOf(shape: PlaneShape & { readonly dtype: DType }, among: readonly DType[], action: string): Plane {
  const { dtype, side, blockSize, headDim } = shape;
  const code = dtypeCode("dtype", dtype, among);
  if (typeof side !== "string") throw new TypeError(`side must be a string: ${typeof side}`);
  if (side !== "k" && side !== "v") {
    throw new KvError("invalid_config", `Cannot ${action} as side must be k or v: side is ${side}`);
  }
  checkCount("blockSize", blockSize);
  if (blockSize !== 64 && blockSize !== 128 && blockSize !== 256) {
    throw new KvError(
      "invalid_config",
      `Cannot ${action} as blockSize must be 64, 128 or 256: blockSize is ${blockSize}`,
    );
  }
  checkCount("headDim", headDim);
  if (headDim % 32 !== 0 || headDim === 0 || headDim > VALUES.headDimMax) {
    throw new KvError(
      "invalid_config",
      `Cannot ${action} as headDim must be a multiple of 32 up to ${VALUES.headDimMax}: headDim is ${headDim}`,
    );
  }
  const groupSize = side === "k" ? blockSize : headDim % 64 === 0 ? 64 : 32;
  return {
    words: [code, ENUMS.side[side === "k" ? "keys" : "values"], blockSize, headDim],
    values: blockSize * headDim,
    bytes: planeBytes(dtype, groupSize, headDim, blockSize),
  };
}

/** The rule that one of the values breaks. */
function valuesRule(rows: Float32Array, dtype: QuantizedDType): string {
  return notFiniteRule([{ name: "rows", array: rows, storedAs: [dtype] }]);
}

function checkByteArray(name: string, array: Uint8Array): void {
  if (arrayKind(array) !== "Uint8Array") throw new TypeError(`${name} must be a Uint8Array: ${kindOf(array)}`);
}

/** A count that crosses has 32 bits. */
function checkCrosses(count: number, action: string): void {
  if (count < 2 ** 32) return;
  throw new KvError("unsupported", `Cannot ${action} as one call makes less than 2^32 bytes or values: ${count}`);
}

/** An input that must have just what the plane has. */
function checkExact(count: number, needed: number, unit: string, name: string, plane: Plane, action: string): void {
  if (count === needed) return;
  const [, , blockSize, headDim] = plane.words;
  throw new KvError(
    "invalid_size",
    `Cannot ${action} as ${blockSize} tokens of ${headDim} dims have ${needed} ${unit}: ${name} has ${count}`,
  );
}

/** The length of a destination, which must be enough. */
function roomFor(needed: number, unit: string, array: ArrayBufferView, action: string): number {
  const count = outputCount("into", array);
  if (count >= needed) return count;
  throw new KvError("invalid_size", `Cannot ${action} as it gives ${needed} ${unit}: into has ${count}`);
}

/** All options are checked before, so that this is the one thing left that native code may find wrong with them. */
function overlap(name: string): { readonly invalid_config: () => string } {
  return { invalid_config: () => `${name} and into must not be the same memory` };
}

function scaleRule(): string {
  return "scales must be finite: found NaN or an infinity";
}
