/**
 * Which rows of a sequence are seen, and which stay so that it can be rewound.
 *
 *     0        sinkTokens                       first              seqLen
 *     | sinks  |  let go, by block  |  unseen   |  the newest rows |
 *
 * A row keeps its position for ever. The `rewindTokens` rows before `first` stay in their blocks and are seen by nobody; a
 * sequence that is truncated shows them again.
 *
 * @module
 */

import { KvError } from "../error.ts";
import { checkCount, checkOption } from "./counts.ts";
import { checkOptions, type OptionNames, optionNames } from "./option_names.ts";

/** A {@linkcode Retention} under which no row leaves. */
export interface KeepAll {
  /** Nothing leaves; `cache_full` at `maxSeqLen`. */
  readonly keep: "all";
}

/** A {@linkcode Retention} under which the newest rows stay. */
export interface KeepNewest {
  /**
   * The newest rows stay, and the first ones if asked; positions never change. `rewindTokens` more are not seen, and
   * stay for a truncate. Rows are hidden at a commit: until then pending rows come on top of `tokens`.
   */
  readonly keep: "newest";
  /** Rows that stay, sinks included, at least 1. */
  readonly tokens: number;
  /** First rows that never leave, fewer than `tokens`; 0 by default. */
  readonly sinkTokens?: number;
}

/** Which rows of a sequence are seen after a commit. */
export type Retention = KeepAll | KeepNewest;

const RETENTION_NAMES: OptionNames = optionNames<KeepNewest>({
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

/** Which rows of a layer are seen: those in [0, sinkEnd) and in [first, rowCount). */
export interface Seen {
  readonly rowCount: number;
  readonly sinkEnd: number;
  readonly first: number;
}

/** Are `count` rows from `start` on seen, each of them? Without a count, could rows begin there? */
export function isSeen({ rowCount, sinkEnd, first }: Seen, start: number, count: number | undefined): boolean {
  if (count === undefined || count === 0) return start <= rowCount;
  const end = start + count;
  return end <= rowCount && (first <= sinkEnd || start >= first || end <= sinkEnd);
}

/** The rows that are seen from `start` on. */
export function seenCount({ rowCount, sinkEnd, first }: Seen, start: number): number {
  if (first <= sinkEnd) return rowCount - start;
  return Math.max(0, sinkEnd - start) + rowCount - Math.max(start, first);
}

/** Which rows are seen, in words. */
export function seenText({ rowCount, sinkEnd, first }: Seen): string {
  if (first <= sinkEnd) return `the layer has ${rowCount}`;
  const sinks = sinkEnd === 0 ? "" : `the first ${sinkEnd} and `;
  return `the layer has ${rowCount}, of which ${sinks}those from ${first} on are seen`;
}

/** What of an attend decides which rows its queries should see. */
export interface Sight {
  readonly causal: boolean;
  /** The windows of the call and of the layer, and the rows that retention keeps beside the sinks. */
  readonly windowTokens: number;
  readonly layerWindowTokens: number;
  readonly newestTokens: number;
  readonly sinkTokens: number;
}

/** The position of the query that reaches furthest back; a causal one among the sinks sees nothing else. */
function oldestQuery({ rowCount, sinkEnd }: Seen, queryCount: number, causal: boolean): number {
  return causal ? Math.max(rowCount - queryCount, sinkEnd) : rowCount - queryCount;
}

/** Has a query no longer all rows it should see? The same rule as that of `zig/src/attention/query.zig`. */
export function isMissingRows(seen: Seen, queryCount: number, sight: Sight): boolean {
  const { rowCount, sinkEnd, first } = seen;
  if (first <= sinkEnd) return false;
  const end = oldestQuery(seen, queryCount, sight.causal) + 1;
  const keptFirst = Math.max(0, (sight.causal ? end : rowCount) - sight.newestTokens);
  const seenFirst = Math.max(keptFirst, end - Math.min(sight.windowTokens, sight.layerWindowTokens));
  return seenFirst < first || Math.max(keptFirst, sinkEnd) < Math.min(sight.sinkTokens, first);
}

/** The rule that such a query breaks. */
export function missingRowsText(seen: Seen, queryCount: number, { causal, sinkTokens }: Sight): string {
  const sinks = seen.sinkEnd === 0 ? "" : ` beside the first ${seen.sinkEnd}`;
  return `no row that a query sees may have been evicted: query position is ${
    oldestQuery(seen, queryCount, causal)
  }, ` +
    `first row still seen${sinks} is ${seen.first}${sinkTokens > seen.sinkEnd ? `, sinkTokens is ${sinkTokens}` : ""}`;
}

function refuse(action: string, rule: string): KvError {
  return new KvError("invalid_config", `Cannot ${action} as ${rule}`);
}
