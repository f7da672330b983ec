/**
 * Makes the layer of what a form has found, and the nodes around it.
 *
 *     query, key, value -> parts of a packed one -> norms -> rotary positions -> f32 rows -> layer -> the node's output
 *
 * @module
 */

import type { AttentionLayer } from "../cut/cut_model.ts";
import {
  checkHeadDim,
  checkHeads,
  type HeadNorms,
  inputOf,
  intOf,
  type Numbers,
  type Part,
  type Surroundings,
  type TakenApart,
} from "./form.ts";
import type { GraphNode } from "../model/node.ts";
import { cannotCut, nodeText } from "../model/refusal.ts";
import { type Rotary, rotated } from "./rotary.ts";
import { Chain } from "./rows.ts";
import type { Values } from "../model/values.ts";

/** What a form has found in its node. */
export interface Found {
  readonly node: GraphNode;
  readonly qHeadCount: number;
  readonly kvHeadCount: number;
  readonly headDim: number;
  readonly q: Part;
  readonly k: Part;
  readonly v: Part;
  readonly output: Part;
  /** Nodes that are there already, before those that are added. */
  readonly before?: Chain;
  readonly norms?: HeadNorms | undefined;
  readonly rotary?: Rotary | undefined;
  readonly numbers: Numbers;
}

/** Makes the layer of what was found, and the nodes around it. */
export function takenApart(found: Found, { values }: Surroundings): TakenApart {
  const { node, qHeadCount, kvHeadCount, headDim, norms, rotary, numbers } = found;
  const before = found.before ?? new Chain(values);
  const after = new Chain(values);
  const rows = (part: Part, headCount: number, norm?: string) => {
    const heads = { headCount, headDim };
    let name = before.toRows(part.name, part.layout, heads);
    if (norm !== undefined) {
      const apart = before.reshaped(name, "heads", [1, -1, headCount, headDim]);
      const normed = before.add(`${name}:normed`, {
        op: "SimplifiedLayerNormalization",
        inputs: [apart, norm],
        ints: { axis: -1, stash_type: 1 },
        floats: { epsilon: norms!.epsilon },
      });
      name = before.reshaped(normed, "rows", [1, -1, headCount * headDim]);
    }
    return name;
  };
  const layer: AttentionLayer = {
    node: nodeText(node),
    qHeadCount,
    kvHeadCount,
    headDim,
    ...numbers,
    q: before.toFloat32(rotated(before, rows(found.q, qHeadCount, norms?.q), qHeadCount, rotary)),
    k: before.toFloat32(rotated(before, rows(found.k, kvHeadCount, norms?.k), kvHeadCount, rotary)),
    v: before.toFloat32(rows(found.v, kvHeadCount)),
    output: after.fromRows(found.output.name, found.output.layout, { headCount: qHeadCount, headDim }),
  };
  return { before: before.nodes, layer, after: after.nodes };
}

/** Numbers of heads, and elements of each. */
interface HeadCounts {
  readonly qHeadCount: number;
  readonly kvHeadCount: number;
  readonly headDim: number;
}

/**
 * Queries, keys and values of a node that takes them as its first three inputs, or all in the first one,
 * `[..., (q heads + 2 * kv heads) * head_dim]`.
 */
export function partsOf(
  node: GraphNode,
  chain: Chain,
  layout: "rows" | "flat",
  { qHeadCount, kvHeadCount, headDim }: HeadCounts,
): { readonly q: Part; readonly k: Part; readonly v: Part } {
  const [query, key, value] = [0, 1, 2].map((index) => inputOf(node, index));
  if (query === undefined || (key === undefined) !== (value === undefined)) {
    throw cannotCut(`${nodeText(node)} must have query, and key and value or neither: one is left out`);
  }
  const sizes = [qHeadCount, kvHeadCount, kvHeadCount].map((count) => count * headDim);
  const names = key === undefined ? chain.parts(query, ["q", "k", "v"], -1, sizes) : [query, key, value!];
  const [q, k, v] = names.map((name) => ({ name, layout }));
  return { q: q!, k: k!, v: v! };
}

/** The heads that such a node says it has; `past` is the last dimension of what it keeps, where that is a head's. */
export function headsOf(node: GraphNode, values: Values, past: number | string | undefined): HeadCounts {
  const qHeadCount = intOf(node, "num_heads");
  const kvHeadCount = intOf(node, "kv_num_heads");
  checkHeads(node, qHeadCount, kvHeadCount);
  return { qHeadCount, kvHeadCount, headDim: headDimOf(node, values, { qHeadCount, kvHeadCount, past }) };
}

/** The head dimension that the past of such a node says, or the width of what its heads lie in. */
function headDimOf(
  node: GraphNode,
  values: Values,
  { qHeadCount, kvHeadCount, past }: Omit<HeadCounts, "headDim"> & { readonly past: number | string | undefined },
): number {
  if (typeof past === "number") return checkHeadDim(node, past);
  const key = inputOf(node, 1);
  const width = values.width(key ?? inputOf(node, 0) ?? "");
  const headCount = key === undefined ? qHeadCount + 2 * kvHeadCount : kvHeadCount;
  return checkHeadDim(node, width === undefined ? undefined : width / headCount);
}
