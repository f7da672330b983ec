/**
 * Nodes of a graph: read, with what their bodies take from around them, and written.
 *
 * @module
 */

import type { Bytes } from "./bytes.ts";
import { type Field, fieldsOf, floatOf, Message, textOf, varintsOf } from "./protobuf.ts";
import { damaged } from "./refusal.ts";
import { readTensor, type Tensor } from "./tensor.ts";

/** What an attribute of a node says; bodies are known by what they take. */
export interface Attribute {
  readonly float?: number;
  readonly int?: number;
  readonly text?: string;
  readonly ints?: readonly number[];
  readonly tensor?: Tensor;
}

/** An operation of the graph. */
export interface GraphNode {
  readonly name: string;
  readonly op: string;
  /** Empty for the operators of ONNX itself. */
  readonly domain: string;
  /** Names of values; empty for one that is left out. */
  readonly inputs: readonly string[];
  readonly outputs: readonly string[];
  readonly attributes: ReadonlyMap<string, Attribute>;
  /** Values that its bodies, if it has any, take from around it. */
  readonly captured: readonly string[];
  /** Operators in its bodies, at any depth. */
  readonly innerOps: readonly string[];
  /** The node as a message. */
  readonly message: Uint8Array | Message;
}

/** Bodies within bodies; one in another is all that exporters write. */
const DEPTH_MAX = 16;

/** The node that a field is. */
export function readNode(bytes: Bytes, { start, end }: Field, depth = 0): GraphNode {
  let name = "";
  let op = "";
  let domain = "";
  const inputs: string[] = [];
  const outputs: string[] = [];
  const attributes = new Map<string, Attribute>();
  const captured = new Set<string>();
  const innerOps: string[] = [];
  for (const field of fieldsOf(bytes, start, end)) {
    switch (field.number) {
      case 1:
        inputs.push(textOf(bytes, field));
        break;
      case 2:
        outputs.push(textOf(bytes, field));
        break;
      case 3:
        name = textOf(bytes, field);
        break;
      case 4:
        op = textOf(bytes, field);
        break;
      case 5:
        readAttribute(field);
        break;
      case 7:
        domain = textOf(bytes, field);
        break;
    }
  }
  if (domain === "ai.onnx") domain = "";
  const message = depth === 0 ? bytes.window(start, end).slice() : new Uint8Array(0);
  return { name, op, domain, inputs, outputs, attributes, captured: [...captured], innerOps, message };

  function readAttribute(attribute: Field): void {
    let key = "";
    const value: { -readonly [Name in keyof Attribute]: Attribute[Name] } = {};
    const ints: number[] = [];
    for (const field of fieldsOf(bytes, attribute.start, attribute.end)) {
      if (field.number === 1) key = textOf(bytes, field);
      else if (field.number === 2) value.float = floatOf(bytes, field);
      else if (field.number === 3) value.int = Number(BigInt.asIntN(64, field.value));
      else if (field.number === 4) value.text = textOf(bytes, field);
      else if (field.number === 5) value.tensor = readTensor(bytes, field.start, field.end);
      else if (field.number === 8) { for (const int of varintsOf(bytes, field)) ints.push(Number(int)); }
      else if (field.number === 6 || field.number === 11) readBody(field);
    }
    if (ints.length > 0) value.ints = ints;
    attributes.set(key, value);
  }

  /** A body sees every value around it; what it uses and does not make itself, the node takes. */
  function readBody(body: Field): void {
    if (depth === DEPTH_MAX) {
      throw damaged(`bodies may lie ${DEPTH_MAX} deep in one another: those of ${name} lie deeper`);
    }
    const own = new Set<string>();
    const used: string[] = [];
    for (const field of fieldsOf(bytes, body.start, body.end)) {
      if (field.number === 1) {
        const inner = readNode(bytes, field, depth + 1);
        for (const output of inner.outputs) own.add(output);
        used.push(...inner.inputs, ...inner.captured);
        innerOps.push(inner.op, ...inner.innerOps);
      } else if (field.number === 5) own.add(readTensor(bytes, field.start, field.end).name);
      else if (field.number === 11 || field.number === 12) {
        for (const part of fieldsOf(bytes, field.start, field.end)) {
          if (part.number !== 1) continue;
          if (field.number === 11) own.add(textOf(bytes, part));
          else used.push(textOf(bytes, part));
        }
      }
    }
    for (const value of used) if (value !== "" && !own.has(value)) captured.add(value);
  }
}

/** A node to be written: integers and texts, and numbers with a fraction as `{ float }`. */
export interface NewNode {
  readonly op: string;
  readonly domain?: string;
  readonly inputs: readonly string[];
  readonly outputs: readonly string[];
  readonly ints?: Readonly<Record<string, number | readonly number[]>>;
  readonly floats?: Readonly<Record<string, number>>;
}

const KIND = { float: 1, int: 2, ints: 7 } as const;

/** A node of our own, as if it had been read. */
export function newNode({ op, domain = "", inputs, outputs, ints = {}, floats = {} }: NewNode): GraphNode {
  const message = new Message();
  const attributes = new Map<string, Attribute>();
  for (const input of inputs) message.text(1, input);
  for (const output of outputs) message.text(2, output);
  message.text(3, outputs[0]!).text(4, op);
  for (const [name, value] of Object.entries(ints)) {
    const attribute = new Message().text(1, name);
    if (typeof value === "number") message.bytes(5, attribute.int(3, value).int(20, KIND.int));
    else {
      for (const each of value) attribute.int(8, each);
      message.bytes(5, attribute.int(20, KIND.ints));
    }
    attributes.set(name, typeof value === "number" ? { int: value } : { ints: value });
  }
  for (const [name, value] of Object.entries(floats)) {
    message.bytes(5, new Message().text(1, name).float(2, value).int(20, KIND.float));
    attributes.set(name, { float: value });
  }
  if (domain !== "") message.text(7, domain);
  return { name: outputs[0]!, op, domain, inputs, outputs, attributes, captured: [], innerOps: [], message };
}
