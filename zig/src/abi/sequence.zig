//! Bodies of the exports of one sequence of a paged cache.

const std = @import("std");
const attend_options = @import("attend.zig");
const buffer = @import("buffer.zig");
const handle = @import("handle.zig");
const memory = @import("memory.zig");
const record = @import("record.zig");
const Rows = @import("../cache/rows.zig").Rows;
const Sequence = @import("../cache/paged/cache.zig").Sequence;
const shapes = @import("../shape.zig");
const status = @import("status.zig");
const view = @import("view.zig");
const ViewRecord = view.ViewRecord;

const gpa = memory.gpa;

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

/// (sequence, layer, k, k_count, v, v_count, dtype, layout) -> start
pub fn append(
    word: u32,
    layer: u32,
    k: ?[*]const u8,
    k_count: u32,
    v: ?[*]const u8,
    v_count: u32,
    dtype: u32,
    layout: u32,
) callconv(.c) i32 {
    const use = handle.begin(.sequence, word) catch |err| return status.fromError(err);
    defer use.end();
    const keys, const values = buffer.inputs(k, k_count, v, v_count, dtype, layout) catch |err| return status.fromError(err);
    return status.count(use.target.append(layer, keys, values) catch |err| return status.fromError(err));
}

pub fn commit(word: u32, token_count: u32) callconv(.c) i32 {
    const use = handle.begin(.sequence, word) catch |err| return status.fromError(err);
    defer use.end();
    return status.word(use.target.commit(token_count));
}

/// (sequence, indices of the pending rows that stay, count): the others are dropped.
pub fn commitKept(word: u32, kept: ?[*]const u8, kept_count: u32) callconv(.c) i32 {
    const use = handle.begin(.sequence, word) catch |err| return status.fromError(err);
    defer use.end();
    if (kept_count > use.target.cache.state.max_seq_len) return status.fromError(error.InvalidSize);
    const indices = buffer.copyWords(u32, gpa, kept, kept_count) catch |err| return status.fromError(err);
    defer gpa.free(indices);
    return status.word(use.target.commitKept(indices));
}

pub fn truncate(word: u32, seq_len: u32) callconv(.c) i32 {
    const use = handle.begin(.sequence, word) catch |err| return status.fromError(err);
    defer use.end();
    return status.word(use.target.truncate(seq_len));
}

pub fn seqLen(word: u32) callconv(.c) i32 {
    const use = handle.begin(.sequence, word) catch |err| return status.fromError(err);
    defer use.end();
    return status.count(use.target.seqLen());
}

/// The smallest length such that a truncate to it, and to all from it up to the present one, is exact.
pub fn rewindableTo(word: u32) callconv(.c) i32 {
    const use = handle.begin(.sequence, word) catch |err| return status.fromError(err);
    defer use.end();
    return status.count(use.target.rewindableTo());
}

/// Committed and pending rows of a layer, evicted ones included.
pub fn rowCount(word: u32, layer: u32) callconv(.c) i32 {
    const use = handle.begin(.sequence, word) catch |err| return status.fromError(err);
    defer use.end();
    const rows = use.target.rows(layer) catch |err| return status.fromError(err);
    return status.count(rows.row_count);
}

/// Rows of a layer that are there: those that `gather` copies.
pub fn residentCount(word: u32, layer: u32) callconv(.c) i32 {
    const use = handle.begin(.sequence, word) catch |err| return status.fromError(err);
    defer use.end();
    const rows = use.target.rows(layer) catch |err| return status.fromError(err);
    return status.count(rows.residentCount());
}

pub fn generation(word: u32, layer: u32) callconv(.c) i32 {
    const use = handle.begin(.sequence, word) catch |err| return status.fromError(err);
    defer use.end();
    return status.count(view.generationWord(use.target.generation(layer) catch |err| return status.fromError(err)));
}

/// (sequence, layer, start, view_first, ViewRecord[] out, bytes) -> views: one for each block that holds resident rows at
/// `start` or later, ascending. Writes those from number `view_first` on, as many as fit; each record's first word is its
/// size, as the caller set it in the first one.
pub fn views(word: u32, layer: u32, start: u32, view_first: u32, out: ?[*]u8, out_bytes: u32) callconv(.c) i32 {
    const use = handle.begin(.sequence, word) catch |err| return status.fromError(err);
    defer use.end();
    return writeViews(use.target, layer, start, view_first, out, out_bytes) catch |err| status.fromError(err);
}

fn writeViews(sequence: *const Sequence, layer: u32, start: u32, view_first: u32, out: ?[*]u8, out_bytes: u32) status.Error!i32 {
    const rows = try sequence.rows(layer);
    const generation_now = view.generationWord(try sequence.generation(layer));
    const bytes = try buffer.out(out, out_bytes);
    const record_bytes = @sizeOf(ViewRecord);
    var count: u32 = 0;
    var written: u32 = 0;
    var position = start;
    while (position < rows.row_count) {
        const run_end = blockEnd(rows, position) orelse {
            position = rows.first;
            continue;
        };
        if (count >= view_first and (written + 1) * record_bytes <= out_bytes) {
            const one = bytes + written * record_bytes;
            std.mem.writeInt(u32, one[0..4], record_bytes, .little);
            try record.write(ViewRecord, one, record_bytes, blockView(sequence, layer, rows, position, run_end, generation_now));
            written += 1;
        }
        count += 1;
        position = run_end;
    }
    return status.count(count);
}

/// The end of the resident rows from `position` on in its block, or null where the row there was evicted.
fn blockEnd(rows: Rows, position: u32) ?u32 {
    const end = rows.residentEnd(position) orelse return null;
    const block_size = rows.memory.paged.block_size;
    return @min(end, (position / block_size + 1) * block_size);
}

fn blockView(sequence: *const Sequence, layer: u32, rows: Rows, position: u32, end: u32, generation_now: u32) ViewRecord {
    const shape = rows.memory.paged.formatAt(position).shape;
    const run = rows.run(0, position, end);
    return .{
        .keys = .from(@intFromPtr(run.keys)),
        .values = .from(@intFromPtr(run.values)),
        .start = position,
        .length = end - position,
        .dtype_k = @intFromEnum(shape.dtype_k),
        .dtype_v = @intFromEnum(shape.dtype_v),
        .token_stride = if (shape.isFloat()) shape.head_dim else 0,
        .head_stride = if (shape.isFloat()) shape.block_size * shape.head_dim else 0,
        .tier = @intFromEnum(sequence.tier(layer, position)),
        .generation = generation_now,
        .block_size = shape.block_size,
        .bytes_k = codeBytes(shape, .keys),
        .bytes_v = codeBytes(shape, .values),
    };
}

fn codeBytes(shape: shapes.BlockShape, side: shapes.Side) u32 {
    return if (shape.dtype(side).isFloat()) 0 else @intCast(shape.sideBytes(side));
}

/// (sequence, layer, row_count, ViewRecord out, bytes) -> rows; the record's `reason` is not 0 where the rows do not lie
/// in one piece, token-major. Never copies.
pub fn contiguousKv(word: u32, layer: u32, row_count: u32, out: ?[*]u8, out_bytes: u32) callconv(.c) i32 {
    const use = handle.begin(.sequence, word) catch |err| return status.fromError(err);
    defer use.end();
    return writeContiguous(use.target, layer, row_count, out, out_bytes) catch |err| status.fromError(err);
}

fn writeContiguous(sequence: *const Sequence, layer: u32, row_count: u32, out: ?[*]u8, out_bytes: u32) status.Error!i32 {
    const rows = try sequence.rows(layer);
    if (row_count > rows.row_count) return error.PositionOutOfRange;
    const reason = whyNot(rows, row_count);
    const generation_now = view.generationWord(try sequence.generation(layer));
    var answer: ViewRecord = std.mem.zeroes(ViewRecord);
    if (reason == .none and row_count != 0) {
        answer = blockView(sequence, layer, rows, 0, @min(row_count, rows.memory.paged.block_size), generation_now);
        answer.length = row_count;
        answer.token_stride = rows.kv_head_count * rows.head_dim;
        answer.head_stride = rows.head_dim;
    }
    answer.generation = generation_now;
    answer.reason = @intFromEnum(reason);
    try record.write(ViewRecord, out, out_bytes, answer);
    return status.count(row_count);
}

fn whyNot(rows: Rows, row_count: u32) view.Reason {
    const paged = rows.memory.paged;
    if (rows.sink_end < rows.first and row_count > rows.sink_end) return .evicted;
    if (row_count == 0) return .none;
    const shape = paged.formatAt(0).shape;
    var position: u32 = 0;
    while (position < row_count) : (position += paged.block_size) {
        if (!paged.formatAt(position).shape.isFloat()) return .quantized;
    }
    if (rows.kv_head_count != 1 and paged.block_size != 1) return .head_major;
    // Adjacent are blocks of one format that hold this layer's side alone and follow one another in their slab.
    position = 0;
    while (position + paged.block_size < row_count) : (position += paged.block_size) {
        const next = position + paged.block_size;
        if (paged.formatAt(next) != paged.formatAt(0)) return .not_adjacent;
        const here = rows.run(0, position, next);
        const there = rows.run(0, next, next + 1);
        if (@intFromPtr(here.keys) + shape.sideBytes(.keys) != @intFromPtr(there.keys)) return .not_adjacent;
        if (@intFromPtr(here.values) + shape.sideBytes(.values) != @intFromPtr(there.values)) return .not_adjacent;
    }
    return .none;
}

/// (sequence, layer, k out, k_count, v out, v_count, dtype) -> resident rows
pub fn gather(
    word: u32,
    layer: u32,
    k: ?[*]u8,
    k_count: u32,
    v: ?[*]u8,
    v_count: u32,
    dtype: u32,
) callconv(.c) i32 {
    const use = handle.begin(.sequence, word) catch |err| return status.fromError(err);
    defer use.end();
    const k_out, const v_out = buffer.outputs(k, k_count, v, v_count, dtype) catch |err| return status.fromError(err);
    return status.count(use.target.gather(layer, k_out, v_out) catch |err| return status.fromError(err));
}

/// 0: every layer is on the CPU.
pub fn layerDevice(word: u32, layer: u32) callconv(.c) i32 {
    const use = handle.begin(.sequence, word) catch |err| return status.fromError(err);
    defer use.end();
    _ = use.target.rows(layer) catch |err| return status.fromError(err);
    return 0;
}

/// (sequence, layer, i32[] out, count) -> entries: the blocks of the layer's rows in order, -1 where none of them is seen.
/// Writes as many as fit.
pub fn blockTable(word: u32, layer: u32, out: ?[*]u8, out_count: u32) callconv(.c) i32 {
    const use = handle.begin(.sequence, word) catch |err| return status.fromError(err);
    defer use.end();
    const blocks = use.target.blockTable(layer) catch |err| return status.fromError(err);
    const entries: [*]align(1) i32 = @ptrCast(buffer.out(out, out_count) catch |err| return status.fromError(err));
    for (0..@min(blocks.len, out_count)) |i| entries[i] = use.target.seenBlock(layer, i);
    return status.count(blocks.len);
}

/// (sequence, layer, i32[] out, count) -> entries: the references of each block of `blockTable`, 0 for -1.
pub fn blockReferences(word: u32, layer: u32, out: ?[*]u8, out_count: u32) callconv(.c) i32 {
    const use = handle.begin(.sequence, word) catch |err| return status.fromError(err);
    defer use.end();
    const blocks = use.target.blockTable(layer) catch |err| return status.fromError(err);
    const rows = use.target.rows(layer) catch unreachable; // blockTable checked the layer
    const paged = rows.memory.paged;
    const entries: [*]align(1) i32 = @ptrCast(buffer.out(out, out_count) catch |err| return status.fromError(err));
    for (0..@min(blocks.len, out_count)) |i| {
        const block = use.target.seenBlock(layer, i);
        entries[i] = 0;
        if (block < 0) continue;
        const pool = &paged.formats[paged.entries.format(@intCast(i))].pool;
        entries[i] = status.count(pool.refCount(@intCast(block)));
    }
    return status.count(blocks.len);
}

/// (sequence, layer, i32[] out, count) -> entries: the tier of each block of `blockTable`, -1 for -1.
pub fn blockTiers(word: u32, layer: u32, out: ?[*]u8, out_count: u32) callconv(.c) i32 {
    const use = handle.begin(.sequence, word) catch |err| return status.fromError(err);
    defer use.end();
    const blocks = use.target.blockTable(layer) catch |err| return status.fromError(err);
    const entries: [*]align(1) i32 = @ptrCast(buffer.out(out, out_count) catch |err| return status.fromError(err));
    const block_size = use.target.cache.state.block_size;
    for (0..@min(blocks.len, out_count)) |i| {
        const position = @as(u32, @intCast(i)) * block_size;
        entries[i] = if (use.target.seenBlock(layer, i) < 0) -1 else @intCast(@intFromEnum(use.target.tier(layer, position)));
    }
    return status.count(blocks.len);
}

/// (sequence, layer, q, q_count, AttendRecord, bytes, alibi_slopes, count, sink_logits, count, tree_parents, count,
/// output, output_count, lse, lse_count)
pub fn attend(
    word: u32,
    layer: u32,
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
    const use = handle.begin(.sequence, word) catch |err| return status.fromError(err);
    defer use.end();
    attend_options.run(
        use.target.rows(layer) catch |err| return status.fromError(err),
        q,
        q_count,
        options,
        options_bytes,
        alibi_slopes,
        alibi_slope_count,
        sink_logits,
        sink_logit_count,
        tree_parents,
        tree_parent_count,
        output,
        output_count,
        lse,
        lse_count,
    ) catch |err| return status.fromError(err);
    return 0;
}
