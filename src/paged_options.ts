/**
 * Options of block pools and paged caches, their defaults and range checks.
 *
 * @module
 */

import { type BlockPool, checkBlockSize, poolHandle } from "./block_pool.ts";
import { checkBytes, checkCount, checkOption, type DType, dtypeCodes, HEAD_DIM_MAX, SEQ_LEN_MAX } from "./config.ts";
import { KvError } from "./error.ts";
import { pagedRecord } from "./ffi/record.ts";

/** The shape of one layer of a {@linkcode PagedCache}. */
export interface LayerShape {
  /** KV heads, at least 1. */
  readonly kvHeadCount: number;
  /** Elements of a head, 1 to 256, the same for K and V; multiples of 32 are fast. */
  readonly headDim: number;
  /** Newest rows a query of this layer sees, its own included; older blocks are given back. All by default. */
  readonly windowTokens?: number;
}

/** Which rows of a sequence stay after a commit. */
export type Retention =
  | {
    /** Nothing leaves; `cache_full` at `maxSeqLen`. */
    readonly keep: "all";
  }
  | {
    /** The newest rows stay, and the first ones if asked; positions never change. */
    readonly keep: "newest";
    /** Rows that stay, sinks included, at least 1. */
    readonly tokens: number;
    /** First rows that never leave, fewer than `tokens`; 0 by default. */
    readonly sinkTokens?: number;
  };

/** The geometry of a {@linkcode PagedCache}, how it stores its elements, and what it keeps. */
export interface PagedCacheOptions {
  /** Transformer layers, all of one shape; with `kvHeadCount` and `headDim`, and without `layers`. */
  readonly layerCount?: number;
  /** KV heads of every layer, at least 1. */
  readonly kvHeadCount?: number;
  /** Elements of a head, 1 to 256, the same for K and V; multiples of 32 are fast. */
  readonly headDim?: number;
  /** Newest rows a query sees, its own included; older blocks are given back. All by default. */
  readonly windowTokens?: number;
  /** The shape of each layer, where they differ. Layers of one shape share blocks. */
  readonly layers?: readonly LayerShape[];
  /** Rows each sequence can hold, evicted ones included, 1 to 2^31 - 1. */
  readonly maxSeqLen: number;
  /** Positions a block holds: a power of two, 1 to 256; 64 by default. */
  readonly blockSize?: number;
  /** How elements are stored, for K and V together or apart; `"f16"` by default. */
  readonly dtype?: DType | { readonly k: DType; readonly v: DType };
  /** Which rows stay; `{ keep: "all" }` by default. */
  readonly retention?: Retention;
  /** Most bytes the cache may reserve; by default what this machine or its cgroup has. Not with `pool`. */
  readonly maxBytes?: number;
  /** Blocks shared with other caches; needs layers of one shape, and blocks of as many bytes as the pool's. */
  readonly pool?: BlockPool;
}

/** What a native cache is made of. */
export interface PagedPlan {
  readonly record: Uint32Array;
  /** Three words for each layer. */
  readonly layers: Uint32Array;
  readonly pool: BlockPool | undefined;
  /** Bytes of the largest block. */
  readonly blockBytes: number;
}

/** Words of a layer beside the record. */
export const LAYER_WORDS = 3;

const CREATE = "create a cache";

/** The checked words of `options`. */
export function planOf(options: PagedCacheOptions): PagedPlan {
  if (typeof options !== "object" || options === null) {
    throw new TypeError(`Cannot ${CREATE} as its options must be an object: ${typeof options}`);
  }
  const { maxSeqLen, blockSize = 64, dtype = "f16", retention, maxBytes, pool } = options;
  const layers = layersOf(options);
  if (pool !== undefined && maxBytes !== undefined) {
    throw refuse("pool and maxBytes exclude each other: both are given");
  }
  const words = layers.flatMap(({ kvHeadCount, headDim, windowTokens }) => [
    checkOption("kvHeadCount", kvHeadCount, CREATE),
    checkOption("headDim", headDim, CREATE, HEAD_DIM_MAX),
    windowTokens === undefined ? 0 : checkOption("windowTokens", windowTokens, CREATE),
  ]);
  const codes = dtypeCodes(dtype);
  const record = pagedRecord({
    layerCount: layers.length,
    maxSeqLen: checkOption("maxSeqLen", maxSeqLen, CREATE, SEQ_LEN_MAX),
    blockSize: checkBlockSize(blockSize, CREATE),
    ...codes,
    ...retentionWords(retention),
    maxBytes: maxBytes === undefined ? 0 : checkBytes("maxBytes", maxBytes, CREATE),
    pool: pool === undefined ? 0 : poolHandle(pool),
  });
  return { record, layers: Uint32Array.from(words), pool, blockBytes: largestBlock(layers, blockSize, codes) };
}

function layersOf({ layerCount, kvHeadCount, headDim, windowTokens, layers }: PagedCacheOptions): LayerShape[] {
  if (layers === undefined) {
    const count = checkOption("layerCount", layerCount!, CREATE, LAYER_COUNT_MAX);
    const window = windowTokens === undefined ? {} : { windowTokens };
    return new Array<LayerShape>(count).fill({ kvHeadCount: kvHeadCount!, headDim: headDim!, ...window });
  }
  if (!Array.isArray(layers)) throw new TypeError(`layers must be an array: ${typeof layers}`);
  const others = Object.entries({ layerCount, kvHeadCount, headDim, windowTokens });
  const other = others.find(([, value]) => value !== undefined);
  if (other !== undefined) throw refuse(`layers and ${other[0]} exclude each other: both are given`);
  if (layers.length === 0 || layers.length > LAYER_COUNT_MAX) {
    throw refuse(`layers must have 1 to ${LAYER_COUNT_MAX} elements: it has ${layers.length}`);
  }
  return layers.map(({ kvHeadCount, headDim, windowTokens }) =>
    windowTokens === undefined ? { kvHeadCount, headDim } : { kvHeadCount, headDim, windowTokens }
  );
}

/** Far above any model, and far below what the words of all layers could not hold. */
const LAYER_COUNT_MAX = 2 ** 16;

function retentionWords(retention: Retention = { keep: "all" }): {
  readonly retentionTokens: number;
  readonly retentionSinkTokens: number;
} {
  if (typeof retention !== "object" || retention === null) {
    throw new TypeError(`retention must be an object: ${retention === null ? "null" : typeof retention}`);
  }
  // As it may come from JSON: a name this version does not know must not pass for one it does.
  const { keep, tokens, sinkTokens } = retention as { keep: string; tokens?: number; sinkTokens?: number };
  if (keep === "all") {
    if (tokens === undefined && sinkTokens === undefined) return { retentionTokens: 0, retentionSinkTokens: 0 };
    throw refuse('retention.tokens and retention.sinkTokens need keep "newest": keep is all');
  }
  if (keep !== "newest") throw refuse(`retention.keep must be all or newest: keep is ${keep}`);
  const count = checkOption("retention.tokens", tokens!, CREATE);
  checkCount("retention.sinkTokens", sinkTokens ?? 0);
  const sinks = sinkTokens ?? 0;
  if (sinks < count) return { retentionTokens: count, retentionSinkTokens: sinks };
  throw refuse(`retention.sinkTokens must be below retention.tokens: ${sinks} sinks of ${count} tokens`);
}

function largestBlock(
  layers: readonly LayerShape[],
  blockSize: number,
  { dtypeK, dtypeV }: { readonly dtypeK: number; readonly dtypeV: number },
): number {
  const bytes = new Map<string, number>();
  const elementBytes = (dtypeK === 0 ? 4 : 2) + (dtypeV === 0 ? 4 : 2);
  for (const { kvHeadCount, headDim, windowTokens } of layers) {
    const key = `${kvHeadCount} ${headDim} ${windowTokens}`;
    bytes.set(key, (bytes.get(key) ?? 0) + kvHeadCount * headDim * blockSize * elementBytes);
  }
  return Math.max(...bytes.values());
}

function refuse(rule: string): KvError {
  return new KvError("invalid_config", `Cannot ${CREATE} as ${rule}`);
}
