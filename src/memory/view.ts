/**
 * Windows on rows in place: the objects that `views` and `append` hand out, the same for every kind of cache.
 *
 * A window keeps the record that native code filled and asks, at each property read, whether its rows are still the ones
 * the record tells of. Where the bytes are, and what array is made over them, is the business of its source.
 *
 * @module
 */

import type { AppendResult, Tier, View } from "../cache.ts";
import { KvError } from "../error.ts";
import { fieldsOf, type FieldWords, nameOf } from "../ffi/record.ts";
import { type DType, dtypeOf } from "../options/dtype.ts";

/** Keys or values. */
export type Side = "k" | "v";

/** What a window shows of one side: floats, their bits, or the bytes of a quantized block. */
export type SideArray = Float32Array | Uint16Array | Uint8Array;

/** Where a ViewRecord has what. */
export const VIEW: FieldWords<"view"> = fieldsOf("view");

/** One sequence, as windows see it. */
export interface ViewSource {
  /** A number that changes whenever a view of the layer goes stale; negative once there is no such sequence. */
  generation(layer: number): number;
  /** The array over one side of a window; the record must be known to be true still. */
  array(layer: number, side: Side, record: Uint32Array): SideArray;
  /** The records of the windows on rows `start` to before `start + length` of a layer. */
  windows(layer: number, start: number, length: number): Uint32Array[];
}

/** One word of a record, if the rows are still those it tells of. */
export function freshWord(source: ViewSource, layer: number, record: Uint32Array, word: number): number {
  checkFresh(source, layer, record[VIEW.generation]!);
  return record[word]!;
}

function checkFresh(source: ViewSource, layer: number, generation: number): void {
  if (source.generation(layer) === generation) return;
  throw new KvError(
    "stale_view",
    `Cannot read a view of layer ${layer} as its rows have changed since: views() makes new ones`,
  );
}

/** Views of `records`. A missing permission shows here, where views are asked for, and not at some later read. */
export function viewsOf(source: ViewSource, layer: number, records: Uint32Array[]): View[] {
  const views = records.map((record) => new RowsView(source, layer, record));
  views[0]?.k;
  return views;
}

/** What append gives back: where the rows went, and on demand views of them. */
export class Appended implements AppendResult {
  readonly start: number;
  readonly #source: ViewSource;
  readonly #layer: number;
  readonly #length: number;
  readonly #generation: number;
  #views: View[] | undefined;

  /** `generation` is the layer's right after the append, so that views asked for after a later one are stale. */
  constructor(source: ViewSource, layer: number, start: number, length: number, generation: number) {
    this.#source = source;
    this.#layer = layer;
    this.start = start;
    this.#length = length;
    this.#generation = generation;
  }

  get views(): View[] {
    if (this.#views !== undefined) return this.#views;
    if (this.#length === 0) return this.#views = [];
    checkFresh(this.#source, this.#layer, this.#generation);
    const records = this.#source.windows(this.#layer, this.start, this.#length);
    return this.#views = viewsOf(this.#source, this.#layer, records);
  }
}

class RowsView implements View {
  readonly #source: ViewSource;
  readonly #layer: number;
  readonly #record: Uint32Array;

  constructor(source: ViewSource, layer: number, record: Uint32Array) {
    this.#source = source;
    this.#layer = layer;
    this.#record = record;
  }

  get k(): SideArray {
    return this.#rows("k");
  }

  get v(): SideArray {
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

  get tier(): Tier {
    return nameOf("tier", this.#word(VIEW.tier));
  }

  get delta(): number {
    return this.#word(VIEW.delta) | 0;
  }

  #rows(side: Side): SideArray {
    this.#word(VIEW.start);
    return this.#source.array(this.#layer, side, this.#record);
  }

  #word(word: number): number {
    return freshWord(this.#source, this.#layer, this.#record, word);
  }
}
