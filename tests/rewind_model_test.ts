/**
 * Random calls on sequences that give up old rows, beside plain arrays that keep all of them: which rows are there is a
 * list of positions, and what a query should see is asked of it row by row.
 *
 * `KVERN_MODEL_SEED=1` repeats a run.
 */

import assert from "node:assert/strict";
import process from "node:process";
import { test } from "node:test";
import { type AttendOptions, type DType, KvError, PagedCache, type PagedCacheOptions, type Policy } from "../mod.ts";
import type { Sequence } from "../mod.ts";
import { attention, Random, relativeError } from "./oracle.ts";

const GIVEN = process.env.KVERN_MODEL_SEED;
const FIXED = 20261128;
const SEEDS = GIVEN === undefined ? [FIXED, Date.now() >>> 0] : [Number(GIVEN)];
const SEQUENCES_MAX = 4;

/** A cache to walk on. */
interface Walk {
  readonly title: string;
  readonly steps: number;
  readonly blockSize: number;
  readonly headDim: number;
  readonly windows: readonly (number | undefined)[];
  readonly retention?: { readonly keep: "newest"; readonly tokens: number; readonly sinkTokens: number };
  readonly rewindTokens: number;
  /** Rows of the longest append, and of a sequence. */
  readonly appended: number;
  readonly maxSeqLen: number;
  /** Stores to migrate to, and how far a value in [-1, 1) may then be off. */
  readonly stores?: readonly DType[];
  readonly error: number;
}

/** One layer of a sequence: all rows there ever were, and which of them are there. */
interface LayerModel {
  k: number[];
  v: number[];
  /** By committed position. */
  isThere: boolean[];
}

interface Pair {
  readonly sequence: Sequence;
  layers: LayerModel[];
  seqLen: number;
}

/** What retention and windows say, one position at a time. */
class Rules {
  readonly #walk: Walk;

  constructor(walk: Walk) {
    this.#walk = walk;
  }

  /** Does retention keep row `row` at `length` tokens? */
  retains(row: number, length: number): boolean {
    const { retention } = this.#walk;
    if (retention === undefined) return true;
    return row < retention.sinkTokens || row >= length - (retention.tokens - retention.sinkTokens);
  }

  /** Is the row seen at `length` tokens? */
  shows(layer: number, row: number, length: number): boolean {
    const { windows, retention } = this.#walk;
    if (row < (retention?.sinkTokens ?? 0)) return true;
    return this.retains(row, length) && row >= length - (windows[layer] ?? Infinity);
  }

  /** Is the row within the windows of a query at `position`, or one of its sinks? */
  isInWindow(layer: number, row: number, position: number, { windowTokens = Infinity, sinkTokens = 0 }: AttendOptions) {
    return row < sinkTokens || row > position - Math.min(windowTokens, this.#walk.windows[layer] ?? Infinity);
  }
}

function range(first: number, end: number): number[] {
  return Array.from({ length: Math.max(0, end - first) }, (_, i) => first + i);
}

/** The rows that a layer shows, committed and pending. */
function shownRows(rules: Rules, pair: Pair, layer: number, dim: number): number[] {
  const rowCount = pair.layers[layer]!.k.length / dim;
  return range(0, rowCount).filter((row) => row >= pair.seqLen || rules.shows(layer, row, pair.seqLen));
}

/** Has every layer all that it shows at `length`? */
function canBe(rules: Rules, { layers }: Pair, length: number): boolean {
  return layers.every(({ isThere }, layer) =>
    range(0, length).every((row) => isThere[row] || !rules.shows(layer, row, length))
  );
}

function rewindableTo(rules: Rules, pair: Pair): number {
  let length = pair.seqLen;
  while (length > 0 && canBe(rules, pair, length - 1)) length -= 1;
  return length;
}

const WALKS: Walk[] = [
  { windows: [undefined, 16, 3], rewindTokens: 5 },
  { windows: [7, 1], rewindTokens: 0 },
  { windows: [undefined], rewindTokens: 4, retention: { keep: "newest", tokens: 10, sinkTokens: 3 } as const },
  { windows: [undefined, 5, 40], rewindTokens: 30, retention: { keep: "newest", tokens: 25, sinkTokens: 6 } as const },
].flatMap((rules) =>
  [1, 4, 16].map((blockSize) => ({
    ...{ title: `blocks of ${blockSize}`, steps: 700, blockSize, headDim: 2, appended: 9, maxSeqLen: 250, error: 0 },
    ...rules,
  }))
);
for (
  const rules of [
    { windows: [undefined, 150, 20], rewindTokens: 100 },
    {
      windows: [undefined, 90],
      rewindTokens: 64,
      retention: { keep: "newest", tokens: 200, sinkTokens: 70 } as const,
    },
  ]
) {
  const stores = ["i8", "q8_0", "f16"] as const;
  // Half a step of i8 is 0.004, and a block that comes back to the tail may be rounded again.
  const shape = { steps: 250, blockSize: 64, headDim: 32, appended: 90, maxSeqLen: 600, stores, error: 0.05 };
  WALKS.push({ title: "tiers", ...shape, ...rules });
}

function name({ title, windows, retention, rewindTokens }: Walk): string {
  const kept = retention === undefined ? "all" : `${retention.tokens}, ${retention.sinkTokens} sinks`;
  return `${title}: windows of ${windows.map((n) => n ?? "all")}, ${kept} kept, ${rewindTokens} to rewind`;
}

for (const seed of SEEDS) {
  for (const walk of WALKS) {
    test(`${name(walk)} (seed ${seed})`, { timeout: 120_000 }, () => new Walker(walk, seed).run());
  }
}

/** One walk: the cache, its models, and what was done so far. */
class Walker {
  readonly #walk: Walk;
  readonly #seed: number;
  readonly #rules: Rules;
  readonly #random: Random;
  readonly #cache: PagedCache;
  #pairs: Pair[] = [];
  readonly #done = { truncated: 0, "truncate refused": 0, attended: 0, "attend refused": 0 };
  #where = "";

  constructor(walk: Walk, seed: number) {
    const { windows, blockSize, headDim, maxSeqLen, retention, rewindTokens, stores } = walk;
    this.#walk = walk;
    this.#seed = seed;
    this.#rules = new Rules(walk);
    this.#random = new Random(seed);
    const options: PagedCacheOptions = {
      ...{ maxSeqLen, blockSize, dtype: "f32", rewindTokens },
      layers: windows.map((n) => ({ kvHeadCount: 1, headDim, ...(n === undefined ? {} : { windowTokens: n }) })),
      ...(retention === undefined ? {} : { retention }),
      ...(stores === undefined ? {} : { tail: { tokens: 64 }, store: stores[0]! }),
    };
    this.#cache = new PagedCache(options);
  }

  run(): void {
    this.#enter(this.#cache.sequence(), undefined);
    for (let step = 0; step < this.#walk.steps; step++) {
      this.#where = `step ${step}`;
      const pair = this.#pairs[this.#random.below(this.#pairs.length)]!;
      this.#act(pair);
      for (const each of this.#pairs.includes(pair) ? [pair] : []) this.#look(each);
      this.#count();
    }
    // The walk that is the same each time does all of these.
    const least = this.#seed === FIXED ? 5 : 0;
    for (const [what, times] of Object.entries(this.#done)) assert.ok(times >= least, `${what}: ${times}`);
    for (const { sequence } of this.#pairs) sequence.free();
    assert.equal(this.#cache.stats().blockCount, 0);
    this.#cache.free();
  }

  #act(pair: Pair): void {
    const random = this.#random;
    switch (random.below(14)) {
      case 0:
        if (this.#pairs.length === SEQUENCES_MAX) return this.#end(pair);
        return this.#enter(pair.sequence.fork(), pair);
      case 1:
        if (this.#pairs.length > 1) this.#end(pair);
        return;
      case 2:
      case 3:
        // Far or near, and where the border is.
        return this.#truncate(
          pair,
          random.below(4) === 0 ? random.below(pair.seqLen + 2) : rewindableTo(this.#rules, pair) - 2 + random.below(5),
        );
      case 4:
        return this.#truncate(pair, Math.max(0, pair.seqLen - random.below(this.#walk.rewindTokens + 3)));
      case 5:
        return this.#reorder();
      case 6:
        return this.#policy();
      case 7:
      case 8:
      case 9:
        return this.#attend(pair);
      default:
        return this.#step(pair);
    }
  }

  /** A new sequence; a fork has the committed rows of its parent, and what that can be rewound to. */
  #enter(sequence: Sequence, parent: Pair | undefined): void {
    this.#pairs.push({ sequence, ...this.#copy(parent) });
  }

  #copy(parent: Pair | undefined): Omit<Pair, "sequence"> {
    if (parent === undefined) {
      return { layers: this.#walk.windows.map(() => ({ k: [], v: [], isThere: [] })), seqLen: 0 };
    }
    const { seqLen } = parent, end = seqLen * this.#walk.headDim;
    const layers = parent.layers.map(({ k, v, isThere }) => ({
      ...{ k: k.slice(0, end), v: v.slice(0, end), isThere: isThere.slice() },
    }));
    return { layers, seqLen };
  }

  #end(pair: Pair): void {
    pair.sequence.free();
    this.#pairs = this.#pairs.filter((each) => each !== pair);
  }

  #truncate(pair: Pair, n: number): void {
    if (n < 0) return;
    const expected = n <= pair.seqLen && canBe(this.#rules, pair, n) ? "ok" : "position_out_of_range";
    assert.equal(codeOf(() => pair.sequence.truncate(n)), expected, `${this.#where}: truncate to ${n}`);
    this.#done[expected === "ok" ? "truncated" : "truncate refused"] += 1;
    if (expected !== "ok") return;
    pair.seqLen = n;
    for (const layer of pair.layers) layer.k.length = layer.v.length = n * this.#walk.headDim;
    for (const { isThere } of pair.layers) isThere.length = n;
  }

  #reorder(): void {
    const beams = this.#pairs.filter(({ layers, seqLen }) =>
      layers.every(({ k }) => k.length === seqLen * this.#walk.headDim)
    );
    const parents = beams.map(() => this.#random.below(beams.length));
    this.#cache.reorder(beams.map(({ sequence }) => sequence), parents);
    const copies = parents.map((parent) => this.#copy(beams[parent]!));
    beams.forEach((beam, i) => Object.assign(beam, copies[i]));
  }

  #policy(): void {
    const { stores } = this.#walk;
    if (stores === undefined) return;
    const store = stores[this.#random.below(stores.length)]!, tokens = 64 * this.#random.below(3);
    const policies: Policy[] = [{ kind: "tail-only" }, { kind: "hybrid", tail: { tokens }, store }];
    this.#cache.updatePolicy(policies[this.#random.below(2)]!);
  }

  /** Rows for every layer; then attended, as a prompt is, and committed, all or some of them, or left as they are. */
  #step(pair: Pair): void {
    const { headDim, appended, maxSeqLen } = this.#walk;
    const rows = pair.layers.map(({ k }) => k.length / headDim);
    const target = Math.max(...rows, Math.min(maxSeqLen, pair.seqLen + this.#random.below(appended + 1)));
    pair.layers.forEach((layer, i) => {
      const n = (target - rows[i]!) * headDim;
      const k = this.#random.floats(n), v = this.#random.floats(n);
      pair.sequence.append(i, k, v);
      layer.k.push(...k);
      layer.v.push(...v);
    });
    this.#attend(pair);
    const n = target - pair.seqLen;
    const kept = this.#random.below(4) === 0 ? range(0, n).filter(() => this.#random.below(3) !== 0) : undefined;
    if (kept === undefined) pair.sequence.commit(n);
    else pair.sequence.commit(kept.length, { kept: Uint32Array.from(kept) });
    if (kept !== undefined) {
      for (const side of pair.layers.flatMap(({ k, v }) => [k, v])) {
        const pending = side.splice(pair.seqLen * headDim);
        for (const i of kept) side.push(...pending.slice(i * headDim, (i + 1) * headDim));
      }
    }
    this.#committed(pair, kept?.length ?? n);
    if (this.#random.below(6) !== 0 || pair.seqLen === maxSeqLen) return;
    // A half-done step.
    const layer = this.#random.below(pair.layers.length), row = this.#random.floats(headDim);
    pair.sequence.append(layer, row, row);
    pair.layers[layer]!.k.push(...row);
    pair.layers[layer]!.v.push(...row);
  }

  #committed(pair: Pair, n: number): void {
    const { rewindTokens } = this.#walk;
    pair.seqLen += n;
    pair.layers.forEach(({ isThere }, layer) => {
      isThere.push(...range(isThere.length, pair.seqLen).map(() => true));
      // A row stays that was seen `rewindTokens` tokens ago, or is now.
      for (let row = 0; row < pair.seqLen; row++) {
        if (!this.#rules.shows(layer, row, Math.max(0, pair.seqLen - rewindTokens))) isThere[row] = false;
      }
    });
  }

  /** Some queries of a layer, which must see all they should or be refused. */
  #attend(pair: Pair): void {
    const random = this.#random, { headDim } = this.#walk;
    const layer = random.below(pair.layers.length);
    const rowCount = pair.layers[layer]!.k.length / headDim;
    const queryCount = 1 + random.below(random.below(2) === 0 ? 2 : 12);
    const options: AttendOptions = {
      queryCount,
      ...(random.below(3) === 0 ? { windowTokens: 1 + random.below(20) } : {}),
      ...(random.below(4) === 0 ? { sinkTokens: random.below(8) } : {}),
    };
    const shown = shownRows(this.#rules, pair, layer, headDim);
    const isShown = new Set(shown);
    const positions = range(0, queryCount).map((i) => rowCount - queryCount + i);
    const wanted = (position: number, row: number) =>
      this.#rules.retains(row, position + 1) && this.#rules.isInWindow(layer, row, position, options);
    const isComplete = positions.every((position) =>
      range(0, position + 1).every((row) => isShown.has(row) || !wanted(position, row))
    );
    const q = random.floats(queryCount * headDim), into = new Float32Array(q.length).fill(9);
    const code = codeOf(() => pair.sequence.attend(layer, q, { ...options, into }));
    const text = `${this.#where}: layer ${layer}, queries from ${positions[0]} on, ${JSON.stringify(options)}`;
    assert.equal(code, isComplete ? "ok" : "position_out_of_range", text);
    this.#done[isComplete ? "attended" : "attend refused"] += 1;
    if (!isComplete) return assert.deepEqual(into, new Float32Array(q.length).fill(9));
    const { k, v } = pair.sequence.gather(layer);
    const of = (side: ArrayLike<number>, rows: number[]) =>
      rows.flatMap((index) => Array.from({ length: headDim }, (_, d) => side[index * headDim + d]!));
    const truth = positions.flatMap((position, i) => {
      const seen = shown.flatMap((row, index) =>
        row <= position && this.#rules.isInWindow(layer, row, position, options) ? [index] : []
      );
      const heads = { queryCount: 1, qHeadCount: 1, kvHeadCount: 1, headDim, causal: false };
      const own = q.subarray(i * headDim, (i + 1) * headDim);
      return [...attention({ q: own, k: of(k, seen), v: of(v, seen), ...heads }).output];
    });
    if (truth.every((value) => value === 0)) return assert.ok(into.every((value) => value === 0), text);
    assert.ok(relativeError(into, truth) <= (this.#walk.stores === undefined ? 1e-5 : 2e-3), text);
  }

  /** A sequence shows what it should, with the values it was given, and can go back as far as it should. */
  #look(pair: Pair): void {
    const { headDim, error } = this.#walk;
    assert.deepEqual(
      [pair.sequence.seqLen, pair.sequence.rewindableTo],
      [pair.seqLen, rewindableTo(this.#rules, pair)],
      this.#where,
    );
    pair.layers.forEach((layer, i) => {
      const shown = shownRows(this.#rules, pair, i, headDim), copy = pair.sequence.gather(i);
      assert.equal(copy.k.length, shown.length * headDim, this.#where);
      for (const side of ["k", "v"] as const) {
        let worst = 0;
        shown.forEach((row, index) => {
          for (let d = 0; d < headDim; d++) {
            worst = Math.max(worst, Math.abs(copy[side][index * headDim + d]! - layer[side][row * headDim + d]!));
          }
        });
        assert.ok(worst <= error, `${this.#where}: ${side} of layer ${i} is off by ${worst}`);
      }
      assert.equal(pair.sequence.residentTokens(i), shown.length);
      const views = pair.sequence.views(i).flatMap(({ start, length }) => range(start, start + length));
      assert.deepEqual(views, shown, this.#where);
    });
  }

  /** No block more than rows lie in that are there; where there is one sequence, exactly those. */
  #count(): void {
    const { blockSize, headDim, stores = [] } = this.#walk;
    this.#walk.windows.forEach((_, layer) => {
      const used = (["f32", ...stores] as const).map((format) => this.#cache.poolStats(layer, format).usedBlocks);
      const usedBlocks = used.reduce((sum, n) => sum + n, 0);
      const held = this.#pairs.map(({ layers, seqLen }) => {
        const { k, isThere } = layers[layer]!;
        const rows = range(0, k.length / headDim).filter((row) => row >= seqLen || isThere[row]);
        return new Set(rows.map((row) => Math.floor(row / blockSize))).size;
      });
      const most = held.reduce((sum, n) => sum + n, 0);
      if (held.length === 1) assert.equal(usedBlocks, most, this.#where);
      else assert.ok(usedBlocks <= most, `${this.#where}: ${usedBlocks} blocks of layer ${layer}, not ${most}`);
    });
  }
}

/** The code of the refusal, or "ok". */
function codeOf(call: () => unknown): string {
  try {
    call();
    return "ok";
  } catch (error) {
    if (error instanceof KvError) return error.code;
    throw error;
  }
}
