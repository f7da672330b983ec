/**
 * The counting of `all.ts`: what it reads from the runners, and that a runner which says nothing has not passed.
 *
 * @module
 */
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { chmodSync, existsSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { findOnPath, ROOT, ToolchainError } from "../zig/toolchain.ts";
import {
  closing,
  countBun,
  countDeno,
  countGate,
  countNode,
  countZig,
  countZigProgram,
  failedTests,
  missing,
  settle,
  slowTests,
  summary,
} from "./all.ts";

test("countZig() reads the summary of a build", () => {
  const read = (line: string) => countZig(`noise\nBuild Summary: ${line}\ntest success\n`);
  assert.deepEqual(read("5/5 steps succeeded; 2/3 tests passed (1 skipped)"), { passed: 2, failed: 0, skipped: 1 });
  assert.deepEqual(read("5/5 steps succeeded; 41/41 tests passed"), { passed: 41, failed: 0, skipped: 0 });
  assert.deepEqual(read("2/5 steps succeeded (2 failed); 4/7 tests passed (1 skipped, 1 failed, 1 crashed)"), {
    passed: 4,
    failed: 2,
    skipped: 1,
  });
  assert.deepEqual(read("2/3 steps succeeded (1 failed); 1/2 tests passed (1 failed)"), {
    passed: 1,
    failed: 1,
    skipped: 0,
  });
  assert.equal(read("5/5 steps succeeded"), undefined);
  assert.equal(countZig("error: no build.zig file found"), undefined);
});

test("countZigProgram() reads the last line of a test program", () => {
  assert.deepEqual(countZigProgram("2/2 a.test.b...OK\nAll 71 tests passed.\n"), { passed: 71, failed: 0, skipped: 0 });
  assert.deepEqual(countZigProgram("59 passed; 3 skipped; 1 failed.\n"), { passed: 59, failed: 1, skipped: 3 });
  assert.equal(countZigProgram("1/71 a.test.b...Segmentation fault"), undefined);
});

test("countDeno() reads the last line of a run", () => {
  assert.deepEqual(countDeno("\nok | 3 passed | 0 failed | 1 ignored (18s)\n"), { passed: 3, failed: 0, skipped: 1 });
  assert.deepEqual(countDeno("FAILED | 2 passed (4 steps) | 1 failed (1 step) (25ms)\n\nerror: Test failed"), {
    passed: 2,
    failed: 1,
    skipped: 0,
  });
  // A test that prints such a line of its own does not count.
  assert.deepEqual(countDeno("ok | 9 passed | 0 failed (1s)\nok | 1 passed | 0 failed (1s)\n")?.passed, 1);
  assert.equal(countDeno("error: Module not found"), undefined);
});

test("countBun() reads the last lines of a run", () => {
  const output = " 15 pass\n 2 skip\n 1 todo\n 3 fail\n 40 expect() calls\nRan 21 tests across 2 files. [17.02s]\n";
  assert.deepEqual(countBun(output), { passed: 15, failed: 3, skipped: 3 });
  assert.deepEqual(countBun("\n 1 pass\n 0 fail\nRan 1 test across 1 file. [7ms]"), {
    passed: 1,
    failed: 0,
    skipped: 0,
  });
  assert.equal(countBun("error: no tests found"), undefined);
});

test("countNode() reads the last lines of a run", () => {
  const end = (pass: number, fail: number, cancelled: number, skipped: number, todo: number) =>
    `ℹ tests 9\nℹ suites 0\nℹ pass ${pass}\nℹ fail ${fail}\nℹ cancelled ${cancelled}\nℹ skipped ${skipped}\n` +
    `ℹ todo ${todo}\nℹ duration_ms 2028.886523\n`;
  assert.deepEqual(countNode(`✔ a (1ms)\n${end(15, 2, 1, 3, 1)}`), { passed: 15, failed: 3, skipped: 4 });
  // A test that prints such lines of its own does not count.
  assert.deepEqual(countNode(end(9, 9, 9, 9, 9) + end(1, 0, 0, 0, 0)), { passed: 1, failed: 0, skipped: 0 });
  assert.equal(countNode("Could not find 'tests/*_test.ts'"), undefined);
});

test("a step whose tool is not to be had says why, and any other failure to provide it is one", async () => {
  const refuse = (error: Error) => () => Promise.reject(error);
  const refused = refuse(new ToolchainError("Cannot install Node from npm: no network"));
  assert.equal(
    await missing({ tool: "node" }, refused),
    "there is no node here (Cannot install Node from npm: no network)",
  );
  await assert.rejects(missing({ tool: "node" }, refuse(new TypeError("a mistake"))), /a mistake/);
  assert.equal(await missing({ tool: "node" }, () => Promise.resolve("/bin/node")), undefined);
  assert.equal(await missing({}, refused), undefined);
  const needs = { names: ["kvern-has-no-such-program"], package: "none" };
  assert.match(
    (await missing({ needs }))!,
    /^kvern-has-no-such-program is not on PATH \(Debian's package none has it\)$/,
  );
});

test("a runner that reports no test, or ends badly without a failed one, has failed", () => {
  const one = { passed: 0, failed: 1, skipped: 0 };
  assert.deepEqual(settle(undefined, 0), one);
  assert.deepEqual(settle({ passed: 0, failed: 0, skipped: 0 }, 0), one);
  assert.deepEqual(settle({ passed: 4, failed: 0, skipped: 0 }, 1), { passed: 4, failed: 1, skipped: 0 });
  assert.deepEqual(settle({ passed: 4, failed: 2, skipped: 0 }, 1), { passed: 4, failed: 2, skipped: 0 });
  assert.deepEqual(settle({ passed: 4, failed: 0, skipped: 1 }, 0), { passed: 4, failed: 0, skipped: 1 });
  assert.deepEqual(settle(countGate("", 1), 1), one);
  assert.deepEqual(settle(countGate("", 0), 0), { passed: 1, failed: 0, skipped: 0 });
});

test("summary() is one plain line", () => {
  assert.equal(summary({ passed: 12, failed: 0, skipped: 0 }), "12 passed, 0 failed");
  assert.equal(summary({ passed: 12, failed: 1, skipped: 2 }), "12 passed, 1 failed, 2 skipped");
});

test("the last lines name what failed, what did not run at all, and where tests were skipped", () => {
  const green = { passed: 2, failed: 0, skipped: 0 };
  assert.equal(
    closing([{ title: "A", command: "deno task lint", counts: green, failures: [], slow: [] }]),
    "2 passed, 0 failed",
  );
  const lines = closing([
    { title: "A", command: "deno task lint", counts: { passed: 2, failed: 0, skipped: 3 }, failures: [], slow: [] },
    {
      title: "B",
      command: "deno task build",
      counts: { passed: 0, failed: 0, skipped: 1 },
      failures: [],
      slow: [],
      unrun: "no b is here",
    },
    {
      title: "C",
      command: "deno task check",
      counts: { passed: 1, failed: 2, skipped: 0 },
      failures: ["one", "two"],
      slow: [{ name: "x", seconds: 61.7 }],
    },
    {
      title: "D",
      command: "deno task test",
      counts: { passed: 0, failed: 22, skipped: 0 },
      failures: Array.from({ length: 22 }, (_, index) => `test ${index}`),
      slow: [],
    },
  ]).split("\n");
  assert.deepEqual(lines, [
    "skipped: 3 of A",
    "skipped: ALL of B, as no b is here",
    "failed: deno task check",
    "  one",
    "  two",
    "failed: deno task test",
    ...Array.from({ length: 20 }, (_, index) => `  test ${index}`),
    "  and 2 more",
    "slow: 62 s of C: x",
    "3 passed, 24 failed, 4 skipped",
  ]);
});

test("failed tests are named, whichever runner ran them", () => {
  assert.deepEqual(failedTests("(pass) a [1.00ms]\n(fail) b > c [5000.12ms]\n(fail) b > c [5000.12ms]\n"), ["b > c"]);
  assert.deepEqual(failedTests("a ... ok (1ms)\n\n FAILURES \n\nb c => ./tests/b_test.ts:61:6\n"), ["b c"]);
  const failing =
    "✖ a (b) (1.5ms)\n✖ failing tests:\n\ntest at tests/b_test.ts:61:6\n✖ a (b) (1.5ms)\n  'test failed'\n";
  assert.deepEqual(failedTests(failing), ["a (b)"]);
  assert.deepEqual(failedTests("error: 'pool_test.test.takes a block' failed:\n"), ["pool_test.test.takes a block"]);
  assert.deepEqual(failedTests("3/9 pool.test.a...OK\n4/9 pool.test.b...FAIL (TestUnexpectedResult)\n"), [
    "pool.test.b",
  ]);
  assert.deepEqual(failedTests("all is well\n"), []);
});

test("tests that took long are named, whichever runner ran them", () => {
  assert.deepEqual(slowTests("a ... ok (2m29s)\nb ... FAILED (21s)\nc ... ok (19s)\nd ... ok (900ms)\n"), [
    { name: "a", seconds: 149 },
    { name: "b", seconds: 21 },
  ]);
  assert.deepEqual(slowTests("(pass) a > b [30000.50ms]\n(fail) c [19000.00ms]\n"), [{
    name: "a > b",
    seconds: 30.0005,
  }]);
  assert.deepEqual(slowTests("✔ a (1) (20500.5ms)\n✖ b (25000ms)\n✔ c (1.5ms)\n"), [
    { name: "b", seconds: 25 },
    { name: "a (1)", seconds: 20.5005 },
  ]);
});

/** Runs `.ci/run` where there are these programs and no others; gives the packages that it installed. */
function installedWith(programs: readonly string[]): string[] {
  const folder = mkdtempSync(join(tmpdir(), "kvern-ci-"));
  try {
    const log = join(folder, "log");
    for (const name of ["bash", "dirname"]) symlinkSync(findOnPath(name)[0]!, join(folder, name));
    const scripts: Record<string, string> = {
      id: "echo 0",
      npx: 'test "$3" = task && test "$4" = test',
      "apt-get": `for last; do :; done; if [ "$2" != update ]; then echo "$last" >> ${log}; fi`,
    };
    for (const name of programs) scripts[name] = "exit 1";
    for (const [name, body] of Object.entries(scripts)) {
      writeFileSync(join(folder, name), `#!${findOnPath("bash")[0]}\n${body}\n`);
      chmodSync(join(folder, name), 0o755);
    }
    const { status, stderr } = spawnSync(join(folder, "bash"), [join(ROOT, ".ci", "run")], {
      env: { PATH: folder },
      encoding: "utf8",
    });
    assert.equal(status, 0, stderr);
    return existsSync(log) ? readFileSync(log, "utf8").trim().split("\n") : [];
  } finally {
    rmSync(folder, { recursive: true });
  }
}

const hasBash = process.platform !== "win32" && findOnPath("bash").length > 0;
const needsBash = hasBash ? "" : " (skipped: no bash)";

test(`.ci/run looks for each tool by itself and installs what is missing${needsBash}`, { skip: !hasBash }, () => {
  assert.deepEqual(installedWith([]), ["qemu-user-static", "valgrind"]);
  assert.deepEqual(installedWith(["valgrind"]), ["qemu-user-static"]);
  assert.deepEqual(installedWith(["qemu-aarch64-static"]), ["valgrind"]);
  assert.deepEqual(installedWith(["qemu-aarch64", "valgrind"]), []);
});
