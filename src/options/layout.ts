/**
 * In which order rows stand in a caller's arrays.
 *
 *     token_major   [row][kv_head][head_dim]
 *     head_major    [kv_head][row][head_dim], the heads `headStride` elements apart
 *
 * @module
 */

import { KvError } from "../error.ts";
import { ENUMS } from "../ffi/exports.ts";
import { checkOption } from "./counts.ts";

/** The order of rows in arrays of keys and values. */
export type RowLayout = "token_major" | "head_major";

/** How rows stand in arrays of keys and values. */
export interface LayoutOptions {
  /** `[row][kv_head][head_dim]`, the default, or `[kv_head][row][head_dim]`, as in a `past_key_values` tensor. */
  readonly layout?: RowLayout;
  /**
   * Elements from the rows of one KV head to those of the next with `head_major` layout, where they are a part of a longer
   * tensor: `length * headDim` for one of `length` rows. By default there is no gap between them.
   */
  readonly headStride?: number;
}

/** What crosses of a layout: its number, and 0 for heads without a gap. */
export interface LayoutWords {
  readonly order: number;
  readonly stride: number;
}

/** The checked words of a layout. */
export function layoutWords(
  layout: RowLayout | undefined,
  headStride: number | undefined,
  action: string,
): LayoutWords {
  if (layout === undefined) layout = "token_major";
  if (layout !== "token_major" && layout !== "head_major") {
    if (typeof layout !== "string") throw new TypeError(`layout must be a string: ${typeof layout}`);
    throw refuse(action, `layout must be token_major or head_major: layout is ${layout}`);
  }
  const order = ENUMS.layout[layout];
  if (headStride === undefined) return order === 0 ? TOKEN_MAJOR : HEAD_MAJOR;
  if (layout !== "head_major") throw refuse(action, `headStride needs the layout head_major: layout is ${layout}`);
  return { order, stride: checkOption("headStride", headStride, action) };
}

const TOKEN_MAJOR: LayoutWords = { order: ENUMS.layout.token_major, stride: 0 };
const HEAD_MAJOR: LayoutWords = { order: ENUMS.layout.head_major, stride: 0 };

/** The heads of a layer. */
interface Heads {
  readonly kvHeadCount: number;
  readonly headDim: number;
}

/** The rows that `length` elements are; a fraction where they are no whole ones. */
export function rowCountIn(length: number, { kvHeadCount, headDim }: Heads, headStride: number = 0): number {
  if (headStride === 0 || length === 0) return length / (kvHeadCount * headDim);
  return (length - (kvHeadCount - 1) * headStride) / headDim;
}

/** The elements from the first to the last of `rowCount` rows. */
export function elementCountOf(rowCount: number, { kvHeadCount, headDim }: Heads, headStride: number = 0): number {
  if (headStride === 0 || rowCount === 0) return rowCount * kvHeadCount * headDim;
  return (kvHeadCount - 1) * headStride + rowCount * headDim;
}

/** How long an array of rows must be, in words. */
export function lengthRule({ kvHeadCount, headDim }: Heads, headStride: number = 0): string {
  if (headStride === 0) return `a multiple of ${kvHeadCount * headDim} elements`;
  const before = (kvHeadCount - 1) * headStride;
  return `${before} elements and a multiple of ${headDim} that is at most headStride, which is ${headStride}`;
}

/** How long an array of the rows of `tokenCount` tokens must be, in words. */
export function batchLengthRule(tokenCount: number, heads: Heads, headStride: number): string {
  if (headStride === 0) return `${heads.kvHeadCount * heads.headDim} elements for each of them`;
  return `${elementCountOf(tokenCount, heads, headStride)} elements where headStride is ${headStride}`;
}

/** The row, KV head and element of an index; undefined between the heads. */
export function placeIn(
  index: number,
  rowCount: number,
  { kvHeadCount, headDim }: Heads,
  { layout = "token_major", headStride }: LayoutOptions,
): { readonly row: number; readonly head: number; readonly element: number } | undefined {
  const element = index % headDim, line = Math.floor(index / headDim);
  if (layout === "token_major") return { row: Math.floor(line / kvHeadCount), head: line % kvHeadCount, element };
  const stride = headStride ?? rowCount * headDim;
  const head = Math.floor(index / stride), inHead = index % stride;
  if (inHead >= rowCount * headDim) return undefined;
  return { row: Math.floor(inHead / headDim), head, element: inHead % headDim };
}

function refuse(action: string, rule: string): KvError {
  return new KvError("invalid_config", `Cannot ${action} as ${rule}`);
}
