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

for (
  const [what, options] of Object.entries(
    {
      "a window of 1000 rows": { windowTokens: 1000 },
      "the newest 1000 rows, 7 sinks among them": {
        retention: { keep: "newest", tokens: 1000, sinkTokens: 7 },
      },
    } as const,
  )
) {
  test(`tables keep their size over a million rows under ${what}`, () => {
    const shape = { layerCount: 1, kvHeadCount: 1, headDim: 1, blockSize: 16 } as const;
    using cache = new PagedCache({ ...shape, ...options, maxSeqLen: 1 << 20, rewindTokens: 16, dtype: "f16" });
    const sequence = cache.sequence(), rows = new Float32Array(5000);
    const metadata: number[] = [];
    for (let step = 1; step <= 200; step++) {
      sequence.append(0, rows, rows.fill(step));
      sequence.commit(rows.length);
      if (step === 20 || step === 200) metadata.push(cache.stats().metadataBytes);
    }
    assert.equal(metadata[1], metadata[0]);

    // Blocks keep their numbers: those of rows that were let go are -1.
    const sinks = "retention" in options ? 1 : 0,
      newest = Math.ceil(1e6 / 16) - Math.floor((1e6 - 1000 + 7 * sinks) / 16);
    const check = (table: ArrayLike<number>) => {
      const seen = Array.from(table, (block, entry) => block < 0 ? -1 : entry).filter((entry) => entry >= 0);
      assert.equal(table.length, 1e6 / 16);
      assert.deepEqual(seen, [
        ...Array(sinks).keys(),
        ...Array.from({ length: newest }, (_, i) => 1e6 / 16 - newest + i),
      ]);
    };
    check(sequence.blockTable(0));
    const child = sequence.fork();
    check(child.blockTable(0));
    assert.ok(cache.stats().metadataBytes - metadata[1]! < 4096, "a fork has a table of the same size");
    child.append(0, rows.subarray(0, 1), rows.subarray(0, 1).fill(-1));
    child.commit(1);
    assert.deepEqual([...child.gather(0).v.subarray(-2)], [200, -1]);
    child.truncate(child.rewindableTo);
    assert.equal(child.gather(0).v.length, 1000);
    assert.equal(sequence.gather(0).v.at(-1), 200);
  });
}
