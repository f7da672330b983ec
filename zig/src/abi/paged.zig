//! Bodies of the exports of a paged cache: making one, and the calls in which several of its sequences take part.

const std = @import("std");
const attention = @import("../attention/attend.zig");
const attend_options = @import("attend.zig");
const buffer = @import("buffer.zig");
const Dtype = @import("../dtype.zig").Dtype;
const handle = @import("handle.zig");
const memory = @import("memory.zig");
const paged = @import("../cache/paged/cache.zig");
const PagedCache = paged.PagedCache;
const Sequence = paged.Sequence;
const pool_bodies = @import("pool.zig");
const record = @import("record.zig");
const status = @import("status.zig");

const gpa = memory.gpa;

/// What a paged cache is made of. Its layers come in a buffer beside it.
const PagedRecord = extern struct {
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

const PolicyRecord = extern struct {
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

/// Words of a layer in the buffer beside the record: kv_head_count, head_dim, window_tokens (0 for all), its own store, as
/// in a policy, and q_head_count (0 where the length of the queries tells). Words are appended, as in a record: a caller
/// may know no more than the first ones.
const layer_words = 6;
const layer_words_min = 5;

/// Words of each layer in a caller's buffer of all of them.
fn layerStride(layer_word_count: u32, layer_count: u32) error{InvalidSize}!u32 {
    if (layer_count == 0) return if (layer_word_count == 0) layer_words else error.InvalidSize;
    const stride = layer_word_count / layer_count;
    if (layer_word_count % layer_count != 0 or stride < layer_words_min) return error.InvalidSize;
    return @min(stride, layer_words);
}

const StatsRecord = extern struct {
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

/// More sequences than this take part in no call.
const batch_max = 1 << 16;

pub fn create(options: ?[*]const u8, options_bytes: u32, layers: ?[*]const u8, layer_word_count: u32) callconv(.c) i32 {
    return createCache(options, options_bytes, layers, layer_word_count) catch |err| status.fromError(err);
}

fn createCache(source: ?[*]const u8, source_bytes: u32, layers: ?[*]const u8, layer_word_count: u32) status.Error!i32 {
    const options = try record.read(PagedRecord, source, source_bytes);
    const stride = try layerStride(layer_word_count, options.layer_count);
    if (layer_word_count != @as(u64, options.layer_count) * stride) return error.InvalidSize;
    const words = try buffer.copyWords(u32, gpa, layers, layer_word_count);
    defer gpa.free(words);
    const list = try gpa.alloc(paged.Layer, options.layer_count);
    defer gpa.free(list);
    for (list, 0..) |*layer, i| {
        const own = words[i * stride ..][0..stride];
        const q_head_count = if (stride > layer_words_min) own[5] else 0;
        layer.* = .{
            .kv_head_count = own[0],
            .head_dim = own[1],
            .q_head_count = if (q_head_count == 0) null else q_head_count,
            .window_tokens = if (own[2] == 0) null else own[2],
            .store = try storeOf(own[3], own[4]),
        };
    }
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
    });
    errdefer cache.deinit();
    return handle.create(.paged, .{ .paged = .{ .cache = cache, .pool = pool } }, pool);
}

pub fn free(word: u32) callconv(.c) i32 {
    return status.word(handle.free(.paged, word));
}

/// The record and the layers a cache was made of.
pub fn config(word: u32, out: ?[*]u8, out_bytes: u32, layers: ?[*]u8, layer_word_count: u32) callconv(.c) i32 {
    const use = handle.begin(.paged, word) catch |err| return status.fromError(err);
    defer use.end();
    return status.word(writeConfig(use.target, out, out_bytes, layers, layer_word_count));
}

fn writeConfig(cache: *const PagedCache, out: ?[*]u8, out_bytes: u32, layers: ?[*]u8, layer_word_count: u32) status.Error!void {
    const stride = if (layer_word_count == 0) 0 else try layerStride(layer_word_count, cache.layerCount());
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
    });
    if (layer_word_count == 0) return;
    const words: [*]align(1) u32 = @ptrCast(try buffer.out(layers, layer_word_count));
    for (cache.state.layers, 0..) |grouped, i| {
        const group = cache.state.groups[grouped.group];
        const store_k, const store_v = storeWords(group.store);
        const own = [layer_words]u32{
            group.shape.kv_head_count,
            group.shape.head_dim,
            group.window_tokens orelse 0,
            store_k,
            store_v,
            grouped.q_head_count orelse 0,
        };
        for (own[0..stride], words[i * stride ..][0..stride]) |from, *to| to.* = from;
    }
}

/// The sequences of a batch. Call with the cache locked.
const Batch = struct {
    sequences: []*Sequence,

    fn init(object: *const handle.Object, words: []align(1) const u32) status.Error!Batch {
        if (words.len > batch_max) return error.InvalidConfig;
        const sequences = try gpa.alloc(*Sequence, words.len);
        errdefer gpa.free(sequences);
        for (sequences, words) |*sequence, word| sequence.* = try handle.sequenceOf(object, word);
        return .{ .sequences = sequences };
    }

    fn deinit(batch: Batch) void {
        gpa.free(batch.sequences);
    }
};

/// (cache, layer, sequences, token_counts, sequence_count, k, k_count, v, v_count, dtype, layout)
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
) callconv(.c) i32 {
    const use = handle.begin(.paged, word) catch |err| return status.fromError(err);
    defer use.end();
    return status.word(appendBatch(use, layer, sequences, token_counts, sequence_count, k, k_count, v, v_count, dtype, layout));
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
) status.Error!void {
    const batch: Batch = try .init(use.object, try buffer.words(u32, sequences, sequence_count));
    defer batch.deinit();
    const counts = try buffer.copyWords(u32, gpa, token_counts, sequence_count);
    defer gpa.free(counts);
    const keys, const values = try buffer.inputs(k, k_count, v, v_count, dtype, layout);
    try use.target.append(layer, batch.sequences, counts, keys, values);
}

/// (cache, layer, sequences, query_counts, sequence_count, q, q_count, AttendRecord, bytes, alibi_slopes, count,
/// sink_logits, count, tree_parents, count, output, output_count, lse, lse_count): the queries of the sequences stand one
/// after the other, [query][q_head][head_dim], and so do the parents, each an index among the queries of its sequence. The
/// record's query_count is unused.
pub fn attend(
    word: u32,
    layer: u32,
    sequences: ?[*]const u8,
    query_counts: ?[*]const u8,
    sequence_count: u32,
    q: ?[*]const u8,
    q_count: u32,
    options: ?[*]const u8,
    options_bytes: u32,
    alibi_slopes: ?[*]const u8,
    alibi_slope_count: u32,
    sink_logits: ?[*]const u8,
    sink_logit_count: u32,
    tree_parents: ?[*]const u8,
    tree_parent_count: u32,
    output: ?[*]u8,
    output_count: u32,
    lse: ?[*]u8,
    lse_count: u32,
) callconv(.c) i32 {
    const use = handle.begin(.paged, word) catch |err| return status.fromError(err);
    defer use.end();
    const parsed = attend_options.read(
        options,
        options_bytes,
        alibi_slopes,
        alibi_slope_count,
        sink_logits,
        sink_logit_count,
        tree_parents,
        tree_parent_count,
    ) catch |err| return status.fromError(err);
    return status.word(attendBatch(
        use,
        layer,
        buffer.words(u32, sequences, sequence_count) catch |err| return status.fromError(err),
        query_counts,
        buffer.words(f32, q, q_count) catch |err| return status.fromError(err),
        parsed,
        buffer.floatsOut(output, output_count) catch |err| return status.fromError(err),
        buffer.floatsOut(lse, lse_count) catch |err| return status.fromError(err),
    ));
}

fn attendBatch(
    use: handle.Use(.paged),
    layer: u32,
    sequences: []align(1) const u32,
    query_count_words: ?[*]const u8,
    q: []align(1) const f32,
    options: attention.Options,
    output: []align(1) f32,
    lse: []align(1) f32,
) status.Error!void {
    const shape = try use.target.layerShape(layer);
    if (sequences.len == 0) return if (q.len == 0) {} else error.InvalidSize;
    const batch: Batch = try .init(use.object, sequences);
    defer batch.deinit();
    const query_counts = try buffer.copyWords(u32, gpa, query_count_words, @intCast(sequences.len));
    defer gpa.free(query_counts);
    var query_count: u64 = 0;
    for (query_counts) |count| query_count += count;
    // Parents are checked and then followed, as those of one sequence.
    if (options.tree_parents.len != 0 and options.tree_parents.len != query_count) return error.InvalidSize;
    const parents = try gpa.alloc(i32, options.tree_parents.len);
    defer gpa.free(parents);
    for (parents, options.tree_parents) |*to, from| to.* = from;
    const row_elements = query_count * shape.head_dim;
    if (query_count == 0 or q.len % row_elements != 0) return error.InvalidSize;
    const q_head_count: usize = @intCast(q.len / row_elements);
    if (output.len < q.len) return error.InvalidSize;
    if (lse.len != 0 and lse.len < query_count * q_head_count) return error.InvalidSize;

    // All calls are checked before the first is run: a refused batch has written nothing.
    const queries = try gpa.alloc(attention.Query, sequences.len);
    defer gpa.free(queries);
    var made: usize = 0;
    var first: usize = 0;
    for (batch.sequences, query_counts) |sequence, count| {
        if (count == 0) continue;
        const stored = try sequence.rows(layer);
        try attention.Query.checkMemory(&stored, q, options, output, lse);
        var own = options;
        own.query_count = count;
        if (parents.len != 0) own.tree_parents = parents[first..][0..count];
        const rows = @as(usize, count) * q_head_count;
        const at = first * q_head_count;
        queries[made] = try .init(
            stored,
            q[at * shape.head_dim ..][0 .. rows * shape.head_dim],
            own,
            output[at * shape.head_dim ..][0 .. rows * shape.head_dim],
            if (lse.len == 0) lse else lse[at..][0..rows],
        );
        made += 1;
        first += count;
    }
    attention.run(queries[0..made]);
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

/// Numbers of a KV head in `fidelity`.
const fidelity_numbers = 10;

/// (cache, layer, f64[kv_head][10] out, count) -> KV heads: of keys and then of values the rows measured, the mean and the
/// smallest cosine, and the largest error of a row; the largest softmax_scale * |q| seen, and the bound of a score's error.
/// Writes as many heads as fit.
pub fn fidelity(word: u32, layer: u32, out: ?[*]u8, out_count: u32) callconv(.c) i32 {
    const use = handle.begin(.paged, word) catch |err| return status.fromError(err);
    defer use.end();
    const heads = use.target.fidelity(layer) catch |err| return status.fromError(err);
    if (heads.len == 0) return status.fromError(error.Unsupported);
    const numbers: [*]align(1) f64 = @ptrCast(buffer.out(out, out_count) catch |err| return status.fromError(err));
    const head_dim = (use.target.layerShape(layer) catch unreachable).head_dim; // `fidelity` checked the layer
    for (heads[0..@min(heads.len, out_count / fidelity_numbers)], 0..) |head, i| {
        const line = [fidelity_numbers]f64{
            @floatFromInt(head.keys.row_count),
            head.keys.cosineMean(),
            head.keys.cosine_min,
            head.keys.error_max,
            @floatFromInt(head.values.row_count),
            head.values.cosineMean(),
            head.values.cosine_min,
            head.values.error_max,
            head.query_norm_max,
            head.logitErrorBound(head_dim),
        };
        for (line, numbers[i * fidelity_numbers ..][0..fidelity_numbers]) |from, *to| to.* = from;
    }
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
