/** Reading a command line by a table of options: what is the same whatever the options are. */
import { parseArgs } from "node:util";

/** A wrong command line; the message is one line. */
export class UsageError extends Error {
  override name = "UsageError";
}

/** An option as the reader and the help text know it. */
export interface ArgumentRow {
  /** What stands for the value in the help text; an option without it is a switch. */
  readonly value?: string;
  /** Whether the value may be the empty text. */
  readonly mayBeEmpty?: boolean;
  readonly help: string;
}

/** A line of the help text for each option. */
export function helpLines(table: Readonly<Record<string, ArgumentRow>>): string {
  return Object.entries(table).map(([name, { value = "", help }]) => `  --${`${name} ${value}`.padEnd(16)} ${help}`)
    .join("\n");
}

/** The given options with their values, "" for a switch; each at most once. A wrong one is a UsageError. */
export function readArguments<Name extends string>(
  args: string[],
  table: Readonly<Record<Name, ArgumentRow>>,
): Map<Name, string> | "help" {
  const rows: [string, ArgumentRow][] = Object.entries(table);
  const isKnown = (name: string): name is Name => Object.hasOwn(table, name);
  const { tokens } = parseArgs({
    args,
    options: Object.fromEntries(rows.map(([name, { value }]) => [name, { type: value ? "string" : "boolean" }])),
    // Not strict, so that the messages are the same ones in every runtime.
    strict: false,
    allowPositionals: true,
    tokens: true,
  });

  const given = new Map<Name, string>();
  for (const token of tokens) {
    if (token.kind === "option-terminator") continue;
    if (token.kind === "positional") throw new UsageError(`unexpected argument ${JSON.stringify(token.value)}`);
    const { name, rawName, value, inlineValue } = token;
    if (rawName === "-h") return "help";
    if (!isKnown(name) || !rawName.startsWith("--")) throw new UsageError(unknownText(rawName, Object.keys(table)));
    if (given.has(name)) throw new UsageError(`--${name} is given twice`);
    const row: ArgumentRow = table[name];
    if (row.value === undefined && value !== undefined) throw new UsageError(`--${name} takes no value`);
    const missing = value === undefined || (value === "" && !row.mayBeEmpty);
    if (row.value !== undefined && (missing || (!inlineValue && value.startsWith("--")))) {
      throw new UsageError(`--${name} needs a value: --${name}=${row.value}`);
    }
    given.set(name, value ?? "");
  }
  return [...given.keys()].some((name) => name === "help") ? "help" : given;
}

/** An option nobody knows, with those whose names begin like it, or else with the one whose name comes nearest. */
function unknownText(rawName: string, known: readonly string[]): string {
  const name = rawName.replace(/^-+(no-)?/, "").toLowerCase(), start = name.slice(0, 3);
  let alike = known.filter((option) => start !== "" && option.startsWith(start));
  if (alike.length === 0) {
    const lettersApart = Math.floor(name.length / 3); // a third of a name may be wrong
    alike = known.filter((option) => distanceOf(name, option) <= lettersApart).slice(0, 1);
  }
  const names = alike.map((option) => `--${option}`).join(", ");
  return `unknown option ${rawName}: ${names === "" ? "--help lists them all" : `there is ${names}`}`;
}

/** Letters to add, drop or replace to make one word of another (Levenshtein's distance). */
function distanceOf(from: string, to: string): number {
  let row = Array.from({ length: to.length + 1 }, (_, j) => j);
  for (const [i, letter] of [...from].entries()) {
    const next = [i + 1];
    for (let j = 0; j < to.length; j++) {
      next.push(Math.min(row[j]! + (letter === to[j] ? 0 : 1), row[j + 1]! + 1, next[j]! + 1));
    }
    row = next;
  }
  return row.at(-1)!;
}

/** The choice that was made of several. */
export function choice<Choice extends string>(name: string, text: string, choices: readonly Choice[]): Choice {
  const chosen = choices.find((candidate) => candidate === text);
  if (chosen === undefined) {
    throw new UsageError(`--${name} must be one of ${choices.join(", ")}, not ${JSON.stringify(text)}`);
  }
  return chosen;
}

/** An integer from min to max; null where the option is not given. */
export function integer(name: string, text: string | undefined, min: number, max: number = 2 ** 32 - 1): number | null {
  if (text === undefined) return null;
  const value = Number(text);
  if (!/^[0-9]+$/.test(text) || value < min || value > max) {
    throw new UsageError(`--${name} must be an integer from ${min} to ${max}, not ${JSON.stringify(text)}`);
  }
  return value;
}

/** A number from 0 up; null where the option is not given. */
export function temperature(name: string, text: string | undefined): number | null {
  if (text === undefined) return null;
  const value = Number(text);
  if (!/^[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?$/.test(text) || !Number.isFinite(value)) {
    throw new UsageError(`--${name} must be a number from 0 up, not ${JSON.stringify(text)}`);
  }
  return value;
}
