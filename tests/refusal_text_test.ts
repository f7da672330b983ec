/**
 * What a refusal says: the action, the rule, and the value that broke it, with the place where it stands.
 *
 * The texts are compared whole, in every runtime: a text of an engine, or a general one, does not pass for ours.
 */

import assert from "node:assert/strict";
import { test } from "node:test";
import {
  BlockPool,
  BufferPool,
  ContiguousCache,
  dequantizeRows,
  type DType,
  KvError,
  PagedCache,
  quantizeBlock,
  quantizeRows,
  readRate,
  type Rows,
  Sequence,
} from "../mod.ts";

const SHAPE = { layerCount: 1, kvHeadCount: 2, headDim: 4, maxSeqLen: 64 };

// deno-lint-ignore no-explicit-any
const anything = (value: unknown): any => value;

/** The call must be refused with this text. */
function assertText(body: () => unknown, text: string): void {
  assert.throws(body, (error: unknown) => {
    assert.ok(error instanceof KvError || error instanceof TypeError, `${error}`);
    assert.equal(error.message, text);
    return true;
  });
}

/** `count` halves, and one other number at an index. */
function floats(count: number, index: number, value: number): Float32Array {
  const array = new Float32Array(count).fill(0.5);
  array[index] = value;
  return array;
}

test("a number among rows: which side, where, what it is, and which dtype is too narrow", () => {
  const good = new Float32Array(16).fill(0.5);
  const rows: [number, number, string][] = [
    [0, NaN, "must be finite: k[0] is NaN (row 0, KV head 0, element 0)"],
    [5, Infinity, "must be finite: k[5] is Infinity (row 0, KV head 1, element 1)"],
    [15, -Infinity, "must be finite: k[15] is -Infinity (row 1, KV head 1, element 3)"],
    [10, 70000, "must stay finite as f16: k[10] is 70000 (row 1, KV head 0, element 2)"],
    [10, -65520, "must stay finite as f16: k[10] is -65520 (row 1, KV head 0, element 2)"],
  ];
  using contiguous = new ContiguousCache({ ...SHAPE, dtype: "f16" });
  using paged = new PagedCache({ ...SHAPE, dtype: "f16" });
  const sequence = paged.sequence();
  for (const [index, value, rule] of rows) {
    const bad = floats(16, index, value);
    const text = `Cannot append 2 tokens to layer 0 as k ${rule}`;
    assertText(() => contiguous.sequence(0).append(0, bad, good), text);
    assertText(() => contiguous.append(0, 0, bad, good), text);
    assertText(() => sequence.append(0, bad, good), text);
    assertText(() => paged.append(0, bad, good, { sequences: [sequence], tokenCounts: [2] }), text);
    assertText(() => sequence.append(0, good, bad), text.replaceAll(/\bk(?= must|\[)/g, "v"));
  }
  const headMajor = floats(16, 13, NaN); // [kv_head][row][head_dim]
  assertText(
    () => sequence.append(0, good, headMajor, { layout: "head_major" }),
    "Cannot append 2 tokens to layer 0 as v must be finite: v[13] is NaN (row 1, KV head 1, element 1)",
  );
  assertText(
    () => contiguous.store(0, 0, floats(8, 7, NaN), floats(8, 0, 1)),
    "Cannot store 1 token to layer 0 as k must be finite: k[7] is NaN (row 0, KV head 1, element 3)",
  );
});

test("a number among the bits of f16 and bf16, and one that the store cannot hold", () => {
  using wide = new ContiguousCache({ ...SHAPE, dtype: "f16" });
  const bits = (value: number) => Uint16Array.from({ length: 8 }, (_, i) => i === 3 ? value : 0);
  const append = (k: Rows, dtype: "f16" | "bf16") => () => wide.append(0, 0, k, bits(0), { dtype });
  const place = "(row 0, KV head 0, element 3)";
  const action = "Cannot append 1 token to layer 0 as k";
  assertText(append(bits(0x7e00), "f16"), `${action} must be finite: k[3] is NaN ${place}`);
  assertText(append(bits(0xfc00), "f16"), `${action} must be finite: k[3] is -Infinity ${place}`);
  assertText(append(bits(0x7fc0), "bf16"), `${action} must be finite: k[3] is NaN ${place}`);
  assertText(append(bits(0x4780), "bf16"), `${action} must stay finite as f16: k[3] is 65536 ${place}`);

  // Rows land in the tail and must be storable as what they will become.
  using tiered = new PagedCache({ ...SHAPE, headDim: 32, tail: { dtype: "f32" }, store: { k: "q8_0", v: "i4" } });
  const many = (value: number) => floats(64, 40, value);
  const there = "(row 0, KV head 1, element 8)";
  assertText(
    () => tiered.sequence().append(0, many(9e6), many(1)),
    `${action} must stay finite as q8_0: k[40] is 9000000 ${there}`,
  );
  assertText(
    () => tiered.sequence().append(0, many(8e6), many(65520)),
    `Cannot append 1 token to layer 0 as v must stay finite as i4: v[40] is 65520 ${there}`,
  );
});

test("the limit of each dtype is that of native code", () => {
  const limits: [DType, number][] = [
    ["f16", 65520],
    ["bf16", 2 ** 128 - 2 ** 119],
    ["q8_0", 65520 * 127],
    ["q4_0", 65520 * 8],
    ["i8", 65520],
    ["i4", 65520],
    ["i2", 65520],
  ];
  const below = (value: number) => {
    const words = new Uint32Array(Float32Array.of(value).buffer);
    words[0]! -= 1;
    return new Float32Array(words.buffer)[0]!;
  };
  for (const [dtype, limit] of limits) {
    const isFloat = dtype === "f16" || dtype === "bf16";
    using cache = new PagedCache({
      ...SHAPE,
      headDim: 32,
      ...(isFloat ? { dtype } : { tail: { dtype: "f32" }, store: dtype }),
    });
    const sequence = cache.sequence();
    const zeros = new Float32Array(64);
    sequence.append(0, floats(64, 0, below(limit)), zeros);
    const text = `k must stay finite as ${dtype}: k[0] is ${Math.fround(limit)} (row 0, KV head 0, element 0)`;
    assertText(() => sequence.append(0, floats(64, 0, limit), zeros), `Cannot append 1 token to layer 0 as ${text}`);
  }
});

test("a number among queries, and among values to quantize", () => {
  using cache = new PagedCache({ ...SHAPE, qHeadCount: 4 });
  const sequence = cache.sequence();
  sequence.append(0, new Float32Array(16), new Float32Array(16));
  const q = floats(32, 22, NaN);
  const text = "Cannot attend in layer 0 as q must be finite: q[22] is NaN (query 1, query head 1, element 2)";
  assertText(() => sequence.attend(0, q, { queryCount: 2 }), text);
  assertText(() => cache.attend(0, q, { sequences: [sequence], queryCounts: [2] }), text);
  assertText(
    () => sequence.attend(0, new Float32Array(32), { queryCount: 2, treeParents: Int32Array.of(-1, 5) }),
    "Cannot attend in layer 0 as treeParents[1] must be below 1: it is 5",
  );
  assertText(
    () => quantizeRows(floats(32, 9, NaN), { dtype: "q8_0" }),
    "Cannot quantize rows as q8_0 as rows must be finite: rows[9] is NaN",
  );
  assertText(
    () => quantizeBlock(floats(64 * 32, 70, 1e9), { dtype: "i4", side: "k", blockSize: 64, headDim: 32 }),
    "Cannot quantize a block as i4 as rows must stay finite as i4: rows[70] is 1000000000",
  );
  assertText(
    () => readRate({ bytes: 100 }),
    "Cannot measure the read rate as it takes 1 to 1024 threads, 512 bytes or more each and 2^40 in all: bytes is 100, threads is 1",
  );
});

test("what was freed", () => {
  const rows = new Float32Array(8);
  const cache = new PagedCache(SHAPE);
  const [one, two] = [cache.sequence(), cache.sequence()];
  two.free();
  const cases: [() => unknown, string][] = [
    [() => two.seqLen, "read the length of a sequence"],
    [() => two.append(0, rows, rows), "append 1 token to layer 0"],
    [() => two.attend(0, rows), "attend in layer 0"],
    [() => two.commit(1), "commit 1 token"],
    [() => two.truncate(0), "truncate to 0 tokens"],
    [() => two.fork(), "fork a sequence"],
    [() => two.views(0), "view layer 0"],
    [() => two.blockTable(0), "read the blocks of layer 0"],
    [() => two.rewindableTo, "read how far a sequence can be rewound"],
  ];
  for (const [body, action] of cases) assertText(body, `Cannot ${action} as the sequence was freed`);
  const batch = "the sequence was freed: it is sequence 1 of the call";
  const sequences = [one, two];
  assertText(() => cache.attend(0, new Float32Array(16), { sequences }), `Cannot attend in layer 0 as ${batch}`);
  assertText(
    () => cache.append(0, new Float32Array(16), new Float32Array(16), { sequences }),
    `Cannot append 2 tokens to layer 0 as ${batch}`,
  );
  cache.free();
  for (const [body, action] of cases) assertText(body, `Cannot ${action} as the cache was freed`);
  assertText(() => one.seqLen, "Cannot read the length of a sequence as the cache was freed");
  assertText(() => cache.stats(), "Cannot count the rows of a cache as the cache was freed");
  assertText(() => cache.sequence(), "Cannot create a sequence as the cache was freed");
  assertText(() => cache.reset(), "Cannot reset a cache as the cache was freed");

  const contiguous = new ContiguousCache({ ...SHAPE, sequenceCount: 2 });
  const first = contiguous.sequence(0);
  first.free();
  assertText(() => first.append(0, rows, rows), "Cannot append 1 token to layer 0 as the sequence was freed");
  assertText(() => first.seqLen, "Cannot read the length of a sequence as the sequence was freed");
  contiguous.free();
  assertText(() => first.seqLen, "Cannot read the length of a sequence as the cache was freed");
  assertText(() => contiguous.store(0, 0, rows, rows), "Cannot store 1 token to layer 0 as the cache was freed");
  assertText(() => contiguous.advance(), "Cannot advance as the cache was freed");
  assertText(() => contiguous.reset(), "Cannot reset a cache as the cache was freed");

  const pool = new BlockPool({ layerCount: 2, kvHeadCount: 2, headDim: 4 });
  pool.free();
  assertText(() => pool.stats(), "Cannot count the blocks of a pool as the pool was freed");
  const buffers = new BufferPool();
  const buffer = buffers.acquire(1024);
  buffers.free();
  buffer.free();
  assertText(() => buffers.acquire(1), "Cannot acquire a buffer of 1 bytes as the pool was freed");
  assertText(() => buffers.stats(), "Cannot count the buffers of a pool as the pool was freed");
  assertText(() => buffer.length, "Cannot read the length of a buffer as the buffer was freed");
  const attach = "it must be that of a";
  assertText(() => PagedCache.attach(7), `Cannot attach the cache of handle 7 as ${attach} cache that was not freed`);
  assertText(
    () => ContiguousCache.attach(7),
    `Cannot attach the cache of handle 7 as ${attach} cache that was not freed`,
  );
  assertText(
    () => Sequence.attach(7),
    `Cannot attach the sequence of handle 7 as ${attach} sequence that was not freed`,
  );
});

test("no text of an engine: options and arguments of the wrong kind", () => {
  using cache = new PagedCache(SHAPE);
  using contiguous = new ContiguousCache({ ...SHAPE, sequenceCount: 2 });
  const rows = new Float32Array(8);
  const sequence = cache.sequence();
  for (
    const [body, text] of [
      [() => anything(cache).append(0, rows, rows), "Cannot append as its options must be an object: it is undefined"],
      [() => anything(cache).attend(0, rows, null), "Cannot attend as its options must be an object: it is null"],
      [() => anything(sequence).attend(0, rows, null), "Cannot attend as its options must be an object: it is null"],
      [() => new PagedCache(anything(null)), "Cannot create a cache as its options must be an object: it is null"],
      [
        () => new ContiguousCache(anything(undefined)),
        "Cannot create a cache as its options must be an object: it is undefined",
      ],
      [
        () => dequantizeRows(new Uint8Array(34), anything(null)),
        "Cannot dequantize rows as its options must be an object: it is null",
      ],
      [
        () => contiguous.getKeys(0),
        "Cannot read keys as the sequence must be named where a cache has 2 sequences: it is undefined",
      ],
    ] as [() => unknown, string][]
  ) assertText(body, text);
});
