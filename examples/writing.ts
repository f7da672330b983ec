/** Writing text behind a prompt: one text as it comes, or several at once. */
import { UsageError } from "./arguments.ts";
import { type Beam, searchBeams } from "./beams.ts";
import { cacheFacts, newPagedCache } from "./caches.ts";
import type { Options } from "./options.ts";
import { fullText, rateFacts, type Run, showBlocks, writeOne, writeTwice } from "./one_text.ts";
import type { Measured } from "./report.ts";
import { type Sample, writeSamples } from "./samples.ts";
import type { Terminal } from "./terminal.ts";
import { textOf, TextWriter } from "./text_writer.ts";
import { countText, type Facts } from "./wording.ts";
import type { Ziglet } from "./ziglet.ts";

/** Writes one text, or several, behind the prompt. */
export async function generate(ziglet: Ziglet, options: Options, terminal: Terminal): Promise<Measured> {
  const { maxSeqLen, bosToken } = ziglet.config;
  const prompt = new TextEncoder().encode(options.prompt);
  if (prompt.length + 1 > maxSeqLen) {
    throw new UsageError(
      `the prompt has ${countText(prompt.length, "byte")}, ` +
        `the model's context of ${maxSeqLen} has room for ${maxSeqLen - 1}`,
    );
  }
  const run = { ziglet, options, terminal, promptTokens: Uint8Array.of(bosToken, ...prompt) };
  if (options.beams !== null) return await writeBeams(run, options.beams);
  if (options.repeat) return await writeTwice(run);
  return options.samples === 1 ? await writeOne(run) : await writeSeveral(run);
}

/** Several texts behind the same prompt, written one after the other: each as it comes, once it is its turn. */
async function writeSeveral({ ziglet, options, terminal, promptTokens }: Run): Promise<Measured> {
  const { maxSeqLen } = ziglet.config;
  using held = newPagedCache(options, ziglet.config, maxSeqLen);
  const status = (ending: string[] = []): Facts => ({
    counts: [countText(options.samples, "sample"), countText(tokens, "token")],
    details: [...rateFacts(tokensPerSecond), ...cacheFacts(options, held.cost())],
    ending,
  });
  let tokens = 0;
  let tokensPerSecond: number | null = null;

  // 1. The prompt goes through the model once, and every text starts with its blocks.
  const start = performance.now();
  const logits = ziglet.prefill(promptTokens, held.cache); // [vocab]
  held.fork(options.samples);

  // 2. All texts together, a byte of each in a step.
  const decodeStart = performance.now();
  const writer = new TextWriter(terminal, options.prompt);
  let turn = 0; // of the text that is being written
  const write = (samples: readonly Sample[]) => {
    for (; turn < samples.length; turn++) {
      const { number, bytes, finished } = samples[turn]!;
      writer.grow(`sample ${number}`, bytes);
      if (!finished) return;
      writer.end();
    }
  };
  const samples = await writeSamples(ziglet, held.paged, held.sequences, logits, options, (samples) => {
    write(samples);
    tokens = samples.reduce((sum, { bytes }) => sum + bytes.length, 0);
    tokensPerSecond = tokens / (performance.now() - decodeStart) * 1000;
    return terminal.status(status);
  });

  // 3. The end: the blocks, the status.
  const totalSeconds = (performance.now() - start) / 1000;
  const cost = held.cost();
  if (options.showBlocks || terminal.live) showBlocks(terminal, cost, "sample");
  const stopped = stoppedFacts(samples, options.tokens, maxSeqLen);
  terminal.finish(status(stopped), { always: stopped.length > 0 });
  return { tokens, tokensPerSecond, bitsPerByte: null, attendSeconds: ziglet.attendSeconds, totalSeconds, cost };
}

/** The likeliest texts behind the prompt, best first; what all of them begin with is written as soon as it is known. */
async function writeBeams({ ziglet, options, terminal, promptTokens }: Run, width: number): Promise<Measured> {
  const { maxSeqLen } = ziglet.config;
  using held = newPagedCache(options, ziglet.config, maxSeqLen);
  const status = (ending: string[] = []): Facts => ({
    counts: [countText(width, "beam"), countText(tokens, "token")],
    details: [...rateFacts(tokensPerSecond), ...cacheFacts(options, held.cost())],
    ending,
  });
  let tokens = 0;
  let tokensPerSecond: number | null = null;

  // 1. The prompt goes through the model once, and every beam starts with its blocks.
  const start = performance.now();
  const logits = ziglet.prefill(promptTokens, held.cache); // [vocab]
  held.fork(width);

  // 2. The search. Which text is the best may change with the last byte, but not what all of them have in common.
  const writer = new TextWriter(terminal, options.prompt);
  const searchStart = performance.now();
  const beams = await searchBeams(ziglet, held.paged, held.sequences, logits, options.tokens, (beams) => {
    writer.grow("beam 1", commonStart(beams));
    tokens = Math.max(...beams.map(({ bytes }) => bytes.length));
    tokensPerSecond = tokens / (performance.now() - searchStart) * 1000;
    return terminal.status(status);
  });

  // 3. The end: the texts, the blocks, the status.
  const totalSeconds = (performance.now() - start) / 1000;
  const cost = held.cost();
  const best = beams[0]!;
  tokens = best.bytes.length;
  for (const [i, { bytes, score }] of beams.entries()) {
    if (i > 0 && !options.allBeams && !terminal.live) break;
    writer.grow(`beam ${i + 1}`, bytes);
    writer.end();
    terminal.text(`--- log-probability ${score.toFixed(4)} ---\n`);
  }
  if (options.showBlocks || terminal.live) showBlocks(terminal, cost, "sequence");
  const stopped = stoppedFacts([best], options.tokens, maxSeqLen);
  terminal.finish(status(stopped), { always: stopped.length > 0 });
  return {
    tokens,
    tokensPerSecond,
    bitsPerByte: null,
    attendSeconds: ziglet.attendSeconds,
    totalSeconds,
    cost,
    beams: beams.map(({ score, bytes }) => ({ score, text: textOf(bytes) })),
  };
}

/** The bytes that all texts begin with. */
function commonStart(beams: readonly Beam[]): number[] {
  const [first, ...others] = beams.map(({ bytes }) => bytes);
  const length = first!.findIndex((byte, i) => others.some((bytes) => bytes[i] !== byte));
  return length < 0 ? first! : first!.slice(0, length);
}

/** Why texts are shorter than they were to be, if any is. */
function stoppedFacts(texts: { bytes: number[]; ended: boolean }[], tokens: number, maxSeqLen: number): string[] {
  const ended = texts.filter(({ ended }) => ended).length;
  const isFull = texts.some((text) => !text.ended && text.bytes.length < tokens);
  const reasons = [
    ...(ended === 0 ? [] : [`the model ended ${texts.length === 1 ? "the text" : `${ended} of the texts`}`]),
    ...(isFull ? [fullText(maxSeqLen)] : []),
  ];
  return reasons.length === 0 ? [] : [`stopped: ${reasons.join(", ")}`];
}
