/**
 * Runs TypeScript in a process of its own, in the runtime the tests run in: for what one process can do only once,
 * such as choosing a level, or with permissions the tests themselves do not lack.
 */

import { spawnSync } from "node:child_process";
import process from "node:process";
import { fileURLToPath } from "node:url";

/** The runtime the tests run in; Deno and Bun name a version of Node, too, so they are asked first. */
export const runtime: "deno" | "bun" | "node" = "Deno" in globalThis ? "deno" : "Bun" in globalThis ? "bun" : "node";

/** Are these tests running in Deno? */
export const inDeno: boolean = runtime === "deno";

/** Why a test of Deno's permissions is skipped in this runtime; empty where it runs. */
export const denoOnly: string = inDeno ? "" : ` (skipped: it is about Deno's permissions)`;

/** The module under test, for `import` lines in a child's code. */
export const MOD: string = new URL("../mod.ts", import.meta.url).href;

/** How a child ended. */
export interface ChildResult {
  readonly code: number | null;
  readonly stdout: string;
  readonly stderr: string;
}

/** What a child is given. */
export interface ChildOptions {
  /** Added to the environment; undefined takes a variable away. */
  readonly env?: Record<string, string | undefined>;
  /** Deno's flags, all permissions by default and never none: child_process adds -A to those. Bun has no flags. */
  readonly denoFlags?: string[];
  /** Node's flags beside those that every child gets there. */
  readonly nodeFlags?: string[];
}

/** A collector of garbage within reach, as Bun has it, and no warning that `node:ffi` is new, which no test is about. */
const NODE_FLAGS = ["--expose-gc", "--disable-warning=ExperimentalWarning"];

/** What this runtime is given to run a program, before the arguments of the program. */
export function programArgs(path: string): string[] {
  const args = { deno: ["run", "-A", "--quiet"], bun: ["run"], node: NODE_FLAGS };
  return [...args[runtime], path];
}

/** Runs `code`, a module. */
export function runCode(code: string, options: ChildOptions = {}): ChildResult {
  const { denoFlags = ["-A"], nodeFlags = [] } = options;
  const args = {
    deno: ["run", "--no-prompt", ...denoFlags],
    bun: ["run"],
    node: [...NODE_FLAGS, ...nodeFlags], // no --input-type, which the Workers of a child would inherit and refuse
  };
  return run([...args[runtime], "-"], code, options.env);
}

/** Runs a test file. */
export function runTests(file: string, env: Record<string, string>): ChildResult {
  const path = fileURLToPath(new URL(file, import.meta.url));
  const args = { deno: ["test", "-A"], bun: ["test"], node: [...NODE_FLAGS, "--test"] };
  return run([...args[runtime], path], "", env);
}

/** Runs a module file. */
export function runFile(file: URL, env: Record<string, string>): ChildResult {
  return run(programArgs(fileURLToPath(file)), "", env);
}

function run(args: string[], input: string, env: ChildOptions["env"] = {}): ChildResult {
  const { status, stdout, stderr, error } = spawnSync(process.execPath, args, {
    input,
    encoding: "utf8",
    cwd: fileURLToPath(new URL("..", import.meta.url)),
    env: withoutUndefined({ ...process.env, NO_COLOR: "1", ...env, NODE_TEST_CONTEXT: undefined }),
  });
  if (error) throw error;
  return { code: status, stdout, stderr };
}

function withoutUndefined(env: Record<string, string | undefined>): Record<string, string> {
  return Object.fromEntries(Object.entries(env).filter((row): row is [string, string] => row[1] !== undefined));
}
