/**
 * What is known of the values of a graph without running it: element types, widths, and those that are constant.
 *
 * @module
 */

import { join } from "node:path";
import { bytesOfFile } from "./bytes.ts";
import type { Model, ValueInfo } from "./model.ts";
import type { GraphNode } from "./node.ts";
import { cannotCut } from "./refusal.ts";
import { ELEMENT, type Elements, elementsOf, type Place, type Tensor } from "./tensor.ts";

/** Operators whose output is of one type whatever they are given. */
const FIXED_TYPE: Readonly<Record<string, number>> = {
  Shape: ELEMENT.int64,
  Size: ELEMENT.int64,
  NonZero: ELEMENT.int64,
  ArgMax: ELEMENT.int64,
  ArgMin: ELEMENT.int64,
  Equal: ELEMENT.bool,
  Greater: ELEMENT.bool,
  GreaterOrEqual: ELEMENT.bool,
  Less: ELEMENT.bool,
  LessOrEqual: ELEMENT.bool,
  And: ELEMENT.bool,
  Or: ELEMENT.bool,
  Xor: ELEMENT.bool,
  Not: ELEMENT.bool,
  IsNaN: ELEMENT.bool,
  IsInf: ELEMENT.bool,
  MatMulInteger: ELEMENT.int32,
  ConvInteger: ELEMENT.int32,
};

/** Operators whose output has the type of another input than the first. */
const TYPE_INPUT: Readonly<Record<string, number>> = {
  Where: 1,
  SimplifiedLayerNormalization: 1,
  DequantizeLinear: 1,
  QuantizeLinear: 2,
  GatherBlockQuantized: 2,
  MatMulIntegerToFloat: 2,
  OneHot: 2,
};

/** Operators whose output is as wide as their first input. */
const SAME_WIDTH =
  /^(Cast|Identity|Add|Sub|RotaryEmbedding|LayerNormalization|SimplifiedLayerNormalization|RMSNormalization)$/;

/** The values of a graph. */
export class Values {
  readonly #model: Model;
  readonly #producers = new Map<string, GraphNode>();
  readonly #own = new Map<string, ValueInfo>();
  readonly #names: Set<string>;

  constructor(model: Model) {
    this.#model = model;
    for (const node of model.nodes) for (const output of node.outputs) this.#producers.set(output, node);
    this.#names = new Set([...model.weights.keys(), ...model.inputs.keys(), ...this.#producers.keys()]);
  }

  /** The node that gives a value; none gives weights and inputs. */
  producer(name: string): GraphNode | undefined {
    return this.#producers.get(name);
  }

  /** A name that no value has yet. */
  fresh(name: string): string {
    let fresh = name;
    for (let i = 2; this.#names.has(fresh); i++) fresh = `${name}:${i}`;
    this.#names.add(fresh);
    return fresh;
  }

  /** Makes a node of our own known as what gives its values. */
  add(node: GraphNode): void {
    for (const output of node.outputs) this.#producers.set(output, node);
  }

  /** What is known of a value that the graph did not have. */
  note(info: ValueInfo): void {
    this.#own.set(info.name, info);
  }

  /** What the graph says of a value. */
  info(name: string): ValueInfo | undefined {
    const { inputs, outputs, values } = this.#model;
    return this.#own.get(name) ?? inputs.get(name) ?? outputs.get(name) ?? values.get(name);
  }

  /** Whether a value is fed: an input of the model, or one that the pieces have of their own. */
  isInput(name: string): boolean {
    return this.#model.inputs.has(name) || (this.#own.has(name) && !this.#producers.has(name));
  }

  /** What is known of a value that the pieces are fed beside the inputs of the model. */
  fed(name: string): ValueInfo | undefined {
    return this.#producers.has(name) ? undefined : this.#own.get(name);
  }

  /** The weights of that name, as they lie in the model. */
  weight(name: string): Tensor | undefined {
    return this.#model.weights.get(name);
  }

  /** The element type of a value: what the graph says, or what its operator gives. */
  type(name: string): number {
    // From input to input, without recursion: a chain may be as long as the graph.
    for (let at = name;;) {
      const known = this.weight(at)?.type ?? this.info(at)?.type ?? 0;
      if (known !== 0) return known;
      const node = this.#producers.get(at);
      if (node === undefined) throw cannotCut(`the element type of ${at} must be known: the graph does not say it`);
      const fixed = typeGiven(node, at);
      if (fixed !== undefined) return fixed;
      const next = node.inputs[TYPE_INPUT[node.op] ?? 0];
      if (next === undefined || next === "") {
        throw cannotCut(
          `the element type of ${at} must be known: ${node.op} gives it, and the graph does not say of what`,
        );
      }
      at = next;
    }
  }

  /** The last dimension of a value, where it can be told. */
  width(name: string): number | undefined {
    for (let at = name;;) {
      const dims = this.weight(at)?.dims ?? this.info(at)?.dims;
      const last = dims?.at(-1);
      if (typeof last === "number") return last;
      const node = this.#producers.get(at);
      if (node === undefined) return undefined;
      if (node.op === "MatMul" || node.op === "Gemm") {
        const { dims = [] } = this.weight(node.inputs[1]!) ?? {};
        return node.attributes.get("transB")?.int === 1 ? dims[0] : dims[1];
      }
      if (node.op === "MatMulNBits") return node.attributes.get("N")?.int;
      if (node.op === "Reshape") {
        const width = this.constant(node.inputs[1] ?? "")?.values.at(-1);
        return width === undefined || width < 1 ? undefined : width;
      }
      if (!SAME_WIDTH.test(node.op) || node.inputs.length === 0) return undefined;
      // A bias may be on either side of a sum; it is as wide as the rest.
      const weight = node.op === "Add" ? node.inputs.find((input) => this.weight(input) !== undefined) : undefined;
      at = weight ?? node.inputs[0]!;
    }
  }

  /** The elements of a value that is the same in every run: small weights, and what is cast from them. */
  constant(name: string): Elements | undefined {
    const { bytes } = this.#model;
    const outside = (place: Place) => this.#outside(place);
    const weight = this.weight(name);
    if (weight !== undefined) return elementsOf(bytes, weight, outside);
    const node = this.#producers.get(name);
    if (node === undefined) return undefined;
    const { attributes, inputs, op } = node;
    if (op === "Constant") {
      const tensor = this.attribute(node, "value");
      if (tensor !== undefined) return tensor;
      const { int, float } = { ...attributes.get("value_int"), ...attributes.get("value_float") };
      const ints = attributes.get("value_ints")?.ints;
      if (ints !== undefined) return { type: ELEMENT.int64, dims: [ints.length], values: ints };
      if (int !== undefined) return { type: ELEMENT.int64, dims: [], values: [int] };
      return float === undefined ? undefined : { type: ELEMENT.float32, dims: [], values: [float] };
    }
    if (op !== "Identity" && op !== "Cast") return undefined;
    return this.constant(inputs[0] ?? "");
  }

  /** The value that is one number in every run. */
  number(name: string): number | undefined {
    const dims = this.weight(name)?.dims;
    if (dims !== undefined && dims.some((dim) => dim !== 1)) return undefined;
    const values = this.constant(name)?.values;
    return values?.length === 1 ? values[0] : undefined;
  }

  /** The elements of a tensor that is an attribute. */
  attribute({ attributes }: GraphNode, name: string): Elements | undefined {
    const tensor = attributes.get(name)?.tensor;
    return tensor && elementsOf(this.#model.bytes, tensor, (place) => this.#outside(place));
  }

  #outside({ file, offset, length }: Place): Uint8Array {
    const { folder, weights } = this.#model.files!;
    const bytes = bytesOfFile(join(folder, weights.get(file)!));
    try {
      return bytes.window(offset, Math.min(bytes.length, offset + length!)).slice();
    } finally {
      bytes.close();
    }
  }
}

/** The type that a node gives by itself. */
function typeGiven({ op, attributes, outputs }: GraphNode, value: string): number | undefined {
  if (op === "Cast") return attributes.get("to")?.int;
  if (op === "DequantizeLinear" || op === "QuantizeLinear") return attributes.get("output_dtype")?.int || undefined;
  if (op === "Constant") {
    if (attributes.has("value")) return attributes.get("value")!.tensor?.type;
    return attributes.has("value_int") || attributes.has("value_ints") ? ELEMENT.int64 : ELEMENT.float32;
  }
  if (op === "ConstantOfShape") return attributes.get("value")?.tensor?.type ?? ELEMENT.float32;
  if (op === "TopK" && value === outputs[1]) return ELEMENT.int64;
  if (op === "DynamicQuantizeLinear") return value === outputs[1] ? ELEMENT.float32 : ELEMENT.uint8;
  return FIXED_TYPE[op];
}
