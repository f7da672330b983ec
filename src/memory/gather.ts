/**
 * Copies of a layer's rows: the checks and the arrays, the same for every kind of cache.
 *
 * @module
 */

import type { GatheredRows } from "../cache.ts";
import { KvError } from "../error.ts";
import { countText, refusal } from "../ffi/status.ts";
import { checkCount } from "../options/counts.ts";
import { floatDtypeCode, SIDE_NAMES } from "../options/dtype.ts";
import { GATHER_NAMES, type GatherOptions } from "../options/gather.ts";
import { checkOptions, givenOptions } from "../options/option_names.ts";
import { checkInto, newRows, outputCount, overlapRule, type Rows } from "../options/rows.ts";
import type { SequenceMemory } from "./sequence.ts";

/** Copies the rows of a layer. */
export function gatherRows(memory: SequenceMemory, layer: number, options?: GatherOptions): GatheredRows {
  // First, as it may run the caller's code; and once, as a second look may find something else.
  const { dtype = "f32", into } = givenOptions(options, GATHER_NAMES, "gather");
  if (into !== undefined) checkOptions(into, SIDE_NAMES, "gather", "into");
  const intoK = into?.k, intoV = into?.v;
  checkCount("layer", layer);
  const code = floatDtypeCode("dtype", dtype);
  if (into !== undefined) {
    checkInto("into.k", intoK!, dtype);
    checkInto("into.v", intoV!, dtype);
  }
  const action = `gather layer ${layer}`;
  const { cache } = memory;
  let rows: number, count: number, k: Rows, v: Rows, kCount: number, vCount: number, status: number;
  do {
    rows = memory.residentCount(layer);
    if (rows < 0) throw refusal(rows, action, memory.rules(layer));
    count = rows * cache.kvDimOf(layer);
    if (count >= 2 ** 32) {
      throw new KvError("unsupported", `Cannot ${action} as a copy has less than 2^32 elements a side: ${count}`);
    }
    k = intoK ?? newRows(dtype, count);
    v = intoV ?? newRows(dtype, count);
    kCount = outputCount("into.k", k);
    vCount = outputCount("into.v", v);
    // An option may have freed the sequence, so the handle is asked for at each call.
    status = cache.library.kv_sequence_gather(memory.handle, memory.index, layer, k, kCount, v, vCount, code);
    // Another thread may append or truncate in between: new arrays are then made anew, for the rows there are.
  } while (into === undefined && status !== rows && (status >= 0 || memory.residentCount(layer) !== rows));
  if (status < 0) {
    throw refusal(status, action, {
      ...memory.rules(layer),
      invalid_config: () => overlapRule({ "into.k": k, "into.v": v }),
      invalid_size: () =>
        `its ${countText(rows, "row")} have ${count} elements a side: k has ${kCount}, v has ${vCount}`,
    });
  }
  return { k, v };
}
