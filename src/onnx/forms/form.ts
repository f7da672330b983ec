/**
 * What a form of attention becomes: the layer that kvern computes, the nodes before it that make its rows, and those
 * after it that give the graph what it had from the node; and what forms read of their nodes.
 *
 * @module
 */

import type { AttentionLayer } from "../cut/cut_model.ts";
import type { Mask, Masks } from "./mask.ts";
import type { Model } from "../model/model.ts";
import type { GraphNode } from "../model/node.ts";
import { cannotCut, nodeText } from "../model/refusal.ts";
import type { Layout } from "./rows.ts";
import type { Values } from "../model/values.ts";

/** A node of attention, taken apart. */
export interface TakenApart {
  readonly before: readonly GraphNode[];
  readonly layer: AttentionLayer;
  readonly after: readonly GraphNode[];
}

/** The graph as a form sees it. */
export interface Surroundings {
  readonly model: Model;
  readonly values: Values;
  readonly masks: Masks;
  /** The positions of the tokens, int64 `[1, tokens]`. */
  positions(): string;
}

/** A value that attention takes or gives, and how its heads lie. */
export interface Part {
  readonly name: string;
  readonly layout: Layout;
}

/** The root mean square norms of queries and keys, each head by itself. */
export interface HeadNorms {
  readonly q: string;
  readonly k: string;
  readonly epsilon: number;
}

/** Numbers that an attention may say, each left out where it does not. */
export type Numbers = Pick<AttentionLayer, "softmaxScale" | "windowTokens" | "softcap" | "sinkLogits">;

/** The integer of an attribute that a node must have. */
export function intOf(node: GraphNode, name: string): number {
  const value = node.attributes.get(name)?.int;
  if (value === undefined) throw cannotCut(`${nodeText(node)} must say ${name}: it does not`);
  return value;
}

/** The input number `index`, where there is one. */
export function inputOf(node: GraphNode, index: number): string | undefined {
  const name = node.inputs[index];
  return name === "" ? undefined : name;
}

/** Checks the numbers of heads, so that nothing is divided by what hostile bytes say. */
export function checkHeads(node: GraphNode, qHeadCount: number, kvHeadCount: number): void {
  const isWhole = kvHeadCount >= 1 && qHeadCount >= 1 && qHeadCount <= 1 << 16 && qHeadCount % kvHeadCount === 0;
  if (isWhole) return;
  throw cannotCut(
    `the query heads of ${
      nodeText(node)
    } must be a multiple of its key heads: there are ${qHeadCount} and ${kvHeadCount}`,
  );
}

/** Checks what a cache can store. */
export function checkHeadDim(node: GraphNode, headDim: number | undefined): number {
  if (headDim === undefined) {
    throw cannotCut(
      `the head dimension of ${
        nodeText(node)
      } must be known: neither past_key nor key says it; export the model with ` +
        "numbers in the shapes of its past",
    );
  }
  if (Number.isSafeInteger(headDim) && headDim >= 1 && headDim <= 256) return headDim;
  throw cannotCut(`the head dimension of ${nodeText(node)} must be a whole number of 1 to 256: it is ${headDim}`);
}

/** Refuses an attribute that turns attention into something kvern does not compute. */
export function checkAttribute(node: GraphNode, name: string, wanted: number, advice: string): void {
  const value = node.attributes.get(name)?.int ?? wanted;
  if (value !== wanted) throw cannotCut(`${name} of ${nodeText(node)} must be ${wanted}: it is ${value}; ${advice}`);
}

/** The scale, window and softcap that the attributes of onnxruntime's own nodes say; each has a number that means none. */
export function numbersOf(node: GraphNode): Numbers {
  const scale = node.attributes.get("scale")?.float ?? 0;
  const window = node.attributes.get("local_window_size")?.int ?? -1;
  const softcap = node.attributes.get("softcap")?.float ?? 0;
  if (window !== -1 && !(window >= 1 && window < 2 ** 31)) {
    throw cannotCut(`local_window_size of ${nodeText(node)} must be -1 or 1 to 2^31 - 1: it is ${window}`);
  }
  if (!Number.isFinite(scale) || !Number.isFinite(softcap) || softcap < 0) {
    throw cannotCut(`scale and softcap of ${nodeText(node)} must be finite: they are ${scale} and ${softcap}`);
  }
  return {
    ...(scale === 0 ? {} : { softmaxScale: scale }),
    ...(window === -1 ? {} : { windowTokens: window }),
    ...(softcap === 0 ? {} : { softcap }),
  };
}

/** The sink logits of a node: those of an input, or a 0 for each head where a smooth softmax is asked for. */
export function sinksOf(node: GraphNode, input: string | undefined, qHeadCount: number, values: Values): Numbers {
  if (input === undefined) {
    const isSmooth = (node.attributes.get("smooth_softmax")?.int ?? 0) === 1;
    return isSmooth ? { sinkLogits: new Float32Array(qHeadCount) } : {};
  }
  const sinks = values.constant(input);
  if (sinks === undefined) {
    throw cannotCut(
      `the sink logits of ${nodeText(node)} must be weights: ${input} is computed; export it as a constant`,
    );
  }
  if (sinks.values.length === qHeadCount) return { sinkLogits: Float32Array.from(sinks.values) };
  throw cannotCut(
    `${nodeText(node)} must have a sink logit for each of its ${qHeadCount} heads: it has ${sinks.values.length}`,
  );
}

/** The numbers of a node with those of its masks: of two windows the smaller is what tokens see. */
export function withMasks(
  node: GraphNode,
  numbers: Numbers,
  { masks, isCausal, around }: {
    readonly masks: readonly Mask[];
    /** The node hides later tokens by itself. */
    readonly isCausal: boolean;
    readonly around: Surroundings;
  },
): Numbers {
  if (masks.length === 0 && !isCausal) {
    throw cannotCut(`${nodeText(node)} must hide later tokens: it has no mask, and no attribute that says so`);
  }
  if (masks.length === 0) return numbers;
  const { windowTokens = Infinity } = around.masks.windowOf(masks, nodeText(node), isCausal);
  const window = Math.min(windowTokens, numbers.windowTokens ?? Infinity);
  return window === Infinity ? numbers : { ...numbers, windowTokens: window };
}

/** A mask that a node takes as an input, where there is one. */
export function masksOf(node: GraphNode, index: number, seen: Mask["seen"]): Mask[] {
  const name = inputOf(node, index);
  return name === undefined ? [] : [{ name, seen }];
}

/** The norms of queries and keys inside a node. */
export function normsOf(node: GraphNode, qIndex: number, kIndex: number): HeadNorms | undefined {
  const q = inputOf(node, qIndex);
  const k = inputOf(node, kIndex);
  if (q === undefined && k === undefined) return undefined;
  if (q === undefined || k === undefined) {
    throw cannotCut(`${nodeText(node)} must have q_norm_weight and k_norm_weight, or neither: one is left out`);
  }
  return { q, k, epsilon: node.attributes.get("qk_norm_epsilon")?.float ?? 1e-6 };
}
