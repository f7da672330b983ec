/** What the library gives against files made once: numbers from the oracle, and bits that may never change. */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { ContiguousCache, systemInfo } from "../mod.ts";
import { runFile } from "./child.ts";
import { relativeError } from "./oracle.ts";

test("attend() agrees with attention.bin", () => {
  const bytes = new Uint8Array(readFileSync(new URL("golden/attention.bin", import.meta.url))).slice();
  assert.equal(new TextDecoder().decode(bytes.subarray(0, 8)), "kvern\0\0\0");
  const header = [...new Uint32Array(bytes.buffer, 8, 10)] as number[];
  const [version, , kvHeadCount, qHeadCount, headDim, n, queryCount, windowTokens, sinkTokens, textBytes] = header;
  assert.equal(version, 1);
  let at = 48 + textBytes!;
  assert.match(new TextDecoder().decode(bytes.subarray(48, at)), /^deno run -A tests\/golden\/make\.ts *$/);
  const floats = (length: number) => {
    const array = new Float32Array(bytes.buffer, at, length);
    at += length * 4;
    return array;
  };
  const qCount = queryCount! * qHeadCount! * headDim!, kvCount = n! * kvHeadCount! * headDim!;
  const [q, k, v] = [floats(qCount), floats(kvCount), floats(kvCount)] as const;
  const [output, lse] = [floats(qCount), floats(queryCount! * qHeadCount!)] as const;
  assert.equal(at, bytes.length);

  using cache = new ContiguousCache({ layerCount: 1, kvHeadCount: kvHeadCount!, headDim: headDim!, maxSeqLen: n! });
  cache.append(0, 0, k, v);
  const options = { queryCount: queryCount!, windowTokens: windowTokens!, sinkTokens: sinkTokens! };
  const actual = new Float32Array(lse.length);
  assert.ok(relativeError(cache.sequence(0).attend(0, q, { ...options, lse: actual }), output) <= 1e-6);
  assert.ok(relativeError(actual, lse) <= 1e-6);
});

const golden = JSON.parse(readFileSync(new URL("golden/bits.json", import.meta.url), "utf8"));

/** What a level must give. The bits of `amx` are those of `avx512`: for codes always, for floats unless it wrote its own. */
function expectedOf(level: string): { attend?: string; codes?: string } {
  const { attend, codes } = golden, like = level === "amx" ? "avx512" : level;
  return { attend: attend[level] ?? attend[like], codes: codes[like] };
}

for (const level of systemInfo().levels) {
  const expected = expectedOf(level), known = expected.attend !== undefined;
  test(
    `level ${level} gives the bits in bits.json${known ? "" : " (skipped: made on a machine without this level)"}`,
    { skip: !known, timeout: 60_000 },
    () => {
      assert.equal(golden.magic, "kvern bits");
      const { code, stdout, stderr } = runFile(new URL("golden/bits.ts", import.meta.url), { KVERN_LEVEL: level });
      assert.equal(code, 0, stderr);
      assert.deepEqual(JSON.parse(stdout), { level, ...expected, stored: golden.stored });
    },
  );
}

test("bits.json has every level of x86_64, and amx as avx512 where codes are attended", () => {
  for (const level of ["v2", "v3", "avx512", "amx"]) {
    const { attend, codes } = expectedOf(level);
    for (const hash of [attend, codes]) assert.match(hash!, /^[0-9a-f]{64}$/);
  }
  assert.equal(expectedOf("amx").codes, golden.codes.avx512);
  assert.equal(golden.codes.amx ?? golden.codes.avx512, golden.codes.avx512);
});
