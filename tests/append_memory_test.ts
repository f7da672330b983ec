/**
 * The memory that rows come from: shared memory that a Worker writes meanwhile, and arrays over the cache's own blocks.
 * Rows are those of the moment the call read them, once, or the call is refused and has changed nothing.
 */

import assert from "node:assert/strict";
import { test } from "node:test";
import { Worker } from "node:worker_threads";
import { ContiguousCache, type DType, type KvCache, KvError, PagedCache, type Sequence } from "../mod.ts";
import { Random } from "./oracle.ts";
import type { Scribble } from "./scribble_worker.ts";

const SHAPE = { layerCount: 1, kvHeadCount: 2, headDim: 32, maxSeqLen: 1024, dtype: "f32" } as const;
const KV_DIM = 64, ROUNDS = 60;

/** Bits of 1 and of NaN: what a Worker writes in turn. */
const ONE_OR_NAN = [0x3f800000, 0x3f800000, 0x3f800000, 0x7fc00000];

/** Runs `body` while a Worker makes elements of the array 1 and NaN in turn. */
async function whileScribbling(length: number, body: (rows: Float32Array) => void): Promise<void> {
  const memory = new SharedArrayBuffer(4 * length), stop = new SharedArrayBuffer(4);
  new Float32Array(memory).fill(1);
  const workerData: Scribble = { memory, stop, words: ONE_OR_NAN };
  const worker = new Worker(new URL("./scribble_worker.ts", import.meta.url), { workerData });
  try {
    await new Promise((resolve, reject) => {
      worker.once("message", resolve);
      worker.once("error", reject);
    });
    body(new Float32Array(memory));
  } finally {
    Atomics.store(new Int32Array(stop), 0, 1);
    await worker.terminate();
  }
}

/** True where the call went through; any refusal but that of a row fails. */
function attempt(call: () => unknown): boolean {
  try {
    call();
    return true;
  } catch (error) {
    assert.ok(error instanceof KvError && error.code === "not_finite", `${error}`);
    return false;
  }
}

/** Appends `n` random rows to layer 0 and commits them. */
function extend(sequence: KvCache, random: Random, n: number): void {
  sequence.append(0, random.floats(n * KV_DIM), random.floats(n * KV_DIM));
  sequence.commit(n);
}

/** A sequence of which the next rows need something to be made first, and how many rows they are. */
const PATHS: Record<string, (cache: PagedCache, random: Random) => [sequence: Sequence, rows: number]> = {
  mapped: (cache) => [cache.sequence(), 200],
  "in place": (cache, random) => {
    const sequence = cache.sequence();
    extend(sequence, random, 10);
    return [sequence, 4];
  },
  copied: (cache, random) => {
    const sequence = cache.sequence();
    extend(sequence, random, 10);
    return [sequence.fork(), 60];
  },
  reopened: (cache, random) => {
    const sequence = cache.sequence();
    extend(sequence, random, 192);
    sequence.truncate(100);
    return [sequence, 3];
  },
};

for (const [name, prepare] of Object.entries(PATHS)) {
  test(`rows that a Worker writes meanwhile are numbers or refused: ${name}`, { timeout: 60_000 }, async () => {
    await whileScribbling(200 * KV_DIM, (shared) => {
      const random = new Random(3);
      for (let round = 0; round < ROUNDS; round++) {
        using cache = new PagedCache({ ...SHAPE, store: "q8_0", tail: { tokens: 64 } });
        const [sequence, n] = prepare(cache, random);
        const rows = shared.subarray(0, n * KV_DIM);
        const facts = () => {
          const { metadataBytes: _, ...stats } = cache.stats();
          return { stats, pool: cache.poolStats(), store: cache.poolStats(0, "q8_0"), rows: sequence.gather(0) };
        };
        const before = facts(), views = sequence.views(0);
        if (!attempt(() => sequence.append(0, rows, rows))) {
          assert.deepEqual(facts(), before);
          for (const view of views) assert.ok(view.k!.length > 0); // as fresh as before
          continue;
        }
        const { k, v } = sequence.gather(0);
        assert.ok(k.every(Number.isFinite) && v.every(Number.isFinite), `round ${round}`);
      }
    });
  });
}

test("rows that a Worker writes meanwhile are numbers or refused: contiguous", { timeout: 60_000 }, async () => {
  await whileScribbling(200 * KV_DIM, (shared) => {
    for (const dtype of ["f32", "f16", "bf16"] as const) {
      using cache = new ContiguousCache({ ...SHAPE, dtype });
      const sequence = cache.sequence(0), whole = cache.getKeys(0, 0).buffer;
      for (let round = 0; round < ROUNDS; round++) {
        const layout = round % 2 === 0 ? "token_major" : "head_major";
        attempt(() => sequence.append(0, shared, shared, { layout }));
        const { k, v } = sequence.gather(0);
        assert.ok(k.every(Number.isFinite) && v.every(Number.isFinite), `round ${round}`);
        sequence.truncate(0);
      }
      // Nor does anything else stand behind the rows.
      const kept = dtype === "f32" ? new Float32Array(whole) : new Uint16Array(whole);
      const infinite = dtype === "f16" ? 0x7c00 : 0x7f80;
      const isNumber = (value: number) => dtype === "f32" ? Number.isFinite(value) : (value & infinite) !== infinite;
      assert.ok(kept.every(isNumber));
    }
  });
});

test("rows in a stored block that goes with the call are stored before it does", () => {
  for (const store of ["bf16", "f16"] as const) {
    const shape = { layerCount: 1, kvHeadCount: 1, headDim: 32, maxSeqLen: 256, dtype: "f32" } as const;
    using cache = new PagedCache({ ...shape, store });
    const sequence = cache.sequence(), random = new Random(5);
    sequence.append(0, random.floats(64 * 32), random.floats(64 * 32));
    sequence.commit(64);
    const expected = sequence.gather(0);
    const [view] = sequence.views(0);
    const k = view!.k as Uint16Array, v = view!.v as Uint16Array;
    sequence.truncate(40);
    sequence.append(0, k.subarray(40 * 32), v.subarray(40 * 32), { dtype: store });
    sequence.commit(24);
    assert.deepEqual(sequence.gather(0), expected);
    assert.deepEqual([k.length, v.length, cache.poolStats(0, store).usedBlocks], [0, 0, 0]);
  }
});

test("rows that overlap where they go are those that were there as the call began", () => {
  const random = new Random(6);
  const rows = () => random.floats(40 * KV_DIM);
  const contiguous = () => new ContiguousCache(SHAPE);
  const paged = () => new PagedCache(SHAPE);
  for (const make of [contiguous, paged]) {
    const layouts = [
      { layout: "token_major" },
      { layout: "head_major" },
      { layout: "head_major", headStride: 6 * KV_DIM - 3 * 32 }, // three rows of two heads, at both ends
    ] as const;
    for (const layout of layouts) {
      for (const [cut, from] of [[30, 29], [30, 30], [30, 33], [20, 0], [20, 19], [38, 1]] as const) {
        for (const crossed of [false, true]) {
          using cache = make();
          using twin = make();
          const sequences = [cache, twin].map((one) =>
            one instanceof ContiguousCache ? one.sequence(0) : (one as PagedCache).sequence()
          );
          const [k, v] = [rows(), rows()];
          for (const sequence of sequences) {
            sequence.append(0, k, v);
            sequence.commit(40);
          }
          const [own, other] = sequences as [KvCache, KvCache];
          const [view] = own.views(0);
          const sides = [view!.k as Float32Array, view!.v as Float32Array];
          if (crossed) sides.reverse();
          const inside = sides.map((side) => side.subarray(from * 32, from * 32 + 6 * KV_DIM)) as Float32Array[];
          const copies = inside.map((side) => side.slice());
          for (const sequence of sequences) sequence.truncate(cut);
          own.append(0, inside[0]!, inside[1]!, layout);
          other.append(0, copies[0]!, copies[1]!, layout);
          assert.deepEqual(own.gather(0), other.gather(0), `${JSON.stringify(layout)} ${cut} ${from} ${crossed}`);
        }
      }
    }
  }
});

test("rows in a block that a fork's append copies are read as they were", () => {
  using cache = new PagedCache(SHAPE);
  const parent = cache.sequence(), random = new Random(7);
  extend(parent, random, 20);
  const child = parent.fork(), before = parent.gather(0);
  const [view] = parent.views(0);
  const k = view!.k as Float32Array, v = view!.v as Float32Array;
  const copies = [k.slice(0, 8 * KV_DIM), v.slice(0, 8 * KV_DIM)] as const;
  child.append(0, k.subarray(0, 8 * KV_DIM), v.subarray(0, 8 * KV_DIM), { layout: "head_major" });
  const twin = parent.fork();
  twin.append(0, ...copies, { layout: "head_major" });
  assert.deepEqual(child.gather(0), twin.gather(0));
  assert.deepEqual(parent.gather(0), before);
});

/** The largest difference of two lists. */
function largestError(actual: ArrayLike<number>, truth: ArrayLike<number>): number {
  let largest = 0;
  for (let i = 0; i < truth.length; i++) largest = Math.max(largest, Math.abs(actual[i]! - truth[i]!));
  return largest;
}

for (const store of ["q8_0", "q4_0", "i8", "i4", "i2"] as const satisfies readonly DType[]) {
  test(`an answer that is cut and asked for 50 times more is as good as the first: ${store}`, () => {
    for (const varies of [false, true]) {
      using cache = new PagedCache({ ...SHAPE, dtype: "f16", store, tail: { tokens: 64 } });
      const sequence = cache.sequence(), random = new Random(8);
      const k = random.floats(332 * KV_DIM), v = random.floats(332 * KV_DIM), q = random.floats(2 * KV_DIM);
      const write = (first: number, end: number) => {
        sequence.append(0, k.subarray(first * KV_DIM, end * KV_DIM), v.subarray(first * KV_DIM, end * KV_DIM));
        sequence.commit(end - first);
      };
      using exact = new ContiguousCache(SHAPE);
      exact.append(0, 0, k, v);
      const truth = exact.sequence(0).attend(0, q);
      const errors = () => [largestError(sequence.gather(0).k, k), largestError(sequence.attend(0, q), truth)] as const;
      write(0, 182);
      write(182, 332);
      const [keys, output] = errors();
      for (let turn = 0; turn < 50; turn++) {
        const cut = varies ? 70 + turn * 37 % 190 : 182;
        sequence.truncate(cut);
        write(cut, 332);
      }
      const [keysAfter, outputAfter] = errors();
      if (store !== "i2") assert.ok(keysAfter <= 0.25, `${keysAfter}`);
      assert.ok(keysAfter <= keys + 2 ** -11, `keys: ${keys}, then ${keysAfter}`);
      assert.ok(outputAfter <= output * 1.5 + 1e-3, `attend: ${output}, then ${outputAfter}`);
      assert.ok(sequence.blockTiers(0).slice(0, -2).includes("tail"));
    }
  });
}
