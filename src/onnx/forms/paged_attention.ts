/**
 * `com.microsoft.PagedAttention`: all tokens of a batch in one list, as in {@linkcode PagedCache}. onnxruntime has no
 * kernel of it for CPUs; cut, it needs none.
 *
 * @module
 */

import { checkAttribute, inputOf, normsOf, numbersOf, sinksOf, type Surroundings, type TakenApart } from "./form.ts";
import type { GraphNode } from "../model/node.ts";
import { cannotCut, nodeText } from "../model/refusal.ts";
import { rotaryOf } from "./rotary.ts";
import { Chain } from "./rows.ts";
import { headsOf, partsOf, takenApart } from "./taken_apart.ts";
import type { Values } from "../model/values.ts";

/** Inputs behind query, key and value; those that only the node's own cache needs are left out. */
const INPUT = { keyCache: 3, cos: 8, sin: 9, sink: 11, qNorm: 12, kNorm: 13 } as const;

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
  const heads = headsOf(node, values, cacheDim(node, values));
  const before = new Chain(values);
  return takenApart({
    node,
    ...heads,
    before,
    ...partsOf(node, before, "flat", heads),
    norms: normsOf(node, INPUT.qNorm, INPUT.kNorm),
    rotary: rotaryOf(node, around, { ...INPUT, positions: -1, headDim: heads.headDim }),
    numbers: { ...numbersOf(node), ...sinksOf(node, inputOf(node, INPUT.sink), heads.qHeadCount, values) },
    output: { name: node.outputs[0]!, layout: "flat" },
  }, around);
}

/** The last dimension of the cache; of codes of 4 bits, two of which share a byte, it is not the head's. */
function cacheDim(node: GraphNode, values: Values): number | string | undefined {
  if (/int4|float4/.test(node.attributes.get("k_cache_dtype")?.text ?? "")) return undefined;
  return values.info(inputOf(node, INPUT.keyCache) ?? "")?.dims?.[3];
}
