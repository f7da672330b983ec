/** What the demo writes while it runs: text as soon as it is known, and a status line that has room. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { cacheFacts } from "../examples/caches.ts";
import { parseOptions } from "../examples/options.ts";
import type { Terminal } from "../examples/terminal.ts";
import { type Facts, statusLine } from "../examples/wording.ts";
import { generate } from "../examples/writing.ts";
import { loadZiglet } from "../examples/ziglet.ts";

const COLUMNS = 80;
const ziglet = loadZiglet(fileURLToPath(new URL("../examples/ziglet", import.meta.url)));

/** Runs the demo; gives the pieces in which it wrote its text, each with the tokens made until then, and all status lines. */
async function written(...args: string[]): Promise<{ pieces: { text: string; steps: number }[]; lines: string[] }> {
  const options = parseOptions(args);
  assert.ok(options !== "help");
  const pieces: { text: string; steps: number }[] = [];
  const lines: string[] = [];
  let steps = 0;
  const say = (facts: Facts) => lines.push(statusLine(facts, COLUMNS));
  const terminal = {
    live: false,
    columns: COLUMNS,
    colors: false,
    text: (text: string) => text !== "" && pieces.push({ text, steps }),
    endLine: () => {},
    line: () => {},
    status: (makeFacts: () => Facts) => {
      steps++;
      say(makeFacts());
      return Promise.resolve();
    },
    finish: say,
  };
  await generate(ziglet, options, terminal as unknown as Terminal);
  return { pieces, lines };
}

test("samples: the first text comes byte by byte, the others once it is their turn", async () => {
  const { pieces } = await written("--samples", "3", "--tokens", "30", "--seed", "3");
  const second = pieces.findIndex(({ text }) => text.startsWith("--- sample 2 ---"));
  const first = pieces.slice(1, second).filter(({ text }) => !text.startsWith("---"));
  assert.equal(first.map(({ text }) => text).join("").length, 30);
  assert.equal(first.length, 30);
  assert.deepEqual(first.map(({ steps }) => steps), Array.from({ length: 30 }, (_, i) => i));
  const titles = pieces.filter(({ text }) => text.startsWith("--- ")).map(({ text }) => text.split("\n")[0]);
  assert.deepEqual(titles, ["--- sample 1 ---", "--- sample 2 ---", "--- sample 3 ---"]);
});

test("beams: what all of them begin with comes before the search has ended", async () => {
  const tokens = 60;
  const { pieces } = await written("--beams", "2", "--tokens", `${tokens}`);
  const early = pieces.slice(1).filter(({ steps }) => steps < tokens - 10);
  assert.ok(early.length > 5, `${early.length}`);
  const text = pieces.slice(1).filter(({ text }) => !text.startsWith("---")).map(({ text }) => text).join("");
  assert.equal(text.length, tokens);
});

test("status lines fit a terminal of 80 columns, whatever is asked for", async () => {
  for (
    const args of [
      ["--samples", "8", "--tokens", "130"],
      ["--samples", "8", "--tokens", "20", "--kv-k", "q8_0", "--kv-v", "q4_0", "--tail", "64", "--block-size", "64"],
      ["--beams", "8", "--tokens", "20", "--kv", "i4"],
      ["--kv", "i4", "--tail", "64", "--tokens", "130"],
      ["--tokens", "5", "--cache", "paged"],
      ["--tokens", "5", "--repeat"],
    ]
  ) {
    const { lines } = await written(...args);
    assert.ok(lines.length > 3);
    for (const line of lines) assert.ok(line.length < COLUMNS, line);
    // Room is used: what matters most is there.
    assert.match(lines.at(-1)!, /tokens, \d+ tokens\/s, (paged|contiguous) cache /);
  }
});

test("a status line leaves out details from the end, and never what counts", () => {
  const facts = { counts: ["1 token"], details: ["a".repeat(10), "b".repeat(10)], ending: ["stopped"] };
  assert.equal(statusLine(facts, 80), `[1 token, ${"a".repeat(10)}, ${"b".repeat(10)}, stopped]`);
  assert.equal(statusLine(facts, 40), `[1 token, ${"a".repeat(10)}, stopped]`);
  assert.equal(statusLine(facts, 1), "[1 token, stopped]");
  const survey = { ...emptySurvey, blocksUsed: 1, usedBytes: 2 ** 20 };
  const cost = { cacheBytes: 2 ** 20, survey, contiguousBytes: 2 ** 21 };
  const options = parseOptions(["--cache", "paged"]);
  assert.ok(options !== "help");
  assert.deepEqual(cacheFacts(options, cost), ["paged cache 1.0 MiB f32", "1 block", "contiguous 2.0 MiB"]);
});

const emptySurvey = {
  blockSize: 16,
  tables: [],
  blocksUsed: 0,
  blocksShared: 0,
  tableEntries: 0,
  blocksFree: 0,
  usedBytes: 0,
};
