/**
 * Calls whose inputs and outputs lie over each other, or over the cache's own memory. Each is refused with
 * `invalid_config`, or gives what it gives with copies of its inputs; it never ends the process.
 *
 *     deno run -A tests/hostile_overlap.ts [calls] [seed]        bun tests/hostile_overlap.ts [calls] [seed]
 *
 * The seed is printed first, so that a crash leaves it behind.
 */

import assert from "node:assert/strict";
import process from "node:process";
import { BufferPool, ContiguousCache, type KvCache, KvError, PagedCache, quantizeRows, type Sequence } from "../mod.ts";
import { Random } from "./oracle.ts";

const KV_HEADS = 2, HEAD_DIM = 32, Q_HEADS = 4, KV_DIM = KV_HEADS * HEAD_DIM, ROWS_MAX = 40;
const SHAPE = { layerCount: 1, kvHeadCount: KV_HEADS, headDim: HEAD_DIM, maxSeqLen: ROWS_MAX, dtype: "f32" } as const;

/** What came of it: calls that did what they do with copies, and calls that were refused. */
export interface OverlapReport {
  readonly exact: Record<string, number>;
  readonly refused: Record<string, number>;
}

/** One run: caches, a stretch of memory that all arrays may lie in, and what was seen. */
class Overlaps {
  readonly #random: Random;
  readonly #pool = new BufferPool();
  readonly #buffer = this.#pool.acquire(4 * 1024);
  /** 64 KiB, so that arrays in it often meet. */
  readonly #arena = new Float32Array(16 * 1024);
  readonly #flat = new ContiguousCache(SHAPE);
  readonly #paged = new PagedCache({ ...SHAPE, blockSize: 4 });
  readonly #sequences: readonly [KvCache, Sequence] = [this.#flat.sequence(0), this.#paged.sequence()];
  readonly exact: Record<string, number> = {};
  readonly refused: Record<string, number> = {};

  constructor(seed: number) {
    this.#random = new Random(seed);
    this.#buffer.extend(this.#random.floats(1024));
  }

  /** Rows that are finite, whatever the last call wrote into the arena or the cache. */
  #calm(sequence: KvCache): void {
    this.#arena.set(this.#random.floats(this.#arena.length));
    this.#buffer.clear();
    this.#buffer.extend(this.#random.floats(1024));
    sequence.truncate(0);
    const rows = this.#random.floats((4 + this.#random.below(20)) * KV_DIM);
    sequence.append(0, rows, rows.slice().reverse());
    sequence.commit(rows.length / KV_DIM);
  }

  /** Arrays over the memory of caches and buffers. */
  #own(sequence: KvCache): Float32Array[] {
    const arrays: Float32Array[] = [this.#buffer.f32];
    for (const view of sequence.views(0)) arrays.push(view.k as Float32Array, view.v as Float32Array);
    const whole = sequence.contiguousKv(0);
    if (whole.ok) arrays.push(whole.k as Float32Array, whole.v as Float32Array);
    if (sequence === this.#sequences[0]) {
      arrays.push(this.#flat.getKeys(0, 0) as Float32Array, this.#flat.getValues(0, 0) as Float32Array);
    }
    return arrays;
  }

  /** An array of `length` elements anywhere: in the arena, over own memory, or apart. */
  #array(sequence: KvCache, length: number): Float32Array {
    const long = this.#own(sequence).filter((array) => array.length >= length);
    const from = this.#random.below(3) === 0 && long.length > 0 ? long[this.#random.below(long.length)]! : this.#arena;
    // Near the start of the arena, so that arrays meet.
    const first = this.#random.below(Math.min(from.length - length, 700) + 1);
    return from.subarray(first, first + length);
  }

  /** Makes a call, which must be refused or do what `check` says. */
  #try(name: string, call: () => void, check: () => void): void {
    try {
      call();
    } catch (error) {
      assert.ok(error instanceof KvError && error.code === "invalid_config", `${name}: ${error}`);
      this.refused[name] = (this.refused[name] ?? 0) + 1;
      return;
    }
    check();
    this.exact[name] = (this.exact[name] ?? 0) + 1;
  }

  append(sequence: KvCache): void {
    const count = 1 + this.#random.below(9);
    const k = this.#array(sequence, count * KV_DIM), v = this.#array(sequence, count * KV_DIM);
    const before = sequence.gather(0), wanted = { k: k.slice(), v: v.slice() };
    this.#try("append", () => sequence.append(0, k, v), () => {
      const { k, v } = sequence.gather(0);
      assert.deepEqual(
        [k, v],
        [[...before.k, ...wanted.k], [...before.v, ...wanted.v]].map((all) => Float32Array.from(all)),
      );
    });
  }

  gather(sequence: KvCache): void {
    const expected = sequence.gather(0);
    const into = { k: this.#array(sequence, expected.k.length), v: this.#array(sequence, expected.v.length) };
    this.#try("gather", () => void sequence.gather(0, { into }), () => {
      assert.deepEqual([into.k.slice(), into.v.slice()], [expected.k, expected.v]);
    });
  }

  attend(sequence: KvCache): void {
    const queryCount = 1 + this.#random.below(3), length = queryCount * Q_HEADS * HEAD_DIM;
    const q = this.#array(sequence, length);
    const into = this.#random.below(4) === 0 ? q : this.#array(sequence, length);
    const lse = this.#array(sequence, queryCount * Q_HEADS);
    const options = {
      queryCount,
      ...(this.#random.below(2) === 0 ? { sinkLogits: this.#array(sequence, Q_HEADS) } : {}),
      ...(this.#random.below(2) === 0 ? { alibiSlopes: this.#array(sequence, Q_HEADS) } : {}),
    };
    const copies = Object.fromEntries(
      Object.entries(options).map(([name, value]) => [name, typeof value === "number" ? value : value.slice()]),
    );
    const expectedLse = new Float32Array(lse.length);
    const expected = sequence.attend(0, q.slice(), { ...copies, lse: expectedLse });
    this.#try("attend", () => void sequence.attend(0, q, { ...options, into, lse }), () => {
      assert.deepEqual([into.slice(), lse.slice()], [expected, expectedLse]);
    });
  }

  quantize(sequence: KvCache): void {
    const rows = this.#array(sequence, 64), bytes = this.#array(sequence, 17);
    const into = new Uint8Array(bytes.buffer, bytes.byteOffset, 68);
    const expected = quantizeRows(rows.slice(), { dtype: "q8_0" });
    this.#try("quantizeRows", () => void quantizeRows(rows, { dtype: "q8_0", into }), () => {
      assert.deepEqual(into.slice(), expected);
    });
  }

  extend(sequence: KvCache): void {
    this.#buffer.clear();
    this.#buffer.extend(this.#random.floats(512));
    const values = this.#array(sequence, 1 + this.#random.below(400)), wanted = values.slice();
    this.#try("extend", () => this.#buffer.extend(values), () => {
      assert.deepEqual(this.#buffer.f32.slice(512, 512 + wanted.length), wanted);
    });
  }

  step(): void {
    const sequence = this.#sequences[this.#random.below(2)]!;
    this.#calm(sequence);
    const calls = [this.append, this.gather, this.attend, this.quantize, this.extend];
    calls[this.#random.below(calls.length)]!.call(this, sequence);
  }

  free(): void {
    this.#flat.free();
    this.#paged.free();
    this.#buffer.free();
    this.#pool.free();
  }
}

/** Makes so many calls. */
export function overlap(calls: number, seed: number): OverlapReport {
  const run = new Overlaps(seed);
  try {
    for (let i = 0; i < calls; i++) run.step();
  } finally {
    run.free();
  }
  return { exact: run.exact, refused: run.refused };
}

if (process.argv[1]?.endsWith("hostile_overlap.ts")) {
  const [calls = 1_000_000, seed = Date.now() >>> 0] = process.argv.slice(2).map(Number);
  console.log(`seed ${seed}`);
  console.log(JSON.stringify(overlap(calls, seed)));
}
