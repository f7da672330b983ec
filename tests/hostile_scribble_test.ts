/**
 * Every call that takes rows or indices, over shared memory that Workers write meanwhile: numbers, NaN and infinities in
 * turn, small indices and absurd ones. A call goes through or is refused with a typed error; no row that is stored is
 * anything but finite, and lengths and counts stay what the calls that went through made them.
 *
 * `KVERN_HOSTILE_CALLS=20000` makes more calls of each kind than those of every day, `KVERN_HOSTILE_SEED=1` repeats a run.
 */

import assert from "node:assert/strict";
import process from "node:process";
import { after, before, test } from "node:test";
import { Worker } from "node:worker_threads";
import {
  BufferPool,
  ContiguousCache,
  dequantizeBlock,
  dequantizeRows,
  type KvCache,
  KvError,
  packBlock,
  PagedCache,
  quantizeBlock,
  quantizeRows,
  type Rows,
  type Sequence,
  unpackBlock,
} from "../mod.ts";
import { Random } from "./oracle.ts";
import type { Scribble } from "./scribble_worker.ts";

const CALLS = Number(process.env.KVERN_HOSTILE_CALLS ?? 60);
const SEED = Number(process.env.KVERN_HOSTILE_SEED ?? Date.now() >>> 0);

const KV_HEADS = 2, HEAD_DIM = 32, Q_HEADS = 4, KV_DIM = KV_HEADS * HEAD_DIM, ROWS_MAX = 200;
const SHAPE = { layerCount: 1, kvHeadCount: KV_HEADS, headDim: HEAD_DIM, maxSeqLen: 1024 } as const;
const PLANE = { side: "k", blockSize: 64, headDim: HEAD_DIM } as const;

/** 1, 2, NaN, 0.5, -1, an infinity: also as halves and bytes, numbers and none. */
const NUMBERS = [0x3f800000, 0x40000000, 0x7fc00000, 0x3f000000, 0xbf800000, 0x7f800000];

/** Small indices, and some no array has. */
const INDICES = [0, 0, 1, 1, 1, 2, 2, 3, -1, 63, 64, 2 ** 31 - 1];

const numbers = new SharedArrayBuffer(4 * ROWS_MAX * KV_DIM), indices = new SharedArrayBuffer(4 * 3);
const stop = new SharedArrayBuffer(4);
const workers: Worker[] = [];

/** A Worker that writes until the tests have ended. */
async function scribble(workerData: Scribble): Promise<void> {
  const worker = new Worker(new URL("./scribble_worker.ts", import.meta.url), { workerData });
  workers.push(worker);
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  worker.once("message", () => resolve());
  worker.once("error", reject);
  await promise;
}

before(async () => {
  new Float32Array(numbers).fill(1);
  await scribble({ memory: numbers, stop, words: NUMBERS, inTurn: true });
  await scribble({ memory: indices, stop, words: INDICES });
});

after(async () => {
  Atomics.store(new Int32Array(stop), 0, 1);
  for (const worker of workers) await worker.terminate();
});

/** `length` numbers that change, anywhere in the shared memory. */
function moving(random: Random, length: number): Float32Array {
  const whole = new Float32Array(numbers), first = random.below(whole.length - length + 1);
  return whole.subarray(first, first + length);
}

/** Bytes that change, as many. */
function movingBytes(random: Random, length: number): Uint8Array {
  return new Uint8Array(numbers, random.below(numbers.byteLength - length + 1), length);
}

/** Rows that change: floats, or bits of halves. */
function movingRows(random: Random, n: number): { rows: Rows; dtype?: "f16" | "bf16" } {
  const kind = random.below(3), rows = moving(random, n * KV_DIM);
  if (kind === 0) return { rows };
  const bits = new Uint16Array(numbers, rows.byteOffset & ~1, n * KV_DIM);
  return { rows: bits, dtype: kind === 1 ? "f16" : "bf16" };
}

/** Codes of refusals that memory which changes can bring about. */
const CODES = ["not_finite", "invalid_size", "invalid_config", "commit_mismatch", "cache_full"];

/** True where the call went through; false where it was refused as it may be. */
function attempt(name: string, call: () => unknown): boolean {
  try {
    call();
    return true;
  } catch (error) {
    const isTyped = error instanceof KvError
      ? CODES.includes(error.code)
      : error instanceof TypeError || error instanceof RangeError;
    assert.ok(isTyped, `${name}, seed ${SEED}: ${error}`);
    return false;
  }
}

function assertFinite(name: string, values: ArrayLike<number>): void {
  for (let i = 0; i < values.length; i++) {
    if (!Number.isFinite(values[i]!)) assert.fail(`${name}, seed ${SEED}: [${i}] is ${values[i]}`);
  }
}

/** The sequence has so many rows, all finite, of which so many are committed. */
function assertRows(name: string, sequence: KvCache, rows: number, seqLen: number): void {
  const { k, v } = sequence.gather(0);
  assert.deepEqual(
    [k.length, v.length, sequence.seqLen],
    [rows * KV_DIM, rows * KV_DIM, seqLen],
    `${name}, seed ${SEED}`,
  );
  assertFinite(name, k);
  assertFinite(name, v);
}

/** A call of each kind, `CALLS` times and on until it has been seen to go through and to be refused. */
function declare(name: string, step: (random: Random) => boolean): void {
  test(`over memory that changes: ${name}`, { timeout: 120_000 }, () => {
    const random = new Random(SEED), seen = { ok: 0, refused: 0 };
    const isSeen = () => seen.ok > 5 && seen.refused > 5;
    for (let i = 0; i < CALLS || (i < 200_000 && !isSeen()); i++) seen[step(random) ? "ok" : "refused"] += 1;
    assert.ok(isSeen(), `seed ${SEED}: ${JSON.stringify(seen)}`);
  });
}

const contiguous = new Map((["f32", "f16", "bf16"] as const).map((dtype) => [
  dtype,
  new ContiguousCache({ ...SHAPE, sequenceCount: 2, dtype }),
]));
const paged = new PagedCache({ ...SHAPE, dtype: "f32", store: "q8_0", tail: { tokens: 64 } });

after(() => {
  for (const cache of contiguous.values()) cache.free();
  paged.free();
});

declare("append and store, contiguous", (random) => {
  const cache = [...contiguous.values()][random.below(3)]!, sequence = cache.sequence(1);
  sequence.truncate(0);
  cache.sequence(0).truncate(0);
  const n = 1 + random.below(ROWS_MAX), { rows, dtype } = movingRows(random, n);
  const options = dtype === undefined ? {} : { dtype };
  if (random.below(3) === 0) {
    const row = rows.subarray(0, KV_DIM);
    const done = attempt("store", () => cache.store(0, 1, row, row, options));
    if (done) cache.advance();
    assertRows("store", sequence, Number(done), Number(done));
    return done;
  }
  const layout = random.below(2) === 0 ? "token_major" : "head_major";
  const done = attempt("append", () => sequence.append(0, rows, rows, { ...options, layout }));
  assertRows("append", sequence, done ? n : 0, 0);
  const q = random.floats(HEAD_DIM * Q_HEADS);
  if (done) assertFinite("attend", sequence.attend(0, q));
  return done;
});

/** Sequences whose next rows need something made first, how many they have, and what holds the rows meanwhile. */
const PATHS: Record<string, (random: Random) => { sequence: Sequence; parent?: Sequence; length: number }> = {
  mapped: () => ({ sequence: paged.sequence(), length: 0 }),
  "in place": (random) => ({ sequence: filled(random, 10), length: 10 }),
  "copied after a fork": (random) => {
    const parent = filled(random, 10);
    return { sequence: parent.fork(), parent, length: 10 };
  },
  "reopened in the store": (random) => {
    const sequence = filled(random, 192);
    sequence.truncate(100);
    return { sequence, length: 100 };
  },
};

function filled(random: Random, n: number): Sequence {
  const sequence = paged.sequence();
  sequence.append(0, random.floats(n * KV_DIM), random.floats(n * KV_DIM));
  sequence.commit(n);
  return sequence;
}

function assertEmpty(name: string): void {
  const { sequenceCount, totalTokens, blockCount } = paged.stats();
  const used = [paged.poolStats().usedBlocks, paged.poolStats(0, "q8_0").usedBlocks];
  assert.deepEqual([sequenceCount, totalTokens, blockCount, ...used], [0, 0, 0, 0, 0], `${name}, seed ${SEED}`);
}

for (const [name, prepare] of Object.entries(PATHS)) {
  declare(`append, paged, ${name}`, (random) => {
    const { sequence, parent, length } = prepare(random);
    const n = 1 + random.below(ROWS_MAX), { rows, dtype } = movingRows(random, n);
    const done = attempt(name, () => sequence.append(0, rows, rows, dtype === undefined ? {} : { dtype }));
    assertRows(name, sequence, done ? length + n : length, length);
    if (parent !== undefined) assertRows(name, parent, length, length);
    if (done) sequence.commit(n); // rows migrate
    assertRows(name, sequence, done ? length + n : length, done ? length + n : length);
    sequence.free();
    parent?.free();
    assertEmpty(name);
    return done;
  });
}

declare("append, batch of every path", (random) => {
  const made = Object.values(PATHS).map((prepare) => prepare(random));
  const counts = made.map(() => random.below(20)), n = counts.reduce((sum, count) => sum + count, 0);
  const { rows, dtype } = movingRows(random, n);
  const sequences = made.map(({ sequence }) => sequence);
  const options = { sequences, tokenCounts: counts, ...(dtype === undefined ? {} : { dtype }) };
  const done = attempt("batch", () => paged.append(0, rows, rows, options));
  made.forEach(({ sequence, parent, length }, i) => {
    assertRows("batch", sequence, done ? length + counts[i]! : length, length);
    sequence.free();
    parent?.free();
  });
  assertEmpty("batch");
  return done;
});

declare("tokenCounts", (random) => {
  const sequences = [paged.sequence(), paged.sequence(), paged.sequence()];
  const rows = random.floats((1 + random.below(4)) * KV_DIM);
  const done = attempt(
    "tokenCounts",
    () => paged.append(0, rows, rows, { sequences, tokenCounts: new Int32Array(indices) }),
  );
  const lengths = sequences.map((sequence) => sequence.gather(0).k.length);
  assert.equal(lengths.reduce((sum, length) => sum + length, 0), done ? rows.length : 0);
  for (const sequence of sequences) sequence.free();
  assertEmpty("tokenCounts");
  return done;
});

/** Attends with everything that may be given changing, and some of it now and then not. */
function movingAttend(random: Random, queryCount: number) {
  const some = <T>(value: T): T | undefined => random.below(2) === 0 ? value : undefined;
  const isTree = random.below(2) === 0; // a tree takes no slopes
  return {
    q: some(moving(random, queryCount * Q_HEADS * HEAD_DIM)) ?? random.floats(queryCount * Q_HEADS * HEAD_DIM),
    options: Object.fromEntries(
      Object.entries({
        alibiSlopes: isTree ? undefined : moving(random, Q_HEADS),
        sinkLogits: some(moving(random, Q_HEADS)),
        treeParents: isTree ? new Int32Array(indices, 0, queryCount) : undefined,
      }).filter(([, value]) => value !== undefined),
    ),
  };
}

for (const kind of ["contiguous", "paged"] as const) {
  let sequence: KvCache | undefined;
  declare(`attend, ${kind}`, (random) => {
    if (sequence === undefined) {
      sequence = kind === "paged" ? paged.sequence() : contiguous.get("f32")!.sequence(0);
      sequence.truncate(0);
      sequence.append(0, random.floats(150 * KV_DIM), random.floats(150 * KV_DIM));
      sequence.commit(150);
    }
    const { q, options } = movingAttend(random, 3);
    const lse = new Float32Array(3 * Q_HEADS), into = new Float32Array(q.length);
    return attempt("attend", () => sequence!.attend(0, q, { queryCount: 3, ...options, into, lse }));
  });
  test(`what attended stays as it was, ${kind}`, () => {
    assertRows("attend", sequence!, 150, 150);
    if (kind === "paged") (sequence as Sequence).free();
    else sequence!.truncate(0);
  });
}

declare("attend and queryCounts, batch", (random) => {
  const sequences = [filled(random, 5), filled(random, 70), filled(random, 3)];
  const queryCount = 3;
  const queryCounts = random.below(2) === 0 ? [1, 1, 1] : new Int32Array(indices);
  const { q, options } = movingAttend(random, queryCount);
  const done = attempt("attend", () => paged.attend(0, q, { sequences, ...options, queryCounts }));
  sequences.forEach((sequence, i) => {
    assertRows("attend", sequence, [5, 70, 3][i]!, [5, 70, 3][i]!);
    sequence.free();
  });
  assertEmpty("attend");
  return done;
});

declare("parents of reorder", (random) => {
  const lengths = [5, 70, 9], beams = lengths.map((n) => filled(random, n));
  const done = attempt("reorder", () => paged.reorder(beams, new Int32Array(indices)));
  beams.forEach((beam, i) => {
    const length = beam.seqLen;
    assert.ok(done ? lengths.includes(length) : length === lengths[i], `seed ${SEED}: ${length}`);
    assertRows("reorder", beam, length, length);
    beam.free();
  });
  assertEmpty("reorder");
  return done;
});

declare("kept of commit", (random) => {
  const sequence = filled(random, 70), rows = random.floats(4 * KV_DIM);
  sequence.append(0, rows, rows);
  const done = attempt("commit", () => sequence.commit(2, { kept: new Uint32Array(indices, 0, 2) }));
  assertRows("commit", sequence, done ? 72 : 74, done ? 72 : 70);
  if (done) {
    const { k } = sequence.gather(0);
    const at = [70, 71].map((row) => [0, 1, 2, 3].find((i) => rows[i * KV_DIM] === k[row * KV_DIM]));
    assert.ok(at[0]! < at[1]!, `seed ${SEED}: ${at}`);
  }
  sequence.free();
  assertEmpty("commit");
  return done;
});

// What is made of memory that changes is the caller's and may be anything; it has its length, and is read or refused.

declare("quantizeRows and dequantizeRows", (random) => {
  const dtype = random.below(2) === 0 ? "q8_0" as const : "q4_0" as const, n = 1 + random.below(100);
  const byteCount = n * (dtype === "q8_0" ? 34 : 18);
  if (random.below(2) === 0) {
    const into = new Uint8Array(byteCount + 1).fill(7);
    const done = attempt("quantizeRows", () => quantizeRows(moving(random, n * 32), { dtype, into }));
    assert.equal(into.at(-1), 7);
    if (done) attempt("dequantizeRows", () => dequantizeRows(into.subarray(0, byteCount), { dtype }));
    return done;
  }
  const into = new Float32Array(n * 32 + 1).fill(7);
  const done = attempt("dequantizeRows", () => dequantizeRows(movingBytes(random, byteCount), { dtype, into }));
  assert.equal(into.at(-1), 7);
  return done;
});

declare("quantizeBlock and dequantizeBlock", (random) => {
  const dtype = (["q8_0", "q4_0", "i8", "i4", "i2"] as const)[random.below(5)]!;
  const options = { ...PLANE, side: random.below(2) === 0 ? "k" : "v", dtype } as const;
  const { length } = quantizeBlock(random.floats(64 * HEAD_DIM), options);
  if (random.below(2) === 0) {
    const into = new Uint8Array(length + 1).fill(7);
    const done = attempt("quantizeBlock", () => quantizeBlock(moving(random, 64 * HEAD_DIM), { ...options, into }));
    assert.equal(into.at(-1), 7);
    if (done) attempt("dequantizeBlock", () => dequantizeBlock(into.subarray(0, length), options));
    return done;
  }
  const into = new Float32Array(64 * HEAD_DIM + 1).fill(7);
  const done = attempt("dequantizeBlock", () => dequantizeBlock(movingBytes(random, length), { ...options, into }));
  assert.equal(into.at(-1), 7);
  return done;
});

declare("packBlock and unpackBlock", (random) => {
  const options = { ...PLANE, dtype: random.below(2) === 0 ? "q8_0" : "q4_0" } as const;
  const { length } = quantizeBlock(new Float32Array(64 * HEAD_DIM), options);
  const move = random.below(2) === 0 ? packBlock : unpackBlock, into = new Uint8Array(length + 1).fill(7);
  const done = attempt(move.name, () => move(movingBytes(random, length), { ...options, into }));
  assert.equal(into.at(-1), 7);
  return done;
});

declare("extend of a buffer", (random) => {
  using pool = new BufferPool();
  using buffer = pool.acquire(4 * 1024);
  const values = moving(random, random.below(2048));
  const done = attempt("extend", () => buffer.extend(values));
  const length = done ? values.length : 0;
  assert.deepEqual([done, buffer.length], [values.length <= 1024, length]);
  // Each element is one of those that were written, whole.
  const bits = new Set([...new Uint32Array(buffer.bytes.slice().buffer)].slice(0, length));
  for (const word of bits) assert.ok(NUMBERS.includes(word), word.toString(16));
  return done;
});
