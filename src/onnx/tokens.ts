/**
 * Ids of tokens, as tokenizers give them and as a cache takes them.
 *
 * @module
 */

import { KvError } from "../error.ts";
import { countText } from "../ffi/status.ts";
import { checkCount } from "../options/counts.ts";
import type { Sequence } from "../sequence.ts";

/** A copy of ids; `name` is that of the argument. */
export function checkTokens(name: string, tokens: ArrayLike<number>, vocabSize?: number): Uint32Array {
  if (typeof tokens !== "object" || tokens === null) throw new TypeError(`${name} must be an array: ${typeof tokens}`);
  const { length } = tokens;
  checkCount(`the length of ${name}`, length);
  const ids = new Uint32Array(length);
  for (let i = 0; i < length; i++) {
    const id = tokens[i];
    if (typeof id === "bigint") {
      throw new TypeError(`${name}[${i}] must be a number, not a bigint: Number(id) makes one`);
    }
    checkCount(`${name}[${i}]`, id);
    if (vocabSize !== undefined && id >= vocabSize) {
      throw new KvError(
        "invalid_config",
        `Cannot use ${name} as ids must be below the ${vocabSize} of the model's vocabulary: ${name}[${i}] is ${id}`,
      );
    }
    ids[i] = id;
  }
  return ids;
}

/** The ids for each sequence, checked and copied. */
export function tokenLists(
  sequences: readonly Sequence[],
  tokens: readonly ArrayLike<number>[],
  vocabSize: number,
): Uint32Array[] {
  if (!Array.isArray(sequences)) throw new TypeError(`sequences must be an array: ${typeof sequences}`);
  if (!Array.isArray(tokens)) throw new TypeError(`tokens must be an array of arrays: ${typeof tokens}`);
  if (sequences.length === 0 || sequences.length !== tokens.length) {
    throw new KvError(
      "invalid_size",
      `Cannot step as there must be tokens for each sequence: for ${
        countText(sequences.length, "sequence")
      } there are ` +
        `${tokens.length} arrays of them`,
    );
  }
  return tokens.map((ids, i) => {
    const list = checkTokens(`tokens[${i}]`, ids, vocabSize);
    if (list.length > 0) return list;
    throw new KvError("invalid_size", `Cannot step as each sequence needs a token: tokens[${i}] is empty`);
  });
}
