//! Bodies of the exports of a paged cache: making one, and the calls in which several of its sequences take part.

const std = @import("std");
const attention = @import("../attention/attend.zig");
const attend_options = @import("attend.zig");
const buffer = @import("buffer.zig");
const cpu = @import("../device/cpu.zig");
const Dtype = @import("../dtype.zig").Dtype;
const handle = @import("handle.zig");
const paged = @import("../cache/paged.zig");
const PagedCache = paged.PagedCache;
const Sequence = paged.Sequence;
const pool_bodies = @import("pool.zig");
const record = @import("record.zig");
const status = @import("status.zig");

const gpa = std.heap.c_allocator;

/// What a paged cache is made of. Its layers come in a buffer: kv_head_count, head_dim and window_tokens of each.
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
};

/// Words of a layer in the buffer beside the record.
const layer_words = @sizeOf(paged.Layer) / 4;

const StatsRecord = extern struct {
    size_bytes: u32 = 0,
    sequence_count: u32,
    token_count: record.Wide,
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
    const words = try buffer.words(u32, layers, layer_word_count);
    if (words.len != @as(u64, options.layer_count) * layer_words) return error.InvalidSize;
    const list = try gpa.alloc(paged.Layer, options.layer_count);
    defer gpa.free(list);
    for (list, 0..) |*layer, i| layer.* = .{
        .kv_head_count = words[i * layer_words],
        .head_dim = words[i * layer_words + 1],
        .window_tokens = words[i * layer_words + 2],
    };
    const max_bytes = options.max_bytes.value();
    if (options.pool != 0 and max_bytes != 0) return error.InvalidConfig;
    const pool = if (options.pool == 0) null else try handle.retain(.pool, options.pool);
    defer if (pool) |object| handle.release(object);
    if (options.retention_tokens == 0 and options.retention_sink_tokens != 0) return error.InvalidConfig;
    var cache: PagedCache = try .init(gpa, .{
        .layers = list,
        .block_size = options.block_size,
        .max_seq_len = options.max_seq_len,
        .dtype_k = Dtype.fromWord(options.dtype_k) orelse return error.InvalidConfig,
        .dtype_v = Dtype.fromWord(options.dtype_v) orelse return error.InvalidConfig,
        .retention = .{
            .tokens = if (options.retention_tokens == 0) null else options.retention_tokens,
            .sink_tokens = options.retention_sink_tokens,
        },
        .max_bytes = if (max_bytes == 0) cpu.memoryLimit() else max_bytes,
        .pool = if (pool) |object| &object.body.pool else null,
    });
    errdefer cache.deinit();
    return handle.create(.paged, .{ .paged = .{ .cache = cache, .pool = pool } });
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
    if (layer_word_count != 0 and layer_word_count < cache.layerCount() * layer_words) return error.InvalidSize;
    try record.write(PagedRecord, out, out_bytes, .{
        .layer_count = cache.layerCount(),
        .block_size = cache.block_size,
        .max_seq_len = cache.max_seq_len,
        .dtype_k = @intFromEnum(cache.dtype_k),
        .dtype_v = @intFromEnum(cache.dtype_v),
        .retention_tokens = cache.retention.tokens orelse 0,
        .retention_sink_tokens = cache.retention.sink_tokens,
        .max_bytes = .{},
        .pool = 0,
        .group_count = @intCast(cache.groups.len),
    });
    if (layer_word_count == 0) return;
    const words: [*]align(1) u32 = @ptrCast(try buffer.out(layers, layer_word_count));
    for (cache.places, 0..) |place, i| {
        const group = cache.groups[place.group];
        words[i * layer_words] = group.shape.kv_head_count;
        words[i * layer_words + 1] = group.shape.head_dim;
        words[i * layer_words + 2] = group.window_tokens orelse 0;
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
/// after the other, [query][q_head][head_dim]; the record's query_count is unused.
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
        null,
        0,
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
        var own = options;
        own.query_count = count;
        const rows = @as(usize, count) * q_head_count;
        const at = first * q_head_count;
        queries[made] = try .init(
            try sequence.rows(layer),
            q[at * shape.head_dim ..][0 .. rows * shape.head_dim],
            own,
            output[at * shape.head_dim ..][0 .. rows * shape.head_dim],
            if (lse.len == 0) lse else lse[at..][0..rows],
        );
        made += 1;
        first += count;
    }
    for (queries[0..made]) |*query| query.run();
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

pub fn stats(word: u32, out: ?[*]u8, out_bytes: u32) callconv(.c) i32 {
    const use = handle.begin(.paged, word) catch |err| return status.fromError(err);
    defer use.end();
    const facts = use.target.stats();
    var used_blocks: u32 = 0;
    var used_bytes: u64 = 0;
    var reserved_bytes: u64 = 0;
    var metadata_bytes = facts.metadata_bytes;
    for (use.target.groups) |group| {
        const pool = group.pool.stats();
        used_blocks += pool.used_blocks;
        used_bytes += pool.used_blocks * pool.block_bytes;
        reserved_bytes += pool.reserved_bytes;
        metadata_bytes += pool.metadata_bytes;
    }
    return status.word(record.write(StatsRecord, out, out_bytes, .{
        .sequence_count = facts.sequence_count,
        .token_count = .from(facts.token_count),
        .table_entries = .from(facts.table_entries),
        .evictions = .from(facts.evictions),
        .metadata_bytes = .from(metadata_bytes),
        .used_blocks = used_blocks,
        .group_count = @intCast(use.target.groups.len),
        .used_bytes = .from(used_bytes),
        .reserved_bytes = .from(reserved_bytes),
    }));
}

/// (cache, group, PoolStatsRecord out, bytes): the pool of a layer group.
pub fn poolStats(word: u32, group: u32, out: ?[*]u8, out_bytes: u32) callconv(.c) i32 {
    const use = handle.begin(.paged, word) catch |err| return status.fromError(err);
    defer use.end();
    if (group >= use.target.groups.len) return status.fromError(error.LayerOutOfRange);
    return status.word(record.write(pool_bodies.StatsRecord, out, out_bytes, .from(use.target.groups[group].pool)));
}
