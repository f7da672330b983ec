/**
 * Prints what attend() and the float formats give at the level in force, as JSON: the bits, hashed.
 *
 * Equal stored bytes give equal bits on one level, in either runtime and on any machine; `golden_test.ts` compares these
 * lines with those in `bits.json`, one process a level.
 */

import { createHash } from "node:crypto";
import { ContiguousCache, systemInfo } from "../../mod.ts";
import { Random } from "../oracle.ts";

const attended = createHash("sha256");
const random = new Random(1909);

for (const dtype of ["f32", "f16", "bf16"] as const) {
  for (const headDim of [1, 33, 64, 128]) {
    for (const n of [1, 65, 1000]) {
      using cache = new ContiguousCache({ layerCount: 1, kvHeadCount: 2, headDim, maxSeqLen: n, dtype });
      cache.append(0, 0, random.floats(n * 2 * headDim), random.floats(n * 2 * headDim));
      for (const queryCount of [1, 5]) {
        const q = random.floats(queryCount * 6 * headDim, 3);
        const lse = new Float32Array(queryCount * 6);
        const plain = cache.sequence(0).attend(0, q, { queryCount, lse });
        attended.update(new Uint8Array(plain.buffer)).update(new Uint8Array(lse.buffer));
        const rich = cache.sequence(0).attend(0, q, {
          queryCount,
          lse,
          softcap: 20,
          windowTokens: 40,
          sinkTokens: 3,
          alibiSlopes: random.floats(6),
          sinkLogits: random.floats(6),
        });
        attended.update(new Uint8Array(rich.buffer)).update(new Uint8Array(lse.buffer));
      }
    }
  }
}

/** The stored bytes of a format, over every exponent: if these change, rows kept elsewhere can no longer be read. */
function storedHash(dtype: "f16" | "bf16"): string {
  using cache = new ContiguousCache({ layerCount: 1, kvHeadCount: 1, headDim: 256, maxSeqLen: 64, dtype });
  const values = Float32Array.from(
    { length: 64 * 256 },
    (_, i) => (random.next() * 2 - 1) * 2 ** (dtype === "f16" ? (i % 40) - 25 : (i % 250) - 126),
  );
  cache.append(0, 0, values, values);
  const { k } = cache.sequence(0).gather(0, { dtype });
  return createHash("sha256").update(new Uint8Array(k.buffer)).digest("hex");
}

console.log(JSON.stringify({
  level: systemInfo().level,
  attend: attended.digest("hex"),
  stored: { f16: storedHash("f16"), bf16: storedHash("bf16") },
}));
