/** A Worker of tests: writes random bits into shared memory, which another thread is using, until told to end. */

import { parentPort, workerData } from "node:worker_threads";

/** What the Worker is told: the memory, and a word that is not 0 once it has had enough. */
export interface Scribble {
  readonly memory: SharedArrayBuffer;
  readonly stop: SharedArrayBuffer;
  /** The words to choose from; any bits where there are none. */
  readonly words?: readonly number[];
}

const { memory, stop, words } = workerData as Scribble;
const bits = new Uint32Array(memory), stopped = new Int32Array(stop);
let state = 1;
parentPort!.postMessage("writing");
while (Atomics.load(stopped, 0) === 0) {
  for (let i = 0; i < bits.length; i++) {
    state = Math.imul(state, 1664525) + 1013904223 | 0;
    if (words !== undefined) {
      bits[i] = words[(state >>> 8) % words.length]!;
      continue;
    }
    // Half of them small floats, half anything: NaN, infinities, numbers that overflow.
    bits[i] = state & 1024 ? state : 0x3f000000 | state >>> 9;
  }
}
