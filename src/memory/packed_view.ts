/**
 * Whole blocks in place, head-major: what a kernel of one's own wants to read.
 *
 * @module
 */

import type { PackedView } from "../cache.ts";
import { type FloatDType, floatDtypeOf } from "../options/dtype.ts";
import type { SequenceMemory } from "./sequence.ts";
import { freshWord, type Side, VIEW } from "./view.ts";

/** Views of the blocks of a layer: of all of them, or `null` where one is no floats. */
export function packedViewsOf(memory: SequenceMemory, layer: number): PackedView[] | null {
  const records = memory.windows(layer, 0);
  if (records.some((record) => record[VIEW.bytesK] !== 0 || record[VIEW.bytesV] !== 0)) return null;
  const views = records.map((record) => new BlockView(memory, layer, record));
  views[0]?.k; // a missing permission shows here
  return views;
}

/** One block; each property read asks whether its rows are still the ones it was made for. */
class BlockView implements PackedView {
  readonly #memory: SequenceMemory;
  readonly #layer: number;
  readonly #record: Uint32Array;

  constructor(memory: SequenceMemory, layer: number, record: Uint32Array) {
    this.#memory = memory;
    this.#layer = layer;
    this.#record = record;
  }

  get k(): Float32Array | Uint16Array {
    return this.#side("k");
  }

  get v(): Float32Array | Uint16Array {
    return this.#side("v");
  }

  get start(): number {
    return this.#word(VIEW.start);
  }

  get length(): number {
    return this.#word(VIEW.length);
  }

  get blockSize(): number {
    return this.#word(VIEW.blockSize);
  }

  get headDim(): number {
    this.#word(VIEW.blockSize);
    return this.#memory.cache.shapeOf(this.#layer).headDim;
  }

  get kvHeadCount(): number {
    this.#word(VIEW.blockSize);
    return this.#memory.cache.shapeOf(this.#layer).kvHeadCount;
  }

  get dtype(): FloatDType {
    return floatDtypeOf(this.#word(VIEW.dtypeK));
  }

  get dtypeV(): FloatDType {
    return floatDtypeOf(this.#word(VIEW.dtypeV));
  }

  #side(side: Side): Float32Array | Uint16Array {
    this.#word(VIEW.start);
    return this.#memory.block(this.#layer, side, this.#record);
  }

  #word(word: number): number {
    return freshWord(this.#memory, this.#layer, this.#record, word);
  }
}
