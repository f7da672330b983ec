/** Caches used from several threads. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { Worker } from "node:worker_threads";
import { ContiguousCache, PagedCache, type Policy } from "../mod.ts";
import type { Answer, Task } from "./attach_worker.ts";
import { Random } from "./oracle.ts";
import type { TiersAnswer, TiersTask } from "./tiers_worker.ts";

function runWorker(data: Task): Promise<Answer>;
function runWorker(data: TiersTask, file: "./tiers_worker.ts"): Promise<TiersAnswer>;
function runWorker(data: unknown, file = "./attach_worker.ts"): Promise<unknown> {
  const { promise, resolve, reject } = Promise.withResolvers<unknown>();
  const worker = new Worker(new URL(file, import.meta.url), { workerData: data });
  worker.once("message", resolve);
  worker.once("error", reject);
  return promise.finally(() => worker.terminate());
}

test("Workers attend over an attached cache while its owner appends and attends", { timeout: 60_000 }, async () => {
  using cache = new ContiguousCache({ layerCount: 1, kvHeadCount: 2, headDim: 64, maxSeqLen: 4096, sequenceCount: 2 });
  const random = new Random(4);
  cache.append(0, 1, random.floats(500 * 128), random.floats(500 * 128));
  cache.sequence(1).commit(500);
  const q = random.floats(4 * 64);
  const expected = cache.sequence(1).attend(0, q);
  const data = { handle: cache.handle, sequence: 1, q, repeats: 300 };
  const workers = [runWorker(data), runWorker(data)];
  let done = false;
  const answers = Promise.all(workers).finally(() => done = true);
  const row = random.floats(128);
  for (let step = 0; !done; step++) {
    if (cache.getSeqLen(0) === cache.maxSeqLen) cache.sequence(0).truncate(0);
    cache.append(0, 0, row, row);
    cache.sequence(0).commit(1);
    assert.deepEqual(cache.sequence(1).attend(0, q), expected);
    if (step % 16 === 0) await new Promise((resolve) => setTimeout(resolve, 0));
  }
  for (const answer of await answers) {
    assert.deepEqual(answer, { output: expected, different: 0, refused: "unsupported", seqLen: 500 });
  }
  assert.deepEqual([...cache.getKeys(0, 0).subarray(0, 128)], [...row]);
});

test("an attached cache is stale once its owner has freed it", { timeout: 60_000 }, async () => {
  const cache = new ContiguousCache({ layerCount: 1, kvHeadCount: 1, headDim: 1, maxSeqLen: 1 });
  const { handle } = cache;
  cache.free();
  const answer = await runWorker({ handle, sequence: 0, q: new Float32Array(1), repeats: 1 });
  assert.deepEqual(answer, { refused: "stale_handle" });
});

test("threads that append, migrate and change policies in one cache lose no row", { timeout: 60_000 }, async () => {
  using cache = new PagedCache({
    layerCount: 1,
    kvHeadCount: 2,
    headDim: 32,
    maxSeqLen: 4096,
    dtype: "f32",
    store: "i8",
  });
  const policies: Policy[] = [
    { kind: "store-only", store: "q8_0" },
    { kind: "hybrid", tail: { tokens: 64 }, store: "i8" },
    { kind: "tail-only" },
  ];
  const task = { handle: cache.handle, steps: 150, policies };
  const workers = [0, 1].map(() => runWorker(task, "./tiers_worker.ts"));
  let done = false;
  const answers = Promise.all(workers).finally(() => done = true);
  const random = new Random(4);
  const sequence = cache.sequence(), given: number[] = [];
  for (let step = 0; !done; step++) {
    if (sequence.seqLen > 2000) {
      sequence.truncate(0);
      given.length = 0;
    }
    const rows = random.floats((1 + step % 30) * 64);
    sequence.append(0, rows, rows);
    sequence.commit(rows.length / 64);
    given.push(...rows);
    if (step % 8 === 0) {
      const { k } = sequence.gather(0);
      assert.equal(k.length, given.length);
      assert.ok(k.every((value, i) => Math.abs(value - given[i]!) <= 0.01), `step ${step}`);
      await new Promise((resolve) => setTimeout(resolve, 0));
    }
  }
  for (const { worst, seqLen, tiers } of await answers) {
    // 150 steps of 1 to 40 rows, 15 of which take 5 back; each row rounded a few times, by half a step of 2 / 255.
    const appended = Array.from({ length: 150 }, (_, i) => 1 + i % 40).reduce((sum, n) => sum + n, 0);
    assert.deepEqual([seqLen, tiers.length], [appended - 75, Math.ceil((appended - 75) / 64)]);
    assert.ok(worst > 0 && worst <= 0.03, `${worst}`);
    assert.ok(tiers.filter((tier) => tier !== "tail").length > 30, `${tiers}`);
  }
  assert.equal(cache.stats().sequenceCount, 1);
});
