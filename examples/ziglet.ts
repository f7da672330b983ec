/**
 * ziglet: a Llama-style transformer over bytes (6 layers, 5.3 M parameters) that writes Zig, in plain TypeScript.
 *
 *     token -> embedding -> 6 x { x += attention(norm(x)) ; x += swiglu(norm(x)) } -> norm -> logits
 *
 * Everything here is written out, except what a KV cache is for: the keys and values of all tokens so far are kept,
 * and attended to, by the cache that the caller passes in. The model knows it only through the `Step` of step.ts
 * (`append`, `attend`, `commit`), so that any cache plugs in, for one sequence or for several at once.
 *
 * This is not a fast way to run a large model: one thread, no SIMD, weights widened to f32.
 *
 * Shapes stand in brackets, outermost axis first. A matrix is [out][in], as the file stores it.
 */
import { join } from "node:path";
import type { KvCache } from "../mod.ts";
import { sequenceStep, type Step, type StepOptions } from "./step.ts";
import { readConfig, readWeights, type Weights, type ZigletConfig } from "./weights.ts";

/** The most tokens that go through the layers together; more would take more room and not be faster. */
export const STEP_TOKENS = 64;

/** The model: weights, and the activations of one step. */
export class Ziglet {
  readonly config: ZigletConfig;
  /** Time spent in attend so far, in seconds. */
  attendSeconds = 0;

  readonly #weights: Weights;
  readonly #ropeCos: Float32Array; // [position][head_dim / 2]
  readonly #ropeSin: Float32Array; // [position][head_dim / 2]

  // Activations, made once; a step of n tokens uses the first n rows of each.
  readonly #x: Float32Array; // [token][hidden], the residual stream
  readonly #normed: Float32Array; // [token][hidden]
  readonly #q: Float32Array; // [token][q_head][head_dim]
  readonly #k: Float32Array; // [token][kv_head][head_dim]
  readonly #v: Float32Array; // [token][kv_head][head_dim]
  readonly #attended: Float32Array; // [token][q_head][head_dim]
  readonly #projected: Float32Array; // [token][hidden]
  readonly #gate: Float32Array; // [token][intermediate]
  readonly #up: Float32Array; // [token][intermediate]
  readonly #logits: Float32Array; // [token][vocab]

  constructor(config: ZigletConfig, weights: Weights) {
    this.config = config;
    this.#weights = weights;
    const { hiddenSize, qHeadCount, kvHeadCount, headDim, intermediateSize, vocabSize } = config;
    const rows = (rowSize: number) => new Float32Array(STEP_TOKENS * rowSize);
    this.#x = rows(hiddenSize);
    this.#normed = rows(hiddenSize);
    this.#q = rows(qHeadCount * headDim);
    this.#k = rows(kvHeadCount * headDim);
    this.#v = rows(kvHeadCount * headDim);
    this.#attended = rows(qHeadCount * headDim);
    this.#projected = rows(hiddenSize);
    this.#gate = rows(intermediateSize);
    this.#up = rows(intermediateSize);
    this.#logits = rows(vocabSize);
    ({ cos: this.#ropeCos, sin: this.#ropeSin } = ropeTables(config));
  }

  /**
   * Runs 1 to STEP_TOKENS tokens through the model, at the positions behind those the cache holds, and commits them.
   *
   * Gives the logits of the token behind the last one, `[vocab]`, or behind every one, `[token][vocab]`. They stay
   * valid until the next call.
   */
  forward(
    tokens: Uint8Array,
    cache: KvCache,
    logitsOf: "last" | "all" = "last",
    options: StepOptions = {},
  ): Float32Array {
    return this.run(tokens, sequenceStep(cache, tokens, options), logitsOf);
  }

  /** The same for a step of any kind, which has a position for each token. */
  run(tokens: Uint8Array, step: Step, logitsOf: "last" | "all"): Float32Array {
    const { hiddenSize, layerCount, qHeadCount, kvHeadCount, headDim, intermediateSize, rmsNormEps } = this.config;
    const n = tokens.length;
    this.#check(step);
    const { embedding, layers, finalNorm } = this.#weights;
    const qSize = qHeadCount * headDim;
    const kvSize = kvHeadCount * headDim;
    // What the cache gets has to be exactly n rows long; the rest may be longer.
    const q = this.#q.subarray(0, n * qSize); // [token][q_head][head_dim]
    const k = this.#k.subarray(0, n * kvSize); // [token][kv_head][head_dim]
    const v = this.#v.subarray(0, n * kvSize); // [token][kv_head][head_dim]
    const attended = this.#attended.subarray(0, n * qSize); // [token][q_head][head_dim]

    // 1. Each token starts as its row of the embedding.
    for (let token = 0; token < n; token++) {
      const row = tokens[token]! * hiddenSize;
      this.#x.set(embedding.subarray(row, row + hiddenSize), token * hiddenSize);
    }

    for (let layer = 0; layer < layerCount; layer++) {
      const w = layers[layer]!;

      // 2. Queries, keys and values of the normed input; queries and keys are turned to their position.
      rmsNorm(this.#normed, this.#x, w.inputNorm, n, hiddenSize, rmsNormEps);
      matmul(q, this.#normed, w.qProj, n, hiddenSize, qSize);
      matmul(k, this.#normed, w.kProj, n, hiddenSize, kvSize);
      matmul(v, this.#normed, w.vProj, n, hiddenSize, kvSize);
      rope(q, this.#ropeCos, this.#ropeSin, n, qHeadCount, headDim, step.positions);
      rope(k, this.#ropeCos, this.#ropeSin, n, kvHeadCount, headDim, step.positions);

      // 3. The cache keeps keys and values, and attends: a query sees its own position and those before it.
      step.append(layer, k, v);
      const attendStart = performance.now();
      step.attend(layer, q, attended);
      this.attendSeconds += (performance.now() - attendStart) / 1000;

      // 4. What attention found joins the residual stream.
      matmul(this.#projected, attended, w.oProj, n, qSize, hiddenSize);
      add(this.#x, this.#projected, n * hiddenSize);

      // 5. SwiGLU: down(silu(gate(x)) * up(x)) joins it as well.
      rmsNorm(this.#normed, this.#x, w.postAttentionNorm, n, hiddenSize, rmsNormEps);
      matmul(this.#gate, this.#normed, w.gateProj, n, hiddenSize, intermediateSize);
      matmul(this.#up, this.#normed, w.upProj, n, hiddenSize, intermediateSize);
      swiglu(this.#gate, this.#up, n * intermediateSize);
      matmul(this.#projected, this.#gate, w.downProj, n, intermediateSize, hiddenSize);
      add(this.#x, this.#projected, n * hiddenSize);
    }

    // 6. All layers have these tokens now: they count.
    step.commit();

    // 7. Logits: the normed result against the embedding of every token of the vocabulary.
    const first = logitsOf === "all" ? 0 : n - 1;
    return this.#readLogits(first, n - first, finalNorm, embedding);
  }

  /** Runs any number of tokens in steps of at most STEP_TOKENS; gives the logits behind the last one, `[vocab]`. */
  prefill(tokens: Uint8Array, cache: KvCache, options: StepOptions = {}): Float32Array {
    let logits = this.#logits.subarray(0, 0);
    for (let start = 0; start < tokens.length; start += STEP_TOKENS) {
      logits = this.forward(tokens.subarray(start, start + STEP_TOKENS), cache, "last", options);
    }
    return logits;
  }

  /** The logits of `count` rows of the residual stream, `[token][vocab]`. */
  #readLogits(first: number, count: number, finalNorm: Float32Array, embedding: Float32Array): Float32Array {
    const { hiddenSize, vocabSize, rmsNormEps } = this.config;
    const x = this.#x.subarray(first * hiddenSize, (first + count) * hiddenSize); // [token][hidden]
    const logits = this.#logits.subarray(0, count * vocabSize); // [token][vocab]
    rmsNorm(this.#normed, x, finalNorm, count, hiddenSize, rmsNormEps);
    matmul(logits, this.#normed, embedding, count, hiddenSize, vocabSize);
    return logits;
  }

  /** Refuses a step that the model or the cache has no room for, before any buffer is touched. */
  #check(step: Step): void {
    const { layerCount, kvHeadCount, headDim, maxSeqLen } = this.config;
    const tokenCount = step.positions.length;
    if (tokenCount < 1 || tokenCount > STEP_TOKENS) {
      throw new RangeError(`Cannot run ${tokenCount} tokens as a step has 1 to ${STEP_TOKENS}`);
    }
    const last = Math.max(...step.positions);
    if (last >= maxSeqLen) {
      throw new RangeError(
        `Cannot run ${tokenCount} tokens as the model has ${maxSeqLen} positions: the last token has position ${last}`,
      );
    }
    if (step.layerCount !== layerCount || step.kvHeadCount !== kvHeadCount || step.headDim !== headDim) {
      throw new RangeError(
        `Cannot use a cache of ${step.layerCount} layers, ${step.kvHeadCount} KV heads of ${step.headDim}: ` +
          `the model has ${layerCount}, ${kvHeadCount} of ${headDim}`,
      );
    }
  }
}

/** Loads the model from a directory with config.json and model.safetensors; a wrong file is a ModelFileError. */
export function loadZiglet(directory: string): Ziglet {
  const config = readConfig(join(directory, "config.json"));
  return new Ziglet(config, readWeights(join(directory, "model.safetensors"), config));
}

// ------------------------------------------------------------------------------------------------- the numbers

/**
 * out [token][o] = sum over i of x [token][i] * w [o][i]; outSize is a multiple of 4.
 *
 * Four tokens by four outputs at a time: 16 sums from 8 loads. The sums are doubles because every JavaScript number
 * is; rounding each to f32 (Math.fround) halves the speed, f64 arrays gain nothing. On two cores of an AMD EPYC
 * (Zen 5, 2.6 GHz), one thread, 64 tokens: 3.7 GMAC/s in V8 and 5.5 in JavaScriptCore, against 2.9 and 5.0 for tiles
 * of 4 by 2.
 */
function matmul(
  out: Float32Array, // [token][outSize]
  x: Float32Array, // [token][inSize]
  w: Float32Array, // [outSize][inSize]
  tokenCount: number,
  inSize: number,
  outSize: number,
): void {
  const tiledCount = tokenCount - tokenCount % 4;
  if (tiledCount > 0) matmulTiled(out, x, w, tiledCount, inSize, outSize);
  for (let token = tiledCount; token < tokenCount; token++) matvec(out, x, w, token, inSize, outSize);
}

/** matmul of a multiple of 4 tokens. */
function matmulTiled(
  out: Float32Array, // [token][outSize]
  x: Float32Array, // [token][inSize]
  w: Float32Array, // [outSize][inSize]
  tokenCount: number,
  inSize: number,
  outSize: number,
): void {
  // The four rows of w (4 * 704 * 4 B = 11 KiB at most) stay in the L1 cache while all tokens pass by.
  for (let o = 0; o < outSize; o += 4) {
    const w0 = o * inSize, w1 = w0 + inSize, w2 = w1 + inSize, w3 = w2 + inSize;
    for (let token = 0; token < tokenCount; token += 4) {
      const x0 = token * inSize, x1 = x0 + inSize, x2 = x1 + inSize, x3 = x2 + inSize;
      // sTO is the sum of token T and output O of the tile.
      let s00 = 0, s01 = 0, s02 = 0, s03 = 0;
      let s10 = 0, s11 = 0, s12 = 0, s13 = 0;
      let s20 = 0, s21 = 0, s22 = 0, s23 = 0;
      let s30 = 0, s31 = 0, s32 = 0, s33 = 0;
      for (let i = 0; i < inSize; i++) {
        const a = x[x0 + i]!, b = x[x1 + i]!, c = x[x2 + i]!, d = x[x3 + i]!;
        let weight = w[w0 + i]!;
        s00 += a * weight, s10 += b * weight, s20 += c * weight, s30 += d * weight;
        weight = w[w1 + i]!;
        s01 += a * weight, s11 += b * weight, s21 += c * weight, s31 += d * weight;
        weight = w[w2 + i]!;
        s02 += a * weight, s12 += b * weight, s22 += c * weight, s32 += d * weight;
        weight = w[w3 + i]!;
        s03 += a * weight, s13 += b * weight, s23 += c * weight, s33 += d * weight;
      }
      let row = token * outSize + o;
      out[row] = s00, out[row + 1] = s01, out[row + 2] = s02, out[row + 3] = s03;
      row += outSize;
      out[row] = s10, out[row + 1] = s11, out[row + 2] = s12, out[row + 3] = s13;
      row += outSize;
      out[row] = s20, out[row + 1] = s21, out[row + 2] = s22, out[row + 3] = s23;
      row += outSize;
      out[row] = s30, out[row + 1] = s31, out[row + 2] = s32, out[row + 3] = s33;
    }
  }
}

/** matmul of one token: four outputs at a time, whose sums do not wait for each other. */
function matvec(
  out: Float32Array, // [token][outSize]
  x: Float32Array, // [token][inSize]
  w: Float32Array, // [outSize][inSize]
  token: number,
  inSize: number,
  outSize: number,
): void {
  const xRow = token * inSize;
  const outRow = token * outSize;
  for (let o = 0; o < outSize; o += 4) {
    const w0 = o * inSize, w1 = w0 + inSize, w2 = w1 + inSize, w3 = w2 + inSize;
    let s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    for (let i = 0; i < inSize; i++) {
      const a = x[xRow + i]!;
      s0 += a * w[w0 + i]!, s1 += a * w[w1 + i]!, s2 += a * w[w2 + i]!, s3 += a * w[w3 + i]!;
    }
    out[outRow + o] = s0, out[outRow + o + 1] = s1, out[outRow + o + 2] = s2, out[outRow + o + 3] = s3;
  }
}

/** out = x / sqrt(mean(x^2) + eps) * weight, row by row. */
function rmsNorm(
  out: Float32Array, // [token][size]
  x: Float32Array, // [token][size]
  weight: Float32Array, // [size]
  tokenCount: number,
  size: number,
  eps: number,
): void {
  for (let token = 0; token < tokenCount; token++) {
    const row = token * size;
    let squares = 0;
    for (let i = 0; i < size; i++) squares += x[row + i]! * x[row + i]!;
    const inverse = 1 / Math.sqrt(squares / size + eps);
    for (let i = 0; i < size; i++) out[row + i] = x[row + i]! * inverse * weight[i]!;
  }
}

/** cos and sin of position * theta^(-2 dim / head_dim), both [position][head_dim / 2]. */
function ropeTables({ maxSeqLen, headDim, ropeTheta }: ZigletConfig): { cos: Float32Array; sin: Float32Array } {
  const half = headDim / 2;
  const cos = new Float32Array(maxSeqLen * half);
  const sin = new Float32Array(maxSeqLen * half);
  for (let position = 0; position < maxSeqLen; position++) {
    for (let dim = 0; dim < half; dim++) {
      const angle = position * ropeTheta ** (-2 * dim / headDim);
      cos[position * half + dim] = Math.cos(angle);
      sin[position * half + dim] = Math.sin(angle);
    }
  }
  return { cos, sin };
}

/** Turns each pair (dim, dim + head_dim / 2) by the angle of the token's position, in place: the half-split form. */
function rope(
  heads: Float32Array, // [token][head][head_dim]
  cos: Float32Array, // [position][head_dim / 2]
  sin: Float32Array, // [position][head_dim / 2]
  tokenCount: number,
  headCount: number,
  headDim: number,
  positions: Uint32Array, // [token]
): void {
  const half = headDim / 2;
  for (let token = 0; token < tokenCount; token++) {
    const table = positions[token]! * half;
    for (let head = 0; head < headCount; head++) {
      const row = (token * headCount + head) * headDim;
      for (let dim = 0; dim < half; dim++) {
        const first = heads[row + dim]!, second = heads[row + half + dim]!;
        const c = cos[table + dim]!, s = sin[table + dim]!;
        heads[row + dim] = first * c - second * s;
        heads[row + half + dim] = second * c + first * s;
      }
    }
  }
}

/** gate = silu(gate) * up, where silu(x) = x / (1 + e^-x). */
function swiglu(gate: Float32Array, up: Float32Array, count: number): void {
  for (let i = 0; i < count; i++) gate[i] = gate[i]! / (1 + Math.exp(-gate[i]!)) * up[i]!;
}

/** x += y. */
function add(x: Float32Array, y: Float32Array, count: number): void {
  for (let i = 0; i < count; i++) x[i]! += y[i]!;
}
