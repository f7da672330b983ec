/** What the library shows to the system's linker: the exports of `src/ffi/exports.ts`, and nothing of its inside. */

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { readFileSync } from "node:fs";
import process from "node:process";
import { test } from "node:test";
import { systemInfo } from "../mod.ts";
import { names } from "./abi_calls.ts";

const isElf = process.platform === "linux";
const reason = isElf ? "" : " (skipped: it reads ELF, the format of Linux)";

/** The sections of an ELF file by their types, as `Elf64_Shdr` has them. */
function sectionsOf(elf: Buffer): { type: number; offset: number; bytes: number; link: number }[] {
  const first = Number(elf.readBigUInt64LE(0x28));
  const [headerBytes, count] = [elf.readUInt16LE(0x3a), elf.readUInt16LE(0x3c)];
  return Array.from({ length: count }, (_, i) => {
    const at = first + i * headerBytes;
    return {
      type: elf.readUInt32LE(at + 4),
      offset: Number(elf.readBigUInt64LE(at + 24)),
      bytes: Number(elf.readBigUInt64LE(at + 32)),
      link: elf.readUInt32LE(at + 40),
    };
  });
}

/** The names that other files may use: the defined symbols of the dynamic symbol table. */
function exportsOf(elf: Buffer): string[] {
  const DYNAMIC_SYMBOLS = 11, SYMBOL_BYTES = 24, UNDEFINED = 0;
  const sections = sectionsOf(elf);
  const symbols = sections.find(({ type }) => type === DYNAMIC_SYMBOLS)!;
  const strings = sections[symbols.link]!;
  return Array.from({ length: symbols.bytes / SYMBOL_BYTES }, (_, i) => symbols.offset + i * SYMBOL_BYTES)
    .filter((at) => elf.readUInt16LE(at + 6) !== UNDEFINED)
    .map((at) => {
      const from = strings.offset + elf.readUInt32LE(at);
      return elf.toString("latin1", from, elf.indexOf(0, from));
    });
}

test(`the library exports what TypeScript declares, and nothing else${reason}`, { skip: !isElf }, () => {
  assert.deepEqual(exportsOf(readFileSync(systemInfo().libraryPath)).sort(), [...names].sort());
});
