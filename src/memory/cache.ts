/**
 * What a sequence needs of the native cache it lives in, whatever the layout of that is.
 *
 * @module
 */

import type { Library } from "../ffi/exports.ts";
import type { FreedRule } from "../ffi/status.ts";
import type { AttendBuffers } from "../options/attend.ts";
import type { DType, FloatDType } from "../options/dtype.ts";
import type { LayerShape } from "../options/paged.ts";
import type { Sight } from "../options/retention.ts";

/** How a native sequence is reached; what is left of it when its object is gone. */
export interface SequenceToken {
  /** The handle of the sequence, or of a contiguous cache; 0 once the sequence was freed. */
  handle: number;
  /** The index of a sequence of a contiguous cache; 0 for one that has a handle of its own. */
  readonly index: number;
}

/** The object of a sequence, as its cache sees it. */
export interface Resident {
  /** Detaches every array over the sequence. */
  detach(): void;
}

/** The options of an attend that say which rows it sees. */
export interface AskedRows {
  readonly causal: boolean;
  readonly windowTokens: number | undefined;
  readonly sinkTokens: number;
}

/** The rules about indices and about what was freed, the same for every call. */
export type IndexRules = Record<"layer_out_of_range" | "sequence_out_of_range" | "stale_handle", () => string>;

/** One native cache, owned or attached. */
export interface CacheMemory {
  readonly library: Library;
  /** True if this object frees the native cache. */
  readonly owned: boolean;
  /** The handle every call takes; 0, which is never valid, once this was freed. */
  readonly handle: number;
  /** True if rows lie in blocks that come and go, head-major; false if in one piece each, token-major. */
  readonly isPaged: boolean;
  readonly layerCount: number;
  readonly maxSeqLen: number;
  /** Positions a block holds; the one piece of a contiguous cache counts as a block of `maxSeqLen`. */
  readonly blockSize: number;
  /** How rows in floats are stored. */
  readonly dtype: { readonly k: FloatDType; readonly v: FloatDType };
  /** True if rows are found by the tokens that a commit tells. */
  readonly findsTokens: boolean;
  /** First rows that retention keeps. */
  readonly retentionSinkTokens: number;
  /** Reused by each attend. */
  readonly attendBuffers: AttendBuffers;
  /** The rule about what was freed, the same for the calls of the cache and of its sequences. */
  readonly freedRule: FreedRule;
  /** The shape of a layer, of the first one where there is no such layer. */
  shapeOf(layer: number): LayerShape;
  /** Elements of a row of a layer, of the first one where there is no such layer. */
  kvDimOf(layer: number): number;
  /** Elements from one row of a block in floats to the next. */
  tokenStrideOf(layer: number): number;
  /** The rules about indices and about what was freed. */
  indexRules(layer: number, index?: number): IndexRules;
  /** What decides which rows of a layer the queries of an attend should see. */
  sightOf(layer: number, asked: AskedRows): Sight;
  /** Every dtype that a row of a layer, once appended, may come to be stored as. */
  storedAs(layer: number): { readonly k: readonly DType[]; readonly v: readonly DType[] };
  /** Detaches the arrays over a sequence and ends it; harmless when repeated. */
  leave(resident: Resident, token: SequenceToken): void;
}
