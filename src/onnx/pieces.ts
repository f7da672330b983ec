/**
 * The pieces of a model and the attention between them: some tokens go through all layers.
 *
 *     ids -> piece 0 -> q k v -> append, attend -> piece 1 -> q k v -> append, attend -> ... -> last piece -> logits
 *
 * Nothing is committed here: rows stay pending in their sequences.
 *
 * @module
 */

import { KvError } from "../error.ts";
import { countText } from "../ffi/status.ts";
import type { PagedCache } from "../paged_cache.ts";
import type { AttentionLayer, CutModel, Piece } from "./cut/cut_model.ts";
import { inputTensor } from "./model_inputs.ts";
import { failure, type Ort, type OrtSession, type OrtTensor } from "./ort.ts";
import { rowsOfTensor, takeRows } from "./rows_of_tensor.ts";
import type { Part } from "./runs.ts";
import { checkSignal } from "./signal.ts";

/** Values by name, as they are between two pieces. */
type Values = Map<string, OrtTensor>;

/** A piece whose model onnxruntime has. */
type LoadedPiece = Omit<Piece, "model"> & {
  readonly session: OrtSession;
  /** Values that no later piece takes. */
  readonly ends: readonly string[];
};

/** A model that is loaded. */
export class Pieces {
  readonly #ort: Ort;
  readonly #pieces: readonly LoadedPiece[];
  readonly #inputs: CutModel["inputs"];
  readonly #logits: string;

  constructor(ort: Ort, { pieces, inputs, logits }: CutModel, sessions: readonly OrtSession[]) {
    const lastUse = new Map(pieces.flatMap(({ takes }, i) => takes.map((name) => [name, i] as const)));
    const ends = pieces.map<string[]>(() => []);
    for (const [name, i] of lastUse) ends[i]!.push(name);
    this.#ort = ort;
    // The bytes of a piece are onnxruntime's now: reading its model would make them again.
    this.#pieces = pieces.map(({ takes, gives, attention }, i) => ({
      takes,
      gives,
      ...(attention === undefined ? {} : { attention }),
      session: sessions[i]!,
      ends: ends[i]!,
    }));
    this.#inputs = inputs;
    this.#logits = logits;
  }

  /**
   * Runs tokens through the model, appends their rows, and gives the logits that are wanted, those of the first part first:
   * `[logit][vocab]`; none where none are wanted.
   */
  async run(parts: readonly Part[], cache: PagedCache, signal: AbortSignal | undefined): Promise<Float32Array> {
    const values: Values = new Map();
    this.#feed(values, parts);
    const wantsNone = parts.every(({ logitCount }) => logitCount === 0);
    let seen = parts; // those that attend
    for (let layer = 0; layer < this.#layerCount; layer++) {
      await this.#runPiece(layer, values, signal);
      const { attention, ends } = this.#pieces[layer]!;
      if (attention === undefined) throw new Error(`piece ${layer} of a cut model must end at attention`);
      this.#append(cache, layer, attention, parts, values);
      if (layer === this.#layerCount - 1) {
        if (wantsNone) return new Float32Array(0);
        seen = this.#narrow(values, attention.q, parts) ?? parts;
      }
      values.set(attention.output, this.#attend(cache, layer, attention, seen, values));
      for (const name of ends) values.delete(name);
    }
    await this.#runPiece(this.#layerCount, values, signal);
    return this.#wantedLogits(values.get(this.#logits), seen);
  }

  /** Tokens of the vocabulary: as onnxruntime says, or as the logits of a token are. */
  async vocabSize(cache: PagedCache): Promise<number> {
    const { session } = this.#pieces.at(-1)!;
    const size = session.outputMetadata?.find(({ name }) => name === this.#logits)?.shape?.at(-1);
    if (typeof size === "number" && size > 0) return size;
    using sequence = cache.sequence();
    const part = { index: 0, sequence, position: 0, tokens: new Uint32Array(1), logitCount: 1 };
    return (await this.run([part], cache, undefined)).length;
  }

  /** Layers of attention. */
  get #layerCount(): number {
    return this.#pieces.length - 1;
  }

  /** Keys and values of one layer become pending rows of their sequences. */
  #append(cache: PagedCache, layer: number, { k, v }: AttentionLayer, parts: readonly Part[], values: Values): void {
    cache.append(layer, floatsOf(k, values), floatsOf(v, values), {
      sequences: parts.map(({ sequence }) => sequence),
      tokenCounts: parts.map(({ tokens }) => tokens.length),
    });
  }

  /** Attention of one layer for queries that stand one after the other. */
  #attend(
    cache: PagedCache,
    layer: number,
    { q, softmaxScale, softcap, sinkLogits }: AttentionLayer,
    parts: readonly Part[],
    values: Values,
  ): OrtTensor {
    const output = cache.attend(layer, floatsOf(q, values), {
      sequences: parts.map(({ sequence }) => sequence),
      queryCounts: parts.map(({ tokens }) => tokens.length),
      ...(softmaxScale === undefined ? {} : { softmaxScale }),
      ...(softcap === undefined ? {} : { softcap }),
      ...(sinkLogits === undefined ? {} : { sinkLogits }),
    });
    const rowCount = rowCountOf(parts);
    return new this.#ort.Tensor("float32", output, [1, rowCount, output.length / rowCount]);
  }

  /**
   * Behind the rows of the last layer only the tokens whose logits are wanted matter: their queries `q` and the values that
   * the last piece takes are made theirs alone. Does nothing where all are wanted, or the rows of a value cannot be told.
   */
  #narrow(values: Values, q: string, parts: readonly Part[]): readonly Part[] | undefined {
    const rowCount = rowCountOf(parts), indices = wantedRows(parts);
    if (indices.length === rowCount) return undefined;
    const inputs = new Set(this.#inputs.map(({ name }) => name));
    const narrowed: [string, OrtTensor][] = [];
    for (const name of new Set([q, ...this.#pieces.at(-1)!.takes])) {
      const value = values.get(name);
      if (value === undefined || inputs.has(name)) continue; // the output of attention is yet to come
      const some = rowsOfTensor(this.#ort, value, rowCount, indices);
      if (some === undefined) return undefined;
      narrowed.push([name, some]);
    }
    for (const [name, some] of narrowed) values.set(name, some);
    const seen = parts.filter(({ logitCount }) => logitCount > 0).map(newestOf);
    this.#feed(values, seen);
    return seen;
  }

  /** The inputs of the model for some rows. */
  #feed(values: Values, parts: readonly Part[]): void {
    const tokens = Uint32Array.from(parts.flatMap(({ tokens }) => [...tokens]));
    const positions = Uint32Array.from(
      parts.flatMap(({ tokens, position }) => Array.from(tokens, (_, i) => position + i)),
    );
    for (const input of this.#inputs) values.set(input.name, inputTensor(this.#ort, input, { tokens, positions }));
  }

  /** Runs a piece on values, and adds what it gives to them. */
  async #runPiece(index: number, values: Values, signal: AbortSignal | undefined): Promise<void> {
    checkSignal(signal);
    const { takes, session } = this.#pieces[index]!;
    const feeds = Object.fromEntries(takes.map((name) => [name, values.get(name)!]));
    try {
      for (const [name, value] of Object.entries(await session.run(feeds))) values.set(name, value);
    } catch (error) {
      throw failure(`run piece ${index} of ${this.#pieces.length} of the model`, error);
    }
  }

  /** The rows of logits that are wanted of those of `parts`. */
  #wantedLogits(tensor: OrtTensor | undefined, parts: readonly Part[]): Float32Array {
    const logits = elementsOf(this.#logits, tensor);
    const rowCount = rowCountOf(parts), vocabSize = tensor!.dims.at(-1) ?? 0;
    if (vocabSize === 0 || logits.length !== rowCount * vocabSize) {
      throw new KvError(
        "unsupported",
        `Cannot run the model as its logits must have a row for each of ${countText(rowCount, "token")}: they are ` +
          `[${tensor!.dims}]; a model that gives those of the last token alone must be exported without that`,
      );
    }
    const indices = wantedRows(parts);
    return indices.length === rowCount ? logits : takeRows(logits, rowCount, indices);
  }
}

/** The newest tokens of a part, those whose logits are wanted. */
function newestOf({ tokens, position, logitCount, ...part }: Part): Part {
  const first = tokens.length - logitCount;
  return { ...part, position: position + first, tokens: tokens.subarray(first), logitCount };
}

function rowCountOf(parts: readonly Part[]): number {
  return parts.reduce((sum, { tokens }) => sum + tokens.length, 0);
}

/** The rows whose logits are wanted, of those of all parts. */
function wantedRows(parts: readonly Part[]): Uint32Array {
  let end = 0;
  return Uint32Array.from(parts.flatMap(({ tokens, logitCount }) => {
    end += tokens.length;
    return Array.from({ length: logitCount }, (_, i) => end - logitCount + i);
  }));
}

/** The elements of a value that crosses into kvern. */
function floatsOf(name: string, values: Values): Float32Array {
  return elementsOf(name, values.get(name));
}

function elementsOf(name: string, tensor: OrtTensor | undefined): Float32Array {
  if (tensor?.data instanceof Float32Array) return tensor.data;
  throw new KvError(
    "unsupported",
    `Cannot run the model as its value ${name} must be float32 on the CPU: it is ${tensor?.type ?? "not there"}`,
  );
}
