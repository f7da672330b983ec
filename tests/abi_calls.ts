/**
 * What the words of each export mean: enough to call every one of them well, and to call it badly on purpose.
 *
 * A row has a name for each parameter, in order. `@kind` is a handle of that kind. `name:4` is a buffer whose elements
 * have at most 4 bytes; `count` is the element count of the buffer before it, or of all buffers since the last count. The
 * ABI is told how long a buffer is and cannot check it, so whoever calls it badly must still never say more than there is.
 */

import { EXPORTS, type Library } from "../src/ffi/exports.ts";
import { library } from "../src/ffi/library.ts";

/** The name of an export. */
export type Name = keyof Library;

/** What crosses: a number, or a buffer. */
export type Word = number | ArrayBufferView;

/** All exports. */
export const names = Object.keys(EXPORTS) as Name[];

const ATTEND = "options:1 count slopes:4 count logits:4 count parents:4 count output:4 count lse:4 count";

const ROLES: Record<Name, string> = {
  kv_abi_version: "",
  kv_abi_manifest: "text:1 count",
  kv_system_info: "record:1 count",
  kv_level_set: "level",
  kv_max_bytes_set: "no_bytes",
  kv_reserved_mib: "",
  kv_thread_count_set: "threads",
  kv_read_rate: "bytes threads double:8 count",
  kv_memory_bytes: "geometry:1 count double:8 count",

  kv_rows_quantize: "format record_rows:4 count records:1 count",
  kv_rows_dequantize: "format records:1 count record_rows:4 count",
  kv_block_quantize: "format side block_size head_dim plane_rows:4 count plane:1 count",
  kv_block_dequantize: "format side block_size head_dim plane:1 count plane_rows:4 count",
  kv_block_pack: "format side block_size head_dim plane:1 count plane:1 count",
  kv_block_unpack: "format side block_size head_dim plane:1 count plane:1 count",

  kv_contiguous_create: "geometry:1 count",
  kv_contiguous_free: "@contiguous",
  kv_contiguous_config: "@contiguous record:1 count",
  kv_contiguous_store: "@contiguous layer sequence row:4 count row:4 count dtype",
  kv_contiguous_append: "@contiguous layer sequence row:4 count row:4 count dtype layout",
  kv_contiguous_advance: "@contiguous",
  kv_contiguous_reset: "@contiguous",
  kv_contiguous_commit: "@contiguous sequence tokens",
  kv_contiguous_truncate: "@contiguous sequence tokens",
  kv_contiguous_seq_len: "@contiguous sequence",
  kv_contiguous_row_count: "@contiguous layer sequence",
  kv_contiguous_generation: "@contiguous layer sequence",
  kv_contiguous_memory_bytes: "@contiguous double:8 count",
  kv_contiguous_stats: "@contiguous record:1 count",
  kv_contiguous_offset: "@contiguous layer sequence position head dim double:8 count",
  kv_contiguous_keys: "@contiguous layer sequence record:1 count",
  kv_contiguous_values: "@contiguous layer sequence record:1 count",
  kv_contiguous_views: "@contiguous layer sequence record:1 count",
  kv_contiguous_contiguous_kv: "@contiguous layer sequence tokens record:1 count",
  kv_contiguous_gather: "@contiguous layer sequence copy:4 count copy:4 count dtype",
  kv_contiguous_layer_device: "@contiguous layer",
  kv_contiguous_attend: `@contiguous layer sequence q:4 count ${ATTEND}`,

  kv_pool_create: "pool_record:1 count",
  kv_pool_free: "@pool",
  kv_pool_prewarm: "@pool tokens dtype dtype",
  kv_pool_stats: "@pool dtype dtype record:1 count",

  kv_paged_create: "paged_record:1 count layers:4 count",
  kv_paged_free: "@paged",
  kv_paged_config: "@paged record:1 count layers:4 count",
  kv_paged_append: "@paged layer handles:4 numbers:4 count row:4 count row:4 count dtype layout",
  kv_paged_attend: `@paged layer handles:4 numbers:4 count q:4 count ${ATTEND}`,
  kv_paged_reorder: "@paged handles:4 numbers:4 count",
  kv_paged_reset: "@paged handles:4 count",
  kv_paged_update_policy: "@paged policy:1 count",
  kv_paged_fidelity: "@paged layer double:8 count",
  kv_paged_stats: "@paged record:1 count",
  kv_paged_pool_stats: "@paged layer dtype dtype record:1 count",

  kv_sequence_create: "@paged",
  kv_sequence_free: "@sequence",
  kv_sequence_cache: "@sequence",
  kv_sequence_fork: "@sequence",
  kv_sequence_append: "@sequence layer row:4 count row:4 count dtype layout",
  kv_sequence_commit: "@sequence tokens",
  kv_sequence_commit_kept: "@sequence numbers:4 count",
  kv_sequence_truncate: "@sequence tokens",
  kv_sequence_seq_len: "@sequence",
  kv_sequence_rewindable_to: "@sequence",
  kv_sequence_row_count: "@sequence layer",
  kv_sequence_resident_count: "@sequence layer",
  kv_sequence_generation: "@sequence layer",
  kv_sequence_views: "@sequence layer tokens tokens record:1 count",
  kv_sequence_contiguous_kv: "@sequence layer tokens record:1 count",
  kv_sequence_gather: "@sequence layer copy:4 count copy:4 count dtype",
  kv_sequence_layer_device: "@sequence layer",
  kv_sequence_block_table: "@sequence layer copy:4 count",
  kv_sequence_block_references: "@sequence layer copy:4 count",
  kv_sequence_block_tiers: "@sequence layer copy:4 count",
  kv_sequence_attend: `@sequence layer q:4 count ${ATTEND}`,

  kv_buffer_pool_create: "buffer_pool_record:1 count",
  kv_buffer_pool_free: "@buffer_pool",
  kv_buffer_pool_prewarm: "@buffer_pool class tokens",
  kv_buffer_pool_prewarm_all: "@buffer_pool tokens",
  kv_buffer_pool_clear: "@buffer_pool",
  kv_buffer_pool_stats: "@buffer_pool record:1 count",

  kv_buffer_acquire: "@buffer_pool bytes",
  kv_buffer_free: "@buffer",
  kv_buffer_clone: "@buffer",
  kv_buffer_info: "@buffer record:1 count",
  kv_buffer_length: "@buffer",
  kv_buffer_extend: "@buffer row:4 count",
  kv_buffer_clear: "@buffer",
};

/** The roles of an export's parameters. */
export function rolesOf(name: Name): string[] {
  return ROLES[name].split(" ").filter((role) => role !== "");
}

/** The largest element of a buffer role, in bytes. */
export function unitOf(role: string): number {
  return Number(role.split(":")[1]);
}

/** Any export with any arguments. */
export function call(name: Name, words: readonly unknown[]): number {
  return (library()[name] as (...words: unknown[]) => number)(...words);
}

/** The record, its size in front. */
function record(words: number[]): Uint32Array {
  return Uint32Array.from([words.length * 4 + 4, ...words]);
}

/** Geometry of the cache that the arguments below fit: 2 layers, 2 sequences, 2 heads of 4, room for 8 rows. */
export const GEOMETRY = [2, 2, 2, 4, 8, 0, 0, 0, 0] as const;

/** Arguments that succeed on a cache of that geometry whose sequence 1 has 3 rows, or any pool; fresh buffers each time. */
export function goodWords(name: Name, handle: number): Word[] {
  const good: Record<string, () => Word> = {
    "@contiguous": () => handle,
    "@pool": () => handle,
    "@buffer_pool": () => handle,
    "@buffer": () => handle,
    pool_record: () => record([2, 2, 32, 64, 1, 1, 0, 0]),
    buffer_pool_record: () => record([4, 0, 0]),
    class: () => 4096,
    bytes: () => 4096,
    layer: () => 1,
    sequence: () => 1,
    position: () => 2,
    head: () => 1,
    dim: () => 3,
    tokens: () => 0,
    dtype: () => 0,
    layout: () => 0,
    format: () => 3, // q8_0
    side: () => 1,
    block_size: () => 64,
    head_dim: () => 32,
    record_rows: () => Float32Array.from({ length: 64 }, (_, i) => i / 64),
    records: () => new Uint8Array(2 * 34).fill(1),
    plane_rows: () => Float32Array.from({ length: 64 * 32 }, (_, i) => i % 64 - 31),
    plane: () => new Uint8Array(64 * 34).fill(1),
    level: () => systemWords()[1]!,
    no_bytes: () => 0,
    threads: () => 1,
    text: () => new Uint8Array(library().kv_abi_manifest(new Uint8Array(0), 0)),
    record: () => record(new Array(31).fill(0)), // longer than any: a caller of a later version
    geometry: () => record([...GEOMETRY]),
    options: () => record([1, 1, 0, 0, 0, 0]),
    double: () => new Float64Array(1),
    row: () => Float32Array.from({ length: 8 }, (_, i) => i / 8 - 0.25),
    copy: () => new Float32Array(24),
    q: () => Float32Array.from({ length: 8 }, (_, i) => i / 4 - 1),
    slopes: () => Float32Array.of(0.5, 0.25),
    logits: () => Float32Array.of(0.5, -1),
    parents: () => new Int32Array(0),
    output: () => new Float32Array(8),
    lse: () => new Float32Array(2),
  };
  const words: Word[] = [];
  for (const role of rolesOf(name)) {
    const buffer = words.at(-1) as ArrayBufferView;
    if (role === "count") words.push(buffer.byteLength / unitOf(rolesOf(name)[words.length - 1]!));
    else words.push(good[role.split(":")[0]!]!());
  }
  return words;
}

function systemWords(): Uint32Array {
  const words = record(new Array(9).fill(0));
  library().kv_system_info(words, words.byteLength);
  return words;
}
