/**
 * The names an object of options may have: a name that is misspelled, or that this version does not know, is refused.
 *
 * An option that is ignored looks like one that works. So whoever takes options lists their names, and says no to every
 * other one, whatever its value: `undefined` is what a misspelled name has before its value is chosen.
 *
 * @module
 */

import { KvError } from "../error.ts";
import { kindOf } from "./typed_array.ts";

/** The known names of one kind of options. */
export type OptionNames = ReadonlySet<string>;

/** Lists the names of an interface, each of them: a missing or superfluous one fails the type check. */
export function optionNames<Options extends object>(names: Readonly<Record<keyof Options, true>>): OptionNames {
  return new Set(Object.keys(names));
}

/** Options left out; shared, so that a call without them allocates none. */
const NONE = Object.freeze({});

/** The options of a call that can do without, their names checked; `action` begins the text of a refusal. */
export function givenOptions<Options extends object>(
  options: Options | undefined,
  known: OptionNames,
  action: string,
): Partial<Options> {
  if (options === undefined) return NONE;
  checkOptions(options, known, action);
  return options;
}

/**
 * Refuses what is no object, and an object with an unknown name; its values are not looked at.
 *
 * Names that it inherits count, as their values would, but for those that every object has. Symbols are no names. To be
 * called before the values are read, because a `Proxy` runs the caller's code at either.
 */
export function checkOptions(
  options: unknown,
  known: OptionNames,
  action: string,
  path: string = "",
): asserts options is object {
  // Arrays have as many names as elements, which may be very many.
  if (typeof options !== "object" || options === null || ArrayBuffer.isView(options) || Array.isArray(options)) {
    throw new TypeError(`Cannot ${action} as ${path || "its options"} must be an object: it is ${kindOf(options)}`);
  }
  for (const name in options) {
    if (!known.has(name)) refuseUnknown(options, name, known, action, path);
  }
}

/** Refuses an unknown name, unless every object of the program has it. */
function refuseUnknown(options: object, name: string, known: OptionNames, action: string, path: string): void {
  if (name in Object.prototype && !Object.hasOwn(options, name)) return;
  const place = path === "" ? "" : `${path}.`;
  const nearest = nearestName(name, known);
  const advice = nearest === undefined ? `known are ${[...known].join(", ")}` : `did you mean ${place}${nearest}?`;
  throw new KvError("invalid_config", `Cannot ${action} as there is no option ${place}${shownName(name)}: ${advice}`);
}

/** No name of ours is half as long; a longer one is neither compared nor shown whole. */
const NAME_LENGTH_MAX = 64;

/** A name as a text shows it: plain where it could stand in a program, else quoted. */
function shownName(name: string): string {
  const shown = name.length > NAME_LENGTH_MAX ? `${name.slice(0, NAME_LENGTH_MAX)}...` : name;
  return /^[\w$.]+$/.test(shown) ? shown : JSON.stringify(shown);
}

/** Names less alike than this are no slip of each other. */
const LIKENESS_MIN = 0.45;

/** The known name that was most likely meant. */
function nearestName(name: string, known: OptionNames): string | undefined {
  if (name.length > NAME_LENGTH_MAX) return undefined;
  let nearest: string | undefined;
  let best = LIKENESS_MIN;
  for (const candidate of known) {
    const likeness = likenessOf(name, candidate);
    if (likeness <= best) continue;
    best = likeness;
    nearest = candidate;
  }
  return nearest;
}

/**
 * How alike two names are, 0 to 1, without regard to case and underscores.
 *
 * The larger of two measures: the share of equal letters after the fewest edits, which sees a slip (`dytpe`), and the
 * share of pairs of letters they have in common, which sees a part of a name (`scale` in `softmaxScale`).
 */
function likenessOf(one: string, other: string): number {
  const a = one.toLowerCase().replaceAll("_", ""), b = other.toLowerCase().replaceAll("_", "");
  const longer = Math.max(a.length, b.length);
  if (longer === 0) return 0;
  return Math.max(1 - editCount(a, b) / longer, commonPairs(a, b));
}

/** The fewest letters to insert, delete or replace that make `b` of `a` (Levenshtein's distance). */
function editCount(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 0; i < a.length; i++) {
    const next = [i + 1];
    for (let j = 0; j < b.length; j++) {
      const replaced = row[j]! + Number(a[i] !== b[j]);
      next.push(Math.min(replaced, row[j + 1]! + 1, next[j]! + 1));
    }
    row = next;
  }
  return row.at(-1)!;
}

/** The share of adjacent pairs of letters that both have (Dice's coefficient). */
function commonPairs(a: string, b: string): number {
  const pairsOf = (text: string) =>
    Array.from({ length: Math.max(0, text.length - 1) }, (_, i) => text.slice(i, i + 2));
  const pairs = pairsOf(a), others = pairsOf(b);
  if (pairs.length + others.length === 0) return 0;
  const left = [...others];
  const common = pairs.filter((pair) => {
    const at = left.indexOf(pair);
    if (at >= 0) left.splice(at, 1);
    return at >= 0;
  });
  return 2 * common.length / (pairs.length + others.length);
}
