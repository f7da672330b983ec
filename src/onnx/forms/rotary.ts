/**
 * Rotary positions as a node of its own, where attention had them inside.
 *
 * @module
 */

import { inputOf, type Surroundings } from "./form.ts";
import type { GraphNode } from "../model/node.ts";
import { cannotCut, nodeText } from "../model/refusal.ts";
import type { Chain } from "./rows.ts";

/** What a node with rotary positions inside says of them. */
export interface Rotary {
  readonly cos: string;
  readonly sin: string;
  /** Values of each head that turn, or undefined where all do. */
  readonly dim?: number;
  readonly isInterleaved: boolean;
  /** int64 `[1, tokens]`. */
  readonly positions: string;
}

/** The rotary positions of a node with `do_rotary`. */
export function rotaryOf(
  node: GraphNode,
  around: Surroundings,
  { cos, sin, positions, headDim }: { cos: number; sin: number; positions: number; headDim: number },
): Rotary | undefined {
  if ((node.attributes.get("do_rotary")?.int ?? 0) === 0) return undefined;
  const cosCache = inputOf(node, cos);
  const sinCache = inputOf(node, sin);
  if (cosCache === undefined || sinCache === undefined) {
    throw cannotCut(`${nodeText(node)} must have cos_cache and sin_cache, as do_rotary is 1: one is left out`);
  }
  const half = around.values.width(cosCache);
  return {
    cos: cosCache,
    sin: sinCache,
    isInterleaved: node.attributes.get("rotary_interleaved")?.int === 1,
    positions: inputOf(node, positions) ?? around.positions(),
    ...(half === undefined || 2 * half === headDim ? {} : { dim: 2 * half }),
  };
}

/** The rows of `name`, `[1, tokens, headCount * headDim]`, turned. */
export function rotated(chain: Chain, name: string, headCount: number, rotary: Rotary | undefined): string {
  if (rotary === undefined) return name;
  const { positions, cos, sin, isInterleaved, dim } = rotary;
  return chain.add(`${name}:rotated`, {
    op: "RotaryEmbedding",
    domain: "com.microsoft",
    inputs: [name, positions, cos, sin],
    ints: {
      interleaved: isInterleaved ? 1 : 0,
      ...(dim === undefined ? {} : { num_heads: headCount, rotary_embedding_dim: dim }),
    },
  });
}
