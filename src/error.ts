/**
 * The one error class of the library, and the closed list of its codes.
 *
 * A wrong JavaScript type is a `TypeError` and a number that is no count at all a `RangeError`; both are mistakes in
 * the calling program. Whatever depends on the cache, the library or the machine is a {@linkcode KvError}.
 *
 * @module
 */

/** Why a call was refused; a refused call has changed nothing, `advance` on a full sequence excepted. */
export type KvErrorCode =
  /** An option out of its range, or two that contradict each other. */
  | "invalid_config"
  /** A layer this cache does not have. */
  | "layer_out_of_range"
  /** A sequence this cache does not have. */
  | "sequence_out_of_range"
  /** A position past the rows there are. */
  | "position_out_of_range"
  /** `k` unlike `v`, rows that are not whole, a buffer too short. */
  | "invalid_size"
  /** NaN, an infinity, or a value the storage dtype would turn into one. */
  | "not_finite"
  /** `maxSeqLen` would be passed. */
  | "cache_full"
  /** No free block. */
  | "pool_empty"
  /** Past the memory limit, or the system refused. */
  | "out_of_memory"
  /** A block larger than the pool's limit. */
  | "block_too_large"
  /** The layers do not all have the rows a commit needs. */
  | "commit_mismatch"
  /** The cache or sequence was freed. */
  | "stale_handle"
  /** The rows behind a view have changed. */
  | "stale_view"
  /** This format, layout or device cannot do it. */
  | "unsupported"
  /** A damaged snapshot. */
  | "bad_snapshot"
  /** A snapshot of another geometry. */
  | "snapshot_mismatch"
  /** No GPU. */
  | "no_device"
  /** A runtime flag is missing; the text names it. */
  | "needs_permission"
  /** An AbortSignal ended it. */
  | "aborted"
  /** The native library is not built, not found, or of another version. */
  | "library_unavailable";

/**
 * A refusal by the library, with a code to branch on and a text that says the action, the rule and the value.
 *
 * @example Branch on the code
 * ```ts
 * import assert from "node:assert/strict";
 * import { KvError } from "@kvern/kvern";
 *
 * const error = new KvError("cache_full", "Cannot append 1 token to layer 0 as the sequence holds at most 8");
 * assert.equal(error.code, "cache_full");
 * ```
 */
export class KvError extends Error {
  /** Always `"KvError"`. */
  override readonly name = "KvError";
  /** Why the call was refused. */
  readonly code: KvErrorCode;

  /** Makes an error of one code; the library makes its own, so this is for tests and wrappers. */
  constructor(code: KvErrorCode, message: string, options?: ErrorOptions) {
    super(message, options);
    this.code = code;
  }
}
