/**
 * What a commit carries beside the count, and what stands in the way of one.
 *
 * @module
 */

import type { CommitOptions } from "./cache.ts";
import { KvError } from "./error.ts";
import { countText } from "./ffi/status.ts";
import { arrayKind, checkAttached, kindOf, lengthOf } from "./typed_array.ts";

/** Each of the `n` tokens needs an id, if ids are given at all. */
export function checkTokens(tokens: CommitOptions["tokens"], n: number): void {
  if (tokens === undefined) return;
  checkWords("tokens", tokens);
  const count = lengthOf(tokens);
  if (count === n) return;
  throw new KvError("invalid_size", `Cannot commit ${countText(n, "token")} as each needs an id: tokens has ${count}`);
}

/** The array must be a `Uint32Array` that has its memory. */
export function checkWords(name: string, words: Uint32Array): void {
  if (arrayKind(words) !== "Uint32Array") throw new TypeError(`${name} must be a Uint32Array: ${kindOf(words)}`);
  if (lengthOf(words) === 0) checkAttached(name, words);
}

/** Which layers have how many rows pending, the first few of them. */
export function pendingText(layerCount: number, pendingOf: (layer: number) => number): string {
  const shown = Array.from({ length: Math.min(layerCount, 4) }, (_, layer) => layer);
  return shown.map((layer) => `layer ${layer} has ${pendingOf(layer)}`).join(", ");
}
