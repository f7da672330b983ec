/**
 * Random calls on the sequences of a paged cache and on plain arrays: the same answers, the same rows, and blocks that
 * are neither lost nor used twice.
 *
 * `KVERN_MODEL_STEPS=100000` makes more steps than the 10 000 of every day, `KVERN_MODEL_SEED=1` repeats a run.
 */

import assert from "node:assert/strict";
import process from "node:process";
import { test } from "node:test";
import { BlockPool, KvError, PagedCache, type Sequence } from "../mod.ts";
import { attention, Random, relativeError, SequenceModel, stored } from "./oracle.ts";

const LAYERS = 3, HEADS = 2, DIM = 5, ROWS = 40, SEQUENCES_MAX = 8;
const KV_DIM = HEADS * DIM;
const STEPS = Number(process.env.KVERN_MODEL_STEPS ?? 10_000);
const GIVEN = process.env.KVERN_MODEL_SEED;
const SEEDS = GIVEN === undefined ? [20261121, Date.now() >>> 0] : [Number(GIVEN)];

/** A sequence and what it should hold. */
interface Pair {
  readonly sequence: Sequence;
  readonly model: SequenceModel;
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

function fresh(): SequenceModel {
  return new SequenceModel(LAYERS, KV_DIM, ROWS);
}

/** The committed rows alone: what a fork begins with. */
function committed(model: SequenceModel): SequenceModel {
  const copy = fresh();
  copy.seqLen = model.seqLen;
  for (let layer = 0; layer < LAYERS; layer++) {
    copy.k[layer]!.push(...model.k[layer]!.slice(0, model.seqLen * KV_DIM));
    copy.v[layer]!.push(...model.v[layer]!.slice(0, model.seqLen * KV_DIM));
  }
  return copy;
}

/** The pending rows of `model` that stay, by index. */
function keep(model: SequenceModel, kept: readonly number[]): void {
  for (const side of [...model.k, ...model.v]) {
    const pending = side.splice(model.seqLen * KV_DIM);
    for (const index of kept) side.push(...pending.slice(index * KV_DIM, (index + 1) * KV_DIM));
  }
  model.seqLen += kept.length;
}

/** Each block has as many references as tables name it, and no block is lost. */
function checkBlocks(cache: PagedCache, pairs: readonly Pair[], step: number): void {
  const named = new Map<number, number>();
  for (const { sequence } of pairs) {
    // All layers are of one group; the layer with most rows shows the whole table.
    const tables = Array.from({ length: LAYERS }, (_, layer) => sequence.blockTable(layer));
    const longest = tables.reduce((a, b) => b.length > a.length ? b : a);
    for (const block of longest) named.set(block, (named.get(block) ?? 0) + 1);
    for (const table of tables) assert.deepEqual(table, longest.subarray(0, table.length), `step ${step}`);
  }
  for (const { sequence } of pairs) {
    for (let layer = 0; layer < LAYERS; layer++) {
      const references = sequence.blockReferences(layer);
      sequence.blockTable(layer).forEach((block, i) => {
        assert.equal(references[i], named.get(block), `step ${step}, block ${block}`);
      });
    }
  }
  const { usedBlocks, freeBlocks, totalBlocks, reservedBytes, blockBytes } = cache.poolStats();
  assert.deepEqual([usedBlocks, usedBlocks + freeBlocks], [named.size, totalBlocks], `step ${step}`);
  assert.ok(reservedBytes >= totalBlocks * blockBytes);
  assert.equal(cache.stats().tableEntries, [...named.values()].reduce((sum, n) => sum + n, 0), `step ${step}`);
}

for (const [blockSize, dtype] of [[1, "f32"], [4, "f16"], [16, "bf16"]] as const) {
  for (const seed of SEEDS) {
    const title = `${STEPS} random calls on sequences in blocks of ${blockSize}, ${dtype} (seed ${seed})`;
    test(title, { timeout: 60_000 + STEPS * 10 }, () => {
      const random = new Random(seed);
      const shape = { layerCount: LAYERS, kvHeadCount: HEADS, headDim: DIM, blockSize, dtype };
      using pool = new BlockPool(shape);
      using cache = new PagedCache({ ...shape, maxSeqLen: ROWS, pool });
      const pairs: Pair[] = [{ sequence: cache.sequence(), model: fresh() }];
      const rows = (n: number) => random.floats(n * KV_DIM).map((value) => stored(value, dtype));
      const counts = { ok: 0, refused: 0 };

      for (let step = 0; step < STEPS; step++) {
        const index = random.below(pairs.length);
        const { sequence, model } = pairs[index]!;
        const layer = random.below(16) === 0 ? LAYERS : random.below(LAYERS);
        let expected = "ok", actual = "ok";
        switch (random.below(13)) {
          case 0:
          case 1: {
            const n = random.below(6);
            const k = rows(n), v = random.below(16) === 0 ? rows(n + 1) : rows(n);
            expected = model.append(layer, k, v);
            actual = codeOf(() => sequence.append(layer, k, v));
            break;
          }
          case 2:
          case 3:
          case 4: {
            // A whole step: what lags behind is filled up to the longest layer.
            const target = Math.max(...model.k.map((_, at) => model.rows(at)), Math.min(model.seqLen + 1, ROWS));
            for (let at = 0; at < LAYERS; at++) {
              const missing = target - model.rows(at);
              const k = rows(missing), v = rows(missing);
              model.append(at, k, v);
              sequence.append(at, k, v);
            }
            const n = target - model.seqLen;
            if (random.below(3) === 0) {
              const kept = Array.from({ length: n }, (_, i) => i).filter(() => random.below(2) === 0);
              keep(model, kept);
              actual = codeOf(() => sequence.commit(kept.length, { kept: Uint32Array.from(kept) }));
            } else {
              expected = model.commit(n);
              actual = codeOf(() => sequence.commit(n));
            }
            break;
          }
          case 5: {
            const n = random.below(4);
            expected = model.commit(n);
            actual = codeOf(() => sequence.commit(n));
            break;
          }
          case 6: {
            const n = random.below(model.seqLen + 2);
            expected = model.truncate(n);
            actual = codeOf(() => sequence.truncate(n));
            break;
          }
          case 7: {
            if (pairs.length === SEQUENCES_MAX) break;
            const isFork = random.below(4) !== 0;
            pairs.push(
              isFork
                ? { sequence: sequence.fork(), model: committed(model) }
                : { sequence: cache.sequence(), model: fresh() },
            );
            break;
          }
          case 8: {
            if (pairs.length === 1 || random.below(2) === 0) break;
            sequence.free();
            pairs.splice(index, 1);
            break;
          }
          case 9: {
            const beams = pairs.filter(() => random.below(2) === 0);
            const parents = beams.map(() => random.below(beams.length));
            const isPending = beams.some(({ model }) => model.k.some((_, at) => model.rows(at) !== model.seqLen));
            expected = isPending ? "commit_mismatch" : "ok";
            actual = codeOf(() => cache.reorder(beams.map((beam) => beam.sequence), parents));
            if (isPending) break;
            const models = parents.map((parent) => committed(beams[parent]!.model));
            beams.forEach((beam, i) => pairs[pairs.indexOf(beam)] = { sequence: beam.sequence, model: models[i]! });
            break;
          }
          case 10: {
            // Rows for several at once: all of them or none.
            const batch = pairs.filter(() => random.below(2) === 0);
            const tokenCounts = batch.map(() => random.below(4));
            const total = tokenCounts.reduce((sum, n) => sum + n, 0);
            const k = rows(total), v = rows(total);
            const isFull = layer < LAYERS && batch.some((each, i) => each.model.rows(layer) + tokenCounts[i]! > ROWS);
            expected = layer === LAYERS ? "layer_out_of_range" : isFull ? "cache_full" : "ok";
            const sequences = batch.map((each) => each.sequence);
            actual = codeOf(() => cache.append(layer, k, v, { sequences, tokenCounts }));
            if (expected !== "ok") break;
            let first = 0;
            for (const [i, each] of batch.entries()) {
              const end = first + tokenCounts[i]! * KV_DIM;
              each.model.append(layer, k.subarray(first, end), v.subarray(first, end));
              first = end;
            }
            break;
          }
          case 11: {
            // Every array shows its own sequence's rows.
            const at = random.below(LAYERS);
            for (const view of sequence.views(at)) {
              for (let t = 0; t < view.length; t++) {
                const row = (view.start + t) * KV_DIM;
                for (let h = 0; h < HEADS && dtype === "f32"; h++) {
                  const element = t * view.tokenStride + h * view.headStride;
                  assert.equal(view.k![element], model.k[at]![row + h * DIM], `step ${step}`);
                  assert.equal(view.v![element], model.v[at]![row + h * DIM], `step ${step}`);
                }
              }
            }
            break;
          }
          case 12: {
            const at = random.below(LAYERS);
            const q = random.floats(2 * HEADS * DIM);
            const { k, v } = { k: model.k[at]!, v: model.v[at]! };
            const truth = attention({ q, k, v, queryCount: 1, qHeadCount: 4, kvHeadCount: HEADS, headDim: DIM });
            const output = sequence.attend(at, q);
            if (k.length === 0) assert.deepEqual(output, new Float32Array(q.length));
            else assert.ok(relativeError(output, truth.output) <= 1e-5, `step ${step}`);
          }
        }
        assert.equal(actual, expected, `step ${step}`);
        counts[expected === "ok" ? "ok" : "refused"] += 1;

        checkBlocks(cache, pairs, step);
        if (step % 50 !== 0) continue;
        for (const each of pairs) {
          assert.equal(each.sequence.seqLen, each.model.seqLen);
          for (let at = 0; at < LAYERS; at++) {
            const { k, v } = each.sequence.gather(at);
            assert.deepEqual([...k], each.model.k[at], `step ${step}`);
            assert.deepEqual([...v], each.model.v[at], `step ${step}`);
          }
        }
      }
      assert.ok(counts.ok > STEPS / 2 && counts.refused > STEPS / 50, JSON.stringify(counts));
      for (const { sequence } of pairs) sequence.free();
      assert.deepEqual([pool.stats().usedBlocks, cache.stats().sequenceCount], [0, 0]);
    });
  }
}
