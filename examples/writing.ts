/** Writing text behind a prompt: one text as it comes, or several at once. */
import { type Beam, searchBeams } from "./beams.ts";
import { type CacheCost, cacheFacts, newCache, newPagedCache } from "./caches.ts";
import { type Options, UsageError } from "./options.ts";
import { drawBlocks } from "./picture.ts";
import type { Measured } from "./report.ts";
import { type Sample, writeSamples } from "./samples.ts";
import { Random, sample } from "./sampling.ts";
import type { Terminal } from "./terminal.ts";
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
  return options.samples === 1 ? await writeOne(run) : await writeSeveral(run);
}

/** All that the ways to write need. */
interface Run {
  ziglet: Ziglet;
  options: Options;
  terminal: Terminal;
  /** The start byte and the prompt. */
  promptTokens: Uint8Array;
}

/** One text, each byte written as it is drawn. */
async function writeOne({ ziglet, options, terminal, promptTokens }: Run): Promise<Measured> {
  const { maxSeqLen, bosToken } = ziglet.config;
  using held = newCache(options, ziglet.config, maxSeqLen);
  const { cache } = held;
  const random = new Random(options.seed);
  // A byte is a token, a character may be several: the decoder waits for the rest.
  const decoder = newDecoder();

  const status = (ending: string[] = []): Facts => {
    const [cacheFact, ...more] = cacheFacts(options, held.cost());
    const positions = `${cache.seqLen} of ${maxSeqLen} positions`;
    const details = [...rateFacts(tokensPerSecond), cacheFact!, positions, ...more];
    return { counts: [countText(tokens, "token")], details, ending };
  };
  let tokens = 0;
  let tokensPerSecond: number | null = null;

  // 1. The prompt fills the cache, the start byte before it.
  const start = performance.now();
  terminal.text(options.prompt);
  let logits = ziglet.prefill(promptTokens, cache); // [vocab]

  // 2. Each byte is drawn, written, and run through the model to get the logits of the one behind it.
  const decodeStart = performance.now();
  let stopped: string[] = []; // before the tokens that were asked for
  while (true) {
    const token = sample(logits, options.temperature, random);
    if (token === bosToken) {
      stopped = ["stopped: the model ended the text"];
      break;
    }
    terminal.text(decoder.decode(Uint8Array.of(token), { stream: true }));
    tokens++;
    if (tokens === options.tokens) break;
    if (cache.seqLen === maxSeqLen) {
      stopped = [`stopped: ${fullText(maxSeqLen)}`];
      break;
    }
    logits = ziglet.forward(Uint8Array.of(token), cache);
    tokensPerSecond = tokens / (performance.now() - decodeStart) * 1000;
    await terminal.status(status);
  }

  // 3. The end: half a character, the blocks if they are asked for, the status.
  terminal.text(decoder.decode());
  const totalSeconds = (performance.now() - start) / 1000;
  const cost = held.cost();
  if (options.showBlocks) showBlocks(terminal, cost, "text");
  terminal.finish(status(stopped), { always: stopped.length > 0 });
  return { tokens, tokensPerSecond, bitsPerByte: null, attendSeconds: ziglet.attendSeconds, totalSeconds, cost };
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

/** Writes one of several texts at a time, under a line that says which, as far as it is known. */
class TextWriter {
  readonly #terminal: Terminal;
  readonly #prompt: string;
  /** Of the present text; null between two. A byte is a token, a character may be several: it waits for the rest. */
  #decoder: TextDecoder | null = null;
  #written = 0;

  constructor(terminal: Terminal, prompt: string) {
    this.#terminal = terminal;
    this.#prompt = prompt;
  }

  /** Writes what is new of a text: all bytes that are known of it are given. */
  grow(title: string, bytes: number[]): void {
    if (this.#decoder === null) {
      this.#decoder = newDecoder();
      this.#terminal.endLine();
      this.#terminal.text(`--- ${title} ---\n${this.#prompt}`);
    }
    this.#terminal.text(this.#decoder.decode(Uint8Array.from(bytes.slice(this.#written)), { stream: true }));
    this.#written = bytes.length;
  }

  /** Ends the present text. */
  end(): void {
    if (this.#decoder !== null) this.#terminal.text(this.#decoder.decode());
    this.#terminal.endLine();
    this.#decoder = null;
    this.#written = 0;
  }
}

/** The bytes that all texts begin with. */
function commonStart(beams: readonly Beam[]): number[] {
  const [first, ...others] = beams.map(({ bytes }) => bytes);
  const length = first!.findIndex((byte, i) => others.some((bytes) => bytes[i] !== byte));
  return length < 0 ? first! : first!.slice(0, length);
}

function showBlocks(terminal: Terminal, { survey, contiguousBytes }: CacheCost, rowName: string): void {
  if (survey === null || contiguousBytes === null) return;
  const { columns, colors } = terminal;
  terminal.line(`\n${drawBlocks(survey, { rowName, columns, colors, contiguousBytes })}`);
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

function fullText(maxSeqLen: number): string {
  return `the context of ${maxSeqLen} positions is full`;
}

function rateFacts(tokensPerSecond: number | null): string[] {
  return tokensPerSecond === null ? [] : [`${tokensPerSecond.toFixed(0)} tokens/s`];
}

function textOf(bytes: number[]): string {
  return newDecoder().decode(Uint8Array.from(bytes));
}

/** No byte order mark is dropped. */
function newDecoder(): TextDecoder {
  return new TextDecoder("utf-8", { ignoreBOM: true });
}
