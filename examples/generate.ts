/**
 * The main job: a small language model writes Zig, byte by byte, with kvern as its KV cache.
 *
 *     deno run -A examples/generate.ts
 *     bun examples/generate.ts --prompt "test \"" --temperature 0
 *     bun examples/generate.ts --samples 4
 *     deno run -A examples/generate.ts --onnx DIR --prompt "Hello"
 *
 * options.ts reads the command line, ziglet.ts is the model, caches.ts makes the cache. writing.ts writes a text, with
 * samples.ts and beams.ts several, and onnx_text.ts one by another model; measuring.ts does the two other things there are
 * to do with a model and a cache. report.ts is what --json prints, terminal.ts the way out. Here is where all that starts
 * and ends.
 */
import { compareCaches, score } from "./measuring.ts";
import { helpText, type Options, parseOptions } from "./options.ts";
import { runProgram } from "./program.ts";
import { type Measured, reportOf } from "./report.ts";
import { Terminal } from "./terminal.ts";
import { generate } from "./writing.ts";
import { loadZiglet } from "./ziglet.ts";

if (import.meta.main) await runProgram("generate.ts", main);

async function main(args: string[]): Promise<void> {
  const options = parseOptions(args);
  if (options === "help") {
    new Terminal({ quiet: true }).line(helpText().trimEnd());
    return;
  }
  const terminal = new Terminal({ quiet: options.json });
  const measured = await measure(options, terminal);
  if (options.json) terminal.line(JSON.stringify(reportOf(options, measured)));
}

async function measure(options: Options, terminal: Terminal): Promise<Measured> {
  if (options.onnxDirectory !== null) {
    const { writeOnnx } = await import("./onnx_text.ts"); // and what only it needs
    return await writeOnnx(options.onnxDirectory, options, terminal);
  }
  const run = { generate, score, compare: compareCaches }[options.mode];
  return await run(loadZiglet(options.modelDirectory), options, terminal);
}
