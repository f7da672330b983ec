/** examples/generate.ts with a paged cache: the same texts and numbers, several texts at once, and the blocks they take. */
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import type { BlockSurvey } from "../examples/blocks.ts";
import { drawBlocks } from "../examples/picture.ts";
import { argmax, logSumExp } from "../examples/sampling.ts";
import { searchBeams } from "../examples/beams.ts";
import { loadZiglet } from "../examples/ziglet.ts";
import { memoryBytes, PagedCache } from "../mod.ts";
import { generate, output } from "./generate_child.ts";

const ZIGLET = fileURLToPath(new URL("../examples/ziglet", import.meta.url));
const HELDOUT = join(ZIGLET, "heldout.txt");
const TIMEOUT = { timeout: 60_000 };
const LONG_TIMEOUT = { timeout: 300_000 };

const golden: { cases: { prompt: string; greedy: string }[] } = JSON.parse(
  readFileSync(join(ZIGLET, "golden.json"), "utf8"),
);

/** 90 bytes: with the start byte, 5 blocks of 16 positions and 11 more. */
const PROMPT = 'const std = @import("std");\n\n/// Returns the number of bytes that a block takes in memory.\n';

/** The texts between lines `--- sample i ---`, by number. */
function samplesOf(text: string): Map<number, string> {
  const parts = text.split(/^--- sample (\d+) ---\n/m).slice(1);
  return new Map(parts.flatMap((part, i) => i % 2 === 0 ? [[Number(part), parts[i + 1]!]] : []));
}

test("generate.ts --cache paged writes the golden text, at every block size and dtype", TIMEOUT, async () => {
  const { prompt, greedy } = golden.cases[1]!;
  const given = [`--prompt=${prompt}`, "--temperature", "0", "--tokens", `${greedy.length}`];
  for (const more of [["--cache", "paged"], ["--block-size", "1"], ["--block-size=256", "--kv", "f16"]]) {
    assert.equal(await output(...given, ...more), `${prompt}${greedy}\n`);
  }
});

test(
  "generate.ts --cache paged writes the text of the contiguous cache, drawn from the same bits",
  TIMEOUT,
  async () => {
    const given = ["--seed", "5", "--tokens", "150", "--kv", "bf16"];
    assert.equal(await output(...given, "--cache", "paged"), await output(...given));
  },
);

test("generate.ts --score gives the same bits per byte with --cache paged", LONG_TIMEOUT, async () => {
  const given = ["--json", "--score", HELDOUT, "--window", "200", "--bytes", "700"];
  const contiguous = JSON.parse(await output(...given));
  const paged = JSON.parse(await output(...given, "--cache", "paged", "--block-size", "32"));
  assert.equal(paged.bitsPerByte, contiguous.bitsPerByte);
  // The last window has 100 bytes: 4 blocks of 32.
  const { cache, blockSize, samples, blocksUsed, blocksShared } = paged;
  assert.deepEqual([cache, blockSize, samples, blocksUsed, blocksShared], ["paged", 32, null, 4, 0]);
});

test("generate.ts --compare runs with --cache paged", LONG_TIMEOUT, async () => {
  const report = JSON.parse(await output("--compare", "--json", "--cache", "paged"));
  assert.equal(report.cache, "paged");
  assert.deepEqual(report.comparison.rows.map(({ length }: { length: number }) => length), [64, 256, 1024]);
  assert.equal(report.blocksUsed, 1024 / 16);
});

test("generate.ts --samples writes what each seed writes alone", TIMEOUT, async () => {
  const given = ["--prompt", PROMPT, "--tokens", "40"];
  const samples = samplesOf(await output(...given, "--samples", "3", "--seed", "7"));
  assert.deepEqual([...samples.keys()], [1, 2, 3]);
  for (const [number, text] of samples) {
    assert.equal(text, await output(...given, "--seed", `${6 + number}`), `sample ${number}`);
  }
  assert.equal(new Set(samples.values()).size, 3);
});

test("generate.ts --samples 1 writes one text, as it comes", TIMEOUT, async () => {
  assert.equal(await output("--samples", "1", "--tokens", "30"), await output("--tokens", "30"));
});

test("generate.ts --samples counts the blocks of the prompt once", TIMEOUT, async () => {
  const report = JSON.parse(await output("--json", "--prompt", PROMPT, "--samples", "4", "--tokens", "20"));
  const { cache, blockSize, samples, tokens, blocksUsed, blocksShared, poolBytes, contiguousBytes } = report;
  assert.deepEqual([cache, blockSize, samples, tokens], ["paged", 16, 4, 80]);
  // 1 + the prompt + 19 positions of each text (its last byte is not run); the full blocks of the prompt are shared.
  const shared = Math.floor((1 + PROMPT.length) / 16);
  const all = Math.ceil((1 + PROMPT.length + 19) / 16);
  assert.equal(blocksShared, shared);
  assert.equal(blocksUsed, shared + 4 * (all - shared));
  // A block: 16 positions * 6 layers * K and V * 2 KV heads * 64 dims * 4 B.
  assert.equal(poolBytes, blocksUsed * 16 * 6 * 2 * 2 * 64 * 4);
  const shape = { layerCount: 6, kvHeadCount: 2, headDim: 64, maxSeqLen: 1024, dtype: "f32" } as const;
  assert.equal(contiguousBytes, memoryBytes({ ...shape, sequenceCount: 4 }));
  assert.ok(report.cacheBytes >= poolBytes);
});

test("generate.ts --samples stops when the context is full, and says so on stderr", TIMEOUT, async () => {
  const prompt = "a".repeat(1015);
  const { code, stdout, stderr } = await generate(["--prompt", prompt, "--samples", "2", "--temperature", "0"]);
  assert.equal(code, 0);
  const [one, two] = [...samplesOf(stdout).values()];
  assert.equal(one, two);
  // 1024 positions hold the start byte, the prompt and 8 bytes, and the last one predicts another.
  assert.equal(one!.trimEnd().length, 1015 + 9);
  assert.match(stderr, /^\[2 samples, 18 tokens, [^\n]*the context of 1024 positions is full\]\n$/);
});

test("generate.ts --beams prints the best text, and all of them when asked", TIMEOUT, async () => {
  const given = ["--prompt", PROMPT, "--tokens", "25", "--beams", "3"];
  const all = await output(...given, "--all-beams");
  assert.equal(await output(...given, "--all-beams"), all, "deterministic");
  const titles = [...all.matchAll(/^--- beam (\d) ---\n/gm)];
  assert.deepEqual(titles.map(([, number]) => number), ["1", "2", "3"]);
  const scores = [...all.matchAll(/^--- log-probability (-[\d.]+) ---\n/gm)].map(([, score]) => Number(score));
  assert.equal(scores.length, 3);
  assert.deepEqual(scores, scores.toSorted((a, b) => b - a));
  assert.equal(await output(...given), all.slice(0, titles[1]!.index));

  const report = JSON.parse(await output(...given, "--json"));
  assert.equal(report.tokens, 25);
  assert.deepEqual(report.beams.map(({ score }: { score: number }) => Number(score.toFixed(4))), scores);
  assert.ok(all.startsWith(`${titles[0]![0]}${PROMPT}${report.beams[0].text}\n--- log-probability `));
  assert.equal(report.samples, null);
  assert.ok(report.blocksShared >= Math.floor((1 + PROMPT.length) / 16));
});

test("generate.ts --beams 1 takes the likeliest byte each time", TIMEOUT, async () => {
  const { prompt, greedy } = golden.cases[0]!;
  const text = await output(`--prompt=${prompt}`, "--beams", "1", "--tokens", `${greedy.length}`);
  assert.equal(text.replaceAll(/^--- [^\n]* ---\n/gm, ""), `${prompt}${greedy}\n`);
});

test("a beam search finds what a search over copies of every text finds", LONG_TIMEOUT, async () => {
  const ziglet = loadZiglet(ZIGLET);
  const { layerCount, kvHeadCount, headDim, maxSeqLen, bosToken } = ziglet.config;
  const newCache = () => new PagedCache({ layerCount, kvHeadCount, headDim, maxSeqLen, dtype: "f32", blockSize: 4 });
  const prompt = Uint8Array.of(bosToken, ...new TextEncoder().encode("fn add(a: u32"));
  const width = 3, tokens = 6;

  using cache = newCache();
  const first = cache.sequence();
  const logits = ziglet.prefill(prompt, first);
  const sequences = [first, first.fork(), first.fork()];
  const beams = await searchBeams(ziglet, cache, sequences, logits, tokens, () => Promise.resolve());
  assert.deepEqual(beams.map(({ bytes }) => bytes.length), [tokens, tokens, tokens]);

  // Each text runs through the model from its start, in a cache of its own: nothing is shared or reordered.
  let texts: { bytes: number[]; score: number }[] = [{ bytes: [], score: 0 }];
  for (let length = 0; length < tokens; length++) {
    const next = texts.flatMap(({ bytes, score }) => {
      using alone = newCache();
      const row = ziglet.prefill(Uint8Array.of(...prompt, ...bytes), alone.sequence());
      const sum = logSumExp(row);
      return Array.from(row, (logit, token) => ({ bytes: [...bytes, token], score: score + logit - sum }));
    });
    texts = next.filter(({ bytes }) => bytes.at(-1) !== bosToken).sort((a, b) => b.score - a.score).slice(0, width);
  }
  assert.deepEqual(beams.map(({ bytes }) => bytes), texts.map(({ bytes }) => bytes));
  // Steps of other lengths round f32 sums otherwise: 1e-3 a logit at most, as in the test of steps.
  beams.forEach(({ score }, i) => assert.ok(Math.abs(score - texts[i]!.score) <= tokens * 2e-3));

  // The sequences hold the pasts of the texts.
  sequences.forEach((sequence, i) => {
    using alone = newCache();
    const bytes = Uint8Array.of(...prompt, ...beams[i]!.bytes);
    const expected = argmax(ziglet.prefill(bytes, alone.sequence()));
    assert.equal(argmax(ziglet.forward(bytes.subarray(-1), sequence)), expected);
  });
});

test("generate.ts --show-blocks draws the blocks in plain symbols into a pipe", TIMEOUT, async () => {
  const text = await output("--prompt", PROMPT, "--samples", "2", "--tokens", "10", "--show-blocks");
  // deno-lint-ignore no-control-regex
  assert.doesNotMatch(text, /\x1b/);
  assert.match(text, /^ {2}sample 1 {2}a2 a2 a2 a2 a2 o {2}o$/m);
  assert.match(text, /^ {2}sample 2 {2}a2 a2 a2 a2 a2 o {2}o$/m);
  assert.match(text, /^ {2}free {6}\.( {2}\.)*( {2}\+\d+)?$/m);
  assert.match(text, /^ {2}aN +5 +480 KiB {2}shared by N$/m);
  assert.match(text, /^ {2}o +4 +384 KiB {2}unshared$/m);
  assert.match(text, /were nothing shared: 14, 1\.3 MiB;/);
  assert.match(await output("--show-blocks", "--tokens", "2"), /\n\n {2}text {2}o o\n {2}free {2}\. /);
});

/** Four texts: three have the first block in common, and the second block is one of two that two share each. */
const SURVEY: BlockSurvey = {
  blockSize: 4,
  tables: [
    [[7, 3], [2, 2], [4, 1]],
    [[7, 3], [2, 2], [5, 1]],
    [[7, 3], [3, 2], [6, 1], [9, 1]],
    [[8, 1], [3, 2]],
  ].map((cells) => cells.map(([block, references]) => ({ block: block!, tier: "tail", references: references! }))),
  blocksUsed: 8,
  blocksShared: 3,
  tableEntries: 12,
  blocksFree: 3,
  usedBytes: 8 * 1024,
};

test("the picture tells apart the shared blocks of a column", () => {
  const options = { rowName: "text", columns: 80, colors: false, contiguousBytes: 2 ** 20 };
  assert.deepEqual(drawBlocks(SURVEY, options).split("\n"), [
    "  text 1  a3 a2 o",
    "  text 2  a3 a2 o",
    "  text 3  a3 b2 o  o",
    "  text 4  o  b2",
    "  free    .  .  .",
    "",
    "  aN    3      3 KiB  shared by N",
    "  o     5      5 KiB  unshared",
    "  .     3      3 KiB  free",
    "  8 blocks of 4 positions used, 8 KiB; were nothing shared: 12, 12 KiB;",
    "  a contiguous cache for 4 sequences: 1.0 MiB",
  ]);
});

test("the picture fits the terminal, with colours and many blocks too", () => {
  const cells = Array.from({ length: 100 }, (_, block) => ({ block, references: 64 }));
  const many = { ...SURVEY, tables: new Array(12).fill(cells), blocksFree: 1000 };
  for (const columns of [36, 44, 80, 200]) {
    const plain = drawBlocks(many, { rowName: "sample", columns, colors: false, contiguousBytes: 2 ** 30 });
    for (const line of plain.split("\n")) assert.ok(line.length < columns, `${columns}: ${line}`);
    assert.equal(plain.match(/a64/g)!.length, 12 * 100);
    const colored = drawBlocks(many, { rowName: "sample", columns, colors: true, contiguousBytes: 2 ** 30 });
    // deno-lint-ignore no-control-regex
    assert.equal(colored.replace(/\x1b\[[\d;]*m/g, "").replace(/ +$/gm, ""), plain);
  }
});
