/** What a run came to, with the names of `systemInfo` and of the options: what --json prints. */
import { systemInfo } from "../mod.ts";
import { type CacheCost, kvName } from "./caches.ts";
import type { ComparisonRow } from "./comparison.ts";
import type { CacheKind, Options } from "./options.ts";

/** What a run measured. */
export interface Measured {
  /** Tokens generated, of all samples, both runs or the best beam; or scored. */
  tokens: number | null;
  /** Of the steps behind the prompt when generating, those of the second of two runs, of everything when scoring. */
  tokensPerSecond: number | null;
  bitsPerByte: number | null;
  /** Seconds spent in attend. */
  attendSeconds: number | null;
  /** Seconds from the loaded model to the end. */
  totalSeconds: number;
  /** What the cache cost at the end. */
  cost: CacheCost;
  /** Only with --compare. */
  comparison?: { rows: ComparisonRow[]; computedTotals: { withCacheSeconds: number; withoutCacheSeconds: number } };
  /** Only with --score: of the rows that were attended, how many were in the tail and how many in the store, of 1. */
  attendedShare?: { tail: number; store: number };
  /** Only with --repeat: where each run started in the prompt, and what it took. */
  runs?: { startsAt: number; computedTokens: number; promptSeconds: number; decodeSeconds: number }[];
  /** Only with --beams: the texts behind the prompt, best first. */
  beams?: { score: number; text: string }[];
}

/** The object of --json; the fields of blocks are null for a contiguous cache. */
export interface Report {
  runtime: string;
  level: string;
  kv: string;
  tokens: number | null;
  tokensPerSecond: number | null;
  bitsPerByte: number | null;
  /** Bytes of the cache, full or not; of a paged one what it has reserved so far. */
  cacheBytes: number;
  attendSeconds: number | null;
  totalSeconds: number;
  cache: CacheKind;
  blockSize: number | null;
  /** Texts behind the prompt. */
  samples: number | null;
  /** Blocks in use at the end, each counted once. */
  blocksUsed: number | null;
  /** Blocks that more than one sequence uses, each counted once. */
  blocksShared: number | null;
  /** Bytes of the blocks in use. */
  poolBytes: number | null;
  /** Bytes of a contiguous cache with as many sequences. */
  contiguousBytes: number | null;
}

/** Puts the report together. */
export function reportOf(options: Options, measured: Measured): Report {
  const { runtime, level } = systemInfo();
  const { tokens, tokensPerSecond, bitsPerByte, attendSeconds, totalSeconds, cost, ...more } = measured;
  const { cacheBytes, survey, contiguousBytes } = cost;
  return {
    runtime,
    level,
    kv: kvName(options.kv),
    tokens,
    tokensPerSecond,
    bitsPerByte,
    cacheBytes,
    attendSeconds,
    totalSeconds,
    cache: options.cache,
    blockSize: survey?.blockSize ?? null,
    samples: survey !== null && options.mode === "generate" && options.beams === null ? options.samples : null,
    blocksUsed: survey?.blocksUsed ?? null,
    blocksShared: survey?.blocksShared ?? null,
    poolBytes: survey?.usedBytes ?? null,
    contiguousBytes,
    ...more,
  };
}
