/**
 * The native sequence behind a `Sequence`, and the arrays over its blocks.
 *
 * A block's side, keys or values of one layer, is `[kv_head][token][head_dim]` or codes, and gets one ArrayBuffer when it
 * is first looked at; every array handed out lies on such a buffer. Blocks are given back while the sequence lives, and
 * their memory may then be unmapped. So whatever may hide a block or let it go is followed by `settle`, which detaches the
 * buffers over the blocks the sequence no longer shows before any other code runs. A call that is refused lets nothing go.
 *
 * Which block an array is over is told by its address. No call gives a block back before the one that takes its place in
 * the table is there, so within a call an entry never gets another block at the same address.
 *
 * A buffer that is alive keeps this object alive, and with it the sequence and its cache.
 *
 * @module
 */

import { KvError } from "../error.ts";
import { library } from "../ffi/library.ts";
import { RECORD_WORDS, uint64At, VIEW } from "../ffi/record.ts";
import { adapter } from "../ffi/runtime.ts";
import { refusal, unknownHandle } from "../ffi/status.ts";
import { type FloatDType, floatDtypeOf } from "../options/dtype.ts";
import type { Seen } from "../options/retention.ts";
import { elementBytes, rowsOver } from "../options/rows.ts";
import { detach, isDetached } from "../options/typed_array.ts";
import { attachPaged, PagedMemory, type Resident, type SequenceToken } from "./paged.ts";
import type { Side, SideArray, ViewSource } from "./view.ts";

/** Which sequence an ArrayBuffer lies on: an array alone keeps it. */
const owners = new WeakMap<ArrayBuffer, SequenceMemory>();

/** The buffers over one block of one layer. */
interface BlockArrays {
  /** Where the block's keys are. */
  readonly address: number;
  k?: ArrayBuffer;
  v?: ArrayBuffer;
}

/** The buffers over the blocks of one layer. */
interface LayerArrays {
  /** The layer's, when its blocks were last known to be those below. */
  generation: number;
  /** By entry of the block table. */
  readonly blocks: Map<number, BlockArrays>;
}

/** Words of a ViewRecord about each side. */
const SIDE_WORDS = {
  k: { address: VIEW.keys, dtype: VIEW.dtypeK, bytes: VIEW.bytesK },
  v: { address: VIEW.values, dtype: VIEW.dtypeV, bytes: VIEW.bytesV },
} as const;

/** One native sequence. */
export class SequenceMemory implements ViewSource, Resident {
  readonly cache: PagedMemory;
  /** True if the sequence is another's, opened by its handle: it is read and forked here, and no more. */
  readonly isAttached: boolean;
  readonly #token: SequenceToken;
  /** By layer. */
  readonly #arrays: Map<number, LayerArrays> = new Map();

  /** Takes over the native sequence of `handle`, or attaches it. */
  constructor(cache: PagedMemory, handle: number, isAttached = false) {
    this.cache = cache;
    this.isAttached = isAttached;
    this.#token = isAttached ? { handle } : cache.enter(this, handle);
  }

  /** Refuses what only the owner of a sequence may do. */
  checkOwn(action: string): void {
    if (!this.isAttached) return;
    throw new KvError(
      "unsupported",
      `Cannot ${action} as the sequence is attached, and its owner alone changes it: fork() it for one of your own`,
    );
  }

  /** The handle every call takes; 0, which is never valid, once this was freed. */
  get handle(): number {
    return this.#token.handle;
  }

  /** Is there any array over its blocks? */
  get hasArrays(): boolean {
    return this.#arrays.size > 0;
  }

  /** Committed and pending rows of a layer, evicted ones included, or a negative status. */
  rowCount(layer: number): number {
    return this.cache.library.kv_sequence_row_count(this.handle, layer);
  }

  /** Which rows of a layer are seen. */
  seen(layer: number): Seen {
    const { library, retentionSinkTokens } = this.cache;
    const rowCount = this.rowCount(layer);
    const hidden = rowCount - library.kv_sequence_resident_count(this.handle, layer);
    const sinkEnd = hidden === 0 ? 0 : retentionSinkTokens;
    return { rowCount, sinkEnd, first: sinkEnd + hidden };
  }

  generation(layer: number): number {
    return this.cache.library.kv_sequence_generation(this.handle, layer);
  }

  /** The array over a window: from its first row to the last element of its last head, or the whole side of a block. */
  array(layer: number, side: Side, record: Uint32Array): SideArray {
    const buffer = this.#side(layer, side, record);
    if (record[SIDE_WORDS[side].bytes] !== 0) return new Uint8Array(buffer);
    if (record[VIEW.headStride] === 0) return this.block(layer, side, record);
    const { kvHeadCount, headDim } = this.cache.shapeOf(layer);
    const offset = record[VIEW.start]! % record[VIEW.blockSize]! * headDim;
    const length = (kvHeadCount - 1) * record[VIEW.headStride]! + record[VIEW.length]! * headDim;
    return rowsOver(buffer, floatDtype(side, record), offset, length);
  }

  /** The whole side of a block in floats: `[kv_head][block_size][head_dim]`. */
  block(layer: number, side: Side, record: Uint32Array): Float32Array | Uint16Array {
    const length = this.cache.kvDimOf(layer) * this.cache.blockSize;
    return rowsOver(this.#side(layer, side, record), floatDtype(side, record), 0, length);
  }

  /** The first `length` rows of a block whose rows lie token-major. */
  run(layer: number, side: Side, record: Uint32Array, length: number): Float32Array | Uint16Array {
    const elements = this.cache.kvDimOf(layer) * length;
    if (elements === 0) return rowsOver(new ArrayBuffer(0), this.cache.dtype[side], 0, 0);
    return rowsOver(this.#side(layer, side, record), floatDtype(side, record), 0, elements);
  }

  windows(layer: number, start: number, length: number = Infinity): Uint32Array[] {
    const records = this.#records(layer, start);
    const end = start + length;
    const inside = records.filter((record) => record[VIEW.start]! < end);
    const last = inside.at(-1);
    if (last !== undefined) last[VIEW.length] = Math.min(last[VIEW.length]!, end - last[VIEW.start]!);
    return inside;
  }

  /** The block table of a layer, or `what` else native code says of each of its blocks. */
  blocks(
    layer: number,
    what: "kv_sequence_block_table" | "kv_sequence_block_references" | "kv_sequence_block_tiers",
  ): Int32Array {
    const { library, blockSize } = this.cache;
    const rows = Math.max(0, this.rowCount(layer)); // a refusal comes again below
    const entries = new Int32Array(new ArrayBuffer(Math.ceil(rows / blockSize) * 4));
    const count = library[what](this.handle, layer, entries, entries.length);
    if (count < 0) throw refusal(count, `read the blocks of layer ${layer}`, this.cache.layerRules(layer));
    return entries;
  }

  /**
   * Detaches the arrays over blocks of which this sequence shows nothing any more, after a call that let none go before
   * that of row `first`.
   */
  settle(first: number = 0): void {
    for (const [layer, arrays] of this.#arrays) {
      const generation = this.generation(layer);
      if (generation === arrays.generation) continue; // its blocks are what they were
      arrays.generation = generation;
      const entryFirst = Math.floor(first / this.cache.blockSize);
      const records = this.#records(layer, entryFirst * this.cache.blockSize);
      const addresses = new Map(records.map((record) => [this.#entry(record), this.#address(layer, "k", record)]));
      for (const [entry, { address, k, v }] of arrays.blocks) {
        if (entry < entryFirst || addresses.get(entry) === address) continue;
        if (k !== undefined) detach(k);
        if (v !== undefined) detach(v);
        arrays.blocks.delete(entry);
      }
      if (arrays.blocks.size === 0) this.#arrays.delete(layer);
    }
  }

  detach(): void {
    for (const { blocks } of this.#arrays.values()) {
      for (const { k, v } of blocks.values()) {
        if (k !== undefined) detach(k);
        if (v !== undefined) detach(v);
      }
    }
    this.#arrays.clear();
  }

  /** Detaches all arrays and frees the native sequence; harmless when repeated. */
  free(): void {
    this.cache.leave(this, this.#token);
  }

  /** The records of all windows from row `start` on. */
  #records(layer: number, start: number): Uint32Array[] {
    const { library } = this.cache;
    const words = RECORD_WORDS.view;
    // Most often one block or a few: asked for at once, and again where there are more.
    let room = 4;
    while (true) {
      const all = new Uint32Array(new ArrayBuffer(room * words * 4));
      all[0] = words * 4;
      const count = library.kv_sequence_views(this.handle, layer, start, 0, all, all.byteLength);
      if (count < 0) throw refusal(count, `view layer ${layer}`, this.cache.layerRules(layer));
      if (count <= room) return Array.from({ length: count }, (_, i) => all.slice(i * words, (i + 1) * words));
      room = count;
    }
  }

  /** The number of the block a window is in. */
  #entry(record: Uint32Array): number {
    return Math.floor(record[VIEW.start]! / this.cache.blockSize);
  }

  /** Where the side of the block a window is in begins: a window on floats begins at its first row. */
  #address(layer: number, side: Side, record: Uint32Array): number {
    const words = SIDE_WORDS[side];
    const address = uint64At(record, words.address);
    if (record[words.bytes] !== 0) return address;
    const rowsBefore = record[VIEW.start]! % this.cache.blockSize;
    return address - rowsBefore * this.cache.shapeOf(layer).headDim * elementBytes(floatDtype(side, record));
  }

  /** The buffer over one side of the block a window is in. */
  #side(layer: number, side: Side, record: Uint32Array): ArrayBuffer {
    const layerArrays = this.#arrays.get(layer) ?? { generation: record[VIEW.generation]!, blocks: new Map() };
    const entry = this.#entry(record);
    const arrays: BlockArrays = layerArrays.blocks.get(entry) ?? { address: this.#address(layer, "k", record) };
    const known = arrays[side];
    if (known !== undefined && !isDetached(known)) return known;
    if (!this.cache.owned) {
      throw new KvError(
        "unsupported",
        "Cannot make an array over native memory as the cache is attached and its owner could not detach it: " +
          "use gather() or attend()",
      );
    }
    const address = this.#address(layer, side, record);
    const elements = this.cache.kvDimOf(layer) * this.cache.blockSize;
    const length = record[SIDE_WORDS[side].bytes]! || elements * elementBytes(floatDtype(side, record));
    const buffer = adapter.view(address % 2 ** 32, Math.floor(address / 2 ** 32), length);
    owners.set(buffer, this);
    arrays[side] = buffer;
    layerArrays.blocks.set(entry, arrays);
    this.#arrays.set(layer, layerArrays);
    return buffer;
  }
}

/** How a side is stored that is known to be in floats. */
function floatDtype(side: Side, record: Uint32Array): FloatDType {
  return floatDtypeOf(record[SIDE_WORDS[side].dtype]!);
}

/** An empty native sequence of `cache`. */
export function newSequence(cache: PagedMemory): SequenceMemory {
  const handle = cache.library.kv_sequence_create(cache.handle);
  if (handle < 0) throw refusal(handle, "create a sequence", { ...HANDLE_RULES, ...cache.freedRule });
  return new SequenceMemory(cache, handle);
}

/** The native sequence of `handle`, of whoever made it. */
export function attachSequence(handle: number): SequenceMemory {
  const native = library();
  const cache = native.kv_sequence_cache(handle);
  if (cache < 0) throw refusal(cache, `attach the sequence of handle ${handle}`, unknownHandle("sequence"));
  return new SequenceMemory(attachPaged(cache), handle, true);
}

/** A native sequence that shares the committed rows of `parent`. */
export function forkSequence(parent: SequenceMemory): SequenceMemory {
  const handle = parent.cache.library.kv_sequence_fork(parent.handle);
  if (handle < 0) throw refusal(handle, "fork a sequence", { ...HANDLE_RULES, ...parent.cache.freedRule });
  return new SequenceMemory(parent.cache, handle);
}

const HANDLE_RULES = {
  out_of_memory: () => "the system refused memory, or the process has 65535 caches, pools and sequences",
};
