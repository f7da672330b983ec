/** The paged cache by its own verbs: figures, retention, batches, beams, limits, lifetimes. */

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import process from "node:process";
import { test } from "node:test";
import {
  ContiguousCache,
  type LayerShape,
  PagedCache,
  type PagedCacheOptions,
  type Sequence,
  systemInfo,
} from "../mod.ts";
import { assertCode } from "./cache_cases.ts";
import { attention, Random, relativeError } from "./oracle.ts";

const SMALL = { layerCount: 1, kvHeadCount: 2, headDim: 4, maxSeqLen: 1024, dtype: "f32" } as const;

/** Appends `n` rows to every layer and commits them; all elements of a row are its position. */
function count(sequence: Sequence, n: number): void {
  const first = sequence.seqLen;
  for (let layer = 0; layer < sequence.layerCount; layer++) {
    const { kvHeadCount, headDim } = sequence.layerShape(layer);
    const width = kvHeadCount * headDim;
    const rows = Float32Array.from({ length: n * width }, (_, i) => first + Math.floor(i / width));
    sequence.append(layer, rows, rows);
  }
  sequence.commit(n);
}

/** The positions of the rows of a layer that are there. */
function positions(sequence: Sequence, layer = 0): number[] {
  const { kvHeadCount, headDim } = sequence.layerShape(layer);
  const { k } = sequence.gather(layer);
  return [...k].filter((_, i) => i % (kvHeadCount * headDim) === 0);
}

/** The whole numbers from `first` to before `end`. */
function range(first: number, end: number): number[] {
  return Array.from({ length: end - first }, (_, i) => first + i);
}

/** All that a refused call must leave alone. */
function snapshot(cache: PagedCache, sequences: readonly Sequence[]): unknown {
  const rows = sequences.map((sequence) =>
    range(0, cache.layerCount).map((layer) => [sequence.gather(layer), sequence.blockTable(layer)])
  );
  const { metadataBytes: _, ...stats } = cache.stats(); // a table may have been given room
  return [rows, stats, cache.poolStats().freeBlocks];
}

function assertRefused(
  cache: PagedCache,
  sequences: readonly Sequence[],
  code: Parameters<typeof assertCode>[0],
  call: () => unknown,
  text?: RegExp,
): void {
  const before = snapshot(cache, sequences);
  assertCode(code, call, text);
  assert.deepEqual(snapshot(cache, sequences), before);
}

test("one token takes one block of 16", () => {
  using cache = new PagedCache({ ...SMALL, blockSize: 16 });
  count(cache.sequence(), 1);
  const { totalTokens, blockCount, tokensPerBlock, sequenceCount } = cache.stats();
  assert.deepEqual({ totalTokens, blockCount, tokensPerBlock, sequenceCount }, {
    totalTokens: 1,
    blockCount: 1,
    tokensPerBlock: 16,
    sequenceCount: 1,
  });
});

test("five tokens take three blocks of 2: K[0] is 0, K[32] is 4", () => {
  using cache = new PagedCache({ ...SMALL, blockSize: 2 });
  const sequence = cache.sequence();
  for (let token = 0; token < 5; token++) {
    sequence.append(0, new Float32Array(8).fill(token), new Float32Array(8).fill(2 * token));
    sequence.commit(1);
  }
  const { k, v } = sequence.gather(0);
  assert.deepEqual([cache.stats().totalTokens, cache.stats().blockCount], [5, 3]);
  assert.deepEqual([k[0], k[32], v[32]], [0, 4, 8]);
});

test("the defaults: f16, blocks of 64, nothing reserved before the first row", () => {
  using cache = new PagedCache({ layerCount: 3, kvHeadCount: 2, headDim: 8, maxSeqLen: 100 });
  const { layerCount, kvHeadCount, headDim, kvDim, maxSeqLen, blockSize, dtypeK, dtypeV, groupCount, pool } = cache;
  assert.deepEqual(
    { layerCount, kvHeadCount, headDim, kvDim, maxSeqLen, blockSize, dtypeK, dtypeV, groupCount, pool },
    {
      layerCount: 3,
      kvHeadCount: 2,
      headDim: 8,
      kvDim: 16,
      maxSeqLen: 100,
      blockSize: 64,
      dtypeK: "f16",
      dtypeV: "f16",
      groupCount: 1,
      pool: undefined,
    },
  );
  assert.ok(cache.handle > 0);
  const { reservedBytes, usedBytes } = cache.stats();
  assert.deepEqual({ reservedBytes, usedBytes }, { reservedBytes: 0, usedBytes: 0 });
});

test("options that are none are refused", () => {
  const make = (options: object) => new PagedCache({ ...SMALL, ...options } as PagedCacheOptions);
  const layers = [{ kvHeadCount: 2, headDim: 4 }];
  const configs = [
    { layerCount: 0 },
    { layerCount: 2 ** 20 },
    { kvHeadCount: 0 },
    { headDim: 0 },
    { headDim: 257 },
    { windowTokens: 0 },
    { maxSeqLen: 0 },
    { maxSeqLen: 2 ** 31 },
    { blockSize: 0 },
    { blockSize: 6 },
    { blockSize: 512 },
    { dtype: "q8_0" },
    { dtype: { k: "f16", v: "i4" } },
    { maxBytes: 0 },
    { layers },
    { retention: { keep: "oldest" } },
    { retention: { keep: "all", tokens: 4 } },
    { retention: { keep: "newest", tokens: 0 } },
    { retention: { keep: "newest", tokens: 4, sinkTokens: 4 } },
  ];
  for (const options of configs) assertCode("invalid_config", () => make(options));
  const other = (options: object) => new PagedCache({ maxSeqLen: 8, ...options } as PagedCacheOptions);
  assertCode("invalid_config", () => other({ layers: [] }));
  assertCode("invalid_config", () => other({ layers, headDim: 4 }), /layers and headDim exclude each other/);
  assertCode("invalid_config", () => other({ layers: [{ kvHeadCount: 2, headDim: 300 }] }));
  other({ layers, retention: { keep: "all" } }).free();
  assertCode("block_too_large", () => make({ maxBytes: 100 }), /it has 4096 bytes$/);
  assertCode("block_too_large", () => make({ layerCount: 4096, kvHeadCount: 64, headDim: 256 }));
  for (const value of [-1, 0.5, NaN]) {
    assert.throws(() => make({ blockSize: value }), RangeError);
    assert.throws(() => make({ maxSeqLen: value }), RangeError);
    assert.throws(() => make({ retention: { keep: "newest", tokens: value } }), RangeError);
  }
  for (const value of ["1", null, 1n]) {
    assert.throws(() => make({ blockSize: value }), TypeError);
    assert.throws(() => make({ layerCount: value }), TypeError);
  }
  assert.throws(() => make({ retention: null }), TypeError);
  assert.throws(() => make({ retention: { keep: "newest" } }), TypeError);
  assert.throws(() => make({ layerCount: undefined }), TypeError);
  assert.throws(() => other({ layers: 3 }), TypeError);
  assert.throws(() => new PagedCache(undefined as unknown as PagedCacheOptions), TypeError);
});

const FIGURES: [tokens: number, sinkTokens: number, appended: number, kept: number[], evictions: number][] = [
  [5, 0, 7, range(2, 7), 2],
  [5, 0, 12, range(7, 12), 7],
  [8, 2, 10, [0, 1, ...range(4, 10)], 2],
  [8, 2, 40, [0, 1, ...range(34, 40)], 32],
  [3000, 256, 9000, [...range(0, 256), ...range(6256, 9000)], 6000],
  [400, 256, 500, [...range(0, 256), ...range(356, 500)], 100],
  [5, 0, 8, range(3, 8), 3],
];

for (const [tokens, sinkTokens, appended, kept, evictions] of FIGURES) {
  test(`of ${appended} rows the newest ${tokens} stay, ${sinkTokens} of them sinks`, () => {
    for (const blockSize of [1, 4, 64]) {
      using cache = new PagedCache({
        ...SMALL,
        kvHeadCount: 1,
        headDim: 1,
        maxSeqLen: 10_000,
        blockSize,
        retention: { keep: "newest", tokens, sinkTokens },
      });
      const sequence = cache.sequence();
      // As many rows as a block has stay unseen, for a truncate.
      const newest = Math.ceil((tokens - sinkTokens + blockSize) / blockSize) + 1;
      const bound = Math.ceil(sinkTokens / blockSize) + newest;
      for (let row = 0; row < appended; row++) {
        count(sequence, 1);
        assert.equal(sequence.residentTokens(), Math.min(row + 1, tokens));
        if (row % 16 === 0) assert.ok(cache.stats().blockCount <= bound);
      }
      assert.deepEqual(positions(sequence), kept);
      assert.deepEqual([cache.stats().evictions, cache.stats().totalTokens], [evictions, kept.length]);
      assert.equal(sequence.seqLen, appended); // positions never fall
      const seen = sequence.views(0).flatMap(({ start, length }) => range(start, start + length));
      assert.deepEqual(seen, kept);
      const q = Float32Array.of(0.001);
      const rows = Float32Array.from(kept);
      const truth = attention({ q, k: rows, v: rows, queryCount: 1, qHeadCount: 1, kvHeadCount: 1, headDim: 1 });
      assert.ok(relativeError(sequence.attend(0, q), truth.output) <= 1e-5);
      // All at once leaves the same rows.
      const atOnce = cache.sequence();
      count(atOnce, appended);
      assert.deepEqual(positions(atOnce), kept);
    }
  });
}

test("an evicted row cannot be gone back to", () => {
  using cache = new PagedCache({ ...SMALL, blockSize: 4, retention: { keep: "newest", tokens: 8, sinkTokens: 2 } });
  const sequence = cache.sequence();
  count(sequence, 40);
  assert.deepEqual([...sequence.blockTable(0)].filter((block) => block < 0).length, 7);
  assertRefused(
    cache,
    [sequence],
    "position_out_of_range",
    () => sequence.truncate(20),
    /rows there were evicted: rewindableTo is 36, current/,
  );
  sequence.truncate(38);
  assert.deepEqual(positions(sequence), [0, 1, ...range(32, 38)]);
  count(sequence, 1);
  assert.deepEqual(positions(sequence), [0, 1, ...range(33, 39)]);
  sequence.truncate(2);
  assert.deepEqual(positions(sequence), [0, 1]);
  count(sequence, 3);
  assert.deepEqual(positions(sequence), range(0, 5));
  assert.ok(!sequence.contiguousKv(0).ok);
});

test("layers with a window give their blocks back, the others do not", () => {
  const window = { kvHeadCount: 2, headDim: 4, windowTokens: 6 }, full = { kvHeadCount: 2, headDim: 4 };
  const wide = { kvHeadCount: 1, headDim: 32 };
  const layers: LayerShape[] = [window, full, window, wide];
  using cache = new PagedCache({ layers, maxSeqLen: 256, blockSize: 4, dtype: "f32" });
  assert.deepEqual([cache.groupCount, cache.layerShape(2)], [3, window]);
  const sequence = cache.sequence();
  const random = new Random(4);
  const q = random.floats(2 * 4);
  const scores = { qHeadCount: 2, kvHeadCount: 2, headDim: 4, queryCount: 1 };
  for (let step = 0; step < 30; step++) {
    count(sequence, 1);
    const k = Float32Array.from(range(0, step + 1).flatMap((row) => new Array(8).fill(row)));
    for (const [layer, windowTokens] of [[0, 6], [1, undefined]] as const) {
      const truth = attention({ q, k, v: k, ...scores, ...(windowTokens === undefined ? {} : { windowTokens }) });
      const output = sequence.attend(layer, q);
      if (step > 0) assert.ok(relativeError(output, truth.output) <= 1e-5, `step ${step}, layer ${layer}`);
    }
  }
  assert.deepEqual(positions(sequence, 0), range(24, 30));
  assert.deepEqual([positions(sequence, 1), positions(sequence, 3)], [range(0, 30), range(0, 30)]);
  assert.deepEqual([0, 1, 2, 3].map((layer) => cache.poolStats(layer).usedBlocks), [3, 8, 3, 8]);
  assert.deepEqual([sequence.residentTokens(0), sequence.residentTokens(1), sequence.residentTokens()], [6, 30, 6]);
  assert.deepEqual(cache.poolStats(0).blockBytes, 2 * cache.poolStats(1).blockBytes);
  assertCode("layer_out_of_range", () => cache.poolStats(4), /has 4 layers: layer is 4$/);
  assertCode("layer_out_of_range", () => cache.layerShape(4));
  const fork = sequence.fork();
  count(fork, 1);
  assert.deepEqual(positions(fork, 2), range(25, 31));
  assert.deepEqual(positions(sequence, 2), range(24, 30));
});

test("a ragged batch is appended as its parts are one by one", () => {
  using cache = new PagedCache({ ...SMALL, layerCount: 2, blockSize: 4, dtype: "f16" });
  const random = new Random(12);
  const together = range(0, 4).map(() => cache.sequence()), alone = range(0, 4).map(() => cache.sequence());
  for (const tokenCounts of [[3, 1, 0, 6], [1, 1, 1, 1], [0, 9, 2, 5]]) {
    const total = tokenCounts.reduce((sum, n) => sum + n, 0);
    for (const layer of [0, 1]) {
      const k = random.floats(total * 8), v = random.floats(total * 8);
      if (tokenCounts.every((n) => n === 1)) cache.append(layer, k, v, { sequences: together });
      else cache.append(layer, k, v, { sequences: together, tokenCounts });
      let first = 0;
      for (const [i, n] of tokenCounts.entries()) {
        alone[i]!.append(layer, k.subarray(first * 8, (first + n) * 8), v.subarray(first * 8, (first + n) * 8));
        first += n;
      }
    }
    tokenCounts.forEach((n, i) => [together, alone].forEach((sequences) => sequences[i]!.commit(n)));
    for (const layer of [0, 1]) {
      for (const i of range(0, 4)) assert.deepEqual(together[i]!.gather(layer), alone[i]!.gather(layer));
    }
  }
  // Queries for several sequences: the same bits as one by one.
  const queryCounts = [2, 1, 0, 3];
  const q = random.floats(6 * 4 * 4), lse = new Float32Array(6 * 4);
  const into = new Float32Array(q.length);
  const options = { sinkLogits: Float32Array.of(0, 1, 2, 3), softcap: 3, windowTokens: 7 };
  assert.equal(cache.attend(1, q, { sequences: together, queryCounts, into, lse, ...options }), into);
  let first = 0;
  for (const [i, queryCount] of queryCounts.entries()) {
    if (queryCount === 0) continue;
    const one = new Float32Array(queryCount * 4);
    const at = q.subarray(first * 16, (first + queryCount) * 16);
    assert.deepEqual(
      into.subarray(first * 16, (first + queryCount) * 16),
      together[i]!.attend(1, at, { queryCount, lse: one, ...options }),
    );
    assert.deepEqual(lse.subarray(first * 4, (first + queryCount) * 4), one);
    first += queryCount;
  }
  const plain = cache.attend(0, q.subarray(0, 64), { sequences: together });
  assert.deepEqual(plain.subarray(16, 32), together[1]!.attend(0, q.subarray(16, 32)));
  assert.deepEqual(cache.attend(0, new Float32Array(0), { sequences: [] }), new Float32Array(0));
  cache.append(0, new Float32Array(0), new Float32Array(0), { sequences: [] });
});

test("head-major rows of a batch", () => {
  using cache = new PagedCache({ ...SMALL, blockSize: 2 });
  const sequences = [cache.sequence(), cache.sequence()];
  const tokens = new Random(2).floats(5 * 8);
  const heads = Float32Array.from(
    { length: 40 },
    (_, i) => tokens[(Math.floor(i / 4) % 5) * 8 + Math.floor(i / 20) * 4 + i % 4]!,
  );
  cache.append(0, heads, heads, { sequences, tokenCounts: [2, 3], layout: "head_major" });
  assert.deepEqual(sequences.map((sequence) => sequence.gather(0).k), [tokens.subarray(0, 16), tokens.subarray(16)]);
});

test("a batch is refused as a whole", () => {
  using cache = new PagedCache({ ...SMALL, layerCount: 2, blockSize: 4, maxSeqLen: 8, dtype: "f16" });
  using other = new PagedCache(SMALL);
  const random = new Random(3);
  const a = cache.sequence(), b = cache.sequence(), freed = cache.sequence(), stranger = other.sequence();
  const sequences = [a, b];
  freed.free();
  count(a, 3);
  const rows = random.floats(16), long = random.floats(8 * 8);
  const refused = (code: Parameters<typeof assertCode>[0], call: () => unknown, text?: RegExp) =>
    assertRefused(cache, sequences, code, call, text);
  refused("layer_out_of_range", () => cache.append(2, rows, rows, { sequences }));
  refused("invalid_size", () => cache.append(0, rows, long, { sequences }), /k has 16, v has 64$/);
  refused("invalid_size", () => cache.append(0, rows, rows, { sequences, tokenCounts: [1] }), /it has 1$/);
  refused("invalid_size", () => cache.append(0, rows, rows, { sequences, tokenCounts: [1, 2] }));
  refused("invalid_size", () => cache.append(0, rows, rows, { sequences: [a] }));
  refused(
    "cache_full",
    () => cache.append(0, long, long, { sequences, tokenCounts: [6, 2] }),
    /sequence 0 has 3 and would get 6$/,
  );
  refused("not_finite", () => cache.append(0, rows, rows.with(15, NaN), { sequences }));
  refused("not_finite", () => cache.append(0, rows.with(0, 7e4), rows, { sequences }));
  refused(
    "invalid_config",
    () => cache.append(0, rows, rows, { sequences: [a, a] }),
    /each sequence may be named once in a call, and must be of this cache$/,
  );
  refused(
    "invalid_config",
    () => cache.append(0, rows, rows, { sequences: [a, stranger] }),
    /sequence 1 is of another/,
  );
  refused("stale_handle", () => cache.append(0, rows, rows, { sequences: [a, freed] }));
  for (const value of [-1, 1.5, 2 ** 32]) {
    assert.throws(() => cache.append(0, rows, rows, { sequences, tokenCounts: [1, value] }), RangeError);
  }
  const into = new Float32Array(16).fill(9), lse = new Float32Array(4).fill(9);
  const attend = (code: Parameters<typeof assertCode>[0], q: Float32Array, options: object, layer = 0) => {
    refused(code, () => cache.attend(layer, q, { sequences, into, lse, ...options }));
    assert.deepEqual([into, lse], [new Float32Array(16).fill(9), new Float32Array(4).fill(9)]);
  };
  attend("layer_out_of_range", rows, {}, 2);
  attend("invalid_size", rows.subarray(1), {});
  attend("invalid_size", rows, { queryCounts: [1] });
  attend("invalid_size", rows, { queryCounts: [0, 0] });
  attend("invalid_size", rows, { queryCounts: [3, 2] });
  attend("invalid_size", rows, { queryCounts: [2 ** 32 - 1, 2 ** 32 - 1] });
  attend("invalid_size", rows, { into: new Float32Array(15) });
  attend("invalid_size", rows, { lse: new Float32Array(3) });
  attend("invalid_config", rows, { softcap: -1 });
  attend("invalid_config", rows, { sequences: [a, stranger] });
  attend("not_finite", rows.with(15, Infinity), {});
  attend("stale_handle", rows, { sequences: [a, freed] });
});

test("reorder by [2, 0, 0, 1]: each beam becomes what its parent was", () => {
  using cache = new PagedCache({ ...SMALL, layerCount: 2, blockSize: 4 });
  const random = new Random(21);
  const prompt = cache.sequence();
  count(prompt, 6);
  const beams = [prompt.fork(), prompt.fork(), prompt.fork(), prompt.fork()];
  const rows = random.floats(4 * 8);
  for (const layer of [0, 1]) cache.append(layer, rows, rows, { sequences: beams });
  beams.forEach((beam) => beam.commit(1));
  for (const i of [0, 2]) count(beams[i]!, i + 2);
  const was = beams.map((beam) => [beam.seqLen, [0, 1].map((layer) => beam.gather(layer)), beam.blockTable(1)]);
  const array = beams[1]!.packedViews(0)![1]!.k, shared = beams[1]!.packedViews(0)![0]!.k;
  const [view] = beams[3]!.views(0);
  cache.reorder(beams, [2, 0, 0, 1]);
  const now = beams.map((beam) => [beam.seqLen, [0, 1].map((layer) => beam.gather(layer)), beam.blockTable(1)]);
  assert.deepEqual(now, [was[2], was[0], was[0], was[1]]);
  assertCode("stale_view", () => view!.k);
  assert.deepEqual([array.length, shared.length], [0, 32]); // the prompt's first block is still its own
  for (const [i, beam] of beams.entries()) count(beam, 3 + i);
  assert.deepEqual(beams[1]!.gather(0).k.subarray(0, 8 * 9), (was[0]![1] as { k: Float32Array }[])[0]!.k);
  const { sequenceCount } = cache.stats();
  assert.equal(sequenceCount, 5);

  const refused = (code: Parameters<typeof assertCode>[0], parents: number[], sequences = beams) =>
    assertRefused(cache, beams, code, () => cache.reorder(sequences, parents));
  refused("invalid_size", [0, 1, 2]);
  refused("invalid_config", [0, 1, 2, 4]);
  refused("invalid_config", [0, 0], [beams[1]!, beams[1]!]);
  assert.throws(() => cache.reorder(beams, [0, 1, 2, -1]), RangeError);
  assert.throws(() => cache.reorder(beams, undefined as unknown as number[]), TypeError);
  beams[2]!.append(0, rows, rows);
  refused("commit_mismatch", [0, 1, 2, 3]);
  beams[2]!.truncate(beams[2]!.seqLen);
  cache.reorder(beams, Uint32Array.of(3, 3, 3, 3));
  cache.reorder([], []);
  for (const beam of beams) beam.free();
  prompt.free();
  assert.equal(cache.stats().blockCount, 0);
});

test("a pool that runs out amid an append leaves everything as it was", () => {
  const blockBytes = 4 * 8 * 4 * 2;
  using cache = new PagedCache({ ...SMALL, blockSize: 4, maxBytes: 6 * blockBytes });
  const random = new Random(6);
  const a = cache.sequence(), b = cache.sequence();
  count(a, 6);
  count(b, 3);
  const child = a.fork();
  const all = [a, b, child];
  const rows = random.floats(30 * 8);
  const some = (n: number) => rows.subarray(0, n * 8);
  const text =
    /^Cannot append \d+ tokens? to layer 0 as no block is free and the byte limit of the pool would be passed$/;
  assertRefused(cache, all, "pool_empty", () => a.append(0, some(15), some(15)), text);
  const batch = { sequences: [b, a, child], tokenCounts: [9, 1, 4] };
  assertRefused(cache, all, "pool_empty", () => cache.append(0, some(14), some(14), batch), text);
  assert.deepEqual([...a.blockReferences(0)], [2, 2]);
  cache.append(0, some(8), some(8), { ...batch, tokenCounts: [5, 1, 2] }); // one more, and one copy
  assert.deepEqual([cache.stats().blockCount, ...a.blockReferences(0), ...child.blockReferences(0)], [5, 2, 1, 2, 1]);
  for (const [i, sequence] of [b, a, child].entries()) sequence.commit([5, 1, 2][i]!);
  assert.deepEqual(positions(b).slice(0, 3), [0, 1, 2]);
  child.free();
  a.append(0, some(5), some(5));
  assert.equal(cache.stats().blockCount, 5);
});

test("sequences that share a block append in one batch: all but the last of them copy it", () => {
  using cache = new PagedCache({ ...SMALL, blockSize: 4 });
  const root = cache.sequence();
  count(root, 6);
  const beams = [root, root.fork(), root.fork()];
  const arrays = beams.map((beam) => beam.packedViews(0)!.map(({ k }) => k));
  const rows = new Random(1).floats(3 * 8);
  cache.append(0, rows, rows, { sequences: beams });
  assert.equal(cache.stats().blockCount, 4);
  const ends = arrays.map(([first, second]) => [first!.length, second!.length]);
  assert.deepEqual(ends.map(([first]) => first), [32, 32, 32]);
  assert.deepEqual(ends.filter(([, second]) => second === 0).length, 2);
  for (const [i, beam] of beams.entries()) {
    assert.deepEqual(beam.gather(0).k.subarray(48), rows.subarray(i * 8, i * 8 + 8));
    assert.deepEqual([...beam.blockReferences(0)], [3, 1]);
  }
});

function hash(...arrays: Float32Array[]): string {
  const digest = createHash("sha256");
  for (const array of arrays) digest.update(new Uint8Array(array.buffer, array.byteOffset, array.byteLength));
  return digest.digest("hex");
}

for (const dtype of ["f32", "f16", "bf16"] as const) {
  test(`the bits of a contiguous cache at every block size, forked or fresh, in ${dtype}`, () => {
    const geometry = { layerCount: 1, kvHeadCount: 2, headDim: 80, maxSeqLen: 300, dtype };
    const random = new Random(15);
    const n = 300;
    const k = random.floats(n * 160), v = random.floats(n * 160), q = random.floats(5 * 8 * 80);
    const options = { queryCount: 5, softcap: 10, sinkLogits: random.floats(8), windowTokens: 200, sinkTokens: 3 };
    using contiguous = new ContiguousCache(geometry);
    contiguous.append(0, 0, k, v);
    const attend = (sequence: Pick<Sequence, "attend">) => {
      const lse = new Float32Array(40);
      return hash(sequence.attend(0, q, { ...options, lse }), lse, sequence.attend(0, q.subarray(0, 640)));
    };
    const expected = attend(contiguous.sequence(0));
    for (const blockSize of [1, 2, 4, 8, 16, 32, 64, 128, 256]) {
      using cache = new PagedCache({ ...geometry, blockSize });
      const noise = cache.sequence();
      const fresh = cache.sequence();
      fresh.append(0, k, v);
      assert.equal(attend(fresh), expected, `${blockSize}`);
      // A chain of forks, each of which copies a block, between rows of somebody else.
      let sequence = cache.sequence();
      for (let row = 0; row < n;) {
        const end = Math.min(n, row + 1 + random.below(40));
        sequence.append(0, k.subarray(row * 160, end * 160), v.subarray(row * 160, end * 160));
        sequence.commit(end - row);
        row = end;
        const child = sequence.fork();
        if (row < n) {
          sequence.append(0, q.subarray(0, 160), q.subarray(0, 160));
          noise.append(0, q.subarray(0, 160), q.subarray(0, 160));
        }
        sequence = child;
      }
      assert.equal(attend(sequence), expected, `${blockSize}, forked`);
      const again = sequence.fork();
      again.truncate(150);
      again.append(0, k.subarray(150 * 160), v.subarray(150 * 160));
      assert.equal(attend(again), expected, `${blockSize}, truncated`);
    }
  });
}

test("all memory goes back", () => {
  const before = systemInfo();
  const cache = new PagedCache({ layerCount: 4, kvHeadCount: 8, headDim: 128, maxSeqLen: 4096 });
  const sequence = cache.sequence();
  const rows = new Float32Array(1024 * 512);
  for (let layer = 0; layer < 4; layer++) sequence.append(layer, rows, rows);
  const stats = cache.stats();
  assert.deepEqual([stats.blockCount, stats.usedBytes], [8, 8 * cache.poolStats().blockBytes]);
  assert.ok(stats.reservedBytes >= stats.usedBytes);
  const during = systemInfo();
  assert.deepEqual(
    [during.liveCaches, during.reservedBytes],
    [before.liveCaches + 1, before.reservedBytes + stats.reservedBytes],
  );
  const array = sequence.packedViews(3)![7]!.k;
  cache.free();
  assert.equal(array.length, 0);
  const after = systemInfo();
  assert.deepEqual([after.liveCaches, after.reservedBytes], [before.liveCaches, before.reservedBytes]);
});

test("reset() empties every sequence and takes their arrays", () => {
  using cache = new PagedCache({ ...SMALL, blockSize: 4 });
  const sequences = [cache.sequence(), cache.sequence()];
  sequences.forEach((sequence) => count(sequence, 9));
  const arrays = sequences.map((sequence) => sequence.packedViews(0)![0]!.k);
  cache.reset();
  assert.deepEqual(arrays.map(({ length }) => length), [0, 0]);
  assert.deepEqual(sequences.map(({ seqLen }) => seqLen), [0, 0]);
  assert.deepEqual([cache.stats().blockCount, cache.stats().sequenceCount], [0, 2]);
  count(sequences[0]!, 2);
  assert.deepEqual(positions(sequences[0]!), [0, 1]);
});

test("free() takes the sequences along, and is harmless twice", () => {
  const cache = new PagedCache({ ...SMALL, blockSize: 4 });
  const sequence = cache.sequence(), fork = sequence.fork();
  count(sequence, 5);
  const [view] = sequence.views(0);
  const { handle } = cache;
  cache.free();
  cache.free();
  cache[Symbol.dispose]();
  sequence.free();
  fork.free();
  assert.equal(cache.handle, 0);
  const row = new Float32Array(8);
  const calls: (() => unknown)[] = [
    () => cache.sequence(),
    () => cache.stats(),
    () => cache.poolStats(),
    () => cache.reset(),
    () => cache.append(0, row, row, { sequences: [sequence] }),
    () => cache.attend(0, row, { sequences: [sequence] }),
    () => cache.reorder([sequence], [0]),
    () => PagedCache.attach(handle),
    () => sequence.seqLen,
    () => sequence.fork(),
    () => fork.append(0, row, row),
    () => sequence.packedViews(0),
    () => sequence.blockTable(0),
    () => sequence.blockReferences(0),
    () => sequence.residentTokens(),
    () => sequence.commit(0, { kept: new Uint32Array(0) }),
  ];
  for (const call of calls) assertCode("stale_handle", call);
  assertCode("stale_view", () => view!.k);
});

test("an attached cache has sequences of its own, and no zero-copy arrays", () => {
  using cache = new PagedCache({
    layers: [{ kvHeadCount: 2, headDim: 4 }, { kvHeadCount: 1, headDim: 2, windowTokens: 5 }],
    maxSeqLen: 64,
    blockSize: 4,
    dtype: { k: "f32", v: "bf16" },
  });
  const own = cache.sequence();
  count(own, 3);
  const attached = PagedCache.attach(cache.handle);
  for (
    const key of ["handle", "layerCount", "kvDim", "maxSeqLen", "blockSize", "groupCount", "dtypeK", "dtypeV"] as const
  ) {
    assert.equal(attached[key], cache[key], key);
  }
  assert.deepEqual([0, 1].map((layer) => attached.layerShape(layer)), [0, 1].map((layer) => cache.layerShape(layer)));
  const guest = attached.sequence();
  const appended = guest.append(0, new Float32Array(8).fill(3), new Float32Array(8).fill(3));
  assert.deepEqual([...guest.gather(0).k], new Array(8).fill(3));
  assert.equal(guest.attend(0, new Float32Array(8)).length, 8);
  for (
    const call of [
      () => guest.views(0),
      () => guest.packedViews(0),
      () => appended.views,
    ]
  ) assertCode("unsupported", call);
  cache.append(0, new Float32Array(16), new Float32Array(16), { sequences: [own, guest] });
  assert.equal(cache.stats().sequenceCount, 2);
  attached.reset();
  assert.deepEqual([guest.residentTokens(), own.residentTokens()], [0, 4]);
  attached.free();
  assertCode("stale_handle", () => guest.seqLen);
  assert.deepEqual([cache.stats().sequenceCount, own.seqLen], [1, 3]);
  assert.throws(() => PagedCache.attach(-1), RangeError);
  assertCode("stale_handle", () => PagedCache.attach(1));
});

test("options that free the cache as they are read are met with stale_handle", () => {
  const row = new Float32Array(8);
  const attempts: ((cache: PagedCache, sequences: Sequence[]) => unknown)[] = [
    (cache, sequences) =>
      cache.append(0, row, row, {
        sequences,
        get layout() {
          cache.free();
          return "token_major" as const;
        },
      }),
    (cache, sequences) => {
      const counts = {
        length: 1,
        get 0() {
          cache.free();
          return 1;
        },
      };
      return cache.append(0, row, row, { sequences, tokenCounts: counts });
    },
    (cache, sequences) =>
      cache.attend(0, row, {
        sequences,
        get causal() {
          sequences[0]!.free();
          return true;
        },
      }),
  ];
  for (const attempt of attempts) {
    using cache = new PagedCache(SMALL);
    assertCode("stale_handle", () => attempt(cache, [cache.sequence()]));
  }
});

test("a million forks leave nothing behind", { timeout: 60_000 }, async () => {
  using cache = new PagedCache({ ...SMALL, blockSize: 4 });
  const sequence = cache.sequence();
  count(sequence, 30);
  const row = new Float32Array(8);
  const cycles = async (count: number) => {
    for (let i = 0; i < count; i++) {
      const child = sequence.fork();
      if (i % 4 === 0) child.append(0, row, row);
      child.free();
      // What a WeakRef was made of in this turn of the event loop is kept until its end.
      if (i % 5000 === 0) await new Promise((resolve) => setTimeout(resolve, 0));
    }
  };
  await cycles(50_000);
  const { reservedBytes } = systemInfo();
  const stats = cache.stats();
  const used = process.memoryUsage().rss;
  await cycles(1_000_000);
  assert.equal(systemInfo().reservedBytes, reservedBytes);
  assert.deepEqual(cache.stats(), stats);
  const grown = process.memoryUsage().rss - used;
  assert.ok(grown < 2 ** 27, `${grown} bytes`);
});

test("thousands of layers of different windows cost in proportion to their number", () => {
  const metadataBytes = (layerCount: number) => {
    const layers = Array.from({ length: layerCount }, (_, i) => ({ kvHeadCount: 1, headDim: 32, windowTokens: i + 1 }));
    using cache = new PagedCache({ layers, maxSeqLen: 100_000 });
    assert.equal(cache.groupCount, layerCount);
    return cache.stats().metadataBytes;
  };
  const few = metadataBytes(256), many = metadataBytes(4096);
  assert.ok(many < 20 * few, `${many} ${few}`);
  assert.ok(many < 4096 * 4096, `${many}`); // the tables of a group that has no block yet
});
