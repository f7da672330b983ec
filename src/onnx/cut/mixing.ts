/**
 * Nodes that let one token of a run know of another: only attention may, for the tokens of all sequences lie side by side.
 *
 * @module
 */

import type { GraphNode } from "../model/node.ts";
import type { PiecePlan } from "./plan.ts";
import { cannotCut, nodeText } from "../model/refusal.ts";
import type { Values } from "../model/values.ts";

/** Operators that mix tokens: attention of other kinds, convolutions, and states that are handed on. */
const MIXING = new RegExp(
  "Attention|^(Conv|ConvTranspose|ConvInteger|FusedConv|NhwcConv|CausalConvWithState|VarlenCausalConvWithState|GatedDeltaNet|" +
    "NGramHashMapping|VarlenNGramHashMapping|LSTM|GRU|RNN|Scan|Loop)$",
);

/** Refuses what mixes tokens without being attention that was taken apart. */
export function checkMixing(plans: readonly PiecePlan[], values: Values): void {
  for (const node of plans.flatMap(({ nodes }) => nodes)) {
    const inner = node.innerOps.find((op) => MIXING.test(op));
    if (inner === undefined && !MIXING.test(node.op) && !isProductOfRows(node, values)) continue;
    throw cannotCut(
      `only attention of a known form may let tokens know of one another: ${nodeText(node)}` +
        `${inner === undefined ? "" : ` with ${inner}`} does, or may; run the model whole, and keep its past with ` +
        "pastKeyValues()",
    );
  }
}

/** A sum over axes by name of values that are all computed may be one over tokens. */
function isProductOfRows({ op, inputs }: GraphNode, values: Values): boolean {
  return op === "Einsum" && inputs.every((input) => values.weight(input) === undefined);
}
