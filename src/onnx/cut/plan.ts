/**
 * Which nodes go into which piece, and which values cross the borders between them.
 *
 * A value has the level of the last attention it depends on: 0 before the first, `l + 1` after layer `l`. A piece has the
 * nodes of its level that anybody wants, so what only attention wanted, masks and past keys, is in none of them. Shapes
 * and positions are computed again where they are wanted: that costs less than carrying them.
 *
 * @module
 */

import type { AttentionLayer } from "./cut_model.ts";
import type { GraphNode } from "../model/node.ts";
import { ELEMENT } from "../model/tensor.ts";
import type { Values } from "../model/values.ts";

/** A graph whose attention has been taken apart: nodes in order, layers in their places. */
export type Line = readonly (GraphNode | { readonly layer: AttentionLayer })[];

/** A piece, by names. */
export interface PiecePlan {
  readonly nodes: readonly GraphNode[];
  /** Inputs of the model, values of earlier pieces, outputs of attention. */
  readonly takes: readonly string[];
  readonly gives: readonly string[];
  readonly layer?: AttentionLayer;
}

/** Operators that give shapes and positions from one another, in no time worth a border. */
const CHEAP = new RegExp(
  "^(Shape|Size|Gather|Unsqueeze|Squeeze|Cast|Concat|Add|Sub|Mul|Div|Mod|Neg|Min|Max|Range|ConstantOfShape|Slice|Reshape|" +
    "Expand|Where|Equal|Less|LessOrEqual|Greater|GreaterOrEqual|And|Or|Not|Identity|CumSum|ReduceSum|Constant)$",
);

/** Plans the pieces of a graph that gives `logits`. */
export function planPieces(line: Line, logits: string, values: Values): PiecePlan[] {
  const layers: AttentionLayer[] = [];
  const nodes: GraphNode[] = [];
  const producers = new Map<string, GraphNode>();
  const levels = new Map<string, number>();
  const levelOf = (node: GraphNode) =>
    [...node.inputs, ...node.captured].reduce((level, input) => Math.max(level, levels.get(input) ?? 0), 0);
  for (const each of line) {
    if ("layer" in each) {
      layers.push(each.layer);
      levels.set(each.layer.output, layers.length);
      continue;
    }
    nodes.push(each);
    const level = levelOf(each);
    for (const output of each.outputs) {
      levels.set(output, level);
      producers.set(output, each);
    }
  }

  const isRepeated = repeatedNodes(nodes, producers, values);
  const wanted = Array.from({ length: layers.length + 1 }, () => new Set<string>());
  for (const [l, { q, k, v }] of layers.entries()) for (const name of [q, k, v]) wanted[l]!.add(name);
  wanted[layers.length]!.add(logits);

  const plans: PiecePlan[] = [];
  for (let level = layers.length; level >= 0; level--) {
    const takes = new Set<string>();
    const kept = new Set<GraphNode>();
    const stack = [...wanted[level]!];
    const seen = new Set<string>();
    while (stack.length > 0) {
      const name = stack.pop()!;
      if (name === "" || seen.has(name) || values.weight(name) !== undefined) continue;
      seen.add(name);
      const node = producers.get(name);
      if (node === undefined) takes.add(name);
      else if (levels.get(name)! < level && !isRepeated.has(node)) {
        takes.add(name);
        wanted[levels.get(name)!]!.add(name);
      } else if (!kept.has(node)) {
        kept.add(node);
        stack.push(...node.inputs, ...node.captured);
      }
    }
    const layer = layers[level];
    plans[level] = {
      nodes: nodes.filter((node) => kept.has(node)),
      takes: [...takes],
      gives: [...wanted[level]!],
      ...(layer === undefined ? {} : { layer }),
    };
  }
  return plans;
}

/** The nodes that are computed again in every piece that wants them: they depend on inputs of the model alone. */
function repeatedNodes(
  nodes: readonly GraphNode[],
  producers: ReadonlyMap<string, GraphNode>,
  values: Values,
): ReadonlySet<GraphNode> {
  const repeated = new Set<GraphNode>();
  for (const node of nodes) {
    if (node.domain !== "" || !CHEAP.test(node.op) || node.captured.length > 0) continue;
    const isKnown = node.inputs.every((input) => {
      if (input === "" || values.weight(input) !== undefined || values.isInput(input)) return true;
      const producer = producers.get(input);
      return producer !== undefined && repeated.has(producer);
    });
    if (isKnown && (node.op === "Constant" || isWhole(values.type(node.outputs[0]!)))) repeated.add(node);
  }
  return repeated;
}

function isWhole(type: number): boolean {
  return type === ELEMENT.int64 || type === ELEMENT.int32 || type === ELEMENT.bool;
}
