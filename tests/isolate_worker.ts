/** A Worker of isolate_test.ts and owner_test.ts: does one task, and says what came of it. */

import process from "node:process";
import { parentPort, workerData } from "node:worker_threads";
import { KvError, PagedCache, Sequence, setThreadCount, systemInfo } from "../mod.ts";

/** What a Worker is to do. */
export type Task =
  | {
    /** Says what the library is set to, with this environment and after `setThreadCount(threads)`. */
    readonly kind: "settings";
    readonly env: Readonly<Record<string, string>>;
    readonly threads?: number;
  }
  | {
    /** Makes a sequence of so many rows of 8 numbers, with a fork, and keeps both; until it is terminated. */
    readonly kind: "leave";
    readonly handle: number;
    readonly rows: number;
  }
  | {
    /** Reads layer 1 of a sequence of two layers, and appends a row to forks of it. */
    readonly kind: "sequence";
    readonly handle: number;
    readonly q: Float32Array;
    readonly row: Float32Array;
  };

/** What came of it: `refused` is the code and the text of an error. */
export type Answer =
  | { readonly level: string; readonly threadCount: number }
  | { readonly rows: number }
  | { readonly read: Readonly<Record<string, unknown>>; readonly forked: number[] }
  | { readonly refused: string; readonly message: string };

const kept: unknown[] = [];

function run(task: Task): Answer {
  if (task.kind === "leave") {
    const cache = PagedCache.attach(task.handle);
    const sequence = cache.sequence();
    const rows = new Float32Array(task.rows * 8).fill(1);
    sequence.append(0, rows, rows);
    sequence.commit(task.rows);
    kept.push(cache, sequence, sequence.fork());
    return { rows: sequence.seqLen };
  }
  if (task.kind === "sequence") {
    const attached = Sequence.attach(task.handle);
    using child = attached.fork();
    step(child, task.row);
    using grandchild = child.fork();
    step(grandchild, task.row);
    const read = {
      seqLen: attached.seqLen,
      gathered: attached.gather(1).k,
      attended: attached.attend(1, task.q),
      blocks: attached.blockTable(1),
    };
    return { read, forked: [child.seqLen, grandchild.seqLen] };
  }
  for (const [name, value] of Object.entries(task.env)) setVariable(name, value);
  try {
    if (task.threads !== undefined) setThreadCount(task.threads);
    const { level, threadCount } = systemInfo();
    return { level, threadCount };
  } finally {
    for (const name of Object.keys(task.env)) setVariable(name, undefined);
  }
}

/** In Deno the process has one environment, of which `process.env` of a Worker is a copy. */
function setVariable(name: string, value: string | undefined): void {
  const { Deno } = globalThis as unknown as {
    Deno?: { readonly env: { set(name: string, value: string): void; delete(name: string): void } };
  };
  if (value === undefined) {
    delete process.env[name];
    Deno?.env.delete(name);
  } else {
    process.env[name] = value;
    Deno?.env.set(name, value);
  }
}

function step(sequence: Sequence, row: Float32Array): void {
  for (let layer = 0; layer < sequence.layerCount; layer++) sequence.append(layer, row, row);
  sequence.commit(1);
}

function attempt(task: Task): Answer {
  try {
    return run(task);
  } catch (error) {
    if (!(error instanceof KvError)) throw error;
    return { refused: error.code, message: error.message };
  }
}

parentPort!.postMessage(attempt(workerData as Task));
