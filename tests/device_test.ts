/** What systemInfo() and readRate() say. */

import assert from "node:assert/strict";
import { availableParallelism, totalmem } from "node:os";
import { test } from "node:test";
import { ContiguousCache, KvError, readRate, type ReadRateOptions, systemInfo } from "../mod.ts";
import { inDeno } from "./child.ts";

test("systemInfo() tells level, CPUs, memory and the library", () => {
  const info = systemInfo();
  assert.ok(info.levels.includes(info.level), info.level);
  const known = ["v2", "v3", "avx512", "amx", "neon", "dotprod"];
  assert.deepEqual(info.levels, known.filter((level) => info.levels.includes(level as typeof info.level)));
  assert.ok(info.levels.length >= 1);
  assert.ok(info.cpuCount >= 1 && info.cpuCount <= availableParallelism(), `${info.cpuCount} CPUs`);
  assert.ok(info.memoryLimitBytes > 2 ** 28 && info.memoryLimitBytes <= totalmem(), `${info.memoryLimitBytes} bytes`);
  assert.equal(info.runtime, inDeno ? "deno" : "bun");
  assert.match(info.libraryPath, /kvern\.(so|dylib|dll)$/);
});

test("systemInfo() counts caches alive and the bytes they reserve", () => {
  const before = systemInfo();
  const caches = [1, 2, 3].map((layerCount) =>
    new ContiguousCache({ layerCount, kvHeadCount: 1, headDim: 64, maxSeqLen: 64 })
  );
  const during = systemInfo();
  assert.equal(during.liveCaches, before.liveCaches + 3);
  const reserved = caches.reduce((sum, cache) => sum + cache.stats().reservedBytes, 0);
  assert.equal(during.reservedBytes - before.reservedBytes, reserved);
  for (const cache of caches) cache.free();
  assert.deepEqual([systemInfo().liveCaches, systemInfo().reservedBytes], [before.liveCaches, before.reservedBytes]);
});

test("readRate() measures a plausible rate, and refuses what it cannot measure", () => {
  const rate = readRate({ bytes: 2 ** 24 });
  assert.ok(rate > 1e6 && rate < 1e14, `${rate} bytes a second`);
  assert.ok(readRate({ bytes: 2 ** 24, threads: 2 }) > 1e6);
  const code = (options: ReadRateOptions, expected: string) =>
    assert.throws(() => readRate(options), (error: unknown) => error instanceof KvError && error.code === expected);
  code({ bytes: 511 }, "invalid_config");
  code({ bytes: 2 ** 24, threads: 0 }, "invalid_config");
  code({ bytes: 2 ** 41 }, "invalid_config");
  assert.throws(() => readRate({ threads: 1.5 }), RangeError);
  assert.throws(() => readRate({ bytes: NaN }), RangeError);
  assert.throws(() => readRate({ bytes: "1" as unknown as number }), TypeError);
});
