/**
 * Inputs of a decoder for lengths of our choice: what a run would be fed behind a past of so many tokens.
 *
 * @module
 */

import { fill, type Known } from "./array.ts";
import type { Model, ValueInfo } from "../model/model.ts";
import { ELEMENT } from "../model/tensor.ts";

/** Lengths of a run. */
export interface Lengths {
  /** Tokens of the past. */
  readonly past: number;
  /** Tokens of the run. */
  readonly tokens: number;
}

/** The inputs of a run, by name; those whose meaning is not known are left out. */
export function inputsFor(model: Model, lengths: Lengths): Map<string, Known> {
  const inputs = new Map<string, Known>();
  for (const info of model.inputs.values()) {
    const known = inputFor(info, lengths);
    if (known !== undefined) inputs.set(info.name, known);
  }
  return inputs;
}

function inputFor(info: ValueInfo, { past, tokens }: Lengths): Known | undefined {
  const { name, type, dims } = info;
  if (isPast(info)) return { type, dims: [1, dims![1] as number, past, dims![3] as number] };
  const rank = dims?.length ?? 2;
  const line = (length: number, element: (i: number) => number): Known => {
    const wanted = [...Array<number>(Math.max(0, rank - 1)).fill(1), length];
    return { type, dims: wanted, values: fill(wanted, element) };
  };
  const number = (value: number): Known => ({ type, dims: Array<number>(dims?.length ?? 0).fill(1), values: [value] });
  switch (name) {
    case "input_ids":
      return { type, dims: rank === 1 ? [tokens] : [1, tokens] };
    case "position_ids":
    case "cache_position":
      return line(tokens, (i) => past + i);
    case "attention_mask":
      return line(past + tokens, () => 1);
    case "past_sequence_length":
      return number(past);
    case "total_sequence_length":
      return number(past + tokens);
    case "num_logits_to_keep": // 0 keeps those of all tokens
    case "logits_to_keep":
      return number(0);
    default:
      return undefined;
  }
}

/** Is an input a layer's past keys or values, `[batch, kv_head, past, head_dim]`? */
export function isPast({ type, dims }: ValueInfo): boolean {
  return dims?.length === 4 && typeof dims[1] === "number" && typeof dims[2] === "string" &&
    typeof dims[3] === "number" && dims[1] > 0 && dims[3] > 0 && isFloat(type);
}

function isFloat(type: number): boolean {
  return type === ELEMENT.float32 || type === ELEMENT.float16 || type === ELEMENT.bfloat16;
}
