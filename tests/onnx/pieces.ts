/** Runs a cut model with attention in plain loops, f64: what is wrong then is the cut. */
import type { CutModel, ModelInput } from "../../src/onnx/cut/cut_model.ts";
import type { Elements, OnnxRuntime, OnnxSession, OnnxTensor } from "../onnx_runtime.ts";

/** Keys and values of one sequence, by layer and position. */
export interface PlainSequence {
  readonly k: Float32Array[][];
  readonly v: Float32Array[][];
  length: number;
}

/** The pieces of a model, loaded. */
export class Pieces implements AsyncDisposable {
  readonly #ort: OnnxRuntime;
  readonly #cut: CutModel;
  readonly #sessions: readonly OnnxSession[];

  private constructor(ort: OnnxRuntime, cut: CutModel, sessions: readonly OnnxSession[]) {
    this.#ort = ort;
    this.#cut = cut;
    this.#sessions = sessions;
  }

  static async load(ort: OnnxRuntime, cut: CutModel): Promise<Pieces> {
    const folder = { session: { model_external_initializers_file_folder_path: cut.folder } };
    const options = {
      intraOpNumThreads: 1,
      interOpNumThreads: 1,
      logSeverityLevel: 3,
      ...(cut.folder ? { extra: folder } : {}),
    };
    const sessions: OnnxSession[] = [];
    for (const { model } of cut.pieces) sessions.push(await ort.InferenceSession.create(model, options));
    return new Pieces(ort, cut, sessions);
  }

  sequence(): PlainSequence {
    return { k: this.#cut.pieces.map(() => []), v: this.#cut.pieces.map(() => []), length: 0 };
  }

  /** Runs the tokens of several sequences as one batch; gives the logits of all, `[token][vocab]`. */
  async step(sequences: readonly PlainSequence[], tokens: readonly (readonly number[])[]): Promise<Float32Array> {
    const values: Record<string, OnnxTensor> = {};
    for (const input of this.#cut.inputs) values[input.name] = this.#feed(input, sequences, tokens);
    const { pieces, logits } = this.#cut;
    for (const [index, { takes, gives, attention }] of pieces.entries()) {
      const feeds: Record<string, OnnxTensor> = {};
      for (const name of takes) {
        if (values[name] === undefined) throw new Error(`piece ${index} takes ${name}, which nothing gave`);
        feeds[name] = values[name];
      }
      const results = await this.#sessions[index]!.run(feeds);
      for (const name of gives) values[name] = results[name]!;
      if (attention === undefined) break;
      const { q, k, v, output, qHeadCount, headDim } = attention;
      for (const name of [q, k, v]) checkRows(name, values[name]!);
      const attended = attend(attention, index, values, sequences, tokens);
      const width = qHeadCount * headDim;
      values[output] = new this.#ort.Tensor("float32", attended, [1, attended.length / width, width]);
    }
    sequences.forEach((sequence, i) => sequence.length += tokens[i]!.length);
    checkRows(logits, values[logits]!);
    return values[logits]!.data as Float32Array;
  }

  #feed(
    { role, type }: ModelInput,
    sequences: readonly PlainSequence[],
    tokens: readonly (readonly number[])[],
  ): OnnxTensor {
    if (role === "totalSequenceLength") {
      const total = Math.max(...sequences.map(({ length }, i) => length + tokens[i]!.length));
      return new this.#ort.Tensor("int64", BigInt64Array.of(BigInt(total)), []);
    }
    const numbers = role === "inputIds"
      ? tokens.flat()
      : sequences.flatMap(({ length }, i) => tokens[i]!.map((_, j) => length + j));
    const data: Elements = type === "int64" ? BigInt64Array.from(numbers, BigInt) : Int32Array.from(numbers);
    return new this.#ort.Tensor(type, data, [1, numbers.length]);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const session of this.#sessions) await session.release();
  }
}

function checkRows(name: string, { type, dims }: OnnxTensor): void {
  if (type === "float32" && dims.length === 3 && dims[0] === 1) return;
  throw new Error(`${name} must be f32 [1, tokens, width]: it is ${type} [${dims.join(", ")}]`);
}

type Layer = NonNullable<CutModel["pieces"][number]["attention"]>;

function attend(
  layer: Layer,
  index: number,
  values: Readonly<Record<string, OnnxTensor>>,
  sequences: readonly PlainSequence[],
  tokens: readonly (readonly number[])[],
): Float32Array {
  const { qHeadCount, kvHeadCount, headDim, windowTokens = Infinity, sinkLogits } = layer;
  const [q, k, v] = [layer.q, layer.k, layer.v].map((name) => values[name]!.data as Float32Array);
  const kvWidth = kvHeadCount * headDim;
  const output = new Float32Array(q!.length);
  let row = 0;
  for (const [i, { k: keys, v: rows, length }] of sequences.entries()) {
    for (let j = 0; j < tokens[i]!.length; j++, row++) {
      keys[index]!.push(k!.slice(row * kvWidth, (row + 1) * kvWidth));
      rows[index]!.push(v!.slice(row * kvWidth, (row + 1) * kvWidth));
      const position = length + j;
      const first = Math.max(0, position + 1 - windowTokens);
      for (let head = 0; head < qHeadCount; head++) {
        const at = (row * qHeadCount + head) * headDim;
        const kvAt = Math.floor(head / (qHeadCount / kvHeadCount)) * headDim;
        const scores: number[] = [];
        for (let p = first; p <= position; p++) {
          let dot = 0;
          for (let d = 0; d < headDim; d++) dot += q![at + d]! * keys[index]![p]![kvAt + d]!;
          scores.push(scoreOf(layer, dot));
        }
        const sink = sinkLogits?.[head] ?? -Infinity;
        const max = Math.max(sink, ...scores);
        const weights = scores.map((score) => Math.exp(score - max));
        const sum = weights.reduce((total, weight) => total + weight, Math.exp(sink - max));
        for (let d = 0; d < headDim; d++) {
          output[at + d] = weights.reduce((total, w, p) => total + w * rows[index]![first + p]![kvAt + d]!, 0) / sum;
        }
      }
    }
  }
  return output;
}

function scoreOf({ softmaxScale, softcap, headDim }: Layer, dot: number): number {
  const score = dot * (softmaxScale ?? 1 / Math.sqrt(headDim));
  return softcap === undefined ? score : softcap * Math.tanh(score / softcap);
}
