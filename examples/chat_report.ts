/** What a pool of conversations took, and what it would have taken had nothing been found. */
import type { PagedCache } from "../mod.ts";
import type { ChatOptions, Turn } from "./chat.ts";
import { countText, formatBytes, formatSeconds } from "./wording.ts";

/** What the conversations came to. */
export interface ChatRun {
  /** All turns of all conversations. */
  turns: readonly Turn[];
  /** The conversations at their end. */
  texts: readonly Uint8Array[];
  paged: PagedCache;
  /** The last conversation, computed alone. */
  cold: { turns: readonly Turn[]; text: Uint8Array };
}

/** The figures: what --json prints. */
export interface ChatReport {
  conversations: number;
  turns: number;
  /** Prompts of which something was found, of all. */
  hits: number;
  lookups: number;
  /** Tokens of prompts, those that were found, and those that were computed. */
  promptTokens: number;
  hitTokens: number;
  computedTokens: number;
  /** Of the cache: blocks that are known by their tokens. */
  cachedBlocks: number;
  cachedBytes: number;
  /** Bytes of as many blocks as the conversations would need that share none. */
  unsharedBytes: number;
  /** Seconds in which the tokens of prompts were computed. */
  promptSeconds: number;
  /** What the tokens that were found would have taken, by the time a token of the cold conversation took. */
  savedSeconds: number;
  /** The last conversation both ways: seconds to the first byte of its answers, added up. */
  hotSeconds: number;
  coldSeconds: number;
  sameText: boolean;
}

/** Counts what was found and what it saved. */
export function chatReport(options: ChatOptions, { turns, texts, paged, cold }: ChatRun): ChatReport {
  const { lookups, hits, hitTokens, cachedBlocks, cachedBytes } = paged.stats().prefix;
  const add = (all: readonly Turn[], value: (turn: Turn) => number) => all.reduce((sum, turn) => sum + value(turn), 0);
  const promptSeconds = ({ drawing }: Turn) => drawing.promptSeconds;
  const computedTokens = ({ drawing }: Turn) => drawing.computedTokens;
  const coldSeconds = add(cold.turns, promptSeconds);
  const hot = turns.filter(({ conversation }) => conversation === texts.length - 1);
  // The last byte of a text did not go through the model.
  const blocks = texts.reduce((sum, text) => sum + Math.ceil((text.length - 1) / paged.blockSize), 0);
  return {
    conversations: options.conversations,
    turns: options.turns,
    hits,
    lookups,
    promptTokens: add(turns, ({ promptTokens }) => promptTokens),
    hitTokens,
    computedTokens: add(turns, computedTokens),
    cachedBlocks,
    cachedBytes,
    unsharedBytes: blocks * cachedBytes / cachedBlocks,
    promptSeconds: add(turns, promptSeconds),
    savedSeconds: hitTokens * coldSeconds / add(cold.turns, computedTokens),
    hotSeconds: add(hot, promptSeconds),
    coldSeconds,
    sameText: `${texts.at(-1)}` === `${cold.text}`,
  };
}

/** The report in words, behind the last conversation. */
export function chatText(report: ChatReport, text: string): string {
  const { conversations, turns, hits, lookups, promptTokens, hitTokens, cachedBlocks } = report;
  const percent = (100 * hitTokens / promptTokens).toFixed(0);
  const verdict = report.sameText ? "the same text" : "ANOTHER TEXT: hot and cold must not differ";
  return `--- conversation ${conversations} of ${conversations} ---
${text.trimEnd()}
--- ${countText(conversations, "conversation")} of ${countText(turns, "turn")} behind one system prompt ---
hits:  ${hits} of ${countText(lookups, "prompt")}, ${hitTokens} of their ${promptTokens} tokens (${percent} %)
bytes: ${formatBytes(report.cachedBytes)} in ${countText(cachedBlocks, "block")} of all turns; ` +
    `${formatBytes(report.unsharedBytes)} if conversations shared none
time:  ${formatSeconds(report.promptSeconds)} for ${report.computedTokens} tokens of prompts; ` +
    `about ${formatSeconds(report.savedSeconds)} saved
cold:  conversation ${conversations} again in fresh caches, ${formatSeconds(report.coldSeconds)} for its prompts, ` +
    `not ${formatSeconds(report.hotSeconds)}: ${verdict}
`;
}
