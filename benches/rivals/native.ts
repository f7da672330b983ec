/**
 * Native libraries of the rivals, opened in Deno and in Bun by one table: addresses are whole numbers on both sides.
 */
import process from "node:process";

/** What crosses: numbers by size, and the address of a typed array. An address given as a number is a `u64`. */
export type Word = "i32" | "i64" | "u64" | "f32" | "buffer";

/** A function: what it takes, and what it gives. */
export type Signature = readonly [parameters: readonly Word[], result: Word | "void"];

type Value<W extends Word | "void"> = W extends "void" ? void
  : W extends "i32" | "f32" ? number
  : W extends "buffer" ? ArrayBufferView
  : bigint;

type Values<Words extends readonly Word[]> = { -readonly [Index in keyof Words]: Value<Words[Index]> };

/** The signatures of a table as functions. */
export type Functions<Table extends Readonly<Record<string, Signature>>> = {
  readonly [Name in keyof Table]: (...given: Values<Table[Name][0]>) => Value<Table[Name][1]>;
};

/** The part of Deno that is used here. */
interface DenoApi {
  dlopen(
    path: string,
    symbols: Record<string, { parameters: readonly string[]; result: string }>,
  ): { symbols: unknown };
  readonly UnsafePointer: { create(address: bigint): object | null };
  readonly UnsafePointerView: { getArrayBuffer(pointer: object, byteLength: number): ArrayBuffer };
}

/** The part of `bun:ffi` that is used here. */
interface BunFfi {
  dlopen(path: string, symbols: Record<string, { args: string[]; returns: string }>): { symbols: unknown };
  toArrayBuffer(address: number, byteOffset: number, byteLength: number): ArrayBuffer;
}

const isDeno = "Deno" in globalThis;
const deno = () => (globalThis as unknown as { Deno: DenoApi }).Deno;
const bun = () => process.getBuiltinModule("bun:ffi") as unknown as BunFfi;

/** Opens a library. */
export function openNative<const Table extends Readonly<Record<string, Signature>>>(
  path: string,
  table: Table,
): Functions<Table> {
  const rows = Object.entries(table);
  if (isDeno) {
    const symbols = rows.map(([name, [parameters, result]]) => [name, { parameters, result }] as const);
    return deno().dlopen(path, Object.fromEntries(symbols)).symbols as Functions<Table>;
  }
  const inBun = (word: Word) => word === "buffer" ? "ptr" : word;
  const symbols = rows.map(([name, [parameters, result]]) =>
    [name, { args: parameters.map(inBun), returns: result }] as const
  );
  return bun().dlopen(path, Object.fromEntries(symbols)).symbols as Functions<Table>;
}

/** An ArrayBuffer over native memory. */
export function memoryAt(address: bigint, byteLength: number): ArrayBuffer {
  if (!isDeno) return bun().toArrayBuffer(Number(address), 0, byteLength);
  const pointer = deno().UnsafePointer.create(address);
  if (pointer === null) throw new TypeError("Cannot make an array over native memory as its address is 0");
  return deno().UnsafePointerView.getArrayBuffer(pointer, byteLength);
}
