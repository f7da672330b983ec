/** Codecs without a cache: ggml's records, planes of blocks, their errors, and calls nobody should make. */

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import {
  dequantizeBlock,
  dequantizeRows,
  KvError,
  packBlock,
  type PlaneShape,
  quantizeBlock,
  type QuantizedDType,
  quantizeRows,
  type RecordDType,
  systemInfo,
  unpackBlock,
} from "../mod.ts";
import { assertCode } from "./cache_cases.ts";
import { MOD, runCode } from "./child.ts";
import { Random } from "./oracle.ts";

const RECORD_DTYPES: readonly RecordDType[] = ["q8_0", "q4_0"];
const DTYPES: readonly QuantizedDType[] = ["q8_0", "q4_0", "i8", "i4", "i2"];
const SIDES = ["k", "v"] as const;
const RECORD_BYTES = { q8_0: 34, q4_0: 18 } as const;
/** The largest code, as stored. */
const CODE_MAX = { i8: 128, i4: 15, i2: 3 } as const;
const BITS = { q8_0: 8, q4_0: 4, i8: 8, i4: 4, i2: 2 } as const;

// deno-lint-ignore no-explicit-any
function anything(value: unknown): any {
  return value;
}

/** The call must throw a plain error of that class, not a KvError. */
function assertThrows(type: typeof TypeError | typeof RangeError, body: () => unknown, text?: RegExp): void {
  assert.throws(body, (error: unknown) => {
    assert.ok(error instanceof type && !(error instanceof KvError), `${error}`);
    if (text !== undefined) assert.match(error.message, text);
    return true;
  });
}

/** The f16 at a byte. */
function half(bytes: Uint8Array, at: number): number {
  const bits = bytes[at]! | bytes[at + 1]! << 8;
  const exponent = bits >> 10 & 31, fraction = bits & 1023;
  assert.ok(exponent < 31);
  const magnitude = exponent === 0 ? fraction * 2 ** -24 : (1024 + fraction) * 2 ** (exponent - 25);
  return bits >> 15 === 1 ? -magnitude : magnitude;
}

test("quantizeRows() and dequantizeRows() give the bits of ggml_records.bin", () => {
  const bytes = new Uint8Array(readFileSync(new URL("golden/ggml_records.bin", import.meta.url))).slice();
  assert.equal(new TextDecoder().decode(bytes.subarray(0, 8)), "kvern\0\0\0");
  const [version, seed, recordCount, textBytes] = new Uint32Array(bytes.buffer, 8, 4) as unknown as number[];
  assert.deepEqual([version, seed], [1, 1909]);
  let at = 24 + textBytes!;
  assert.match(
    new TextDecoder().decode(bytes.subarray(24, at)),
    /^deno run -A tests\/golden\/ggml\.ts # [^ ]+@[\d.]+ *$/,
  );
  const floats = () => {
    const array = new Float32Array(bytes.buffer, at, recordCount! * 32);
    at += array.byteLength;
    return array;
  };
  const records = (size: number) => {
    at += recordCount! * size;
    return bytes.subarray(at - recordCount! * size, at);
  };
  const values = floats(), back8 = floats(), back4 = floats();
  const expected = { q8_0: records(34), q4_0: records(18) };
  assert.equal(at, bytes.length);
  assert.ok(recordCount! >= 20);
  for (const dtype of RECORD_DTYPES) {
    assert.deepEqual(quantizeRows(values, { dtype }), expected[dtype], dtype);
    const back = dtype === "q8_0" ? back8 : back4;
    assert.deepEqual(dequantizeRows(expected[dtype], { dtype }), back, dtype);
  }
});

test("ties go to the even code, but in q4_0, where they go up", () => {
  const group = (...values: number[]) => Float32Array.from({ length: 32 }, (_, i) => values[i] ?? 0);
  // The scale is 1 in all of them.
  const eight = quantizeRows(group(127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5), { dtype: "q8_0" });
  assert.deepEqual([...new Int8Array(eight.buffer, 2, 8)], [127, 0, 2, 2, 0, -2, -2, 126]);
  const four = quantizeRows(group(-8, 0.5, 1.5, -0.5, -1.5, 7.5, -7.5), { dtype: "q4_0" });
  assert.deepEqual([...four.subarray(2, 9)].map((byte) => byte & 15), [0, 9, 10, 8, 7, 15, 1]);

  const block = (dtype: QuantizedDType, values: number[]) => {
    const rows = Float32Array.from({ length: 64 * 32 }, (_, i) => values[Math.floor(i / 32)] ?? 0);
    const shape = { dtype, side: "k", blockSize: 64, headDim: 32 } as const;
    return [...dequantizeBlock(quantizeBlock(rows, shape), shape)].filter((_, i) => i % 32 === 0).slice(
      0,
      values.length,
    );
  };
  assert.deepEqual(block("i8", [-128, 127, 0.5, 1.5, -0.5, -1.5, 126.5]), [-128, 127, 0, 2, 0, -2, 126]);
  assert.deepEqual(block("i4", [0, 15, 0.5, 1.5, 2.5, 14.5, 13.5]), [0, 15, 0, 2, 2, 14, 14]);
  assert.deepEqual(block("i2", [0, 3, 0.5, 1.5, 2.5]), [0, 3, 0, 2, 2]);
});

test("packBlock() of the records is quantizeBlock() of the rows, and unpackBlock() takes it back", () => {
  const random = new Random(3);
  for (const dtype of RECORD_DTYPES) {
    for (const side of SIDES) {
      for (const [blockSize, headDim] of [[64, 32], [64, 96], [128, 128], [256, 256]] as const) {
        const shape = { dtype, side, blockSize, headDim };
        const rows = random.floats(blockSize * headDim, 3);
        const records = quantizeRows(rows, { dtype });
        const plane = quantizeBlock(rows, shape);
        assert.deepEqual(packBlock(records, shape), plane);
        assert.deepEqual(unpackBlock(plane, shape), records);
        assert.deepEqual(dequantizeBlock(plane, shape), dequantizeRows(records, { dtype }));
      }
    }
  }
});

test("a plane has 8, 4 or 2 bits a value and the scales of its groups", () => {
  for (const dtype of DTYPES) {
    for (const side of SIDES) {
      for (const blockSize of [64, 128, 256]) {
        for (const headDim of [32, 64, 96, 128, 256]) {
          const plane = quantizeBlock(new Float32Array(blockSize * headDim), { dtype, side, blockSize, headDim });
          const isRecord = dtype === "q8_0" || dtype === "q4_0";
          const group = isRecord ? 32 : side === "k" ? blockSize : headDim % 64 === 0 ? 64 : 32;
          const values = blockSize * headDim;
          assert.equal(plane.length, values * BITS[dtype] / 8 + values / group * (isRecord ? 2 : 4));
        }
      }
    }
  }
});

/** Values of the group that element `[token][dim]` belongs to. */
function groupOf(rows: Float32Array, shape: PlaneShape, token: number, dim: number): number[] {
  const { side, blockSize, headDim } = shape;
  if (side === "k") return Array.from({ length: blockSize }, (_, t) => rows[t * headDim + dim]!);
  const size = headDim % 64 === 0 ? 64 : 32;
  const first = token * headDim + Math.floor(dim / size) * size;
  return [...rows.subarray(first, first + size)];
}

test("i8, i4 and i2 stay within half a step and what scale and min lose as f16, an outlier or not", () => {
  const random = new Random(5);
  for (const dtype of ["i8", "i4", "i2"] as const) {
    for (const side of SIDES) {
      const shape = { dtype, side, blockSize: 64, headDim: 96 } as const;
      const rows = random.floats(64 * 96);
      for (let token = 0; token < 64; token++) rows[token * 96 + 40]! += 12; // a channel apart
      rows[5] = 900;
      const back = dequantizeBlock(quantizeBlock(rows, shape), shape);
      for (let token = 0; token < 64; token++) {
        for (let dim = 0; dim < 96; dim++) {
          const group = groupOf(rows, shape, token, dim);
          const least = Math.min(...group), step = (Math.max(...group) - least) / (2 ** BITS[dtype] - 1);
          const min = dtype === "i8" ? least + 128 * step : least;
          // An f16 is off by 2^-11 of itself; the roundings of f32 are 2^-24.
          const bound = step * (0.5 + CODE_MAX[dtype] * 2 ** -11 + 2 ** -12) + Math.abs(min) * 2 ** -11 + 2 ** -20;
          const at = token * 96 + dim;
          assert.ok(Math.abs(back[at]! - rows[at]!) <= bound, `${dtype} ${side} [${token}][${dim}]`);
        }
      }
    }
  }
});

test("q8_0 stays within 0.57 scales and q4_0 within 0.51, or 1.01 opposite to the largest", () => {
  const random = new Random(7);
  for (const dtype of RECORD_DTYPES) {
    const rows = random.floats(4096, 20);
    const records = quantizeRows(rows, { dtype }), back = dequantizeRows(records, { dtype });
    for (let i = 0; i < rows.length; i++) {
      const group = rows.subarray(i - i % 32, i - i % 32 + 32);
      const largest = group.reduce((a, b) => Math.abs(b) > Math.abs(a) ? b : a, 0);
      const scale = dtype === "q8_0" ? Math.abs(largest) / 127 : largest / -8;
      const stored = half(records, Math.floor(i / 32) * RECORD_BYTES[dtype]);
      assert.ok(Math.abs(stored - scale) <= Math.abs(scale) * 2 ** -11);
      const bound = dtype === "q8_0" ? 0.57 : rows[i]! / scale > 7.49 ? 1.01 : 0.51;
      assert.ok(Math.abs(back[i]! - rows[i]!) <= bound * Math.abs(scale), `${dtype} ${i}`);
    }
  }
});

test("values up to the largest scale or min are taken, and come back finite", () => {
  const limits = { q8_0: 65520 * 127, q4_0: 65520 * 8, i8: 65520, i4: 65520, i2: 65520 };
  for (const dtype of DTYPES) {
    for (const side of SIDES) {
      for (const sign of [1, -1]) {
        const shape = { dtype, side, blockSize: 64, headDim: 32 } as const;
        const rows = new Float32Array(64 * 32).fill(1);
        const limit = sign * Math.fround(limits[dtype]);
        rows[33] = limit;
        assertCode("not_finite", () => quantizeBlock(rows, shape), /as rows must stay finite as \w+: rows\[33\] is/);
        rows[33] = limit * (1 - 2 ** -23);
        const back = dequantizeBlock(quantizeBlock(rows, shape), shape);
        assert.ok(back.every((x) => Number.isFinite(x)));
        assert.ok(Math.abs(back[33]! - limit) <= Math.abs(limit) / 8, `${back[33]} for ${limit}`);
      }
    }
  }
});

test("into is filled and returned; what lies behind is not touched; memory may be shared, and begin anywhere", () => {
  const rows = new Random(9).floats(64 * 32);
  const shape = { dtype: "q4_0", side: "v", blockSize: 64, headDim: 32 } as const;
  const records = quantizeRows(rows, { dtype: "q4_0" }), plane = quantizeBlock(rows, shape);
  const values = dequantizeRows(records, { dtype: "q4_0" });
  const shared = new Float32Array(new SharedArrayBuffer(rows.byteLength));
  shared.set(rows);
  const memories = [(bytes: number) => new ArrayBuffer(bytes), (bytes: number) => new SharedArrayBuffer(bytes)];
  for (const memory of memories) {
    const bytes = () => new Uint8Array(memory(1155)).fill(0xaa).subarray(1);
    const given = (source: Uint8Array) => {
      const copy = bytes().subarray(0, source.length);
      copy.set(source);
      return copy;
    };
    const calls: [Uint8Array, (into: Uint8Array) => Uint8Array][] = [
      [records, (into) => quantizeRows(shared, { dtype: "q4_0", into })],
      [plane, (into) => quantizeBlock(shared, { ...shape, into })],
      [plane, (into) => packBlock(given(records), { ...shape, into })],
      [records, (into) => unpackBlock(given(plane), { ...shape, into })],
    ];
    for (const [expected, run] of calls) {
      const into = bytes();
      assert.equal(run(into), into);
      assert.deepEqual(into.slice(0, 1152), expected.slice());
      assert.deepEqual([...into.subarray(1152)], [0xaa, 0xaa]);
    }
    for (
      const run of [
        (into: Float32Array) => dequantizeRows(given(records), { dtype: "q4_0", into }),
        (into: Float32Array) => dequantizeBlock(given(plane), { ...shape, into }),
      ]
    ) {
      const into = new Float32Array(memory(4 * 2050)).fill(7);
      assert.equal(run(into), into);
      assert.deepEqual(into.slice(0, 2048), values);
      assert.deepEqual([...into.subarray(2048)], [7, 7]);
    }
  }
  assert.equal(quantizeRows(new Float32Array(0), { dtype: "q8_0" }).length, 0);
  assert.equal(dequantizeRows(new Uint8Array(0), { dtype: "q8_0" }).length, 0);
});

/** Every function with arguments that succeed, and with what may be changed about them. */
function calls(): {
  readonly name: string;
  readonly input: Float32Array | Uint8Array;
  readonly into: Float32Array | Uint8Array;
  readonly options: Record<string, unknown>;
  readonly run: (input: unknown, options: unknown) => unknown;
}[] {
  const floats = () => new Float32Array(64 * 32).fill(1), bytes = () => new Uint8Array(64 * 34);
  const rows = { dtype: "q8_0" }, block = { dtype: "q8_0", side: "k", blockSize: 64, headDim: 32 };
  const row = (name: string, run: unknown, input: Float32Array | Uint8Array, options: Record<string, unknown>) => ({
    name,
    input,
    into: input instanceof Float32Array || name.endsWith("packBlock") ? bytes() : floats(),
    options,
    run: run as (input: unknown, options: unknown) => unknown,
  });
  return [
    row("quantizeRows", quantizeRows, floats(), rows),
    row("dequantizeRows", dequantizeRows, bytes(), rows),
    row("quantizeBlock", quantizeBlock, floats(), block),
    row("dequantizeBlock", dequantizeBlock, bytes(), block),
    row("packBlock", packBlock, bytes(), block),
    row("unpackBlock", unpackBlock, bytes(), block),
  ].map((call) => call.name === "unpackBlock" ? { ...call, into: bytes() } : call);
}

/** The call is refused and writes nothing. */
function assertUntouched(into: Float32Array | Uint8Array, refused: () => void): void {
  into.fill(9);
  refused();
  assert.ok((into as Uint8Array).every((value) => value === 9));
}

test("wrong types are TypeErrors", () => {
  for (const { name, input, into, options, run } of calls()) {
    run(input, { ...options, into });
    const inputs = [undefined, null, 4, "rows", [1, 2], new ArrayBuffer(2048), new DataView(new ArrayBuffer(2048))];
    const others = [new Float64Array(2048), new Uint8ClampedArray(2176), new Uint16Array(2048), new Proxy(input, {})];
    const swapped = input instanceof Float32Array ? new Uint8Array(2176) : new Float32Array(2048);
    for (const wrong of [...inputs, ...others, swapped, Object.create(input)]) {
      assertUntouched(
        into,
        () => assertThrows(TypeError, () => run(wrong, { ...options, into }), / must be a .*Array: /),
      );
    }
    const wrongInto = into instanceof Float32Array ? new Uint8Array(9999) : new Float32Array(9999);
    for (const wrong of [null, 4, [], new ArrayBuffer(9999), wrongInto, new Proxy(into, {})]) {
      assertThrows(TypeError, () => run(input, { ...options, into: wrong }), /^into must be a /);
    }
    for (const wrong of [undefined, null]) assertThrows(TypeError, () => run(input, wrong));
    for (const wrong of [undefined, null, 3, {}, ["q8_0"]]) {
      assertThrows(TypeError, () => run(input, { ...options, dtype: wrong }), /^dtype must be a string/);
    }
    if (name.endsWith("Rows")) continue;
    for (const wrong of [undefined, null, 0, {}]) {
      assertThrows(TypeError, () => run(input, { ...options, side: wrong }), /^side must be a string/);
    }
    for (const key of ["blockSize", "headDim"]) {
      for (const wrong of [undefined, null, "64", 64n, {}]) {
        assertThrows(TypeError, () => run(input, { ...options, [key]: wrong }), new RegExp(`^${key} must be a number`));
      }
      for (const wrong of [-64, 64.5, NaN, Infinity, 2 ** 32, -0]) {
        assertThrows(RangeError, () => run(input, { ...options, [key]: wrong }), new RegExp(`^${key} must be a whole`));
      }
    }
  }
});

test("options out of their range are invalid_config", () => {
  for (const { name, input, into, options, run } of calls()) {
    const refused = (change: Record<string, unknown>, text: RegExp) =>
      assertUntouched(
        into,
        () => assertCode("invalid_config", () => run(input, { ...options, into, ...change }), text),
      );
    for (const dtype of ["f32", "f16", "bf16", "q8_1", "", "Q8_0", "toString"]) {
      refused({ dtype }, /must be one of q8_0, q4_0(, i8, i4, i2)?$/);
    }
    if (!/^(de)?quantizeBlock$/.test(name)) {
      for (const dtype of ["i8", "i4", "i2"]) refused({ dtype }, /must be one of q8_0, q4_0$/);
    }
    if (name.endsWith("Rows")) continue;
    for (const side of ["", "K", "keys", "kv"]) refused({ side }, /as side must be k or v: side is /);
    for (const blockSize of [0, 1, 32, 63, 65, 96, 192, 512, 2 ** 31, 2 ** 32 - 64]) {
      refused({ blockSize }, new RegExp(`as blockSize must be 64, 128 or 256: blockSize is ${blockSize}$`));
    }
    for (const headDim of [0, 1, 16, 48, 257, 288, 2 ** 31, 2 ** 32 - 32]) {
      refused({ headDim }, new RegExp(`as headDim must be a multiple of 32 up to 256: headDim is ${headDim}$`));
    }
  }
});

test("lengths that do not fit are invalid_size, and nothing is written", () => {
  for (const { name, input, into, options, run } of calls()) {
    const refused = (change: number, text: RegExp) => {
      const other = input instanceof Float32Array
        ? new Float32Array(input.length + change)
        : new Uint8Array(input.length + change);
      assertUntouched(into, () => assertCode("invalid_size", () => run(other, { ...options, into }), text));
    };
    const isRows = name.endsWith("Rows");
    for (const change of [-1, 1, -31]) {
      refused(change, isRows ? /as a record has 3[24] / : /as 64 tokens of 32 dims have /);
    }
    if (!isRows) {
      for (const change of [-input.length, input.length]) refused(change, /as 64 tokens of 32 dims have /);
    }
    const short = into.subarray(1);
    assertUntouched(into, () => {
      assertCode(
        "invalid_size",
        () => run(input, { ...options, into: short }),
        /as it gives \d+ (bytes|values): into has /,
      );
    });
  }
});

test("values and scales that are not finite are refused, and nothing is written", () => {
  for (const { input, into, options, run } of calls()) {
    if (input instanceof Float32Array) {
      for (const bad of [NaN, Infinity, -Infinity]) {
        for (const at of [0, 1000, 2047]) {
          const rows = input.slice();
          rows[at] = bad;
          assertUntouched(
            into,
            () =>
              assertCode("not_finite", () => run(rows, { ...options, into }), new RegExp(`rows\\[${at}\\] is ${bad}$`)),
          );
        }
      }
    } else if (run !== anything(unpackBlock)) {
      // The last scale: of a record, and of a plane.
      for (const high of [0x7c, 0x7e, 0xfc]) {
        const bytes = input.slice();
        bytes[run === anything(dequantizeBlock) ? 2175 : 2176 - 33] = high;
        assertUntouched(
          into,
          () => assertCode("not_finite", () => run(bytes, { ...options, into }), /as scales must be/),
        );
      }
    }
  }
});

test("detached arrays, arrays that lie about their length, and getters that detach them do no harm", () => {
  for (const { input, into, options, run } of calls()) {
    const expected = run(input, options);
    const liar = Object.defineProperty(input.slice(), "length", { value: 2 ** 30 });
    assert.deepEqual(run(liar, options), expected);
    const gone = input.slice();
    gone.buffer.transfer();
    assertThrows(TypeError, () => run(gone, { ...options, into }), /must not be detached/);
    const goneInto = into.slice();
    goneInto.buffer.transfer();
    assertThrows(TypeError, () => run(input, { ...options, into: goneInto }), /^into must not be detached/);
    const trap = input.slice();
    const trapped = {
      ...options,
      get into() {
        trap.buffer.transfer();
        return into;
      },
    };
    assertThrows(TypeError, () => run(trap, trapped), /must not be detached/);
    let reads = 0;
    const changing = {
      ...options,
      get dtype() {
        return reads++ === 0 ? "q8_0" : "i2";
      },
    };
    assert.deepEqual(run(input, changing), expected);
  }
});

test("memory that is read and written at once is refused", () => {
  for (const { input, into, options, run } of calls()) {
    const buffer = new ArrayBuffer(2 ** 15);
    const copy = (array: Float32Array | Uint8Array, at: number) =>
      array instanceof Float32Array
        ? new Float32Array(buffer, at, array.length)
        : new Uint8Array(buffer, at, array.length);
    const source = copy(input, 0);
    source.set(input as Uint8Array);
    const overlapping = [0, 4, input.byteLength - 4];
    for (const at of overlapping) {
      const text = /must not be the same memory$/;
      assertCode("invalid_config", () => run(source, { ...options, into: copy(into, at) }), text);
    }
    assert.deepEqual(source, input);
    const apart = run(source, { ...options, into: copy(into, input.byteLength) });
    assert.deepEqual(apart, run(input, options));
  }
});

/** Hashes of planes and records of seeded values of every size; the same text runs in a process of each level. */
const SCAN = `
  import { createHash } from "node:crypto";
  import { dequantizeBlock, quantizeBlock, quantizeRows, systemInfo } from "${MOD}";
  let state = 1909;
  const next = () => (state = Math.imul(state, 1664525) + 1013904223 | 0) / 2 ** 31;
  const hash = createHash("sha256");
  for (let round = 0; round < 12; round++) {
    const headDim = [32, 64, 96, 128][round % 4], blockSize = [64, 128, 256][round % 3];
    const factor = 2 ** (round * 3 - 27);
    const rows = Float32Array.from({ length: blockSize * headDim }, () => Math.round(next() * 1000) * factor);
    for (const dtype of ["q8_0", "q4_0", "i8", "i4", "i2"]) {
      for (const side of ["k", "v"]) {
        const shape = { dtype, side, blockSize, headDim };
        const plane = quantizeBlock(rows, shape);
        hash.update(plane).update(new Uint8Array(dequantizeBlock(plane, shape).buffer));
      }
    }
    for (const dtype of ["q8_0", "q4_0"]) hash.update(quantizeRows(rows, { dtype }));
  }
  console.log(JSON.stringify([systemInfo().level, hash.digest("hex")]));
`;

test("every level gives the same bytes", { timeout: 120_000 }, () => {
  const hashes = new Map<string, string>();
  for (const level of systemInfo().levels) {
    const { stdout, stderr } = runCode(SCAN, { env: { KVERN_LEVEL: level } });
    assert.equal(stderr, "");
    const [inForce, hash] = JSON.parse(stdout);
    assert.equal(inForce, level);
    hashes.set(level, hash);
  }
  assert.equal(new Set(hashes.values()).size, 1, JSON.stringify([...hashes]));
});

test("the bytes of seeded rows: if a hash changes, saved caches can no longer be read", () => {
  let state = 1909;
  const rows = Float32Array.from({ length: 64 * 128 }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) | 0;
    return (state >> 8) * 2 ** -20;
  });
  const hash = createHash("sha256");
  for (const dtype of DTYPES) {
    for (const side of SIDES) hash.update(quantizeBlock(rows, { dtype, side, blockSize: 64, headDim: 128 }));
  }
  for (const dtype of RECORD_DTYPES) hash.update(quantizeRows(rows, { dtype }));
  assert.equal(hash.digest("hex"), "e0a7224781ca6494181bbbfa0fe188c8b72829aabce3f131da96d4c50f4b2bc4");
});
