/**
 * The ONNX models the tests make: that they are what exporters write, and right, by what onnxruntime alone makes of them.
 */
import assert from "node:assert/strict";
import { test } from "node:test";
import { argmax, logSumExp } from "../examples/sampling.ts";
import type { Form } from "./onnx/builder.ts";
import { makeDecoder } from "./onnx/decoder.ts";
import { GOLDEN, tokensOf, ZIGLET_SHAPE, ZIGLET_WEIGHTS } from "./onnx/ziglet.ts";
import { WholeGraph } from "./onnx/whole_graph.ts";
import { onnxRuntime, withoutOnnx } from "./onnx_runtime.ts";

const OPTIONS = { skip: withoutOnnx !== "", timeout: 120_000 };

const FORMS: Readonly<Record<string, Form>> = {
  "GroupQueryAttention": { attention: "gqa" },
};

for (const [name, form] of Object.entries(FORMS)) {
  test(`ziglet as ${name} has golden logits in onnxruntime alone${withoutOnnx}`, OPTIONS, async () => {
    const { model } = makeDecoder(ZIGLET_SHAPE, ZIGLET_WEIGHTS, form);
    await using graph = await WholeGraph.load(onnxRuntime!, model, ZIGLET_SHAPE, form);
    for (const { prompt, logitsTop, logSumExp: truth, greedy } of GOLDEN.cases) {
      graph.restart();
      const tokens = tokensOf(prompt);
      let logits = (await graph.step(tokens)).subarray((tokens.length - 1) * 256);
      for (const [token, logit] of logitsTop) {
        assert.ok(Math.abs(logits[token]! - logit) <= GOLDEN.tolerance, `${prompt}: ${token}`);
      }
      assert.ok(Math.abs(logSumExp(logits) - truth) <= GOLDEN.tolerance, prompt);
      let text = "";
      while (text.length < 16) {
        const token = argmax(logits);
        text += String.fromCharCode(token);
        logits = await graph.step([token]);
      }
      assert.equal(text, greedy.slice(0, text.length));
    }
  });
}
