/**
 * Which rows of a sequence stay.
 *
 *     0        sinkTokens             first                seqLen
 *     | sinks  |  gone, block by block  |  the newest rows   |
 *
 * A row keeps its position for ever; what is gone is seen by nobody.
 *
 * @module
 */

import { checkCount, checkOption } from "./config.ts";
import { KvError } from "./error.ts";
import { checkOptions, type OptionNames, optionNames } from "./option_names.ts";

/** Which rows of a sequence stay after a commit. */
export type Retention =
  | {
    /** Nothing leaves; `cache_full` at `maxSeqLen`. */
    readonly keep: "all";
  }
  | {
    /** The newest rows stay, and the first ones if asked; positions never change. */
    readonly keep: "newest";
    /** Rows that stay, sinks included, at least 1. */
    readonly tokens: number;
    /** First rows that never leave, fewer than `tokens`; 0 by default. */
    readonly sinkTokens?: number;
  };

const RETENTION_NAMES: OptionNames = optionNames<Extract<Retention, { keep: "newest" }>>({
  keep: true,
  tokens: true,
  sinkTokens: true,
});

/** The checked words of a retention; `action` begins the text of a refusal. */
export function retentionWords(retention: Retention, action: string): {
  readonly retentionTokens: number;
  readonly retentionSinkTokens: number;
} {
  checkOptions(retention, RETENTION_NAMES, action, "retention");
  // As it may come from JSON: a name this version does not know must not pass for one it does.
  const { keep, tokens, sinkTokens } = retention as { keep: string; tokens?: number; sinkTokens?: number };
  if (keep === "all") {
    if (tokens === undefined && sinkTokens === undefined) return { retentionTokens: 0, retentionSinkTokens: 0 };
    throw refuse(action, 'retention.tokens and retention.sinkTokens need keep "newest": keep is all');
  }
  if (keep !== "newest") throw refuse(action, `retention.keep must be all or newest: keep is ${keep}`);
  const count = checkOption("retention.tokens", tokens!, action);
  checkCount("retention.sinkTokens", sinkTokens ?? 0);
  const sinks = sinkTokens ?? 0;
  if (sinks < count) return { retentionTokens: count, retentionSinkTokens: sinks };
  throw refuse(action, `retention.sinkTokens must be below retention.tokens: ${sinks} sinks of ${count} tokens`);
}

function refuse(action: string, rule: string): KvError {
  return new KvError("invalid_config", `Cannot ${action} as ${rule}`);
}
