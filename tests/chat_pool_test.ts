/** examples/chat_pool.ts: conversations that share what they begin with, hot and cold the same. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { chat, chatCold, type ChatOptions, mostTokens, newChatCache, requestOf } from "../examples/chat.ts";
import { chatReport, chatText } from "../examples/chat_report.ts";
import { loadZiglet } from "../examples/ziglet.ts";
import { generate, refused } from "./generate_child.ts";

const TIMEOUT = { timeout: 60_000 };
const ZIGLET = fileURLToPath(new URL("../examples/ziglet", import.meta.url));
const PROGRAM = "chat_pool.ts";

const OPTIONS: ChatOptions = {
  conversations: 3,
  turns: 2,
  tokens: 10,
  temperature: 0.7,
  seed: 5,
  system: "//! Numbers, and slices of them.\n",
  blockSize: 8,
  kv: "f32",
};

/** Tokens that both begin with. */
function commonLength(one: Uint8Array, other: Uint8Array): number {
  const length = one.findIndex((token, i) => token !== other[i]);
  return length < 0 ? one.length : length;
}

test(
  "chat: a turn starts where its conversation differs from all before, and cold caches give the same",
  TIMEOUT,
  async () => {
    const ziglet = loadZiglet(ZIGLET);
    using held = newChatCache(ziglet, OPTIONS);
    const { turns, texts } = await chat(ziglet, held, OPTIONS);
    assert.deepEqual(turns.map(({ turn, conversation }) => [turn, conversation]), [[0, 0], [0, 1], [0, 2], [1, 0], [
      1,
      1,
    ], [1, 2]]);

    let found = 0;
    turns.forEach(({ text, promptTokens, drawing, conversation, turn }, i) => {
      const prompt = text.subarray(0, promptTokens);
      assert.ok(new TextDecoder().decode(prompt).endsWith(requestOf(conversation, turn)));
      // The last byte of an earlier text did not go through the model.
      const lengths = turns.slice(0, i).map(({ text }) => commonLength(prompt.subarray(0, -1), text.subarray(0, -1)));
      assert.equal(drawing.startsAt, Math.max(0, ...lengths), `turn ${turn} of conversation ${conversation}`);
      assert.equal(drawing.computedTokens, promptTokens - drawing.startsAt);
      assert.ok(drawing.bytes.length <= OPTIONS.tokens && text.length <= mostTokens(OPTIONS));
      found += drawing.startsAt;
    });
    assert.ok(turns[1]!.drawing.startsAt > OPTIONS.system.length);

    for (const conversation of texts.keys()) {
      const cold = await chatCold(ziglet, conversation, OPTIONS);
      assert.deepEqual(cold.text, texts[conversation]);
      assert.ok(cold.turns.every(({ drawing }) => drawing.startsAt === 0));
    }

    const cold = await chatCold(ziglet, 2, OPTIONS);
    const run = { turns, texts, paged: held.paged, cold };
    const report = chatReport(OPTIONS, run);
    const { lookups, hits, hitTokens, promptTokens, computedTokens, sameText } = report;
    assert.deepEqual([lookups, hits, hitTokens, computedTokens], [6, 5, found, promptTokens - found]);
    assert.ok(report.cachedBytes < report.unsharedBytes);
    assert.ok(sameText);
    assert.match(chatText(report, "text"), /: the same text\n$/);

    const other = chatReport(OPTIONS, { ...run, cold: { ...cold, text: cold.text.with(-1, 7) } });
    assert.ok(!other.sameText);
    assert.match(chatText(other, "text"), /: ANOTHER TEXT/);
  },
);

test("chat_pool.ts prints hits, bytes and time, and that hot and cold are the same", TIMEOUT, async () => {
  const given = ["--conversations", "2", "--tokens", "5", "--turns", "1", "--system", OPTIONS.system];
  const { code, stdout, stderr } = await generate(given, { program: PROGRAM });
  assert.deepEqual([code, stderr], [0, ""]);
  const time = "\\d[\\d.]* m?s", bytes = "\\d[\\d.]* [KM]iB";
  const start = new RegExp(`^--- conversation 2 of 2 ---\n${OPTIONS.system}${requestOf(1, 0).replace(/[(]/g, "\\(")}`);
  assert.match(stdout, start);
  assert.match(
    stdout,
    new RegExp(
      `^hits: {2}1 of 2 prompts, \\d+ of their \\d+ tokens \\(\\d+ %\\)\n` +
        `bytes: ${bytes} in \\d+ blocks of all turns; ${bytes} if conversations shared none\n` +
        `time: {2}${time} for \\d+ tokens of prompts; about ${time} saved\n` +
        `cold: {2}conversation 2 again in fresh caches, ${time} for its prompts, not ${time}: the same text\n$`,
      "m",
    ),
  );
});

test("chat_pool.ts --json prints one object, --help lists the options", TIMEOUT, async () => {
  const given = ["--json", "--conversations=1", "--turns=1", "--tokens=2", "--system=", "--kv=bf16", "--block-size=1"];
  const { code, stdout, stderr } = await generate(given, { program: PROGRAM });
  assert.deepEqual([code, stderr], [0, ""]);
  const { hits, lookups, hitTokens, sameText } = JSON.parse(stdout);
  assert.deepEqual([hits, lookups, hitTokens, sameText], [0, 1, 0, true]);
  const help = await generate(["--help"], { program: PROGRAM });
  assert.equal(help.code, 0);
  for (const name of ["conversations N", "turns N", "tokens N", "system TEXT", "temperature T", "seed N", "json"]) {
    assert.ok(help.stdout.includes(`\n  --${name} `), name);
  }
});

const WRONG_ARGUMENTS: [string[], RegExp][] = [
  [["--conversation", "2"], /unknown option --conversation: there is --conversations$/m],
  [["--conversations", "0"], /--conversations must be an integer from 1 to 10000, not "0"/],
  [["--turns", "two"], /--turns must be an integer from 1 to \d+, not "two"/],
  [["--turns", "2", "--turns", "2"], /--turns is given twice/],
  [["--kv", "i4"], /--kv must be one of f32, f16, bf16, not "i4"/],
  [["--block-size", "3"], /--block-size must be one of 1, 2, /],
  [["--temperature", "hot"], /--temperature must be a number/],
  [["text"], /unexpected argument "text"/],
  [["--turns", "20"], /--system, --turns and --tokens make conversations of up to \d+ bytes, .* room for 1024/],
  [["--model", "nowhere"], /config.json: no such file/],
];

test("chat_pool.ts refuses what is wrong in one line", TIMEOUT, async () => {
  for (const [args, problem] of WRONG_ARGUMENTS) await refused(args, problem, {}, PROGRAM);
});
