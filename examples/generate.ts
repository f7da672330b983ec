/**
 * The main job: a small language model writes Zig, byte by byte, with kvern as its KV cache.
 *
 *     deno run -A examples/generate.ts
 *     bun examples/generate.ts --prompt "test \"" --temperature 0
 *
 * options.ts reads the command line, ziglet.ts is the model, sampling.ts picks bytes, scoring.ts and comparison.ts
 * are the two other things to do with a model and a cache, terminal.ts is the way out. Here is what ties them
 * together: the choice of the cache, the loop that generates, the report.
 */
import { readFileSync } from "node:fs";
import process from "node:process";
import { ContiguousCache, type KvCache, KvError, systemInfo } from "../mod.ts";
import { compare, type ComparisonRow, computeTotalSeconds, formatComparison, SHORTEST } from "./comparison.ts";
import { helpText, type Options, parseOptions, UsageError } from "./options.ts";
import { Random, sample } from "./sampling.ts";
import { bitsPerByte } from "./scoring.ts";
import { printError, Terminal } from "./terminal.ts";
import { ModelFileError, type ZigletConfig } from "./weights.ts";
import { loadZiglet, type Ziglet } from "./ziglet.ts";

/** What a run came to; --json prints it, with the names of `systemInfo` and of the options. */
interface Report {
  /** Tokens generated, or scored. */
  tokens: number | null;
  /** Of the steps behind the prompt when generating, of everything when scoring. */
  tokensPerSecond: number | null;
  bitsPerByte: number | null;
  /** Bytes of the cache, full or not: `memoryBytes`. */
  cacheBytes: number;
  /** Seconds spent in `cache.attend`. */
  attendSeconds: number | null;
  /** Seconds from the loaded model to the end. */
  totalSeconds: number;
  /** Only with --compare. */
  comparison?: { rows: ComparisonRow[]; computedTotals: { withCacheSeconds: number; withoutCacheSeconds: number } };
}

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
  const report = await run(ziglet, options, terminal);
  if (options.json) {
    const { runtime, level } = systemInfo();
    terminal.line(JSON.stringify({ runtime, level, kv: options.kv, ...report }));
  }
}

// --------------------------------------------------------------------------------------------------- the cache

/** A cache with one sequence, what it costs, and the end of its life. */
interface HeldCache extends Disposable {
  cache: KvCache;
  bytes: number;
}

/** Makes the cache that the options ask for, with room for `maxSeqLen` tokens. */
function newCache({ cache, kv }: Options, config: ZigletConfig, maxSeqLen: number): HeldCache {
  const { layerCount, kvHeadCount, headDim } = config;
  switch (cache) {
    case "contiguous": {
      const contiguous = new ContiguousCache({ layerCount, kvHeadCount, headDim, maxSeqLen, dtype: kv });
      return {
        cache: contiguous.sequence(0),
        bytes: contiguous.memoryBytes,
        [Symbol.dispose]: () => contiguous.free(),
      };
    }
  }
}

/** For example "contiguous cache 6.0 MiB f32". */
function cacheLabel({ cache, kv }: Options, bytes: number): string {
  const size = bytes < 2 ** 20 ? `${(bytes / 2 ** 10).toFixed(0)} KiB` : `${(bytes / 2 ** 20).toFixed(1)} MiB`;
  return `${cache} cache ${size} ${kv}`;
}

// --------------------------------------------------------------------------------------- the three things to do

/** Writes text behind the prompt. */
async function generate(ziglet: Ziglet, options: Options, terminal: Terminal): Promise<Report> {
  const { maxSeqLen, bosToken } = ziglet.config;
  const prompt = new TextEncoder().encode(options.prompt);
  if (prompt.length + 1 > maxSeqLen) {
    throw new UsageError(
      `the prompt has ${prompt.length} bytes, the model's context of ${maxSeqLen} has room for ${maxSeqLen - 1}`,
    );
  }
  using held = newCache(options, ziglet.config, maxSeqLen);
  const { cache, bytes: cacheBytes } = held;
  const random = new Random(options.seed);
  // A byte is a token, a character may be several: the decoder waits for the rest. No byte order mark is dropped.
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });

  const statusText = () => {
    const rate = tokensPerSecond === null ? "" : `${tokensPerSecond.toFixed(0)} tokens/s, `;
    return `${tokens} tokens, ${rate}${cacheLabel(options, cacheBytes)}, ${cache.seqLen} of ${maxSeqLen} positions`;
  };
  let tokens = 0;
  let tokensPerSecond: number | null = null;

  // 1. The prompt fills the cache, the start byte before it.
  const start = performance.now();
  terminal.text(options.prompt);
  let logits = ziglet.prefill(Uint8Array.of(bosToken, ...prompt), cache); // [vocab]

  // 2. Each byte is drawn, written, and run through the model to get the logits of the one behind it.
  const decodeStart = performance.now();
  let stopped = ""; // before the tokens that were asked for
  while (true) {
    const token = sample(logits, options.temperature, random);
    if (token === bosToken) {
      stopped = ", stopped: the model ended the text";
      break;
    }
    terminal.text(decoder.decode(Uint8Array.of(token), { stream: true }));
    tokens++;
    if (tokens === options.tokens) break;
    if (cache.seqLen === maxSeqLen) {
      stopped = `, stopped: the context of ${maxSeqLen} positions is full`;
      break;
    }
    logits = ziglet.forward(Uint8Array.of(token), cache);
    tokensPerSecond = tokens / (performance.now() - decodeStart) * 1000;
    await terminal.status(() => `[${statusText()}]`);
  }

  // 3. The end: half a character, the status.
  terminal.text(decoder.decode());
  terminal.finish(`[${statusText()}${stopped}]`, { always: stopped !== "" });
  const totalSeconds = (performance.now() - start) / 1000;
  return { tokens, tokensPerSecond, bitsPerByte: null, cacheBytes, attendSeconds: ziglet.attendSeconds, totalSeconds };
}

/** Bits per byte of a file. */
async function score(ziglet: Ziglet, options: Options, terminal: Terminal): Promise<Report> {
  const { maxSeqLen } = ziglet.config;
  const windowTokens = options.window ?? maxSeqLen;
  if (windowTokens > maxSeqLen) throw new UsageError(`--window must be at most the model's context, ${maxSeqLen}`);
  const text = readScoredFile(options.score, options.bytes);
  using held = newCache(options, ziglet.config, windowTokens);
  const { cache, bytes: cacheBytes } = held;

  const start = performance.now();
  const bits = await bitsPerByte(ziglet, cache, text, windowTokens, (bytes) => {
    return terminal.status(() => `[${bytes} of ${text.length} bytes, ${cacheLabel(options, cacheBytes)}]`);
  });
  const totalSeconds = (performance.now() - start) / 1000;
  const tokensPerSecond = text.length / totalSeconds;
  terminal.text(`${bits.toFixed(5)} bits per byte: ${text.length} bytes in windows of ${windowTokens}\n`);
  terminal.finish(`[${totalSeconds.toFixed(1)} s, ${tokensPerSecond.toFixed(0)} tokens/s]`);
  return {
    tokens: text.length,
    tokensPerSecond,
    bitsPerByte: bits,
    cacheBytes,
    attendSeconds: ziglet.attendSeconds,
    totalSeconds,
  };
}

/** The time of the next token with the cache and without it. */
async function compareCaches(ziglet: Ziglet, options: Options, terminal: Terminal): Promise<Report> {
  const { maxSeqLen } = ziglet.config;
  const text = new TextEncoder().encode(options.prompt);
  if (maxSeqLen < SHORTEST) throw new UsageError(`--compare needs a context of at least ${SHORTEST}, not ${maxSeqLen}`);
  let cacheBytes = 0; // the same for all of them
  const makeCache = () => {
    const held = newCache(options, ziglet.config, maxSeqLen);
    cacheBytes = held.bytes;
    return held;
  };

  const start = performance.now();
  const rows = await compare(ziglet, makeCache, text, (doing) => terminal.status(() => `[measuring: ${doing}]`));
  const totalSeconds = (performance.now() - start) / 1000;
  terminal.text(formatComparison(rows, cacheLabel(options, cacheBytes)) + "\n");
  terminal.finish(`[${totalSeconds.toFixed(1)} s]`);
  return {
    tokens: null,
    tokensPerSecond: null,
    bitsPerByte: null,
    cacheBytes,
    attendSeconds: null,
    totalSeconds,
    comparison: {
      rows,
      computedTotals: {
        withCacheSeconds: computeTotalSeconds(rows, "withCacheSeconds"),
        withoutCacheSeconds: computeTotalSeconds(rows, "withoutCacheSeconds"),
      },
    },
  };
}

/** The first `bytes` bytes of a file, all of them where it is null. */
function readScoredFile(path: string, bytes: number | null): Uint8Array {
  let file: Uint8Array;
  try {
    file = readFileSync(path);
  } catch (error) {
    const code = (error as { code?: string }).code;
    throw new UsageError(`${path}: ${code === "ENOENT" ? "no such file" : `cannot be read (${code ?? error})`}`);
  }
  if (file.length === 0) throw new UsageError(`${path}: is empty, there is nothing to score`);
  if (bytes !== null && bytes > file.length) throw new UsageError(`${path}: has ${file.length} bytes, not ${bytes}`);
  return file.subarray(0, bytes ?? file.length);
}

// ------------------------------------------------------------------------------------------------------ the end

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
