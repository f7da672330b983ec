/**
 * What a copy of rows is made of, and where it goes.
 *
 * @module
 */

import type { FloatDType } from "./dtype.ts";
import { type OptionNames, optionNames } from "./option_names.ts";
import type { Rows } from "./rows.ts";

/** What a copy is made of, and where it goes. */
export interface GatherOptions {
  /** The dtype of the copy, `"f32"` by default. */
  readonly dtype?: FloatDType;
  /**
   * Where the rows go, `[row][kv_head][head_dim]`, at least as long as the rows; new arrays by default. They share no
   * memory, neither with each other nor with the cache.
   */
  readonly into?: { readonly k: Rows; readonly v: Rows };
}

/** The names of {@linkcode GatherOptions}. */
export const GATHER_NAMES: OptionNames = optionNames<GatherOptions>({
  dtype: true,
  into: true,
});
