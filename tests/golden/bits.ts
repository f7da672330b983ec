/**
 * Prints what attend() and the float formats give at the level in force, as JSON: the bits, hashed.
 *
 * Equal stored bytes give equal bits on one level, in every runtime and on any machine; `golden_test.ts` compares these
 * lines with those in `bits.json`, one process a level.
 */

import { createHash } from "node:crypto";
import { ContiguousCache, PagedCache, systemInfo } from "../../mod.ts";
import { Random } from "../oracle.ts";

const attended = createHash("sha256"), codes = createHash("sha256");
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

// Codes behind a tail of 64, of every format, keys and values apart; and more positions than one chunk of the work has.
const formats = ["q8_0", "q4_0", "i8", "i4", "i2"] as const;
for (const [i, k] of formats.entries()) {
  const n = i === 0 ? 3000 : 500, headDim = i % 2 === 0 ? 64 : 96;
  const shape = { layerCount: 1, kvHeadCount: 2, headDim, maxSeqLen: n };
  using cache = new PagedCache({ ...shape, tail: { tokens: 64 }, store: { k, v: formats[(i + 2) % 5]! } });
  const sequence = cache.sequence();
  sequence.append(0, random.floats(n * 2 * headDim), random.floats(n * 2 * headDim));
  sequence.commit(n);
  for (const queryCount of [1, 5]) {
    const lse = new Float32Array(queryCount * 6);
    const output = sequence.attend(0, random.floats(queryCount * 6 * headDim, 3), { queryCount, lse });
    for (const hash of [attended, codes]) hash.update(new Uint8Array(output.buffer)).update(new Uint8Array(lse.buffer));
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
  codes: codes.digest("hex"),
  stored: { f16: storedHash("f16"), bf16: storedHash("bf16") },
}));
