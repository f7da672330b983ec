/** The tests that reach kernels, once more at every level this CPU has, one process a level. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { systemInfo } from "../mod.ts";
import { MOD, runCode, runTests, runtime } from "./child.ts";

/** Floats in the first three, codes and both together in the others. */
const FILES = ["attention_test.ts", "cache_test.ts", "model_test.ts", "tiers_test.ts", "policy_test.ts"];

/** What a run says that had tests, all of which passed: one that found none would end well, too. */
const passed =
  { deno: /ok \| [1-9]\d* passed \| 0 failed/, bun: /\b[1-9]\d* pass\b/, node: /^ℹ pass [1-9]\d*$/m }[runtime];

test("the library has the lowest level, too", () => {
  const { levels: [lowest] } = systemInfo();
  // `deno task demo` leaves a library there for this CPU alone, with which most levels would go untested.
  assert.ok(lowest === "v2" || lowest === "neon", `zig/zig-out begins with ${lowest}: run deno task build`);
});

for (const level of systemInfo().levels) {
  test(`level ${level} is in force when KVERN_LEVEL names it`, { timeout: 60_000 }, () => {
    const code = `import { systemInfo } from "${MOD}"; console.log(systemInfo().level);`;
    const { stdout, stderr } = runCode(code, { env: { KVERN_LEVEL: level } });
    assert.equal(stdout.trim(), level, stderr);
  });

  for (const file of FILES) {
    test(`${file} passes at level ${level}`, { timeout: 120_000 }, () => {
      const { code, stdout, stderr } = runTests(file, { KVERN_LEVEL: level });
      assert.equal(code, 0, stdout + stderr);
      assert.match(stdout + stderr, passed);
    });
  }
}
