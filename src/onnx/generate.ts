/**
 * Writing on behind a text, token by token.
 *
 * @module
 */

import { KvError } from "../error.ts";
import { checkOption } from "../options/counts.ts";
import { checkOptions, type OptionNames, optionNames } from "../options/option_names.ts";
import { memoryOf, type Sequence } from "../sequence.ts";
import { type Sample, sampler, type SamplingOptions } from "./sampling.ts";
import { checkIsSignal } from "./signal.ts";
import { checkTokens } from "./tokens.ts";

/** Behind which text to write, how, and how far. */
export interface GenerateOptions extends SamplingOptions {
  /** Ids of the whole text so far, of which the sequence may have a beginning; at least one token more than it has. */
  readonly tokens: ArrayLike<number>;
  /** Most tokens to write; by default as many as the sequence has room for. */
  readonly maxTokens?: number;
  /**
   * What ends the text beside the model's `endTokens`: ids of tokens, which are not given out, and texts, behind the token
   * that completes one. Texts need `decode`.
   */
  readonly stop?: readonly (number | string)[];
  /** The text of some tokens that were written, as the model's tokenizer has it; for `stop`. */
  readonly decode?: (tokens: number[]) => string;
  /** Ends the writing with an error of the code `aborted`; the sequence has what was computed before. */
  readonly signal?: AbortSignal;
  /** Chooses a token by its logits, in place of `temperature`, `topP` and `seed`. */
  readonly sample?: Sample;
}

/** Why no more was written: a token or a text that ends it, `maxTokens`, or the end of the sequence. */
export type GenerateEnd = "stop" | "max_tokens" | "max_seq_len";

const GENERATE_NAMES: OptionNames = optionNames<GenerateOptions>({
  tokens: true,
  maxTokens: true,
  stop: true,
  decode: true,
  signal: true,
  sample: true,
  temperature: true,
  topP: true,
  seed: true,
});

/** The checked options. */
export interface GeneratePlan {
  readonly tokens: Uint32Array;
  readonly maxTokens: number;
  readonly endTokens: ReadonlySet<number>;
  readonly endTexts: readonly string[];
  readonly decode: (tokens: number[]) => string;
  readonly sample: Sample;
  readonly signal: AbortSignal | undefined;
  readonly vocabSize: number;
}

const GENERATE = "generate";

/** Reads the options, each once. */
export function readGenerate(
  options: GenerateOptions,
  endTokens: readonly number[],
  vocabSize: number,
): GeneratePlan {
  checkOptions(options, GENERATE_NAMES, GENERATE);
  const { tokens, maxTokens, stop = [], decode, signal, sample, temperature, topP, seed } = options;
  checkIsSignal(signal);
  if (!Array.isArray(stop)) throw new TypeError(`stop must be an array: ${typeof stop}`);
  const texts = stop.filter((end) => typeof end === "string");
  if (texts.includes("")) throw refuse("a text in stop must not be empty");
  if (texts.length > 0 && decode === undefined) {
    throw refuse(`a text in stop needs decode: it has ${JSON.stringify(texts[0])}`);
  }
  if (decode !== undefined && typeof decode !== "function") {
    throw new TypeError(`decode must be a function: ${typeof decode}`);
  }
  if (decode !== undefined && texts.length === 0) throw refuse("decode needs a text in stop: there is none");
  if (sample !== undefined) {
    if (typeof sample !== "function") throw new TypeError(`sample must be a function: ${typeof sample}`);
    const other = Object.entries({ temperature, topP, seed }).find(([, value]) => value !== undefined);
    if (other !== undefined) throw refuse(`sample and ${other[0]} exclude each other: both are given`);
  }
  return {
    tokens: checkTokens("tokens", tokens, vocabSize),
    maxTokens: maxTokens === undefined ? Infinity : checkOption("maxTokens", maxTokens, GENERATE),
    endTokens: new Set([
      ...endTokens,
      ...checkTokens("stop", stop.filter((end) => typeof end !== "string"), vocabSize),
    ]),
    endTexts: texts,
    decode: decode ?? (() => ""),
    sample: sample ?? sampler(given({ temperature, topP, seed })),
    signal,
    vocabSize,
  };
}

/** Writes on; `step` adds tokens to the sequence and gives the logits of the last one. */
export async function* generateTokens(
  sequence: Sequence,
  { tokens, maxTokens, endTokens, endTexts, decode, sample, vocabSize }: GeneratePlan,
  step: (tokens: Uint32Array) => Promise<Float32Array>,
): AsyncGenerator<number, GenerateEnd, void> {
  checkText(sequence, tokens);
  const written: number[] = [];
  let next = tokens.subarray(sequence.seqLen);
  while (true) {
    const token = sample(await step(next));
    if (token >>> 0 !== token || token >= vocabSize) {
      throw new RangeError(`sample must give an id below ${vocabSize}: it gave ${token}`);
    }
    if (endTokens.has(token)) return "stop";
    written.push(token);
    yield token;
    if (endsWithText(written, endTexts, decode)) return "stop";
    if (written.length === maxTokens) return "max_tokens";
    if (sequence.seqLen === sequence.maxSeqLen) return "max_seq_len";
    next = Uint32Array.of(token);
  }
}

/** Refuses tokens of which the sequence is known to have others, or all. */
function checkText(sequence: Sequence, tokens: Uint32Array): void {
  const { seqLen } = sequence;
  if (tokens.length <= seqLen) {
    throw refuse(
      `tokens must be the whole text, of which a token at least is yet to compute: it has ${tokens.length}, ` +
        `the sequence ${seqLen}`,
    );
  }
  if (seqLen === 0 || !memoryOf(sequence).cache.findsTokens || tokens.length > sequence.maxSeqLen) return;
  const { knownTokens, differs } = sequence.explain(tokens);
  if (differs === undefined || knownTokens >= seqLen) return;
  throw refuse(
    `tokens must begin with what the sequence has: token ${differs.at} is ${tokens[differs.at]}, ` +
      `that of the sequence is ${differs.id}`,
  );
}

/** Does what was written have one of the texts at its end, up to a token? */
function endsWithText(written: readonly number[], texts: readonly string[], decode: GeneratePlan["decode"]): boolean {
  if (texts.length === 0) return false;
  // A token has a byte at least and a letter four at most; some more, as the first ones may be parts of a letter.
  const tokenCount = 4 * Math.max(...texts.map(({ length }) => length)) + 8;
  const text = decode(written.slice(-tokenCount));
  return texts.some((end) => text.includes(end));
}

/** Options that are given. */
function given({ temperature, topP, seed }: Record<keyof SamplingOptions, number | undefined>): SamplingOptions {
  return {
    ...(temperature === undefined ? {} : { temperature }),
    ...(topP === undefined ? {} : { topP }),
    ...(seed === undefined ? {} : { seed }),
  };
}

function refuse(rule: string): KvError {
  return new KvError("invalid_config", `Cannot ${GENERATE} as ${rule}`);
}
