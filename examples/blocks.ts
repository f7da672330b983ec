/** Which blocks a paged cache uses, and which of them several sequences share. */
import type { PagedCache, Sequence } from "../mod.ts";

/** One block in the table of one sequence. */
export interface Cell {
  /** Number of the block in its pool; each tier has one. */
  block: number;
  tier: "tail" | "warm" | "store" | null;
  /** Sequences that use it. */
  references: number;
}

/** The blocks of a cache as they are now. All layers of a model have one shape, so each block holds all of them. */
export interface BlockSurvey {
  /** Positions a block holds. */
  blockSize: number;
  /** The blocks of each sequence by ascending position, `[sequence][block]`. */
  tables: Cell[][];
  /** Blocks in use, each counted once. */
  blocksUsed: number;
  /** Blocks that more than one sequence uses, each counted once. */
  blocksShared: number;
  /** Blocks in all tables: what would be in use if nothing were shared. */
  tableEntries: number;
  /** Blocks of the tail there is memory for and nobody uses. */
  blocksFree: number;
  /** Bytes of the blocks in use. */
  usedBytes: number;
}

/** Looks at the blocks of all sequences of a cache. */
export function surveyBlocks(cache: PagedCache, sequences: readonly Sequence[]): BlockSurvey {
  const tables = sequences.map((sequence) => {
    const references = sequence.blockReferences(0), tiers = sequence.blockTiers(0);
    return Array.from(
      sequence.blockTable(0),
      (block, i): Cell => ({ block, tier: tiers[i]!, references: references[i]! }),
    );
  });
  const shared = tables.flat().filter(({ references }) => references > 1).map(cellName);
  const { blockCount, usedBytes, tableEntries } = cache.stats();
  return {
    blockSize: cache.blockSize,
    tables,
    blocksUsed: blockCount,
    blocksShared: new Set(shared).size,
    tableEntries,
    blocksFree: cache.poolStats().freeBlocks,
    usedBytes,
  };
}

/** Tells a block from all others of its cache. */
export function cellName({ tier, block }: Cell): string {
  return `${tier} ${block}`;
}
