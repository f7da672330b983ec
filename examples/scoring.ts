/** Scoring: how many bits the model needs for each byte of a text, when the cache is all it knows of the past. */
import type { KvCache } from "../mod.ts";
import { logSumExp } from "./sampling.ts";
import { STEP_TOKENS, type Ziglet } from "./ziglet.ts";

/**
 * Bits per byte of `text`, cut in windows of `windowTokens` bytes.
 *
 * Each window starts with an empty cache and the start byte at position 0, and every byte of it is predicted: the
 * input is the window moved right by one.
 *
 *     input    0 c o n s t      position 0 to 5
 *     target   c o n s t _
 *
 * The cache fills in steps of at most STEP_TOKENS, so all but the first step attend to keys and values that were
 * stored before. The bits of a byte are -log2 of the probability it was given.
 */
export async function bitsPerByte(
  ziglet: Ziglet,
  cache: KvCache,
  text: Uint8Array,
  windowTokens: number,
  progress: (bytes: number) => Promise<void>,
): Promise<number> {
  const { vocabSize, bosToken } = ziglet.config;
  let nats = 0;
  for (let windowStart = 0; windowStart < text.length; windowStart += windowTokens) {
    const target = text.subarray(windowStart, windowStart + windowTokens); // [token]
    const input = new Uint8Array(target.length); // [token]
    input[0] = bosToken;
    input.set(target.subarray(0, target.length - 1), 1);

    cache.truncate(0);
    for (let start = 0; start < target.length; start += STEP_TOKENS) {
      const stepTarget = target.subarray(start, start + STEP_TOKENS); // [token]
      const logits = ziglet.forward(input.subarray(start, start + STEP_TOKENS), cache, "all"); // [token][vocab]
      for (let token = 0; token < stepTarget.length; token++) {
        const row = logits.subarray(token * vocabSize, (token + 1) * vocabSize); // [vocab]
        nats += logSumExp(row) - row[stepTarget[token]!]!;
      }
      await progress(windowStart + start + stepTarget.length);
    }
  }
  return nats / Math.LN2 / text.length;
}
