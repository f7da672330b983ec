/**
 * How many rows or queries each sequence of a batch has.
 *
 * @module
 */

import { KvError } from "../error.ts";
import { countText } from "../ffi/status.ts";
import { checkCount } from "./counts.ts";

/** One count for each sequence: `each`, or 1, where none are given; where both are, they must agree. */
export function countsOf(
  name: string,
  given: ArrayLike<number> | undefined,
  length: number,
  action: string,
  each?: number,
): Uint32Array {
  const counts = new Uint32Array(length).fill(each ?? 1);
  if (given === undefined && name !== "parents") return counts;
  if (typeof given !== "object" || given === null) throw new TypeError(`${name} must be an array: ${typeof given}`);
  // Its length before its elements: `{ length: 1e9 }` is a small object and would be a large array.
  const valueCount = given.length;
  if (valueCount !== length) {
    throw new KvError(
      "invalid_size",
      `Cannot ${action} as ${name} must have one for each of ${countText(length, "sequence")}: it has ${
        typeof valueCount === "number" ? valueCount : typeof valueCount
      }`,
    );
  }
  for (let i = 0; i < length; i++) {
    const value = given[i]!;
    checkCount(`${name}[${i}]`, value);
    if (each !== undefined && value !== each) {
      throw new KvError(
        "invalid_config",
        `Cannot ${action} as queryCount and ${name} must agree: queryCount is ${each}, ${name}[${i}] is ${value}`,
      );
    }
    counts[i] = value;
  }
  return counts;
}
