/** Runs a program of examples/, generate.ts unless another one is named, in the runtime the tests run in. */
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { programArgs } from "./child.ts";

/** How a run ended. */
export interface Result {
  code: number | null;
  stdout: string;
  stderr: string;
}

/** What a run is given beside its arguments. */
interface RunOptions {
  env?: Record<string, string>;
  linesWanted?: number;
  program?: string;
  cwd?: string;
}

/** Runs the program with this runtime; with `linesWanted` stdout is closed after that many lines. */
export function generate(
  args: string[],
  { env = {}, linesWanted = Infinity, program = "generate.ts", cwd }: RunOptions = {},
): Promise<Result> {
  return new Promise((resolve, reject) => {
    const path = fileURLToPath(new URL(`../examples/${program}`, import.meta.url));
    const child = spawn(process.execPath, [...programArgs(path), ...args], {
      env: { ...process.env, ...env },
      cwd,
      stdio: ["ignore", "pipe", "pipe"],
    });
    const stdout: Uint8Array[] = [];
    const stderr: Uint8Array[] = [];
    const text = (chunks: Uint8Array[]) => new TextDecoder().decode(Uint8Array.from(chunks.flatMap((c) => [...c])));
    child.stdout.on("data", (chunk: Uint8Array) => {
      stdout.push(chunk);
      if (text(stdout).split("\n").length > linesWanted) child.stdout.destroy();
    });
    child.stderr.on("data", (chunk: Uint8Array) => stderr.push(chunk));
    child.on("error", reject);
    child.on("close", (code) => resolve({ code, stdout: text(stdout), stderr: text(stderr) }));
  });
}

/** Runs the program, which has to succeed and to say nothing on stderr; gives its stdout. */
export async function output(...args: string[]): Promise<string> {
  const { code, stdout, stderr } = await generate(args);
  assert.equal(stderr, "");
  assert.equal(code, 0);
  return stdout;
}

/** The program has to refuse: exit code 2, nothing on stdout, one line on stderr that matches. */
export async function refused(
  args: string[],
  problem: RegExp,
  env: Record<string, string> = {},
  program: string = "generate.ts",
): Promise<void> {
  const { code, stdout, stderr } = await generate(args, { env, program });
  assert.match(stderr, /^[^\n]+\n$/, args.join(" "));
  assert.equal(stderr.slice(0, program.length + 2), `${program}: `);
  assert.match(stderr, problem);
  assert.equal(stdout, "");
  assert.equal(code, 2);
}
