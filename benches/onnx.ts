/**
 * How long is one step of a whole model that onnxruntime multiplies, and what does its memory of past tokens take?
 *
 *     deno task bench:onnx [--json] [--smoke] [--tokens 512,2048,4096] [--batch 1,8] [--threads 1] [--engine kvern-i4,...]
 *     bun benches/onnx.ts
 *
 * A model of SmolLM2-135M's shape with random weights (538 MB, in the system's folder for such files while it runs). A
 * step adds a token to each of `batch` sequences that have so many tokens before it; in kvern and llama.cpp these are
 * forks of one text. Eight sequences of 8192 take 6 GiB and more in onnxruntime alone.
 *
 * `ms` is by token, and so is `cpu ms`, what the process computed in that time: on a machine that does nothing else the two
 * are the same with one thread, and elsewhere the second is what can be compared, so the ratios are of it. `MiB` is what
 * keys and values of all sequences take after that step.
 *
 *     whole       onnxruntime runs the graph, past in and present out, as transformers.js does
 *     shared      the same with one tensor as past and as present
 *     llama-f16   llama.cpp on the same weights by node-llama-cpp, keys and values in f16; where it is installed
 *     kvern-f16   OnnxDecoder: onnxruntime multiplies, kvern attends, over f16
 *     kvern-i4    the same over i4
 *
 * Before timing, logits are compared with those of `whole` over the same rows. llama.cpp has to compute its own.
 */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { setThreadCount } from "../mod.ts";
import { OnnxDecoder } from "../src/onnx.ts";
import { makeDecoder } from "../tests/onnx/decoder.ts";
import { writeModel } from "../tests/onnx/graph.ts";
import { onnxRuntime, withoutOnnx } from "../tests/onnx_runtime.ts";
import { checkClose, hashOf } from "./checking.ts";
import { numbers } from "./inputs.ts";
import { writeGguf } from "./rivals/gguf.ts";
import { Llama } from "./rivals/llama.ts";
import { WholeGraph } from "./rivals/whole_graph.ts";
import { cell, printRows, readOptions, type Row, tell, tellMachine, timeOf, usage } from "./rows.ts";
import { randomWeights, SMOL, TINY } from "./smol.ts";

const ENGINES = ["whole", "shared", "llama-f16", "kvern-f16", "kvern-i4"] as const;
type Engine = typeof ENGINES[number];

const options = readOptions(["tokens", "batch", "threads", "engine"]);
const { smoke } = options;
const tokenCounts = options.numbers("tokens", smoke ? [40] : [512, 2048, 4096]);
const batches = options.numbers("batch", smoke ? [1, 2] : [1, 8]);
const [threads = 1] = options.numbers("threads", [1]);
const engines = options.names<Engine>("engine", ENGINES);
const shape = smoke ? TINY : SMOL;
const kvDim = shape.kvHeadCount * shape.headDim;
const TOKEN = 5;

/** Rounding of f16 rows, and of rows in 4 bits, through all layers; random weights make much of both. */
const ERROR_MAX = { "kvern-f16": 0.02, "kvern-i4": 0.5 } as const;

interface Measured {
  readonly engine: Engine;
  readonly tokens: number;
  readonly batch: number;
  readonly ms: number;
  readonly cpuMs: number;
  readonly bytes: number;
}

/** Medians of a step, by token. */
async function timed(step: () => Promise<unknown>, batch: number): Promise<{ ms: number; cpuMs: number }> {
  const spent: number[] = [];
  const ns = await timeOf(async () => {
    const before = process.cpuUsage();
    await step();
    const { user, system } = process.cpuUsage(before);
    spent.push(Math.max(1, user + system));
  }, smoke);
  const median = spent.sort((a, b) => a - b)[spent.length >> 1]!;
  return { ms: ns / 1e6 / batch, cpuMs: median / 1e3 / batch };
}

/** Where the model is. */
interface Files {
  readonly onnx: string;
  readonly gguf: string;
}

function writeFiles(folder: string): Files {
  const weights = randomWeights(shape);
  const onnx = writeModel(folder, makeDecoder(shape, weights, { attention: "gqa", dataFile: "model.onnx_data" }));
  const gguf = join(folder, "model.gguf");
  if (engines.includes("llama-f16")) writeGguf(gguf, shape, weights);
  return { onnx, gguf };
}

/** Rows of that many tokens, the same in every layer, for keys and for values. */
function rowsOf(tokens: number): Float32Array {
  return numbers(tokens, tokens * kvDim);
}

const pastBytes = (tokens: number) => 2 * shape.layerCount * tokens * kvDim * Float32Array.BYTES_PER_ELEMENT;

/** The logits of a step over those rows, by onnxruntime alone. */
async function truthOf(graph: WholeGraph, tokens: number): Promise<Float32Array> {
  return (await graph.step(TOKEN, { rows: rowsOf(tokens), batch: 1, passing: "copied" })()).slice();
}

async function measureWhole(graph: WholeGraph, engine: "whole" | "shared"): Promise<Measured[]> {
  const measured: Measured[] = [];
  for (const tokens of tokenCounts) {
    const truth = await truthOf(graph, tokens);
    for (const batch of batches) {
      const passing = engine === "whole" ? "copied" : "shared";
      const step = graph.step(TOKEN, { rows: rowsOf(tokens), batch, passing });
      checkClose(`${engine}, ${tokens} tokens`, (await step()).slice(-shape.vocabSize), truth, 1e-3);
      const time = await timed(step, batch);
      tell(options, `${engine}, ${tokens} tokens, ${batch} at once: ${time.cpuMs.toFixed(2)} ms a token`);
      // Past and present are there together where they are not the same.
      const copies = engine === "whole" ? 2 : 1;
      measured.push({ engine, tokens, batch, ...time, bytes: copies * batch * pastBytes(tokens + 1) });
    }
  }
  return measured;
}

async function measureLlama(path: string): Promise<Measured[]> {
  const measured: Measured[] = [];
  for (const tokens of tokenCounts) {
    for (const batch of batches) {
      const maxSeqLen = Math.ceil((tokens + 1) / 256) * 256;
      await using llama = await Llama.load({ path, kv: "f16", maxSeqLen, sequenceCount: batch, threads });
      if (llama === null) {
        tell(options, "llama.cpp is not installed: deno task bench:rivals");
        return [];
      }
      await llama.prefill(Uint32Array.from({ length: tokens }, (_, i) => (i * 7919) % shape.vocabSize));
      const time = await timed(() => llama.step(TOKEN, tokens, batch), batch);
      tell(options, `llama-f16, ${tokens} tokens, ${batch} at once: ${time.cpuMs.toFixed(2)} ms a token`);
      measured.push({ engine: "llama-f16", tokens, batch, ...time, bytes: batch * pastBytes(maxSeqLen) / 2 });
    }
  }
  return measured;
}

async function measureKvern(
  path: string,
  engine: "kvern-f16" | "kvern-i4",
  truths: ReadonlyMap<number, Float32Array>,
): Promise<Measured[]> {
  const measured: Measured[] = [];
  await using decoder = await OnnxDecoder.load(path, {
    ort: onnxRuntime!,
    session: { intraOpNumThreads: threads, interOpNumThreads: 1 },
    maxSeqLen: shape.maxSeqLen,
    dtype: "f16",
    ...(engine === "kvern-i4" ? { store: "i4" as const } : {}),
  });
  for (const tokens of tokenCounts) {
    const rows = rowsOf(tokens);
    using first = decoder.sequence();
    for (let layer = 0; layer < shape.layerCount; layer++) first.append(layer, rows, rows);
    first.commit(tokens);
    const forks = Array.from({ length: Math.max(...batches) - 1 }, () => first.fork());
    for (const batch of batches) {
      const sequences = [first, ...forks.slice(0, batch - 1)];
      const given = sequences.map(() => [TOKEN]);
      const step = async () => {
        const logits = await decoder.step(sequences, given);
        for (const sequence of sequences) sequence.truncate(tokens);
        return logits;
      };
      const logits = (await step()).at(-1)!;
      checkClose(`${engine}, ${tokens} tokens`, logits, truths.get(tokens)!, ERROR_MAX[engine]);
      tell(
        options,
        `${engine}, ${tokens} tokens, ${batch} at once: equal to onnxruntime alone but for rounding, hash ${
          hashOf(logits)
        }`,
      );
      const time = await timed(step, batch);
      await decoder.step(sequences, given);
      const bytes = decoder.cache.stats().usedBytes;
      for (const sequence of sequences) sequence.truncate(tokens);
      measured.push({ engine, tokens, batch, ...time, bytes });
    }
    for (const fork of forks) fork.free();
  }
  return measured;
}

if (onnxRuntime === undefined) usage(`onnxruntime must be there${withoutOnnx}`);
setThreadCount(threads);
tellMachine(options);
const folder = mkdtempSync(join(tmpdir(), "kvern-bench-"));
const measured: Measured[] = [];
try {
  const files = writeFiles(folder);
  const truths = new Map<number, Float32Array>();
  {
    await using graph = await WholeGraph.load(onnxRuntime, files.onnx, shape, threads);
    for (const tokens of tokenCounts) truths.set(tokens, await truthOf(graph, tokens));
    for (const engine of ["whole", "shared"] as const) {
      if (engines.includes(engine)) measured.push(...await measureWhole(graph, engine));
    }
  }
  if (engines.includes("llama-f16")) measured.push(...await measureLlama(files.gguf));
  for (const engine of ["kvern-f16", "kvern-i4"] as const) {
    if (engines.includes(engine)) measured.push(...await measureKvern(files.onnx, engine, truths));
  }
} finally {
  rmSync(folder, { recursive: true });
}

/** The same case of a rival, over that one: above 1 where the rival is slower, or takes more. */
function ratio(of: Measured, rival: Engine, figure: (one: Measured) => number): number | null {
  const found = measured.find(({ engine, tokens, batch }) =>
    engine === rival && tokens === of.tokens && batch === of.batch
  );
  return found === undefined ? null : figure(found) / figure(of);
}

const rows = measured.map((one): Row => {
  const { engine, tokens, batch, ms, cpuMs, bytes } = one;
  const mib = bytes / 2 ** 20;
  const [vsWhole, vsShared] = (["whole", "shared"] as const).map((rival) => ratio(one, rival, ({ cpuMs }) => cpuMs));
  const memoryVsShared = ratio(one, "shared", ({ bytes }) => bytes);
  return {
    json: { engine, tokens, batch, threads, ms, cpuMs, vsWhole: vsWhole!, vsShared: vsShared!, mib, memoryVsShared },
    cells: [
      ...[engine, tokens, batch, ms.toFixed(2), cpuMs.toFixed(2), cell(vsWhole!, 2), cell(vsShared!, 2)],
      ...[mib.toFixed(1), cell(memoryVsShared, 1)],
    ],
  };
});
const header = ["engine", "tokens", "batch", "ms", "cpu ms", "x whole", "x shared", "MiB", "less MiB than shared"];
printRows(options, "onnx", header, rows);
