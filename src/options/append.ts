/**
 * How the rows of an append or a store are given.
 *
 * @module
 */

import type { FloatDType } from "./dtype.ts";
import type { LayoutOptions } from "./layout.ts";
import { type OptionNames, optionNames } from "./option_names.ts";

/** How the rows given to append are stored in their arrays. */
export interface AppendOptions extends LayoutOptions {
  /** What the bits in a `Uint16Array` are; the other arrays say it themselves. */
  readonly dtype?: FloatDType;
}

/** The names of {@linkcode AppendOptions}. */
export const APPEND_NAMES: OptionNames = optionNames<AppendOptions>({
  dtype: true,
  layout: true,
  headStride: true,
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
