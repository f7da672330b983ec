/**
 * Cuts a decoder at its attention: onnxruntime runs the pieces, kvern what is between them.
 *
 *     piece 0 -> q, k, v -> layer 0 -> piece 1 -> q, k, v -> layer 1 -> ... -> piece n -> logits
 *
 * @module
 */

import type { CutModel } from "./cut_model.ts";
import type { Surroundings, TakenApart } from "../forms/form.ts";
import { fingerprintOf } from "../model/fingerprint.ts";
import { takeGroupQuery } from "../forms/group_query.ts";
import { Inputs } from "./inputs.ts";
import { withoutLengths } from "./lengths.ts";
import { findLogits } from "./logits.ts";
import { Masks } from "../forms/mask.ts";
import { checkMixing } from "./mixing.ts";
import { type Model, readModel } from "../model/model.ts";
import type { GraphNode } from "../model/node.ts";
import { takeMultiHead } from "../forms/multi_head.ts";
import { takePaged } from "../forms/paged_attention.ts";
import { crossing, isNarrow, writePiece } from "./piece.ts";
import { takePlain } from "../forms/plain_attention.ts";
import { type Line, planPieces } from "./plan.ts";
import { cannotCut, nodeText } from "../model/refusal.ts";
import { takeStandard } from "../forms/standard_attention.ts";
import { Values } from "../model/values.ts";

/** The forms of attention, by domain and operator. */
const FORMS: ReadonlyMap<string, (node: GraphNode, around: Surroundings) => TakenApart | undefined> = new Map([
  ["com.microsoft GroupQueryAttention", takeGroupQuery],
  ["com.microsoft PagedAttention", takePaged],
  ["com.microsoft MultiHeadAttention", takeMultiHead],
  [" Attention", takeStandard],
  [" MatMul", takePlain],
]);

/** Cuts the model in `source`: its bytes, the path of its file, or that of a folder with one. */
export function cutModel(source: string | Uint8Array): CutModel {
  const model = readModel(source);
  try {
    const values = new Values(model);
    const inputs = new Inputs(model, values);
    const attended = takeApart(model, {
      model,
      values,
      masks: new Masks(model, values),
      positions: () => inputs.positions(),
    });
    const { line, logits } = findLogits(model, attended, values);
    const even = withoutLengths(line, logits, inputs, model, values);
    const plans = planPieces([...inputs.nodes, ...even], logits, values);
    checkMixing(plans, values);
    const pieces = plans.map((plan, i) => writePiece(plan, i, model, values));
    const { files } = model;
    let fingerprint: string | undefined;
    return {
      pieces,
      inputs: inputs.of(plans),
      logits: isNarrow(values.type(logits)) ? crossing(logits) : logits,
      ...(files === undefined ? {} : { folder: files.folder }),
      get fingerprint() {
        return fingerprint ??= fingerprintOf(typeof source === "string" ? files! : source);
      },
    };
  } finally {
    model.bytes.close();
  }
}

/** The nodes of the graph with every attention taken apart. */
function takeApart(model: Model, around: Surroundings): Line {
  const line = model.nodes.flatMap((node) => {
    const inner = node.innerOps.find((op) => /Attention$|^Softmax$/.test(op));
    if (inner !== undefined) {
      throw cannotCut(
        `attention must lie in the graph itself: ${nodeText(node)} has ${inner} in a body of its own; ` +
          "export the decoder with its past alone, not merged with the one without",
      );
    }
    const taken = FORMS.get(`${node.domain} ${node.op}`)?.(node, around);
    if (taken === undefined) return [node];
    const { before, layer, after } = taken;
    return [...before, { layer }, ...after];
  });
  if (line.some((each) => "layer" in each)) return line;
  throw cannotCut(
    "it must have attention: no node is GroupQueryAttention, PagedAttention, MultiHeadAttention or Attention, and no " +
      "product of a softmax with values that are joined to a past [batch, heads, past, head_dim]",
  );
}
