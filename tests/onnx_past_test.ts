/**
 * A whole graph in onnxruntime with a cache between its runs: its outputs go in as they come, its inputs come out.
 */

import assert from "node:assert/strict";
import { test } from "node:test";
import { argmax } from "../examples/sampling.ts";
import { PagedCache } from "../mod.ts";
import { keep, layersOf, pastKeyValues } from "../src/onnx.ts";
import { makeDecoder } from "./onnx/decoder.ts";
import { tokensOf, ZIGLET_SHAPE, ZIGLET_WEIGHTS } from "./onnx/ziglet.ts";
import { onnxRuntime, type OnnxTensors, withoutOnnx } from "./onnx_runtime.ts";

/** Logits of f16 graphs, 8 to 16 in magnitude, are 2^-7 apart, and each layer rounds: a few of those. */
const HALF_ERROR_MAX = 0.05;

/** The numbers of a tensor. */
function numbersOf({ data }: { readonly data: unknown }): Float32Array {
  // Copied, since a Float16Array of the bits needs an ArrayBuffer of their own.
  return data instanceof Uint16Array
    ? Float32Array.from(new Float16Array(data.slice().buffer))
    : Float32Array.from(data as Float32Array);
}

for (const [dtype, float, errorMax] of [["f32", "float32", 1e-4], ["f16", "float16", HALF_ERROR_MAX]] as const) {
  const options = { skip: withoutOnnx !== "", timeout: 120_000 };
  test(`a whole graph in ${dtype} goes on from what the cache keeps${withoutOnnx}`, options, async () => {
    const { InferenceSession, Tensor } = onnxRuntime!;
    const { model } = makeDecoder(ZIGLET_SHAPE, ZIGLET_WEIGHTS, { attention: "gqa", float });
    const session = await InferenceSession.create(model, { intraOpNumThreads: 1, interOpNumThreads: 1 });
    const { layerCount, kvHeadCount, headDim } = ZIGLET_SHAPE;
    using cache = new PagedCache({ layerCount, kvHeadCount, headDim, maxSeqLen: 256, dtype, prefix: {} });

    /** Runs what the cache does not know of a text; gives all outputs. */
    const run = async (tokens: readonly number[]): Promise<[computed: number, outputs: OnnxTensors]> => {
      using sequence = cache.sequence({ tokens: Uint32Array.from(tokens) });
      const rest = tokens.slice(sequence.seqLen);
      const outputs = await session.run({
        ...pastKeyValues(sequence, { Tensor, dtype }),
        input_ids: new Tensor("int64", BigInt64Array.from(rest, BigInt), [1, rest.length]),
        attention_mask: new Tensor("int64", new BigInt64Array(tokens.length).fill(1n), [1, tokens.length]),
      });
      return [rest.length, outputs];
    };
    const last = ({ logits }: OnnxTensors) => numbersOf(logits!).slice(-ZIGLET_SHAPE.vocabSize);

    const text = tokensOf('const std = @import("std");\n\npub fn main() void {}\n');
    const prompt = text.slice(0, 31);
    const [, cold] = await run(text);
    const [, first] = await run(prompt);
    assert.deepEqual(layersOf(first), layersOf(cold));
    keep(cache, prompt, first).free();

    const [computed, warm] = await run(text);
    assert.equal(computed, text.length - prompt.length);
    assert.equal(argmax(last(warm)), argmax(last(cold)));
    const truth = last(cold);
    const error = last(warm).reduce((most, logit, i) => Math.max(most, Math.abs(logit - truth[i]!)), 0);
    assert.ok(error <= errorMax, `logits are ${error} off`);

    using whole = keep(cache, text, warm);
    assert.equal(whole.seqLen, text.length);
    // The cache has the dtype of the graph: its rows are those of the run, bit for bit.
    for (const [name, tensor] of Object.entries(pastKeyValues(whole, { dtype }))) {
      assert.deepEqual(numbersOf(tensor), numbersOf(warm[name.replace("past_key_values", "present")]!), name);
    }
    await session.release();
  });
}
