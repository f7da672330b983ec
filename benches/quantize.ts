/**
 * How fast do rows become codes?
 *
 *     deno task bench:quantize [--json] [--smoke] [--kv q8_0,i8,i4,q4_0,i2] [--step 512,8192]
 *     bun benches/quantize.ts
 *
 * 64 MiB of f32 keys and values go into a paged cache without a tail, `step` tokens at a time: an append, and a commit
 * that moves them into the store. What is read and what is written is cold: both go through max(1 GiB, 2 x the last cache
 * level), which was touched before. `GB/s` counts the f32 bytes that come in. The rivals do as much, as cold:
 *
 *     copy   `Float32Array.set` of the same f32 bytes; `x copy` is its time over ours. Goal: 0.7
 *     ggml   llama.cpp's quantization of the same values into its records, by one thread: the fastest of its functions
 *            for the format; `deno task bench:rivals` installs it, without it the column is empty
 *
 * Before timing, the codes are compared with the rows that went in, and ggml's records with ours.
 */
import { BlockPool, PagedCache, type QuantizedDType, quantizeRows, type Sequence, setThreadCount } from "../mod.ts";
import { checkClose, hashOf } from "./checking.ts";
import { CODE_ERRORS, CODES, numbers, rotatedBytes, SHAPE } from "./inputs.ts";
import { type GgmlQuantizer, ggmlQuantizers } from "./rivals/ggml.ts";
import { cell, printRows, readOptions, type Row, tell, tellMachine, usage } from "./rows.ts";

const options = readOptions(["kv", "step"]);
const { smoke } = options;
const formats = options.names<QuantizedDType>("kv", CODES);
const steps = options.numbers("step", smoke ? [64, 100] : [512, 8192]);
const { kvHeadCount, headDim } = SHAPE;
const kvDim = kvHeadCount * headDim;

/** Tokens of a piece, which is what is timed. */
const TOKENS = smoke ? 256 : 8192;
for (const step of steps) if (step > TOKENS) usage(`--step is ${TOKENS} at most, not ${step}`);
const pieceBytes = 2 * TOKENS * kvDim * 4;
const pieceCount = Math.max(2, Math.ceil(rotatedBytes(smoke) / pieceBytes));
tellMachine(options);
setThreadCount(1);

/** The rows of each piece: the same numbers in other memory. */
const first = { k: numbers(1, TOKENS * kvDim), v: numbers(2, TOKENS * kvDim) };
const pieces = Array.from(
  { length: pieceCount },
  (_, i) => i === 0 ? first : { k: first.k.slice(), v: first.v.slice() },
);

/** Median nanoseconds of a piece; `restart` is called before the first one and is not timed. */
function timePieces(call: (piece: number) => void, restart: () => void): number {
  const times: number[] = [];
  for (let round = 0; round < (smoke ? 1 : ROUNDS + 1); round++) {
    restart();
    for (let piece = 0; piece < pieceCount; piece++) {
      const started = performance.now();
      call(piece);
      // The first round touches the memory.
      if (round > 0 || smoke) times.push((performance.now() - started) * 1e6);
    }
  }
  times.sort((a, b) => a - b);
  return Math.max(1, times[Math.floor(times.length / 2)]!);
}

const ROUNDS = 2;

/** Nanoseconds to copy a piece. */
function timeCopy(): number {
  const copies = pieces.map(({ k, v }) => ({ k: new Float32Array(k.length), v: new Float32Array(v.length) }));
  return timePieces((piece) => {
    copies[piece]!.k.set(pieces[piece]!.k);
    copies[piece]!.v.set(pieces[piece]!.v);
  }, () => {});
}

/** Appends and commits a piece, `step` tokens at a time. */
function appendPiece(sequence: Sequence, { k, v }: typeof first, step: number): void {
  for (let start = 0; start < TOKENS; start += step) {
    const end = Math.min(start + step, TOKENS);
    sequence.append(0, k.subarray(start * kvDim, end * kvDim), v.subarray(start * kvDim, end * kvDim));
    sequence.commit(end - start);
  }
}

/** Nanoseconds to append and quantize a piece, for each step. */
function timeAppends(kv: QuantizedDType): Map<number, number> {
  const shape = { layerCount: 1, kvHeadCount, headDim, blockSize: 64 };
  // Blocks stay mapped from round to round, as the copies do.
  using pool = new BlockPool(shape);
  pool.prewarm(Math.ceil(Math.max(...steps) / 64) + 1);
  pool.prewarm(pieceCount * TOKENS / 64, kv);
  using cache = new PagedCache({ ...shape, maxSeqLen: pieceCount * TOKENS, tail: { tokens: 0 }, store: kv, pool });
  const sequence = cache.sequence();
  appendPiece(sequence, first, steps[0]!);
  const { storeTokens } = cache.stats();
  checkClose("rows in the store", [storeTokens], [TOKENS], 0);
  const { k, v } = sequence.gather(0) as { k: Float32Array; v: Float32Array };
  checkClose(`${kv} keys`, k, first.k, CODE_ERRORS[kv]);
  checkClose(`${kv} values`, v, first.v, CODE_ERRORS[kv]);
  tell(options, `${kv}: ${TOKENS} tokens equal to what went in but for rounding, hash ${hashOf(k)} ${hashOf(v)}`);
  return new Map(steps.map((step) => [
    step,
    timePieces((piece) => appendPiece(sequence, pieces[piece]!, step), () => sequence.truncate(0)),
  ]));
}

/** Nanoseconds of ggml for a piece; null where it is not installed or has no such format. */
function timeGgml(kv: QuantizedDType): number | null {
  if (kv !== "q8_0" && kv !== "q4_0") return null;
  const records = quantizeRows(first.k, { dtype: kv });
  const into = pieces.map(() => ({ k: new Uint8Array(records.length), v: new Uint8Array(records.length) }));
  let best: { ms: number; by: GgmlQuantizer } | null = null;
  for (const by of ggmlQuantizers(kv)) {
    const started = performance.now();
    by.quantize(first.k, into[0]!.k);
    const ms = performance.now() - started;
    let different = 0;
    for (let i = 0; i < records.length; i++) if (records[i] !== into[0]!.k[i]) different += 1;
    // Ties are rounded in other ways, and some of its functions multiply where others divide.
    if (different > records.length / 1000) throw new Error(`${by.name} gives other records: ${different} bytes differ`);
    if (best === null || ms < best.ms) best = { ms, by };
  }
  if (best === null) return null;
  const { name, quantize } = best.by;
  tell(options, `${kv}: ggml ${name} gives equal records`);
  return timePieces((piece) => {
    quantize(pieces[piece]!.k, into[piece]!.k);
    quantize(pieces[piece]!.v, into[piece]!.v);
  }, () => {});
}

/** A row of the table. */
function rowOf(kv: string, step: number | null, ns: number, copyNs: number, ggmlNs: number | null): Required<Row> {
  const ms = ns / 1e6, gbps = pieceBytes / ns, vsCopy = copyNs / ns, vsGgml = ggmlNs === null ? null : ggmlNs / ns;
  return {
    json: { kv, step, ms, gbps, vsCopy, vsGgml },
    cells: [kv, cell(step, 0), cell(ms, 2), cell(gbps, 2), cell(vsCopy, 2), cell(vsGgml, 2)],
  };
}

const copyNs = timeCopy();
const rows: Row[] = [{ cells: rowOf("f32 copy", null, copyNs, copyNs, null).cells }];
for (const kv of formats) {
  const ggmlNs = timeGgml(kv);
  for (const [step, ns] of timeAppends(kv)) rows.push(rowOf(kv, step, ns, copyNs, ggmlNs));
  if (ggmlNs !== null) rows.push({ cells: rowOf(`${kv} ggml`, null, ggmlNs, copyNs, null).cells });
}
printRows(options, "quantize", ["kv", "step", "ms", "GB/s of f32", "x copy", "x ggml"], rows);
