/**
 * Counts and sizes: their ranges, and the refusal of what is none.
 *
 * The FFI layer of most runtimes checks nothing (a -1 may arrive as 4294967295), so every number is checked here
 * before a call, and again in native code.
 *
 * @module
 */

import { KvError } from "../error.ts";
import { VALUES } from "../ffi/exports.ts";

/** A count of at least 1, and at most `max`. */
export function checkOption(name: string, value: number, action: string, max: number = 2 ** 32 - 1): number {
  checkCount(name, value);
  if (value < 1 || value > max) {
    const range = max < 2 ** 32 - 1 ? `1 to ${max}` : "at least 1";
    throw new KvError("invalid_config", `Cannot ${action} as ${name} must be ${range}: ${name} is ${value}`);
  }
  return value;
}

/** The heads of a layer, whose row must be countable in 32 bits; `path` is where the options stand. */
export function checkHeads(
  kvHeadCount: number,
  headDim: number,
  action: string,
  path: string = "",
): { readonly kvHeadCount: number; readonly headDim: number } {
  checkOption(`${path}kvHeadCount`, kvHeadCount, action);
  checkOption(`${path}headDim`, headDim, action, VALUES.headDimMax);
  if (kvHeadCount * headDim < 2 ** 32) return { kvHeadCount, headDim };
  throw new KvError(
    "invalid_config",
    `Cannot ${action} as a row of ${path}kvHeadCount times headDim elements must be below 2^32: ` +
      `kvHeadCount is ${kvHeadCount}, headDim is ${headDim}`,
  );
}

/** A count of query heads: each KV head serves equally many. */
export function checkQueryHeads(qHeadCount: number, kvHeadCount: number, action: string, path: string = ""): number {
  checkOption(`${path}qHeadCount`, qHeadCount, action);
  if (qHeadCount % kvHeadCount === 0) return qHeadCount;
  throw new KvError(
    "invalid_config",
    `Cannot ${action} as ${path}qHeadCount must be a multiple of kvHeadCount: ` +
      `qHeadCount is ${qHeadCount}, kvHeadCount is ${kvHeadCount}`,
  );
}

/** Bytes travel in 64 bits, so they have a wider range than other counts. */
export function checkBytes(name: string, value: number, action: string): number {
  if (typeof value !== "number") throw new TypeError(`${name} must be a number: ${typeof value}`);
  if (!Number.isSafeInteger(value) || value < 0) {
    throw new RangeError(`${name} must be a whole number from 0 to ${Number.MAX_SAFE_INTEGER}: ${value}`);
  }
  if (value === 0) throw new KvError("invalid_config", `Cannot ${action} as ${name} must be at least 1: ${name} is 0`);
  return value;
}

/** Refuses what is no count: only a whole number of 32 bits may cross the boundary. */
export function checkCount(name: string, value: unknown): asserts value is number {
  if (typeof value !== "number") {
    throw new TypeError(`${name} must be a number: ${value === null ? "null" : typeof value}`);
  }
  if (value >>> 0 !== value || Object.is(value, -0)) { // Deno takes no -0 for an integer
    const shown = Object.is(value, -0) ? "-0" : value;
    throw new RangeError(`${name} must be a whole number from 0 to 4294967295: ${shown}`);
  }
}

/** A count of positions that a block can hold. */
export function checkBlockSize(blockSize: number, action: string): number {
  checkCount("blockSize", blockSize);
  const max = VALUES.blockSizeMax;
  if (blockSize >= 1 && blockSize <= max && Number.isInteger(Math.log2(blockSize))) return blockSize;
  throw new KvError(
    "invalid_config",
    `Cannot ${action} as blockSize must be a power of two from 1 to ${max}: blockSize is ${blockSize}`,
  );
}
