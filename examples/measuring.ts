/** The two other things to do with a model and a cache: score a file, and time a token with the cache and without it. */
import { UsageError } from "./arguments.ts";
import { type CacheCost, cacheFacts, newCache } from "./caches.ts";
import { compare, computeTotalSeconds, formatComparison, SHORTEST } from "./comparison.ts";
import { type Options, readGivenFile } from "./options.ts";
import type { Measured } from "./report.ts";
import { scoreText } from "./scoring.ts";
import type { Terminal } from "./terminal.ts";
import { countText } from "./wording.ts";
import type { Ziglet } from "./ziglet.ts";

/** Bits per byte of a file. */
export async function score(ziglet: Ziglet, options: Options, terminal: Terminal): Promise<Measured> {
  const { maxSeqLen } = ziglet.config;
  const windowTokens = options.window ?? maxSeqLen;
  if (windowTokens > maxSeqLen) throw new UsageError(`--window must be at most the model's context, ${maxSeqLen}`);
  const text = readScoredFile(options.score, options.bytes);
  using held = newCache(options, ziglet.config, windowTokens);

  const start = performance.now();
  const { bitsPerByte, attendedShare } = await scoreText(ziglet, held, text, windowTokens, (bytes) => {
    const counts = [`${bytes} of ${countText(text.length, "byte")}`];
    return terminal.status(() => ({ counts, details: cacheFacts(options, held.cost()) }));
  });
  const totalSeconds = (performance.now() - start) / 1000;
  const tokensPerSecond = text.length / totalSeconds;
  terminal.text(
    `${bitsPerByte.toFixed(5)} bits per byte: ${countText(text.length, "byte")} in windows of ${windowTokens}\n`,
  );
  terminal.finish({ counts: [`${totalSeconds.toFixed(1)} s`], details: [`${tokensPerSecond.toFixed(0)} tokens/s`] });
  return {
    tokens: text.length,
    tokensPerSecond,
    bitsPerByte,
    attendSeconds: ziglet.attendSeconds,
    totalSeconds,
    cost: held.cost(),
    attendedShare,
  };
}

/** The time of the next token with the cache and without it. */
export async function compareCaches(ziglet: Ziglet, options: Options, terminal: Terminal): Promise<Measured> {
  const { maxSeqLen } = ziglet.config;
  const text = new TextEncoder().encode(options.prompt);
  if (maxSeqLen < SHORTEST) throw new UsageError(`--compare needs a context of at least ${SHORTEST}, not ${maxSeqLen}`);
  let cost: CacheCost | null = null; // of the last one when it was full
  const makeCache = () => {
    const held = newCache(options, ziglet.config, maxSeqLen);
    const dispose = () => {
      cost = held.cost();
      held[Symbol.dispose]();
    };
    return { cache: held.cache, [Symbol.dispose]: dispose };
  };

  const start = performance.now();
  const rows = await compare(ziglet, makeCache, text, (doing) => {
    return terminal.status(() => ({ counts: [`measuring: ${doing}`], details: [] }));
  });
  const totalSeconds = (performance.now() - start) / 1000;
  terminal.text(formatComparison(rows, cacheFacts(options, cost!).join(", ")) + "\n");
  terminal.finish({ counts: [`${totalSeconds.toFixed(1)} s`], details: [] });
  return {
    tokens: null,
    tokensPerSecond: null,
    bitsPerByte: null,
    attendSeconds: null,
    totalSeconds,
    cost: cost!,
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
  const file = readGivenFile(path);
  if (file.length === 0) throw new UsageError(`${path}: is empty, there is nothing to score`);
  if (bytes !== null && bytes > file.length) {
    throw new UsageError(`${path}: has ${countText(file.length, "byte")}, not ${bytes}`);
  }
  return file.subarray(0, bytes ?? file.length);
}
