/**
 * A decoder in an ONNX file: onnxruntime runs its pieces, and a paged cache keeps keys and values and attends.
 *
 * @module
 */

import { fileURLToPath } from "node:url";
import { KvError } from "../error.ts";
import { givenOptions, type OptionNames, optionNames } from "../options/option_names.ts";
import { PagedCache } from "../paged_cache.ts";
import type { Sequence } from "../sequence.ts";
import { cutModel } from "./cut/cut.ts";
import type { CutModel } from "./cut/cut_model.ts";
import { type DecoderPlan, decoderPlan, type OnnxDecoderOptions } from "./decoder_options.ts";
import { type GenerateEnd, type GenerateOptions, generateTokens, readGenerate } from "./generate.ts";
import { readModelConfig } from "./model_config.ts";
import { createSessions, type OrtSession, releaseSessions } from "./ort.ts";
import { Pieces } from "./pieces.ts";
import { checkIsSignal } from "./signal.ts";
import { runStep } from "./step.ts";
import { checkTokens, tokenLists } from "./tokens.ts";
import { Turns } from "./turns.ts";

/** What a sequence of an {@linkcode OnnxDecoder} is made for. */
export interface DecoderSequenceOptions {
  /**
   * Ids of the text it will hold: it starts with the rows of the longest prefix of them that the cache has, and at least one
   * token is left to compute. Its `seqLen` tells where it starts.
   */
  readonly tokens?: ArrayLike<number>;
  /** Names the tenant: sequences of equal salts share what they have in common, and others learn nothing of it. */
  readonly salt?: string | Uint8Array;
}

/** How a step is done. */
export interface StepOptions {
  /** Gives the logits of all tokens of the step, not of the last of each sequence alone; false by default. */
  readonly allLogits?: boolean;
  /** Ends the step between two layers; the error has the code `aborted`. */
  readonly signal?: AbortSignal;
}

const SEQUENCE_NAMES: OptionNames = optionNames<DecoderSequenceOptions>({ tokens: true, salt: true });
const STEP_NAMES: OptionNames = optionNames<StepOptions>({ allLogits: true, signal: true });

/** What a loaded decoder is made of. */
interface Loaded {
  /** Either the fingerprint or what knows it. */
  readonly name: string | Pick<CutModel, "fingerprint">;
  readonly plan: DecoderPlan;
  readonly cache: PagedCache;
  readonly pieces: Pieces;
  readonly sessions: readonly OrtSession[];
  readonly vocabSize: number;
}

/**
 * A language model whose graph onnxruntime computes and whose keys and values a {@linkcode PagedCache} has: shared between
 * sequences, in few bits, for any number of sequences of any lengths in one step.
 *
 * Free it with `await using` or `free`. Steps that are asked for while another one runs wait for it.
 *
 * @example Five lines, with a model from a folder
 * ```ts ignore
 * import * as ort from "onnxruntime-node";
 * import { OnnxDecoder } from "@kvern/kvern/onnx";
 *
 * await using decoder = await OnnxDecoder.load("model/", { ort, store: "i4" });
 * using sequence = decoder.sequence({ tokens });
 * for await (const token of decoder.generate(sequence, { tokens, maxTokens: 100 })) write(token);
 * ```
 */
export class OnnxDecoder implements AsyncDisposable {
  readonly #loaded: Loaded;
  readonly #turns: Turns = new Turns();
  #isFreed = false;

  private constructor(loaded: Loaded) {
    this.#loaded = loaded;
  }

  /**
   * Loads a model: the path or `file:` URL of an ONNX file or of a folder that has one, or the bytes of a file.
   *
   * Weights in files of their own are opened by onnxruntime and never read here; bytes must have theirs inside. What a graph
   * must look like, and what can be done where one does not, says docs/onnx.md.
   *
   * @throws {TypeError} an option of the wrong type
   * @throws {KvError} `unsupported` for a model that cannot be cut at its attention; `model_failed` where onnxruntime does not
   * take it; `invalid_config` for bytes that are no model, an option out of its range, and one that the model decides
   */
  static async load(model: string | URL | Uint8Array, options: OnnxDecoderOptions): Promise<OnnxDecoder> {
    const source = model instanceof URL ? fileURLToPath(model) : model;
    const cut = cutModel(source);
    const layers = cut.pieces.flatMap(({ attention }) => attention ?? []);
    const plan = decoderPlan(options, layers, typeof source === "string" ? readModelConfig(source) : undefined);
    const cache = new PagedCache(plan.cache);
    let sessions: readonly OrtSession[] = [];
    try {
      sessions = await createSessions(plan.ort, cut, plan.session);
      const pieces = new Pieces(plan.ort, cut, sessions);
      const vocabSize = await pieces.vocabSize(cache);
      // It reads all weights: not in the middle of the work, and while bytes that were given are there.
      const name = plan.namesModel || typeof source !== "string" ? cut.fingerprint : cut;
      return new OnnxDecoder({ name, plan, cache, pieces, sessions, vocabSize });
    } catch (error) {
      await releaseSessions(sessions);
      cache.free();
      throw error;
    }
  }

  /** The cache, with all it has: `stats`, `explain`, `events`, `updatePolicy` and the others. */
  get cache(): PagedCache {
    return this.#loaded.cache;
  }

  /** Tokens of the model's vocabulary: ids are below it, and it is the length of the logits of a token. */
  get vocabSize(): number {
    return this.#loaded.vocabSize;
  }

  /** Tokens that end a text: none where neither the options nor the files beside the model say any. */
  get endTokens(): readonly number[] {
    return this.#loaded.plan.endTokens;
  }

  /**
   * 64 hexadecimal digits that differ wherever weights or graph do. The first use reads all weights.
   *
   * Rows in this cache are of this model alone. With `prefix: { events: true }`, whose names of blocks other processes have,
   * too, it is the fingerprint of every sequence, and read when the model is loaded.
   */
  get fingerprint(): string {
    const { name } = this.#loaded;
    return typeof name === "string" ? name : name.fingerprint;
  }

  /**
   * A new sequence: empty, or with the rows of the longest prefix of `tokens` that the cache has.
   *
   * It is one of `cache.sequence`, for rows of this model. With `fork` it has continuations that share its rows, and a step
   * goes on behind whatever `truncate` leaves.
   *
   * @throws {TypeError} an option of the wrong type
   * @throws {KvError} `cache_full` for more tokens than a sequence holds; `invalid_config` for ids that the model does not
   * have, and for options where the cache has a `pool`, which finds nothing; `out_of_memory`, `stale_handle`
   */
  sequence(options?: DecoderSequenceOptions): Sequence {
    const { tokens, salt } = givenOptions(options, SEQUENCE_NAMES, "create a sequence");
    const { cache, plan, vocabSize } = this.#loaded;
    if (options === undefined && cache.pool !== undefined) return cache.sequence();
    return cache.sequence({
      ...(plan.namesModel ? { fingerprint: this.fingerprint } : {}),
      ...(tokens === undefined ? {} : { tokens: checkTokens("tokens", tokens, vocabSize) }),
      ...(salt === undefined ? {} : { salt }),
    });
  }

  /**
   * Adds `tokens[i]` to `sequences[i]`, for all of them at once, and gives the logits of the last token of each, `[vocab]`, or
   * with `allLogits` of all tokens of the step, `[token][vocab]`.
   *
   * A step that fails leaves every sequence as it was. One that is asked for while another one runs waits for its turn.
   *
   * @throws {TypeError} an argument of the wrong type
   * @throws {RangeError} an id that is no count
   * @throws {KvError} `invalid_config` for an id that the model does not have, a sequence named twice or of another cache;
   * `invalid_size` if there are not some tokens for each sequence; `cache_full`, `pool_empty`, `out_of_memory`;
   * `not_finite` for a model that computes no numbers; `commit_mismatch` for a sequence with rows pending, and for one that
   * was changed while the step ran; `model_failed` with the error of onnxruntime; `aborted`; `stale_handle`
   */
  async step(
    sequences: readonly Sequence[],
    tokens: readonly ArrayLike<number>[],
    options?: StepOptions,
  ): Promise<Float32Array[]> {
    const { allLogits = false, signal } = givenOptions(options, STEP_NAMES, "step");
    if (typeof allLogits !== "boolean") throw new TypeError(`allLogits must be a boolean: ${typeof allLogits}`);
    checkIsSignal(signal);
    const { vocabSize, pieces, cache, plan } = this.#loaded;
    const lists = tokenLists(sequences, tokens, vocabSize);
    const request = { sequences: [...sequences], tokens: lists, allLogits, signal, tokensPerRun: plan.tokensPerRun };
    this.#checkAlive("step");
    return await this.#turns.take(() => runStep(pieces, cache, request));
  }

  /**
   * Writes on: each token as it is chosen, until one that ends the text, or `maxTokens` of them, or `maxSeqLen`.
   *
   * `tokens` is the whole text so far. What the sequence has of it already is not computed again, so a `sequence({ tokens })`
   * begins where an earlier text with the same beginning ends. Afterwards the sequence has all tokens but the last one.
   *
   * The steps of several sequences that are written at the same time follow each other; to compute them together, call
   * `step` with all of them.
   *
   * @throws {TypeError} an option of the wrong type
   * @throws {KvError} as {@linkcode OnnxDecoder.step}; `invalid_config` for tokens that are not what the sequence has and more
   */
  generate(sequence: Sequence, options: GenerateOptions): AsyncGenerator<number, GenerateEnd, void> {
    this.#checkAlive("generate");
    const plan = readGenerate(options, this.endTokens, this.vocabSize);
    return generateTokens(sequence, plan, async (tokens) => {
      const [logits] = await this.step([sequence], [tokens], plan.signal === undefined ? {} : { signal: plan.signal });
      return logits!;
    });
  }

  /** Waits for the step that runs, then frees the cache with all its sequences and what onnxruntime has of the model. */
  async free(): Promise<void> {
    if (this.#isFreed) return await this.#turns.take(() => Promise.resolve());
    this.#isFreed = true;
    await this.#turns.take(async () => {
      this.#loaded.cache.free();
      await releaseSessions(this.#loaded.sessions);
    });
  }

  /** The same as `free`, for `await using`. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.free();
  }

  #checkAlive(action: string): void {
    if (this.#isFreed) throw new KvError("stale_handle", `Cannot ${action} as the decoder was freed`);
  }
}
