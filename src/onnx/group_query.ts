/**
 * `com.microsoft.GroupQueryAttention`, as the builders of onnxruntime-genai and transformers.js write it.
 *
 *     query, key, value, past_key, past_value, seqlens_k, total_sequence_length, cos_cache, sin_cache, position_ids,
 *     attention_bias, head_sink, k_scale, v_scale, q_norm_weight, k_norm_weight
 *
 * @module
 */

import { checkHeadDim, checkHeads, inputOf, intOf, type Surroundings, type TakenApart } from "./form.ts";
import type { GraphNode } from "./node.ts";
import { cannotCut, nodeText } from "./refusal.ts";
import { rotaryOf, rotated } from "./rotary.ts";
import { Chain } from "./rows.ts";

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
} as const;

/** Takes a GroupQueryAttention apart. */
export function takeGroupQuery(node: GraphNode, around: Surroundings): TakenApart {
  const { values } = around;
  const qHeadCount = intOf(node, "num_heads");
  const kvHeadCount = intOf(node, "kv_num_heads");
  checkHeads(node, qHeadCount, kvHeadCount);
  const headDim = checkHeadDim(node, headDimOf(node, around, kvHeadCount));
  const query = inputOf(node, INPUT.query);
  const key = inputOf(node, INPUT.key);
  const value = inputOf(node, INPUT.value);
  if (query === undefined || key === undefined || value === undefined) {
    throw cannotCut(`${nodeText(node)} must have query, key and value: one is left out`);
  }
  if (inputOf(node, INPUT.bias) !== undefined) throw cannotCut(`${nodeText(node)} has an attention_bias`);

  const before = new Chain(values);
  const after = new Chain(values);
  const rotary = rotaryOf(node, around, { ...INPUT, headDim });
  const layer = {
    node: nodeText(node),
    qHeadCount,
    kvHeadCount,
    headDim,
    q: before.toFloat32(rotated(before, query, qHeadCount, rotary)),
    k: before.toFloat32(rotated(before, key, kvHeadCount, rotary)),
    v: before.toFloat32(value),
    output: after.fromFloat32(node.outputs[0]!),
    ...numbersOf(node),
  };
  return { before: before.nodes, layer, after: after.nodes };
}

/** The scale, window and softcap that the attributes say; each has a value that means none. */
function numbersOf({ attributes }: GraphNode): { softmaxScale?: number; windowTokens?: number; softcap?: number } {
  const scale = attributes.get("scale")?.float ?? 0;
  const window = attributes.get("local_window_size")?.int ?? -1;
  const softcap = attributes.get("softcap")?.float ?? 0;
  return {
    ...(scale === 0 ? {} : { softmaxScale: scale }),
    ...(window <= 0 ? {} : { windowTokens: window }),
    ...(softcap === 0 ? {} : { softcap }),
  };
}

function headDimOf(node: GraphNode, { values }: Surroundings, kvHeadCount: number): number | undefined {
  const past = values.info(inputOf(node, INPUT.pastKey) ?? "")?.dims?.[3] ??
    values.info(node.outputs[1] ?? "")?.dims?.[3];
  if (typeof past === "number") return past;
  const width = values.width(inputOf(node, INPUT.key) ?? "");
  return width === undefined ? undefined : width / kvHeadCount;
}
