/**
 * The truth the tests compare with: attention in f64, rounding by the book, and a cache made of plain arrays.
 *
 * Nothing here is fast, and nothing here is shared with the library.
 */

/** A small generator of 32-bit state (mulberry32): the same numbers in every runtime. */
export class Random {
  #state: number;

  constructor(seed: number) {
    this.#state = seed >>> 0;
  }

  /** In [0, 1), a multiple of 2^-24: exact as an f32. */
  next(): number {
    this.#state = (this.#state + 0x6d2b79f5) >>> 0;
    let bits = Math.imul(this.#state ^ (this.#state >>> 15), this.#state | 1);
    bits ^= bits + Math.imul(bits ^ (bits >>> 7), bits | 61);
    return ((bits ^ (bits >>> 14)) >>> 8) / 2 ** 24;
  }

  /** A whole number below `end`. */
  below(end: number): number {
    return Math.floor(this.next() * end);
  }

  /** `length` numbers in [-scale, scale). */
  floats(length: number, scale = 1): Float32Array {
    return Float32Array.from({ length }, () => (this.next() * 2 - 1) * scale);
  }
}

/** What attention is asked: k and v `[row][kv_head][head_dim]`, q `[query][q_head][head_dim]`. */
export interface AttentionCase {
  readonly q: ArrayLike<number>;
  readonly k: ArrayLike<number>;
  readonly v: ArrayLike<number>;
  readonly queryCount: number;
  readonly qHeadCount: number;
  readonly kvHeadCount: number;
  readonly headDim: number;
  readonly softmaxScale?: number;
  readonly causal?: boolean;
  readonly windowTokens?: number;
  readonly sinkTokens?: number;
  readonly softcap?: number;
  readonly alibiSlopes?: ArrayLike<number>;
  readonly sinkLogits?: ArrayLike<number>;
  readonly treeParents?: ArrayLike<number>;
}

/** Attention as the formula says it, in f64: all scores, their maximum, all weights. */
export function attention(options: AttentionCase): { output: Float64Array; lse: Float64Array } {
  const { q, k, v, queryCount, qHeadCount, kvHeadCount, headDim, causal = true } = options;
  const { softmaxScale = 1 / Math.sqrt(headDim), windowTokens = Infinity, sinkTokens = 0, softcap } = options;
  const kvDim = kvHeadCount * headDim;
  const rowCount = k.length / kvDim;
  const output = new Float64Array(q.length);
  const lse = new Float64Array(queryCount * qHeadCount);
  for (let query = 0; query < queryCount; query++) {
    const position = rowCount - queryCount + query;
    for (let head = 0; head < qHeadCount; head++) {
      const index = query * qHeadCount + head;
      const kvHead = Math.floor(head / (qHeadCount / kvHeadCount));
      const seen: { row: number; score: number }[] = [];
      for (let row = 0; row < rowCount; row++) {
        const inWindow = row > position - windowTokens || row < sinkTokens;
        if (causal && !(row <= position && inWindow)) continue;
        if (options.treeParents && !isInBranch(options.treeParents, query, row - (rowCount - queryCount))) continue;
        let dot = 0;
        for (let d = 0; d < headDim; d++) dot += q[index * headDim + d]! * k[row * kvDim + kvHead * headDim + d]!;
        let score = softmaxScale * dot;
        if (softcap !== undefined) score = softcap * Math.tanh(score / softcap);
        if (options.alibiSlopes) score -= options.alibiSlopes[head]! * (position - row);
        seen.push({ row, score });
      }
      const sink = options.sinkLogits?.[head];
      const max = Math.max(sink ?? -Infinity, ...seen.map(({ score }) => score));
      let sum = sink === undefined ? 0 : Math.exp(sink - max);
      for (const { score } of seen) sum += Math.exp(score - max);
      for (const { row, score } of seen) {
        const weight = Math.exp(score - max) / sum;
        for (let d = 0; d < headDim; d++) {
          output[index * headDim + d]! += weight * v[row * kvDim + kvHead * headDim + d]!;
        }
      }
      lse[index] = sum === 0 ? -Infinity : max + Math.log(sum);
    }
  }
  return { output, lse };
}

/** Is `node` an ancestor of the node `query`, or itself, or a row before the tree? */
function isInBranch(parents: ArrayLike<number>, query: number, node: number): boolean {
  let at = query;
  while (at > node && at >= 0) at = parents[at]!;
  return node < 0 || at === node;
}

/** mean|difference| / mean|truth|; NaN anywhere gives NaN, which no bound admits. */
export function relativeError(actual: ArrayLike<number>, truth: ArrayLike<number>): number {
  if (actual.length !== truth.length) return NaN;
  let difference = 0;
  let size = 0;
  for (let i = 0; i < truth.length; i++) {
    difference += Math.abs(actual[i]! - truth[i]!);
    size += Math.abs(truth[i]!);
  }
  return difference / size;
}

const scratch = new DataView(new ArrayBuffer(4));

function f32Bits(value: number): number {
  scratch.setFloat32(0, value);
  return scratch.getUint32(0);
}

/** The bits of the f16 nearest to `value`, half to even: the significand is scaled to units of the last place. */
export function f16Bits(value: number): number {
  const sign = Object.is(value, -0) || value < 0 ? 0x8000 : 0;
  const magnitude = Math.abs(value);
  if (magnitude === 0) return sign;
  // Below 2^-14 the place of the last bit stays where it is: denormals.
  let exponent = Math.max(-14, Math.floor(Math.log2(magnitude)));
  if (exponent > -14 && 2 ** exponent > magnitude) exponent -= 1; // log2 was rounded up to a whole number
  const units = magnitude / 2 ** (exponent - 10);
  return sign | ((exponent + 14) << 10) + roundHalfToEven(units);
}

/** The bits of the bf16 nearest to the f32 `value`, half to even. */
export function bf16Bits(value: number): number {
  return roundHalfToEven(f32Bits(value) / 2 ** 16);
}

function roundHalfToEven(value: number): number {
  const floor = Math.floor(value);
  const rest = value - floor;
  if (rest !== 0.5) return rest < 0.5 ? floor : floor + 1;
  return floor % 2 === 0 ? floor : floor + 1;
}

/** The value of f16 bits. */
export function f16Value(bits: number): number {
  const exponent = (bits >> 10) & 31;
  const magnitude = exponent === 0 ? (bits & 1023) * 2 ** -24 : (1024 + (bits & 1023)) * 2 ** (exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

/** The value of bf16 bits. */
export function bf16Value(bits: number): number {
  scratch.setUint32(0, bits << 16 >>> 0);
  return scratch.getFloat32(0);
}

/** What a value reads as once it was stored as `dtype`. */
export function stored(value: number, dtype: "f32" | "f16" | "bf16"): number {
  if (dtype === "f16") return f16Value(f16Bits(value));
  return dtype === "bf16" ? bf16Value(bf16Bits(value)) : Math.fround(value);
}

/** Rows as the cache should give them back. */
export function storedRows(rows: Float32Array, dtype: "f32" | "f16" | "bf16"): Float32Array {
  return rows.map((value) => stored(value, dtype));
}

/** One sequence of a cache, in plain arrays: what it holds, and which calls it refuses with which code. */
export class SequenceModel {
  readonly k: number[][];
  readonly v: number[][];
  readonly layerCount: number;
  readonly kvDim: number;
  readonly maxSeqLen: number;
  seqLen = 0;

  constructor(layerCount: number, kvDim: number, maxSeqLen: number) {
    this.layerCount = layerCount;
    this.kvDim = kvDim;
    this.maxSeqLen = maxSeqLen;
    this.k = Array.from({ length: layerCount }, () => []);
    this.v = Array.from({ length: layerCount }, () => []);
  }

  /** Committed and pending rows of a layer. */
  rows(layer: number): number {
    return this.k[layer]!.length / this.kvDim;
  }

  append(layer: number, k: ArrayLike<number>, v: ArrayLike<number>): string {
    if (layer >= this.layerCount) return "layer_out_of_range";
    if (k.length !== v.length || k.length % this.kvDim !== 0) return "invalid_size";
    if (this.rows(layer) + k.length / this.kvDim > this.maxSeqLen) return "cache_full";
    this.k[layer]!.push(...Array.from(k));
    this.v[layer]!.push(...Array.from(v));
    return "ok";
  }

  commit(n: number): string {
    if (n !== 0 && this.k.some((_, layer) => this.rows(layer) !== this.seqLen + n)) return "commit_mismatch";
    this.seqLen += n;
    return "ok";
  }

  truncate(n: number): string {
    if (n > this.seqLen) return "position_out_of_range";
    for (const side of [...this.k, ...this.v]) side.length = n * this.kvDim;
    this.seqLen = n;
    return "ok";
  }
}
