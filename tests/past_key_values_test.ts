/**
 * Keys and values as tensors, in and out, with a model that is written down: a row of it is a number made of all tokens up to
 * its own, so that a row of another text, head or layer would be seen.
 */

import assert from "node:assert/strict";
import { test } from "node:test";
import { PagedCache, type PagedCacheOptions, type Sequence } from "../mod.ts";
import { keep, type KvTensor, layersOf, type PastKeyValues, pastKeyValues } from "../src/onnx.ts";
import { assertCode } from "./cache_cases.ts";
import { f16Bits, Random } from "./oracle.ts";

const LAYERS = 3, HEADS = 2, DIM = 32;

/** Past tensors of a run as transformers.js has them, and how many tokens it computed. */
interface Run {
  readonly past: Record<string, KvTensor>;
  readonly computed: number;
}

/** Computes what comes behind `past`: each new row follows from all tokens before it. */
function run(tokens: readonly number[], past: PastKeyValues = {}, type: "float32" | "float16" = "float32"): Run {
  const start = past["past_key_values.0.key"]?.dims[2] ?? 0;
  const out: Record<string, KvTensor> = {};
  for (let layer = 0; layer < LAYERS; layer++) {
    for (const side of ["key", "value"]) {
      const name = `past_key_values.${layer}.${side}`;
      const data = type === "float32"
        ? new Float32Array(HEADS * tokens.length * DIM)
        : new Uint16Array(HEADS * tokens.length * DIM);
      for (let head = 0; head < HEADS; head++) {
        const before = past[name]?.data as Float32Array | Uint16Array | undefined;
        const to = head * tokens.length * DIM;
        if (before !== undefined) data.set(before.subarray(head * start * DIM, (head + 1) * start * DIM), to);
        for (let token = start; token < tokens.length; token++) {
          const numbers = rowOf(tokens.slice(0, token + 1), layer, side, head);
          data.set(type === "float32" ? numbers : numbers.map(f16Bits), to + token * DIM);
        }
      }
      out[name] = { type, dims: [1, HEADS, tokens.length, DIM], data };
    }
  }
  return { past: out, computed: tokens.length - start };
}

/** Numbers that f16 holds. */
function rowOf(tokens: readonly number[], layer: number, side: string, head: number): number[] {
  let seed = layer * 4 + head * 2 + (side === "key" ? 0 : 1);
  for (const token of tokens) seed = (Math.imul(seed, 31) + token) >>> 0;
  const random = new Random(seed);
  return Array.from({ length: DIM }, () => (random.below(257) - 128) / 64);
}

function makeCache(options: Partial<PagedCacheOptions> = {}): PagedCache {
  return new PagedCache({
    layerCount: LAYERS,
    kvHeadCount: HEADS,
    headDim: DIM,
    maxSeqLen: 512,
    prefix: {},
    ...options,
  });
}

const text = (seed: number, length: number) => Array.from({ length }, (_, i) => seed * 1000 + i);
const start = (cache: PagedCache, tokens: readonly number[], salt?: string) =>
  cache.sequence({ tokens: Uint32Array.from(tokens), ...(salt === undefined ? {} : { salt }) });

/** A turn of a chat as a caller writes it: what is known comes out of the cache, what was computed goes into it. */
function turn(cache: PagedCache, tokens: readonly number[], salt?: string): Run {
  using sequence = start(cache, tokens, salt);
  const result = run(tokens, pastKeyValues(sequence));
  keep(cache, tokens, result.past, salt === undefined ? {} : { salt }).free();
  return result;
}

test("a chat computes each token once, and every run has the rows of one that began with nothing", () => {
  using cache = makeCache();
  const first = [...text(1, 150)],
    second = [...first, ...text(2, 40)],
    other = [...first.slice(0, 100), ...text(3, 30)];
  assert.deepEqual([first, second, other, second].map((tokens) => turn(cache, tokens).computed), [150, 40, 30, 1]);
  for (const tokens of [first, second, other]) {
    using sequence = start(cache, tokens);
    assert.equal(sequence.seqLen, tokens.length - 1);
    assert.deepEqual(run(tokens, pastKeyValues(sequence)).past, run(tokens).past);
  }
  assert.equal(turn(cache, first, "another tenant").computed, 150);
  using stranger = cache.sequence({ tokens: Uint32Array.from(first), fingerprint: "another model" });
  assert.equal(stranger.seqLen, 0);
});

test("rows that the cache knows are not even looked at", () => {
  using cache = makeCache();
  const first = text(1, 100), second = [...first, ...text(2, 20)];
  keep(cache, first, run(first).past).free();
  const { past } = run(second);
  for (const { data } of Object.values(past)) {
    for (let head = 0; head < HEADS; head++) {
      (data as Float32Array).fill(NaN, head * 120 * DIM, (head * 120 + 99) * DIM);
    }
  }
  using sequence = keep(cache, second, past);
  assert.equal(sequence.seqLen, 120);
  assert.deepEqual(run([...second, 7], pastKeyValues(sequence)).past, run([...second, 7]).past);
});

test("tokens behind the last row are no rows, and tell that all of them are known", () => {
  using cache = makeCache();
  const tokens = text(1, 90);
  const { past } = run(tokens.slice(0, 70));
  using first = keep(cache, tokens, past);
  const { usedBytes, totalTokens } = cache.stats();
  using again = keep(cache, tokens, past);
  assert.deepEqual([first.seqLen, again.seqLen], [70, 70]);
  assert.deepEqual(again.blockTable(0), first.blockTable(0)); // not one row was written
  assert.equal(cache.stats().usedBytes, usedBytes);
  assert.equal(totalTokens, 70);
  using full = makeCache({ maxSeqLen: 64 });
  using whole = keep(full, tokens, run(tokens.slice(0, 64)).past);
  assert.equal(whole.seqLen, 64);
});

test("f16 tensors go in and out as their bits, in both kinds of array", () => {
  using cache = makeCache();
  const tokens = text(4, 80);
  const { past } = run(tokens, {}, "float16");
  keep(cache, tokens, past, { salt: "bits" }).free();
  using sequence = start(cache, [...tokens, 1], "bits");
  assert.deepEqual({ ...pastKeyValues(sequence, { dtype: "f16" }) }, past);
  assert.deepEqual({ ...pastKeyValues(sequence) }, run(tokens).past);
  if (!("Float16Array" in globalThis)) return;
  const halves = Object.entries(past).map(([name, tensor]) => {
    const { buffer } = tensor.data as Uint16Array<ArrayBuffer>;
    return [name, { ...tensor, data: new Float16Array(buffer) }];
  });
  using kept = keep(cache, tokens, Object.fromEntries(halves), { salt: "halves" });
  assert.deepEqual({ ...pastKeyValues(kept, { dtype: "f16" }) }, past);
});

test("what comes out of codes is what attention sees", () => {
  using cache = makeCache({ store: "i4", tail: { tokens: 64 } });
  const tokens = text(5, 300);
  using sequence = keep(cache, tokens, run(tokens).past);
  const stored = cache.stats();
  assert.ok(stored.storeTokens >= 192, `${stored.storeTokens} rows are in codes`);
  const tensors = pastKeyValues(sequence);
  for (let layer = 0; layer < LAYERS; layer++) {
    const { k, v } = sequence.gather(layer);
    for (const [rows, side] of [[k, "key"], [v, "value"]] as const) {
      const tensor = tensors[`past_key_values.${layer}.${side}`]!;
      assert.deepEqual(tensor.dims, [1, HEADS, 300, DIM]);
      const turned = new Float32Array(rows.length);
      for (let token = 0; token < 300; token++) {
        for (let head = 0; head < HEADS; head++) {
          const from = (token * HEADS + head) * DIM;
          turned.set(rows.subarray(from, from + DIM), (head * 300 + token) * DIM);
        }
      }
      assert.deepEqual(tensor.data, turned);
    }
  }
});

test("a class makes the tensors, and outputs may be kept as they are", () => {
  class Tensor {
    readonly type: string;
    readonly data: unknown;
    readonly dims: number[];
    constructor(type: string, data: unknown, dims: number[]) {
      Object.assign(this, { type, data, dims });
      this.type = type;
      this.data = data;
      this.dims = dims;
    }
  }
  using cache = makeCache();
  const tokens = text(6, 20);
  const logits = { type: "float32", dims: [1, 20, 9], data: new Float32Array(180), location: "cpu" };
  const outputs = Object.fromEntries(
    Object.entries(run(tokens).past).map(([name, tensor]) => [name.replace("past_key_values", "present"), tensor]),
  );
  using sequence = keep(cache, tokens, { logits, ...outputs });
  const tensors = pastKeyValues(sequence, { Tensor });
  assert.equal(Object.keys(tensors).length, 2 * LAYERS);
  for (const [name, tensor] of Object.entries(tensors)) {
    assert.ok(tensor instanceof Tensor, name);
    assert.deepEqual({ ...tensor }, outputs[name.replace("past_key_values", "present")]);
  }
  using fresh = cache.sequence();
  const empty = pastKeyValues(fresh)["past_key_values.2.value"]!;
  assert.deepEqual([empty.dims, empty.data], [[1, HEADS, 0, DIM], new Float32Array(0)]);
});

test("layersOf() gives the layers of a cache for a model, also of heads that differ", () => {
  const tensor = (heads: number, dim: number) => ({
    type: "float32",
    dims: [1, heads, 0, dim],
    data: new Float32Array(0),
  });
  const past = {
    "past_key_values.0.key": tensor(2, 32),
    "past_key_values.0.value": tensor(2, 32),
    "past_key_values.1.key": tensor(1, 64),
    "past_key_values.1.value": tensor(1, 64),
  };
  const layers = layersOf(past);
  assert.deepEqual(layers, [{ kvHeadCount: 2, headDim: 32 }, { kvHeadCount: 1, headDim: 64 }]);
  using cache = new PagedCache({ layers, maxSeqLen: 64 });
  using sequence = keep(cache, [], past);
  assert.deepEqual({ ...pastKeyValues(sequence) }, past);
});

test("keep() refuses what does not fit, with its rule, and leaves the cache as it was", () => {
  using cache = makeCache();
  const tokens = text(7, 10);
  const { past } = run(tokens);
  const key = past["past_key_values.1.key"]!;
  const before = cache.stats();
  const kept: Sequence[] = [];
  const keeping = (change: Record<string, unknown>, ids: ArrayLike<number> = tokens) => () =>
    kept.push(keep(cache, ids, { ...past, ...change } as PastKeyValues));
  const cases: [Parameters<typeof assertCode>[0], () => unknown, RegExp][] = [
    [
      "invalid_config",
      keeping({ "past_key_values.1.key": undefined }),
      /layer 1 must have a key and a value: it has past/,
    ],
    [
      "invalid_config",
      keeping({ "past_key_values.1.key": { ...key, dims: [2, 1, 10, 32] } }),
      /of one sequence: it is \[2, /,
    ],
    [
      "invalid_config",
      keeping({ "past_key_values.1.key": { ...key, dims: [1, 2, 10, -32] } }),
      /it is \[1, 2, 10, -32\]$/,
    ],
    [
      "invalid_config",
      keeping({ "past_key_values.1.key": { ...key, dims: [1, 2, 5, 64] } }),
      /must be alike: one is f32 \[1, 2/,
    ],
    [
      "invalid_size",
      keeping({ "past_key_values.1.key": { ...key, data: new Float32Array(9) } }),
      /640 elements, .*: it has 9$/,
    ],
    [
      "unsupported",
      keeping({ "past_key_values.1.key": { ...key, type: "int8" } }),
      /be float32 or float16: it is int8$/,
    ],
    [
      "unsupported",
      keeping({ "past_key_values.1.key": { ...key, type: "toString" } }),
      /be float32 or float16: it is toString$/,
    ],
    [
      "unsupported",
      keeping({ "past_key_values.1.key": { ...key, location: "gpu-buffer" } }),
      /CPU: it is on gpu-buffer$/,
    ],
    ["unsupported", keeping({ "past_conv.0": key }), /layers 0, 1 and so on: there is past_conv\.0$/],
    ["unsupported", keeping({ "past_key_values.0.encoder.key": key }), /there is past_key_values\.0\.encoder\.key$/],
    ["invalid_config", keeping({ ...run(tokens.slice(1)).past, ...layer(past, 2) }), /layer 0 has 9, layer 2 has 10$/],
    ["invalid_size", keeping({}, tokens.slice(1)), /each of 10 rows needs a token: tokens has 9$/],
    ["invalid_config", () => keep(cache, tokens, layer(past, 0)), /the cache has 3 layers: there are tensors of 1$/],
    ["invalid_config", () => keep(cache, tokens, {}), /past_key_values\.0\.key or present\.0\.key: there is neither$/],
    ["cache_full", () => keep(cache, text(1, 600), run(text(1, 600)).past), /512/],
    [
      "not_finite",
      keeping({ "past_key_values.2.key": { ...key, data: new Float32Array(640).fill(NaN) } }),
      /k\[0\] is NaN/,
    ],
  ];
  for (const [code, call, rule] of cases) {
    assertCode(code, call, rule);
    assert.deepEqual(cache.stats(), { ...cache.stats(), ...same(before) }, code);
  }
  using wide = new PagedCache({ layerCount: LAYERS, kvHeadCount: 1, headDim: 64, maxSeqLen: 64 });
  assertCode(
    "invalid_config",
    () => keep(wide, tokens, past),
    /layer 0 of the cache has 1 KV heads of 64: its tensors have 2 /,
  );
  assert.throws(keeping({}, tokens.map(BigInt) as unknown as number[]), /must be a number, not a bigint: Number/);
  const words = { ...key, data: new Int32Array(640) };
  assert.throws(keeping({ "past_key_values.1.key": words }), {
    name: "TypeError",
    message: /a Float32Array, as it is float32/,
  });
  assert.throws(() => keep(cache, tokens, null as never), TypeError);
  assertCode("invalid_config", () => keep(cache, tokens, past, { slat: "a" } as never), /did you mean salt\?$/);
  assert.deepEqual(kept, []);
});

/** The tensors of one layer. */
function layer(past: PastKeyValues, index: number): PastKeyValues {
  return Object.fromEntries(Object.entries(past).filter(([name]) => name.startsWith(`past_key_values.${index}.`)));
}

/** What a refused call must not change. */
function same({ sequenceCount, totalTokens, usedBytes }: ReturnType<PagedCache["stats"]>): object {
  return { sequenceCount, totalTokens, usedBytes };
}

test("pastKeyValues() refuses rows that were let go, and a dtype that no graph has", () => {
  using cache = makeCache({ retention: { keep: "newest", tokens: 64 } });
  const tokens = text(8, 100);
  using sequence = keep(cache, tokens, run(tokens).past);
  assertCode(
    "position_out_of_range",
    () => pastKeyValues(sequence),
    /100 rows from position 0 on must be seen, the layer has/,
  );
  assertCode("invalid_config", () => pastKeyValues(sequence, { dtype: "bf16" as never }), /f32 or f16: it is bf16$/);
  assert.throws(() => pastKeyValues(sequence, { Tensor: {} as never }), TypeError);
  sequence.free();
  assertCode("stale_handle", () => pastKeyValues(sequence));
});
