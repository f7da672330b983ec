/**
 * A decoder that is cut says what the whole one says: pieces in onnxruntime, attention between them in plain loops, against
 * a forward pass of ours in f64.
 */
import assert from "node:assert/strict";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { cutModel } from "../src/onnx/cut/cut.ts";
import type { Form } from "./onnx/builder.ts";
import { makeDecoder } from "./onnx/decoder.ts";
import { families } from "./onnx/families.ts";
import { canWrite, FORMS, HALF_FORMS, INT4_FORMS } from "./onnx/forms.ts";
import { writeModel } from "./onnx/graph.ts";
import { withInt4 } from "./onnx/int4.ts";
import { forward } from "./onnx/oracle.ts";
import { Pieces } from "./onnx/pieces.ts";
import type { DecoderShape, DecoderWeights } from "./onnx/shapes.ts";
import { tokensOf, ZIGLET_SHAPE, ZIGLET_WEIGHTS } from "./onnx/ziglet.ts";
import { onnxRuntime, withoutOnnx } from "./onnx_runtime.ts";

const OPTIONS = { skip: withoutOnnx !== "", timeout: 120_000 };

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

/**
 * The largest error of the logits of two texts, cut, given at once in two steps of unequal lengths: positions and pasts of
 * one are not those of the other.
 */
async function errorOf(
  { shape, weights, form, truth, texts }: {
    readonly shape: DecoderShape;
    readonly weights: DecoderWeights;
    readonly form: Form;
    readonly truth: readonly ArrayLike<number>[];
    readonly texts: readonly (readonly number[])[];
  },
): Promise<number> {
  const folder = mkdtempSync(join(tmpdir(), "kvern-cut-"));
  try {
    writeModel(folder, makeDecoder(shape, weights, form));
    const cut = cutModel(folder);
    // Nothing crosses the last border but attention and the residual stream: both have a row for each token.
    const { takes } = cut.pieces.at(-1)!;
    assert.equal(takes.filter((name) => cut.inputs.every((input) => input.name !== name)).length, 2, `${takes}`);
    await using pieces = await Pieces.load(onnxRuntime!, cut);
    const sequences = texts.map(() => pieces.sequence());
    const given: number[][] = texts.map(() => []);
    const heads = texts.map((tokens, i) => tokens.slice(0, tokens.length - 3 - 2 * i));
    for (const part of [heads, texts.map((tokens, i) => tokens.slice(heads[i]!.length))]) {
      const logits = await pieces.step(sequences, part);
      let at = 0;
      for (const [i, { length }] of part.entries()) {
        given[i]!.push(...logits.subarray(at, at += length * shape.vocabSize));
      }
    }
    return Math.max(...given.map((logits, i) => distance(logits, truth[i]!)));
  } finally {
    rmSync(folder, { recursive: true });
  }
}

test("the pieces of a model that is a file leave its weights there, within the file too", () => {
  const folder = mkdtempSync(join(tmpdir(), "kvern-cut-"));
  try {
    for (const form of [{ attention: "gqa" }, { attention: "gqa", dataFile: "weights.bin" }] as const) {
      writeModel(folder, makeDecoder(ZIGLET_SHAPE, ZIGLET_WEIGHTS, form));
      const { pieces } = cutModel(folder);
      // The weights have 21 MB; nodes and what is smaller than a kilobyte have some 5 KB a piece.
      for (const { model } of pieces) assert.ok(model.length < 20_000, `${model.length}`);
    }
  } finally {
    rmSync(folder, { recursive: true });
  }
});

const TEXTS = ["const std = @im", "fn add(a: u8, b: u8) u8 {"].map(tokensOf);

// Bounds are a few times what was measured, as in the tests of the whole graphs: f32 sums in another order, and f16 numbers
// rounded by up to 2^-11 of them where logits reach 10.
const ZIGLETS = [
  { forms: FORMS, weights: ZIGLET_WEIGHTS, bound: 1e-4 },
  { forms: HALF_FORMS, weights: ZIGLET_WEIGHTS, bound: 0.05 },
  { forms: INT4_FORMS, weights: withInt4(ZIGLET_SHAPE, ZIGLET_WEIGHTS), bound: 1e-4 },
];

for (const { forms, weights, bound } of ZIGLETS) {
  for (const { name, form } of forms) {
    test(`ziglet as ${name}, cut, gives its f64 logits${withoutOnnx}`, OPTIONS, async () => {
      const truth = TEXTS.map((tokens) => forward(ZIGLET_SHAPE, weights, tokens));
      const error = await errorOf({ shape: ZIGLET_SHAPE, weights: ZIGLET_WEIGHTS, form, truth, texts: TEXTS });
      assert.ok(error <= bound, `${error}`);
    });
  }
}

for (const { name: family, shape, weights } of families(20_261_129)) {
  test(`random ${family}, cut, gives its f64 logits in every form${withoutOnnx}`, OPTIONS, async () => {
    const texts = [23, 40].map((length) => Array.from({ length }, (_, i) => (i * 7919 + length) % shape.vocabSize));
    const truth = texts.map((tokens) => forward(shape, weights, tokens));
    for (const { name, form } of FORMS) {
      if (!canWrite(form, shape, weights)) continue;
      const error = await errorOf({ shape, weights, form, truth, texts });
      assert.ok(error <= 1e-4, `${name}: ${error}`);
    }
  });
}
