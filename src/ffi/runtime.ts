/**
 * The runtime this runs in: the only file that asks.
 *
 * @module
 */

import * as bun from "./bun.ts";
import * as deno from "./deno.ts";
import type { Library } from "./exports.ts";
import * as node from "./node.ts";
import type { Permission } from "./permission.ts";

/** The runtimes that can call native code. */
export type RuntimeName = "deno" | "bun" | "node";

/** What the adapters of all of them offer. */
export interface Adapter {
  readonly name: RuntimeName;
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

/** Deno and Bun call themselves a Node as well, so they are asked first. */
const known: Adapter | undefined = "Deno" in globalThis
  ? deno
  : "Bun" in globalThis
  ? bun
  : node.isRecent()
  ? node
  : undefined;

/** Can this runtime call native code? */
export function isKnown(): boolean {
  return known !== undefined;
}

/** The adapter of the runtime this runs in. */
export const adapter: Adapter = known ?? node;
