/** What systemInfo() and readRate() say. */

import assert from "node:assert/strict";
import { availableParallelism, totalmem } from "node:os";
import { test } from "node:test";
import {
  ContiguousCache,
  KvError,
  PagedCache,
  readRate,
  type ReadRateOptions,
  setThreadCount,
  systemInfo,
} from "../mod.ts";
import { MOD, runCode, runtime } from "./child.ts";
import { Random } from "./oracle.ts";

test("systemInfo() tells level, CPUs, memory and the library", () => {
  const info = systemInfo();
  assert.ok(info.levels.includes(info.level), info.level);
  const known = ["v2", "v3", "avx512", "amx", "neon", "dotprod"];
  assert.deepEqual(info.levels, known.filter((level) => info.levels.includes(level as typeof info.level)));
  assert.ok(info.levels.length >= 1);
  assert.ok(info.cpuCount >= 1 && info.cpuCount <= availableParallelism(), `${info.cpuCount} CPUs`);
  assert.ok(info.threadCount >= 1 && info.threadCount <= info.cpuCount, `${info.threadCount} threads`);
  assert.ok(info.memoryLimitBytes > 2 ** 28 && info.memoryLimitBytes <= totalmem(), `${info.memoryLimitBytes} bytes`);
  assert.equal(info.runtime, runtime);
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

test("setThreadCount() changes no bit of what attend() gives", () => {
  const before = systemInfo().threadCount;
  using cache = new PagedCache({ layerCount: 1, kvHeadCount: 4, headDim: 64, maxSeqLen: 8192, store: "q8_0" });
  const random = new Random(3);
  const sequences = [5000, 300, 1].map((n) => {
    const sequence = cache.sequence();
    sequence.append(0, random.floats(n * 256), random.floats(n * 256));
    sequence.commit(n);
    return sequence;
  });
  const q = random.floats(3 * 8 * 64);
  try {
    setThreadCount(1);
    const alone = cache.attend(0, q, { sequences });
    for (const count of [2, 3, 256]) {
      setThreadCount(count);
      assert.equal(systemInfo().threadCount, count);
      assert.deepEqual(cache.attend(0, q, { sequences }), alone);
    }
  } finally {
    setThreadCount(before);
  }
});

test("setThreadCount() refuses what is no count of threads", () => {
  const before = systemInfo().threadCount;
  for (const count of [0, 257, 2 ** 32 - 1]) {
    assert.throws(
      () => setThreadCount(count),
      (error: unknown) => error instanceof KvError && error.code === "invalid_config",
    );
  }
  for (const count of [-1, 1.5, NaN, Infinity]) assert.throws(() => setThreadCount(count), RangeError);
  assert.throws(() => setThreadCount("2" as unknown as number), TypeError);
  assert.equal(systemInfo().threadCount, before);
});

test(
  "KVERN_THREADS says how many threads there may be, and nothing but a count is taken for one",
  { timeout: 60_000 },
  () => {
    const code = `import { systemInfo } from "${MOD}";
    try { console.log(systemInfo().threadCount); } catch (error) { console.log(error.code, error.message); }`;
    const answer = (threads: string) => runCode(code, { env: { KVERN_THREADS: threads } }).stdout.trim();
    assert.equal(answer("3"), "3");
    for (const wrong of ["0", "257", "two", "-1", "1.5", "1e2"]) {
      assert.equal(
        answer(wrong),
        `invalid_config Cannot use KVERN_THREADS as it must be 1 to 256: KVERN_THREADS is ${wrong}`,
      );
    }
  },
);
