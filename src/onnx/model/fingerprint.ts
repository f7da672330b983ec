/**
 * What a model is known by: whatever changes its answers changes this.
 *
 * @module
 */

import { createHash, type Hash } from "node:crypto";
import { join } from "node:path";
import { type Bytes, bytesOf, bytesOfFile } from "./bytes.ts";
import type { ModelFiles } from "./model.ts";

/** Bytes that are read at once: a file of weights passes through, and is never held. */
const STEP_BYTES = 1 << 20;

/**
 * BLAKE2b over the model and every file of its weights, the first 64 hexadecimal digits: of the hashes that every runtime
 * has it is the one that is fast in all of them.
 */
export function fingerprintOf(model: ModelFiles | Uint8Array): string {
  const hash = createHash("blake2b512").update("kvern onnx 1\n");
  if (model instanceof Uint8Array) update(hash, bytesOf(model));
  else {
    for (const file of [model.model, ...model.weights.values()]) {
      const bytes = bytesOfFile(join(model.folder, file));
      try {
        update(hash, bytes);
      } finally {
        bytes.close();
      }
    }
  }
  return hash.digest("hex").slice(0, 64);
}

/** The length comes first, so that no two lists of files read the same. */
function update(hash: Hash, bytes: Bytes): void {
  hash.update(`${bytes.length}\n`);
  for (let start = 0; start < bytes.length; start += STEP_BYTES) {
    hash.update(bytes.window(start, Math.min(bytes.length, start + STEP_BYTES)));
  }
}
