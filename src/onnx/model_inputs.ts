/**
 * What the pieces of a model are fed beside their own values: ids, positions, and what graphs ask for with them.
 *
 * All rows of a run, of however many sequences, are one batch of one: `[1, row]`.
 *
 * @module
 */

import type { ModelInput } from "./cut/cut_model.ts";
import type { Ort, OrtTensor } from "./ort.ts";

/** The tokens of a run, and where in its sequence each of them stands, `[row]`. */
export interface InputRows {
  readonly tokens: Uint32Array;
  readonly positions: Uint32Array;
}

/** The tensor of an input. */
export function inputTensor(ort: Ort, { role, type }: ModelInput, { tokens, positions }: InputRows): OrtTensor {
  switch (role) {
    case "inputIds":
      return tensorOf(ort, type, tokens, [1, tokens.length]);
    case "positionIds":
      return tensorOf(ort, type, positions, [1, tokens.length]);
    case "totalSequenceLength":
      return tensorOf(ort, type, Uint32Array.of(positions.reduce((most, at) => Math.max(most, at), 0) + 1), []);
  }
}

/** Numbers as a graph wants them. */
function tensorOf(ort: Ort, type: ModelInput["type"], numbers: Uint32Array, dims: readonly number[]): OrtTensor {
  return type === "int64"
    ? new ort.Tensor("int64", BigInt64Array.from(numbers, BigInt), dims)
    : new ort.Tensor("int32", Int32Array.from(numbers), dims);
}
