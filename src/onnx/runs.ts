/**
 * How the tokens of a step are spread over runs of the model: a long prompt goes through it in parts, so that what lies
 * between its layers stays small.
 *
 * @module
 */

import type { Sequence } from "../sequence.ts";

/** The tokens that a step adds to one sequence. */
export interface Addition {
  readonly sequence: Sequence;
  /** Its length before the step. */
  readonly start: number;
  readonly tokens: Uint32Array;
}

/** Some of the tokens of an addition, in one run. */
export interface Part {
  /** Which addition of the step it is of. */
  readonly index: number;
  readonly sequence: Sequence;
  /** Where in the sequence its first token stands. */
  readonly position: number;
  readonly tokens: Uint32Array;
  /** Newest tokens of it whose logits are wanted. */
  readonly logitCount: number;
}

/** Runs of at most `tokensPerRun` tokens, in order; logits are wanted of all tokens, or of the last one of each sequence. */
export function runsOf(additions: readonly Addition[], tokensPerRun: number, allLogits: boolean): Part[][] {
  const runs: Part[][] = [];
  let room = 0;
  for (const [index, { sequence, start, tokens }] of additions.entries()) {
    for (let done = 0; done < tokens.length;) {
      if (room === 0) {
        runs.push([]);
        room = tokensPerRun;
      }
      const some = tokens.subarray(done, done + room);
      const isLast = done + some.length === tokens.length;
      const logitCount = allLogits ? some.length : isLast ? 1 : 0;
      runs.at(-1)!.push({ index, sequence, position: start + done, tokens: some, logitCount });
      done += some.length;
      room -= some.length;
    }
  }
  return runs;
}
