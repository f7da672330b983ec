/**
 * How long does it take to keep what a run computed, and to give a later run what it starts from?
 *
 *     deno task bench:past [--json] [--smoke] [--kv f32,f16,i8,i4] [--tokens 512] [--threads 1]
 *     bun benches/past.ts
 *
 * Tensors as transformers.js has them, `[1, kv_head, row, head_dim]` in f32, of all 30 layers of SmolLM2-135M's shape, go
 * into a paged cache (`keep`) and come out of it (`restore`, with the search for the prefix).
 *
 *     x copy      `TypedArray.set` of the same bytes into new arrays, over ours
 *     x turned    the same where JavaScript turns the rows, token-major there and head-major here, over ours
 *     % prefill   keep and restore together, of the time in which OnnxDecoder computes these tokens: onnxruntime multiplies
 *                 with so many threads, and logits are those of the last token. Goal: at most 2.
 *
 * Before timing, what comes out is compared with what went in.
 */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type KvFormat, PagedCache, setThreadCount } from "../mod.ts";
import { keep, type KvTensor, OnnxDecoder, pastKeyValues } from "../src/onnx.ts";
import { makeDecoder } from "../tests/onnx/decoder.ts";
import { writeModel } from "../tests/onnx/graph.ts";
import { onnxRuntime, withoutOnnx } from "../tests/onnx_runtime.ts";
import { checkClose, hashOf } from "./checking.ts";
import { headMajor, numbers } from "./inputs.ts";
import { cell, keep as use, printRows, readOptions, type Row, tell, tellMachine, timeOf } from "./rows.ts";
import { randomWeights, SMOL, TINY } from "./smol.ts";

const FORMATS = ["f32", "f16", "i8", "i4"] as const;
type Format = typeof FORMATS[number];

/** How far rows may be off by the rounding of the format, in the mean. */
const ERROR_MAX: Readonly<Record<Format, number>> = { f32: 0, f16: 2 ** -12, i8: 2 ** -7, i4: 2 ** -3.5 };

const options = readOptions(["kv", "tokens", "threads"]);
const { smoke } = options;
const formats = options.names<Format>("kv", FORMATS);
const tokenCounts = options.numbers("tokens", [smoke ? 70 : 512]);
const [threads = 1] = options.numbers("threads", [1]);
const shape = smoke ? TINY : SMOL;
const { layerCount, kvHeadCount, headDim } = shape;
const kvDim = kvHeadCount * headDim;

interface Measured {
  readonly call: "keep" | "restore";
  readonly kv: Format;
  readonly tokens: number;
  readonly ns: number;
  readonly copyNs: number;
  readonly turnedNs: number;
}

/** The ids of a text. */
function textOf(tokens: number): Uint32Array {
  return Uint32Array.from({ length: tokens }, (_, i) => (i * 7919) % shape.vocabSize);
}

/** Rows `[kv_head][row][head_dim]` of each layer and side, as a run would give them. */
function tensorsOf(tokens: number): Record<string, KvTensor> {
  const tensors: Record<string, KvTensor> = {};
  for (let layer = 0; layer < layerCount; layer++) {
    for (const [i, side] of ["key", "value"].entries()) {
      const data = numbers(2 * layer + i + 1, tokens * kvDim);
      tensors[`past_key_values.${layer}.${side}`] = { type: "float32", dims: [1, kvHeadCount, tokens, headDim], data };
    }
  }
  return tensors;
}

/** All of them are held until the last one is there, as a caller holds tensors. */
function copyAll(tensors: Record<string, KvTensor>): Float32Array[] {
  return Object.values(tensors).map(({ data }) => new Float32Array(data as Float32Array));
}

/** Rows `[row][kv_head][head_dim]` of `[kv_head][row][head_dim]`. */
function tokenMajor(rows: Float32Array, tokens: number): Float32Array {
  const turned = new Float32Array(rows.length);
  for (let head = 0; head < kvHeadCount; head++) {
    for (let token = 0; token < tokens; token++) {
      const from = (head * tokens + token) * headDim;
      turned.set(rows.subarray(from, from + headDim), (token * kvHeadCount + head) * headDim);
    }
  }
  return turned;
}

function optionsOf(kv: Format): { dtype: "f32" | "f16"; store?: KvFormat } {
  return kv === "f32" || kv === "f16" ? { dtype: kv } : { dtype: "f16", store: kv };
}

async function measure(kv: Format, tokens: number, tensors: Record<string, KvTensor>): Promise<Measured[]> {
  const text = textOf(tokens + 1), told = text.slice(0, tokens);
  using cache = new PagedCache({ layerCount, kvHeadCount, headDim, maxSeqLen: tokens + 64, ...optionsOf(kv) });
  const keepAll = () => keep(cache, text, tensors).free(); // without `prefix` nothing is known the next time
  // Rows of one layer after the other: no caller holds them all.
  const keepTurned = () => {
    using sequence = cache.sequence({ tokens: text });
    for (let layer = 0; layer < layerCount; layer++) {
      const [k, v] = ["key", "value"].map((side) =>
        tokenMajor(tensors[`past_key_values.${layer}.${side}`]!.data as Float32Array, tokens)
      );
      sequence.append(layer, k!, v!);
    }
    sequence.commit(tokens, { tokens: told });
  };
  const copyNs = await timeOf(() => use(copyAll(tensors)), smoke);
  const kept = {
    call: "keep" as const,
    ...{ kv, tokens, copyNs, ns: await timeOf(keepAll, smoke), turnedNs: await timeOf(keepTurned, smoke) },
  };

  using living = keep(cache, text, tensors);
  const restore = () => {
    using sequence = cache.sequence({ tokens: text });
    return pastKeyValues(sequence);
  };
  const restored = restore();
  for (const name of ["past_key_values.0.key", `past_key_values.${layerCount - 1}.value`]) {
    checkClose(name, restored[name]!.data as Float32Array, tensors[name]!.data as Float32Array, ERROR_MAX[kv]);
  }
  const hash = hashOf(restored["past_key_values.0.value"]!.data as Float32Array);
  tell(options, `${kv}, ${living.seqLen} tokens: equal to what went in but for rounding, hash ${hash}`);
  const restoreTurned = () => {
    using sequence = cache.sequence({ tokens: text });
    return Array.from({ length: layerCount }, (_, layer) => {
      const { k, v } = sequence.gather(layer);
      return [k, v].map((rows) => headMajor(rows as Float32Array, kvHeadCount, headDim));
    });
  };
  const ns = await timeOf(() => use(restore()), smoke);
  return [kept, { call: "restore", kv, tokens, copyNs, ns, turnedNs: await timeOf(() => use(restoreTurned()), smoke) }];
}

/** Nanoseconds in which tokens are computed, by their number; none without onnxruntime. */
async function prefills(): Promise<Map<number, number>> {
  const times = new Map<number, number>();
  if (onnxRuntime === undefined) {
    tell(options, `no prefill to compare with${withoutOnnx}`);
    return times;
  }
  const folder = mkdtempSync(join(tmpdir(), "kvern-bench-"));
  try {
    const form = { attention: "gqa", dataFile: "model.onnx_data" } as const;
    const path = writeModel(folder, makeDecoder(shape, randomWeights(shape), form));
    await using decoder = await OnnxDecoder.load(path, {
      ort: onnxRuntime,
      session: { intraOpNumThreads: threads, interOpNumThreads: 1 },
      maxSeqLen: Math.max(...tokenCounts) + 64,
    });
    using sequence = decoder.sequence();
    for (const tokens of tokenCounts) {
      times.set(
        tokens,
        await timeOf(async () => {
          await decoder.step([sequence], [textOf(tokens)]);
          sequence.truncate(0);
        }, smoke),
      );
    }
  } finally {
    rmSync(folder, { recursive: true });
  }
  return times;
}

setThreadCount(threads);
tellMachine(options);
const measured: Measured[] = [];
for (const tokens of tokenCounts) {
  const tensors = tensorsOf(tokens);
  for (const kv of formats) measured.push(...await measure(kv, tokens, tensors));
}
const prefillNs = await prefills();

const rows = measured.map(({ call, kv, tokens, ns, copyNs, turnedNs }): Row => {
  const ms = ns / 1e6, vsCopy = copyNs / ns, vsTurned = turnedNs / ns;
  const both = measured.filter((one) => one.kv === kv && one.tokens === tokens).reduce((sum, one) => sum + one.ns, 0);
  const prefill = prefillNs.get(tokens);
  const prefillMs = prefill === undefined ? null : prefill / 1e6;
  const shareOfPrefill = prefill === undefined ? null : both / prefill;
  return {
    json: { call, kv, tokens, threads, ms, vsCopy, vsTurned, prefillMs, shareOfPrefill },
    cells: [
      ...[call, kv, tokens, ms.toFixed(2), cell(vsCopy, 2), cell(vsTurned, 2), cell(prefillMs, 0)],
      cell(shareOfPrefill === null ? null : 100 * shareOfPrefill, 2),
    ],
  };
});
printRows(options, "past", ["call", "kv", "tokens", "ms", "x copy", "x turned", "prefill ms", "% prefill"], rows);
