/**
 * Writes the golden files: `deno run -A tests/golden/make.ts`.
 *
 * `attention.bin` is made by the f64 oracle alone, so it does not depend on the library. It is little-endian:
 *
 *     u32[12]: "kver", "n\0\0\0", version 1, seed, kv heads, q heads, head_dim, rows, queries, window, sinks, text bytes
 *     text: the command that made it, padded with spaces to a multiple of 4
 *     f32: q [query][q_head][head_dim], k and v [row][kv_head][head_dim], output as q, lse [query][q_head]
 *
 * `bits.json` holds hashes of what the library gives on each level this machine has; levels it lacks keep theirs.
 */

import { readFileSync, writeFileSync } from "node:fs";
import { systemInfo } from "../../mod.ts";
import { runFile } from "../child.ts";
import { attention, Random } from "../oracle.ts";

const COMMAND = "deno run -A tests/golden/make.ts";

function attentionVector(): Uint8Array {
  const [seed, kvHeadCount, qHeadCount, headDim, n, queryCount, windowTokens, sinkTokens] = [7, 2, 4, 8, 33, 3, 20, 2];
  const random = new Random(seed);
  const q = random.floats(queryCount * qHeadCount * headDim, 2);
  const k = random.floats(n * kvHeadCount * headDim, 2), v = random.floats(n * kvHeadCount * headDim);
  const options = { queryCount, qHeadCount, kvHeadCount, headDim, windowTokens, sinkTokens };
  const { output, lse } = attention({ q, k, v, ...options });
  const text = new TextEncoder().encode(COMMAND.padEnd(Math.ceil(COMMAND.length / 4) * 4));
  const header = [1, seed, kvHeadCount, qHeadCount, headDim, n, queryCount, windowTokens, sinkTokens, text.length];
  const parts = [
    new TextEncoder().encode("kvern\0\0\0"),
    new Uint8Array(Uint32Array.from(header).buffer),
    text,
    ...[q, k, v, Float32Array.from(output), Float32Array.from(lse)].map((array) => new Uint8Array(array.buffer)),
  ];
  return new Uint8Array(parts.flatMap((part) => [...part]));
}

function bits(): string {
  const url = new URL("bits.json", import.meta.url);
  let attend: Record<string, unknown> = {}, codes: Record<string, unknown> = {};
  try {
    ({ attend, codes } = JSON.parse(readFileSync(url, "utf8")));
  } catch { /* the first time there is none */ }
  let stored: unknown;
  for (const level of systemInfo().levels) {
    const line = JSON.parse(runFile(new URL("bits.ts", import.meta.url), { KVERN_LEVEL: level }).stdout);
    attend[level] = line.attend;
    codes[level] = line.codes;
    stored = line.stored;
  }
  const golden = { magic: "kvern bits", version: 1, seed: 1909, command: COMMAND, stored, attend, codes };
  return `${JSON.stringify(golden, null, 2)}\n`;
}

writeFileSync(new URL("attention.bin", import.meta.url), attentionVector());
writeFileSync(new URL("bits.json", import.meta.url), bits());
