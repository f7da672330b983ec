/**
 * The native sequence behind a `Sequence`, of either layout, and the arrays over its blocks.
 *
 * A block's side, keys or values of one layer, is `[kv_head][token][head_dim]` or codes, and gets one ArrayBuffer when it
 * is first looked at; every array handed out lies on such a buffer. Blocks are given back while the sequence lives, and
 * their memory may then be unmapped. So whatever may hide a block or let it go is followed by `settle`, which detaches the
 * buffers over the blocks the sequence no longer shows before any other code runs. A call that is refused lets nothing go.
 *
 * Which block an array is over is told by its address. No call gives a block back before the one that takes its place in
 * the table is there, so within a call an entry never gets another block at the same address.
 *
 * In a contiguous cache all positions of a layer are one block, `[token][kv_head][head_dim]`, which stays as long as the
 * cache does; its arrays are detached when the sequence is freed. Where no ArrayBuffer can be as large as that block, one
 * over as much as is needed takes its place, and earlier ones are kept to be detached.
 *
 * A buffer that is alive keeps this object alive, and with it the sequence and its cache.
 *
 * @module
 */

import { KvError } from "../error.ts";
import { library } from "../ffi/library.ts";
import { newRecord, newRecords, recordAt, uint64At, uint64Words } from "../ffi/record.ts";
import { adapter } from "../ffi/runtime.ts";
import { refusal, unknownHandle } from "../ffi/status.ts";
import { type FloatDType, floatDtypeOf } from "../options/dtype.ts";
import { type Prompt, promptWords } from "../options/prompt.ts";
import type { Seen } from "../options/retention.ts";
import { elementBytes, rowsOver } from "../options/rows.ts";
import { byteLengthOf, detach, isDetached } from "../options/typed_array.ts";
import type { CacheMemory, IndexRules, Resident, SequenceToken } from "./cache.ts";
import { attachPaged, PagedMemory } from "./paged.ts";
import { type Side, type SideArray, VIEW, type ViewSource } from "./view.ts";

/** Which sequence an ArrayBuffer lies on: an array alone keeps it. */
const owners = new WeakMap<ArrayBuffer, SequenceMemory>();

/** The buffers over one block of one layer. */
interface BlockArrays {
  /** Where the block's keys are. */
  readonly address: number;
  /** The last one is in use; earlier ones may still lie under a caller's array. */
  k: readonly ArrayBuffer[];
  v: readonly ArrayBuffer[];
}

/** The buffers over the blocks of one layer. */
interface LayerArrays {
  /** The layer's, when its blocks were last known to be those below. */
  generation: number;
  /** The blocks by entry of the block table. */
  readonly blocks: Map<number, BlockArrays>;
}

/** Where a ViewRecord tells of each side. */
const SIDE_WORDS = {
  k: { address: VIEW.keys, dtype: VIEW.dtypeK, bytes: VIEW.bytesK },
  v: { address: VIEW.values, dtype: VIEW.dtypeV, bytes: VIEW.bytesV },
} as const;

/** One native sequence. */
export class SequenceMemory implements ViewSource, Resident {
  readonly cache: CacheMemory;
  /** True if the sequence is another's, opened by its handle: it is read and forked here, and no more. */
  readonly isAttached: boolean;
  readonly #token: SequenceToken;
  /** The arrays by layer; absent before the first. */
  #arrays: Map<number, LayerArrays> | undefined;

  /** Takes over the native sequence of a token, or attaches it. */
  constructor(cache: CacheMemory, token: SequenceToken, isAttached = false) {
    this.cache = cache;
    this.isAttached = isAttached;
    this.#token = token;
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

  /** The index every call takes behind the handle. */
  get index(): number {
    return this.#token.index;
  }

  /** Is there any array over its blocks? */
  get hasArrays(): boolean {
    return this.#arrays !== undefined && this.#arrays.size > 0;
  }

  /** Committed and pending rows of a layer, evicted ones included, or a negative status. */
  rowCount(layer: number): number {
    return this.cache.library.kv_sequence_row_count(this.handle, this.index, layer);
  }

  /** Rows of a layer that are seen, committed and pending, or a negative status. */
  residentCount(layer: number): number {
    return this.cache.library.kv_sequence_resident_count(this.handle, this.index, layer);
  }

  /** Which rows of a layer are seen. */
  seen(layer: number): Seen {
    const { retentionSinkTokens } = this.cache;
    const rowCount = this.rowCount(layer);
    const hidden = rowCount - this.residentCount(layer);
    const sinkEnd = hidden === 0 ? 0 : retentionSinkTokens;
    return { rowCount, sinkEnd, first: sinkEnd + hidden };
  }

  /** The rules about indices and about what was freed. */
  rules(layer: number): IndexRules {
    return this.cache.indexRules(layer, this.index);
  }

  generation(layer: number): number {
    return this.cache.library.kv_sequence_generation(this.handle, this.index, layer);
  }

  /** The array over a window: from its first row to the last element of its last head, or the whole side of a block. */
  array(layer: number, side: Side, record: Uint32Array): SideArray {
    if (record[SIDE_WORDS[side].bytes] !== 0) return new Uint8Array(this.#side(layer, side, record, 0));
    const tokenStride = record[VIEW.tokenStride]!, headStride = record[VIEW.headStride]!;
    if (headStride === 0) return this.block(layer, side, record);
    const { kvHeadCount, headDim } = this.cache.shapeOf(layer);
    const first = record[VIEW.start]! % this.cache.blockSize * tokenStride;
    const length = (kvHeadCount - 1) * headStride + (record[VIEW.length]! - 1) * tokenStride + headDim;
    return this.#floats(layer, side, record, first, length);
  }

  /** The whole side of a block in floats: `[kv_head][block_size][head_dim]`. */
  block(layer: number, side: Side, record: Uint32Array): Float32Array | Uint16Array {
    return this.#floats(layer, side, record, 0, this.cache.kvDimOf(layer) * this.cache.blockSize);
  }

  /** The first `length` rows of a block whose rows lie token-major. */
  run(layer: number, side: Side, record: Uint32Array, length: number): Float32Array | Uint16Array {
    const elements = this.cache.kvDimOf(layer) * length;
    // No block is behind no rows of a paged cache.
    if (elements === 0 && this.cache.isPaged) return rowsOver(new ArrayBuffer(0), this.cache.dtype[side], 0, 0);
    return this.#floats(layer, side, record, 0, elements);
  }

  /** All rows of a layer of a contiguous cache. */
  allRows(layer: number, side: Side): Float32Array | Uint16Array {
    const rows = this.rowCount(layer);
    const action = `read layer ${layer}`;
    if (rows < 0) throw refusal(rows, action, this.rules(layer));
    const record = newRecord("view");
    const length = this.contiguousKv(layer, rows, record);
    if (length < 0) throw refusal(length, action, this.rules(layer));
    return this.run(layer, side, record, length);
  }

  /** Looks for the first `rowCount` rows in one piece; gives their number, or a negative status. */
  contiguousKv(layer: number, rowCount: number, record: Uint32Array): number {
    const { library } = this.cache;
    return library.kv_sequence_contiguous_kv(this.handle, this.index, layer, rowCount, record, record.byteLength);
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
    if (count < 0) throw refusal(count, `read the blocks of layer ${layer}`, this.rules(layer));
    return entries;
  }

  /**
   * Detaches the arrays over blocks of which this sequence shows nothing any more, after a call that let none go before
   * that of row `first`.
   */
  settle(first: number = 0): void {
    if (this.#arrays === undefined || !this.cache.isPaged) return;
    for (const [layer, arrays] of this.#arrays) {
      const generation = this.generation(layer);
      if (generation === arrays.generation) continue; // its blocks are what they were
      arrays.generation = generation;
      const entryFirst = Math.floor(first / this.cache.blockSize);
      const records = this.#records(layer, entryFirst * this.cache.blockSize);
      const addresses = new Map(records.map((record) => [this.#entry(record), this.#address(layer, "k", record)]));
      for (const [entry, block] of arrays.blocks) {
        if (entry < entryFirst || addresses.get(entry) === block.address) continue;
        detachBlock(block);
        arrays.blocks.delete(entry);
      }
      if (arrays.blocks.size === 0) this.#arrays.delete(layer);
    }
  }

  detach(): void {
    for (const { blocks } of this.#arrays?.values() ?? []) blocks.forEach(detachBlock);
    this.#arrays = undefined;
  }

  /** Detaches all arrays and frees the native sequence; harmless when repeated. */
  free(): void {
    this.cache.leave(this, this.#token);
  }

  /** The records of all windows from row `start` on. */
  #records(layer: number, start: number): Uint32Array[] {
    const { library } = this.cache;
    // Most often one block or a few: asked for at once, and again where there are more.
    let room = 4;
    while (true) {
      const all = newRecords("view", room);
      const count = library.kv_sequence_views(this.handle, this.index, layer, start, 0, all, all.byteLength);
      if (count < 0) throw refusal(count, `view layer ${layer}`, this.rules(layer));
      if (count <= room) return Array.from({ length: count }, (_, i) => recordAt("view", all, i).slice());
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
    return address - rowsBefore * this.cache.tokenStrideOf(layer) * elementBytes(floatDtype(side, record));
  }

  /** Elements of a side in floats, from number `first` of its block on. */
  #floats(layer: number, side: Side, record: Uint32Array, first: number, length: number): Float32Array | Uint16Array {
    const dtype = floatDtype(side, record);
    return rowsOver(this.#side(layer, side, record, (first + length) * elementBytes(dtype)), dtype, first, length);
  }

  /** The buffer over one side of the block a window is in, with at least `bytes` bytes. */
  #side(layer: number, side: Side, record: Uint32Array, bytes: number): ArrayBuffer {
    const layerArrays = this.#arrays?.get(layer) ?? { generation: record[VIEW.generation]!, blocks: new Map() };
    const entry = this.#entry(record);
    const arrays: BlockArrays = layerArrays.blocks.get(entry) ??
      { address: this.#address(layer, "k", record), k: [], v: [] };
    const attached = arrays[side].filter((buffer) => !isDetached(buffer));
    const known = attached.at(-1);
    // Both conditions matter: an array without rows needs a buffer, too.
    if (known !== undefined && byteLengthOf(known) >= bytes) return known;
    const action = "make an array over native memory";
    if (!this.cache.owned) {
      throw new KvError(
        "unsupported",
        `Cannot ${action} as the cache is attached and its owner could not detach it: use gather() or attend()`,
      );
    }
    const elements = this.cache.kvDimOf(layer) * this.cache.blockSize;
    const blockBytes = record[SIDE_WORDS[side].bytes]! || elements * elementBytes(floatDtype(side, record));
    // All of it where the runtime can, so that one buffer serves the block's whole life.
    const length = blockBytes <= adapter.viewBytesMax ? blockBytes : bytes;
    if (length > adapter.viewBytesMax) {
      const max = adapter.viewBytesMax;
      throw new KvError("unsupported", `Cannot ${action} as an ArrayBuffer has at most ${max} bytes here: ${bytes}`);
    }
    const buffer = length === 0
      ? new ArrayBuffer(0)
      : adapter.view(...uint64Words(this.#address(layer, side, record)), length);
    owners.set(buffer, this);
    arrays[side] = [...attached, buffer];
    layerArrays.blocks.set(entry, arrays);
    this.#arrays ??= new Map();
    this.#arrays.set(layer, layerArrays);
    return buffer;
  }
}

function detachBlock({ k, v }: BlockArrays): void {
  k.forEach(detach);
  v.forEach(detach);
}

/** How a side is stored that is known to be in floats. */
function floatDtype(side: Side, record: Uint32Array): FloatDType {
  return floatDtypeOf(record[SIDE_WORDS[side].dtype]!);
}

/** An empty native sequence of `cache`. */
export function newSequence(cache: PagedMemory): SequenceMemory {
  const handle = cache.library.kv_sequence_create(cache.handle);
  if (handle < 0) throw refusal(handle, "create a sequence", { ...HANDLE_RULES, ...cache.freedRule });
  return enter(cache, handle);
}

/** A native sequence of `cache` that starts with what is there of a prompt. */
export function newSequenceFor(cache: PagedMemory, prompt: Prompt): SequenceMemory {
  const handle = cache.library.kv_sequence_create_for(cache.handle, ...promptWords(prompt));
  if (handle < 0) throw refusal(handle, "create a sequence", { ...HANDLE_RULES, ...cache.promptRules(prompt.tokens) });
  return enter(cache, handle);
}

/** The native sequence of `handle`, of whoever made it. */
export function attachSequence(handle: number): SequenceMemory {
  const cache = library().kv_sequence_cache(handle);
  if (cache < 0) throw refusal(cache, `attach the sequence of handle ${handle}`, unknownHandle("sequence"));
  return new SequenceMemory(attachPaged(cache), { handle, index: 0 }, true);
}

/** A native sequence of `cache` that shares the committed rows of `parent`. */
export function forkSequence(cache: PagedMemory, parent: SequenceMemory): SequenceMemory {
  const handle = cache.library.kv_sequence_fork(parent.handle);
  if (handle < 0) throw refusal(handle, "fork a sequence", { ...HANDLE_RULES, ...cache.freedRule });
  return enter(cache, handle);
}

function enter(cache: PagedMemory, handle: number): SequenceMemory {
  const token = { handle, index: 0 };
  const memory = new SequenceMemory(cache, token);
  cache.enter(memory, token);
  return memory;
}

const HANDLE_RULES = {
  out_of_memory: () => "the system refused memory, or the process has 65535 caches, pools and sequences",
};

/** A native sequence of a paged cache. */
export type PagedSequence = SequenceMemory & { readonly cache: PagedMemory };

/** Does it live in a paged cache? */
export function isPaged(memory: SequenceMemory): memory is PagedSequence {
  return memory.cache instanceof PagedMemory;
}
