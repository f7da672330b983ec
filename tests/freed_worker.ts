/** A Worker of freed_test.ts: makes, forks and frees sequences of a cache that another thread frees meanwhile. */

import { parentPort, workerData } from "node:worker_threads";
import { KvError, PagedCache } from "../mod.ts";

/** Until the cache is gone, which is what each call is to say then. */
function hammer(handle: number): string {
  try {
    const cache = PagedCache.attach(handle);
    const rows = new Float32Array(3 * 8).fill(1);
    const first = cache.sequence();
    first.append(0, rows, rows);
    first.commit(3);
    parentPort!.postMessage("started");
    for (let i = 0;; i++) {
      const sequence = i % 2 === 0 ? cache.sequence() : first.fork();
      sequence.append(0, rows, rows);
      sequence.free();
    }
  } catch (error) {
    return error instanceof KvError ? error.code : String(error);
  }
}

parentPort!.postMessage(hammer(workerData as number));
