/**
 * The files of ziglet: config.json (the shape of the model) and model.safetensors (its weights, bfloat16).
 *
 *     [ header bytes, u64 ][ header, JSON: name -> { dtype, shape, data_offsets } ][ data ]
 *
 * Nothing is taken on trust. The tensors have to be the ones that the config asks for, and to cover the data without a
 * gap, so a truncated file, a flipped bit of the header and bytes behind the last tensor are all refused. A flipped bit
 * of the data is only seen where it makes a NaN or an infinity: the format has no checksum.
 */
import { readFileSync } from "node:fs";

/** A file of the model that is missing, damaged, or not what the config says; the message names it and is one line. */
export class ModelFileError extends Error {
  override name = "ModelFileError";

  constructor(path: string, problem: string) {
    super(`${path}: ${problem}`);
  }
}

/** The shape of the model, from its config.json. */
export interface ZigletConfig {
  vocabSize: number;
  hiddenSize: number;
  layerCount: number;
  qHeadCount: number;
  kvHeadCount: number;
  headDim: number;
  intermediateSize: number;
  /** The context: positions 0 to maxSeqLen - 1. */
  maxSeqLen: number;
  ropeTheta: number;
  rmsNormEps: number;
  /** The token at position 0 of every text. */
  bosToken: number;
}

/** Weights of one layer. */
export interface LayerWeights {
  inputNorm: Float32Array; // [hidden]
  qProj: Float32Array; // [q_head * head_dim][hidden]
  kProj: Float32Array; // [kv_head * head_dim][hidden]
  vProj: Float32Array; // [kv_head * head_dim][hidden]
  oProj: Float32Array; // [hidden][q_head * head_dim]
  postAttentionNorm: Float32Array; // [hidden]
  gateProj: Float32Array; // [intermediate][hidden]
  upProj: Float32Array; // [intermediate][hidden]
  downProj: Float32Array; // [hidden][intermediate]
}

/** Weights of the model. */
export interface Weights {
  embedding: Float32Array; // [vocab][hidden], also the output matrix (tied)
  layers: LayerWeights[]; // [layer]
  finalNorm: Float32Array; // [hidden]
}

/** Reads config.json, and checks all that the code above relies on. */
export function readConfig(path: string): ZigletConfig {
  const fail = (problem: string): never => {
    throw new ModelFileError(path, problem);
  };
  let json: unknown;
  try {
    json = JSON.parse(new TextDecoder().decode(readModelFile(path)));
  } catch (error) {
    if (error instanceof ModelFileError) throw error;
    fail("is not JSON");
  }
  if (!isRecord(json)) return fail("is not a JSON object");
  const fields = json;

  /** An integer from min up; 65536 is far above any model that this code could run. */
  const integer = (name: string, min = 1, max = 65536): number => {
    const value = fields[name];
    if (typeof value === "number" && Number.isInteger(value) && value >= min && value <= max) return value;
    return fail(`${name} must be an integer from ${min} to ${max}, not ${JSON.stringify(value)}`);
  };
  const positive = (name: string): number => {
    const value = fields[name];
    if (typeof value === "number" && value > 0 && Number.isFinite(value)) return value;
    return fail(`${name} must be a positive number, not ${JSON.stringify(value)}`);
  };

  const config: ZigletConfig = {
    vocabSize: integer("vocab_size"),
    hiddenSize: integer("hidden_size"),
    layerCount: integer("num_hidden_layers"),
    qHeadCount: integer("num_attention_heads"),
    kvHeadCount: integer("num_key_value_heads"),
    headDim: integer("head_dim", 2, 256),
    intermediateSize: integer("intermediate_size"),
    maxSeqLen: integer("max_position_embeddings"),
    ropeTheta: positive("rope_theta"),
    rmsNormEps: positive("rms_norm_eps"),
    bosToken: integer("bos_token_id", 0),
  };
  const { vocabSize, hiddenSize, qHeadCount, kvHeadCount, headDim, intermediateSize, bosToken } = config;
  if (vocabSize !== 256) fail(`vocab_size must be 256, as a token is a byte, not ${vocabSize}`);
  if (bosToken >= vocabSize) fail(`bos_token_id must be below vocab_size, not ${bosToken}`);
  if (fields.tie_word_embeddings !== true) fail("tie_word_embeddings must be true: there is no other output matrix");
  if (qHeadCount % kvHeadCount !== 0) {
    fail(`num_attention_heads (${qHeadCount}) must be a multiple of num_key_value_heads (${kvHeadCount})`);
  }
  // The half-split form pairs dims; matmul makes four outputs at a time.
  if (headDim % 4 !== 0) fail(`head_dim must be a multiple of 4, not ${headDim}`);
  if (hiddenSize % 4 !== 0) fail(`hidden_size must be a multiple of 4, not ${hiddenSize}`);
  if (intermediateSize % 4 !== 0) fail(`intermediate_size must be a multiple of 4, not ${intermediateSize}`);
  return config;
}

/** Reads model.safetensors: every tensor that the config asks for, in its shape, and no other. */
export function readWeights(path: string, config: ZigletConfig): Weights {
  const { vocabSize, hiddenSize, layerCount, qHeadCount, kvHeadCount, headDim, intermediateSize } = config;
  const qSize = qHeadCount * headDim;
  const kvSize = kvHeadCount * headDim;
  const tensors = readSafetensors(path);

  const take = (name: string, ...shape: number[]): Float32Array => {
    const tensor: Tensor | undefined = tensors.get(name);
    if (tensor === undefined) throw new ModelFileError(path, `has no tensor "${name}"`);
    if (tensor.shape.join() !== shape.join()) {
      throw new ModelFileError(path, `tensor "${name}" has shape [${tensor.shape}], the config says [${shape}]`);
    }
    tensors.delete(name);
    return tensor.data;
  };

  const embedding = take("model.embed_tokens.weight", vocabSize, hiddenSize);
  const layers: LayerWeights[] = [];
  for (let layer = 0; layer < layerCount; layer++) {
    const prefix = `model.layers.${layer}`;
    layers.push({
      inputNorm: take(`${prefix}.input_layernorm.weight`, hiddenSize),
      qProj: take(`${prefix}.q_proj.weight`, qSize, hiddenSize),
      kProj: take(`${prefix}.k_proj.weight`, kvSize, hiddenSize),
      vProj: take(`${prefix}.v_proj.weight`, kvSize, hiddenSize),
      oProj: take(`${prefix}.o_proj.weight`, hiddenSize, qSize),
      postAttentionNorm: take(`${prefix}.post_attention_layernorm.weight`, hiddenSize),
      gateProj: take(`${prefix}.gate_proj.weight`, intermediateSize, hiddenSize),
      upProj: take(`${prefix}.up_proj.weight`, intermediateSize, hiddenSize),
      downProj: take(`${prefix}.down_proj.weight`, hiddenSize, intermediateSize),
    });
  }
  const finalNorm = take("model.norm.weight", hiddenSize);

  const [extra] = tensors.keys();
  if (extra !== undefined) throw new ModelFileError(path, `has a tensor that the config does not: "${extra}"`);
  return { embedding, layers, finalNorm };
}

// ------------------------------------------------------------------------------------------------- safetensors

/** One tensor, widened to f32. */
interface Tensor {
  /** Axis lengths, outermost first. */
  shape: number[];
  /** The elements, last axis fastest. */
  data: Float32Array;
}

interface HeaderEntry {
  name: string;
  shape: number[];
  begin: number; // bytes from the start of the data
  end: number;
}

const HEADER_LENGTH_BYTES = 8;
const BF16_BYTES = 2;
const BF16_EXPONENT = 0x7f80; // all ones: NaN or infinity

/** Reads a file whole; a file that cannot be read is a ModelFileError. */
function readModelFile(path: string): Uint8Array<ArrayBuffer> {
  try {
    return new Uint8Array(readFileSync(path));
  } catch (error) {
    const code = (error as { code?: string }).code;
    throw new ModelFileError(path, code === "ENOENT" ? "no such file" : `cannot be read (${code ?? error})`);
  }
}

/** Reads every tensor of the file at `path`. */
function readSafetensors(path: string): Map<string, Tensor> {
  const bytes = readModelFile(path);
  const { entries, dataStart } = readHeader(path, bytes);
  const tensors = new Map<string, Tensor>();
  for (const { name, shape, begin, end } of entries) {
    // slice, not subarray: the copy starts at an even address wherever the header ended.
    const bits = new Uint16Array(bytes.slice(dataStart + begin, dataStart + end).buffer);
    tensors.set(name, { shape, data: widen(path, name, bits) });
  }
  return tensors;
}

/** Reads and checks the header: afterwards every entry lies inside the file and the entries cover its data. */
function readHeader(path: string, bytes: Uint8Array<ArrayBuffer>): { entries: HeaderEntry[]; dataStart: number } {
  const fail = (problem: string): never => {
    throw new ModelFileError(path, problem);
  };
  if (bytes.length < HEADER_LENGTH_BYTES) {
    fail(`holds ${bytes.length} bytes, too few for the header length of a safetensors file`);
  }
  const littleEndian = true;
  const headerLength = new DataView(bytes.buffer).getBigUint64(0, littleEndian);
  if (headerLength > BigInt(bytes.length - HEADER_LENGTH_BYTES)) {
    fail(`says its header is ${headerLength} bytes long, but ends after ${bytes.length} bytes`);
  }
  const dataStart = HEADER_LENGTH_BYTES + Number(headerLength);
  const dataBytes = bytes.length - dataStart;

  let header: unknown;
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(bytes.subarray(HEADER_LENGTH_BYTES, dataStart));
    header = JSON.parse(text);
  } catch {
    fail("its header is not JSON");
  }
  if (!isRecord(header)) return fail("its header is not a JSON object");

  const entries: HeaderEntry[] = [];
  for (const [name, value] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const label = JSON.stringify(name);
    if (!isRecord(value)) return fail(`the header entry of ${label} is not an object`);
    const { dtype, shape, data_offsets: offsets } = value;
    if (dtype !== "BF16") fail(`tensor ${label} has dtype ${JSON.stringify(dtype)}, not "BF16"`);
    if (!isCounts(shape)) return fail(`tensor ${label} has no valid shape`);
    if (!isCounts(offsets) || offsets.length !== 2) return fail(`tensor ${label} has no valid data_offsets`);
    const [begin, end] = offsets as [number, number];
    if (end > dataBytes) fail(`tensor ${label} ends at byte ${end} of the data, which has ${dataBytes} (truncated?)`);
    const tensorBytes = shape.reduce((product, length) => product * length, BF16_BYTES);
    if (end - begin !== tensorBytes) {
      fail(`tensor ${label} of shape [${shape}] needs ${tensorBytes} bytes, its data_offsets give ${end - begin}`);
    }
    entries.push({ name, shape, begin, end });
  }

  entries.sort((a, b) => a.begin - b.begin || a.end - b.end);
  let covered = 0;
  for (const { name, begin, end } of entries) {
    if (begin !== covered) {
      fail(`tensor ${JSON.stringify(name)} starts at byte ${begin} of the data, not at ${covered} where the last ends`);
    }
    covered = end;
  }
  if (covered !== dataBytes) fail(`has ${dataBytes - covered} bytes that belong to no tensor`);
  return { entries, dataStart };
}

/** bfloat16 is the upper half of an f32. */
function widen(path: string, name: string, bits: Uint16Array): Float32Array {
  const words = new Uint32Array(bits.length);
  for (let i = 0; i < bits.length; i++) {
    if ((bits[i]! & BF16_EXPONENT) === BF16_EXPONENT) {
      throw new ModelFileError(path, `tensor ${JSON.stringify(name)} has a NaN or an infinity at element ${i}`);
    }
    words[i] = bits[i]! << 16;
  }
  return new Float32Array(words.buffer);
}

/** Whether a JSON value is an object (and no array). */
function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function isCounts(value: unknown): value is number[] {
  return Array.isArray(value) && value.every((count) => Number.isSafeInteger(count) && count >= 0);
}
