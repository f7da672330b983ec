/**
 * `com.microsoft.GroupQueryAttention`, as the builders of onnxruntime-genai and transformers.js write it.
 *
 * @module
 */

import {
  checkAttribute,
  checkHeadDim,
  checkHeads,
  inputOf,
  intOf,
  masksOf,
  normsOf,
  numbersOf,
  sinksOf,
  type Surroundings,
  type TakenApart,
  withMasks,
} from "./form.ts";
import type { GraphNode } from "./node.ts";
import { cannotCut, nodeText } from "./refusal.ts";
import { rotaryOf } from "./rotary.ts";
import { Chain, type Layout } from "./rows.ts";
import { takenApart, unpacked } from "./taken_apart.ts";

/** Inputs by their number; those that only the node's own cache needs are left out. */
const INPUT = {
  query: 0,
  key: 1,
  value: 2,
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
  const qHeadCount = intOf(node, "num_heads");
  const kvHeadCount = intOf(node, "kv_num_heads");
  checkHeads(node, qHeadCount, kvHeadCount);
  const [query, key, value] = [INPUT.query, INPUT.key, INPUT.value].map((index) => inputOf(node, index));
  if (query === undefined || (key === undefined) !== (value === undefined)) {
    throw cannotCut(`${nodeText(node)} must have query, and key and value or neither: one is left out`);
  }
  const headDim = checkHeadDim(node, headDimOf(node, around, qHeadCount, kvHeadCount));

  const before = new Chain(values);
  const layout: Layout = "rows";
  const parts = key === undefined
    ? unpacked(before, query, layout, { qHeadCount, kvHeadCount, headDim })
    : { q: { name: query, layout }, k: { name: key, layout }, v: { name: value!, layout } };
  return takenApart({
    node,
    qHeadCount,
    kvHeadCount,
    headDim,
    before,
    ...parts,
    norms: normsOf(node, INPUT.qNorm, INPUT.kNorm),
    rotary: rotaryOf(node, around, { ...INPUT, headDim }),
    numbers: {
      ...withMasks(node, numbersOf(node), { masks: masksOf(node, INPUT.bias, "zero"), isCausal: true, around }),
      ...sinksOf(node, inputOf(node, INPUT.sink), qHeadCount, values),
    },
    output: { name: node.outputs[0]!, layout },
  }, around);
}

/** The head dimension that the past says, or the width of what the heads lie in. */
function headDimOf(
  node: GraphNode,
  { values }: Surroundings,
  qHeadCount: number,
  kvHeadCount: number,
): number | undefined {
  // A past of 4-bit codes has two elements a byte.
  const isCodes = (node.attributes.get("kv_cache_bit_width")?.int ?? 0) === 4;
  const past = values.info(inputOf(node, INPUT.pastKey) ?? "")?.dims?.[3] ??
    values.info(node.outputs[1] ?? "")?.dims?.[3];
  if (typeof past === "number" && !isCodes) return past;
  const key = inputOf(node, INPUT.key);
  const width = values.width(key ?? inputOf(node, INPUT.query)!);
  return width === undefined ? undefined : width / (key === undefined ? qHeadCount + 2 * kvHeadCount : kvHeadCount);
}
