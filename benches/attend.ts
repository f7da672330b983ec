/**
 * How long is one step of a layer by format and context, how near is that to memory's speed, and how long do others take?
 *
 *     deno task bench:attend [--json] [--smoke] [--kv f32,f16,bf16,q8_0,i8,i4,q4_0,i2]
 *         [--tokens 4096,32768] [--threads 1,2] [--gqa 4] [--head-dim 128] [--queries 1]
 *     bun benches/attend.ts
 *
 * Every option that chooses rows takes a list. Floats are in a contiguous cache, codes in the store of a paged one with
 * blocks of 64 and no tail. Each call takes the next layer of at least max(1 GiB, 2 x the last cache level), rivals too.
 * `GB/s` counts the stored bytes of the layer once; `of R` is their share of R, the best rate at which as many threads
 * read memory here, measured before and after in the same run.
 *
 * The rivals, whose time over ours is `x`:
 *
 *     ggml   llama.cpp's flash attention over the same format, called by FFI      `deno task bench:rivals` installs these;
 *     ort    onnxruntime's GroupQueryAttention, called as JavaScript calls it      without them their columns are empty
 *     loop   a loop in TypeScript over the same rows as f32, which has one thread  left out where it takes many seconds
 *
 * Before timing, attend and the loop are compared with the oracle on a short sequence of the same rows; with each other
 * on the layer that is timed; and the rivals with both. For codes the truth is their own values, from `gather`, which
 * are compared with the rows that went in. After timing, the last result must be the same bits as the first.
 */
import {
  ContiguousCache,
  type DType,
  type FloatDType,
  type KvCache,
  PagedCache,
  type QuantizedDType,
  readRate,
  setThreadCount,
} from "../mod.ts";
import { attention, storedRows } from "../tests/oracle.ts";
import { type AttentionCase, attentionLoop } from "./attention_loop.ts";
import { checkClose, hashOf } from "./checking.ts";
import { CODE_ERRORS, CODES, DTYPE_BYTES, FLOATS, numbers, rotatedBytes, SHAPE } from "./inputs.ts";
import { ggmlAttention } from "./rivals/ggml.ts";
import { onnxAttention } from "./rivals/onnx.ts";
import { cell, printRows, readOptions, type Row, tell, tellMachine, timeOf, usage } from "./rows.ts";

/** Scores and sums are f32, which is what the tests of the kernels admit; codes meet a small operand of 15 bits. */
const FLOAT_ERROR_MAX = 1e-5, CODE_ERROR_MAX = 1e-3;

/**
 * The rivals round more: ggml takes its queries in 8 bits where the keys are codes, and sums values of f16 as f16, so that
 * its error grows as the root of their number: 0.008 at 4096 tokens, 0.023 at 32768.
 */
function rivalErrorMax(kv: DType, tokens: number): number {
  if (kv === "q4_0") return 0.1;
  return kv === "f16" ? 2e-2 * Math.sqrt(Math.max(1, tokens / 4096)) : 2e-2;
}

/** What is measured: `tokens` rows, attended by `queries` newest positions. */
interface Case {
  readonly tokens: number;
  readonly gqa: number;
  readonly headDim: number;
  readonly queries: number;
}

/** A format: floats or codes. */
const isFloat = (kv: DType): kv is FloatDType => Object.hasOwn(DTYPE_BYTES, kv);

const options = readOptions(["kv", "tokens", "threads", "gqa", "head-dim", "queries"]);
const { smoke } = options;
const formats = options.names<DType>("kv", [...FLOATS, ...CODES]);
const threadCounts = options.numbers("threads", [1, 2]);
const cases: Case[] = [];
for (const tokens of options.numbers("tokens", smoke ? [64, 100] : [4096, 32768])) {
  for (const gqa of options.numbers("gqa", [SHAPE.gqa])) {
    for (const headDim of options.numbers("head-dim", [SHAPE.headDim])) {
      for (const queries of options.numbers("queries", [1])) cases.push({ tokens, gqa, headDim, queries });
    }
  }
}
for (const { tokens, headDim, queries } of cases) {
  if (headDim > 256) usage(`--head-dim is 256 at most, not ${headDim}`);
  const codes = formats.find((kv) => !isFloat(kv));
  if (codes !== undefined && headDim % 32 !== 0) usage(`--head-dim is a multiple of 32 for ${codes}, not ${headDim}`);
  if (queries > tokens) usage(`--queries are of the last tokens, so ${tokens} tokens have no ${queries}`);
}
for (const threads of threadCounts) if (threads > 256) usage(`--threads is 256 at most, not ${threads}`);
const { kvHeadCount } = SHAPE;

/** Rows of a format in a cache, the same in every layer. */
interface Filled extends Disposable {
  readonly sequence: KvCache;
  /** Stored bytes of a layer. */
  readonly layerBytes: number;
}

/** Rows in so many layers. */
function fill(attention: AttentionCase, kv: DType, layerCount: number): Filled {
  return isFloat(kv) ? fillFloats(attention, kv, layerCount) : fillCodes(attention, kv, layerCount);
}

function fillFloats({ k, v, headDim }: AttentionCase, dtype: FloatDType, layerCount: number): Filled {
  const maxSeqLen = k.length / (kvHeadCount * headDim);
  const cache = new ContiguousCache({ layerCount, kvHeadCount, headDim, maxSeqLen, dtype });
  const sequence = cache.sequence(0);
  for (let layer = 0; layer < layerCount; layer++) sequence.append(layer, k, v);
  sequence.commit(maxSeqLen);
  return { sequence, layerBytes: 2 * k.length * DTYPE_BYTES[dtype], [Symbol.dispose]: () => cache.free() };
}

/** Tokens that are appended before they migrate: the blocks of floats that they need meanwhile stay few. */
const STEP_TOKENS = 512;

function fillCodes({ k, v, headDim }: AttentionCase, store: QuantizedDType, layerCount: number): Filled {
  const kvDim = kvHeadCount * headDim;
  const maxSeqLen = k.length / kvDim;
  const shape = { layerCount, kvHeadCount, headDim, maxSeqLen };
  const cache = new PagedCache({ ...shape, blockSize: 64, tail: { tokens: 0 }, store });
  const sequence = cache.sequence();
  for (let start = 0; start < maxSeqLen; start += STEP_TOKENS) {
    const end = Math.min(start + STEP_TOKENS, maxSeqLen);
    const newK = k.subarray(start * kvDim, end * kvDim), newV = v.subarray(start * kvDim, end * kvDim);
    for (let layer = 0; layer < layerCount; layer++) sequence.append(layer, newK, newV);
    sequence.commit(end - start);
  }
  const { tailBytes, storeBytes } = cache.stats();
  return { sequence, layerBytes: (tailBytes + storeBytes) / layerCount, [Symbol.dispose]: () => cache.free() };
}

/** Layers of a format that are together too large for a processor's caches. */
function layersFor(attention: AttentionCase, kv: DType): number {
  using one = fill(attention, kv, 1);
  return Math.ceil(rotatedBytes(smoke) / one.layerBytes);
}

/** Compares attend and the loop with the oracle on the first rows. */
function checkShort(whole: AttentionCase, kv: DType): void {
  const { q, queryCount, headDim, gqa } = whole;
  const kvDim = kvHeadCount * headDim;
  const tokens = Math.min(whole.k.length / kvDim, Math.max(queryCount, 500));
  const given = { k: whole.k.subarray(0, tokens * kvDim), v: whole.v.subarray(0, tokens * kvDim) };
  using filled = fill({ ...whole, ...given }, kv, 1);
  const rows = filled.sequence.gather(0) as { k: Float32Array; v: Float32Array };
  for (const side of ["k", "v"] as const) {
    const what = `${side} of ${tokens} ${kv} rows`;
    if (isFloat(kv)) checkClose(what, rows[side], storedRows(given[side], kv), 0);
    else checkClose(what, rows[side], given[side], CODE_ERRORS[kv]);
  }
  const stored = { ...whole, ...rows };
  const truth = attention({ ...stored, qHeadCount: kvHeadCount * gqa }).output;
  const output = filled.sequence.attend(0, q, { queryCount });
  checkClose(`attend over ${tokens} ${kv} rows`, output, truth, isFloat(kv) ? FLOAT_ERROR_MAX : CODE_ERROR_MAX);
  const looped = new Float32Array(truth.length);
  attentionLoop(stored, looped);
  checkClose(`the loop over ${tokens} ${kv} rows`, looped, truth, FLOAT_ERROR_MAX);
}

/** Compares attend over the rows that are timed with the loop over their f32 values, at up to four of the queries. */
function checkWhole(whole: AttentionCase, kv: DType, { sequence }: Filled): Float32Array {
  const { q, queryCount, headDim, gqa } = whole;
  const { k, v } = sequence.gather(0) as { k: Float32Array; v: Float32Array };
  const output = sequence.attend(0, q, { queryCount });
  const kvDim = kvHeadCount * headDim, outputDim = gqa * kvDim;
  const tokens = k.length / kvDim;
  for (const part of new Set([0, 1 / 3, 2 / 3, 1])) {
    const query = Math.round(part * (queryCount - 1));
    const seen = (tokens - queryCount + query + 1) * kvDim;
    const of = (values: Float32Array) => values.subarray(query * outputDim, (query + 1) * outputDim);
    const looped = new Float32Array(outputDim);
    attentionLoop({ ...whole, q: of(q), k: k.subarray(0, seen), v: v.subarray(0, seen), queryCount: 1 }, looped);
    const bound = isFloat(kv) ? FLOAT_ERROR_MAX : CODE_ERROR_MAX;
    checkClose(`attend over ${tokens} ${kv} rows at query ${query}`, of(output), looped, bound);
  }
  return output;
}

/** A row before the read rate is known. */
interface Measured {
  readonly row: Case;
  readonly kv: DType;
  /** What was timed. */
  readonly name: string;
  readonly threads: number;
  readonly ns: number;
  readonly layerBytes: number;
}

/** The loop over the rows as f32, without a copy of those in the cache; null where a call would take many seconds. */
async function measureLoop(row: Case, whole: AttentionCase): Promise<Measured | null> {
  if (row.queries * row.tokens > LOOP_ROWS_MAX) return null;
  const layerCount = layersFor(whole, "f32");
  using filled = fill(whole, "f32", layerCount);
  const layers = Array.from({ length: layerCount }, (_, layer) => {
    const run = filled.sequence.contiguousKv(layer);
    if (!run.ok) throw new Error("a contiguous cache has its rows in one run");
    return { ...whole, k: run.k as Float32Array, v: run.v as Float32Array };
  });
  const into = new Float32Array(whole.q.length);
  let calls = 0;
  const ns = await timeOf(() => attentionLoop(layers[calls++ % layerCount]!, into), smoke);
  return { row, kv: "f32", name: "f32 loop", threads: 1, ns, layerBytes: filled.layerBytes };
}

const LOOP_ROWS_MAX = 2 ** 18;

/** kvern with every number of threads, and its result. */
async function measureOurs(row: Case, whole: AttentionCase, kv: DType): Promise<[Measured[], Float32Array]> {
  checkShort(whole, kv);
  const layerCount = layersFor(whole, kv);
  using filled = fill(whole, kv, layerCount);
  const { sequence, layerBytes } = filled;
  const output = checkWhole(whole, kv, filled);
  const hash = hashOf(output);
  tell(options, `${kv}, ${row.tokens} tokens: equal to the oracle and to the loop, hash ${hash}`);
  const into = new Float32Array(whole.q.length);
  const attendOptions = { queryCount: row.queries, into };
  const measured: Measured[] = [];
  for (const threads of threadCounts) {
    setThreadCount(threads);
    let calls = 0;
    const ns = await timeOf(() => sequence.attend(calls++ % layerCount, whole.q, attendOptions), smoke);
    if (hashOf(into) !== hash) throw new Error(`attend over ${row.tokens} ${kv} rows gives other bits than at first`);
    measured.push({ row, kv, name: kv, threads, ns, layerBytes });
  }
  return [measured, output];
}

/** What a rival needs for the same memory. */
interface Rival {
  readonly name: string;
  readonly layerCount: number;
  setThreads(threads: number): void | Promise<void>;
  attend(layer: number): void | Promise<void>;
  output(): Float32Array;
}

/** A rival with every number of threads; its result must be near ours. */
async function measureRival(row: Case, kv: DType, rival: Rival, layerBytes: number, ours: Float32Array) {
  const measured: Measured[] = [];
  for (const threads of threadCounts) {
    await rival.setThreads(threads);
    await rival.attend(0);
    checkClose(`${rival.name} over ${row.tokens} tokens`, rival.output(), ours, rivalErrorMax(kv, row.tokens));
    let calls = 0;
    const ns = await timeOf(() => rival.attend(calls++ % rival.layerCount), smoke);
    measured.push({ row, kv, name: rival.name, threads, ns, layerBytes });
  }
  return measured;
}

/** One case in one format: kvern, then the rivals that have the format. */
async function measureFormat(row: Case, whole: AttentionCase, kv: DType): Promise<Format> {
  const [ours, output] = await measureOurs(row, whole, kv);
  const { layerBytes } = ours[0]!;
  const layerCount = Math.ceil(rotatedBytes(smoke) / layerBytes);
  const format: Format = { ours, ggml: [], ort: [] };
  {
    using ggml = ggmlAttention(whole, kv, layerCount);
    if (ggml !== null) {
      tell(options, `${kv}: ggml is fastest as ${ggml.variant}`);
      const rival = { ...ggml, name: `${kv} ggml ${ggml.variant}`, output: () => ggml.output };
      format.ggml = await measureRival(row, kv, rival, layerBytes, output);
    }
  }
  await using ort = onnxAttention(whole, kv, layerCount);
  if (ort !== null) format.ort = await measureRival(row, kv, { ...ort, name: `${kv} ort` }, layerBytes, output);
  return format;
}

/** What is measured of a case and a format: a row for each number of threads, or none. */
interface Format {
  readonly ours: Measured[];
  ggml: Measured[];
  ort: Measured[];
}

tellMachine(options);
const rates = new Map(threadCounts.map((threads) => [threads, 0]));
function measureReadRates(): void {
  const bytes = Math.max(rotatedBytes(smoke), 2 ** 22);
  for (const [threads, rate] of rates) rates.set(threads, Math.max(rate, readRate({ bytes, threads }) / 1e9));
}

/** A line of the table; those of rivals and of the loop are not in the JSON. */
function rowOf({ row, kv, name, threads, ns, layerBytes }: Measured, rivals?: Rivals): Row {
  const { tokens, gqa, headDim, queries } = row;
  const ms = ns / 1e6, gbps = layerBytes / ns;
  const rate = rates.get(threads);
  const shareOfRead = rate === undefined ? null : gbps / rate;
  const times = (rival: Measured | null | undefined) => rival ? rival.ns / ns : null;
  const vsGgml = times(rivals?.ggml), vsOrt = times(rivals?.ort), vsLoop = times(rivals?.loop);
  const ratios = [vsGgml, vsOrt, vsLoop].map((ratio) => cell(ratio, 1));
  const sizes = [tokens, threads, gqa, headDim, queries];
  const cells = [name, ...sizes, cell(ms, 3), cell(gbps, 2), cell(shareOfRead, 2), ...ratios];
  if (rivals === undefined) return { cells };
  return { json: { kv, tokens, threads, gqa, headDim, queries, ms, gbps, shareOfRead, vsGgml, vsOrt }, cells };
}

interface Rivals {
  readonly ggml: Measured | undefined;
  readonly ort: Measured | undefined;
  readonly loop: Measured | null;
}

measureReadRates();
const measured: { loop: Measured | null; formats: Format[] }[] = [];
for (const row of cases) {
  const { tokens, gqa, headDim, queries: queryCount } = row;
  const kvDim = kvHeadCount * headDim;
  const k = numbers(1, tokens * kvDim), v = numbers(2, tokens * kvDim), q = numbers(3, queryCount * gqa * kvDim);
  const whole = { q, k, v, queryCount, kvHeadCount, headDim, gqa };
  const loop = await measureLoop(row, whole);
  const measuredFormats: Format[] = [];
  for (const kv of formats) measuredFormats.push(await measureFormat(row, whole, kv));
  measured.push({ loop, formats: measuredFormats });
}
measureReadRates();
for (const [threads, rate] of rates) tell(options, `R ${rate.toFixed(2)} GB/s with ${threads} threads`);

const rows = measured.flatMap(({ loop, formats }) => [
  ...(loop === null ? [] : [rowOf(loop)]),
  ...threadCounts.flatMap((_, i) =>
    formats.flatMap(({ ours, ggml, ort }) => [
      rowOf(ours[i]!, { ggml: ggml[i], ort: ort[i], loop }),
      ...[ggml[i], ort[i]].flatMap((rival) => rival === undefined ? [] : [rowOf(rival)]),
    ])
  ),
]);
const sizes = ["tokens", "threads", "gqa", "head dim", "queries"];
printRows(options, "attend", ["kv", ...sizes, "ms", "GB/s", "of R", "x ggml", "x ort", "x loop"], rows);
