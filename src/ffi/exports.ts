/**
 * The C ABI as TypeScript sees it: symbols, records, and the numbers that have a name on both sides.
 *
 * The same tables stand in `zig/src/abi.zig`, and the library prints its own as a manifest (`kv_abi_manifest`); a test
 * proves them equal. A row says what crosses under which name; what a call does is told by the body of the same noun
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

/** The name of a parameter, and its word. */
export type Parameter = `${string} ${Word}`;

/** The word of every result. */
export const RESULT: Word = "i32";

/** The version of the ABI below; the library answers `kv_abi_version` with the same number. */
export const ABI_VERSION = 6;

/** Every symbol of the library, in the order of `zig/src/abi.zig`, and its parameters. */
export const EXPORTS = {
  // -> the version
  kv_abi_version: [],
  // -> bytes of the text, which is written where they fit
  kv_abi_manifest: ["text buffer", "text_bytes u32"],
  kv_system_info: ["system buffer", "system_bytes u32"],
  // 0 for the highest there is -> the level in force
  kv_level_set: ["level u32"],
  // 0 for no limit
  kv_max_bytes_set: ["bytes f64"],
  // -> MiB that all caches, pools and buffers of the process have reserved
  kv_reserved_mib: [],
  kv_thread_count_set: ["thread_count u32"],
  kv_read_rate: ["bytes f64", "thread_count u32", "rate buffer", "rate_count u32"],
  kv_memory_bytes: ["options buffer", "options_bytes u32", "bytes buffer", "bytes_count u32"],

  // `sequences` are handles of those of a paged cache, or indices of those of a contiguous one
  kv_attend: [
    "cache u32",
    "layer u32",
    "sequences buffer",
    "query_counts buffer",
    "sequence_count u32",
    "options buffer",
    "options_bytes u32",
    "q buffer",
    "q_count u32",
    "alibi_slopes buffer",
    "alibi_slope_count u32",
    "sink_logits buffer",
    "sink_logit_count u32",
    "tree_parents buffer",
    "tree_parent_count u32",
    "output buffer",
    "output_count u32",
    "lse buffer",
    "lse_count u32",
  ],

  kv_rows_quantize: ["dtype u32", "rows buffer", "row_count u32", "records buffer", "records_bytes u32"],
  kv_rows_dequantize: ["dtype u32", "records buffer", "records_bytes u32", "rows buffer", "row_count u32"],
  kv_block_quantize: [
    "dtype u32",
    "side u32",
    "block_size u32",
    "head_dim u32",
    "rows buffer",
    "row_count u32",
    "plane buffer",
    "plane_bytes u32",
  ],
  kv_block_dequantize: [
    "dtype u32",
    "side u32",
    "block_size u32",
    "head_dim u32",
    "plane buffer",
    "plane_bytes u32",
    "rows buffer",
    "row_count u32",
  ],
  kv_block_pack: [
    "dtype u32",
    "side u32",
    "block_size u32",
    "head_dim u32",
    "records buffer",
    "records_bytes u32",
    "plane buffer",
    "plane_bytes u32",
  ],
  kv_block_unpack: [
    "dtype u32",
    "side u32",
    "block_size u32",
    "head_dim u32",
    "plane buffer",
    "plane_bytes u32",
    "records buffer",
    "records_bytes u32",
  ],

  // -> the cache
  kv_contiguous_create: ["options buffer", "options_bytes u32"],
  kv_contiguous_free: ["cache u32"],
  kv_contiguous_config: ["cache u32", "options buffer", "options_bytes u32"],
  kv_contiguous_store: [
    "cache u32",
    "layer u32",
    "sequence_index u32",
    "k buffer",
    "k_count u32",
    "v buffer",
    "v_count u32",
    "dtype u32",
  ],
  kv_contiguous_advance: ["cache u32"],
  kv_contiguous_reset: ["cache u32"],
  kv_contiguous_memory_bytes: ["cache u32", "bytes buffer", "bytes_count u32"],
  kv_contiguous_stats: ["cache u32", "stats buffer", "stats_bytes u32"],
  kv_contiguous_offset: [
    "cache u32",
    "layer u32",
    "sequence_index u32",
    "position u32",
    "kv_head u32",
    "dim u32",
    "offset buffer",
    "offset_count u32",
  ],

  // -> the pool
  kv_pool_create: ["options buffer", "options_bytes u32"],
  kv_pool_free: ["pool u32"],
  kv_pool_prewarm: ["pool u32", "block_count u32", "dtype_k u32", "dtype_v u32"],
  kv_pool_stats: ["pool u32", "dtype_k u32", "dtype_v u32", "stats buffer", "stats_bytes u32"],

  // -> the cache
  kv_paged_create: ["options buffer", "options_bytes u32", "layers buffer", "layers_bytes u32"],
  kv_paged_free: ["cache u32"],
  // no bytes of layers: they are not wanted
  kv_paged_config: ["cache u32", "options buffer", "options_bytes u32", "layers buffer", "layers_bytes u32"],
  kv_paged_append: [
    "cache u32",
    "layer u32",
    "sequences buffer",
    "token_counts buffer",
    "sequence_count u32",
    "k buffer",
    "k_count u32",
    "v buffer",
    "v_count u32",
    "dtype u32",
    "layout u32",
    "head_stride u32",
  ],
  kv_paged_reorder: ["cache u32", "sequences buffer", "parents buffer", "sequence_count u32"],
  kv_paged_reset: ["cache u32", "kept buffer", "kept_count u32"],
  kv_paged_update_policy: ["cache u32", "policy buffer", "policy_bytes u32"],
  // -> KV heads, a record of each
  kv_paged_fidelity: ["cache u32", "layer u32", "heads buffer", "heads_bytes u32"],
  kv_paged_stats: ["cache u32", "stats buffer", "stats_bytes u32"],
  kv_paged_prefix_stats: ["cache u32", "stats buffer", "stats_bytes u32"],
  // -> tokens of a prompt that are yet to be committed
  kv_paged_pending_prefix: [
    "cache u32",
    "tokens buffer",
    "token_count u32",
    "has_salt u32",
    "salt buffer",
    "salt_bytes u32",
    "fingerprint buffer",
    "fingerprint_bytes u32",
  ],
  // -> words of the events there are; they are written, and taken, where they fit
  kv_paged_events: ["cache u32", "events buffer", "event_words u32"],
  kv_paged_explain: [
    "cache u32",
    "tokens buffer",
    "token_count u32",
    "has_salt u32",
    "salt buffer",
    "salt_bytes u32",
    "fingerprint buffer",
    "fingerprint_bytes u32",
    "explanation buffer",
    "explanation_bytes u32",
  ],
  kv_paged_pool_stats: ["cache u32", "group u32", "dtype_k u32", "dtype_v u32", "stats buffer", "stats_bytes u32"],

  // -> the sequence. The four from here on and the three about blocks are of paged caches alone
  kv_sequence_create: ["cache u32"],
  // -> a sequence that starts with what is there of a prompt
  kv_sequence_create_for: [
    "cache u32",
    "tokens buffer",
    "token_count u32",
    "has_salt u32",
    "salt buffer",
    "salt_bytes u32",
    "fingerprint buffer",
    "fingerprint_bytes u32",
  ],
  kv_sequence_free: ["sequence u32"],
  // -> its cache
  kv_sequence_cache: ["sequence u32"],
  // -> the child
  kv_sequence_fork: ["sequence u32"],
  // -> start
  kv_sequence_append: [
    "sequence u32",
    "index u32",
    "layer u32",
    "k buffer",
    "k_count u32",
    "v buffer",
    "v_count u32",
    "dtype u32",
    "layout u32",
    "head_stride u32",
    "appended buffer",
    "appended_bytes u32",
  ],
  kv_sequence_commit: ["sequence u32", "index u32", "token_count u32"],
  // `kept` are indices of the pending rows that stay
  kv_sequence_commit_kept: ["sequence u32", "index u32", "kept buffer", "kept_count u32"],
  // the priority lasts for milliseconds, or with 0 for ever
  kv_sequence_commit_tokens: ["sequence u32", "tokens buffer", "token_count u32", "priority u32", "ttl_ms u32"],
  kv_sequence_commit_kept_tokens: [
    "sequence u32",
    "kept buffer",
    "kept_count u32",
    "tokens buffer",
    "token_count u32",
    "priority u32",
    "ttl_ms u32",
  ],
  // for the tenant of the sequence
  kv_sequence_explain: [
    "sequence u32",
    "tokens buffer",
    "token_count u32",
    "explanation buffer",
    "explanation_bytes u32",
  ],
  kv_sequence_truncate: ["sequence u32", "index u32", "seq_len u32"],
  // -> committed tokens
  kv_sequence_seq_len: ["sequence u32", "index u32"],
  // -> the length from which on a truncate is exact
  kv_sequence_rewindable_to: ["sequence u32", "index u32"],
  // -> committed and pending rows, evicted ones included
  kv_sequence_row_count: ["sequence u32", "index u32", "layer u32"],
  // -> rows that are there
  kv_sequence_resident_count: ["sequence u32", "index u32", "layer u32"],
  // -> a number that changes whenever a view of that layer goes stale
  kv_sequence_generation: ["sequence u32", "index u32", "layer u32"],
  // -> views from `start` on; those from number `view_first` on are written
  kv_sequence_views: [
    "sequence u32",
    "index u32",
    "layer u32",
    "start u32",
    "view_first u32",
    "views buffer",
    "views_bytes u32",
  ],
  // -> rows
  kv_sequence_contiguous_kv: [
    "sequence u32",
    "index u32",
    "layer u32",
    "row_count u32",
    "view buffer",
    "view_bytes u32",
  ],
  // -> rows
  kv_sequence_gather: [
    "sequence u32",
    "index u32",
    "layer u32",
    "start u32",
    "row_count u32",
    "k buffer",
    "k_count u32",
    "v buffer",
    "v_count u32",
    "dtype u32",
    "layout u32",
    "head_stride u32",
  ],
  // -> 0 for the CPU, n for GPU n - 1
  kv_sequence_layer_device: ["sequence u32", "index u32", "layer u32"],
  // -> entries of the block table
  kv_sequence_block_table: ["sequence u32", "layer u32", "entries buffer", "entry_count u32"],
  // -> entries: the references of each block
  kv_sequence_block_references: ["sequence u32", "layer u32", "entries buffer", "entry_count u32"],
  // -> entries: the tier of each block, -1 for an evicted one
  kv_sequence_block_tiers: ["sequence u32", "layer u32", "entries buffer", "entry_count u32"],

  // -> the pool
  kv_buffer_pool_create: ["options buffer", "options_bytes u32"],
  kv_buffer_pool_free: ["pool u32"],
  kv_buffer_pool_prewarm: ["pool u32", "class_bytes u32", "buffer_count u32"],
  kv_buffer_pool_prewarm_all: ["pool u32", "buffer_count u32"],
  kv_buffer_pool_clear: ["pool u32"],
  kv_buffer_pool_stats: ["pool u32", "stats buffer", "stats_bytes u32"],

  // -> the buffer
  kv_buffer_acquire: ["pool u32", "bytes f64"],
  kv_buffer_free: ["buffer u32"],
  // -> the copy
  kv_buffer_clone: ["buffer u32"],
  kv_buffer_info: ["buffer u32", "info buffer", "info_bytes u32"],
  // -> elements that were appended
  kv_buffer_length: ["buffer u32"],
  // -> elements that were appended
  kv_buffer_extend: ["buffer u32", "values buffer", "value_count u32"],
  kv_buffer_clear: ["buffer u32"],
} as const;

/** What JavaScript passes for a parameter. */
type Argument<Row extends Parameter> = Row extends `${string} buffer` ? ArrayBufferView : number;

/** What JavaScript passes for the parameters of a row. */
type Arguments<Row extends readonly Parameter[]> = { -readonly [I in keyof Row]: Argument<Row[I]> };

/** The opened library: one function for each row of `EXPORTS`. */
export type Library = {
  readonly [Name in keyof typeof EXPORTS]: (...args: Arguments<(typeof EXPORTS)[Name]>) => number;
};

/** The words of a row. */
export function wordsOf(parameters: readonly Parameter[]): Word[] {
  return parameters.map((parameter) => parameter.slice(parameter.lastIndexOf(" ") + 1) as Word);
}

/** What a field of a record holds; 64 bits take two words, low first, and an array is of u32. */
export type Field = "u32" | "i32" | "f32" | "u64" | "f64" | `u32[${number}]`;

/** Every record, with its fields in order behind the first word, which says its size in bytes. */
export const RECORDS = {
  system: {
    level: "u32",
    levels: "u32",
    cpuCount: "u32",
    memoryLimitBytes: "u64",
    liveHandles: "u32",
    threadCount: "u32",
    reservedBytes: "u64",
    maxBytes: "u64",
    builtLevels: "u32",
  },
  contiguous: {
    layerCount: "u32",
    sequenceCount: "u32",
    kvHeadCount: "u32",
    headDim: "u32",
    maxSeqLen: "u32",
    dtypeK: "u32",
    dtypeV: "u32",
    maxBytes: "u64",
    qHeadCount: "u32",
  },
  contiguousStats: {
    sequenceCount: "u32",
    kvBytes: "u64",
    reservedBytes: "u64",
    metadataBytes: "u64",
    paddingBytes: "u64",
    slabCount: "u32",
  },
  append: { start: "u32", generation: "u32" },
  view: {
    keys: "u64",
    values: "u64",
    start: "u32",
    length: "u32",
    dtypeK: "u32",
    dtypeV: "u32",
    tokenStride: "u32",
    headStride: "u32",
    tier: "u32",
    delta: "i32",
    generation: "u32",
    blockSize: "u32",
    reason: "u32",
    bytesK: "u32",
    bytesV: "u32",
  },
  attend: { flags: "u32", softmaxScale: "f32", windowTokens: "u32", sinkTokens: "u32", softcap: "f32" },
  pool: {
    layerCount: "u32",
    kvHeadCount: "u32",
    headDim: "u32",
    blockSize: "u32",
    dtypeK: "u32",
    dtypeV: "u32",
    maxBytes: "u64",
  },
  poolStats: {
    totalBlocks: "u32",
    freeBlocks: "u32",
    usedBlocks: "u32",
    peakBlocks: "u32",
    prewarmed: "u32",
    blockBytes: "u64",
    hits: "u64",
    misses: "u64",
    allocations: "u64",
    returns: "u64",
    drops: "u64",
    reservedBytes: "u64",
    metadataBytes: "u64",
  },
  paged: {
    layerCount: "u32",
    blockSize: "u32",
    maxSeqLen: "u32",
    dtypeK: "u32",
    dtypeV: "u32",
    retentionTokens: "u32",
    retentionSinkTokens: "u32",
    maxBytes: "u64",
    pool: "u32",
    groupCount: "u32",
    policyKind: "u32",
    policyStoreK: "u32",
    policyStoreV: "u32",
    policyTailTokens: "u32",
    policySinkTokens: "u32",
    policyMaxLogitError: "f32",
    policyQueryNorm: "f32",
    measuresFidelity: "u32",
    rewindTokens: "u32",
    prefixMode: "u32",
    prefixTiers: "u32",
    prefixMaxBytes: "u64",
    prefixMaxBytesPerSalt: "u64",
    prefixHasEvents: "u32",
  },
  layer: {
    kvHeadCount: "u32",
    headDim: "u32",
    windowTokens: "u32",
    storeK: "u32",
    storeV: "u32",
    qHeadCount: "u32",
  },
  policy: {
    policyKind: "u32",
    policyStoreK: "u32",
    policyStoreV: "u32",
    policyTailTokens: "u32",
    policySinkTokens: "u32",
    policyMaxLogitError: "f32",
    policyQueryNorm: "f32",
  },
  headFidelity: {
    keyRowCount: "f64",
    keyCosineMean: "f64",
    keyCosineMin: "f64",
    keyErrorMax: "f64",
    valueRowCount: "f64",
    valueCosineMean: "f64",
    valueCosineMin: "f64",
    valueErrorMax: "f64",
    queryNormMax: "f64",
    logitErrorBound: "f64",
  },
  pagedStats: {
    sequenceCount: "u32",
    tailTokenCount: "u64",
    storeTokenCount: "u64",
    warmTokenCount: "u64",
    tailBytes: "u64",
    storeBytes: "u64",
    f32Bytes: "u64",
    tableEntries: "u64",
    evictions: "u64",
    metadataBytes: "u64",
    usedBlocks: "u32",
    groupCount: "u32",
    usedBytes: "u64",
    reservedBytes: "u64",
  },
  prefixStats: {
    lookups: "u64",
    hits: "u64",
    hitTokens: "u64",
    cachedBlocks: "u64",
    cachedBytes: "u64",
    evictedBlocks: "u64",
    metadataBytes: "u64",
  },
  explanation: {
    tokenCount: "u32",
    knownCount: "u32",
    reason: "u32",
    hasOtherToken: "u32",
    otherToken: "u32",
    formatCount: "u32",
    dtypeK: "u32[8]",
    dtypeV: "u32[8]",
  },
  bufferPool: { buffersPerClass: "u32", maxBytes: "u64" },
  bufferPoolStats: {
    hits: "u64",
    misses: "u64",
    allocations: "u64",
    returns: "u64",
    drops: "u64",
    reservedBytes: "u64",
    freeBuffers: "u32[8]",
  },
  buffer: { address: "u64", capacity: "u32", length: "u32" },
} as const;

/** The numbers that stand for a name. */
export const ENUMS = {
  status: {
    ok: 0,
    invalid_config: -1,
    layer_out_of_range: -2,
    sequence_out_of_range: -3,
    position_out_of_range: -4,
    invalid_size: -5,
    not_finite: -6,
    cache_full: -7,
    pool_empty: -8,
    out_of_memory: -9,
    block_too_large: -10,
    commit_mismatch: -11,
    stale_handle: -12,
    stale_view: -13,
    unsupported: -14,
    bad_snapshot: -15,
    snapshot_mismatch: -16,
    no_device: -17,
    needs_permission: -18,
    aborted: -19,
  },
  dtype: { f32: 0, f16: 1, bf16: 2, q8_0: 3, q4_0: 4, i8: 5, i4: 6, i2: 7 },
  side: { keys: 0, values: 1 },
  layout: { token_major: 0, head_major: 1 },
  tier: { tail: 0, store: 1, warm: 2 },
  reason: { none: 0, head_major: 1, not_adjacent: 2, quantized: 3, evicted: 4, on_gpu: 5 },
  policyKind: { tailOnly: 0, tiered: 1 },
  prefixMode: { none: 0, living: 1, kept: 2 },
  prefixTiers: { any: 0, float: 1 },
  prefixEvent: { stored: 1, removed: 2, cleared: 3 },
  prefixReason: {
    whole: 0,
    differs: 1,
    not_stored: 2,
    window_passed: 3,
    quantized: 4,
    evicted: 5,
    other_fingerprint: 6,
  },
  device: { cpu: 0 },
  level: { v2: 1, v3: 2, avx512: 3, amx: 4, neon: 5, dotprod: 6 },
  attendFlag: { causal: 1, softmaxScale: 2, softcap: 4, window: 8 },
} as const;

/** Limits and defaults that both sides have. */
export const VALUES = {
  headDimMax: 256,
  blockSizeMax: 256,
  blockSizeDefault: 64,
  maxSeqLenMax: 2147483647,
  slabBytesMax: 1073741824,
  treeNodeCountMax: 64,
  priorityDefault: 35,
  allRows: 4294967295,
  threadCountMax: 256,
  bufferClassBytes: [1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216],
} as const;
