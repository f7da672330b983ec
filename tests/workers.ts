/** Runs tasks in Workers, for tests of what several threads of a process share. */

import { Worker } from "node:worker_threads";
import type { Answer, Task } from "./isolate_worker.ts";

/** Does a task in a Worker of its own, which has ended when the answer is here. */
export async function inWorker(task: Task): Promise<Answer> {
  const { promise, resolve, reject } = Promise.withResolvers<Answer>();
  const worker = new Worker(new URL("./isolate_worker.ts", import.meta.url), { workerData: task });
  worker.once("message", resolve);
  worker.once("error", reject);
  try {
    return await promise;
  } finally {
    await worker.terminate();
  }
}
