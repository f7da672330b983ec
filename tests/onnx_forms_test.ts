/**
 * The ONNX models the tests make: that they are what exporters write, and right, by what onnxruntime alone makes of them.
 */
import assert from "node:assert/strict";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { argmax, logSumExp } from "../examples/sampling.ts";
import { makeDecoder } from "./onnx/decoder.ts";
import { families } from "./onnx/families.ts";
import { canWrite, FORMS, HALF_FORMS, INT4_FORMS } from "./onnx/forms.ts";
import { writeModel } from "./onnx/graph.ts";
import { withInt4 } from "./onnx/int4.ts";
import { forward } from "./onnx/oracle.ts";
import { type DecoderShape, type DecoderWeights, unsharedHeads } from "./onnx/shapes.ts";
import { WholeGraph } from "./onnx/whole_graph.ts";
import { GOLDEN, tokensOf, ZIGLET_SHAPE, ZIGLET_WEIGHTS } from "./onnx/ziglet.ts";
import type { Form } from "./onnx/builder.ts";
import { onnxRuntime, withoutOnnx } from "./onnx_runtime.ts";

const OPTIONS = { skip: withoutOnnx !== "", timeout: 120_000 };

/** Loads a decoder in a form, by a path where it has a file of weights, and gives it to `use`. */
async function withGraph(
  shape: DecoderShape,
  weights: DecoderWeights,
  form: Form,
  use: (graph: WholeGraph) => Promise<void>,
): Promise<void> {
  const files = makeDecoder(shape, weights, form);
  const folder = mkdtempSync(join(tmpdir(), "kvern-onnx-"));
  try {
    const model = files.data ? writeModel(folder, files) : files.model;
    await using graph = await WholeGraph.load(onnxRuntime!, model, shape, form);
    await use(graph);
  } finally {
    rmSync(folder, { recursive: true });
  }
}

/** The logits behind a text of which some tokens are given at once, and the others one by one, `[token][vocab]`. */
async function logitsOf(graph: WholeGraph, tokens: readonly number[], atOnce: number): Promise<number[]> {
  const logits = [...await graph.step(tokens.slice(0, atOnce))];
  for (const token of tokens.slice(atOnce)) logits.push(...await graph.step([token]));
  return logits;
}

/** The largest distance of two rows; NaN if there is one. */
function distance(a: ArrayLike<number>, b: ArrayLike<number>): number {
  assert.equal(a.length, b.length);
  let largest = 0;
  for (let i = 0; i < a.length; i++) {
    const difference = Math.abs(a[i]! - b[i]!);
    if (!(difference <= largest)) largest = difference;
  }
  return largest;
}

const unshared = unsharedHeads(ZIGLET_SHAPE, ZIGLET_WEIGHTS);
const ziglets = [
  ...FORMS.map(({ name, form }) => ({ name, form, shape: ZIGLET_SHAPE, weights: ZIGLET_WEIGHTS })),
  ...FORMS.filter(({ name }) => name === "MultiHeadAttention").map(({ name, form }) => ({
    name: `${name} of as many KV heads`,
    form,
    ...unshared,
  })),
];

for (const { name, form, shape, weights } of ziglets) {
  test(`ziglet as ${name} has golden logits in onnxruntime alone${withoutOnnx}`, OPTIONS, async () => {
    await withGraph(shape, weights, form, async (graph) => {
      for (const { prompt, logitsTop, logSumExp: truth, greedy } of GOLDEN.cases) {
        graph.restart();
        const tokens = tokensOf(prompt);
        let logits = (await graph.step(tokens)).subarray((tokens.length - 1) * 256);
        for (const [token, logit] of logitsTop) {
          assert.ok(Math.abs(logits[token]! - logit) <= GOLDEN.tolerance, `${prompt}: ${token}`);
        }
        assert.ok(Math.abs(logSumExp(logits) - truth) <= GOLDEN.tolerance, prompt);
        let text = "";
        while (text.length < 8) {
          const token = argmax(logits);
          text += String.fromCharCode(token);
          logits = await graph.step([token]);
        }
        assert.equal(text, greedy.slice(0, text.length));
      }
    });
  });
}

// Bounds are a few times what was measured: 2.1e-5 with f32 activations, whose sums onnxruntime makes in another order,
// 0.011 with f16 ones, each rounded by up to 2^-11 of it where logits reach 10, and 1.5e-5 for the random decoders.
const TOKENS = tokensOf("fn add(a: u8, b: u8)");

for (const { name, form } of INT4_FORMS) {
  test(`ziglet as ${name} is its dequantized weights in onnxruntime alone${withoutOnnx}`, OPTIONS, async () => {
    const truth = forward(ZIGLET_SHAPE, withInt4(ZIGLET_SHAPE, ZIGLET_WEIGHTS), TOKENS);
    await withGraph(ZIGLET_SHAPE, ZIGLET_WEIGHTS, form, async (graph) => {
      const error = distance(await logitsOf(graph, TOKENS, 16), truth);
      assert.ok(error <= 1e-4, `${error}`);
    });
  });
}

for (const { name, form } of HALF_FORMS.filter(({ form }) => form.attention !== "paged")) {
  test(`ziglet as ${name} is near its f64 logits in onnxruntime alone${withoutOnnx}`, OPTIONS, async () => {
    const truth = forward(ZIGLET_SHAPE, ZIGLET_WEIGHTS, TOKENS);
    await withGraph(ZIGLET_SHAPE, ZIGLET_WEIGHTS, form, async (graph) => {
      const error = distance(await logitsOf(graph, TOKENS, 16), truth);
      assert.ok(error <= 0.05, `${error}`);
    });
  });
}

const SEED = 20_261_128;
const LENGTH = 40;

for (const { name: family, shape, weights } of families(SEED)) {
  test(
    `random ${family} is the f64 forward pass in onnxruntime alone, in every form${withoutOnnx}`,
    OPTIONS,
    async () => {
      const tokens = Array.from({ length: LENGTH }, (_, i) => (i * 7919 + 3) % shape.vocabSize);
      const truth = forward(shape, weights, tokens);
      for (const { name, form } of FORMS) {
        if (!canWrite(form, shape, weights)) continue;
        await withGraph(shape, weights, form, async (graph) => {
          const error = distance(await logitsOf(graph, tokens, LENGTH - 6), truth);
          assert.ok(error <= 1e-4, `${name}: ${error}`);
        });
      }
    },
  );
}
