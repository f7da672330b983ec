/**
 * Random calls, right and wrong ones, through the public API and through the raw C ABI: nothing may crash, every answer
 * must be one that is documented, lengths must be those of a small model, and memory must stay flat.
 *
 *     deno run -A --v8-flags=--expose-gc tests/fuzz.ts [calls] [seed]
 *     bun tests/fuzz.ts [calls] [seed]
 *     node --expose-gc tests/fuzz.ts [calls] [seed]
 *
 * The seed is printed first, so that a crash leaves it behind; the same seed makes the same calls, as far as garbage is
 * collected at the same time. With KVERN_TRACE=1 each call is printed before it is made: the last line crashed.
 *
 * What is not tried, because no library could survive it: counts that are larger than their buffers, numbers and
 * strings where the ABI wants a buffer (Bun and Node take them for addresses), and freeing a cache by its raw handle
 * behind the back of the object that owns it. TypeScript never does any of them.
 */

import process from "node:process";
import { systemInfo } from "../mod.ts";
import { CacheFuzzer } from "./fuzz_caches.ts";
import { Dice } from "./fuzz_dice.ts";
import { PagedFuzzer } from "./fuzz_paged.ts";
import { WordFuzzer } from "./fuzz_words.ts";

/** What is in use. */
export interface Usage {
  readonly rss: number;
  readonly liveCaches: number;
  readonly reservedBytes: number;
}

/** What came of it. */
export interface FuzzReport {
  readonly seed: number;
  readonly calls: number;
  /** Calls that did what they were asked to. */
  readonly ok: number;
  readonly refused: number;
  /** How often each call had each answer: `"append: cache_full"`. */
  readonly answers: Record<string, number>;
  readonly dropped: number;
  readonly finalized: number;
  /** After a quarter of the calls, after all of them, and after everything was given up. */
  readonly quarter: Usage;
  readonly end: Usage;
  readonly after: Usage;
  readonly seconds: number;
}

/** Lets the garbage collector find what was dropped, and its callbacks run. */
async function collect(): Promise<void> {
  const runtime = globalThis as { gc?: () => void; Bun?: { gc: (force: true) => void } };
  runtime.gc?.();
  runtime.Bun?.gc(true);
  await new Promise((resolve) => setTimeout(resolve, 0));
}

/** What is in use after the collector has given back what it can. */
async function usage(): Promise<Usage> {
  for (let i = 0; i < 5; i++) {
    await collect();
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  const { liveCaches, reservedBytes } = systemInfo();
  return { rss: process.memoryUsage().rss, liveCaches, reservedBytes };
}

/** Growth of the process that counts as none: every runtime enlarges its heap as it finds out what is needed. */
const RSS_GROWTH_MAX = 2 ** 27;
/** Caches and bytes that may be alive in the middle of a run: 17 in use, others kept by what was taken out of them. */
const LIVE_MAX = 100;
const RESERVED_MAX = 2 ** 30;
/** Caches that may be left at the end: a collector that looks at the stack may still see the last ones there. */
const LEFT_MAX = 2;

/** Makes `calls` random calls in a process that has no caches; throws at the first wrong answer, or if memory grows. */
export async function fuzz({ calls, seed }: { readonly calls: number; readonly seed: number }): Promise<FuzzReport> {
  const started = performance.now();
  const dice = new Dice(seed);
  const caches = new CacheFuzzer(dice);
  const paged = new PagedFuzzer(dice);
  const words = new WordFuzzer(dice, (handle) => caches.owns(handle) || paged.owns(handle));
  let quarter: Usage | undefined;
  for (let i = 0; i < calls; i++) {
    try {
      [words, words, paged, paged, paged, caches, caches, caches, caches, caches][dice.below(10)]!.step();
    } catch (cause) {
      throw new Error(`Call ${i} of seed ${seed}: ${cause instanceof Error ? cause.message : cause}`, { cause });
    }
    if (i % 4096 === 4095) await collect();
    if (i === calls >>> 2) quarter = await usage();
  }
  const end = await usage();
  caches.end();
  paged.end();
  words.end();
  for (let i = 0; i < 100 && systemInfo().liveCaches > 0; i++) await collect();
  const after = await usage();
  if (quarter === undefined) throw new RangeError(`calls must be at least 1: ${calls}`);
  const flat = end.rss - quarter.rss < RSS_GROWTH_MAX &&
    Math.max(quarter.liveCaches, end.liveCaches) <= LIVE_MAX && after.liveCaches <= LEFT_MAX &&
    Math.max(quarter.reservedBytes, end.reservedBytes) <= RESERVED_MAX;
  if (!flat) throw new Error(`Memory is not flat with seed ${seed}: ${JSON.stringify({ quarter, end, after })}`);
  return {
    seed,
    calls,
    ok: dice.ok,
    refused: dice.refused,
    answers: dice.answers,
    dropped: caches.dropped + paged.dropped,
    finalized: systemInfo().finalizedCaches,
    quarter,
    end,
    after,
    seconds: (performance.now() - started) / 1000,
  };
}

if (import.meta.main) {
  const [calls = 1_000_000, seed = Date.now() >>> 0] = process.argv.slice(2).map(Number);
  process.stdout.write(`${calls} calls of seed ${seed}\n`);
  const { answers, ...report } = await fuzz({ calls, seed });
  for (const [answer, count] of Object.entries(answers).toSorted()) process.stdout.write(`${count} ${answer}\n`);
  process.stdout.write(`${JSON.stringify(report)}\n`);
}
