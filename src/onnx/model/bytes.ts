/**
 * Bytes that lie in memory or in a file, read a window at a time: the graph of a model is small, and its weights are
 * gigabytes that nobody here needs.
 *
 * @module
 */

import { closeSync, fstatSync, openSync, readSync } from "node:fs";

/** Bytes by their place. */
export interface Bytes {
  readonly length: number;
  /** The bytes from `start` to `end`: a window where they lie in memory. Both must be within the length. */
  window(start: number, end: number): Uint8Array;
  /** Closes the file; nothing can be read after that. */
  close(): void;
}

/** Windows on an array. */
export function bytesOf(array: Uint8Array): Bytes {
  return {
    length: array.length,
    window: (start, end) => array.subarray(start, end),
    close: () => {},
  };
}

/** Bytes that are read from a file at once; fields of a message are far smaller and lie side by side. */
const CHUNK_BYTES = 1 << 16;

/** The bytes of a file, of which one chunk is kept. */
export function bytesOfFile(path: string): Bytes {
  const file = openSync(path, "r");
  const length = fstatSync(file).size;
  let chunk = new Uint8Array(0);
  let chunkStart = 0;

  return {
    length,
    window(start, end) {
      if (start >= chunkStart && end <= chunkStart + chunk.length) {
        return chunk.subarray(start - chunkStart, end - chunkStart);
      }
      if (end - start > CHUNK_BYTES) return read(start, end);
      chunk = read(start, Math.min(length, start + CHUNK_BYTES));
      chunkStart = start;
      return chunk.subarray(0, end - start);
    },
    close: () => closeSync(file),
  };

  /** Reads into an array of its own. */
  function read(start: number, end: number): Uint8Array<ArrayBuffer> {
    const array = new Uint8Array(end - start);
    let count = 0;
    while (count < array.length) {
      const more = readSync(file, array, count, array.length - count, start + count);
      if (more === 0) throw new Error(`${path} was cut short while it was read`);
      count += more;
    }
    return array;
  }
}
