/** The caches a run can choose from, each with its sequences, its cost in bytes and the end of its life. */
import { ContiguousCache, type KvCache, memoryBytes, PagedCache, type Sequence } from "../mod.ts";
import { type BlockSurvey, surveyBlocks } from "./blocks.ts";
import type { Options } from "./options.ts";
import type { ZigletConfig } from "./weights.ts";

/** What the options say of a cache. */
export type CacheOptions = Pick<Options, "cache" | "kv" | "blockSize">;

/** A cache with one sequence, what it costs, and the end of its life. */
export interface HeldCache extends Disposable {
  readonly cache: KvCache;
  /** What it costs now. */
  cost(): CacheCost;
}

/** A paged cache, whose sequence may be forked into several. */
export interface HeldPagedCache extends HeldCache {
  readonly paged: PagedCache;
  /** All sequences, `cache` first. */
  readonly sequences: readonly Sequence[];
  /** Forks the first sequence until there are `count`. */
  fork(count: number): void;
}

/** Bytes of a cache; null for what a contiguous cache does not have. */
export interface CacheCost {
  /** All bytes it has taken, in use or not. */
  cacheBytes: number;
  survey: BlockSurvey | null;
  /** Bytes of a contiguous cache with as many sequences of `maxSeqLen` tokens. */
  contiguousBytes: number | null;
}

/** Makes the cache that the options ask for, with room for `maxSeqLen` tokens. */
export function newCache(options: CacheOptions, config: ZigletConfig, maxSeqLen: number): HeldCache {
  return options.cache === "paged"
    ? newPagedCache(options, config, maxSeqLen)
    : newContiguousCache(options, config, maxSeqLen);
}

/** Makes a paged cache with one sequence. */
export function newPagedCache(
  { kv: dtype, blockSize }: CacheOptions,
  { layerCount, kvHeadCount, headDim }: ZigletConfig,
  maxSeqLen: number,
): HeldPagedCache {
  const shape = { layerCount, kvHeadCount, headDim, maxSeqLen, dtype };
  const paged = new PagedCache({ ...shape, blockSize });
  const cache = paged.sequence();
  const sequences = [cache];
  return {
    paged,
    cache,
    sequences,
    fork: (count) => {
      while (sequences.length < count) sequences.push(cache.fork());
    },
    cost: () => {
      const { reservedBytes, metadataBytes } = paged.stats();
      return {
        cacheBytes: reservedBytes + metadataBytes,
        survey: surveyBlocks(paged, sequences),
        contiguousBytes: memoryBytes({ ...shape, sequenceCount: sequences.length }),
      };
    },
    [Symbol.dispose]: () => paged.free(),
  };
}

function newContiguousCache(
  { kv: dtype }: CacheOptions,
  { layerCount, kvHeadCount, headDim }: ZigletConfig,
  maxSeqLen: number,
): HeldCache {
  const contiguous = new ContiguousCache({ layerCount, kvHeadCount, headDim, maxSeqLen, dtype });
  return {
    cache: contiguous.sequence(0),
    cost: () => ({ cacheBytes: contiguous.memoryBytes, survey: null, contiguousBytes: null }),
    [Symbol.dispose]: () => contiguous.free(),
  };
}

/**
 * For example "contiguous cache 6.0 MiB f32", or "paged cache 2.1 MiB f32, 22 blocks (1 shared), contiguous 18.0 MiB".
 */
export function cacheLabel({ cache, kv }: CacheOptions, { cacheBytes, survey, contiguousBytes }: CacheCost): string {
  if (survey === null || contiguousBytes === null) return `${cache} cache ${formatBytes(cacheBytes)} ${kv}`;
  const { usedBytes, blocksUsed, blocksShared } = survey;
  const shared = blocksShared === 0 ? "" : ` (${blocksShared} shared)`;
  return `${cache} cache ${formatBytes(usedBytes)} ${kv}, ${blocksUsed} blocks${shared}, ` +
    `contiguous ${formatBytes(contiguousBytes)}`;
}

/** For example "384 KiB" or "6.0 MiB". */
export function formatBytes(bytes: number): string {
  return bytes < 2 ** 20 ? `${(bytes / 2 ** 10).toFixed(0)} KiB` : `${(bytes / 2 ** 20).toFixed(1)} MiB`;
}
