/**
 * How the rows of an append or a store are given.
 *
 * @module
 */

import type { FloatDType } from "./dtype.ts";
import { type OptionNames, optionNames } from "./option_names.ts";

/** How the rows given to append are stored in their arrays. */
export interface AppendOptions {
  /** What the bits in a `Uint16Array` are; the other arrays say it themselves. */
  readonly dtype?: FloatDType;
  /** `[n][kv_head][head_dim]`, the default, or `[kv_head][n][head_dim]`, as in a `past_key_values` tensor. */
  readonly layout?: "token_major" | "head_major";
}

/** The names of {@linkcode AppendOptions}. */
export const APPEND_NAMES: OptionNames = optionNames<AppendOptions>({
  dtype: true,
  layout: true,
});

/** How the rows given to store are stored in their arrays. */
export interface StoreOptions {
  /** What the bits in a `Uint16Array` are; the other arrays say it themselves. */
  readonly dtype?: FloatDType;
}

/** The names of {@linkcode StoreOptions}. */
export const STORE_NAMES: OptionNames = optionNames<StoreOptions>({
  dtype: true,
});
