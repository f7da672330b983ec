/** Objects that one thread frees while others make parts of them. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { Worker } from "node:worker_threads";
import { BlockPool, PagedCache, systemInfo } from "../mod.ts";
import { assertCode } from "./cache_cases.ts";

const SHAPE = { layerCount: 1, kvHeadCount: 1, headDim: 8, blockSize: 2 };

/** A Worker that works on the cache of `handle`: when it has begun, and how it ended. */
function hammer(handle: number): { started: Promise<void>; ended: Promise<string> } {
  const started = Promise.withResolvers<void>(), ended = Promise.withResolvers<string>();
  const worker = new Worker(new URL("./freed_worker.ts", import.meta.url), { workerData: handle });
  worker.on("message", (message: string) => message === "started" ? started.resolve() : ended.resolve(message));
  worker.once("error", (error) => {
    started.reject(error);
    ended.reject(error);
  });
  return { started: started.promise, ended: ended.promise.finally(() => worker.terminate()) };
}

test("a cache that is freed under the hands of Workers takes no more sequences, and its blocks come back", {
  timeout: 60_000,
}, async () => {
  const before = systemInfo().liveCaches;
  using pool = new BlockPool(SHAPE);
  for (let round = 0; round < 4; round++) {
    const cache = new PagedCache({ ...SHAPE, maxSeqLen: 64, pool });
    const workers = [hammer(cache.handle), hammer(cache.handle)];
    await Promise.all(workers.map(({ started }) => started));
    assert.ok(pool.stats().usedBlocks >= 4);
    cache.free();
    assert.deepEqual(await Promise.all(workers.map(({ ended }) => ended)), ["stale_handle", "stale_handle"]);
    assert.equal(pool.stats().usedBlocks, 0);
    assert.equal(systemInfo().liveCaches, before);
  }
});

test("nothing can be made of what was freed", () => {
  const pool = new BlockPool(SHAPE);
  const cache = new PagedCache({ ...SHAPE, maxSeqLen: 64, pool });
  const { handle } = cache;
  const attached = PagedCache.attach(handle);
  const sequence = cache.sequence(), other = attached.sequence();
  cache.free();
  assertCode("stale_handle", () => PagedCache.attach(handle));
  assertCode("stale_handle", () => cache.sequence());
  assertCode("stale_handle", () => attached.sequence());
  assertCode("stale_handle", () => sequence.fork());
  assertCode("stale_handle", () => other.fork());
  pool.free();
  assertCode("stale_handle", () => new PagedCache({ ...SHAPE, maxSeqLen: 64, pool }));
});
