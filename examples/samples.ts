/**
 * Several texts behind one prompt. The prompt goes through the model once; then each text has a sequence of its own,
 * forked from the prompt's, and one step runs the next byte of all of them.
 */
import type { PagedCache, Sequence } from "../mod.ts";
import { Random, sample } from "./sampling.ts";
import { batchStep } from "./step.ts";
import type { Ziglet } from "./ziglet.ts";

/** One of the texts. */
export interface Sample {
  /** 1 for the first. */
  number: number;
  /** Its bytes behind the prompt. */
  bytes: number[];
  /** Whether the model ended it; else it has all bytes, or the context is full. */
  ended: boolean;
  /** Whether no byte follows. */
  finished: boolean;
}

/** What a run of samples is told. */
export interface SamplesOptions {
  /** Bytes to write for each. */
  tokens: number;
  temperature: number;
  /** Of the first text; each one after it has the next. */
  seed: number;
}

/**
 * Writes a text behind each of the sequences, which all hold the prompt; `logits` `[vocab]` are those behind it.
 *
 * Text i is, bit by bit, the text that one sequence alone gets with the seed of text i: batching changes no result.
 * `progress` is told of all texts whenever they have grown.
 */
export async function writeSamples(
  ziglet: Ziglet,
  cache: PagedCache,
  sequences: readonly Sequence[],
  logits: Float32Array,
  { tokens, temperature, seed }: SamplesOptions,
  progress: (samples: readonly Sample[]) => Promise<void>,
): Promise<Sample[]> {
  const { vocabSize, bosToken, maxSeqLen } = ziglet.config;
  const texts = sequences.map((sequence, i) => ({
    sequence,
    random: new Random(seed + i),
    logits, // [vocab], shared until the first step
    sample: { number: i + 1, bytes: [], ended: false, finished: false } as Sample,
  }));
  const samples = texts.map(({ sample }) => sample);

  let live = texts;
  while (live.length > 0) {
    // 1. Each text draws its next byte from its own logits with its own random numbers.
    for (const { sample: text, logits, random, sequence } of live) {
      const token = sample(logits, temperature, random);
      if (token === bosToken) text.ended = true;
      else text.bytes.push(token);
      text.finished = text.ended || text.bytes.length === tokens || sequence.seqLen === maxSeqLen;
    }
    await progress(samples);

    // 2. Some are finished, the others go on.
    live = live.filter(({ sample }) => !sample.finished);
    if (live.length === 0) break;

    // 3. One step of the model for all of them.
    const step = batchStep(cache, live.map(({ sequence }) => sequence));
    const rows = ziglet.run(Uint8Array.from(live, ({ sample }) => sample.bytes.at(-1)!), step, "all"); // [text][vocab]
    live.forEach((text, i) => text.logits = rows.subarray(i * vocabSize, (i + 1) * vocabSize));
  }
  return samples;
}
