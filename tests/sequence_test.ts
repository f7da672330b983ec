/** A sequence of a paged cache: blocks, forks, views of blocks and their end, trees of drafted tokens. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { PagedCache, type PagedCacheOptions, type Sequence, systemInfo } from "../mod.ts";
import { assertCode, assertRefused } from "./cache_cases.ts";
import { denoOnly, inDeno, MOD, runCode } from "./child.ts";
import { attention, Random, relativeError } from "./oracle.ts";

const SMALL = { layerCount: 2, kvHeadCount: 2, headDim: 3, blockSize: 4, maxSeqLen: 64, dtype: "f32" } as const;

/** Runs `body` on a cache and a sequence of it. */
function withSequence(
  options: Partial<PagedCacheOptions>,
  body: (sequence: Sequence, cache: PagedCache, random: Random) => void,
): void {
  using cache = new PagedCache({ ...SMALL, ...options });
  body(cache.sequence(), cache, new Random(5));
}

/** Appends `n` random rows to every layer and commits them; returns the keys of each layer. */
function extend(sequence: Sequence, random: Random, n: number): Float32Array[] {
  const rows = Array.from({ length: sequence.layerCount }, (_, layer) => {
    const { kvHeadCount, headDim } = sequence.layerShape(layer);
    const k = random.floats(n * kvHeadCount * headDim);
    sequence.append(layer, k, k.map((value) => -value));
    return k;
  });
  sequence.commit(n);
  return rows;
}

/** Start and length of each view. */
function extents(views: readonly { start: number; length: number }[]): number[][] {
  return views.map(({ start, length }) => [start, length]);
}

test("index(1, 2, 1) of a block is 19 of 24, and what lies in its holes changes nothing", () => {
  withSequence({}, (sequence, _cache, random) => {
    const [keys] = extend(sequence, random, 3);
    const q = random.floats(6);
    const before = sequence.attend(0, q);
    const [block] = sequence.packedViews(0)!;
    const { k, v } = block!;
    assert.deepEqual([k.length, v.length, block!.length, block!.blockSize], [24, 24, 3, 4]);
    assert.equal(k[19], keys![2 * 6 + 3 + 1]);
    for (const side of [k, v]) {
      side.fill(NaN, 9, 12);
      side.fill(NaN, 21, 24);
    }
    assert.deepEqual(sequence.attend(0, q), before);
    assert.deepEqual(sequence.gather(0).k, keys);
    const fork = sequence.fork();
    fork.append(0, keys!.subarray(0, 6), keys!.subarray(0, 6));
    assert.deepEqual(fork.gather(0).k, Float32Array.from([...keys!, ...keys!.subarray(0, 6)]));
  });
});

test("6 rows behind 3 in blocks of 4 are three views", () => {
  withSequence({}, (sequence, _cache, random) => {
    extend(sequence, random, 3);
    const { start, views } = sequence.append(0, random.floats(36), random.floats(36));
    assert.deepEqual([start, extents(views)], [3, [[3, 1], [4, 4], [8, 1]]]);
    assert.deepEqual(extents(sequence.views(0)), [[0, 4], [4, 4], [8, 1]]);
    assert.deepEqual(extents(sequence.packedViews(0)!), [[0, 4], [4, 4], [8, 1]]);
    assert.deepEqual(extents(sequence.views(1)), [[0, 3]]);
  });
});

test("views in the middle of a block say where their rows are", () => {
  withSequence({}, (sequence, _cache, random) => {
    extend(sequence, random, 3);
    const k = random.floats(18);
    const { views } = sequence.append(0, k, k);
    const read = views.flatMap((view) =>
      Array.from(
        { length: view.length },
        (_, t) => [0, 1].map((h) => [0, 1, 2].map((d) => view.k![t * view.tokenStride + h * view.headStride + d])),
      ).flat(2)
    );
    assert.deepEqual(Float32Array.from(read), k);
    // Not a byte past the block's own side.
    for (const { k: array } of views) assert.ok(array!.byteOffset + array!.byteLength <= 24 * 4);
    assert.equal(views[0]!.k!.buffer.byteLength, 24 * 4);
  });
});

test("truncate() gives back the blocks behind it", () => {
  withSequence({}, (sequence, cache, random) => {
    extend(sequence, random, 9);
    assert.equal(cache.stats().blockCount, 3);
    sequence.truncate(5);
    assert.deepEqual([cache.stats().blockCount, sequence.seqLen], [2, 5]);
    assertRefused(sequence, "position_out_of_range", () => sequence.truncate(6), /past the end: current length is 5$/);
  });
});

test("a fork shares blocks, and an append copies the last one alone", () => {
  withSequence({}, (parent, cache, random) => {
    const keys = extend(parent, random, 6);
    const bytes = [0, 1].map((layer) => parent.packedViews(layer)!.map(({ k, v }) => [k.slice(), v.slice()]));
    const child = parent.fork();
    assert.deepEqual([child.seqLen, cache.stats().blockCount, cache.stats().tableEntries], [6, 2, 4]);
    assert.deepEqual(child.blockTable(0), parent.blockTable(0));
    assert.deepEqual([...child.blockReferences(0)], [2, 2]);
    const row = random.floats(6);
    child.append(0, row, row);
    assert.equal(cache.stats().blockCount, 3);
    assert.deepEqual([...child.blockReferences(0), ...parent.blockReferences(1)], [2, 1, 2, 1]);
    assert.equal(child.blockTable(0)[0], parent.blockTable(0)[0]);
    assert.notEqual(child.blockTable(0)[1], parent.blockTable(0)[1]);
    const after = [0, 1].map((layer) => parent.packedViews(layer)!.map(({ k, v }) => [k.slice(), v.slice()]));
    assert.deepEqual(after, bytes);
    assert.deepEqual(child.gather(0).k, Float32Array.from([...keys[0]!, ...row]));
    assert.deepEqual(child.gather(1).k, keys[1]); // copied with the block
    parent.append(0, row, row); // its block is its own again
    assert.equal(cache.stats().blockCount, 3);
    child.free();
    assert.deepEqual([cache.stats().blockCount, cache.stats().sequenceCount], [2, 1]);
  });
});

test("a fork takes committed rows only, and pending ones stay their owner's", () => {
  withSequence({}, (parent, _cache, random) => {
    const [keys] = extend(parent, random, 5);
    const row = random.floats(6);
    parent.append(0, row, row);
    const child = parent.fork();
    assert.deepEqual([child.gather(0).k, child.residentTokens(0)], [keys, 5]);
    child.append(0, row.map((value) => value / 2), row);
    assert.deepEqual(parent.gather(0).k, Float32Array.from([...keys!, ...row]));
    parent.free();
    assert.equal(child.gather(0).k.length, 36);
    assertCode("stale_handle", () => parent.fork());
  });
});

test("generations of forks keep their rows when the others go", () => {
  withSequence({ maxSeqLen: 512 }, (root, cache, random) => {
    const expected = new Map<Sequence, number[]>();
    expected.set(root, [...extend(root, random, 3)[0]!]);
    let family = [root];
    for (let generation = 0; generation < 6; generation++) {
      family = family.flatMap((parent) => {
        const child = parent.fork();
        expected.set(child, [...expected.get(parent)!]);
        for (const each of [parent, child]) {
          expected.get(each)!.push(...extend(each, random, 1 + random.below(5))[0]!);
        }
        return [parent, child];
      });
    }
    assert.equal(family.length, 64);
    for (const [i, sequence] of family.entries()) {
      if (i % 3 === 0) sequence.free();
    }
    for (const [i, sequence] of family.entries()) {
      if (i % 3 !== 0) assert.deepEqual([...sequence.gather(0).k], expected.get(sequence));
    }
    for (const sequence of family) sequence.free();
    assert.deepEqual([cache.stats().blockCount, cache.stats().reservedBytes], [0, 0]);
  });
});

test("contiguousKv() says what stands in the way", () => {
  withSequence({}, (sequence, _cache, random) => {
    extend(sequence, random, 3);
    assert.deepEqual(sequence.contiguousKv(0), { ok: false, reason: "head_major" });
    assert.ok(sequence.contiguousKv(0, 0).ok);
  });
  withSequence({ kvHeadCount: 1 }, (sequence, cache, random) => {
    const [keys] = extend(sequence, random, 4);
    const run = sequence.contiguousKv(0);
    assert.ok(run.ok);
    assert.deepEqual([run.k, run.length], [keys, 4]);
    extend(cache.sequence(), random, 1);
    extend(sequence, random, 4);
    assert.deepEqual(sequence.contiguousKv(0), { ok: false, reason: "not_adjacent" });
    const first = sequence.contiguousKv(0, 3);
    assert.ok(first.ok);
    assert.deepEqual(first.k, keys!.subarray(0, 9));
  });
  withSequence({ blockSize: 1 }, (sequence, _cache, random) => {
    const [keys] = extend(sequence, random, 1);
    const run = sequence.contiguousKv(0);
    assert.ok(run.ok);
    assert.deepEqual(run.k, keys);
    extend(sequence, random, 1);
    assert.deepEqual(sequence.contiguousKv(0), { ok: false, reason: "not_adjacent" });
  });
  withSequence({ kvHeadCount: 1, retention: { keep: "newest", tokens: 3 } }, (sequence, _cache, random) => {
    extend(sequence, random, 4);
    assert.deepEqual(sequence.contiguousKv(0), { ok: false, reason: "evicted" });
  });
});

test("arrays end with their blocks, and those of other blocks go on", () => {
  withSequence({}, (sequence, _cache, random) => {
    const [keys] = extend(sequence, random, 9);
    const arrays = sequence.packedViews(0)!.map(({ k }) => k);
    const [view] = sequence.views(0);
    sequence.truncate(5);
    assert.deepEqual(arrays.map(({ length }) => length), [24, 24, 0]);
    assert.equal(arrays[2]!.buffer.byteLength, 0);
    assert.deepEqual([...arrays[0]!.subarray(0, 3)], [...keys!.subarray(0, 3)]);
    assertCode("stale_view", () => view!.k);
    extend(sequence, random, 1);
    assert.equal(sequence.packedViews(0)![1]!.k.buffer, arrays[1]!.buffer);
    assertRefused(sequence, "position_out_of_range", () => sequence.truncate(60));
    assert.equal(arrays[1]!.length, 24);
    sequence.free();
    assert.deepEqual(arrays.map(({ length }) => length), [0, 0, 0]);
    assertCode("stale_view", () => view!.start);
  });
});

test("an append that copies a shared block takes its arrays away, a refused one does not", () => {
  withSequence({ maxSeqLen: 8 }, (parent, _cache, random) => {
    extend(parent, random, 6);
    const child = parent.fork();
    const own = child.packedViews(0)!.map(({ k }) => k), others = parent.packedViews(0)!.map(({ v }) => v);
    const views = child.views(1);
    assertRefused(child, "cache_full", () => child.append(0, random.floats(18), random.floats(18)));
    assertRefused(child, "not_finite", () => child.append(0, new Float32Array(6).fill(NaN), random.floats(6)));
    assert.deepEqual(own.map(({ length }) => length), [24, 24]);
    child.append(0, random.floats(6), random.floats(6));
    assert.deepEqual([...own, ...others].map(({ length }) => length), [24, 0, 24, 24]);
    // Layer 1 has the rows it had, but elsewhere: a view that would still look at the old block is stale.
    assertCode("stale_view", () => views[1]!.k);
    const [mine, theirs] = [child, parent].map((each) => each.views(1)[1]!.k!.subarray(0, 6));
    assert.deepEqual(mine, theirs);
  });
});

test("retention takes the arrays of the blocks it lets go", () => {
  withSequence({ retention: { keep: "newest", tokens: 4 } }, (sequence, _cache, random) => {
    extend(sequence, random, 6);
    const arrays = sequence.packedViews(1)!.map(({ k }) => k);
    extend(sequence, random, 1);
    assert.deepEqual(arrays.map(({ length }) => length), [24, 24]);
    const [view] = sequence.views(1);
    extend(sequence, random, 1);
    assert.deepEqual(arrays.map(({ length }) => length), [0, 24]);
    assertCode("stale_view", () => view!.k);
  });
});

test("an array whose buffer was transferred is nobody's, and a fresh one is made", () => {
  withSequence({}, (sequence, _cache, random) => {
    const [keys] = extend(sequence, random, 1);
    const [view] = sequence.packedViews(0)!;
    (view!.k.buffer as ArrayBuffer).transfer(0);
    assert.deepEqual([...view!.k.subarray(0, 3)], [...keys!.subarray(0, 3)]);
    sequence.free();
  });
});

test("options that free the sequence as they are read are met with stale_handle", () => {
  const attempts: ((sequence: Sequence, trap: () => undefined) => unknown)[] = [
    (sequence, trap) =>
      sequence.append(0, new Float32Array(6), new Float32Array(6), {
        get layout() {
          return trap() ?? "token_major" as const;
        },
      }),
    (sequence, trap) =>
      sequence.commit(0, {
        get kept() {
          return trap() ?? new Uint32Array(0);
        },
      }),
    (sequence, trap) =>
      sequence.gather(0, {
        get dtype() {
          return trap() ?? "f32" as const;
        },
      }),
    (sequence, trap) =>
      sequence.attend(0, new Float32Array(6), {
        get causal() {
          return trap() ?? true;
        },
      }),
  ];
  for (const attempt of attempts) {
    withSequence({}, (sequence) => {
      assertCode("stale_handle", () =>
        attempt(sequence, () => {
          sequence.free();
          return undefined;
        }));
    });
  }
});

test("the accepted path of a tree is what the rows of that path are alone", () => {
  withSequence({ blockSize: 4, headDim: 8 }, (sequence, cache, random) => {
    extend(sequence, random, 6);
    const plain = sequence.fork();
    // 0 - 1 - 3, 0 - 2 - 4 - 5: rows in that order, across two blocks.
    const treeParents = Int32Array.of(-1, 0, 0, 1, 2, 4);
    const path = [0, 2, 4, 5];
    const drafted = [0, 1].map(() => ({ k: random.floats(6 * 16), v: random.floats(6 * 16) }));
    const q = random.floats(6 * 32);
    const pick = (array: Float32Array, width: number) =>
      Float32Array.from(path.flatMap((row) => [...array.subarray(row * width, row * width + width)]));
    for (const [layer, { k, v }] of drafted.entries()) {
      sequence.append(layer, k, v);
      plain.append(layer, pick(k, 16), pick(v, 16));
      const all = sequence.attend(layer, q, { queryCount: 6, treeParents });
      const alone = plain.attend(layer, pick(q, 32), { queryCount: 4 });
      assert.ok(relativeError(pick(all, 32), alone) <= 1e-6);
    }
    const array = sequence.packedViews(0)![2]!.k;
    const [view] = sequence.views(0);
    const tokens = Uint32Array.from(path);
    sequence.commit(4, { kept: Uint32Array.from(path), tokens });
    plain.commit(4);
    assert.deepEqual([sequence.seqLen, array.length], [10, 2 * 4 * 8]);
    assertCode("stale_view", () => view!.k);
    for (const layer of [0, 1]) {
      assert.deepEqual(sequence.gather(layer), plain.gather(layer));
      assert.deepEqual(sequence.attend(layer, q.subarray(0, 32)), plain.attend(layer, q.subarray(0, 32)));
    }
    assert.equal(cache.stats().totalTokens, 20);
  });
});

test("kept rows may be all, none or the last; what does not fit is refused", () => {
  withSequence({}, (sequence, cache, random) => {
    const [keys] = extend(sequence, random, 3);
    const rows = random.floats(5 * 6);
    const append = (layers = [0, 1]) => layers.forEach((layer) => sequence.append(layer, rows, rows));
    append();
    assert.equal(cache.stats().blockCount, 2);
    sequence.commit(0, { kept: new Uint32Array(0) });
    assert.deepEqual([sequence.seqLen, sequence.gather(0).k, cache.stats().blockCount], [3, keys, 1]);
    append();
    const kept = (...indices: number[]) => ({ kept: Uint32Array.from(indices) });
    assertRefused(sequence, "invalid_size", () => sequence.commit(2, kept(1)), /kept must have as many rows: 1$/);
    assertRefused(sequence, "invalid_size", () => sequence.commit(2, kept(1, 1)), /ascending: layer 0 has 5/);
    assertRefused(sequence, "invalid_size", () => sequence.commit(2, kept(3, 1)));
    assertRefused(sequence, "invalid_size", () => sequence.commit(1, kept(5)));
    const tokens = new Uint32Array(2);
    assertRefused(sequence, "invalid_size", () => sequence.commit(1, { ...kept(0), tokens }), /tokens has 2$/);
    assert.throws(() => sequence.commit(1, { kept: [0] as unknown as Uint32Array }), TypeError);
    append([0]);
    assertRefused(sequence, "commit_mismatch", () => sequence.commit(1, kept(0)), /layer 0 has 10, layer 1 has 5/);
    append([1]);
    sequence.commit(1, kept(9));
    assert.deepEqual([...sequence.gather(1).k.subarray(18)], [...rows.subarray(24)]);
    append();
    sequence.commit(5, kept(0, 1, 2, 3, 4));
    assert.deepEqual([...sequence.gather(1).k.subarray(24)], [...rows]);
  });
});

test("layers of different shapes", () => {
  const layers = [{ kvHeadCount: 2, headDim: 4 }, { kvHeadCount: 1, headDim: 16 }, { kvHeadCount: 2, headDim: 4 }];
  using cache = new PagedCache({ layers, maxSeqLen: 64, blockSize: 4, dtype: "f32" });
  const sequence = cache.sequence();
  const random = new Random(8);
  const keys = extend(sequence, random, 7);
  assert.deepEqual([sequence.kvDim, sequence.layerShape(1)], [8, { kvHeadCount: 1, headDim: 16 }]);
  assertCode("layer_out_of_range", () => sequence.layerShape(3));
  for (const [layer, { kvHeadCount, headDim }] of layers.entries()) {
    const { k, v } = sequence.gather(layer) as { k: Float32Array; v: Float32Array };
    assert.deepEqual(k, keys[layer]);
    const q = random.floats(4 * headDim);
    const truth = attention({ q, k, v, queryCount: 1, qHeadCount: 4, kvHeadCount, headDim });
    assert.ok(relativeError(sequence.attend(layer, q), truth.output) <= 1e-5);
    const block = sequence.packedViews(layer)![1]!;
    assert.deepEqual([block.k.length, block.headDim, block.kvHeadCount], [
      4 * kvHeadCount * headDim,
      headDim,
      kvHeadCount,
    ]);
  }
  assertRefused(
    sequence,
    "invalid_size",
    () => sequence.append(1, random.floats(8), random.floats(8)),
    /of 16 elements/,
  );
  assertRefused(
    sequence,
    "invalid_size",
    () => sequence.attend(1, random.floats(8)),
    /q must be \[queryCount\]\[q heads\]\[headDim\], 1 \* a multiple of 1 \* 16 elements: q has 8/,
  );
});

test("a sequence is no object but its own", () => {
  withSequence({}, (sequence, cache) => {
    const row = new Float32Array(6);
    for (const wrong of [null, undefined, {}, 3, cache, Object.create(sequence)]) {
      const sequences = [wrong as Sequence];
      assert.throws(() => cache.append(0, row, row, { sequences }), TypeError);
      assert.throws(() => cache.reorder(sequences, [0]), TypeError);
    }
    assert.throws(() => cache.append(0, row, row, { sequences: sequence as unknown as Sequence[] }), TypeError);
  });
});

/** Runs `body` in a process that can collect garbage; it prints JSON. */
function collect(body: string): Record<string, number> {
  const { code, stdout, stderr } = runCode(
    `
    import { PagedCache, systemInfo } from "${MOD}";
    const options = { layerCount: 1, kvHeadCount: 1, headDim: 8, maxSeqLen: 64, blockSize: 4, dtype: "f32" };
    const row = new Float32Array(8).fill(3);
    async function settle(done) {
      for (let i = 0; i < 100 && !done(); i++) {
        "Bun" in globalThis ? Bun.gc(true) : gc();
        await new Promise((resolve) => setTimeout(resolve, 20));
      }
    }
    ${body}
    `,
    { denoFlags: ["-A", "--no-check", "--v8-flags=--expose-gc"] },
  );
  assert.equal(code, 0, stderr);
  return JSON.parse(stdout);
}

test("dropped sequences are freed, unless an array over them lives", { timeout: 60_000 }, () => {
  const result = collect(`
    const cache = new PagedCache(options);
    function drop() {
      const kept = [];
      for (let i = 0; i < 60; i++) {
        const sequence = cache.sequence();
        sequence.append(0, row, row);
        sequence.commit(1);
        if (i % 2 === 0) sequence.fork();
        if (i % 6 === 0) kept.push(sequence.views(0)[0].k);
        if (i % 6 === 3) kept.push(sequence.packedViews(0)[0].v.subarray(0, 8));
      }
      return kept;
    }
    globalThis.kept = drop();
    await settle(() => cache.stats().sequenceCount <= 20);
    let rounds = 0;
    await settle(() => ++rounds > 5);
    const { sequenceCount } = cache.stats();
    const sum = globalThis.kept.reduce((all, array) => all + array[0], 0);
    globalThis.kept = undefined;
    await settle(() => cache.stats().sequenceCount === 0);
    const last = cache.stats();
    console.log(JSON.stringify({
      sequenceCount, sum, last: last.sequenceCount, blocks: last.blockCount, live: systemInfo().liveCaches,
      finalized: systemInfo().finalizedCaches,
    }));
  `);
  assert.ok(result.sequenceCount! >= 20 && result.sequenceCount! <= 22, JSON.stringify(result));
  assert.equal(result.sum, 60);
  assert.ok(result.last! <= 2 && result.blocks! <= 2, JSON.stringify(result));
  assert.deepEqual([result.live, result.finalized], [1, 0]);
});

test("a dropped paged cache is freed and counted, and a sequence keeps it", { timeout: 60_000 }, () => {
  const result = collect(`
    function make() {
      const cache = new PagedCache(options);
      const sequence = cache.sequence();
      sequence.append(0, row, row);
      return sequence;
    }
    globalThis.kept = [make(), make().views(0)[0], make().views(0)[0].k, make().packedViews(0)[0]];
    for (let i = 0; i < 20; i++) make();
    await settle(() => systemInfo().finalizedCaches >= 19);
    const { liveCaches, finalizedCaches } = systemInfo();
    const value = globalThis.kept[0].gather(0).k[0] + globalThis.kept[1].k[0] + globalThis.kept[2][0] + globalThis.kept[3].v[0];
    globalThis.kept = undefined;
    await settle(() => systemInfo().liveCaches === 0);
    console.log(JSON.stringify({ liveCaches, finalizedCaches, value, last: systemInfo().liveCaches }));
  `);
  assert.ok(result.finalizedCaches! >= 18 && result.finalizedCaches! <= 20, JSON.stringify(result));
  assert.equal(result.liveCaches, 24 - result.finalizedCaches!);
  assert.equal(result.value, 12);
  assert.ok(result.last! <= 1, JSON.stringify(result));
});

test(`with a path-scoped --allow-ffi all works but zero-copy arrays of blocks${denoOnly}`, { skip: !inDeno }, () => {
  const { code, stdout, stderr } = runCode(
    `
    import { KvError, PagedCache } from "${MOD}";
    const cache = new PagedCache({ layerCount: 1, kvHeadCount: 1, headDim: 2, maxSeqLen: 8, blockSize: 2 });
    const sequence = cache.sequence();
    const row = Float32Array.of(1, 2);
    const appended = sequence.append(0, row, row);
    sequence.commit(1);
    const attempt = (call) => {
      try {
        return call();
      } catch (error) {
        return error instanceof KvError ? error.code : String(error);
      }
    };
    const views = [
      () => appended.views.length,
      () => sequence.views(0).length,
      () => sequence.packedViews(0).length,
      () => sequence.contiguousKv(0).ok,
    ].map(attempt);
    const child = sequence.fork();
    cache.append(0, Float32Array.of(3, 4, 5, 6), Float32Array.of(3, 4, 5, 6), { sequences: [sequence, child] });
    for (const each of [sequence, child]) each.commit(1);
    cache.reorder([sequence, child], [1, 1]);
    const works = [[...sequence.gather(0).k], sequence.attend(0, row).length, sequence.blockTable(0).length, appended.start];
    sequence.truncate(1);
    child.free();
    cache.reset();
    cache.free();
    console.log(JSON.stringify({ views, works }));
    `,
    { denoFlags: [`--allow-ffi=${systemInfo().libraryPath}`] },
  );
  assert.equal(code, 0, stderr);
  const expected = { views: new Array(4).fill("needs_permission"), works: [[1, 2, 5, 6], 2, 1, 0] };
  assert.deepEqual(JSON.parse(stdout), expected);
});
