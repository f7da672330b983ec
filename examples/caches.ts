/** The caches a run can choose from, each with its sequences, its cost in bytes and the end of its life. */
import {
  ContiguousCache,
  type DType,
  type FloatDType,
  type KvCache,
  memoryBytes,
  PagedCache,
  type PagedOptions,
  type Sequence,
} from "../mod.ts";
import { type BlockSurvey, surveyBlocks } from "./blocks.ts";
import { isFloat, type Options } from "./options.ts";
import type { ZigletConfig } from "./weights.ts";
import { countText, formatBytes } from "./wording.ts";

/** What the options say of a cache. */
export type CacheOptions = Pick<Options, "cache" | "kv" | "blockSize" | "tail" | "sinks">;

/** A cache with one sequence, what it costs, and the end of its life. */
export interface HeldCache extends Disposable {
  readonly cache: KvCache;
  /** The paged cache it is a sequence of, if it is one. */
  readonly paged?: PagedCache;
  /** What it costs now. */
  cost(): CacheCost;
}

/** What the floats are in which rows wait to become codes. */
const TAIL_DTYPE: FloatDType = "f16";

/** A paged cache, whose sequence may be forked into several. */
export interface HeldPagedCache extends HeldCache {
  readonly paged: PagedCache;
  /** All sequences, `cache` first. */
  readonly sequences: readonly Sequence[];
  /** Forks the first sequence until there are `count`. */
  fork(count: number): void;
  /** Ends all sequences; the new first one has what the cache still knows of these tokens. */
  startWith(tokens: Uint8Array): void;
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

/**
 * Makes a paged cache with one sequence. With `keepsPrefixes` it keeps blocks that no sequence uses any more, until their
 * memory is wanted.
 */
export function newPagedCache(
  { kv, blockSize, tail, sinks }: Omit<CacheOptions, "cache">,
  { layerCount, kvHeadCount, headDim }: ZigletConfig,
  maxSeqLen: number,
  { keepsPrefixes = false }: { keepsPrefixes?: boolean } = {},
): HeldPagedCache {
  const shape = { layerCount, kvHeadCount, headDim, maxSeqLen };
  const dtype = floatsOf(kv);
  const tiers = tierOptions({ kv, tail, sinks });
  const paged = new PagedCache({ ...shape, ...tiers, blockSize, ...(keepsPrefixes ? { prefix: {} } : {}) });
  const sequences = [paged.sequence()];
  return {
    paged,
    get cache() {
      return sequences[0]!;
    },
    sequences,
    fork: (count) => {
      while (sequences.length < count) sequences.push(sequences[0]!.fork());
    },
    startWith: (tokens) => {
      for (const sequence of sequences.splice(0)) sequence.free();
      sequences.push(paged.sequence({ tokens: Uint32Array.from(tokens) }));
    },
    cost: () => {
      const { reservedBytes, metadataBytes } = paged.stats();
      return {
        cacheBytes: reservedBytes + metadataBytes,
        survey: surveyBlocks(paged, sequences),
        contiguousBytes: memoryBytes({ ...shape, dtype, sequenceCount: sequences.length }),
      };
    },
    [Symbol.dispose]: () => paged.free(),
  };
}

/** How a paged cache stores rows: in floats, or in those first and in codes later. */
export function tierOptions(
  { kv, tail, sinks }: Pick<CacheOptions, "kv" | "tail" | "sinks">,
): Pick<PagedOptions, "dtype" | "tail" | "store"> {
  if (isFloat(kv.k) && isFloat(kv.v)) return { dtype: floatsOf(kv) };
  return { tail: { dtype: TAIL_DTYPE, tokens: tail, sinkTokens: sinks }, store: kv };
}

/** The floats of a cache without codes: those asked for, and f16 where codes were. */
function floatsOf({ k, v }: { k: DType; v: DType }): { k: FloatDType; v: FloatDType } {
  return { k: isFloat(k) ? k : TAIL_DTYPE, v: isFloat(v) ? v : TAIL_DTYPE };
}

function newContiguousCache(
  { kv }: CacheOptions,
  { layerCount, kvHeadCount, headDim }: ZigletConfig,
  maxSeqLen: number,
): HeldCache {
  const contiguous = new ContiguousCache({ layerCount, kvHeadCount, headDim, maxSeqLen, dtype: floatsOf(kv) });
  return {
    cache: contiguous.sequence(0),
    cost: () => ({ cacheBytes: contiguous.memoryBytes, survey: null, contiguousBytes: null }),
    [Symbol.dispose]: () => contiguous.free(),
  };
}

/**
 * What a cache costs, the most important fact first: for example "contiguous cache 6.0 MiB f32", or "paged cache 2.1 MiB
 * f32", "22 blocks (1 shared)", "contiguous 18.0 MiB".
 */
export function cacheFacts(options: CacheOptions, { cacheBytes, survey, contiguousBytes }: CacheCost): string[] {
  const { cache } = options;
  const kv = kvName(options.kv);
  if (survey === null || contiguousBytes === null) return [`${cache} cache ${formatBytes(cacheBytes)} ${kv}`];
  const { usedBytes, blocksUsed, blocksShared } = survey;
  const shared = blocksShared === 0 ? "" : ` (${blocksShared} shared)`;
  return [
    `${cache} cache ${formatBytes(usedBytes)} ${kv}`,
    `${countText(blocksUsed, "block")}${shared}`,
    `contiguous ${formatBytes(contiguousBytes)}`,
  ];
}

/** For example "f16", or "i8/i4" where keys and values differ. */
export function kvName({ k, v }: { k: DType; v: DType }): string {
  return k === v ? k : `${k}/${v}`;
}
