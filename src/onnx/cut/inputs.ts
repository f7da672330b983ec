/**
 * What a decoder is fed: by the names that exporters have for it, as `[1, tokens]` whatever axes the graph wants.
 *
 * @module
 */

import type { ModelInput } from "./cut_model.ts";
import type { Model } from "../model/model.ts";
import { type GraphNode, newNode } from "../model/node.ts";
import type { PiecePlan } from "./plan.ts";
import { cannotCut, nodeText } from "../model/refusal.ts";
import { ELEMENT } from "../model/tensor.ts";
import type { Values } from "../model/values.ts";

/** What inputs mean, by name. */
const ROLES: ReadonlyMap<string, ModelInput["role"]> = new Map([
  ["input_ids", "inputIds"],
  ["position_ids", "positionIds"],
]);

const TYPES: ReadonlyMap<number, ModelInput["type"]> = new Map([
  [ELEMENT.int64, "int64"],
  [ELEMENT.int32, "int32"],
]);

const TOKENS = [1, "tokens"];

/** The inputs of a decoder. */
export class Inputs {
  readonly #values: Values;
  readonly #fed = new Map<string, ModelInput>();
  readonly #nodes: GraphNode[] = [];
  readonly #reshaped = new Set<string>();
  #positions: string | undefined;
  #total: string | undefined;

  constructor(model: Model, values: Values) {
    this.#values = values;
    for (const [name, role] of ROLES) {
      const info = model.inputs.get(name);
      const type = TYPES.get(info?.type ?? 0);
      if (info === undefined || type === undefined) continue;
      const rank = info.dims?.length;
      if (rank === 1) {
        // A list of all tokens is what the batch of one is, without its first axis.
        const fed = values.fresh(`${name}:fed`);
        values.note({ name: fed, type: info.type, dims: TOKENS });
        const dims = values.fresh(`${name}:dims`);
        this.#push({ op: "Constant", inputs: [], outputs: [dims], ints: { value_ints: [-1] } });
        this.#push({ op: "Reshape", inputs: [fed, dims], outputs: [name] });
        this.#fed.set(fed, { name: fed, role, type });
        this.#reshaped.add(name);
      } else if (rank === undefined || rank === 2) this.#fed.set(name, { name, role, type });
    }
  }

  /** Nodes that stand before all others. */
  get nodes(): readonly GraphNode[] {
    return this.#nodes;
  }

  /** The positions of the tokens, int64 `[1, tokens]`: those of the model, or an input that the pieces have of their own. */
  positions(): string {
    if (this.#positions !== undefined) return this.#positions;
    let fed = [...this.#fed.values()].find(({ role }) => role === "positionIds");
    if (fed === undefined) {
      const name = this.#values.fresh("position_ids");
      this.#values.note({ name, type: ELEMENT.int64, dims: TOKENS });
      fed = { name, role: "positionIds", type: "int64" };
      this.#fed.set(name, fed);
    }
    this.#positions = fed.name;
    if (fed.type === "int64") return fed.name;
    this.#positions = this.#values.fresh(`${fed.name}:int64`);
    this.#push({ op: "Cast", inputs: [fed.name], outputs: [this.#positions], ints: { to: ELEMENT.int64 } });
    return this.#positions;
  }

  /** A value `[1, tokens]`. */
  tokens(): string {
    return [...this.#fed.values()].find(({ role }) => role === "inputIds")?.name ?? this.positions();
  }

  /** Is an input of the model fed, in whatever shape? */
  has(name: string): boolean {
    return this.#fed.has(name) || this.#reshaped.has(name);
  }

  /** The length of the longest sequence, past and new tokens: an int64 of no axis. */
  total(): string {
    this.#total ??= this.#values.fresh("total_sequence_length");
    this.#values.note({ name: this.#total, type: ELEMENT.int64, dims: [] });
    this.#fed.set(this.#total, { name: this.#total, role: "totalSequenceLength", type: "int64" });
    return this.#total;
  }

  /** The inputs that are left: what no piece takes, nobody has to feed. */
  of(plans: readonly PiecePlan[]): ModelInput[] {
    const given = new Set(plans.flatMap(({ gives, layer }) => layer === undefined ? gives : [...gives, layer.output]));
    const taken = new Set(plans.flatMap(({ takes }) => takes).filter((name) => !given.has(name)));
    for (const name of taken) if (!this.#fed.has(name)) throw this.#unknown(name, plans);
    return [...this.#fed.values()].filter(({ name }) => taken.has(name));
  }

  #unknown(name: string, plans: readonly PiecePlan[]): Error {
    const node = plans.flatMap(({ nodes }) => nodes).find(({ inputs, captured }) =>
      inputs.includes(name) || captured.includes(name)
    );
    const place = node === undefined ? "attention" : nodeText(node);
    const { dims = [] } = this.#values.info(name) ?? {};
    return cannotCut(
      `all that is left without attention must be fed ${[...ROLES.keys()].join(" and ")}, integers of 1 or 2 axes: ` +
        `${place} takes ${name} [${dims.join(", ")}]`,
    );
  }

  #push(node: Parameters<typeof newNode>[0]): void {
    const made = newNode(node);
    this.#values.add(made);
    this.#nodes.push(made);
  }
}
