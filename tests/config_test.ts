/** Options and the memory formula. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { ContiguousCache, type ContiguousCacheOptions, type FloatDType, memoryBytes } from "../mod.ts";
import { assertCode } from "./cache_cases.ts";

const good: ContiguousCacheOptions = { layerCount: 2, kvHeadCount: 2, headDim: 8, maxSeqLen: 16 };

test("T5: 12 layers of 12 heads of 64 at 2048 tokens are 144 MiB", () => {
  const bytes = memoryBytes({ layerCount: 12, kvHeadCount: 12, headDim: 64, maxSeqLen: 2048 });
  assert.equal(bytes, 150_994_944);
  assert.equal(bytes / 2 ** 20, 144);
});

test("memoryBytes() of the nine geometries, three of them past 2^32", () => {
  const table = [
    [12, 12, 64, [150_994_944, 301_989_888, 603_979_776], [144, 288, 576]],
    [32, 32, 80, [1_342_177_280, 2_684_354_560, 5_368_709_120], [1280, 2560, 5120]],
    [32, 32, 128, [2_147_483_648, 4_294_967_296, 8_589_934_592], [2048, 4096, 8192]],
  ] as const;
  for (const [layerCount, kvHeadCount, headDim, bytes, mebibytes] of table) {
    [2048, 4096, 8192].forEach((maxSeqLen, i) => {
      const actual = memoryBytes({ layerCount, kvHeadCount, headDim, maxSeqLen });
      assert.equal(actual, bytes[i]);
      assert.equal(actual / 2 ** 20, mebibytes[i]);
    });
  }
});

test("TinyLlama stores 4 KV heads: 88 MiB in f32, 44 in f16, and 704 if query heads were stored", () => {
  const tiny = { layerCount: 22, kvHeadCount: 4, headDim: 64, maxSeqLen: 2048 };
  assert.equal(memoryBytes(tiny), 88 * 2 ** 20);
  assert.equal(memoryBytes({ ...tiny, dtype: "f16" }), 44 * 2 ** 20);
  assert.equal(memoryBytes({ ...tiny, dtype: "bf16" }), 44 * 2 ** 20);
  assert.equal(memoryBytes({ ...tiny, dtype: { k: "f32", v: "bf16" } }), 66 * 2 ** 20);
  assert.equal(memoryBytes({ ...tiny, kvHeadCount: 32 }), 704 * 2 ** 20);
  assert.equal(memoryBytes({ ...tiny, sequenceCount: 64 }), 64 * 88 * 2 ** 20);
});

test("memoryBytes() needs no memory, and counts as long as a number is exact", () => {
  const petabytes = { layerCount: 2 ** 15, kvHeadCount: 128, headDim: 256, maxSeqLen: 2 ** 20 };
  assert.equal(memoryBytes(petabytes), 2 ** 53);
  assertCode("out_of_memory", () => memoryBytes({ ...petabytes, sequenceCount: 2 }));
  assert.equal(memoryBytes({ ...good, maxBytes: 1 }), memoryBytes(good));
  const absurd = { layerCount: 2 ** 32 - 1, kvHeadCount: 2 ** 24 - 1, headDim: 256, maxSeqLen: 2 ** 31 - 1 };
  assertCode("out_of_memory", () => memoryBytes(absurd));
});

test("a refusal gives all digits of the bytes that were asked for", () => {
  const shape = { layerCount: 1000, kvHeadCount: 1000, headDim: 256, maxSeqLen: 1e9 };
  const two = 2_048_000_000_000_000_000n;
  const refused = (call: () => unknown, bytes: bigint) =>
    assertCode("out_of_memory", call, new RegExp(`: K and V need ${bytes} bytes$`));
  refused(() => new ContiguousCache(shape), two);
  refused(() => memoryBytes(shape), two);
  refused(
    () => memoryBytes({ ...shape, dtype: { k: "f16", v: "f32" }, sequenceCount: 1e9 }),
    two * 3n * 10n ** 9n / 4n,
  );
  refused(() => new ContiguousCache({ ...shape, dtype: "bf16", sequenceCount: 3 }), two * 3n / 2n);
});

// Each is refused alike by the planner and by the cache itself.
for (
  const [name, call] of [
    ["memoryBytes()", (options: ContiguousCacheOptions) => void memoryBytes(options)],
    ["new ContiguousCache()", (options: ContiguousCacheOptions) => new ContiguousCache(options).free()],
  ] as const
) {
  const counts = ["layerCount", "kvHeadCount", "headDim", "maxSeqLen", "sequenceCount"] as const;

  test(`${name} refuses counts of 0 and past their range as invalid_config`, () => {
    call(good);
    for (const key of counts) {
      assertCode("invalid_config", () => call({ ...good, [key]: 0 }), new RegExp(`as ${key} must be .*: ${key} is 0$`));
    }
    assertCode("invalid_config", () => call({ ...good, headDim: 257 }), /1 to 256: headDim is 257$/);
    assertCode("invalid_config", () => call({ ...good, headDim: 2 ** 32 - 1 }));
    assertCode("invalid_config", () => call({ ...good, maxSeqLen: 2 ** 31 }));
    const rule =
      /as a row of kvHeadCount times headDim elements must be below 2\^32: kvHeadCount is 536870912, headDim is 8$/;
    assertCode("invalid_config", () => call({ ...good, kvHeadCount: 2 ** 29 }), rule);
    assertCode("out_of_memory", () => call({ ...good, kvHeadCount: 2 ** 29 - 1, layerCount: 2 ** 20 }));
    assertCode("invalid_config", () => call({ ...good, maxBytes: 0 }));
  });

  test(`${name} throws RangeError for what is no count`, () => {
    for (const key of [...counts, "maxBytes"]) {
      for (const value of [-1, 1.5, NaN, Infinity, key === "maxBytes" ? 2 ** 53 : 2 ** 32]) {
        assert.throws(() => call({ ...good, [key]: value }), RangeError, `${key} ${value}`);
      }
    }
  });

  test(`${name} throws TypeError for the wrong type`, () => {
    for (const key of [...counts, "maxBytes"]) {
      for (const value of ["4", 4n, null, true, {}]) {
        assert.throws(() => call({ ...good, [key]: value }), TypeError, `${key} ${String(value)}`);
      }
    }
    for (const key of ["layerCount", "kvHeadCount", "headDim", "maxSeqLen"]) {
      assert.throws(() => call({ ...good, [key]: undefined }), TypeError);
    }
    for (const options of [undefined, null, 4]) {
      assert.throws(() => call(options as unknown as ContiguousCacheOptions), TypeError);
    }
    for (const dtype of [1, null, { k: "f32" }, ["f32", "f32"]]) {
      assert.throws(() => call({ ...good, dtype: dtype as unknown as FloatDType }), TypeError);
    }
  });

  test(`${name} refuses a dtype it does not store`, () => {
    for (const dtype of ["f64", "q8_0", "", "F16", "toString"]) {
      assertCode(
        "invalid_config",
        () => call({ ...good, dtype: dtype as FloatDType }),
        /must be one of f32, f16, bf16$/,
      );
      assertCode("invalid_config", () => call({ ...good, dtype: { k: "f16", v: dtype as FloatDType } }), /dtype\.v/);
    }
  });
}
