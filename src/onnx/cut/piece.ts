/**
 * A piece as a model of its own.
 *
 * @module
 */

import type { Piece } from "./cut_model.ts";
import type { Model } from "../model/model.ts";
import { type GraphNode, newNode } from "../model/node.ts";
import type { PiecePlan } from "./plan.ts";
import { Message } from "../model/protobuf.ts";
import { ELEMENT, tensorMessage } from "../model/tensor.ts";
import type { Values } from "../model/values.ts";

/** The version of the format from which on weights need not be inputs too. */
const IR_VERSION_MIN = 4;

/** Writes a piece: what is no f32 crosses its borders as one. */
export function writePiece(plan: PiecePlan, index: number, model: Model, values: Values): Piece {
  const graph = new Message();
  const takes: string[] = [];
  const gives: string[] = [];
  const before: GraphNode[] = [];
  const after: GraphNode[] = [];
  const inputs: Message[] = [];
  const outputs: Message[] = [];

  for (const name of plan.takes) {
    const type = values.type(name);
    const fed = isNarrow(type) ? crossing(name) : name;
    if (fed !== name) before.push(newNode({ op: "Cast", inputs: [fed], outputs: [name], ints: { to: type } }));
    takes.push(fed);
    inputs.push(valueMessage(fed, fed === name ? type : ELEMENT.float32, values.info(name)?.dims));
  }
  for (const name of plan.gives) {
    const type = values.type(name);
    const given = isNarrow(type) ? crossing(name) : name;
    if (given !== name) {
      after.push(newNode({ op: "Cast", inputs: [name], outputs: [given], ints: { to: ELEMENT.float32 } }));
    }
    gives.push(given);
    outputs.push(valueMessage(given, given === name ? type : ELEMENT.float32, values.info(name)?.dims));
  }

  const nodes = [...before, ...plan.nodes, ...after];
  for (const { message } of nodes) graph.bytes(1, message);
  graph.text(2, `piece ${index}`);
  const weights = new Set(nodes.flatMap(({ inputs, captured }) => [...inputs, ...captured]));
  for (const name of weights) {
    const weight = values.weight(name);
    if (weight !== undefined) graph.bytes(5, tensorMessage(model.bytes, weight, model.files));
  }
  for (const input of inputs) graph.bytes(11, input);
  for (const output of outputs) graph.bytes(12, output);

  const message = new Message().int(1, Math.max(model.irVersion, IR_VERSION_MIN)).text(2, "kvern").bytes(7, graph);
  const opsets = new Map([["com.microsoft", 1], ...model.opsets]);
  for (const [domain, version] of opsets) message.bytes(8, new Message().text(1, domain).int(2, version));
  for (const each of model.functions) message.bytes(25, each);
  const { layer } = plan;
  return {
    get model() {
      return message.toBytes();
    },
    takes,
    gives,
    ...(layer === undefined ? {} : { attention: layer }),
  };
}

/** The name under which a value that is no f32 crosses. */
export function crossing(name: string): string {
  return `${name}:crossing`;
}

/** Types of floats that onnxruntime's JavaScript does not carry everywhere. */
export function isNarrow(type: number): boolean {
  return type === ELEMENT.float16 || type === ELEMENT.bfloat16;
}

function valueMessage(name: string, type: number, dims: readonly (number | string)[] | undefined): Message {
  const tensor = new Message().int(1, type);
  if (dims !== undefined) {
    const shape = new Message();
    for (const dim of dims) {
      const each = new Message();
      if (typeof dim === "number") each.int(1, dim);
      else if (dim !== "") each.text(2, dim);
      shape.bytes(1, each);
    }
    tensor.bytes(2, shape);
  }
  return new Message().text(1, name).bytes(2, new Message().bytes(1, tensor));
}
