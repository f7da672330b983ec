/**
 * What a native library of a release must be: for the system its folder names, and made to be given away.
 *
 * @module
 */
import { Buffer } from "node:buffer";
import { LIBRARY_FILES, type Target } from "./package.ts";
import { ROOT } from "./toolchain.ts";

/** The instruction sets as ELF, Mach-O and PE number them. */
const ELF: Readonly<Record<number, string>> = { 62: "x86_64", 183: "aarch64" };
const MACH_O: Readonly<Record<number, string>> = { 0x1000007: "x86_64", 0x100000c: "aarch64" };
const PE: Readonly<Record<number, string>> = { 0x8664: "x86_64", 0xaa64: "aarch64" };

/** The oldest glibc 2 that a release runs with, as `zig/build.zig` says. */
const GLIBC_MINOR = 17;

/** The system that the first bytes of a library name: `x86_64-linux`, `aarch64-macos` and so on. */
function systemOf(library: Buffer): string | undefined {
  if (library.length < 64) return undefined;
  const named = (cpu: string | undefined, system: string) => cpu === undefined ? undefined : `${cpu}-${system}`;
  if (library.readUInt32BE(0) === 0x7f454c46) return named(ELF[library.readUInt16LE(18)], "linux"); // "\x7fELF"
  if (library.readUInt32LE(0) === 0xfeedfacf) return named(MACH_O[library.readUInt32LE(4)], "macos");
  const header = library.readUInt32LE(60);
  if (library.toString("latin1", 0, 2) !== "MZ" || header + 6 > library.length) return undefined;
  return named(PE[library.readUInt16LE(header + 4)], "windows");
}

/** Complaints about the library of a target. */
export function libraryComplaints(target: Target, library: Uint8Array): string[] {
  const file = `lib/${target}/${LIBRARY_FILES[target]}`;
  const bytes = Buffer.from(library.buffer, library.byteOffset, library.byteLength);
  const [cpu, system, libc] = target.split("-");
  const found = systemOf(bytes);
  if (found !== `${cpu}-${system}`) {
    return [`${file} must be a library for ${cpu}-${system}: it is one for ${found ?? "nothing that is known"}`];
  }
  const complaints: string[] = [];
  // The C library that the system loads with it stands among its strings.
  const loaded = bytes.includes("\0libc.so.6\0") ? "gnu" : bytes.includes("\0libc.so\0") ? "musl" : undefined;
  if (system === "linux" && loaded !== libc) {
    complaints.push(`${file} must load the C library of ${libc}: it loads ${loaded ? `that of ${loaded}` : "none"}`);
  }
  const newest = Math.max(
    0,
    ...Array.from(bytes.toString("latin1").matchAll(/\0GLIBC_2\.(\d+)/g), ([, minor]) => Number(minor)),
  );
  if (newest > GLIBC_MINOR) complaints.push(`${file} must load with glibc 2.${GLIBC_MINOR}: it needs 2.${newest}`);
  if (bytes.includes(".debug_info")) complaints.push(`${file} must be stripped: it has debug information`);
  if (bytes.includes(ROOT)) complaints.push(`${file} must not tell where it was built: it has ${ROOT}`);
  return complaints;
}
