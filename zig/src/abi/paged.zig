//! Bodies of the exports of a paged cache: making one, and the calls in which several of its sequences take part.

const std = @import("std");
const buffer = @import("buffer.zig");
const Dtype = @import("../dtype.zig").Dtype;
const handle = @import("handle.zig");
const memory = @import("memory.zig");
const paged = @import("../cache/paged/cache.zig");
const PagedCache = paged.PagedCache;
const Sequence = paged.Sequence;
const pool_bodies = @import("pool.zig");
const record = @import("record.zig");
const sequence_count_max = @import("attend.zig").sequence_count_max;
const status = @import("status.zig");

const gpa = memory.gpa;

/// What a paged cache is made of. Its layers come in a buffer beside it.
pub const PagedRecord = extern struct {
    size_bytes: u32 = 0,
    layer_count: u32,
    block_size: u32,
    max_seq_len: u32,
    dtype_k: u32,
    dtype_v: u32,
    /// 0 for all rows.
    retention_tokens: u32,
    retention_sink_tokens: u32,
    /// 0 for what the process may use; must be 0 with a pool.
    max_bytes: record.Wide,
    /// Handle of the pool to be on; 0 for pools of its own.
    pool: u32,
    /// Out only: layer groups.
    group_count: u32 = 0,
    policy: PolicyWords = .{},
    measures_fidelity: u32 = 0,
    /// Rows that stay unseen so that a sequence can be rewound.
    rewind_tokens: u32 = 0,
    /// A `PrefixMode`.
    prefix_mode: u32 = 0,
    /// Which blocks a sequence may start from, a `Tiers`.
    prefix_tiers: u32 = 0,
    /// 0 for no limit but the cache's.
    prefix_max_bytes: record.Wide = .{},
    prefix_max_bytes_per_salt: record.Wide = .{},
    prefix_has_events: u32 = 0,

    fn prefix(options: PagedRecord) error{InvalidConfig}!?paged.PrefixOptions {
        const mode = std.enums.fromInt(PrefixMode, options.prefix_mode) orelse return error.InvalidConfig;
        const max_bytes = options.prefix_max_bytes.value();
        const max_bytes_per_salt = options.prefix_max_bytes_per_salt.value();
        if (mode == .none) return null;
        return .{
            .tiers = std.enums.fromInt(paged.Tiers, options.prefix_tiers) orelse return error.InvalidConfig,
            .outlives = mode == .kept,
            .has_events = options.prefix_has_events != 0,
            .max_bytes = if (max_bytes == 0) null else max_bytes,
            .max_bytes_per_salt = if (max_bytes_per_salt == 0) null else max_bytes_per_salt,
        };
    }
};

/// How long rows are found by their tokens. The numbers cross the ABI and are never changed.
pub const PrefixMode = enum(u32) {
    none = 0,
    /// Rows are found as long as a sequence has them.
    living = 1,
    /// Rows are found until their memory is wanted.
    kept = 2,
};

/// What becomes of old rows.
const PolicyWords = extern struct {
    /// A `Policy.Kind`.
    kind: u32 = 0,
    /// One more than the number of a dtype; 0 for both where layers say their own.
    store_k: u32 = 0,
    store_v: u32 = 0,
    tail_tokens: u32 = 0,
    sink_tokens: u32 = 0,
    /// 0 for none.
    max_logit_error: f32 = 0,
    /// 0 for the largest seen.
    query_norm: f32 = 0,

    fn read(words: PolicyWords) error{InvalidConfig}!paged.Policy {
        return .{
            .kind = std.enums.fromInt(paged.Policy.Kind, words.kind) orelse return error.InvalidConfig,
            .store = try storeOf(words.store_k, words.store_v),
            .tail_tokens = words.tail_tokens,
            .sink_tokens = words.sink_tokens,
            .max_logit_error = if (words.max_logit_error == 0) null else words.max_logit_error,
            .query_norm = if (words.query_norm == 0) null else words.query_norm,
        };
    }

    fn from(policy: paged.Policy) PolicyWords {
        const store_k, const store_v = storeWords(policy.store);
        return .{
            .kind = @intFromEnum(policy.kind),
            .store_k = store_k,
            .store_v = store_v,
            .tail_tokens = policy.tail_tokens,
            .sink_tokens = policy.sink_tokens,
            .max_logit_error = policy.max_logit_error orelse 0,
            .query_norm = policy.query_norm orelse 0,
        };
    }
};

pub const PolicyRecord = extern struct {
    size_bytes: u32 = 0,
    policy: PolicyWords,
};

fn storeOf(store_k: u32, store_v: u32) error{InvalidConfig}!?paged.Store {
    if (store_k == 0 and store_v == 0) return null;
    return .{
        .dtype_k = Dtype.fromWord(store_k -% 1) orelse return error.InvalidConfig,
        .dtype_v = Dtype.fromWord(store_v -% 1) orelse return error.InvalidConfig,
    };
}

fn storeWords(store: ?paged.Store) [2]u32 {
    const given = store orelse return .{ 0, 0 };
    return .{ @intFromEnum(given.dtype_k) + 1, @intFromEnum(given.dtype_v) + 1 };
}

/// What a layer of a paged cache holds.
pub const LayerRecord = extern struct {
    size_bytes: u32 = 0,
    kv_head_count: u32,
    head_dim: u32,
    /// 0 for all.
    window_tokens: u32,
    /// Its own store, as in a policy.
    store_k: u32,
    store_v: u32,
    /// 0 where the length of the queries tells.
    q_head_count: u32 = 0,
};

pub const StatsRecord = extern struct {
    size_bytes: u32 = 0,
    sequence_count: u32,
    tail_token_count: record.Wide,
    store_token_count: record.Wide,
    warm_token_count: record.Wide,
    tail_bytes: record.Wide,
    store_bytes: record.Wide,
    f32_bytes: record.Wide,
    table_entries: record.Wide,
    evictions: record.Wide,
    metadata_bytes: record.Wide,
    used_blocks: u32,
    group_count: u32,
    used_bytes: record.Wide,
    reserved_bytes: record.Wide,
};

/// What migration did to the rows of one KV head.
pub const HeadFidelityRecord = extern struct {
    size_bytes: u32 = 0,
    key_row_count: record.Double,
    key_cosine_mean: record.Double,
    key_cosine_min: record.Double,
    key_error_max: record.Double,
    value_row_count: record.Double,
    value_cosine_mean: record.Double,
    value_cosine_min: record.Double,
    value_error_max: record.Double,
    /// The largest softmax_scale * |q| seen, and the bound of a score's error.
    query_norm_max: record.Double,
    logit_error_bound: record.Double,

    fn from(head: paged.Head, head_dim: u32) HeadFidelityRecord {
        return .{
            .key_row_count = .from(@floatFromInt(head.keys.row_count)),
            .key_cosine_mean = .from(head.keys.cosineMean()),
            .key_cosine_min = .from(head.keys.cosine_min),
            .key_error_max = .from(head.keys.error_max),
            .value_row_count = .from(@floatFromInt(head.values.row_count)),
            .value_cosine_mean = .from(head.values.cosineMean()),
            .value_cosine_min = .from(head.values.cosine_min),
            .value_error_max = .from(head.values.error_max),
            .query_norm_max = .from(head.query_norm_max),
            .logit_error_bound = .from(head.logitErrorBound(head_dim)),
        };
    }
};

/// (PagedRecord, bytes, LayerRecord[], bytes) -> handle
pub fn create(options: ?[*]const u8, options_bytes: u32, layers: ?[*]const u8, layers_bytes: u32) callconv(.c) i32 {
    return createCache(options, options_bytes, layers, layers_bytes) catch |err| status.fromError(err);
}

fn createCache(source: ?[*]const u8, source_bytes: u32, layers: ?[*]const u8, layers_bytes: u32) status.Error!i32 {
    const options = try record.read(PagedRecord, source, source_bytes);
    const records = try record.readAll(LayerRecord, gpa, layers, layers_bytes, options.layer_count);
    defer gpa.free(records);
    const list = try gpa.alloc(paged.Layer, records.len);
    defer gpa.free(list);
    for (list, records) |*layer, own| layer.* = .{
        .kv_head_count = own.kv_head_count,
        .head_dim = own.head_dim,
        .q_head_count = if (own.q_head_count == 0) null else own.q_head_count,
        .window_tokens = if (own.window_tokens == 0) null else own.window_tokens,
        .store = try storeOf(own.store_k, own.store_v),
    };
    const max_bytes = options.max_bytes.value();
    const pool = if (options.pool == 0) null else try handle.retain(.pool, options.pool);
    defer if (pool) |object| handle.release(object);
    if (options.retention_tokens == 0 and options.retention_sink_tokens != 0) return error.InvalidConfig;
    var cache: PagedCache = try .initSlabs(gpa, memory.slabs, .{
        .layers = list,
        .block_size = options.block_size,
        .max_seq_len = options.max_seq_len,
        .dtype_k = Dtype.floatFromWord(options.dtype_k) orelse return error.InvalidConfig,
        .dtype_v = Dtype.floatFromWord(options.dtype_v) orelse return error.InvalidConfig,
        .policy = try options.policy.read(),
        .measures_fidelity = options.measures_fidelity != 0,
        .retention = .{
            .tokens = if (options.retention_tokens == 0) null else options.retention_tokens,
            .sink_tokens = options.retention_sink_tokens,
        },
        .rewind_tokens = options.rewind_tokens,
        .max_bytes = if (max_bytes == 0) null else max_bytes,
        .pool = if (pool) |object| &object.body.pool else null,
        .prefix = try options.prefix(),
    });
    errdefer cache.deinit();
    return handle.create(.paged, .{ .paged = .{ .cache = cache, .pool = pool } }, pool);
}

pub fn free(word: u32) callconv(.c) i32 {
    return status.word(handle.free(.paged, word));
}

/// (cache, PagedRecord out, bytes, LayerRecord[] out, bytes): what a cache was made of. No bytes for layers ask for none.
pub fn config(word: u32, out: ?[*]u8, out_bytes: u32, layers: ?[*]u8, layers_bytes: u32) callconv(.c) i32 {
    const use = handle.begin(.paged, word) catch |err| return status.fromError(err);
    defer use.end();
    return status.word(writeConfig(use.target, out, out_bytes, layers, layers_bytes));
}

fn writeConfig(cache: *const PagedCache, out: ?[*]u8, out_bytes: u32, layers: ?[*]u8, layers_bytes: u32) status.Error!void {
    var writer: record.Writer(LayerRecord) = try .init(layers, layers_bytes);
    if (layers_bytes != 0 and layers_bytes != @as(u64, writer.stride) * cache.layerCount()) return error.InvalidSize;
    try record.write(PagedRecord, out, out_bytes, .{
        .layer_count = cache.layerCount(),
        .block_size = cache.state.block_size,
        .max_seq_len = cache.state.max_seq_len,
        .dtype_k = @intFromEnum(cache.state.dtype_k),
        .dtype_v = @intFromEnum(cache.state.dtype_v),
        .retention_tokens = cache.state.retention.tokens orelse 0,
        .retention_sink_tokens = cache.state.retention.sink_tokens,
        .max_bytes = .{},
        .pool = 0,
        .group_count = @intCast(cache.state.groups.len),
        .policy = .from(cache.state.policy),
        .measures_fidelity = @intFromBool(cache.state.groups[0].fidelity.len != 0),
        .rewind_tokens = cache.state.rewind_tokens,
        .prefix_mode = @intFromEnum(prefixMode(cache)),
        .prefix_tiers = if (cache.state.prefix) |index| @intFromEnum(index.options.tiers) else 0,
        .prefix_has_events = if (cache.state.prefix) |index| @intFromBool(index.options.has_events) else 0,
    });
    if (layers_bytes == 0) return;
    for (cache.state.layers) |layer| {
        const group = cache.state.groups[layer.group];
        const store_k, const store_v = storeWords(group.store);
        writer.append(.{
            .kv_head_count = group.shape.kv_head_count,
            .head_dim = group.shape.head_dim,
            .window_tokens = group.window_tokens orelse 0,
            .store_k = store_k,
            .store_v = store_v,
            .q_head_count = layer.q_head_count orelse 0,
        });
    }
}

fn prefixMode(cache: *const PagedCache) PrefixMode {
    const index = cache.state.prefix orelse return .none;
    return if (index.options.outlives) .kept else .living;
}

/// The sequences of a batch. Call with the cache locked.
const Batch = struct {
    sequences: []*Sequence,

    fn init(object: *const handle.Object, words: []align(1) const u32) status.Error!Batch {
        if (words.len > sequence_count_max) return error.InvalidConfig;
        const sequences = try gpa.alloc(*Sequence, words.len);
        errdefer gpa.free(sequences);
        for (sequences, words) |*sequence, word| sequence.* = try handle.sequenceOf(object, word);
        return .{ .sequences = sequences };
    }

    fn deinit(batch: Batch) void {
        gpa.free(batch.sequences);
    }
};

/// (cache, layer, sequences, token_counts, sequence_count, k, k_count, v, v_count, dtype, layout,
/// elements from head to head of a head-major input or 0)
pub fn append(
    word: u32,
    layer: u32,
    sequences: ?[*]const u8,
    token_counts: ?[*]const u8,
    sequence_count: u32,
    k: ?[*]const u8,
    k_count: u32,
    v: ?[*]const u8,
    v_count: u32,
    dtype: u32,
    layout: u32,
    head_stride: u32,
) callconv(.c) i32 {
    const use = handle.begin(.paged, word) catch |err| return status.fromError(err);
    defer use.end();
    return status.word(appendBatch(use, layer, sequences, token_counts, sequence_count, k, k_count, v, v_count, dtype, layout, head_stride));
}

fn appendBatch(
    use: handle.Use(.paged),
    layer: u32,
    sequences: ?[*]const u8,
    token_counts: ?[*]const u8,
    sequence_count: u32,
    k: ?[*]const u8,
    k_count: u32,
    v: ?[*]const u8,
    v_count: u32,
    dtype: u32,
    layout: u32,
    head_stride: u32,
) status.Error!void {
    const batch: Batch = try .init(use.object, try buffer.words(u32, sequences, sequence_count));
    defer batch.deinit();
    const counts = try buffer.copyWords(u32, gpa, token_counts, sequence_count);
    defer gpa.free(counts);
    const keys, const values = try buffer.inputs(k, k_count, v, v_count, dtype, layout, head_stride);
    try use.target.append(layer, batch.sequences, counts, keys, values);
}

/// (cache, beams, parents, count)
pub fn reorder(word: u32, beams: ?[*]const u8, parents: ?[*]const u8, beam_count: u32) callconv(.c) i32 {
    const use = handle.begin(.paged, word) catch |err| return status.fromError(err);
    defer use.end();
    return status.word(reorderBeams(use, beams, parents, beam_count));
}

fn reorderBeams(use: handle.Use(.paged), beams: ?[*]const u8, parents: ?[*]const u8, beam_count: u32) status.Error!void {
    const batch: Batch = try .init(use.object, try buffer.words(u32, beams, beam_count));
    defer batch.deinit();
    const indices = try buffer.copyWords(u32, gpa, parents, beam_count);
    defer gpa.free(indices);
    try use.target.reorder(batch.sequences, indices);
}

/// (cache, sequences, count): frees all sequences of the cache, whoever made them, but the given ones, which are emptied.
pub fn reset(word: u32, kept: ?[*]const u8, kept_count: u32) callconv(.c) i32 {
    const use = handle.begin(.paged, word) catch |err| return status.fromError(err);
    defer use.end();
    return status.word(resetCache(use, kept, kept_count));
}

fn resetCache(use: handle.Use(.paged), kept: ?[*]const u8, kept_count: u32) status.Error!void {
    const batch: Batch = try .init(use.object, try buffer.words(u32, kept, kept_count));
    defer batch.deinit();
    try handle.resetSequences(use.object, batch.sequences);
}

/// (cache, PolicyRecord, bytes)
pub fn updatePolicy(word: u32, options: ?[*]const u8, options_bytes: u32) callconv(.c) i32 {
    const use = handle.begin(.paged, word) catch |err| return status.fromError(err);
    defer use.end();
    return status.word(setPolicy(use.target, options, options_bytes));
}

fn setPolicy(cache: *PagedCache, options: ?[*]const u8, options_bytes: u32) status.Error!void {
    const parsed = try record.read(PolicyRecord, options, options_bytes);
    try cache.updatePolicy(try parsed.policy.read());
}

/// (cache, layer, HeadFidelityRecord[] out, bytes) -> KV heads. Writes as many as fit.
pub fn fidelity(word: u32, layer: u32, out: ?[*]u8, out_bytes: u32) callconv(.c) i32 {
    const use = handle.begin(.paged, word) catch |err| return status.fromError(err);
    defer use.end();
    const heads = use.target.fidelity(layer) catch |err| return status.fromError(err);
    if (heads.len == 0) return status.fromError(error.Unsupported);
    const head_dim = (use.target.layerShape(layer) catch unreachable).head_dim; // `fidelity` checked the layer
    var writer = record.Writer(HeadFidelityRecord).init(out, out_bytes) catch |err| return status.fromError(err);
    for (heads) |head| writer.append(.from(head, head_dim));
    return status.count(heads.len);
}

pub fn stats(word: u32, out: ?[*]u8, out_bytes: u32) callconv(.c) i32 {
    const use = handle.begin(.paged, word) catch |err| return status.fromError(err);
    defer use.end();
    const facts = use.target.stats() catch |err| return status.fromError(err);
    return status.word(record.write(StatsRecord, out, out_bytes, .{
        .sequence_count = facts.sequence_count,
        .tail_token_count = .from(facts.tail_token_count),
        .store_token_count = .from(facts.store_token_count),
        .warm_token_count = .from(facts.warm_token_count),
        .tail_bytes = .from(facts.tail_bytes),
        .store_bytes = .from(facts.store_bytes),
        .f32_bytes = .from(facts.f32_bytes),
        .table_entries = .from(facts.table_entries),
        .evictions = .from(facts.evictions),
        .metadata_bytes = .from(facts.metadata_bytes),
        .used_blocks = facts.used_blocks,
        .group_count = facts.group_count,
        .used_bytes = .from(facts.used_bytes),
        .reserved_bytes = .from(facts.reserved_bytes),
    }));
}

/// (cache, group, dtype_k, dtype_v, PoolStatsRecord out, bytes): the blocks of a layer group in one format.
pub fn poolStats(word: u32, group: u32, dtype_k: u32, dtype_v: u32, out: ?[*]u8, out_bytes: u32) callconv(.c) i32 {
    const use = handle.begin(.paged, word) catch |err| return status.fromError(err);
    defer use.end();
    return status.word(writePoolStats(use.target, group, dtype_k, dtype_v, out, out_bytes));
}

fn writePoolStats(cache: *const PagedCache, group: u32, k_word: u32, v_word: u32, out: ?[*]u8, out_bytes: u32) status.Error!void {
    const dtype_k = Dtype.fromWord(k_word) orelse return error.InvalidConfig;
    const dtype_v = Dtype.fromWord(v_word) orelse return error.InvalidConfig;
    try record.write(pool_bodies.StatsRecord, out, out_bytes, .from(try cache.poolStats(group, dtype_k, dtype_v)));
}
