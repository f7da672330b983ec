/**
 * Whether a library's file is whole, and the one that was released: asked before it is opened, since a file that was cut
 * short ends the process where the missing part is needed.
 *
 * @module
 */

import { closeSync, openSync, readFileSync, readSync, statSync } from "node:fs";
import process from "node:process";
import type { ReleasedLibrary } from "./manifest.ts";

/** Why these bytes are not those of the released library, or undefined where they are. */
export function mismatchOf(bytes: Uint8Array, released: ReleasedLibrary): string | undefined {
  if (bytes.length !== released.bytes) return `it has ${bytes.length} bytes, the released one has ${released.bytes}`;
  // Not imported: Bun loads its streams with it, and most starts compare nothing.
  const sha256 = process.getBuiltinModule("node:crypto").createHash("sha256").update(bytes).digest("hex");
  return sha256 === released.sha256
    ? undefined
    : `its SHA-256 is ${sha256}, that of the released one ${released.sha256}`;
}

/** Refuses a file that was cut short, and one that is not the library that was released where that is known. */
export function checkFile(path: string, released: ReleasedLibrary | undefined): void {
  const facts = statSync(path, { throwIfNoEntry: false });
  if (!facts?.isFile()) return; // opening it says what it is
  if (released === undefined) return checkWhole(path, facts.size);
  const mismatch = mismatchOf(readFileSync(path), released);
  if (mismatch !== undefined) throw new Error(mismatch);
}

/**
 * Refuses an ELF library that was cut short. Section headers stand at the end, so a whole file reaches behind them. Other
 * formats and other files are left to the attempt to open them.
 */
function checkWhole(path: string, bytes: number): void {
  let file: number;
  try {
    file = openSync(path, "r");
  } catch {
    return; // a file within a program that Bun compiled can be loaded, not opened
  }
  try {
    const header = new Uint32Array(16);
    if (readSync(file, header) < header.byteLength) return;
    const halves = new Uint16Array(header.buffer);
    if (header[0] !== 0x464c457f || halves[2] !== 0x0102) return; // "\x7fELF", 64 bits, little endian
    const end = header[10]! + header[11]! * 2 ** 32 + halves[29]! * halves[30]!;
    if (bytes < end) throw new Error(`it was cut short: it has ${bytes} of its ${end} bytes`);
  } finally {
    closeSync(file);
  }
}
