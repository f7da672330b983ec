/**
 * One meaning of each option of attend in every call that attends: a sequence of either cache, and a batch.
 */

import assert from "node:assert/strict";
import { test } from "node:test";
import { type AttendOptions, ContiguousCache, KvError, PagedCache, type Sequence } from "../mod.ts";
import { assertCode } from "./cache_cases.ts";
import { attention, Random, relativeError } from "./oracle.ts";

/** One layer of 2 KV heads of 32, in blocks of 64 rows of which the older ones are quantized. */
const SHAPE = { layerCount: 1, kvHeadCount: 2, headDim: 32, maxSeqLen: 512 } as const;

const Q_HEADS = 4;

/** Sequences of these lengths with random rows. */
function sequencesOf(cache: PagedCache, random: Random, lengths: readonly number[]): Sequence[] {
  return lengths.map((length) => {
    const sequence = cache.sequence();
    sequence.append(0, random.floats(length * 64), random.floats(length * 64));
    sequence.commit(length);
    return sequence;
  });
}

/** What every option may be beside the count of queries. */
const OPTIONS: readonly Omit<AttendOptions, "queryCount">[] = [
  {},
  { softmaxScale: 0.3 },
  { causal: false },
  { windowTokens: 9 },
  { windowTokens: 9, sinkTokens: 2 },
  { sinkTokens: 2 },
  { softcap: 1.5 },
  { alibiSlopes: Float32Array.of(0.5, 0.25, 0.125, 0.0625) },
  { sinkLogits: Float32Array.of(1, -1, 0.5, 3) },
];

for (const [index, options] of OPTIONS.entries()) {
  test(`a batch means by option set ${index} what each of its sequences does: ${Object.keys(options)}`, () => {
    for (const queryCount of [1, 4]) {
      using cache = new PagedCache({ ...SHAPE, store: "i8" });
      const random = new Random(7), sequences = sequencesOf(cache, random, [5, 70, 200]);
      const q = random.floats(3 * queryCount * Q_HEADS * 32);
      const lse = new Float32Array(3 * queryCount * Q_HEADS), into = new Float32Array(q.length);
      assert.equal(cache.attend(0, q, { ...options, queryCount, sequences, lse, into }), into);
      for (const [i, sequence] of sequences.entries()) {
        const rows = queryCount * Q_HEADS, own = new Float32Array(rows);
        const part = q.slice(i * rows * 32, (i + 1) * rows * 32);
        assert.deepEqual(
          into.slice(i * rows * 32, (i + 1) * rows * 32),
          sequence.attend(0, part, { ...options, queryCount, lse: own }),
        );
        assert.deepEqual(lse.slice(i * rows, (i + 1) * rows), own);
      }
    }
  });
}

test("a batch has a tree for each sequence, each counted from its own first query", () => {
  using cache = new PagedCache({ ...SHAPE, dtype: "f32" });
  const random = new Random(8), sequences = sequencesOf(cache, random, [40, 70, 12]);
  const trees = [[-1, 0, 0, 1, -1], [-1, 0, 0], [-1, -1]];
  const queryCounts = trees.map((tree) => tree.length);
  const q = random.floats(10 * Q_HEADS * 32), treeParents = Int32Array.from(trees.flat());
  const output = cache.attend(0, q, { sequences, queryCounts, treeParents });
  let first = 0;
  for (const [i, sequence] of sequences.entries()) {
    const count = queryCounts[i]!, end = first + count;
    const part = q.slice(first * Q_HEADS * 32, end * Q_HEADS * 32);
    const own = { queryCount: count, treeParents: Int32Array.from(trees[i]!) };
    const expected = sequence.attend(0, part, own);
    assert.deepEqual(output.slice(first * Q_HEADS * 32, end * Q_HEADS * 32), expected);
    assert.notDeepEqual(expected, sequence.attend(0, part, { queryCount: count })); // or this would prove nothing
    first = end;
  }
  // A parent counts within its sequence: what would be one among all queries is none.
  const across = Int32Array.from([...trees[0]!, ...trees[1]!, 7, -1]);
  assertCode("invalid_config", () => cache.attend(0, q, { sequences, queryCounts, treeParents: across }));
  assertCode("invalid_size", () => cache.attend(0, q, { sequences, queryCounts, treeParents: across.subarray(1) }));
});

test("the options of a step serve a sequence and a batch of it alike", () => {
  using cache = new PagedCache({ ...SHAPE, dtype: "f32" });
  const random = new Random(9), sequences = sequencesOf(cache, random, [70]);
  const stepOptions = { queryCount: 4, treeParents: Int32Array.of(-1, 0, 0, 1), softcap: 3 };
  const q = random.floats(4 * Q_HEADS * 32);
  const expected = sequences[0]!.attend(0, q, stepOptions);
  assert.deepEqual(cache.attend(0, q, { ...stepOptions, sequences }), expected);
});

test("queryCount and queryCounts of a batch agree, or neither counts", () => {
  using cache = new PagedCache({ ...SHAPE, dtype: "f32" });
  const random = new Random(10), sequences = sequencesOf(cache, random, [7, 9]);
  const q = random.floats(6 * Q_HEADS * 32), into = new Float32Array(q.length);
  const expected = cache.attend(0, q, { sequences, queryCount: 3 });
  assert.deepEqual(cache.attend(0, q, { sequences, queryCount: 3, queryCounts: [3, 3] }), expected);
  assert.throws(() => cache.attend(0, q, { sequences, queryCount: 3, queryCounts: [3, 2], into }), {
    code: "invalid_config",
    message: "Cannot attend as queryCount and queryCounts must agree: queryCount is 3, queryCounts[1] is 2",
  });
  assertCode("invalid_config", () => cache.attend(0, q, { sequences, queryCount: 0 }));
  assert.throws(() => cache.attend(0, q, { sequences, queryCount: 1.5 }), RangeError);
  assert.deepEqual(into, new Float32Array(q.length));
});

// The number of query heads.

const WITH_HEADS = { ...SHAPE, qHeadCount: Q_HEADS, dtype: "f32" } as const;

test("with qHeadCount a forgotten queryCount is refused, in both caches and in a batch", () => {
  using contiguous = new ContiguousCache(WITH_HEADS);
  using paged = new PagedCache(WITH_HEADS);
  const random = new Random(11), k = random.floats(5 * 64), v = random.floats(5 * 64);
  const q = random.floats(5 * Q_HEADS * 32), into = new Float32Array(q.length).fill(7);
  const sequence = paged.sequence();
  const truth = attention({ q, k, v, queryCount: 5, qHeadCount: Q_HEADS, kvHeadCount: 2, headDim: 32 });
  const message = "Cannot attend in layer 0 as q must be [queryCount][qHeadCount][headDim], 1 * 4 * 32 elements: " +
    "q has 640";
  for (const cache of [contiguous.sequence(0), sequence]) {
    cache.append(0, k, v);
    cache.commit(5);
    assert.throws(() => cache.attend(0, q, { into }), { code: "invalid_size", message });
    assert.throws(() => cache.attend(0, q.subarray(0, 64)), { code: "invalid_size" });
    assert.deepEqual(into, new Float32Array(q.length).fill(7));
    assert.ok(relativeError(cache.attend(0, q, { queryCount: 5 }), truth.output) < 1e-5);
  }
  const sequences = [sequence];
  assert.throws(() => paged.attend(0, q, { sequences, into }), { code: "invalid_size", message });
  assert.ok(relativeError(paged.attend(0, q, { sequences, queryCount: 5 }), truth.output) < 1e-5);
  assert.deepEqual([contiguous.qHeadCount, paged.qHeadCount], [Q_HEADS, Q_HEADS]);
  assert.equal(ContiguousCache.attach(contiguous.handle).qHeadCount, Q_HEADS);
  const attached = PagedCache.attach(paged.handle);
  assert.deepEqual(attached.layerShape(0), { kvHeadCount: 2, headDim: 32, qHeadCount: Q_HEADS });
});

test("qHeadCount is that of a layer: layers that differ in it share blocks", () => {
  const layer = { kvHeadCount: 2, headDim: 4 };
  using cache = new PagedCache({
    layers: [{ ...layer, qHeadCount: 2 }, { ...layer, qHeadCount: 8 }, layer],
    maxSeqLen: 64,
    blockSize: 4,
  });
  assert.equal(cache.groupCount, 1);
  const sequence = cache.sequence(), row = new Float32Array(8).fill(1);
  for (const index of [0, 1, 2]) sequence.append(index, row, row);
  sequence.commit(1);
  for (const heads of [2, 4, 8]) {
    const q = new Float32Array(heads * 4);
    for (const [index, wanted] of [2, 8, heads].entries()) {
      if (heads === wanted) assert.equal(sequence.attend(index, q).length, q.length);
      else assertCode("invalid_size", () => sequence.attend(index, q));
    }
  }
  assert.equal(new PagedCache({ layers: [layer], maxSeqLen: 1 }).qHeadCount, undefined);
});

test("qHeadCount is a multiple of kvHeadCount", () => {
  for (const make of [ContiguousCache, PagedCache]) {
    const shape = { layerCount: 1, kvHeadCount: 4, headDim: 8, maxSeqLen: 8 };
    assert.throws(() => new make({ ...shape, qHeadCount: 6 }), (error: unknown) => {
      assert.ok(error instanceof KvError);
      assert.equal(error.code, "invalid_config");
      const rule = "qHeadCount must be a multiple of kvHeadCount: qHeadCount is 6, kvHeadCount is 4";
      assert.equal(error.message, `Cannot create a cache as ${rule}`);
      return true;
    });
    assertCode("invalid_config", () => new make({ ...shape, qHeadCount: 0 }));
    assert.throws(() => new make({ ...shape, qHeadCount: -4 }), RangeError);
    assert.throws(() => new make({ ...shape, qHeadCount: "4" as unknown as number }), TypeError);
    new make({ ...shape, qHeadCount: 12 }).free();
  }
});
