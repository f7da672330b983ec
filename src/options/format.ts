/**
 * Formats of blocks: a dtype for keys and one for values, where they fit, and what they cost.
 *
 * @module
 */

import { KvError } from "../error.ts";
import { VALUES } from "../ffi/exports.ts";
import { type DType, dtypeCode, eachSide, isQuantized } from "./dtype.ts";

/** How keys and values are stored: one dtype for both, or one for each. */
export type KvFormat = DType | { readonly k: DType; readonly v: DType };

/** A dtype for each side. */
export interface Sides {
  readonly k: DType;
  readonly v: DType;
}

/** The dtypes of a format, checked; `name` is that of the option, `action` begins the text of a refusal. */
export function sidesOf(name: string, format: KvFormat, action: string): Sides {
  const { k, v } = eachSide(format, action, name);
  dtypeCode(`${name}.k`, k);
  dtypeCode(`${name}.v`, v);
  return { k, v };
}

/** What a block must fit in, for the text of a refusal. */
export const BLOCK_LIMITS: string = `maxBytes and in ${VALUES.slabBytesMax / 2 ** 30} GiB`;

/** Quantized formats come in whole vectors of codes: refuses blocks and heads that are none. */
export function checkFits(name: string, sides: Sides, headDim: number, blockSize: number, action: string): void {
  for (const side of ["k", "v"] as const) {
    const dtype = sides[side];
    if (!isQuantized(dtype)) continue;
    const refuse = (rule: string) =>
      new KvError("invalid_config", `Cannot ${action} as ${name}.${side} ${dtype} ${rule}`);
    if (blockSize % 64 !== 0) throw refuse(`needs a blockSize of 64, 128 or 256: blockSize is ${blockSize}`);
    if (headDim % 32 !== 0) throw refuse(`needs a headDim that is a multiple of 32: headDim is ${headDim}`);
  }
}

/** Bytes of the rows of one KV head in a block, keys and values: codes, and the scales and mins behind them. */
export function headBytes({ k, v }: Sides, headDim: number, blockSize: number): number {
  return planeBytes(k, blockSize, headDim, blockSize) + planeBytes(v, headDim % 64 === 0 ? 64 : 32, headDim, blockSize);
}

/** `groupSize` values share a scale where the dtype has a min beside it. */
export function planeBytes(dtype: DType, groupSize: number, headDim: number, blockSize: number): number {
  const values = headDim * blockSize;
  switch (dtype) {
    case "f32":
      return values * 4;
    case "f16":
    case "bf16":
      return values * 2;
    case "q8_0":
      return values / 32 * 34;
    case "q4_0":
      return values / 32 * 18;
    case "i8":
      return values + values / groupSize * 4;
    case "i4":
      return values / 2 + values / groupSize * 4;
    case "i2":
      return values / 4 + values / groupSize * 4;
  }
}

/** The numbers of the dtypes of a format that blocks of such heads can have; `tail` where none is given. */
export function formatWords(
  format: KvFormat | undefined,
  tail: Sides,
  headDim: number,
  blockSize: number,
  action: string,
): [k: number, v: number] {
  const sides = format === undefined ? tail : sidesOf("format", format, action);
  checkFits("format", sides, headDim, blockSize, action);
  return [dtypeCode("format.k", sides.k), dtypeCode("format.v", sides.v)];
}
