/** Rewinding where old rows are given up: what is seen after a truncate, what is refused, and queries that come too late. */

import assert from "node:assert/strict";
import { test } from "node:test";
import {
  type AttendOptions,
  ContiguousCache,
  KvError,
  PagedCache,
  type PagedCacheOptions,
  type Sequence,
} from "../mod.ts";
import { assertCode } from "./cache_cases.ts";

const PLAIN = { layerCount: 1, kvHeadCount: 1, headDim: 1, maxSeqLen: 4096, blockSize: 4, dtype: "f32" } as const;
const WINDOWED = { ...PLAIN, windowTokens: 16 } as const;

/** Commits `n` rows in every layer, some at a time: keys 0, and each value its position. */
function grow(sequence: Sequence, n: number, most = 1): void {
  while (n > 0) {
    const rows = Math.min(n, most), first = sequence.seqLen;
    for (let layer = 0; layer < sequence.layerCount; layer++) append(sequence, layer, first, rows);
    sequence.commit(rows);
    n -= rows;
  }
}

function append(sequence: Sequence, layer: number, first: number, n = 1): void {
  sequence.append(layer, new Float32Array(n), Float32Array.from({ length: n }, (_, i) => first + i));
}

/** The positions of the rows that a layer shows. */
function shown(sequence: Sequence, layer = 0): number[] {
  return [...sequence.gather(layer).v];
}

function range(first: number, end: number): number[] {
  return Array.from({ length: end - first }, (_, i) => first + i);
}

/** What `queryCount` queries get: the mean of the rows each of them sees, as all keys are 0. */
function means(sequence: Pick<Sequence, "attend">, queryCount: number, options: AttendOptions = {}): Float32Array {
  return sequence.attend(0, new Float32Array(queryCount).fill(1), { queryCount, ...options });
}

/** All that a refused call must leave alone. */
function snapshot(sequence: Sequence): unknown {
  const { seqLen, rewindableTo, layerCount } = sequence;
  return [
    seqLen,
    rewindableTo,
    range(0, layerCount).map((layer) => [shown(sequence, layer), sequence.blockTable(layer)]),
  ];
}

/** The truncate must be refused, with a text that names the values, and change nothing. */
function assertTooFar(sequence: Sequence, n: number): void {
  const before = snapshot(sequence);
  const { rewindableTo, seqLen } = sequence;
  const text = `Cannot truncate to ${n} token${n === 1 ? "" : "s"} as rows there were evicted: ` +
    `rewindableTo is ${rewindableTo}, current length is ${seqLen}`;
  assert.throws(() => sequence.truncate(n), (error: KvError) => {
    assert.deepEqual([error.code, error.message], ["position_out_of_range", text]);
    return true;
  });
  assert.deepEqual(snapshot(sequence), before);
}

/** The attend must be refused, name query and row, and write nothing. */
function assertTooLate(sequence: Sequence, queryCount: number, options: AttendOptions, text: string): void {
  const into = new Float32Array(queryCount).fill(9), lse = new Float32Array(queryCount).fill(9);
  assert.throws(() => means(sequence, queryCount, { ...options, into, lse }), (error: KvError) => {
    const rule = "no row that a query sees may have been evicted";
    assert.deepEqual(
      [error.code, error.message],
      ["position_out_of_range", `Cannot attend in layer 0 as ${rule}: ${text}`],
    );
    return true;
  });
  assert.deepEqual([into, lse], [new Float32Array(queryCount).fill(9), new Float32Array(queryCount).fill(9)]);
}

test("a window of 16 is whole after a rewind by 5, or the rewind is refused", () => {
  for (const most of [1, 7, 100]) {
    using byDefault = new PagedCache(WINDOWED);
    assert.equal(byDefault.rewindTokens, 4);
    const one = byDefault.sequence();
    grow(one, 100, most);
    assert.equal(one.rewindableTo, 96);
    assertTooFar(one, 95);
    assert.equal(means(one, 1)[0], 91.5);
    one.truncate(96);
    assert.deepEqual(shown(one), range(80, 96));

    using cache = new PagedCache({ ...WINDOWED, rewindTokens: 5 });
    const sequence = cache.sequence();
    grow(sequence, 100, most);
    assert.equal(sequence.rewindableTo, 95);
    assertTooFar(sequence, 94);
    sequence.truncate(95);
    append(sequence, 0, 95);
    assert.equal(means(sequence, 1)[0], 87.5);
    sequence.commit(1);
    assert.equal(means(sequence, 1)[0], 87.5);
    assertTooFar(sequence, 94);
    sequence.truncate(0);
    assert.deepEqual([sequence.rewindableTo, sequence.seqLen], [0, 0]);
  }
});

test("rewindTokens is a count, and reads back, also where a cache is attached", () => {
  const make = (options: object) => new PagedCache({ ...WINDOWED, ...options } as PagedCacheOptions);
  for (const [options, expected] of [[{}, 4], [{ blockSize: 64 }, 64], [{ rewindTokens: 0 }, 0]] as const) {
    using cache = make(options);
    using attached = PagedCache.attach(cache.handle);
    assert.deepEqual([cache.rewindTokens, attached.rewindTokens], [expected, expected]);
  }
  using most = make({ rewindTokens: 2 ** 31 - 1 });
  const sequence = most.sequence();
  grow(sequence, 100);
  assert.deepEqual([most.rewindTokens, sequence.rewindableTo, shown(sequence)], [2 ** 31 - 1, 0, range(84, 100)]);
  sequence.truncate(20);
  assert.deepEqual(shown(sequence), range(4, 20));
  const rule = /^Cannot create a cache as rewindTokens must be at most 2147483647: rewindTokens is 2147483648$/;
  assertCode("invalid_config", () => make({ rewindTokens: 2 ** 31 }), rule);
  for (const value of [-1, 0.5, NaN, Infinity]) assert.throws(() => make({ rewindTokens: value }), RangeError);
  for (const value of ["4", null, 4n]) assert.throws(() => make({ rewindTokens: value }), TypeError);
});

test("sinks stay whatever is rewound, and a sequence that ends among them is as good as new", () => {
  using cache = new PagedCache({
    ...PLAIN,
    retention: { keep: "newest", tokens: 10, sinkTokens: 3 },
    rewindTokens: 6,
  });
  const sequence = cache.sequence();
  grow(sequence, 16);
  assert.equal(sequence.rewindableTo, 0); // rows 3 to 8 are not seen, and there
  grow(sequence, 34);
  assert.deepEqual([shown(sequence), sequence.rewindableTo], [[0, 1, 2, ...range(43, 50)], 44]);
  using fork = sequence.fork();
  for (const n of [44, 4]) {
    if (n === 44) sequence.truncate(44);
    else assertTooFar(sequence, n);
    assert.deepEqual([shown(sequence), sequence.rewindableTo], [[0, 1, 2, ...range(37, 44)], 44]);
  }
  for (const n of [3, 1, 0]) {
    using child = sequence.fork();
    child.truncate(n);
    assert.deepEqual([shown(child), child.rewindableTo], [range(0, n), 0]);
    grow(child, 20);
    assert.deepEqual(shown(child), [0, 1, 2, ...range(13 + n, 20 + n)]);
  }
  assert.deepEqual([shown(fork), fork.rewindableTo], [[0, 1, 2, ...range(43, 50)], 44]);
});

test("prefixes by fork and truncate, drafted tokens by truncate: as a sequence that was never longer", () => {
  const layers = [{ kvHeadCount: 1, headDim: 1, windowTokens: 7 }, { kvHeadCount: 1, headDim: 1 }];
  for (const rewindTokens of [0, 1, 8, 30]) {
    using cache = new PagedCache({ layers, maxSeqLen: 500, blockSize: 4, dtype: "f32", rewindTokens });
    const parent = cache.sequence(), plain = cache.sequence();
    for (let length = 60; length < 90; length++) {
      grow(parent, length - parent.seqLen);
      using child = parent.fork();
      const target = length - rewindTokens;
      assert.equal(child.rewindableTo, target);
      assertTooFar(child, target - 1);
      child.truncate(target);
      grow(plain, target - plain.seqLen);
      for (const layer of [0, 1]) {
        assert.deepEqual(child.gather(layer), plain.gather(layer));
        const views = (sequence: Sequence) =>
          sequence.views(layer).map(({ start, length, k, v }) => [start, length, k, v]);
        assert.deepEqual(views(child).map((view) => view.slice(0, 2)), views(plain).map((view) => view.slice(0, 2)));
        const q = Float32Array.of(0.5);
        assert.deepEqual(child.attend(layer, q), plain.attend(layer, q));
      }
    }
  }
});

test("rows that nobody sees count as blocks in use and nowhere else, and there are never many of them", () => {
  for (const rewindTokens of [0, 4, 30]) {
    using cache = new PagedCache({ ...WINDOWED, rewindTokens });
    const sequence = cache.sequence();
    const bound = Math.ceil((16 + rewindTokens) / 4) + 1;
    for (let length = 1; length <= 1500; length++) {
      grow(sequence, 1);
      assert.ok(cache.poolStats().usedBlocks <= bound);
      if (length % 100 === 50) sequence.truncate(sequence.rewindableTo);
    }
    const { totalTokens, tailTokens, tailBytes, tableEntries, blockCount, slackBytes, usedBytes } = cache.stats();
    assert.deepEqual([totalTokens, tailTokens, tailBytes], [16, 16, 16 * 8]);
    assert.equal(slackBytes, usedBytes - 16 * 8);
    const seen = [...sequence.blockTable(0)].filter((block) => block >= 0).length;
    const { seqLen } = sequence;
    const entries = (first: number) => Math.floor((seqLen - 1) / 4) - Math.floor(first / 4) + 1;
    assert.deepEqual([tableEntries, seen], [entries(seqLen - 16), entries(seqLen - 16)]);
    assert.equal(blockCount, entries(seqLen - 16 - rewindTokens));
    assert.deepEqual([...sequence.blockReferences(0)].filter((n) => n > 0), new Array(seen).fill(1));
    assert.equal(sequence.blockTiers(0).filter((tier) => tier !== null).length, seen);
    assert.equal(sequence.residentTokens(), 16);
    sequence.free();
    assert.equal(cache.stats().blockCount, 0);
  }
});

test("arrays of a block that goes out of sight end, and a rewind brings the block back with its rows", () => {
  using cache = new PagedCache({ ...WINDOWED, windowTokens: 4 });
  const sequence = cache.sequence();
  grow(sequence, 8);
  const [view] = sequence.views(0), array = view!.v!;
  assert.deepEqual([view!.start, [...array]], [4, range(4, 8)]);
  const { usedBlocks } = cache.poolStats();
  grow(sequence, 4);
  assert.equal(array.length, 0);
  assertCode("stale_view", () => view!.v);
  assert.equal(cache.poolStats().usedBlocks, usedBlocks); // it is still there
  sequence.truncate(8);
  assert.deepEqual(shown(sequence), range(4, 8));
  assert.deepEqual([...sequence.views(0)[0]!.v!], range(4, 8));
});

test("kept drafts, beams and a reset", () => {
  using cache = new PagedCache({ ...WINDOWED, windowTokens: 6, rewindTokens: 3 });
  const first = cache.sequence(), second = cache.sequence();
  grow(first, 20);
  for (const value of [100, 101, 102]) append(first, 0, value);
  first.commit(2, { kept: Uint32Array.of(0, 2) });
  assert.deepEqual([shown(first), first.rewindableTo], [[16, 17, 18, 19, 100, 102], 19]);
  cache.reorder([first, second], [0, 0]);
  for (const beam of [first, second]) {
    assertTooFar(beam, 18);
    beam.truncate(19);
    assert.deepEqual(shown(beam), range(13, 19));
  }
  cache.reset();
  assert.deepEqual([first.rewindableTo, second.seqLen], [0, 0]);
  grow(second, 9);
  assert.equal(second.rewindableTo, 0);
  grow(second, 1);
  assert.equal(second.rewindableTo, 7);
});

test("a prompt is attended before its commit; after it, queries whose rows were evicted are refused", () => {
  using cache = new PagedCache(WINDOWED);
  using flat = new ContiguousCache({ layerCount: 1, kvHeadCount: 1, headDim: 1, maxSeqLen: 400 });
  const sequence = cache.sequence(), whole = flat.sequence(0);
  assert.equal(whole.rewindableTo, 0);
  for (const total of [200, 400]) {
    append(sequence, 0, total - 200, 200);
    whole.append(0, new Float32Array(200), Float32Array.from(range(total - 200, total)));
    const truth = means(whole, 200, { windowTokens: 16 });
    assert.deepEqual(means(sequence, 200), truth);
    assert.deepEqual(means(sequence, 200, { windowTokens: 16 }), truth);
    sequence.commit(200);
    whole.commit(200);
    const first = `first row still seen is ${total - 16}`;
    assertTooLate(sequence, 200, {}, `query position is ${total - 200}, ${first}`);
    assertTooLate(sequence, 2, {}, `query position is ${total - 2}, ${first}`);
    assertTooLate(sequence, 2, { windowTokens: 16 }, `query position is ${total - 2}, ${first}`);
    assertTooLate(sequence, 2, { causal: false }, `query position is ${total - 2}, ${first}`);
    assertTooLate(sequence, 1, { sinkTokens: 1 }, `query position is ${total - 1}, ${first}, sinkTokens is 1`);
    assert.equal(means(sequence, 1)[0], truth[199]);
    assert.equal(means(sequence, 1, { causal: false })[0], truth[199]);
    // A window of the call's own is narrower, and there for older queries, too.
    assert.deepEqual(means(sequence, 5, { windowTokens: 12 }), means(whole, 5, { windowTokens: 12 }));
    assertTooLate(sequence, 6, { windowTokens: 12 }, `query position is ${total - 6}, ${first}`);
    // All rows of a contiguous cache stay.
    assert.deepEqual(means(whole, 200, { windowTokens: 16 }), truth);
  }
});

test("what retention hides by rule stays masked", () => {
  const retention = { keep: "newest", tokens: 11, sinkTokens: 3 } as const;
  using cache = new PagedCache({ ...PLAIN, retention });
  const sequence = cache.sequence();
  grow(sequence, 50);
  const mean = Math.fround((0 + 1 + 2 + 8 * 45.5) / 11);
  const near = (actual: number) => assert.ok(Math.abs(actual - mean) < 1e-4, `${actual}, not ${mean}`);
  near(means(sequence, 1)[0]!);
  for (const value of means(sequence, 60, { causal: false })) near(value);
  const seen = "first row still seen beside the first 3 is 42";
  assertTooLate(sequence, 2, {}, `query position is 48, ${seen}`);
  assertTooLate(sequence, 2, { treeParents: Int32Array.of(-1, 0) }, `query position is 48, ${seen}`);
  assertTooLate(sequence, 60, {}, `query position is 3, ${seen}`);
  assert.deepEqual(means(sequence, 5, { windowTokens: 4 }), Float32Array.of(43.5, 44.5, 45.5, 46.5, 47.5));
  assertTooLate(sequence, 6, { windowTokens: 4 }, `query position is 44, ${seen}`);
  near(means(sequence, 1, { windowTokens: 20, sinkTokens: 20 })[0]!);
  // Pending rows push nothing out.
  append(sequence, 0, 50, 2);
  assert.ok(Math.abs(means(sequence, 2)[1]! - (3 + 8 * 45.5 + 50 + 51) / 13) < 1e-4);
  assert.equal(means(sequence, 2, { treeParents: Int32Array.of(-1, -1) }).length, 2);
});

test("a batch is refused as a whole, and the text names the sequence", () => {
  using cache = new PagedCache(WINDOWED);
  const sequences = [10, 100, 100].map((n) => {
    const sequence = cache.sequence();
    grow(sequence, n, n);
    return sequence;
  });
  const attend = (queryCounts: number[], options: AttendOptions = {}) => {
    const n = queryCounts.reduce((sum, count) => sum + count, 0);
    const into = new Float32Array(n).fill(9);
    return cache.attend(0, new Float32Array(n).fill(1), { ...options, into, sequences, queryCounts });
  };
  assert.deepEqual(attend([10, 1, 0]).length, 11);
  const text = /^Cannot attend in layer 0 as .*: query position is 98, first row still seen is 84, sequence is 2$/;
  assertCode("position_out_of_range", () => attend([10, 1, 2]), text);
  assertCode("position_out_of_range", () => attend([10, 0, 1], { sinkTokens: 1 }), /position is 99, .* sequence is 2$/);
  assertCode(
    "position_out_of_range",
    () => attend([10, 3, 2], { windowTokens: 15 }),
    /position is 97, .* sequence is 1$/,
  );
  assert.equal(attend([10, 2, 2], { windowTokens: 15 }).length, 14);
  assert.equal(attend([10, 1, 1], { causal: false }).length, 12);
  assertCode("position_out_of_range", () => attend([10, 1, 2], { causal: false }), /position is 98, .* sequence is 2$/);
});
