/**
 * `com.microsoft.GroupQueryAttention`, as the builders of onnxruntime-genai and transformers.js write it.
 *
 * @module
 */

import {
  checkAttribute,
  inputOf,
  masksOf,
  normsOf,
  numbersOf,
  sinksOf,
  type Surroundings,
  type TakenApart,
  withMasks,
} from "./form.ts";
import type { GraphNode } from "../model/node.ts";
import { rotaryOf } from "./rotary.ts";
import { Chain } from "./rows.ts";
import { headsOf, partsOf, takenApart } from "./taken_apart.ts";
import type { Values } from "../model/values.ts";

/** Inputs behind query, key and value; those that only the node's own cache needs are left out. */
const INPUT = {
  pastKey: 3,
  cos: 7,
  sin: 8,
  positions: 9,
  bias: 10,
  sink: 11,
  qNorm: 14,
  kNorm: 15,
} as const;

/** Takes a GroupQueryAttention apart. */
export function takeGroupQuery(node: GraphNode, around: Surroundings): TakenApart {
  const { values } = around;
  checkAttribute(node, "causal", 1, "a decoder sees no later token");
  checkAttribute(node, "qk_output", 0, "kvern gives no scores; export without them");
  const heads = headsOf(node, values, pastDim(node, values));
  const before = new Chain(values);
  return takenApart({
    node,
    ...heads,
    before,
    ...partsOf(node, before, "rows", heads),
    norms: normsOf(node, INPUT.qNorm, INPUT.kNorm),
    rotary: rotaryOf(node, around, { ...INPUT, headDim: heads.headDim }),
    numbers: {
      ...withMasks(node, numbersOf(node), { masks: masksOf(node, INPUT.bias, "zero"), isCausal: true, around }),
      ...sinksOf(node, inputOf(node, INPUT.sink), heads.qHeadCount, values),
    },
    output: { name: node.outputs[0]!, layout: "rows" },
  }, around);
}

/** The last dimension of the past; of codes of 4 bits, two of which share a byte, it is not the head's. */
function pastDim(node: GraphNode, values: Values): number | string | undefined {
  if (node.attributes.get("kv_cache_bit_width")?.int === 4) return undefined;
  return values.info(inputOf(node, INPUT.pastKey) ?? "")?.dims?.[3] ?? values.info(node.outputs[1] ?? "")?.dims?.[3];
}
