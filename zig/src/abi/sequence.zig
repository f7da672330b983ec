//! Bodies of the exports of one sequence.
//!
//! Exports with an index serve both layouts: the handle is that of a sequence of a paged cache, and the index 0, or that of a
//! contiguous cache, and the index says which of its sequences. The others are of a paged cache alone.

const std = @import("std");
const buffer = @import("buffer.zig");
const handle = @import("handle.zig");
const memory = @import("memory.zig");
const Rank = @import("../cache/paged/cache.zig").Rank;
const record = @import("record.zig");
const SeenBlock = @import("../cache/paged/cache.zig").Sequence.SeenBlock;
const status = @import("status.zig");
const views_of = @import("../cache/view.zig");
const View = views_of.View;

const gpa = memory.gpa;

/// Where appended rows are, for views of them.
pub const AppendRecord = extern struct {
    size_bytes: u32 = 0,
    /// Position of the first row.
    start: u32,
    /// The layer's, now that the rows are there.
    generation: u32,
};

/// A window on rows in place: addresses for the runtimes to make arrays over.
pub const ViewRecord = extern struct {
    size_bytes: u32 = 0,
    /// First row of the first head.
    keys: record.Wide,
    values: record.Wide,
    /// Absolute position of the first row.
    start: u32,
    /// Rows.
    length: u32,
    dtype_k: u32,
    dtype_v: u32,
    /// In elements; 0 where a side is quantized.
    token_stride: u32,
    head_stride: u32,
    /// A `Tier`.
    tier: u32,
    /// What the positions of the rows moved by; 0, as no call moves them yet.
    delta: i32 = 0,
    generation: u32,
    /// Tokens the block can hold; 0 where there are no blocks.
    block_size: u32,
    /// A `Reason` why there is no such window, for `contiguous_kv`; 0 where there is one.
    reason: u32 = 0,
    /// Bytes of all heads of a side of a quantized block, which begin at `keys` and `values`; 0 for a side in floats.
    bytes_k: u32,
    bytes_v: u32,

    fn from(view: View, generation_now: u32) ViewRecord {
        return .{
            .keys = .from(@intFromPtr(view.keys)),
            .values = .from(@intFromPtr(view.values)),
            .start = view.start,
            .length = view.row_count,
            .dtype_k = @intFromEnum(view.dtype_k),
            .dtype_v = @intFromEnum(view.dtype_v),
            .token_stride = view.token_stride,
            .head_stride = view.head_stride,
            .tier = @intFromEnum(view.tier),
            .generation = generation_now,
            .block_size = view.block_size,
            .bytes_k = view.bytes_k,
            .bytes_v = view.bytes_v,
        };
    }
};

/// A generation in 31 bits, so that it is a positive result.
fn generationWord(number: u32) u32 {
    return number & std.math.maxInt(i32);
}

pub fn create(word: u32) callconv(.c) i32 {
    const use = handle.begin(.paged, word) catch |err| return status.fromError(err);
    defer use.end();
    const sequence = use.target.createSequence() catch |err| return status.fromError(err);
    return handle.createSequence(use.object, sequence) catch |err| {
        use.target.freeSequence(sequence);
        return status.fromError(err);
    };
}

pub fn free(word: u32) callconv(.c) i32 {
    return status.word(handle.free(.sequence, word));
}

/// (sequence) -> the handle of its cache
pub fn cacheOf(word: u32) callconv(.c) i32 {
    return handle.cacheOf(word) catch |err| status.fromError(err);
}

/// A new sequence that shares all committed rows.
pub fn fork(word: u32) callconv(.c) i32 {
    const use = handle.begin(.sequence, word) catch |err| return status.fromError(err);
    defer use.end();
    const cache = use.target.cache;
    const child = cache.fork(use.target) catch |err| return status.fromError(err);
    return handle.createSequence(use.object, child) catch |err| {
        cache.freeSequence(child);
        return status.fromError(err);
    };
}

/// (sequence, index, layer, k, k_count, v, v_count, dtype, layout, elements from head to head of a head-major input or 0,
/// AppendRecord out, bytes) -> start
pub fn append(
    word: u32,
    index: u32,
    layer: u32,
    k: ?[*]const u8,
    k_count: u32,
    v: ?[*]const u8,
    v_count: u32,
    dtype: u32,
    layout: u32,
    head_stride: u32,
    appended: ?[*]u8,
    appended_bytes: u32,
) callconv(.c) i32 {
    const use = handle.beginSequence(word, index) catch |err| return status.fromError(err);
    defer use.end();
    const keys, const values = buffer.inputs(k, k_count, v, v_count, dtype, layout, head_stride) catch |err| return status.fromError(err);
    // The record first: a refused append has written nothing.
    if (appended_bytes != 0) _ = record.strideOf(appended, appended_bytes) catch |err| return status.fromError(err);
    const start = use.target.append(layer, keys, values) catch |err| return status.fromError(err);
    if (appended_bytes != 0) record.write(AppendRecord, appended, appended_bytes, .{
        .start = start,
        .generation = generationWord(use.target.generation(layer) catch unreachable), // the append checked the layer
    }) catch |err| return status.fromError(err);
    return status.count(start);
}

pub fn commit(word: u32, index: u32, token_count: u32) callconv(.c) i32 {
    const use = handle.beginSequence(word, index) catch |err| return status.fromError(err);
    defer use.end();
    return status.word(use.target.commit(token_count));
}

/// (sequence, index, indices of the pending rows that stay, count): the others are dropped.
pub fn commitKept(word: u32, index: u32, kept: ?[*]const u8, kept_count: u32) callconv(.c) i32 {
    const use = handle.beginSequence(word, index) catch |err| return status.fromError(err);
    defer use.end();
    if (kept_count > std.math.maxInt(i32)) return status.fromError(error.InvalidSize);
    const indices = buffer.copyWords(u32, gpa, kept, kept_count) catch |err| return status.fromError(err);
    defer gpa.free(indices);
    return status.word(use.target.commitKept(indices));
}

/// (sequence, tokens of the pending rows, count, priority, milliseconds it lasts or 0): a commit that tells them.
pub fn commitTokens(word: u32, tokens: ?[*]const u8, token_count: u32, priority: u32, ttl_ms: u32) callconv(.c) i32 {
    const use = handle.begin(.sequence, word) catch |err| return status.fromError(err);
    defer use.end();
    const rank = rankOf(priority, ttl_ms) catch |err| return status.fromError(err);
    const told = buffer.copyWords(u32, gpa, tokens, token_count) catch |err| return status.fromError(err);
    defer gpa.free(told);
    return status.word(use.target.commitTokens(told, rank));
}

fn rankOf(priority: u32, ttl_ms: u32) error{InvalidConfig}!Rank {
    return .{
        .priority = std.math.cast(u8, priority) orelse return error.InvalidConfig,
        .ttl_ms = if (ttl_ms == 0) null else ttl_ms,
    };
}

/// (sequence, indices of the pending rows that stay, count, their tokens, count, priority, milliseconds it lasts or 0)
pub fn commitKeptTokens(
    word: u32,
    kept: ?[*]const u8,
    kept_count: u32,
    tokens: ?[*]const u8,
    token_count: u32,
    priority: u32,
    ttl_ms: u32,
) callconv(.c) i32 {
    const use = handle.begin(.sequence, word) catch |err| return status.fromError(err);
    defer use.end();
    if (kept_count > std.math.maxInt(i32)) return status.fromError(error.InvalidSize);
    const rank = rankOf(priority, ttl_ms) catch |err| return status.fromError(err);
    const indices = buffer.copyWords(u32, gpa, kept, kept_count) catch |err| return status.fromError(err);
    defer gpa.free(indices);
    const told = buffer.copyWords(u32, gpa, tokens, token_count) catch |err| return status.fromError(err);
    defer gpa.free(told);
    return status.word(use.target.commitKeptTokens(indices, told, rank));
}

pub fn truncate(word: u32, index: u32, seq_len: u32) callconv(.c) i32 {
    const use = handle.beginSequence(word, index) catch |err| return status.fromError(err);
    defer use.end();
    return status.word(use.target.truncate(seq_len));
}

pub fn seqLen(word: u32, index: u32) callconv(.c) i32 {
    const use = handle.beginSequence(word, index) catch |err| return status.fromError(err);
    defer use.end();
    return status.count(use.target.seqLen() catch |err| return status.fromError(err));
}

/// The smallest length such that a truncate to it, and to all from it up to the present one, is exact.
pub fn rewindableTo(word: u32, index: u32) callconv(.c) i32 {
    const use = handle.beginSequence(word, index) catch |err| return status.fromError(err);
    defer use.end();
    return status.count(use.target.rewindableTo() catch |err| return status.fromError(err));
}

/// Committed and pending rows of a layer, evicted ones included.
pub fn rowCount(word: u32, index: u32, layer: u32) callconv(.c) i32 {
    const use = handle.beginSequence(word, index) catch |err| return status.fromError(err);
    defer use.end();
    const rows = use.target.rows(layer) catch |err| return status.fromError(err);
    return status.count(rows.row_count);
}

/// Rows of a layer that are there: those that `gather` copies.
pub fn residentCount(word: u32, index: u32, layer: u32) callconv(.c) i32 {
    const use = handle.beginSequence(word, index) catch |err| return status.fromError(err);
    defer use.end();
    const rows = use.target.rows(layer) catch |err| return status.fromError(err);
    return status.count(rows.residentCount());
}

pub fn generation(word: u32, index: u32, layer: u32) callconv(.c) i32 {
    const use = handle.beginSequence(word, index) catch |err| return status.fromError(err);
    defer use.end();
    return status.count(generationWord(use.target.generation(layer) catch |err| return status.fromError(err)));
}

/// (sequence, index, layer, start, view_first, ViewRecord[] out, bytes) -> views of the resident rows at `start` or later,
/// ascending. Writes those from number `view_first` on, as many as fit; the first record's first word is the size of each.
pub fn views(
    word: u32,
    index: u32,
    layer: u32,
    start: u32,
    view_first: u32,
    out: ?[*]u8,
    out_bytes: u32,
) callconv(.c) i32 {
    const use = handle.beginSequence(word, index) catch |err| return status.fromError(err);
    defer use.end();
    var each = use.target.viewsFrom(layer, start) catch |err| return status.fromError(err);
    var writer = record.Writer(ViewRecord).init(out, out_bytes) catch |err| return status.fromError(err);
    const generation_now = generationWord(use.target.generation(layer) catch unreachable); // `viewsFrom` checked the layer
    var count: u32 = 0;
    while (each.next()) |view| : (count += 1) {
        if (count >= view_first) writer.append(.from(view, generation_now));
    }
    return status.count(count);
}

/// (sequence, index, layer, row_count, ViewRecord out, bytes) -> rows; the record's `reason` is not 0 where the rows do not
/// lie in one piece, token-major. Never copies.
pub fn contiguousKv(word: u32, index: u32, layer: u32, row_count: u32, out: ?[*]u8, out_bytes: u32) callconv(.c) i32 {
    const use = handle.beginSequence(word, index) catch |err| return status.fromError(err);
    defer use.end();
    const found = use.target.contiguousKv(layer, row_count) catch |err| return status.fromError(err);
    const generation_now = generationWord(use.target.generation(layer) catch unreachable); // the line above checked the layer
    var answer: ViewRecord = std.mem.zeroes(ViewRecord);
    switch (found) {
        .view => |view| answer = .from(view, generation_now),
        .reason => |reason| answer.reason = @intFromEnum(reason),
    }
    answer.generation = generation_now;
    record.write(ViewRecord, out, out_bytes, answer) catch |err| return status.fromError(err);
    return status.count(row_count);
}

/// What stands for all rows that are seen, where a call takes a count of them.
pub const all_rows = std.math.maxInt(u32);

/// (sequence, index, layer, start, row_count or `all_rows`, k out, k_count, v out, v_count, dtype, layout, elements from head to
/// head of a head-major output or 0) -> rows
pub fn gather(
    word: u32,
    index: u32,
    layer: u32,
    start: u32,
    row_count: u32,
    k: ?[*]u8,
    k_count: u32,
    v: ?[*]u8,
    v_count: u32,
    dtype: u32,
    layout: u32,
    head_stride: u32,
) callconv(.c) i32 {
    const use = handle.beginSequence(word, index) catch |err| return status.fromError(err);
    defer use.end();
    const k_out, const v_out = buffer.outputs(k, k_count, v, v_count, dtype, layout, head_stride) catch |err|
        return status.fromError(err);
    const count = if (row_count == all_rows) null else row_count;
    return status.count(use.target.gatherRange(layer, .{ .start = start, .count = count }, k_out, v_out) catch |err|
        return status.fromError(err));
}

/// A `Device`: 0 for the CPU.
pub fn layerDevice(word: u32, index: u32, layer: u32) callconv(.c) i32 {
    const use = handle.beginSequence(word, index) catch |err| return status.fromError(err);
    defer use.end();
    const device = use.target.layerDevice(layer) catch |err| return status.fromError(err);
    return status.count(@intFromEnum(device));
}

/// (sequence, layer, i32[] out, count) -> entries: the blocks of the layer's rows in order, -1 where none of them is seen.
/// Writes as many as fit.
pub fn blockTable(word: u32, layer: u32, out: ?[*]u8, out_count: u32) callconv(.c) i32 {
    return eachBlock(word, layer, out, out_count, struct {
        fn number(seen: ?SeenBlock) i32 {
            return if (seen) |block| block.block else -1;
        }
    }.number);
}

/// (sequence, layer, i32[] out, count) -> entries: the references of each block of `blockTable`, 0 for -1.
pub fn blockReferences(word: u32, layer: u32, out: ?[*]u8, out_count: u32) callconv(.c) i32 {
    return eachBlock(word, layer, out, out_count, struct {
        fn number(seen: ?SeenBlock) i32 {
            return if (seen) |block| status.count(block.ref_count) else 0;
        }
    }.number);
}

/// (sequence, layer, i32[] out, count) -> entries: the tier of each block of `blockTable`, -1 for -1.
pub fn blockTiers(word: u32, layer: u32, out: ?[*]u8, out_count: u32) callconv(.c) i32 {
    return eachBlock(word, layer, out, out_count, struct {
        fn number(seen: ?SeenBlock) i32 {
            return if (seen) |block| @intCast(@intFromEnum(block.tier)) else -1;
        }
    }.number);
}

fn eachBlock(word: u32, layer: u32, out: ?[*]u8, out_count: u32, number: fn (seen: ?SeenBlock) i32) i32 {
    const use = handle.begin(.sequence, word) catch |err| return status.fromError(err);
    defer use.end();
    const blocks = use.target.blockTable(layer) catch |err| return status.fromError(err);
    const entries: [*]align(1) i32 = @ptrCast(buffer.out(out, out_count) catch |err| return status.fromError(err));
    for (0..@min(blocks.len, out_count)) |i| entries[i] = number(use.target.seenBlock(layer, @intCast(i)));
    return status.count(blocks.len);
}
