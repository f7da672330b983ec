/** A Worker of tests: writes random bits into shared memory, which another thread is using, until told to end. */

import { parentPort, workerData } from "node:worker_threads";

/** What the Worker is told: the memory, and a word that is not 0 once it has had enough. */
export interface Scribble {
  readonly memory: SharedArrayBuffer;
  readonly stop: SharedArrayBuffer;
  /** The words to choose from; any bits where there are none. */
  readonly words?: readonly number[];
  /** Writes one word into all of the memory before it takes the next; by default each element has a word of its own. */
  readonly inTurn?: boolean;
}

const { memory, stop, words, inTurn = false } = workerData as Scribble;
const bits = new Uint32Array(memory), stopped = new Int32Array(stop);
let state = 1;
parentPort!.postMessage("writing");
for (let turn = 0; Atomics.load(stopped, 0) === 0; turn++) {
  for (let i = 0; i < bits.length; i++) {
    state = Math.imul(state, 1664525) + 1013904223 | 0;
    if (words !== undefined) {
      bits[i] = words[(inTurn ? turn : state >>> 8) % words.length]!;
      continue;
    }
    // In one turn small floats; in the next half of them anything: NaN, infinities, numbers that overflow. So whoever
    // reads meets both, however seldom this thread has a core.
    bits[i] = turn % 2 === 1 && state & 1024 ? state : 0x3f000000 | state >>> 9;
  }
}
