/**
 * The runtime this runs in: the only file that asks.
 *
 * @module
 */

import * as bun from "./bun.ts";
import * as deno from "./deno.ts";
import type { Library } from "./exports.ts";
import type { Permission } from "./permission.ts";

/** What both adapters offer. */
export interface Adapter {
  readonly name: "deno" | "bun";
  readonly viewBytesMax: number;
  open(path: string): Library;
  env(variable: string): string | undefined;
  grants(permission: Permission): boolean;
  ask(permission: Permission): boolean;
  libc(): "gnu" | "musl";
  isDenial(error: unknown): boolean;
  noteGrowth(grownMib: number, heldMib: number): void;
  view(addressLow: number, addressHigh: number, byteLength: number): ArrayBuffer;
}

/** Is it one of the two that can call native code here? */
export function isKnown(): boolean {
  return "Deno" in globalThis || "Bun" in globalThis;
}

/** The adapter of the runtime this runs in. */
export const adapter: Adapter = "Deno" in globalThis ? deno : bun;
