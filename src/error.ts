/**
 * The one error class of the library, and the closed list of its codes.
 *
 * A wrong JavaScript type is a `TypeError` and a number that is no count at all a `RangeError`; both are mistakes in
 * the calling program. Whatever depends on the cache, the library or the machine is a {@linkcode KvError}.
 *
 * @module
 */

/**
 * Why a call was refused; a refused call has changed nothing, `advance` on a full sequence excepted.
 *
 * - `invalid_config`: an option out of its range, or two that contradict each other.
 * - `layer_out_of_range`: a layer this cache does not have.
 * - `sequence_out_of_range`: a sequence this cache does not have.
 * - `position_out_of_range`: a position past the rows there are, or rows that were let go.
 * - `invalid_size`: `k` unlike `v`, rows that are not whole, a buffer too short.
 * - `not_finite`: NaN, an infinity, or a value the storage dtype would turn into one.
 * - `cache_full`: `maxSeqLen` would be passed.
 * - `pool_empty`: no free block.
 * - `out_of_memory`: past the memory limit, or the system refused.
 * - `block_too_large`: a block larger than the pool's limit.
 * - `commit_mismatch`: the layers do not all have the rows a commit needs.
 * - `stale_handle`: the cache, sequence, pool or buffer was freed.
 * - `stale_view`: the rows behind a view have changed.
 * - `unsupported`: this format, layout or device cannot do it.
 * - `bad_snapshot`: a damaged snapshot; no call gives it yet.
 * - `snapshot_mismatch`: a snapshot of another geometry; no call gives it yet.
 * - `no_device`: no GPU; no call gives it yet.
 * - `needs_permission`: a runtime flag is missing; the text names it.
 * - `aborted`: an AbortSignal ended it; `cause` is its reason.
 * - `model_failed`: onnxruntime refused a part of a model, or failed at it; `cause` is its error.
 * - `library_unavailable`: the native library is not built, not found, or of another version.
 */
export type KvErrorCode =
  | "invalid_config"
  | "layer_out_of_range"
  | "sequence_out_of_range"
  | "position_out_of_range"
  | "invalid_size"
  | "not_finite"
  | "cache_full"
  | "pool_empty"
  | "out_of_memory"
  | "block_too_large"
  | "commit_mismatch"
  | "stale_handle"
  | "stale_view"
  | "unsupported"
  | "bad_snapshot"
  | "snapshot_mismatch"
  | "no_device"
  | "needs_permission"
  | "aborted"
  | "model_failed"
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
