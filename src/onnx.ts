/**
 * Decoders in ONNX files: onnxruntime multiplies matrices, kvern keeps keys and values and attends.
 *
 * The graph of a model is cut at its attention nodes. The package has no dependency of its own: a program that has
 * onnxruntime hands it in.
 *
 * @example Writes on behind a prompt
 * ```ts
 * import { OnnxDecoder, type Ort } from "@kvern/kvern/onnx";
 *
 * // `ort` is what `import * as ort from "onnxruntime-node"` gives.
 * async function write(ort: Ort, tokens: number[]): Promise<number[]> {
 *   await using decoder = await OnnxDecoder.load("model/", { ort, store: "i4" });
 *   using sequence = decoder.sequence({ tokens });
 *   const written: number[] = [];
 *   for await (const token of decoder.generate(sequence, { tokens, maxTokens: 20 })) written.push(token);
 *   return written;
 * }
 * ```
 *
 * @module
 */

export { type DecoderSequenceOptions, OnnxDecoder, type StepOptions } from "./onnx/decoder.ts";
export type { OnnxDecoderOptions } from "./onnx/decoder_options.ts";
export type { GenerateEnd, GenerateOptions } from "./onnx/generate.ts";
export type { KvTensor, PastKeyValues } from "./onnx/kv_tensor.ts";
export type { Ort, OrtSession, OrtSessionOptions, OrtTensor, OrtTensors, OrtValue } from "./onnx/ort.ts";
export {
  keep,
  type KeepOptions,
  type KvTensorClass,
  layersOf,
  pastKeyValues,
  type PastKeyValuesOptions,
} from "./onnx/past_key_values.ts";
export { type Sample, sampler, type SamplingOptions } from "./onnx/sampling.ts";
