/**
 * Matrices in 4 bits, as the operator MatMulNBits takes them: blocks of 32 along a row, codes 0 to 15 around 8, and a scale.
 */

import type { DecoderShape, DecoderWeights, LayerWeights } from "./shapes.ts";

const BLOCK_SIZE = 32;

/** A matrix `[out][in]` in 4 bits. */
export interface Int4Matrix {
  /** `[out][block][16]`, two codes a byte, the first in the low bits. */
  readonly codes: Uint8Array;
  /** `[out][block]`. */
  readonly scales: Float32Array;
  readonly blockSize: number;
  /** What the codes stand for, `[out][in]`. */
  readonly values: Float32Array;
}

export function int4Matrix(matrix: Float32Array, out: number): Int4Matrix {
  const blocks = matrix.length / BLOCK_SIZE;
  if (!Number.isInteger(blocks / out)) {
    throw new RangeError(`Cannot quantize rows of ${matrix.length / out}: they must be a multiple of ${BLOCK_SIZE}`);
  }
  const codes = new Uint8Array(matrix.length / 2);
  const scales = new Float32Array(blocks);
  const values = new Float32Array(matrix.length);
  for (let block = 0; block < blocks; block++) {
    const start = block * BLOCK_SIZE;
    let largest = 0;
    for (let i = start; i < start + BLOCK_SIZE; i++) if (Math.abs(matrix[i]!) > Math.abs(largest)) largest = matrix[i]!;
    const scale = scales[block] = largest / -8; // the largest becomes code 0, which is -8
    for (let i = start; i < start + BLOCK_SIZE; i++) {
      const code = scale === 0 ? 8 : Math.min(15, Math.max(0, Math.round(matrix[i]! / scale) + 8));
      codes[i >> 1]! |= code << 4 * (i & 1);
      values[i] = (code - 8) * scale;
    }
  }
  return { codes, scales, blockSize: BLOCK_SIZE, values };
}

/** The weights that a decoder has whose matrices are in 4 bits; norms, biases and the embedding stay. */
export function withInt4(shape: DecoderShape, { layers, ...weights }: DecoderWeights): DecoderWeights {
  const { qHeadCount, kvHeadCount, headDim, hiddenSize, intermediateSize } = shape;
  const kvSize = kvHeadCount * headDim;
  const values = (matrix: Float32Array, out: number) => int4Matrix(matrix, out).values;
  const quantized = layers.map((layer): LayerWeights => ({
    ...layer,
    qProj: values(layer.qProj, qHeadCount * headDim),
    kProj: values(layer.kProj, kvSize),
    vProj: values(layer.vProj, kvSize),
    oProj: values(layer.oProj, hiddenSize),
    gateProj: values(layer.gateProj, intermediateSize),
    upProj: values(layer.upProj, intermediateSize),
    downProj: values(layer.downProj, hiddenSize),
  }));
  return { ...weights, layers: quantized };
}
