/** The contiguous cache by its own verbs: store and advance, several sequences, figures, lifetimes. */

import assert from "node:assert/strict";
import process from "node:process";
import { test } from "node:test";
import { ContiguousCache, type ContiguousCacheOptions, memoryBytes, PagedCache, Sequence, systemInfo } from "../mod.ts";
import { assertCode } from "./cache_cases.ts";
import { Random } from "./oracle.ts";

function rowOf(cache: ContiguousCache, value: number): Float32Array {
  return new Float32Array(cache.kvDim).fill(value);
}

/** Stores one token in every layer of a sequence. */
function storeToken(cache: ContiguousCache, sequence: number, k: Float32Array, v: Float32Array): void {
  for (let layer = 0; layer < cache.layerCount; layer++) cache.store(layer, sequence, k, v);
}

/** All that a refused call must leave alone. */
function snapshot(cache: ContiguousCache): unknown {
  const rows = [];
  for (let layer = 0; layer < cache.layerCount; layer++) {
    for (let sequence = 0; sequence < cache.sequenceCount; sequence++) {
      rows.push(cache.sequence(sequence).gather(layer), cache.getSeqLen(sequence));
    }
  }
  return rows;
}

function assertRefused(cache: ContiguousCache, code: Parameters<typeof assertCode>[0], call: () => unknown): void {
  const before = snapshot(cache);
  assertCode(code, call);
  assert.deepEqual(snapshot(cache), before);
}

test("T1: one token in two layers of 4 heads of 8", () => {
  using cache = new ContiguousCache({ layerCount: 2, kvHeadCount: 4, headDim: 8, maxSeqLen: 10 });
  storeToken(cache, 0, rowOf(cache, 1), rowOf(cache, 2));
  assert.equal(cache.currentPos, 0);
  cache.advance();
  assert.deepEqual([cache.currentPos, cache.getSeqLen(0), cache.memoryBytes], [1, 1, 5124]);
  assert.equal(memoryBytes({ layerCount: 2, kvHeadCount: 4, headDim: 8, maxSeqLen: 10 }), 5120);
  assert.equal(cache.stats().kvBytes, 5120);
});

test("T2: three tokens, every value as stored", () => {
  using cache = new ContiguousCache({ layerCount: 1, kvHeadCount: 2, headDim: 4, maxSeqLen: 5 });
  const keys: number[] = [], values: number[] = [];
  for (let token = 0; token < 3; token++) {
    const k = rowOf(cache, 0).map((_, i) => token * 100 + i);
    const v = k.map((value) => -value - 0.5);
    keys.push(...k);
    values.push(...v);
    cache.store(0, 0, k, v);
    cache.advance();
  }
  assert.equal(cache.getKeys(0, 0).length, 24);
  assert.deepEqual(cache.getKeys(0, 0), Float32Array.from(keys));
  assert.deepEqual(cache.getValues(0, 0), Float32Array.from(values));
});

test("T3: the token that fills the cache is kept, advance() says it is full, and nothing is overwritten", () => {
  using cache = new ContiguousCache({ layerCount: 1, kvHeadCount: 1, headDim: 4, maxSeqLen: 3 });
  const rows = Float32Array.from({ length: 12 }, (_, i) => i + 1);
  for (const token of [0, 1]) {
    cache.store(0, 0, rows.subarray(token * 4, token * 4 + 4), rows.subarray(token * 4, token * 4 + 4));
    cache.advance();
  }
  cache.store(0, 0, rows.subarray(8), rows.subarray(8));
  assertCode("cache_full", () => cache.advance(), /holds all its 3 rows now/);
  assert.equal(cache.getSeqLen(0), 3);
  for (let again = 0; again < 3; again++) {
    assertRefused(cache, "cache_full", () => cache.store(0, 0, rowOf(cache, 9), rowOf(cache, 9)));
    assertRefused(cache, "cache_full", () => cache.advance());
  }
  assert.deepEqual(cache.getKeys(0, 0), rows);
  assert.deepEqual(cache.getValues(0, 0), rows);
  cache.sequence(0).truncate(2);
  cache.store(0, 0, rowOf(cache, 5), rowOf(cache, 5));
  assertCode("cache_full", () => cache.advance());
  assert.deepEqual([...cache.getKeys(0, 0)], [...rows.subarray(0, 8), 5, 5, 5, 5]);
});

test("T4: reset() starts again and shows no old row", () => {
  using cache = new ContiguousCache({ layerCount: 1, kvHeadCount: 1, headDim: 4, maxSeqLen: 3 });
  for (const value of [1, 2]) {
    cache.store(0, 0, rowOf(cache, value), rowOf(cache, value));
    cache.advance();
  }
  assert.equal(cache.currentPos, 2);
  cache.reset();
  assert.deepEqual([cache.currentPos, cache.getSeqLen(0), cache.getKeys(0, 0).length], [0, 0, 0]);
  cache.store(0, 0, rowOf(cache, 3), rowOf(cache, 4));
  cache.advance();
  assert.deepEqual(cache.getKeys(0, 0), rowOf(cache, 3));
  assert.deepEqual(cache.getValues(0, 0), rowOf(cache, 4));
});

test("reset() drops pending rows, makes a full cache usable and touches no byte", () => {
  using cache = new ContiguousCache({ layerCount: 2, kvHeadCount: 1, headDim: 2, maxSeqLen: 1, sequenceCount: 2 });
  storeToken(cache, 0, rowOf(cache, 7), rowOf(cache, 8));
  const keys = cache.getKeys(0, 0);
  assertCode("cache_full", () => cache.advance());
  cache.store(0, 1, rowOf(cache, 1), rowOf(cache, 1));
  cache.reset();
  assert.equal(cache.getKeys(0, 1).length, 0);
  assert.deepEqual([...keys], [7, 7]);
  storeToken(cache, 0, rowOf(cache, 9), rowOf(cache, 9));
  assertCode("cache_full", () => cache.advance());
});

test("store() refuses in the order layer, sequence, full, size, second store, not finite", () => {
  using cache = new ContiguousCache({ layerCount: 1, kvHeadCount: 2, headDim: 2, maxSeqLen: 2, sequenceCount: 2 });
  const good = rowOf(cache, 1);
  const nan = rowOf(cache, NaN);
  const long = new Float32Array(8).fill(NaN);
  for (const value of [1, 2]) {
    cache.store(0, 0, rowOf(cache, value), rowOf(cache, value));
    try {
      cache.advance();
    } catch { /* full after the second, as T3 shows */ }
  }
  cache.store(0, 1, good, good);
  assertRefused(cache, "layer_out_of_range", () => cache.store(1, 2, long, good));
  assertRefused(cache, "sequence_out_of_range", () => cache.store(0, 2, long, good));
  assertRefused(cache, "cache_full", () => cache.store(0, 0, long, good));
  assertRefused(cache, "invalid_size", () => cache.store(0, 1, long, good));
  assertRefused(cache, "invalid_size", () => cache.store(0, 1, good, new Float32Array(0)));
  assertRefused(cache, "commit_mismatch", () => cache.store(0, 1, nan, nan));
  cache.advance();
  assertRefused(cache, "not_finite", () => cache.store(0, 1, nan, good));
  assertRefused(cache, "not_finite", () => cache.store(0, 1, good, nan));
  assert.throws(() => cache.store(-1, 0, good, good), RangeError);
  assert.throws(() => cache.store(0, 1.5, good, good), RangeError);
  assert.throws(() => cache.store(0, 0, [1, 1] as unknown as Float32Array, good), TypeError);
});

test("append() of the cache refuses in the same order", () => {
  using cache = new ContiguousCache({ layerCount: 1, kvHeadCount: 1, headDim: 2, maxSeqLen: 2 });
  const rows = new Float32Array(7).fill(NaN);
  assertRefused(cache, "layer_out_of_range", () => cache.append(1, 1, rows, rows));
  assertRefused(cache, "sequence_out_of_range", () => cache.append(0, 1, rows, rows));
  assertRefused(cache, "invalid_size", () => cache.append(0, 0, rows, rows));
  assertRefused(cache, "cache_full", () => cache.append(0, 0, rows.subarray(0, 6), rows.subarray(0, 6)));
  assertRefused(cache, "not_finite", () => cache.append(0, 0, rows.subarray(0, 4), rows.subarray(0, 4)));
});

test("a row stored in layer 0 is not seen in layer 1", () => {
  using cache = new ContiguousCache({ layerCount: 2, kvHeadCount: 1, headDim: 2, maxSeqLen: 4 });
  storeToken(cache, 0, rowOf(cache, 1), rowOf(cache, 1));
  cache.advance();
  cache.store(0, 0, rowOf(cache, 2), rowOf(cache, 2));
  assert.deepEqual([...cache.getKeys(0, 0)], [1, 1, 2, 2]);
  assert.deepEqual([...cache.getKeys(1, 0)], [1, 1]);
  assertRefused(cache, "commit_mismatch", () => cache.advance());
});

test("advance() without any new row, or with two in a layer, is refused", () => {
  using cache = new ContiguousCache({ layerCount: 1, kvHeadCount: 1, headDim: 2, maxSeqLen: 4, sequenceCount: 2 });
  assertRefused(cache, "commit_mismatch", () => cache.advance());
  cache.append(0, 0, new Float32Array(4), new Float32Array(4));
  cache.store(0, 1, rowOf(cache, 1), rowOf(cache, 1));
  assertRefused(cache, "commit_mismatch", () => cache.advance());
  cache.sequence(0).commit(2);
  cache.advance();
  assert.deepEqual([cache.getSeqLen(0), cache.getSeqLen(1)], [2, 1]);
});

test("ragged sequences keep lengths of their own", () => {
  using cache = new ContiguousCache({ layerCount: 2, kvHeadCount: 1, headDim: 2, maxSeqLen: 4, sequenceCount: 2 });
  for (const value of [1, 2, 3]) {
    storeToken(cache, 0, rowOf(cache, value), rowOf(cache, value));
    cache.advance();
  }
  assert.deepEqual([cache.getSeqLen(0), cache.getSeqLen(1), cache.currentPos], [3, 0, 3]);
  storeToken(cache, 1, rowOf(cache, 9), rowOf(cache, 9));
  cache.advance();
  assert.deepEqual([...cache.getKeys(1, 1)], [9, 9]);
  storeToken(cache, 0, rowOf(cache, 4), rowOf(cache, 4));
  storeToken(cache, 1, rowOf(cache, 8), rowOf(cache, 8));
  assertCode("cache_full", () => cache.advance()); // sequence 0 is full now, and sequence 1 committed with it
  assert.deepEqual([cache.getSeqLen(0), cache.getSeqLen(1)], [4, 2]);
  storeToken(cache, 1, rowOf(cache, 7), rowOf(cache, 7));
  cache.advance();
  assert.equal(cache.getSeqLen(1), 3);
  assertRefused(cache, "sequence_out_of_range", () => cache.getSeqLen(2));
});

test("a prompt appended layer by layer equals one stored token by token", () => {
  const options = { layerCount: 3, kvHeadCount: 2, headDim: 4, maxSeqLen: 20, sequenceCount: 3 };
  using cache = new ContiguousCache(options);
  const random = new Random(7);
  const k = random.floats(3 * 12 * 8), v = random.floats(3 * 12 * 8);
  const rows = (array: Float32Array, layer: number, first: number, end: number) =>
    array.subarray((layer * 12 + first) * 8, (layer * 12 + end) * 8);
  for (const [first, end] of [[0, 7], [7, 12]] as const) {
    for (let layer = 0; layer < 3; layer++) {
      const { start } = cache.append(layer, 1, rows(k, layer, first, end), rows(v, layer, first, end));
      assert.equal(start, first);
    }
    cache.sequence(1).commit(end - first);
  }
  for (let token = 0; token < 12; token++) {
    for (let layer = 0; layer < 3; layer++) {
      cache.store(layer, 2, rows(k, layer, token, token + 1), rows(v, layer, token, token + 1));
    }
    cache.advance();
  }
  for (let layer = 0; layer < 3; layer++) {
    assert.deepEqual(cache.getKeys(layer, 1), rows(k, layer, 0, 12).slice());
    assert.deepEqual(cache.getKeys(layer, 2), cache.getKeys(layer, 1));
    assert.deepEqual(cache.getValues(layer, 2), cache.getValues(layer, 1));
    assert.equal(cache.getKeys(layer, 0).length, 0);
  }
});

test("K and V may be stored in different dtypes", () => {
  using cache = new ContiguousCache({
    layerCount: 1,
    kvHeadCount: 1,
    headDim: 4,
    maxSeqLen: 4,
    dtype: { k: "bf16", v: "f16" },
  });
  assert.deepEqual([cache.dtypeK, cache.dtypeV], ["bf16", "f16"]);
  const row = rowOf(cache, 1.5);
  cache.store(0, 0, row, row);
  assert.deepEqual(cache.getKeys(0, 0), new Uint16Array(4).fill(0x3fc0));
  assert.deepEqual(cache.getValues(0, 0), new Uint16Array(4).fill(0x3e00));
  const [view] = cache.sequence(0).views(0);
  assert.deepEqual([view!.dtypeK, view!.dtypeV], ["bf16", "f16"]);
  assertRefused(cache, "commit_mismatch", () => cache.store(0, 0, row, row));
  cache.advance();
  cache.store(0, 0, rowOf(cache, 65520), row); // fits bf16
  cache.advance();
  assertRefused(cache, "not_finite", () => cache.store(0, 0, row, rowOf(cache, 65520)));
  const half = new Float16Array(4).fill(2), bits = new Uint16Array(4).fill(0x4000);
  cache.store(0, 0, half, half);
  cache.advance();
  cache.store(0, 0, bits, bits, { dtype: "bf16" });
  assert.deepEqual([...cache.sequence(0).gather(0).v.subarray(8)], [2, 2, 2, 2, 2, 2, 2, 2]);
});

// Windows counts what is reserved, so there the cases that reserve more than they use are left out.
const reservesFreely = process.platform !== "win32";
const unlessReserved = reservesFreely ? "" : " (skipped: this system counts reserved memory)";

test(`offset() is the formula, also past 2^32 elements${unlessReserved}`, { skip: !reservesFreely }, () => {
  // 2^33 elements a side: reserved with the limit lifted, and never touched.
  const geometry = { layerCount: 64, sequenceCount: 4, kvHeadCount: 8, headDim: 128, maxSeqLen: 32768 };
  using cache = new ContiguousCache({ ...geometry, dtype: "f16", maxBytes: 2 ** 40 });
  assert.deepEqual([cache.stats().kvBytes, cache.memoryBytes], [2 ** 35, 2 ** 35 + 4 * 4]);
  const random = new Random(3);
  const [L, B, S, H, D] = [64, 4, 32768, 8, 128];
  const expected = (l: number, b: number, p: number, h: number, d: number) =>
    Number(
      (((BigInt(l) * BigInt(B) + BigInt(b)) * BigInt(S) + BigInt(p)) * BigInt(H) + BigInt(h)) * BigInt(D) + BigInt(d),
    );
  for (let i = 0; i < 1000; i++) {
    const at = [L, B, S, H, D].map((end) => random.below(end)) as [number, number, number, number, number];
    assert.equal(cache.offset(...at), expected(...at));
  }
  assert.equal(cache.offset(63, 3, 32767, 7, 127), 2 ** 33 - 1);
  assertCode("layer_out_of_range", () => cache.offset(64, 0, 0, 0, 0));
  assertCode("sequence_out_of_range", () => cache.offset(0, 4, 0, 0, 0));
  assertCode("position_out_of_range", () => cache.offset(0, 0, 32768, 0, 0));
  assertCode("position_out_of_range", () => cache.offset(0, 0, 0, 8, 0));
  assertCode("position_out_of_range", () => cache.offset(0, 0, 0, 0, 128));
  assert.throws(() => cache.offset(0, 0, -1, 0, 0), RangeError);
});

test("memoryBytes and stats() count what is reserved", () => {
  const before = systemInfo();
  const options = {
    layerCount: 3,
    kvHeadCount: 2,
    headDim: 80,
    maxSeqLen: 100,
    sequenceCount: 5,
    dtype: "f16",
  } as const;
  const cache = new ContiguousCache(options);
  const formula = 2 * 3 * 5 * 100 * 2 * 80 * 2;
  assert.deepEqual([memoryBytes(options), cache.memoryBytes], [formula, formula + 5 * 4]);
  const stats = cache.stats();
  assert.deepEqual([stats.sequenceCount, stats.kvBytes], [5, formula]);
  assert.ok(stats.reservedBytes >= formula && stats.reservedBytes % 4096 === 0 && stats.slabCount >= 1);
  assert.equal(stats.paddingBytes, stats.reservedBytes - formula);
  assert.ok(stats.metadataBytes >= 5 * 4 && stats.metadataBytes < 4096);
  const during = systemInfo();
  assert.equal(during.liveCaches, before.liveCaches + 1);
  assert.equal(during.reservedBytes, before.reservedBytes + stats.reservedBytes);
  cache.free();
  assert.deepEqual(
    [systemInfo().liveCaches, systemInfo().reservedBytes],
    [before.liveCaches, before.reservedBytes],
  );
});

test("a cache past its limit is refused before anything is reserved", () => {
  const before = systemInfo();
  const options: ContiguousCacheOptions = { layerCount: 2, kvHeadCount: 2, headDim: 64, maxSeqLen: 1024 };
  const bytes = memoryBytes(options);
  assertCode(
    "out_of_memory",
    () => new ContiguousCache({ ...options, maxBytes: bytes - 1 }),
    /limit of 2097151 bytes .* need 2097152 bytes$/,
  );
  using cache = new ContiguousCache({ ...options, maxBytes: bytes });
  assert.equal(cache.stats().kvBytes, bytes);
  const absurd = { layerCount: 2 ** 32 - 1, kvHeadCount: 2 ** 24 - 1, headDim: 256, maxSeqLen: 2 ** 31 - 1 };
  assertCode("out_of_memory", () => new ContiguousCache(absurd));
  assertCode("out_of_memory", () => new ContiguousCache({ ...options, maxSeqLen: 2 ** 31 - 1, layerCount: 10000 }));
  assert.equal(systemInfo().liveCaches, before.liveCaches + 1);
});

test("memory is used as rows arrive, not when the cache is made", () => {
  const before = process.memoryUsage().rss;
  using cache = new ContiguousCache({ layerCount: 8, kvHeadCount: 8, headDim: 128, maxSeqLen: 32768 });
  cache.append(7, 0, rowOf(cache, 1), rowOf(cache, 1));
  assert.equal(cache.stats().kvBytes, 2 ** 31);
  const used = process.memoryUsage().rss - before;
  assert.ok(used < 2 ** 28, `${used} bytes`);
});

// Llama-7B at 8192 tokens in f32: 2 * 32 * 8192 * 32 * 128 * 4 B = 8 GiB, twice 2^32.
const llamaBytes = 2 ** 33;
const fits = systemInfo().memoryLimitBytes >= llamaBytes;
test(
  `Llama-7B at 8192 tokens: the last layer keeps its rows${fits ? "" : " (skipped: the memory limit is lower)"}`,
  { skip: !fits },
  () => {
    using cache = new ContiguousCache({ layerCount: 32, kvHeadCount: 32, headDim: 128, maxSeqLen: 8192 });
    assert.equal(cache.memoryBytes, llamaBytes + 4);
    const random = new Random(11);
    const k = random.floats(3 * cache.kvDim), v = random.floats(3 * cache.kvDim);
    const first = random.floats(cache.kvDim);
    cache.append(0, 0, first, first);
    cache.append(31, 0, k, v);
    assert.deepEqual(cache.getKeys(31, 0), k);
    assert.deepEqual(cache.getValues(31, 0), v);
    assert.deepEqual(cache.getKeys(0, 0), first);
    for (let layer = 1; layer < 31; layer++) assert.equal(cache.getKeys(layer, 0).length, 0);
    const [view] = cache.sequence(0).views(31);
    assert.deepEqual(view!.v!.subarray(0, 4096), v.subarray(0, 4096));
  },
);

test(`a run past 4 GiB, more than an ArrayBuffer of Bun can be${unlessReserved}`, { skip: !reservesFreely }, () => {
  // 2^21 rows of 1024 elements of 2 B: 4 GiB and a bit for K and the same for V, of which a few pages are touched.
  const options = { layerCount: 1, kvHeadCount: 8, headDim: 128, maxSeqLen: 2 ** 21 + 1, dtype: "f16" } as const;
  const cache = new ContiguousCache({ ...options, maxBytes: 2 ** 40 });
  const row = (value: number) => new Float32Array(cache.kvDim).fill(value);
  cache.append(0, 0, row(1), row(2));
  const before = cache.getKeys(0, 0);
  assert.equal(before.length, 1024);
  cache.append(0, 0, row(3), row(4));
  const after = cache.getKeys(0, 0);
  assert.deepEqual([after.length, after[0], after[1024]], [2048, 0x3c00, 0x4200]);
  assert.equal(before[0], 0x3c00);
  cache.free();
  assert.deepEqual([before.length, after.length], [0, 0]);
});

test("sequence(i) is one object until it is freed, and freeing it empties that sequence alone", () => {
  using cache = new ContiguousCache({ layerCount: 1, kvHeadCount: 1, headDim: 2, maxSeqLen: 4, sequenceCount: 2 });
  const sequence = cache.sequence(1);
  assert.equal(cache.sequence(1), sequence);
  for (const index of [0, 1]) cache.append(0, index, rowOf(cache, 1), rowOf(cache, 1));
  sequence.commit(1);
  cache.append(0, 1, rowOf(cache, 2), rowOf(cache, 2));
  const own = cache.getKeys(0, 1), other = cache.getKeys(0, 0);
  sequence.free();
  assert.deepEqual([own.length, other.length, cache.getSeqLen(1)], [0, 2, 0]);
  assertCode("stale_handle", () => sequence.seqLen);
  assertCode("stale_handle", () => sequence.append(0, rowOf(cache, 1), rowOf(cache, 1)));
  const fresh = cache.sequence(1);
  assert.notEqual(fresh, sequence);
  assert.equal(fresh.gather(0).k.length, 0);
  fresh.append(0, rowOf(cache, 3), rowOf(cache, 3));
  sequence.free();
  assert.deepEqual([...cache.getKeys(0, 1)], [3, 3]);
  assertCode("sequence_out_of_range", () => cache.sequence(2));
  assert.throws(() => cache.sequence(-1), RangeError);
});

test("free() detaches every array, makes sequences stale and is harmless twice", () => {
  const cache = new ContiguousCache({ layerCount: 2, kvHeadCount: 1, headDim: 2, maxSeqLen: 4 });
  const sequence = cache.sequence(0);
  const row = rowOf(cache, 1);
  sequence.append(0, row, row);
  const [view] = sequence.views(0);
  const arrays = [cache.getKeys(0, 0), cache.getValues(0, 0), cache.getKeys(1, 0), view!.k!, view!.v!];
  cache.free();
  cache.free();
  cache[Symbol.dispose]();
  for (const array of arrays) {
    assert.deepEqual([array.length, array.buffer.byteLength], [0, 0]);
    assert.equal(array[0], undefined);
  }
  const calls: (() => unknown)[] = [
    () => cache.store(0, 0, row, row),
    () => cache.append(0, 0, row, row),
    () => cache.advance(),
    () => cache.reset(),
    () => cache.getKeys(0, 0),
    () => cache.getValues(0, 0),
    () => cache.getSeqLen(0),
    () => cache.currentPos,
    () => cache.memoryBytes,
    () => cache.stats(),
    () => cache.offset(0, 0, 0, 0, 0),
    () => cache.sequence(0),
    () => ContiguousCache.attach(cache.handle),
    () => sequence.append(0, row, row),
    () => sequence.attend(0, row),
  ];
  for (const call of calls) assertCode("stale_handle", call);
  assertCode("stale_view", () => view!.k);
  sequence.free();
  assert.equal(cache.layerCount, 2);
});

test("using frees at the end of the block", () => {
  const before = systemInfo().liveCaches;
  {
    using cache = new ContiguousCache({ layerCount: 1, kvHeadCount: 1, headDim: 1, maxSeqLen: 1 });
    assert.equal(systemInfo().liveCaches, before + 1);
    using sequence = cache.sequence(0);
    assert.equal(sequence.seqLen, 0);
  }
  assert.equal(systemInfo().liveCaches, before);
});

test("arrays over one run share one buffer; a detached one is made anew", () => {
  using cache = new ContiguousCache({ layerCount: 1, kvHeadCount: 1, headDim: 2, maxSeqLen: 4 });
  const empty = cache.getKeys(0, 0);
  cache.append(0, 0, Float32Array.of(1, 2), Float32Array.of(3, 4));
  const keys = cache.getKeys(0, 0);
  assert.equal(keys.buffer, empty.buffer);
  assert.equal(cache.sequence(0).views(0)[0]!.k!.buffer, keys.buffer);
  assert.notEqual(cache.getValues(0, 0).buffer, keys.buffer);
  cache.append(0, 0, Float32Array.of(5, 6), Float32Array.of(7, 8));
  assert.deepEqual([...cache.getKeys(0, 0)], [1, 2, 5, 6]);
  assert.deepEqual([...keys], [1, 2]);
  (keys.buffer as ArrayBuffer).transfer(0);
  assert.equal(keys.length, 0);
  assert.deepEqual([...cache.getKeys(0, 0)], [1, 2, 5, 6]);
  assert.deepEqual([...cache.getValues(0, 0)], [3, 4, 7, 8]);
});

test("writes through an array reach the cache", () => {
  using cache = new ContiguousCache({ layerCount: 1, kvHeadCount: 1, headDim: 2, maxSeqLen: 4 });
  cache.append(0, 0, Float32Array.of(1, 2), Float32Array.of(3, 4));
  cache.getValues(0, 0)[1] = 9;
  assert.deepEqual(cache.sequence(0).gather(0).v, Float32Array.of(3, 9));
});

test("an attached cache reads, writes and attends, owns nothing and gives no arrays", () => {
  const owner = new ContiguousCache({ layerCount: 1, kvHeadCount: 1, headDim: 2, maxSeqLen: 4, sequenceCount: 2 });
  const row = Float32Array.of(1, 2);
  owner.append(0, 1, row, row);
  const attached = ContiguousCache.attach(owner.handle);
  assert.deepEqual([attached.layerCount, attached.sequenceCount, attached.maxSeqLen, attached.dtypeK], [
    1,
    2,
    4,
    "f32",
  ]);
  const sequence = attached.sequence(1);
  assert.deepEqual(sequence.gather(0).k, row);
  assert.deepEqual(sequence.attend(0, row), row);
  sequence.commit(1);
  assert.equal(owner.getSeqLen(1), 1);
  assertCode("unsupported", () => attached.getKeys(0, 1), /attached/);
  assertCode("unsupported", () => sequence.views(0));
  assertCode("unsupported", () => sequence.contiguousKv(0));
  const appended = sequence.append(0, row, row);
  assertCode("unsupported", () => appended.views);
  sequence.free();
  assertCode("stale_handle", () => sequence.seqLen);
  attached.free();
  assertCode("stale_handle", () => attached.getSeqLen(0));
  assert.deepEqual([...owner.getKeys(0, 1)], [1, 2, 1, 2]);
  const again = ContiguousCache.attach(owner.handle);
  owner.free();
  assertCode("stale_handle", () => again.getSeqLen(0));
  for (const handle of [0, 1, 12345, 2 ** 31 - 1, 2 ** 32 - 1]) {
    assertCode("stale_handle", () => ContiguousCache.attach(handle), /attach the cache of handle/);
  }
  assert.throws(() => ContiguousCache.attach(-1), RangeError);
  assert.throws(() => ContiguousCache.attach("1" as unknown as number), TypeError);
});

test("a sequence of it is a Sequence, and what only a paged cache has is refused", () => {
  using cache = new ContiguousCache({ layerCount: 1, kvHeadCount: 1, headDim: 2, maxSeqLen: 8 });
  const sequence = cache.sequence(0);
  assert.ok(sequence instanceof Sequence);
  assert.equal(sequence.packedViews, undefined);
  const paged: (() => unknown)[] = [
    () => sequence.handle,
    () => sequence.fork(),
    () => sequence.blockTable(0),
    () => sequence.blockReferences(0),
    () => sequence.blockTiers(0),
  ];
  for (const body of paged) assertCode("unsupported", body, /one of a contiguous cache/);
  using other = new PagedCache({ layerCount: 1, kvHeadCount: 1, headDim: 2, maxSeqLen: 8 });
  const row = new Float32Array(2);
  assert.throws(() => other.append(0, row, row, { sequences: [sequence] }), TypeError);
  assert.deepEqual(sequence.layerShape(0), { kvHeadCount: 1, headDim: 2 });
  assert.equal(sequence.residentTokens(), 0);
});

test("pending rows of an accepted path stay, the others go", () => {
  using cache = new ContiguousCache({ layerCount: 2, kvHeadCount: 1, headDim: 1, maxSeqLen: 8 });
  const sequence = cache.sequence(0);
  assert.ok(sequence instanceof Sequence);
  for (const layer of [0, 1]) sequence.append(layer, Float32Array.of(1, 2, 3), Float32Array.of(4, 5, 6));
  sequence.commit(2, { kept: Uint32Array.of(0, 2) });
  assert.equal(sequence.seqLen, 2);
  for (const layer of [0, 1]) {
    const { k, v } = sequence.gather(layer);
    assert.deepEqual([...k, ...v], [1, 3, 4, 6]);
  }
});

test("there may be more sequences than handles, each reached by its index", () => {
  const sequenceCount = 70_000;
  using cache = new ContiguousCache({ layerCount: 1, kvHeadCount: 1, headDim: 1, maxSeqLen: 2, sequenceCount });
  for (let index = 0; index < sequenceCount; index++) {
    assert.equal(cache.append(0, index, Float32Array.of(index), Float32Array.of(index + 1)).start, 0);
  }
  cache.advance();
  for (const index of [0, 1, 65_535, 65_536, sequenceCount - 1]) {
    assert.equal(cache.getSeqLen(index), 1);
    assert.deepEqual([...cache.getKeys(0, index), ...cache.getValues(0, index)], [index, index + 1]);
    assert.deepEqual([...cache.sequence(index).attend(0, Float32Array.of(1))], [index + 1]);
  }
  assertCode("sequence_out_of_range", () => cache.append(0, sequenceCount, new Float32Array(1), new Float32Array(1)));
});
