/**
 * Writes a .tar.gz whose bytes follow from its files alone: their names, sorted, and what is in them. No times, owners
 * or permissions of this machine, so that two people who pack the same files with the same Deno get the same hash.
 *
 * @module
 */
import { Buffer } from "node:buffer";
import { gzipSync } from "node:zlib";
import { ToolchainError } from "./toolchain.ts";

const BLOCK_BYTES = 512;
/** 1985-10-26, as in the packages of npm: some programs take the year 1970 for damage. */
const SECONDS = 499162500;

/** Packs files, by their paths in the archive with `/` between folders. */
export function packTarball(files: ReadonlyMap<string, Uint8Array>): Uint8Array {
  const sorted = [...files].sort(([a], [b]) => a < b ? -1 : 1);
  const blocks = sorted.flatMap(([path, bytes]) => {
    const padding = (BLOCK_BYTES - bytes.length % BLOCK_BYTES) % BLOCK_BYTES;
    return [header(path, bytes.length), bytes, Buffer.alloc(padding)];
  });
  const tarball = gzipSync(Buffer.concat([...blocks, Buffer.alloc(2 * BLOCK_BYTES)]), { level: 9 });
  tarball[9] = 255; // the system that packed it, which zlib tells: unknown
  return tarball;
}

/** A file's header in the format ustar. */
function header(path: string, byteLength: number): Buffer {
  // 100 bytes hold the path; the rest of it would go to a field that begins at a folder.
  if (!/^\w[\w@.+-]*(\/\w[\w@.+-]*)*$/.test(path) || path.length > 100) {
    throw new ToolchainError(`Cannot pack a file as its path must be plain, and of at most 100 characters: ${path}`);
  }
  const block = Buffer.alloc(BLOCK_BYTES);
  const octal = (value: number, at: number, digits: number) => block.write(value.toString(8).padStart(digits, "0"), at);
  block.write(path, 0);
  octal(0o644, 100, 7);
  octal(0, 108, 7); // user
  octal(0, 116, 7); // group
  octal(byteLength, 124, 11);
  octal(SECONDS, 136, 11);
  block.write(" ".repeat(8), 148);
  block.write("0", 156); // a plain file
  block.write("ustar\x0000", 257);
  const sum = block.reduce((total, byte) => total + byte, 0);
  octal(sum, 148, 6);
  block.writeUInt8(0, 154);
  return block;
}
