/**
 * `Attention` of ONNX itself, from version 23 of its operators on.
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
  numbersOf,
  type Part,
  type Surroundings,
  type TakenApart,
  withMasks,
} from "./form.ts";
import type { GraphNode } from "../model/node.ts";
import { joinedTo } from "./past.ts";
import { cannotCut, nodeText } from "../model/refusal.ts";
import type { Layout } from "./rows.ts";
import { takenApart } from "./taken_apart.ts";

/** Inputs by their number. */
const INPUT = { query: 0, key: 1, value: 2, mask: 3, pastKey: 4, keyLengths: 6 } as const;

/** Takes an Attention apart. */
export function takeStandard(node: GraphNode, around: Surroundings): TakenApart {
  const { values, model } = around;
  checkAttribute(node, "qk_matmul_output_mode", 0, "kvern gives no scores; export without them");
  if (inputOf(node, INPUT.keyLengths) !== undefined) {
    throw cannotCut(`${nodeText(node)} must have its past as past_key: it has nonpad_kv_seqlen, a cache from outside`);
  }
  const [query, key, value] = [INPUT.query, INPUT.key, INPUT.value].map((index) => inputOf(node, index));
  if (query === undefined || key === undefined || value === undefined) {
    throw cannotCut(`${nodeText(node)} must have query, key and value: one is left out`);
  }
  const isApart = !node.attributes.has("q_num_heads");
  const [qHeadCount, headCount] = isApart
    ? [query, key].map((name) => headAxis(node, values.info(name)?.dims))
    : [intOf(node, "q_num_heads"), intOf(node, "kv_num_heads")];
  const layout: Layout = isApart ? "head_major" : "rows";
  const hasPast = inputOf(node, INPUT.pastKey) !== undefined;
  const [k, v] = [key, value].map((name) =>
    hasPast ? undefined : joinedTo(name, isApart ? "htd" : "thd", node, model, values)
  );
  const part = (name: string): Part => ({ name, layout });
  const kvHeadCount = k?.headCount ?? headCount!;
  checkHeads(node, qHeadCount!, kvHeadCount);
  if ((k === undefined) !== (v === undefined) || (k?.factor ?? 1) !== 1 || (v?.factor ?? 1) !== 1) {
    throw cannotCut(`keys and values of ${nodeText(node)} must both be joined to a past, unscaled: they are not`);
  }
  const ofPast = values.info(inputOf(node, INPUT.pastKey) ?? "")?.dims?.[3];
  const width = values.width(key);
  const headDim = checkHeadDim(
    node,
    k?.headDim ?? (typeof ofPast === "number" ? ofPast : width && (isApart ? width : width / kvHeadCount)),
  );
  const isCausal = node.attributes.get("is_causal")?.int === 1;
  return takenApart({
    node,
    qHeadCount: qHeadCount!,
    kvHeadCount,
    headDim,
    q: part(query),
    k: k?.part ?? part(key),
    v: v?.part ?? part(value),
    output: part(node.outputs[0]!),
    numbers: withMasks(node, numbersOf(node), { masks: masksOf(node, INPUT.mask, "zero"), isCausal, around }),
  }, around);
}

/** The heads of a value `[1, heads, tokens, head_dim]`. */
function headAxis(node: GraphNode, dims: readonly (number | string)[] | undefined): number {
  const heads = dims?.length === 4 ? dims[1] : undefined;
  if (typeof heads === "number") return heads;
  throw cannotCut(`${nodeText(node)} must say q_num_heads and kv_num_heads, or the shapes of its inputs their heads`);
}
