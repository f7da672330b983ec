/** A process of attend_memory_test.ts: what attention over many codes takes of memory at its height, as JSON. */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { PagedCache, systemInfo, twoTierDefaults } from "../mod.ts";
import { Random } from "./oracle.ts";

/** The most memory this process ever had at once, in bytes. */
function peakBytes(): number {
  return Number(/VmHWM:\s+(\d+) kB/.exec(readFileSync("/proc/self/status", "utf8"))![1]) * 1024;
}

const { kvHeadCount, headDim } = twoTierDefaults;
const n = 58_240; // 910 blocks of 64 rows of 1152 bytes; as f32 they are 455 MiB
const random = new Random(11);
using cache = new PagedCache({ layerCount: 1, kvHeadCount, headDim, maxSeqLen: n, store: "q4_0" });
const sequence = cache.sequence();
const rows = random.floats(640 * kvHeadCount * headDim);
for (let row = 0; row < n; row += 640) {
  sequence.append(0, rows, rows);
  sequence.commit(640);
}
const q = random.floats(32 * headDim), into = new Float32Array(q.length);
// Nothing is attended before: the first call would have been at the height already.
const reserved = systemInfo().reservedBytes;
const before = peakBytes();
for (let step = 0; step < 3; step++) sequence.attend(0, q, { into });
const grown = peakBytes() - before;
assert.equal(systemInfo().reservedBytes, reserved);
assert.ok(into.every(Number.isFinite));
const { storeBytes } = cache.stats();
console.log(JSON.stringify({ grown, storeBytes }));
