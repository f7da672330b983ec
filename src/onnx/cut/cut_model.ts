/**
 * What a decoder's graph is once it has been cut at its attention: pieces that onnxruntime runs, one after the other, and
 * between each two of them one layer of attention, which kvern computes.
 *
 * All rows of a call, of however many sequences, go through a piece as one batch of one: every value that crosses a border
 * is `[1, tokens, width]`. Floats cross as f32 in every model, because f16 tensors of onnxruntime-node are broken in Bun
 * and Deno: a piece of an f16 graph has casts at its borders, which lose nothing.
 *
 * @module
 */

/** One layer of attention, as the graph says it is. */
export interface AttentionLayer {
  /** The node it was, for errors. */
  readonly node: string;
  readonly qHeadCount: number;
  readonly kvHeadCount: number;
  readonly headDim: number;
  readonly softmaxScale?: number;
  readonly windowTokens?: number;
  readonly softcap?: number;
  /** Learned sink logits `[q_head]`. */
  readonly sinkLogits?: Float32Array;
  /** Values of the piece before it, f32 `[1, tokens, heads * headDim]`, as attention takes them: rotated, normed. */
  readonly q: string;
  readonly k: string;
  readonly v: string;
  /** The value that later pieces take, f32 `[1, tokens, qHeadCount * headDim]`. */
  readonly output: string;
}

/** What a piece wants to be fed that is neither a value of an earlier piece nor the output of attention. */
export interface ModelInput {
  readonly name: string;
  /** What it means: ids and positions are `[1, tokens]`, the length of the longest sequence has no axis. */
  readonly role: "inputIds" | "positionIds" | "totalSequenceLength";
  readonly type: "int64" | "int32";
}

/** A part of the graph that onnxruntime runs. */
export interface Piece {
  /**
   * A whole ONNX model, put together when it is read, so that weights that were given as bytes are there twice for one
   * piece at a time. Weights that lie in files are named relative to the folder of the cut model.
   */
  readonly model: Uint8Array;
  /** Values it is fed: model inputs, values of earlier pieces, outputs of attention. */
  readonly takes: readonly string[];
  /** Values it gives. */
  readonly gives: readonly string[];
  /** The layer that comes after it; none after the last piece. */
  readonly attention?: AttentionLayer;
}

/** A decoder, cut. */
export interface CutModel {
  readonly pieces: readonly Piece[];
  readonly inputs: readonly ModelInput[];
  /** The value of the last piece that is the logits, f32 `[1, tokens, vocabSize]`. */
  readonly logits: string;
  /** Where files of weights are; undefined where all weights are in the pieces. */
  readonly folder?: string;
  /**
   * 64 hexadecimal digits that differ wherever weights or graph do: what prefixes and snapshots are known by. Its first use
   * reads every file of the model once, which takes seconds where they have gigabytes.
   */
  readonly fingerprint: string;
}
