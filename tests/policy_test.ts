/** Policies of tiered caches: what they refuse, what each switch does, and options that misbehave. */

import assert from "node:assert/strict";
import { test } from "node:test";
import {
  BlockPool,
  type DType,
  PagedCache,
  type PagedCacheOptions,
  type Policy,
  type Sequence,
  twoTierDefaults,
} from "../mod.ts";
import { assertCode } from "./cache_cases.ts";
import { attention, Random, relativeError } from "./oracle.ts";

/** One layer of 2 KV heads of 32 in blocks of 64: the smallest that can be quantized. */
const SHAPE = { layerCount: 1, kvHeadCount: 2, headDim: 32, blockSize: 64, maxSeqLen: 4096, dtype: "f32" } as const;

/** Appends `n` random rows to every layer and commits them. */
function extend(sequence: Sequence, random: Random, n: number): void {
  for (let layer = 0; layer < sequence.layerCount; layer++) {
    const { kvHeadCount, headDim } = sequence.layerShape(layer);
    const rows = random.floats(n * kvHeadCount * headDim);
    sequence.append(layer, rows, rows);
  }
  sequence.commit(n);
}

/** The bytes of the quantized blocks, by position. */
function bytesOf(sequence: Sequence): Map<number, number[][]> {
  const quantized = sequence.views(0).filter(({ tokenStride }) => tokenStride === 0);
  return new Map(quantized.map(({ start, k, v }) => [start, [[...k!], [...v!]]]));
}

/** Attention over the tiers must be attention over the gathered rows. */
function assertAttends(sequence: Sequence, random: Random): void {
  const q = random.floats(4 * 32, 2);
  const { k, v } = sequence.gather(0) as { k: Float32Array; v: Float32Array };
  const { output } = attention({ q, k, v, queryCount: 1, qHeadCount: 4, kvHeadCount: 2, headDim: 32 });
  const error = relativeError(sequence.attend(0, q), output);
  assert.ok(error <= 1e-3, `${error}`);
}

// deno-lint-ignore no-explicit-any
function anything(value: unknown): any {
  return value;
}

// Options of a new cache.

test("the policy of a new cache is what its tail and its store mean", () => {
  const store = { k: "q8_0", v: "i4" } as const;
  const cases: [Partial<PagedCacheOptions>, Policy][] = [
    [{}, { kind: "tail-only" }],
    [{ tail: {} }, { kind: "tail-only" }],
    [{ store }, { kind: "store-only", store, sinkTokens: 0 }],
    [{ store: "i2", tail: { sinkTokens: 5 } }, { kind: "store-only", store: { k: "i2", v: "i2" }, sinkTokens: 5 }],
    [{ store, tail: { tokens: 0 } }, { kind: "store-only", store, sinkTokens: 0 }],
    [{ store, tail: { tokens: 128 } }, { kind: "hybrid", store, tail: { tokens: 128, sinkTokens: 0 } }],
  ];
  for (const [options, policy] of cases) {
    using cache = new PagedCache({ ...SHAPE, ...options });
    assert.deepEqual(cache.policy, policy);
    assert.deepEqual(JSON.parse(JSON.stringify(cache.policy)), policy);
    cache.updatePolicy(cache.policy); // says the same
    assert.deepEqual(cache.policy, policy);
    assert.deepEqual(PagedCache.attach(cache.handle).policy, policy);
  }
});

test("the dtype of a tail stands in dtype or in tail.dtype, not in both", () => {
  const { dtype: _, ...shape } = SHAPE;
  using plain = new PagedCache(shape);
  using one = new PagedCache({ ...shape, tail: { dtype: "bf16" } });
  using two = new PagedCache({ ...shape, tail: { dtype: { k: "f32", v: "f16" } } });
  using both = new PagedCache({ ...shape, dtype: { k: "f32", v: "f16" }, tail: {} });
  const dtypes = [plain, one, two, both].map(({ dtypeK, dtypeV }) => [dtypeK, dtypeV]);
  assert.deepEqual(dtypes, [["f16", "f16"], ["bf16", "bf16"], ["f32", "f16"], ["f32", "f16"]]);
  assertCode(
    "invalid_config",
    () => new PagedCache({ ...SHAPE, tail: { dtype: "f32" } }),
    /as dtype and tail.dtype exclude each other: both are given$/,
  );
});

test("tails and stores that are none are refused", () => {
  const make = (options: object) => new PagedCache({ ...SHAPE, ...options } as PagedCacheOptions);
  const store = "q4_0", blocks = "needs a blockSize of 64, 128 or 256: blockSize is";
  const newest = (tokens: number) => ({ retention: { keep: "newest", tokens } });
  const layers = [{ kvHeadCount: 1, headDim: 32 }, { kvHeadCount: 1, headDim: 40 }];
  const shaped = (options: object) => new PagedCache({ maxSeqLen: 64, ...options } as PagedCacheOptions);
  const refusals: [() => unknown, string][] = [
    [() => make({ store, blockSize: 32 }), `store.k q4_0 ${blocks} 32`],
    [() => make({ store: { k: "f16", v: "i2" }, blockSize: 1 }), `store.v i2 ${blocks} 1`],
    [() => make({ store, headDim: 48 }), "store.k q4_0 needs a headDim that is a multiple of 32: headDim is 48"],
    [() => shaped({ layers, store: "i8" }), "store.k i8 needs a headDim that is a multiple of 32: headDim is 40"],
    [
      () => shaped({ layers: [layers[0], { ...layers[1], store: "q8_0" }] }),
      "layers\\[1\\].store.k q8_0 needs a headDim that is a multiple of 32: headDim is 40",
    ],
    [
      () => make({ store, tail: { tokens: 100 } }),
      "tail.tokens must be a multiple of blockSize 64: tail.tokens is 100",
    ],
    [
      () => make({ store, tail: { tokens: 256 }, ...newest(200) }),
      "tail.tokens must be at most retention.tokens 200: tail.tokens is 256",
    ],
    [() => make({ tail: { tokens: 64 } }), "tail.tokens needs a store: tail.tokens is 64"],
    [() => make({ tail: { tokens: 0 } }), "tail.tokens needs a store: tail.tokens is 0"],
    [() => make({ tail: { sinkTokens: 4 } }), "tail.sinkTokens needs a store: tail.sinkTokens is 4"],
  ];
  for (const [call, rule] of refusals) {
    assertCode("invalid_config", call, new RegExp(`^Cannot create a cache as ${rule}$`));
  }
  for (const wrong of ["q5_0", "", { k: "q4_0", v: "f64" }]) assertCode("invalid_config", () => make({ store: wrong }));
  assertCode("invalid_config", () => shaped({ layers: [{ ...layers[0], store: "k" }] }));
  for (const wrong of ["q8_0", { k: "f16", v: "i4" }]) {
    assertCode("invalid_config", () => make({ dtype: undefined, tail: { dtype: wrong } }), /one of f32, f16, bf16$/);
  }
  for (const wrong of [null, 3, {}, [], { k: "q4_0" }, () => "q4_0"]) {
    assert.throws(() => make({ store: wrong }), TypeError);
    assert.throws(() => shaped({ layers: [{ ...layers[0], store: wrong }] }), TypeError);
  }
  for (const wrong of [null, 3, "f16"]) assert.throws(() => make({ tail: wrong }), TypeError);
  assert.throws(() => make({ dtype: null }), TypeError);
  assert.throws(() => make({ dtype: undefined, tail: { dtype: null } }), TypeError);
  for (const wrong of ["64", null, 64n, {}]) {
    assert.throws(() => make({ store, tail: { tokens: wrong } }), TypeError);
    assert.throws(() => make({ store, tail: { sinkTokens: wrong } }), TypeError);
  }
  for (const wrong of [-64, 0.5, NaN, 2 ** 32, -0, Infinity]) {
    assert.throws(() => make({ store, tail: { tokens: wrong } }), RangeError);
    assert.throws(() => make({ store, tail: { sinkTokens: wrong } }), RangeError);
  }
  for (const wrong of [2 ** 31, 2 ** 32 - 1]) {
    assertCode("invalid_config", () => make({ store, tail: { sinkTokens: wrong } }));
  }
  // What is at the edge of that is fine.
  const fine: object[] = [
    { store, blockSize: 256, headDim: 256 },
    { store, tail: { tokens: 128 }, ...newest(128) },
    { store: "f16", blockSize: 1, headDim: 5, tail: { tokens: 3 } },
    { store: "f32", tail: { tokens: 64 } },
    { store, tail: { sinkTokens: 2 ** 31 - 1 } },
  ];
  for (const options of fine) make(options).free();
});

test("a block that is too large is so in the tail or in the store", () => {
  const make = (options: object) => new PagedCache({ ...SHAPE, ...options } as PagedCacheOptions);
  const tail = 64 * 64 * 8, f16 = tail / 2;
  assertCode("block_too_large", () => make({ store: "q4_0", maxBytes: tail - 1 }), new RegExp(`has ${tail} bytes$`));
  const wide = { dtype: "f16", store: "f32", maxBytes: tail - 1 };
  assertCode("block_too_large", () => make(wide), new RegExp(`has ${tail} bytes$`));
  const mixed = { dtype: "f16", store: { k: "f32", v: "q8_0" } } as const;
  const bytes = 64 * 64 * 4 + 64 * 64 / 32 * 34;
  assertCode("block_too_large", () => make({ ...mixed, maxBytes: bytes - 1 }), new RegExp(`has ${bytes} bytes$`));
  using fits = make({ ...mixed, maxBytes: bytes });
  assert.equal(fits.poolStats(0, mixed.store).blockBytes, bytes);
  using cache = make({ dtype: "f16", maxBytes: f16 });
  const policy: Policy = { kind: "store-only", store: "f32" };
  assertCode("block_too_large", () => cache.updatePolicy(policy), new RegExp(`it would have ${tail} bytes$`));
  assert.deepEqual(cache.policy, { kind: "tail-only" });
});

/** Bits of a code, and bytes of the scale and min of its group. */
const CODES = { q8_0: [8, 2], q4_0: [4, 2], i8: [8, 4], i4: [4, 4], i2: [2, 4] } as const;

test("what a quantized block takes: groups of 32, of a block's tokens for keys, of 64 or 32 dims for values", () => {
  for (const headDim of [32, 64, 96, 128, 160, 256]) {
    for (const blockSize of [64, 128, 256]) {
      for (const dtype of Object.keys(CODES) as (keyof typeof CODES)[]) {
        const [bits, scaleBytes] = CODES[dtype], values = 3 * headDim * blockSize;
        const groups = { k: blockSize, v: headDim % 64 === 0 ? 64 : 32 };
        for (const side of ["k", "v"] as const) {
          const groupSize = scaleBytes === 2 ? 32 : groups[side];
          const bytes = values * 4 + values * bits / 8 + values / groupSize * scaleBytes;
          const shape = { layerCount: 1, kvHeadCount: 3, headDim, blockSize, maxSeqLen: 256 };
          const store = { k: "f32", v: "f32", [side]: dtype } as { k: DType; v: DType };
          const make = (maxBytes: number) => new PagedCache({ ...shape, store, maxBytes });
          // The text counts for itself, the pool as native code does.
          assertCode("block_too_large", () => make(bytes - 1), new RegExp(`it has ${bytes} bytes$`));
          using cache = make(bytes);
          assert.equal(cache.poolStats(0, store).blockBytes, bytes, `${side} in ${dtype}`);
        }
      }
    }
  }
});

test("options of a new cache are read once, and first", () => {
  const reads = new Map<string, number>();
  const spy = <T extends object>(path: string, target: T): T =>
    new Proxy(target, {
      get(from, name) {
        const key = `${path}${String(name)}`;
        reads.set(key, (reads.get(key) ?? 0) + 1);
        return Reflect.get(from, name);
      },
    });
  const { dtype: _, ...shape } = SHAPE;
  const options = spy("", {
    ...shape,
    tail: spy("tail.", { dtype: spy("dtype.", { k: "f16", v: "f32" } as const), tokens: 64, sinkTokens: 2 }),
    store: spy("store.", { k: "q8_0", v: "i4" } as const),
  });
  using cache = new PagedCache(options);
  assert.ok(
    ["tail", "store", "tail.tokens", "tail.sinkTokens", "tail.dtype", "dtype.k", "store.v"].every((name) =>
      //
      reads.get(name) === 1
    ),
    JSON.stringify([...reads]),
  );
  assert.deepEqual(cache.policy, {
    kind: "hybrid",
    tail: { tokens: 64, sinkTokens: 2 },
    store: { k: "q8_0", v: "i4" },
  });
  reads.clear();
  cache.updatePolicy(spy("", {
    kind: "hybrid" as const,
    tail: spy("tail.", { tokens: 128, sinkTokens: 0 }),
    store: spy("store.", { k: "i8", v: "i8" } as const),
  }));
  assert.ok(reads.size >= 7 && [...reads.values()].every((count) => count === 1), JSON.stringify([...reads]));
});

test("a pool that is freed as the options are read makes no cache", () => {
  const { maxSeqLen: _, ...shape } = SHAPE;
  const pool = new BlockPool(shape);
  const store = {
    get k() {
      pool.free();
      return "q4_0" as const;
    },
    v: "q4_0" as const,
  };
  assertCode("stale_handle", () => new PagedCache({ ...SHAPE, pool, store }));
});

// Switches.

const POLICIES: Record<string, Policy> = {
  "tail-only": { kind: "tail-only" },
  "store-only": { kind: "store-only", store: "q8_0" },
  "hybrid": { kind: "hybrid", tail: { tokens: 128 }, store: "q4_0" },
  "hybrid with sinks": { kind: "hybrid", tail: { tokens: 64, sinkTokens: 1 }, store: { k: "i8", v: "i4" } },
};

/** Rows that have left the tail once 640 are committed under a policy. */
const LEFT: Record<string, number> = { "tail-only": 0, "store-only": 640, "hybrid": 512, "hybrid with sinks": 512 };

for (const from of Object.keys(POLICIES)) {
  for (const to of Object.keys(POLICIES)) {
    test(`from ${from} to ${to}: in force at the next commit, and quantized blocks keep their bytes`, () => {
      using cache = new PagedCache(SHAPE);
      const sequence = cache.sequence(), random = new Random(5);
      cache.updatePolicy(POLICIES[from]!);
      extend(sequence, random, 640);
      const tiers = sequence.blockTiers(0), bytes = bytesOf(sequence), stats = cache.stats();
      assert.equal(stats.storeTokens, LEFT[from]);
      cache.updatePolicy(POLICIES[to]!);
      // Nothing has moved yet; what another policy stored is warm from now on.
      const isSame = from === to;
      const left = (tier: unknown) => tier === "store" && !isSame ? "warm" : tier;
      assert.deepEqual(sequence.blockTiers(0), tiers.map(left));
      assert.deepEqual([bytesOf(sequence), cache.stats().storeBytes], [bytes, stats.storeBytes]);
      assert.equal(cache.stats().warmTokens, isSame ? 0 : LEFT[from]);
      assertAttends(sequence, random);

      extend(sequence, random, 64);
      const now = sequence.blockTiers(0), after = bytesOf(sequence);
      for (const [start, sides] of bytes) assert.deepEqual(after.get(start), sides, `block at ${start}`);
      tiers.forEach((tier, i) => {
        if (tier === "store") assert.equal(now[i], isSame ? "store" : "warm");
      });
      const warm = now.filter((tier) => tier === "warm").length, stored = now.filter((tier) => tier === "store").length;
      const { storeTokens, warmTokens, tailTokens, totalTokens } = cache.stats();
      assert.deepEqual([warmTokens, storeTokens, tailTokens], [
        64 * warm,
        64 * (warm + stored),
        704 - 64 * (warm + stored),
      ]);
      assert.equal(totalTokens, 704);
      // What the new policy wants out of the tail has left it.
      const kept = { "tail-only": 11, "store-only": 0, "hybrid": 2, "hybrid with sinks": 2 }[to]!;
      assert.equal(
        now.slice(0, 11 - kept).filter((tier) => tier === "tail").length,
        to === "hybrid with sinks" && now[0] === "tail" ? 1 : 0,
      );
      assertAttends(sequence, random);
    });
  }
}

test("tail, warm and store blocks together attend, copy, fork and rewind correctly", () => {
  using cache = new PagedCache({ ...SHAPE, store: "q4_0" });
  const sequence = cache.sequence(), random = new Random(9);
  extend(sequence, random, 200);
  cache.updatePolicy({ kind: "hybrid", tail: { tokens: 64 }, store: { k: "i4", v: "q8_0" } });
  extend(sequence, random, 200);
  cache.updatePolicy({ kind: "store-only", store: { k: "f16", v: "i8" } });
  extend(sequence, random, 130);
  assert.deepEqual(sequence.blockTiers(0), ["warm", "warm", "warm", "warm", "warm", "store", "store", "store", "tail"]);
  assert.deepEqual(sequence.views(0).map(({ dtypeK, dtypeV }) => `${dtypeK} ${dtypeV}`), [
    ...new Array(3).fill("q4_0 q4_0"),
    ...new Array(2).fill("i4 q8_0"),
    ...new Array(3).fill("f16 i8"),
    "f32 f32",
  ]);
  assertAttends(sequence, random);
  const fork = sequence.fork();
  assert.deepEqual([fork.blockTiers(0), fork.gather(0)], [sequence.blockTiers(0), sequence.gather(0)]);
  const rows = fork.gather(0).k.slice(0, 100 * 64);
  fork.truncate(100); // among the warm ones
  extend(fork, random, 100);
  assert.deepEqual(fork.gather(0).k.subarray(0, 100 * 64), rows); // nothing is rounded twice
  assert.deepEqual(fork.blockTiers(0), ["warm", "tail", "store", "tail"]);
  for (const each of [sequence, fork]) assertAttends(each, random);
  // Back to a format that is known: its blocks are the store again.
  cache.updatePolicy({ kind: "store-only", store: "q4_0" });
  assert.deepEqual(sequence.blockTiers(0).slice(0, 6), ["store", "store", "store", "warm", "warm", "warm"]);
});

test("blocks that were due under a policy that kept them leave at the next commit of their own sequence", () => {
  using cache = new PagedCache(SHAPE);
  const random = new Random(1);
  const sequences = [cache.sequence(), cache.sequence()];
  for (const sequence of sequences) extend(sequence, random, 150);
  cache.updatePolicy({ kind: "store-only", store: "i8" });
  extend(sequences[0]!, random, 1);
  assert.deepEqual(sequences.map((sequence) => sequence.blockTiers(0)[0]), ["store", "tail"]);
  sequences[1]!.commit(0); // does nothing
  assert.equal(sequences[1]!.blockTiers(0)[0], "tail");
  extend(sequences[1]!, random, 1);
  assert.deepEqual(sequences[1]!.blockTiers(0), ["store", "store", "tail"]);
});

test("a policy of a cache whose layers have stores of their own", () => {
  const layers = [{ kvHeadCount: 2, headDim: 32, store: "q8_0" as const }, { kvHeadCount: 2, headDim: 32 }];
  using cache = new PagedCache({ layers, maxSeqLen: 1024 });
  const sequence = cache.sequence(), random = new Random(2);
  extend(sequence, random, 130);
  const tiers = () => [0, 1].map((layer) => sequence.blockTiers(layer).join(" "));
  assert.deepEqual([cache.policy, tiers()], [{ kind: "store-only", sinkTokens: 0 }, [
    "store store tail",
    "tail tail tail",
  ]]);
  cache.updatePolicy({ kind: "hybrid", tail: { tokens: 64 }, store: "i4" });
  extend(sequence, random, 70);
  assert.deepEqual(tiers(), ["store store tail tail", "store store tail tail"]);
  assert.deepEqual([0, 1].map((layer) => sequence.views(layer)[0]!.dtypeK), ["q8_0", "i4"]);
  cache.updatePolicy({ kind: "tail-only" });
  extend(sequence, random, 200);
  assert.deepEqual(tiers().map((text) => text.split(" ").filter((tier) => tier !== "tail").length), [2, 2]);
});

test("a Worker's end of a cache changes the policy for all", () => {
  using cache = new PagedCache({ ...SHAPE, retention: { keep: "newest", tokens: 128 } });
  const sequence = cache.sequence(), random = new Random(3);
  extend(sequence, random, 100);
  const array = sequence.views(0)[0]!.k!;
  const attached = PagedCache.attach(cache.handle);
  assertCode(
    "invalid_config",
    () => attached.updatePolicy({ kind: "hybrid", tail: { tokens: 192 }, store: "i8" }),
    /at most retention.tokens 128: tail.tokens is 192$/,
  );
  attached.updatePolicy({ kind: "store-only", store: "q8_0" });
  assert.ok(array.length > 0);
  extend(sequence, random, 1);
  assert.deepEqual([sequence.blockTiers(0), array.length], [["store", "tail"], 0]);
});

// Refusals.

test("a policy that is none is refused and changes nothing", () => {
  using cache = new PagedCache({
    ...SHAPE,
    store: "q4_0",
    tail: { tokens: 64 },
    retention: { keep: "newest", tokens: 256 },
  });
  const sequence = cache.sequence(), random = new Random(4);
  extend(sequence, random, 200);
  const held = () => [cache.policy, cache.stats(), sequence.gather(0), sequence.blockTiers(0)];
  const before = held();
  const hybrid = (tail: object, others: object = {}) => ({ kind: "hybrid", tail, store: "i8", ...others });
  const refusals: [policy: unknown, rule: RegExp][] = [
    [{ kind: "tail_only" }, /policy.kind must be tail-only, store-only or hybrid: kind is tail_only$/],
    [{ kind: "" }, /kind is $/],
    [{ kind: "tail-only", store: "i8" }, /a policy that is tail-only has no store: it is given$/],
    [{ kind: "tail-only", sinkTokens: 0 }, /tail-only has no sinkTokens/],
    [{ kind: "store-only", store: "i8", tail: { tokens: 64 } }, /store-only has no tail/],
    [hybrid({ tokens: 64 }, { sinkTokens: 3 }), /hybrid has no sinkTokens/],
    [{ kind: "store-only" }, /store must be given where no layer has its own: store is undefined$/],
    [hybrid({ tokens: 65 }), /multiple of blockSize 64: tail.tokens is 65$/],
    [hybrid({ tokens: 320 }), /at most retention.tokens 256: tail.tokens is 320$/],
    [{ kind: "store-only", store: "i3" }, /store.k i3 as it must be one of f32, .*, i2$/],
    [{ kind: "store-only", store: { k: "i4", v: "k" } }, /store.v k as/],
  ];
  for (const [policy, rule] of refusals) assertCode("invalid_config", () => cache.updatePolicy(anything(policy)), rule);
  const types: unknown[] = [
    undefined,
    null,
    "hybrid",
    3,
    {},
    { kind: 1 },
    { kind: null },
    { kind: "hybrid", store: "i8" },
    { kind: "hybrid", tail: null, store: "i8" },
    { kind: "hybrid", tail: 64, store: "i8" },
    hybrid({}),
    hybrid({ tokens: "64" }),
    hybrid({ tokens: 64n }),
    hybrid({ tokens: 64, sinkTokens: null }),
    { kind: "store-only", store: null },
    { kind: "store-only", store: ["i8", "i8"] },
    { kind: "store-only", store: "i8", sinkTokens: "1" },
  ];
  for (const policy of types) {
    assert.throws(
      () => cache.updatePolicy(anything(policy)),
      TypeError,
      JSON.stringify(policy, (_, value) => typeof value === "bigint" ? "n" : value),
    );
  }
  for (const value of [-1, 0.5, NaN, Infinity, 2 ** 32, -0]) {
    assert.throws(() => cache.updatePolicy(anything(hybrid({ tokens: value }))), RangeError);
    assert.throws(() => cache.updatePolicy(anything(hybrid({ tokens: 64, sinkTokens: value }))), RangeError);
    assert.throws(() => cache.updatePolicy({ kind: "store-only", store: "i8", sinkTokens: value }), RangeError);
  }
  assert.deepEqual(held(), before);
  for (const shape of [{ blockSize: 16 }, { headDim: 40 }]) {
    using small = new PagedCache({ ...SHAPE, ...shape });
    assertCode(
      "invalid_config",
      () => small.updatePolicy({ kind: "store-only", store: "q8_0" }),
      /^Cannot update the policy/,
    );
    assert.deepEqual(small.policy, { kind: "tail-only" });
    small.updatePolicy({ kind: "store-only", store: "bf16" });
  }
});

test("a policy that acts as it is read: the cache is freed, emptied, or given another policy", () => {
  const acting = (act: () => void): Policy => ({
    kind: "store-only",
    get store() {
      act();
      return "q8_0" as const;
    },
  });
  const cache = new PagedCache(SHAPE);
  const sequence = cache.sequence(), random = new Random(6);
  extend(sequence, random, 100);
  cache.updatePolicy(acting(() => cache.updatePolicy({ kind: "store-only", store: "i2" })));
  assert.deepEqual(cache.policy, { kind: "store-only", store: { k: "q8_0", v: "q8_0" }, sinkTokens: 0 });
  cache.updatePolicy(acting(() => sequence.truncate(0)));
  extend(sequence, random, 64);
  assert.deepEqual(sequence.blockTiers(0), ["store"]);
  const thrown = new Error("thrown by a getter");
  assert.throws(
    () =>
      cache.updatePolicy(acting(() => {
        throw thrown;
      })),
    (error: unknown) => error === thrown,
  );
  assertCode("stale_handle", () => cache.updatePolicy(acting(() => cache.free())));
  for (
    const call of [() => cache.policy, () => cache.updatePolicy({ kind: "tail-only" }), () => sequence.blockTiers(0)]
  ) {
    assertCode("stale_handle", call);
  }
});

test("blockTiers() checks its layer", () => {
  using cache = new PagedCache(twoTierDefaultsOfOneLayer);
  const sequence = cache.sequence();
  assert.deepEqual(sequence.blockTiers(0), []);
  assertCode("layer_out_of_range", () => sequence.blockTiers(1), /has 1 layer: layer is 1$/);
  for (const value of [-1, 0.5, NaN]) assert.throws(() => sequence.blockTiers(value), RangeError);
  for (const value of ["0", null, 0n]) assert.throws(() => sequence.blockTiers(anything(value)), TypeError);
});

const twoTierDefaultsOfOneLayer: PagedCacheOptions = { ...twoTierDefaults, layerCount: 1, maxSeqLen: 64 };
