/**
 * What changed in what a cache finds by tokens, in the shape that routers read.
 *
 * An event crosses as words: its kind, its number in two words, the names of the block and of the one before it in four
 * each, the number of its tokens, and the tokens.
 *
 * @module
 */

import { nameOf } from "../ffi/record.ts";

/**
 * One change. Names are 32 hexadecimal digits: a keyed hash of all tokens from the first on, of the salt, of the fingerprint
 * and of the cache's shape and formats, equal in every process.
 */
export type PrefixEvent =
  | {
    readonly kind: "stored";
    /** Counts all events of the cache from 0 on, without gaps. */
    readonly number: number;
    readonly block: string;
    /** The block before it; undefined for a first one. */
    readonly parent: string | undefined;
    /** Its tokens, as many as a block has. */
    readonly tokens: Uint32Array;
  }
  | { readonly kind: "removed"; readonly number: number; readonly block: string }
  | { readonly kind: "cleared"; readonly number: number };

const NUMBER = 1, NAME = 3, PARENT = 7, TOKEN_COUNT = 11, TOKENS = 12;

/** The events in a list of words. */
export function eventsOf(list: Uint32Array): PrefixEvent[] {
  const events: PrefixEvent[] = [];
  for (let at = 0; at < list.length;) {
    const kind = nameOf("prefixEvent", list[at]!);
    const number = list[at + NUMBER]! + list[at + NUMBER + 1]! * 2 ** 32;
    const tokenCount = list[at + TOKEN_COUNT]!;
    const block = hexOf(list, at + NAME);
    if (kind === "cleared") events.push({ kind, number });
    else if (kind === "removed") events.push({ kind, number, block });
    else {
      const parent = hexOf(list, at + PARENT);
      const tokens = list.slice(at + TOKENS, at + TOKENS + tokenCount);
      events.push({ kind, number, block, parent: /^0+$/.test(parent) ? undefined : parent, tokens });
    }
    at += TOKENS + tokenCount;
  }
  return events;
}

/** Four words as the bytes they are, in hexadecimal digits. */
function hexOf(list: Uint32Array, at: number): string {
  const bytes = new Uint8Array(list.buffer, list.byteOffset + at * 4, 16);
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
