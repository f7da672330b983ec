/** One text behind the prompt, written as it is drawn, and on demand once more from what the cache knows of the prompt. */
import { type CacheCost, cacheFacts, type HeldCache, newCache, newPagedCache } from "./caches.ts";
import { type Drawing, drawText } from "./drawing.ts";
import type { Options } from "./options.ts";
import { drawBlocks } from "./picture.ts";
import type { Measured } from "./report.ts";
import type { Terminal } from "./terminal.ts";
import { newDecoder, TextWriter } from "./text_writer.ts";
import { countText, type Facts, formatSeconds } from "./wording.ts";
import type { Ziglet } from "./ziglet.ts";

/** All that the ways to write need. */
export interface Run {
  ziglet: Ziglet;
  options: Options;
  terminal: Terminal;
  /** The start byte and the prompt. */
  promptTokens: Uint8Array;
}

/** One text, each byte written as it is drawn. */
export async function writeOne({ ziglet, options, terminal, promptTokens }: Run): Promise<Measured> {
  using held = newCache(options, ziglet.config, ziglet.config.maxSeqLen);
  // A byte is a token, a character may be several: the decoder waits for the rest.
  const decoder = newDecoder();

  const start = performance.now();
  terminal.text(options.prompt);
  const drawing = await drawText(ziglet, held.cache, promptTokens, options, (drawing) => {
    terminal.text(decoder.decode(Uint8Array.of(drawing.bytes.at(-1)!), { stream: true }));
    return terminal.status(() => statusOf(ziglet, options, held, [drawing]));
  });

  // The end: half a character, the blocks if they are asked for, the status.
  terminal.text(decoder.decode());
  const totalSeconds = (performance.now() - start) / 1000;
  const cost = held.cost();
  if (options.showBlocks) showBlocks(terminal, cost, "text");
  finish(terminal, statusOf(ziglet, options, held, [drawing]));
  const { bytes, tokensPerSecond } = drawing;
  return {
    tokens: bytes.length,
    tokensPerSecond,
    bitsPerByte: null,
    attendSeconds: ziglet.attendSeconds,
    totalSeconds,
    cost,
  };
}

/**
 * The same text twice in one cache: the second sequence starts with the rows of the prompt that the first one left, but
 * for its last token, whose logits nobody keeps.
 */
export async function writeTwice({ ziglet, options, terminal, promptTokens }: Run): Promise<Measured> {
  using held = newPagedCache(options, ziglet.config, ziglet.config.maxSeqLen, { keepsPrefixes: true });
  const writer = new TextWriter(terminal, options.prompt);
  const drawings: Drawing[] = [];
  const drawingOptions = { ...options, tellsTokens: true };

  const start = performance.now();
  for (const title of ["run 1", "run 2"]) {
    held.startWith(promptTokens);
    const drawing = await drawText(ziglet, held.cache, promptTokens, drawingOptions, (drawing) => {
      writer.grow(title, drawing.bytes);
      return terminal.status(() => statusOf(ziglet, options, held, [...drawings, drawing]));
    });
    writer.grow(title, drawing.bytes); // of a text without a byte, too
    writer.end();
    drawings.push(drawing);
  }
  const totalSeconds = (performance.now() - start) / 1000;
  const [first, second] = drawings as [Drawing, Drawing];
  // No error of whoever called: rows in floats give the same bits, whoever computed them.
  if (`${first.bytes}` !== `${second.bytes}`) throw new Error("the second run wrote another text than the first");

  terminal.text(repeatText(first, second, promptTokens.length));
  const cost = held.cost();
  finish(terminal, statusOf(ziglet, options, held, drawings));
  return {
    tokens: first.bytes.length + second.bytes.length,
    tokensPerSecond: second.tokensPerSecond,
    bitsPerByte: null,
    attendSeconds: ziglet.attendSeconds,
    totalSeconds,
    cost,
    runs: drawings.map(({ startsAt, computedTokens, promptSeconds, decodeSeconds }) => ({
      startsAt,
      computedTokens,
      promptSeconds,
      decodeSeconds,
    })),
  };
}

/** What the second run did not have to compute, and the time of both. */
function repeatText(first: Drawing, second: Drawing, promptTokens: number): string {
  const line = (run: number, { startsAt, computedTokens, promptSeconds, decodeSeconds }: Drawing) =>
    `run ${run}: starts at ${startsAt} of ${promptTokens}, ` +
    `${countText(computedTokens, "token")} of the prompt computed in ${formatSeconds(promptSeconds)}, ${
      formatSeconds(promptSeconds + decodeSeconds)
    } in all\n`;
  const saved = countText(second.startsAt - first.startsAt, "token");
  return `--- the same text, ${saved} of the prompt not computed again ---\n${line(1, first)}${line(2, second)}`;
}

/** What the status line says of the last of these texts, and of the cache. */
function statusOf(ziglet: Ziglet, options: Options, held: HeldCache, drawings: readonly Drawing[]): Facts {
  const { maxSeqLen } = ziglet.config;
  const { tokensPerSecond, end } = drawings.at(-1)!;
  const tokens = drawings.reduce((sum, { bytes }) => sum + bytes.length, 0);
  const [cacheFact, ...more] = cacheFacts(options, held.cost());
  const positions = `${held.cache.seqLen} of ${maxSeqLen} positions`;
  const ending = {
    model: ["stopped: the model ended the text"],
    context: [`stopped: ${fullText(maxSeqLen)}`],
    complete: [],
  };
  return {
    counts: [countText(tokens, "token")],
    details: [...rateFacts(tokensPerSecond), cacheFact!, positions, ...more],
    ending: end === null ? [] : ending[end],
  };
}

/** Writes the last status, always where a text is shorter than it was to be. */
function finish(terminal: Terminal, status: Facts): void {
  terminal.finish(status, { always: status.ending!.length > 0 });
}

/** Draws the blocks of a cache that has some. */
export function showBlocks(terminal: Terminal, { survey, contiguousBytes }: CacheCost, rowName: string): void {
  if (survey === null || contiguousBytes === null) return;
  const { columns, colors } = terminal;
  terminal.line(`\n${drawBlocks(survey, { rowName, columns, colors, contiguousBytes })}`);
}

/** Why no more of a text fits. */
export function fullText(maxSeqLen: number): string {
  return `the context of ${maxSeqLen} positions is full`;
}

/** How fast it goes, once that is known. */
export function rateFacts(tokensPerSecond: number | null): string[] {
  return tokensPerSecond === null ? [] : [`${tokensPerSecond.toFixed(0)} tokens/s`];
}
