/**
 * What every part of the fuzzer needs: chance, and the answers that were given.
 *
 * @module
 */

import { writeSync } from "node:fs";
import process from "node:process";
import { KvError } from "../mod.ts";
import { Random } from "./oracle.ts";

/** Counts and indices that are absurd for what they count, or at the edge of a type. */
export const ABSURD: readonly number[] = [
  0,
  1,
  2,
  7,
  8,
  255,
  256,
  257,
  65535,
  65536,
  2 ** 31 - 1,
  2 ** 31,
  2 ** 32 - 1,
];
/** Numbers that are no count at all. */
export const NO_COUNTS: readonly number[] = [NaN, -1, 1.5, 2 ** 32, -0, Infinity, 2 ** 53];

/** Chance with a seed, and a book of answers. */
export class Dice {
  readonly random: Random;
  /** How often each call had each answer. */
  readonly answers: Record<string, number> = {};
  ok = 0;
  refused = 0;
  readonly #trace: boolean;

  constructor(seed: number) {
    this.random = new Random(seed);
    this.#trace = process.env.KVERN_TRACE === "1";
  }

  /** A whole number below `end`. */
  below(end: number): number {
    return this.random.below(end);
  }

  /** True once in `n` times. */
  oneIn(n: number): boolean {
    return this.random.below(n) === 0;
  }

  pick<T>(from: readonly T[]): T {
    return from[this.random.below(from.length)]!;
  }

  /** An index below `end`, most of the time. */
  index(end: number): number {
    return this.oneIn(20) ? this.pick(this.oneIn(3) ? NO_COUNTS : ABSURD) : this.below(end);
  }

  /** A range of rows, head-major, most of the time one that may be there. */
  partOfRows(): { layout: "head_major"; start: number; count?: number; headStride?: number } {
    return {
      layout: "head_major",
      start: this.index(8),
      ...(this.oneIn(2) ? { count: this.index(8) } : {}),
      ...(this.oneIn(3) ? { headStride: 1 + this.below(2000) } : {}),
    };
  }

  /** Calls `body`; a refusal must be one of `codes`, or another error of a class named there. */
  attempt<T>(name: string, codes: string, body: () => T): T | undefined {
    this.trace(name);
    try {
      const result = body();
      this.note(name, "ok");
      return result;
    } catch (error) {
      const code = error instanceof KvError ? error.code : error instanceof Error ? error.constructor.name : "";
      if (!codes.split(" ").includes(code)) {
        throw new Error(`${name} gave ${code}, not one of: ${codes}`, { cause: error });
      }
      this.note(name, code);
      return undefined;
    }
  }

  /** Writes an answer into the book. */
  note(name: string, answer: string): void {
    if (answer === "ok") this.ok += 1;
    else this.refused += 1;
    const key = `${name}: ${answer}`;
    this.answers[key] = (this.answers[key] ?? 0) + 1;
  }

  /** Tells of a call before it is made. */
  trace(call: string): void {
    if (this.#trace) writeSync(2, `${call}\n`);
  }

  /** What must be true of an answer. */
  check(isTrue: boolean, what: string): void {
    if (!isTrue) throw new Error(what);
  }
}
