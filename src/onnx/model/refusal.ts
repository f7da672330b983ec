/**
 * Refusals of a model: every one says what about it cannot be, and what would work instead.
 *
 * @module
 */

import { KvError } from "../../error.ts";

/** A model that is whole, and that kvern cannot run. */
export function cannotCut(rule: string): KvError {
  return new KvError("unsupported", `Cannot cut the model as ${rule}`);
}

/** Bytes that are no model. */
export function damaged(rule: string): KvError {
  return new KvError("invalid_config", `Cannot read the model as ${rule}`);
}

/** A node in the text of an error: its name where it has one, or the value it gives. */
export function nodeText(node: { readonly name: string; readonly op: string; readonly outputs: readonly string[] }) {
  return `node ${node.name === "" ? `of ${node.outputs[0] ?? "nothing"}` : node.name} (${node.op})`;
}
