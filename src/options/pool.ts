/**
 * Options of a block pool, and the record of them.
 *
 * @module
 */

import { VALUES } from "../ffi/exports.ts";
import { recordOf } from "../ffi/record.ts";
import { countText } from "../ffi/status.ts";
import { checkBlockSize, checkBytes, checkHeads, checkOption } from "./counts.ts";
import { dtypeCodes, dtypeOf, type FloatDType } from "./dtype.ts";
import { headBytes, type Sides } from "./format.ts";
import { checkOptions, type OptionNames, optionNames } from "./option_names.ts";

/** The caches a {@linkcode BlockPool} is for, and how large it may grow. */
export interface BlockPoolOptions {
  /** Transformer layers of a cache. */
  readonly layerCount: number;
  /** KV heads of a layer, at least 1. */
  readonly kvHeadCount: number;
  /** Elements of a head, 1 to 256. */
  readonly headDim: number;
  /** Positions a block holds: a power of two, 1 to 256; 64 by default. */
  readonly blockSize?: number;
  /** How elements of the tail are stored, for K and V together or apart; `"f16"` by default. */
  readonly dtype?: FloatDType | { readonly k: FloatDType; readonly v: FloatDType };
  /** Most bytes the pool may reserve, for blocks of all formats; by default what this machine or its cgroup has. */
  readonly maxBytes?: number;
}

const POOL_NAMES: OptionNames = optionNames<BlockPoolOptions>({
  layerCount: true,
  kvHeadCount: true,
  headDim: true,
  blockSize: true,
  dtype: true,
  maxBytes: true,
});

/** What a native pool is made of. */
export interface PoolPlan {
  readonly record: Uint32Array;
  readonly headDim: number;
  readonly blockSize: number;
  /** How elements of the tail are stored. */
  readonly tail: Sides;
  /** The shape of its blocks, in words. */
  readonly shape: string;
  /** Bytes of a block of the tail. */
  readonly blockBytes: number;
  /** The limit that was given. */
  readonly maxBytes: number | undefined;
}

/** The checked record of `options`; `action` begins the text of a refusal. */
export function poolPlanOf(options: BlockPoolOptions, action: string): PoolPlan {
  checkOptions(options, POOL_NAMES, action);
  const { blockSize = VALUES.blockSizeDefault, dtype = "f16", maxBytes } = options;
  const values = {
    layerCount: checkOption("layerCount", options.layerCount, action),
    ...checkHeads(options.kvHeadCount, options.headDim, action),
    blockSize: checkBlockSize(blockSize, action),
    ...dtypeCodes(dtype, action),
    maxBytes: maxBytes === undefined ? 0 : checkBytes("maxBytes", maxBytes, action),
  };
  const { layerCount, kvHeadCount, headDim } = values;
  const tail = { k: dtypeOf(values.dtypeK), v: dtypeOf(values.dtypeV) };
  const shape = `${countText(layerCount, "layer")}, ${kvHeadCount} KV heads of ${headDim}, blocks of ${blockSize}, ` +
    `keys in ${tail.k} and values in ${tail.v}`;
  const blockBytes = layerCount * kvHeadCount * headBytes(tail, headDim, blockSize);
  return { record: recordOf("pool", values), headDim, blockSize, tail, shape, blockBytes, maxBytes };
}
