/**
 * How long is one decode step of a layer at 4 K and at 32 K tokens, by dtype, and how near is that to memory's speed?
 *
 *     deno task bench:attend [--json] [--smoke]
 *         [--kv f32,f16,bf16] [--tokens 4096,32768] [--gqa 4] [--head-dim 128] [--queries 1]
 *     bun benches/attend.ts
 *
 * One thread; every option that chooses rows takes a list. Each call takes the next layer of a cache of at least
 * max(1 GiB, 2 x the last cache level). `GB/s` counts the stored bytes of the layer once; `of R` is their share of R,
 * the best rate at which this machine reads memory, measured before and after in the same run. The rival is a loop in
 * TypeScript over the same f32 rows; `x loop` is its time over ours.
 *
 * Before timing, attend and the loop are compared with the oracle on a short sequence of the same rows, and with each
 * other on the layer that is timed. After timing, the last result must be the same bits as the first.
 */
import { ContiguousCache, type DType, type KvCache, readRate } from "../mod.ts";
import { attention, storedRows } from "../tests/oracle.ts";
import { attentionLoop } from "./attention_loop.ts";
import { checkClose, hashOf } from "./checking.ts";
import { DTYPE_BYTES, numbers, rotatedBytes, SHAPE } from "./inputs.ts";
import { printRows, readOptions, type Row, tell, tellMachine, timeOf, usage } from "./rows.ts";

/** Scores and sums are f32: what the tests of the kernels admit, too. */
const ERROR_MAX = 1e-5;

/** What is measured: `tokens` rows, attended by `queries` newest positions. */
interface Case {
  readonly tokens: number;
  readonly gqa: number;
  readonly headDim: number;
  readonly queries: number;
}

/** Keys and values of one layer, all its layers are the same, and the queries. */
interface Inputs {
  readonly k: Float32Array;
  readonly v: Float32Array;
  readonly q: Float32Array;
}

const options = readOptions(["kv", "tokens", "gqa", "head-dim", "queries"]);
const dtypes = options.dtypes();
const cases: Case[] = [];
for (const tokens of options.numbers("tokens", options.smoke ? [64, 100] : [4096, 32768])) {
  for (const gqa of options.numbers("gqa", [SHAPE.gqa])) {
    for (const headDim of options.numbers("head-dim", [SHAPE.headDim])) {
      for (const queries of options.numbers("queries", [1])) cases.push({ tokens, gqa, headDim, queries });
    }
  }
}
for (const { tokens, headDim, queries } of cases) {
  if (headDim > 256) usage(`--head-dim is 256 at most, not ${headDim}`);
  if (queries > tokens) usage(`--queries are of the last tokens, so ${tokens} tokens have no ${queries}`);
}
const { kvHeadCount } = SHAPE;

/** A cache of so many layers that each call finds its layer in memory and not in a processor's cache. */
function fill({ tokens, headDim }: Case, { k, v }: Inputs, dtype: DType): ContiguousCache {
  const layerBytes = 2 * tokens * kvHeadCount * headDim * DTYPE_BYTES[dtype];
  const layerCount = Math.ceil(rotatedBytes(options.smoke) / layerBytes);
  const cache = new ContiguousCache({ layerCount, kvHeadCount, headDim, maxSeqLen: tokens, dtype });
  for (let layer = 0; layer < layerCount; layer++) cache.append(layer, 0, k, v);
  cache.sequence(0).commit(tokens);
  return cache;
}

/** Compares attend and the loop with the oracle on the first rows. */
function checkShort(row: Case, inputs: Inputs, dtype: DType): void {
  const { gqa, headDim, queries } = row;
  const tokens = Math.min(row.tokens, Math.max(queries, 500));
  const end = tokens * kvHeadCount * headDim;
  const k = inputs.k.subarray(0, end), v = inputs.v.subarray(0, end);
  using cache = new ContiguousCache({ layerCount: 1, kvHeadCount, headDim, maxSeqLen: tokens, dtype });
  const sequence = cache.sequence(0);
  sequence.append(0, k, v);
  const stored = {
    q: inputs.q,
    k: storedRows(k, dtype),
    v: storedRows(v, dtype),
    queryCount: queries,
    kvHeadCount,
    headDim,
  };
  const truth = attention({ ...stored, qHeadCount: kvHeadCount * gqa }).output;
  checkClose(
    `attend over ${tokens} ${dtype} rows`,
    sequence.attend(0, inputs.q, { queryCount: queries }),
    truth,
    ERROR_MAX,
  );
  const looped = new Float32Array(truth.length);
  attentionLoop({ ...stored, gqa }, looped);
  checkClose(`the loop over ${tokens} ${dtype} rows`, looped, truth, ERROR_MAX);
}

/** Compares attend with the loop over the f32 values of the rows that are timed. */
function checkWhole({ gqa, headDim, queries, tokens }: Case, { q }: Inputs, dtype: DType, sequence: KvCache): string {
  const { k, v } = sequence.gather(0);
  const looped = new Float32Array(q.length);
  attentionLoop(
    { q, k: k as Float32Array, v: v as Float32Array, queryCount: queries, kvHeadCount, headDim, gqa },
    looped,
  );
  const output = sequence.attend(0, q, { queryCount: queries });
  checkClose(`attend over ${tokens} ${dtype} rows`, output, looped, ERROR_MAX);
  return hashOf(output);
}

/** Nanoseconds of the loop over one layer; its rows are those in the cache, without a copy. */
async function timeLoop({ gqa, headDim, queries }: Case, { q }: Inputs, cache: ContiguousCache): Promise<number> {
  const layers = Array.from({ length: cache.layerCount }, (_, layer) => ({
    q,
    k: cache.getKeys(layer, 0) as Float32Array,
    v: cache.getValues(layer, 0) as Float32Array,
    queryCount: queries,
    kvHeadCount,
    headDim,
    gqa,
  }));
  const into = new Float32Array(q.length);
  let calls = 0;
  return await timeOf(() => attentionLoop(layers[calls++ % layers.length]!, into), options.smoke);
}

/** Nanoseconds of attend over one layer. */
async function timeAttend(row: Case, inputs: Inputs, dtype: DType, cache: ContiguousCache): Promise<number> {
  const sequence = cache.sequence(0);
  checkShort(row, inputs, dtype);
  const hash = checkWhole(row, inputs, dtype, sequence);
  tell(options, `${dtype}, ${row.tokens} tokens: equal to the oracle and to the loop, hash ${hash}`);
  const into = new Float32Array(inputs.q.length);
  const attendOptions = { queryCount: row.queries, into };
  let calls = 0;
  const ns = await timeOf(
    () => sequence.attend(calls++ % cache.layerCount, inputs.q, attendOptions),
    options.smoke,
  );
  if (hashOf(into) !== hash) throw new Error(`attend over ${row.tokens} ${dtype} rows gives other bits than at first`);
  return ns;
}

/** One case: the loop, then each dtype. */
async function measureCase(row: Case): Promise<Measured[]> {
  const { tokens, gqa, headDim, queries } = row;
  const kvDim = kvHeadCount * headDim;
  const inputs = {
    k: numbers(1, tokens * kvDim),
    v: numbers(2, tokens * kvDim),
    q: numbers(3, queries * gqa * kvDim),
  };
  using plain = fill(row, inputs, "f32");
  const loopNs = await timeLoop(row, inputs, plain);
  const measured: Measured[] = [{ row, dtype: "f32", isLoop: true, ns: loopNs, loopNs }];
  for (const dtype of dtypes) {
    using own = dtype === "f32" ? undefined : fill(row, inputs, dtype);
    const ns = await timeAttend(row, inputs, dtype, own ?? plain);
    measured.push({ row, dtype, isLoop: false, ns, loopNs });
  }
  return measured;
}

/** A row before the read rate is known. */
interface Measured {
  readonly row: Case;
  readonly dtype: DType;
  readonly isLoop: boolean;
  readonly ns: number;
  readonly loopNs: number;
}

/** Bytes a nanosecond: GB/s. */
function measureReadRate(): number {
  return readRate({ bytes: Math.max(rotatedBytes(options.smoke), 2 ** 22), threads: 1 }) / 1e9;
}

tellMachine(options);
const rateBefore = measureReadRate();
const measured: Measured[] = [];
for (const row of cases) measured.push(...await measureCase(row));
const rate = Math.max(rateBefore, measureReadRate());
tell(options, `R ${rate.toFixed(2)} GB/s by one thread`);

const rows = measured.map(({ row, dtype, isLoop, ns, loopNs }): Row => {
  const { tokens, gqa, headDim, queries } = row;
  const ms = ns / 1e6;
  const gbps = 2 * tokens * kvHeadCount * headDim * DTYPE_BYTES[dtype] / ns;
  const shareOfRead = gbps / rate, vsLoop = loopNs / ns;
  const cells = [
    isLoop ? "f32 loop" : dtype,
    tokens,
    gqa,
    headDim,
    queries,
    ms.toFixed(3),
    gbps.toFixed(2),
    shareOfRead.toFixed(2),
    vsLoop.toFixed(1),
  ];
  if (isLoop) return { cells };
  return { json: { kv: dtype, tokens, threads: 1, gqa, headDim, queries, ms, gbps, shareOfRead, vsLoop }, cells };
});
printRows(options, "attend", ["kv", "tokens", "gqa", "head dim", "queries", "ms", "GB/s", "of R", "x loop"], rows);
