/**
 * What a decoder gives: logits as f32 `[1, tokens, vocab_size]`.
 *
 * @module
 */

import type { Model } from "../model/model.ts";
import type { Line } from "./plan.ts";
import { cannotCut } from "../model/refusal.ts";
import { Chain } from "../forms/rows.ts";
import type { Values } from "../model/values.ts";

/** Finds the logits; gives the line with what makes rows of them, and their name. */
export function findLogits(model: Model, line: Line, values: Values): { readonly line: Line; readonly logits: string } {
  const output = outputOf(model, line);
  const { dims = [1, "tokens", ""] } = model.outputs.get(output)!;
  if (dims.length === 3) return { line, logits: output };
  // All tokens in one list, as PagedAttention has them.
  const width = dims.at(-1) ?? 0;
  if (dims.length !== 2 || typeof width !== "number") {
    throw cannotCut(
      `logits must have axes of batch, tokens and vocabulary, or the last two and the last a number: ${output} is ` +
        `[${dims.join(", ")}]`,
    );
  }
  const chain = new Chain(values);
  const logits = chain.reshaped(output, "batch", [1, -1, width]);
  return { line: [...line, ...chain.nodes], logits };
}

/** The output that is no key and no value. */
function outputOf(model: Model, line: Line): string {
  const given = new Set(line.flatMap((each) => "layer" in each ? [] : each.outputs));
  const outputs = [...model.outputs.keys()].filter((name) => given.has(name));
  const logits = outputs.length === 1 ? outputs[0] : outputs.find((name) => name === "logits");
  if (logits !== undefined) return logits;
  throw cannotCut(
    `it must give logits: of its outputs, ${outputs.length === 0 ? "none" : outputs.join(", ")} could be them`,
  );
}
