/**
 * The arrays of a call: which of them may share memory, and that what is read is read before anything is written.
 */

import assert from "node:assert/strict";
import { test } from "node:test";
import { PagedCache, type PagedCacheOptions } from "../mod.ts";
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
