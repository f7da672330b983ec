/** What one thread of a process may say about the others: the level is settled once, the thread count is a caller's own. */

import assert from "node:assert/strict";
import process from "node:process";
import { test } from "node:test";
import { PagedCache, setThreadCount, systemInfo } from "../mod.ts";
import { MOD, runCode } from "./child.ts";
import { Random } from "./oracle.ts";
import { inWorker } from "./workers.ts";

test("a Worker may name the level in force, and no other one", { timeout: 120_000 }, async () => {
  const { level, levels, threadCount } = systemInfo();
  assert.deepEqual(await inWorker({ kind: "settings", env: { KVERN_LEVEL: level } }), { level, threadCount });
  assert.deepEqual(await inWorker({ kind: "settings", env: { KVERN_LEVEL: "" } }), { level, threadCount });
  const other = levels.find((name) => name !== level);
  if (other !== undefined) {
    assert.deepEqual(await inWorker({ kind: "settings", env: { KVERN_LEVEL: other } }), {
      refused: "invalid_config",
      message:
        `Cannot use the level KVERN_LEVEL names as the process uses ${level} since its first use of kvern: KVERN_LEVEL is ${other}`,
    });
  }
  assert.equal(systemInfo().level, level);
});

test("threads of a Worker are its own, and change no bit and no count of another thread", {
  timeout: 120_000,
}, async () => {
  const before = systemInfo().threadCount;
  using cache = new PagedCache({ layerCount: 1, kvHeadCount: 4, headDim: 64, maxSeqLen: 4096 });
  const random = new Random(14);
  const sequence = cache.sequence();
  sequence.append(0, random.floats(3000 * 256), random.floats(3000 * 256));
  const q = random.floats(8 * 64);
  const expected = sequence.attend(0, q);
  try {
    setThreadCount(2);
    const workers = [{ env: { KVERN_THREADS: "7" } }, { env: {}, threads: 5 }, { env: {} }];
    const counts: unknown[] = [];
    for (const task of workers) {
      let done = false;
      const answered = inWorker({ kind: "settings", ...task }).finally(() => done = true);
      while (!done) {
        assert.deepEqual(sequence.attend(0, q), expected);
        assert.equal(systemInfo().threadCount, 2);
        await new Promise((resolve) => setTimeout(resolve, 0));
      }
      const answer = await answered;
      counts.push("threadCount" in answer ? answer.threadCount : answer);
    }
    assert.equal(systemInfo().threadCount, 2);
    // The last one said nothing: it has the default, and not what this thread or another Worker said.
    const { KVERN_THREADS: ours } = process.env;
    assert.deepEqual(counts, [7, 5, ours ? Number(ours) : before]);
  } finally {
    setThreadCount(before);
  }
});

test("the first Worker to name a level settles it for the process", { timeout: 120_000 }, () => {
  const { levels } = systemInfo();
  const first = levels[0]!;
  const { stdout, stderr } = runCode(
    `
    import { inWorker } from "${new URL("./workers.ts", import.meta.url).href}";
    import { systemInfo } from "${MOD}";
    const worker = await inWorker({ kind: "settings", env: { KVERN_LEVEL: "${first}" } });
    console.log(JSON.stringify([worker.level, systemInfo().level]));
    `,
    { env: { KVERN_LEVEL: undefined }, denoFlags: ["-A", "--no-check"] },
  );
  assert.deepEqual(JSON.parse(stdout || "null"), [first, first], stderr);
});
