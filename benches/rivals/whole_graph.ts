/**
 * A decoder as onnxruntime runs it whole: past keys and values go in, all of them come out again.
 *
 * `copied` is what transformers.js does: the outputs are new tensors, the next call's past. `shared` gives one tensor as
 * past and as present, so that nothing is copied: the fastest that onnxruntime's API has, for one length all sequences have.
 */
import type { DecoderShape } from "../../tests/onnx/shapes.ts";
import type { OnnxRuntime, OnnxSession, OnnxTensor } from "../../tests/onnx_runtime.ts";
import { headMajor } from "../inputs.ts";

/** How past and present are passed. */
export type Passing = "copied" | "shared";

/** What a step starts from: the same rows in every layer and sequence. */
export interface Past {
  /** `[token][kv_head][headDim]`. */
  readonly rows: Float32Array;
  readonly batch: number;
  readonly passing: Passing;
}

/** A decoder in onnxruntime. */
export class WholeGraph implements AsyncDisposable {
  readonly #ort: OnnxRuntime;
  readonly #session: OnnxSession;
  readonly #shape: DecoderShape;

  private constructor(ort: OnnxRuntime, session: OnnxSession, shape: DecoderShape) {
    this.#ort = ort;
    this.#session = session;
    this.#shape = shape;
  }

  static async load(ort: OnnxRuntime, path: string, shape: DecoderShape, threads: number): Promise<WholeGraph> {
    const session = await ort.InferenceSession.create(path, { intraOpNumThreads: threads, interOpNumThreads: 1 });
    return new WholeGraph(ort, session, shape);
  }

  /** A step of one token for each sequence, ready to be called as often as one likes; gives the logits, `[batch][vocab]`. */
  step(token: number, { rows, batch, passing }: Past): () => Promise<Float32Array> {
    const { layerCount, kvHeadCount, headDim, vocabSize } = this.#shape;
    const tokens = rows.length / (kvHeadCount * headDim);
    const room = passing === "copied" ? tokens : tokens + 1;
    const dims = [batch, kvHeadCount, room, headDim];
    const one = headMajor(paddedRows(rows, room * kvHeadCount * headDim), kvHeadCount, headDim);
    const all = () => {
      const values = new Float32Array(batch * one.length);
      for (let i = 0; i < batch; i++) values.set(one, i * one.length);
      return new this.#ort.Tensor("float32", values, dims);
    };
    const feeds: Record<string, OnnxTensor> = {
      input_ids: new this.#ort.Tensor("int64", new BigInt64Array(batch).fill(BigInt(token)), [batch, 1]),
      attention_mask: new this.#ort.Tensor("int64", new BigInt64Array(batch * (tokens + 1)).fill(1n), [
        batch,
        tokens + 1,
      ]),
    };
    const fetches: Record<string, OnnxTensor> = {
      logits: new this.#ort.Tensor("float32", new Float32Array(batch * vocabSize), [batch, 1, vocabSize]),
    };
    for (let layer = 0; layer < layerCount; layer++) {
      for (const side of ["key", "value"]) {
        const past = feeds[`past_key_values.${layer}.${side}`] = all();
        if (passing === "shared") fetches[`present.${layer}.${side}`] = past;
      }
    }
    return async () => {
      const { logits } = await (passing === "shared" ? this.#session.run(feeds, fetches) : this.#session.run(feeds));
      return logits!.data as Float32Array;
    };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#session.release();
  }
}

function paddedRows(rows: Float32Array, length: number): Float32Array {
  const padded = new Float32Array(length);
  padded.set(rows);
  return padded;
}
