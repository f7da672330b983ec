/**
 * Node's side of the boundary: opens a library with the table of exports, makes arrays over native memory.
 *
 * It translates and knows no API of kvern. `node:ffi` is asked for at the first call and not imported: no other
 * runtime has it, and Node warns where it is loaded that it is experimental.
 *
 * @module
 */

import process from "node:process";
import { KvError } from "../error.ts";
import { EXPORTS, type Library, RESULT, type Word, wordsOf } from "./exports.ts";
import type { Permission } from "./permission.ts";

/** The part of `node:ffi` that is used here. */
interface NodeFfi {
  dlopen(path: string, symbols: Record<string, { arguments: Word[]; return: Word }>): { functions: Library };
  toArrayBuffer(address: bigint, byteLength: number, copy: boolean): ArrayBuffer;
}

/** The permissions of a process that was started with `--permission`. */
interface Permissions {
  has(scope: "fs.read" | "fs.write", path: string): boolean;
}

/** The part of `process.report` that is used here. */
interface Report {
  excludeNetwork: boolean;
  getReport(): { readonly header: { readonly glibcVersionRuntime?: string } };
}

/** The first release whose `node:ffi` needs no flag. */
const OLDEST = [26, 10] as const;

/** Views and not copies are made. */
const COPIED = false;

/** Is this Node, of a release that can call native code? Deno and Bun name a release of Node, too, and are asked first. */
export function isRecent(): boolean {
  const [major = 0, minor = 0] = (process.versions?.node ?? "").split(".").map(Number);
  return major > OLDEST[0] || (major === OLDEST[0] && minor >= OLDEST[1]);
}

function ffi(): NodeFfi {
  const found = process.getBuiltinModule("node:ffi") as unknown as NodeFfi | undefined;
  if (found !== undefined) return found;
  throw new Error("Node calls native code through node:ffi, which is off here: leave out --no-experimental-ffi");
}

/** Which runtime this adapter speaks for. */
export const name = "node";

/** No ArrayBuffer of this runtime is too large for a run of rows (128 GiB were tried). */
export const viewBytesMax: number = Infinity;

/** Opens the library at `path`; throws what Node throws, and `needs_permission` where Node forbids native code. */
export function open(path: string): Library {
  const symbols = Object.entries(EXPORTS).map(([symbol, parameters]) =>
    [symbol, { arguments: wordsOf(parameters), return: RESULT }] as const
  );
  try {
    return ffi().dlopen(path, Object.fromEntries(symbols)).functions;
  } catch (error) {
    if (!isDenial(error)) throw error;
    throw new KvError(
      "needs_permission",
      "Cannot open the native library as Node needs a permission for it: run with --allow-ffi",
      { cause: error },
    );
  }
}

/** The environment is read as in Bun. */
export { env } from "./bun.ts";

/**
 * Which C library this Node was built for, on Linux: a library for the other one cannot be loaded. Unless told not to, the
 * report that says so asks for the names of all open connections, and waits for them.
 */
export function libc(): "gnu" | "musl" {
  const report = process.report as unknown as Report;
  const { excludeNetwork } = report;
  report.excludeNetwork = true;
  try {
    return report.getReport().header.glibcVersionRuntime === undefined ? "musl" : "gnu";
  } finally {
    report.excludeNetwork = excludeNetwork;
  }
}

/** Is this allowed? Node has a permission for all native code and none by path, and the attempt to open tells of that. */
export function grants(permission: Permission): boolean {
  const { permission: permissions } = process as { permission?: Permissions };
  if (permission.name !== "read" && permission.name !== "write") return true;
  return permissions?.has(`fs.${permission.name}`, permission.path) ?? true;
}

/** Node has nobody to ask. */
export function ask(permission: Permission): boolean {
  return grants(permission);
}

/** True for the error Node throws when a permission is missing. */
export function isDenial(error: unknown): boolean {
  return error instanceof Error && (error as { code?: unknown }).code === "ERR_ACCESS_DENIED";
}

/** V8 counts memory as in Deno. */
export { noteGrowth } from "./deno.ts";

/** An ArrayBuffer over native memory. */
export function view(addressLow: number, addressHigh: number, byteLength: number): ArrayBuffer {
  return ffi().toArrayBuffer((BigInt(addressHigh) << 32n) | BigInt(addressLow), byteLength, COPIED);
}
