/**
 * Runs TypeScript in a process of its own, in the runtime the tests run in: for what one process can do only once,
 * such as choosing a level, or with permissions the tests themselves do not lack.
 */

import { spawnSync } from "node:child_process";
import process from "node:process";
import { fileURLToPath } from "node:url";

/** Are these tests running in Deno? */
export const inDeno: boolean = "Deno" in globalThis;

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
}

/** Runs `code`, a module. */
export function runCode(code: string, options: ChildOptions = {}): ChildResult {
  const { denoFlags = ["-A"] } = options;
  return run(inDeno ? ["run", "--no-prompt", ...denoFlags, "-"] : ["run", "-"], code, options.env);
}

/** Runs a test file. */
export function runTests(file: string, env: Record<string, string>): ChildResult {
  const path = fileURLToPath(new URL(file, import.meta.url));
  return run(inDeno ? ["test", "-A", path] : ["test", path], "", env);
}

/** Runs a module file. */
export function runFile(file: URL, env: Record<string, string>): ChildResult {
  const path = fileURLToPath(file);
  return run(inDeno ? ["run", "-A", path] : ["run", path], "", env);
}

function run(args: string[], input: string, env: ChildOptions["env"] = {}): ChildResult {
  const { status, stdout, stderr, error } = spawnSync(process.execPath, args, {
    input,
    encoding: "utf8",
    cwd: fileURLToPath(new URL("..", import.meta.url)),
    env: withoutUndefined({ ...process.env, NO_COLOR: "1", ...env }),
  });
  if (error) throw error;
  return { code: status, stdout, stderr };
}

function withoutUndefined(env: Record<string, string | undefined>): Record<string, string> {
  return Object.fromEntries(Object.entries(env).filter((row): row is [string, string] => row[1] !== undefined));
}
