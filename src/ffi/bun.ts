/**
 * Bun's side of the boundary: opens a library with the table of exports, makes arrays over native memory.
 *
 * It translates and knows no API of kvern. `bun:ffi` is asked for at the first call and not imported, because a static
 * import of it breaks `deno run`.
 *
 * @module
 */

import process from "node:process";
import { EXPORTS, type Library, RESULT, type Word, wordsOf } from "./exports.ts";
import type { Permission } from "./permission.ts";

/** The part of `bun:ffi` that is used here. */
interface BunFfi {
  dlopen(path: string, symbols: Record<string, { args: string[]; returns: string }>): { symbols: Library };
  toArrayBuffer(address: number, byteOffset: number, byteLength: number): ArrayBuffer;
}

let loaded: BunFfi | undefined;

function ffi(): BunFfi {
  return loaded ??= process.getBuiltinModule("bun:ffi") as unknown as BunFfi;
}

/** Bun calls a typed array passed by address a pointer; the other words have equal names. */
function argument(word: Word): string {
  return word === "buffer" ? "ptr" : word;
}

/** Which runtime this adapter speaks for. */
export const name = "bun";

/** Bun makes no ArrayBuffer larger than 4 GiB. */
export const viewBytesMax: number = 2 ** 32;

/** Opens the library at `path`; throws what Bun throws. */
export function open(path: string): Library {
  const symbols = Object.entries(EXPORTS).map(([symbol, parameters]) =>
    [symbol, { args: wordsOf(parameters).map(argument), returns: RESULT }] as const
  );
  try {
    return ffi().dlopen(path, Object.fromEntries(symbols)).symbols;
  } catch (error) {
    if (!(error instanceof Error && error.message.includes("requires the JIT"))) throw error;
    throw new Error("Bun calls native code through its JIT, which is off here: unset BUN_JSC_useJIT", { cause: error });
  }
}

/** A variable of the environment. */
export function env(variable: string): string | undefined {
  return process.env[variable];
}

/** Bun has no permissions. */
export function grants(_permission: Permission): boolean {
  return true;
}

/** Bun has nobody to ask. */
export function ask(_permission: Permission): boolean {
  return true;
}

/** Which C library this Bun was built for, on Linux: a library for the other one cannot be loaded. */
export function libc(): "gnu" | "musl" {
  const { header } = process.report.getReport() as unknown as { header: { glibcVersionRuntime?: string } };
  return header.glibcVersionRuntime === undefined ? "musl" : "gnu";
}

/** Bun denies nothing. */
export function isDenial(_error: unknown): boolean {
  return false;
}

/** Native memory grows by this much, or by a quarter of what is held, before garbage is looked for. */
const NOTED_MIB_MIN = 64;

const FORCED = false;
let notedMib = 0;

/**
 * Asks for a collection, in the background, whenever native memory has grown by enough. An ArrayBuffer that only stands
 * for it would be written to by Bun, page by page.
 */
export function noteGrowth(grownMib: number, heldMib: number): void {
  notedMib += grownMib;
  if (notedMib < Math.max(NOTED_MIB_MIN, heldMib / 4)) return;
  notedMib = 0;
  (globalThis as unknown as { Bun: { gc(force: boolean): void } }).Bun.gc(FORCED);
}

/** An ArrayBuffer over native memory. */
export function view(addressLow: number, addressHigh: number, byteLength: number): ArrayBuffer {
  return ffi().toArrayBuffer(addressHigh * 2 ** 32 + addressLow, 0, byteLength);
}
