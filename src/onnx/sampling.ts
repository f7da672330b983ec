/**
 * From logits to a token.
 *
 * @module
 */

import { KvError } from "../error.ts";
import { checkCount } from "../options/counts.ts";
import { givenOptions, type OptionNames, optionNames } from "../options/option_names.ts";

/** How a token is chosen. */
export interface SamplingOptions {
  /**
   * Divides the logits: below 1 for likelier tokens, above for others; 0, the default, takes the likeliest one, whatever
   * `topP` and `seed` are.
   */
  readonly temperature?: number;
  /** Chooses among the fewest likeliest tokens whose probabilities are this much together, above 0 and up to 1, the default. */
  readonly topP?: number;
  /** Names the random numbers: the same seed gives the same tokens in one runtime; another one each time by default. */
  readonly seed?: number;
}

const SAMPLING_NAMES: OptionNames = optionNames<SamplingOptions>({ temperature: true, topP: true, seed: true });

/** Chooses a token by its logits `[vocab]`, which it may change. */
export type Sample = (logits: Float32Array) => number;

/**
 * Makes what `generate` chooses tokens with.
 *
 * Across runtimes the tokens of one seed may part ways, as `Math.exp` does not give the same last bit everywhere.
 *
 * @example The likeliest of the tokens that are allowed
 * ```ts
 * import assert from "node:assert/strict";
 * import { sampler } from "@kvern/kvern/onnx";
 *
 * const likeliest = sampler({ temperature: 0 });
 * const sample = (logits: Float32Array) => likeliest(logits.fill(-Infinity, 2));
 * assert.equal(sample(Float32Array.of(1, 2, 4, 3)), 1);
 * ```
 *
 * @throws {TypeError} an option of the wrong type
 * @throws {KvError} `invalid_config`; its function `not_finite` for logits of which none is a number, or that have NaN
 */
export function sampler(options?: SamplingOptions): Sample {
  const { temperature = 0, topP = 1, seed } = givenOptions(options, SAMPLING_NAMES, "choose tokens");
  checkNumber("temperature", temperature);
  checkNumber("topP", topP);
  if (seed !== undefined) checkCount("seed", seed);
  if (temperature < 0) throw refuse(`temperature must be at least 0: temperature is ${temperature}`);
  if (topP <= 0 || topP > 1) throw refuse(`topP must be above 0 and at most 1: topP is ${topP}`);
  if (temperature === 0) return likeliestOf;
  const next = randomNumbers(seed ?? Math.floor(Math.random() * 2 ** 32));
  return (logits) => draw(termsOf(logits, temperature), topP, next());
}

/** The token of the largest logit, the first of them on a tie. */
function likeliestOf(logits: Float32Array): number {
  let best = 0;
  for (let token = 0; token < logits.length; token++) {
    const logit = logits[token]!;
    if (logit !== logit) throw noNumber(token);
    if (logit > logits[best]!) best = token;
  }
  if (Number.isFinite(logits[best])) return best;
  throw noNumber(best, logits[best]);
}

/** Multiples of the probabilities, of which the largest is 1. */
function termsOf(logits: Float32Array, temperature: number): Float64Array {
  const largest = logits[likeliestOf(logits)]!;
  return Float64Array.from(logits, (logit) => logit === largest ? 1 : Math.exp((logit - largest) / temperature));
}

/** The token that a random number below 1 falls on, among the likeliest ones that are `topP` of all together. */
function draw(terms: Float64Array, topP: number, random: number): number {
  const sum = terms.reduce((sum, term) => sum + term, 0);
  if (topP === 1) return fallOn(terms, terms.keys(), random * sum);
  // A token below this cannot be among them: all such together are less than what may be left out.
  const least = (1 - topP) * sum / terms.length;
  const tokens = Array.from(terms.keys()).filter((token) => terms[token]! >= least)
    .sort((a, b) => terms[b]! - terms[a]! || a - b);
  let kept = 0;
  const end = tokens.findIndex((token) => (kept += terms[token]!) >= topP * sum);
  return fallOn(terms, end < 0 ? tokens : tokens.slice(0, end + 1), random * kept);
}

/** The first of the tokens at which the sum of the terms passes a number. */
function fallOn(terms: Float64Array, tokens: Iterable<number>, at: number): number {
  let rest = at;
  let likeliest = 0;
  for (const token of tokens) {
    if (terms[token]! > terms[likeliest]!) likeliest = token;
    rest -= terms[token]!;
    if (rest < 0) return token;
  }
  return likeliest; // the sum and the subtractions round differently
}

/** Random numbers in [0, 1), in steps of 2^-32 (mulberry32); not for secrets. */
function randomNumbers(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

function checkNumber(name: string, value: unknown): void {
  if (typeof value !== "number") {
    throw new TypeError(`${name} must be a number: ${value === null ? "null" : typeof value}`);
  }
  if (!Number.isFinite(value)) throw new RangeError(`${name} must be finite: ${value}`);
}

function noNumber(token: number, logit: number = NaN): KvError {
  return new KvError(
    "not_finite",
    `Cannot choose a token as a logit must be a number: that of token ${token} is ${logit}`,
  );
}

function refuse(rule: string): KvError {
  return new KvError("invalid_config", `Cannot choose tokens as ${rule}`);
}
