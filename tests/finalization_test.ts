/** Caches that are dropped without free(): freed, counted, and never while an array over them lives. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { MOD, runCode } from "./child.ts";

/** Runs `body` in a process that can collect garbage; it prints JSON. */
function collect(body: string): unknown {
  const { code, stdout, stderr } = runCode(
    `
    import { BufferPool, ContiguousCache, PagedCache, systemInfo } from "${MOD}";
    const options = { layerCount: 2, kvHeadCount: 1, headDim: 8, maxSeqLen: 64 };
    const row = new Float32Array(8).fill(3);
    /** Collects until \`done\`, or for two seconds. */
    async function settle(done) {
      for (let i = 0; i < 100 && !done(systemInfo()); i++) {
        "Bun" in globalThis ? Bun.gc(true) : gc();
        await new Promise((resolve) => setTimeout(resolve, 20));
      }
      const { liveCaches, finalizedCaches, reservedBytes } = systemInfo();
      return { liveCaches, finalizedCaches, reservedBytes };
    }
    ${body}
    `,
    { denoFlags: ["-A", "--no-check", "--v8-flags=--expose-gc"] },
  );
  assert.equal(code, 0, stderr);
  return JSON.parse(stdout);
}

test("dropped caches are freed and counted, freed ones are not", { timeout: 60_000 }, () => {
  const result = collect(`
    function drop() {
      for (let i = 0; i < 50; i++) {
        const cache = new ContiguousCache(options);
        cache.append(0, 0, row, row);
        if (i % 2 === 0) cache.getKeys(0, 0);
        if (i % 3 === 0) cache.sequence(0).views(0)[0].k;
      }
      for (let i = 0; i < 50; i++) new ContiguousCache(options).free();
    }
    drop();
    console.log(JSON.stringify(await settle((info) => info.finalizedCaches === 50)));
  `) as { liveCaches: number; finalizedCaches: number; reservedBytes: number };
  // The last object may be seen on the stack by a collector that looks there.
  assert.ok(result.finalizedCaches >= 48 && result.finalizedCaches <= 50, JSON.stringify(result));
  assert.equal(result.liveCaches, 50 - result.finalizedCaches);
  if (result.liveCaches === 0) assert.equal(result.reservedBytes, 0);
});

test("whatever is left of a cache keeps it", { timeout: 60_000 }, () => {
  const result = collect(`
    const leave = [
      (cache) => cache.getKeys(0, 0),
      (cache) => cache.getValues(0, 0).subarray(0, 4),
      (cache) => cache.getKeys(0, 0).buffer,
      (cache) => cache.sequence(0).contiguousKv(0).v,
      (cache) => cache.sequence(0).views(0)[0].k,
      (cache) => cache.sequence(0).views(0)[0],
      (cache) => cache.append(1, 0, row, row),
      (cache) => cache.sequence(0),
    ];
    function make(left) {
      const cache = new ContiguousCache(options);
      cache.append(0, 0, row, row);
      return left(cache);
    }
    globalThis.kept = leave.map(make);
    for (let i = 0; i < 20; i++) new ContiguousCache(options); // so that something can be seen to be collected
    const first = await settle((info) => info.finalizedCaches >= 18);
    let rounds = 0;
    const then = await settle(() => ++rounds > 10);
    const values = globalThis.kept.map((left) => {
      const array = left.gather?.(0).k ?? left.views?.[0].k ?? left.k ?? left;
      return new Float32Array(array.buffer ?? array)[0];
    });
    globalThis.kept = undefined;
    const last = await settle((info) => info.liveCaches === 0);
    console.log(JSON.stringify({ first, then, values, last }));
  `) as Record<"first" | "then" | "last", Record<string, number>> & { values: number[] };
  assert.deepEqual(result.values, new Array(8).fill(3));
  assert.ok(result.first.finalizedCaches! >= 18, JSON.stringify(result));
  assert.ok(result.then.liveCaches! >= 8 && result.then.finalizedCaches! <= 20, JSON.stringify(result));
  assert.ok(result.last.finalizedCaches! >= 26, JSON.stringify(result));
});

test("what is dropped where the event loop turns is freed before it is a gigabyte", { timeout: 120_000 }, () => {
  // 400 objects of 4 to 16 MiB of each kind; one row is written to each, so that the test needs little memory.
  const result = collect(`
    const shape = { layerCount: 4, kvHeadCount: 8, headDim: 128, maxSeqLen: 256, dtype: "f32" };
    const rows = new Float32Array(1024);
    const cache = new PagedCache({ ...shape, blockSize: 256, maxBytes: 2 ** 33 });
    const pool = new BufferPool({ buffersPerClass: 1 });
    const makers = {
      contiguous: () => new ContiguousCache(shape).append(0, 0, rows, rows),
      paged: () => new PagedCache({ ...shape, layerCount: 1 }).sequence().append(0, rows, rows),
      sequences: () => cache.sequence().append(0, rows, rows),
      buffers: () => pool.acquire(2 ** 22),
    };
    const peaks = {};
    for (const [kind, make] of Object.entries(makers)) {
      const before = systemInfo().reservedBytes;
      let peak = 0;
      for (let i = 0; i < 400; i++) {
        make();
        peak = Math.max(peak, systemInfo().reservedBytes - before);
        await new Promise((resolve) => setTimeout(resolve, 0));
      }
      peaks[kind] = peak;
    }
    console.log(JSON.stringify(peaks));
  `) as Record<string, number>;
  assert.deepEqual(Object.keys(result), ["contiguous", "paged", "sequences", "buffers"]);
  for (const [kind, peak] of Object.entries(result)) assert.ok(peak < 1e9, `${kind}: ${peak} bytes`);
});
