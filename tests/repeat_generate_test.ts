/** examples/generate.ts --repeat: the second run starts where the cache has the prompt, and writes the same text. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { output } from "./generate_child.ts";

const TIMEOUT = { timeout: 60_000 };

/** 90 bytes, and with the start byte no multiple of any block but one. */
const PROMPT = 'const std = @import("std");\n\n/// Returns the number of bytes that a block takes in memory.\n';

test(
  "generate.ts --repeat writes twice what one run writes, and says what it did not compute again",
  TIMEOUT,
  async () => {
    const given = ["--prompt", PROMPT, "--tokens", "30", "--seed", "3"];
    const once = await output(...given);
    const [, first, second, facts] =
      (await output(...given, "--repeat")).match(/^--- run 1 ---\n([^]*)--- run 2 ---\n([^]*?)^(--- the same .*)$/ms) ??
        [];
    assert.equal(first, once);
    assert.equal(second, once);
    const tokens = 1 + PROMPT.length;
    const time = "\\d[\\d.]* m?s";
    assert.match(
      facts!,
      new RegExp(
        `^--- the same text, ${tokens - 1} tokens of the prompt not computed again ---\n` +
          `run 1: starts at 0 of ${tokens}, ${tokens} tokens of the prompt computed in ${time}, ${time} in all\n` +
          `run 2: starts at ${tokens - 1} of ${tokens}, 1 token of the prompt computed in ${time}, ${time} in all\n$`,
      ),
    );
  },
);

test("generate.ts --repeat leaves one token to compute, at every block size and dtype", TIMEOUT, async () => {
  const runsOf = async (...args: string[]) => {
    const { tokens, cache, runs } = JSON.parse(await output("--json", "--repeat", "--tokens", "5", ...args));
    assert.deepEqual([tokens, cache], [10, "paged"]);
    return runs.map(({ startsAt, computedTokens }: Record<string, number>) => [startsAt, computedTokens]);
  };
  for (const more of [["--block-size", "1"], ["--block-size", "256", "--kv", "f16"]]) {
    assert.deepEqual(await runsOf("--prompt", PROMPT, ...more), [[0, 1 + PROMPT.length], [PROMPT.length, 1]]);
  }
  assert.deepEqual(await runsOf("--prompt="), [[0, 1], [0, 1]]);
});
