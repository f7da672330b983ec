/**
 * Every verb of what another thread resets and frees meanwhile. Each call does what it says or is refused with a typed
 * error, the process lives, and what was freed has given everything back.
 *
 * `KVERN_HOSTILE_CALLS=20000` frees more caches than those of every day.
 */

import assert from "node:assert/strict";
import process from "node:process";
import { test } from "node:test";
import { Worker } from "node:worker_threads";
import { BlockPool, BufferPool, ContiguousCache, PagedCache, systemInfo } from "../mod.ts";
import { call, goodWords } from "./abi_calls.ts";
import type { Endings, Target } from "./hostile_free_worker.ts";

/** Each round begins Workers, which takes far longer than its calls. */
const ROUNDS = Math.ceil(Number(process.env.KVERN_HOSTILE_CALLS ?? 400) / 200);

const SHAPE = { layerCount: 1, kvHeadCount: 2, headDim: 32 } as const;
const KV_DIM = 64;

/** A Worker that uses `target`: when every verb of it has gone through, and how the calls ended. */
function hammer(target: Target): { started: Promise<void>; ended: Promise<Endings> } {
  const started = Promise.withResolvers<void>(), ended = Promise.withResolvers<Endings>();
  const worker = new Worker(new URL("./hostile_free_worker.ts", import.meta.url), { workerData: target });
  worker.on("message", (message: Endings | "started") => {
    if (message === "started") started.resolve();
    else ended.resolve(message);
  });
  worker.once("error", (error) => {
    started.reject(error);
    ended.reject(error);
  });
  return { started: started.promise, ended: ended.promise.finally(() => worker.terminate()) };
}

/** What the process holds. */
function held(): number[] {
  const { liveCaches, reservedBytes } = systemInfo();
  return [liveCaches, reservedBytes];
}

/**
 * Workers use `targets`; once every verb has gone through, `disturb` is called while they go on, and `free` under their
 * hands. No verb may end in another way than well or with one of `codes`.
 */
async function freeUnderHands(
  targets: Target[],
  disturb: (turn: number) => void,
  free: () => void,
  codes: readonly string[],
): Promise<void> {
  const workers = targets.map(hammer);
  await Promise.all(workers.map(({ started }) => started));
  for (let turn = 0; turn < 30; turn++) {
    disturb(turn);
    await new Promise((resolve) => setTimeout(resolve, 0)); // on one core, a turn for the others
  }
  free();
  for (const endings of await Promise.all(workers.map(({ ended }) => ended))) {
    for (const [verb, counts] of Object.entries(endings)) {
      for (const ending of Object.keys(counts)) {
        assert.ok(ending === "ok" || codes.includes(ending), `${verb}: ${ending}`);
      }
      assert.ok("ok" in counts || ARRAYS.includes(verb), `${verb}: ${JSON.stringify(counts)}`);
    }
  }
}

/** Refusals that come of what other threads do to the same rows, and of being too late. */
const CODES = [
  "stale_handle",
  "commit_mismatch",
  "cache_full",
  "position_out_of_range",
  "unsupported",
  "invalid_size",
  "stale_view",
];

/** What an attached cache cannot do but where there is no row: nobody could detach the arrays. */
const ARRAYS = ["sequence.contiguousKv", "sequence.views", "sequence.packedViews", "getKeys", "getValues"];

test("a contiguous cache that is reset and freed under the hands of Workers", { timeout: 120_000 }, async () => {
  const before = held();
  for (let round = 0; round < ROUNDS; round++) {
    const cache = new ContiguousCache({ ...SHAPE, maxSeqLen: 256, sequenceCount: 2 });
    const row = new Float32Array(KV_DIM).fill(1), sequence = cache.sequence(1);
    const target: Target = { kind: "contiguous", cache: cache.handle };
    await freeUnderHands(
      [target, target],
      (turn) => {
        if (turn % 3 === 0) cache.reset();
        try {
          sequence.append(0, row, row);
        } catch (error) {
          assert.match(String(error), /holds at most/);
        }
      },
      () => cache.free(),
      CODES,
    );
  }
  assert.deepEqual(held(), before);
});

test("a paged cache that is reset and freed under the hands of Workers", { timeout: 120_000 }, async () => {
  const before = held();
  for (let round = 0; round < ROUNDS; round++) {
    using pool = new BlockPool({ ...SHAPE });
    const inPool = round % 2 === 0;
    const cache = new PagedCache({
      ...SHAPE,
      maxSeqLen: 512,
      store: "q8_0",
      tail: { tokens: 64 },
      measureFidelity: true,
      ...(inPool ? { pool } : {}),
    });
    const sequence = cache.sequence(), rows = new Float32Array(70 * KV_DIM).fill(1);
    sequence.append(0, rows, rows);
    sequence.commit(70);
    const target: Target = { kind: "paged", cache: cache.handle, sequence: sequence.handle, isOnly: false };
    await freeUnderHands(
      [target, target],
      (turn) => {
        if (turn % 10 === 9) cache.reset();
        else sequence.truncate(Math.min(sequence.seqLen, 70 - turn));
        sequence.append(0, rows, rows);
        sequence.commit(70);
        sequence.truncate(70);
        if (inPool && turn === 25) pool.free(); // its blocks are the cache's as long as that lives
      },
      () => cache.free(),
      [...CODES, "pool_empty"],
    );
    if (!inPool) assert.equal(pool.stats().usedBlocks, 0);
  }
  assert.deepEqual(held(), before);
});

test("a sequence that is freed under the hands of those who read and fork it", { timeout: 120_000 }, async () => {
  const before = held();
  for (let round = 0; round < ROUNDS; round++) {
    const cache = new PagedCache({ ...SHAPE, maxSeqLen: 512, store: "q8_0", measureFidelity: true });
    const make = () => {
      const sequence = cache.sequence(), rows = new Float32Array(70 * KV_DIM).fill(1);
      sequence.append(0, rows, rows);
      sequence.commit(70);
      return sequence;
    };
    const sequences = [make(), make()];
    const targets = sequences.map(({ handle }): Target => ({
      kind: "paged",
      cache: cache.handle,
      sequence: handle,
      isOnly: false,
    }));
    await freeUnderHands(
      targets,
      (turn) => {
        if (turn === 10 || turn === 20) sequences[turn / 10 - 1]!.free();
        make().free();
      },
      () => cache.free(),
      CODES,
    );
  }
  assert.deepEqual(held(), before);
});

/** A handle of what has no `attach`: the C ABI is all another thread has of it. */
const NATIVE: Record<Exclude<Target["kind"], "contiguous" | "paged">, () => { handle: number; free: () => void }> = {
  "block pool": () => made("kv_pool_create", "kv_pool_free"),
  "buffer pool": () => made("kv_buffer_pool_create", "kv_buffer_pool_free"),
  buffer: () => {
    const pool = made("kv_buffer_pool_create", "kv_buffer_pool_free");
    const handle = call("kv_buffer_acquire", [pool.handle, 4096]);
    return {
      handle,
      free: () => {
        call("kv_buffer_free", [handle]);
        pool.free();
      },
    };
  },
};

function made(
  create: "kv_pool_create" | "kv_buffer_pool_create",
  free: "kv_pool_free" | "kv_buffer_pool_free",
): { handle: number; free: () => void } {
  const handle = call(create, goodWords(create));
  assert.ok(handle > 0, `${create}: ${handle}`);
  return { handle, free: () => assert.equal(call(free, [handle]), 0) };
}

for (const [kind, make] of Object.entries(NATIVE)) {
  test(`a ${kind} that is freed under the hands of Workers`, { timeout: 120_000 }, async () => {
    const before = held();
    for (let round = 0; round < ROUNDS; round++) {
      const { handle, free } = make();
      const target = { kind, handle } as Target;
      await freeUnderHands([target, target], () => {}, free, ["-12", "-5"]);
    }
    assert.deepEqual(held(), before);
  });
}

test("buffers of a pool that is freed stay whole until they are freed", () => {
  const before = held();
  const pool = new BufferPool(), buffer = pool.acquire(4096), clone = buffer.clone();
  pool.free();
  buffer.extend(Float32Array.of(1, 2));
  assert.deepEqual([buffer.length, clone.length], [2, 0]);
  buffer.free();
  clone.free();
  assert.deepEqual(held(), before);
});
