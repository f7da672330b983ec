/**
 * Conversations that begin with the same text: in each turn a user asks for a function and the model writes it.
 *
 * A turn gets all of its conversation so far as its prompt, as a server does. Hot, the cache still has most of it: the
 * system prompt from whoever came first, the turns before from the conversation itself. Cold, all of it is computed.
 */
import { type HeldPagedCache, newPagedCache } from "./caches.ts";
import { type Drawing, drawText } from "./drawing.ts";
import type { FloatDType } from "../mod.ts";
import type { Ziglet } from "./ziglet.ts";

/** What the conversations are. */
export interface ChatOptions {
  conversations: number;
  turns: number;
  /** The most bytes of an answer. */
  tokens: number;
  temperature: number;
  /** Of the first conversation; each one after it has the next. */
  seed: number;
  /** What every conversation begins with. */
  system: string;
  /** Positions a block holds. */
  blockSize: number;
  kv: FloatDType;
}

/** A turn of a conversation, answered. */
export interface Turn {
  /** The first one is 0, here and below. */
  conversation: number;
  turn: number;
  promptTokens: number;
  drawing: Drawing;
  /** The conversation with the answer, its start byte first. */
  text: Uint8Array;
}

/** What users ask for: the start of a function, which the model goes on with. */
const REQUESTS: readonly string[] = [
  "/// Returns the larger of two numbers.\npub fn max(",
  "/// Returns whether a slice has no elements.\npub fn isEmpty(",
  "/// Copies bytes from one slice to another.\npub fn copy(",
  "/// Counts how often a byte occurs.\npub fn count(",
  "/// Returns the index of the first match.\npub fn indexOf(",
  "/// Reverses a slice in place.\npub fn reverse(",
  "/// Returns the sum of all elements.\npub fn sum(",
  "/// Compares two slices byte by byte.\npub fn eql(",
  "/// Fills a slice with one byte.\npub fn fill(",
  "/// Rounds up to a multiple of an alignment.\npub fn alignForward(",
  "/// Returns the number of digits.\npub fn digits(",
  "/// Drops what stands at the end.\npub fn trim(",
];
const TURN_STEP = 5; // no factor of REQUESTS: the turns of a conversation ask for different functions

/** What ends a function in Zig as `zig fmt` writes it. */
const FUNCTION_END = "\n}\n";

/** What a user asks for in a turn. */
export function requestOf(conversation: number, turn: number): string {
  return `\n${REQUESTS[(conversation + TURN_STEP * turn) % REQUESTS.length]!}`;
}

/** The most tokens a conversation can come to, its start byte included. */
export function mostTokens({ turns, tokens, system }: ChatOptions): number {
  const bytes = (text: string) => new TextEncoder().encode(text).length;
  const longest = Math.max(...REQUESTS.map((_, i) => bytes(requestOf(i, 0))));
  return 1 + bytes(system) + turns * (longest + tokens);
}

/** All conversations in one cache, turn by turn; gives them in the order of the turns. */
export async function chat(
  ziglet: Ziglet,
  held: HeldPagedCache,
  options: ChatOptions,
  progress: (turn: Turn) => Promise<void> = () => Promise.resolve(),
): Promise<{ turns: Turn[]; texts: Uint8Array[] }> {
  const texts = Array.from({ length: options.conversations }, () => firstTokens(ziglet, options));
  const turns: Turn[] = [];
  for (let turn = 0; turn < options.turns; turn++) {
    for (const [conversation, text] of texts.entries()) {
      const answered = await answer(ziglet, held, text, { conversation, turn }, options);
      texts[conversation] = answered.text;
      turns.push(answered);
      await progress(answered);
    }
  }
  return { turns, texts };
}

/** One conversation alone, each turn in a cache of its own: what is computed where nothing is found. */
export async function chatCold(
  ziglet: Ziglet,
  conversation: number,
  options: ChatOptions,
): Promise<{ turns: Turn[]; text: Uint8Array }> {
  let text = firstTokens(ziglet, options);
  const turns: Turn[] = [];
  for (let turn = 0; turn < options.turns; turn++) {
    using held = newChatCache(ziglet, options);
    turns.push(await answer(ziglet, held, text, { conversation, turn }, options));
    text = turns.at(-1)!.text;
  }
  return { turns, text };
}

/** A cache for the conversations, which keeps the blocks of earlier turns. */
export function newChatCache(ziglet: Ziglet, { kv, blockSize }: ChatOptions): HeldPagedCache {
  const options = { kv: { k: kv, v: kv }, blockSize, tail: 0, sinks: 0 };
  return newPagedCache(options, ziglet.config, ziglet.config.maxSeqLen, { keepsPrefixes: true });
}

/** Lets the model answer: the sequence starts with what the cache has of the conversation, and ends with the answer. */
async function answer(
  ziglet: Ziglet,
  held: HeldPagedCache,
  soFar: Uint8Array,
  { conversation, turn }: { conversation: number; turn: number },
  { tokens, temperature, seed }: ChatOptions,
): Promise<Turn> {
  const prompt = joined(soFar, new TextEncoder().encode(requestOf(conversation, turn)));
  held.startWith(prompt);
  const isComplete = (bytes: readonly number[]) => {
    return String.fromCharCode(...bytes.slice(-FUNCTION_END.length)) === FUNCTION_END;
  };
  const options = { tokens, temperature, seed: seed + conversation, isComplete, tellsTokens: true };
  const drawing = await drawText(ziglet, held.cache, prompt, options);
  return { conversation, turn, promptTokens: prompt.length, drawing, text: joined(prompt, drawing.bytes) };
}

function firstTokens(ziglet: Ziglet, { system }: ChatOptions): Uint8Array {
  return joined([ziglet.config.bosToken], new TextEncoder().encode(system));
}

function joined(first: ArrayLike<number>, second: ArrayLike<number>): Uint8Array {
  const all = new Uint8Array(first.length + second.length);
  all.set(first);
  all.set(second, first.length);
  return all;
}
