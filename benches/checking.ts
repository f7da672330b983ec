/** What is timed must be right: results are compared with a truth before, and leave a hash to compare runs by. */

/** Throws unless mean|difference| / mean|truth| is at most `bound`; NaN anywhere throws. */
export function checkClose(
  what: string,
  actual: ArrayLike<number>,
  truth: ArrayLike<number>,
  bound: number,
): void {
  let difference = actual.length === truth.length ? 0 : NaN;
  let size = 0;
  for (let i = 0; i < truth.length; i++) {
    difference += Math.abs(actual[i]! - truth[i]!);
    size += Math.abs(truth[i]!);
  }
  const isClose = difference <= bound * size;
  if (!isClose) throw new Error(`${what} is wrong: its error is ${difference / size}, and may be ${bound}`);
}

/** A hash of the bytes of a result (FNV-1a): the same numbers, the same hash. */
export function hashOf(result: ArrayBufferView): string {
  let hash = 0x811c9dc5;
  for (const byte of new Uint8Array(result.buffer, result.byteOffset, result.byteLength)) {
    hash = Math.imul(hash ^ byte, 0x01000193);
  }
  return (hash >>> 0).toString(16).padStart(8, "0");
}
