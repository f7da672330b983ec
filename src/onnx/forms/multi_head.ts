/**
 * `com.microsoft.MultiHeadAttention`: as many key heads as query heads, unless the graph repeats fewer of them before it.
 *
 * @module
 */

import {
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
import { Chain } from "./rows.ts";
import { takenApart } from "./taken_apart.ts";

/** Inputs by their number; those that only the node's own cache needs are left out. */
const INPUT = { query: 0, key: 1, value: 2, bias: 3, padding: 4, mask: 5, pastKey: 6 } as const;

/** Takes a MultiHeadAttention apart. */
export function takeMultiHead(node: GraphNode, around: Surroundings): TakenApart {
  const { values } = around;
  const qHeadCount = intOf(node, "num_heads");
  checkHeads(node, qHeadCount, qHeadCount);
  const masks = [...masksOf(node, INPUT.padding, "true"), ...masksOf(node, INPUT.mask, "zero")];
  const isCausal = node.attributes.get("unidirectional")?.int === 1;
  const numbers = withMasks(node, numbersOf(node), { masks, isCausal, around });
  const before = new Chain(values);
  const heads = headsOf(node, before, qHeadCount, around);
  return takenApart({
    node,
    qHeadCount,
    ...heads,
    before,
    numbers,
    output: { name: node.outputs[0]!, layout: "rows" },
  }, around);
}

/** Queries, keys and values, and how many heads of which size. */
interface Heads {
  readonly kvHeadCount: number;
  readonly headDim: number;
  readonly q: Part;
  readonly k: Part;
  readonly v: Part;
}

function headsOf(node: GraphNode, chain: Chain, qHeadCount: number, around: Surroundings): Heads {
  const { values, model } = around;
  const [query, key, value] = [INPUT.query, INPUT.key, INPUT.value].map((index) => inputOf(node, index));
  if (query === undefined) throw cannotCut(`${nodeText(node)} must have a query: it is left out`);
  const ofPast = values.info(inputOf(node, INPUT.pastKey) ?? "")?.dims?.[3];
  const width = values.width(key === undefined || value === undefined ? "" : query);
  const given = typeof ofPast === "number" ? ofPast : width === undefined ? undefined : width / qHeadCount;
  if (key === undefined || value === undefined) {
    throw cannotCut(
      `${nodeText(node)} must have query, key and value: one is left out, as in a packed one; ` +
        "export them apart, or with GroupQueryAttention",
    );
  }
  if ([key, value].some((name) => values.info(name)?.dims?.length === 4)) {
    throw cannotCut(`${nodeText(node)} must attend to its own tokens: its keys have 4 axes, as those of an encoder`);
  }
  const joined = [key, value].map((name) =>
    inputOf(node, INPUT.pastKey) === undefined ? joinedTo(name, "thd", node, model, values) : undefined
  );
  const [k, v] = joined;
  const rows = (name: string): Part => ({ name, layout: "rows" });
  if (k === undefined || v === undefined) {
    const headDim = checkHeadDim(node, given);
    const [q, ...kv] = withBias(node, chain, [query, key, value], qHeadCount * headDim);
    return { kvHeadCount: qHeadCount, headDim, q: rows(q!), k: rows(kv[0]!), v: rows(kv[1]!) };
  }
  if (inputOf(node, INPUT.bias) !== undefined) {
    throw cannotCut(`${nodeText(node)} must have no bias where its keys were joined to the past: it has one`);
  }
  const isSame = k.headCount === v.headCount && k.headDim === v.headDim && k.qHeadCount === qHeadCount;
  if (!isSame || k.factor !== 1 || v.factor !== 1) {
    throw cannotCut(`keys and values of ${nodeText(node)} must have the same heads, unscaled: they do not`);
  }
  const headDim = checkHeadDim(node, k.headDim);
  return { kvHeadCount: k.headCount, headDim, q: rows(query), k: k.part, v: v.part };
}

/** Rows with the bias of the projections, where the node adds it. */
function withBias(node: GraphNode, chain: Chain, names: readonly string[], width: number): readonly string[] {
  const bias = inputOf(node, INPUT.bias);
  if (bias === undefined) return names;
  const parts = chain.parts(bias, ["q", "k", "v"], 0, [width, width, width]);
  return names.map((name, i) => chain.add(`${name}:biased`, { op: "Add", inputs: [name, parts[i]!] }));
}
