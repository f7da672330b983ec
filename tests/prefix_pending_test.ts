/** What sequences are about to commit: a prompt that waits for it must not wait for what will never come. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { PagedCache, type Sequence } from "../mod.ts";

const SHAPE = { layerCount: 1, kvHeadCount: 1, headDim: 8, maxSeqLen: 256, blockSize: 4, dtype: "f32" } as const;
const P = Uint32Array.from({ length: 20 }, (_, i) => i + 1);

/** Commits rows of these tokens, and tells them. */
function grow(sequence: Sequence, tokens: Uint32Array): void {
  appendRows(sequence, tokens.length);
  sequence.commit(tokens.length, { tokens });
}

function appendRows(sequence: Sequence, count: number): void {
  sequence.append(0, new Float32Array(count * 8), new Float32Array(count * 8));
}

test("a prompt is pending until all of it was committed, and no longer", () => {
  using cache = new PagedCache({ ...SHAPE, prefix: {} });
  const sequence = cache.sequence({ tokens: P });
  for (const [start, end] of [[0, 6], [6, 8], [8, 20]] as const) {
    assert.equal(cache.pendingPrefix(P), P.length - start);
    appendRows(sequence, 1);
    sequence.truncate(start); // a step that failed takes nothing back
    assert.equal(cache.pendingPrefix(P), P.length - start);
    grow(sequence, P.subarray(start, end));
  }
  assert.equal(cache.pendingPrefix(P), 0);
  // Its rows may go again, and it has no more to tell.
  cache.reset();
  assert.equal(cache.pendingPrefix(P), 0);
});

test("who commits other tokens, or tells none, or goes back, is not waited for", () => {
  const leaving: [string, (cache: PagedCache, sequence: Sequence) => void][] = [
    ["another token", (_, sequence) => grow(sequence, Uint32Array.of(7, 8, 90))],
    ["no tokens", (_, sequence) => {
      appendRows(sequence, 3);
      sequence.commit(3);
    }],
    ["truncate", (_, sequence) => sequence.truncate(3)],
    ["reset", (cache) => cache.reset()],
    ["free", (_, sequence) => sequence.free()],
    ["another beam", (cache, sequence) => cache.reorder([sequence, cache.sequence()], [1, 1])],
  ];
  for (const [name, leave] of leaving) {
    using cache = new PagedCache({ ...SHAPE, prefix: {} });
    const sequence = cache.sequence({ tokens: P });
    grow(sequence, P.subarray(0, 6));
    assert.equal(cache.pendingPrefix(P), 14, name);
    leave(cache, sequence);
    const { knownTokens } = cache.explain(P);
    assert.equal(cache.pendingPrefix(P), 0, `${name}: ${knownTokens} are known`);
  }
});

test("a sequence whose rows found no room is not waited for", () => {
  const blockBytes = 4 * 8 * 4 * 2;
  using cache = new PagedCache({ ...SHAPE, prefix: { maxBytesPerSalt: 2 * blockBytes } });
  const sequence = cache.sequence({ tokens: P });
  grow(sequence, P.subarray(0, 8));
  assert.equal(cache.pendingPrefix(P), 12);
  grow(sequence, P.subarray(8, 16)); // the third block has no room beside the two before it
  assert.equal(cache.pendingPrefix(P), 0);
});
