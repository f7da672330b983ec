/**
 * What a form of attention becomes: the layer that kvern computes, the nodes before it that make its rows, and those
 * after it that give the graph what it had from the node.
 *
 * @module
 */

import type { AttentionLayer } from "./cut_model.ts";
import type { GraphNode } from "./node.ts";
import { cannotCut, nodeText } from "./refusal.ts";
import type { Values } from "./values.ts";

/** A node of attention, taken apart. */
export interface TakenApart {
  readonly before: readonly GraphNode[];
  readonly layer: AttentionLayer;
  readonly after: readonly GraphNode[];
}

/** The graph as a form sees it. */
export interface Surroundings {
  readonly values: Values;
  /** The positions of the tokens, int64 `[1, tokens]`. */
  positions(): string;
}

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
  const isWhole = kvHeadCount >= 1 && qHeadCount % kvHeadCount === 0 && qHeadCount >= 1 && qHeadCount <= 1 << 16;
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
      } must be known: neither past_key nor key says it; export with static shapes of heads`,
    );
  }
  if (Number.isSafeInteger(headDim) && headDim >= 1 && headDim <= 256) return headDim;
  throw cannotCut(`the head dimension of ${nodeText(node)} must be 1 to 256: it is ${headDim}`);
}
