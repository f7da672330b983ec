/**
 * Why a prompt starts where it does.
 *
 * @module
 */

import { fieldsOf, nameOf, newRecord, valuesOf } from "../ffi/record.ts";
import { type DType, dtypeOf } from "../options/dtype.ts";

/**
 * Why no more of a prompt is found.
 *
 * - `whole`: all of it was found, and the last token is left to compute.
 * - `differs`: another token stands there; `differs` tells which.
 * - `not_stored`: nobody committed more of these tokens, or not with the same salt.
 * - `window_passed`: a layer with a window, or under retention, has given up rows that it needs there.
 * - `quantized`: rows are quantized from there on, and the cache starts from floats alone.
 * - `evicted`: the rows were there, and had to go.
 * - `other_fingerprint`: they are there for another fingerprint of this salt.
 */
export type PrefixReason =
  | "whole"
  | "differs"
  | "not_stored"
  | "window_passed"
  | "quantized"
  | "evicted"
  | "other_fingerprint";

/** What a prompt would start with, and why with no more; plain data. */
export interface PrefixExplanation {
  /** Tokens with whose rows a sequence would start. */
  readonly startsAt: number;
  /** Tokens that are known from the first on; more than `startsAt` where rows of theirs cannot be used. */
  readonly knownTokens: number;
  /** Why it does not start later. */
  readonly reason: PrefixReason;
  /** Where another token stands, and which; undefined unless `reason` is `differs`. */
  readonly differs: { readonly at: number; readonly id: number } | undefined;
  /** The formats of the rows, in the order in which they occur. */
  readonly formats: readonly { readonly k: DType; readonly v: DType }[];
}

/** A record for an explanation. */
export function newExplanation(): Uint32Array {
  return newRecord("explanation");
}

/** What an ExplanationRecord says. */
export function explanationOf(record: Uint32Array): PrefixExplanation {
  const { tokenCount, knownCount, reason, hasOtherToken, otherToken, formatCount } = valuesOf("explanation", record);
  const keys = record.subarray(fieldsOf("explanation").dtypeK),
    values = record.subarray(fieldsOf("explanation").dtypeV);
  return {
    startsAt: tokenCount,
    knownTokens: knownCount,
    reason: nameOf("prefixReason", reason),
    differs: hasOtherToken === 0 ? undefined : { at: knownCount, id: otherToken },
    formats: Array.from({ length: formatCount }, (_, i) => ({ k: dtypeOf(keys[i]!), v: dtypeOf(values[i]!) })),
  };
}
