/** Pools of blocks: what is counted, sharing between caches, limits, and memory that goes back. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { BlockPool, type BlockPoolOptions, ContiguousCache, PagedCache, systemInfo } from "../mod.ts";
import { assertCode } from "./cache_cases.ts";
import { Random } from "./oracle.ts";

const SHAPE = { layerCount: 1, kvHeadCount: 2, headDim: 4, blockSize: 16 } as const;

test("an untouched pool has nothing, and a rate of 0", () => {
  using pool = new BlockPool({ ...SHAPE, dtype: "f32" });
  assert.deepEqual(pool.stats(), {
    blockBytes: 16 * 2 * 4 * 2 * 4,
    totalBlocks: 0,
    freeBlocks: 0,
    usedBlocks: 0,
    peakBlocks: 0,
    prewarmed: 0,
    hits: 0,
    misses: 0,
    allocations: 0,
    returns: 0,
    drops: 0,
    hitRate: 0,
    reservedBytes: 0,
    metadataBytes: pool.stats().metadataBytes,
  });
});

test("a block's bytes are its rows in every layer, keys and values, rounded up to 64", () => {
  const cases: [BlockPoolOptions, number][] = [
    [{ layerCount: 1, kvHeadCount: 2, headDim: 64 }, 64 * 2 * 64 * 2 * 2],
    [{ layerCount: 3, kvHeadCount: 2, headDim: 64, dtype: "f32" }, 3 * 64 * 2 * 64 * 4 * 2],
    [{ layerCount: 1, kvHeadCount: 1, headDim: 3, blockSize: 1 }, 64],
    [{ layerCount: 1, kvHeadCount: 1, headDim: 5, blockSize: 8, dtype: { k: "f32", v: "f16" } }, 256],
  ];
  for (const [options, bytes] of cases) {
    using pool = new BlockPool(options);
    assert.equal(pool.stats().blockBytes, bytes);
  }
});

test("prewarmed blocks are hits, each given back once (append, reset, three times)", () => {
  using pool = new BlockPool({ ...SHAPE, dtype: "f32" });
  pool.prewarm(4);
  const warm = pool.stats();
  assert.deepEqual([warm.prewarmed, warm.returns, warm.hits, warm.misses], [4, 0, 0, 0]);
  assert.ok(warm.totalBlocks >= 4 && warm.freeBlocks === warm.totalBlocks);
  using cache = new PagedCache({ ...SHAPE, dtype: "f32", maxSeqLen: 1024, pool });
  const sequence = cache.sequence();
  const row = new Float32Array(8).fill(1);
  const blocks = new Set<number>();
  for (let round = 0; round < 3; round++) {
    sequence.append(0, row, row);
    sequence.commit(1);
    blocks.add(sequence.blockTable(0)[0]!);
    cache.reset();
  }
  const { prewarmed, hits, misses, returns, usedBlocks, peakBlocks, hitRate } = pool.stats();
  assert.equal(cache.stats().totalTokens, 0);
  assert.deepEqual({ prewarmed, hits, misses, returns }, { prewarmed: 4, hits: 3, misses: 0, returns: 3 });
  assert.deepEqual({ usedBlocks, peakBlocks, hitRate, blocks: blocks.size }, {
    usedBlocks: 0,
    peakBlocks: 1,
    hitRate: 1,
    blocks: 1,
  });
  pool.prewarm(0);
  pool.prewarm(2);
  assert.equal(pool.stats().totalBlocks, warm.totalBlocks);
});

test("two caches on one pool keep their rows apart and count together", () => {
  const dtype = "f16", maxSeqLen = 256;
  using pool = new BlockPool({ ...SHAPE, dtype });
  using one = new PagedCache({ ...SHAPE, dtype, maxSeqLen, pool });
  using two = new PagedCache({ ...SHAPE, dtype, maxSeqLen, pool });
  assert.equal(one.pool, pool);
  const random = new Random(3);
  const sequences = [one.sequence(), two.sequence()];
  const rows = sequences.map(() => ({ k: random.floats(100 * 8), v: random.floats(100 * 8) }));
  for (let row = 0; row < 100; row++) {
    sequences.forEach((sequence, i) => {
      const at = (side: Float32Array) => side.subarray(row * 8, row * 8 + 8);
      sequence.append(0, at(rows[i]!.k), at(rows[i]!.v));
      sequence.commit(1);
    });
  }
  using alone = new ContiguousCache({ layerCount: 1, kvHeadCount: 2, headDim: 4, dtype, maxSeqLen });
  for (const [i, sequence] of sequences.entries()) {
    alone.reset();
    alone.append(0, 0, rows[i]!.k, rows[i]!.v);
    assert.deepEqual(sequence.gather(0), alone.sequence(0).gather(0));
  }
  assert.equal(pool.stats().usedBlocks, 14);
  const tables = sequences.map((sequence) => [...sequence.blockTable(0)]);
  assert.equal(new Set(tables.flat()).size, 14);
  one.free();
  assert.equal(pool.stats().usedBlocks, 7);
  assert.deepEqual(two.poolStats(), pool.stats());
});

test("a cache keeps the blocks of a pool that was freed", () => {
  const before = systemInfo();
  const pool = new BlockPool(SHAPE);
  const cache = new PagedCache({ ...SHAPE, maxSeqLen: 64, pool });
  const sequence = cache.sequence();
  const row = new Float32Array(8).fill(3);
  sequence.append(0, row, row);
  pool.free();
  pool.free();
  pool[Symbol.dispose]();
  assertCode("stale_handle", () => pool.stats());
  assertCode("stale_handle", () => pool.prewarm(1));
  assertCode("stale_handle", () => new PagedCache({ ...SHAPE, maxSeqLen: 64, pool }));
  assert.deepEqual(sequence.gather(0).k, row);
  sequence.append(0, row, row);
  cache.free();
  const after = systemInfo();
  assert.deepEqual([after.liveCaches, after.reservedBytes], [before.liveCaches, before.reservedBytes]);
});

test("a cache must fit its pool", () => {
  using pool = new BlockPool(SHAPE);
  const make = (options: object) => new PagedCache({ ...SHAPE, maxSeqLen: 64, pool, ...options });
  const text = /must be the pool's: 1 layer, 2 KV heads of 4, blocks of 16, keys in f16 and values in f16$/;
  assertCode("invalid_config", () => make({ blockSize: 32 }), text);
  assertCode("invalid_config", () => make({ dtype: "f32" }), text);
  assertCode("invalid_config", () => make({ layerCount: 2 }), text);
  assertCode("invalid_config", () => make({ maxBytes: 2 ** 20 }), /pool and maxBytes exclude each other/);
  const { blockSize } = SHAPE;
  const layers = [{ kvHeadCount: 2, headDim: 4 }, { kvHeadCount: 2, headDim: 4, windowTokens: 4 }];
  assertCode("invalid_config", () => new PagedCache({ layers, blockSize, maxSeqLen: 64, pool }), /one shape/);
  assert.throws(() => make({ pool: {} }), TypeError);
  assert.throws(() => make({ pool: null }), TypeError);
  make({}).free();
});

test("options that are none are refused", () => {
  const make = (options: object) => new BlockPool({ ...SHAPE, ...options });
  const configs = [
    { layerCount: 0 },
    { kvHeadCount: 0 },
    { headDim: 0 },
    { headDim: 257 },
    { blockSize: 0 },
    { blockSize: 3 },
    { blockSize: 512 },
    { dtype: "q8_0" },
    { dtype: { k: "f16", v: "f64" } },
    { maxBytes: 0 },
  ];
  for (const options of configs) assertCode("invalid_config", () => make(options));
  assertCode("block_too_large", () => make({ maxBytes: 511 }), /maxBytes is 511$/);
  assertCode("block_too_large", () => make({ layerCount: 4096, kvHeadCount: 64, headDim: 256, blockSize: 256 }));
  for (const value of [-1, 1.5, NaN, 2 ** 53]) assert.throws(() => make({ layerCount: value }), RangeError);
  for (const value of ["1", null, 1n]) assert.throws(() => make({ kvHeadCount: value }), TypeError);
  assert.throws(() => make({ maxBytes: -1 }), RangeError);
  for (const options of [undefined, null, 3]) {
    assert.throws(() => new BlockPool(options as unknown as BlockPoolOptions), TypeError);
  }
  using pool = new BlockPool({ ...SHAPE, maxBytes: 1024 });
  for (const value of [-1, 0.5]) assert.throws(() => pool.prewarm(value), RangeError);
  assertCode("pool_empty", () => pool.prewarm(3), /^Cannot prewarm 3 blocks as maxBytes would be passed$/);
});

test("memory goes back: with the blocks, and all of it with the pool", () => {
  const before = systemInfo().reservedBytes;
  const pool = new BlockPool({ layerCount: 4, kvHeadCount: 8, headDim: 128 });
  const cache = new PagedCache({ layerCount: 4, kvHeadCount: 8, headDim: 128, maxSeqLen: 4096, pool });
  const sequence = cache.sequence();
  const rows = new Float32Array(1024 * 1024);
  for (let i = 0; i < 4; i++) sequence.append(0, rows, rows);
  const full = pool.stats();
  assert.equal(full.usedBlocks, 64);
  assert.ok(full.reservedBytes >= 64 * full.blockBytes);
  assert.equal(systemInfo().reservedBytes, before + full.reservedBytes);
  sequence.truncate(0);
  const empty = pool.stats();
  assert.equal(empty.usedBlocks, 0);
  assert.ok(empty.reservedBytes < full.reservedBytes && empty.drops > 0, `${empty.reservedBytes} bytes stay`);
  cache.free();
  pool.free();
  assert.equal(systemInfo().reservedBytes, before);
});
