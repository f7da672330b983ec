/**
 * The runtime this runs in: the only file that asks.
 *
 * @module
 */

import * as bun from "./bun.ts";
import * as deno from "./deno.ts";
import type { Library } from "./exports.ts";

/** The variables of the environment that count, once, when the library is opened. */
export const VARIABLES = ["KVERN_LIB", "KVERN_LEVEL", "KVERN_MAX_BYTES", "KVERN_THREADS"] as const;

/** One of them. */
export type Variable = typeof VARIABLES[number];

/** What both adapters offer. */
export interface Adapter {
  readonly name: "deno" | "bun";
  readonly viewBytesMax: number;
  open(path: string): Library;
  env(variable: Variable): string | undefined;
  mayReadEnv(variable: Variable): boolean;
  mayOpen(path: string): boolean;
  ask(path: string): boolean;
  mayExist(path: string): boolean;
  mayRead(path: string): boolean;
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
