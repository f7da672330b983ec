/**
 * onnxruntime-node as its users load it, with Float16Array in sight: the other tests hide it, for then f16 tensors work in
 * Deno and Bun. A cut model needs none, whatever its graph is.
 */
import assert from "node:assert/strict";
import { test } from "node:test";
import { runCode } from "./child.ts";
import { ONNX_PATH, withoutOnnx } from "./onnx_runtime.ts";

const url = (path: string) => JSON.stringify(new URL(path, import.meta.url).href);

test(`an f16 graph runs on onnxruntime as users load it${withoutOnnx}`, {
  skip: withoutOnnx !== "",
  timeout: 120_000,
}, () => {
  const { code, stdout, stderr } = runCode(`
    import { createRequire } from "node:module";
    import { OnnxDecoder } from ${url("../src/onnx.ts")};
    import { makeDecoder } from ${url("./onnx/decoder.ts")};
    import { GOLDEN, tokensOf, ZIGLET_SHAPE, ZIGLET_WEIGHTS } from ${url("./onnx/ziglet.ts")};
    const ort = createRequire(${url("./onnx_runtime.ts")})(${JSON.stringify(ONNX_PATH)});
    const { model } = makeDecoder(ZIGLET_SHAPE, ZIGLET_WEIGHTS, { attention: "gqa", float: "float16" });
    const decoder = await OnnxDecoder.load(model, { ort, maxSeqLen: 256 });
    const sequence = decoder.sequence();
    const { prompt } = GOLDEN.cases[0];
    let text = "";
    for await (const token of decoder.generate(sequence, { tokens: tokensOf(prompt), maxTokens: 24, temperature: 0 })) {
      text += String.fromCharCode(token);
    }
    console.log(JSON.stringify([typeof Float16Array, text === GOLDEN.cases[0].greedy.slice(0, 24)]));
    await decoder.free();
  `);
  assert.equal(code, 0, stderr);
  assert.deepEqual(JSON.parse(stdout), ["function", true]);
});
