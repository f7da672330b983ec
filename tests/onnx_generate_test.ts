/** Writing with an `OnnxDecoder`: how far, from where, what ends it, and what is computed again. */
import assert from "node:assert/strict";
import { test } from "node:test";
import type { Sequence } from "../mod.ts";
import { type GenerateEnd, type GenerateOptions, OnnxDecoder } from "../src/onnx.ts";
import { loadSmall, ort, smallModel, tokensOf, VOCAB_SIZE, watched } from "./onnx_decoders.ts";
import { withoutOnnx } from "./onnx_runtime.ts";

function onnxTest(name: string, run: () => Promise<void>): void {
  test(`${name}${withoutOnnx}`, { skip: withoutOnnx !== "" }, run);
}

const PROMPT = tokensOf("pub fn main() ");

/** What is written behind a text, and why no more. */
async function written(
  decoder: OnnxDecoder,
  options: Partial<GenerateOptions>,
  sequence: Sequence = decoder.sequence(),
): Promise<{ tokens: number[]; end: GenerateEnd }> {
  const writing = decoder.generate(sequence, { tokens: PROMPT, maxTokens: 12, ...options });
  const tokens: number[] = [];
  while (true) {
    const { value, done } = await writing.next();
    if (done) return { tokens, end: value };
    tokens.push(value);
  }
}

onnxTest("generate() writes the likeliest token behind each other one", async () => {
  await using decoder = await loadSmall({ dtype: "f32" });
  using sequence = decoder.sequence();
  const { tokens, end } = await written(decoder, {}, sequence);
  assert.deepEqual([tokens.length, end], [12, "max_tokens"]);
  assert.equal(sequence.seqLen, PROMPT.length + 11); // the last one is not computed yet
  using other = decoder.sequence();
  const [logits] = await decoder.step([other], [[...PROMPT, ...tokens]], { allLogits: true });
  for (const [i, token] of tokens.entries()) {
    const row = logits!.subarray((PROMPT.length - 1 + i) * VOCAB_SIZE, (PROMPT.length + i) * VOCAB_SIZE);
    assert.equal(token, row.indexOf(Math.max(...row)));
  }
});

onnxTest("generate() begins where the sequence ends, and goes on behind what it wrote", async () => {
  const watch = watched();
  await using decoder = await loadSmall({ dtype: "f32", ort: watch.ort, prefix: {} });
  const whole = await written(decoder, {});
  using sequence = decoder.sequence();
  const first = await written(decoder, { maxTokens: 5 }, sequence);
  const rest = await written(decoder, { tokens: [...PROMPT, ...first.tokens], maxTokens: 7 }, sequence);
  assert.deepEqual([...first.tokens, ...rest.tokens], whole.tokens);

  // A prompt that is known, up to its last token.
  using again = decoder.sequence({ tokens: PROMPT });
  assert.equal(again.seqLen, PROMPT.length - 1);
  assert.deepEqual((await written(decoder, {}, again)).tokens, whole.tokens);
  // A conversation that goes on starts with all that was written but the last token.
  const conversation = [...PROMPT, ...whole.tokens, 65];
  assert.equal(decoder.sequence({ tokens: conversation }).seqLen, conversation.length - 2);
  assert.equal(decoder.sequence({ tokens: conversation, salt: "another tenant" }).seqLen, 0);
  assert.equal(decoder.cache.explain(Uint32Array.from(conversation)).startsAt, conversation.length - 2);
});

onnxTest("blocks that other processes hear of are named by the model, too", async () => {
  const models = [smallModel(), smallModel(), smallModel({ ropeTheta: 5000 })];
  const names = await Promise.all(models.map(async (model) => {
    const prefix = { events: true };
    await using decoder = await OnnxDecoder.load(model, { ort, maxSeqLen: 64, blockSize: 8, prefix });
    await written(decoder, { maxTokens: 1 });
    const { fingerprint } = decoder;
    assert.equal(decoder.cache.explain(Uint32Array.from(PROMPT), { fingerprint }).startsAt, PROMPT.length - 1);
    return decoder.cache.events().flatMap((event) => event.kind === "stored" ? event.block : []);
  }));
  assert.equal(names[0]!.length, 1);
  assert.deepEqual(names[1], names[0]);
  assert.notDeepEqual(names[2], names[0]);
});

onnxTest("generate() ends at a token, at a text, at maxTokens and where the sequence is full", async () => {
  await using decoder = await loadSmall({ dtype: "f32" });
  const drawn = { temperature: 2, seed: 1 }; // of many different tokens
  const { tokens } = await written(decoder, drawn);
  const at = tokens.findIndex((token, i) => i > 2 && !tokens.slice(0, i).includes(token));
  assert.ok(at > 0, `tokens are ${tokens}`);
  const before = tokens.slice(0, at);
  assert.deepEqual(await written(decoder, { ...drawn, stop: [tokens[at]!] }), { tokens: before, end: "stop" });
  await using ending = await loadSmall({ dtype: "f32", endTokens: [tokens[at]!] });
  assert.deepEqual(await written(ending, drawn), { tokens: before, end: "stop" });

  const decode = (ids: number[]) => String.fromCharCode(...ids);
  const stop = decode(tokens.slice(at - 2, at + 1));
  const until = decode(tokens).indexOf(stop) + stop.length;
  assert.deepEqual(await written(decoder, { ...drawn, stop: ["nowhere", stop], decode }), {
    tokens: tokens.slice(0, until),
    end: "stop",
  });
  await using short = await loadSmall({ dtype: "f32", maxSeqLen: PROMPT.length + 3 });
  assert.deepEqual(await written(short, drawn), { tokens: tokens.slice(0, 4), end: "max_seq_len" });
  const rest: Partial<GenerateOptions> = { maxTokens: undefined as never };
  assert.equal((await written(short, rest)).tokens.length, 4);
});

onnxTest("generate() that somebody leaves can be gone on with", async () => {
  await using decoder = await loadSmall({ dtype: "f32" });
  const { tokens } = await written(decoder, {});
  using sequence = decoder.sequence();
  const text = [...PROMPT];
  for await (const token of decoder.generate(sequence, { tokens: PROMPT })) {
    text.push(token);
    if (text.length === PROMPT.length + 4) break;
  }
  assert.deepEqual((await written(decoder, { tokens: text, maxTokens: 8 }, sequence)).tokens, tokens.slice(4));
});

onnxTest("the same seed writes the same, another one something else, and sampling can be replaced", async () => {
  await using decoder = await loadSmall({ dtype: "f32" });
  const draw = async (seed: number) => (await written(decoder, { temperature: 1.5, topP: 0.95, seed })).tokens;
  assert.deepEqual(await draw(1), await draw(1));
  assert.notDeepEqual(await draw(1), await draw(2));
  const seen: number[] = [];
  const sample = (logits: Float32Array) => {
    seen.push(logits.length);
    logits.fill(0); // they are the caller's own
    return 66;
  };
  assert.deepEqual((await written(decoder, { sample, maxTokens: 3 })).tokens, [66, 66, 66]);
  assert.deepEqual(seen, [VOCAB_SIZE, VOCAB_SIZE, VOCAB_SIZE]);
  await assert.rejects(written(decoder, { sample: () => VOCAB_SIZE }), /sample must give an id below 256: it gave 256/);
});

onnxTest("generate() ends with its signal, and the sequence has what was computed", async () => {
  const watch = watched();
  await using decoder = await loadSmall({ ort: watch.ort });
  using sequence = decoder.sequence();
  const controller = new AbortController();
  const text = [...PROMPT];
  const writing = (async () => {
    for await (const token of decoder.generate(sequence, { tokens: PROMPT, signal: controller.signal })) {
      text.push(token);
      if (text.length === PROMPT.length + 2) watch.beforeRun = () => controller.abort("enough");
    }
  })();
  await assert.rejects(writing, { code: "aborted", cause: "enough" });
  assert.deepEqual([sequence.seqLen, text.length], [PROMPT.length + 1, PROMPT.length + 2]);
});

onnxTest("several sequences can be written at the same time", async () => {
  await using decoder = await loadSmall({ dtype: "f32" });
  const prompts = ["const a", "fn b", "// c"].map(tokensOf);
  const together = await Promise.all(prompts.map((tokens) => written(decoder, { tokens })));
  for (const [i, tokens] of prompts.entries()) assert.deepEqual(together[i], await written(decoder, { tokens }));
});

onnxTest("generate() refuses tokens that are not the whole text, and options that make no sense", async () => {
  await using decoder = await loadSmall({ dtype: "f32" });
  using sequence = decoder.sequence();
  await written(decoder, { maxTokens: 3 }, sequence);
  const refused = async (options: object, text: RegExp, of: Sequence = decoder.sequence()) =>
    await assert.rejects(async () => await written(decoder, options, of), text);
  await refused({ tokens: PROMPT }, /tokens must be the whole text, .* it has 15, the sequence 17/, sequence);
  const other = PROMPT.with(3, 99);
  const differs = /tokens must begin with what the sequence has: token 3 is 99, that of the sequence is 98/;
  await refused({ tokens: [...other, 1, 2, 3, 4] }, differs, sequence);
  await refused({ tokens: [] }, /it has 0, the sequence 0/);
  await refused({ tokens: [VOCAB_SIZE] }, /tokens\[0\] is 256/);
  await refused({ maxTokens: 0 }, /maxTokens must be at least 1/);
  await refused({ stop: ["x"] }, /a text in stop needs decode: it has "x"/);
  await refused({ stop: [""], decode: () => "" }, /a text in stop must not be empty/);
  await refused({ decode: () => "" }, /decode needs a text in stop/);
  await refused({ stop: [-1] }, /stop\[0\]/);
  await refused({ sample: () => 0, topP: 0.5 }, /sample and topP exclude each other/);
  await refused({ signal: true }, /signal must be an AbortSignal: boolean/);
  await refused({ temprature: 1 }, /did you mean temperature\?/);
});
