/**
 * The native sequence behind a `Sequence`, and the arrays over its blocks.
 *
 * A block's side, keys or values of one layer, is `[kv_head][token][head_dim]` and gets one ArrayBuffer when it is first
 * looked at; every array handed out lies on such a buffer. Blocks are given back while the sequence lives, and their
 * memory may then be unmapped. So whatever may let a block go runs inside `change`, which detaches the buffers over the
 * blocks the sequence no longer has before any other code runs. A call that is refused lets nothing go.
 *
 * A buffer that is alive keeps this object alive, and with it the sequence and its cache.
 *
 * @module
 */

import { KvError } from "./error.ts";
import { adapter } from "./ffi/library.ts";
import { RECORD_WORDS, uint64At, VIEW } from "./ffi/record.ts";
import { refusal } from "./ffi/status.ts";
import type { PagedMemory, Resident, SequenceToken } from "./paged_memory.ts";
import { elementBytes, rowsOver } from "./rows.ts";
import { detach, isDetached } from "./typed_array.ts";
import type { Side, ViewSource } from "./view.ts";

/** Which sequence an ArrayBuffer lies on: an array alone keeps it. */
const owners = new WeakMap<ArrayBuffer, SequenceMemory>();

/** The buffers over one block of one layer. */
interface BlockArrays {
  readonly layer: number;
  readonly entry: number;
  k?: ArrayBuffer;
  v?: ArrayBuffer;
}

/** Block tables of the layers that have arrays, as they were before a change. */
type Tables = Map<number, Int32Array>;

const NO_TABLES: Tables = new Map();

/** One native sequence. */
export class SequenceMemory implements ViewSource, Resident {
  readonly cache: PagedMemory;
  readonly #token: SequenceToken;
  readonly #arrays: Map<string, BlockArrays> = new Map();
  /** Was it ever forked or reordered? Then an append may put a copy in the place of a block. */
  #mayShare: boolean;

  /** Takes over the native sequence of `handle`. */
  constructor(cache: PagedMemory, handle: number, mayShare: boolean) {
    this.cache = cache;
    this.#mayShare = mayShare;
    this.#token = cache.enter(this, handle);
  }

  /** The handle every call takes; 0, which is never valid, once this was freed. */
  get handle(): number {
    return this.#token.handle;
  }

  /** May an append let a block go? */
  get mayShare(): boolean {
    return this.#mayShare;
  }

  /** Its blocks are shared with others from now on. */
  share(): void {
    this.#mayShare = true;
  }

  /** Committed and pending rows of a layer, evicted ones included, or a negative status. */
  rowCount(layer: number): number {
    return this.cache.library.kv_sequence_row_count(this.handle, layer);
  }

  generation(layer: number): number {
    return this.cache.library.kv_sequence_generation(this.handle, layer);
  }

  /** The array over a window: from its first row to the last element of its last head. */
  array(layer: number, side: Side, record: Uint32Array): Float32Array | Uint16Array {
    const { kvHeadCount, headDim } = this.cache.shapeOf(layer);
    const offset = record[VIEW.start]! % record[VIEW.blockSize]! * headDim;
    const length = (kvHeadCount - 1) * record[VIEW.headStride]! + record[VIEW.length]! * headDim;
    return rowsOver(this.#side(layer, side, record), this.cache.dtype[side], offset, length);
  }

  /** The whole side of a block: `[kv_head][block_size][head_dim]`. */
  block(layer: number, side: Side, record: Uint32Array): Float32Array | Uint16Array {
    const length = this.cache.kvDimOf(layer) * this.cache.blockSize;
    return rowsOver(this.#side(layer, side, record), this.cache.dtype[side], 0, length);
  }

  /** The first `length` rows of a block whose rows lie token-major. */
  run(layer: number, side: Side, record: Uint32Array, length: number): Float32Array | Uint16Array {
    const elements = this.cache.kvDimOf(layer) * length;
    if (elements === 0) return rowsOver(new ArrayBuffer(0), this.cache.dtype[side], 0, 0);
    return rowsOver(this.#side(layer, side, record), this.cache.dtype[side], 0, elements);
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
    what: "kv_sequence_block_table" | "kv_sequence_block_references" = "kv_sequence_block_table",
  ): Int32Array {
    const { library, blockSize } = this.cache;
    const rows = Math.max(0, this.rowCount(layer)); // a refusal comes again below
    const entries = new Int32Array(new ArrayBuffer(Math.ceil(rows / blockSize) * 4));
    const count = library[what](this.handle, layer, entries, entries.length);
    if (count < 0) throw refusal(count, `read the blocks of layer ${layer}`, this.cache.layerRules(layer));
    return entries;
  }

  /** Runs a native call that may let blocks go, and detaches the arrays over those that went. */
  change(call: () => number): number {
    const before = this.before();
    const status = call();
    if (status >= 0) this.after(before);
    return status;
  }

  /** What `after` compares with; for a call on several sequences at once. */
  before(): Tables {
    if (this.#arrays.size === 0) return NO_TABLES;
    const layers = new Set([...this.#arrays.values()].map(({ layer }) => layer));
    return new Map([...layers].map((layer) => [layer, this.blocks(layer)]));
  }

  /** Detaches the arrays over blocks that were this sequence's before and are no more. */
  after(before: Tables): void {
    if (before.size === 0) return;
    const now = new Map([...before.keys()].map((layer) => [layer, this.blocks(layer)]));
    for (const [key, { layer, entry, k, v }] of this.#arrays) {
      if (now.get(layer)![entry] === before.get(layer)![entry]) continue;
      if (k !== undefined) detach(k);
      if (v !== undefined) detach(v);
      this.#arrays.delete(key);
    }
  }

  detach(): void {
    for (const { k, v } of this.#arrays.values()) {
      if (k !== undefined) detach(k);
      if (v !== undefined) detach(v);
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

  /** The buffer over one side of the block a window is in. */
  #side(layer: number, side: Side, record: Uint32Array): ArrayBuffer {
    const entry = Math.floor(record[VIEW.start]! / this.cache.blockSize);
    const key = `${layer}:${entry}`;
    const arrays: BlockArrays = this.#arrays.get(key) ?? { layer, entry };
    const known = arrays[side];
    if (known !== undefined && !isDetached(known)) return known;
    if (!this.cache.owned) {
      throw new KvError(
        "unsupported",
        "Cannot make an array over native memory as the cache is attached and its owner could not detach it: " +
          "use gather() or attend()",
      );
    }
    const { kvHeadCount, headDim } = this.cache.shapeOf(layer);
    const bytes = elementBytes(this.cache.dtype[side]);
    const rowsBefore = record[VIEW.start]! % this.cache.blockSize;
    const address = uint64At(record, side === "k" ? VIEW.keys : VIEW.values) - rowsBefore * headDim * bytes;
    const length = kvHeadCount * this.cache.blockSize * headDim * bytes;
    const buffer = adapter.view(address % 2 ** 32, Math.floor(address / 2 ** 32), length);
    owners.set(buffer, this);
    arrays[side] = buffer;
    this.#arrays.set(key, arrays);
    return buffer;
  }
}

/** An empty native sequence of `cache`. */
export function newSequence(cache: PagedMemory): SequenceMemory {
  const handle = cache.library.kv_sequence_create(cache.handle);
  if (handle < 0) throw refusal(handle, "create a sequence", HANDLE_RULES);
  return new SequenceMemory(cache, handle, false);
}

/** A native sequence that shares the committed rows of `parent`. */
export function forkSequence(parent: SequenceMemory): SequenceMemory {
  const handle = parent.cache.library.kv_sequence_fork(parent.handle);
  if (handle < 0) throw refusal(handle, "fork a sequence", HANDLE_RULES);
  parent.share();
  return new SequenceMemory(parent.cache, handle, true);
}

const HANDLE_RULES = {
  out_of_memory: () => "the system refused memory, or the process has 65535 caches, pools and sequences",
};
