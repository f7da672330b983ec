/**
 * Writes `ggml_records.bin`: `deno run -A tests/golden/ggml.ts`, on x86_64 Linux with npm.
 *
 * The records are made by ggml's own reference functions, out of the shared library in a pinned npm package, of values
 * that do not lie within 1e-3 steps of where rounding turns: there ggml rounds half away from zero and kvern half to
 * even. The file is little-endian:
 *
 *     u32[6]: "kver", "n\0\0\0", version 1, seed, records, text bytes
 *     text: the command that made it and the package, padded with spaces to a multiple of 4
 *     f32: values [record][32], what q8_0 makes of them, what q4_0 makes of them
 *     records: q8_0 of 34 bytes, q4_0 of 18
 */

import { spawnSync } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Random } from "../oracle.ts";

const PACKAGE = "@node-llama-cpp/linux-x64";
const VERSION = "3.22.1";
const LIBRARY = `node_modules/${PACKAGE}/bins/linux-x64/libggml-base.so`;
const TEXT = `deno run -A tests/golden/ggml.ts # ${PACKAGE}@${VERSION}`;
const SEED = 1909;
const GROUP = 32;

/** What is written into a record of values between -1 and 1, each with one of them at 0.99 or more. */
const KINDS: readonly ((values: Float32Array) => void)[] = [
  () => {},
  (values) => scale(values, 1000),
  (values) => scale(values, 1e-2),
  (values) => scale(values, 1e-4), // the scale is a denormal f16
  (values) => scale(values, 1e-9), // the scale is 0 as f16, and its inverse finite
  (values) => scale(values, 1e-30),
  (values) => scale(values, 60000),
  (values) => values.fill(0),
  (values) => values.fill(0.3),
  (values) => values.fill(-0.3),
  (values) => values[19] = 500, // an outlier
  (values) => values[7] = -500,
  (values) => [values[3], values[28]] = [1.5, -1.5], // the first of two extremes counts
  (values) => [values[3], values[28]] = [-1.5, 1.5],
];

function scale(values: Float32Array, factor: number): void {
  for (let i = 0; i < values.length; i++) values[i]! *= factor;
}

/** Shrinks every value but the largest until it is rounded the same way whatever is done with halves. */
function avoidTies(values: Float32Array): void {
  const largest = values.reduce((a, b) => Math.abs(b) > Math.abs(a) ? b : a, 0);
  const turns = (x: number) => {
    if (Math.abs(x) === Math.abs(largest)) return false;
    return [127 / Math.abs(largest), -8 / largest].some((inverse) => {
      const steps = x * inverse + 0.5;
      return Math.abs(steps - Math.round(steps)) < 1e-3;
    });
  };
  for (let i = 0; i < values.length; i++) while (turns(values[i]!)) values[i]! *= 0.997;
}

function allValues(): Float32Array {
  const random = new Random(SEED);
  const groups = [...KINDS, ...KINDS.slice(0, 6)].map((kind) => {
    const values = random.floats(GROUP);
    values[Math.floor(Math.abs(values[0]!) * GROUP) % GROUP] = values[1]! < 0 ? -0.99 - 0.01 * values[2]! ** 2 : 0.99;
    kind(values);
    avoidTies(values);
    return values;
  });
  return Float32Array.from(groups.flatMap((values) => [...values]));
}

function main(): void {
  const folder = mkdtempSync(join(tmpdir(), "ggml-"));
  try {
    const args = ["install", "--prefix", folder, "--no-save", "--ignore-scripts", `${PACKAGE}@${VERSION}`];
    const npm = spawnSync("npm", args, { encoding: "utf8" });
    if (npm.status !== 0) throw new Error(`Cannot install ${PACKAGE} as npm failed: ${npm.stderr}`);
    writeFileSync(new URL("ggml_records.bin", import.meta.url), golden(join(folder, LIBRARY)));
  } finally {
    rmSync(folder, { recursive: true });
  }
}

function golden(path: string): Uint8Array {
  const signature = { parameters: ["buffer", "buffer", "i64"], result: "void" } as const;
  const ggml = Deno.dlopen(path, {
    quantize_row_q8_0_ref: signature,
    quantize_row_q4_0_ref: signature,
    dequantize_row_q8_0: signature,
    dequantize_row_q4_0: signature,
  });
  const values = allValues();
  const recordCount = values.length / GROUP, count = BigInt(values.length);
  const records8 = new Uint8Array(recordCount * 34), records4 = new Uint8Array(recordCount * 18);
  const back8 = new Float32Array(values.length), back4 = new Float32Array(values.length);
  ggml.symbols.quantize_row_q8_0_ref(values, records8, count);
  ggml.symbols.quantize_row_q4_0_ref(values, records4, count);
  ggml.symbols.dequantize_row_q8_0(records8, back8, count);
  ggml.symbols.dequantize_row_q4_0(records4, back4, count);
  ggml.close();
  const text = new TextEncoder().encode(TEXT.padEnd(Math.ceil(TEXT.length / 4) * 4));
  const parts = [
    new TextEncoder().encode("kvern\0\0\0"),
    Uint32Array.of(1, SEED, recordCount, text.length),
    text,
    values,
    back8,
    back4,
    records8,
    records4,
  ];
  return new Uint8Array(parts.flatMap((part) => [...new Uint8Array(part.buffer, part.byteOffset, part.byteLength)]));
}

main();
