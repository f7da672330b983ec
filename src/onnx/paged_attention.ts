/**
 * `com.microsoft.PagedAttention`: all tokens of a batch in one list, as in {@linkcode PagedCache}. onnxruntime has no
 * kernel of it for CPUs; cut, it needs none.
 *
 * @module
 */

import {
  checkAttribute,
  checkHeadDim,
  checkHeads,
  inputOf,
  intOf,
  normsOf,
  numbersOf,
  sinksOf,
  type Surroundings,
  type TakenApart,
} from "./form.ts";
import type { GraphNode } from "./node.ts";
import { cannotCut, nodeText } from "./refusal.ts";
import { rotaryOf } from "./rotary.ts";
import { Chain, type Layout } from "./rows.ts";
import { takenApart, unpacked } from "./taken_apart.ts";

/** Inputs by their number; those that only the node's own cache needs are left out. */
const INPUT = { query: 0, key: 1, value: 2, keyCache: 3, cos: 8, sin: 9, sink: 11, qNorm: 12, kNorm: 13 } as const;

/** Takes a PagedAttention apart. */
export function takePaged(node: GraphNode, around: Surroundings): TakenApart {
  const { values } = around;
  checkAttribute(node, "is_causal", 1, "a decoder sees no later token");
  checkAttribute(node, "rotary_offset", 0, "only the first part of a head can turn");
  if (node.attributes.get("kv_cache_layout")?.text === "LATENT") {
    throw cannotCut(
      `kv_cache_layout of ${nodeText(node)} must be SEPARATE: it is LATENT; export without absorbed heads`,
    );
  }
  const qHeadCount = intOf(node, "num_heads");
  const kvHeadCount = intOf(node, "kv_num_heads");
  checkHeads(node, qHeadCount, kvHeadCount);
  const [query, key, value] = [INPUT.query, INPUT.key, INPUT.value].map((index) => inputOf(node, index));
  if (query === undefined || (key === undefined) !== (value === undefined)) {
    throw cannotCut(`${nodeText(node)} must have query, and key and value or neither: one is left out`);
  }
  const headDim = checkHeadDim(node, headDimOf(node, around, qHeadCount, kvHeadCount));

  const before = new Chain(values);
  const layout: Layout = "flat";
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
    rotary: rotaryOf(node, around, { ...INPUT, positions: -1, headDim }),
    numbers: { ...numbersOf(node), ...sinksOf(node, inputOf(node, INPUT.sink), qHeadCount, values) },
    output: { name: node.outputs[0]!, layout },
  }, around);
}

/** The head dimension: of codes of 4 bits the cache says half of it. */
function headDimOf(
  node: GraphNode,
  { values }: Surroundings,
  qHeadCount: number,
  kvHeadCount: number,
): number | undefined {
  const isCodes = /int4|float4/.test(node.attributes.get("k_cache_dtype")?.text ?? "");
  const cached = values.info(inputOf(node, INPUT.keyCache) ?? "")?.dims?.[3];
  if (typeof cached === "number" && !isCodes) return cached;
  const key = inputOf(node, INPUT.key);
  const width = values.width(key ?? inputOf(node, INPUT.query)!);
  return width === undefined ? undefined : width / (key === undefined ? qHeadCount + 2 * kvHeadCount : kvHeadCount);
}
