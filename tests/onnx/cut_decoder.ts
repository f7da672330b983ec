/** Decoders in the forms of the tests, loaded as users load them: cut, with kvern's cache. */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { OnnxDecoder, type OnnxDecoderOptions } from "../../src/onnx.ts";
import { onnxRuntime } from "../onnx_runtime.ts";
import type { Form } from "./builder.ts";
import { makeDecoder } from "./decoder.ts";
import { writeModel } from "./graph.ts";
import type { DecoderShape, DecoderWeights } from "./shapes.ts";

/** What a decoder is made of, and how it is written. */
export interface Made {
  readonly shape: DecoderShape;
  readonly weights: DecoderWeights;
  readonly form: Form;
}

/** Options of the cache, where a test has a say. */
export type CacheChoice = Partial<Omit<OnnxDecoderOptions, "ort">>;

/** Loads a decoder, as bytes or from a folder where it has a file of weights, and gives it to `use`. */
export async function withDecoder<Result>(
  { shape, weights, form }: Made,
  options: CacheChoice,
  use: (decoder: OnnxDecoder) => Promise<Result>,
): Promise<Result> {
  const files = makeDecoder(shape, weights, form);
  const folder = mkdtempSync(join(tmpdir(), "kvern-onnx-"));
  try {
    if (files.data) writeModel(folder, files);
    const model = files.data ? folder : files.model;
    await using decoder = await OnnxDecoder.load(model, {
      ort: onnxRuntime!,
      dtype: "f32",
      maxSeqLen: shape.maxSeqLen,
      session: { intraOpNumThreads: 1, interOpNumThreads: 1 },
      ...options,
    } as OnnxDecoderOptions);
    return await use(decoder);
  } finally {
    rmSync(folder, { recursive: true });
  }
}

/** The largest distance of two rows; NaN if there is one. */
export function distance(a: ArrayLike<number>, b: ArrayLike<number>): number {
  if (a.length !== b.length) return NaN;
  let largest = 0;
  for (let i = 0; i < a.length; i++) {
    const difference = Math.abs(a[i]! - b[i]!);
    if (!(difference <= largest)) largest = difference;
  }
  return largest;
}
