/**
 * llama.cpp's attention on a CPU, ggml's `ggml_flash_attn_ext`, called by FFI from the process of the bench.
 *
 * The package has one library for each kind of CPU. All that can run here are timed in a short run and the fastest is
 * taken, since it is not always the one that llama.cpp would take. What is faster than in llama.cpp is done: rows are
 * `[kv_head][token][head_dim]`, which takes about 0.75 of the time of llama.cpp's `[token][kv_head][head_dim]`, and huge
 * pages are asked for. Threads live on between calls, and graphs are built once.
 */
import { readdirSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import type { DType } from "../../mod.ts";
import type { AttentionCase } from "../attention_loop.ts";
import { headMajor } from "../inputs.ts";
import { type Functions, memoryAt, openNative } from "./native.ts";

const FOLDER = fileURLToPath(
  new URL("node_modules/@node-llama-cpp/linux-x64/bins/linux-x64/", import.meta.url),
);

/** ggml's numbers of types, and the bytes of as many values. */
const TYPES: Readonly<Partial<Record<DType, readonly [type: number, values: number, bytes: number]>>> = {
  f32: [0, 1, 4],
  f16: [1, 1, 2],
  bf16: [30, 1, 2],
  q4_0: [2, 32, 18],
  q8_0: [8, 32, 34],
};

const BASE = {
  // A struct of 24 bytes goes over the stack: after six words for the registers come size, memory and no_alloc.
  ggml_init: [["u64", "u64", "u64", "u64", "u64", "u64", "u64", "u64", "u64"], "u64"],
  ggml_free: [["u64"], "void"],
  ggml_get_mem_buffer: [["u64"], "u64"],
  ggml_new_tensor_3d: [["u64", "i32", "i64", "i64", "i64"], "u64"],
  ggml_permute: [["u64", "u64", "i32", "i32", "i32", "i32"], "u64"],
  ggml_get_data: [["u64"], "u64"],
  ggml_flash_attn_ext: [["u64", "u64", "u64", "u64", "u64", "f32", "f32", "f32"], "u64"],
  ggml_new_graph_custom: [["u64", "u64", "i32"], "u64"],
  ggml_build_forward_expand: [["u64", "u64"], "void"],
  ggml_quantize_chunk: [["i32", "buffer", "u64", "i64", "i64", "i64", "u64"], "u64"],
  ggml_threadpool_params_init: [["buffer", "i32"], "void"],
  quantize_row_q8_0_ref: [["buffer", "buffer", "i64"], "void"],
  quantize_row_q4_0_ref: [["buffer", "buffer", "i64"], "void"],
} as const;

const CPU = {
  ggml_backend_score: [[], "i32"],
  ggml_cpu_init: [[], "void"],
  ggml_threadpool_new: [["buffer"], "u64"],
  ggml_threadpool_free: [["u64"], "void"],
  // The result is a struct that the caller makes room for.
  ggml_graph_plan: [["buffer", "u64", "i32", "u64"], "u64"],
  ggml_graph_compute: [["u64", "buffer"], "i32"],
  quantize_row_q8_0: [["buffer", "buffer", "i64"], "void"],
  quantize_row_q4_0: [["buffer", "buffer", "i64"], "void"],
} as const;

type Base = Functions<typeof BASE>;
type Cpu = Functions<typeof CPU>;

/** ggml as it is installed: its library of tensors, and its kernels for this CPU. */
interface Ggml {
  readonly base: Base;
  readonly variants: ReadonlyMap<string, Cpu>;
}

let opened: Ggml | null | undefined;

/** Opens ggml once; null where it is not installed or cannot be opened. */
function ggml(): Ggml | null {
  if (opened !== undefined) return opened;
  try {
    opened = openGgml();
  } catch {
    opened = null;
  }
  return opened;
}

function openGgml(): Ggml {
  const files = readdirSync(FOLDER).sort();
  const base = openNative(join(FOLDER, "libggml-base.so"), BASE);
  const variants = new Map<string, Cpu>();
  for (const file of files) {
    const name = /^libggml-cpu-(.+)\.so$/.exec(file)?.[1];
    if (name === undefined) continue;
    const cpu = openNative(join(FOLDER, file), CPU);
    if (cpu.ggml_backend_score() <= 0) continue; // it has instructions that this CPU does not
    cpu.ggml_cpu_init();
    variants.set(name, cpu);
  }
  return { base, variants };
}

const F32 = 0, F16 = 1, I8 = 24;
/** Minus infinity as f16. */
const MINUS_INFINITY = 0xfc00;
/** For what a call computes on the way. */
const SCRATCH_BYTES = 2 ** 26;
/** For the descriptions of a layer's tensors and of its graph. */
const LAYER_BYTES = 2 ** 14;

/** Layers of the same rows, and a graph of one attention for each. */
class Layers implements Disposable {
  readonly graphs: readonly bigint[];
  /** The result of the first layer. */
  readonly output: Float32Array;
  readonly scratch: bigint;
  readonly #free: () => void;

  constructor(base: Base, attention: AttentionCase, kv: DType, layerCount: number) {
    const { q, k, v, queryCount, kvHeadCount, headDim, gqa } = attention;
    const [type, groupValues, groupBytes] = TYPES[kv]!;
    const tokens = k.length / (kvHeadCount * headDim);
    const sideBytes = k.length / groupValues * groupBytes;
    const maskCount = queryCount === 1 ? 0 : tokens * queryCount;
    const bytes = layerCount * (2 * sideBytes + q.byteLength + LAYER_BYTES) + q.byteLength + 2 * maskCount +
      SCRATCH_BYTES + LAYER_BYTES;
    const context = base.ggml_init(0n, 0n, 0n, 0n, 0n, 0n, BigInt(bytes), 0n, 0n);
    if (context === 0n) throw new Error(`ggml cannot have ${bytes} bytes`);
    adviseHugePages(base.ggml_get_mem_buffer(context), bytes);
    this.#free = () => base.ggml_free(context);

    const tensor = (type: number, x: number, y: number, z: number) =>
      base.ggml_new_tensor_3d(context, type, BigInt(x), BigInt(y), BigInt(z));
    const memory = (tensor: bigint, byteLength: number) => memoryAt(base.ggml_get_data(tensor), byteLength);

    this.scratch = base.ggml_get_data(tensor(I8, SCRATCH_BYTES, 1, 1));
    const queries = tensor(F32, headDim, kvHeadCount * gqa, queryCount);
    new Float32Array(memory(queries, q.byteLength)).set(q);
    const mask = maskCount === 0 ? 0n : tensor(F16, tokens, queryCount, 1);
    if (mask !== 0n) {
      const masked = new Uint16Array(memory(mask, 2 * maskCount)).fill(0);
      for (let query = 0; query < queryCount; query++) {
        const end = (query + 1) * tokens;
        masked.fill(MINUS_INFINITY, end - queryCount + query + 1, end);
      }
    }

    const quantize = (rows: Float32Array) => {
      const side = tensor(type, headDim, tokens, kvHeadCount);
      const rowCount = BigInt(tokens * kvHeadCount), byHead = headMajor(rows, kvHeadCount, headDim);
      base.ggml_quantize_chunk(type, byHead, base.ggml_get_data(side), 0n, rowCount, BigInt(headDim), 0n);
      return side;
    };
    const copy = (of: bigint) => {
      const side = tensor(type, headDim, tokens, kvHeadCount);
      new Uint8Array(memory(side, sideBytes)).set(new Uint8Array(memory(of, sideBytes)));
      return side;
    };
    const attend = (keys: bigint, values: bigint) => {
      const byHead = base.ggml_permute(context, queries, 0, 2, 1, 3);
      const node = base.ggml_flash_attn_ext(context, byHead, keys, values, mask, 1 / Math.sqrt(headDim), 0, 0);
      const graph = base.ggml_new_graph_custom(context, GRAPH_NODES, 0);
      base.ggml_build_forward_expand(graph, node);
      return { graph, node };
    };
    const keys = quantize(k), values = quantize(v);
    const first = attend(keys, values);
    this.output = new Float32Array(memory(first.node, q.byteLength));
    const graphs = [first.graph];
    while (graphs.length < layerCount) graphs.push(attend(copy(keys), copy(values)).graph);
    this.graphs = graphs;
  }

  [Symbol.dispose](): void {
    this.#free();
  }
}

/** Enough for an attention and what it reads. */
const GRAPH_NODES = 16n;

/** Layers with the kernels of a variant and a number of threads. */
class Calls implements Disposable {
  readonly #layers: Layers;
  readonly #cpu: Cpu;
  readonly #pool: bigint;
  readonly #plans: Uint8Array[];

  constructor({ base }: Ggml, cpu: Cpu, layers: Layers, threads: number) {
    this.#layers = layers;
    this.#cpu = cpu;
    const settings = new Uint8Array(1024);
    base.ggml_threadpool_params_init(settings, threads);
    this.#pool = cpu.ggml_threadpool_new(settings);
    this.#plans = layers.graphs.map((graph) => {
      const plan = new Uint8Array(128);
      cpu.ggml_graph_plan(plan, graph, threads, this.#pool);
      const words = new BigUint64Array(plan.buffer);
      if (words[0]! > SCRATCH_BYTES) throw new Error(`ggml needs ${words[0]} bytes for an attention`);
      words[1] = layers.scratch;
      return plan;
    });
  }

  attend(layer: number): void {
    const status = this.#cpu.ggml_graph_compute(this.#layers.graphs[layer]!, this.#plans[layer]!);
    if (status !== 0) throw new Error(`ggml ends an attention with status ${status}`);
  }

  [Symbol.dispose](): void {
    this.#cpu.ggml_threadpool_free(this.#pool);
  }
}

/** The attention of ggml over layers of the same rows. */
export interface GgmlAttention extends Disposable {
  /** The CPU the fastest kernels were compiled for. */
  readonly variant: string;
  readonly layerCount: number;
  /** The result of layer 0. */
  readonly output: Float32Array;
  /** Uses so many threads from now on. */
  setThreads(threads: number): void;
  attend(layer: number): void;
}

/** Rows in `layerCount` layers for ggml; null where it is not installed or has no such format. */
export function ggmlAttention(attention: AttentionCase, kv: DType, layerCount: number): GgmlAttention | null {
  const found = ggml();
  const type = TYPES[kv];
  if (found === null || type === undefined || attention.headDim % 32 !== 0) return null;
  const variant = fastest(found, attention, kv);
  const layers = new Layers(found.base, attention, kv, layerCount);
  let calls = new Calls(found, found.variants.get(variant)!, layers, 1);
  return {
    variant,
    layerCount,
    output: layers.output,
    setThreads(threads) {
      calls[Symbol.dispose]();
      calls = new Calls(found, found.variants.get(variant)!, layers, threads);
    },
    attend: (layer) => calls.attend(layer),
    [Symbol.dispose]() {
      calls[Symbol.dispose]();
      layers[Symbol.dispose]();
    },
  };
}

/** A function of ggml that writes the records of values. */
export interface GgmlQuantizer {
  readonly name: string;
  quantize(rows: Float32Array, records: Uint8Array): void;
}

/** The functions of ggml for a format, the plain one and those for CPUs; none where it is not installed. */
export function ggmlQuantizers(dtype: "q8_0" | "q4_0"): GgmlQuantizer[] {
  const found = ggml();
  if (found === null) return [];
  const { base, variants } = found;
  const plain = base[`quantize_row_${dtype}_ref`];
  return [
    { name: "base", quantize: (rows, records) => plain(rows, records, BigInt(rows.length)) },
    ...[...variants].map(([name, cpu]): GgmlQuantizer => {
      const fast = cpu[`quantize_row_${dtype}`];
      return { name, quantize: (rows, records) => fast(rows, records, BigInt(rows.length)) };
    }),
  ];
}

/** Most rows of a short run. */
const SHORT_TOKENS = 4096;

const winners = new Map<string, string>();

/** The variant that is fastest with one thread and the newest rows. */
function fastest(found: Ggml, attention: AttentionCase, kv: DType): string {
  const { queryCount, kvHeadCount, headDim, gqa, k, v } = attention;
  const start = -SHORT_TOKENS * kvHeadCount * headDim;
  const short = { ...attention, k: k.subarray(start), v: v.subarray(start) };
  const key = [kv, queryCount, headDim, gqa, short.k.length].join();
  const known = winners.get(key);
  if (known !== undefined) return known;
  using layers = new Layers(found.base, short, kv, 1);
  // In turns, so that a moment in which the machine is busy is nobody's.
  let runners = [...found.variants].map(([name, cpu]) => ({
    name,
    calls: new Calls(found, cpu, layers, 1),
    ms: Infinity,
  }));
  for (let round = 0; round < SHORT_ROUNDS; round++) {
    for (const runner of runners) {
      const started = performance.now();
      runner.calls.attend(0);
      runner.ms = Math.min(runner.ms, performance.now() - started);
    }
    runners.sort((a, b) => a.ms - b.ms);
    const isFar = ({ ms }: { ms: number }) => ms > 2 * runners[0]!.ms;
    for (const { calls } of runners.filter(isFar)) calls[Symbol.dispose]();
    runners = runners.filter((runner) => !isFar(runner));
  }
  const best = runners[0]!.name;
  for (const { calls } of runners) calls[Symbol.dispose]();
  winners.set(key, best);
  return best;
}

const SHORT_ROUNDS = 8;

/** Asks for huge pages where the C library is the usual one; without them ggml is slower, and still right. */
function adviseHugePages(address: bigint, bytes: number): void {
  const start = (address + HUGE_PAGE - 1n) & -HUGE_PAGE;
  const end = (address + BigInt(bytes)) & -HUGE_PAGE;
  if (end > start) libc().madvise(start, end - start, MADV_HUGEPAGE);
}

const HUGE_PAGE = 2n ** 21n, MADV_HUGEPAGE = 14;

const LIBC = { madvise: [["u64", "u64", "i32"], "i32"] } as const;

let openedLibc: Functions<typeof LIBC> | undefined;

function libc(): Functions<typeof LIBC> {
  return openedLibc ??= openNative("libc.so.6", LIBC);
}
