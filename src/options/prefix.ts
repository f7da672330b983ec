/**
 * Which rows a cache keeps for prompts that begin alike.
 *
 * @module
 */

import { KvError } from "../error.ts";
import { ENUMS } from "../ffi/exports.ts";
import type { Values } from "../ffi/record.ts";
import { checkBytes } from "./counts.ts";
import { checkOptions, type OptionNames, optionNames } from "./option_names.ts";

/** What a {@linkcode PagedCache} keeps, so that a prompt starts where an earlier one ends. */
export interface PrefixOptions {
  /**
   * Most bytes of the blocks that are known by their tokens, those of living sequences included; by default no limit but
   * the cache's own. Blocks that no sequence uses are given back whenever memory is wanted.
   */
  readonly maxBytes?: number;
  /** Most of them for one salt, whatever the fingerprints: what one tenant computes does not push out what another one has. */
  readonly maxBytesPerSalt?: number;
  /**
   * With `"any"`, the default, a sequence starts from whatever format the rows have; with `"float"` it starts before the
   * first quantized block, and rows in floats are kept for that.
   */
  readonly tiers?: "any" | "float";
  /** Keeps a list of what changed, for {@linkcode PagedCache.events}; false by default. */
  readonly events?: boolean;
}

const PREFIX_NAMES: OptionNames = optionNames<PrefixOptions>({
  maxBytes: true,
  maxBytesPerSalt: true,
  tiers: true,
  events: true,
});

/** What a PagedRecord says of the index. */
export type PrefixWords = Pick<
  Values<"paged">,
  "prefixMode" | "prefixTiers" | "prefixMaxBytes" | "prefixMaxBytesPerSalt" | "prefixHasEvents"
>;

/**
 * The checked words of the option `prefix`. Without one, rows are found as long as a sequence has them; on a pool of several
 * caches not at all, since what one of them keeps another could not get back.
 */
export function prefixWords(prefix: PrefixOptions | undefined, hasPool: boolean, action: string): PrefixWords {
  if (prefix === undefined) {
    const prefixMode = hasPool ? ENUMS.prefixMode.none : ENUMS.prefixMode.living;
    return {
      prefixMode,
      prefixTiers: ENUMS.prefixTiers.any,
      prefixMaxBytes: 0,
      prefixMaxBytesPerSalt: 0,
      prefixHasEvents: 0,
    };
  }
  checkOptions(prefix, PREFIX_NAMES, action, "prefix");
  const { maxBytes, maxBytesPerSalt, tiers = "any", events = false } = prefix;
  if (typeof events !== "boolean") throw new TypeError(`prefix.events must be a boolean: ${typeof events}`);
  if (hasPool) {
    throw new KvError("invalid_config", `Cannot ${action} as pool and prefix exclude each other: both are given`);
  }
  if (!Object.hasOwn(ENUMS.prefixTiers, tiers)) {
    throw new KvError("invalid_config", `Cannot ${action} as prefix.tiers must be "any" or "float": it is ${tiers}`);
  }
  return {
    prefixMode: ENUMS.prefixMode.kept,
    prefixTiers: ENUMS.prefixTiers[tiers],
    prefixMaxBytes: maxBytes === undefined ? 0 : checkBytes("prefix.maxBytes", maxBytes, action),
    prefixHasEvents: Number(events),
    prefixMaxBytesPerSalt: maxBytesPerSalt === undefined
      ? 0
      : checkBytes("prefix.maxBytesPerSalt", maxBytesPerSalt, action),
  };
}
