/** Steps of an `OnnxDecoder` that fail: every sequence is what it was before, to the last bit. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { BlockPool, KvError, type Sequence } from "../mod.ts";
import type { OnnxDecoder, OnnxDecoderOptions } from "../src/onnx.ts";
import { ZIGLET_SHAPE } from "./onnx/ziglet.ts";
import { LAYER_COUNT, loadSmall, sequenceOf, tokensOf, watched } from "./onnx_decoders.ts";
import { withoutOnnx } from "./onnx_runtime.ts";

function onnxTest(name: string, run: () => Promise<void>): void {
  test(`${name}${withoutOnnx}`, { skip: withoutOnnx !== "" }, run);
}

/** What a cache holds. */
function held({ cache }: OnnxDecoder): Record<string, number> {
  const { blockCount, totalTokens, usedBytes, tailTokens, storeTokens } = cache.stats();
  return { blockCount, totalTokens, usedBytes, tailTokens, storeTokens };
}

/** What makes a step fail, told before one of its runs. */
type Failing = (abort: () => void, sequences: Sequence[]) => void;

/** The logits of a step after others that failed, beside those of a decoder where none did. */
async function assertUndone(
  options: Partial<OnnxDecoderOptions>,
  fail: Failing,
  code: string,
  firstRun: number = 0,
): Promise<void> {
  const watch = watched();
  const rest = ["fn f() u8 { return 1;", "while (true)"];
  await using decoder = await loadSmall({ ort: watch.ort, ...options });
  await using undisturbed = await loadSmall(options);
  const sequences = await Promise.all(rest.map((text) => sequenceOf(decoder, text)));
  const wanted = await Promise.all(rest.map((text) => sequenceOf(undisturbed, text)));
  const tokens = ["}\n", " {\n        x += 1;"].map(tokensOf);
  for (let failAt = firstRun; failAt <= LAYER_COUNT; failAt++) {
    const before = held(decoder);
    const first = watch.runCount;
    const controller = new AbortController();
    watch.beforeRun = (run) => {
      if (run === first + failAt) fail(() => controller.abort("enough"), sequences);
    };
    await assert.rejects(decoder.step(sequences, tokens, { signal: controller.signal }), { code });
    watch.beforeRun = () => {};
    assert.deepEqual(held(decoder), before);
  }
  const given = await decoder.step(sequences, tokens);
  assert.deepEqual(given, await undisturbed.step(wanted, tokens)); // the same bits
}

onnxTest("a step that onnxruntime fails leaves all sequences as they were, whichever run it was", async () => {
  const fail = () => {
    throw new Error("out of luck");
  };
  await assertUndone({ dtype: "f32" }, fail, "model_failed");
  await assertUndone({ store: "i8" }, fail, "model_failed");
});

onnxTest("a step that is aborted leaves all sequences as they were, whichever run it was", async () => {
  await assertUndone({ store: "i4" }, (abort) => abort(), "aborted");
});

onnxTest("a step whose sequence is rewound while it runs fails, and the others are as they were", async () => {
  await assertUndone({ dtype: "f32" }, (_, [first]) => first!.truncate(first!.seqLen), "commit_mismatch", 1);
});

onnxTest("a step whose sequence is freed while it runs fails, and the others are as they were", async () => {
  const watch = watched();
  await using decoder = await loadSmall({ ort: watch.ort });
  const [first, second] = [await sequenceOf(decoder, "abc"), await sequenceOf(decoder, "de")];
  const run = watch.runCount + 1;
  watch.beforeRun = (at) => {
    if (at === run) second!.free();
  };
  await assert.rejects(decoder.step([first!, second!], [[1], [2]]), { code: "stale_handle" });
  assert.equal(first!.seqLen, 4);
  const [logits] = await decoder.step([first!], [[1]]);
  await using other = await loadSmall();
  assert.deepEqual([logits], await other.step([await sequenceOf(other, "abc")], [[1]]));
});

onnxTest(
  "a sequence that is full and a cache without room fail a step, and all sequences are as they were",
  async () => {
    await using short = await loadSmall({ maxSeqLen: 6 });
    const sequences = [await sequenceOf(short, "abc"), await sequenceOf(short, "abcd")];
    await assert.rejects(short.step(sequences, [[1], [2, 3]]), (error) => {
      assert.ok(error instanceof KvError);
      assert.equal(error.code, "cache_full");
      assert.match(error.message, /at most 6 tokens: sequence 1 has 5, 2 were to come/);
      return true;
    });
    assert.equal((await short.step(sequences, [[1], [2]])).length, 2);

    // A block of 16 rows, keys and values in f32.
    const { kvHeadCount, headDim } = ZIGLET_SHAPE;
    const blockBytes = LAYER_COUNT * 2 * kvHeadCount * 16 * headDim * 4;
    using pool = new BlockPool({
      layerCount: LAYER_COUNT,
      ...{ kvHeadCount, headDim, blockSize: 16, dtype: "f32", maxBytes: 2 * blockBytes },
    });
    await using small = await loadSmall({ pool, blockSize: 16, dtype: "f32" });
    await using large = await loadSmall({ blockSize: 16, dtype: "f32" });
    const [one, other] = [await sequenceOf(small, "abcdefgh"), await sequenceOf(small, "xyz")];
    const many = Array.from({ length: 20 }, (_, i) => i);
    await assert.rejects(small.step([one, other], [[1], many]), { code: "pool_empty" });
    assert.deepEqual([one.seqLen, other.seqLen], [9, 4]);
    const wanted = [await sequenceOf(large, "abcdefgh"), await sequenceOf(large, "xyz")];
    assert.deepEqual(await small.step([one, other], [[1], [2, 3]]), await large.step(wanted, [[1], [2, 3]]));
  },
);
