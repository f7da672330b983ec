/**
 * onnxruntime's attention on a CPU, the operator `GroupQueryAttention`, called from JavaScript by onnxruntime-node.
 *
 * A call gets the rows so far (`past`), the new ones and the queries, and gives the result and all rows (`present`): the
 * past is copied in every call, as in what is written for JavaScript with it. `present` has its memory before the first
 * call, which is not slower than to leave it to the runtime. The operator can also be given one tensor as past and as
 * present; then it copies nothing and takes 0.55 to 0.8 of the time.
 */
import { createRequire } from "node:module";
// Loaded before Float16Array is out of sight, as the package needs it and its making needs Float16Array in Bun.
import "node:worker_threads";
import type { DType } from "../../mod.ts";
import type { AttentionCase } from "../attention_loop.ts";
import { headMajor } from "../inputs.ts";

type Elements = Float32Array | Uint16Array | Int32Array;

/** A tensor of the package. */
interface Tensor {
  readonly data: Elements;
}

/** The part of the package that is used here. */
interface Package {
  readonly Tensor: new (type: string, data: Elements, dims: readonly number[]) => Tensor;
  readonly InferenceSession: {
    create(model: Uint8Array, options: Readonly<Record<string, unknown>>): Promise<Session>;
  };
}

type Tensors = Readonly<Record<string, Tensor>>;

interface Session {
  run(feeds: Tensors, fetches: Tensors): Promise<Tensors>;
  release(): Promise<void>;
}

let loaded: Package | null | undefined;

/** Loads the package once; null where it is not installed or does not run. */
function onnx(): Package | null {
  return loaded === undefined ? loaded = loadPackage() : loaded;
}

function loadPackage(): Package | null {
  // The package takes f16 as a Float16Array where there is one, which neither runtime hands on to native code.
  const hidden = globalThis.Float16Array;
  try {
    Reflect.deleteProperty(globalThis, "Float16Array");
    const found: Package = createRequire(import.meta.url)("onnxruntime-node");
    new found.Tensor("float16", new Uint16Array(1), [1]); // at its first tensor it looks for Float16Array
    return found;
  } catch {
    return null;
  } finally {
    globalThis.Float16Array = hidden;
  }
}

const INPUTS = ["query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length"];
const OUTPUTS = ["output", "present_key", "present_value"];

/** The element types of ONNX. */
const TYPES = { f32: { code: 1, name: "float32" }, f16: { code: 10, name: "float16" } } as const;
const INT32 = 6;

/** A model of one node, in the protobuf encoding: a message is a list of numbered fields. */
function modelOf(type: number, { kvHeadCount, headDim, gqa }: AttentionCase): Uint8Array {
  const attribute = (name: string, ...value: number[]) => bytes(5, [...text(1, name), ...value]);
  const whole = (name: string, value: number) => attribute(name, ...number(3, value), ...number(20, 2));
  const float = (name: string, value: number) => attribute(name, ...float32(2, value), ...number(20, 1));
  const node = [
    ...INPUTS.flatMap((name) => text(1, name)),
    ...OUTPUTS.flatMap((name) => text(2, name)),
    ...text(4, "GroupQueryAttention"),
    ...text(7, "com.microsoft"),
    ...whole("num_heads", kvHeadCount * gqa),
    ...whole("kv_num_heads", kvHeadCount),
    ...float("scale", 1 / Math.sqrt(headDim)),
  ];
  const value = (field: number, name: string) => {
    const element = name.startsWith("seq") || name.startsWith("total") ? INT32 : type;
    return bytes(field, [...text(1, name), ...bytes(2, bytes(1, number(1, element)))]);
  };
  const graph = [
    ...bytes(1, node),
    ...text(2, "attention"),
    ...INPUTS.flatMap((name) => value(11, name)),
    ...OUTPUTS.flatMap((name) => value(12, name)),
  ];
  const operators = (domain: string, version: number) => bytes(8, [...text(1, domain), ...number(2, version)]);
  const irVersion = number(1, 8);
  return Uint8Array.from([...irVersion, ...bytes(7, graph), ...operators("", 17), ...operators("com.microsoft", 1)]);
}

/** Seven bits a byte, lowest first; the eighth says that more follow. */
function varint(value: number): number[] {
  return value < 128 ? [value] : [value % 128 + 128, ...varint(Math.floor(value / 128))];
}

function number(field: number, value: number): number[] {
  return [...varint(field * 8), ...varint(value)];
}

function bytes(field: number, content: ArrayLike<number>): number[] {
  return [...varint(field * 8 + 2), ...varint(content.length), ...Array.from(content)];
}

function text(field: number, value: string): number[] {
  return bytes(field, new TextEncoder().encode(value));
}

function float32(field: number, value: number): number[] {
  return [...varint(field * 8 + 5), ...new Uint8Array(Float32Array.of(value).buffer)];
}

/** The attention of onnxruntime over layers of the same rows. */
export interface OnnxAttention extends AsyncDisposable {
  readonly layerCount: number;
  /** The result of the last call. */
  output(): Float32Array;
  /** Uses so many threads from now on. */
  setThreads(threads: number): Promise<void>;
  attend(layer: number): Promise<void>;
}

/** Rows in `layerCount` layers for onnxruntime; null where it is not installed or has no such format. */
export function onnxAttention(attention: AttentionCase, kv: DType, layerCount: number): OnnxAttention | null {
  const found = onnx();
  if (found === null || (kv !== "f32" && kv !== "f16")) return null;
  const { q, k, v, queryCount, kvHeadCount, headDim, gqa } = attention;
  const kvDim = kvHeadCount * headDim;
  const tokens = k.length / kvDim, past = tokens - queryCount;
  const type = TYPES[kv];
  const elements = (values: Float32Array) => kv === "f32" ? values : new Uint16Array(new Float16Array(values).buffer);
  const tensor = (data: Elements, dims: readonly number[]) => new found.Tensor(type.name, data, dims);
  const empty = (dims: readonly number[]) => tensor(elements(new Float32Array(dims.reduce((a, b) => a * b))), dims);
  const int32 = (value: number) => new found.Tensor("int32", Int32Array.of(value), [1]);

  const newest = (rows: Float32Array) => tensor(elements(rows.slice(past * kvDim)), [1, queryCount, kvDim]);
  const shared = {
    query: tensor(elements(q), [1, queryCount, gqa * kvDim]),
    key: newest(k),
    value: newest(v),
    seqlens_k: int32(tokens - 1),
    total_sequence_length: int32(tokens),
  };
  const older = (rows: Float32Array) => elements(headMajor(rows.subarray(0, past * kvDim), kvHeadCount, headDim));
  const pastK = older(k), pastV = older(v);
  const pastDims = [1, kvHeadCount, past, headDim], presentDims = [1, kvHeadCount, tokens, headDim];
  const feeds = Array.from({ length: layerCount }, () => ({
    ...shared,
    past_key: tensor(pastK.slice(), pastDims),
    past_value: tensor(pastV.slice(), pastDims),
  }));
  const fetches = {
    output: empty([1, queryCount, gqa * kvDim]),
    present_key: empty(presentDims),
    present_value: empty(presentDims),
  };
  let session: Session | undefined;
  return {
    layerCount,
    output() {
      const { data } = fetches.output;
      return data instanceof Uint16Array
        ? Float32Array.from(new Float16Array(data.slice().buffer))
        : data as Float32Array;
    },
    async setThreads(threads) {
      await session?.release();
      session = await found.InferenceSession.create(modelOf(type.code, attention), {
        intraOpNumThreads: threads,
        interOpNumThreads: 1,
      });
    },
    async attend(layer) {
      await session!.run(feeds[layer]!, fetches);
    },
    async [Symbol.asyncDispose]() {
      await session?.release();
    },
  };
}
