/**
 * What a decoder is loaded with: onnxruntime, and the options of its cache that the model leaves open.
 *
 * @module
 */

import { KvError } from "../error.ts";
import { checkOption } from "../options/counts.ts";
import { type OptionNames, optionNames } from "../options/option_names.ts";
import type { PagedCacheOptions } from "../paged_cache.ts";
import type { AttentionLayer } from "./cut/cut_model.ts";
import type { ModelConfig } from "./model_config.ts";
import { checkOrt, type Ort, type OrtSessionOptions } from "./ort.ts";
import { checkTokens } from "./tokens.ts";

/** What an {@linkcode OnnxDecoder} is loaded with: all of {@linkcode PagedCacheOptions} that the model leaves open, and these. */
export interface OnnxDecoderOptions extends
  Omit<
    PagedCacheOptions,
    "layers" | "layerCount" | "kvHeadCount" | "headDim" | "qHeadCount" | "windowTokens" | "maxSeqLen"
  > {
  /** The package `onnxruntime-node` or `onnxruntime-web`. */
  readonly ort: Ort;
  /**
   * Tokens each sequence can hold; by default as many as `config.json` or `genai_config.json` beside the model say it was
   * made for. Needed for a model without such a file.
   */
  readonly maxSeqLen?: number;
  /**
   * Options of each session of onnxruntime, which has one for each layer and one more: `intraOpNumThreads` and the others.
   * Attention has threads of its own, see `setThreadCount`.
   */
  readonly session?: OrtSessionOptions;
  /**
   * Tokens that end a text, see {@linkcode OnnxDecoder.endTokens}; by default those that `generation_config.json`,
   * `config.json` or `genai_config.json` beside the model say.
   */
  readonly endTokens?: ArrayLike<number>;
  /**
   * Most tokens that go through the model together, 512 by default: longer prompts go through it in parts. It bounds the
   * memory that onnxruntime takes.
   */
  readonly tokensPerRun?: number;
}

/** The checked options. */
export interface DecoderPlan {
  readonly ort: Ort;
  readonly session: OrtSessionOptions | undefined;
  readonly endTokens: readonly number[];
  readonly tokensPerRun: number;
  /** Whether others than this cache name its rows, so that the model belongs to their names. */
  readonly namesModel: boolean;
  readonly cache: PagedCacheOptions;
}

const LOAD = "load a decoder";

const TOKENS_PER_RUN_DEFAULT = 512;

/** What the model says of its cache: each option that a decoder's lack. */
const MODEL_OPTIONS: OptionNames = optionNames<Omit<PagedCacheOptions, keyof OnnxDecoderOptions>>({
  layers: true,
  layerCount: true,
  kvHeadCount: true,
  headDim: true,
  qHeadCount: true,
  windowTokens: true,
});

/** Reads the options; those of the cache are checked where it is made. */
export function decoderPlan(
  options: OnnxDecoderOptions,
  layers: readonly AttentionLayer[],
  config: ModelConfig | undefined,
): DecoderPlan {
  if (typeof options !== "object" || options === null) {
    throw new TypeError(`Cannot ${LOAD} as its options must be an object with ort: it is ${options && typeof options}`);
  }
  for (const name of MODEL_OPTIONS) {
    if (!(name in options)) continue;
    throw refuse(`the model says what its layers are: ${name} is given`);
  }
  const { ort, session, endTokens, tokensPerRun = TOKENS_PER_RUN_DEFAULT, maxSeqLen, ...rest } = options;
  if (session !== undefined && (typeof session !== "object" || session === null)) {
    throw new TypeError(`session must be an object: ${session === null ? "null" : typeof session}`);
  }
  return {
    ort: checkOrt(ort),
    session,
    endTokens: endTokens === undefined ? config?.endTokens ?? [] : [...checkTokens("endTokens", endTokens)],
    tokensPerRun: checkOption("tokensPerRun", tokensPerRun, LOAD),
    namesModel: rest.prefix?.events === true,
    cache: { ...rest, layers: layers.map(shapeOf), maxSeqLen: lengthOf(maxSeqLen, config) },
  };
}

/** The shape that attention gives a layer of the cache. */
function shapeOf({ kvHeadCount, headDim, qHeadCount, windowTokens }: AttentionLayer) {
  return { kvHeadCount, headDim, qHeadCount, ...(windowTokens === undefined ? {} : { windowTokens }) };
}

/** Tokens of a sequence: as given, or as the model was made for. */
function lengthOf(maxSeqLen: number | undefined, config: ModelConfig | undefined): number {
  if (maxSeqLen !== undefined) return maxSeqLen;
  if (config?.positionCount !== undefined) return config.positionCount;
  throw refuse("maxSeqLen must be given: no config.json beside the model says max_position_embeddings");
}

function refuse(rule: string): KvError {
  return new KvError("invalid_config", `Cannot ${LOAD} as ${rule}`);
}
