/**
 * What every `KvCache` must do, whatever layout is behind it: one suite, called with a factory for each kind of cache.
 */

import assert from "node:assert/strict";
import { test } from "node:test";
import type { FloatDType, KvCache, KvErrorCode, Rows } from "../mod.ts";
import { KvError } from "../mod.ts";
import { attention, bf16Bits, f16Bits, Random, relativeError, storedRows } from "./oracle.ts";

/** The geometry a case asks for. */
export interface CaseOptions {
  readonly layerCount: number;
  readonly kvHeadCount: number;
  readonly headDim: number;
  readonly maxSeqLen: number;
  readonly dtype: FloatDType;
}

/** A cache to run the cases over. */
export interface CacheCasesOptions {
  /** Stands before the name of each case. */
  readonly name: string;
  /** Makes one empty sequence; `free` ends whatever is behind it. */
  readonly create: (options: CaseOptions) => { cache: KvCache; free: () => void };
  /** Cases this cache cannot run, and why. */
  readonly skip: { readonly reason: string; readonly names: string[] }[];
}

/** The number of rows, and the bytes, of each layer: what a refused call must leave alone. */
function snapshot(cache: KvCache): unknown {
  const layers = Array.from({ length: cache.layerCount }, (_, layer) => cache.gather(layer));
  return { seqLen: cache.seqLen, layers };
}

/** The call must be refused with this code, and change nothing. */
export function assertRefused(cache: KvCache, code: KvErrorCode, call: () => unknown, text?: RegExp): void {
  const before = snapshot(cache);
  assertCode(code, call, text);
  assert.deepEqual(snapshot(cache), before, `${code} changed something`);
}

/** The call must throw a KvError of this code. */
export function assertCode(code: KvErrorCode, call: () => unknown, text?: RegExp): void {
  assert.throws(call, (error: unknown) => {
    assert.ok(error instanceof KvError, `not a KvError: ${error}`);
    assert.equal(error.code, code, error.message);
    assert.match(error.message, text ?? /^Cannot .* as .*$/s);
    return true;
  });
}

/** Declares the cases. */
export function cacheCases({ name, create, skip }: CacheCasesOptions): void {
  const declared = new Set<string>();

  function check(title: string, options: Partial<CaseOptions>, body: (cache: KvCache, random: Random) => void): void {
    declared.add(title);
    const reason = skip.find(({ names }) => names.includes(title))?.reason;
    if (reason !== undefined) {
      test(`${name}: ${title} (skipped: ${reason})`, { skip: true }, () => {});
      return;
    }
    test(`${name}: ${title}`, () => {
      const made = create({ layerCount: 2, kvHeadCount: 2, headDim: 4, maxSeqLen: 16, dtype: "f32", ...options });
      try {
        body(made.cache, new Random(1));
      } finally {
        made.free();
      }
    });
  }

  check("has every method and property of the interface", {}, (cache) => {
    assert.deepEqual(
      [
        cache.layerCount,
        cache.kvHeadCount,
        cache.headDim,
        cache.kvDim,
        cache.seqLen,
        cache.maxSeqLen,
        cache.rewindableTo,
      ],
      [2, 2, 4, 8, 0, 16, 0],
    );
    const methods = [
      "append",
      "commit",
      "contiguousKv",
      "gather",
      "views",
      "truncate",
      "layerDevice",
      "attend",
      "free",
    ];
    for (const method of methods) assert.equal(typeof cache[method as keyof KvCache], "function", method);
    assert.equal(typeof cache[Symbol.dispose], "function");
  });

  check("append() counts from what the layer has, commit() makes it count", {}, (cache, random) => {
    const rows = random.floats(3 * 8);
    assert.equal(cache.append(0, rows, rows).start, 0);
    assert.equal(cache.append(0, rows.subarray(0, 8), rows.subarray(0, 8)).start, 3);
    assert.equal(cache.seqLen, 0);
    cache.append(1, random.floats(32), random.floats(32));
    cache.commit(4);
    assert.equal(cache.seqLen, 4);
    assert.equal(cache.append(1, rows, rows).start, 4);
  });

  check("no row is legal and does nothing", {}, (cache, random) => {
    const rows = random.floats(8);
    for (const layer of [0, 1]) cache.append(layer, rows, rows);
    const before = snapshot(cache);
    const result = cache.append(0, new Float32Array(0), new Float32Array(0));
    assert.equal(result.start, 1);
    cache.commit(0);
    assert.deepEqual(snapshot(cache), before);
    cache.commit(1);
    cache.commit(0, { tokens: new Uint32Array(0) });
    assert.equal(cache.seqLen, 1);
  });

  check("reads in the middle of a step are per layer", {}, (cache, random) => {
    const rowsOf = (layer: number) => cache.gather(layer).k.length / cache.kvDim;
    for (const layer of [0, 1]) cache.append(layer, random.floats(24), random.floats(24));
    cache.commit(3);
    cache.append(0, random.floats(40), random.floats(40));
    assert.deepEqual([rowsOf(0), rowsOf(1), cache.seqLen], [8, 3, 3]);
    assertRefused(cache, "commit_mismatch", () => cache.commit(5));
    cache.append(1, random.floats(40), random.floats(40));
    assertRefused(cache, "commit_mismatch", () => cache.commit(4), /layer 0 has 5, layer 1 has 5/);
    cache.commit(5);
    assert.equal(cache.seqLen, 8);
  });

  check("attend() sees the pending rows of its own layer only", {}, (cache, random) => {
    const q = random.floats(2 * 4);
    const first = random.floats(8), second = random.floats(8);
    for (const layer of [0, 1]) cache.append(layer, first, first);
    cache.commit(1);
    cache.append(0, second, second);
    const both = attention({
      q,
      k: [...first, ...second],
      v: [...first, ...second],
      queryCount: 1,
      qHeadCount: 2,
      kvHeadCount: 2,
      headDim: 4,
    });
    assert.ok(relativeError(cache.attend(0, q), both.output) < 1e-6);
    assert.deepEqual(cache.attend(1, q), first); // one row has all the weight
  });

  check("append() past maxSeqLen is refused and changes nothing", { maxSeqLen: 8 }, (cache, random) => {
    for (const layer of [0, 1]) cache.append(layer, random.floats(24), random.floats(24));
    cache.commit(3);
    const text = /^Cannot append 6 tokens to layer 0 as the sequence holds at most 8: current length is 3$/;
    assertRefused(cache, "cache_full", () => cache.append(0, random.floats(48), random.floats(48)), text);
    for (const layer of [0, 1]) cache.append(layer, random.floats(40), random.floats(40));
    const pending = /^Cannot append 1 token to layer 0 as the sequence holds at most 8: current length is 8$/;
    assertRefused(cache, "cache_full", () => cache.append(0, random.floats(8), random.floats(8)), pending);
    cache.commit(5);
    assert.equal(cache.seqLen, 8);
    assertRefused(cache, "cache_full", () => cache.append(1, random.floats(8), random.floats(8)));
    cache.truncate(7);
    assert.equal(cache.append(1, random.floats(8), random.floats(8)).start, 7);
  });

  check("commit() never makes unwritten rows visible", {}, (cache, random) => {
    for (const layer of [0, 1]) cache.append(layer, random.floats(16), random.floats(16));
    assertRefused(cache, "commit_mismatch", () => cache.commit(5));
    assertRefused(cache, "commit_mismatch", () => cache.commit(1));
    cache.commit(2);
    assertRefused(cache, "commit_mismatch", () => cache.commit(2));
  });

  check("commit() takes one token id for each row", {}, (cache, random) => {
    for (const layer of [0, 1]) cache.append(layer, random.floats(16), random.floats(16));
    assertRefused(cache, "invalid_size", () => cache.commit(2, { tokens: new Uint32Array(3) }), /tokens has 3$/);
    assertRefused(cache, "invalid_size", () => cache.commit(2, { tokens: new Uint32Array(0) }));
    assert.throws(() => cache.commit(2, { tokens: [1, 2] as unknown as Uint32Array }), TypeError);
    cache.commit(2, { tokens: Uint32Array.of(7, 9) });
    assert.equal(cache.seqLen, 2);
  });

  check("truncate() rewinds, and appending again gives the bytes of a fresh cache", {}, (cache, random) => {
    const k = random.floats(9 * 8), v = random.floats(9 * 8);
    for (const layer of [0, 1]) cache.append(layer, random.floats(72), random.floats(72));
    cache.commit(9);
    cache.truncate(5);
    assert.equal(cache.seqLen, 5);
    assertRefused(cache, "position_out_of_range", () => cache.truncate(6), /^Cannot truncate to 6 tokens .* is 5$/);
    cache.truncate(0);
    assert.equal(cache.gather(0).k.length, 0);
    for (const layer of [0, 1]) cache.append(layer, k, v);
    cache.commit(9);
    for (const layer of [0, 1]) assert.deepEqual(cache.gather(layer), { k, v });
  });

  check("truncate(seqLen) abandons a half-done step", {}, (cache, random) => {
    const rows = random.floats(8);
    for (const layer of [0, 1]) cache.append(layer, rows, rows);
    cache.commit(1);
    cache.append(0, random.floats(16), random.floats(16));
    cache.truncate(1);
    assert.deepEqual(cache.gather(0).k, rows);
    assert.equal(cache.append(1, rows, rows).start, 1);
  });

  check("every refusal of append() leaves the cache as it was", { dtype: "f16" }, (cache, random) => {
    const rows = random.floats(8);
    for (const layer of [0, 1]) cache.append(layer, rows, rows);
    cache.commit(1);
    cache.append(0, rows, rows);
    const bad = (at: number, value: number) => {
      const copy = rows.slice();
      copy[at] = value;
      return copy;
    };
    assertRefused(cache, "layer_out_of_range", () => cache.append(2, rows, rows), /has 2 layers: layer is 2$/);
    assertRefused(cache, "layer_out_of_range", () => cache.append(2 ** 32 - 1, rows, rows));
    assertRefused(cache, "invalid_size", () => cache.append(0, rows, random.floats(16)), /k has 8, v has 16$/);
    assertRefused(cache, "invalid_size", () => cache.append(0, random.floats(9), random.floats(9)));
    assertRefused(cache, "invalid_size", () => cache.append(0, rows, new Float32Array(0)));
    assertRefused(cache, "cache_full", () => cache.append(0, random.floats(17 * 8), random.floats(17 * 8)));
    for (const value of [NaN, Infinity, -Infinity, 65520, -65520, 1e38]) {
      for (const at of [0, 3, 7]) {
        assertRefused(cache, "not_finite", () => cache.append(0, bad(at, value), rows));
        assertRefused(cache, "not_finite", () => cache.append(0, rows, bad(at, value)));
      }
    }
    assertRefused(cache, "invalid_config", () => cache.append(0, rows, rows, { dtype: "f16" }));
    assertRefused(cache, "invalid_config", () => cache.append(0, rows, rows, { dtype: "f64" as FloatDType }));
    assertRefused(cache, "invalid_config", () => cache.append(0, rows, rows, { layout: "heads" as "head_major" }));
    cache.append(0, bad(3, 65504), bad(0, -65519));
    assert.equal(cache.gather(0).k.length, 3 * 8);
  });

  check("wrong types and numbers that are no count are refused before anything", {}, (cache, random) => {
    const rows = random.floats(8);
    const wrong = (call: () => unknown, type: ErrorConstructor) => {
      const before = snapshot(cache);
      assert.throws(call, (error: unknown) => error instanceof type && !(error instanceof KvError));
      assert.deepEqual(snapshot(cache), before);
    };
    // deno-lint-ignore no-explicit-any
    const anything = (value: unknown): any => value;
    for (const value of [-1, 1.5, NaN, Infinity, 2 ** 32]) {
      wrong(() => cache.append(value, rows, rows), RangeError);
      wrong(() => cache.commit(value), RangeError);
      wrong(() => cache.truncate(value), RangeError);
      wrong(() => cache.views(value), RangeError);
      wrong(() => cache.gather(value), RangeError);
      wrong(() => cache.contiguousKv(value), RangeError);
      wrong(() => cache.contiguousKv(0, value), RangeError);
      wrong(() => cache.layerDevice(value), RangeError);
      wrong(() => cache.attend(value, rows), RangeError);
      wrong(() => cache.attend(0, rows, { queryCount: value }), RangeError);
      wrong(() => cache.attend(0, rows, { windowTokens: value }), RangeError);
      wrong(() => cache.attend(0, rows, { sinkTokens: value }), RangeError);
    }
    for (const value of ["0", 0n, null, undefined, {}, true]) {
      wrong(() => cache.append(anything(value), rows, rows), TypeError);
      wrong(() => cache.commit(anything(value)), TypeError);
      wrong(() => cache.truncate(anything(value)), TypeError);
      wrong(() => cache.append(0, anything(value), rows), TypeError);
      wrong(() => cache.append(0, rows, anything(value)), TypeError);
      wrong(() => cache.attend(0, anything(value)), TypeError);
    }
    wrong(() => cache.append(0, rows, new Float16Array(8)), TypeError);
    wrong(() => cache.append(0, new Float64Array(8) as Rows & Float64Array, anything(new Float64Array(8))), TypeError);
    wrong(() => cache.append(0, new Uint16Array(8), new Uint16Array(8)), TypeError);
    wrong(() => cache.append(0, anything([1, 2, 3, 4, 5, 6, 7, 8]), rows), TypeError);
    wrong(() => cache.append(0, anything(new DataView(new ArrayBuffer(32))), rows), TypeError);
    wrong(() => cache.gather(0, { dtype: anything(1) }), TypeError);
    wrong(() => cache.gather(0, { into: { k: new Uint16Array(8), v: new Uint16Array(8) } }), TypeError);
  });

  check("detached arrays are refused", {}, (cache, random) => {
    const detached = (array: Float32Array) => {
      (array.buffer as ArrayBuffer).transfer();
      return array;
    };
    const rows = random.floats(8);
    const before = snapshot(cache);
    assert.throws(() => cache.append(0, detached(random.floats(8)), rows), TypeError);
    assert.throws(() => cache.append(0, rows, detached(random.floats(8))), TypeError);
    assert.throws(() => cache.append(0, detached(random.floats(8)), detached(random.floats(8))), TypeError);
    assert.throws(() => cache.attend(0, detached(random.floats(8))), TypeError);
    assert.throws(() => cache.attend(0, rows, { into: detached(random.floats(8)) }), TypeError);
    assert.throws(() => cache.attend(0, rows, { lse: detached(random.floats(8)) }), TypeError);
    assert.throws(() => cache.gather(0, { into: { k: detached(random.floats(8)), v: rows } }), TypeError);
    assert.deepEqual(snapshot(cache), before);
  });

  for (const dtype of ["f32", "f16", "bf16"] as const) {
    check(`${dtype} rows are rounded half to even`, { dtype, headDim: 32, maxSeqLen: 64 }, (cache, random) => {
      const k = random.floats(cache.kvDim * 40), v = random.floats(cache.kvDim * 40, 1e-6);
      // Ties, denormals of f16, the largest values, both zeros.
      k.set([
        1 + 2 ** -11,
        1 + 3 * 2 ** -11,
        1 + 2 ** -8,
        1 + 3 * 2 ** -8,
        2 ** -24,
        2 ** -25,
        3 * 2 ** -25,
        65504,
        -0,
      ]);
      v.set([2 ** -14, 2 ** -14 - 2 ** -26, 65519, -65519, 2 ** -126, -(2 ** -149), 0, -(2 ** -25) - 2 ** -40]);
      cache.append(0, k, v);
      const expected = { k: storedRows(k, dtype), v: storedRows(v, dtype) };
      assert.deepEqual(cache.gather(0), expected);
      const bits = dtype === "f16" ? f16Bits : bf16Bits;
      if (dtype !== "f32") {
        assert.deepEqual(cache.gather(0, { dtype }), { k: Uint16Array.from(k, bits), v: Uint16Array.from(v, bits) });
      }
    });
  }

  check("f16 and bf16 rows arrive as their bits", { dtype: "f32" }, (cache, random) => {
    const rows = random.floats(8);
    const half = Uint16Array.from(rows, f16Bits), brain = Uint16Array.from(rows, bf16Bits);
    cache.append(0, half, half, { dtype: "f16" });
    cache.append(0, brain, brain, { dtype: "bf16" });
    cache.append(0, Float16Array.from(rows), Float16Array.from(rows), { dtype: "f16" });
    cache.append(0, new Float16Array(rows), new Float16Array(rows));
    const expected = [storedRows(rows, "f16"), storedRows(rows, "bf16"), storedRows(rows, "f16")];
    assert.deepEqual(cache.gather(0).k, Float32Array.from([...expected, expected[0]!].flatMap((row) => [...row])));
    const infinite = Uint16Array.from(half).fill(0x7c00, 7);
    assertRefused(cache, "not_finite", () => cache.append(0, infinite, half, { dtype: "f16" }));
    assertRefused(cache, "not_finite", () => cache.append(0, brain, brain.map(() => 0xff80), { dtype: "bf16" }));
    assertRefused(cache, "not_finite", () => cache.append(0, half, half.map(() => 0x7e01), { dtype: "f16" }));
    assertRefused(cache, "invalid_config", () => cache.append(0, half, half, { dtype: "f32" }));
    assertRefused(cache, "invalid_config", () => cache.append(0, rows, rows, { dtype: "bf16" }));
  });

  check("bf16 rows that overflow f16 are refused", { dtype: "f16" }, (cache) => {
    const rows = (value: number) => new Uint16Array(8).fill(bf16Bits(value));
    assertRefused(cache, "not_finite", () => cache.append(0, rows(65536), rows(1), { dtype: "bf16" }));
    cache.append(0, rows(65280), rows(-65280), { dtype: "bf16" });
    assert.deepEqual(cache.gather(0).k, new Float32Array(8).fill(65280));
  });

  check("head-major rows give the bytes of token-major ones", { kvHeadCount: 3, headDim: 5 }, (cache, random) => {
    for (const n of [1, 4]) {
      const rows = random.floats(n * 15);
      const turned = new Float32Array(n * 15);
      for (let h = 0; h < 3; h++) {
        for (let t = 0; t < n; t++) {
          for (let d = 0; d < 5; d++) turned[(h * n + t) * 5 + d] = rows[(t * 3 + h) * 5 + d]!;
        }
      }
      cache.append(0, rows, rows);
      cache.append(1, turned, turned, { layout: "head_major" });
      cache.commit(n);
    }
    assert.deepEqual(cache.gather(1), cache.gather(0));
  });

  check("rows may lie anywhere: shared memory, odd offsets", { headDim: 1, kvHeadCount: 3 }, (cache, random) => {
    const shared = new Float32Array(new SharedArrayBuffer(64), 4, 6);
    shared.set(random.floats(6));
    cache.append(0, shared, shared);
    const halves = new Uint16Array(new ArrayBuffer(32), 2, 6).map((_, i) => f16Bits(i));
    cache.append(0, halves.subarray(3), halves.subarray(3), { dtype: "f16" });
    assert.deepEqual(cache.gather(0).k, Float32Array.from([...shared, 3, 4, 5]));
    const q = new Float32Array(new SharedArrayBuffer(12));
    assert.equal(cache.attend(0, q).length, 3);
  });

  check("gather() copies into arrays it is given, or refuses them untouched", {}, (cache, random) => {
    const k = random.floats(16), v = random.floats(16);
    cache.append(0, k, v);
    const into = { k: new Float32Array(20).fill(9), v: new Float32Array(16) };
    const result = cache.gather(0, { into });
    assert.equal(result.k, into.k);
    assert.equal(result.v, into.v);
    assert.deepEqual(into, { k: Float32Array.from([...k, 9, 9, 9, 9]), v });
    const short = { k: new Float32Array(16), v: new Float32Array(15) };
    assertRefused(cache, "invalid_size", () => cache.gather(0, { into: short }), /2 rows have 16 .* v has 15$/);
    assert.deepEqual(short, { k: new Float32Array(16), v: new Float32Array(15) });
    const half = { k: new Float16Array(16), v: new Uint16Array(16) };
    cache.gather(0, { dtype: "f16", into: half });
    assert.deepEqual(half, { k: new Float16Array(k), v: Uint16Array.from(v, f16Bits) });
    assert.deepEqual(cache.gather(0, { dtype: "bf16" }).k, Uint16Array.from(k, bf16Bits));
    assertRefused(cache, "layer_out_of_range", () => cache.gather(2));
    assertRefused(cache, "invalid_config", () => cache.gather(0, { dtype: "q8_0" as FloatDType }));
    assert.deepEqual(cache.gather(1), { k: new Float32Array(0), v: new Float32Array(0) });
  });

  check("views() are the retained and pending rows, by position", {}, (cache, random) => {
    assert.deepEqual(cache.views(0), []);
    const k = random.floats(5 * 8), v = random.floats(5 * 8);
    for (const layer of [0, 1]) cache.append(layer, k.subarray(0, 24), v.subarray(0, 24));
    cache.commit(3);
    cache.append(0, k.subarray(24), v.subarray(24));
    let position = 0;
    for (const view of cache.views(0)) {
      assert.equal(view.start, position);
      assert.deepEqual([view.device, view.gpu, view.dtypeK, view.dtypeV, view.delta], ["cpu", -1, "f32", "f32", 0]);
      assert.equal(view.tier, "tail");
      for (let t = 0; t < view.length; t++) {
        for (let h = 0; h < 2; h++) {
          for (let d = 0; d < 4; d++) {
            const at = t * view.tokenStride + h * view.headStride + d;
            assert.equal(view.k![at], k[((view.start + t) * 2 + h) * 4 + d]);
            assert.equal(view.v![at], v[((view.start + t) * 2 + h) * 4 + d]);
          }
        }
      }
      position += view.length;
    }
    assert.equal(position, 5);
    assert.equal(cache.views(1).reduce((sum, view) => sum + view.length, 0), 3);
    assertRefused(cache, "layer_out_of_range", () => cache.views(2));
  });

  check("packedViews(), where there are any, are the rows head by head", {}, (cache, random) => {
    if (cache.packedViews === undefined) return;
    assert.deepEqual(cache.packedViews(0), []);
    const k = random.floats(5 * 8), v = random.floats(5 * 8);
    cache.append(0, k, v);
    let position = 0;
    for (const view of cache.packedViews(0)!) {
      const { blockSize, headDim, kvHeadCount, start, length } = view;
      assert.deepEqual([start, headDim, kvHeadCount, view.dtype, view.dtypeV], [position, 4, 2, "f32", "f32"]);
      assert.deepEqual([view.k.length, view.v.length], [blockSize * 8, blockSize * 8]);
      assert.ok(length >= 1 && length <= blockSize);
      for (let t = 0; t < length; t++) {
        for (let h = 0; h < 2; h++) {
          for (let d = 0; d < 4; d++) {
            const at = (h * blockSize + t) * headDim + d;
            assert.equal(view.k[at], k[((start + t) * 2 + h) * 4 + d]);
            assert.equal(view.v[at], v[((start + t) * 2 + h) * 4 + d]);
          }
        }
      }
      position += length;
    }
    assert.equal(position, 5);
    const [stale] = cache.packedViews(0)!;
    cache.truncate(0);
    for (const key of ["k", "v", "start", "length", "blockSize", "headDim", "kvHeadCount", "dtype"] as const) {
      assertCode("stale_view", () => stale![key]);
    }
    assertRefused(cache, "layer_out_of_range", () => cache.packedViews!(2));
  });

  check("append() gives views of the appended rows", {}, (cache, random) => {
    for (const layer of [0, 1]) cache.append(layer, random.floats(24), random.floats(24));
    cache.commit(3);
    const { start, views } = cache.append(0, random.floats(48), random.floats(48));
    assert.equal(start, 3);
    assert.equal(views[0]!.start, 3);
    assert.equal(views.reduce((sum, view) => sum + view.length, 0), 6);
    assert.deepEqual(cache.append(1, new Float32Array(0), new Float32Array(0)).views, []);
  });

  check("a view is stale after append, truncate or free", {}, (cache, random) => {
    const rows = random.floats(8);
    const append = () => cache.append(0, rows, rows);
    const assertStale = (change: () => void) => {
      const appended = append();
      const [view] = cache.views(0);
      assert.ok(view!.k!.length > 0);
      change();
      const keys = ["k", "v", "start", "length", "device", "gpu", "dtypeK", "dtypeV", "tokenStride", "delta"] as const;
      for (const key of keys) assertCode("stale_view", () => view![key], /^Cannot read a view/);
      assertCode("stale_view", () => appended.views[0]!.k, /^Cannot read a view/);
    };
    assertStale(append);
    assertStale(() => cache.truncate(0));
    assertStale(() => cache.free());
  });

  check("a commit of other layers and reads leave a view valid", {}, (cache, random) => {
    const rows = random.floats(8);
    cache.append(0, rows, rows);
    const [view] = cache.views(0);
    cache.append(1, rows, rows);
    cache.commit(1);
    cache.attend(0, rows);
    const heads = [0, 1].map((head) => [...view!.k!.subarray(head * view!.headStride, head * view!.headStride + 4)]);
    assert.deepEqual(heads.flat(), [...rows]);
    assert.equal(view!.k!.buffer, view!.k!.buffer);
  });

  check("contiguousKv() has the rows or a reason, and never copies", {}, (cache, random) => {
    const k = random.floats(24), v = random.floats(24);
    cache.append(0, k, v);
    const all = cache.contiguousKv(0);
    if (all.ok) {
      assert.deepEqual([all.k, all.v, all.length], [k, v, 3]);
      const two = cache.contiguousKv(0, 2);
      assert.ok(two.ok);
      assert.deepEqual([two.k, two.length], [k.subarray(0, 16), 2]);
      assert.equal(two.k.buffer, all.k.buffer);
      const none = cache.contiguousKv(1);
      assert.ok(none.ok && none.length === 0 && none.k.length === 0);
    } else {
      assert.match(all.reason, /^(head_major|not_adjacent|quantized|evicted|on_gpu)$/);
    }
    assertRefused(cache, "position_out_of_range", () => cache.contiguousKv(0, 4), /has 3 rows: kvLen is 4$/);
    assertRefused(cache, "position_out_of_range", () => cache.contiguousKv(1, 1));
    assertRefused(cache, "layer_out_of_range", () => cache.contiguousKv(2));
  });

  check("attend() over no rows gives 0 and an lse of -Infinity", {}, (cache, random) => {
    const lse = new Float32Array(4).fill(9);
    const into = new Float32Array(16).fill(9);
    assert.equal(cache.attend(0, random.floats(16), { queryCount: 2, into, lse }), into);
    assert.deepEqual(into, new Float32Array(16));
    assert.deepEqual(lse, new Float32Array(4).fill(-Infinity));
  });

  check("attend() refuses what does not fit and writes nothing", {}, (cache, random) => {
    const rows = random.floats(8);
    cache.append(0, rows, rows);
    const into = new Float32Array(8).fill(9), lse = new Float32Array(2).fill(9);
    const q = random.floats(8);
    assertRefused(cache, "layer_out_of_range", () => cache.attend(2, q, { into, lse }));
    const sizes: [Float32Array, Parameters<KvCache["attend"]>[2]][] = [
      [random.floats(7), {}],
      [random.floats(4), {}],
      [random.floats(12), {}],
      [new Float32Array(0), {}],
      [q, { queryCount: 2 }],
      [q, { queryCount: 2 ** 32 - 1 }],
      [q, { into: new Float32Array(7) }],
      [q, { lse: new Float32Array(1) }],
      [q, { lse: new Float32Array(0) }],
      [q, { alibiSlopes: new Float32Array(1) }],
      [q, { alibiSlopes: new Float32Array(3) }],
      [q, { sinkLogits: new Float32Array(0) }],
    ];
    for (const [queries, options] of sizes) {
      assertRefused(cache, "invalid_size", () => cache.attend(0, queries, { into, lse, ...options }));
    }
    const configs: Parameters<KvCache["attend"]>[2][] = [
      { queryCount: 0 },
      { softmaxScale: NaN },
      { softmaxScale: Infinity },
      { softcap: 0 },
      { softcap: -1 },
      { softcap: NaN },
      { softcap: 1e300 },
      { windowTokens: 0 },
      { windowTokens: 4, causal: false },
      { alibiSlopes: Float32Array.of(0, NaN) },
    ];
    for (const options of configs) {
      assertRefused(cache, "invalid_config", () => cache.attend(0, q, { into, lse, ...options }));
    }
    for (const value of [NaN, Infinity]) {
      const bad = q.with(5, value);
      assertRefused(cache, "not_finite", () => cache.attend(0, bad, { into, lse }));
    }
    assert.deepEqual([into, lse], [new Float32Array(8).fill(9), new Float32Array(2).fill(9)]);
    assert.throws(() => cache.attend(0, q, { into: new Float64Array(8) as unknown as Float32Array }), TypeError);
    assert.throws(() => cache.attend(0, q, { softcap: "1" as unknown as number }), TypeError);
    assert.throws(() => cache.attend(0, q, { causal: 1 as unknown as boolean }), TypeError);
  });

  for (const headDim of [1, 3, 31, 33, 80, 256]) {
    for (const dtype of ["f32", "f16", "bf16"] as const) {
      check(
        `attend() is right at headDim ${headDim} in ${dtype}`,
        { headDim, dtype, maxSeqLen: 128 },
        (cache, random) => {
          const n = 70, qHeadCount = 6, queryCount = 3;
          const k = random.floats(n * cache.kvDim), v = random.floats(n * cache.kvDim);
          const q = random.floats(queryCount * qHeadCount * headDim);
          cache.append(1, k, v);
          const lse = new Float32Array(queryCount * qHeadCount);
          const output = cache.attend(1, q, { queryCount, lse });
          const truth = attention({
            q,
            k: storedRows(k, dtype),
            v: storedRows(v, dtype),
            queryCount,
            qHeadCount,
            kvHeadCount: 2,
            headDim,
          });
          assert.ok(relativeError(output, truth.output) <= 1e-5, `output ${relativeError(output, truth.output)}`);
          assert.ok(relativeError(lse, truth.lse) <= 1e-6, `lse ${relativeError(lse, truth.lse)}`);
        },
      );
    }
  }

  check("layers live on the CPU", {}, (cache) => {
    assert.ok(!cache.isOnGpu);
    assert.deepEqual(cache.layerDevice(1), { device: "cpu", gpu: -1 });
    assertRefused(cache, "layer_out_of_range", () => cache.layerDevice(2));
  });

  check("free() is harmless twice, and every later call is refused", {}, (cache, random) => {
    const rows = random.floats(8);
    cache.append(0, rows, rows);
    const array = cache.views(0)[0]!.k!;
    cache.free();
    cache.free();
    cache[Symbol.dispose]();
    assert.equal(array.length, 0);
    assert.equal(array.buffer.byteLength, 0);
    const calls: (() => unknown)[] = [
      () => cache.seqLen,
      () => cache.rewindableTo,
      () => cache.isOnGpu,
      () => cache.append(0, rows, rows),
      () => cache.commit(0),
      () => cache.commit(1),
      () => cache.truncate(0),
      () => cache.views(0),
      () => cache.gather(0),
      () => cache.contiguousKv(0),
      () => cache.layerDevice(0),
      () => cache.attend(0, rows),
    ];
    for (const call of calls) assertCode("stale_handle", call);
  });

  for (const { names } of skip) {
    for (const title of names) assert.ok(declared.has(title), `no such case to skip: ${title}`);
  }
}
