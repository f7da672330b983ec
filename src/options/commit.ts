/**
 * What a commit carries beside the count, and what stands in the way of one.
 *
 * @module
 */

import { KvError } from "../error.ts";
import { VALUES } from "../ffi/exports.ts";
import { countText } from "../ffi/status.ts";
import { checkCount } from "./counts.ts";
import { type OptionNames, optionNames } from "./option_names.ts";
import { arrayKind, checkAttached, kindOf, lengthOf } from "./typed_array.ts";

/** What a commit may carry beside the count. */
export interface CommitOptions {
  /**
   * Ids of the committed tokens `[n]`. A {@linkcode PagedCache} finds rows by them, see {@linkcode PagedCache.sequence}; a
   * contiguous cache shares no rows: it checks their type and number, no more.
   */
  readonly tokens?: Uint32Array;
}

/** What a commit of a {@linkcode Sequence} may carry beside the count. */
export interface SequenceCommitOptions extends CommitOptions {
  /**
   * The pending rows that stay, by their index, ascending: the accepted path of a tree of drafted tokens. The others are
   * dropped, and those that stay move up. As many as are committed, and `tokens` are theirs.
   */
  readonly kept?: Uint32Array;
  /**
   * How long the rows of these `tokens` stay once nobody uses them, against others, 0 to 255; 35 by default. Of equal ones
   * those that were used last stay longest.
   */
  readonly priority?: number;
  /** Milliseconds for which that `priority` holds, 1 to 2^32 - 1; after them it is 35. For ever by default. */
  readonly ttlMs?: number;
}

/** The names of {@linkcode SequenceCommitOptions}. */
export const COMMIT_NAMES: OptionNames = optionNames<SequenceCommitOptions>({
  tokens: true,
  kept: true,
  priority: true,
  ttlMs: true,
});

/** Each of the `n` tokens needs an id, if ids are given at all. */
export function checkTokens(tokens: CommitOptions["tokens"], n: number): void {
  if (tokens === undefined) return;
  checkWords("tokens", tokens);
  const count = lengthOf(tokens);
  if (count === n) return;
  throw new KvError("invalid_size", `Cannot commit ${countText(n, "token")} as each needs an id: tokens has ${count}`);
}

/** The options that say how long told tokens stay, as they were read. */
interface GivenRank {
  readonly tokens: Uint32Array | undefined;
  readonly priority: number | undefined;
  readonly ttlMs: number | undefined;
}

/** How long told tokens stay: the priority, and for how many milliseconds it holds, 0 for ever. */
export function rankOf({ tokens, priority, ttlMs }: GivenRank): { priority: number; ttlMs: number } {
  if (priority === undefined) {
    if (ttlMs !== undefined) throw refuse("ttlMs needs a priority: none is given");
    return { priority: VALUES.priorityDefault, ttlMs: 0 };
  }
  checkCount("priority", priority);
  if (tokens === undefined) throw refuse("priority needs tokens: none are given");
  if (priority > PRIORITY_MAX) throw refuse(`priority must be at most ${PRIORITY_MAX}: priority is ${priority}`);
  if (ttlMs === undefined) return { priority, ttlMs: 0 };
  checkCount("ttlMs", ttlMs);
  if (ttlMs === 0) throw refuse("ttlMs must be at least 1: ttlMs is 0");
  return { priority, ttlMs };
}

const PRIORITY_MAX = 255;

function refuse(rule: string): KvError {
  return new KvError("invalid_config", `Cannot commit as ${rule}`);
}

/** The array must be a `Uint32Array` that has its memory. */
export function checkWords(name: string, words: Uint32Array): void {
  if (arrayKind(words) !== "Uint32Array") throw new TypeError(`${name} must be a Uint32Array: ${kindOf(words)}`);
  if (lengthOf(words) === 0) checkAttached(name, words);
}
