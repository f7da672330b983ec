/**
 * Writes ONNX models: a graph of nodes over named values, as `onnx.proto` numbers its fields.
 *
 * Weights lie in the model, or in a file of their own beside it (external data), where exporters put them from 2 GiB on.
 */
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { Message } from "./protobuf.ts";

/** Numbers of the element types. */
const TYPES = { float32: 1, uint8: 2, int32: 6, int64: 7, bool: 9, float16: 10 } as const;

/** An element type. */
export type ElementType = keyof typeof TYPES;

/** Axis lengths; a name is a length that differs from call to call. */
export type Dims = readonly (number | string)[];

/** Elements of a constant; f16 are the bits in a Uint16Array. */
export type ConstantData = Float32Array | Uint16Array | Uint8Array | Int32Array | BigInt64Array;

/** A whole number is an int of the format, unless it is wrapped. */
export type Attribute =
  | number
  | { readonly float: number }
  | { readonly tensor: Constant }
  | string
  | readonly number[];

/** What a node has beside its inputs and outputs. */
export interface NodeOptions {
  readonly name?: string;
  readonly domain?: string;
  readonly attributes?: Readonly<Record<string, Attribute | undefined>>;
}

/** The domain of onnxruntime's own operators. */
export const MICROSOFT = "com.microsoft";

/** A model, and the file of its weights where they lie outside. */
export interface ModelFiles {
  readonly model: Uint8Array;
  readonly data?: { readonly file: string; readonly bytes: Uint8Array };
}

/** A tensor that is known when the model is made. */
export interface Constant {
  readonly type: ElementType;
  readonly dims: readonly number[];
  readonly data: ConstantData;
}

/** A graph that is being written. */
export class Graph {
  readonly #nodes: Message[] = [];
  readonly #constants = new Map<string, Constant>();
  readonly #inputs: Message[] = [];
  readonly #outputs: Message[] = [];

  /** Adds a node with one output of that name; an input that is left out is an empty name. */
  node(operator: string, inputs: readonly string[], output: string, options: NodeOptions = {}): string {
    this.nodes(operator, inputs, [output], options);
    return output;
  }

  /** Adds a node with several outputs. */
  nodes(operator: string, inputs: readonly string[], outputs: readonly string[], options: NodeOptions = {}): void {
    const { name = outputs[0]!, domain = "", attributes = {} } = options;
    const node = new Message();
    for (const input of inputs) node.text(1, input);
    for (const output of outputs) node.text(2, output);
    node.text(3, name).text(4, operator);
    for (const [key, value] of Object.entries(attributes)) {
      if (value !== undefined) node.message(5, attribute(key, value));
    }
    if (domain !== "") node.text(7, domain);
    this.#nodes.push(node);
  }

  /** Adds a constant once; gives its name. */
  constant(name: string, type: ElementType, dims: readonly number[], data: ConstantData): string {
    if (!this.#constants.has(name)) this.#constants.set(name, { type, dims, data });
    return name;
  }

  input(name: string, type: ElementType, dims: Dims): string {
    this.#inputs.push(value(name, type, dims));
    return name;
  }

  output(name: string, type: ElementType, dims: Dims): string {
    this.#outputs.push(value(name, type, dims));
    return name;
  }

  /** The model; with `dataFile` every constant of a kilobyte or more lies in that file. */
  files({ dataFile, opset = 17 }: { dataFile?: string; opset?: number } = {}): ModelFiles {
    const graph = new Message();
    for (const node of this.#nodes) graph.message(1, node);
    graph.text(2, "main_graph");
    const outside: Uint8Array[] = [];
    let offset = 0;
    for (const [name, constant] of this.#constants) {
      const tensor = description(constant).text(8, name);
      const bytes = bytesOf(constant);
      if (dataFile === undefined || bytes.length < 1024) tensor.bytes(9, bytes);
      else {
        const entries = { location: dataFile, offset: `${offset}`, length: `${bytes.length}` };
        for (const [key, text] of Object.entries(entries)) tensor.message(13, new Message().text(1, key).text(2, text));
        tensor.number(14, 1);
        outside.push(bytes);
        offset += bytes.length;
      }
      graph.message(5, tensor);
    }
    for (const input of this.#inputs) graph.message(11, input);
    for (const output of this.#outputs) graph.message(12, output);
    const model = new Message().number(1, opset < 21 ? 8 : 10).text(2, "kvern").message(7, graph);
    for (const [domain, version] of [["", opset], [MICROSOFT, 1]] as const) {
      model.message(8, new Message().text(1, domain).number(2, version));
    }
    if (dataFile === undefined) return { model: model.toBytes() };
    const bytes = new Uint8Array(offset);
    let end = 0;
    for (const part of outside) {
      bytes.set(part, end);
      end += part.length;
    }
    return { model: model.toBytes(), data: { file: dataFile, bytes } };
  }
}

/** Writes the files of a model into a folder, `model.onnx` among them; gives the path of that. */
export function writeModel(folder: string, { model, data }: ModelFiles): string {
  mkdirSync(folder, { recursive: true });
  const path = join(folder, "model.onnx");
  writeFileSync(path, model);
  if (data) writeFileSync(join(folder, data.file), data.bytes);
  return path;
}

/** Lengths and type of a constant. */
function description({ type, dims }: Constant): Message {
  const tensor = new Message();
  for (const length of dims) tensor.number(1, length);
  return tensor.number(2, TYPES[type]);
}

function bytesOf({ data }: Constant): Uint8Array {
  return new Uint8Array(data.buffer as ArrayBuffer, data.byteOffset, data.byteLength);
}

function attribute(name: string, value: Attribute): Message {
  const message = new Message().text(1, name);
  if (typeof value === "number") return message.number(3, value).number(20, 2);
  if (typeof value === "string") return message.text(4, value).number(20, 3);
  if ("float" in value) return message.float(2, value.float).number(20, 1);
  if ("tensor" in value) {
    return message.message(5, description(value.tensor).bytes(9, bytesOf(value.tensor))).number(20, 4);
  }
  for (const item of value) message.number(8, item);
  return message.number(20, 7);
}

function value(name: string, type: ElementType, dims: Dims): Message {
  const shape = new Message();
  for (const length of dims) {
    shape.message(1, typeof length === "number" ? new Message().number(1, length) : new Message().text(2, length));
  }
  const tensor = new Message().number(1, TYPES[type]).message(2, shape);
  return new Message().text(1, name).message(2, new Message().message(1, tensor));
}
