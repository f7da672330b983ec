/** Scoring: how many bits the model needs for each byte of a text, when the cache is all it knows of the past. */
import { type KvCache, type PagedCache } from "../mod.ts";
import { logSumExp } from "./sampling.ts";
import { STEP_TOKENS, type Ziglet } from "./ziglet.ts";

/** What a text took. */
export interface Score {
  /** Bits for each byte. */
  readonly bitsPerByte: number;
  /** Of the rows that were attended, how many were in the tail and how many in the store, of 1. */
  readonly attendedShare: { readonly tail: number; readonly store: number };
}

/** The cache that a text is scored with: one sequence, of a paged cache or alone. */
export interface ScoredCache {
  readonly cache: KvCache;
  readonly paged?: PagedCache;
}

/**
 * Bits per byte of `text`, cut in windows of `windowTokens` bytes.
 *
 * Each window starts with an empty cache and the start byte at position 0, and every byte of it is predicted: the
 * input is the window moved right by one.
 *
 *     input    0 c o n s t      position 0 to 5
 *     target   c o n s t _
 *
 * The cache fills in steps of at most STEP_TOKENS, and no more than a block, so all but the first step attend to keys and
 * values that were stored before. The bits of a byte are -log2 of the probability it was given.
 */
export async function scoreText(
  ziglet: Ziglet,
  { cache, paged }: ScoredCache,
  text: Uint8Array,
  windowTokens: number,
  progress: (bytes: number) => Promise<void>,
): Promise<Score> {
  const { vocabSize, bosToken } = ziglet.config;
  const stepTokens = Math.min(STEP_TOKENS, paged?.blockSize ?? STEP_TOKENS);
  let nats = 0;
  const attended = { tail: 0, store: 0 };
  for (let windowStart = 0; windowStart < text.length; windowStart += windowTokens) {
    const target = text.subarray(windowStart, windowStart + windowTokens); // [token]
    const input = new Uint8Array(target.length); // [token]
    input[0] = bosToken;
    input.set(target.subarray(0, target.length - 1), 1);

    cache.truncate(0);
    for (let start = 0; start < target.length; start += stepTokens) {
      const stepTarget = target.subarray(start, start + stepTokens); // [token]
      const storeTokens = paged?.stats().storeTokens ?? 0;
      const logits = ziglet.forward(input.subarray(start, start + stepTokens), cache, "all"); // [token][vocab]
      for (let token = 0; token < stepTarget.length; token++) {
        attended.store += storeTokens;
        attended.tail += start + token + 1 - storeTokens;
        const row = logits.subarray(token * vocabSize, (token + 1) * vocabSize); // [vocab]
        nats += logSumExp(row) - row[stepTarget[token]!]!;
      }
      await progress(windowStart + start + stepTarget.length);
    }
  }
  const rows = attended.tail + attended.store;
  return {
    bitsPerByte: nats / Math.LN2 / text.length,
    attendedShare: { tail: attended.tail / rows, store: attended.store / rows },
  };
}
