/**
 * Deno's side of the boundary: opens a library with the table of exports, makes arrays over native memory.
 *
 * It translates and knows no API of kvern. Deno is reached through `globalThis` and described by the few lines below,
 * so that the file type checks in a Bun project, too.
 *
 * @module
 */

import { KvError } from "../error.ts";
import { EXPORTS, type Library, RESULT, type Word, wordsOf } from "./exports.ts";
import type { Permission } from "./permission.ts";

type State = "granted" | "prompt" | "denied";

/** The part of Deno that is used here. */
interface DenoApi {
  dlopen(path: string, symbols: Record<string, { parameters: Word[]; result: Word }>): { symbols: Library };
  readonly permissions: {
    querySync(permission: Permission): { state: State };
    requestSync(permission: Permission): { state: State };
  };
  readonly env: { get(name: string): string | undefined };
  readonly errors: { NotCapable: new () => Error };
  readonly build: { readonly env?: string };
  readonly UnsafePointer: { create(address: bigint): object | null };
  readonly UnsafePointerView: { getArrayBuffer(pointer: object, byteLength: number): ArrayBuffer };
}

/** Deno is not asked for before the first call. */
function api(): DenoApi {
  return (globalThis as unknown as { Deno: DenoApi }).Deno;
}

/** Which runtime this adapter speaks for. */
export const name = "deno";

/** No ArrayBuffer of this runtime is too large for a run of rows (64 GiB were tried). */
export const viewBytesMax: number = Infinity;

/** Opens the library at `path`; throws what Deno throws. */
export function open(path: string): Library {
  const symbols = Object.entries(EXPORTS).map(([symbol, parameters]) =>
    [symbol, { parameters: wordsOf(parameters), result: RESULT }] as const
  );
  return api().dlopen(path, Object.fromEntries(symbols)).symbols;
}

/** A variable of the environment, if reading it is allowed already: a library asks nobody for its own settings. */
export function env(variable: string): string | undefined {
  return grants({ name: "env", variable }) ? api().env.get(variable) : undefined;
}

/** Is this allowed without asking? */
export function grants(permission: Permission): boolean {
  return api().permissions.querySync(permission).state === "granted";
}

/** Asks the user for this, where there is a user to ask, unless it is allowed already. */
export function ask(permission: Permission): boolean {
  return api().permissions.requestSync(permission).state === "granted";
}

/** Which C library this Deno was built for, on Linux: a library for the other one cannot be loaded. */
export function libc(): "gnu" | "musl" {
  return api().build.env === "musl" ? "musl" : "gnu";
}

/** True for the error Deno throws when a permission is missing. */
export function isDenial(error: unknown): boolean {
  return error instanceof api().errors.NotCapable;
}

/** V8 is told no more at once. */
const NOTED_MIB_MAX = 256;

/**
 * Has V8 count that native memory has grown: an ArrayBuffer of that size is made and let go. The system backs it with no
 * page, as nobody writes to it, and V8 collects garbage when it has counted enough of them.
 */
export function noteGrowth(grownMib: number, _heldMib: number): void {
  try {
    new ArrayBuffer(Math.min(grownMib, NOTED_MIB_MAX) * 2 ** 20);
  } catch {
    // No room in the address space: whoever needs it next is told so.
  }
}

/** An ArrayBuffer over native memory; needs `--allow-ffi` without a path. */
export function view(addressLow: number, addressHigh: number, byteLength: number): ArrayBuffer {
  try {
    const pointer = api().UnsafePointer.create((BigInt(addressHigh) << 32n) | BigInt(addressLow));
    if (pointer === null) throw new TypeError("Cannot make an array over native memory as its address is 0");
    return api().UnsafePointerView.getArrayBuffer(pointer, byteLength);
  } catch (error) {
    if (!isDenial(error)) throw error;
    throw new KvError(
      "needs_permission",
      "Cannot make an array over native memory as Deno allows that with an unscoped --allow-ffi only: " +
        "run with --allow-ffi, or use gather() and attend(), which need no more than --allow-ffi=<path>",
      { cause: error },
    );
  }
}
