/** Runs a decoder as it is written, by onnxruntime alone, with past and present as its users pass them. */
import type { OnnxRuntime, OnnxSession, OnnxTensor } from "../onnx_runtime.ts";
import type { Form } from "./builder.ts";
import type { DecoderShape } from "./shapes.ts";

/** A decoder in onnxruntime, and the past of one sequence. */
export class WholeGraph implements AsyncDisposable {
  readonly #ort: OnnxRuntime;
  readonly #session: OnnxSession;
  readonly #shape: DecoderShape;
  readonly #form: Form;
  #past: Record<string, OnnxTensor> = {};
  #length = 0;

  private constructor(ort: OnnxRuntime, session: OnnxSession, shape: DecoderShape, form: Form) {
    this.#ort = ort;
    this.#session = session;
    this.#shape = shape;
    this.#form = form;
    this.restart();
  }

  static async load(
    ort: OnnxRuntime,
    model: Uint8Array | string,
    shape: DecoderShape,
    form: Form,
  ): Promise<WholeGraph> {
    const session = await ort.InferenceSession.create(model, { intraOpNumThreads: 1, interOpNumThreads: 1 });
    return new WholeGraph(ort, session, shape, form);
  }

  /** Forgets the past. */
  restart(): void {
    const { layerCount, kvHeadCount, headDim } = this.#shape;
    this.#length = 0;
    const type = this.#form.float ?? "float32";
    const none = type === "float32" ? new Float32Array(0) : new Uint16Array(0);
    for (let layer = 0; layer < layerCount; layer++) {
      for (const side of ["key", "value"]) {
        this.#past[`past_key_values.${layer}.${side}`] = new this.#ort.Tensor(type, none, [
          1,
          kvHeadCount,
          0,
          headDim,
        ]);
      }
    }
  }

  /** Runs tokens behind the past; gives the logits of all, `[token][vocab]`. */
  async step(tokens: readonly number[]): Promise<Float32Array> {
    const { Tensor } = this.#ort;
    const start = this.#length, end = start + tokens.length;
    const ids = (values: readonly number[]) => {
      const type = this.#form.ids ?? "int64";
      const data = type === "int64" ? BigInt64Array.from(values, BigInt) : Int32Array.from(values);
      return new Tensor(type, data, [1, values.length]);
    };
    const feeds: Record<string, OnnxTensor> = { ...this.#past, input_ids: ids(tokens) };
    const given = new Set(this.#session.inputNames);
    if (given.has("attention_mask")) {
      feeds.attention_mask = new Tensor("int64", new BigInt64Array(end).fill(1n), [1, end]);
    }
    if (given.has("position_ids")) feeds.position_ids = ids(tokens.map((_, i) => start + i));
    const results = await this.#session.run(feeds);
    for (const name of Object.keys(this.#past)) {
      this.#past[name] = results[name.replace("past_key_values", "present")]!;
    }
    this.#length = end;
    const { data } = results.logits!;
    // Copied, since a Float16Array of the bits needs an ArrayBuffer of their own.
    return data instanceof Uint16Array
      ? Float32Array.from(new Float16Array(data.slice().buffer))
      : data as Float32Array;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#session.release();
  }
}
