/**
 * The C ABI as TypeScript sees it: one row for every symbol of the library.
 *
 * The same table stands in `zig/src/abi.zig`, and the library prints its own as a manifest (`kv_abi_manifest`); a test
 * proves the two equal. A row says which words cross, never what they mean: that is told by the body of the same noun
 * in `zig/src/abi/`.
 *
 * Only five kinds of word cross. A 64-bit integer argument would leave Deno's fast path (3 ns become 60 to 90), so
 * sizes travel as f64 or inside records. Every buffer is followed by its element count. A result is an i32: 0 or a
 * positive count or handle, or a negative status (`status.ts`).
 *
 * @module
 */

/** A kind of word that may cross the boundary. */
export type Word = "u32" | "i32" | "f32" | "f64" | "buffer";

/** The version of the ABI below; the library answers `kv_abi_version` with the same number. */
export const ABI_VERSION = 3;

/** Every symbol of the library, in the order of `zig/src/abi.zig`. */
export const EXPORTS = {
  // () -> the ABI version
  kv_abi_version: { parameters: [], result: "i32" },
  // (text, text_bytes) -> bytes of the manifest, written when they fit
  kv_abi_manifest: { parameters: ["buffer", "u32"], result: "i32" },
  // (SystemRecord out, bytes)
  kv_system_info: { parameters: ["buffer", "u32"], result: "i32" },
  // (level, 0 for the highest there is) -> the level in force
  kv_level_set: { parameters: ["u32"], result: "i32" },
  // (bytes, 0 for no limit)
  kv_max_bytes_set: { parameters: ["f64"], result: "i32" },
  // () -> MiB that all caches, pools and buffers of the process have reserved
  kv_reserved_mib: { parameters: [], result: "i32" },
  // (count)
  kv_thread_count_set: { parameters: ["u32"], result: "i32" },
  // (bytes, thread_count, bytes a second out, count)
  kv_read_rate: { parameters: ["f64", "u32", "buffer", "u32"], result: "i32" },
  // (ContiguousRecord, bytes, bytes out, count)
  kv_memory_bytes: { parameters: ["buffer", "u32", "buffer", "u32"], result: "i32" },

  // (dtype, f32 rows, count, records out, bytes)
  kv_rows_quantize: { parameters: ["u32", "buffer", "u32", "buffer", "u32"], result: "i32" },
  // (dtype, records, bytes, f32 rows out, count)
  kv_rows_dequantize: { parameters: ["u32", "buffer", "u32", "buffer", "u32"], result: "i32" },
  // (dtype, side, block_size, head_dim, f32 rows, count, plane out, bytes)
  kv_block_quantize: {
    parameters: ["u32", "u32", "u32", "u32", "buffer", "u32", "buffer", "u32"],
    result: "i32",
  },
  // (dtype, side, block_size, head_dim, plane, bytes, f32 rows out, count)
  kv_block_dequantize: {
    parameters: ["u32", "u32", "u32", "u32", "buffer", "u32", "buffer", "u32"],
    result: "i32",
  },
  // (dtype, side, block_size, head_dim, records, bytes, plane out, bytes)
  kv_block_pack: {
    parameters: ["u32", "u32", "u32", "u32", "buffer", "u32", "buffer", "u32"],
    result: "i32",
  },
  // (dtype, side, block_size, head_dim, plane, bytes, records out, bytes)
  kv_block_unpack: {
    parameters: ["u32", "u32", "u32", "u32", "buffer", "u32", "buffer", "u32"],
    result: "i32",
  },

  // (ContiguousRecord, bytes) -> handle
  kv_contiguous_create: { parameters: ["buffer", "u32"], result: "i32" },
  // (handle)
  kv_contiguous_free: { parameters: ["u32"], result: "i32" },
  // (handle, ContiguousRecord out, bytes)
  kv_contiguous_config: { parameters: ["u32", "buffer", "u32"], result: "i32" },
  // (handle, layer, sequence, k, k_count, v, v_count, dtype)
  kv_contiguous_store: {
    parameters: ["u32", "u32", "u32", "buffer", "u32", "buffer", "u32", "u32"],
    result: "i32",
  },
  // (handle, layer, sequence, k, k_count, v, v_count, dtype, layout) -> start
  kv_contiguous_append: {
    parameters: ["u32", "u32", "u32", "buffer", "u32", "buffer", "u32", "u32", "u32"],
    result: "i32",
  },
  // (handle)
  kv_contiguous_advance: { parameters: ["u32"], result: "i32" },
  // (handle)
  kv_contiguous_reset: { parameters: ["u32"], result: "i32" },
  // (handle, sequence, token_count)
  kv_contiguous_commit: { parameters: ["u32", "u32", "u32"], result: "i32" },
  // (handle, sequence, seq_len)
  kv_contiguous_truncate: { parameters: ["u32", "u32", "u32"], result: "i32" },
  // (handle, sequence) -> committed tokens
  kv_contiguous_seq_len: { parameters: ["u32", "u32"], result: "i32" },
  // (handle, layer, sequence) -> committed and pending rows of that layer
  kv_contiguous_row_count: { parameters: ["u32", "u32", "u32"], result: "i32" },
  // (handle, layer, sequence) -> a number that changes whenever a view of that layer goes stale
  kv_contiguous_generation: { parameters: ["u32", "u32", "u32"], result: "i32" },
  // (handle, bytes out, count)
  kv_contiguous_memory_bytes: { parameters: ["u32", "buffer", "u32"], result: "i32" },
  // (handle, StatsRecord out, bytes)
  kv_contiguous_stats: { parameters: ["u32", "buffer", "u32"], result: "i32" },
  // (handle, layer, sequence, position, kv_head, dim, element offset out, count)
  kv_contiguous_offset: {
    parameters: ["u32", "u32", "u32", "u32", "u32", "u32", "buffer", "u32"],
    result: "i32",
  },
  // (handle, layer, sequence, RowsRecord out, bytes) -> rows
  kv_contiguous_keys: { parameters: ["u32", "u32", "u32", "buffer", "u32"], result: "i32" },
  // (handle, layer, sequence, RowsRecord out, bytes) -> rows
  kv_contiguous_values: { parameters: ["u32", "u32", "u32", "buffer", "u32"], result: "i32" },
  // (handle, layer, sequence, ViewRecord out, bytes) -> views, 0 or 1
  kv_contiguous_views: { parameters: ["u32", "u32", "u32", "buffer", "u32"], result: "i32" },
  // (handle, layer, sequence, row_count, ViewRecord out, bytes) -> rows
  kv_contiguous_contiguous_kv: {
    parameters: ["u32", "u32", "u32", "u32", "buffer", "u32"],
    result: "i32",
  },
  // (handle, layer, sequence, k out, k_count, v out, v_count, dtype) -> rows
  kv_contiguous_gather: {
    parameters: ["u32", "u32", "u32", "buffer", "u32", "buffer", "u32", "u32"],
    result: "i32",
  },
  // (handle, layer) -> 0 for the CPU, n for GPU n - 1
  kv_contiguous_layer_device: { parameters: ["u32", "u32"], result: "i32" },
  // (handle, layer, sequence, q, q_count, AttendRecord, bytes, alibi_slopes, count, sink_logits, count,
  //  tree_parents, count, output out, output_count, lse out, lse_count)
  kv_contiguous_attend: {
    parameters: [
      "u32",
      "u32",
      "u32",
      "buffer",
      "u32",
      "buffer",
      "u32",
      "buffer",
      "u32",
      "buffer",
      "u32",
      "buffer",
      "u32",
      "buffer",
      "u32",
      "buffer",
      "u32",
    ],
    result: "i32",
  },

  // (PoolRecord, bytes) -> handle
  kv_pool_create: { parameters: ["buffer", "u32"], result: "i32" },
  // (handle)
  kv_pool_free: { parameters: ["u32"], result: "i32" },
  // (handle, block_count, dtype_k, dtype_v): blocks of one format
  kv_pool_prewarm: { parameters: ["u32", "u32", "u32", "u32"], result: "i32" },
  // (handle, dtype_k, dtype_v, PoolStatsRecord out, bytes): the blocks of one format
  kv_pool_stats: { parameters: ["u32", "u32", "u32", "buffer", "u32"], result: "i32" },

  // (PagedRecord, bytes, layers, word_count) -> handle
  kv_paged_create: { parameters: ["buffer", "u32", "buffer", "u32"], result: "i32" },
  // (handle)
  kv_paged_free: { parameters: ["u32"], result: "i32" },
  // (handle, PagedRecord out, bytes, layers out, word_count)
  kv_paged_config: { parameters: ["u32", "buffer", "u32", "buffer", "u32"], result: "i32" },
  // (handle, layer, sequences, token_counts, sequence_count, k, k_count, v, v_count, dtype, layout)
  kv_paged_append: {
    parameters: ["u32", "u32", "buffer", "buffer", "u32", "buffer", "u32", "buffer", "u32", "u32", "u32"],
    result: "i32",
  },
  // (handle, layer, sequences, query_counts, sequence_count, q, q_count, AttendRecord, bytes, alibi_slopes, count,
  //  sink_logits, count, tree_parents, count, output out, output_count, lse out, lse_count)
  kv_paged_attend: {
    parameters: [
      "u32",
      "u32",
      "buffer",
      "buffer",
      "u32",
      "buffer",
      "u32",
      "buffer",
      "u32",
      "buffer",
      "u32",
      "buffer",
      "u32",
      "buffer",
      "u32",
      "buffer",
      "u32",
      "buffer",
      "u32",
    ],
    result: "i32",
  },
  // (handle, beams, parents, count)
  kv_paged_reorder: { parameters: ["u32", "buffer", "buffer", "u32"], result: "i32" },
  // (handle, sequences that stay, count)
  kv_paged_reset: { parameters: ["u32", "buffer", "u32"], result: "i32" },
  // (handle, PolicyRecord, bytes)
  kv_paged_update_policy: { parameters: ["u32", "buffer", "u32"], result: "i32" },
  // (handle, layer, f64[] out, count) -> KV heads: 10 numbers of each
  kv_paged_fidelity: { parameters: ["u32", "u32", "buffer", "u32"], result: "i32" },
  // (handle, PagedStatsRecord out, bytes)
  kv_paged_stats: { parameters: ["u32", "buffer", "u32"], result: "i32" },
  // (handle, group, dtype_k, dtype_v, PoolStatsRecord out, bytes): the blocks of one format
  kv_paged_pool_stats: { parameters: ["u32", "u32", "u32", "u32", "buffer", "u32"], result: "i32" },

  // (cache) -> handle
  kv_sequence_create: { parameters: ["u32"], result: "i32" },
  // (handle)
  kv_sequence_free: { parameters: ["u32"], result: "i32" },
  // (handle) -> handle of its cache
  kv_sequence_cache: { parameters: ["u32"], result: "i32" },
  // (handle) -> handle of the child
  kv_sequence_fork: { parameters: ["u32"], result: "i32" },
  // (handle, layer, k, k_count, v, v_count, dtype, layout) -> start
  kv_sequence_append: { parameters: ["u32", "u32", "buffer", "u32", "buffer", "u32", "u32", "u32"], result: "i32" },
  // (handle, token_count)
  kv_sequence_commit: { parameters: ["u32", "u32"], result: "i32" },
  // (handle, indices of the pending rows that stay, count)
  kv_sequence_commit_kept: { parameters: ["u32", "buffer", "u32"], result: "i32" },
  // (handle, seq_len)
  kv_sequence_truncate: { parameters: ["u32", "u32"], result: "i32" },
  // (handle) -> committed tokens
  kv_sequence_seq_len: { parameters: ["u32"], result: "i32" },
  // (handle) -> the length from which on a truncate is exact
  kv_sequence_rewindable_to: { parameters: ["u32"], result: "i32" },
  // (handle, layer) -> committed and pending rows, evicted ones included
  kv_sequence_row_count: { parameters: ["u32", "u32"], result: "i32" },
  // (handle, layer) -> rows that are there
  kv_sequence_resident_count: { parameters: ["u32", "u32"], result: "i32" },
  // (handle, layer) -> a number that changes whenever a view of that layer goes stale
  kv_sequence_generation: { parameters: ["u32", "u32"], result: "i32" },
  // (handle, layer, start, view_first, ViewRecord[] out, bytes) -> views from `start` on
  kv_sequence_views: { parameters: ["u32", "u32", "u32", "u32", "buffer", "u32"], result: "i32" },
  // (handle, layer, row_count, ViewRecord out, bytes) -> rows
  kv_sequence_contiguous_kv: { parameters: ["u32", "u32", "u32", "buffer", "u32"], result: "i32" },
  // (handle, layer, k out, k_count, v out, v_count, dtype) -> rows
  kv_sequence_gather: { parameters: ["u32", "u32", "buffer", "u32", "buffer", "u32", "u32"], result: "i32" },
  // (handle, layer) -> 0 for the CPU, n for GPU n - 1
  kv_sequence_layer_device: { parameters: ["u32", "u32"], result: "i32" },
  // (handle, layer, i32[] out, count) -> entries of the block table
  kv_sequence_block_table: { parameters: ["u32", "u32", "buffer", "u32"], result: "i32" },
  // (handle, layer, i32[] out, count) -> entries: the references of each block
  kv_sequence_block_references: { parameters: ["u32", "u32", "buffer", "u32"], result: "i32" },
  // (handle, layer, i32[] out, count) -> entries: the tier of each block, -1 for an evicted one
  kv_sequence_block_tiers: { parameters: ["u32", "u32", "buffer", "u32"], result: "i32" },
  // (handle, layer, q, q_count, AttendRecord, bytes, alibi_slopes, count, sink_logits, count, tree_parents, count,
  //  output out, output_count, lse out, lse_count)
  kv_sequence_attend: {
    parameters: [
      "u32",
      "u32",
      "buffer",
      "u32",
      "buffer",
      "u32",
      "buffer",
      "u32",
      "buffer",
      "u32",
      "buffer",
      "u32",
      "buffer",
      "u32",
      "buffer",
      "u32",
    ],
    result: "i32",
  },

  // (BufferPoolRecord, bytes) -> handle
  kv_buffer_pool_create: { parameters: ["buffer", "u32"], result: "i32" },
  // (pool)
  kv_buffer_pool_free: { parameters: ["u32"], result: "i32" },
  // (pool, class_bytes, buffer_count)
  kv_buffer_pool_prewarm: { parameters: ["u32", "u32", "u32"], result: "i32" },
  // (pool, buffer_count)
  kv_buffer_pool_prewarm_all: { parameters: ["u32", "u32"], result: "i32" },
  // (pool)
  kv_buffer_pool_clear: { parameters: ["u32"], result: "i32" },
  // (pool, BufferPoolStatsRecord out, bytes)
  kv_buffer_pool_stats: { parameters: ["u32", "buffer", "u32"], result: "i32" },

  // (pool, bytes) -> handle
  kv_buffer_acquire: { parameters: ["u32", "f64"], result: "i32" },
  // (handle)
  kv_buffer_free: { parameters: ["u32"], result: "i32" },
  // (handle) -> handle of the copy
  kv_buffer_clone: { parameters: ["u32"], result: "i32" },
  // (handle, BufferRecord out, bytes)
  kv_buffer_info: { parameters: ["u32", "buffer", "u32"], result: "i32" },
  // (handle) -> elements that were appended
  kv_buffer_length: { parameters: ["u32"], result: "i32" },
  // (handle, values, count) -> elements that were appended
  kv_buffer_extend: { parameters: ["u32", "buffer", "u32"], result: "i32" },
  // (handle)
  kv_buffer_clear: { parameters: ["u32"], result: "i32" },
} as const;

/** What JavaScript passes for the words of a row; every row of `EXPORTS` must pass the check this makes. */
type Arguments<Words extends readonly Word[]> = {
  -readonly [I in keyof Words]: Words[I] extends "buffer" ? ArrayBufferView : number;
};

/** The opened library: one function for each row of `EXPORTS`. */
export type Library = {
  readonly [Name in keyof typeof EXPORTS]: (...args: Arguments<(typeof EXPORTS)[Name]["parameters"]>) => number;
};
