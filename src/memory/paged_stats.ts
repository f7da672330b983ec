/**
 * What a paged cache holds, tier by tier.
 *
 * Rows are counted where they are seen: two sequences that share a block have its rows twice. Bytes are counted where they
 * are: a shared block once.
 *
 * @module
 */

import { valuesOf } from "../ffi/record.ts";

/** What a paged cache holds, and where the bytes are; plain data. */
export interface PagedStats {
  /** Committed rows that are there in layer 0, of all sequences; rows that several share count in each. */
  readonly totalTokens: number;
  /** Rows of `totalTokens` that are in the tail. */
  readonly tailTokens: number;
  /** Rows of `totalTokens` that have left the tail. */
  readonly storeTokens: number;
  /** Rows of `storeTokens` that an earlier policy put there, in another format than the present one's. */
  readonly warmTokens: number;
  /** Bytes of the rows in the tail, in all layers; rows that several sequences share count once. */
  readonly tailBytes: number;
  /** Bytes of the rows that have left it, scales included; a block with scales for all its rows counts whole. */
  readonly storeBytes: number;
  /**
   * Bytes of blocks in use that are no committed rows anyone sees: pending rows, the ends of blocks, rows that are there
   * to be rewound to, and on a shared pool the blocks of the other caches.
   */
  readonly slackBytes: number;
  /** Bytes the committed rows would have as f32 over `tailBytes + storeBytes`; 1 when there are none. */
  readonly compressionRatio: number;
  /** Blocks in use in the pools of the cache, each counted once; of a shared pool all of them. */
  readonly blockCount: number;
  /** Blocks of which a sequence shows something; one that several share counts in each. */
  readonly tableEntries: number;
  /** Positions a block holds. */
  readonly tokensPerBlock: number;
  /** Sequences that were not freed. */
  readonly sequenceCount: number;
  /**
   * Rows that retention and windows took out of sight, in each group of layers of one shape; one that a truncate brought
   * back counts again when it goes again.
   */
  readonly evictions: number;
  /** Bytes of the blocks in use. */
  readonly usedBytes: number;
  /** Bytes reserved for blocks. */
  readonly reservedBytes: number;
  /** Bytes of tables and bookkeeping, without those of `prefix`. */
  readonly metadataBytes: number;
  /** What prompts found. */
  readonly prefix: PrefixStats;
}

/** What prompts found, and what is kept so that they do; plain data. */
export interface PrefixStats {
  /** Prompts that sequences were made with. */
  readonly lookups: number;
  /** Prompts of which some rows were there. */
  readonly hits: number;
  /** Their rows, which nobody had to compute. */
  readonly hitTokens: number;
  /** Blocks that are known by their tokens, those of living sequences included. */
  readonly cachedBlocks: number;
  /** Bytes of these blocks. */
  readonly cachedBytes: number;
  /** Blocks that were known and had to go: for memory, or for a limit of the option `prefix`. */
  readonly evictedBlocks: number;
  /** Bytes of the index. */
  readonly metadataBytes: number;
}

/** What a PagedStatsRecord and a PrefixStatsRecord say. */
export function pagedStatsOf(record: Uint32Array, prefix: Uint32Array, tokensPerBlock: number): PagedStats {
  const values = valuesOf("pagedStats", record);
  const { tailTokenCount, storeTokenCount, warmTokenCount, tailBytes, storeBytes, f32Bytes } = values;
  const { usedBlocks, tableEntries, sequenceCount, evictions, usedBytes, reservedBytes, metadataBytes } = values;
  return {
    totalTokens: tailTokenCount + storeTokenCount,
    tailTokens: tailTokenCount,
    storeTokens: storeTokenCount,
    warmTokens: warmTokenCount,
    tailBytes,
    storeBytes,
    slackBytes: usedBytes - tailBytes - storeBytes,
    compressionRatio: tailBytes + storeBytes === 0 ? 1 : f32Bytes / (tailBytes + storeBytes),
    blockCount: usedBlocks,
    tableEntries,
    tokensPerBlock,
    sequenceCount,
    evictions,
    usedBytes,
    reservedBytes,
    metadataBytes,
    prefix: valuesOf("prefixStats", prefix),
  };
}
