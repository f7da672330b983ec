/** Small decoders with random weights, each of the shape of a family of real models. */
import { Random } from "../oracle.ts";
import type { DecoderShape, DecoderWeights, LayerWeights } from "./shapes.ts";

/** What a family has beside the matrices of all. */
interface Extras {
  readonly biases?: boolean;
  readonly headNorms?: boolean;
  readonly outNorms?: boolean;
  readonly sinks?: boolean;
}

/** A decoder of a family. */
export interface Family {
  readonly name: string;
  readonly shape: DecoderShape;
  readonly weights: DecoderWeights;
}

const SMALL = {
  hiddenSize: 64,
  layerCount: 4,
  qHeadCount: 4,
  kvHeadCount: 2,
  headDim: 32,
  intermediateSize: 96,
  vocabSize: 160,
  maxSeqLen: 256,
  ropeTheta: 10_000,
  rmsNormEps: 1e-6,
} as const;

const FAMILIES: Readonly<Record<string, { shape: Partial<DecoderShape>; extras: Extras }>> = {
  "Llama": { shape: {}, extras: {} },
  "Qwen2": { shape: { ropeTheta: 1_000_000 }, extras: { biases: true } },
  "Qwen3": { shape: { headDim: 48, ropeTheta: 1_000_000 }, extras: { headNorms: true } },
  "Gemma": {
    shape: {
      ...{ headDim: 64, softmaxScale: 1 / Math.sqrt(48), softcap: 5, logitSoftcap: 3, windows: [16, 0] },
      ...{ windowRopeTheta: 1000, embeddingScale: 8, activation: "gelu" },
    },
    extras: { outNorms: true },
  },
  "Phi": { shape: { rotaryDim: 16 }, extras: { biases: true } },
  "gpt-oss": { shape: { kvHeadCount: 1, windows: [12, 0] }, extras: { biases: true, sinks: true } },
};

/** One decoder of each family; the same numbers for the same seed, in every runtime. */
export function families(seed: number): Family[] {
  const random = new Random(seed);
  return Object.entries(FAMILIES).map(([name, { shape: own, extras }]) => {
    const shape: DecoderShape = { ...SMALL, ...own };
    return { name, shape, weights: randomWeights(shape, extras, random) };
  });
}

function randomWeights(shape: DecoderShape, extras: Extras, random: Random): DecoderWeights {
  const { hiddenSize, layerCount, qHeadCount, kvHeadCount, headDim, intermediateSize, vocabSize } = shape;
  // The variance of a sum of `inSize` products stays 1; attention is made sharp, so that its errors show.
  const matrix = (out: number, inSize: number, gain = 1) => random.floats(out * inSize, gain * Math.sqrt(3 / inSize));
  const aroundOne = (length: number) => random.floats(length, 0.5).map((value) => 1 + value);
  const layer = (): LayerWeights => ({
    inputNorm: aroundOne(hiddenSize),
    qProj: matrix(qHeadCount * headDim, hiddenSize, 2),
    kProj: matrix(kvHeadCount * headDim, hiddenSize, 2),
    vProj: matrix(kvHeadCount * headDim, hiddenSize),
    oProj: matrix(hiddenSize, qHeadCount * headDim),
    mlpNorm: aroundOne(hiddenSize),
    gateProj: matrix(intermediateSize, hiddenSize),
    upProj: matrix(intermediateSize, hiddenSize),
    downProj: matrix(hiddenSize, intermediateSize),
    ...(extras.biases
      ? {
        qBias: random.floats(qHeadCount * headDim),
        kBias: random.floats(kvHeadCount * headDim),
        vBias: random.floats(kvHeadCount * headDim),
        oBias: random.floats(hiddenSize),
      }
      : {}),
    ...(extras.headNorms ? { qNorm: aroundOne(headDim), kNorm: aroundOne(headDim) } : {}),
    ...(extras.outNorms ? { attentionOutNorm: aroundOne(hiddenSize), mlpOutNorm: aroundOne(hiddenSize) } : {}),
    ...(extras.sinks ? { sinkLogits: random.floats(qHeadCount, 3) } : {}),
  });
  return {
    embedding: matrix(vocabSize, hiddenSize),
    layers: Array.from({ length: layerCount }, layer),
    finalNorm: aroundOne(hiddenSize),
  };
}
