/** What is left of objects whose maker is gone. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { BlockPool, PagedCache, systemInfo } from "../mod.ts";
import { assertCode } from "./cache_cases.ts";
import { inWorker } from "./workers.ts";

const SHAPE = { layerCount: 1, kvHeadCount: 1, headDim: 8, blockSize: 2 };

test("reset() frees what Workers left that were terminated", { timeout: 120_000 }, async () => {
  using pool = new BlockPool(SHAPE);
  using cache = new PagedCache({ ...SHAPE, maxSeqLen: 64, pool });
  const own = cache.sequence();
  const rows = new Float32Array(5 * 8).fill(2);
  own.append(0, rows, rows);
  own.commit(5);
  const array = own.packedViews(0)![0]!.k;
  for (let round = 0; round < 4; round++) {
    assert.deepEqual(await inWorker({ kind: "leave", handle: cache.handle, rows: 20 }), { rows: 20 });
  }
  assert.equal(pool.stats().usedBlocks, 3 + 4 * 10);
  assert.equal(cache.stats().sequenceCount, 1 + 4 * 2);
  cache.reset();
  assert.equal(pool.stats().usedBlocks, 0);
  assert.equal(cache.stats().sequenceCount, 1);
  assert.deepEqual([own.seqLen, array.length], [0, 0]);
  own.append(0, rows, rows);
  own.commit(5);
  assert.deepEqual([own.seqLen, cache.stats().blockCount], [5, 3]);
});

test("free() of the cache takes along what Workers left", { timeout: 120_000 }, async () => {
  const before = systemInfo().liveCaches;
  using pool = new BlockPool(SHAPE);
  const cache = new PagedCache({ ...SHAPE, maxSeqLen: 64, pool });
  await inWorker({ kind: "leave", handle: cache.handle, rows: 20 });
  cache.free();
  assert.deepEqual([pool.stats().usedBlocks, systemInfo().liveCaches], [0, before]);
});

test("reset() of the owner frees the sequences of an attached cache; that one empties its own", () => {
  using cache = new PagedCache({ ...SHAPE, maxSeqLen: 64 });
  using attached = PagedCache.attach(cache.handle);
  const own = cache.sequence(), guest = attached.sequence(), other = guest.fork();
  const rows = new Float32Array(3 * 8);
  for (const sequence of [own, guest, other]) {
    sequence.append(0, rows, rows);
    sequence.commit(3);
  }
  attached.reset();
  assert.deepEqual([own.seqLen, guest.seqLen, other.seqLen], [3, 0, 0]);
  guest.append(0, rows, rows);
  cache.reset();
  assert.equal(own.seqLen, 0);
  for (const sequence of [guest, other]) {
    assertCode("stale_handle", () => sequence.seqLen);
    assertCode("stale_handle", () => sequence.fork());
    assertCode("stale_handle", () => sequence.append(0, rows, rows));
    sequence.free(); // harmless
  }
  assert.deepEqual([cache.stats().sequenceCount, cache.stats().blockCount], [1, 0]);
  attached.reset(); // nothing of its own is left
  assert.equal(attached.sequence().seqLen, 0);
  assert.equal(cache.stats().sequenceCount, 2);
  cache.free();
  assertCode("stale_handle", () => cache.reset());
  assertCode("stale_handle", () => attached.reset());
});
