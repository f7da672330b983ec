/** Prompts, salts and tokens that lie about themselves or change while a call has them. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { PagedCache } from "../mod.ts";

const SHAPE = { layerCount: 1, kvHeadCount: 1, headDim: 8, maxSeqLen: 4096, blockSize: 4, dtype: "f32" } as const;
const A = Uint32Array.of(1, 2, 3, 4, 5, 6, 7, 8, 9, 10);

/** A cache in which these tenants have computed `A`. */
function cacheOf(...salts: readonly string[]): PagedCache {
  const cache = new PagedCache({ ...SHAPE, prefix: {} });
  for (const salt of salts) {
    using sequence = cache.sequence({ salt });
    const rows = new Float32Array(A.length * 8);
    sequence.append(0, rows, rows);
    sequence.commit(A.length, { tokens: A });
  }
  return cache;
}

/** An array that says it has another length. */
function lying<Words extends Uint32Array | Uint8Array>(words: Words, length: number): Words {
  return Object.defineProperty(words, "length", { value: length });
}

function detached<Words extends Uint32Array | Uint8Array>(words: Words): Words {
  structuredClone(words.buffer, { transfer: [words.buffer as ArrayBuffer] });
  return words;
}

test("a prompt is as long as its array, whatever that says", () => {
  using cache = cacheOf("a");
  const sequence = cache.sequence({ salt: "a" });
  const expected = cache.explain(A, { salt: "a" });
  assert.equal(expected.reason, "whole");
  for (const length of [0, 4, 4000, 2 ** 31]) {
    assert.deepEqual(cache.explain(lying(A.slice(), length), { salt: "a" }), expected, `${length}`);
    assert.deepEqual(sequence.explain(lying(A.slice(), length)), expected, `${length}`);
    assert.equal(cache.sequence({ tokens: lying(A.slice(), length), salt: "a" }).seqLen, 9, `${length}`);
    assert.equal(cache.pendingPrefix(lying(A.slice(), length), { salt: "b" }), 0, `${length}`);
  }
});

test("a salt is as long as its array, and no array without memory names a tenant", () => {
  using cache = cacheOf("", "a");
  const salt = () => new TextEncoder().encode("a");
  for (const length of [0, 1000, 2 ** 31]) {
    assert.equal(cache.sequence({ tokens: A, salt: lying(salt(), length) }).seqLen, 9, `${length}`);
    assert.equal(cache.sequence({ tokens: A, salt: "a", fingerprint: lying(salt(), length) }).seqLen, 0, `${length}`);
  }
  const gone = detached(salt());
  for (const tenant of [{ salt: gone }, { fingerprint: gone }, { salt: Object.create(Uint8Array.prototype) }]) {
    assert.throws(() => cache.sequence({ tokens: A, ...tenant }), TypeError);
    assert.throws(() => cache.explain(A, tenant), TypeError);
    assert.throws(() => cache.pendingPrefix(A, tenant), TypeError);
  }
  assert.equal(cache.sequence({ tokens: A, salt: new Uint8Array(0) }).seqLen, 9);
});

test("strings of different letters are different tenants", () => {
  using cache = cacheOf("\ufffd", "\u{1f600}");
  assert.equal(cache.sequence({ tokens: A, salt: "\u{1f600}" }).seqLen, 9);
  for (const salt of ["\ud800", "\udfff", "a\ud83d", "\ude00\ud83d"]) {
    assert.throws(() => cache.sequence({ tokens: A, salt }), { name: "TypeError", message: /surrogate/ });
    assert.throws(() => cache.sequence({ tokens: A, fingerprint: salt }), { name: "TypeError", message: /surrogate/ });
  }
});

test("a getter that frees the cache or takes an array away ends in an error", () => {
  for (const call of ["explain", "pendingPrefix"] as const) {
    const cache = cacheOf("a");
    const freeing = {
      get salt() {
        cache.free();
        return "a";
      },
    };
    assert.throws(() => cache[call](A, freeing), { code: "stale_handle" });
    using other = cacheOf("a");
    const tokens = A.slice();
    const taking = {
      get salt() {
        detached(tokens);
        return "a";
      },
    };
    assert.throws(() => other[call](tokens, taking), TypeError);
  }
  const cache = cacheOf();
  assert.throws(() =>
    cache.sequence({
      get tokens() {
        cache.free();
        return A;
      },
    }), { code: "stale_handle" });
});
