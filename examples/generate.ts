/**
 * The main job: a small language model writes Zig, byte by byte, with kvern as its KV cache.
 *
 *     deno run -A examples/generate.ts
 *     bun examples/generate.ts --prompt "test \"" --temperature 0
 *     bun examples/generate.ts --samples 4
 *
 * options.ts reads the command line, ziglet.ts is the model, caches.ts makes the cache. writing.ts writes a text, with
 * samples.ts and beams.ts several; measuring.ts does the two other things there are to do with a model and a cache.
 * report.ts is what --json prints, terminal.ts the way out. Here is where all that starts and ends.
 */
import process from "node:process";
import { KvError } from "../mod.ts";
import { compareCaches, score } from "./measuring.ts";
import { helpText, parseOptions, UsageError } from "./options.ts";
import { reportOf } from "./report.ts";
import { printError, Terminal } from "./terminal.ts";
import { ModelFileError } from "./weights.ts";
import { generate } from "./writing.ts";
import { loadZiglet } from "./ziglet.ts";

if (import.meta.main) {
  try {
    await main(process.argv.slice(2));
  } catch (error) {
    process.exit(exitCode(error));
  }
}

async function main(args: string[]): Promise<void> {
  const options = parseOptions(args);
  if (options === "help") {
    new Terminal({ quiet: true }).line(helpText().trimEnd());
    return;
  }
  const ziglet = loadZiglet(options.modelDirectory);
  const terminal = new Terminal({ quiet: options.json });
  const run = { generate, score, compare: compareCaches }[options.mode];
  const measured = await run(ziglet, options, terminal);
  if (options.json) terminal.line(JSON.stringify(reportOf(options, measured)));
}

/** What a failure means to whoever called: 2 for what a line on stderr explains; anything else is a bug of ours. */
function exitCode(error: unknown): number {
  const code = (error as { code?: string }).code;
  if (code === "EPIPE") return 0; // the reader has what it wanted
  const diskProblem = code === "ENOSPC" || code === "EIO";
  if (diskProblem || error instanceof UsageError || error instanceof ModelFileError || error instanceof KvError) {
    try {
      printError((error as Error).message);
    } catch {
      // Nobody reads stderr either.
    }
    return 2;
  }
  throw error;
}
