/** A Worker of worker_test.ts: attends over a cache another thread made, again and again. */

import { parentPort, workerData } from "node:worker_threads";
import { ContiguousCache, KvError } from "../mod.ts";

/** What the Worker is told. */
export interface Task {
  readonly handle: number;
  readonly sequence: number;
  readonly q: Float32Array;
  readonly repeats: number;
}

/** What it answers; `refused` is what it may not do with a cache it does not own, or why it could not attach. */
export interface Answer {
  readonly output?: Float32Array;
  readonly different?: number;
  readonly refused: string;
  readonly seqLen?: number;
}

function answer({ handle, sequence, q, repeats }: Task): Answer {
  let cache;
  try {
    cache = ContiguousCache.attach(handle);
  } catch (error) {
    return { refused: error instanceof KvError ? error.code : String(error) };
  }
  const rows = cache.sequence(sequence);
  const output = rows.attend(0, q);
  const into = new Float32Array(q.length);
  let different = 0;
  for (let i = 0; i < repeats; i++) {
    rows.attend(0, q, { into });
    if (into.some((value, d) => value !== output[d])) different += 1;
  }
  let refused = "nothing";
  try {
    cache.getKeys(0, sequence);
  } catch (error) {
    refused = error instanceof KvError ? error.code : String(error);
  }
  cache.free();
  // The owner's cache outlives the attached object that was just freed.
  const seqLen = ContiguousCache.attach(handle).getSeqLen(sequence);
  return { output, different, refused, seqLen };
}

parentPort!.postMessage(answer(workerData as Task));
