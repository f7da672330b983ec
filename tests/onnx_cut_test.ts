/**
 * A decoder that is cut says what the whole one says: for every form, pieces in onnxruntime with attention in plain loops
 * against the whole graph in onnxruntime.
 */
import assert from "node:assert/strict";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { cutModel } from "../src/onnx/cut.ts";
import type { Form } from "./onnx/builder.ts";
import { makeDecoder } from "./onnx/decoder.ts";
import { writeModel } from "./onnx/graph.ts";
import { Pieces } from "./onnx/pieces.ts";
import { WholeGraph } from "./onnx/whole_graph.ts";
import { tokensOf, ZIGLET_SHAPE, ZIGLET_WEIGHTS } from "./onnx/ziglet.ts";
import { onnxRuntime, withoutOnnx } from "./onnx_runtime.ts";

const OPTIONS = { skip: withoutOnnx !== "", timeout: 120_000 };

/** Forms that onnxruntime runs whole, and how far a logit may be off: sums in f32 have another order. */
const FORMS: Readonly<Record<string, { readonly form: Form; readonly bound: number }>> = {
  "GroupQueryAttention": { form: { attention: "gqa" }, bound: 1e-4 },
};

for (const [name, { form, bound }] of Object.entries(FORMS)) {
  test(`${name}, cut, gives the logits of the whole graph${withoutOnnx}`, OPTIONS, async () => {
    const folder = mkdtempSync(join(tmpdir(), "kvern-cut-"));
    try {
      const path = writeModel(folder, makeDecoder(ZIGLET_SHAPE, ZIGLET_WEIGHTS, form));
      await using whole = await WholeGraph.load(onnxRuntime!, path, ZIGLET_SHAPE, form);
      await using pieces = await Pieces.load(onnxRuntime!, cutModel(folder));
      const prompts = ["const std = @import(", "pub fn main() !void {"].map(tokensOf);
      const expected: Float32Array[] = [];
      for (const prompt of prompts) {
        whole.restart();
        expected.push(await whole.step(prompt));
      }
      // Both at once, in two steps of unequal lengths: positions and pasts of one are not those of the other.
      const sequences = prompts.map(() => pieces.sequence());
      const cuts = [7, 12];
      const [first, rest] = [
        await pieces.step(sequences, prompts.map((tokens, i) => tokens.slice(0, cuts[i]))),
        await pieces.step(sequences, prompts.map((tokens, i) => tokens.slice(cuts[i]))),
      ];
      const vocab = ZIGLET_SHAPE.vocabSize;
      const restAt = (prompts[0]!.length - cuts[0]!) * vocab;
      const given = [
        [first.subarray(0, cuts[0]! * vocab), rest.subarray(0, restAt)],
        [first.subarray(cuts[0]! * vocab), rest.subarray(restAt)],
      ].map((parts) => parts.flatMap((part) => [...part]));
      for (const [i, logits] of given.entries()) {
        assert.equal(logits.length, expected[i]!.length);
        for (const [at, logit] of logits.entries()) {
          assert.ok(
            Math.abs(logit - expected[i]![at]!) <= bound,
            `prompt ${i}, logit ${at}: ${logit}, ${expected[i]![at]}`,
          );
        }
      }
    } finally {
      rmSync(folder, { recursive: true });
    }
  });
}
