/**
 * What does one call into the library cost?
 *
 *     deno task bench:boundary [--json] [--smoke]
 *     bun benches/boundary.ts
 *
 * Calls with next to nothing to do, beside a JavaScript function with as little: a row of the cache has one number.
 * What such an attend takes is an upper bound of what the boundary adds to a layer of a step. Goal: below 1 us.
 */
import { ContiguousCache } from "../mod.ts";
import { checkClose, hashOf } from "./checking.ts";
import { keep, printRows, readOptions, type Row, tell, tellMachine, timeOf } from "./rows.ts";

const options = readOptions([]);
tellMachine(options);

const shape = { layerCount: 1, kvHeadCount: 1, headDim: 1 };
const key = Float32Array.of(0.5), value = Float32Array.of(0.75), q = Float32Array.of(0.25);

// One row: attention over it is its value.
using cache = new ContiguousCache({ ...shape, maxSeqLen: 1 });
const sequence = cache.sequence(0);
sequence.append(0, key, value);
sequence.commit(1);
const into = new Float32Array(1);
const attendOptions = { into };
sequence.attend(0, q, attendOptions);

// The rival of getSeqLen: checks its argument as well, and reads a number.
const lengths = Uint32Array.of(1);
function plainFunction(index: number): number {
  if (index >>> 0 !== index || index >= lengths.length) throw new RangeError(`no sequence ${index}`);
  return lengths[index]!;
}

// Appends fill a cache again and again.
const capacity = 2 ** 16;
using filling = new ContiguousCache({ ...shape, maxSeqLen: capacity });
const filled = filling.sequence(0);
let length = 0;
function appendOne(): void {
  if (length === capacity) filled.truncate(length = 0);
  filled.append(0, key, value);
  length += 1;
}
for (let i = 0; i < capacity; i++) appendOne();

checkClose("attend over one row", into, value, 0);
checkClose("the length", [cache.getSeqLen(0), sequence.seqLen, plainFunction(0)], [1, 1, 1], 0);
checkClose("append", filled.gather(0).v, new Float32Array(capacity).fill(0.75), 0);
tell(options, `equal to what they must be, hash ${hashOf(into)}`);

const calls: readonly [call: string, run: () => void][] = [
  ["plain function", () => keep(plainFunction(0))],
  ["cache.getSeqLen(0)", () => keep(cache.getSeqLen(0))],
  ["sequence.seqLen", () => keep(sequence.seqLen)],
  ["append, one number", appendOne],
  ["attend, one number", () => sequence.attend(0, q, attendOptions)],
];
const rows: Row[] = [];
for (const [call, run] of calls) {
  const ns = await timeOf(run, options.smoke);
  rows.push({ json: { call, ns }, cells: [call, ns.toFixed(1)] });
}
printRows(options, "boundary", ["call", "ns"], rows);
