/**
 * What a sequence is made for: the tokens it will hold, and whose they are.
 *
 * @module
 */

import { checkWords } from "./commit.ts";
import { type OptionNames, optionNames } from "./option_names.ts";
import { arrayKind, checkAttached, kindOf, lengthOf } from "./typed_array.ts";

/** Whose rows they are, and what they depend on. */
export interface TenantOptions {
  /**
   * Names the tenant: sequences of equal salts share what they have in common, and others learn nothing of it. Without one,
   * sequences of this cache that have none share among themselves. A string is the tenant that its UTF-8 bytes are.
   */
  readonly salt?: string | Uint8Array;
  /**
   * Names what rows depend on beside tokens and the cache's own shape and formats: the weights and their revision, an
   * adapter, how positions are rotated, the engine. Rows of another one are not found.
   */
  readonly fingerprint?: string | Uint8Array;
}

/** What a sequence of a {@linkcode PagedCache} is made for. */
export interface PromptOptions extends TenantOptions {
  /**
   * Ids of the tokens it will hold: it starts with the rows of the longest prefix of them that is there, and at least one
   * token is left to compute. Its `seqLen` tells where it starts.
   */
  readonly tokens?: Uint32Array;
}

/** The names of {@linkcode TenantOptions}. */
export const TENANT_NAMES: OptionNames = optionNames<TenantOptions>({ salt: true, fingerprint: true });

/** The names of {@linkcode PromptOptions}. */
export const PROMPT_NAMES: OptionNames = new Set([
  ...optionNames<Omit<PromptOptions, keyof TenantOptions>>({ tokens: true }),
  ...TENANT_NAMES,
]);

/** What crosses of a prompt. */
export interface Prompt {
  readonly tokens: Uint32Array;
  readonly hasSalt: number;
  readonly salt: Uint8Array;
  readonly fingerprint: Uint8Array;
}

/** A prompt as the library takes it: each buffer with the length that it has now, whatever it says of itself. */
export function promptWords(
  { tokens, hasSalt, salt, fingerprint }: Prompt,
): [Uint32Array, number, number, Uint8Array, number, Uint8Array, number] {
  return [tokens, lengthOf(tokens), hasSalt, salt, lengthOf(salt), fingerprint, lengthOf(fingerprint)];
}

/** The checked prompt. */
export function promptOf({ tokens, salt, fingerprint }: PromptOptions): Prompt {
  if (tokens !== undefined) checkWords("tokens", tokens);
  return {
    tokens: tokens ?? NO_TOKENS,
    hasSalt: salt === undefined ? 0 : 1,
    salt: textOf("salt", salt),
    fingerprint: textOf("fingerprint", fingerprint),
  };
}

const NO_TOKENS = new Uint32Array(0);
const NO_BYTES = new Uint8Array(0);
const encoder = new TextEncoder();

/** The bytes of a name: different strings have different ones. */
function textOf(name: string, text: string | Uint8Array | undefined): Uint8Array {
  if (text === undefined) return NO_BYTES;
  if (typeof text === "string") {
    if (!/\p{Surrogate}/u.test(text)) return encoder.encode(text);
    throw new TypeError(`${name} must be well-formed: it has half of a surrogate pair, which has no bytes of its own`);
  }
  if (arrayKind(text) !== "Uint8Array") {
    throw new TypeError(`${name} must be a string or a Uint8Array: ${kindOf(text)}`);
  }
  // Without its memory it would name the tenant of the empty salt.
  if (lengthOf(text) === 0) checkAttached(name, text);
  return text;
}
