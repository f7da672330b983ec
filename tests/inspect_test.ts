/** What `console.log` prints of an object: one useful line, whatever became of the object. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { inspect } from "node:util";
import { BlockPool, BufferPool, ContiguousCache, PagedCache } from "../mod.ts";

const SHAPE = { layerCount: 2, kvHeadCount: 2, headDim: 4, maxSeqLen: 64 };

test("objects show their facts in one line, and that they were freed", () => {
  const paged = new PagedCache(SHAPE);
  const sequence = paged.sequence();
  for (const layer of [0, 1]) sequence.append(layer, new Float32Array(24), new Float32Array(24));
  sequence.commit(3);
  const contiguous = new ContiguousCache(SHAPE);
  const single = contiguous.sequence(0);
  const pool = new BlockPool({ layerCount: 2, kvHeadCount: 2, headDim: 4 });
  const buffers = new BufferPool();
  const buffer = buffers.acquire(1024);
  const shown: [{ free(): void }, string][] = [
    [
      sequence,
      "Sequence { seqLen: 3, residentTokens: 3, maxSeqLen: 64, layerCount: 2, kvHeadCount: 2, headDim: 4 }",
    ],
    [
      paged,
      "PagedCache { layerCount: 2, kvHeadCount: 2, headDim: 4, maxSeqLen: 64, blockSize: 64, " +
      'dtypeK: "f16", dtypeV: "f16", sequenceCount: 1, totalTokens: 3, usedBytes: 4096 }',
    ],
    [single, "ContiguousSequence { seqLen: 0, maxSeqLen: 64, layerCount: 2, kvHeadCount: 2, headDim: 4 }"],
    [
      contiguous,
      "ContiguousCache { layerCount: 2, sequenceCount: 1, kvHeadCount: 2, headDim: 4, maxSeqLen: 64, " +
      'dtypeK: "f32", dtypeV: "f32", seqLen: 0, memoryBytes: 8196 }',
    ],
    [
      pool,
      'BlockPool { shape: "2 layers, 2 KV heads of 4, blocks of 64, keys in f16 and values in f16", ' +
      "usedBlocks: 0, totalBlocks: 0, reservedBytes: 0 }",
    ],
    [buffer, "AlignedBuffer { capacity: 256, length: 0 }"],
    [buffers, "BufferPool { hits: 0, misses: 1, reservedBytes: 1024 }"],
  ];
  for (const [object, line] of shown) {
    assert.equal(inspect(object), line);
    assert.ok(inspect([object]).includes(line), "inside of others, too");
  }
  for (const [object, line] of shown.toReversed()) {
    object.free(), assert.equal(inspect(object), `${line.split(" ")[0]} (freed)`);
  }
  for (const { prototype } of [PagedCache, ContiguousCache, BlockPool, BufferPool]) inspect(prototype);
});

test("a cache of one sequence does not need it named", () => {
  using cache = new ContiguousCache({ ...SHAPE, layerCount: 1 });
  cache.sequence(0).append(0, new Float32Array(8).fill(1), new Float32Array(8).fill(2));
  cache.sequence(0).commit(1);
  assert.deepEqual(cache.getKeys(0), cache.getKeys(0, 0));
  assert.deepEqual(cache.getValues(0), new Float32Array(8).fill(2));
  assert.equal(cache.getSeqLen(), 1);
});
