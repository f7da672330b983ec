/**
 * From a native status to a `KvError`.
 *
 * The library answers with a number from one closed, never renumbered list; the text is composed where the call was
 * made, because only there are the action and the values known.
 *
 * @module
 */

import { KvError, type KvErrorCode } from "../error.ts";
import { ENUMS } from "./exports.ts";

/** The closed list of refusals; a code that is missing here fails the type check below. */
export const STATUS: Omit<typeof ENUMS.status, "ok"> = (({ ok: _, ...refusals }) => refusals)(ENUMS.status);

/** Every code that crosses the boundary; `library_unavailable` arises before there is a boundary, `model_failed` outside it. */
type NativeCode = Exclude<KvErrorCode, "library_unavailable" | "model_failed">;

/** The rules that read the same whatever was attempted. */
const RULES: Record<NativeCode, string> = {
  invalid_config: "an option is out of its range",
  layer_out_of_range: "the cache has no such layer",
  sequence_out_of_range: "the cache has no such sequence",
  position_out_of_range: "the sequence has no such position",
  invalid_size: "a buffer has the wrong length",
  not_finite: "rows must be finite in the dtype they are stored in: found NaN, an infinity, or a value that overflows",
  cache_full: "the sequence is full",
  pool_empty: "no block is free",
  out_of_memory: "the memory limit would be passed",
  block_too_large: "the block is larger than the pool allows",
  commit_mismatch: "the layers do not all have the rows it needs",
  stale_handle: "it was freed",
  stale_view: "the rows behind it have changed",
  unsupported: "this cache cannot do it",
  bad_snapshot: "the snapshot is damaged",
  snapshot_mismatch: "the snapshot has another geometry",
  no_device: "there is no such device",
  needs_permission: "a runtime permission is missing",
  aborted: "it was aborted",
};

const CODES = new Map<number, NativeCode>(
  (Object.keys(RULES) as NativeCode[]).map((code) => [STATUS[code], code]),
);

/** Ends every refusal for want of memory. */
let memoryLimitText = "";

/** Has every refusal for want of memory say what the process may reserve. */
export function nameMemoryLimit(bytes: number): void {
  memoryLimitText = `; KVERN_MAX_BYTES is ${bytes}`;
}

/**
 * Composes the error of a negative status: `Cannot <action> as <rule>`.
 *
 * `rules` replaces the general rule of a code by one that names the values; the functions run for that code only, so a
 * call site may ask the cache for what it needs to say.
 */
export function refusal(
  status: number,
  action: string,
  rules: Partial<Record<NativeCode, () => string>> = {},
): KvError {
  const code = CODES.get(status);
  if (code === undefined) throw new Error(`Cannot ${action} as the library gave an unknown status: ${status}`);
  const limit = code === "out_of_memory" ? memoryLimitText : "";
  return new KvError(code, `Cannot ${action} as ${rules[code]?.() ?? RULES[code]}${limit}`);
}

/** What the rule about a stale handle is: only its owner knows what was freed. */
export type FreedRule = Record<"stale_handle", () => string>;

/** The rule of a cache that was freed, with all its sequences. */
export const CACHE_FREED = "the cache was freed";

/** The rule of every object that is freed as a whole. */
export function freedRule(thing: "buffer" | "pool"): FreedRule {
  return { stale_handle: () => `the ${thing} was freed` };
}

/** The rule of a handle that comes from elsewhere. */
export function unknownHandle(thing: "cache" | "sequence"): FreedRule {
  return { stale_handle: () => `it must be that of a ${thing} that was not freed` };
}

/** A number of things in words. */
export function countText(
  n: number,
  thing: "token" | "layer" | "sequence" | "block" | "row" | "element" | "buffer",
): string {
  return n === 1 ? `1 ${thing}` : `${n} ${thing}s`;
}
