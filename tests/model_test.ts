/** Ten thousand random calls on a contiguous cache and on plain arrays: the same answers, the same rows. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { ContiguousCache, KvError } from "../mod.ts";
import { attention, Random, relativeError, SequenceModel, stored } from "./oracle.ts";

const LAYERS = 3, SEQUENCES = 4, HEADS = 2, DIM = 5, ROWS = 24;
const KV_DIM = HEADS * DIM;

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

for (const dtype of ["f32", "f16", "bf16"] as const) {
  for (const seed of [20261121, Date.now() >>> 0]) {
    test(`random calls keep the rows of a plain-array model in ${dtype} (seed ${seed})`, { timeout: 60_000 }, () => {
      const random = new Random(seed);
      const shape = { layerCount: LAYERS, kvHeadCount: HEADS, headDim: DIM, maxSeqLen: ROWS };
      using cache = new ContiguousCache({ ...shape, sequenceCount: SEQUENCES, dtype });
      const fresh = () => new SequenceModel(LAYERS, KV_DIM, ROWS);
      const models = Array.from({ length: SEQUENCES }, fresh);
      const rows = (n: number) => random.floats(n * KV_DIM).map((value) => stored(value, dtype));
      const counts = { ok: 0, refused: 0 };

      for (let step = 0; step < 10_000; step++) {
        const index = random.below(SEQUENCES);
        const model = models[index]!, sequence = cache.sequence(index);
        const layer = random.below(16) === 0 ? LAYERS : random.below(LAYERS);
        let expected = "ok", actual = "ok";
        switch (random.below(10)) {
          case 0:
          case 1:
          case 2: {
            const n = random.below(6);
            const k = rows(n), v = random.below(16) === 0 ? rows(n + 1) : rows(n);
            expected = model.append(layer, k, v);
            actual = codeOf(() => sequence.append(layer, k, v));
            break;
          }
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
            expected = model.commit(n);
            actual = codeOf(() => sequence.commit(n));
            break;
          }
          case 5:
          case 6: {
            const n = random.below(4);
            expected = model.commit(n);
            actual = codeOf(() => sequence.commit(n));
            break;
          }
          case 7: {
            const n = random.below(model.seqLen + 2);
            expected = model.truncate(n);
            actual = codeOf(() => sequence.truncate(n));
            break;
          }
          case 8: {
            if (random.below(8) !== 0) break;
            sequence.free();
            models[index] = fresh();
            break;
          }
          case 9: {
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

        const now = models[index]!;
        assert.equal(cache.getSeqLen(index), now.seqLen);
        const looked = cache.sequence(index);
        for (let at = 0; at < LAYERS; at++) {
          assert.equal(looked.views(at).reduce((sum, view) => sum + view.length, 0), now.rows(at), `step ${step}`);
        }
        if (step % 50 !== 0) continue;
        models.forEach((each, which) => {
          for (let at = 0; at < LAYERS; at++) {
            const { k, v } = cache.sequence(which).gather(at);
            assert.deepEqual([...k], each.k[at], `step ${step}`);
            assert.deepEqual([...v], each.v[at], `step ${step}`);
          }
        });
      }
      assert.ok(counts.ok > 5000 && counts.refused > 500, JSON.stringify(counts));
    });
  }
}
