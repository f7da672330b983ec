/**
 * What a graph makes of the lengths of its past and of its values, where it is wanted without attention: positions of
 * tokens, and shapes.
 *
 * The sequences of a run have pasts of different lengths, and the graph knows one. A value that is the positions of the
 * tokens in every run is fed as such; numbers that are the same in every run, or the number of its tokens, are made of
 * nothing else; and the length of all is the largest, where it is but the end of a table. Anything else that a past says
 * is refused with the node that wants it. Shapes of values become shapes of tokens, so that none crosses a border.
 *
 * @module
 */

import type { Known } from "../evaluate/array.ts";
import { Evaluation } from "../evaluate/evaluate.ts";
import type { Inputs } from "./inputs.ts";
import type { Model } from "../model/model.ts";
import type { GraphNode } from "../model/node.ts";
import type { Line } from "./plan.ts";
import { Chain } from "../forms/rows.ts";
import type { Lengths } from "../evaluate/scenario.ts";
import { ELEMENT } from "../model/tensor.ts";
import type { Values } from "../model/values.ts";

/** Runs that a value is looked at in: no two have a length in common. */
const RUNS: readonly Lengths[] = [
  { past: 3, tokens: 2 },
  { past: 0, tokens: 5 },
  { past: 11, tokens: 4 },
  { past: 6, tokens: 1 },
];

/** The line with values in place of lengths, wherever `logits` or a layer wants one. */
export function withoutLengths(line: Line, logits: string, inputs: Inputs, model: Model, values: Values): Line {
  const runs = RUNS.map((lengths) => ({ lengths, evaluation: new Evaluation(model, values, lengths) }));
  const depends = dependents(line, model, inputs);
  const chain = new Chain(values);
  const replaced = new Set<string>();
  const seen = new Set<string>();
  const stack: { name: string; user?: GraphNode; index: number }[] = [{ name: logits, index: 0 }];
  for (const each of line) {
    if (!("layer" in each)) continue;
    for (const name of [each.layer.q, each.layer.k, each.layer.v]) stack.push({ name, index: 0 });
  }
  while (stack.length > 0) {
    const { name, user, index } = stack.pop()!;
    if (seen.has(name) || !depends.has(name)) continue;
    const isEnd = user?.op === "Slice" && user.domain === "" && index === 2;
    if (replace(name, isEnd)) {
      replaced.add(name);
      seen.add(name);
      continue;
    }
    // An end of a table may be another's start, which is refused when it is met as one.
    if (!isEnd) seen.add(name);
    const node = values.producer(name);
    if (node === undefined) continue; // an input, which is refused where the inputs are counted
    for (const [i, input] of [...node.inputs, ...node.captured].entries()) {
      stack.push({ name: input, user: node, index: i });
    }
  }
  if (replaced.size === 0) return line;
  const rest = line.filter((each) => "layer" in each || !each.outputs.some((output) => replaced.has(output)));
  return [...chain.nodes, ...rest];

  function replace(name: string, isEnd: boolean): boolean {
    if ((values.producer(name)?.outputs.length ?? 1) !== 1) return false;
    const found = runs.map(({ evaluation, lengths }) => ({ known: evaluation.of(name), lengths }));
    if (!found.every(({ known }) => known?.values !== undefined)) return false;
    const results = found as readonly Result[];
    const { type } = results[0]!.known;
    const one = (expected: (lengths: Lengths) => number) =>
      results.every(({ known, lengths }) => known.values!.length === 1 && known.values![0] === expected(lengths));
    const { known: { dims, values: [first] } } = results[0] as Result & { known: { values: readonly number[] } };
    if (isPositions(results)) {
      const open = results[1]!.known.dims.map((dim, axis) => dim === dims[axis] ? dim : -1);
      chain.giveAs(name, inputs.positions(), open, type);
    } else if (Number.isSafeInteger(first) && one(() => first!)) chain.giveNumber(name, first!, dims, type);
    else if (isShape(results)) {
      const parts = results[0]!.known.values;
      const length = chain.add(`${name}:tokens`, { op: "Shape", inputs: [inputs.tokens()], ints: { start: 1 } });
      const list = Array.from(
        parts,
        (part, i) => part === results[1]!.known.values[i] ? chain.ints(`${name}:${i}`, [part]) : length,
      );
      const all = list.length === 1
        ? list[0]!
        : chain.add(`${name}:list`, { op: "Concat", inputs: list, ints: { axis: 0 } });
      chain.giveAs(name, all, dims, type);
    } else if (isEnd && one(({ past, tokens }) => past + tokens)) chain.giveAs(name, inputs.total(), dims, type);
    else return false;
    return true;
  }
}

/** A value in one run. */
interface Result {
  readonly known: Known & { readonly values: NonNullable<Known["values"]> };
  readonly lengths: Lengths;
}

/** Are these the positions of the tokens of each run? */
function isPositions(results: readonly Result[]): boolean {
  return results.every(({ known: { type, values, dims }, lengths: { past, tokens } }) =>
    type !== ELEMENT.bool && values.length === tokens && Math.max(...dims) === tokens &&
    Array.from(values).every((value, i) => value === past + i)
  );
}

/** Most axes of a shape. */
const AXES_MAX = 8;

/** Is this a list of numbers that are the same in every run, or the number of its tokens? */
function isShape(results: readonly Result[]): boolean {
  const { values: first, dims } = results[0]!.known;
  return dims.length <= 1 && first.length <= AXES_MAX &&
    results.every(({ known: { values, type }, lengths }) =>
      type === ELEMENT.int64 && values.length === first.length &&
      Array.from(values).every((value, i) =>
        Number.isSafeInteger(value) && (value === lengths.tokens || value === first[i])
      )
    );
}

/** Values that depend on inputs other than tokens and their positions, or are lengths of what is no input. */
function dependents(line: Line, model: Model, inputs: Inputs): ReadonlySet<string> {
  const depends = new Set([...model.inputs.keys()].filter((name) => !inputs.has(name)));
  for (const each of line) {
    if ("layer" in each) continue;
    const isLength = each.op === "Shape" && !inputs.has(each.inputs[0] ?? "");
    if (!isLength && ![...each.inputs, ...each.captured].some((input) => depends.has(input))) continue;
    for (const output of each.outputs) depends.add(output);
  }
  return depends;
}
