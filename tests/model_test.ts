/**
 * Ten thousand random calls on a contiguous cache and on plain arrays: the same answers, the same rows, and attention as
 * an oracle in f64 computes it. A list of calls that fails is made short before it is shown.
 *
 *     KVERN_SEED=123 deno test -A tests/model_test.ts        the same calls again, in every runtime
 */

import assert from "node:assert/strict";
import process from "node:process";
import { test } from "node:test";
import { ContiguousCache, type FloatDType, KvError } from "../mod.ts";
import { attention, Random, relativeError, SequenceModel, stored } from "./oracle.ts";
import { shrink } from "./shrink.ts";

const LAYERS = 3, SEQUENCES = 4, HEADS = 2, DIM = 5, ROWS = 24;
const KV_DIM = HEADS * DIM;
const STEPS = 10_000;

/** One call. It means the same whatever came before: rows come from a seed of its own. */
type Step =
  | { verb: "append"; sequence: number; layer: number; n: number; seed: number; layout?: "head_major"; ragged?: true }
  | { verb: "store"; sequence: number; layer: number; seed: number }
  | { verb: "advance" }
  /** What is pending anywhere is dropped, one row is stored in each layer of one sequence, and all advance. */
  | { verb: "step"; sequence: number; seed: number }
  /** Every layer gets the rows it lacks for one token more than the sequence has, and the token is committed. */
  | { verb: "token"; sequence: number; seed: number }
  | { verb: "commit"; sequence: number; n: number }
  /** To that many eighths of what there is; 9 is past the end. */
  | { verb: "truncate"; sequence: number; eighths: number }
  | { verb: "attend"; sequence: number; layer: number; seed: number; queryCount: number; windowTokens?: number }
  | { verb: "free"; sequence: number }
  | { verb: "reset" };

/** `count` steps that a seed stands for. */
function stepsOf(seed: number, count: number): Step[] {
  const random = new Random(seed);
  return Array.from({ length: count }, () => {
    const sequence = random.below(SEQUENCES), layer = random.below(16) === 0 ? LAYERS : random.below(LAYERS);
    const own = random.below(2 ** 24);
    const choice = random.below(100);
    if (choice < 28) {
      const step: Step = {
        verb: "append",
        sequence,
        layer,
        n: random.below(random.below(8) === 0 ? ROWS + 3 : 6),
        seed: own,
      };
      if (random.below(4) === 0) step.layout = "head_major";
      if (random.below(16) === 0) step.ragged = true;
      return step;
    }
    if (choice < 40) return { verb: "store", sequence, layer, seed: own };
    if (choice < 42) return { verb: "advance" };
    if (choice < 48) return { verb: "step", sequence, seed: own };
    if (choice < 60) return { verb: "token", sequence, seed: own };
    if (choice < 74) return { verb: "commit", sequence, n: random.below(4) };
    if (choice < 84) return { verb: "truncate", sequence, eighths: random.below(10) };
    if (choice < 98) {
      const windowTokens = random.below(3) === 0 ? { windowTokens: 1 + random.below(8) } : {};
      return {
        verb: "attend",
        sequence,
        layer: random.below(LAYERS),
        seed: own,
        queryCount: 1 + random.below(3),
        ...windowTokens,
      };
    }
    return choice === 98 ? { verb: "free", sequence } : { verb: "reset" };
  });
}

/** The same step, easier to read. */
function simplerSteps(step: Step): Step[] {
  const steps: Step[] = [];
  if ("seed" in step && step.seed > 1) steps.push({ ...step, seed: 1 });
  if ("sequence" in step && step.sequence > 0) steps.push({ ...step, sequence: 0 });
  if ("layer" in step && step.layer > 0) steps.push({ ...step, layer: 0 });
  if ("n" in step && step.n > 1) steps.push({ ...step, n: 1 });
  if ("n" in step && step.n > 1 && step.n <= ROWS) steps.push({ ...step, n: ROWS + 1 }); // one call for many
  if ("queryCount" in step && step.queryCount > 1) steps.push({ ...step, queryCount: 1 });
  if (step.verb === "truncate" && step.eighths > 0) steps.push({ ...step, eighths: 0 });
  if (step.verb === "append" && step.layout !== undefined) {
    const { layout: _, ...plain } = step;
    steps.push(plain);
  }
  return steps;
}

/** A cache of plain arrays: what it answers, and what it holds. Tests of the harness make it wrong on purpose. */
class CacheModel {
  readonly sequences: SequenceModel[];
  readonly dtype: FloatDType;

  constructor(dtype: FloatDType) {
    this.dtype = dtype;
    this.sequences = Array.from({ length: SEQUENCES }, () => this.empty());
  }

  empty(): SequenceModel {
    return new SequenceModel(LAYERS, KV_DIM, ROWS);
  }

  stored(value: number): number {
    return stored(value, this.dtype);
  }

  append(sequence: number, layer: number, k: number[], v: number[]): string {
    return this.sequences[sequence]!.append(layer, k, v);
  }

  store(sequence: number, layer: number, k: number[], v: number[]): string {
    const model = this.sequences[sequence]!;
    if (layer >= LAYERS) return "layer_out_of_range";
    if (model.seqLen === ROWS) return "cache_full";
    return model.rows(layer) > model.seqLen ? "commit_mismatch" : model.append(layer, k, v);
  }

  advance(): string {
    const pending = this.sequences.map((model) => model.k.map((_, layer) => model.rows(layer) - model.seqLen));
    if (pending.some((rows) => rows.some((n) => n !== rows[0] || n > 1))) return "commit_mismatch";
    const moved = this.sequences.filter((_, i) => pending[i]![0] === 1);
    if (moved.length === 0) {
      return this.sequences.some(({ seqLen }) => seqLen === ROWS) ? "cache_full" : "commit_mismatch";
    }
    for (const model of moved) model.commit(1);
    return moved.some(({ seqLen }) => seqLen === ROWS) ? "cache_full" : "ok"; // said after the fact
  }

  commit(sequence: number, n: number): string {
    return this.sequences[sequence]!.commit(n);
  }

  truncate(sequence: number, n: number): string {
    return this.sequences[sequence]!.truncate(n);
  }

  free(sequence: number): void {
    this.sequences[sequence] = this.empty();
  }

  /** The rows that attention is to see. */
  rowsOf(sequence: number, layer: number): { k: number[]; v: number[] } {
    const { k, v } = this.sequences[sequence]!;
    return { k: k[layer]!, v: v[layer]! };
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

/** `n` rows as they are given, and as they should be held. */
function rowsOf(model: CacheModel, seed: number, n: number): { k: Float32Array; v: Float32Array; held: number[][] } {
  const random = new Random(seed);
  const k = random.floats(n * KV_DIM), v = random.floats(n * KV_DIM);
  return { k, v, held: [k, v].map((side) => Array.from(side, (value) => model.stored(value))) };
}

/** `[n][head][dim]` as `[head][n][dim]`. */
function headMajor(rows: Float32Array): Float32Array {
  const n = rows.length / KV_DIM;
  return rows.map((_, i) => {
    const head = Math.floor(i / (n * DIM)), row = Math.floor(i / DIM) % n;
    return rows[row * KV_DIM + head * DIM + i % DIM]!;
  });
}

/** Makes one call on both; throws where they differ. */
function apply(step: Step, cache: ContiguousCache, model: CacheModel): void {
  switch (step.verb) {
    case "append": {
      const { k, v, held } = rowsOf(model, step.seed, step.n);
      const [given, options] = step.layout === undefined
        ? [[k, v], {}] as const
        : [[headMajor(k), headMajor(v)], { layout: step.layout }] as const;
      if (step.ragged) {
        const longer = new Float32Array(v.length + KV_DIM);
        const expected = step.layer < LAYERS ? "invalid_size" : "layer_out_of_range";
        return assert.equal(codeOf(() => cache.append(step.layer, step.sequence, given[0]!, longer)), expected);
      }
      const expected = model.append(step.sequence, step.layer, held[0]!, held[1]!);
      return assert.equal(
        codeOf(() => cache.append(step.layer, step.sequence, given[0]!, given[1]!, options)),
        expected,
      );
    }
    case "store": {
      const { k, v, held } = rowsOf(model, step.seed, 1);
      const expected = model.store(step.sequence, step.layer, held[0]!, held[1]!);
      return assert.equal(codeOf(() => cache.store(step.layer, step.sequence, k, v)), expected);
    }
    case "advance":
      return assert.equal(codeOf(() => cache.advance()), model.advance());
    case "step": {
      model.sequences.forEach((each, index) => {
        const { seqLen } = each;
        assert.equal(codeOf(() => cache.sequence(index).truncate(seqLen)), model.truncate(index, seqLen));
      });
      for (let layer = 0; layer < LAYERS; layer++) {
        const { k, v, held } = rowsOf(model, step.seed + layer, 1);
        const expected = model.store(step.sequence, layer, held[0]!, held[1]!);
        assert.equal(codeOf(() => cache.store(layer, step.sequence, k, v)), expected);
      }
      return assert.equal(codeOf(() => cache.advance()), model.advance());
    }
    case "token": {
      const { sequence } = step;
      const now = model.sequences[sequence]!;
      const rows = now.k.map((_, layer) => now.rows(layer));
      const target = Math.max(...rows, Math.min(now.seqLen + 1, ROWS));
      rows.forEach((count, layer) => {
        const { k, v, held } = rowsOf(model, step.seed + layer, Math.max(0, target - count));
        assert.equal(
          codeOf(() => cache.append(layer, sequence, k, v)),
          model.append(sequence, layer, held[0]!, held[1]!),
        );
      });
      const n = target - now.seqLen;
      return assert.equal(codeOf(() => cache.sequence(sequence).commit(n)), model.commit(sequence, n));
    }
    case "commit":
      return assert.equal(
        codeOf(() => cache.sequence(step.sequence).commit(step.n)),
        model.commit(step.sequence, step.n),
      );
    case "truncate": {
      const { seqLen } = model.sequences[step.sequence]!;
      const n = step.eighths > 8 ? seqLen + 1 : Math.floor(seqLen * step.eighths / 8);
      return assert.equal(codeOf(() => cache.sequence(step.sequence).truncate(n)), model.truncate(step.sequence, n));
    }
    case "attend": {
      const { queryCount, windowTokens } = step;
      const q = new Random(step.seed).floats(queryCount * 2 * KV_DIM);
      const shape = { queryCount, qHeadCount: 2 * HEADS, kvHeadCount: HEADS, headDim: DIM };
      const options = windowTokens === undefined ? { queryCount } : { queryCount, windowTokens };
      const truth = attention({ q, ...model.rowsOf(step.sequence, step.layer), ...shape, ...options });
      const output = cache.sequence(step.sequence).attend(step.layer, q, options);
      const isEmpty = truth.output.every((value) => value === 0);
      if (isEmpty) return assert.deepEqual(output, new Float32Array(q.length));
      const error = relativeError(output, truth.output);
      return assert.ok(error <= 1e-5, `attention is off by ${error}`);
    }
    case "free":
      cache.sequence(step.sequence).free();
      return model.free(step.sequence);
    case "reset":
      cache.reset();
      return model.sequences.forEach((_, sequence) => model.free(sequence));
  }
}

/** What must be true after every call: lengths, and views of just the rows there are. */
function checkLengths(cache: ContiguousCache, model: CacheModel): void {
  model.sequences.forEach((each, index) => {
    assert.equal(cache.getSeqLen(index), each.seqLen, `length of sequence ${index}`);
    const sequence = cache.sequence(index);
    for (let layer = 0; layer < LAYERS; layer++) {
      const rows = sequence.views(layer).reduce((sum, view) => sum + view.length, 0);
      assert.equal(rows, each.rows(layer), `rows of layer ${layer} of sequence ${index}`);
    }
  });
}

function checkRows(cache: ContiguousCache, model: CacheModel): void {
  model.sequences.forEach((each, index) => {
    for (let layer = 0; layer < LAYERS; layer++) {
      const { k, v } = cache.sequence(index).gather(layer);
      assert.deepEqual([...k], each.k[layer], `keys of layer ${layer} of sequence ${index}`);
      assert.deepEqual([...v], each.v[layer], `values of layer ${layer} of sequence ${index}`);
    }
  });
}

/** Where a list of steps fails, and why. */
interface Failure {
  readonly at: number;
  readonly message: string;
}

/** Makes all calls; all rows are compared after every fiftieth and at the end. */
function failureOf(steps: readonly Step[], model: CacheModel): Failure | undefined {
  const shape = { layerCount: LAYERS, kvHeadCount: HEADS, headDim: DIM, maxSeqLen: ROWS, sequenceCount: SEQUENCES };
  using cache = new ContiguousCache({ ...shape, dtype: model.dtype });
  for (const [at, step] of steps.entries()) {
    try {
      apply(step, cache, model);
      checkLengths(cache, model);
      if (at % 50 === 0 || at === steps.length - 1) checkRows(cache, model);
    } catch (error) {
      return { at, message: String(error) };
    }
  }
  return undefined;
}

/** The shortest failing list that a seed leads to, or undefined. */
function search(seed: number, count: number, make: () => CacheModel): { steps: Step[]; message: string } | undefined {
  const steps = stepsOf(seed, count);
  const failure = failureOf(steps, make());
  if (failure === undefined) return undefined;
  const fails = (some: readonly Step[]) => failureOf(some, make()) !== undefined;
  const short = shrink(steps.slice(0, failure.at + 1), fails, simplerSteps);
  return { steps: short, message: failureOf(short, make())!.message };
}

const given = process.env.KVERN_SEED;
const seeds = given === undefined ? [20261121, Date.now() >>> 0] : [Number(given)];

for (const dtype of ["f32", "f16", "bf16"] as const) {
  for (const seed of seeds) {
    test(`random calls keep the rows of a plain-array model in ${dtype} (seed ${seed})`, { timeout: 120_000 }, () => {
      const found = search(seed, STEPS, () => new CacheModel(dtype));
      if (found === undefined) return;
      const list = found.steps.map((step) => `  ${JSON.stringify(step)}`).join("\n");
      assert.fail(`${found.message}\nafter, in ${dtype}:\n${list}\nagain with KVERN_SEED=${seed}`);
    });
  }
}

test("random calls are answered and refused in all ways", () => {
  const answers = new Set<string>();
  class Noting extends CacheModel {
    note(answer: string): string {
      answers.add(answer);
      return answer;
    }
    override append(...args: Parameters<CacheModel["append"]>): string {
      return this.note(super.append(...args));
    }
    override advance(): string {
      return this.note(`advance ${super.advance()}`).slice("advance ".length);
    }
    override commit(sequence: number, n: number): string {
      return this.note(super.commit(sequence, n));
    }
    override truncate(sequence: number, n: number): string {
      return this.note(super.truncate(sequence, n));
    }
  }
  assert.equal(failureOf(stepsOf(20261121, STEPS), new Noting("f32")), undefined);
  assert.deepEqual(
    [...answers].toSorted(),
    [
      ...["advance cache_full", "advance commit_mismatch", "advance ok", "cache_full", "commit_mismatch"],
      ...["layer_out_of_range", "ok", "position_out_of_range"],
    ],
  );
});

// A model that is wrong must be found out, and the list that shows it must be short.

/** Mistakes a cache could make, made by the model instead; the longest list that may be left, and what must be in it. */
const mistakes: readonly [name: string, steps: number, verb: RegExp, make: () => CacheModel][] = [
  ["truncate keeps pending rows", 2, /truncate|step/, () =>
    new class extends CacheModel {
      override truncate(sequence: number, n: number): string {
        const model = this.sequences[sequence]!;
        const pending = [model.k, model.v].map((side) => side.map((rows) => rows.slice(model.seqLen * KV_DIM)));
        const code = model.truncate(n);
        if (code !== "ok") return code;
        [model.k, model.v].forEach((side, s) => side.forEach((rows, layer) => rows.push(...pending[s]![layer]!)));
        return code;
      }
    }("f32")],
  ["commit asks layer 0 only", 2, /commit|token/, () =>
    new class extends CacheModel {
      override commit(sequence: number, n: number): string {
        const model = this.sequences[sequence]!;
        if (n !== 0 && model.rows(0) !== model.seqLen + n) return "commit_mismatch";
        model.seqLen += n;
        return "ok";
      }
    }("f32")],
  ["append takes one row too many", 2, /append/, () =>
    new class extends CacheModel {
      override empty(): SequenceModel {
        return new SequenceModel(LAYERS, KV_DIM, ROWS + 1);
      }
    }("f32")],
  ["f16 is rounded toward zero", 1, /append|store|token/, () =>
    new class extends CacheModel {
      override stored(value: number): number {
        const half = super.stored(value);
        return Math.abs(half) > Math.abs(value) ? half * (1 - 2 ** -10) : half;
      }
    }("f16")],
  ["advance says nothing when a sequence is full", 4, /advance|step/, () =>
    new class extends CacheModel {
      override advance(): string {
        const code = super.advance();
        return code === "cache_full" ? "ok" : code;
      }
    }("f32")],
  ["attention misses the newest row", 2, /attend/, () =>
    new class extends CacheModel {
      override rowsOf(sequence: number, layer: number): { k: number[]; v: number[] } {
        const { k, v } = super.rowsOf(sequence, layer);
        return { k: k.slice(0, -KV_DIM), v: v.slice(0, -KV_DIM) };
      }
    }("f32")],
  ["freeing a sequence keeps its rows", 2, /free|reset/, () =>
    new class extends CacheModel {
      override free(): void {}
    }("f32")],
];

for (const [name, most, verb, make] of mistakes) {
  test(`a model that is wrong is found out: ${name}`, { timeout: 60_000 }, () => {
    const found = search(7, 3000, make);
    assert.ok(found !== undefined, "not found");
    const list = JSON.stringify(found.steps);
    assert.ok(found.steps.length <= most && verb.test(list), list);
    assert.ok(found.message.length > 0);
    // The list alone fails again, the same steps without a mistake do not, and nothing of it can be left out.
    assert.equal(failureOf(JSON.parse(list), make())?.message, found.message);
    assert.equal(failureOf(found.steps, new CacheModel(make().dtype)), undefined);
    found.steps.forEach((_, i) => assert.equal(failureOf(found.steps.toSpliced(i, 1), make()), undefined));
  });
}

test("a seed stands for the same steps each time", () => {
  assert.deepEqual(stepsOf(5, 200), stepsOf(5, 200));
  assert.notDeepEqual(stepsOf(5, 200), stepsOf(6, 200));
});

test("shrink() leaves what matters", () => {
  const numbers = Array.from({ length: 1000 }, (_, i) => i);
  assert.deepEqual(shrink(numbers, (some) => some.includes(7)), [7]);
  assert.deepEqual(shrink(numbers, (some) => some.includes(3) && some.includes(998)), [3, 998]);
  assert.deepEqual(shrink(numbers, (some) => some.length >= 4).length, 4);
  assert.deepEqual(shrink(numbers, (some) => some.reduce((sum, n) => sum + n, 0) > 90, (n) => [n >> 1]).length, 1);
  assert.deepEqual(shrink([5, 6], () => true), []);
});
