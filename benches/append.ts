/**
 * How fast are keys and values stored: one token, 64, 4096, by dtype?
 *
 *     deno task bench:append [--json] [--smoke] [--kv f32,f16,bf16] [--tokens 1,64,4096]
 *     bun benches/append.ts
 *
 * The rows are f32 and are converted on the way. The rival copies the same f32 bytes with `TypedArray.set`. Both write
 * through max(1 GiB, 2 x the last cache level) of memory that was touched before, and start again. `GB/s` counts the
 * f32 bytes that come in; `x copy` is the copy's time over append's. f16 and bf16 write half of what they read.
 *
 * Not a goal: cold sources. A step's keys come from a multiplication that has just written them.
 */
import { ContiguousCache, type FloatDType } from "../mod.ts";
import { storedRows } from "../tests/oracle.ts";
import { checkClose, hashOf } from "./checking.ts";
import { DTYPE_BYTES, FLOATS, numbers, rotatedBytes, SHAPE } from "./inputs.ts";
import { printRows, readOptions, type Row, tell, tellMachine, timeOf } from "./rows.ts";

const options = readOptions(["kv", "tokens"]);
const dtypes = options.names("kv", FLOATS);
const tokenCounts = options.numbers("tokens", options.smoke ? [1, 4] : [1, 64, 4096]);
const { kvHeadCount, headDim } = SHAPE;
const kvDim = kvHeadCount * headDim;
const most = Math.max(...tokenCounts);
const bytes = Math.max(rotatedBytes(options.smoke), 2 * most * kvDim * 4);
const keys = numbers(1, most * kvDim), values = numbers(2, most * kvDim);
tellMachine(options);

/** Rows of K and V that `bytes` bytes hold. */
const capacityOf = (dtype: FloatDType) => Math.floor(bytes / (2 * kvDim * DTYPE_BYTES[dtype]));

/** Nanoseconds to copy each number of tokens. */
async function timeCopies(): Promise<Map<number, number>> {
  const capacity = capacityOf("f32");
  // Filled, so that every page is there.
  const k = new Float32Array(capacity * kvDim).fill(1), v = new Float32Array(capacity * kvDim).fill(1);
  const times = new Map<number, number>();
  for (const tokens of tokenCounts) {
    const newK = keys.subarray(0, tokens * kvDim), newV = values.subarray(0, tokens * kvDim);
    let length = 0;
    const copy = () => {
      if (length + tokens > capacity) length = 0;
      k.set(newK, length * kvDim);
      v.set(newV, length * kvDim);
      length += tokens;
    };
    times.set(tokens, await timeOf(copy, options.smoke));
  }
  return times;
}

/** Nanoseconds to append each number of tokens. */
async function timeAppends(dtype: FloatDType): Promise<Map<number, number>> {
  const capacity = capacityOf(dtype);
  using cache = new ContiguousCache({ layerCount: 1, kvHeadCount, headDim, maxSeqLen: capacity, dtype });
  const sequence = cache.sequence(0);

  sequence.append(0, keys, values);
  const f32 = sequence.gather(0);
  checkClose(`append of ${dtype} keys`, f32.k, storedRows(keys, dtype), 0);
  checkClose(`append of ${dtype} values`, f32.v, storedRows(values, dtype), 0);
  const { k, v } = sequence.gather(0, { dtype });
  tell(options, `${dtype}: ${most} tokens equal to the oracle, hash ${hashOf(k)} ${hashOf(v)}`);
  // Every page is touched.
  for (let length = most; length + most <= capacity; length += most) sequence.append(0, keys, values);

  const times = new Map<number, number>();
  for (const tokens of tokenCounts) {
    const newK = keys.subarray(0, tokens * kvDim), newV = values.subarray(0, tokens * kvDim);
    sequence.truncate(0);
    let length = 0;
    const append = () => {
      if (length + tokens > capacity) sequence.truncate(length = 0);
      sequence.append(0, newK, newV);
      length += tokens;
    };
    times.set(tokens, await timeOf(append, options.smoke));
  }
  return times;
}

/** A row of the table. */
function rowOf(name: string, tokens: number, ns: number, copyNs: number): Required<Row> {
  const gbps = 2 * tokens * kvDim * 4 / ns;
  const vsCopy = copyNs / ns;
  return {
    json: { kv: name, tokens, us: ns / 1e3, gbps, vsCopy },
    cells: [name, tokens, (ns / 1e3).toFixed(3), gbps.toFixed(2), vsCopy.toFixed(2)],
  };
}

const copies = await timeCopies();
const rows: Row[] = [...copies].map(([tokens, ns]) => ({ cells: rowOf("f32 copy", tokens, ns, ns).cells }));
for (const dtype of dtypes) {
  for (const [tokens, ns] of await timeAppends(dtype)) rows.push(rowOf(dtype, tokens, ns, copies.get(tokens)!));
}
printRows(options, "append", ["kv", "tokens", "us", "GB/s of f32", "x copy"], rows);
