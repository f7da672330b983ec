/**
 * The truth that decoders are compared with: a forward pass in f64, of all tokens of a text at once, without a cache.
 *
 * Nothing here is fast, and nothing is shared with the library or with the graphs.
 */
import { attention } from "../oracle.ts";
import { type DecoderShape, type DecoderWeights, rotaryOf, windowOf } from "./shapes.ts";

/** Logits behind every token of a text, `[token][vocab]`. */
export function forward(shape: DecoderShape, weights: DecoderWeights, tokens: readonly number[]): Float64Array {
  const { hiddenSize, qHeadCount, kvHeadCount, headDim, rmsNormEps, softmaxScale, softcap, logitSoftcap } = shape;
  const norm = (x: Float64Array, weight: Float32Array) => rmsNorm(x, weight, rmsNormEps);
  let x = new Float64Array(tokens.length * hiddenSize);
  tokens.forEach((token, i) => {
    x.set(weights.embedding.subarray(token * hiddenSize, (token + 1) * hiddenSize), i * hiddenSize);
  });
  x = x.map((value) => value * (shape.embeddingScale ?? 1));
  weights.layers.forEach((layer, index) => {
    const normed = norm(x, layer.inputNorm);
    const queries = matmul(normed, layer.qProj, qHeadCount * headDim, layer.qBias);
    const keys = matmul(normed, layer.kProj, kvHeadCount * headDim, layer.kBias);
    const v = matmul(normed, layer.vProj, kvHeadCount * headDim, layer.vBias);
    const q = turned(layer.qNorm ? norm(queries, layer.qNorm) : queries, tokens.length, shape, index);
    const k = turned(layer.kNorm ? norm(keys, layer.kNorm) : keys, tokens.length, shape, index);
    const windowTokens = windowOf(shape, index) || Infinity;
    const { output } = attention({
      ...{ q, k, v, queryCount: tokens.length, qHeadCount, kvHeadCount, headDim, windowTokens },
      softmaxScale: softmaxScale ?? 1 / Math.sqrt(headDim),
      ...(softcap === undefined ? {} : { softcap }),
      ...(layer.sinkLogits ? { sinkLogits: layer.sinkLogits } : {}),
    });
    const found = matmul(output, layer.oProj, hiddenSize, layer.oBias);
    x = sum(x, layer.attentionOutNorm ? norm(found, layer.attentionOutNorm) : found);
    const middle = norm(x, layer.mlpNorm);
    const gate = matmul(middle, layer.gateProj, shape.intermediateSize);
    const up = matmul(middle, layer.upProj, shape.intermediateSize);
    const active = gate.map((value, i) => activation(value, shape) * up[i]!);
    const fed = matmul(active, layer.downProj, hiddenSize);
    x = sum(x, layer.mlpOutNorm ? norm(fed, layer.mlpOutNorm) : fed);
  });
  const logits = matmul(norm(x, weights.finalNorm), weights.embedding, shape.vocabSize);
  return logitSoftcap === undefined ? logits : logits.map((value) => logitSoftcap * Math.tanh(value / logitSoftcap));
}

/** silu, or gelu by tanh. */
function activation(x: number, { activation = "silu" }: DecoderShape): number {
  if (activation === "silu") return x / (1 + Math.exp(-x));
  return 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)));
}

/** Rows of x times a matrix `[out][in]`, plus a bias. */
function matmul(x: Float64Array, matrix: Float32Array, out: number, bias?: Float32Array): Float64Array {
  const inSize = matrix.length / out, rows = x.length / inSize;
  const product = new Float64Array(rows * out);
  for (let row = 0; row < rows; row++) {
    for (let o = 0; o < out; o++) {
      let dot = bias?.[o] ?? 0;
      for (let i = 0; i < inSize; i++) dot += x[row * inSize + i]! * matrix[o * inSize + i]!;
      product[row * out + o] = dot;
    }
  }
  return product;
}

function sum(a: Float64Array, b: Float64Array): Float64Array<ArrayBuffer> {
  return Float64Array.from(a, (value, i) => value + b[i]!);
}

/** Rows of the length of the weight, over their root mean square, times the weight. */
function rmsNorm(x: Float64Array, weight: Float32Array, eps: number): Float64Array {
  const size = weight.length;
  const normed = new Float64Array(x.length);
  for (let start = 0; start < x.length; start += size) {
    let squares = 0;
    for (let i = 0; i < size; i++) squares += x[start + i]! ** 2;
    const inverse = 1 / Math.sqrt(squares / size + eps);
    for (let i = 0; i < size; i++) normed[start + i] = x[start + i]! * inverse * weight[i]!;
  }
  return normed;
}

/** Heads `[token][head][headDim]` turned to their positions from 0: the first half of the rotated dims with the second. */
function turned(heads: Float64Array, tokenCount: number, shape: DecoderShape, layer: number): Float64Array {
  const { theta, dims } = rotaryOf(shape, layer);
  const result = heads.slice();
  const half = dims / 2, perToken = heads.length / tokenCount;
  for (let start = 0; start < heads.length; start += shape.headDim) {
    const position = Math.floor(start / perToken);
    for (let dim = 0; dim < half; dim++) {
      const angle = position * theta ** (-2 * dim / dims);
      const a = heads[start + dim]!, b = heads[start + half + dim]!;
      result[start + dim] = a * Math.cos(angle) - b * Math.sin(angle);
      result[start + half + dim] = b * Math.cos(angle) + a * Math.sin(angle);
    }
  }
  return result;
}
