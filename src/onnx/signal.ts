/**
 * Signals that end a step.
 *
 * @module
 */

import { KvError } from "../error.ts";

/** Refuses what is no signal. */
export function checkIsSignal(signal: unknown): void {
  if (signal === undefined || signal instanceof AbortSignal) return;
  throw new TypeError(`signal must be an AbortSignal: ${signal === null ? "null" : typeof signal}`);
}

/** Ends what a signal ended. */
export function checkSignal(signal: AbortSignal | undefined): void {
  if (signal?.aborted) {
    throw new KvError("aborted", "Cannot finish the step as it was aborted", { cause: signal.reason });
  }
}
