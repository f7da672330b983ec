/**
 * Rows written into a contiguous cache, and the views of them.
 *
 * A contiguous cache keeps the rows of a (layer, sequence) in one run, so there is one view at most, and all its facts
 * follow from where it starts and how long it is.
 *
 * @module
 */

import type { AppendOptions, AppendResult, View } from "./cache.ts";
import { checkCount, type DType, dtypeOf } from "./config.ts";
import type { ContiguousMemory, Side } from "./contiguous_memory.ts";
import { KvError } from "./error.ts";
import { newRecord, VIEW } from "./ffi/record.ts";
import { refusal } from "./ffi/status.ts";
import { inputDtype, type Rows } from "./rows.ts";

/** Options left out; shared, so that a call without them allocates none. */
const NO_OPTIONS = {};

/** Appends rows to one layer of one sequence; `handle` is 0 if the sequence object was freed. */
export function appendRows(
  memory: ContiguousMemory,
  handle: number,
  layer: number,
  sequence: number,
  k: Rows,
  v: Rows,
  options: AppendOptions = NO_OPTIONS,
): AppendResult {
  checkCount("layer", layer);
  checkCount("sequence", sequence);
  const dtype = inputDtype(k, v, options.dtype);
  const start = memory.library.kv_contiguous_append(
    handle,
    layer,
    sequence,
    k,
    k.length,
    v,
    v.length,
    dtype,
    layoutCode(options.layout),
  );
  if (start < 0) throw writeRefusal(start, memory, "append", layer, sequence, k, v);
  // Read now, so that views asked for after a later append are known to be stale.
  const generation = memory.library.kv_contiguous_generation(handle, layer, sequence);
  return new ContiguousAppend(memory, layer, sequence, start, k.length / memory.kvDim, generation);
}

function layoutCode(layout: AppendOptions["layout"] = "token_major"): number {
  if (layout === "token_major") return 0;
  if (layout === "head_major") return 1;
  if (typeof layout !== "string") throw new TypeError(`layout must be a string: ${typeof layout}`);
  throw new KvError("invalid_config", `Cannot append as layout must be token_major or head_major: layout is ${layout}`);
}

/** The refusal of an append or a store, with the values its rule is about. */
export function writeRefusal(
  status: number,
  memory: ContiguousMemory,
  verb: "append" | "store",
  layer: number,
  sequence: number,
  k: Rows,
  v: Rows,
): KvError {
  const n = Math.ceil(k.length / memory.kvDim);
  const length = verb === "append" ? `a multiple of ${memory.kvDim} elements` : `${memory.kvDim} elements`;
  return refusal(status, `${verb} ${countText(n, "token")} to layer ${layer}`, {
    ...rangeRules(memory, layer, sequence),
    cache_full: () =>
      `the sequence holds at most ${memory.maxSeqLen}: current length is ${memory.rowCount(layer, sequence)}`,
    invalid_size: () => `k and v must be equally long, ${length}: k has ${k.length}, v has ${v.length}`,
    commit_mismatch: () => `layer and sequence have a pending row already: advance() comes first`,
  });
}

/** A number of things in words. */
export function countText(n: number, thing: "token" | "layer" | "sequence"): string {
  return n === 1 ? `1 ${thing}` : `${n} ${thing}s`;
}

/** The rules about indices, the same for every call. */
export function rangeRules(
  memory: ContiguousMemory,
  layer: number,
  sequence: number,
): Record<"layer_out_of_range" | "sequence_out_of_range", () => string> {
  return {
    layer_out_of_range: () => `the cache has ${countText(memory.layerCount, "layer")}: layer is ${layer}`,
    sequence_out_of_range: () =>
      `the cache has ${countText(memory.sequenceCount, "sequence")}: sequence is ${sequence}`,
  };
}

/** The view of all rows a layer has now; none if there are no rows. */
export function allViews(memory: ContiguousMemory, handle: number, layer: number, sequence: number): View[] {
  checkCount("layer", layer);
  const record = newRecord("view");
  const views = memory.library.kv_contiguous_views(handle, layer, sequence, record, record.byteLength);
  if (views < 0) throw refusal(views, `view layer ${layer}`, rangeRules(memory, layer, sequence));
  return views === 0 ? [] : [new ContiguousView(memory, layer, sequence, record)];
}

/** What append gives back: where the rows went, and on demand a view of them. */
class ContiguousAppend implements AppendResult {
  readonly start: number;
  readonly #memory: ContiguousMemory;
  readonly #layer: number;
  readonly #sequence: number;
  readonly #length: number;
  readonly #generation: number;
  #views: View[] | undefined;

  constructor(
    memory: ContiguousMemory,
    layer: number,
    sequence: number,
    start: number,
    length: number,
    generation: number,
  ) {
    this.start = start;
    this.#memory = memory;
    this.#layer = layer;
    this.#sequence = sequence;
    this.#length = length;
    this.#generation = generation;
  }

  get views(): View[] {
    return this.#views ??= this.#length === 0 ? [] : [this.#view()];
  }

  #view(): View {
    const record = newRecord("view");
    const { library, handle } = this.#memory;
    library.kv_contiguous_views(handle, this.#layer, this.#sequence, record, record.byteLength);
    record[VIEW.generation] = this.#generation;
    record[VIEW.start] = this.start;
    record[VIEW.length] = this.#length;
    return new ContiguousView(this.#memory, this.#layer, this.#sequence, record);
  }
}

/** A window on some rows of one run; each property read asks whether they are still the rows it was made for. */
class ContiguousView implements View {
  readonly #memory: ContiguousMemory;
  readonly #layer: number;
  readonly #sequence: number;
  readonly #record: Uint32Array;

  constructor(memory: ContiguousMemory, layer: number, sequence: number, record: Uint32Array) {
    this.#memory = memory;
    this.#layer = layer;
    this.#sequence = sequence;
    this.#record = record;
    // A missing permission shows where views are asked for and not at some later read.
    this.#rows("k");
  }

  get k(): Float32Array | Uint16Array {
    return this.#rows("k");
  }

  get v(): Float32Array | Uint16Array {
    return this.#rows("v");
  }

  get start(): number {
    return this.#word(VIEW.start);
  }

  get length(): number {
    return this.#word(VIEW.length);
  }

  get device(): "cpu" {
    this.#word(VIEW.tier);
    return "cpu";
  }

  get gpu(): number {
    this.#word(VIEW.tier);
    return -1;
  }

  get dtypeK(): DType {
    return dtypeOf(this.#word(VIEW.dtypeK));
  }

  get dtypeV(): DType {
    return dtypeOf(this.#word(VIEW.dtypeV));
  }

  get tokenStride(): number {
    return this.#word(VIEW.tokenStride);
  }

  get headStride(): number {
    return this.#word(VIEW.headStride);
  }

  get tier(): "tail" {
    this.#word(VIEW.tier);
    return "tail";
  }

  get delta(): number {
    return this.#word(VIEW.delta) | 0;
  }

  #rows(side: Side): Float32Array | Uint16Array {
    return this.#memory.rows(this.#layer, this.#sequence, side, this.#word(VIEW.start), this.#word(VIEW.length));
  }

  /** One word of the record, if the rows are still those it tells of. */
  #word(word: number): number {
    const memory = this.#memory;
    const now = memory.library.kv_contiguous_generation(memory.handle, this.#layer, this.#sequence);
    if (now === this.#record[VIEW.generation]) return this.#record[word]!;
    throw new KvError(
      "stale_view",
      `Cannot read a view of layer ${this.#layer} as its rows have changed since: views() makes new ones`,
    );
  }
}
