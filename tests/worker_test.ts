/** Caches used from several threads. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { Worker } from "node:worker_threads";
import { ContiguousCache } from "../mod.ts";
import type { Answer, Task } from "./attach_worker.ts";
import { Random } from "./oracle.ts";

function runWorker(data: Task): Promise<Answer> {
  const { promise, resolve, reject } = Promise.withResolvers<Answer>();
  const worker = new Worker(new URL("./attach_worker.ts", import.meta.url), { workerData: data });
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
