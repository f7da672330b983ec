/**
 * Attention whose numbers leave the range of f32 on the way, against the oracle in f64: scores and sums past the largest
 * f32, and scales and queries near it. Nothing is NaN, and an lse is -Infinity where no row is seen and nowhere else.
 */

import assert from "node:assert/strict";
import { test } from "node:test";
import { type AttendOptions, ContiguousCache, type DType, type KvCache, PagedCache } from "../mod.ts";
import { attention, bf16Bits, bf16Value, Random } from "./oracle.ts";

const LARGEST = 2 ** 128 - 2 ** 104;

/** One layer of 2 KV heads of 64. */
const SHAPE = { layerCount: 1, kvHeadCount: 2, headDim: 64, maxSeqLen: 1024, qHeadCount: 4 } as const;

/** What a sequence of that shape gives must be what f64 gives, its lse at most the largest f32. */
function assertTruth(sequence: KvCache, q: Float32Array, options: AttendOptions = {}): void {
  const { k, v } = sequence.gather(0) as { k: Float32Array; v: Float32Array };
  const { queryCount = 1 } = options;
  const truth = attention({ q, k, v, queryCount, qHeadCount: 4, kvHeadCount: 2, headDim: 64, ...options });
  const lse = new Float32Array(queryCount * 4);
  const output = sequence.attend(0, q, { ...options, lse });
  truth.output.forEach((value, i) => {
    assert.ok(Math.abs(output[i]! - value) <= 1e-4 * (1 + Math.abs(value)), `output[${i}] ${output[i]} for ${value}`);
  });
  truth.lse.forEach((value, i) => {
    const expected = value === -Infinity ? value : Math.max(-LARGEST, Math.min(LARGEST, value));
    const near = lse[i] === expected || Math.abs(lse[i]! - expected) <= 1e-5 * (1 + Math.abs(expected));
    assert.ok(near, `lse[${i}] ${lse[i]} for ${value}`);
  });
  // The call may be one of a batch, and in place.
  if (sequence instanceof ContiguousCache || !("fork" in sequence)) return;
  assert.deepEqual(sequence.attend(0, q.slice(), options), output);
  const place = q.slice();
  assert.deepEqual(sequence.attend(0, place, { ...options, into: place }), output);
}

/** `n` rows near 1, of which one is `value` in every element. */
function rowsWith(random: Random, n: number, row: number, value: number): Float32Array {
  const rows = random.floats(n * 128);
  if (row >= 0) rows.fill(value, row * 128, row * 128 + 128);
  return rows;
}

/** The same rows in a sequence of either cache, committed. */
function forEachCache(
  dtype: "f32" | "bf16",
  k: Float32Array,
  v: Float32Array,
  body: (sequence: KvCache) => void,
): void {
  using contiguous = new ContiguousCache({ ...SHAPE, dtype });
  using paged = new PagedCache({ ...SHAPE, dtype });
  for (const sequence of [contiguous.sequence(0), paged.sequence()]) {
    sequence.append(0, k, v);
    sequence.commit(k.length / 128);
    body(sequence);
  }
}

for (const dtype of ["f32", "bf16"] as const) {
  test(`a key of 3e38 in ${dtype} under a query of 1`, () => {
    const random = new Random(1);
    const k = rowsWith(random, 70, 33, 3e38), v = random.floats(70 * 128);
    forEachCache(dtype, k, v, (sequence) => {
      for (const sign of [1, -1]) {
        const q = new Float32Array(256).fill(sign);
        for (const softmaxScale of [undefined, 0.5, 100]) {
          for (const more of [{}, { softcap: 3 }, { sinkLogits: Float32Array.of(1, 2, 3e38, -3e38) }]) {
            assertTruth(sequence, q, { ...(softmaxScale === undefined ? {} : { softmaxScale }), ...more });
          }
        }
      }
    });
  });

  test(`keys that are all -3e38 in ${dtype}: all are seen, and none is nothing`, () => {
    const random = new Random(2), n = 20;
    const k = new Float32Array(n * 128).fill(-3e38), v = random.floats(n * 128);
    forEachCache(dtype, k, v, (sequence) => {
      const lse = new Float32Array(4);
      sequence.attend(0, new Float32Array(256).fill(1), { lse });
      assert.deepEqual([...lse], new Array(4).fill(-LARGEST));
      assertTruth(sequence, new Float32Array(256).fill(1));
      // Queries before the first row see none.
      assertTruth(sequence, new Float32Array(23 * 256).fill(1), { queryCount: 23 });
      sequence.truncate(0);
      assertTruth(sequence, new Float32Array(256).fill(1));
    });
  });

  test(`values of 3e38 in ${dtype}: an average of them is one`, () => {
    const n = 300, k = new Float32Array(n * 128).fill(0.25), v = new Float32Array(n * 128).fill(3e38);
    forEachCache(dtype, k, v, (sequence) => {
      const output = sequence.attend(0, new Float32Array(256).fill(0.5));
      const value = dtype === "f32" ? Math.fround(3e38) : bf16Value(bf16Bits(Math.fround(3e38)));
      assert.deepEqual(output, new Float32Array(256).fill(value));
      assertTruth(sequence, new Float32Array(5 * 256).fill(0.5), { queryCount: 5 });
    });
  });
}

test("a softmaxScale of 3e38, of either sign, and queries of it", () => {
  const random = new Random(3);
  const k = random.floats(130 * 128), v = random.floats(130 * 128), q = random.floats(2 * 256);
  forEachCache("f32", k, v, (sequence) => {
    for (const softmaxScale of [3e38, -3e38].map(Math.fround)) {
      assertTruth(sequence, q, { queryCount: 2, softmaxScale });
      assertTruth(sequence, q.map((value) => value * 1e38), { queryCount: 2, softmaxScale, softcap: 20 });
      assertTruth(sequence, q.map((value) => value * 1e38), { queryCount: 2, softmaxScale: 1, windowTokens: 9 });
    }
  });
});

for (const store of ["f16", "q8_0", "q4_0", "i8", "i4", "i2"] as const satisfies readonly DType[]) {
  test(`queries of 1e38 over keys in ${store}, alone and in a batch`, () => {
    using cache = new PagedCache({ ...SHAPE, store, blockSize: 64, dtype: "f32" });
    const random = new Random(4), q = random.floats(2 * 256).map((value) => value * 1e38);
    const sequences = [70, 200].map((n) => {
      const sequence = cache.sequence();
      sequence.append(0, random.floats(n * 128), random.floats(n * 128));
      sequence.commit(n);
      return sequence;
    });
    const lse = new Float32Array(8);
    const output = cache.attend(0, q, { sequences, softmaxScale: 4, lse });
    for (const [i, sequence] of sequences.entries()) {
      const own = q.slice(i * 256, i * 256 + 256), ownLse = new Float32Array(4);
      assertTruth(sequence, own, { softmaxScale: 4 });
      assert.deepEqual(output.slice(i * 256, i * 256 + 256), sequence.attend(0, own, { softmaxScale: 4, lse: ownLse }));
      assert.deepEqual(lse.slice(i * 4, i * 4 + 4), ownLse);
    }
    assert.ok(lse.every((value) => value > 1e37), `${lse}`);
  });
}

test("an ALiBi slope that outweighs every score", () => {
  const random = new Random(5), k = random.floats(40 * 128), v = random.floats(40 * 128);
  forEachCache("f32", k, v, (sequence) => {
    const alibiSlopes = Float32Array.of(3e38, -3e38, 1e37, 0.5);
    const q = random.floats(2 * 256);
    assertTruth(sequence, q, { queryCount: 2, alibiSlopes });
    assertTruth(sequence, q, { queryCount: 2, alibiSlopes, causal: false });
  });
});
