/**
 * One text behind a prompt, drawn byte by byte.
 *
 * The sequence may have the first tokens of the prompt already: only what it lacks goes through the model.
 */
import type { KvCache } from "../mod.ts";
import { Random, sample } from "./sampling.ts";
import type { StepOptions } from "./step.ts";
import type { Ziglet } from "./ziglet.ts";

/** How a text is drawn. */
export interface DrawingOptions extends StepOptions {
  /** The most bytes to draw. */
  tokens: number;
  temperature: number;
  seed: number;
  /** Whether a text is complete as it stands. */
  isComplete?: (bytes: readonly number[]) => boolean;
}

/** A text so far, and what it took. */
export interface Drawing {
  /** Its bytes behind the prompt. */
  bytes: number[];
  /** Tokens of the prompt that the sequence had. */
  startsAt: number;
  /** Tokens of the prompt that went through the model. */
  computedTokens: number;
  /** Seconds from the sequence as it was to the logits behind the prompt. */
  promptSeconds: number;
  /** Seconds behind that. */
  decodeSeconds: number;
  /** Of the steps behind the prompt; null before the first. */
  tokensPerSecond: number | null;
  /** Why no byte follows; null while some may. */
  end: "complete" | "model" | "context" | null;
}

/**
 * Draws a text behind `promptTokens` in `cache`, whose rows are those of the prompt's first tokens, not all of them.
 * `progress` is told after every byte.
 */
export async function drawText(
  ziglet: Ziglet,
  cache: KvCache,
  promptTokens: Uint8Array,
  { tokens, temperature, seed, isComplete = () => false, tellsTokens = false }: DrawingOptions,
  progress: (drawing: Drawing) => Promise<void> = () => Promise.resolve(),
): Promise<Drawing> {
  const { maxSeqLen, bosToken } = ziglet.config;
  const random = new Random(seed);
  const bytes: number[] = [];
  const startsAt = cache.seqLen;
  const computedTokens = promptTokens.length - startsAt;
  const drawing: Drawing = {
    bytes,
    startsAt,
    computedTokens,
    promptSeconds: 0,
    decodeSeconds: 0,
    tokensPerSecond: null,
    end: null,
  };

  // 1. What the cache lacks of the prompt.
  const start = performance.now();
  let logits = ziglet.prefill(promptTokens.subarray(startsAt), cache, { tellsTokens }); // [vocab]
  const decodeStart = performance.now();
  drawing.promptSeconds = (decodeStart - start) / 1000;

  // 2. Each byte is drawn, and run through the model to get the logits of the one behind it.
  while (drawing.end === null) {
    const token = sample(logits, temperature, random);
    if (token === bosToken) {
      drawing.end = "model";
      break;
    }
    bytes.push(token);
    if (bytes.length === tokens || isComplete(bytes)) drawing.end = "complete";
    else if (cache.seqLen === maxSeqLen) drawing.end = "context";
    await progress(drawing);
    if (drawing.end !== null) break;
    logits = ziglet.forward(Uint8Array.of(token), cache, "last", { tellsTokens });
    drawing.decodeSeconds = (performance.now() - decodeStart) / 1000;
    drawing.tokensPerSecond = bytes.length / drawing.decodeSeconds;
  }
  drawing.decodeSeconds = (performance.now() - decodeStart) / 1000;
  return drawing;
}
