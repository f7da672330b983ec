/**
 * Rows in and out in the order of a `past_key_values` tensor: each call against the plain one on the same rows.
 */

import assert from "node:assert/strict";
import { test } from "node:test";
import {
  ContiguousCache,
  type DType,
  type FloatDType,
  type GatherOptions,
  type KvCache,
  KvError,
  PagedCache,
  type Rows,
} from "../mod.ts";
import { assertCode, assertRefused } from "./cache_cases.ts";
import { bf16Bits, f16Bits, Random } from "./oracle.ts";

const HEADS = 3, DIM = 32, KV_DIM = HEADS * DIM, ROWS = 300;

/** A number from 0 to `max`. */
const upTo = (random: Random, max: number) => random.below(max + 1);

/** All rows of one side, in both orders, as a caller's array. */
interface Given {
  readonly plain: Rows;
  readonly tensor: Rows;
}

function givenRows(random: Random, dtype: FloatDType): Given {
  const rows = random.floats(ROWS * KV_DIM);
  const plain = dtype === "f32" ? rows : Uint16Array.from(rows, dtype === "f16" ? f16Bits : bf16Bits);
  const tensor = plain.slice();
  for (let token = 0; token < ROWS; token++) {
    for (let head = 0; head < HEADS; head++) {
      const from = (token * HEADS + head) * DIM;
      tensor.set(plain.subarray(from, from + DIM), (head * ROWS + token) * DIM);
    }
  }
  return { plain, tensor };
}

/** The positions that a layer shows. */
function seenPositions(cache: KvCache): number[] {
  return cache.views(0).flatMap(({ start, length }) => Array.from({ length }, (_, i) => start + i));
}

/** One gather with random options, checked number by number against the plain one. */
function checkGather(cache: KvCache, random: Random): void {
  const seen = seenPositions(cache), rowCount = cache.seqLen;
  const dtype = (["f32", "f16", "bf16"] as const)[upTo(random, 2)]!;
  const layout = random.next() < 0.8 ? "head_major" : "token_major";
  const start = upTo(random, rowCount);
  const count = random.next() < 0.5 ? upTo(random, rowCount - start) : undefined;
  const wanted = seen.filter((position) => position >= start && position < start + (count ?? Infinity));
  const stride = layout === "head_major" && random.next() < 0.5
    ? Math.max(1, wanted.length * DIM + upTo(random, 50))
    : undefined;
  const options: GatherOptions = {
    dtype,
    layout,
    start,
    ...(count === undefined ? {} : { count }),
    ...(stride === undefined ? {} : { headStride: stride }),
  };
  if (count !== undefined && count !== wanted.length) {
    return assertCode("position_out_of_range", () => cache.gather(0, options), /must be seen, the layer has/);
  }
  const all = cache.gather(0, { dtype });
  const length = stride === undefined || wanted.length === 0
    ? wanted.length * KV_DIM
    : (HEADS - 1) * stride + wanted.length * DIM;
  const fresh = cache.gather(0, options);
  assert.deepEqual([fresh.k.length, fresh.v.length], [length, length]);
  const room = () => (dtype === "f32" ? new Float32Array(length + 3) : new Uint16Array(length + 3)).fill(77);
  const into = { k: room(), v: room() };
  const filled = cache.gather(0, { ...options, into });
  assert.ok(filled.k === into.k && filled.v === into.v);
  for (const side of ["k", "v"] as const) {
    const expected = room(), expectedFresh = fresh[side].slice().fill(0);
    wanted.forEach((position, row) => {
      const from = seen.indexOf(position) * KV_DIM;
      for (let head = 0; head < HEADS; head++) {
        const numbers = all[side].subarray(from + head * DIM, from + (head + 1) * DIM);
        const to = layout === "token_major"
          ? row * KV_DIM + head * DIM
          : head * (stride ?? wanted.length * DIM) + row * DIM;
        expected.set(numbers, to);
        expectedFresh.set(numbers, to);
      }
    });
    assert.deepEqual(into[side], expected);
    assert.deepEqual(fresh[side], expectedFresh);
  }
}

/** Appends the same rows plainly to one sequence and out of whole tensors to another; both hold the same ever after. */
function checkAppends(plain: KvCache, strided: KvCache, random: Random): void {
  const dtype = (["f32", "f16", "bf16"] as const)[upTo(random, 2)]!;
  const k = givenRows(random, dtype), v = givenRows(random, dtype);
  const bits = dtype === "f32" ? {} : { dtype };
  for (let first = 0, n = 0; first < ROWS; first += n) {
    n = Math.min(ROWS - first, 1 + upTo(random, 90));
    const tokens = ({ plain }: Given) => plain.subarray(first * KV_DIM, (first + n) * KV_DIM);
    const heads = ({ tensor }: Given) => tensor.subarray(first * DIM, ((HEADS - 1) * ROWS + first + n) * DIM);
    assert.equal(plain.append(0, tokens(k), tokens(v), bits).start, first);
    const at = { ...bits, layout: "head_major", headStride: ROWS * DIM } as const;
    const appended = strided.append(0, heads(k), heads(v), at);
    assert.equal(appended.start, first);
    assert.equal(appended.views.reduce((sum, { length }) => sum + length, 0), n);
    plain.commit(n);
    strided.commit(n);
    for (let i = 0; i < 4; i++) checkGather(strided, random);
    assert.deepEqual(strided.gather(0), plain.gather(0));
  }
}

for (const dtype of ["f32", "f16", "bf16"] as const) {
  test(`head-major rows of a contiguous ${dtype} cache are those of the plain calls`, () => {
    const shape = { layerCount: 1, kvHeadCount: HEADS, headDim: DIM, maxSeqLen: ROWS };
    using cache = new ContiguousCache({ ...shape, sequenceCount: 2, dtype });
    checkAppends(cache.sequence(0), cache.sequence(1), new Random(7));
  });
}

for (const stored of ["f32", "f16", "bf16", "q8_0", "q4_0", "i8", "i4", "i2"] as DType[]) {
  for (const kept of ["all", "newest"] as const) {
    test(`head-major rows of a paged cache in ${stored} that keeps ${kept} are those of the plain calls`, () => {
      const isFloat = stored === "f32" || stored === "f16" || stored === "bf16";
      using cache = new PagedCache({
        layerCount: 1,
        kvHeadCount: HEADS,
        headDim: DIM,
        maxSeqLen: ROWS,
        dtype: isFloat ? stored : "f16",
        ...(isFloat ? {} : { store: stored, tail: { tokens: 64 } }),
        ...(kept === "all" ? {} : { retention: { keep: "newest", tokens: 100, sinkTokens: 5 } as const }),
      });
      checkAppends(cache.sequence(), cache.sequence(), new Random(8));
    });
  }
}

test("a batch takes rows out of a longer tensor, and says how long its arrays must be", () => {
  const { tensor, plain } = givenRows(new Random(9), "f32");
  using cache = new PagedCache({ layerCount: 1, kvHeadCount: HEADS, headDim: DIM, maxSeqLen: ROWS, dtype: "f32" });
  const sequences = [cache.sequence(), cache.sequence()];
  const rows = tensor.subarray(2 * DIM, (2 * ROWS + 2 + 9) * DIM);
  const at = { sequences, layout: "head_major", headStride: ROWS * DIM } as const;
  assertCode(
    "invalid_size",
    () => cache.append(0, rows, rows, { ...at, tokenCounts: [3, 5] }),
    /^Cannot append 8 tokens to layer 0 as k and v must have 19456 elements where headStride is 9600: k has 19488, v has /,
  );
  assert.deepEqual(sequences.map((sequence) => sequence.residentTokens()), [0, 0]);
  cache.append(0, rows, rows, { ...at, tokenCounts: [3, 6] });
  assert.deepEqual(sequences[0]!.gather(0).k, plain.slice(2 * KV_DIM, 5 * KV_DIM));
  assert.deepEqual(sequences[1]!.gather(0).v, plain.slice(5 * KV_DIM, 11 * KV_DIM));
});

/** A sequence of each kind of cache with 5 rows of 2 heads of 4. */
function withFive(body: (sequence: KvCache) => void): void {
  const shape = { layerCount: 1, kvHeadCount: 2, headDim: 4, maxSeqLen: 64, dtype: "f16" } as const;
  using paged = new PagedCache({ ...shape, blockSize: 4 });
  using contiguous = new ContiguousCache(shape);
  for (const sequence of [paged.sequence(), contiguous.sequence(0)]) {
    sequence.append(0, new Float32Array(40).fill(1), new Float32Array(40).fill(2));
    body(sequence);
  }
}

test("a layout, stride or range that does not fit is refused with its rule, and nothing changes", () => {
  withFive((sequence) => {
    const k = new Float32Array(32);
    const append = (options: object, rows = k) => () => sequence.append(0, rows, rows, options);
    const gather = (options: object) => () => sequence.gather(0, options);
    assertRefused(
      sequence,
      "invalid_config",
      append({ headStride: 16 }),
      /needs the layout head_major: layout is token/,
    );
    assertRefused(sequence, "invalid_config", gather({ headStride: 16 }), /^Cannot gather layer 0 as headStride needs/);
    assertRefused(
      sequence,
      "invalid_config",
      append({ layout: "heads" }),
      /^Cannot append as layout must be .*: layout is/,
    );
    assertRefused(sequence, "invalid_config", gather({ layout: "heads" }), /^Cannot gather layer 0 as layout must be/);
    const heads = { layout: "head_major" };
    assertRefused(sequence, "invalid_config", append({ ...heads, headStride: 0 }), /headStride is 0$/);
    const size =
      /equally long, 16 elements and a multiple of 4 that is at most headStride, which is 16: k has \d+, v has \d+$/;
    for (const length of [31, 15, 36]) {
      const rows = new Float32Array(length);
      assertRefused(sequence, "invalid_size", append({ ...heads, headStride: 16 }, rows), size);
    }
    assertRefused(
      sequence,
      "invalid_size",
      gather({ ...heads, headStride: 19 }),
      /at least 20, .* 5 rows: headStride is 19$/,
    );
    const into = { k: new Float32Array(43), v: new Float32Array(44) };
    assertRefused(
      sequence,
      "invalid_size",
      gather({ ...heads, headStride: 24, into }),
      /^Cannot gather layer 0 as its 5 rows have 44 elements a side: k has 43, v has 44$/,
    );
    assert.deepEqual([...into.k, ...into.v], new Array(87).fill(0));
    const range = (start: number, count: number) =>
      new RegExp(`as ${count} rows? from position ${start} on must be seen, the layer has 5$`);
    for (const [start, count] of [[0, 6], [5, 1], [4, 2], [9, 1], [4294967295, 4294967295]] as const) {
      assertRefused(sequence, "position_out_of_range", gather({ start, count }), range(start, count));
    }
    assertRefused(
      sequence,
      "position_out_of_range",
      gather({ start: 6 }),
      /at most the number of rows: start is 6, the/,
    );
    for (const options of [{ start: -1 }, { count: 1.5 }, { start: 2 ** 32 }, { ...heads, headStride: -3 }]) {
      assert.throws(gather(options), RangeError);
    }
    for (const options of [{ start: "0" }, { count: null }, { layout: 3 }, { ...heads, headStride: "4" }]) {
      assert.throws(gather(options), TypeError);
    }
    assert.deepEqual(sequence.gather(0, { start: 5 }), { k: new Float32Array(0), v: new Float32Array(0) });
    assert.deepEqual(sequence.gather(0, { start: 2, count: 0 }).k, new Float32Array(0));
    assert.equal(sequence.append(0, k.subarray(16), k.subarray(16), { layout: "head_major", headStride: 16 }).start, 5);
    assert.equal(
      sequence.append(0, k.subarray(0, 0), k.subarray(0, 0), { layout: "head_major", headStride: 9 }).start,
      5,
    );
  });
});

test("a number that cannot be stored is named by its row; what lies between the heads may be anything", () => {
  withFive((sequence) => {
    // 2 of 4 rows of 2 heads of 4, from the second on.
    const tensor = new Float32Array(32).fill(NaN);
    for (const head of [0, 1]) tensor.fill(3, head * 16 + 4, head * 16 + 12);
    const at = { layout: "head_major", headStride: 16 } as const;
    const rows = tensor.subarray(4, 28);
    const whole = rows.slice();
    tensor[16 + 9] = 1e30; // head 1, row 1 of those that are appended, element 1
    assertRefused(
      sequence,
      "not_finite",
      () => sequence.append(0, rows, rows, at),
      /^Cannot append 2 tokens to layer 0 as k must .*: k\[21\] is 1.*e\+30 \(row 1, KV head 1, element 1\)$/,
    );
    assert.equal(sequence.append(0, whole, whole, at).start, 5);
    assert.deepEqual(sequence.gather(0, { start: 5, count: 2 }).k, new Float32Array(16).fill(3));
  });
});

test("a range over rows that were let go says which are seen", () => {
  using cache = new PagedCache({
    layerCount: 1,
    kvHeadCount: 1,
    headDim: 1,
    maxSeqLen: 64,
    blockSize: 2,
    dtype: "f32",
    retention: { keep: "newest", tokens: 6, sinkTokens: 2 },
  });
  const sequence = cache.sequence();
  const rows = Float32Array.from({ length: 20 }, (_, i) => i);
  sequence.append(0, rows, rows);
  sequence.commit(20);
  const at = (options: GatherOptions) => [...sequence.gather(0, { ...options, layout: "head_major" }).k];
  assert.deepEqual(at({}), [0, 1, 16, 17, 18, 19]);
  assert.deepEqual([at({ start: 1 }), at({ start: 9 })], [[1, 16, 17, 18, 19], [16, 17, 18, 19]]);
  assert.deepEqual([at({ start: 0, count: 2 }), at({ start: 17, count: 3 })], [[0, 1], [17, 18, 19]]);
  for (const [start, count] of [[1, 2], [0, 6], [15, 2], [9, 1]] as const) {
    assertCode(
      "position_out_of_range",
      () => sequence.gather(0, { start, count }),
      /must be seen, the layer has 20, of which the first 2 and those from 16 on are seen$/,
    );
  }
});

test("a freed sequence is said to be freed, whatever the range", () => {
  withFive((sequence) => {
    sequence.free();
    for (const options of [{ start: 2 }, { start: 1, count: 3 }, { layout: "head_major" } as const]) {
      assert.throws(
        () => sequence.gather(0, options),
        (error) => error instanceof KvError && error.code === "stale_handle",
      );
    }
  });
});
