/** Models for the bench of whole steps: the shape of SmolLM2-135M, and a small one, with random weights. */
import type { DecoderShape, DecoderWeights } from "../tests/onnx/shapes.ts";
import { numbers } from "./inputs.ts";

/** 134.5 million parameters: 30 layers, 9 query and 3 KV heads of 64. */
export const SMOL: DecoderShape = {
  hiddenSize: 576,
  layerCount: 30,
  qHeadCount: 9,
  kvHeadCount: 3,
  headDim: 64,
  intermediateSize: 1536,
  vocabSize: 49152,
  maxSeqLen: 8448,
  ropeTheta: 100_000,
  rmsNormEps: 1e-5,
};

/** The same in small, for a run that only shows that the bench works. */
export const TINY: DecoderShape = {
  ...SMOL,
  hiddenSize: 96,
  layerCount: 3,
  intermediateSize: 128,
  vocabSize: 512,
  qHeadCount: 3,
  kvHeadCount: 1,
};

/** Weights with which values keep their size from layer to layer; the same in every runtime. */
export function randomWeights(shape: DecoderShape): DecoderWeights {
  const { hiddenSize, layerCount, qHeadCount, kvHeadCount, headDim, intermediateSize, vocabSize } = shape;
  let seed = 0;
  const matrix = (out: number, inSize: number) => {
    const values = numbers(++seed, out * inSize), scale = 1 / Math.sqrt(inSize);
    for (let i = 0; i < values.length; i++) values[i]! *= scale;
    return values;
  };
  const ones = () => new Float32Array(hiddenSize).fill(1);
  return {
    embedding: matrix(vocabSize, hiddenSize),
    layers: Array.from({ length: layerCount }, () => ({
      inputNorm: ones(),
      qProj: matrix(qHeadCount * headDim, hiddenSize),
      kProj: matrix(kvHeadCount * headDim, hiddenSize),
      vProj: matrix(kvHeadCount * headDim, hiddenSize),
      oProj: matrix(hiddenSize, qHeadCount * headDim),
      mlpNorm: ones(),
      gateProj: matrix(intermediateSize, hiddenSize),
      upProj: matrix(intermediateSize, hiddenSize),
      downProj: matrix(hiddenSize, intermediateSize),
    })),
    finalNorm: ones(),
  };
}
