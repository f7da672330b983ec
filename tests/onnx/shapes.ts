/**
 * What a decoder is, however its graph is written: a shape, and weights. Matrices are `[out][in]`.
 */

/** The shape of a decoder, and what distinguishes its family. */
export interface DecoderShape {
  readonly hiddenSize: number;
  readonly layerCount: number;
  readonly qHeadCount: number;
  readonly kvHeadCount: number;
  readonly headDim: number;
  readonly intermediateSize: number;
  readonly vocabSize: number;
  /** Rows of the tables of cosines and sines. */
  readonly maxSeqLen: number;
  readonly ropeTheta: number;
  /** Base of the angles in layers with a window, where it differs. */
  readonly windowRopeTheta?: number;
  /** Dims of a head that are rotated, its first; all unless given. */
  readonly rotaryDim?: number;
  readonly rmsNormEps: number;
  /** 1 / sqrt(headDim) unless given. */
  readonly softmaxScale?: number;
  /** Soft limit of attention scores. */
  readonly softcap?: number;
  /** Soft limit of logits. */
  readonly logitSoftcap?: number;
  /** Newest tokens that a layer sees, by turns; 0 sees all. */
  readonly windows?: readonly number[];
  /** Factor of the embedded tokens. */
  readonly embeddingScale?: number;
  readonly activation?: "silu" | "gelu";
}

/** Weights of a layer; those that are left out are not in the graph. */
export interface LayerWeights {
  readonly inputNorm: Float32Array; // [hidden]
  readonly qProj: Float32Array; // [q_head * head_dim][hidden]
  readonly kProj: Float32Array; // [kv_head * head_dim][hidden]
  readonly vProj: Float32Array; // [kv_head * head_dim][hidden]
  readonly oProj: Float32Array; // [hidden][q_head * head_dim]
  readonly mlpNorm: Float32Array; // [hidden]
  readonly gateProj: Float32Array; // [intermediate][hidden]
  readonly upProj: Float32Array; // [intermediate][hidden]
  readonly downProj: Float32Array; // [hidden][intermediate]
  readonly qBias?: Float32Array; // [q_head * head_dim]
  readonly kBias?: Float32Array; // [kv_head * head_dim]
  readonly vBias?: Float32Array; // [kv_head * head_dim]
  readonly oBias?: Float32Array; // [hidden]
  /** Of each head's queries and keys, before they are rotated. */
  readonly qNorm?: Float32Array; // [head_dim]
  readonly kNorm?: Float32Array; // [head_dim]
  readonly sinkLogits?: Float32Array; // [q_head]
  /** Of what attention and the MLP give, before it joins the residual stream. */
  readonly attentionOutNorm?: Float32Array; // [hidden]
  readonly mlpOutNorm?: Float32Array; // [hidden]
}

/** Weights of a decoder. */
export interface DecoderWeights {
  readonly embedding: Float32Array; // [vocab][hidden], also the output matrix
  readonly layers: readonly LayerWeights[];
  readonly finalNorm: Float32Array; // [hidden]
}

/** Newest tokens that a layer sees; 0 sees all. */
export function windowOf({ windows = [0] }: DecoderShape, layer: number): number {
  return windows[layer % windows.length]!;
}

/** How a layer rotates: base of the angles, and how many dims of a head. */
export function rotaryOf(shape: DecoderShape, layer: number): { theta: number; dims: number } {
  const { ropeTheta, windowRopeTheta = ropeTheta, headDim, rotaryDim = headDim } = shape;
  return { theta: windowOf(shape, layer) > 0 ? windowRopeTheta : ropeTheta, dims: rotaryDim };
}

/** The same decoder with the two dims of each rotated pair side by side: what `interleaved` rotation takes. */
export function interleavedHeads(shape: DecoderShape, { layers, ...weights }: DecoderWeights): DecoderWeights {
  const { headDim, rotaryDim = headDim } = shape;
  const moved = (rows: Float32Array, width: number) => {
    const result = rows.slice();
    for (let head = 0; head < rows.length; head += headDim * width) {
      for (let dim = 0; dim < rotaryDim; dim++) {
        const from = head + ((dim % 2) * (rotaryDim / 2) + (dim >> 1)) * width;
        result.set(rows.subarray(from, from + width), head + dim * width);
      }
    }
    return result;
  };
  const movedLayers = layers.map((layer): LayerWeights => ({
    ...layer,
    qProj: moved(layer.qProj, shape.hiddenSize),
    kProj: moved(layer.kProj, shape.hiddenSize),
    ...(layer.qBias ? { qBias: moved(layer.qBias, 1) } : {}),
    ...(layer.kBias ? { kBias: moved(layer.kBias, 1) } : {}),
    ...(layer.qNorm ? { qNorm: moved(layer.qNorm, 1) } : {}),
    ...(layer.kNorm ? { kNorm: moved(layer.kNorm, 1) } : {}),
  }));
  return { ...weights, layers: movedLayers };
}

/** The same decoder with each KV head written down for every query head that shares it: the same numbers, shared no more. */
export function unsharedHeads(
  shape: DecoderShape,
  { layers, ...weights }: DecoderWeights,
): { shape: DecoderShape; weights: DecoderWeights } {
  const { qHeadCount, kvHeadCount, headDim, hiddenSize } = shape;
  const repeats = qHeadCount / kvHeadCount;
  const repeated = (matrix: Float32Array, width: number) => {
    const head = headDim * width;
    const wide = new Float32Array(qHeadCount * head);
    for (let q = 0; q < qHeadCount; q++) {
      const kv = Math.floor(q / repeats);
      wide.set(matrix.subarray(kv * head, (kv + 1) * head), q * head);
    }
    return wide;
  };
  const wideLayers = layers.map((layer): LayerWeights => ({
    ...layer,
    kProj: repeated(layer.kProj, hiddenSize),
    vProj: repeated(layer.vProj, hiddenSize),
    ...(layer.kBias ? { kBias: repeated(layer.kBias, 1) } : {}),
    ...(layer.vBias ? { vBias: repeated(layer.vBias, 1) } : {}),
  }));
  return { shape: { ...shape, kvHeadCount: qHeadCount }, weights: { ...weights, layers: wideLayers } };
}
