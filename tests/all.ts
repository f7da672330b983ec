/**
 * Runs every gate and every test, and counts them: `deno task test`.
 *
 * Each step is a task of `deno.json`, so that what runs here is what a person types. Two steps run at a time, and each
 * prints all it has to say when it ends. A failed step does not end the run: one run shows everything. A gate (format,
 * lint, types, build) counts as one test. The last line is `N passed, N failed`, with `, N skipped` where something was
 * skipped; the exit code is 1 when anything failed. The lines before it name what failed, each step that did not run at
 * all, and the steps in which tests were skipped.
 *
 * @module
 */
import process from "node:process";
import {
  findOnPath,
  findTool,
  provideTool,
  ROOT,
  run,
  say,
  seconds,
  ToolchainError,
  type ToolName,
  zigEnvironment,
} from "../zig/toolchain.ts";

/** What a step came to. */
export interface Counts {
  readonly passed: number;
  readonly failed: number;
  readonly skipped: number;
}

/** One task: what it is for, the task and its arguments, and how its counts are read from its output. */
interface Step {
  readonly title: string;
  readonly task: readonly string[];
  readonly count: (output: string, code: number) => Counts | undefined;
  /** The task whose files it reads, to be waited for. */
  readonly after?: string;
  /** A program without which the step is skipped, by any of its names, and the Debian package it is in. */
  readonly needs?: { readonly names: readonly string[]; readonly package: string };
  /** A tool of `zig/toolchain.ts` without which the step is skipped; those of the other steps have to be there. */
  readonly tool?: ToolName;
}

/**
 * Reads Zig's summary, `Build Summary: 2/5 steps succeeded (2 failed); 4/7 tests passed (1 skipped, 1 crashed)`.
 * What neither passed nor was skipped has failed, whatever Zig calls it.
 */
export function countZig(output: string): Counts | undefined {
  const found = lastMatch(output, /^Build Summary: .*; (\d+)\/(\d+) tests passed(?: \((?:(\d+) skipped)?.*\))?/gm);
  if (!found) return undefined;
  const [passed, total, skipped] = numbers(found);
  return { passed: passed!, failed: total! - passed! - skipped!, skipped: skipped! };
}

/** Reads the line of a Zig test program that runs by itself, `59 passed; 3 skipped; 0 failed.` or `All 62 tests passed.` */
export function countZigProgram(output: string): Counts | undefined {
  const all = lastMatch(output, /^All (\d+) tests passed\.$/gm);
  if (all) return { passed: Number(all[1]), failed: 0, skipped: 0 };
  const found = lastMatch(output, /^(\d+) passed; (\d+) skipped; (\d+) failed\.$/gm);
  if (!found) return undefined;
  const [passed, skipped, failed] = numbers(found);
  return { passed: passed!, failed: failed!, skipped: skipped! };
}

/** Reads Deno's last line, `ok | 3 passed (2 steps) | 0 failed | 1 ignored (18s)`. */
export function countDeno(output: string): Counts | undefined {
  const step = "(?: \\(\\d+ steps?\\))?";
  const line = `^(?:ok|FAILED) \\| (\\d+) passed${step} \\| (\\d+) failed${step}(?: \\| (\\d+) ignored)?`;
  const found = lastMatch(output, new RegExp(line, "gm"));
  if (!found) return undefined;
  const [passed, failed, skipped] = numbers(found);
  return { passed: passed!, failed: failed!, skipped: skipped! };
}

/** Reads Bun's last lines: ` 3 pass`, ` 1 skip`, ` 0 fail`, each on a line of its own, and `Ran 4 tests`. */
export function countBun(output: string): Counts | undefined {
  if (!/^Ran \d+ tests? across/m.test(output)) return undefined;
  const of = (word: string) => Number(lastMatch(output, new RegExp(`^ *(\\d+) ${word}$`, "gm"))?.[1] ?? 0);
  return { passed: of("pass"), failed: of("fail"), skipped: of("skip") + of("todo") };
}

/** Reads Node's last lines, `ℹ pass 3`, `ℹ fail 1` and so on; a cancelled test has not passed. */
export function countNode(output: string): Counts | undefined {
  const of = (word: string) => lastMatch(output, new RegExp(`^ℹ ${word} (\\d+)$`, "gm"))?.[1];
  const sum = (...words: string[]) => words.reduce((total, word) => total + Number(of(word) ?? 0), 0);
  if (of("pass") === undefined) return undefined;
  return { passed: sum("pass"), failed: sum("fail", "cancelled"), skipped: sum("skipped", "todo") };
}

/** A gate counts as one test, which its exit code decides. */
export function countGate(_output: string, code: number): Counts {
  return { passed: code === 0 ? 1 : 0, failed: code === 0 ? 0 : 1, skipped: 0 };
}

/**
 * The counts of a step that ended with that exit code. A step that reports no test at all has crashed, or has lost its
 * tests; one that ends badly with no failed test has failed in another way (a leak, a compile error): both are one
 * failure.
 */
export function settle(counts: Counts | undefined, code: number): Counts {
  if (!counts || counts.passed + counts.failed + counts.skipped === 0) return { passed: 0, failed: 1, skipped: 0 };
  return code !== 0 && counts.failed === 0 ? { ...counts, failed: 1 } : counts;
}

/** The tests that failed, as Zig, Deno, Bun and Node name them in that output, each once. */
export function failedTests(output: string): string[] {
  const names = [
    /^\(fail\) (.+?)(?: \[[\d.]+m?s\])?$/gm, // Bun
    /^(.+) => \.?\/?\S+\.ts:\d+:\d+$/gm, // Deno's list of failures
    /^test at \S+:\d+:\d+\n✖ (.+) \([\d.]+ms\)$/gm, // Node's list of failures
    /^error: '(.+)' (?:failed|crashed|terminated|leaked).*$/gm, // zig build
    /^\d+\/\d+ (.+)\.\.\.FAIL.*$/gm, // a Zig test program by itself
  ].flatMap((pattern) => [...output.matchAll(pattern)].map(([, name]) => name!));
  return [...new Set(names)];
}

/** A test and how long it took. */
export interface Slow {
  readonly name: string;
  readonly seconds: number;
}

/** Tests that took longer than this have to be worth it: the end of a run names them. */
const SLOW_SECONDS = 20;

/** The tests of that output that took long, as Deno, Bun and Node tell it, the longest first. */
export function slowTests(output: string): Slow[] {
  const inDeno = /^(.+) \.\.\. (?:ok|FAILED) \((?:(\d+)m)?(\d+)s\)$/gm; // which tells milliseconds of what is short
  const inOthers = /^(?:[✔✖]|\((?:pass|fail)\)) (.+?) [[(]([\d.]+)ms[\])]$/gm;
  const found = [...output.matchAll(inDeno)].map(([, name, minutes = "0", seconds]) => ({
    name: name!,
    seconds: Number(minutes) * 60 + Number(seconds),
  }));
  for (const [, name, ms] of output.matchAll(inOthers)) found.push({ name: name!, seconds: Number(ms) / 1000 });
  return found.filter(({ seconds }) => seconds > SLOW_SECONDS).sort((a, b) => b.seconds - a.seconds);
}

function lastMatch(text: string, pattern: RegExp): RegExpExecArray | undefined {
  return [...text.matchAll(pattern)].at(-1) as RegExpExecArray | undefined;
}

function numbers(match: RegExpExecArray): number[] {
  return match.slice(1).map((group) => Number(group ?? 0));
}

/** What a step came to that has to be said once more at the end. */
export interface Outcome {
  readonly title: string;
  /** What a person types to run it alone. */
  readonly command: string;
  readonly counts: Counts;
  /** The names of the tests that failed. */
  readonly failures: readonly string[];
  /** The tests that took long. */
  readonly slow: readonly Slow[];
  /** Why it did not run; then it counts as one skipped test. */
  readonly unrun?: string;
}

/** Of a step in which more failed, the first are enough. */
const NAMES_MAX = 20;

/** The end of a run: what was skipped, failed or took long, by name, and the sum of all counts in the last line. */
export function closing(outcomes: readonly Outcome[]): string {
  const sum = (key: keyof Counts) => outcomes.reduce((total, { counts }) => total + counts[key], 0);
  const ran = outcomes.filter(({ unrun }) => unrun === undefined);
  return [
    ...ran.filter(({ counts }) => counts.skipped > 0)
      .map(({ title, counts }) => `skipped: ${counts.skipped} of ${title}`),
    ...outcomes.filter(({ unrun }) => unrun !== undefined)
      .map(({ title, unrun }) => `skipped: ALL of ${title}, as ${unrun}`),
    ...ran.filter(({ counts }) => counts.failed > 0).flatMap(({ command, failures }) => [
      `failed: ${command}`,
      ...failures.slice(0, NAMES_MAX).map((name) => `  ${name}`),
      ...(failures.length > NAMES_MAX ? [`  and ${failures.length - NAMES_MAX} more`] : []),
    ]),
    ...ran.flatMap(({ title, slow }) =>
      slow.map(({ name, seconds }) => `slow: ${Math.round(seconds)} s of ${title}: ${name}`)
    ),
    summary({ passed: sum("passed"), failed: sum("failed"), skipped: sum("skipped") }),
  ].join("\n");
}

/** The counts of a run, or of one of its steps. */
export function summary({ passed, failed, skipped }: Counts): string {
  return `${passed} passed, ${failed} failed` + (skipped > 0 ? `, ${skipped} skipped` : "");
}

/** The longest first, behind what ends at once, so that two at a time end together. */
const STEPS: readonly Step[] = [
  { title: "format", task: ["fmt:check"], count: countGate },
  { title: "lint", task: ["lint"], count: countGate },
  { title: "types, with Deno's", task: ["check:deno"], count: countGate },
  { title: "types, with what Deno and Bun share", task: ["check:bun"], count: countGate },
  { title: "documentation", task: ["doc:lint"], count: countGate },
  { title: "library", task: ["build"], count: countGate },
  {
    title: "Zig tests under valgrind",
    task: ["test:memcheck"],
    count: countZigProgram,
    needs: { names: ["valgrind"], package: "valgrind" },
  },
  {
    title: "Zig tests for aarch64",
    task: ["test:arm64"],
    count: countZigProgram,
    needs: { names: ["qemu-aarch64-static", "qemu-aarch64"], package: "qemu-user-static" },
  },
  { title: "library for every target", task: ["build:targets"], count: countGate },
  { title: "TypeScript tests in Deno", task: ["test:deno"], count: countDeno },
  { title: "TypeScript tests in Bun", task: ["test:bun"], count: countBun },
  { title: "TypeScript tests in Node", task: ["test:node"], count: countNode, tool: "node" },
  { title: "Zig tests, Debug", task: ["test:zig"], count: countZig },
  { title: "Zig tests, ReleaseSafe", task: ["test:zig", "-Doptimize=ReleaseSafe"], count: countZig },
  { title: "examples in the documentation", task: ["test:doc"], count: countDeno },
  { title: "package", task: ["publish:check"], count: countGate, after: "build:targets" },
];

const AT_A_TIME = 2;
const HEARTBEAT_MS = 60_000;

async function main(): Promise<Outcome[]> {
  const started = performance.now();
  say(`${STEPS.length} steps, about thirty-five minutes in all on two cores`);
  // The tools are looked for once; the tasks below take them from these variables. Output is plain, as it is read.
  const env: Record<string, string | undefined> = {
    ...zigEnvironment(),
    KVERN_ZIG: await provideTool("zig"),
    KVERN_BUN: await provideTool("bun"),
    KVERN_NODE: findTool("node"), // where it is nowhere, its own step fetches it or is skipped
    NO_COLOR: "1",
  };
  delete env.FORCE_COLOR;
  delete env.CLICOLOR_FORCE;

  const running = new Map<string, Promise<Outcome>>();
  const queue = STEPS.entries();
  const work = async () => {
    for (const [index, step] of queue) {
      const ended = runStep(`[${index + 1}/${STEPS.length}] ${step.title}`, step, env, running.get(step.after ?? ""));
      running.set(step.task.join(" "), ended);
      await ended;
    }
  };
  await Promise.all(Array.from({ length: AT_A_TIME }, work));
  say(`took ${seconds(started)}`);
  return await Promise.all(running.values());
}

/** Why a step cannot run here, if it cannot. */
export async function missing(
  { needs, tool }: Pick<Step, "needs" | "tool">,
  provide: (tool: ToolName) => Promise<string> = provideTool,
): Promise<string | undefined> {
  if (needs && needs.names.every((name) => findOnPath(name).length === 0)) {
    return `${needs.names.join(" or ")} is not on PATH (Debian's package ${needs.package} has it)`;
  }
  if (tool === undefined) return undefined;
  try {
    await provide(tool);
    return undefined;
  } catch (error) {
    if (!(error instanceof ToolchainError)) throw error;
    return `there is no ${tool} here (${error.message})`;
  }
}

async function runStep(
  place: string,
  step: Step,
  env: Record<string, string | undefined>,
  after: Promise<Outcome> | undefined,
): Promise<Outcome> {
  await after;
  const started = performance.now();
  const { title, task, count } = step;
  const command = `deno task ${task.join(" ")}`;
  const unrun = await missing(step);
  if (unrun !== undefined) {
    say(`${place}: skipped, as ${unrun}\n`);
    return { title, command, counts: { passed: 0, failed: 0, skipped: 1 }, failures: [], slow: [], unrun };
  }
  say(`${place}: ${command}`);
  const { code, output } = await run(`at ${command}`, process.execPath, ["task", "--quiet", ...task], {
    cwd: ROOT,
    env,
    output: "captured",
    heartbeatMs: HEARTBEAT_MS,
  });
  const counts = settle(count(output, code), code);
  process.stderr.write(`${output.trimEnd()}\n`);
  say(`${place}: ${summary(counts)}, ${seconds(started)}\n`);
  return { title, command, counts, failures: failedTests(output), slow: slowTests(output) };
}

if (import.meta.main) {
  let end = summary({ passed: 0, failed: 1, skipped: 0 });
  try {
    const outcomes = await main();
    end = closing(outcomes);
    process.exitCode = outcomes.some(({ counts }) => counts.failed > 0) ? 1 : 0;
  } catch (error) {
    process.exitCode = 1;
    if (!(error instanceof ToolchainError)) throw error;
    say(error.message);
  }
  process.stdout.write(end + "\n");
}
