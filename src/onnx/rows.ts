/**
 * The nodes that stand around attention: what makes rows of a value, f32 `[1, tokens, width]`, and a value of rows.
 *
 * @module
 */

import { type GraphNode, type NewNode, newNode } from "./node.ts";
import { ELEMENT } from "./tensor.ts";
import type { Values } from "./values.ts";

/** A chain of new nodes: each call adds one and gives the name of its output. */
export class Chain {
  readonly nodes: GraphNode[] = [];
  readonly #values: Values;

  constructor(values: Values) {
    this.#values = values;
  }

  /** Adds a node whose one output is called after `name`. */
  add(name: string, node: Omit<NewNode, "outputs">): string {
    const output = this.#values.fresh(name);
    const added = newNode({ ...node, outputs: [output] });
    this.#values.add(added);
    this.nodes.push(added);
    return output;
  }

  /** The value in f32. */
  toFloat32(name: string): string {
    const type = this.#values.type(name);
    if (type === ELEMENT.float32) return name;
    return this.add(`${name}:f32`, { op: "Cast", inputs: [name], ints: { to: ELEMENT.float32 } });
  }

  /** The f32 value to be fed, of which these nodes make `name` in its own type: itself where that is f32. */
  fromFloat32(name: string): string {
    const type = this.#values.type(name);
    if (type === ELEMENT.float32) return name;
    const fed = this.#values.fresh(`${name}:f32`);
    this.#values.note({ name: fed, type: ELEMENT.float32 });
    this.nodes.push(newNode({ op: "Cast", inputs: [fed], outputs: [name], ints: { to: type } }));
    return fed;
  }
}
