/**
 * Options of block pools and paged caches, their defaults and range checks.
 *
 * @module
 */

import { KvError } from "../error.ts";
import { ENUMS, VALUES } from "../ffi/exports.ts";
import { recordOf, recordsOf, type Values } from "../ffi/record.ts";
import { checkBlockSize, checkBytes, checkCount, checkHeads, checkOption, checkQueryHeads } from "./counts.ts";
import { type DType, dtypeCodes, dtypeOf, type FloatDType } from "./dtype.ts";
import { headBytes, type KvFormat, type Sides, sidesOf } from "./format.ts";
import { checkOptions, type OptionNames, optionNames } from "./option_names.ts";
import { type PrefixOptions, prefixWords } from "./prefix.ts";
import { type LogitErrorOptions, type Policy, policyValues, storeOf, storeWords } from "./policy.ts";
import { type Retention, retentionWords } from "./retention.ts";

/** The shape of one layer of a {@linkcode PagedCache}. */
export interface LayerShape {
  /** KV heads, at least 1. */
  readonly kvHeadCount: number;
  /** Elements of a head, 1 to 256, the same for K and V; multiples of 32 are fast. */
  readonly headDim: number;
  /** Query heads, a multiple of `kvHeadCount`: where given, `attend` refuses queries that do not have as many. */
  readonly qHeadCount?: number;
  /** Newest rows a query of this layer sees, its own included; older blocks are given back. All by default. */
  readonly windowTokens?: number;
  /** The format its rows migrate to, instead of the cache's `store`. */
  readonly store?: KvFormat;
}

/** The floats to which all rows are written, and how long they stay there. */
export interface TailOptions {
  /** How elements are stored, for K and V together or apart; `"f16"` by default. The same as the option `dtype`. */
  readonly dtype?: FloatDType | { readonly k: FloatDType; readonly v: FloatDType };
  /**
   * Newest rows that stay, a multiple of `blockSize`, at most `retention.tokens`; 0 by default. Up to `blockSize - 1`
   * more stay until their block is full. Needs a `store`.
   */
  readonly tokens?: number;
  /** First rows whose blocks never migrate, beside the newest ones; 0 by default. Needs a `store`. */
  readonly sinkTokens?: number;
}

/**
 * The geometry of a {@linkcode PagedCache}, how it stores its elements, and what it keeps: all of
 * {@linkcode PagedCacheOptions} but the pool. The limits of {@linkcode LogitErrorOptions} need a `store`.
 */
export interface PagedOptions extends LogitErrorOptions {
  /** Transformer layers, all of one shape; with `kvHeadCount` and `headDim`, and without `layers`. */
  readonly layerCount?: number;
  /** KV heads of every layer, at least 1. */
  readonly kvHeadCount?: number;
  /** Elements of a head, 1 to 256, the same for K and V; multiples of 32 are fast. */
  readonly headDim?: number;
  /**
   * Query heads of every layer, a multiple of `kvHeadCount`: where given, `attend` refuses queries that do not have as
   * many.
   */
  readonly qHeadCount?: number;
  /** Newest rows a query sees, its own included; older blocks are given back. All by default. */
  readonly windowTokens?: number;
  /** The shape of each layer, where they differ. Layers of one shape share blocks. */
  readonly layers?: readonly LayerShape[];
  /** Rows each sequence can hold, evicted ones included, 1 to 2^31 - 1. */
  readonly maxSeqLen: number;
  /** Positions a block holds: a power of two, 1 to 256; 64 by default. */
  readonly blockSize?: number;
  /** How elements of the tail are stored, for K and V together or apart; `"f16"` by default. Not with `tail.dtype`. */
  readonly dtype?: FloatDType | { readonly k: FloatDType; readonly v: FloatDType };
  /** The floats to which all rows are written, and how long they stay there. */
  readonly tail?: TailOptions;
  /**
   * The format of rows that have left the tail, a block at a time; without one, here or in `layers`, none leaves it.
   * Quantized formats need a `blockSize` of 64, 128 or 256 and a `headDim` that is a multiple of 32.
   */
  readonly store?: KvFormat;
  /**
   * Compares every row that migrates with what it became, for {@linkcode PagedCache.fidelity}, which costs about as much
   * again as quantizing it; false by default.
   */
  readonly measureFidelity?: boolean;
  /** Which rows stay; `{ keep: "all" }` by default. */
  readonly retention?: Retention;
  /**
   * How far a sequence can be rewound where old rows are given up, 0 to 2^31 - 1; `blockSize` by default.
   *
   * That many rows more than `retention` and `windowTokens` keep stay in their blocks. No read sees them, and of all
   * counts only those of blocks in use have them. Where nothing is given up, every length can be gone back to and this
   * has no effect. See {@linkcode Sequence.rewindableTo}.
   */
  readonly rewindTokens?: number;
  /**
   * What is kept of sequences that have ended, so that a prompt starts where an earlier one ends: see
   * {@linkcode PagedCache.sequence}. Without it rows are found as long as a sequence has them. Not with `pool`.
   */
  readonly prefix?: PrefixOptions;
  /**
   * Most bytes the blocks of the cache may take; by default what this machine or its cgroup has. The system rounds each
   * piece of memory up to whole pages. Not with `pool`.
   */
  readonly maxBytes?: number;
}

/**
 * The newest 4096 rows of each sequence, 256 or a few more in f16 and the older ones in 4.5 bits: add `layerCount` and
 * `maxSeqLen`, and replace what your model has otherwise.
 *
 * A row of K and V in one layer takes 4096 bytes in the tail and 1152 in the store, which as f32 are 8192.
 *
 * @example 256 * 4096 + 3840 * 1152 = 5,472,256 bytes for a full sequence of one layer
 * ```ts
 * import assert from "node:assert/strict";
 * import { PagedCache, twoTierDefaults } from "@kvern/kvern";
 *
 * using cache = new PagedCache({ ...twoTierDefaults, layerCount: 1, maxSeqLen: 2 ** 20 });
 * const sequence = cache.sequence();
 * const rows = new Float32Array(4096 * sequence.kvDim).fill(0.5);
 * sequence.append(0, rows, rows);
 * sequence.commit(4096);
 * const { tailTokens, storeTokens, tailBytes, storeBytes } = cache.stats();
 * assert.deepEqual([tailTokens, storeTokens, tailBytes + storeBytes], [256, 3840, 5_472_256]);
 * ```
 */
export const twoTierDefaults: {
  readonly kvHeadCount: number;
  readonly headDim: number;
  readonly blockSize: number;
  readonly tail: { readonly dtype: FloatDType; readonly tokens: number };
  readonly store: { readonly k: DType; readonly v: DType };
  readonly retention: { readonly keep: "newest"; readonly tokens: number };
} = {
  kvHeadCount: 8,
  headDim: 128,
  blockSize: 64,
  tail: { dtype: "f16", tokens: 256 },
  store: { k: "q4_0", v: "q4_0" },
  retention: { keep: "newest", tokens: 4096 },
};

const LAYER_NAMES: OptionNames = optionNames<LayerShape>({
  kvHeadCount: true,
  headDim: true,
  qHeadCount: true,
  windowTokens: true,
  store: true,
});

const TAIL_NAMES: OptionNames = optionNames<TailOptions>({
  dtype: true,
  tokens: true,
  sinkTokens: true,
});

const PAGED_NAMES: OptionNames = optionNames<PlanOptions<unknown>>({
  layerCount: true,
  kvHeadCount: true,
  headDim: true,
  qHeadCount: true,
  windowTokens: true,
  layers: true,
  maxSeqLen: true,
  blockSize: true,
  dtype: true,
  tail: true,
  store: true,
  measureFidelity: true,
  maxLogitError: true,
  queryNorm: true,
  retention: true,
  rewindTokens: true,
  prefix: true,
  maxBytes: true,
  pool: true,
});

/** The options of a cache, with whatever the caller has for a pool. */
export interface PlanOptions<Pool> extends PagedOptions {
  readonly pool?: Pool;
}

/** What a native cache is made of. */
export interface PagedPlan<Pool> {
  readonly record: Uint32Array;
  /** A LayerRecord for each layer. */
  readonly layers: Uint32Array;
  readonly pool: Pool | undefined;
  /** Bytes of the largest block, in the tail or in the store. */
  readonly blockBytes: number;
}

/** A layer whose store says both sides. */
export interface PagedLayer extends LayerShape {
  readonly store?: Sides;
}

const CREATE = "create a cache";

const KEEP_ALL: Retention = { keep: "all" };

/** The checked words of `options`; `handleOf` gives the handle of a pool, or refuses it. */
export function planOf<Pool>(options: PlanOptions<Pool>, handleOf: (pool: Pool) => number): PagedPlan<Pool> {
  checkOptions(options, PAGED_NAMES, CREATE);
  const { maxSeqLen, blockSize = VALUES.blockSizeDefault, dtype, tail, store, retention = KEEP_ALL, maxBytes, pool } =
    options;
  const { measureFidelity = false, maxLogitError, queryNorm, rewindTokens = blockSize, prefix } = options;
  const layers = layersOf(options);
  if (pool !== undefined && maxBytes !== undefined) {
    throw refuse("pool and maxBytes exclude each other: both are given");
  }
  if (typeof measureFidelity !== "boolean") {
    throw new TypeError(`measureFidelity must be a boolean: ${typeof measureFidelity}`);
  }
  const { dtype: own, ...stay } = tailOf(tail);
  if (dtype !== undefined && own !== undefined) {
    throw refuse("dtype and tail.dtype exclude each other: both are given");
  }
  const { tailDtype = "f16" } = { tailDtype: dtype === undefined ? own : dtype };
  const codes = dtypeCodes(tailDtype, CREATE);
  const storeSides = store === undefined ? undefined : sidesOf("store", store, CREATE);
  const values = {
    layerCount: layers.length,
    groupCount: 0, // the library's answer
    maxSeqLen: checkOption("maxSeqLen", maxSeqLen, CREATE, VALUES.maxSeqLenMax),
    blockSize: checkBlockSize(blockSize, CREATE),
    ...codes,
    ...retentionWords(retention, CREATE),
    rewindTokens: checkRewind(rewindTokens),
    maxBytes: maxBytes === undefined ? 0 : checkBytes("maxBytes", maxBytes, CREATE),
    pool: pool === undefined ? 0 : handleOf(pool),
    ...prefixWords(prefix, pool !== undefined, CREATE),
  };
  const { retentionTokens } = values;
  const limits = { maxLogitError, queryNorm };
  const policy = policyValues(policyOfOptions({ ...stay, ...limits }, storeSides, layers), {
    action: CREATE,
    blockSize,
    retentionTokens,
    measuresFidelity: measureFidelity,
    layers,
  });
  const sides = { k: dtypeOf(codes.dtypeK), v: dtypeOf(codes.dtypeV) };
  return {
    record: recordOf("paged", { ...values, ...policy, measuresFidelity: Number(measureFidelity) }),
    layers: recordsOf("layer", layers.map(layerValues)),
    pool,
    blockBytes: largestBlock(layers, blockSize, sides, policy),
  };
}

/** A count of rows to rewind; 0 is one, too. */
function checkRewind(rewindTokens: number): number {
  checkCount("rewindTokens", rewindTokens);
  if (rewindTokens <= VALUES.maxSeqLenMax) return rewindTokens;
  throw refuse(`rewindTokens must be at most ${VALUES.maxSeqLenMax}: rewindTokens is ${rewindTokens}`);
}

/** The options of a tail, each read once. */
function tailOf(tail: TailOptions = {}): Given<TailOptions> {
  checkOptions(tail, TAIL_NAMES, CREATE, "tail");
  const { dtype, tokens, sinkTokens } = tail;
  return { dtype, tokens, sinkTokens };
}

/** What `tail`, `store` and the limits mean. */
function policyOfOptions(
  { tokens, sinkTokens, maxLogitError, queryNorm }: Omit<Given<TailOptions & LogitErrorOptions>, "dtype">,
  store: Sides | undefined,
  layers: readonly PagedLayer[],
): Policy {
  if (store !== undefined || layers.some((layer) => layer.store !== undefined)) {
    const stay = sinkTokens === undefined ? {} : { sinkTokens };
    return {
      kind: "hybrid",
      tail: { tokens: tokens === undefined ? 0 : tokens, ...stay },
      ...(store === undefined ? {} : { store }),
      ...(maxLogitError === undefined ? {} : { maxLogitError }),
      ...(queryNorm === undefined ? {} : { queryNorm }),
    };
  }
  const given = { "tail.tokens": tokens, "tail.sinkTokens": sinkTokens, maxLogitError, queryNorm };
  const wrong = Object.entries(given).find(([, value]) => value !== undefined);
  if (wrong !== undefined) throw refuse(`${wrong[0]} needs a store: ${wrong[0]} is ${wrong[1]}`);
  return { kind: "tail-only" };
}

function layersOf(options: PagedOptions): PagedLayer[] {
  const { layerCount, kvHeadCount, headDim, qHeadCount, windowTokens, layers } = options;
  if (layers === undefined) {
    const count = checkOption("layerCount", layerCount!, CREATE, LAYER_COUNT_MAX);
    const shape = { kvHeadCount: kvHeadCount!, headDim: headDim!, qHeadCount, windowTokens, store: undefined };
    return new Array<PagedLayer>(count).fill(layerOf(shape));
  }
  if (!Array.isArray(layers)) throw new TypeError(`layers must be an array: ${typeof layers}`);
  const others = Object.entries({ layerCount, kvHeadCount, headDim, qHeadCount, windowTokens });
  const other = others.find(([, value]) => value !== undefined);
  if (other !== undefined) throw refuse(`layers and ${other[0]} exclude each other: both are given`);
  if (layers.length === 0 || layers.length > LAYER_COUNT_MAX) {
    throw refuse(`layers must have 1 to ${LAYER_COUNT_MAX} elements: it has ${layers.length}`);
  }
  return Array.from(layers, (layer: LayerShape, i) => {
    checkOptions(layer, LAYER_NAMES, CREATE, `layers[${i}]`);
    const { kvHeadCount, headDim, qHeadCount, windowTokens, store } = layer;
    return layerOf({ kvHeadCount, headDim, qHeadCount, windowTokens, store }, `layers[${i}].`);
  });
}

/** Options as they are read: one left out is undefined. */
type Given<Options> = { readonly [Name in keyof Options]-?: Options[Name] | undefined };

/** A checked layer. */
function layerOf(
  { kvHeadCount, headDim, qHeadCount, windowTokens, store }: Given<LayerShape>,
  path: string = "",
): PagedLayer {
  const window = `${path}windowTokens`;
  return {
    ...checkHeads(kvHeadCount!, headDim!, CREATE, path),
    ...(qHeadCount === undefined ? {} : { qHeadCount: checkQueryHeads(qHeadCount, kvHeadCount!, CREATE, path) }),
    ...(windowTokens === undefined ? {} : { windowTokens: checkOption(window, windowTokens, CREATE) }),
    ...(store === undefined ? {} : { store: sidesOf(`${path}store`, store, CREATE) }),
  };
}

/** What a LayerRecord says of a layer. */
function layerValues({ kvHeadCount, headDim, windowTokens = 0, store, qHeadCount = 0 }: PagedLayer): Values<"layer"> {
  const [storeK, storeV] = storeWords(store);
  return { kvHeadCount, headDim, windowTokens, storeK, storeV, qHeadCount };
}

/** The layer that a LayerRecord tells of. */
export function pagedLayerOf(values: Values<"layer">): PagedLayer {
  const { kvHeadCount, headDim, windowTokens, qHeadCount } = values;
  const store = storeOf(values.storeK, values.storeV);
  return {
    kvHeadCount,
    headDim,
    ...(qHeadCount === 0 ? {} : { qHeadCount }),
    ...(windowTokens === 0 ? {} : { windowTokens }),
    ...(store === undefined ? {} : { store }),
  };
}

/** Far above any model, and far below what the words of all layers could not hold. */
const LAYER_COUNT_MAX = 2 ** 16;

/** The group of each layer: those of one shape, numbered as they first occur. */
export function groupsOf(layers: readonly PagedLayer[]): number[] {
  const seen = new Map<string, number>();
  return layers.map(({ kvHeadCount, headDim, windowTokens, store }) => {
    const key = `${kvHeadCount} ${headDim} ${windowTokens} ${store?.k} ${store?.v}`;
    const group = seen.get(key) ?? seen.size;
    seen.set(key, group);
    return group;
  });
}

/** Bytes of the largest block of any group, in the tail or in the store. */
export function largestBlock(
  layers: readonly PagedLayer[],
  blockSize: number,
  tail: Sides,
  { policyKind, policyStoreK, policyStoreV }: Values<"policy">,
): number {
  const bytes = new Map<number, number[]>();
  for (const [layer, group] of groupsOf(layers).entries()) {
    const { kvHeadCount, headDim, store = storeOf(policyStoreK, policyStoreV) } = layers[layer]!;
    const isTailOnly = policyKind === ENUMS.policyKind.tailOnly;
    const formats = isTailOnly || store === undefined ? [tail] : [tail, store];
    const sums = bytes.get(group) ?? [0, 0];
    bytes.set(group, formats.map((format, i) => sums[i]! + kvHeadCount * headBytes(format, headDim, blockSize)));
  }
  return Math.max(...[...bytes.values()].flat());
}

function refuse(rule: string): KvError {
  return new KvError("invalid_config", `Cannot ${CREATE} as ${rule}`);
}
