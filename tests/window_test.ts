/** Layers with a window of their own: what each of several queries sees of them. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { type LayerShape, PagedCache } from "../mod.ts";
import { attention, Random, relativeError } from "./oracle.ts";

const SHAPE = { kvHeadCount: 2, headDim: 8 }, Q_HEADS = 4, QUERIES = 12;
const LAYERS: LayerShape[] = [{ ...SHAPE, windowTokens: 6 }, SHAPE];

for (const windowTokens of [undefined, 9, 3]) {
  const call = windowTokens === undefined ? {} : { windowTokens };
  test(`queries see the window of their layer, and a call's of ${windowTokens ?? "no"} rows where that is narrower`, () => {
    using cache = new PagedCache({ layers: LAYERS, maxSeqLen: 64, blockSize: 4, dtype: "f32" });
    const random = new Random(29);
    const rows = [40, 17].map((count) => {
      const [k, v] = [random.floats(count * 16), random.floats(count * 16)] as const;
      return { k, v, q: random.floats(QUERIES * Q_HEADS * 8), sequence: cache.sequence() };
    });
    // Pending: no row has left the window yet.
    for (const { sequence, k, v } of rows) for (const layer of LAYERS.keys()) sequence.append(layer, k, v);
    for (const [layer, { windowTokens: own = Infinity }] of LAYERS.entries()) {
      const narrower = Math.min(own, windowTokens ?? Infinity);
      const scores = { ...SHAPE, qHeadCount: Q_HEADS, queryCount: QUERIES, windowTokens: narrower };
      const truths = rows.map(({ q, k, v }) => attention({ ...scores, q, k, v }));
      for (const [i, { sequence, q }] of rows.entries()) {
        const lse = new Float32Array(QUERIES * Q_HEADS);
        const output = sequence.attend(layer, q, { ...call, queryCount: QUERIES, lse });
        assert.ok(relativeError(output, truths[i]!.output) <= 1e-5, `layer ${layer}, sequence ${i}`);
        assert.ok(relativeError(lse, truths[i]!.lse) <= 1e-5, `lse of layer ${layer}, sequence ${i}`);
      }
      const q = Float32Array.from(rows.flatMap((row) => [...row.q]));
      const sequences = rows.map((row) => row.sequence);
      const together = cache.attend(layer, q, { ...call, sequences, queryCounts: [QUERIES, QUERIES] });
      assert.ok(relativeError(together, truths.flatMap(({ output }) => [...output])) <= 1e-5, `layer ${layer}, both`);
    }
  });
}
