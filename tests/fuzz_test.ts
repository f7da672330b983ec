/** Twenty thousand random calls in a process of their own, so that a crash is a failed test that tells its seed. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { type ChildResult, MOD, runCode } from "./child.ts";
import type { FuzzReport } from "./fuzz.ts";

const FUZZ = new URL("./fuzz.ts", import.meta.url).href;

/** Runs `calls` calls of `seed` after `prelude`. */
function runFuzz(seed: number, calls: number, prelude: string): ChildResult {
  return runCode(
    `
    import { fuzz } from "${FUZZ}";
    import { ContiguousCache } from "${MOD}";
    import process from "node:process";
    ${prelude}
    console.log(JSON.stringify(await fuzz({ calls: ${calls}, seed: ${seed} })));
    `,
    { denoFlags: ["-A", "--v8-flags=--expose-gc"] },
  );
}

/** The report of a child; what ended it otherwise is told with the seed. */
function reportOf(seed: number, { code, stdout, stderr }: ChildResult): FuzzReport {
  assert.equal(code, 0, `seed ${seed} ended with ${code === null ? "a signal" : `code ${code}`}: ${stderr}`);
  return JSON.parse(stdout);
}

for (const seed of [20261121, Date.now() >>> 0]) {
  test(`20 000 random calls end nothing and leak nothing (seed ${seed})`, { timeout: 120_000 }, () => {
    const report = reportOf(seed, runFuzz(seed, 20_000, ""));
    assert.ok(report.ok > 10_000 && report.refused > 5000, JSON.stringify(report));
    assert.equal(report.seed, seed);
    assert.ok(report.dropped > 10 && report.finalized >= report.dropped - 2, JSON.stringify(report));
    // Whatever there is to answer was answered, and whatever there is to refuse was refused.
    const answers = ["append: ok", "append: cache_full", "append: TypeError", "attend: ok", "attend: invalid_config"]
      .concat(["store: commit_mismatch", "advance: ok", "commit: ok", "truncate: position_out_of_range", "gather: ok"])
      .concat(["new: out_of_memory", "attach: stale_handle", "view: stale_view", "view after free: stale_view"])
      .concat(["after free: stale_handle", "meddled append: stale_handle", "meddled append: TypeError", "drop: ok"])
      .concat([
        "kv_sequence_append: ok",
        "kv_attend: ok",
        "kv_contiguous_free: ok",
        "kv_contiguous_stats: -12",
      ]);
    for (const answer of answers) assert.ok(report.answers[answer]! > 0, answer);
  });
}

test("a wrong answer is found, and told with the call and the seed", { timeout: 60_000 }, () => {
  for (
    const wrong of [
      "const { getSeqLen } = ContiguousCache.prototype;" +
      "ContiguousCache.prototype.getSeqLen = function (s) { return getSeqLen.call(this, s) || 1; };",
      "ContiguousCache.prototype.free = function () {};",
      "ContiguousCache.prototype.advance = function () {};",
    ]
  ) {
    const { code, stderr } = runFuzz(5, 5000, wrong);
    assert.equal(code, 1, wrong);
    assert.match(stderr, /Call \d+ of seed 5: /, wrong);
  }
});

test("a crash is told with the seed", { timeout: 60_000 }, () => {
  const crash = `
    let left = 3;
    const { reset } = ContiguousCache.prototype;
    ContiguousCache.prototype.reset = function () {
      if (--left === 0) process.kill(process.pid, "SIGKILL"); // as sudden as a crash
      return reset.call(this);
    };`;
  const crashed = runFuzz(5, 5000, crash);
  assert.equal(crashed.code, null, crashed.stderr);
  assert.throws(() => reportOf(5, crashed), /seed 5 ended with a signal/);
});
