/**
 * transformers.js with a cache between its runs: ziglet as ONNX, the package's own `generate`.
 */

import assert from "node:assert/strict";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import * as kvern from "../mod.ts";
import * as onnx from "../src/onnx.ts";
import { makeDecoder } from "./onnx/decoder.ts";
import { writeModel } from "./onnx/graph.ts";
import { GOLDEN, tokensOf, ZIGLET_SHAPE, ZIGLET_WEIGHTS } from "./onnx/ziglet.ts";
import {
  type DynamicCache,
  type GenerateOptions,
  transformers,
  type TransformersModel,
  withoutTransformers,
} from "./transformers_runtime.ts";

const { PagedCache } = kvern;
const { keep, layersOf, pastKeyValues } = onnx;

const OPTIONS = { skip: withoutTransformers !== "", timeout: 120_000 };

/** A folder as the package wants it: files about the model, and the model in a folder of its own. */
async function withModel(use: (model: TransformersModel) => Promise<void>): Promise<void> {
  const { env, AutoModelForCausalLM } = transformers!;
  const folder = mkdtempSync(join(tmpdir(), "kvern-transformers-"));
  try {
    writeModel(join(folder, "ziglet", "onnx"), makeDecoder(ZIGLET_SHAPE, ZIGLET_WEIGHTS, { attention: "gqa" }));
    const { layerCount, qHeadCount, kvHeadCount, headDim } = ZIGLET_SHAPE;
    writeFileSync(
      join(folder, "ziglet", "config.json"),
      JSON.stringify({
        architectures: ["LlamaForCausalLM"],
        model_type: "llama",
        num_hidden_layers: layerCount,
        num_attention_heads: qHeadCount,
        num_key_value_heads: kvHeadCount,
        hidden_size: qHeadCount * headDim,
        head_dim: headDim,
        vocab_size: 256,
        bos_token_id: GOLDEN.bos,
        eos_token_id: null,
      }),
    );
    writeFileSync(join(folder, "ziglet", "generation_config.json"), JSON.stringify({ bos_token_id: GOLDEN.bos }));
    env.allowRemoteModels = false;
    env.localModelPath = folder;
    const session_options = { intraOpNumThreads: 1, interOpNumThreads: 1 };
    const model = await AutoModelForCausalLM.from_pretrained("ziglet", {
      dtype: "fp32",
      device: "cpu",
      session_options,
    });
    try {
      await use(model);
    } finally {
      await model.dispose();
    }
  } finally {
    rmSync(folder, { recursive: true });
  }
}

/** `[1, n]` of int64. */
function row(numbers: readonly number[]) {
  return new transformers!.Tensor("int64", BigInt64Array.from(numbers, BigInt), [1, numbers.length]);
}

/** The text and what `generate` adds to it, with a mask over all of it unless told otherwise. */
async function generate(
  model: TransformersModel,
  tokens: readonly number[],
  past_key_values: DynamicCache,
  { isMasked = true } = {},
): Promise<number[]> {
  const attention_mask = row(new Array(tokens.length).fill(1));
  const result = await model.generate({
    inputs: row(tokens),
    ...(isMasked ? { attention_mask } : {}),
    max_new_tokens: 16,
    past_key_values,
  });
  return Array.from(result.data, Number);
}

test(
  `generate() goes on from what the cache keeps, in floats as from nothing${withoutTransformers}`,
  OPTIONS,
  () =>
    withModel(async (model) => {
      const { DynamicCache, Tensor } = transformers!;
      const prompt = tokensOf(GOLDEN.cases[0]!.prompt);
      const first = new DynamicCache();
      const text = await generate(model, prompt, first);
      assert.equal(
        new TextDecoder().decode(Uint8Array.from(text.slice(prompt.length))),
        GOLDEN.cases[0]!.greedy.slice(0, 16),
      );
      using cache = new PagedCache({ layers: layersOf(first), maxSeqLen: 1024, dtype: "f32", prefix: {} });
      keep(cache, text, first, { fingerprint: "ziglet f32" }).free();

      using nothing = cache.sequence();
      assert.deepEqual(await generate(model, prompt, new DynamicCache(pastKeyValues(nothing, { Tensor }))), text);

      // The last token that was generated has no row yet; the second question begins as the first one does.
      const questions: [text: string, startsAt: number][] = [
        ['\ntest "', text.length - 1],
        ["\n    const ", text.length + 1],
      ];
      for (const [question, startsAt] of questions) {
        const tokens = [...text, ...new TextEncoder().encode(question)];
        using sequence = cache.sequence({ tokens: Uint32Array.from(tokens), fingerprint: "ziglet f32" });
        assert.equal(sequence.seqLen, startsAt);
        const warm = new DynamicCache(pastKeyValues(sequence, { Tensor }));
        const answer = await generate(model, tokens, warm);
        assert.deepEqual(answer, await generate(model, tokens, new DynamicCache()));
        assert.equal(warm.get_seq_length(), answer.length - 1);
        keep(cache, answer, warm, { fingerprint: "ziglet f32" }).free();
        assert.equal(
          cache.explain(Uint32Array.from(answer), { fingerprint: "ziglet f32" }).startsAt,
          answer.length - 1,
        );
      }
    }),
);

test(
  `without a mask of full length generate() computes the whole prompt again${withoutTransformers}`,
  OPTIONS,
  () =>
    withModel(async (model) => {
      const { DynamicCache, Tensor } = transformers!;
      const prompt = tokensOf(GOLDEN.cases[0]!.prompt);
      const first = new DynamicCache();
      const text = await generate(model, prompt, first);
      using cache = new PagedCache({ layers: layersOf(first), maxSeqLen: 1024, prefix: {} });
      using sequence = keep(cache, text, first);
      const past = () => new DynamicCache(pastKeyValues(sequence, { Tensor }));
      const masked = past(), unmasked = past();
      await generate(model, text, masked);
      await generate(model, text, unmasked, { isMasked: false });
      assert.equal(masked.get_seq_length(), text.length + 15);
      // What docs/transformers.md warns of: once this fails the package is mended.
      assert.equal(unmasked.get_seq_length(), sequence.seqLen + text.length + 15);
    }),
);

/** What the example of docs/transformers.md makes, and the tokens that its cache has. */
interface Example {
  answer(messages: readonly string[]): Promise<string>;
  cacheOf(): kvern.PagedCache;
}

/** Runs the example as it is written, with another model in its place. */
async function runExample(modules: Readonly<Record<string, object>>): Promise<Example> {
  const text = readFileSync(new URL("../docs/transformers.md", import.meta.url), "utf8");
  const code = /```js\n([^]*?)```/.exec(text)![1]!;
  const imports = /^import (\{.*\}) from ("[^"]+");$/gm;
  assert.equal([...code.matchAll(imports)].length, 3);
  const body = code.replaceAll(imports, "const $1 = modules[$2];") + "return { answer, cacheOf: () => cache };";
  const AsyncFunction = Object.getPrototypeOf(async () => {}).constructor;
  return await new AsyncFunction("modules", body)(modules);
}

test(
  `the example of docs/transformers.md goes on from its cache${withoutTransformers}`,
  OPTIONS,
  () =>
    withModel(async (model) => {
      const lengths: number[] = [];
      const tokenizer = {
        apply_chat_template: (messages: readonly string[]) => tokensOf(messages.join("")),
        decode: (tokens: readonly number[]) => String.fromCharCode(...tokens),
      };
      const { answer, cacheOf } = await runExample({
        "@kvern/kvern": kvern,
        "@kvern/kvern/onnx": onnx,
        "@huggingface/transformers": {
          ...transformers!,
          AutoTokenizer: { from_pretrained: () => tokenizer },
          AutoModelForCausalLM: {
            from_pretrained: () => ({
              generate(options: GenerateOptions) {
                lengths.push(options.past_key_values!.get_seq_length());
                return model.generate({ ...options, max_new_tokens: 24 });
              },
            }),
          },
        },
      });
      const prompt = GOLDEN.cases[0]!.prompt;
      const first = await answer([prompt]);
      assert.equal(first, GOLDEN.cases[0]!.greedy.slice(0, 24));
      const second = await answer([prompt, first, "\ntest"]);
      assert.equal(second.length, 24);
      assert.equal(await answer([prompt]), first);
      assert.deepEqual(lengths, [0, prompt.length + 24, prompt.length]); // and the token that begins each text
      cacheOf().free();
    }),
);
