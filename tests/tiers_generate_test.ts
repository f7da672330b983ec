/** The demo with codes behind its tail: text, scores, and what the report says of them. */
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { output } from "./generate_child.ts";

const TIMEOUT = { timeout: 300_000 };
const HELDOUT = fileURLToPath(new URL("../examples/ziglet/heldout.txt", import.meta.url));
const golden = JSON.parse(
  readFileSync(join(fileURLToPath(new URL("../examples/ziglet", import.meta.url)), "golden.json"), "utf8"),
);

/** The report of a score over the first bytes of the held-out text. */
async function scored(...args: string[]) {
  return JSON.parse(await output("--json", "--score", HELDOUT, "--window", "512", "--bytes", "1024", ...args));
}

test(
  "generate.ts --score reads codes back from the store, and each format costs about what it should",
  TIMEOUT,
  async () => {
    const { bitsPerByte: exact } = await scored("--kv", "f32");
    // Of 1024 bytes, so with a margin beside the figures of the whole text.
    const limits = { q8_0: 0.001, i8: 0.001, q4_0: 0.02, i4: 0.01 };
    for (const [kv, limit] of Object.entries(limits)) {
      const report = await scored("--kv", kv);
      assert.ok(Math.abs(report.bitsPerByte - exact) <= limit, `${kv}: ${report.bitsPerByte - exact}`);
      assert.notEqual(report.bitsPerByte, exact); // it did read codes
      assert.deepEqual([report.kv, report.cache, report.blockSize], [kv, "paged", 64]);
      // Steps of 64 in windows of 512: token t of step s attends 64 s rows of the store and t + 1 of the tail.
      const store = 64 * 64 * 28, tail = 8 * 64 * 65 / 2;
      assert.ok(Math.abs(report.attendedShare.store - store / (store + tail)) < 1e-12);
      assert.ok(Math.abs(report.attendedShare.tail - tail / (store + tail)) < 1e-12);
    }
  },
);

test("generate.ts takes formats of keys and values apart, a tail, and sinks", TIMEOUT, async () => {
  const apart = await scored("--kv-k", "q8_0", "--kv-v", "i4");
  assert.equal(apart.kv, "q8_0/i4");
  const half = await scored("--kv", "f16", "--kv-k", "i8");
  assert.equal(half.kv, "i8/f16");
  const all = await scored("--kv", "i4");
  const tail = await scored("--kv", "i4", "--tail", "128");
  const sinks = await scored("--kv", "i4", "--tail", "128", "--sinks", "4");
  const shares = [all, tail, sinks].map(({ attendedShare }) => attendedShare.store);
  assert.ok(shares[0] > shares[1] && shares[1] > shares[2] && shares[2] > 0.2, `${shares}`);
  const large = await scored("--kv", "i4", "--tail", "512");
  assert.deepEqual(large.attendedShare, { tail: 1, store: 0 });
  assert.equal(large.bitsPerByte, (await scored("--kv", "f16")).bitsPerByte);
});

test("generate.ts writes the golden text out of 8 bits, at any block size", TIMEOUT, async () => {
  const { prompt, greedy } = golden.cases[1]!;
  const given = [`--prompt=${prompt}`, "--temperature", "0", "--tokens", `${greedy.length}`];
  for (const more of [["--kv", "q8_0"], ["--kv", "i8", "--block-size", "128"]]) {
    assert.equal(await output(...given, ...more), `${prompt}${greedy}\n`);
  }
});

test("generate.ts shares blocks of codes between samples", TIMEOUT, async () => {
  const prompt = 'const std = @import("std");\n'.repeat(6);
  const report = JSON.parse(
    await output("--json", "--kv", "q4_0", "--samples", "3", "--tokens", "100", `--prompt=${prompt}`),
  );
  assert.equal(report.kv, "q4_0");
  assert.ok(report.blocksShared >= 2, `${report.blocksShared}`);
});
