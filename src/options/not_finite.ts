/**
 * Which number of a refused input could not be stored, and where it stands.
 *
 * Native code says that there is one and no more, since it looks at many numbers at once. So the arrays are looked at
 * again, slowly, once a call was refused. Memory that is shared may have changed by then.
 *
 * @module
 */

import type { DType, FloatDType } from "./dtype.ts";
import { type LayoutOptions, placeIn, rowCountIn } from "./layout.ts";
import type { Rows } from "./rows.ts";
import { arrayKind, lengthOf } from "./typed_array.ts";

/** The magnitudes from which on a dtype refuses a number: rounded, it or the scale of its group would be an infinity. */
const MAGNITUDE_MAX: Readonly<Record<DType, number>> = {
  f32: 2 ** 128,
  f16: 65520,
  bf16: 2 ** 128 - 2 ** 119,
  q8_0: 65520 * 127,
  q4_0: 65520 * 8,
  i8: 65520,
  i4: 65520,
  i2: 65520,
};

/** An array of numbers that a call was given. */
export interface GivenNumbers {
  readonly name: string;
  readonly array: Rows;
  /** What the bits of a `Uint16Array` are. */
  readonly bits?: FloatDType | undefined;
  /** All that they are to be stored as. */
  readonly storedAs: readonly DType[];
  /** Where an element stands, in words; undefined for one that is none of the input's. */
  readonly place?: (index: number) => string | undefined;
}

/** The rule that an element of one of the arrays breaks, with its place and value. */
export function notFiniteRule(inputs: readonly GivenNumbers[]): string {
  for (const { name, array, bits, storedAs, place } of inputs) {
    const narrowest = storedAs.reduce((a, b) => MAGNITUDE_MAX[b] < MAGNITUDE_MAX[a] ? b : a);
    const isFit = (value: number) => Math.abs(value) < MAGNITUDE_MAX[narrowest]; // false for NaN
    const length = lengthOf(array);
    for (let index = 0; index < length; index++) {
      const value = valueOf(array, index, bits);
      if (isFit(value)) continue;
      const where = place?.(index);
      if (place !== undefined && where === undefined) continue;
      const at = where === undefined ? "" : ` (${where})`;
      const must = Number.isFinite(value) ? `stay finite as ${narrowest}` : "be finite";
      return `${name} must ${must}: ${name}[${index}] is ${value}${at}`;
    }
  }
  const names = inputs.map(({ name }) => name).join(" and ");
  return `${names} must be finite as they are stored: a number was not, and has changed since`;
}

/** The rows of an append, as they were given. */
export interface AppendedRows {
  readonly k: Rows;
  readonly v: Rows;
  readonly dtype?: FloatDType | undefined;
  readonly layout?: LayoutOptions["layout"] | undefined;
  readonly headStride?: number | undefined;
}

/** The rule that a number among appended rows breaks. */
export function rowsRule(
  { k, v, dtype, layout = "token_major", headStride }: AppendedRows,
  shape: { readonly kvHeadCount: number; readonly headDim: number },
  storedAs: { readonly k: readonly DType[]; readonly v: readonly DType[] },
): string {
  const rowCount = rowCountIn(lengthOf(k), shape, headStride);
  const options = headStride === undefined ? { layout } : { layout, headStride };
  const place = (index: number) => {
    const at = placeIn(index, rowCount, shape, options);
    return at && `row ${at.row}, KV head ${at.head}, element ${at.element}`;
  };
  return notFiniteRule([
    { name: "k", array: k, bits: dtype, storedAs: storedAs.k, place },
    { name: "v", array: v, bits: dtype, storedAs: storedAs.v, place },
  ]);
}

/** Where an element of queries `[query][q_head][head_dim]` stands. */
export function queryPlace(qHeadCount: number, headDim: number): (index: number) => string {
  return (index) => {
    const line = Math.floor(index / headDim);
    return `query ${Math.floor(line / qHeadCount)}, query head ${line % qHeadCount}, element ${index % headDim}`;
  };
}

/** An element as a number. */
function valueOf(array: Rows, index: number, bits: FloatDType | undefined): number {
  const element = array[index]!;
  if (arrayKind(array) !== "Uint16Array") return element;
  return bits === "bf16" ? ofBfloat16(element) : ofHalf(element);
}

const words = new Uint32Array(1);
const floats = new Float32Array(words.buffer);

/** A bf16 is the upper half of an f32. */
function ofBfloat16(bits: number): number {
  words[0] = bits << 16;
  return floats[0]!;
}

/** An f16 has 5 bits of exponent and 10 of fraction. */
function ofHalf(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent === 31) return fraction === 0 ? sign * Infinity : NaN;
  return sign * (exponent === 0 ? fraction * 2 ** -24 : (1024 + fraction) * 2 ** (exponent - 25));
}
