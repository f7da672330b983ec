/**
 * Tiers: rows that leave the tail, a block at a time, in which format they are then, and what they cost.
 *
 * Figures are exact. Values are compared with the rows that went in where a bound follows from the format, and with
 * `gather` where the question is whether two ways of reading agree.
 */

import assert from "node:assert/strict";
import { test } from "node:test";
import {
  BlockPool,
  type DType,
  type KvFormat,
  PagedCache,
  type PagedCacheOptions,
  type Policy,
  type Sequence,
  systemInfo,
  twoTierDefaults,
} from "../mod.ts";
import { assertCode, assertRefused } from "./cache_cases.ts";
import { attention, f16Bits, Random, relativeError, storedRows } from "./oracle.ts";

/** One layer of 2 KV heads of 32 in blocks of 64: the smallest that can be quantized. */
const QUANTIZED = { layerCount: 1, kvHeadCount: 2, headDim: 32, blockSize: 64, maxSeqLen: 4096, dtype: "f32" } as const;

/** One layer of 2 KV heads of 4: too small for codes, so that the store is f16. */
const FLOATS = { layerCount: 1, kvHeadCount: 2, headDim: 4, maxSeqLen: 1024, dtype: "f32" } as const;

const Q4 = { k: "q4_0", v: "q4_0" } as const;

/** Runs `body` on a cache and a sequence of it. */
function withSequence(
  options: PagedCacheOptions,
  body: (sequence: Sequence, cache: PagedCache, random: Random) => void,
): void {
  using cache = new PagedCache(options);
  body(cache.sequence(), cache, new Random(11));
}

/** Appends `n` random rows to every layer and commits them; returns those of layer 0. */
function extend(sequence: Sequence, random: Random, n: number): { k: Float32Array; v: Float32Array } {
  const rows = Array.from({ length: sequence.layerCount }, (_, layer) => {
    const { kvHeadCount, headDim } = sequence.layerShape(layer);
    const k = random.floats(n * kvHeadCount * headDim), v = random.floats(n * kvHeadCount * headDim);
    sequence.append(layer, k, v);
    return { k, v };
  });
  sequence.commit(n);
  return rows[0]!;
}

/** Rows in the tail and in the store. */
function tiersOf(cache: PagedCache): [tail: number, store: number] {
  const { tailTokens, storeTokens } = cache.stats();
  return [tailTokens, storeTokens];
}

/** The gathered rows of a layer, as f32. */
function gathered(sequence: Sequence, layer = 0): { k: Float32Array; v: Float32Array } {
  return sequence.gather(layer) as { k: Float32Array; v: Float32Array };
}

/** A copy of the bytes of each block that is quantized. */
function bytesOf(sequence: Sequence, layer = 0): Map<number, Uint8Array[]> {
  const quantized = sequence.views(layer).filter(({ tokenStride }) => tokenStride === 0);
  return new Map(
    quantized.map(({ start, k, v }) => [start, [k as Uint8Array, v as Uint8Array].map((side) => side.slice())]),
  );
}

/** Attention over the tiers must be attention over the gathered rows. */
function assertAttends(sequence: Sequence, random: Random, layer = 0, options: { queryCount?: number } = {}): void {
  const { kvHeadCount, headDim } = sequence.layerShape(layer);
  const { queryCount = 1 } = options, qHeadCount = kvHeadCount * 2;
  const q = random.floats(queryCount * qHeadCount * headDim, 2);
  const { k, v } = gathered(sequence, layer);
  const truth = attention({ q, k, v, queryCount, qHeadCount, kvHeadCount, headDim });
  const lse = new Float32Array(queryCount * qHeadCount);
  const error = relativeError(sequence.attend(layer, q, { queryCount, lse }), truth.output);
  assert.ok(error <= 1e-3, `output ${error}`);
  assert.ok(relativeError(lse, truth.lse) <= 1e-3, `lse ${relativeError(lse, truth.lse)}`);
}

/** The whole numbers from `first` to before `end`. */
function range(first: number, end: number): number[] {
  return Array.from({ length: end - first }, (_, i) => first + i);
}

// The table of the two-tier cache, exact.

test("a: one token is in the tail", () => {
  withSequence({ ...FLOATS, blockSize: 2, tail: { tokens: 4 }, store: "f16" }, (sequence, cache, random) => {
    extend(sequence, random, 1);
    assert.deepEqual([cache.stats().totalTokens, ...tiersOf(cache)], [1, 1, 0]);
  });
});

test("b: of five tokens two stay in the tail", () => {
  withSequence({ ...FLOATS, blockSize: 1, tail: { tokens: 2 }, store: "f16" }, (sequence, cache, random) => {
    const { k, v } = extend(sequence, random, 5);
    assert.deepEqual([cache.stats().totalTokens, ...tiersOf(cache)], [5, 2, 3]);
    assert.deepEqual(sequence.blockTiers(0), ["store", "store", "store", "tail", "tail"]);
    const half = (side: Float32Array) =>
      Float32Array.of(...storedRows(side.subarray(0, 24), "f16"), ...side.subarray(24));
    assert.deepEqual(gathered(sequence), { k: half(k), v: half(v) });
  });
});

test("aq: one token is in the tail of a quantized cache", () => {
  withSequence({ ...QUANTIZED, tail: { tokens: 64 }, store: "q4_0" }, (sequence, cache, random) => {
    extend(sequence, random, 1);
    assert.deepEqual([cache.stats().totalTokens, ...tiersOf(cache)], [1, 1, 0]);
  });
});

for (const [title, step] of [["one by one", 1], ["at once", 256], ["in uneven steps", 37]] as const) {
  test(`bq: of 256 tokens ${title} 64 stay in the tail: 46,592 bytes, a ratio of 2.81`, () => {
    withSequence({ ...QUANTIZED, tail: { tokens: 64 }, store: Q4 }, (sequence, cache, random) => {
      for (let row = 0; row < 256; row += step) extend(sequence, random, Math.min(step, 256 - row));
      assert.deepEqual([cache.stats().totalTokens, ...tiersOf(cache)], [256, 64, 192]);
      const { tailBytes, storeBytes, compressionRatio } = cache.stats();
      assert.deepEqual([tailBytes, storeBytes, tailBytes + storeBytes], [32_768, 13_824, 46_592]);
      assert.equal(compressionRatio, 256 * 512 / 46_592);
      assert.equal(compressionRatio.toFixed(2), "2.81");
    });
  });
}

test("bq with a tail in f16: 16,384 + 13,824 bytes, a ratio of 4.34", () => {
  withSequence({ ...QUANTIZED, dtype: "f16", tail: { tokens: 64 }, store: Q4 }, (sequence, cache, random) => {
    extend(sequence, random, 256);
    const { tailBytes, storeBytes, compressionRatio } = cache.stats();
    assert.deepEqual([tailBytes, storeBytes, compressionRatio.toFixed(2)], [16_384, 13_824, "4.34"]);
  });
});

test("c: one row in an f16 tail has all the weight, exactly", () => {
  const shape = { layerCount: 1, kvHeadCount: 1, headDim: 4, blockSize: 1, maxSeqLen: 16 };
  withSequence({ ...shape, tail: { dtype: "f16", tokens: 4 }, store: "bf16" }, (sequence) => {
    const lse = new Float32Array(1), q = Float32Array.of(1, 0, 0, 0);
    sequence.append(0, q, Float32Array.of(1, 2, 3, 4));
    sequence.commit(1);
    assert.deepEqual([...sequence.attend(0, q, { softmaxScale: 1, lse })], [1, 2, 3, 4]);
    assert.deepEqual([...lse], [1]);
  });
});

// d, e and f are tail-only and stand in paged_cache_test.ts and block_pool_test.ts.

test("the preset, token by token: 256 rows in the tail, 3840 in the store, 5,472,256 bytes, a ratio of 6.13", () => {
  assert.deepEqual(JSON.parse(JSON.stringify(twoTierDefaults)), twoTierDefaults);
  withSequence({ ...twoTierDefaults, layerCount: 1, maxSeqLen: 8192 }, (sequence, cache, random) => {
    const rows = random.floats(64 * sequence.kvDim);
    for (let row = 0; row < 4096; row++) {
      const at = row % 64 * sequence.kvDim;
      const one = rows.subarray(at, at + sequence.kvDim);
      sequence.append(0, one, one);
      sequence.commit(1);
      if (row === 318) assert.deepEqual(tiersOf(cache), [319, 0]);
      if (row === 319) assert.deepEqual(tiersOf(cache), [256, 64]);
    }
    const { totalTokens, tailTokens, storeTokens, warmTokens, tailBytes, storeBytes, compressionRatio, slackBytes } =
      cache
        .stats();
    assert.deepEqual([totalTokens, tailTokens, storeTokens, warmTokens], [4096, 256, 3840, 0]);
    assert.deepEqual([tailBytes, storeBytes], [256 * 4096, 3840 * 1152]);
    assert.equal(tailBytes + storeBytes, 5_472_256);
    assert.deepEqual([compressionRatio, compressionRatio.toFixed(2)], [4096 * 8192 / 5_472_256, "6.13"]);
    assert.equal(slackBytes, 0); // every block is full
    assert.deepEqual(JSON.parse(JSON.stringify(cache.stats())), cache.stats());
    // Retention: the oldest row goes with each new one, from the store.
    extend(sequence, random, 1);
    assert.deepEqual([cache.stats().totalTokens, cache.stats().evictions, ...tiersOf(cache)], [4096, 1, 257, 3839]);
  });
});

test("bytes of a row of K and V at stride 1024: what each format costs in the store", () => {
  const costs: [KvFormat, bytes: number][] = [
    ["f32", 8192],
    ["f16", 4096],
    ["bf16", 4096],
    ["q8_0", 2176],
    ["q4_0", 1152],
    ["i8", (128 * 1024 + 64 * 1024 / 64 * 4 * 2) / 64],
    ["i4", 1152],
    ["i2", 640],
    [{ k: "q8_0", v: "i4" }, 1088 + 576],
  ];
  const { kvHeadCount, headDim } = twoTierDefaults;
  for (const [store, bytes] of costs) {
    withSequence(
      { layerCount: 1, kvHeadCount, headDim, maxSeqLen: 64, dtype: "bf16", store },
      (sequence, cache, random) => {
        extend(sequence, random, 64);
        const isTail = store === "bf16"; // a store in the tail's own formats is no other place
        const { tailBytes, storeBytes, usedBytes, slackBytes } = cache.stats();
        assert.deepEqual(isTail ? tailBytes : storeBytes, 64 * bytes, `${JSON.stringify(store)}`);
        assert.deepEqual([usedBytes, slackBytes], [64 * bytes, 0]);
        assert.equal(cache.poolStats(0, store).blockBytes, 64 * bytes);
        assert.deepEqual(sequence.blockTiers(0), [isTail ? "tail" : "store"]);
      },
    );
  }
});

// Migration.

test("a filled tail has tail.tokens to tail.tokens + blockSize - 1 rows, whatever the steps", () => {
  for (const [tokens, step] of [[0, 1], [64, 1], [128, 7], [64, 100], [0, 200]] as const) {
    withSequence({ ...QUANTIZED, maxSeqLen: 1200, tail: { tokens }, store: "i8" }, (sequence, cache, random) => {
      for (let row = step; row <= 1000; row += step) {
        extend(sequence, random, step);
        const tail = row < tokens + 64 ? row : tokens + (row - tokens) % 64;
        assert.deepEqual(tiersOf(cache), [tail, row - tail], `${row} rows, tail ${tokens}`);
      }
    });
  }
});

test("all layers of a shape migrate at once, and each shape by itself", () => {
  const wide = { kvHeadCount: 2, headDim: 32 }, narrow = { kvHeadCount: 1, headDim: 64, store: "q8_0" } as const;
  withSequence(
    { layers: [wide, narrow, wide], maxSeqLen: 1024, tail: { tokens: 64 }, store: { k: "i8", v: "i4" } },
    (sequence, cache, random) => {
      const layers = [0, 1, 2];
      for (let row = 0; row < 130; row += 26) extend(sequence, random, 26);
      for (const layer of layers) assert.deepEqual(sequence.blockTiers(layer), ["store", "tail", "tail"]);
      assert.deepEqual(cache.layerShape(1), { ...narrow, store: { k: "q8_0", v: "q8_0" } });
      assert.deepEqual([cache.groupCount, cache.layerShape(2)], [2, wide]);
      assert.deepEqual(layers.map((layer) => sequence.views(layer)[0]!.dtypeV), ["i4", "q8_0", "i4"]);
      for (const layer of layers) assertAttends(sequence, random, layer);
      assert.deepEqual(layers.map((layer) => cache.poolStats(layer, "q8_0").usedBlocks), [0, 1, 0]);
      assert.deepEqual(layers.map((layer) => cache.poolStats(layer, { k: "i8", v: "i4" }).usedBlocks), [1, 0, 1]);
    },
  );
});

test("layers may have stores of their own without one of the cache; the others stay in the tail", () => {
  const own = { kvHeadCount: 2, headDim: 32, store: { k: "q8_0", v: "f32" } } as const,
    none = { kvHeadCount: 2, headDim: 5 };
  withSequence({ layers: [none, own], maxSeqLen: 256, tail: { tokens: 64 } }, (sequence, cache, random) => {
    extend(sequence, random, 200);
    assert.deepEqual([sequence.blockTiers(0), sequence.blockTiers(1)], [
      ["tail", "tail", "tail", "tail"],
      ["store", "store", "tail", "tail"],
    ]);
    assert.deepEqual(cache.policy, { kind: "hybrid", tail: { tokens: 64, sinkTokens: 0 } });
    assert.deepEqual(tiersOf(cache), [200, 0]); // counted in layer 0
    assertAttends(sequence, random, 1);
  });
});

test("pending rows never migrate, and a commit of many migrates all that are due", () => {
  withSequence({ ...QUANTIZED, store: "q8_0" }, (sequence, cache, random) => {
    const rows = random.floats(300 * 64);
    sequence.append(0, rows, rows);
    assert.deepEqual(sequence.blockTiers(0), new Array(5).fill("tail"));
    assert.deepEqual(tiersOf(cache), [0, 0]);
    sequence.commit(300);
    assert.deepEqual(sequence.blockTiers(0), ["store", "store", "store", "store", "tail"]);
    assert.deepEqual(tiersOf(cache), [44, 256]);
    sequence.append(0, rows, rows);
    assertAttends(sequence, random); // over pending rows, too
    sequence.truncate(300);
    assert.deepEqual(tiersOf(cache), [44, 256]);
  });
});

test("the kept rows of a tree migrate as any others", () => {
  withSequence({ ...QUANTIZED, store: "q8_0" }, (sequence, _cache, random) => {
    extend(sequence, random, 60);
    const rows = random.floats(12 * 64);
    sequence.append(0, rows, rows);
    const kept = Uint32Array.of(0, 2, 3, 5, 7, 11);
    sequence.commit(6, { kept });
    assert.deepEqual([sequence.seqLen, sequence.blockTiers(0)], [66, ["store", "tail"]]);
    const { k } = gathered(sequence);
    const row = (i: number) => rows.subarray(i * 64, i * 64 + 64);
    assert.deepEqual(k.subarray(64 * 64), Float32Array.of(...row(7), ...row(11)));
    assert.ok(relativeError(k.subarray(60 * 64, 64 * 64), [0, 2, 3, 5].flatMap((i) => [...row(i)])) < 0.01);
  });
});

test("where there is no memory for the store, rows stay in the tail, and a later commit tries again", () => {
  // A block of the tail has 32,768 bytes: with 383 of them in use nothing is left of 12 MiB for another format.
  withSequence(
    { ...QUANTIZED, maxSeqLen: 2 ** 15, maxBytes: 12 * 2 ** 20, store: "q4_0" },
    (sequence, cache, random) => {
      const hog = cache.sequence();
      const many = new Float32Array(380 * 64 * 64);
      hog.append(0, many, many);
      const { k } = extend(sequence, random, 128);
      assert.deepEqual([tiersOf(cache), sequence.blockTiers(0)], [[128, 0], ["tail", "tail"]]);
      assert.deepEqual(gathered(sequence).k, k); // as exact as ever
      assertAttends(sequence, random);
      extend(sequence, random, 1);
      assert.deepEqual(tiersOf(cache), [129, 0]);
      hog.truncate(0);
      extend(sequence, random, 1);
      assert.deepEqual([tiersOf(cache), sequence.blockTiers(0)], [[2, 128], ["store", "store", "tail"]]);
      assertAttends(sequence, random);
    },
  );
});

test("retention counts rows one by one in quantized blocks, too", () => {
  for (const [tokens, tail, sinkTokens] of [[200, 128, 0], [100, 64, 10], [64, 0, 5]] as const) {
    const retention = { keep: "newest", tokens, sinkTokens } as const;
    withSequence({ ...QUANTIZED, tail: { tokens: tail }, store: "i8", retention }, (sequence, cache, random) => {
      const all: number[] = [];
      for (let row = 0; row < 700; row += 7) {
        all.push(...extend(sequence, random, 7).k);
        assert.equal(cache.stats().totalTokens, Math.min(row + 7, tokens));
        assert.equal(sequence.residentTokens(), Math.min(row + 7, tokens));
      }
      const positions = [...range(0, sinkTokens), ...range(700 - tokens + sinkTokens, 700)];
      const expected = positions.flatMap((position) => all.slice(position * 64, position * 64 + 64));
      // i8: a step of 2 / 255, and half of that at most, of rows of mean magnitude 1/2.
      assert.ok(relativeError(gathered(sequence).k, expected) < 0.01);
      assert.deepEqual(sequence.views(0).flatMap(({ start, length }) => range(start, start + length)), positions);
      assertAttends(sequence, random);
      assert.equal(sequence.seqLen, 700);
    });
  }
});

test("a layer with a window gives up quantized blocks, one without keeps them", () => {
  const layers = [{ kvHeadCount: 2, headDim: 32, windowTokens: 150 }, { kvHeadCount: 2, headDim: 32 }];
  withSequence(
    { layers, maxSeqLen: 1024, dtype: "f32", tail: { tokens: 64 }, store: "q8_0" },
    (sequence, cache, random) => {
      for (let row = 0; row < 500; row += 20) extend(sequence, random, 20);
      assert.deepEqual(sequence.blockTiers(0), [...new Array(5).fill(null), "store", "tail", "tail"]);
      assert.deepEqual(sequence.blockTiers(1), [...new Array(6).fill("store"), "tail", "tail"]);
      assert.deepEqual([0, 1].map((layer) => cache.poolStats(layer, "q8_0").usedBlocks), [2, 6]); // one of them unseen
      for (const layer of [0, 1]) assertAttends(sequence, random, layer);
    },
  );
});

test("precision sinks stay in floats, whole blocks of them, and count in the tail", () => {
  const tail = { tokens: 64, sinkTokens: 4 };
  withSequence({ ...QUANTIZED, tail, store: "q4_0" }, (sequence, cache, random) => {
    const { k } = extend(sequence, random, 300);
    assert.deepEqual(sequence.blockTiers(0), ["tail", "store", "store", "tail", "tail"]);
    assert.deepEqual(tiersOf(cache), [64 + 108, 128]);
    const { tailBytes, storeBytes } = cache.stats();
    assert.deepEqual([tailBytes, storeBytes], [172 * 512, 128 * 72]);
    assert.deepEqual(gathered(sequence).k.subarray(0, 64 * 64), k.subarray(0, 64 * 64));
    assertAttends(sequence, random);
    extend(sequence, random, 700);
    assert.deepEqual(sequence.blockTiers(0).filter((tier) => tier === "tail").length, 3);
    assert.equal(sequence.blockTiers(0)[0], "tail");
  });
});

// Forks, beams and rewinding.

test("a fork shares quantized blocks, and rows appended by either leave them alone", () => {
  withSequence({ ...QUANTIZED, store: "i4" }, (parent, cache, random) => {
    extend(parent, random, 140);
    const before = bytesOf(parent);
    const child = parent.fork();
    assert.deepEqual([...child.blockReferences(0)], [2, 2, 2]);
    assert.deepEqual(child.blockTiers(0), parent.blockTiers(0));
    extend(child, random, 60);
    extend(parent, random, 3);
    assert.deepEqual([...child.blockReferences(0)], [2, 2, 1, 1]);
    assert.deepEqual(child.blockTiers(0), ["store", "store", "store", "tail"]);
    assert.deepEqual([bytesOf(parent), new Map([...bytesOf(child)].slice(0, 2))], [before, before]);
    // Rows are counted where they are seen, bytes where they are.
    const { totalTokens, storeBytes, usedBytes } = cache.stats();
    assert.equal(totalTokens, 200 + 143);
    assert.equal(storeBytes, 3 * cache.poolStats(0, "i4").blockBytes);
    assert.equal(usedBytes, storeBytes + 2 * cache.poolStats().blockBytes);
    child.free();
    assert.equal(cache.poolStats(0, "i4").usedBlocks, 2);
    assertAttends(parent, random);
  });
});

test("two forks that let the same block migrate share what it becomes", () => {
  withSequence({ ...QUANTIZED, tail: { tokens: 64 }, store: "q4_0" }, (parent, cache, random) => {
    extend(parent, random, 100);
    const child = parent.fork();
    extend(parent, random, 40);
    assert.deepEqual([parent.blockTiers(0)[0], child.blockTiers(0)[0]], ["store", "tail"]);
    assert.equal(cache.poolStats(0, "q4_0").usedBlocks, 1);
    extend(child, random, 40);
    assert.equal(child.blockTiers(0)[0], "store");
    assert.equal(child.blockTable(0)[0], parent.blockTable(0)[0]);
    assert.deepEqual([child.blockReferences(0)[0], cache.poolStats(0, "q4_0").usedBlocks], [2, 1]);
    assert.deepEqual(bytesOf(child), bytesOf(parent));
    const late = child.fork();
    parent.free();
    child.free();
    assertAttends(late, random);
    late.free();
    assert.equal(cache.stats().blockCount, 0);
  });
});

test("a block that a fork wrote to is not what it was when the other let it migrate", () => {
  withSequence({ ...QUANTIZED, tail: { tokens: 64 }, store: "q8_0" }, (parent, _cache, random) => {
    extend(parent, random, 100);
    const child = parent.fork();
    extend(parent, random, 60);
    assert.deepEqual([parent.blockTiers(0)[0], child.blockReferences(0)[0]], ["store", 1]); // shared once, and migrated once
    child.truncate(10);
    const { k } = extend(child, random, 150);
    assert.deepEqual(child.blockTiers(0), ["store", "tail", "tail"]);
    assert.ok(relativeError(gathered(child).k.subarray(10 * 64), k) < 0.01);
    assert.notEqual(child.blockTable(0)[0], parent.blockTable(0)[0]);
  });
});

test("beams of mixed tiers take each other's place, and their arrays end", () => {
  withSequence({ ...QUANTIZED, store: "q8_0" }, (first, cache, random) => {
    const second = cache.sequence();
    extend(first, random, 70);
    extend(second, random, 200);
    cache.updatePolicy({ kind: "store-only", store: "i4" });
    extend(first, random, 60);
    const was = [first, second].map((beam) => [beam.blockTiers(0), gathered(beam), bytesOf(beam)]);
    assert.deepEqual(first.blockTiers(0), ["warm", "store", "tail"]);
    assert.deepEqual(second.blockTiers(0), ["warm", "warm", "warm", "tail"]);
    const arrays = [first, second].map((beam) => beam.views(0).map(({ k }) => k!));
    cache.reorder([first, second], [1, 0]);
    assert.deepEqual(
      [first, second].map((beam) => [beam.blockTiers(0), gathered(beam), bytesOf(beam)]),
      was.toReversed(),
    );
    assert.ok(arrays.flat().every(({ length }) => length === 0));
    for (const beam of [first, second]) assertAttends(beam, random);
  });
});

for (const store of ["q8_0", "q4_0", "i8", "i4"] as const) {
  test(`truncate into a ${store} block and append: its rows are the tail's again, and stay there`, () => {
    withSequence({ ...QUANTIZED, store }, (sequence, cache, random) => {
      extend(sequence, random, 200);
      const before = gathered(sequence).k.slice(), bytes = bytesOf(sequence);
      const [, view] = sequence.views(0);
      const array = view!.k!;
      sequence.truncate(100);
      assert.deepEqual([sequence.blockTiers(0), sequence.views(0)[1]!.length], [["store", "store"], 36]);
      assert.deepEqual([cache.stats().totalTokens, cache.poolStats(0, store).usedBlocks], [100, 2]);
      assert.deepEqual(gathered(sequence).k, before.subarray(0, 100 * 64));
      assertAttends(sequence, random);
      assert.ok(array.length > 0); // the block is still there
      const row = random.floats(64);
      sequence.append(0, row, row);
      assert.equal(array.length, 0); // and now it is not
      assert.deepEqual(sequence.blockTiers(0), ["store", "tail"]);
      // Floats of 4 bytes hold what the codes said.
      assert.deepEqual(gathered(sequence).k, Float32Array.of(...before.subarray(0, 100 * 64), ...row));
      sequence.commit(1);
      extend(sequence, random, 60);
      assert.deepEqual(sequence.blockTiers(0), ["store", "tail", "tail"]);
      assert.deepEqual(bytesOf(sequence).get(0), bytes.get(0)); // never touched
      assert.deepEqual(gathered(sequence).k.subarray(0, 100 * 64), before.subarray(0, 100 * 64));
      assert.deepEqual(tiersOf(cache), [97, 64]);
      assertAttends(sequence, random);
    });
  });
}

test("truncate into a quantized block with a tail in f16: its rows are rounded to f16", () => {
  withSequence({ ...QUANTIZED, dtype: "f16", store: "q8_0" }, (sequence, _cache, random) => {
    extend(sequence, random, 130);
    const before = gathered(sequence).k.slice();
    sequence.truncate(90);
    const row = random.floats(64);
    sequence.append(0, row, row);
    const expected = Float32Array.of(
      ...before.subarray(0, 64 * 64),
      ...storedRows(before.subarray(64 * 64, 90 * 64), "f16"),
      ...storedRows(row, "f16"),
    );
    assert.deepEqual(gathered(sequence).k, expected);
  });
});

test("a shared quantized block is turned back for one sequence only", () => {
  withSequence({ ...QUANTIZED, layerCount: 2, store: "q4_0" }, (parent, cache, random) => {
    extend(parent, random, 130);
    const child = parent.fork();
    const arrays = [parent, child].map((each) => [0, 1].map((layer) => each.views(layer)[0]!.k!));
    const before = [0, 1].map((layer) => gathered(parent, layer)), bytes = bytesOf(parent, 1);
    child.truncate(20);
    const row = random.floats(64);
    child.append(0, row, row);
    assert.deepEqual([child.blockTiers(0), parent.blockTiers(0)], [["tail"], ["store", "store", "tail"]]);
    assert.deepEqual(child.gather(1).k, before[1]!.k.subarray(0, 20 * 64)); // turned back with the block
    assert.deepEqual([0, 1].map((layer) => gathered(parent, layer)), before);
    assert.deepEqual(bytesOf(parent, 1), bytes);
    assert.deepEqual(arrays.map((layers) => layers.map(({ length }) => length > 0)), [[true, true], [false, false]]);
    assert.equal(cache.poolStats(0, "q4_0").usedBlocks, 2);
  });
});

// Views.

test("a quantized block is seen as bytes, a side in floats as the whole side, and neither has strides", () => {
  const store = { k: "f16", v: "q8_0" } as const;
  withSequence({ ...QUANTIZED, tail: { tokens: 64 }, store }, (sequence, _cache, random) => {
    const { k } = extend(sequence, random, 150);
    const views = sequence.views(0);
    const facts = views.map(({ tier, start, length, dtypeK, dtypeV, tokenStride, headStride }) => //
    ({ tier, start, length, dtypeK, dtypeV, tokenStride, headStride }));
    const stored = { tier: "store", length: 64, dtypeK: "f16", dtypeV: "q8_0", tokenStride: 0, headStride: 0 };
    const tail = { tier: "tail", dtypeK: "f32", dtypeV: "f32", tokenStride: 32, headStride: 64 * 32 };
    assert.deepEqual(facts, [
      { ...stored, start: 0 },
      { ...tail, start: 64, length: 64 },
      { ...tail, start: 128, length: 22 },
    ]);
    const [{ k: halves, v: bytes }, { k: floats }] = views as [typeof views[0], typeof views[0]];
    assert.deepEqual([halves!.constructor, bytes!.constructor, floats!.constructor], [
      Uint16Array,
      Uint8Array,
      Float32Array,
    ]);
    assert.deepEqual([halves!.length, bytes!.length, floats!.length], [2 * 64 * 32, 2 * 64 * 34, 2 * 64 * 32]);
    // [kv_head][token][head_dim]
    const at = (head: number, token: number) => (head * 64 + token) * 32;
    for (const [head, token] of [[0, 0], [0, 63], [1, 7]] as const) {
      const row = k.subarray((token * 2 + head) * 32, (token * 2 + head) * 32 + 32);
      assert.deepEqual(halves!.subarray(at(head, token), at(head, token) + 32), Uint16Array.from(row, f16Bits));
    }
    assert.equal(sequence.packedViews(0), null);
    assert.deepEqual(sequence.contiguousKv(0), { ok: false, reason: "quantized" });
    // Again, and in the middle of a block: the same buffers, the same bytes.
    sequence.truncate(40);
    const [cut] = sequence.views(0);
    assert.deepEqual([cut!.length, cut!.k!.length, cut!.k!.buffer === halves!.buffer], [40, halves!.length, true]);
  });
});

test("a layer in floats has packed views beside a quantized one", () => {
  const layers = [{ kvHeadCount: 2, headDim: 32, store: "f16" as const }, { kvHeadCount: 2, headDim: 32 }];
  withSequence({ layers, maxSeqLen: 256, dtype: "f32", store: "i2" }, (sequence, _cache, random) => {
    extend(sequence, random, 70);
    assert.equal(sequence.packedViews(1), null);
    const packed = sequence.packedViews(0)!;
    assert.deepEqual(packed.map(({ dtype, dtypeV, k }) => [dtype, dtypeV, k.constructor, k.length]), [
      ["f16", "f16", Uint16Array, 64 * 64],
      ["f32", "f32", Float32Array, 64 * 64],
    ]);
  });
});

test("a commit that lets a block migrate ends its arrays and makes its views stale, and no others", () => {
  withSequence({ ...QUANTIZED, layerCount: 2, store: "q8_0", tail: { tokens: 64 } }, (sequence, _cache, random) => {
    extend(sequence, random, 127);
    const arrays = [0, 1].map((layer) => sequence.views(layer).map(({ k }) => k!));
    const packed = sequence.packedViews(1)!;
    extend(sequence, random, 1);
    assert.deepEqual(arrays.map((layer) => layer.map(({ length }) => length > 0)), [[false, true], [false, true]]);
    assertCode("stale_view", () => packed[1]!.k);
    const after = sequence.views(0).map(({ k }) => k!), [stored] = sequence.views(1);
    extend(sequence, random, 63); // no block is due
    assert.deepEqual(after.map(({ length }) => length > 0), [true, true]);
    assertCode("stale_view", () => stored!.tier); // by the append
    extend(sequence, random, 1);
    assert.deepEqual(after.map(({ length }) => length > 0), [true, false]);
    sequence.free();
    assert.deepEqual(after.map(({ length }) => length > 0), [false, false]);
  });
});

// Values.

/** The dtypes that refuse more than f32 does, and the smallest magnitude each refuses. */
const LIMITS: [DType, number][] = [["f16", 65520], ["q8_0", 65520 * 127], ["q4_0", 65520 * 8], ["i8", 65520], [
  "i4",
  65520,
]];

for (const [store, limit] of LIMITS) {
  test(`append() refuses what a store in ${store} could not hold, though the tail could`, () => {
    for (const side of ["k", "v"] as const) {
      const sides = { k: "f32", v: "f32", [side]: store } as { k: DType; v: DType };
      withSequence({ ...QUANTIZED, tail: { tokens: 64 }, store: sides }, (sequence, _cache, random) => {
        extend(sequence, random, 5);
        const row = random.floats(64);
        const rows = (value: number) => [row, row].map((each, i) => "kv"[i] === side ? each.with(63, value) : each);
        for (const value of [limit, -limit, NaN, Infinity, -Infinity]) {
          const [k, v] = rows(value);
          assertRefused(sequence, "not_finite", () => sequence.append(0, k!, v!));
        }
        const below = Math.fround(limit * (1 - 2 ** -23));
        const [k, v] = rows(below), [otherV, otherK] = rows(limit);
        if (side === "k") sequence.append(0, k!, otherK!.with(0, -1e30));
        else sequence.append(0, otherV!.with(0, -1e30), v!);
        sequence.commit(1);
        extend(sequence, random, 200);
        const all = gathered(sequence);
        assert.ok([...all.k, ...all.v].every(Number.isFinite));
      });
    }
  });
}

test("a row that a later store could not hold stays in the tail with its block", () => {
  withSequence({ ...QUANTIZED, kvHeadCount: 1 }, (sequence, cache, random) => {
    const large = random.floats(32).with(3, 1e20);
    sequence.append(0, large, large);
    sequence.commit(1);
    extend(sequence, random, 199);
    cache.updatePolicy({ kind: "store-only", store: "i8" });
    assertRefused(sequence, "not_finite", () => sequence.append(0, large, large));
    extend(sequence, random, 1);
    assert.deepEqual(sequence.blockTiers(0), ["tail", "store", "store", "tail"]);
    assert.equal(gathered(sequence).k[3], Math.fround(1e20));
    extend(sequence, random, 100);
    assert.equal(sequence.blockTiers(0)[0], "tail");
  });
});

/** Numbers of mean 0 and variance 1 (Box and Muller). */
function normals(random: Random, length: number): Float32Array {
  return Float32Array.from({ length }, () => {
    const radius = Math.sqrt(-2 * Math.log(1 - random.next()));
    return radius * Math.cos(2 * Math.PI * random.next());
  });
}

const GATES: [DType, number][] = [["q4_0", 0.55], ["i4", 0.16], ["q8_0", 0.04], ["i8", 0.012]];

for (const [dtype, gate] of GATES) {
  test(`keys with outlier channels: the output in ${dtype} is at most ${gate} off`, () => {
    const random = new Random(1234);
    const n = 512, headDim = 128, queryCount = 32;
    const k = normals(random, n * headDim), v = normals(random, n * headDim), q = normals(random, queryCount * headDim);
    for (const [i, channel] of [3, 40, 77, 111].entries()) {
      for (let t = 0; t < n; t++) k[t * headDim + channel] = 2 * k[t * headDim + channel]! + (i % 2 === 0 ? 12 : -12);
    }
    withSequence({ layerCount: 1, kvHeadCount: 1, headDim, maxSeqLen: n, dtype: "f32", store: dtype }, (sequence) => {
      sequence.append(0, k, v);
      sequence.commit(n);
      assert.deepEqual(sequence.blockTiers(0), new Array(8).fill("store"));
      const options = { queryCount, qHeadCount: 1, kvHeadCount: 1, headDim, causal: false };
      const { output } = attention({ q, k, v, ...options });
      const norm = (values: ArrayLike<number>) => Math.hypot(...Array.from(values));
      const actual = sequence.attend(0, q, { queryCount, causal: false });
      const error = norm(output.map((value, i) => value - actual[i]!)) / norm(output);
      assert.ok(error <= gate && error > 0, `${error}`);
    });
  });
}

for (const store of ["q8_0", "q4_0", "i8", "i4", "i2"] as const) {
  test(`attention over ${store} is attention over the gathered rows, at every length and with several queries`, () => {
    for (const [headDim, blockSize] of [[32, 64], [96, 128], [128, 64], [256, 256]] as const) {
      const shape = { layerCount: 1, kvHeadCount: 2, headDim, blockSize, maxSeqLen: 1024 };
      withSequence({ ...shape, store }, (sequence, _cache, random) => {
        for (const n of [blockSize, 1, blockSize - 1, 30]) {
          extend(sequence, random, n);
          assertAttends(sequence, random);
        }
        assertAttends(sequence, random, 0, { queryCount: 5 });
        assert.equal(sequence.blockTiers(0)[1], "store");
      });
    }
  });
}

test("equal stored bytes give equal bits: at once or in steps, forked or fresh, one or in a batch", () => {
  withSequence(
    { ...QUANTIZED, dtype: "f16", tail: { tokens: 64 }, store: { k: "i8", v: "i4" } },
    (first, cache, random) => {
      const k = random.floats(333 * 64), v = random.floats(333 * 64), q = random.floats(4 * 32);
      first.append(0, k, v);
      first.commit(333);
      const second = cache.sequence();
      for (let row = 0; row < 333; row += 9) {
        second.append(0, k.subarray(row * 64, (row + 9) * 64), v.subarray(row * 64, (row + 9) * 64));
        second.commit(9);
      }
      const sequences = [first, second, first.fork()];
      assert.deepEqual(bytesOf(second), bytesOf(first));
      const expected = first.attend(0, q);
      for (const sequence of sequences) assert.deepEqual(sequence.attend(0, q), expected);
      const three = cache.attend(0, Float32Array.of(...q, ...q, ...q), { sequences });
      assert.deepEqual(three, Float32Array.of(...expected, ...expected, ...expected));
    },
  );
});

// What is easily got wrong.

test("a tail in f16 is f16: two bytes an element, rounded once", () => {
  withSequence({ ...QUANTIZED, dtype: "f16", tail: { tokens: 64 }, store: "q4_0" }, (sequence, cache, random) => {
    const { k } = extend(sequence, random, 3);
    const array = sequence.views(0)[0]!.k as Uint16Array;
    assert.deepEqual([array.BYTES_PER_ELEMENT, cache.stats().tailBytes], [2, 3 * 2 * 64 * 2]);
    assert.deepEqual(array.subarray(0, 32), Uint16Array.from(k.subarray(0, 32), f16Bits));
  });
});

/** Largest distance of a value in [-scale, scale) from what its codes say, by the format: half a step, and the f16's error. */
const ERRORS: [DType, error: number][] = [
  ["q8_0", 0.57 / 127], // d = 1 / 127
  ["q4_0", 1.01 / 8], // d = 1 / 8, and a whole one where the code was clipped
  ["i8", 0.57 * 2 / 255], // a step of 2 / 255
  ["i4", 0.51 * 2 / 15],
  ["i2", 0.51 * 2 / 3],
];

for (const [store, error] of ERRORS) {
  test(`keys and values in ${store} have scales of their own, and constants are constants`, () => {
    withSequence({ ...QUANTIZED, store }, (sequence, _cache, random) => {
      const k = random.floats(64 * 64), v = random.floats(64 * 64, 10);
      k.fill(0.625, 0, 32); // one head of the first token
      v.fill(-7, 64, 128);
      sequence.append(0, k, v);
      sequence.commit(64);
      const rows = gathered(sequence);
      for (const [sides, scale] of [[[k, rows.k], 1], [[v, rows.v], 10]] as const) {
        const worst = Math.max(...sides[0].map((value, i) => Math.abs(value - sides[1][i]!)));
        assert.ok(worst <= error * scale, `${worst} of ${scale}`);
        assert.ok(worst > error * scale / 20, `${worst}: was anything rounded?`);
      }
      const even = rows.v.subarray(64, 128);
      assert.ok(even.every((value) => Math.abs(value + 7) <= 0.01 * 7), `${even[0]}`);
    });
  });
}

/** Two KV heads of 2 elements, two rows. */
function twoHeads(options: Partial<PagedCacheOptions>, body: (sequence: Sequence) => void): void {
  const shape = { layerCount: 1, kvHeadCount: 2, headDim: 2, maxSeqLen: 16, dtype: "f32" } as const;
  withSequence({ ...shape, ...options }, (sequence) => {
    sequence.append(0, Float32Array.of(1, 0, 0, 1, 0, 1, 1, 0), Float32Array.of(1, 1, 2, 2, 3, 3, 4, 4));
    sequence.commit(2);
    body(sequence);
  });
}

for (const options of [{}, { blockSize: 1, store: "f16" }] as const) {
  const where = "store" in options ? "in the store" : "in the tail";
  test(`each query head has a softmax of its own, rows ${where}`, () => {
    twoHeads(options, (sequence) => {
      const near = (actual: Float32Array, expected: number[]) => {
        assert.equal(actual.length, expected.length);
        assert.ok(actual.every((value, i) => Math.abs(value - expected[i]!) <= 1e-3), `${actual}`);
      };
      near(sequence.attend(0, Float32Array.of(10, 0, 10, 0), { softmaxScale: 1 }), [1, 1, 4, 4]);
      const four = Float32Array.of(10, 0, 0, 10, 10, 0, 0, 10);
      near(sequence.attend(0, four, { softmaxScale: 1 }), [1, 1, 3, 3, 4, 4, 2, 2]);
    });
  });
}

test("a tiered cache without rows gives zeros as long as the queries, an lse of -Infinity, and a ratio of 1", () => {
  withSequence({ ...QUANTIZED, store: "q4_0" }, (sequence, cache, random) => {
    for (const qHeadCount of [2, 4, 8]) {
      const lse = new Float32Array(qHeadCount).fill(3);
      assert.deepEqual(sequence.attend(0, random.floats(qHeadCount * 32), { lse }), new Float32Array(qHeadCount * 32));
      assert.deepEqual(lse, new Float32Array(qHeadCount).fill(-Infinity));
    }
    const { compressionRatio, totalTokens, tailBytes, storeBytes, slackBytes } = cache.stats();
    assert.deepEqual([compressionRatio, totalTokens, tailBytes, storeBytes, slackBytes], [1, 0, 0, 0, 0]);
    assert.deepEqual(gathered(sequence), { k: new Float32Array(0), v: new Float32Array(0) });
  });
});

test("a tail of 128 in a cache of 200 rows: 300 at once leave 200", () => {
  const retention = { keep: "newest", tokens: 200 } as const;
  withSequence({ ...QUANTIZED, tail: { tokens: 128 }, store: "q4_0", retention }, (sequence, cache, random) => {
    extend(sequence, random, 300);
    assert.deepEqual([cache.stats().totalTokens, ...tiersOf(cache), sequence.seqLen], [200, 172, 28, 300]);
    assert.deepEqual(sequence.blockTiers(0), [null, "store", "tail", "tail", "tail"]);
    extend(sequence, random, 50); // it goes on
    assert.deepEqual([cache.stats().totalTokens, ...tiersOf(cache)], [200, 158, 42]);
    assertAttends(sequence, random);
  });
});

test("of ten rows the newest four stay, at positions 6 to 9, and the next one is number 10", () => {
  withSequence({ ...FLOATS, blockSize: 2, retention: { keep: "newest", tokens: 4 } }, (sequence, cache, random) => {
    for (let row = 0; row < 10; row++) extend(sequence, random, 1);
    assert.equal(cache.stats().totalTokens, 4);
    assert.deepEqual(sequence.views(0).flatMap(({ start, length }) => range(start, start + length)), [6, 7, 8, 9]);
    const row = random.floats(8);
    assert.equal(sequence.append(0, row, row).start, 10);
  });
});

test("rows that are not whole are refused: 13 floats of rows of 8, 16 keys beside 8 values", () => {
  withSequence({ ...FLOATS, blockSize: 2, tail: { tokens: 2 }, store: "f16" }, (sequence, _cache, random) => {
    extend(sequence, random, 5);
    const thirteen = random.floats(13);
    const whole = /must be equally long, a multiple of 8 elements: k has 13, v has 13$/;
    assertRefused(sequence, "invalid_size", () => sequence.append(0, thirteen, thirteen), whole);
    assertRefused(sequence, "invalid_size", () => sequence.append(0, random.floats(16), random.floats(8)), /v has 8$/);
  });
});

test("every block of every format is counted: taken, given back, in use", () => {
  const { maxSeqLen: _, ...shape } = QUANTIZED;
  using pool = new BlockPool(shape);
  withSequence({ ...QUANTIZED, pool, tail: { tokens: 64 }, store: "q4_0" }, (sequence, cache, random) => {
    for (let row = 0; row < 300; row++) extend(sequence, random, 1);
    const taken = (format: KvFormat) => {
      const { hits, misses, returns, usedBlocks, peakBlocks } = pool.stats(format);
      return { taken: hits + misses, returns, usedBlocks, peakBlocks };
    };
    assert.deepEqual(taken("f32"), { taken: 5, returns: 3, usedBlocks: 2, peakBlocks: 2 });
    assert.deepEqual(taken("q4_0"), { taken: 3, returns: 0, usedBlocks: 3, peakBlocks: 3 });
    const copy = { k: new Float32Array(300 * 64), v: new Float32Array(300 * 64) };
    sequence.gather(0, { into: copy });
    assert.deepEqual(taken("f32").taken, 5); // a copy takes none
    cache.reset();
    assert.deepEqual([taken("f32").returns, taken("q4_0").returns], [5, 3]);
  });
});

test("128 rows of 1024 elements make a block of 1 MiB, and one byte less is too little for it", () => {
  const shape = { layerCount: 1, kvHeadCount: 8, headDim: 128, blockSize: 128, maxSeqLen: 1024, dtype: "f32" } as const;
  withSequence({ ...shape, maxBytes: 2 ** 20 }, (sequence, cache, random) => {
    extend(sequence, random, 128);
    assert.deepEqual([cache.poolStats().blockBytes, cache.stats().usedBytes], [2 ** 20, 2 ** 20]);
  });
  assertCode("block_too_large", () => new PagedCache({ ...shape, maxBytes: 2 ** 20 - 1 }));
});

test("twenty rows in blocks of 16 stay twenty", () => {
  withSequence({ ...FLOATS, blockSize: 16, retention: { keep: "newest", tokens: 20 } }, (sequence, cache, random) => {
    for (let row = 1; row <= 100; row++) {
      extend(sequence, random, 1);
      assert.equal(cache.stats().totalTokens, Math.min(row, 20));
      assert.ok(cache.stats().blockCount <= 4); // as many as 20 and 16 to be rewound can lie in
    }
  });
});

test("letting old rows of a long store go moves no row", () => {
  const retention = { keep: "newest", tokens: 1000 } as const;
  withSequence({ ...QUANTIZED, tail: { tokens: 64 }, store: "i8", retention }, (sequence, cache, random) => {
    extend(sequence, random, 1000);
    const blocks = [...sequence.blockTable(0)], before = bytesOf(sequence);
    const arrays = new Map(sequence.views(0).map(({ start, k }) => [start - start % 64, k!]));
    const { hits, misses } = cache.poolStats(0, "i8");
    extend(sequence, random, 190);
    assert.deepEqual(sequence.blockTiers(0).slice(0, 3), [null, null, "store"]);
    assert.deepEqual([...sequence.blockTable(0).subarray(3, 14)], blocks.slice(3, 14));
    assert.ok(range(3, 14).every((i) => arrays.get(i * 64)!.length > 0)); // still the same memory
    const after = bytesOf(sequence);
    for (const i of range(3, 14)) assert.deepEqual(after.get(i * 64), before.get(i * 64));
    const now = cache.poolStats(0, "i8");
    assert.equal(now.hits + now.misses - hits - misses, 3); // those that migrated meanwhile
  });
});

test("an old row weighs as much as a new one", () => {
  withSequence({ ...QUANTIZED, store: "q8_0" }, (sequence) => {
    const n = 200, k = new Float32Array(n * 64).fill(1);
    const v = Float32Array.from(k, (_, i) => Math.floor(i / 64)); // the position
    sequence.append(0, k, v);
    sequence.commit(n);
    const output = sequence.attend(0, new Float32Array(64).fill(1));
    assert.ok(output.every((value) => Math.abs(value - (n - 1) / 2) < 0.1), `${output[0]}`);
  });
});

// Pools.

test("a pool has blocks of every format of its caches, and counts them apart", () => {
  const { maxSeqLen: _, ...shape } = QUANTIZED;
  using pool = new BlockPool(shape);
  pool.prewarm(2);
  pool.prewarm(3, "q4_0");
  assert.deepEqual([pool.stats().prewarmed, pool.stats(Q4).prewarmed, pool.stats("i4").prewarmed], [2, 3, 0]);
  assert.deepEqual([pool.stats("f32").blockBytes, pool.stats("q4_0").blockBytes], [64 * 512, 64 * 72]);
  const options = { ...QUANTIZED, pool, tail: { tokens: 64 } };
  using one = new PagedCache({ ...options, store: Q4 });
  using two = new PagedCache({ ...options, store: { k: "i4", v: "q8_0" } });
  const random = new Random(3);
  const sequences = [one.sequence(), two.sequence()];
  for (const sequence of sequences) extend(sequence, random, 300);
  assert.deepEqual([pool.stats().usedBlocks, pool.stats(Q4).usedBlocks], [4, 3]);
  assert.equal(pool.stats({ k: "i4", v: "q8_0" }).usedBlocks, 3);
  assert.deepEqual(two.poolStats(0, Q4), pool.stats(Q4));
  for (const sequence of sequences) assertAttends(sequence, random);
  // The bytes of one cache's rows, and the rest of what is in use in the formats it knows: the other cache's tail.
  const { tailBytes, storeBytes, slackBytes, usedBytes } = one.stats();
  assert.deepEqual([tailBytes, storeBytes], [108 * 512, 192 * 72]);
  assert.deepEqual([usedBytes, slackBytes], [4 * 32_768 + 3 * 4608, 20 * 512 + 2 * 32_768]);
  one.free();
  assert.deepEqual([pool.stats().usedBlocks, pool.stats(Q4).usedBlocks], [2, 0]);
  assert.equal(pool.stats(Q4).returns, 3);
});

test("a format that the blocks of a pool cannot have is refused", () => {
  using small = new BlockPool({ layerCount: 1, kvHeadCount: 2, headDim: 32, blockSize: 16 });
  using odd = new BlockPool({ layerCount: 1, kvHeadCount: 2, headDim: 48 });
  assertCode(
    "invalid_config",
    () => small.stats("q8_0"),
    /^Cannot count .* format.k q8_0 needs a blockSize of .* is 16$/,
  );
  assertCode("invalid_config", () => odd.prewarm(1, { k: "f16", v: "i4" }), /^Cannot prewarm .* headDim .* is 48$/);
  assert.equal(odd.stats("bf16").usedBlocks, 0);
  using cache = new PagedCache({ layerCount: 1, kvHeadCount: 2, headDim: 48, maxSeqLen: 64 });
  assertCode(
    "invalid_config",
    () => cache.poolStats(0, "i8"),
    /^Cannot count the blocks of layer 0 as format.k i8 needs/,
  );
  for (const wrong of ["q5_0", { k: "f16", v: "" }]) {
    assertCode("invalid_config", () => odd.stats(wrong as KvFormat));
    assertCode("invalid_config", () => cache.poolStats(0, wrong as KvFormat));
  }
  for (const wrong of [null, 3, {}, [], { k: "f16" }]) {
    assert.throws(() => odd.stats(wrong as unknown as KvFormat), TypeError);
    assert.throws(() => odd.prewarm(1, wrong as unknown as KvFormat), TypeError);
    assert.throws(() => cache.poolStats(0, wrong as unknown as KvFormat), TypeError);
  }
});

test("pool_empty in the middle of an append of many blocks changes nothing, with quantized rows before", () => {
  withSequence(
    { ...QUANTIZED, maxSeqLen: 2 ** 15, maxBytes: 12 * 2 ** 20, store: "q4_0" },
    (sequence, cache, random) => {
      extend(sequence, random, 200);
      const stats = () => {
        // Tables may have been given room.
        const { metadataBytes: _, ...others } = cache.stats();
        return [others, cache.poolStats().usedBlocks, cache.poolStats(0, "q4_0"), bytesOf(sequence)];
      };
      const before = stats();
      const rows = new Float32Array(30_000 * 64); // 469 blocks of 32,768 bytes
      assertRefused(sequence, "pool_empty", () => sequence.append(0, rows, rows));
      assert.deepEqual(stats(), before);
      extend(sequence, random, 100);
      assertAttends(sequence, random);
    },
  );
});

test("all memory goes back, of every format", () => {
  const before = systemInfo().reservedBytes;
  const cache = new PagedCache({ ...QUANTIZED, tail: { tokens: 64 }, store: { k: "q8_0", v: "i2" } });
  const random = new Random(2);
  const sequence = cache.sequence();
  extend(sequence, random, 500);
  const policies: Policy[] = [{ kind: "store-only", store: "i4" }, { kind: "tail-only" }];
  for (const policy of policies) {
    cache.updatePolicy(policy);
    extend(sequence, random, 300);
  }
  const { usedBytes, reservedBytes } = cache.stats();
  assert.ok(reservedBytes >= usedBytes);
  assert.equal(systemInfo().reservedBytes, before + reservedBytes);
  sequence.truncate(0);
  assert.equal(cache.stats().usedBytes, 0);
  cache.free();
  assert.equal(systemInfo().reservedBytes, before);
});
