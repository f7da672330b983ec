/**
 * What a copy of rows is made of, and where it goes.
 *
 * @module
 */

import type { FloatDType } from "./dtype.ts";
import type { LayoutOptions } from "./layout.ts";
import { type OptionNames, optionNames } from "./option_names.ts";
import type { Rows } from "./rows.ts";

/** What a copy is made of, and where it goes. */
export interface GatherOptions extends LayoutOptions {
  /** Position of the first row, 0 by default. */
  readonly start?: number;
  /**
   * Rows of the copy. Each position from `start` on must be there, so that a copy never has fewer rows than were asked for.
   * By default all rows that are seen from `start` on, however many.
   */
  readonly count?: number;
  /** The dtype of the copy, `"f32"` by default. */
  readonly dtype?: FloatDType;
  /**
   * Where the rows go, in the order of `layout`, at least as long as the rows; new arrays by default. They share no memory,
   * neither with each other nor with the cache. With a `headStride` what lies between the heads stays as it is.
   */
  readonly into?: { readonly k: Rows; readonly v: Rows };
}

/** The names of {@linkcode GatherOptions}. */
export const GATHER_NAMES: OptionNames = optionNames<GatherOptions>({
  layout: true,
  headStride: true,
  start: true,
  count: true,
  dtype: true,
  into: true,
});
