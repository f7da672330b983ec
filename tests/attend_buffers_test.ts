/**
 * The arrays of a call: which of them may share memory, and that what is read is read before anything is written.
 */

import assert from "node:assert/strict";
import { test } from "node:test";
import { type AttendOptions, ContiguousCache, type KvCache, PagedCache, type PagedCacheOptions } from "../mod.ts";
import { Random } from "./oracle.ts";

/** One layer of one KV head of 128 whose full blocks are quantized, and compared. */
const MEASURED = {
  layerCount: 1,
  kvHeadCount: 1,
  headDim: 128,
  maxSeqLen: 1024,
  dtype: "f32",
  store: { k: "i2", v: "i4" },
  measureFidelity: true,
} as const satisfies PagedCacheOptions;

/** What a layer says of its first head once a query of norm 1000 was there, by the call that `attend` makes. */
function boundAfter(attend: (cache: PagedCache, q: Float32Array) => Float32Array): number {
  using cache = new PagedCache(MEASURED);
  const sequence = cache.sequence(), random = new Random(3);
  sequence.append(0, random.floats(64 * 128), random.floats(64 * 128));
  sequence.commit(64);
  const q = new Float32Array(128);
  q[7] = 1000;
  const output = attend(cache, q);
  assert.ok(output.every((value) => Math.abs(value) <= 1.1), "the output is far shorter than the query");
  return cache.fidelity(0)[0]!.logitErrorBound;
}

test("the norm of a query is that of the query, in place too, alone and in a batch", () => {
  const sequenceOf = (cache: PagedCache) => {
    const sequence = cache.sequence();
    sequence.append(0, new Float32Array(128).fill(0.1), new Float32Array(128).fill(0.1));
    return sequence;
  };
  const expected = boundAfter((cache, q) => sequenceOf(cache).attend(0, q));
  assert.ok(expected > 10, `${expected}`);
  assert.equal(boundAfter((cache, q) => sequenceOf(cache).attend(0, q, { into: q })), expected);
  assert.equal(boundAfter((cache, q) => sequenceOf(cache).attend(0, q, { into: new Float32Array(128) })), expected);
  assert.equal(
    boundAfter((cache, q) => cache.attend(0, q, { sequences: [sequenceOf(cache)], into: q })),
    expected,
  );
});

test("a limit on the error of scores sees a query that its output takes the place of", () => {
  const formats = ["into", "other"].map((place) => {
    using cache = new PagedCache({ ...MEASURED, maxLogitError: 0.5 });
    const sequence = cache.sequence(), random = new Random(5);
    const more = () => {
      sequence.append(0, random.floats(64 * 128), random.floats(64 * 128));
      sequence.commit(64);
    };
    more();
    const q = new Float32Array(128);
    q[7] = 1000;
    sequence.attend(0, q, { into: place === "into" ? q : new Float32Array(128) });
    more();
    return sequence.views(0).map(({ dtypeK }) => dtypeK);
  });
  assert.deepEqual(formats[0], formats[1]);
  assert.deepEqual(formats[0], ["i2", "f32"]); // the first before any query
});

// Outputs and what else a call is given.

/** One layer of 2 KV heads of 8. */
const SMALL = { layerCount: 1, kvHeadCount: 2, headDim: 8, maxSeqLen: 64, dtype: "f32", qHeadCount: 4 } as const;

/** A call that attends with 3 queries, whatever the cache is, and the sequence it attends in. */
type Attend = (q: Float32Array, options: AttendOptions) => Float32Array;

/** Both caches, and a batch of two sequences that has the second query's rows apart. */
function forEachAttend(body: (attend: Attend, sequence: KvCache) => void): void {
  using contiguous = new ContiguousCache(SMALL);
  using paged = new PagedCache(SMALL);
  const random = new Random(6), k = random.floats(9 * 16), v = random.floats(9 * 16);
  const sequences = [paged.sequence(), paged.sequence()] as const;
  for (const sequence of [contiguous.sequence(0), ...sequences]) {
    sequence.append(0, k, v);
    sequence.commit(9);
  }
  for (const sequence of [contiguous.sequence(0), sequences[0]]) {
    body((q, options) => sequence.attend(0, q, { queryCount: 3, ...options }), sequence);
  }
  body((q, options) => paged.attend(0, q, { sequences, queryCounts: [1, 2], ...options }), sequences[1]);
}

const ROW = 4 * 8;

test("an output over another array of the call is refused by the names of the two, and nothing is written", () => {
  const at = (memory: ArrayBuffer, first: number, length: number) => new Float32Array(memory, first * 4, length);
  forEachAttend((attend) => {
    const memory = new ArrayBuffer(4096);
    const q = at(memory, 100, 3 * ROW);
    const slopes = new Float32Array(4).fill(0.25);
    const before = new Random(7).floats(1024).map(Math.abs);
    const cases: [names: string, options: AttendOptions][] = [
      ["into and q", { into: at(memory, 100 + ROW, 3 * ROW) }],
      ["into and q", { into: at(memory, 100 - ROW, 3 * ROW) }],
      ["into and q", { into: at(memory, 101, 3 * ROW) }],
      ["into and q", { into: at(memory, 100 + 3 * ROW - 1, 3 * ROW) }],
      ["into and lse", { into: at(memory, 500, 3 * ROW), lse: at(memory, 500 + 3 * ROW - 1, 12) }],
      ["into and lse", { into: q, lse: at(memory, 110, 12) }],
      ["lse and q", { lse: at(memory, 100 + 3 * ROW - 12, 12) }],
      ["into and sinkLogits", { into: at(memory, 500, 3 * ROW), sinkLogits: at(memory, 510, 4) }],
      ["into and alibiSlopes", { into: at(memory, 500, 3 * ROW), alibiSlopes: at(memory, 497, 4) }],
      ["lse and sinkLogits", { lse: at(memory, 500, 12), sinkLogits: at(memory, 511, 4), alibiSlopes: slopes }],
    ];
    for (const [names, options] of cases) {
      new Float32Array(memory).set(before);
      assert.throws(() => attend(q, options), {
        code: "invalid_config",
        message: `Cannot attend in layer 0 as ${names} must not share memory`,
      });
      assert.deepEqual(new Float32Array(memory), before);
    }
    // Parents that end where the output begins, and parents in it.
    const treeParents = new Int32Array(memory, 500 * 4, 3);
    for (const first of [503, 502]) {
      treeParents.fill(-1);
      const options = { treeParents, into: at(memory, first, 3 * ROW) };
      if (first === 503) assert.equal(attend(q, options), options.into);
      else {assert.throws(() => attend(q, options), {
          code: "invalid_config",
          message: /into and treeParents must not/,
        });}
    }
  });
});

test("arrays side by side on one buffer, and an output in place, work", () => {
  forEachAttend((attend) => {
    const memory = new ArrayBuffer(4096), random = new Random(8);
    const q = new Float32Array(memory, 400, 3 * ROW);
    q.set(random.floats(q.length));
    const lse = new Float32Array(12), expected = attend(q, { lse });
    const beside = new Float32Array(memory, 400 + 3 * ROW * 4, 3 * ROW), besideLse = new Float32Array(memory, 352, 12);
    assert.equal(attend(q, { into: beside, lse: besideLse }), beside);
    assert.deepEqual([beside, besideLse], [expected, lse]);
    // What lies behind the elements that are written does not count.
    const longer = new Float32Array(memory, 400, 4 * ROW + 50);
    const logits = new Float32Array(memory, 400 + 4 * ROW * 4, 4).fill(-100);
    assert.equal(attend(q, { into: longer, sinkLogits: logits }), longer);
    assert.ok(longer.subarray(0, q.length).every((value, i) => Math.abs(value - expected[i]!) < 1e-5));
  });
});

test("memory that two buffers share is told by its address", () => {
  forEachAttend((attend, sequence) => {
    const rows = sequence.views(0)[0]!.k as Float32Array;
    const before = rows.slice();
    const q = new Float32Array(3 * ROW).fill(0.5);
    for (const options of [{ into: rows.subarray(0, 3 * ROW) }, { lse: rows.subarray(3, 15) }]) {
      assert.throws(() => attend(q, options), { code: "invalid_config", message: /nor with the rows it reads/ });
    }
    assert.deepEqual(rows, before);
    // The rows as queries are only read.
    assert.deepEqual(attend(rows.subarray(0, 3 * ROW), {}), attend(before.slice(0, 3 * ROW), {}));
  });
  const shared = new SharedArrayBuffer(4096);
  const copy = structuredClone(shared); // another object over the same memory
  new Float32Array(shared)[0] = 7;
  if (new Float32Array(copy)[0] !== 7) return; // this runtime copied it
  forEachAttend((attend) => {
    const q = new Float32Array(shared, 0, 3 * ROW), into = new Float32Array(copy, ROW * 4, 3 * ROW);
    assert.throws(() => attend(q, { into }), { code: "invalid_config" });
  });
});

test("gather() refuses one memory for keys and values, and that of the cache", () => {
  forEachAttend((_, sequence) => {
    const { k, v } = sequence.gather(0), n = 9 * 16;
    const memory = new Float32Array(2 * n + 9).fill(3);
    for (const first of [0, 1, n - 1]) {
      const into = { k: memory.subarray(0, n), v: memory.subarray(first, first + n) };
      assert.throws(() => sequence.gather(0, { into }), {
        code: "invalid_config",
        message: "Cannot gather layer 0 as into.k and into.v must not share memory",
      });
      assert.ok(memory.every((value) => value === 3));
    }
    const into = { k: memory.subarray(0, n), v: memory.subarray(n) }; // longer than what is written
    sequence.gather(0, { into });
    assert.deepEqual([into.k, into.v.subarray(0, n)], [k, v]);
    const rows = sequence.views(0)[0]!.v as Float32Array;
    for (const over of [{ k: rows, v: memory }, { k: memory, v: rows }]) {
      if (rows.length < n) continue;
      assert.throws(() => sequence.gather(0, { into: over }), { code: "invalid_config" });
    }
    assert.deepEqual(sequence.gather(0), { k, v });
  });
});

test("elements that break a rule are named", () => {
  forEachAttend((attend) => {
    const q = new Float32Array(3 * ROW);
    const cases: [rule: string, options: AttendOptions][] = [
      ["alibiSlopes must be finite: alibiSlopes[2] is NaN", { alibiSlopes: Float32Array.of(1, 2, NaN, 3) }],
      ["sinkLogits must be finite: sinkLogits[0] is Infinity", { sinkLogits: Float32Array.of(Infinity, 2, 0, 3) }],
      ["treeParents[2] must be below 2: it is 2", { treeParents: Int32Array.of(-1, -1, 2) }],
      ["treeParents needs causal: causal is false", { treeParents: Int32Array.of(-1, -1, -1), causal: false }],
    ];
    for (const [rule, options] of cases) {
      assert.throws(() => attend(q, options), {
        code: "invalid_config",
        message: `Cannot attend in layer 0 as ${rule}`,
      });
    }
  });
});
