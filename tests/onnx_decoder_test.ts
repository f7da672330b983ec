/** `OnnxDecoder`: what it is loaded with, what it says of a model, and that it computes what the model computes. */
import assert from "node:assert/strict";
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { pathToFileURL } from "node:url";
import { BlockPool, type KvErrorCode } from "../mod.ts";
import { OnnxDecoder, type OnnxDecoderOptions, type Ort } from "../src/onnx.ts";
import { makeDecoder } from "./onnx/decoder.ts";
import { GOLDEN, tokensOf as goldenTokens, ZIGLET_SHAPE, ZIGLET_WEIGHTS } from "./onnx/ziglet.ts";
import { LAYER_COUNT, loadSmall, ort, sequenceOf, smallModel, tokensOf, VOCAB_SIZE, watched } from "./onnx_decoders.ts";
import { withoutOnnx } from "./onnx_runtime.ts";

const skip = withoutOnnx !== "";

function onnxTest(name: string, run: () => Promise<void>): void {
  test(`${name}${withoutOnnx}`, { skip }, run);
}

/** A folder that is gone afterwards. */
async function inFolder(run: (folder: string) => Promise<void>): Promise<void> {
  const folder = mkdtempSync(join(tmpdir(), "kvern-onnx-"));
  try {
    await run(folder);
  } finally {
    rmSync(folder, { recursive: true });
  }
}

async function assertRefused(loading: Promise<OnnxDecoder>, code: KvErrorCode, text: RegExp): Promise<void> {
  await assert.rejects(loading, (error: { code?: string; message: string }) => {
    assert.equal(error.code, code, error.message);
    assert.match(error.message, text);
    return true;
  });
}

onnxTest("a decoder gives the logits and the greedy texts of ziglet", async () => {
  const { model } = makeDecoder(ZIGLET_SHAPE, ZIGLET_WEIGHTS, { attention: "gqa" });
  await using decoder = await OnnxDecoder.load(model, { ort, maxSeqLen: 512, dtype: "f32" });
  assert.ok(GOLDEN.cases.length > 0);
  for (const { prompt, logitsTop, greedy } of GOLDEN.cases) {
    const tokens = goldenTokens(prompt);
    using sequence = decoder.sequence();
    const [logits] = await decoder.step([sequence], [tokens]);
    for (const [token, logit] of logitsTop) {
      assert.ok(Math.abs(logits![token]! - logit) <= GOLDEN.tolerance, `${token}: ${logits![token]}, not ${logit}`);
    }
    using other = decoder.sequence({ tokens });
    const bytes: number[] = [];
    for await (const token of decoder.generate(other, { tokens, maxTokens: greedy.length })) bytes.push(token);
    assert.equal(String.fromCharCode(...bytes), greedy);
  }
});

onnxTest("a decoder says what its model is", async () => {
  await using decoder = await loadSmall();
  await using same = await loadSmall();
  await using other = await OnnxDecoder.load(smallModel({ ropeTheta: 5000 }), { ort, maxSeqLen: 256 });
  const { vocabSize, endTokens, cache, fingerprint } = decoder;
  assert.deepEqual({ vocabSize, endTokens, layerCount: cache.layerCount, maxSeqLen: cache.maxSeqLen }, {
    vocabSize: VOCAB_SIZE,
    endTokens: [],
    layerCount: LAYER_COUNT,
    maxSeqLen: 256,
  });
  assert.match(fingerprint, /^[0-9a-f]{64}$/);
  assert.equal(same.fingerprint, fingerprint);
  assert.notEqual(other.fingerprint, fingerprint);
});

onnxTest("heads and windows of the graph are those of the cache's layers", async () => {
  await using decoder = await OnnxDecoder.load(smallModel({ windows: [16, 0] }), { ort, maxSeqLen: 256 });
  const { kvHeadCount, headDim, qHeadCount } = ZIGLET_SHAPE;
  assert.deepEqual(decoder.cache.layerShape(0), { kvHeadCount, headDim, qHeadCount, windowTokens: 16 });
  assert.deepEqual(decoder.cache.layerShape(1), { kvHeadCount, headDim, qHeadCount });
  assert.equal(decoder.cache.groupCount, 2);
});

onnxTest("every option of a cache that the model leaves open reaches the cache", async () => {
  using pool = new BlockPool({ layerCount: 1, kvHeadCount: 1, headDim: 32, maxBytes: 2 ** 20 });
  const { kvHeadCount, headDim } = ZIGLET_SHAPE;
  await using decoder = await loadSmall({
    ...{ blockSize: 128, tail: { dtype: "bf16", tokens: 128 }, store: { k: "i8", v: "i4" }, maxBytes: 2 ** 24 },
    ...{ measureFidelity: true, retention: { keep: "newest", tokens: 200 }, rewindTokens: 7, prefix: { events: true } },
  });
  const { cache } = decoder;
  assert.deepEqual([cache.blockSize, cache.dtypeK, cache.rewindTokens], [128, "bf16", 7]);
  assert.deepEqual(cache.events(), []);
  assert.equal(cache.fidelity(0).length, kvHeadCount);
  assert.equal(cache.policy.kind, "hybrid");
  await assertRefused(loadSmall({ pool }), "invalid_config", /pool/); // of another shape than the layers
  using own = new BlockPool({ layerCount: LAYER_COUNT, kvHeadCount, headDim, maxBytes: 2 ** 24 });
  await using pooled = await loadSmall({ pool: own });
  assert.equal(pooled.cache.pool, own);
  using sequence = await sequenceOf(pooled, "a");
  assert.equal(sequence.seqLen, 2);
});

onnxTest("an option that the model decides, a wrong one and an unknown one are refused", async () => {
  for (const name of ["layers", "layerCount", "kvHeadCount", "headDim", "qHeadCount", "windowTokens"]) {
    const options = { [name]: 1 } as Partial<OnnxDecoderOptions>;
    await assertRefused(loadSmall(options), "invalid_config", new RegExp(`the model says .*: ${name} is given`));
  }
  const wrong = (options: object) => options as Partial<OnnxDecoderOptions>;
  await assertRefused(loadSmall(wrong({ stroe: "i4" })), "invalid_config", /no option stroe: did you mean store\?/);
  await assertRefused(loadSmall({ tokensPerRun: 0 }), "invalid_config", /tokensPerRun must be at least 1/);
  await assertRefused(OnnxDecoder.load(smallModel(), { ort }), "invalid_config", /maxSeqLen must be given/);
  await assert.rejects(loadSmall(wrong({ session: 1 })), /session must be an object/);
  await assert.rejects(loadSmall(wrong({ ort: {} })), /ort must be the package onnxruntime-node or onnxruntime-web/);
  await assert.rejects(OnnxDecoder.load(smallModel(), undefined as never), /its options must be an object with ort/);
});

onnxTest("onnxruntime may be what a package exports by default", async () => {
  await using decoder = await loadSmall({ ort: { default: ort } as unknown as Ort });
  assert.equal(decoder.vocabSize, VOCAB_SIZE);
});

onnxTest(
  "a model is a folder, a file, a URL or bytes, and files beside it say how long a text is and what ends it",
  async () => {
    await inFolder(async (folder) => {
      const inner = join(folder, "onnx"), path = join(inner, "model.onnx");
      mkdirSync(inner);
      writeFileSync(path, smallModel());
      writeFileSync(join(folder, "config.json"), JSON.stringify({ max_position_embeddings: 100, eos_token_id: 9 }));
      writeFileSync(join(folder, "generation_config.json"), JSON.stringify({ eos_token_id: [7, 8] }));
      for (const model of [folder, path, pathToFileURL(path)]) {
        await using decoder = await OnnxDecoder.load(model, { ort });
        assert.deepEqual([decoder.cache.maxSeqLen, decoder.endTokens], [100, [7, 8]], `${model}`);
      }
      await using given = await OnnxDecoder.load(path, { ort, maxSeqLen: 300, endTokens: [1] });
      assert.deepEqual([given.cache.maxSeqLen, given.endTokens], [300, [1]]);

      rmSync(join(folder, "generation_config.json"));
      await using plain = await OnnxDecoder.load(path, { ort });
      assert.deepEqual(plain.endTokens, [9]);
      const genai = { model: { context_length: 50, eos_token_id: 3 } };
      writeFileSync(join(inner, "genai_config.json"), JSON.stringify(genai));
      rmSync(join(folder, "config.json"));
      await using built = await OnnxDecoder.load(path, { ort });
      assert.deepEqual([built.cache.maxSeqLen, built.endTokens], [50, [3]]);
      writeFileSync(join(folder, "config.json"), "{");
      await assert.rejects(OnnxDecoder.load(path, { ort }), /Cannot read .*config\.json/);
    });
  },
);

onnxTest("a load that fails leaves no session and no cache behind", async () => {
  const watch = watched();
  let made = 0;
  const failing: Ort = {
    ...watch.ort,
    InferenceSession: {
      create(model, options) {
        if (made++ === 2) throw new Error("no memory for this");
        return watch.ort.InferenceSession.create(model, options);
      },
    },
  };
  await assertRefused(loadSmall({ ort: failing }), "model_failed", /piece 2 of 3: no memory for this/);
  assert.equal(watch.sessionCount, 0);
});

onnxTest("free() waits for the step that runs, releases all sessions and refuses what comes later", async () => {
  const watch = watched();
  const decoder = await loadSmall({ ort: watch.ort });
  assert.equal(watch.sessionCount, LAYER_COUNT + 1);
  const sequence = decoder.sequence();
  const step = decoder.step([sequence], [tokensOf("fn main")]);
  const freed = decoder.free();
  const refused = { code: "stale_handle", message: "Cannot step as the decoder was freed" };
  const late = assert.rejects(decoder.step([sequence], [[1]]), refused);
  assert.equal((await step).length, 1);
  await late;
  await freed;
  await decoder.free();
  assert.deepEqual([watch.sessionCount, sequence.handle, decoder.cache.handle], [0, 0, 0]);
  assert.throws(() => decoder.sequence(), { code: "stale_handle" });
  assert.throws(() => decoder.generate(sequence, { tokens: [1] }), { code: "stale_handle" });
});

onnxTest(
  "options of sessions are onnxruntime's own; between two pieces no thread spins and no arena is kept",
  async () => {
    const seen: unknown[] = [];
    const watching: Ort = {
      ...ort,
      InferenceSession: {
        create(model, options) {
          seen.push(options);
          return ort.InferenceSession.create(model, options);
        },
      },
    };
    await using _ = await loadSmall({ ort: watching });
    const session = {
      intraOpNumThreads: 1,
      enableCpuMemArena: true,
      extra: { session: { force_spinning_stop: "0" } },
    };
    await using __ = await loadSmall({ ort: watching, session });
    assert.deepEqual(seen[0], { enableCpuMemArena: false, extra: { session: { force_spinning_stop: "1" } } });
    assert.deepEqual(seen.at(-1), session);
  },
);
