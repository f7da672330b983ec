/**
 * Options of a contiguous cache, and the record of them.
 *
 * @module
 */

import { VALUES } from "../ffi/exports.ts";
import type { Values } from "../ffi/record.ts";
import { checkBytes, checkHeads, checkOption, checkQueryHeads } from "./counts.ts";
import { dtypeCodes, type FloatDType, floatDtypeOf } from "./dtype.ts";
import { checkOptions, type OptionNames, optionNames } from "./option_names.ts";
import { elementBytes } from "./rows.ts";

/** The geometry of a {@linkcode ContiguousCache}, and how it stores its elements. */
export interface ContiguousCacheOptions {
  /** Transformer layers, at least 1. */
  readonly layerCount: number;
  /** KV heads of a layer, at least 1; with grouped-query attention fewer than query heads. */
  readonly kvHeadCount: number;
  /** Elements of a head, 1 to 256, the same for K and V; multiples of 32 are fast. */
  readonly headDim: number;
  /** Query heads, a multiple of `kvHeadCount`: where given, `attend` refuses queries that do not have as many. */
  readonly qHeadCount?: number;
  /** Rows each sequence can hold, 1 to 2^31 - 1. */
  readonly maxSeqLen: number;
  /** Sequences, at least 1; 1 by default. */
  readonly sequenceCount?: number;
  /** How elements are stored, for K and V together or apart; `"f32"` by default. */
  readonly dtype?: FloatDType | { readonly k: FloatDType; readonly v: FloatDType };
  /** Most bytes the cache may reserve; by default what this machine or its cgroup has. */
  readonly maxBytes?: number;
}

const CONTIGUOUS_NAMES: OptionNames = optionNames<ContiguousCacheOptions>({
  layerCount: true,
  kvHeadCount: true,
  headDim: true,
  qHeadCount: true,
  maxSeqLen: true,
  sequenceCount: true,
  dtype: true,
  maxBytes: true,
});

/** Bytes of K and V in digits, by the formula: a product that no number of 64 bits need hold. */
export function bytesText(values: Values<"contiguous">): string {
  const { layerCount, sequenceCount, maxSeqLen, kvHeadCount, headDim, dtypeK, dtypeV } = values;
  const bytes = elementBytes(floatDtypeOf(dtypeK)) + elementBytes(floatDtypeOf(dtypeV));
  const factors = [layerCount, sequenceCount, maxSeqLen, kvHeadCount, headDim, bytes];
  return String(factors.reduce((product, factor) => product * BigInt(factor), 1n));
}

/** The checked values of `options`; `action` begins the text of a refusal. */
export function contiguousValues(options: ContiguousCacheOptions, action: string): Values<"contiguous"> {
  checkOptions(options, CONTIGUOUS_NAMES, action);
  const { layerCount, kvHeadCount, headDim, qHeadCount, dtype = "f32", sequenceCount = 1, maxBytes } = options;
  return {
    layerCount: checkOption("layerCount", layerCount, action),
    sequenceCount: checkOption("sequenceCount", sequenceCount, action),
    ...checkHeads(kvHeadCount, headDim, action),
    qHeadCount: qHeadCount === undefined ? 0 : checkQueryHeads(qHeadCount, kvHeadCount, action),
    maxSeqLen: checkOption("maxSeqLen", options.maxSeqLen, action, VALUES.maxSeqLenMax),
    ...dtypeCodes(dtype, action),
    maxBytes: maxBytes === undefined ? 0 : checkBytes("maxBytes", maxBytes, action),
  };
}
