/**
 * Cuts a decoder at its attention: onnxruntime runs the pieces, kvern what is between them.
 *
 *     piece 0 -> q, k, v -> layer 0 -> piece 1 -> q, k, v -> layer 1 -> ... -> piece n -> logits
 *
 * @module
 */

import type { CutModel, ModelInput } from "./cut_model.ts";
import type { Surroundings, TakenApart } from "./form.ts";
import { fingerprintOf, type ModelFiles } from "./fingerprint.ts";
import { takeGroupQuery } from "./group_query.ts";
import { type Model, readModel } from "./model.ts";
import type { GraphNode } from "./node.ts";
import { crossing, isNarrow, writePiece } from "./piece.ts";
import { type Line, type PiecePlan, planPieces } from "./plan.ts";
import { cannotCut, nodeText } from "./refusal.ts";
import { ELEMENT } from "./tensor.ts";
import { Values } from "./values.ts";

/** The forms of attention, by domain and operator. */
const FORMS: ReadonlyMap<string, (node: GraphNode, around: Surroundings) => TakenApart> = new Map([
  ["com.microsoft GroupQueryAttention", takeGroupQuery],
]);

/** Cuts the model in `source`: its bytes, the path of its file, or that of a folder with one. */
export function cutModel(source: string | Uint8Array): CutModel {
  const model = readModel(source);
  try {
    const values = new Values(model);
    const line = takeApart(model, values);
    const logits = logitsOf(model, line);
    const plans = planPieces(line, logits, values);
    const inputs = inputsOf(plans, model, values);
    const pieces = plans.map((plan, i) => writePiece(plan, i, model, values));
    const { folder } = model;
    let fingerprint: string | undefined;
    return {
      pieces,
      inputs,
      logits: isNarrow(values.type(logits)) ? crossing(logits) : logits,
      ...(folder === undefined ? {} : { folder }),
      get fingerprint() {
        return fingerprint ??= fingerprintOf(filesOf(source, model));
      },
    };
  } finally {
    model.bytes.close();
  }
}

/** Where the model and its weights lie: the fingerprint reads them all, at its first use. */
function filesOf(source: string | Uint8Array, { folder, file, weights }: Model): ModelFiles {
  const outside = new Set([...weights.values()].flatMap(({ place }) => place?.file ?? []));
  const files = [...file === undefined ? [] : [file], ...[...outside].sort()];
  return {
    files,
    ...(typeof source === "string" ? {} : { bytes: source }),
    ...(folder === undefined ? {} : { folder }),
  };
}

/** The nodes of the graph with every attention taken apart. */
function takeApart(model: Model, values: Values): Line {
  const around = { values, positions: () => positionsOf(model, values) };
  const line = model.nodes.flatMap((node) => {
    const inner = node.innerOps.find((op) => /Attention$/.test(op));
    if (inner !== undefined) {
      throw cannotCut(`attention must lie in the graph itself: ${nodeText(node)} has ${inner} in a body of its own`);
    }
    const take = FORMS.get(`${node.domain} ${node.op}`);
    if (take === undefined) return [node];
    const { before, layer, after } = take(node, around);
    return [...before, { layer }, ...after];
  });
  if (!line.some((each) => "layer" in each)) {
    throw cannotCut("it must have attention of a known form: no node is GroupQueryAttention");
  }
  return line;
}

/** The positions of the tokens: those of the model, or an input that the pieces have of their own. */
function positionsOf(model: Model, values: Values): string {
  if (!model.inputs.has(POSITIONS)) values.note({ name: POSITIONS, type: ELEMENT.int64, dims: [1, "tokens"] });
  return POSITIONS;
}

const POSITIONS = "position_ids";

/** The output that is no key and no value. */
function logitsOf(model: Model, line: Line): string {
  const given = new Set(line.flatMap((each) => "layer" in each ? [] : each.outputs));
  const outputs = [...model.outputs.keys()].filter((name) => given.has(name));
  const logits = outputs.length === 1 ? outputs[0] : outputs.find((name) => name === "logits");
  if (logits !== undefined) return logits;
  throw cannotCut(
    `it must give logits: of its outputs, ${outputs.length === 0 ? "none" : outputs.join(", ")} could be them`,
  );
}

/** What each input of a decoder means, by the names that exporters have for it. */
const ROLES: ReadonlyMap<string, ModelInput["role"]> = new Map([
  ["input_ids", "inputIds"],
  [POSITIONS, "positionIds"],
]);

const TYPES: ReadonlyMap<number, ModelInput["type"]> = new Map([
  [ELEMENT.int64, "int64"],
  [ELEMENT.int32, "int32"],
]);

/** The inputs that are left: what no piece takes, nobody has to feed. */
function inputsOf(plans: readonly PiecePlan[], model: Model, values: Values): ModelInput[] {
  const taken = new Set(plans.flatMap(({ takes }) => takes));
  return [...new Set([...model.inputs.keys(), POSITIONS])].filter((name) => taken.has(name)).map((name) => {
    const role = ROLES.get(name);
    const type = TYPES.get(values.type(name));
    if (role === undefined || type === undefined) {
      const node = plans.flatMap(({ nodes }) => nodes).find(({ inputs }) => inputs.includes(name));
      throw cannotCut(
        `the inputs of what is left must be ${[...ROLES.keys()].join(" and ")}, of integers: ` +
          `${node === undefined ? "attention" : nodeText(node)} takes ${name}`,
      );
    }
    return { name, role, type };
  });
}
