/**
 * Real and random decoders as ONNX, cut and run with kvern's cache: against golden numbers, against a forward pass in f64,
 * and against themselves alone where several texts are in one step.
 */
import assert from "node:assert/strict";
import { test } from "node:test";
import type { Sequence } from "../mod.ts";
import type { OnnxDecoder } from "../src/onnx.ts";
import { argmax, logSumExp } from "../examples/sampling.ts";
import { distance, withDecoder } from "./onnx/cut_decoder.ts";
import { families } from "./onnx/families.ts";
import { canWrite, CUT_ONLY_FORMS, FORMS, HALF_FORMS, INT4_FORMS } from "./onnx/forms.ts";
import { withInt4 } from "./onnx/int4.ts";
import { forward } from "./onnx/oracle.ts";
import { unsharedHeads } from "./onnx/shapes.ts";
import { GOLDEN, tokensOf, ZIGLET_SHAPE, ZIGLET_WEIGHTS } from "./onnx/ziglet.ts";
import { Random } from "./oracle.ts";
import { withoutOnnx } from "./onnx_runtime.ts";

const OPTIONS = { skip: withoutOnnx !== "", timeout: 120_000 };
const ZIGLET = { shape: ZIGLET_SHAPE, weights: ZIGLET_WEIGHTS };

/** Adds tokens to a sequence; gives the logits of the last. */
async function extend(decoder: OnnxDecoder, sequence: Sequence, tokens: readonly number[]): Promise<Float32Array> {
  const [logits] = await decoder.step([sequence], [tokens]);
  return logits!;
}

/** The greedy text behind logits, so many tokens of it. */
async function greedyText(decoder: OnnxDecoder, sequence: Sequence, logits: Float32Array, count: number) {
  let text = "";
  while (text.length < count) {
    const token = argmax(logits);
    text += String.fromCharCode(token);
    logits = await extend(decoder, sequence, [token]);
  }
  return text;
}

/** The logits behind a text of which some tokens are given at once, and the others one by one, `[token][vocab]`. */
async function logitsOf(decoder: OnnxDecoder, tokens: readonly number[], atOnce: number): Promise<number[]> {
  using sequence = decoder.sequence();
  const logits: number[] = [];
  const add = async (part: readonly number[]) => {
    const [found] = await decoder.step([sequence], [part], { allLogits: true });
    logits.push(...found!);
  };
  await add(tokens.slice(0, atOnce));
  for (const token of tokens.slice(atOnce)) await add([token]);
  return logits;
}

const ziglets = [
  ...FORMS.map(({ name, form }) => ({ name, form, ...ZIGLET })),
  ...FORMS.filter(({ name }) => name === "MultiHeadAttention").map(({ name, form }) => ({
    name: `${name} of as many KV heads`,
    form,
    ...unsharedHeads(ZIGLET_SHAPE, ZIGLET_WEIGHTS),
  })),
];

for (const { name, ...made } of ziglets) {
  test(`ziglet as ${name} has golden logits and texts${withoutOnnx}`, OPTIONS, async () => {
    await withDecoder(made, {}, async (decoder) => {
      const isFirst = name === FORMS[0]!.name;
      const cases = isFirst ? GOLDEN.cases : GOLDEN.cases.slice(0, 2);
      for (const { prompt, logitsTop, logSumExp: truth, greedy } of cases) {
        using sequence = decoder.sequence();
        const logits = await extend(decoder, sequence, tokensOf(prompt));
        for (const [token, logit] of logitsTop) {
          assert.ok(Math.abs(logits[token]! - logit) <= GOLDEN.tolerance, `${prompt}: ${token}`);
        }
        assert.ok(Math.abs(logSumExp(logits) - truth) <= GOLDEN.tolerance, prompt);
        const count = isFirst ? greedy.length : 8;
        assert.equal(await greedyText(decoder, sequence, logits, count), greedy.slice(0, count));
      }
    });
  });
}

const TOKENS = tokensOf("pub fn add(a: u8, b: u8) u8 {\n    return a + b;\n}\n");
/** Tokens that are given at once; the others come one by one. */
const AT_ONCE = TOKENS.length - 8;

for (const { name, form } of INT4_FORMS) {
  test(`ziglet as ${name} is its dequantized weights in f64${withoutOnnx}`, OPTIONS, async () => {
    const truth = forward(ZIGLET_SHAPE, withInt4(ZIGLET_SHAPE, ZIGLET_WEIGHTS), TOKENS);
    await withDecoder({ ...ZIGLET, form }, {}, async (decoder) => {
      const error = distance(await logitsOf(decoder, TOKENS, AT_ONCE), truth);
      assert.ok(error <= 1e-4, `${error}`);
    });
  });
}

for (const { name, form } of HALF_FORMS) {
  test(`ziglet as ${name} is near its f64 logits${withoutOnnx}`, OPTIONS, async () => {
    const truth = forward(ZIGLET_SHAPE, ZIGLET_WEIGHTS, TOKENS);
    await withDecoder({ ...ZIGLET, form }, {}, async (decoder) => {
      const error = distance(await logitsOf(decoder, TOKENS, AT_ONCE), truth);
      assert.ok(error <= 0.05, `${error}`);
    });
  });
}

const LENGTH = 48;

/** A form of each kind of attention; onnx_cut_test.ts runs the pieces of all forms of random decoders. */
const KINDS = [
  ...FORMS.filter(({ form: { attention } }, i) => FORMS.findIndex((other) => other.form.attention === attention) === i),
  ...CUT_ONLY_FORMS,
];

for (const { name: family, shape, weights } of families(20_261_128)) {
  test(`random ${family} is the f64 forward pass, with every kind of attention${withoutOnnx}`, OPTIONS, async () => {
    const tokens = Array.from({ length: LENGTH }, (_, i) => (i * 7919 + 3) % shape.vocabSize);
    const truth = forward(shape, weights, tokens);
    for (const { name, form } of KINDS) {
      if (!canWrite(form, shape, weights)) continue;
      await withDecoder({ shape, weights, form }, { blockSize: 16 }, async (decoder) => {
        const error = distance(await logitsOf(decoder, tokens, LENGTH - 6), truth);
        assert.ok(error <= 1e-4, `${name}: ${error}`);
      });
    }
  });
}

test(`texts of any lengths in one step are what each is alone${withoutOnnx}`, OPTIONS, async () => {
  const form = FORMS[0]!.form;
  const texts = GOLDEN.cases.map(({ prompt, greedy }) => tokensOf(prompt + greedy));
  await withDecoder({ ...ZIGLET, form }, {}, async (decoder) => {
    const { cache } = decoder;
    const together = texts.map(() => decoder.sequence()), alone = texts.map(() => decoder.sequence());
    const starts = texts.map(() => 0);
    // Each step has other lengths: long ones first, a few of one text beside one of another, and some texts not at all.
    for (let step = 0; step < 6; step++) {
      const given = texts.map((text, i) => {
        const count = step === 0 ? 9 * (i + 1) : (step + i) % 3;
        return text.slice(starts[i]!, starts[i]! + count);
      });
      const taking = given.flatMap((part, i) => part.length > 0 ? [i] : []);
      const found = await decoder.step(taking.map((i) => together[i]!), taking.map((i) => given[i]!));
      for (const [at, i] of taking.entries()) {
        const truth = await extend(decoder, alone[i]!, given[i]!);
        const error = distance(found[at]!, truth);
        assert.ok(error <= 1e-5, `text ${i}, step ${step}: ${error}`);
        starts[i]! += given[i]!.length;
      }
    }
    const qSize = ZIGLET_SHAPE.qHeadCount * ZIGLET_SHAPE.headDim;
    const q = new Random(1).floats(texts.length * qSize, 2);
    for (let layer = 0; layer < cache.layerCount; layer++) {
      const all = cache.attend(layer, q, { sequences: together, queryCounts: texts.map(() => 1) });
      for (const [i, sequence] of together.entries()) {
        const part = [i * qSize, (i + 1) * qSize] as const;
        assert.deepEqual(all.slice(...part), sequence.attend(layer, q.slice(...part)), `layer ${layer}, text ${i}`);
      }
    }
  });
});

test(`a prefix that is found again, and a fork, go on as if computed${withoutOnnx}`, OPTIONS, async () => {
  const tokens = [...TOKENS, ...TOKENS, ...TOKENS];
  await withDecoder({ ...ZIGLET, form: FORMS[0]!.form }, { blockSize: 16, prefix: {} }, async (decoder) => {
    const first = decoder.sequence({ tokens });
    assert.equal(first.seqLen, 0);
    const truth = await extend(decoder, first, tokens);
    using fork = first.fork();
    const next = argmax(truth);
    const further = await extend(decoder, first, [next]);
    assert.ok(distance(await extend(decoder, fork, [next]), further) <= 1e-5);
    first.free();
    using again = decoder.sequence({ tokens });
    assert.ok(again.seqLen >= tokens.length - 16 && again.seqLen < tokens.length, `${again.seqLen} tokens are found`);
    const error = distance(await extend(decoder, again, tokens.slice(again.seqLen)), truth);
    assert.ok(error <= 1e-5, `${error}`);
  });
});

test(`ziglet over i4 keys and values keeps its greedy texts${withoutOnnx}`, OPTIONS, async () => {
  await withDecoder({ ...ZIGLET, form: FORMS[0]!.form }, { dtype: "f16", store: "i4" }, async (decoder) => {
    for (const { prompt, greedy } of GOLDEN.cases) {
      using sequence = decoder.sequence();
      const logits = await extend(decoder, sequence, tokensOf(prompt));
      assert.equal(await greedyText(decoder, sequence, logits, greedy.length), greedy);
      assert.ok(decoder.cache.stats().storeTokens >= 64, "a block of the text is in 4 bits");
    }
  });
});
