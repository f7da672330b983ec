/**
 * Decoders in ONNX files: onnxruntime multiplies matrices, kvern keeps keys and values and attends.
 *
 * The graph of a model is cut at its attention nodes. The package has no dependency of its own: a program that has
 * onnxruntime hands it in.
 *
 * @module
 */

export type { AttentionLayer, CutModel, ModelInput, Piece } from "./onnx/cut_model.ts";
