/** A Worker of worker_test.ts: lives in a tiered cache another thread made, with a sequence and policies of its own. */

import { parentPort, workerData } from "node:worker_threads";
import { PagedCache, type Policy } from "../mod.ts";

/** What the Worker is told. */
export interface TiersTask {
  readonly handle: number;
  readonly steps: number;
  readonly policies: readonly Policy[];
}

/** How far its rows are from those it appended at most, how many there are, and how they count in the tiers. */
export interface TiersAnswer {
  readonly worst: number;
  readonly seqLen: number;
  readonly tiers: readonly (string | null)[];
}

function answer({ handle, steps, policies }: TiersTask): TiersAnswer {
  const cache = PagedCache.attach(handle);
  const sequence = cache.sequence();
  const rows = (first: number, n: number) =>
    Float32Array.from({ length: n * cache.kvDim }, (_, i) => Math.sin(first * cache.kvDim + i));
  for (let step = 0; step < steps; step++) {
    const first = sequence.seqLen, n = 1 + step % 40;
    sequence.append(0, rows(first, n), rows(first, n));
    sequence.commit(n);
    cache.updatePolicy(policies[step % policies.length]!);
    cache.stats();
    if (step % 10 === 9) sequence.truncate(sequence.seqLen - 5);
  }
  const { seqLen } = sequence;
  const expected = rows(0, seqLen);
  const { k, v } = sequence.gather(0) as { k: Float32Array; v: Float32Array };
  let worst = k.length === expected.length ? 0 : Infinity;
  for (const side of [k, v]) side.forEach((value, i) => worst = Math.max(worst, Math.abs(value - expected[i]!)));
  const tiers = sequence.blockTiers(0);
  cache.free();
  return { worst, seqLen, tiers };
}

parentPort!.postMessage(answer(workerData as TiersTask));
