/**
 * A whole model on llama.cpp, by the native addon of node-llama-cpp, which is what that package calls: batches of tokens of
 * several sequences, the KV cache llama.cpp's own.
 */
import { createRequire } from "node:module";
import { dirname } from "node:path";
import { fileURLToPath } from "node:url";

const ADDON = fileURLToPath(
  new URL("node_modules/@node-llama-cpp/linux-x64/bins/linux-x64/llama-addon.node", import.meta.url),
);

/** ggml's numbers of the formats of keys and values. */
const KV_TYPES = { f16: 1, q4_0: 2, q8_0: 8 } as const;

/** A format of keys and values in llama.cpp. */
export type LlamaKv = keyof typeof KV_TYPES;

/** The part of the addon that is used here. */
interface Addon {
  readonly AddonModel: new (path: string, parameters: Readonly<Record<string, unknown>>) => Model;
  readonly AddonContext: new (model: Model, parameters: Readonly<Record<string, unknown>>) => Context;
  readonly AddonSampler: new (model: Model) => Sampler;
  markLoaded(): boolean;
  setLogger(logger: (level: number, message: string) => void): void;
  setLoggerLogLevel(level: number): void;
  loadBackends(folder?: string): void;
  getGpuType(): string | false | undefined;
  init(): Promise<void>;
}

interface Model {
  init(): Promise<boolean>;
  dispose(): Promise<void>;
}

interface Context {
  init(): Promise<boolean>;
  dispose(): Promise<void>;
  initBatch(tokenCount: number): void;
  addToBatch(sequence: number, position: number, tokens: Uint32Array, logitIndexes: Uint32Array): Uint32Array;
  decodeBatch(): Promise<void>;
  sampleToken(index: number, sampler: Sampler): Promise<number>;
  removeTokenCellsFromSequence(sequence: number, start: number, end: number): boolean;
  copySequenceStateFromOtherSequence(target: number, source: number): Promise<number>;
  getMemoryBreakdown(): { cpuRam: number };
}

interface Sampler {
  applyConfig(config: Readonly<Record<string, unknown>>): void;
  dispose(): void;
}

/** Nothing below an error is logged. */
const LOG_ERRORS = 2;

let opened: Promise<Addon | null> | undefined;

/** Opens the addon once; null where it is not installed or cannot be opened. */
function addon(): Promise<Addon | null> {
  return opened ??= open();
}

async function open(): Promise<Addon | null> {
  let found: Addon;
  try {
    found = createRequire(import.meta.url)(ADDON);
  } catch {
    return null;
  }
  found.markLoaded();
  found.setLogger(() => {});
  found.setLoggerLogLevel(LOG_ERRORS);
  found.loadBackends();
  if (found.getGpuType() === undefined) found.loadBackends(dirname(ADDON));
  await found.init();
  return found;
}

/** What a model is run with. */
export interface LlamaOptions {
  /** The GGUF file. */
  readonly path: string;
  readonly kv: LlamaKv;
  /** Most tokens of a sequence. */
  readonly maxSeqLen: number;
  readonly sequenceCount: number;
  readonly threads: number;
}

/** Tokens that are computed at once. */
const BATCH_TOKENS = 512;

/** A model in llama.cpp, and a context of so many sequences. */
export class Llama implements AsyncDisposable {
  readonly #model: Model;
  readonly #context: Context;
  readonly #sampler: Sampler;
  readonly #sequenceCount: number;

  private constructor(model: Model, context: Context, sampler: Sampler, sequenceCount: number) {
    this.#model = model;
    this.#context = context;
    this.#sampler = sampler;
    this.#sequenceCount = sequenceCount;
  }

  /** Loads a model; null where the addon is not installed or cannot be opened. */
  static async load({ path, kv, maxSeqLen, sequenceCount, threads }: LlamaOptions): Promise<Llama | null> {
    const found = await addon();
    if (found === null) return null;
    const model = new found.AddonModel(path, { addonExports: found, gpuLayers: 0, useMmap: true });
    if (!await model.init()) throw new Error(`llama.cpp cannot load ${path}`);
    const context = new found.AddonContext(model, {
      contextSize: maxSeqLen * sequenceCount,
      batchSize: BATCH_TOKENS,
      sequences: sequenceCount,
      flashAttention: true,
      threads,
      kvCacheKeyType: KV_TYPES[kv],
      kvCacheValueType: KV_TYPES[kv],
    });
    if (!await context.init()) throw new Error(`llama.cpp cannot make a context of ${maxSeqLen} tokens`);
    const sampler = new found.AddonSampler(model);
    sampler.applyConfig({ temperature: 0 });
    return new Llama(model, context, sampler, sequenceCount);
  }

  /** Bytes of the context: keys and values, and room to compute. */
  get bytes(): number {
    return this.#context.getMemoryBreakdown().cpuRam;
  }

  /** Computes a prompt in sequence 0, and gives it to the others; gives the token that is likeliest behind it. */
  async prefill(tokens: Uint32Array): Promise<number> {
    let likeliest = -1;
    for (let start = 0; start < tokens.length; start += BATCH_TOKENS) {
      const part = tokens.slice(start, start + BATCH_TOKENS);
      this.#context.initBatch(part.length);
      const [index] = this.#context.addToBatch(0, start, part, Uint32Array.of(part.length - 1));
      await this.#context.decodeBatch();
      likeliest = await this.#context.sampleToken(index!, this.#sampler);
    }
    for (let sequence = 1; sequence < this.#sequenceCount; sequence++) {
      await this.#context.copySequenceStateFromOtherSequence(sequence, 0);
    }
    return likeliest;
  }

  /** Computes a token at a position in the first so many sequences, and forgets it again. */
  async step(token: number, position: number, count: number): Promise<void> {
    this.#context.initBatch(count);
    for (let sequence = 0; sequence < count; sequence++) {
      this.#context.addToBatch(sequence, position, Uint32Array.of(token), Uint32Array.of(0));
    }
    await this.#context.decodeBatch();
    for (let sequence = 0; sequence < count; sequence++) {
      this.#context.removeTokenCellsFromSequence(sequence, position, position + 1);
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#sampler.dispose();
    await this.#context.dispose();
    await this.#model.dispose();
  }
}
