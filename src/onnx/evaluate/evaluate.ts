/**
 * What values of a graph come to for lengths of our choice: masks, positions and shapes are computed, all else has a shape.
 *
 * Exporters write the same mask in a hundred ways. What it lets a token see is asked of it, not read from its nodes.
 *
 * @module
 */

import { compute, isArithmetic } from "./arithmetic.ts";
import { broadcastDims, fill, type Known, valuesOf } from "./array.ts";
import type { Model } from "../model/model.ts";
import type { GraphNode } from "../model/node.ts";
import { RESHAPING } from "./reshaping.ts";
import { inputsFor, type Lengths } from "./scenario.ts";
import { ELEMENT, type Tensor } from "../model/tensor.ts";
import type { Values } from "../model/values.ts";

/** Weights with more elements are matrices, of which only the shape matters, unless they are truths. */
const WEIGHTS_MAX = 1 << 12;

/** Operators whose output has the shape of their first input. */
const SAME_SHAPE = new RegExp(
  "^(Relu|Gelu|FastGelu|QuickGelu|BiasGelu|Sigmoid|Tanh|Softmax|LogSoftmax|Softplus|Exp|Log|Erf|Cos|Sin|Reciprocal|Dropout|" +
    "LayerNormalization|SimplifiedLayerNormalization|RMSNormalization|RotaryEmbedding|Round|Sign)$",
);

/** The values of a graph for one set of inputs. */
export class Evaluation {
  readonly #values: Values;
  readonly #tokens: number;
  readonly #known: Map<string, Known | undefined>;

  /** A run of so many tokens behind a past; `given` are values that are not to be computed. */
  constructor(model: Model, values: Values, lengths: Lengths, given: ReadonlyMap<string, Known> = new Map()) {
    this.#values = values;
    this.#tokens = lengths.tokens;
    this.#known = new Map([...inputsFor(model, lengths), ...given]);
  }

  /** What a value comes to; undefined where it cannot be told. */
  of(name: string): Known | undefined {
    // A graph may be a chain of any length: no recursion.
    const stack = [name];
    const open = new Set<string>();
    while (stack.length > 0) {
      const at = stack.at(-1)!;
      if (at === "" || this.#known.has(at)) {
        stack.pop();
        continue;
      }
      const node = this.#values.producer(at);
      if (node === undefined || open.has(at)) {
        stack.pop();
        if (node === undefined) this.#known.set(at, this.#given(at));
        else this.#run(node);
        continue;
      }
      open.add(at);
      for (const input of node.inputs) if (input !== "" && !this.#known.has(input)) stack.push(input);
    }
    return this.#known.get(name);
  }

  /** A value that no node gives: weights, and what the pieces are fed. */
  #given(name: string): Known | undefined {
    const weight = this.#values.weight(name);
    if (weight !== undefined) return this.#constant(name, weight);
    const { type, dims } = this.#values.fed(name) ?? {};
    return dims && { type: type!, dims: dims.map((dim) => typeof dim === "number" ? dim : this.#tokens) };
  }

  /** A value that is the same in every run; of a matrix, its shape. */
  #constant(name: string, tensor: Tensor | undefined): Known | undefined {
    if (tensor !== undefined) {
      const { type, dims } = tensor;
      const size = dims.reduce((product, dim) => product * dim, 1);
      const isMask = type === ELEMENT.bool || type === ELEMENT.uint8;
      if (type === ELEMENT.string || (size > WEIGHTS_MAX && !isMask)) return { type, dims };
    }
    return this.#values.constant(name);
  }

  #run(node: GraphNode): void {
    const inputs = node.inputs.map((input) => input === "" ? undefined : this.#known.get(input));
    const results = this.#results(node, inputs);
    for (const [i, output] of node.outputs.entries()) {
      if (output !== "") this.#known.set(output, results?.[i]);
    }
  }

  #results(node: GraphNode, inputs: readonly (Known | undefined)[]): readonly (Known | undefined)[] | undefined {
    const { op, domain, outputs } = node;
    if (op === "Constant") return [this.#constant(outputs[0]!, node.attributes.get("value")?.tensor)];
    if (op === "ConstantOfShape") {
      const dims = valuesOf(inputs[0]);
      const { type, values } = this.#values.attribute(node, "value") ?? { type: ELEMENT.float32, values: [0] };
      return dims && [{ type, dims, values: fill(dims, () => values[0] ?? 0) }];
    }
    const isOnnx = domain === "";
    if (isOnnx && isArithmetic(op)) {
      const known = inputs.filter((input) => input !== undefined);
      const isWhole = known.length === node.inputs.filter((input) => input !== "").length;
      return isWhole ? [compute(op, known, node.attributes.get("to")?.int ?? 0)] : undefined;
    }
    if (isOnnx && Object.hasOwn(RESHAPING, op)) return RESHAPING[op]!(inputs, node);
    return shapesOf(node, inputs);
  }
}

/** Shapes of what is not computed here. */
function shapesOf(
  { op, attributes, outputs }: GraphNode,
  [first, second]: readonly (Known | undefined)[],
): readonly Known[] | undefined {
  if (first === undefined) return undefined;
  const { type, dims } = first;
  if (SAME_SHAPE.test(op) || /^Skip(Simplified)?LayerNormalization$/.test(op)) {
    return outputs.map(() => ({ type, dims }));
  }
  if (op === "MatMulNBits") return [{ type, dims: [...dims.slice(0, -1), attributes.get("N")?.int ?? 0] }];
  if (second === undefined) return undefined;
  if (op === "Gemm") {
    const columns = second.dims[attributes.get("transB")?.int === 1 ? 0 : 1];
    return columns === undefined ? undefined : [{ type, dims: [dims[0]!, columns] }];
  }
  if ((op === "MatMul" || op === "FusedMatMul") && dims.length >= 2 && second.dims.length >= 2) {
    const batch = broadcastDims(dims.slice(0, -2), second.dims.slice(0, -2));
    return batch && [{ type, dims: [...batch, dims.at(-2)!, second.dims.at(-1)!] }];
  }
  if (op === "GatherBlockQuantized") return [{ type, dims: [...second.dims, ...dims.slice(1)] }];
  return undefined;
}
