/** Decoders of Llama's shape as GGUF files, which llama.cpp reads: a header of keys and values, and tensors in f32. */
import { closeSync, openSync, writeSync } from "node:fs";
import { type DecoderShape, type DecoderWeights, interleavedHeads } from "../../tests/onnx/shapes.ts";

/** Tensors begin at a multiple of that. */
const ALIGNMENT = 32;

/** Numbers of the types of values. */
const U32 = 4, F32 = 6, TEXT = 8;

/** Writes the file at `path`. */
export function writeGguf(path: string, shape: DecoderShape, weights: DecoderWeights): void {
  const header = new Header(tensorsOf(shape, weights), metadataOf(shape)).bytes();
  const file = openSync(path, "w");
  try {
    writeWhole(file, padded(header));
    for (const { values } of tensorsOf(shape, weights)) {
      writeWhole(file, padded(new Uint8Array(values.buffer, values.byteOffset, values.byteLength)));
    }
  } finally {
    closeSync(file);
  }
}

interface GgufTensor {
  readonly name: string;
  /** Axis lengths, the innermost first. */
  readonly dims: readonly number[];
  readonly values: Float32Array;
}

type Metadata = readonly (readonly [key: string, type: number, value: number | string])[];

function metadataOf(shape: DecoderShape): Metadata {
  return [
    ["general.architecture", TEXT, "llama"],
    ["general.alignment", U32, ALIGNMENT],
    ["general.file_type", U32, 0],
    ["llama.context_length", U32, shape.maxSeqLen],
    ["llama.embedding_length", U32, shape.hiddenSize],
    ["llama.block_count", U32, shape.layerCount],
    ["llama.feed_forward_length", U32, shape.intermediateSize],
    ["llama.attention.head_count", U32, shape.qHeadCount],
    ["llama.attention.head_count_kv", U32, shape.kvHeadCount],
    ["llama.attention.key_length", U32, shape.headDim],
    ["llama.attention.value_length", U32, shape.headDim],
    ["llama.rope.dimension_count", U32, shape.headDim],
    ["llama.rope.freq_base", F32, shape.ropeTheta],
    ["llama.attention.layer_norm_rms_epsilon", F32, shape.rmsNormEps],
    ["llama.vocab_size", U32, shape.vocabSize],
    ["tokenizer.ggml.model", TEXT, "no_vocab"],
  ];
}

/** The tensors by llama.cpp's names; its Llama rotates pairs that lie side by side. */
function tensorsOf(shape: DecoderShape, weights: DecoderWeights): GgufTensor[] {
  const { hiddenSize, vocabSize } = shape;
  const matrix = (name: string, values: Float32Array, inSize: number): GgufTensor => ({
    name: `${name}.weight`,
    dims: [inSize, values.length / inSize],
    values,
  });
  const vector = (name: string, values: Float32Array): GgufTensor => ({
    name: `${name}.weight`,
    dims: [values.length],
    values,
  });
  return [
    { name: "token_embd.weight", dims: [hiddenSize, vocabSize], values: weights.embedding },
    vector("output_norm", weights.finalNorm),
    ...interleavedHeads(shape, weights).layers.flatMap((layer, i) => {
      const name = `blk.${i}`;
      return [
        vector(`${name}.attn_norm`, layer.inputNorm),
        vector(`${name}.ffn_norm`, layer.mlpNorm),
        matrix(`${name}.attn_q`, layer.qProj, hiddenSize),
        matrix(`${name}.attn_k`, layer.kProj, hiddenSize),
        matrix(`${name}.attn_v`, layer.vProj, hiddenSize),
        matrix(`${name}.attn_output`, layer.oProj, shape.qHeadCount * shape.headDim),
        matrix(`${name}.ffn_gate`, layer.gateProj, hiddenSize),
        matrix(`${name}.ffn_up`, layer.upProj, hiddenSize),
        matrix(`${name}.ffn_down`, layer.downProj, shape.intermediateSize),
      ];
    }),
  ];
}

/** The header of a file: what it is, keys and values, and where which tensor lies. */
class Header {
  readonly #parts: Uint8Array[] = [];

  constructor(tensors: readonly GgufTensor[], metadata: Metadata) {
    this.#parts.push(new TextEncoder().encode("GGUF"));
    this.#u32(3).#u64(tensors.length).#u64(metadata.length);
    for (const [key, type, value] of metadata) {
      this.#text(key).#u32(type);
      if (typeof value === "string") this.#text(value);
      else if (type === U32) this.#u32(value);
      else this.#parts.push(new Uint8Array(Float32Array.of(value).buffer));
    }
    let offset = 0;
    for (const { name, dims, values } of tensors) {
      this.#text(name).#u32(dims.length);
      for (const length of dims) this.#u64(length);
      this.#u32(0).#u64(offset); // type f32
      offset += Math.ceil(values.byteLength / ALIGNMENT) * ALIGNMENT;
    }
  }

  bytes(): Uint8Array {
    const bytes = new Uint8Array(this.#parts.reduce((size, part) => size + part.length, 0));
    let end = 0;
    for (const part of this.#parts) {
      bytes.set(part, end);
      end += part.length;
    }
    return bytes;
  }

  #u32(value: number): this {
    this.#parts.push(new Uint8Array(Uint32Array.of(value).buffer));
    return this;
  }

  #u64(value: number): this {
    this.#parts.push(new Uint8Array(BigUint64Array.of(BigInt(value)).buffer));
    return this;
  }

  #text(value: string): this {
    const bytes = new TextEncoder().encode(value);
    this.#u64(bytes.length).#parts.push(bytes);
    return this;
  }
}

function padded(bytes: Uint8Array): Uint8Array {
  const rest = bytes.length % ALIGNMENT;
  if (rest === 0) return bytes;
  const whole = new Uint8Array(bytes.length + ALIGNMENT - rest);
  whole.set(bytes);
  return whole;
}

function writeWhole(file: number, bytes: Uint8Array): void {
  for (let start = 0; start < bytes.length;) start += writeSync(file, bytes, start);
}
