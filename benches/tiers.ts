/**
 * Does a migration make a step stall?
 *
 *     deno task bench:tiers [--json] [--smoke] [--store none,q4_0,i4] [--tokens 4096] [--layers 32] [--steps 200]
 *     bun benches/tiers.ts
 *
 * A step appends a token to every layer, attends with one query over it, and commits; the commit moves a block of 64
 * tokens out of an f16 tail of 256 into the store whenever one is full, in every layer. 8 KV heads of 128, 4 query heads
 * each. `none` is the rival: the same cache without a store. `moved` counts the steps in which rows migrated, and
 * `moved ms` is their median.
 *
 * Before timing, attend over both tiers is compared with the oracle; after it, too, and the rows must be where they
 * should be.
 */
import { PagedCache, type PagedCacheOptions, type QuantizedDType, type Sequence } from "../mod.ts";
import { attention } from "../tests/oracle.ts";
import { checkClose, hashOf } from "./checking.ts";
import { CODES, numbers, SHAPE } from "./inputs.ts";
import { cell, printRows, readOptions, type Row, tell, tellMachine } from "./rows.ts";

const options = readOptions(["store", "tokens", "layers", "steps"]);
const { smoke } = options;
const stores = options.names<QuantizedDType | "none">("store", ["none", ...CODES], ["none", "q4_0", "i4"]);
const tokenCounts = options.numbers("tokens", [smoke ? 500 : 4096]);
const layerCounts = options.numbers("layers", [smoke ? 2 : 32]);
const stepCounts = options.numbers("steps", [smoke ? 70 : 200]);
const { kvHeadCount, headDim, gqa } = SHAPE;
const kvDim = kvHeadCount * headDim;
const BLOCK_SIZE = 64, TAIL_TOKENS = 256;

/** Scores and sums are f32, and meet codes as an operand of 15 bits. */
const ERROR_MAX = 1e-3;

/** Steps that are not counted: the runtime compiles the loop meanwhile. */
const WARM_STEPS = smoke ? 2 : 40;

/** Tokens of a step before the ones that are timed. */
const PROMPT_STEP = 512;

interface Measured {
  readonly store: QuantizedDType | "none";
  readonly tokens: number;
  readonly layers: number;
  readonly steps: number;
  /** Milliseconds of each step, in order of size. */
  readonly times: readonly number[];
  /** Those of the steps in which rows migrated, in order of size. */
  readonly moved: readonly number[];
}

/** Compares attend over the first layer with the oracle over its gathered rows; gives a hash of the result. */
function checkAttend(what: string, sequence: Sequence, q: Float32Array): string {
  const { k, v } = sequence.gather(0) as { k: Float32Array; v: Float32Array };
  const shape = { queryCount: 1, qHeadCount: kvHeadCount * gqa, kvHeadCount, headDim };
  const output = sequence.attend(0, q);
  checkClose(what, output, attention({ q, k, v, ...shape }).output, ERROR_MAX);
  return hashOf(output);
}

function measure(store: QuantizedDType | "none", tokens: number, layers: number, steps: number): Measured {
  const tiers: Partial<PagedCacheOptions> = store === "none" ? {} : { tail: { tokens: TAIL_TOKENS }, store };
  const maxSeqLen = tokens + WARM_STEPS + steps;
  using cache = new PagedCache({
    layerCount: layers,
    kvHeadCount,
    headDim,
    maxSeqLen,
    blockSize: BLOCK_SIZE,
    ...tiers,
  });
  const sequence = cache.sequence();
  const prompt = Math.min(PROMPT_STEP, tokens);
  const k = numbers(1, prompt * kvDim), v = numbers(2, prompt * kvDim), q = numbers(3, gqa * kvDim);
  const extend = (count: number) => {
    const newK = k.subarray(0, count * kvDim), newV = v.subarray(0, count * kvDim);
    for (let layer = 0; layer < layers; layer++) sequence.append(layer, newK, newV);
    sequence.commit(count);
  };
  for (let length = 0; length < tokens; length += prompt) extend(Math.min(prompt, tokens - length));
  const hash = checkAttend(`attend over ${tokens} tokens, store ${store}`, sequence, q);
  tell(options, `store ${store}, ${tokens} tokens: equal to the oracle, hash ${hash}`);

  const newK = numbers(4, kvDim), newV = numbers(5, kvDim);
  const into = new Float32Array(q.length);
  const attendOptions = { into };
  const step = () => {
    for (let layer = 0; layer < layers; layer++) {
      sequence.append(layer, newK, newV);
      sequence.attend(layer, q, attendOptions);
    }
    sequence.commit(1);
  };
  for (let i = 0; i < WARM_STEPS; i++) step();
  const times: number[] = [];
  const moved: number[] = [];
  let stored = cache.stats().storeTokens;
  for (let i = 0; i < steps; i++) {
    const started = performance.now();
    step();
    const ms = performance.now() - started;
    times.push(ms);
    const { storeTokens } = cache.stats();
    if (storeTokens !== stored) moved.push(ms);
    stored = storeTokens;
  }
  checkAttend(`attend after ${steps} steps, store ${store}`, sequence, q);
  const migrated = Math.max(0, Math.floor((maxSeqLen - TAIL_TOKENS) / BLOCK_SIZE)) * BLOCK_SIZE;
  checkClose("tokens in the store", [stored], [store === "none" ? 0 : migrated], 0);
  const bySize = (a: number, b: number) => a - b;
  return { store, tokens, layers, steps, times: times.sort(bySize), moved: moved.sort(bySize) };
}

tellMachine(options);
const measured: Measured[] = [];
for (const tokens of tokenCounts) {
  for (const layers of layerCounts) {
    for (const steps of stepCounts) {
      for (const store of stores) measured.push(measure(store, tokens, layers, steps));
    }
  }
}

const rows = measured.map(({ store, tokens, layers, steps, times, moved }): Row => {
  const at = (share: number) => times[Math.min(times.length - 1, Math.floor(share * times.length))]!;
  const medianMs = at(0.5), p99Ms = at(0.99), maxMs = at(1), maxOverMedian = maxMs / medianMs;
  const movedMs = moved[Math.floor(moved.length / 2)] ?? null;
  const figures = [medianMs, p99Ms, maxMs, maxOverMedian, movedMs].map((figure) => cell(figure, 2));
  return {
    json: { store, tokens, layers, steps, medianMs, p99Ms, maxMs, maxOverMedian, movedMs },
    cells: [store, tokens, layers, steps, ...figures, moved.length],
  };
});
const header = [
  "store",
  "tokens",
  "layers",
  "steps",
  "median ms",
  "p99 ms",
  "max ms",
  "max / median",
  "moved ms",
  "moved",
];
printRows(options, "tiers", header, rows);
