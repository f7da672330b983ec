/**
 * The benches as programs: each runs at a small size, finds its results equal to the oracle, and prints what it says it
 * prints. Times are never looked at, but for being there.
 */
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { attentionLoop } from "../benches/attention_loop.ts";
import { checkClose } from "../benches/checking.ts";
import { systemInfo } from "../mod.ts";
import { programArgs } from "./child.ts";
import { withoutOnnx } from "./onnx_runtime.ts";
import { attention, Random, relativeError } from "./oracle.ts";

const TIMEOUT = { timeout: 120_000 };
const ONNX_OPTIONS = { ...TIMEOUT, skip: withoutOnnx !== "" };
const FLOATS = ["f32", "f16", "bf16"];
const CODES = ["q8_0", "i8", "i4", "q4_0", "i2"];

const { level, runtime } = systemInfo();

/** A line of JSON. */
type Fields = Record<string, unknown>;

function run(bench: string, args: string[]): { code: number | null; stdout: string; stderr: string } {
  const path = fileURLToPath(new URL(`../benches/${bench}.ts`, import.meta.url));
  const { status, stdout, stderr, error } = spawnSync(process.execPath, [...programArgs(path), ...args], {
    encoding: "utf8",
    env: { ...process.env, NO_COLOR: "1" },
  });
  if (error) throw error;
  return { code: status, stdout, stderr };
}

/** Runs a bench at its small size; gives the fields of its rows, of which the numbers are finite and above 0. */
function rowsOf(bench: string, fields: string, ...args: string[]): Fields[] {
  const { code, stdout, stderr } = run(bench, ["--smoke", "--json", ...args]);
  assert.equal(code, 0, stderr);
  assert.match(stderr, /equal to .*, hash [0-9a-f]{8}/);
  return stdout.trimEnd().split("\n").map((line) => {
    const row: Fields = JSON.parse(line);
    assert.deepEqual(Object.keys(row), ["bench", "runtime", "level", ...fields.split(" ")], line);
    assert.deepEqual([row.bench, row.runtime, row.level], [bench, runtime, level], line);
    for (const value of Object.values(row)) {
      if (typeof value === "number") assert.ok(Number.isFinite(value) && value > 0, line);
    }
    return row;
  });
}

test("bench boundary prints a row for each call", TIMEOUT, () => {
  const rows = rowsOf("boundary", "call ns");
  assert.deepEqual(rows.map(({ call }) => call), [
    "plain function",
    "cache.getSeqLen(0)",
    "sequence.seqLen",
    "append, one number",
    "attend, one number",
  ]);
});

test("bench append prints a row for each dtype and number of tokens", TIMEOUT, () => {
  const rows = rowsOf("append", "kv tokens us gbps vsCopy");
  assert.deepEqual(
    rows.map(({ kv, tokens }) => [kv, tokens]),
    FLOATS.flatMap((kv) => [1, 4].map((tokens) => [kv, tokens])),
  );
});

test("bench append stores the same bits in every runtime", TIMEOUT, () => {
  const { stderr } = run("append", ["--smoke", "--json", "--kv", "f32,f16", "--tokens", "4"]);
  const hashes = [...stderr.matchAll(/hash ([0-9a-f]{8} [0-9a-f]{8})/g)].map((found) => found[1]);
  assert.deepEqual(hashes, ["c901a8ec 7f42f8cd", "6729216c 070a462e"]);
});

const ATTEND = "kv tokens threads gqa headDim queries ms gbps shareOfRead vsGgml vsOrt";

/** Rivals have figures where they are installed and have the format, and are null elsewhere. */
function assertRivals(rows: Fields[]): void {
  const formats = { vsGgml: [...FLOATS, "q8_0", "q4_0"], vsOrt: ["f32", "f16"] };
  for (const [rival, its] of Object.entries(formats)) {
    const isMissing = rows.every((row) => row[rival] === null);
    for (const row of rows) {
      assert.equal(row[rival] === null, isMissing || !its.includes(`${row.kv}`), `${rival} ${row.kv}`);
    }
  }
}

test("bench attend prints a row for each number of tokens and threads and each format", TIMEOUT, () => {
  const rows = rowsOf("attend", ATTEND);
  assert.deepEqual(
    rows.map(({ tokens, threads, kv, gqa, headDim, queries }) => [tokens, threads, kv, gqa, headDim, queries]),
    [64, 100].flatMap((tokens) =>
      [1, 2].flatMap((threads) => [...FLOATS, ...CODES].map((kv) => [tokens, threads, kv, 4, 128, 1]))
    ),
  );
  assertRivals(rows);
});

test("bench attend prints the rows its options choose", TIMEOUT, () => {
  const chosen = [
    "--kv",
    "bf16",
    "--tokens",
    "33",
    "--threads",
    "3",
    "--gqa",
    "3,5",
    "--head-dim",
    "7",
    "--queries",
    "2",
  ];
  const rows = rowsOf("attend", ATTEND, ...chosen);
  assert.deepEqual(
    rows.map(({ kv, tokens, threads, gqa, headDim, queries }) => [kv, tokens, threads, gqa, headDim, queries]),
    [3, 5].map((gqa) => ["bf16", 33, 3, gqa, 7, 2]),
  );
});

test("bench attend has prefills, too, in every format and with every rival", TIMEOUT, () => {
  const rows = rowsOf("attend", ATTEND, "--tokens", "150", "--threads", "1", "--head-dim", "64", "--queries", "40");
  assert.deepEqual(rows.map(({ kv, queries }) => [kv, queries]), [...FLOATS, ...CODES].map((kv) => [kv, 40]));
  assertRivals(rows);
});

test("bench paged prints a row for each call, length and number of sequences", TIMEOUT, () => {
  const rows = rowsOf("paged", "call tokens sequences us nsPerToken vsRival");
  assert.deepEqual(rows.map(({ call, tokens, sequences }) => [call, tokens, sequences]), [
    ["fork", 100, 1],
    ["fork", 1000, 1],
    ["append", 1, 1],
    ["append", 1, 8],
    ["attend", 64, 1],
    ["attend", 100, 1],
    ["batch", 100, 1],
    ["batch", 100, 3],
    ["ragged", 94, 32],
  ]);
});

test("bench paged prints the rows its options choose", TIMEOUT, () => {
  const chosen = ["--fork", "7", "--append", "2", "--tokens", "65", "--sequences", "2"];
  const rows = rowsOf("paged", "call tokens sequences us nsPerToken vsRival", ...chosen);
  assert.deepEqual(rows.map(({ call, tokens, sequences }) => [call, tokens, sequences]), [
    ["fork", 7, 1],
    ["append", 1, 2],
    ["attend", 65, 1],
    ["batch", 100, 2],
    ["ragged", 94, 32],
  ]);
});

test("bench quantize prints a row for each format and step", TIMEOUT, () => {
  const rows = rowsOf("quantize", "kv step ms gbps vsCopy vsGgml");
  assert.deepEqual(
    rows.map(({ kv, step }) => [kv, step]),
    CODES.flatMap((kv) => [64, 100].map((step) => [kv, step])),
  );
  for (const { kv, vsGgml } of rows) assert.ok(vsGgml === null || kv === "q8_0" || kv === "q4_0", `${kv}`);
});

const TIERS = "store tokens layers steps medianMs p99Ms maxMs maxOverMedian movedMs";

test("bench tiers prints a row for each store", TIMEOUT, () => {
  const rows = rowsOf("tiers", TIERS);
  assert.deepEqual(
    rows.map(({ store, tokens, layers, steps }) => [store, tokens, layers, steps]),
    ["none", "q4_0", "i4"].map((store) => [store, 500, 2, 70]),
  );
  for (const { medianMs, p99Ms, maxMs } of rows as Record<string, number>[]) {
    assert.ok(medianMs! <= p99Ms! && p99Ms! <= maxMs!);
  }
  assert.deepEqual(rows.map(({ movedMs }) => movedMs !== null), [false, true, true]);
});

test("bench tiers prints the rows its options choose", TIMEOUT, () => {
  const rows = rowsOf("tiers", TIERS, "--store", "i2", "--tokens", "1,600", "--layers", "3", "--steps", "5");
  assert.deepEqual(
    rows.map(({ store, tokens, layers, steps }) => [store, tokens, layers, steps]),
    [1, 600].map((tokens) => ["i2", tokens, 3, 5]),
  );
});

test("bench prefix prints a row for each call and size", TIMEOUT, () => {
  const rows = rowsOf("prefix", "call count us vsRival computed indexBytes tokens rivalTokens");
  assert.deepEqual(rows.map(({ call, count }) => [call, count]), [
    ...[100, 1000].flatMap((tokens) => [["match", tokens], ["adopt", tokens], ["stranger", tokens]]),
    ["evict", 50],
    ["turn", 1],
    ["turn", 2],
    ["turn", 3],
    ["chat", 3],
  ]);
  // 160 tokens of 100, 130 and 160.
  assert.deepEqual(rows.flatMap(({ call, computed }) => call === "chat" ? [computed] : []), [160 / 390]);
  const turns = rows.filter(({ call }) => call === "turn");
  assert.deepEqual(turns.map(({ tokens, rivalTokens }) => [tokens, rivalTokens]), [[100, 100], [30, 130], [30, 160]]);
  assert.equal(rows.filter(({ indexBytes }) => indexBytes !== null).length, 1);
});

test("bench prefix prints the rows its options choose", TIMEOUT, () => {
  const chosen = ["--match", "65", "--blocks", "33", "--turns", "2"];
  const rows = rowsOf("prefix", "call count us vsRival computed indexBytes tokens rivalTokens", ...chosen);
  assert.deepEqual(rows.map(({ call, count }) => [call, count]), [
    ["match", 65],
    ["adopt", 65],
    ["stranger", 65],
    ["evict", 33],
    ["turn", 1],
    ["turn", 2],
    ["chat", 2],
  ]);
});

/** The chart of rows. */
function chartOf(rows: readonly Record<string, unknown>[]): string {
  const path = join(mkdtempSync(join(tmpdir(), "kvern-chart-")), "rows.jsonl");
  writeFileSync(path, rows.map((row) => JSON.stringify(row)).join("\n") + "\n");
  const { code, stdout, stderr } = run("chart", [path]);
  rmSync(dirname(path), { recursive: true });
  assert.equal(code, 0, stderr);
  return stdout;
}

const ONNX_ROWS = "engine tokens batch threads ms cpuMs vsWhole vsShared mib memoryVsShared";

test(`bench onnx prints a row for each engine, number of tokens and batch${withoutOnnx}`, ONNX_OPTIONS, () => {
  const rows = rowsOf("onnx", ONNX_ROWS);
  const hasLlama = rows.some(({ engine }) => engine === "llama-f16");
  const engines = ["whole", "shared", ...(hasLlama ? ["llama-f16"] : []), "kvern-f16", "kvern-i4"];
  assert.deepEqual(
    rows.map(({ engine, tokens, batch }) => [engine, tokens, batch]),
    engines.flatMap((engine) => [1, 2].map((batch) => [engine, 40, batch])),
  );
});

test(`bench onnx prints the rows its options choose${withoutOnnx}`, ONNX_OPTIONS, () => {
  const rows = rowsOf("onnx", ONNX_ROWS, "--engine", "kvern-i4", "--tokens", "3,130", "--batch", "3", "--threads", "2");
  assert.deepEqual(
    rows.map(({ engine, tokens, batch, threads, vsWhole }) => [engine, tokens, batch, threads, vsWhole]),
    [3, 130].map((tokens) => ["kvern-i4", tokens, 3, 2, null]),
  );
});

test("bench past prints a row for each format and direction", TIMEOUT, () => {
  const rows = rowsOf("past", "call kv tokens threads ms vsCopy vsTurned prefillMs shareOfPrefill", "--kv", "f16,i4");
  assert.deepEqual(
    rows.map(({ call, kv, tokens }) => [call, kv, tokens]),
    ["f16", "i4"].flatMap((kv) => ["keep", "restore"].map((call) => [call, kv, 70])),
  );
  const hasPrefill = withoutOnnx === "";
  for (const { prefillMs, shareOfPrefill } of rows) {
    assert.deepEqual([typeof prefillMs, typeof shareOfPrefill], new Array(2).fill(hasPrefill ? "number" : "object"));
  }
});

test("the chart shows every format, context and rival of the rows", TIMEOUT, () => {
  const row = { bench: "attend", runtime: "bun", level: "v3", gqa: 4, headDim: 128, queries: 1, ms: 1, gbps: 9 };
  const rows = [4096, 32768].flatMap((tokens) => [
    { ...row, tokens, threads: 1, kv: "f16", shareOfRead: 0.9, vsGgml: 3, vsOrt: 15 },
    { ...row, tokens, threads: 1, kv: "i4", shareOfRead: 0.71, vsGgml: null, vsOrt: null },
    { ...row, tokens, threads: 1, kv: "i8", queries: 7, shareOfRead: 0.33, vsGgml: null, vsOrt: null },
  ]);
  const stdout = chartOf(rows);
  assert.match(stdout, /^<svg [^]*<\/svg>\n$/);
  const count = (what: RegExp) => [...stdout.matchAll(what)].length;
  assert.deepEqual(["4096 tokens, 1 thread", "32768 tokens, 1 thread"].filter((title) => !stdout.includes(title)), []);
  assert.deepEqual([count(/>f16</g), count(/>i4</g), count(/>i8</g), count(/>0\.90</g), count(/>0\.71</g)], [
    2,
    2,
    0,
    2,
    2,
  ]);
  // One rectangle each is of the legend.
  const bars = ["ours", "rival", "other"].map((color) => count(new RegExp(`<rect class="${color}"`, "g")) - 1);
  assert.deepEqual(bars, [4, 2, 2]);
  assert.equal(
    count(/<(rect|text|line|title|style|g)\b/g),
    count(/<\/(text|title|style|g)>/g) + count(/<(rect|line)[^>]*\/>/g),
  );
  assert.doesNotMatch(stdout, /NaN|Infinity|undefined/);
});

test("the chart of a conversation has two bars for each turn in each panel", TIMEOUT, () => {
  const turn = { bench: "prefix", call: "turn", us: 1500, vsRival: 4, tokens: 30 };
  const rows = [
    { bench: "prefix", call: "match", count: 100, us: 9, vsRival: 3, tokens: null, rivalTokens: null },
    ...[1, 2, 3].map((count) => ({ ...turn, count, rivalTokens: 100 * count })),
  ];
  const chart = chartOf(rows);
  const count = (what: RegExp) => [...chart.matchAll(what)].length;
  assert.deepEqual(["ours", "rival"].map((color) => count(new RegExp(`<rect class="${color}"`, "g")) - 1), [6, 6]);
  assert.deepEqual([count(/>turn 3</g), count(/>300</g), count(/>6\.0</g)], [2, 1, 1]);
  assert.doesNotMatch(chart, /NaN|Infinity|undefined/);
});

test("benches print a table with their rival in it where no JSON is wanted", TIMEOUT, () => {
  const rivals = {
    boundary: "plain function",
    append: "f32 copy",
    attend: "f32 loop",
    paged: "fork",
    quantize: "f32 copy",
    tiers: "none",
    prefix: "match",
    past: "keep +f32",
    ...(withoutOnnx === "" ? { onnx: "whole" } : {}),
  };
  for (const [bench, rival] of Object.entries(rivals)) {
    const { code, stdout, stderr } = run(bench, ["--smoke"]);
    assert.equal(code, 0, stderr);
    assert.equal(stderr, "");
    assert.match(stdout, new RegExp(`^${rival} +[\\d. -]+$`, "m"));
    assert.match(stdout, /hash [0-9a-f]{8}/);
  }
});

test("benches refuse what they do not know", TIMEOUT, () => {
  const refused: [bench: string, args: string[], problem: RegExp][] = [
    ["boundary", ["--fast"], /^boundary\.ts: .*fast/],
    ["append", ["--kv", "f8"], /--kv takes f32,f16,bf16, not f8\n$/],
    ["append", ["--tokens", "0"], /--tokens takes whole numbers from 1 up, not "0"\n$/],
    ["paged", ["--sequences", "many"], /--sequences takes whole numbers from 1 up, not "many"\n$/],
    ["attend", ["--kv", "q4_1"], /--kv takes f32,f16,bf16,q8_0,i8,i4,q4_0,i2, not q4_1\n$/],
    ["attend", ["--head-dim", "257"], /--head-dim is 256 at most, not 257\n$/],
    ["attend", ["--head-dim", "40"], /--head-dim is a multiple of 32 for q8_0, not 40\n$/],
    ["attend", ["--threads", "257"], /--threads is 256 at most, not 257\n$/],
    ["attend", ["--tokens", "8", "--queries", "9"], /8 tokens have no 9\n$/],
    ["quantize", ["--kv", "f16"], /--kv takes q8_0,i8,i4,q4_0,i2, not f16\n$/],
    ["quantize", ["--step", "8193"], /--step is 8192 at most, not 8193\n$/],
    ["tiers", ["--store", "f16"], /--store takes none,q8_0,i8,i4,q4_0,i2, not f16\n$/],
    ["prefix", ["--turns", "0"], /--turns takes whole numbers from 1 up, not "0"\n$/],
    ["onnx", ["--engine", "vllm"], /--engine takes whole,shared,llama-f16,kvern-f16,kvern-i4, not vllm\n$/],
    ["past", ["--kv", "i2"], /--kv takes f32,f16,i8,i4, not i2\n$/],
    ["chart", [], /takes the file of rows/],
  ];
  for (const [bench, args, problem] of refused) {
    const { code, stdout, stderr } = run(bench, args);
    assert.equal(code, 2, stderr);
    assert.equal(stdout, "");
    assert.match(stderr, problem);
  }
});

test("a result that is not the oracle's throws", () => {
  checkClose("x", [1, 2], [1, 2], 0);
  checkClose("x", [1, 2.0001], [1, 2], 1e-4);
  for (const actual of [[1, 2.001], [1, NaN], [1], [1, 2, 3]]) {
    assert.throws(() => checkClose("x", actual, [1, 2], 1e-4), /^Error: x is wrong/);
  }
});

test("the loop that attend is compared with is right for any shape", () => {
  const random = new Random(1);
  const shapes = [[1, 1, 1, 1], [1, 1, 128, 40], [4, 1, 7, 17], [6, 2, 5, 33], [3, 3, 2, 16], [8, 1, 64, 100]];
  for (const [gqa, queryCount, headDim, tokens] of shapes as [number, number, number, number][]) {
    const kvHeadCount = 2;
    const k = random.floats(tokens * kvHeadCount * headDim, 3), v = random.floats(k.length);
    const q = random.floats(queryCount * kvHeadCount * gqa * headDim, 3);
    const output = new Float32Array(q.length);
    attentionLoop({ q, k, v, queryCount, kvHeadCount, headDim, gqa }, output);
    const truth = attention({ q, k, v, queryCount, qHeadCount: kvHeadCount * gqa, kvHeadCount, headDim }).output;
    // The sums are f64, the output is rounded to f32.
    const error = relativeError(output, truth);
    assert.ok(error <= 2 ** -24, `gqa ${gqa}, head_dim ${headDim}: ${error}`);
  }
});

test("deno task bench runs every bench, and each has a task of its own", () => {
  const { tasks, imports } = JSON.parse(readFileSync(new URL("../deno.json", import.meta.url), "utf8"));
  const benches = ["boundary", "append", "attend", "paged", "quantize", "tiers", "prefix", "onnx", "past"];
  const commands = benches.map((bench) => tasks[`bench:${bench}`].command);
  assert.equal(tasks.bench.command, commands.join(" && "));
  // What stands in imports is downloaded by everybody who builds kvern; the rivals have a task of their own.
  assert.equal(imports, undefined);
  assert.match(tasks["bench:rivals"].command, / benches\/rivals\/install\.ts$/);
});
