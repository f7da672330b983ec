/**
 * A step as the model sees it: some tokens, where each of them stands, and a cache behind two verbs.
 *
 * The rows of a step belong to one sequence, or to several with a token each; the pass through the layers is the same.
 * All that differs is here.
 */
import type { KvCache, PagedCache, Sequence } from "../mod.ts";

/** What the pass needs to know of the cache. */
export interface Step {
  /** The position of each token, `[token]`. */
  readonly positions: Uint32Array;
  readonly layerCount: number;
  readonly kvHeadCount: number;
  readonly headDim: number;
  /** Keeps the keys and values of the tokens, both `[token][kv_head][head_dim]`. */
  append(layer: number, k: Float32Array, v: Float32Array): void;
  /** Attends with `q` `[token][q_head][head_dim]`: each token sees its own past and itself. */
  attend(layer: number, q: Float32Array, into: Float32Array): void;
  /** All layers have the tokens: they count. */
  commit(): void;
}

/** What a cache is told of the tokens of a step. */
export interface StepOptions {
  /** Whether it is told which they are, so that other sequences can start with their rows. */
  tellsTokens?: boolean;
}

/** The next tokens of one sequence. */
export function sequenceStep(cache: KvCache, tokens: Uint8Array, { tellsTokens = false }: StepOptions = {}): Step {
  const tokenCount = tokens.length;
  const { seqLen, layerCount, kvHeadCount, headDim } = cache;
  return {
    positions: Uint32Array.from({ length: tokenCount }, (_, token) => seqLen + token),
    layerCount,
    kvHeadCount,
    headDim,
    append: (layer, k, v) => cache.append(layer, k, v),
    attend: (layer, q, into) => cache.attend(layer, q, { queryCount: tokenCount, into }),
    commit: () => cache.commit(tokenCount, tellsTokens ? { tokens: Uint32Array.from(tokens) } : {}),
  };
}

/** The next token of each of several sequences: one call to append and one to attend for all of them. */
export function batchStep(cache: PagedCache, sequences: readonly Sequence[]): Step {
  const { layerCount, kvHeadCount, headDim } = sequences[0]!;
  return {
    positions: Uint32Array.from(sequences, ({ seqLen }) => seqLen),
    layerCount,
    kvHeadCount,
    headDim,
    append: (layer, k, v) => cache.append(layer, k, v, { sequences }),
    attend: (layer, q, into) => cache.attend(layer, q, { sequences, into }),
    commit: () => sequences.forEach((sequence) => sequence.commit(1)),
  };
}
