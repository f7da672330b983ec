/**
 * Random calls on the sequences of a tiered cache and on plain arrays: the model knows which block is in which format,
 * and how far its rows may be from those that went in. Rows that were never quantized must be exact.
 *
 * `KVERN_MODEL_SEED=1` repeats a run.
 */

import assert from "node:assert/strict";
import process from "node:process";
import { test } from "node:test";
import { type DType, PagedCache, type Policy, type Sequence } from "../mod.ts";
import { attention, Random, relativeError } from "./oracle.ts";

const BLOCK = 64, DIM = 32, LAYERS = 2, ROWS = 640, SEQUENCES_MAX = 6, STEPS = 1500;
const GIVEN = process.env.KVERN_MODEL_SEED;
const SEEDS = GIVEN === undefined ? [20261121, Date.now() >>> 0] : [Number(GIVEN)];

/** How far a value in [-1, 1) may move when it is stored: half a step, what the f16 of a scale adds, and for q4_0 a clip. */
const ERRORS: Partial<Record<DType, number>> = {
  f16: 2 ** -11,
  q8_0: 0.57 / 127,
  q4_0: 1.01 / 8,
  i8: 0.57 * 2 / 255,
  i4: 0.51 * 2 / 15,
  i2: 0.51 * 2 / 3,
};

const STORES: { k: DType; v: DType }[] = [
  { k: "q4_0", v: "q4_0" },
  { k: "q8_0", v: "q8_0" },
  { k: "i8", v: "i4" },
  { k: "i2", v: "f16" },
];

/** One entry of a block table. */
interface Block {
  /** Undefined in the tail. */
  readonly store?: { k: DType; v: DType };
  /** How far its rows may be from those that went in. */
  readonly error: { readonly k: number; readonly v: number };
  /** It was turned back into floats, which it keeps. */
  readonly stays?: true;
}

/** A sequence and what it should hold. */
interface Pair {
  readonly sequence: Sequence;
  /** [layer] elements. */
  readonly rows: { k: number[]; v: number[] }[];
  blocks: Block[];
  seqLen: number;
}

/** An array of a block, and what it showed. */
interface Held {
  readonly pair: Pair;
  readonly entry: number;
  readonly store: Block["store"];
  readonly array: Float32Array | Uint16Array | Uint8Array;
  readonly shown: Float32Array | Uint16Array | Uint8Array;
}

function stored({ error }: Block, store: { k: DType; v: DType }): Block {
  assert.deepEqual(error, { k: 0, v: 0 }); // no row is rounded a second time
  return { store, error: { k: ERRORS[store.k]!, v: ERRORS[store.v]! } };
}

/** What the policy makes of the blocks of a sequence at a commit. */
function migrate(pair: Pair, policy: Policy): void {
  if (policy.kind === "tail-only") return;
  const { tokens, sinkTokens = 0 } = policy.kind === "hybrid" ? policy.tail : { ...policy, tokens: 0 };
  const store = policy.store as { k: DType; v: DType };
  pair.blocks = pair.blocks.map((block, entry) => {
    const isDue = (entry + 1) * BLOCK + tokens <= pair.seqLen && entry * BLOCK >= sinkTokens;
    return isDue && block.store === undefined && !block.stays ? stored(block, store) : block;
  });
}

function tierOf({ store }: Block, policy: Policy): "tail" | "store" | "warm" {
  if (store === undefined) return "tail";
  return policy.kind !== "tail-only" && policy.store === store ? "store" : "warm";
}

/** The layer with most rows: its table is all there is. */
function longest({ rows }: Pair): number {
  return rows[0]!.k.length >= rows[1]!.k.length ? 0 : 1;
}

/** Rows of each sequence, tier by tier, must be counted as the model has them; no block may be lost. */
function checkCounts(cache: PagedCache, pairs: readonly Pair[], policy: Policy, step: number): void {
  const counts = { tail: 0, store: 0, warm: 0 };
  const named = new Map<string, Set<number>>();
  for (const pair of pairs) {
    const { sequence, blocks, seqLen } = pair;
    const table = sequence.blockTable(longest(pair));
    blocks.forEach((block, entry) => {
      counts[tierOf(block, policy)] += Math.max(0, Math.min(BLOCK, seqLen - entry * BLOCK));
      const { k, v } = block.store ?? { k: "f32", v: "f32" };
      const key = `${k} ${v}`;
      named.set(key, (named.get(key) ?? new Set()).add(table[entry]!));
    });
  }
  const { tailTokens, storeTokens, warmTokens, totalTokens, usedBytes, tailBytes, storeBytes, slackBytes } = cache
    .stats();
  assert.deepEqual(
    { tailTokens, storeTokens, warmTokens, totalTokens },
    {
      tailTokens: counts.tail,
      storeTokens: counts.store + counts.warm,
      warmTokens: counts.warm,
      totalTokens: counts.tail + counts.store + counts.warm,
    },
    `step ${step}`,
  );
  assert.ok(slackBytes >= 0 && usedBytes === tailBytes + storeBytes + slackBytes, `step ${step}`);
  for (const { k, v } of [{ k: "f32", v: "f32" } as const, ...STORES]) {
    assert.equal(cache.poolStats(0, { k, v }).usedBlocks, named.get(`${k} ${v}`)?.size ?? 0, `step ${step}, ${k} ${v}`);
  }
}

/** The rows of a sequence: exact where they never left the tail, and near enough where they did. */
function checkRows({ sequence, rows, blocks }: Pair, step: number): void {
  for (let layer = 0; layer < LAYERS; layer++) {
    const copy = sequence.gather(layer);
    for (const side of ["k", "v"] as const) {
      const expected = rows[layer]![side], actual = copy[side];
      assert.equal(actual.length, expected.length, `step ${step}`);
      for (const [entry, { error }] of blocks.entries()) {
        const end = Math.min(actual.length, (entry + 1) * BLOCK * DIM);
        let worst = 0;
        for (let i = entry * BLOCK * DIM; i < end; i++) worst = Math.max(worst, Math.abs(actual[i]! - expected[i]!));
        assert.ok(worst <= error[side], `step ${step}, block ${entry}: ${side} is off by ${worst}, not ${error[side]}`);
      }
    }
  }
}

for (const seed of SEEDS) {
  test(`${STEPS} random calls on sequences of a tiered cache (seed ${seed})`, { timeout: 120_000 }, () => {
    const random = new Random(seed);
    using cache = new PagedCache({ layerCount: LAYERS, kvHeadCount: 1, headDim: DIM, maxSeqLen: ROWS, dtype: "f32" });
    let policy: Policy = { kind: "tail-only" };
    const fresh = (sequence: Sequence): Pair => ({
      sequence,
      rows: Array.from({ length: LAYERS }, () => ({ k: [], v: [] })),
      blocks: [],
      seqLen: 0,
    });
    const pairs: Pair[] = [fresh(cache.sequence())];
    let held: Held[] = [];
    const done = { migrated: 0, reopened: 0, ended: 0 };

    /** Puts a block of the tail in the place of a stored one, and adds those that are missing. */
    const reserve = (pair: Pair, first: number, end: number) => {
      const entry = Math.floor(first / BLOCK), block = pair.blocks[entry];
      if (block?.store !== undefined) {
        pair.blocks[entry] = { error: block.error, stays: true };
        done.reopened += 1;
      }
      while (pair.blocks.length * BLOCK < end) pair.blocks.push({ error: { k: 0, v: 0 } });
    };
    const append = (pair: Pair, layer: number, n: number) => {
      if (n === 0) return;
      const k = random.floats(n * DIM), v = random.floats(n * DIM), own = pair.rows[layer]!;
      reserve(pair, own.k.length / DIM, own.k.length / DIM + n);
      pair.sequence.append(layer, k, v);
      own.k.push(...k);
      own.v.push(...v);
    };
    const truncate = (pair: Pair, n: number) => {
      pair.sequence.truncate(n);
      pair.seqLen = n;
      pair.blocks.length = Math.ceil(n / BLOCK);
      for (const { k, v } of pair.rows) k.length = v.length = n * DIM;
    };
    const copyOf = (sequence: Sequence, { rows, blocks, seqLen }: Pair): Pair => ({
      sequence,
      rows: rows.map(({ k, v }) => ({ k: k.slice(0, seqLen * DIM), v: v.slice(0, seqLen * DIM) })),
      blocks: blocks.slice(0, Math.ceil(seqLen / BLOCK)),
      seqLen,
    });

    for (let step = 0; step < STEPS; step++) {
      const pair = pairs[random.below(pairs.length)]!;
      switch (random.below(12)) {
        case 0: {
          // A step that is left half done.
          const layer = random.below(LAYERS);
          append(pair, layer, Math.min(random.below(90), ROWS - pair.rows[layer]!.k.length / DIM));
          if (random.below(2) === 0) truncate(pair, pair.seqLen);
          break;
        }
        case 1:
        case 2: {
          truncate(
            pair,
            random.below(3) === 0 ? random.below(pair.seqLen + 1) : Math.max(0, pair.seqLen - random.below(80)),
          );
          break;
        }
        case 3: {
          if (pairs.length === SEQUENCES_MAX) break;
          pairs.push(random.below(4) === 0 ? fresh(cache.sequence()) : copyOf(pair.sequence.fork(), pair));
          break;
        }
        case 4: {
          if (pairs.length === 1) break;
          pair.sequence.free();
          pairs.splice(pairs.indexOf(pair), 1);
          break;
        }
        case 5: {
          const store = STORES[random.below(STORES.length)]!, tokens = BLOCK * random.below(4);
          const tail = { tokens, sinkTokens: random.below(3) === 0 ? random.below(100) : 0 };
          policy = ([
            { kind: "tail-only" },
            { kind: "store-only", store, sinkTokens: tail.sinkTokens },
            { kind: "hybrid", tail, store },
          ] as const)[random.below(3)]!;
          cache.updatePolicy(policy);
          break;
        }
        case 6: {
          const beams = pairs.filter(({ rows, seqLen }) => rows.every(({ k }) => k.length === seqLen * DIM));
          const parents = beams.map(() => random.below(beams.length));
          cache.reorder(beams.map(({ sequence }) => sequence), parents);
          const copies = beams.map(({ sequence }, i) => copyOf(sequence, beams[parents[i]!]!));
          beams.forEach((beam, i) => Object.assign(beam, copies[i]!));
          break;
        }
        case 7: {
          for (const view of pair.sequence.views(random.below(LAYERS))) {
            const entry = Math.floor(view.start / BLOCK), array = random.below(2) === 0 ? view.k! : view.v!;
            held.push({ pair, entry, store: pair.blocks[entry]!.store, array, shown: array.slice() });
          }
          break;
        }
        default: {
          const target = Math.max(
            ...pair.rows.map(({ k }) => k.length / DIM),
            Math.min(pair.seqLen + random.below(100), ROWS),
          );
          for (const [layer, { k }] of pair.rows.entries()) append(pair, layer, target - k.length / DIM);
          pair.sequence.commit(target - pair.seqLen);
          const before = pair.blocks;
          if (target > pair.seqLen) {
            pair.seqLen = target;
            migrate(pair, policy);
          }
          done.migrated += pair.blocks.filter((block, entry) => block !== before[entry]).length;
        }
      }
      if (pairs.includes(pair)) {
        const tiers = pair.blocks.map((block) => tierOf(block, policy));
        assert.deepEqual(pair.sequence.blockTiers(longest(pair)), tiers, `step ${step}`);
        checkRows(pair, step);
      }
      checkCounts(cache, pairs, policy, step);

      // An array shows the block it was made over, to the end: stored ones never change.
      for (const { pair: owner, entry, store, array, shown } of held) {
        const isOver = !pairs.includes(owner) || owner.blocks[entry]?.store !== store;
        if (isOver) assert.equal(array.length, 0, `step ${step}`);
        else if (array instanceof Uint8Array && array.length > 0) assert.deepEqual(array, shown, `step ${step}`);
      }
      done.ended += held.filter(({ array }) => array.length === 0).length;
      held = held.filter(({ array }) => array.length > 0).slice(-60);
      if (step % 20 !== 0 || !pairs.includes(pair)) continue;
      const { k, v } = pair.sequence.gather(1) as { k: Float32Array; v: Float32Array };
      const q = random.floats(2 * DIM), lse = new Float32Array(2);
      const truth = attention({ q, k, v, queryCount: 1, qHeadCount: 2, kvHeadCount: 1, headDim: DIM });
      const output = pair.sequence.attend(1, q, { lse });
      if (k.length === 0) assert.deepEqual(output, new Float32Array(q.length));
      else {assert.ok(
          relativeError(output, truth.output) <= 1e-3,
          `step ${step}: ${relativeError(output, truth.output)}`,
        );}
    }
    assert.ok(
      done.migrated > STEPS / 20 && done.reopened > STEPS / 50 && done.ended > STEPS / 10,
      JSON.stringify(done),
    );
    for (const { sequence } of pairs) sequence.free();
    assert.deepEqual([cache.stats().blockCount, cache.stats().usedBytes], [0, 0]);
  });
}
