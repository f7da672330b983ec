/**
 * Fidelity: what migration did to the rows of a paged cache, and how far off a score can be for it.
 *
 * With k' the stored key of k, the score of a query q is off by `softmaxScale * q . (k' - k)`, at most
 *
 *     softmaxScale * |q| * max|k' - k|  +  softmaxScale * |q| * (what the kernels lose as they round q to two digits)
 *
 * so it is bounded for all queries no longer than the longest one seen, which is kept by head.
 *
 * @module
 */

import { newRecords, recordAt, type Values, valuesOf } from "../ffi/record.ts";
import { refusal } from "../ffi/status.ts";
import { checkCount } from "../options/counts.ts";
import type { PagedMemory } from "./paged.ts";

/** The rows of one side of a KV head, before they migrated and after; plain data. */
export interface SideFidelity {
  /** Rows that were compared; one that several sequences share counts once, and one that was evicted since stays. */
  readonly rows: number;
  /** Mean cosine of the rows with what they became; 1 before the first. */
  readonly cosineMean: number;
  /** The smallest of these cosines; 1 before the first row. */
  readonly cosineMin: number;
  /** The largest Euclidean norm of a row's difference; 0 before the first row. */
  readonly errorMax: number;
}

/**
 * What migration did to the rows of a KV head of one layer; plain data.
 *
 * Rows are compared as they were in the tail, which may have rounded them already. Everything is counted since the cache
 * was made: blocks that were freed since, or turned back into floats by an append, stay in it.
 *
 * @example Keys in 8 bits, values in 4
 * ```ts
 * import assert from "node:assert/strict";
 * import { PagedCache } from "@kvern/kvern";
 *
 * const store = { k: "q8_0", v: "q4_0" } as const;
 * const options = { layerCount: 1, kvHeadCount: 2, headDim: 32, maxSeqLen: 1024, store, measureFidelity: true };
 * using cache = new PagedCache(options);
 * const sequence = cache.sequence();
 * const rows = Float32Array.from({ length: 128 * 64 }, (_, i) => Math.sin(i));
 * sequence.append(0, rows, rows);
 * sequence.attend(0, rows.subarray(0, 2 * 32)); // the norms of its queries count
 * sequence.commit(128);
 * for (const { k, v, logitErrorBound } of cache.fidelity(0)) {
 *   assert.equal(k.rows, 128);
 *   assert.ok(k.cosineMin > 0.999 && v.cosineMin > 0.98 && v.errorMax > k.errorMax);
 *   assert.ok(logitErrorBound < 0.1); // no score of these queries is off by more
 * }
 * ```
 */
export interface HeadFidelity {
  /** Its keys. */
  readonly k: SideFidelity;
  /** Its values. */
  readonly v: SideFidelity;
  /** The largest `softmaxScale * |q|` of a query that was attended with; 0 before the first. */
  readonly scaledQueryNormMax: number;
  /**
   * The most that a score `softmaxScale * q . k` of any query up to `scaledQueryNormMax` is off, against the keys of the
   * tail, the kernels' rounding of queries included and that of f32 sums not. It grows in proportion to the norm; 0
   * before the first query or the first row.
   */
  readonly logitErrorBound: number;
}

/** Asks a native cache about the heads of a layer. */
export function fidelityOf(memory: PagedMemory, layer: number): HeadFidelity[] {
  checkCount("layer", layer);
  const heads = newRecords("headFidelity", memory.shapeOf(layer).kvHeadCount);
  const count = memory.library.kv_paged_fidelity(memory.handle, layer, heads, heads.byteLength);
  if (count < 0) {
    throw refusal(count, `tell the fidelity of layer ${layer}`, {
      ...memory.indexRules(layer),
      unsupported: () => "rows are compared only in a cache made with measureFidelity: it is false",
    });
  }
  return Array.from(
    { length: count },
    (_, head) => headOf(valuesOf("headFidelity", recordAt("headFidelity", heads, head))),
  );
}

function headOf(values: Values<"headFidelity">): HeadFidelity {
  return {
    k: {
      rows: values.keyRowCount,
      cosineMean: values.keyCosineMean,
      cosineMin: values.keyCosineMin,
      errorMax: values.keyErrorMax,
    },
    v: {
      rows: values.valueRowCount,
      cosineMean: values.valueCosineMean,
      cosineMin: values.valueCosineMin,
      errorMax: values.valueErrorMax,
    },
    scaledQueryNormMax: values.queryNormMax,
    logitErrorBound: values.logitErrorBound,
  };
}
