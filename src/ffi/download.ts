/**
 * Downloads a file of known size while the caller waits, or while it does something else: a Worker of its own fetches,
 * and writes into memory that both share.
 *
 * @module
 */

/** A download that has begun. */
export interface Download {
  /** Waits without giving way to anything else, and returns the file. */
  blocking(): Uint8Array<ArrayBuffer>;
  /** Waits as promises do. */
  promise(): Promise<Uint8Array<ArrayBuffer>>;
}

/** The words before the file in the shared memory, and what the first of them may say; the Worker has its own copies. */
const STATE = 0, RECEIVED = 1, WORDS = 2;
const RUNNING = 0, DONE = 1;

/** A server that says nothing for so long is given up. */
const SILENCE_MS = 30_000;

/** The reason of a failure is no longer. */
const REASON_BYTES = 1024;

/**
 * Begins to download `url`. A file of another size than `bytes` ends early: what there was of it is given, up to one byte
 * more, and is no match for whoever compares.
 *
 * @throws (both ways of waiting) {Error} with the reason, in words
 */
export function download(url: URL, bytes: number): Download {
  const shared = new SharedArrayBuffer(WORDS * 4 + Math.max(bytes + 1, REASON_BYTES));
  const words = new Int32Array(shared, 0, WORDS);
  const worker = new Worker(`data:text/javascript,${encodeURIComponent(`(${work})(self)`)}`, { type: "module" });
  const ended = new Promise<void>((resolve) => worker.onmessage = () => resolve());
  worker.postMessage({ url: url.href, shared });

  const result = (): Uint8Array<ArrayBuffer> => {
    worker.terminate();
    const received = Uint8Array.from(new Uint8Array(shared, WORDS * 4, words[RECEIVED]!));
    if (words[STATE] === DONE) return received;
    throw new Error(
      words[STATE] === RUNNING ? `nothing came for ${SILENCE_MS / 1000} s` : new TextDecoder().decode(received),
    );
  };
  return {
    blocking() {
      for (let before = -1; before !== words[RECEIVED];) {
        before = words[RECEIVED]!;
        if (Atomics.wait(words, STATE, RUNNING, SILENCE_MS) !== "timed-out") break;
      }
      return result();
    },
    async promise() {
      let before = -1;
      let timer: ReturnType<typeof setInterval> | undefined;
      const silent = new Promise<void>((resolve) => {
        timer = setInterval(() => {
          if (before === words[RECEIVED]) resolve();
          before = words[RECEIVED]!;
        }, SILENCE_MS);
      });
      await Promise.race([ended, silent]);
      clearInterval(timer);
      return result();
    },
  };
}

/** What a Worker calls `self`. */
interface Scope {
  onmessage: (event: MessageEvent<{ url: string; shared: SharedArrayBuffer }>) => void;
  postMessage(message: unknown): void;
}

/** Runs in the Worker, from its text alone, and names nothing outside. */
function work(scope: Scope): void {
  scope.onmessage = async ({ data }) => {
    const state = new Int32Array(data.shared, 0, 1), count = new Int32Array(data.shared, 4, 1);
    const file = new Uint8Array(data.shared, 8);
    let ending = 1;
    try {
      const response = await fetch(data.url);
      if (!response.ok || response.body === null) throw new Error(`the server answered ${response.status}`);
      for await (const part of response.body) {
        const taken = part.subarray(0, file.length - count[0]!);
        file.set(taken, count[0]);
        Atomics.add(count, 0, taken.length);
        if (count[0] === file.length) break;
      }
    } catch (error) {
      const reason = new TextEncoder().encode(error instanceof Error ? error.message : String(error)).subarray(0, 1024);
      file.set(reason);
      Atomics.store(count, 0, reason.length);
      ending = 2;
    }
    Atomics.store(state, 0, ending);
    Atomics.notify(state, 0);
    scope.postMessage("ended");
  };
}
