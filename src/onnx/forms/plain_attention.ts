/**
 * Attention as two products and a softmax, as PyTorch's exporter and optimum write it.
 *
 *     q -> [* number] -> MatMul with keys -> [* number] -> [+ mask] -> Softmax -> MatMul with values
 *
 * It is found at its second product, whose right side is no weight.
 *
 * @module
 */

import { checkHeadDim, checkHeads, type Surroundings, type TakenApart, withMasks } from "./form.ts";
import type { Mask } from "./mask.ts";
import type { GraphNode } from "../model/node.ts";
import { joinedTo } from "./past.ts";
import { cannotCut, nodeText } from "../model/refusal.ts";
import { takenApart } from "./taken_apart.ts";
import type { Values } from "../model/values.ts";

/** Operators that change nothing when a model runs. */
const NOTHING = /^(Identity|Cast|Dropout)$/;

/** Takes attention apart that ends in this product; undefined where it is another one. */
export function takePlain(node: GraphNode, around: Surroundings): TakenApart | undefined {
  const { values, model } = around;
  const softmax = behindNothing(node.inputs[0]!, values);
  if (softmax?.op !== "Softmax") return undefined;
  const right = node.inputs[1]!;
  if (values.weight(right) !== undefined || values.producer(right)?.op === "Constant") return undefined;
  const v = joinedTo(right, "htd", node, model, values);
  if (v === undefined) {
    throw cannotCut(
      `the values of ${nodeText(node)} must be joined to a past [batch, heads, past, head_dim]: ${
        node.inputs[1]
      } is not; ` +
        "export the decoder with its past",
    );
  }
  checkLastAxis(softmax);

  const scores = scoresOf(softmax, node, around);
  const k = joinedTo(scores.keys, "hdt", node, model, values);
  if (k === undefined) {
    throw cannotCut(`the keys of ${nodeText(node)} must be joined to a past as its values are: they are not`);
  }
  const query = factored(scores.query, values);
  const { qHeadCount } = v;
  checkHeads(node, qHeadCount, v.headCount);
  const isSame = k.headCount === v.headCount && k.headDim === v.headDim && k.qHeadCount === qHeadCount;
  if (!isSame || v.factor !== 1) {
    throw cannotCut(
      `keys and values of ${nodeText(node)} must have the same heads, and values be unscaled: they do not`,
    );
  }
  const { softcap, masks } = scores;
  return takenApart({
    node,
    qHeadCount,
    kvHeadCount: v.headCount,
    headDim: checkHeadDim(node, v.headDim),
    q: { name: query.name, layout: "head_major" },
    k: k.part,
    v: v.part,
    output: { name: node.outputs[0]!, layout: "head_major" },
    numbers: {
      softmaxScale: scores.factor * query.factor * k.factor,
      ...(softcap === undefined ? {} : { softcap }),
      ...withMasks(node, {}, { masks, isCausal: false, around }),
    },
  }, around);
}

/** The node that gives a value, behind those that change nothing. */
function behindNothing(name: string, values: Values): GraphNode | undefined {
  let node = values.producer(name);
  while (node !== undefined && NOTHING.test(node.op)) node = values.producer(node.inputs[0]!);
  return node;
}

function checkLastAxis(softmax: GraphNode): void {
  const axis = softmax.attributes.get("axis")?.int ?? -1;
  if (axis !== -1 && axis !== 3) {
    throw cannotCut(`${nodeText(softmax)} must be over the last axis: its axis is ${axis}`);
  }
}

/** The way from the first product to the softmax. */
interface Scores {
  readonly query: string;
  readonly keys: string;
  readonly factor: number;
  readonly softcap?: number;
  readonly masks: readonly Mask[];
}

/** Reads what is done to scores, from the softmax back to their product. */
function scoresOf(softmax: GraphNode, user: GraphNode, { values, masks: known }: Surroundings): Scores {
  const masks: Mask[] = [];
  let factor = 1;
  let softcap: number | undefined;
  for (let at = softmax.inputs[0]!;;) {
    const node = values.producer(at);
    const [left = "", right = "", third = ""] = node?.inputs ?? [];
    const number = values.number(right) ?? (node?.op === "Mul" ? values.number(left) : undefined);
    switch (node?.op) {
      case "Identity":
      case "Cast":
        at = left;
        continue;
      case "MatMul":
        return { query: left, keys: right, factor, masks, ...(softcap === undefined ? {} : { softcap }) };
      case "Mul":
      case "Div":
        if (number === undefined) break;
        factor *= node.op === "Mul" ? number : 1 / number;
        at = values.number(right) === undefined ? right : left;
        continue;
      case "Tanh":
        // What multiplies the tangent is the cap, and what comes before it is a share of the cap.
        if (softcap !== undefined) break;
        softcap = factor;
        at = left;
        continue;
      case "Add": {
        const mask = [left, right].find((input) => known.isMask(input));
        if (mask === undefined) break;
        masks.push({ name: mask, seen: "zero" });
        at = mask === left ? right : left;
        continue;
      }
      case "Where": {
        const isSeen = (values.number(third) ?? 0) < 0;
        const isHidden = (values.number(right) ?? 0) < 0;
        if (isSeen === isHidden || !known.isMask(left)) break;
        masks.push({ name: left, seen: isSeen ? "true" : "false" });
        at = isSeen ? right : third;
        continue;
      }
    }
    throw cannotCut(
      `scores of ${nodeText(user)} must be a product, scaled, capped and masked: ` +
        `${node === undefined ? at : nodeText(node)} is none of that; export with GroupQueryAttention`,
    );
  }
}

/** A value that is another one times a number. */
function factored(name: string, values: Values): { readonly name: string; readonly factor: number } {
  let factor = 1;
  for (let at = name;;) {
    const node = values.producer(at);
    const [left = "", right = ""] = node?.inputs ?? [];
    const ofRight = values.number(right);
    const ofLeft = node?.op === "Mul" ? values.number(left) : undefined;
    if ((node?.op !== "Mul" && node?.op !== "Div") || (ofRight ?? ofLeft) === undefined) return { name: at, factor };
    factor *= node.op === "Mul" ? (ofRight ?? ofLeft)! : 1 / ofRight!;
    at = ofRight === undefined ? right : left;
  }
}
