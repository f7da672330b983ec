/**
 * What does a cache buy? The time of the next token of a text, with the cache and without it.
 *
 * With: the cache holds the keys and values of the text but its last token; one step runs that token alone.
 * Without: nothing is kept from before, so all tokens of the text go through the model again. They do so in steps of
 * STEP_TOKENS into a fresh cache, as attention needs the keys and values of this one pass somewhere: same model code,
 * same attention kernels, so that the difference is the recomputation and nothing else.
 */
import type { KvCache } from "../mod.ts";
import type { Ziglet } from "./ziglet.ts";

/** Measured at one length of the text: median seconds. */
export interface ComparisonRow {
  /** Tokens of the text, the one that runs last included. */
  length: number;
  withCacheSeconds: number;
  withoutCacheSeconds: number;
}

/** Makes an empty cache with room for the model's context; whoever calls it disposes of it. */
export type MakeCache = () => { cache: KvCache } & Disposable;

/** The first length measured. */
export const SHORTEST = 64;
const LENGTHS = [SHORTEST, 256, 1024];
const REPETITIONS = { withCache: 25, withoutCache: 5 }; // odd, so that there is a middle one
const WARM_UPS = { withCache: 10, withoutCache: 1 };

/** Measures every length that fits the model. */
export async function compare(
  ziglet: Ziglet,
  makeCache: MakeCache,
  text: Uint8Array,
  progress: (doing: string) => Promise<void>,
): Promise<ComparisonRow[]> {
  const rows: ComparisonRow[] = [];
  for (const length of LENGTHS.filter((length) => length <= ziglet.config.maxSeqLen)) {
    const tokens = textOfLength(length, ziglet.config.bosToken, text);
    const past = length - 1;

    // 1. With the cache: the past is in it already, and is there again after each run.
    using held = makeCache();
    ziglet.prefill(tokens.subarray(0, past), held.cache);
    const withCacheSeconds = await medianSeconds(
      "withCache",
      () => progress(`length ${length}, with the cache`),
      () => {
        ziglet.forward(tokens.subarray(past), held.cache);
        held.cache.truncate(past);
      },
    );

    // 2. Without it: all tokens, in a cache that knows nothing yet.
    const withoutCacheSeconds = await medianSeconds(
      "withoutCache",
      () => progress(`length ${length}, without it`),
      () => {
        using fresh = makeCache();
        ziglet.prefill(tokens, fresh.cache);
      },
    );
    rows.push({ length, withCacheSeconds, withoutCacheSeconds });
  }
  return rows;
}

/**
 * Seconds for a text as long as the last row, written token by token: computed from the medians, not measured.
 *
 * Straight lines between the rows; below the first one a token costs the same with the cache, and in proportion to
 * the length without it.
 */
export function computeTotalSeconds(
  rows: ComparisonRow[],
  column: "withCacheSeconds" | "withoutCacheSeconds",
): number {
  let total = 0;
  let fromLength = 0;
  let fromSeconds = column === "withCacheSeconds" ? rows[0]?.[column] ?? 0 : 0;
  for (const row of rows) {
    const slope = (row[column] - fromSeconds) / (row.length - fromLength);
    for (let length = fromLength + 1; length <= row.length; length++) {
      total += fromSeconds + slope * (length - fromLength);
    }
    fromLength = row.length;
    fromSeconds = row[column];
  }
  return total;
}

/** The table and the totals, for people. */
export function formatComparison(rows: ComparisonRow[], cacheLabel: string): string {
  const cells = (length: string, withCache: string, withoutCache: string, ratio: string) =>
    `${length.padStart(8)}${withCache.padStart(17)}${withoutCache.padStart(14)}${ratio.padStart(8)}`;
  const milliseconds = (seconds: number) => `${(seconds * 1000).toFixed(2)} ms`;
  const table = rows.map(({ length, withCacheSeconds, withoutCacheSeconds }) => {
    const ratio = `${(withoutCacheSeconds / withCacheSeconds).toFixed(0)}x`;
    return cells(`${length}`, milliseconds(withCacheSeconds), milliseconds(withoutCacheSeconds), ratio);
  });
  const repetitions = `${REPETITIONS.withCache} runs with the cache, ${REPETITIONS.withoutCache} without`;
  const withTotal = computeTotalSeconds(rows, "withCacheSeconds").toFixed(1);
  const withoutTotal = computeTotalSeconds(rows, "withoutCacheSeconds").toFixed(1);
  return `Time of the next token, measured (median of ${repetitions}):

${cells("length", "with the cache", "without it", "ratio")}
${table.join("\n")}

Without it, every token of the text goes through the model again: same code, same attention kernels.
A text of ${rows.at(-1)?.length ?? 0} tokens, computed from these medians (straight lines between them), not measured:
${withTotal} s with the cache, ${withoutTotal} s without it.
What it takes: a ${cacheLabel}.`;
}

async function medianSeconds(
  column: "withCache" | "withoutCache",
  progress: () => Promise<void>,
  run: () => void,
): Promise<number> {
  const seconds: number[] = [];
  for (let i = -WARM_UPS[column]; i < REPETITIONS[column]; i++) {
    await progress();
    const start = performance.now();
    run();
    if (i >= 0) seconds.push((performance.now() - start) / 1000);
  }
  return seconds.sort((a, b) => a - b)[(seconds.length - 1) / 2]!;
}

/** The start token and the text, over and over: what the tokens are does not change the time. */
function textOfLength(length: number, bosToken: number, text: Uint8Array): Uint8Array {
  return Uint8Array.from({ length }, (_, i) => i === 0 ? bosToken : text[(i - 1) % text.length]!);
}
