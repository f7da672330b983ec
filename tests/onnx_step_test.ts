/** Steps of an `OnnxDecoder`: many sequences at once, each as if it were alone, and what no step can be for. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { ContiguousCache, Sequence } from "../mod.ts";
import { OnnxDecoder, type OnnxDecoderOptions } from "../src/onnx.ts";
import { ZIGLET_SHAPE } from "./onnx/ziglet.ts";
import {
  assertNear,
  LAYER_COUNT,
  loadSmall,
  ort,
  sequenceOf,
  smallModel,
  tokensOf,
  VOCAB_SIZE,
  watched,
} from "./onnx_decoders.ts";
import { withoutOnnx } from "./onnx_runtime.ts";

const skip = withoutOnnx !== "";

/** Matrix products of other heights are summed in another order. */
const BOUND = 1e-5;

const TEXTS = ["const std = @import(", "a", "pub fn main() void {\n    return;", "test"];

function onnxTest(name: string, run: () => Promise<void>): void {
  test(`${name}${withoutOnnx}`, { skip }, run);
}

onnxTest("sequences of different lengths in one step have the logits that each has alone", async () => {
  for (const options of [{ dtype: "f32" }, { store: "i4" }] satisfies Partial<OnnxDecoderOptions>[]) {
    await using decoder = await loadSmall(options);
    const sequences = TEXTS.map(() => decoder.sequence());
    const together = await decoder.step(sequences, TEXTS.map(tokensOf));
    const next = await decoder.step(sequences, [[65], [66, 67, 68], [69], [70, 71]]);
    for (const [i, text] of TEXTS.entries()) {
      using alone = decoder.sequence();
      const [first] = await decoder.step([alone], [tokensOf(text)]);
      assertNear(together[i]!, first!, BOUND);
      const [second] = await decoder.step([alone], [[[65], [66, 67, 68], [69], [70, 71]][i]!]);
      assertNear(next[i]!, second!, BOUND);
      assert.equal(sequences[i]!.seqLen, alone.seqLen);
    }
  }
});

onnxTest("all logits are those of each token, and the last of them those of a step without", async () => {
  await using decoder = await loadSmall({ dtype: "f32" });
  const tokens = TEXTS.map(tokensOf);
  const all = await decoder.step(TEXTS.map(() => decoder.sequence()), tokens, { allLogits: true });
  const last = await decoder.step(TEXTS.map(() => decoder.sequence()), tokens);
  using sequence = decoder.sequence();
  for (const [i, ids] of tokens.entries()) {
    assert.equal(all[i]!.length, ids.length * VOCAB_SIZE);
    assertNear(last[i]!, all[i]!.subarray(-VOCAB_SIZE), BOUND);
    sequence.truncate(0);
    for (const [j, id] of ids.entries()) {
      const [logits] = await decoder.step([sequence], [[id]]);
      assertNear(logits!, all[i]!.subarray(j * VOCAB_SIZE, (j + 1) * VOCAB_SIZE), BOUND);
    }
  }
});

onnxTest("a step whose tokens go through the model in parts gives what it gives at once", async () => {
  await using whole = await loadSmall({ dtype: "f32" });
  for (const tokensPerRun of [1, 3, 7]) {
    await using parts = await loadSmall({ dtype: "f32", tokensPerRun });
    for (const allLogits of [false, true]) {
      const [wanted, given] = await Promise.all(
        [whole, parts].map((decoder) =>
          decoder.step(TEXTS.map(() => decoder.sequence()), TEXTS.map(tokensOf), { allLogits })
        ),
      );
      for (const [i, logits] of given!.entries()) assertNear(logits, wanted![i]!, BOUND);
    }
  }
});

onnxTest("a layer with a window sees no further, in a prompt as in single tokens", async () => {
  await using decoder = await OnnxDecoder.load(smallModel({ windows: [4, 4] }), { ort, maxSeqLen: 256, blockSize: 4 });
  const [first, second] = ["xxxxxxxxxxabcdefgh", "yyyyyyyyyyabcdefgh"].map(tokensOf);
  const [one, other] = await decoder.step([decoder.sequence(), decoder.sequence()], [first!, second!]);
  assertNear(one!, other!, BOUND); // two layers of 4 see 7 tokens, and the texts differ before the last 8
  await using all = await loadSmall();
  const [near, far] = await all.step([all.sequence(), all.sequence()], [first!, second!]);
  assert.throws(() => assertNear(near!, far!, BOUND));
});

onnxTest("ids that the model does not have are refused, and nothing has changed", async () => {
  await using decoder = await loadSmall();
  using sequence = await sequenceOf(decoder, "abc");
  const others = [decoder.sequence(), decoder.sequence()];
  for (const id of [VOCAB_SIZE, -1, 1.5, NaN, "1", 1n, undefined]) {
    const step = decoder.step([...others, sequence], [[1], [2], [3, id as number]]);
    await assert.rejects(step, (error: Error) => {
      assert.match(error.message, /tokens\[2\]\[1\]/);
      return true;
    });
    assert.deepEqual([...others, sequence].map(({ seqLen }) => seqLen), [0, 0, 4]);
  }
  assert.throws(() => decoder.sequence({ tokens: [VOCAB_SIZE] }), { code: "invalid_config" });
});

onnxTest("a step refuses what no step can be for", async () => {
  await using decoder = await loadSmall();
  await using other = await loadSmall();
  using sequence = await sequenceOf(decoder, "abc");
  const freed = decoder.sequence();
  freed.free();
  const { kvHeadCount, headDim } = ZIGLET_SHAPE;
  using contiguous = new ContiguousCache({ layerCount: LAYER_COUNT, kvHeadCount, headDim, maxSeqLen: 8 });
  const one: [Sequence[], number[][]][] = [
    [[sequence, sequence], [[1], [2]]],
    [[sequence, other.sequence()], [[1], [2]]],
    [[sequence, freed], [[1], [2]]],
    [[sequence, Sequence.attach(sequence.handle)], [[1], [2]]],
    [[sequence], [[]]],
    [[sequence], [[1], [2]]],
    [[], []],
  ];
  const codes = [
    "invalid_config",
    "invalid_config",
    "stale_handle",
    "unsupported",
    "invalid_size",
    "invalid_size",
    "invalid_size",
  ];
  for (const [i, [sequences, tokens]] of one.entries()) {
    await assert.rejects(decoder.step(sequences, tokens), { code: codes[i] }, `${i}`);
  }
  await assert.rejects(decoder.step([contiguous.sequence(0) as Sequence], [[1]]), /ContiguousCache/);
  await assert.rejects(decoder.step([{} as Sequence], [[1]]), TypeError);
  await assert.rejects(decoder.step([sequence], [[1]], { alllogits: true } as object), /did you mean allLogits/);
  await assert.rejects(
    decoder.step([sequence], [[1]], { allLogits: 1 } as object),
    /allLogits must be a boolean: number/,
  );
  await assert.rejects(
    decoder.step([sequence], [[1]], { signal: {} } as object),
    /signal must be an AbortSignal: object/,
  );

  const rows = new Float32Array(kvHeadCount * headDim);
  sequence.append(0, rows, rows);
  await assert.rejects(decoder.step([sequence], [[1]]), { code: "commit_mismatch" });
  sequence.truncate(sequence.seqLen);
  assert.equal((await decoder.step([sequence], [[1]])).length, 1);
});

onnxTest("steps that are asked for at once follow each other", async () => {
  const watch = watched();
  await using decoder = await loadSmall({ ort: watch.ort });
  await using calm = await loadSmall();
  const text = tokensOf("const a = 1;");
  using sequence = decoder.sequence(), other = decoder.sequence(), wanted = calm.sequence();
  let failed = false;
  watch.beforeRun = (run) => {
    if (run === 1 && !failed) {
      failed = true;
      throw new Error("once");
    }
  };
  const first = assert.rejects(decoder.step([sequence], [text]), { code: "model_failed" });
  const steps = await Promise.all([
    ...text.map((id) => decoder.step([sequence], [[id]])),
    decoder.step([other], [text]),
  ]);
  await first;
  for (const [i, id] of text.entries()) assert.deepEqual(steps[i], await calm.step([wanted], [[id]]));
  assert.deepEqual([sequence.seqLen, other.seqLen], [text.length, text.length]);
});

onnxTest("a step that waits may be aborted before it begins", async () => {
  const watch = watched();
  await using decoder = await loadSmall({ ort: watch.ort });
  using sequence = decoder.sequence(), other = decoder.sequence();
  const controller = new AbortController();
  const step = decoder.step([sequence], [[1, 2]]);
  const waiting = assert.rejects(decoder.step([other], [[1]], { signal: controller.signal }), {
    code: "aborted",
    cause: "no more",
  });
  controller.abort("no more");
  await Promise.all([step, waiting]);
  assert.deepEqual([sequence.seqLen, other.seqLen], [2, 0]);
});
