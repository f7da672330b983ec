/** Sequences that are opened by their handle: read and forked elsewhere, changed by their owner alone. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { PagedCache, Sequence } from "../mod.ts";
import { assertCode } from "./cache_cases.ts";
import { Random } from "./oracle.ts";
import { inWorker } from "./workers.ts";

const SHAPE = { layerCount: 2, kvHeadCount: 2, headDim: 8, blockSize: 4, maxSeqLen: 64, dtype: "f32" } as const;

/** A sequence of 10 rows in each layer, and the rows. */
function make(cache: PagedCache): { sequence: Sequence; rows: Float32Array } {
  const sequence = cache.sequence();
  const rows = new Random(7).floats(10 * 16);
  for (let layer = 0; layer < 2; layer++) sequence.append(layer, rows, rows);
  sequence.commit(10);
  return { sequence, rows };
}

test("a Worker reads and forks the sequence of another thread, and its forks are its own", {
  timeout: 60_000,
}, async () => {
  using cache = new PagedCache(SHAPE);
  const { sequence, rows } = make(cache);
  const q = new Random(8).floats(4 * 8);
  const answer = await inWorker({ kind: "sequence", handle: sequence.handle, q, row: rows.slice(0, 16) });
  assert.ok("read" in answer, JSON.stringify(answer));
  assert.deepEqual(answer.read, {
    seqLen: 10,
    gathered: sequence.gather(1).k,
    attended: sequence.attend(1, q),
    blocks: sequence.blockTable(1),
  });
  assert.deepEqual(answer.forked, [11, 12]);
  // The owner's is what it was, and so is the number of sequences once the Worker has freed its forks.
  assert.deepEqual([sequence.seqLen, sequence.gather(0).k], [10, rows]);
  assert.equal(cache.stats().sequenceCount, 1);
});

test("what changes a sequence is unsupported where it is attached", () => {
  using cache = new PagedCache(SHAPE);
  const { sequence, rows } = make(cache);
  const attached = Sequence.attach(sequence.handle);
  assert.equal(attached.handle, sequence.handle);
  const row = rows.subarray(0, 16);
  const elsewhere = PagedCache.attach(cache.handle);
  const changes: (() => unknown)[] = [
    () => attached.append(0, row, row),
    () => attached.commit(0),
    () => attached.truncate(5),
    () => attached.free(),
    () => cache.append(0, row, row, { sequences: [attached], tokenCounts: [1] }),
    () => elsewhere.append(0, row, row, { sequences: [attached], tokenCounts: [1] }),
    () => cache.reorder([attached], [0]),
  ];
  for (const change of changes) {
    assertCode("unsupported", change, /^Cannot .+ as the sequence is attached, .+ fork\(\)/);
  }
  for (const look of [() => attached.views(0), () => attached.packedViews(0)]) assertCode("unsupported", look);
  attached[Symbol.dispose]();
  assert.deepEqual([attached.seqLen, sequence.seqLen], [10, 10]);
  assert.deepEqual(attached.gather(0).k, rows);
  const q = new Float32Array(16).fill(1);
  assert.deepEqual(cache.attend(0, q, { sequences: [attached] }), sequence.attend(0, q));
});

test("an attached sequence sees what its owner does, and is stale once that has freed it", () => {
  using cache = new PagedCache(SHAPE);
  const { sequence, rows } = make(cache);
  const { handle } = sequence;
  const attached = Sequence.attach(handle);
  sequence.truncate(3);
  assert.deepEqual([attached.seqLen, attached.gather(0).k], [3, rows.slice(0, 3 * 16)]);
  const fork = attached.fork();
  sequence.free();
  assertCode("stale_handle", () => attached.seqLen);
  assertCode("stale_handle", () => attached.fork());
  assertCode("stale_handle", () => Sequence.attach(handle));
  assert.equal(fork.seqLen, 3);
  fork.free();
  assert.equal(cache.stats().blockCount, 0);
  for (const wrong of [0, 1, cache.handle, 2 ** 32 - 1]) assertCode("stale_handle", () => Sequence.attach(wrong));
  assert.throws(() => Sequence.attach(-1), RangeError);
  assert.throws(() => Sequence.attach("1" as unknown as number), TypeError);
});
