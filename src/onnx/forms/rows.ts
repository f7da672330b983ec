/**
 * The nodes that stand around attention: what makes rows of a value, f32 `[1, tokens, width]`, and a value of rows.
 *
 * @module
 */

import { type GraphNode, type NewNode, newNode } from "../model/node.ts";
import { ELEMENT } from "../model/tensor.ts";
import type { Values } from "../model/values.ts";

/**
 * How the heads of all tokens lie in a value.
 *
 * | layout | axes |
 * | --- | --- |
 * | rows | `[1, tokens, heads * head_dim]` |
 * | flat | `[tokens, heads * head_dim]` |
 * | token_major | `[1, tokens, heads, head_dim]` |
 * | head_major | `[1, heads, tokens, head_dim]` |
 */
export type Layout = "rows" | "flat" | "token_major" | "head_major";

/** Heads of every token, and elements of each. */
export interface Heads {
  readonly headCount: number;
  readonly headDim: number;
}

/** From head-major to token-major, and back. */
const TURNED = [0, 2, 1, 3];

/** A chain of new nodes: each call adds one and gives the name of its output. */
export class Chain {
  readonly nodes: GraphNode[] = [];
  readonly #values: Values;

  constructor(values: Values) {
    this.#values = values;
  }

  /** Adds a node whose one output is called after `name`. */
  add(name: string, node: Omit<NewNode, "outputs">): string {
    return this.addAll([name], node)[0]!;
  }

  /** Adds a node whose outputs are called after `names`. */
  addAll(names: readonly string[], node: Omit<NewNode, "outputs">): string[] {
    const outputs = names.map((name) => this.#values.fresh(name));
    this.#push(newNode({ ...node, outputs }));
    return outputs;
  }

  /** A constant list of integers. */
  ints(name: string, values: readonly number[]): string {
    return this.add(name, { op: "Constant", inputs: [], ints: { value_ints: values } });
  }

  /** The value with other axes. */
  reshaped(name: string, kind: string, dims: readonly number[]): string {
    return this.add(`${name}:${kind}`, { op: "Reshape", inputs: [name, this.ints(`${name}:${kind}:dims`, dims)] });
  }

  /** Parts of the value along an axis, of these sizes. */
  parts(name: string, kinds: readonly string[], axis: number, sizes: readonly number[]): string[] {
    const inputs = [name, this.ints(`${name}:sizes`, sizes)];
    return this.addAll(kinds.map((kind) => `${name}:${kind}`), { op: "Split", inputs, ints: { axis } });
  }

  /** The value in f32. */
  toFloat32(name: string): string {
    if (this.#values.type(name) === ELEMENT.float32) return name;
    return this.add(`${name}:f32`, { op: "Cast", inputs: [name], ints: { to: ELEMENT.float32 } });
  }

  /** The value as rows. */
  toRows(name: string, layout: Layout, { headCount, headDim }: Heads): string {
    if (layout === "rows") return name;
    const tokenMajor = layout === "head_major"
      ? this.add(`${name}:token_major`, { op: "Transpose", inputs: [name], ints: { perm: TURNED } })
      : name;
    return this.reshaped(tokenMajor, "rows", [1, -1, headCount * headDim]);
  }

  /** The f32 rows to be fed, of which these nodes make `name`, in its own type and layout. */
  fromRows(name: string, layout: Layout, { headCount, headDim }: Heads): string {
    const type = this.#values.type(name);
    const dims = [1, "tokens", headCount * headDim];
    if (type === ELEMENT.float32 && layout === "rows") {
      if (this.#values.info(name) === undefined) this.#values.note({ name, type, dims });
      return name;
    }
    const fed = this.#values.fresh(`${name}:fed`);
    this.#values.note({ name: fed, type: ELEMENT.float32, dims });
    const axes = {
      flat: [-1, headCount * headDim],
      token_major: [1, -1, headCount, headDim],
      head_major: [1, -1, headCount, headDim],
    };
    let at = fed;
    // The last of the nodes gives the value under its own name.
    const last = layout === "rows" ? "Cast" : layout === "head_major" ? "Transpose" : "Reshape";
    if (type !== ELEMENT.float32) {
      const cast = { op: "Cast", inputs: [at], ints: { to: type } };
      at = last === "Cast" ? this.#give(name, cast) : this.add(`${name}:cast`, cast);
    }
    if (layout === "rows") return fed;
    const reshape = { op: "Reshape", inputs: [at, this.ints(`${name}:dims`, axes[layout])] };
    at = last === "Reshape" ? this.#give(name, reshape) : this.add(`${name}:token_major`, reshape);
    if (last === "Transpose") this.#give(name, { op: "Transpose", inputs: [at], ints: { perm: TURNED } });
    return fed;
  }

  /** Gives `name` as an integer value with other axes, in another type. */
  giveAs(name: string, from: string, dims: readonly number[], type: number): void {
    if (type === ELEMENT.int64) {
      this.#give(name, { op: "Reshape", inputs: [from, this.ints(`${name}:dims`, dims)] });
    } else {
      this.#give(name, { op: "Cast", inputs: [this.reshaped(from, `${name}:axes`, dims)], ints: { to: type } });
    }
  }

  /** Gives `name` as a whole number that is the same in every run. */
  giveNumber(name: string, value: number, dims: readonly number[], type: number): void {
    this.giveAs(name, this.ints(`${name}:number`, [value]), dims, type);
  }

  #give(name: string, node: Omit<NewNode, "outputs">): string {
    this.#push(newNode({ ...node, outputs: [name] }));
    return name;
  }

  #push(node: GraphNode): void {
    this.#values.add(node);
    this.nodes.push(node);
  }
}
