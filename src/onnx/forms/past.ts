/**
 * Keys and values where the graph itself joins them to the past, and repeats each for the query heads that share it.
 *
 *     past [1, kv_head, past, d] -+
 *                                 +- Concat [1, kv_head, total, d] -> anything that moves elements -> what attention takes
 *     new  [1, kv_head, n, d]    -+
 *
 * How heads lie in the end is not read from the nodes between: the joined value is numbered, and the numbers are looked for.
 *
 * @module
 */

import { fill, type Known } from "../evaluate/array.ts";
import { Evaluation } from "../evaluate/evaluate.ts";
import type { Part } from "./form.ts";
import type { Model } from "../model/model.ts";
import type { GraphNode } from "../model/node.ts";
import { cannotCut, nodeText } from "../model/refusal.ts";
import { isPast } from "../evaluate/scenario.ts";
import type { Values } from "../model/values.ts";

/** Keys or values of a layer. */
export interface Joined {
  /** The new ones. */
  readonly part: Part;
  readonly headCount: number;
  readonly headDim: number;
  /** Heads there are after each was repeated. */
  readonly qHeadCount: number;
  /** What every element was multiplied by on the way. */
  readonly factor: number;
}

/** Operators that leave elements what they are, or multiply them by a number. */
const MOVING = /^(Reshape|Transpose|Expand|Unsqueeze|Squeeze|Identity|Cast|Tile|Mul|Div|Slice|Gather)$/;

/** Axes of a value at the end of the way: `t` tokens, `h` heads, `d` elements. */
export type Axes = "htd" | "hdt" | "thd";

/** Lengths for which a way is looked at; tokens and heads differ from each other in most models. */
const LENGTHS = { past: 2, tokens: 3 };

/**
 * The keys or values that come to `name`, where they are joined to a past on the way; undefined where they are not.
 * `axes` is how attention takes them, after axes of 1.
 */
export function joinedTo(name: string, axes: Axes, user: GraphNode, model: Model, values: Values): Joined | undefined {
  const join = joinOn(name, model, values);
  if (join === undefined) return undefined;
  const { node, past, added } = join;
  const [, headCount, , headDim] = model.inputs.get(past)!.dims as number[];
  const { type } = model.inputs.get(past)!;
  const total = LENGTHS.past + LENGTHS.tokens;
  const numbered: Known = {
    type,
    dims: [1, headCount!, total, headDim!],
    values: fill([1, headCount!, total, headDim!], (i) => i + 1),
  };
  const end = new Evaluation(model, values, LENGTHS, new Map([[node.outputs[0]!, numbered]])).of(name);
  const found = end && wayOf(end, axes, { headCount: headCount!, headDim: headDim!, total });
  if (found === undefined) {
    throw cannotCut(
      `keys and values of ${nodeText(user)} must be those of ${
        node.outputs[0]
      }, each head repeated for its query heads: ` +
        `${name} is not; export with GroupQueryAttention`,
    );
  }
  return { part: { name: added, layout: "head_major" }, headCount: headCount!, headDim: headDim!, ...found };
}

/** The node that joins a past to new rows, on the way to a value. */
function joinOn(
  name: string,
  model: Model,
  values: Values,
): { readonly node: GraphNode; readonly past: string; readonly added: string } | undefined {
  for (let at = name;;) {
    const node = values.producer(at);
    if (node === undefined || node.domain !== "") return undefined;
    if (node.op === "Concat") {
      const [past, added] = node.inputs;
      const info = model.inputs.get(past ?? "");
      const axis = node.attributes.get("axis")?.int;
      const isJoin = node.inputs.length === 2 && info !== undefined && isPast(info) && (axis === 2 || axis === -2);
      return isJoin ? { node, past: past!, added: added! } : undefined;
    }
    if (!MOVING.test(node.op)) return undefined;
    // A number may stand on either side of a product.
    at = node.op === "Mul" && values.number(node.inputs[0]!) !== undefined ? node.inputs[1]! : node.inputs[0]!;
  }
}

/** How the numbered elements lie at the end: the number of heads, and a factor of all of them. */
function wayOf(
  { dims, values }: Known,
  axes: Axes,
  { headCount, headDim, total }: { readonly headCount: number; readonly headDim: number; readonly total: number },
): { readonly qHeadCount: number; readonly factor: number } | undefined {
  const isWhole = values !== undefined && values.length % (total * headDim) === 0;
  if (!isWhole) return undefined;
  const qHeadCount = values.length / (total * headDim);
  if (qHeadCount < headCount || qHeadCount % headCount !== 0) return undefined;
  const lengths = { t: total, h: qHeadCount, d: headDim };
  const wanted = [...axes].map((axis) => lengths[axis as "t" | "h" | "d"]);
  // Rows may have their heads apart or in one axis.
  const shapes = axes === "thd" ? [wanted, [total, qHeadCount * headDim]] : [wanted];
  if (!shapes.some((shape) => sameShape(shape, dims))) return undefined;
  const factor = values[0]!;
  const strides = stridesIn(axes, lengths);
  for (let h = 0; h < qHeadCount; h++) {
    const head = Math.floor(h / (qHeadCount / headCount));
    for (let t = 0; t < total; t++) {
      for (let d = 0; d < headDim; d++) {
        const number = (head * total + t) * headDim + d + 1;
        const value = values[h * strides.h + t * strides.t + d * strides.d]!;
        if (!(Math.abs(value - number * factor) <= number * Math.abs(factor) * 1e-5)) return undefined;
      }
    }
  }
  return Number.isFinite(factor) && factor !== 0 ? { qHeadCount, factor } : undefined;
}

/** The last axes are those of the shape, and all before them 1. */
function sameShape(shape: readonly number[], dims: readonly number[]): boolean {
  const before = dims.length - shape.length;
  return before >= 0 && dims.every((dim, axis) => dim === (axis < before ? 1 : shape[axis - before]));
}

function stridesIn(axes: Axes, { t, h, d }: { readonly t: number; readonly h: number; readonly d: number }) {
  switch (axes) {
    case "htd":
      return { h: t * d, t: d, d: 1 };
    case "hdt":
      return { h: d * t, d: t, t: 1 };
    case "thd":
      return { t: h * d, h: d, d: 1 };
  }
}
