/** One text by a model in an ONNX file, written as it is drawn. */
import { UsageError } from "./arguments.ts";
import { kvName, tierOptions } from "./caches.ts";
import { fullText, rateFacts } from "./one_text.ts";
import { openOnnxModel } from "./onnx_model.ts";
import type { Options } from "./options.ts";
import type { Measured } from "./report.ts";
import type { Terminal } from "./terminal.ts";
import { countText, type Facts, formatBytes } from "./wording.ts";

/** What a part of a letter is decoded to, until the rest of it is there. */
const INCOMPLETE = "\ufffd";

/** Writes one text behind the prompt. */
export async function writeOnnx(folder: string, options: Options, terminal: Terminal): Promise<Measured> {
  const { blockSize, plain, tokens: maxTokens, temperature, seed } = options;
  await using model = await openOnnxModel(folder, { ...tierOptions(options), blockSize, plain });
  const { decoder } = model;
  const { maxSeqLen } = decoder.cache;
  const prompt = model.encode(options.prompt);
  if (prompt.length === 0) throw new UsageError("the prompt has no token for this model");
  if (prompt.length > maxSeqLen) {
    throw new UsageError(
      `the prompt has ${countText(prompt.length, "token")}, the model's context of ${maxSeqLen} has room for no more`,
    );
  }

  const start = performance.now();
  let decodeStart = start;
  using sequence = decoder.sequence({ tokens: prompt });
  const written: number[] = [];
  let shown = 0; // letters of the text
  const status = (ending: string[] = []): Facts => ({
    counts: [countText(written.length, "token")],
    details: [
      ...rateFacts(rate()),
      `paged cache ${formatBytes(decoder.cache.stats().usedBytes)} ${kvName(options.kv)}`,
      `${sequence.seqLen} of ${maxSeqLen} positions`,
    ],
    ending,
  });
  const rate = () => written.length < 2 ? null : (written.length - 1) / (performance.now() - decodeStart) * 1000;
  const show = (text: string) => {
    terminal.text(text.slice(shown));
    shown = text.length;
  };

  if (plain) terminal.text(options.prompt);
  const writing = decoder.generate(sequence, { tokens: prompt, maxTokens, temperature, seed });
  let result = await writing.next();
  for (; !result.done; result = await writing.next()) {
    if (written.length === 0) decodeStart = performance.now();
    written.push(result.value);
    const text = model.decode(written);
    if (!text.endsWith(INCOMPLETE)) show(text);
    await terminal.status(() => status());
  }
  show(model.decode(written));
  const totalSeconds = (performance.now() - start) / 1000;
  const ending = {
    stop: ["stopped: the model ended the text"],
    max_seq_len: [`stopped: ${fullText(maxSeqLen)}`],
    max_tokens: [],
  }[result.value];
  terminal.finish(status(ending), { always: ending.length > 0 });
  const { reservedBytes, metadataBytes } = decoder.cache.stats();
  return {
    tokens: written.length,
    tokensPerSecond: rate(),
    bitsPerByte: null,
    attendSeconds: null,
    totalSeconds,
    cost: { cacheBytes: reservedBytes + metadataBytes, survey: null, contiguousBytes: null },
  };
}
