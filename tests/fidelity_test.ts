/**
 * Fidelity: what a cache says migration did to its rows, and policies that act on it.
 *
 * Reports are compared with errors computed here, in f64, from the rows that were given and those that `gather` gives
 * back. Scores are measured one at a time: over a single visible row the lse of attend is the score.
 */

import assert from "node:assert/strict";
import { test } from "node:test";
import {
  type DType,
  type HeadFidelity,
  PagedCache,
  type PagedCacheOptions,
  type Policy,
  type Sequence,
  type SideFidelity,
} from "../mod.ts";
import { assertCode } from "./cache_cases.ts";
import { Random, storedRows } from "./oracle.ts";

/** One layer of 2 KV heads of 128, all of whose full blocks are quantized, and compared. */
const SHAPE = {
  layerCount: 1,
  kvHeadCount: 2,
  headDim: 128,
  maxSeqLen: 1024,
  dtype: "f32",
  store: "q4_0",
  measureFidelity: true,
} as const satisfies PagedCacheOptions;

/** What a head says before anything has migrated. */
const NOTHING: SideFidelity = { rows: 0, cosineMean: 1, cosineMin: 1, errorMax: 0 };

/** What lies in a row. */
type RowShape = Pick<Sequence, "kvDim" | "headDim">;

/** Rows of K or V, `[token][kv_head][head_dim]`. */
type SideRows = Float32Array;

/** `n` rows in [-1, 1) of which four channels of each head of `heads` are at 12 or at -12. */
function outliers(random: Random, n: number, heads: readonly number[] = [0, 1]): SideRows {
  const rows = random.floats(n * 256);
  for (const head of heads) {
    for (const [i, channel] of [3, 40, 77, 111].entries()) {
      for (let t = 0; t < n; t++) rows[(t * 2 + head) * 128 + channel]! += i % 2 === 0 ? 12 : -12;
    }
  }
  return rows;
}

/** Appends the same rows to every layer, or those of each, as keys, and plain ones as values; commits them. */
function extend(sequence: Sequence, random: Random, ...keys: SideRows[]): void {
  const n = keys[0]!.length / 256;
  for (let layer = 0; layer < sequence.layerCount; layer++) {
    const k = keys[layer % keys.length]!;
    sequence.append(layer, k, random.floats(k.length));
  }
  sequence.commit(n);
}

function dot(a: ArrayLike<number>, b: ArrayLike<number>): number {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i]! * b[i]!;
  return sum;
}

function norm(a: ArrayLike<number>): number {
  return Math.sqrt(dot(a, a));
}

/** The first `n` rows of one head before and after. */
function compare(before: SideRows, after: SideRows, n: number, head: number, shape: RowShape): SideFidelity {
  const { kvDim, headDim } = shape;
  const cosines: number[] = [], errors: number[] = [];
  for (let t = 0; t < n; t++) {
    const at = t * kvDim + head * headDim;
    const x = Float64Array.from(before.subarray(at, at + headDim)), y = after.subarray(at, at + headDim);
    cosines.push(dot(x, y) / (norm(x) * norm(y)));
    errors.push(norm(x.map((value, i) => value - y[i]!)));
  }
  return {
    rows: n,
    cosineMean: cosines.reduce((sum, cosine) => sum + cosine, 0) / n,
    cosineMin: Math.min(...cosines),
    errorMax: Math.max(...errors),
  };
}

/** Sums of at most a few hundred f64 may differ in their order only. */
function assertSide(actual: SideFidelity, expected: SideFidelity, text: string): void {
  assert.equal(actual.rows, expected.rows, text);
  for (const name of ["cosineMean", "cosineMin", "errorMax"] as const) {
    const difference = Math.abs(actual[name] - expected[name]);
    assert.ok(difference <= 1e-12 * (1 + expected[name]), `${text}: ${name} ${actual[name]}, not ${expected[name]}`);
  }
}

/** The formats of the blocks of a layer. */
function formatsOf(sequence: Sequence, layer = 0): string[] {
  return sequence.views(layer).map(({ dtypeK, dtypeV, tier }) => `${tier} ${dtypeK} ${dtypeV}`);
}

// deno-lint-ignore no-explicit-any
function anything(value: unknown): any {
  return value;
}

// What is reported.

for (
  const [k, v, dtype] of [
    ["i4", "q8_0", "f32"],
    ["q8_0", "q4_0", "f16"],
    ["i8", "i2", "bf16"],
    ["q4_0", "f16", "f32"],
    ["f16", "i4", "f32"],
  ] as const
) {
  test(`fidelity() is what the rows given and gather() say: ${k} and ${v} of a tail in ${dtype}`, () => {
    const wide = { kvHeadCount: 3, headDim: 64 }, narrow = { kvHeadCount: 1, headDim: 96 };
    const layers = [wide, narrow, wide], tail = { tokens: 64, sinkTokens: 0 };
    using cache = new PagedCache({ layers, maxSeqLen: 512, dtype, tail, store: { k, v }, measureFidelity: true });
    const sequence = cache.sequence(), random = new Random(3);
    const given = layers.map(({ kvHeadCount, headDim }, i) => {
      const length = 300 * kvHeadCount * headDim;
      // No two heads, sides or layers alike.
      const rows = (scale: number) =>
        storedRows(
          random.floats(length, scale).map((value, i) => value * (1 + Math.floor(i / headDim) % kvHeadCount)),
          dtype,
        );
      return { k: rows(1 + i), v: rows(7 - i) };
    });
    for (let row = 0; row < 300; row += 50) {
      layers.forEach(({ kvHeadCount, headDim }, i) => {
        const part = (side: SideRows) => side.subarray(row * kvHeadCount * headDim, (row + 50) * kvHeadCount * headDim);
        sequence.append(i, part(given[i]!.k), part(given[i]!.v));
      });
      sequence.commit(50);
    }
    const { storeTokens } = cache.stats();
    assert.equal(storeTokens, 192);
    for (const [layer, { kvHeadCount, headDim }] of layers.entries()) {
      const after = sequence.gather(layer) as { k: Float32Array; v: Float32Array };
      const heads = cache.fidelity(layer);
      assert.equal(heads.length, kvHeadCount);
      for (const [head, fidelity] of heads.entries()) {
        const shape = { kvDim: kvHeadCount * headDim, headDim };
        for (const side of ["k", "v"] as const) {
          const expected = compare(given[layer]![side], after[side], storeTokens, head, shape);
          assert.ok(expected.errorMax > 0, "was anything rounded?");
          assertSide(fidelity[side], expected, `${side} of head ${head} in layer ${layer}`);
        }
        assert.deepEqual([fidelity.scaledQueryNormMax, fidelity.logitErrorBound], [0, 0]); // nobody asked anything
      }
    }
    assert.deepEqual(JSON.parse(JSON.stringify(cache.fidelity(1))), cache.fidelity(1));
  });
}

test("fidelity() says nothing before a row has migrated, and rows that do not migrate are not compared", () => {
  using cache = new PagedCache({ ...SHAPE, tail: { tokens: 64, sinkTokens: 1 } });
  const sequence = cache.sequence(), random = new Random(1);
  const nothing: HeadFidelity = { k: NOTHING, v: NOTHING, scaledQueryNormMax: 0, logitErrorBound: 0 };
  assert.deepEqual(cache.fidelity(0), [nothing, nothing]);
  extend(sequence, random, outliers(random, 191));
  assert.deepEqual(cache.fidelity(0), [nothing, nothing]);
  extend(sequence, random, outliers(random, 1)); // the block behind that of the sink is due
  assert.deepEqual(cache.fidelity(0).map(({ k, v }) => [k.rows, v.rows]), [[64, 64], [64, 64]]);
  const before = cache.fidelity(0);
  sequence.free();
  cache.reset();
  assert.deepEqual(cache.fidelity(0), before); // it is told of all there ever was
  cache.updatePolicy({ kind: "tail-only" });
  extend(cache.sequence(), random, outliers(random, 300));
  assert.deepEqual(cache.fidelity(0), before);
});

test("rows that stay what they were have a cosine of 1, zeros too", () => {
  using cache = new PagedCache({ ...SHAPE, store: { k: "q8_0", v: "f16" } });
  const sequence = cache.sequence();
  const rows = new Float32Array(64 * 256);
  sequence.append(0, rows, rows.map((_, i) => i % 5)); // f16 holds them exactly
  sequence.commit(64);
  for (const { k, v } of cache.fidelity(0)) {
    assert.deepEqual(k, { ...NOTHING, rows: 64 });
    assert.equal(v.errorMax, 0);
    assert.ok(Math.abs(v.cosineMin - 1) < 1e-12 && Math.abs(v.cosineMean - 1) < 1e-12);
  }
});

test("a block that forks share is compared once, whoever lets it migrate first", () => {
  using cache = new PagedCache({ ...SHAPE, tail: { tokens: 64 }, maxLogitError: 1, queryNorm: 12 });
  const parent = cache.sequence(), random = new Random(2);
  extend(parent, random, outliers(random, 100));
  const child = parent.fork();
  for (const sequence of [parent, child]) extend(sequence, random, outliers(random, 40));
  assert.deepEqual(cache.fidelity(0).map(({ k }) => k.rows), [64, 64]);
  assert.deepEqual([parent, child].map((sequence) => formatsOf(sequence)[0]), new Array(2).fill("store q8_0 q4_0"));
  assert.equal(child.blockTable(0)[0], parent.blockTable(0)[0]);
  assert.deepEqual([...child.blockReferences(0)], [2, 1, 1]);
  extend(child, random, outliers(random, 64)); // and its own
  assert.deepEqual(cache.fidelity(0).map(({ k }) => k.rows), [128, 128]);
  assert.deepEqual(["q8_0", "q4_0"].map((k) => cache.poolStats(0, { k: k as DType, v: "q4_0" }).usedBlocks), [2, 0]);
});

// Bounds.

test("scaledQueryNormMax is the largest norm, times softmaxScale, of the queries of a head", () => {
  using cache = new PagedCache(SHAPE);
  const sequence = cache.sequence(), other = cache.sequence(), random = new Random(4);
  for (const each of [sequence, other]) extend(each, random, outliers(random, 64));
  const norms = () => cache.fidelity(0).map(({ scaledQueryNormMax }) => scaledQueryNormMax);
  const near = (actual: number[], expected: number[]) =>
    actual.every((value, i) => Math.abs(value - expected[i]!) <= 1e-6 * expected[i]!); // the scale is an f32
  // [query][q_head][head_dim]: heads 0 and 1 ask KV head 0, 2 and 3 the other.
  const q = random.floats(2 * 4 * 128).map((value, i) => value * (1 + Math.floor(i / 128)));
  const longest = (heads: number[]) =>
    Math.max(...heads.flatMap((head) => [head, 4 + head].map((i) => norm(q.subarray(i * 128, i * 128 + 128)))));
  const expected = [longest([0, 1]), longest([2, 3])];
  sequence.attend(0, q, { queryCount: 2 });
  assert.ok(near(norms(), expected.map((value) => value / Math.sqrt(128))), `${norms()}`);
  const bounds = cache.fidelity(0).map(({ logitErrorBound }) => logitErrorBound);
  sequence.attend(0, q, { queryCount: 2, softmaxScale: 0.01 }); // nothing longer
  assert.deepEqual(cache.fidelity(0).map(({ logitErrorBound }) => logitErrorBound), bounds);
  cache.attend(0, q, { sequences: [sequence, other], softmaxScale: -3 });
  assert.ok(near(norms(), expected.map((value) => 3 * value)), `${norms()}`);
  // The bound is in proportion.
  const grown = cache.fidelity(0).map(({ logitErrorBound }, i) => logitErrorBound / bounds[i]!);
  assert.ok(near(grown, [3 * Math.sqrt(128), 3 * Math.sqrt(128)]), `${grown}`);
});

for (const store of ["q8_0", "q4_0", "i8", "i4", "i2", "f16"] as const) {
  for (const kind of ["plain", "outlier"] as const) {
    test(`no score over ${kind} keys in ${store} is off by more than logitErrorBound`, () => {
      using cache = new PagedCache({ ...SHAPE, store });
      const sequence = cache.sequence(), random = new Random(5);
      const keys = kind === "plain" ? random.floats(128 * 256) : outliers(random, 128);
      extend(sequence, random, keys);
      const measured: { head: number; length: number; error: number; slack: number }[] = [];
      const queries = [1, 0.01, 3].map((scale) => random.floats(4 * 128, scale));
      const lse = new Float32Array(4);
      for (let row = 127; row >= 0; row--) {
        sequence.truncate(row + 1);
        for (const q of queries) {
          sequence.attend(0, q, { windowTokens: 1, softmaxScale: 1, lse });
          lse.forEach((score, i) => {
            const head = Math.floor(i / 2), at = row * 256 + head * 128;
            const query = q.subarray(i * 128, i * 128 + 128);
            const error = Math.abs(score - dot(query, keys.subarray(at, at + 128)));
            // What is added in f32: 16 roundings of 2^-24 for each of the products, none above |q| * 13.
            const slack = 2 ** -20 * 13 * query.reduce((sum, value) => sum + Math.abs(value), 0);
            measured.push({ head, length: norm(query), error, slack });
          });
        }
      }
      const heads = cache.fidelity(0);
      const shares = measured.map(({ head, length, error, slack }) => {
        const { logitErrorBound, scaledQueryNormMax } = heads[head]!;
        return error / (logitErrorBound * length / scaledQueryNormMax + slack);
      });
      assert.ok(shares.every((share) => share <= 1), `${Math.max(...shares)}`);
      assert.ok(Math.max(...shares) > 0.1, `${Math.max(...shares)}: a bound far above all says nothing`);
    });
  }
}

// Limits.

/** The bound of keys in a store, for queries of a norm and the usual scale. */
function boundOf(keys: SideRows, store: DType, queryNorm: number): number {
  using cache = new PagedCache({ ...SHAPE, store: { k: store, v: "q4_0" } });
  const sequence = cache.sequence(), random = new Random(6);
  extend(sequence, random, keys);
  sequence.attend(0, random.floats(256));
  const bounds = cache.fidelity(0).map(({ logitErrorBound, scaledQueryNormMax }) =>
    logitErrorBound / scaledQueryNormMax
  );
  return Math.max(...bounds) * queryNorm / Math.sqrt(128);
}

for (const chain of [["i2", "i4", "i8", "f32"], ["q4_0", "q8_0", "f32"]] as const) {
  test(`maxLogitError: keys in ${chain[0]} become ${chain.slice(1).join(", then ")} where they must, values never`, () => {
    const random = new Random(7), keys = outliers(random, 64);
    const bounds = chain.map((dtype) => boundOf(keys, dtype, 12));
    assert.equal(bounds.at(-1), 0);
    assert.ok(bounds.every((bound, i) => i === 0 || bound < bounds[i - 1]! / 3), `${bounds}`);
    const store = { k: chain[0], v: "q4_0" } as const;
    chain.forEach((dtype, i) => {
      // As much as this format needs, and a little less than the one before it would.
      const limits = i === chain.length - 1 ? [] : [bounds[i]! * 1.0001];
      if (i > 0) limits.push(bounds[i - 1]! * 0.9999);
      for (const maxLogitError of limits) {
        using cache = new PagedCache({ ...SHAPE, store, maxLogitError, queryNorm: 12 });
        const sequence = cache.sequence();
        extend(sequence, random, keys);
        assert.deepEqual(formatsOf(sequence), [`store ${dtype} q4_0`], `${maxLogitError}`);
        const { storeTokens, warmTokens, blockCount } = cache.stats();
        assert.deepEqual([storeTokens, warmTokens, blockCount], [64, 0, 1]); // what was tried was given back
        // It is told of what they became.
        const after = sequence.gather(0) as { k: Float32Array };
        for (const [head, { k }] of cache.fidelity(0).entries()) {
          if (dtype === "f32") assert.equal(k.errorMax, 0);
          else assertSide(k, compare(keys, after.k, 64, head, sequence), dtype);
        }
      }
    });
  });
}

test("maxLogitError widens the blocks that need it: plain ones stay in 4 bits, byte for byte", () => {
  const random = new Random(8);
  const blocks = [random.floats(64 * 256), outliers(random, 64), random.floats(64 * 256), outliers(random, 64, [1])];
  const fill = (limits: Partial<PagedCacheOptions>): [string[], number[][]] => {
    using cache = new PagedCache({ ...SHAPE, ...limits });
    const sequence = cache.sequence(), values = new Random(9);
    for (const keys of blocks) extend(sequence, values, keys);
    return [formatsOf(sequence), sequence.views(0).map(({ k }) => [...k!])];
  };
  const [plainFormats, plainKeys] = fill({});
  assert.deepEqual(plainFormats, new Array(4).fill("store q4_0 q4_0"));
  // Head 0 alone would do with 4 bits: heads of a block are widened together.
  const [formats, keys] = fill({ maxLogitError: 1, queryNorm: 12 });
  assert.deepEqual(formats, ["store q4_0 q4_0", "store q8_0 q4_0", "store q4_0 q4_0", "store q8_0 q4_0"]);
  assert.deepEqual([keys[0], keys[2]], [plainKeys[0], plainKeys[2]]);
  assert.notDeepEqual(keys[1], plainKeys[1]);
  const [strict] = fill({ maxLogitError: 0.1, queryNorm: 12 });
  assert.deepEqual(strict, ["store q8_0 q4_0", "store f32 q4_0", "store q8_0 q4_0", "store f32 q4_0"]);
});

test("maxLogitError widens a block in all layers of its shape, and not those of another", () => {
  const wide = { kvHeadCount: 2, headDim: 128 }, other = { ...wide, windowTokens: 512 };
  const random = new Random(10), plain = random.floats(64 * 256), keys = outliers(random, 64);
  const options = { maxSeqLen: 256, dtype: "f32", store: "q4_0", measureFidelity: true } as const;
  using cache = new PagedCache({ ...options, layers: [wide, other, wide], maxLogitError: 1, queryNorm: 12 });
  const sequence = cache.sequence();
  extend(sequence, random, plain, plain, keys);
  const formats = [0, 1, 2].map((layer) => formatsOf(sequence, layer)[0]);
  assert.deepEqual(formats, ["store q8_0 q4_0", "store q4_0 q4_0", "store q8_0 q4_0"]);
});

test("a block whose keys and values would be the tail's again stays there, and is not compared", () => {
  const random = new Random(11);
  using cache = new PagedCache({ ...SHAPE, store: { k: "q4_0", v: "f32" }, maxLogitError: 0.1, queryNorm: 12 });
  const sequence = cache.sequence();
  const keys = outliers(random, 64);
  extend(sequence, random, keys);
  extend(sequence, random, random.floats(64 * 256));
  extend(sequence, random, random.floats(5 * 256));
  assert.deepEqual(formatsOf(sequence), ["tail f32 f32", "store q8_0 f32", "tail f32 f32"]);
  assert.deepEqual(sequence.gather(0).k.subarray(0, 64 * 256), keys);
  assert.deepEqual(cache.fidelity(0).map(({ k }) => k.rows), [64, 64]);
  assert.equal(cache.stats().blockCount, 3);
});

test("without queryNorm the queries that were seen count: none at first, and what migrated keeps its format", () => {
  const random = new Random(12);
  using cache = new PagedCache({ ...SHAPE, maxLogitError: 1 });
  const sequence = cache.sequence();
  extend(sequence, random, outliers(random, 64));
  const q = random.floats(256);
  const long = q.map((value) => value * 12 / norm(q.subarray(0, 128)));
  sequence.attend(0, q.map((value) => value / 100));
  extend(sequence, random, outliers(random, 64));
  sequence.attend(0, long);
  extend(sequence, random, outliers(random, 64));
  sequence.attend(0, q.map((value) => value / 100)); // the longest one counts, not the last
  extend(sequence, random, outliers(random, 64));
  assert.deepEqual(formatsOf(sequence).map((format) => format.split(" ")[1]), ["q4_0", "q4_0", "q8_0", "q8_0"]);
  assert.ok(cache.fidelity(0).some(({ logitErrorBound }) => logitErrorBound > 1)); // of the first two
});

test("updatePolicy() sets a limit and lifts it, for blocks that migrate from then on", () => {
  const random = new Random(13);
  using cache = new PagedCache(SHAPE);
  const sequence = cache.sequence();
  const store = { k: "q4_0", v: "q4_0" } as const, limits = { maxLogitError: 1, queryNorm: 12 };
  const more = () => extend(sequence, random, outliers(random, 64));
  more();
  cache.updatePolicy({ kind: "store-only", store, ...limits });
  more();
  const child = sequence.fork();
  const attached = PagedCache.attach(cache.handle);
  attached.updatePolicy({ kind: "hybrid", tail: { tokens: 64 }, store, ...limits });
  assert.deepEqual(formatsOf(sequence), ["store q4_0 q4_0", "warm q8_0 q4_0"]);
  more();
  more();
  assert.deepEqual(formatsOf(sequence).slice(2), ["store q8_0 q4_0", "tail f32 f32"]);
  assert.deepEqual(formatsOf(child), ["store q4_0 q4_0", "store q8_0 q4_0"]); // a format of this policy again
  cache.updatePolicy({ kind: "store-only", store });
  more();
  assert.deepEqual(formatsOf(sequence).slice(3), ["store q4_0 q4_0", "store q4_0 q4_0"]);
  assert.deepEqual(cache.policy, { kind: "store-only", sinkTokens: 0, store });
  assert.deepEqual(formatsOf(child), ["store q4_0 q4_0", "warm q8_0 q4_0"]);
  assert.deepEqual(attached.fidelity(0), cache.fidelity(0));
  assert.deepEqual(cache.fidelity(0).map(({ v }) => v.rows), [320, 320]);
  // All of them attend.
  const output = sequence.attend(0, random.floats(512));
  assert.ok(output.every(Number.isFinite) && output.some((value) => value !== 0));
});

test("rewinding into a widened block turns it back to floats, which are neither rounded nor compared again", () => {
  const random = new Random(14);
  using cache = new PagedCache({ ...SHAPE, maxLogitError: 1, queryNorm: 12 });
  const sequence = cache.sequence(), keys = outliers(random, 64);
  extend(sequence, random, keys);
  sequence.truncate(40);
  extend(sequence, random, outliers(random, 24));
  assert.deepEqual(formatsOf(sequence), ["tail f32 f32"]);
  assert.deepEqual(cache.fidelity(0).map(({ k }) => k.rows), [64, 64]);
  assert.equal(cache.stats().blockCount, 1);
});

// Options.

test("a policy says its limits, rounded to 32 bits, and says the same as JSON", () => {
  const store = { k: "q4_0", v: "q4_0" } as const;
  const limits = [{}, { maxLogitError: 0.1 }, { maxLogitError: 0.1, queryNorm: 11.3 }, { maxLogitError: 2 ** -149 }];
  for (const given of limits) {
    const rounded = Object.fromEntries(Object.entries(given).map(([name, value]) => [name, Math.fround(value)]));
    const policies: Policy[] = [
      { kind: "store-only", sinkTokens: 0, store, ...given },
      { kind: "hybrid", tail: { tokens: 64, sinkTokens: 3 }, store, ...given },
    ];
    for (const policy of policies) {
      const tail = policy.kind === "hybrid" ? policy.tail : {};
      using made = new PagedCache({ ...SHAPE, tail, ...given });
      using updated = new PagedCache({ ...SHAPE, store: "i2", maxLogitError: 7 });
      updated.updatePolicy(policy);
      for (const cache of [made, updated, PagedCache.attach(made.handle)]) {
        assert.deepEqual(cache.policy, { ...policy, ...rounded });
        cache.updatePolicy(JSON.parse(JSON.stringify(cache.policy)));
        assert.deepEqual(cache.policy, { ...policy, ...rounded });
      }
    }
  }
});

test("a limit that is none is refused, and so is one that nobody measures", () => {
  using cache = new PagedCache({ ...SHAPE, maxLogitError: 0.5 });
  const { measureFidelity: _, ...plain } = SHAPE;
  using unmeasured = new PagedCache(plain);
  const policy = cache.policy;
  const ways: [action: string, body: (limits: object) => unknown][] = [
    ["create a cache", (limits) => new PagedCache({ ...SHAPE, ...limits })],
    ["update the policy of a cache", (limits) => cache.updatePolicy({ kind: "store-only", store: "i4", ...limits })],
    [
      "update the policy of a cache",
      (limits) => cache.updatePolicy({ kind: "hybrid", tail: { tokens: 64 }, store: "i4", ...limits }),
    ],
  ];
  for (const [action, body] of ways) {
    for (const name of ["maxLogitError", "queryNorm"]) {
      const others = name === "queryNorm" ? { maxLogitError: 1 } : {};
      for (const value of [NaN, Infinity, -Infinity, 0, -0, -1, 2 ** -150, 1e39, Number.MIN_VALUE, Number.MAX_VALUE]) {
        const rule = new RegExp(`^Cannot ${action} as ${name} must be above 0 and finite as an f32: ${name} is `);
        assertCode("invalid_config", () => body({ ...others, [name]: value }), rule);
      }
      const numeric = { valueOf: () => assert.fail("asked"), toString: () => assert.fail("asked") };
      for (const value of ["1", "", null, true, 1n, {}, [1], numeric, Symbol("1"), () => 1]) {
        assert.throws(() => body({ ...others, [name]: value }), { name: "TypeError", message: /must be a number/ });
      }
    }
    const alone = new RegExp(`^Cannot ${action} as queryNorm needs maxLogitError: queryNorm is 3$`);
    assertCode("invalid_config", () => body({ queryNorm: 3 }), alone);
    assertCode("invalid_config", () => body({ queryNorm: 3, maxLogitError: undefined }), alone);
  }
  const needs = /as maxLogitError needs measureFidelity: maxLogitError is 2$/;
  assertCode("invalid_config", () => new PagedCache({ ...plain, maxLogitError: 2 }), needs);
  assertCode("invalid_config", () => new PagedCache({ ...SHAPE, measureFidelity: false, maxLogitError: 2 }), needs);
  for (const each of [unmeasured, PagedCache.attach(unmeasured.handle)]) {
    assertCode("invalid_config", () => each.updatePolicy({ kind: "store-only", store: "i4", maxLogitError: 2 }), needs);
  }
  const { store: __, ...bare } = SHAPE;
  for (const name of ["maxLogitError", "queryNorm"]) {
    const rule = new RegExp(`^Cannot create a cache as ${name} needs a store: ${name} is 2$`);
    assertCode("invalid_config", () => new PagedCache({ ...bare, [name]: 2 }), rule);
    assertCode(
      "invalid_config",
      () => cache.updatePolicy(anything({ kind: "tail-only", [name]: 2 })),
      new RegExp(`a policy that is tail-only has no ${name}: it is given$`),
    );
  }
  for (const value of [1, 0, "true", null, {}, 1n, Symbol("true")]) {
    assert.throws(() => new PagedCache({ ...SHAPE, measureFidelity: anything(value) }), TypeError);
  }
  assert.deepEqual([cache.policy, unmeasured.policy.kind], [policy, "store-only"]);
});

test("fidelity() refuses layers there are not, caches that do not measure, and freed ones", () => {
  const { measureFidelity: _, ...plain } = SHAPE;
  using unmeasured = new PagedCache(plain);
  const unsupported =
    /^Cannot tell the fidelity of layer 0 as rows are compared only in a cache made with measureFidelity/;
  for (const cache of [unmeasured, PagedCache.attach(unmeasured.handle)]) {
    assertCode("unsupported", () => cache.fidelity(0), unsupported);
    assertCode("layer_out_of_range", () => cache.fidelity(1), /the cache has 1 layer: layer is 1$/);
  }
  const cache = new PagedCache(SHAPE), attached = PagedCache.attach(cache.handle);
  assertCode("layer_out_of_range", () => cache.fidelity(1), /the cache has 1 layer: layer is 1$/);
  assertCode("layer_out_of_range", () => cache.fidelity(2 ** 32 - 1));
  for (const value of [-1, 0.5, NaN, Infinity, 2 ** 32, -0]) assert.throws(() => cache.fidelity(value), RangeError);
  for (const value of ["0", null, undefined, 0n, [0], {}]) {
    assert.throws(() => cache.fidelity(anything(value)), TypeError);
  }
  cache.free();
  for (const each of [cache, attached]) {
    assertCode("stale_handle", () => each.fidelity(0));
    assertCode("stale_handle", () => each.fidelity(1));
  }
});
