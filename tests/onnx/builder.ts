/**
 * The parts of a decoder's graph that every form of it shares: matrices, norms, rotation, the MLP. Names are those that
 * onnxruntime-genai's builder gives.
 */
import { type Attribute, type Constant, type ConstantData, type ElementType, Graph, MICROSOFT } from "./graph.ts";
import { int4Matrix } from "./int4.ts";
import type { DecoderShape, LayerWeights } from "./shapes.ts";

/** How a graph is written; every row of it is one that exporters give. */
export interface Form {
  /** The nodes that attention is. */
  readonly attention: "gqa" | "mha" | "standard" | "plain" | "paged";
  /** The element type of weights, activations and past. */
  readonly float?: "float32" | "float16";
  /** The type of `input_ids` and `position_ids`. */
  readonly ids?: "int64" | "int32";
  /** One matrix gives queries, keys and values, and the node takes them as one. */
  readonly packed?: boolean;
  /** Who rotates: the attention's node, nodes of `RotaryEmbedding` before it, or slices and products. */
  readonly rotary?: "inside" | "nodes" | "plain";
  /** `position_ids` is an input that the attention's node takes, too. */
  readonly positionIds?: boolean;
  /** Norms of heads are the attention node's, too. */
  readonly headNormsInside?: boolean;
  /** The causal mask as `attention_bias`. */
  readonly causalBias?: boolean;
  /** Pairs of dims that are rotated lie side by side, as in Llama's own files: rows of the matrices move with them. */
  readonly interleaved?: boolean;
  /** Positions are made of the lengths of past and input, and are no input. */
  readonly positionsMade?: boolean;
  /** Small numbers are nodes `Constant`, as PyTorch's exporter writes them. */
  readonly constantNodes?: boolean;
  /** The embedding is the output matrix turned by a node. */
  readonly tied?: boolean;
  /** Matrices are `MatMulNBits` of 4 bits. */
  readonly int4?: boolean;
  /** Residual sums are made in `SkipSimplifiedLayerNormalization`, or norms are powers, means and roots. */
  readonly norms?: "skip" | "plain";
  /** Queries and keys are scaled before their product, as PyTorch exports `scaled_dot_product_attention`. */
  readonly scaledApart?: boolean;
  /** Constants of a kilobyte or more lie in this file. */
  readonly dataFile?: string;
}

/** A graph that is being written, and what its parts are made of. */
export class Builder {
  readonly graph: Graph = new Graph();
  readonly shape: DecoderShape;
  readonly form: Form;
  readonly float: "float32" | "float16";
  readonly ids: "int64" | "int32";

  constructor(shape: DecoderShape, form: Form) {
    this.shape = shape;
    this.form = form;
    this.float = form.float ?? "float32";
    this.ids = form.ids ?? "int64";
  }

  /** A constant in the element type of the graph. */
  floats(name: string, dims: readonly number[], values: Float32Array): string {
    return this.graph.constant(name, this.float, dims, elementsOf(values, this.float));
  }

  /** A number of no axis in the element type of the graph. */
  scalar(value: number): string {
    const data = elementsOf(Float32Array.of(value), this.float);
    return this.#small(`/model/constants/FLOAT/${value}`, { type: this.float, dims: [], data });
  }

  /** A list of whole numbers; a number alone has no axis. */
  integers(values: number | readonly number[], type: "int64" | "int32" = "int64"): string {
    const list = typeof values === "number" ? [values] : values;
    const name = `/model/constants/${type.toUpperCase()}/${JSON.stringify(values)}`;
    const data = type === "int64" ? BigInt64Array.from(list, BigInt) : Int32Array.from(list);
    return this.#small(name, { type, dims: typeof values === "number" ? [] : [list.length], data });
  }

  #small(name: string, constant: Constant): string {
    if (!this.form.constantNodes) return this.graph.constant(name, constant.type, constant.dims, constant.data);
    if (!this.#constantNodes.has(name)) {
      this.graph.node("Constant", [], name, { attributes: { value: { tensor: constant } } });
    }
    this.#constantNodes.add(name);
    return name;
  }
  readonly #constantNodes = new Set<string>();

  /** A node with one output, `<name>/output_0`. */
  node(
    operator: string,
    name: string,
    inputs: readonly string[],
    attributes: Readonly<Record<string, Attribute | undefined>> = {},
    domain = "",
  ): string {
    return this.graph.node(operator, inputs, `${name}/output_0`, { name, attributes, domain });
  }

  cast(name: string, input: string, to: ElementType): string {
    const codes = { float32: 1, uint8: 2, int32: 6, int64: 7, bool: 9, float16: 10 };
    return this.node("Cast", name, [input], { to: codes[to] });
  }

  /** x times a matrix `[out][in]`, plus a bias `[out]`. */
  linear(name: string, x: string, weight: Float32Array, out: number, bias?: Float32Array): string {
    const inSize = weight.length / out;
    const weightName = `${name.slice(1).replaceAll("/", ".")}.MatMul.weight`;
    let product: string;
    if (this.form.int4 && name !== "/lm_head") {
      const { codes, scales, blockSize } = int4Matrix(weight, out);
      const blocks = inSize / blockSize;
      const quantized = this.graph.constant(`${weightName}_Q4`, "uint8", [out, blocks, blockSize / 2], codes);
      const scaled = this.floats(`${weightName}_scales`, [out * blocks], scales);
      const attributes = { K: inSize, N: out, bits: 4, block_size: blockSize, accuracy_level: 0 };
      product = this.node("MatMulNBits", `${name}/MatMul_Q4`, [x, quantized, scaled], attributes, MICROSOFT);
    } else {
      const columns = this.floats(weightName, [inSize, out], transposed(weight, out));
      product = this.node("MatMul", `${name}/MatMul`, [x, columns]);
    }
    if (bias === undefined) return product;
    return this.node("Add", `${name}/Add`, [product, this.floats(`${weightName}.bias`, [out], bias)]);
  }

  /** x over its root mean square, times a weight. */
  norm(name: string, x: string, weight: Float32Array): string {
    const weightName = this.floats(`${name.slice(1).replaceAll("/", ".")}.weight`, [weight.length], weight);
    if (this.form.norms === "plain") return this.#plainNorm(name, x, weightName);
    const attributes = { axis: -1, epsilon: { float: this.shape.rmsNormEps }, stash_type: 1 };
    return this.node("SimplifiedLayerNormalization", `${name}/LayerNorm`, [x, weightName], attributes);
  }

  /** The same as powers, means and roots: what PyTorch exports. */
  #plainNorm(name: string, x: string, weight: string): string {
    const squares = this.node("Pow", `${name}/Pow`, [x, this.scalar(2)]);
    const mean = this.node("ReduceMean", `${name}/ReduceMean`, [squares], { axes: [-1], keepdims: 1 });
    const root = this.node("Sqrt", `${name}/Sqrt`, [
      this.node("Add", `${name}/Add`, [mean, this.scalar(this.shape.rmsNormEps)]),
    ]);
    const inverse = this.node("Div", `${name}/Div`, [this.scalar(1), root]);
    const scaled = this.node("Mul", `${name}/Mul`, [x, inverse]);
    return this.node("Mul", `${name}/Mul_1`, [weight, scaled]);
  }

  /** The sum of a value and what is added to it, and the norm of the sum. */
  addNorm(name: string, x: string, added: string, weight: Float32Array): { normed: string; sum: string } {
    if (this.form.norms !== "skip") {
      const sum = this.node("Add", `${name}/residual/Add`, [x, added]);
      return { normed: this.norm(name, sum, weight), sum };
    }
    const weightName = this.floats(`${name.slice(1).replaceAll("/", ".")}.weight`, [weight.length], weight);
    const normed = `${name}/output_0`, sum = `${name}/output_3`;
    this.graph.nodes("SkipSimplifiedLayerNormalization", [x, added, weightName], [normed, "", "", sum], {
      name: `${name}/SkipLayerNorm`,
      domain: MICROSOFT,
      attributes: { epsilon: { float: this.shape.rmsNormEps } },
    });
    return { normed, sum };
  }

  /** The norm of each head by itself: `[..., head * headDim]`. */
  headNorm(name: string, x: string, weight: Float32Array): string {
    const { headDim } = this.shape;
    const heads = this.node("Reshape", `${name}/Reshape_1`, [x, this.integers([0, -1, headDim])]);
    const normed = this.norm(name, heads, weight);
    const size = name.endsWith("q_norm") ? this.shape.qHeadCount * headDim : this.shape.kvHeadCount * headDim;
    return this.node("Reshape", `${name}/Reshape_2`, [normed, this.integers([0, -1, size])]);
  }

  /** down(activation(gate(x)) * up(x)). */
  mlp(name: string, x: string, weights: LayerWeights): string {
    const { hiddenSize, intermediateSize, activation = "silu" } = this.shape;
    const gate = this.linear(`${name}/gate_proj`, x, weights.gateProj, intermediateSize);
    const up = this.linear(`${name}/up_proj`, x, weights.upProj, intermediateSize);
    const active = activation === "silu"
      ? this.node("Mul", `${name}/act_fn/Mul`, [gate, this.node("Sigmoid", `${name}/act_fn/Sigmoid`, [gate])])
      : this.node("FastGelu", `${name}/act_fn/FastGelu`, [gate], {}, MICROSOFT);
    const product = this.node("Mul", `${name}/Mul`, [active, up]);
    return this.linear(`${name}/down_proj`, product, weights.downProj, hiddenSize);
  }

  /** limit * tanh(x / limit). */
  softcapped(name: string, x: string, limit: number): string {
    const share = this.node("Div", `${name}/Div`, [x, this.scalar(limit)]);
    return this.node("Mul", `${name}/Mul`, [this.node("Tanh", `${name}/Tanh`, [share]), this.scalar(limit)]);
  }
}

/** Floats as elements of that type. */
export function elementsOf(values: Float32Array, type: "float32" | "float16"): ConstantData {
  return type === "float32" ? values : new Uint16Array(new Float16Array(values).buffer);
}

/** `[out][in]` as `[in][out]`. */
export function transposed(matrix: Float32Array, out: number): Float32Array {
  const inSize = matrix.length / out;
  const turned = new Float32Array(matrix.length);
  for (let o = 0; o < out; o++) for (let i = 0; i < inSize; i++) turned[i * out + o] = matrix[o * inSize + i]!;
  return turned;
}
