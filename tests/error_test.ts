/** KvError: what it is, and that its codes are the statuses of the library. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { ContiguousCache, KvError } from "../mod.ts";

test("a KvError has a code, a name, a cause and a text of action, rule and value", () => {
  const cause = new Error("below");
  const error = new KvError("aborted", "Cannot go on as it was aborted", { cause });
  assert.ok(error instanceof Error);
  assert.deepEqual([error.name, error.code, error.cause], ["KvError", "aborted", cause]);
  assert.equal(String(error), "KvError: Cannot go on as it was aborted");

  using cache = new ContiguousCache({ layerCount: 1, kvHeadCount: 2, headDim: 2, maxSeqLen: 4 });
  const message = (call: () => unknown) => {
    try {
      call();
    } catch (error) {
      return (error as Error).message;
    }
    throw new Error("not refused");
  };
  assert.equal(
    message(() => cache.append(0, 0, new Float32Array(20), new Float32Array(20))),
    "Cannot append 5 tokens to layer 0 as the sequence holds at most 4: current length is 0",
  );
  assert.equal(
    message(() => cache.sequence(7)),
    "Cannot read sequence 7 as the cache has 1 sequence: sequence is 7",
  );
  assert.equal(
    message(() => new ContiguousCache({ layerCount: 1, kvHeadCount: 1, headDim: 257, maxSeqLen: 1 })),
    "Cannot create a cache as headDim must be 1 to 256: headDim is 257",
  );
  assert.equal(
    message(() => cache.append(-1, 0, new Float32Array(4), new Float32Array(4))),
    "layer must be a whole number from 0 to 4294967295: -1",
  );
});
