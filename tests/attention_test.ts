/** attend() of a contiguous sequence against the f64 oracle: every option, every dtype, short and long. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { type AttendOptions, ContiguousCache, type FloatDType, type KvCache, KvError } from "../mod.ts";
import { attention, type AttentionCase, Random, relativeError, storedRows } from "./oracle.ts";

/** A cache with one sequence of random rows, and what the oracle needs to know of them. */
interface Setup {
  readonly sequence: KvCache;
  readonly q: Float32Array;
  readonly truth: Omit<AttentionCase, "queryCount">;
}

interface Geometry {
  readonly n: number;
  readonly qHeadCount?: number;
  readonly kvHeadCount?: number;
  readonly headDim?: number;
  readonly dtype?: FloatDType;
  readonly queryCount?: number;
  /** Size of the elements of q and k; scores grow with it. */
  readonly scale?: number;
}

function withRows(geometry: Geometry, body: (setup: Setup) => void): void {
  const { n, qHeadCount = 4, kvHeadCount = 2, headDim = 64, dtype = "f32", queryCount = 1, scale = 1 } = geometry;
  using cache = new ContiguousCache({ layerCount: 1, kvHeadCount, headDim, maxSeqLen: Math.max(n, 1), dtype });
  const random = new Random(n * 131 + headDim);
  const k = random.floats(n * kvHeadCount * headDim, scale), v = random.floats(n * kvHeadCount * headDim);
  const q = random.floats(queryCount * qHeadCount * headDim, scale);
  const sequence = cache.sequence(0);
  sequence.append(0, k, v);
  const rows = { k: storedRows(k, dtype), v: storedRows(v, dtype) };
  body({ sequence, q, truth: { q, ...rows, qHeadCount, kvHeadCount, headDim } });
}

/** attend() must agree with the oracle; `bound` is for the output, and the lse is held to a tenth of a millionth more. */
function assertAttends({ sequence, q, truth }: Setup, options: AttendOptions = {}, bound = 1e-5): void {
  const { queryCount = 1 } = options;
  const lse = new Float32Array(queryCount * truth.qHeadCount);
  const output = sequence.attend(0, q, { ...options, lse });
  const expected = attention({ ...truth, ...options, queryCount });
  const error = relativeError(output, expected.output);
  assert.ok(error <= bound, `output is off by ${error}`);
  expected.lse.forEach((value, i) => {
    if (value === -Infinity) assert.equal(lse[i], -Infinity);
    else assert.ok(Math.abs(lse[i]! - value) <= 1e-5 * Math.max(1, Math.abs(value)), `lse ${lse[i]} for ${value}`);
  });
}

for (const dtype of ["f32", "f16", "bf16"] as const) {
  for (const n of [1, 2, 15, 16, 17, 63, 64, 65, 100, 128, 2048]) {
    test(`one query over ${n} keys in ${dtype}`, () => {
      withRows({ n, dtype }, (setup) => assertAttends(setup));
    });
  }
}

for (const [qHeadCount, kvHeadCount] of [[1, 1], [8, 1], [3, 1], [32, 4], [8, 8], [14, 2], [20, 4], [40, 1]] as const) {
  test(`${qHeadCount} query heads share ${kvHeadCount} KV heads`, () => {
    withRows({ n: 100, qHeadCount, kvHeadCount, headDim: 32 }, (setup) => assertAttends(setup));
  });
}

for (const queryCount of [2, 7, 16, 33, 100]) {
  test(`${queryCount} causal queries over 100 keys`, () => {
    withRows({ n: 100, queryCount, headDim: 16 }, (setup) => assertAttends(setup, { queryCount }));
  });
}

test("queries that see every row", () => {
  withRows({ n: 70, queryCount: 5 }, (setup) => assertAttends(setup, { queryCount: 5, causal: false }));
});

test("more queries than rows: the first ones see none", () => {
  withRows({ n: 3, queryCount: 5, headDim: 8 }, (setup) => {
    assertAttends(setup, { queryCount: 5 });
    const lse = new Float32Array(5 * 4);
    const output = setup.sequence.attend(0, setup.q, { queryCount: 5, lse });
    assert.deepEqual(output.subarray(0, 2 * 4 * 8), new Float32Array(64));
    assert.deepEqual(lse.subarray(0, 8), new Float32Array(8).fill(-Infinity));
    assert.ok(lse.subarray(8).every(Number.isFinite));
    assertAttends(setup, { queryCount: 5, windowTokens: 2 });
    assertAttends(setup, { queryCount: 5, windowTokens: 1, sinkTokens: 1 });
  });
});

for (
  const [windowTokens, sinkTokens] of [[1, 0], [2, 0], [16, 0], [17, 4], [64, 1], [99, 0], [100, 0], [1000, 5]] as const
) {
  test(`a window of ${windowTokens} rows and ${sinkTokens} sinks`, () => {
    withRows({ n: 100, queryCount: 3 }, (setup) => {
      assertAttends(setup, { queryCount: 3, windowTokens, sinkTokens });
    });
  });
}

test("sinks that overlap the window are counted once", () => {
  withRows({ n: 20, queryCount: 20 }, (setup) => {
    for (const sinkTokens of [0, 1, 5, 19, 20, 100]) {
      assertAttends(setup, { queryCount: 20, windowTokens: 7, sinkTokens });
    }
  });
});

test("rows outside the window have no influence at all", () => {
  using cache = new ContiguousCache({ layerCount: 1, kvHeadCount: 1, headDim: 8, maxSeqLen: 64, sequenceCount: 2 });
  const random = new Random(5);
  const shared = random.floats(10 * 8), q = random.floats(8);
  for (const sequence of [0, 1]) {
    cache.append(0, sequence, shared.subarray(0, 8), shared.subarray(0, 8));
    const hidden = random.floats(30 * 8, 1e30); // would drown all the rest
    cache.append(0, sequence, hidden, hidden);
    cache.append(0, sequence, shared.subarray(8), shared.subarray(8));
  }
  const options = { windowTokens: 9, sinkTokens: 1 };
  const first = cache.sequence(0).attend(0, q, options);
  assert.deepEqual(first, cache.sequence(1).attend(0, q, options));
  assert.ok(first.every((value) => Math.abs(value) <= 1));
});

test("softmaxScale", () => {
  withRows({ n: 65 }, (setup) => {
    for (const softmaxScale of [1, 0.01, 0, -0.5]) assertAttends(setup, { softmaxScale });
  });
});

test("softcap", () => {
  withRows({ n: 65, scale: 4 }, (setup) => {
    for (const softcap of [0.1, 1, 30, 1e6]) assertAttends(setup, { softcap });
    assertAttends(setup, { softcap: 5, softmaxScale: 1 });
  });
});

test("ALiBi, for one query and for several", () => {
  const alibiSlopes = Float32Array.of(0.5, 0.25, 0.0625, 0);
  withRows({ n: 100 }, (setup) => assertAttends(setup, { alibiSlopes }));
  withRows({ n: 100, queryCount: 9 }, (setup) => {
    assertAttends(setup, { queryCount: 9, alibiSlopes });
    assertAttends(setup, { queryCount: 9, alibiSlopes, causal: false });
    assertAttends(setup, { queryCount: 9, alibiSlopes, windowTokens: 12, sinkTokens: 3 });
  });
});

test("sink logits join the denominator and the lse", () => {
  const sinkLogits = Float32Array.of(-3, 0, 2, 50);
  withRows({ n: 40, queryCount: 2 }, (setup) => assertAttends(setup, { queryCount: 2, sinkLogits }));
  withRows({ n: 0 }, ({ sequence, q }) => {
    const lse = new Float32Array(4);
    assert.deepEqual(sequence.attend(0, q, { sinkLogits, lse }), new Float32Array(4 * 64));
    assert.deepEqual(lse, sinkLogits);
  });
});

test("a tree of drafted tokens: each sees the rows before the tree, its ancestors and itself", () => {
  const trees = [[-1], [-1, 0, 1, 2], [-1, 0, 0, 1, 1, 2, 4], [-1, -1, 0, -7, 3], new Array<number>(64).fill(-1)];
  for (const parents of trees) {
    const treeParents = Int32Array.from(parents);
    const queryCount = parents.length;
    for (const n of [queryCount, 100]) {
      withRows({ n, queryCount, headDim: 16 }, (setup) => {
        assertAttends(setup, { queryCount, treeParents });
        const sinkLogits = Float32Array.of(1, -1, 0.5, 0);
        assertAttends(setup, { queryCount, treeParents, softcap: 2, sinkLogits });
      });
    }
  }
});

test("a chain is what plain causal attention is, and rows of other branches have no influence at all", () => {
  withRows({ n: 40, queryCount: 5 }, ({ sequence, q }) => {
    const treeParents = Int32Array.of(-1, 0, 1, 2, 3);
    const chain = sequence.attend(0, q, { queryCount: 5, treeParents });
    assert.ok(relativeError(chain, sequence.attend(0, q, { queryCount: 5 })) <= 1e-6);
  });
  using cache = new ContiguousCache({ layerCount: 1, kvHeadCount: 1, headDim: 8, maxSeqLen: 16, sequenceCount: 2 });
  const random = new Random(6);
  const shared = random.floats(3 * 8), tail = random.floats(8), q = random.floats(3 * 8);
  for (const sequence of [0, 1]) {
    cache.append(0, sequence, shared, shared);
    const hidden = random.floats(8, 1e30);
    cache.append(0, sequence, hidden, hidden);
    cache.append(0, sequence, tail, tail);
  }
  // Rows 2, 3, 4 are the tree: 3 and 4 are children of 2, and do not see each other.
  const options = { queryCount: 3, treeParents: Int32Array.of(-1, 0, 0) };
  const last = [0, 1].map((i) => cache.sequence(i).attend(0, q, options).subarray(16));
  assert.deepEqual(last[0], last[1]);
});

test("a tree that is none is refused, and nothing is written", () => {
  withRows({ n: 70, queryCount: 3, headDim: 8 }, ({ sequence, q }) => {
    const into = new Float32Array(q.length).fill(9);
    const refused = (code: string, parents: number[], options: AttendOptions = {}) => {
      const given = { queryCount: 3, into, treeParents: Int32Array.from(parents), ...options };
      assert.throws(
        () => sequence.attend(0, q, given),
        (error: unknown) => error instanceof KvError && error.code === code,
      );
    };
    refused("invalid_size", [-1, 0]);
    refused("invalid_size", [-1, 0, 1, 2]);
    refused("invalid_size", []);
    refused("invalid_config", [-1, 1, 0]);
    refused("invalid_config", [0, 0, 0]);
    refused("invalid_config", [-1, 2 ** 31 - 1, 0]);
    refused("invalid_config", [-1, 0, 1], { causal: false });
    refused("unsupported", [-1, 0, 1], { windowTokens: 2 });
    refused("unsupported", [-1, 0, 1], { alibiSlopes: new Float32Array(4) });
    const wrong = [-1, 0, 1] as unknown as Int32Array;
    assert.throws(() => sequence.attend(0, q, { queryCount: 3, into, treeParents: wrong }), TypeError);
    const detached = Int32Array.of(-1, 0, 1);
    detached.buffer.transfer();
    assert.throws(() => sequence.attend(0, q, { queryCount: 3, into, treeParents: detached }), TypeError);
    assert.deepEqual(into, new Float32Array(q.length).fill(9));
  });
  withRows({ n: 70, queryCount: 65, headDim: 8 }, ({ sequence, q }) => {
    const treeParents = new Int32Array(65).fill(-1);
    assert.throws(() => sequence.attend(0, q, { queryCount: 65, treeParents }), KvError);
  });
  withRows({ n: 2, queryCount: 3, headDim: 8 }, ({ sequence, q }) => {
    const treeParents = Int32Array.of(-1, 0, 1);
    assert.throws(() => sequence.attend(0, q, { queryCount: 3, treeParents }), KvError);
  });
});

test("all options at once", () => {
  const options = {
    queryCount: 6,
    softmaxScale: 0.2,
    softcap: 3,
    windowTokens: 33,
    sinkTokens: 4,
    alibiSlopes: Float32Array.of(0.1, 0.2, 0.3, 0.4),
    sinkLogits: Float32Array.of(1, -1, 0.5, 0),
  };
  for (const dtype of ["f32", "f16", "bf16"] as const) {
    withRows({ n: 130, queryCount: 6, headDim: 33, dtype }, (setup) => assertAttends(setup, options));
  }
});

test("scores of +-1e4 neither overflow nor vanish", () => {
  using cache = new ContiguousCache({ layerCount: 1, kvHeadCount: 1, headDim: 4, maxSeqLen: 128 });
  const n = 128;
  const k = new Float32Array(n * 4), v = new Random(2).floats(n * 4);
  for (let row = 0; row < n; row++) k[row * 4] = (row % 2 === 0 ? 1 : -1) * (1e4 - row / 16);
  cache.append(0, 0, k, v);
  for (const direction of [1, -1]) {
    const q = Float32Array.of(direction, 0, 0, 0);
    const lse = new Float32Array(1);
    const output = cache.sequence(0).attend(0, q, { softmaxScale: 1, lse });
    const expected = attention({ q, k, v, queryCount: 1, qHeadCount: 1, kvHeadCount: 1, headDim: 4, softmaxScale: 1 });
    assert.ok(relativeError(output, expected.output) <= 1e-5);
    assert.ok(relativeError(lse, expected.lse) <= 1e-6);
  }
});

test("a growing maximum rescales output and sum alike (100 keys, truth 0.47 to 0.52)", () => {
  const n = 100, headDim = 64;
  const wave = (factor: number) => Float32Array.from({ length: n * headDim }, (_, i) => ((factor * i) % 100) * 0.01);
  const q = wave(1).subarray(0, headDim), k = wave(7), v = wave(13);
  using cache = new ContiguousCache({ layerCount: 1, kvHeadCount: 1, headDim, maxSeqLen: n });
  cache.append(0, 0, k, v);
  const output = cache.sequence(0).attend(0, q);
  const truth = attention({ q, k, v, queryCount: 1, qHeadCount: 1, kvHeadCount: 1, headDim });
  assert.ok(relativeError(output, truth.output) <= 1e-5);
  assert.ok(output.every((value) => value > 0.46 && value < 0.53), `${Math.min(...output)} to ${Math.max(...output)}`);
  const rising = k.map((_, i) => Math.floor(i / headDim) * 0.2);
  cache.reset();
  cache.append(0, 0, rising, v);
  const risen = attention({ q, k: rising, v, queryCount: 1, qHeadCount: 1, kvHeadCount: 1, headDim });
  assert.ok(relativeError(cache.sequence(0).attend(0, q), risen.output) <= 1e-5);
});

test("into and lse are filled and into is returned, longer ones keep their ends", () => {
  withRows({ n: 10, queryCount: 2, headDim: 8 }, ({ sequence, q }) => {
    const fresh = sequence.attend(0, q, { queryCount: 2 });
    const into = new Float32Array(q.length + 3).fill(7), lse = new Float32Array(8 + 2).fill(7);
    assert.equal(sequence.attend(0, q, { queryCount: 2, into, lse }), into);
    assert.deepEqual(into.subarray(0, q.length), fresh);
    assert.deepEqual([...into.subarray(q.length)], [7, 7, 7]);
    assert.deepEqual([...lse.subarray(8)], [7, 7]);
    assert.ok(lse.subarray(0, 8).every((value) => value !== 7));
    assert.equal(sequence.attend(0, q, { queryCount: 2, into: q }), q);
    assert.deepEqual(q, fresh);
  });
});

test("with into and lse no array is made", () => {
  withRows({ n: 10, headDim: 8 }, ({ sequence, q }) => {
    const options = { into: new Float32Array(q.length), lse: new Float32Array(4) };
    const kinds = ["Float32Array", "Uint32Array", "ArrayBuffer"] as const;
    const originals = kinds.map((kind) => globalThis[kind]);
    const forbid = { construct: () => assert.fail("an array was made") };
    try {
      kinds.forEach((kind, i) => Object.assign(globalThis, { [kind]: new Proxy(originals[i]!, forbid) }));
      assert.equal(sequence.attend(0, q, options), options.into);
      assert.throws(() => sequence.attend(0, q), /an array was made/);
    } finally {
      kinds.forEach((kind, i) => Object.assign(globalThis, { [kind]: originals[i] }));
    }
  });
});

test("equal rows give equal bits: in one append or many, alone or beside other sequences", () => {
  const random = new Random(9);
  const geometry = { layerCount: 2, kvHeadCount: 2, headDim: 80, maxSeqLen: 300, dtype: "f16" } as const;
  using one = new ContiguousCache(geometry);
  using many = new ContiguousCache({ ...geometry, maxSeqLen: 777, sequenceCount: 5 });
  const k = random.floats(300 * 160), v = random.floats(300 * 160), q = random.floats(3 * 8 * 80);
  one.append(1, 0, k, v);
  for (let row = 0; row < 300; row += 7) {
    const end = Math.min(300, row + 7) * 160;
    many.append(1, 3, k.subarray(row * 160, end), v.subarray(row * 160, end));
  }
  for (const queryCount of [1, 3]) {
    const queries = q.subarray(0, queryCount * 640);
    const expected = one.sequence(0).attend(1, queries, { queryCount });
    assert.deepEqual(many.sequence(3).attend(1, queries, { queryCount }), expected);
  }
});

test("decode gives what a causal prefill gives", () => {
  const random = new Random(10);
  const geometry = { layerCount: 1, kvHeadCount: 2, headDim: 64, maxSeqLen: 100 };
  using prefill = new ContiguousCache(geometry);
  using decode = new ContiguousCache(geometry);
  const k = random.floats(100 * 128), v = random.floats(100 * 128), q = random.floats(100 * 256);
  prefill.append(0, 0, k, v);
  const all = prefill.sequence(0).attend(0, q, { queryCount: 100 });
  const sequence = decode.sequence(0);
  for (let row = 0; row < 100; row++) {
    sequence.append(0, k.subarray(row * 128, row * 128 + 128), v.subarray(row * 128, row * 128 + 128));
    const step = sequence.attend(0, q.subarray(row * 256, row * 256 + 256));
    assert.ok(relativeError(step, all.subarray(row * 256, row * 256 + 256)) <= 1e-6);
    sequence.commit(1);
  }
});
