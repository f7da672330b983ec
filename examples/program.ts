/** How a program starts, and with which exit code it ends when something is wrong. */
import process from "node:process";
import { KvError } from "../mod.ts";
import { UsageError } from "./arguments.ts";
import { printError } from "./terminal.ts";
import { ModelFileError } from "./weights.ts";

/** Runs a program with the arguments it was given; what fails ends the process. */
export async function runProgram(name: string, main: (args: string[]) => Promise<void>): Promise<void> {
  try {
    await main(process.argv.slice(2));
  } catch (error) {
    process.exit(exitCode(name, error));
  }
}

/** What a failure means to whoever called: 2 for what a line on stderr explains; anything else is a bug of ours. */
function exitCode(program: string, error: unknown): number {
  const code = (error as { code?: string }).code;
  if (code === "EPIPE") return 0; // the reader has what it wanted
  const diskProblem = code === "ENOSPC" || code === "EIO";
  if (diskProblem || error instanceof UsageError || error instanceof ModelFileError || error instanceof KvError) {
    try {
      printError(program, (error as Error).message);
    } catch {
      // Nobody reads stderr either.
    }
    return 2;
  }
  throw error;
}
