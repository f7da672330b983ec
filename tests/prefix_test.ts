/** Sequences that start from a prefix: what is found, by whom, how long, and that hot and cold give the same. */

import assert from "node:assert/strict";
import { test } from "node:test";
import {
  BlockPool,
  ContiguousCache,
  KvError,
  PagedCache,
  type PagedCacheOptions,
  type Sequence,
  setThreadCount,
  systemInfo,
} from "../mod.ts";

const SHAPE = { layerCount: 2, kvHeadCount: 2, headDim: 8, maxSeqLen: 4096, blockSize: 4 } as const;

/** Rows that depend on all tokens up to their own, as a model's do. */
function rowsOf(tokens: Uint32Array, from: number, elements: number): Float32Array {
  const rows = new Float32Array((tokens.length - from) * elements);
  let hash = 17;
  tokens.forEach((token, i) => {
    hash = Math.imul(hash ^ token, 16777619) >>> 0;
    for (let e = 0; i >= from && e < elements; e++) {
      rows[(i - from) * elements + e] = Math.sin(hash % 1000 + e);
    }
  });
  return rows;
}

/** Computes what a sequence lacks of these tokens, and commits them. */
function grow(sequence: Sequence, tokens: Uint32Array, options: { priority?: number; ttlMs?: number } = {}): void {
  const start = sequence.seqLen;
  if (start === tokens.length) return;
  for (let layer = 0; layer < sequence.layerCount; layer++) {
    const rows = rowsOf(tokens, start, sequence.kvDim);
    sequence.append(layer, rows, rows);
  }
  sequence.commit(tokens.length - start, { tokens: tokens.slice(start), ...options });
}

/** The rows of a sequence are those of its tokens. */
function assertRows(sequence: Sequence, tokens: Uint32Array): void {
  const expected = rowsOf(tokens.subarray(0, sequence.seqLen), 0, sequence.kvDim);
  for (let layer = 0; layer < sequence.layerCount; layer++) {
    const { k, v } = sequence.gather(layer);
    assert.deepEqual([...k], [...expected]);
    assert.deepEqual([...v], [...expected]);
  }
}

function codeOf(call: () => unknown): string {
  try {
    call();
  } catch (error) {
    if (error instanceof KvError) return error.code;
    throw error;
  }
  return "none";
}

const f32 = { ...SHAPE, dtype: "f32" } as const;
const A = Uint32Array.of(1, 2, 3, 4, 5, 6, 7, 8, 9, 10);

test("a prompt starts at 8, 7, 6, 10 and, with another salt, 0", () => {
  using cache = new PagedCache({ ...f32, prefix: {} });
  const first = cache.sequence({ tokens: A });
  assert.equal(first.seqLen, 0);
  grow(first, A);
  const rows: [tokens: number[], salt: string | undefined, start: number][] = [
    [[1, 2, 3, 4, 5, 6, 7, 8, 90, 91], undefined, 8],
    [[...A.subarray(0, 8)], undefined, 7],
    [[1, 2, 3, 4, 5, 6, 70, 80], undefined, 6],
    [[...A, 11, 12], undefined, 10],
    [[...A], "another", 0],
    [[], undefined, 0],
  ];
  for (const lives of [true, false]) {
    if (!lives) first.free();
    for (const [tokens, salt, start] of rows) {
      using sequence = cache.sequence({ tokens: Uint32Array.from(tokens), ...(salt === undefined ? {} : { salt }) });
      assert.equal(sequence.seqLen, start, `${tokens} with ${salt}`);
      assertRows(sequence, Uint32Array.from(tokens));
    }
  }
  const { lookups, hits, hitTokens, cachedBlocks, evictedBlocks, cachedBytes, metadataBytes } = cache.stats().prefix;
  assert.deepEqual([lookups, hits, hitTokens, cachedBlocks, evictedBlocks], [13, 8, 62, 3, 0]);
  assert.equal(cachedBytes, 3 * 4 * 16 * 4 * 2 * 2);
  assert.ok(metadataBytes > 0);
});

test("without the option prefix nothing outlives its sequence", () => {
  using cache = new PagedCache(f32);
  const first = cache.sequence();
  grow(first, A);
  const second = cache.sequence({ tokens: A });
  assert.equal(second.seqLen, 9);
  first.free();
  second.free();
  assert.equal(cache.sequence({ tokens: A }).seqLen, 0);
  assert.equal(cache.stats().prefix.cachedBlocks, 0);
});

test("salts and fingerprints are told apart, whatever they are", () => {
  using cache = new PagedCache({ ...f32, prefix: {} });
  const tenants = [
    {},
    { salt: "" },
    { salt: "a" },
    { salt: Uint8Array.of(255) },
    { fingerprint: "a" },
    { salt: "a", fingerprint: "a" },
    { salt: "aa" },
    { fingerprint: "weights 1" },
    { fingerprint: "weights 2" },
  ];
  for (const [i, tenant] of tenants.entries()) {
    const sequence = cache.sequence({ tokens: A, ...tenant });
    assert.equal(sequence.seqLen, 0, `tenant ${i}`);
    grow(sequence, A);
    assert.equal(cache.sequence({ tokens: A, ...tenant }).seqLen, 9, `tenant ${i}`);
  }
  assert.equal(cache.sequence({ tokens: A, salt: new TextEncoder().encode("aa") }).seqLen, 9);
});

test("pendingPrefix() tells what sequences of a salt are about to commit", () => {
  using cache = new PagedCache({ ...f32, prefix: {} });
  const tokens = Uint32Array.from({ length: 40 }, (_, i) => i);
  const first = cache.sequence({ tokens, salt: "a" });
  assert.equal(cache.pendingPrefix(tokens, { salt: "a" }), 40);
  assert.equal(cache.pendingPrefix(tokens), 0);
  assert.equal(cache.pendingPrefix(tokens, { salt: "b" }), 0);
  grow(first, tokens.subarray(0, 18));
  assert.equal(cache.pendingPrefix(tokens, { salt: "a" }), 22);
  assert.equal(cache.sequence({ tokens, salt: "a" }).seqLen, 18);
  first.free();
  assert.equal(cache.pendingPrefix(tokens.subarray(0, 5), { salt: "a" }), 0);
});

test("hot and cold give the same bits: paged, forked and contiguous, by one thread and by two", () => {
  const queries = Float32Array.from({ length: 16 }, (_, i) => Math.cos(i));
  const tokens = Uint32Array.from({ length: 77 }, (_, i) => i * i % 31);
  using cache = new PagedCache({ ...f32, prefix: {} });
  const cold = cache.sequence({ tokens });
  grow(cold, tokens);
  const outputs = [0, 1].map((layer) => cold.attend(layer, queries));
  cold.free();
  const hot = cache.sequence({ tokens });
  assert.equal(hot.seqLen, 76);
  grow(hot, tokens);
  using flat = new ContiguousCache({ layerCount: 2, kvHeadCount: 2, headDim: 8, maxSeqLen: 128, dtype: "f32" });
  const rows = rowsOf(tokens, 0, 16);
  for (const layer of [0, 1]) flat.append(layer, 0, rows, rows);
  flat.sequence(0).commit(77, { tokens });
  const { threadCount } = systemInfo();
  try {
    for (const threads of [1, 2]) {
      setThreadCount(threads);
      for (const layer of [0, 1]) {
        assert.deepEqual(hot.attend(layer, queries), outputs[layer]);
        assert.deepEqual(hot.fork().attend(layer, queries), outputs[layer]);
        assert.deepEqual(flat.sequence(0).attend(layer, queries), outputs[layer]);
      }
    }
  } finally {
    setThreadCount(threadCount);
  }
});

test("tiers: float starts before the first quantized block, any from the codes", () => {
  const tokens = Uint32Array.from({ length: 300 }, (_, i) => i % 7);
  const options = {
    layerCount: 1,
    kvHeadCount: 1,
    headDim: 32,
    maxSeqLen: 1024,
    dtype: "f32",
    store: "i8",
    tail: { tokens: 64 },
  } as const;
  for (const tiers of ["any", "float"] as const) {
    using cache = new PagedCache({ ...options, prefix: { tiers } });
    const donor = cache.sequence();
    grow(donor, tokens);
    donor.free();
    const sequence = cache.sequence({ tokens });
    assert.equal(sequence.seqLen, 299);
    assert.equal(sequence.views(0)[0]!.tier, tiers === "any" ? "store" : "tail");
  }
});

test("memory comes from prefixes nobody uses, the least important first", () => {
  const blockBytes = 4 * 16 * 4 * 2 * 2;
  using cache = new PagedCache({ ...f32, maxBytes: 64 * blockBytes, prefix: {} });
  const important = Uint32Array.of(1, 1, 1, 1, 1, 1, 1, 1);
  const donor = cache.sequence();
  grow(donor, important, { priority: 90 });
  donor.free();
  for (let i = 0; i < 40; i++) {
    const tokens = new Uint32Array(30).fill(100 + i);
    using sequence = cache.sequence({ tokens });
    grow(sequence, tokens);
    assertRows(sequence, tokens);
  }
  assert.ok(cache.stats().prefix.evictedBlocks > 200);
  assert.equal(cache.sequence({ tokens: important }).seqLen, 7);
});

test("a priority holds for ttlMs", async () => {
  const blockBytes = 4 * 16 * 4 * 2 * 2;
  using cache = new PagedCache({ ...f32, maxBytes: 64 * blockBytes, prefix: {} });
  const important = Uint32Array.of(1, 1, 1, 1, 1, 1, 1, 1), lasting = Uint32Array.of(2, 2, 2, 2, 2, 2, 2, 2);
  for (const [tokens, ttlMs] of [[important, 20], [lasting, 600_000]] as const) {
    const donor = cache.sequence();
    grow(donor, tokens, { priority: 90, ttlMs });
    donor.free();
  }
  await new Promise((resolve) => setTimeout(resolve, 50));
  for (let i = 0; i < 40; i++) {
    using sequence = cache.sequence();
    grow(sequence, new Uint32Array(30).fill(100 + i));
  }
  assert.equal(cache.sequence({ tokens: important }).seqLen, 0);
  assert.equal(cache.sequence({ tokens: lasting }).seqLen, 7);
});

test("limits hold for all and for a salt, and a flood stays in its own", () => {
  const blockBytes = 4 * 16 * 4 * 2 * 2;
  const prefix = { maxBytes: 20 * blockBytes, maxBytesPerSalt: 10 * blockBytes };
  using cache = new PagedCache({ ...f32, prefix });
  const quiet = cache.sequence({ salt: "quiet" });
  grow(quiet, A);
  quiet.free();
  for (let i = 0; i < 100; i++) {
    using loud = cache.sequence({ salt: "loud" });
    grow(loud, new Uint32Array(12).fill(i));
    assert.ok(cache.stats().prefix.cachedBytes <= prefix.maxBytes);
  }
  assert.equal(cache.sequence({ tokens: A, salt: "quiet" }).seqLen, 9);
});

test("what is wrong with a prompt or a limit is said", () => {
  using cache = new PagedCache({ ...f32, prefix: {} });
  const bad = (options: unknown) => () => cache.sequence(options as never);
  for (
    const options of [{ tokens: [1, 2] }, { tokens: new Int32Array(2) }, { salt: 5 }, { fingerprint: {} }, null, 5]
  ) {
    assert.throws(bad(options), TypeError, JSON.stringify(options));
  }
  assert.throws(bad({ token: A }), /tokens/);
  assert.equal(codeOf(bad({ tokens: new Uint32Array(4097) })), "cache_full");
  assert.throws(() => cache.pendingPrefix([1] as never), TypeError);
  const sequence = cache.sequence();
  assert.equal(codeOf(() => sequence.commit(0, { priority: 5 })), "invalid_config");
  assert.equal(codeOf(() => sequence.commit(0, { tokens: new Uint32Array(0), priority: 256 })), "invalid_config");
  assert.equal(codeOf(() => sequence.commit(0, { tokens: A })), "invalid_size");
  const told = { tokens: new Uint32Array(0) };
  assert.equal(codeOf(() => sequence.commit(0, { ...told, ttlMs: 5 })), "invalid_config");
  assert.equal(codeOf(() => sequence.commit(0, { ...told, priority: 50, ttlMs: 0 })), "invalid_config");
  assert.throws(() => sequence.commit(0, { ...told, priority: 50, ttlMs: 0.5 }), RangeError);
  sequence.commit(0, { ...told, priority: 50, ttlMs: 2 ** 32 - 1 });

  const make = (prefix: unknown, more: Partial<PagedCacheOptions> = {}) => () =>
    new PagedCache({ ...f32, ...more, prefix: prefix as never }).free();
  assert.equal(codeOf(make({ tiers: "floats" })), "invalid_config");
  assert.equal(codeOf(make({ maxBytes: 0 })), "invalid_config");
  assert.throws(make({ maxBytes: "5" }), TypeError);
  assert.throws(make({ maxByte: 5 }), /maxBytes/);
  assert.throws(make("all"), TypeError);
  const { maxSeqLen: _, ...shape } = SHAPE;
  using pool = new BlockPool({ ...shape, dtype: "f32" });
  assert.equal(codeOf(make({}, { pool })), "invalid_config");
  using shared = new PagedCache({ ...f32, pool });
  assert.equal(codeOf(() => shared.sequence({ tokens: A })), "invalid_config");
  shared.sequence().free();
});

test("explain() says why, to the owner of the cache and to a tenant", () => {
  const layers = [{ kvHeadCount: 1, headDim: 32 }, { kvHeadCount: 1, headDim: 32, windowTokens: 4 }];
  using cache = new PagedCache({ layers, maxSeqLen: 1024, blockSize: 4, dtype: "f32", prefix: {} });
  const donor = cache.sequence({ salt: "a" });
  grow(donor, A);
  const own = (tokens: number[]) => cache.explain(Uint32Array.from(tokens), { salt: "a" });
  assert.deepEqual(own([...A]), {
    startsAt: 9,
    knownTokens: 10,
    reason: "whole",
    differs: undefined,
    formats: [{ k: "f32", v: "f32" }],
  });
  assert.deepEqual(own([1, 2, 3, 9]).differs, { at: 3, id: 4 });
  assert.deepEqual(own([9]).differs, { at: 0, id: 1 });
  assert.equal(own([...A, 11, 12]).reason, "not_stored");
  assert.equal(own([...A, 11, 12]).startsAt, 10);
  const other = cache.explain(A, { salt: "a", fingerprint: "another" });
  assert.deepEqual([other.startsAt, other.reason], [0, "other_fingerprint"]);
  assert.equal(cache.explain(A, { salt: "b" }).reason, "not_stored");
  assert.deepEqual(donor.explain(A), own([...A]));
  const stranger = cache.sequence({ salt: "b" });
  assert.deepEqual([stranger.explain(A).startsAt, stranger.explain(A).reason], [0, "not_stored"]);
  const before = cache.stats().prefix;
  own([...A]);
  assert.deepEqual(cache.stats().prefix, before);
  using flat = new ContiguousCache({ layerCount: 1, kvHeadCount: 1, headDim: 32, maxSeqLen: 8 });
  assert.equal(codeOf(() => (flat.sequence(0) as Sequence).explain(A)), "unsupported");
});

test("explain() tells what was evicted, what is quantized and what a window has passed", () => {
  const one = { layerCount: 1, kvHeadCount: 1, headDim: 32, maxSeqLen: 1024, dtype: "f32" } as const;
  const tokens = Uint32Array.from({ length: 300 }, (_, i) => i % 7);
  {
    const blockBytes = 64 * 32 * 4 * 2;
    using cache = new PagedCache({ ...one, maxBytes: 16 * blockBytes, prefix: {} });
    const donor = cache.sequence({ salt: "a" });
    grow(donor, tokens);
    donor.free();
    const other = cache.sequence();
    grow(other, Uint32Array.from({ length: 1000 }, (_, i) => 100 + i));
    assert.equal(cache.explain(tokens, { salt: "a" }).reason, "evicted");
    assert.equal(cache.sequence({ salt: "a" }).explain(tokens).reason, "not_stored");
  }
  {
    using cache = new PagedCache({ ...one, store: "i8", prefix: {} });
    const donor = cache.sequence();
    grow(donor, tokens);
    const { startsAt, formats } = cache.explain(tokens);
    assert.equal(startsAt, 299);
    assert.deepEqual(formats, [{ k: "i8", v: "i8" }, { k: "f32", v: "f32" }]);
  }
});

test("events() tell what a router must know, numbered without gaps", () => {
  using cache = new PagedCache({ ...f32, maxBytes: 64 * 4 * 16 * 4 * 2 * 2, prefix: { events: true } });
  const known = new Map<string, string>();
  let number = 0;
  const follow = () => {
    for (const event of cache.events()) {
      assert.equal(event.number, number++);
      if (event.kind === "cleared") known.clear();
      else if (event.kind === "removed") assert.ok(known.delete(event.block));
      else {
        assert.equal(event.tokens.length, 4);
        const before = event.parent === undefined ? "" : known.get(event.parent);
        assert.ok(before !== undefined, "a block comes behind the one before it");
        assert.ok(!known.has(event.block));
        known.set(event.block, `${before} ${event.tokens.join(" ")}`);
      }
    }
  };
  assert.deepEqual(cache.events(), []);
  for (let i = 0; i < 60; i++) {
    using sequence = cache.sequence({ salt: `${i % 3}` });
    grow(sequence, Uint32Array.from({ length: 30 }, (_, j) => j < 8 ? j : i % 20));
    follow();
    if (i === 40) {
      cache.reset();
      sequence.truncate(0);
    }
  }
  follow();
  assert.ok(cache.stats().prefix.evictedBlocks > 50);
  assert.ok(known.size > 20 && known.size <= 64, `${known.size}`);
  for (const [block, tokens] of known) {
    assert.match(block, /^[0-9a-f]{32}$/);
    const ids = Uint32Array.from([...tokens.trim().split(" ").map(Number), 1]);
    const found = [0, 1, 2].map((salt) => cache.explain(ids, { salt: `${salt}` }).knownTokens);
    assert.ok(found.includes(ids.length - 1) || found.includes(ids.length), `${tokens}: ${found}`);
  }
  using silent = new PagedCache({ ...f32, prefix: {} });
  assert.equal(codeOf(() => silent.events()), "unsupported");
  assert.throws(() => new PagedCache({ ...f32, prefix: { events: 1 as never } }), TypeError);
});

test("beams of two tenants are not reordered into each other", () => {
  using cache = new PagedCache({ ...f32, prefix: {} });
  const beams = [cache.sequence({ salt: "a" }), cache.sequence({ salt: "b" })];
  grow(beams[0]!, A);
  grow(beams[1]!, A);
  assert.equal(codeOf(() => cache.reorder(beams, [1, 0])), "invalid_config");
  assertRows(beams[0]!, A);
});

test("reset() empties the index, and drafts tell the tokens they keep", () => {
  using cache = new PagedCache({ ...f32, prefix: {} });
  const sequence = cache.sequence();
  grow(sequence, A);
  const drafted = Uint32Array.of(20, 21, 22);
  const rows = rowsOf(Uint32Array.of(...A, ...drafted), 10, 16);
  for (const layer of [0, 1]) sequence.append(layer, rows, rows);
  sequence.commit(2, { kept: Uint32Array.of(0, 2), tokens: Uint32Array.of(20, 22) });
  assert.equal(cache.sequence({ tokens: Uint32Array.of(...A, 20, 22, 23) }).seqLen, 12);
  assert.equal(cache.sequence({ tokens: Uint32Array.of(...A, 20, 21, 22) }).seqLen, 11);
  cache.reset();
  assert.equal(cache.stats().prefix.cachedBlocks, 0);
  assert.equal(cache.sequence({ tokens: A }).seqLen, 0);
});
