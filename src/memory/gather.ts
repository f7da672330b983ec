/**
 * Copies of a layer's rows: the checks and the arrays, the same for every kind of cache.
 *
 * @module
 */

import type { GatheredRows } from "../cache.ts";
import { KvError } from "../error.ts";
import { VALUES } from "../ffi/exports.ts";
import { countText, refusal } from "../ffi/status.ts";
import { checkCount } from "../options/counts.ts";
import { floatDtypeCode, SIDE_NAMES } from "../options/dtype.ts";
import { GATHER_NAMES, type GatherOptions } from "../options/gather.ts";
import { elementCountOf, layoutWords } from "../options/layout.ts";
import { checkOptions, givenOptions } from "../options/option_names.ts";
import { isSeen, seenCount, seenText } from "../options/retention.ts";
import { checkInto, newRows, outputCount, overlapRule, type Rows } from "../options/rows.ts";
import type { SequenceMemory } from "./sequence.ts";

/** Copies rows of a layer. */
export function gatherRows(memory: SequenceMemory, layer: number, options?: GatherOptions): GatheredRows {
  // First, as it may run the caller's code; and once, as a second look may find something else.
  const given = givenOptions(options, GATHER_NAMES, "gather");
  const { dtype = "f32", into, layout, headStride, start = 0, count } = given;
  if (into !== undefined) checkOptions(into, SIDE_NAMES, "gather", "into");
  const intoK = into?.k, intoV = into?.v;
  checkCount("layer", layer);
  checkCount("start", start);
  if (count !== undefined) checkCount("count", count);
  const code = floatDtypeCode("dtype", dtype);
  const action = `gather layer ${layer}`;
  const { order, stride } = layoutWords(layout, headStride, action);
  if (into !== undefined) {
    checkInto("into.k", intoK!, dtype);
    checkInto("into.v", intoV!, dtype);
  }
  const { cache } = memory;
  const shape = cache.shapeOf(layer);
  let rows: number, k: Rows, v: Rows, kCount: number, vCount: number, status: number;
  do {
    rows = rowsWanted(memory, layer, start, count, action);
    const elements = elementCountOf(rows, shape, stride);
    if (elements >= 2 ** 32) {
      throw new KvError("unsupported", `Cannot ${action} as a copy has less than 2^32 elements a side: ${elements}`);
    }
    k = intoK ?? newRows(dtype, elements);
    v = intoV ?? newRows(dtype, elements);
    kCount = outputCount("into.k", k);
    vCount = outputCount("into.v", v);
    // An option may have freed the sequence, so the handle is asked for at each call.
    status = cache.library.kv_sequence_gather(
      memory.handle,
      memory.index,
      layer,
      start,
      count ?? VALUES.allRows,
      k,
      kCount,
      v,
      vCount,
      code,
      order,
      stride,
    );
    // Another thread may append or truncate in between: new arrays are then made anew, for the rows there are.
  } while (
    into === undefined && status !== rows &&
    (status >= 0 || rowsWanted(memory, layer, start, count, action) !== rows)
  );
  if (status < 0) {
    throw refusal(status, action, {
      ...memory.rules(layer),
      position_out_of_range: () => rangeRule(memory, layer, start, count),
      invalid_config: () => overlapRule({ "into.k": k, "into.v": v }),
      invalid_size: () =>
        stride !== 0 && stride < rows * shape.headDim
          ? `headStride must be at least ${rows * shape.headDim}, the elements of a head of ${
            countText(rows, "row")
          }: headStride is ${stride}`
          : `its ${countText(rows, "row")} have ${elementCountOf(rows, shape, stride)} elements a side: ` +
            `k has ${kCount}, v has ${vCount}`,
    });
  }
  return { k, v };
}

/** The rows that a copy of a range will have; no array is made for rows that are not there. */
function rowsWanted(
  memory: SequenceMemory,
  layer: number,
  start: number,
  count: number | undefined,
  action: string,
): number {
  const resident = memory.residentCount(layer);
  if (resident < 0) throw refusal(resident, action, memory.rules(layer));
  if (start === 0 && count === undefined) return resident;
  const seen = memory.seen(layer);
  if (isSeen(seen, start, count)) return count ?? seenCount(seen, start);
  throw new KvError("position_out_of_range", `Cannot ${action} as ${rangeRule(memory, layer, start, count)}`);
}

function rangeRule(memory: SequenceMemory, layer: number, start: number, count: number | undefined): string {
  const rule = count === undefined
    ? `start may be at most the number of rows: start is ${start}`
    : `${countText(count, "row")} from position ${start} on must be seen`;
  return `${rule}, ${seenText(memory.seen(layer))}`;
}
