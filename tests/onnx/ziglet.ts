/** The model of the examples as shape and weights, and the golden numbers beside it. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { readConfig, readWeights } from "../../examples/weights.ts";
import type { DecoderShape, DecoderWeights } from "./shapes.ts";

const FOLDER = fileURLToPath(new URL("../../examples/ziglet", import.meta.url));

/** What ziglet says to a prompt, in f64. */
export interface GoldenCase {
  readonly prompt: string;
  /** The eight highest logits: token and logit. */
  readonly logitsTop: readonly (readonly [number, number])[];
  readonly logSumExp: number;
  /** The greedy text behind the prompt. */
  readonly greedy: string;
}

/** The golden numbers: cases, and how far a logit may be off. */
export const GOLDEN: { readonly bos: number; readonly tolerance: number; readonly cases: readonly GoldenCase[] } = JSON
  .parse(readFileSync(join(FOLDER, "golden.json"), "utf8"));

/** The tokens of a prompt: byte 0, and its bytes. */
export function tokensOf(prompt: string): number[] {
  return [GOLDEN.bos, ...new TextEncoder().encode(prompt)];
}

const config = readConfig(join(FOLDER, "config.json"));
const weights = readWeights(join(FOLDER, "model.safetensors"), config);

export const ZIGLET_SHAPE: DecoderShape = config;

export const ZIGLET_WEIGHTS: DecoderWeights = {
  embedding: weights.embedding,
  layers: weights.layers.map(({ postAttentionNorm, ...layer }) => ({ ...layer, mlpNorm: postAttentionNorm })),
  finalNorm: weights.finalNorm,
};
