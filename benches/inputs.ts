/**
 * What the benches run on: the shape of real models, numbers of a fixed seed, and as much memory as it takes for the
 * processor's caches to be of no help.
 *
 * Everything is made before timing, and is the same in every runtime.
 */
import { readFileSync } from "node:fs";
import type { FloatDType, QuantizedDType } from "../mod.ts";

/** The attention of models from 7 to 70 billion parameters: 8 KV heads of 128, each read by 4 query heads. */
export const SHAPE = { kvHeadCount: 8, headDim: 128, gqa: 4 } as const;

/** The dtypes of floats, and bytes of an element. */
export const DTYPE_BYTES: Readonly<Record<FloatDType, number>> = { f32: 4, f16: 2, bf16: 2 };
export const FLOATS: readonly FloatDType[] = ["f32", "f16", "bf16"];

/** The dtypes of codes, and how far values move: mean|difference| / mean|value| is below that. */
export const CODE_ERRORS: Readonly<Record<QuantizedDType, number>> = {
  q8_0: 0.01,
  i8: 0.01,
  i4: 0.12,
  q4_0: 0.12,
  i2: 0.5,
};
export const CODES: readonly QuantizedDType[] = ["q8_0", "i8", "i4", "q4_0", "i2"];

/** Bytes of the last cache level: what Linux says, else 64 MiB. */
function lastLevelBytes(): number {
  const unknown = 64 * 2 ** 20;
  try {
    const text = readFileSync("/sys/devices/system/cpu/cpu0/cache/index3/size", "utf8"); // "32768K"
    const [, count, unit] = /^(\d+)([KMG]?)$/.exec(text.trim()) ?? [];
    return count === undefined ? unknown : Number(count) * 1024 ** " KMG".indexOf(unit || " ");
  } catch {
    return unknown; // another system, or Deno without --allow-all
  }
}

/**
 * Bytes of cache that a row cycles through, so that what it reads next was pushed out of every cache level:
 * max(1 GiB, 2 x the last level). A smoke run has no use for the figures and takes 1 MiB.
 */
export function rotatedBytes(smoke: boolean): number {
  return smoke ? 2 ** 20 : Math.max(2 ** 30, 2 * lastLevelBytes());
}

/**
 * `length` numbers of mean 0 and variance 1, the same for the same seed.
 *
 * Each is the sum of two 16-bit draws of one step of mulberry32: a triangle instead of a bell, exact in every runtime.
 */
export function numbers(seed: number, length: number): Float32Array {
  const rows = new Float32Array(length);
  let state = seed | 0;
  for (let i = 0; i < length; i++) {
    state = (state + 0x6d2b79f5) | 0;
    let bits = Math.imul(state ^ (state >>> 15), state | 1);
    bits ^= bits + Math.imul(bits ^ (bits >>> 7), bits | 61);
    bits ^= bits >>> 14;
    rows[i] = ((bits & 0xffff) + (bits >>> 16) - 0xffff) * (Math.sqrt(6) / 2 ** 16);
  }
  return rows;
}

/** Rows `[token][kv_head][head_dim]` as `[kv_head][token][head_dim]`. */
export function headMajor(rows: Float32Array, kvHeadCount: number, headDim: number): Float32Array {
  const tokens = rows.length / (kvHeadCount * headDim);
  const moved = new Float32Array(rows.length);
  for (let token = 0; token < tokens; token++) {
    for (let head = 0; head < kvHeadCount; head++) {
      const start = (token * kvHeadCount + head) * headDim;
      moved.set(rows.subarray(start, start + headDim), (head * tokens + token) * headDim);
    }
  }
  return moved;
}
