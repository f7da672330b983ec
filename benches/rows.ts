/**
 * The rows of a bench: chosen on the command line, timed, printed.
 *
 * A row is timed by mitata's `measure` alone: its `run` would, in Bun, install a native package of counters. mitata is
 * fetched when the first row is timed, and stands in no configuration: there it would be fetched by everybody who only
 * builds kvern.
 */
import { cpus } from "node:os";
import { basename } from "node:path";
import process from "node:process";
import { parseArgs, type ParseArgsConfig } from "node:util";
import { systemInfo } from "../mod.ts";

/** The command line of a bench: comma lists by option. */
export interface Options {
  /** One line of JSON a row, and no other output on stdout. */
  readonly json: boolean;
  /** Small sizes and next to no repetitions: tells that the bench works, and nothing of its figures. */
  readonly smoke: boolean;
  /** The values of `--name a,b`, whole numbers from 1 up, or those of the bench. */
  numbers(name: string, fallback: readonly number[]): number[];
  /** The values of `--name a,b`, each one of those known, or those of the bench. */
  names<Name extends string>(name: string, known: readonly Name[], fallback?: readonly Name[]): Name[];
}

/** Reads the command line; `lists` are options with values. A wrong one ends the process with code 2. */
export function readOptions(lists: readonly string[]): Options {
  try {
    const config: ParseArgsConfig["options"] = {
      json: { type: "boolean" },
      smoke: { type: "boolean" },
      ...Object.fromEntries(lists.map((name) => [name, { type: "string", multiple: true }] as const)),
    };
    const { values } = parseArgs({ options: config });
    const listOf = (name: string): string[] | undefined => {
      const given = values[name];
      return Array.isArray(given) ? given.flatMap((text) => String(text).split(",")) : undefined;
    };
    const numbers = (name: string, fallback: readonly number[]) =>
      listOf(name)?.map((text) => {
        if (!/^[1-9]\d{0,8}$/.test(text)) usage(`--${name} takes whole numbers from 1 up, not ${JSON.stringify(text)}`);
        return Number(text);
      }) ?? [...fallback];
    const names = <Name extends string>(name: string, known: readonly Name[], fallback = known) =>
      listOf(name)?.map((text) => {
        const found = known.find((one) => one === text);
        return found ?? usage(`--${name} takes ${known}, not ${text}`);
      }) ?? [...fallback];
    return { json: values.json === true, smoke: values.smoke === true, numbers, names };
  } catch (error) {
    usage(error instanceof Error ? error.message : String(error));
  }
}

/** Ends the process over a wrong command line. */
export function usage(problem: string): never {
  process.stderr.write(`${basename(process.argv[1]!)}: ${problem}\n`);
  process.exit(2);
}

/** What is used of mitata. */
interface Mitata {
  measure(call: () => unknown, options: { min_samples: number }): Promise<{ p50: number }>;
}

/** Bun installs the bare name by itself, Deno wants to be told where from, and Node fetches nothing. */
async function fetchMitata(): Promise<Mitata> {
  if (systemInfo().runtime === "node") {
    usage("Node can run this with --smoke only: Deno and Bun fetch mitata by themselves");
  }
  const from = "Deno" in globalThis ? "npm:" : "";
  return await import(from + "mitata@1.0.34");
}

let mitata: Promise<Mitata> | undefined;

/** Median time of one call, in nanoseconds: at least 0.6 s of calls, and 5 calls if they are slow. */
export async function timeOf(call: () => unknown, smoke: boolean): Promise<number> {
  if (smoke) {
    const started = performance.now();
    for (let i = 0; i < 2; i++) await call();
    return Math.max(1, (performance.now() - started) / 2 * 1e6);
  }
  const { measure } = await (mitata ??= fetchMitata());
  return (await measure(call, { min_samples: 5 })).p50;
}

/** Where results go, so that no compiler may leave a call out. */
let kept: unknown;

/** Uses a value. */
export function keep(value: unknown): void {
  kept = value;
  if (kept === keep) throw new Error("Cannot keep this function");
}

/** A row as it is printed: JSON fields, or the cells of a line. */
export interface Row {
  readonly json?: Readonly<Record<string, string | number | null>>;
  readonly cells: readonly (string | number)[];
}

/** A cell with a number, or with a dash where there is none. */
export function cell(value: number | null, digits: number): string {
  return value === null ? "-" : value.toFixed(digits);
}

/** Prints what happens before the rows are there: which result was checked, and its hash. */
export function tell(options: Options, line: string): void {
  (options.json ? process.stderr : process.stdout).write(line + "\n");
}

/** Prints where this runs. */
export function tellMachine(options: Options): void {
  const { level, runtime, cpuCount } = systemInfo();
  const version = process.versions[runtime];
  tell(
    options,
    `${cpus()[0]?.model.trim() ?? "unknown CPU"}, ${cpuCount} cores, level ${level}, ${runtime} ${version}`,
  );
}

/** Prints a table, or the JSON of the rows that have some. */
export function printRows(options: Options, bench: string, header: readonly string[], rows: readonly Row[]): void {
  if (options.json) {
    const { level, runtime } = systemInfo();
    for (const { json } of rows) if (json) console.log(JSON.stringify({ bench, runtime, level, ...json }));
    return;
  }
  const table = [header, ...rows.map(({ cells }) => cells.map(String))];
  const widths = header.map((_, column) => Math.max(...table.map((line) => line[column]!.length)));
  const pad = (cell: string, column: number) => column === 0 ? cell.padEnd(widths[0]!) : cell.padStart(widths[column]!);
  console.log("\n" + table.map((line) => line.map(pad).join("  ")).join("\n"));
}
