//! Tests of rewinding: what is seen after it, what is refused, and what stays in memory for it.

const std = @import("std");
const memcheck = @import("build_options").memcheck;
const testing = std.testing;
const attention = @import("../../attention/attend.zig");
const contiguous = @import("../contiguous.zig");
const paged = @import("cache.zig");
const PagedCache = paged.PagedCache;
const Sequence = paged.Sequence;
const Input = @import("../input.zig").Input;

const line: paged.Layer = .{ .kv_head_count = 1, .head_dim = 1 };

fn windowed(comptime window_tokens: u32) paged.Options {
    return .{
        .layers = &.{.{ .kv_head_count = 1, .head_dim = 1, .window_tokens = window_tokens }},
        .block_size = 4,
        .max_seq_len = 1 << 20,
        .dtype_k = .f32,
        .dtype_v = .f32,
    };
}

/// Appends one row to every layer, keys 0 and values `value`, without a commit.
fn append(cache: *PagedCache, sequence: *Sequence, value: f32) !void {
    var keys: [64]f32 = @splat(0);
    var values: [64]f32 = @splat(value);
    for (0..cache.layerCount()) |layer| {
        const elements: usize = @intCast((try cache.layerShape(@intCast(layer))).kvDim());
        try cache.append(@intCast(layer), &.{sequence}, &.{1}, .fromF32(keys[0..elements]), .fromF32(values[0..elements]));
    }
}

/// Commits rows, each with its position as its value, up to a length.
fn grow(cache: *PagedCache, sequence: *Sequence, seq_len: u32) !void {
    while (sequence.seqLen() < seq_len) {
        try append(cache, sequence, @floatFromInt(sequence.seqLen()));
        try sequence.commit(1);
    }
}

/// The mean of the rows that a query sees: all scores are 0.
fn mean(sequence: *const Sequence, layer: u32) !f32 {
    var output: [1]f32 = undefined;
    try attention.attend(try sequence.rows(layer), &.{1}, .{}, &output, &.{});
    return output[0];
}

fn usedBlocks(cache: *const PagedCache, group: usize) u64 {
    return cache.state.groups[group].tailPool().stats().used_blocks;
}

test "a window after a truncate has all of its rows, or the truncate is refused" {
    var options = windowed(16);
    for ([_]?u32{ null, 5 }) |rewind_tokens| {
        options.rewind_tokens = rewind_tokens;
        var cache: PagedCache = try .init(testing.allocator, options);
        defer cache.deinit();
        const sequence = try cache.createSequence();
        try grow(&cache, sequence, 100);
        try testing.expectEqual(@as(u32, if (rewind_tokens == null) 96 else 95), sequence.rewindableTo());
        if (rewind_tokens == null) {
            try testing.expectError(error.PositionOutOfRange, sequence.truncate(95));
            try testing.expectEqual(100, sequence.seqLen());
            try testing.expectEqual(91.5, try mean(sequence, 0)); // 84 to 99
            continue;
        }
        try testing.expectError(error.PositionOutOfRange, sequence.truncate(94));
        try sequence.truncate(95);
        try append(&cache, sequence, 95);
        try testing.expectEqual(87.5, try mean(sequence, 0)); // 80 to 95
        try sequence.commit(1);
        try testing.expectEqual(87.5, try mean(sequence, 0));
    }
}

test "every rewind within rewind_tokens shows what a sequence shows that was never longer" {
    // Valgrind takes one of each kind.
    const rewinds: []const u32 = if (memcheck) &.{ 0, 9 } else &.{ 0, 1, 3, 4, 9, 40 };
    const block_sizes: []const u32 = if (memcheck) &.{4} else &.{ 1, 4, 16 };
    for (rewinds) |rewind_tokens| for ([_]u32{ 0, 3 }) |sink_tokens| for (block_sizes) |block_size| {
        const options: paged.Options = .{
            .layers = &.{ line, .{ .kv_head_count = 1, .head_dim = 1, .window_tokens = 7 }, .{ .kv_head_count = 2, .head_dim = 1 } },
            .block_size = block_size,
            .max_seq_len = 200,
            .dtype_k = .f32,
            .dtype_v = .f32,
            .retention = .{ .tokens = 12, .sink_tokens = sink_tokens },
            .rewind_tokens = rewind_tokens,
        };
        var cache: PagedCache = try .init(testing.allocator, options);
        defer cache.deinit();
        const parent = try cache.createSequence();
        const fresh = try cache.createSequence();
        try grow(&cache, fresh, 25);
        for (26..80) |length| {
            try grow(&cache, parent, @intCast(length));
            const target: u32 = @intCast(length -| rewind_tokens);
            if (target < 25) continue;
            // A fork has what its parent has to go back to, and takes nothing from it.
            const child = try cache.fork(parent);
            defer cache.freeSequence(child);
            try testing.expectEqual(target, child.rewindableTo());
            if (target > 25) try testing.expectError(error.PositionOutOfRange, child.truncate(target - 1));
            try grow(&cache, fresh, target);
            try child.truncate(target);
            try testing.expectEqual(target, child.rewindableTo());
            for (0..2) |layer| try expectAlike(try fresh.rows(@intCast(layer)), try child.rows(@intCast(layer)));
            try append(&cache, child, -1);
            try append(&cache, fresh, -1);
            for (0..2) |layer| try expectAlike(try fresh.rows(@intCast(layer)), try child.rows(@intCast(layer)));
            try fresh.truncate(target);
            // Back among the sinks is as good as new; between them and the rows that are left is nothing to show.
            if (sink_tokens != 0) {
                try testing.expectError(error.PositionOutOfRange, child.truncate(sink_tokens + 1));
                try child.truncate(sink_tokens);
                try testing.expectEqual(sink_tokens, (try child.rows(0)).residentCount());
            } else try child.truncate(0);
            try testing.expectEqual(0, child.rewindableTo());
            try grow(&cache, child, 25);
            try testing.expectEqual(25 -| rewind_tokens, child.rewindableTo());
        }
    };
}

/// The same rows are seen, with the same values.
fn expectAlike(expected: anytype, actual: @TypeOf(expected)) !void {
    try testing.expectEqual(expected.row_count, actual.row_count);
    try testing.expectEqual(expected.residentCount(), actual.residentCount());
    try testing.expectEqual(expected.sink_end, actual.sink_end);
    try testing.expectEqual(expected.first, actual.first);
    for (0..expected.row_count) |i| {
        const position: u32 = @intCast(i);
        if (expected.residentEnd(position) == null) continue;
        const values = [_]*align(1) const f32{
            @ptrCast(expected.run(0, position, position + 1).values),
            @ptrCast(actual.run(0, position, position + 1).values),
        };
        try testing.expectEqual(values[0].*, values[1].*);
    }
}

test "kept rows differ by layer group: a rewind must hold in each" {
    var options = windowed(3);
    options.layers = &.{ line, .{ .kv_head_count = 1, .head_dim = 1, .window_tokens = 3 }, .{ .kv_head_count = 1, .head_dim = 1, .window_tokens = 30 } };
    var cache: PagedCache = try .init(testing.allocator, options);
    defer cache.deinit();
    const sequence = try cache.createSequence();
    try grow(&cache, sequence, 7);
    try testing.expectEqual(0, sequence.rewindableTo());
    try grow(&cache, sequence, 8);
    try testing.expectEqual(4, sequence.rewindableTo()); // 8 - 3 - 4 = 1: row 0 was let go
    try sequence.truncate(4);
    try testing.expectError(error.PositionOutOfRange, sequence.truncate(3));
    try testing.expectEqual(2, try mean(sequence, 1));
    try testing.expectEqual(1.5, try mean(sequence, 0));
    try testing.expectEqual(1.5, try mean(sequence, 2));
    // What was let go stays so until the sequence is longer than it ever was.
    try grow(&cache, sequence, 8);
    try testing.expectEqual(4, sequence.rewindableTo());
    try grow(&cache, sequence, 9);
    try testing.expectEqual(5, sequence.rewindableTo());
    try sequence.truncate(0);
    try testing.expectEqual(0, sequence.rewindableTo());
}

test "memory is constant, and what nobody sees is counted in blocks alone" {
    var options = windowed(16);
    for ([_]u32{ 0, 4, 50 }) |rewind_tokens| {
        options.rewind_tokens = rewind_tokens;
        var cache: PagedCache = try .init(testing.allocator, options);
        defer cache.deinit();
        const sequence = try cache.createSequence();
        const bound = (16 + rewind_tokens + 3) / 4 + 1;
        for (1..2000) |length| {
            try grow(&cache, sequence, @intCast(length));
            try testing.expect(usedBlocks(&cache, 0) <= bound);
            if (length % 100 == 99) try sequence.truncate(sequence.rewindableTo());
        }
        const stats = try cache.stats();
        try testing.expectEqual(16, stats.tail_token_count);
        try testing.expectEqual(16 * 8, stats.tail_bytes);
        var seen: u64 = 0;
        for (0..(try sequence.blockTable(0)).len) |entry| seen += @intFromBool(sequence.seenBlock(0, @intCast(entry)) != null);
        try testing.expectEqual(seen, stats.table_entries);
        try testing.expectEqual(16, (try sequence.rows(0)).residentCount());
        cache.freeSequence(sequence);
        try testing.expectEqual(0, usedBlocks(&cache, 0));
    }
    options.rewind_tokens = 1 << 31;
    try testing.expectError(error.InvalidConfig, PagedCache.init(testing.allocator, options));
}

test "accepted drafts and beams keep what there is to go back to" {
    var options = windowed(6);
    options.rewind_tokens = 3;
    var cache: PagedCache = try .init(testing.allocator, options);
    defer cache.deinit();
    const beams = [_]*Sequence{ try cache.createSequence(), try cache.createSequence() };
    try grow(&cache, beams[0], 20);
    for (0..4) |i| try append(&cache, beams[0], @floatFromInt(100 + i));
    try beams[0].commitKept(&.{ 0, 2 });
    try testing.expectEqual(22, beams[0].seqLen());
    try testing.expectEqual(19, beams[0].rewindableTo());
    try testing.expectApproxEqRel(@as(f32, 16 + 17 + 18 + 19 + 100 + 102) / 6.0, try mean(beams[0], 0), 1e-6);
    try cache.reorder(&beams, &.{ 0, 0 });
    for (beams) |beam| {
        try testing.expectEqual(19, beam.rewindableTo());
        try testing.expectError(error.PositionOutOfRange, beam.truncate(18));
        try beam.truncate(19);
        try testing.expectApproxEqRel(15.5, try mean(beam, 0), 1e-6); // 13 to 18
    }
}

test "a block that came back into sight migrates as others do, and none that nobody sees" {
    var cache: PagedCache = try .init(testing.allocator, .{
        .layers = &.{.{ .kv_head_count = 1, .head_dim = 32, .window_tokens = 64 }},
        .max_seq_len = 4096,
        .dtype_k = .f32,
        .dtype_v = .f32,
        .policy = .{ .kind = .tiered, .store = .{ .dtype_k = .i8, .dtype_v = .i8 }, .tail_tokens = 64 },
        .rewind_tokens = 128,
    });
    defer cache.deinit();
    const sequence = try cache.createSequence();
    try grow(&cache, sequence, 127);
    try testing.expectEqual(.tail, sequence.tier(0, 63)); // row 63 is seen
    try grow(&cache, sequence, 256);
    // Blocks 0 to 2 were out of sight when they were due.
    for ([_]u32{ 0, 64, 128, 192 }) |position| try testing.expectEqual(.tail, sequence.tier(0, position));
    try testing.expectEqual(0, (try cache.stats()).store_token_count);
    const store = try cache.poolStats(0, .i8, .i8);
    try testing.expectEqual(0, store.hits + store.misses);
    try sequence.truncate(129); // sees 65 to 128
    try cache.updatePolicy(.{ .kind = .tiered, .store = .{ .dtype_k = .i8, .dtype_v = .i8 } });
    try grow(&cache, sequence, 130);
    try testing.expectEqual(.tail, sequence.tier(0, 0));
    try testing.expectEqual(.store, sequence.tier(0, 64));
    try grow(&cache, sequence, 200);
    try testing.expectEqual(.store, sequence.tier(0, 128));
    // Back into the middle of a block that migrated meanwhile: its rows are there, and it is of the tail again.
    try sequence.truncate(150);
    try testing.expectEqual(64, (try sequence.rows(0)).residentCount());
    try grow(&cache, sequence, 151);
    try testing.expectEqual(.tail, sequence.tier(0, 150));
    var output: [32]f32 = undefined;
    const q: [32]f32 = @splat(1);
    try attention.attend(try sequence.rows(0), &q, .{}, &output, &.{});
    try testing.expectApproxEqAbs(118.5, output[0], 0.2); // 87 to 150 in 8 bits
}

/// One query row for each position of `q`, over a sequence of rows whose values are their positions.
fn attend(sequence: *const Sequence, layer: u32, options: attention.Options, output: []f32) !void {
    var q: [256]f32 = @splat(1);
    @memset(output, -1);
    try attention.attend(try sequence.rows(layer), q[0..options.query_count], options, output, &.{});
}

fn expectRefused(sequence: *const Sequence, layer: u32, options: attention.Options) !void {
    var output: [256]f32 = undefined;
    try testing.expectError(error.PositionOutOfRange, attend(sequence, layer, options, output[0..options.query_count]));
    for (output[0..options.query_count]) |value| try testing.expectEqual(-1, value);
}

test "queries whose rows were let go are refused; before the commit they see what they should" {
    var cache: PagedCache = try .init(testing.allocator, windowed(16));
    defer cache.deinit();
    var flat: contiguous.ContiguousCache = try .init(testing.allocator, .{
        .layer_count = 1,
        .kv_head_count = 1,
        .head_dim = 1,
        .max_seq_len = 400,
        .dtype_k = .f32,
        .dtype_v = .f32,
    });
    defer flat.deinit();
    const sequence = try cache.createSequence();
    for (0..2) |_| {
        // A prompt of 200 rows, and then another one.
        for (0..200) |_| {
            const position: f32 = @floatFromInt((try sequence.rows(0)).row_count);
            try append(&cache, sequence, position);
            _ = try flat.append(0, 0, .fromF32(&.{0}), .fromF32(&.{position}));
        }
        var output: [200]f32 = undefined;
        var truth: [200]f32 = undefined;
        try attend(sequence, 0, .{ .query_count = 200 }, &output);
        var q: [200]f32 = @splat(1);
        try attention.attend(try flat.rows(0, 0), &q, .{ .query_count = 200, .window_tokens = 16 }, &truth, &.{});
        try testing.expectEqual(truth, output);
        try sequence.commit(200);
        try expectRefused(sequence, 0, .{ .query_count = 200 });
        try expectRefused(sequence, 0, .{ .query_count = 2 });
        try attend(sequence, 0, .{}, output[0..1]);
        try testing.expectEqual(truth[199], output[0]);
        // A narrower window of the call's own is there further back.
        try attend(sequence, 0, .{ .query_count = 5, .window_tokens = 12 }, output[0..5]);
        try attention.attend(try flat.rows(0, 0), q[0..5], .{ .query_count = 5, .window_tokens = 12 }, truth[0..5], &.{});
        try testing.expectEqualSlices(f32, truth[0..5], output[0..5]);
        try expectRefused(sequence, 0, .{ .query_count = 6, .window_tokens = 12 });
        // Queries that are not causal have windows all the same.
        try attend(sequence, 0, .{ .causal = false }, output[0..1]);
        try expectRefused(sequence, 0, .{ .query_count = 2, .causal = false });
        // The window has passed the sinks that are asked for.
        try expectRefused(sequence, 0, .{ .sink_tokens = 1 });
        // Every query of the contiguous cache has its rows.
        try attention.attend(try flat.rows(0, 0), &q, .{ .query_count = 200, .window_tokens = 16, .sink_tokens = 4 }, &truth, &.{});
    }
}

test "what retention hides stays masked, and is missed only by queries it would not have hidden it from" {
    for ([_]u32{ 0, 3 }) |sink_tokens| {
        var cache: PagedCache = try .init(testing.allocator, .{
            .layers = &.{ line, .{ .kv_head_count = 1, .head_dim = 1, .window_tokens = 5 } },
            .block_size = 4,
            .max_seq_len = 400,
            .dtype_k = .f32,
            .dtype_v = .f32,
            .retention = .{ .tokens = 8 + sink_tokens, .sink_tokens = sink_tokens },
        });
        defer cache.deinit();
        const sequence = try cache.createSequence();
        try grow(&cache, sequence, 8 + sink_tokens);
        var output: [256]f32 = undefined;
        // Nothing is hidden yet but by the window.
        try attend(sequence, 0, .{ .query_count = 20 }, output[0..20]);
        try testing.expectEqual(0.5, output[20 - 8 - sink_tokens + 1]);
        try expectRefused(sequence, 1, .{ .query_count = 2 });
        try grow(&cache, sequence, 50);
        try attend(sequence, 0, .{}, output[0..1]);
        const sinks: f32 = if (sink_tokens == 0) 0 else 0 + 1 + 2;
        const kept: f32 = @floatFromInt(8 + sink_tokens);
        try testing.expectApproxEqRel((sinks + 45.5 * 8) / kept, output[0], 1e-6);
        try attend(sequence, 0, .{ .causal = false, .query_count = 100 }, output[0..100]);
        for (output[0..100]) |value| try testing.expectApproxEqRel((sinks + 45.5 * 8) / kept, value, 1e-6);
        try expectRefused(sequence, 0, .{ .query_count = 2 });
        try expectRefused(sequence, 0, .{ .query_count = 2, .tree_parents = &.{ -1, 0 } });
        try expectRefused(sequence, 1, .{ .query_count = 2 });
        try attend(sequence, 0, .{ .query_count = 5, .window_tokens = 4 }, output[0..5]);
        try testing.expectEqual(43.5, output[0]); // 42 to 45
        try expectRefused(sequence, 0, .{ .query_count = 6, .window_tokens = 4 });
        // More sinks than there are: retention hides them from every query that is new enough.
        try attend(sequence, 0, .{ .window_tokens = 4, .sink_tokens = 30 }, output[0..1]);
        try attend(sequence, 1, .{ .sink_tokens = 30 }, output[0..1]);
        // Pending rows push nothing out, and a query among them sees all that is there.
        for (0..3) |_| try append(&cache, sequence, 7);
        try attend(sequence, 0, .{ .query_count = 3 }, output[0..3]);
        try testing.expectApproxEqRel((sinks + 45.5 * 8 + 21) / (kept + 3), output[2], 1e-6);
        try attend(sequence, 0, .{ .query_count = 3, .tree_parents = &.{ -1, -1, 0 } }, output[0..3]);
        try attend(sequence, 0, .{ .query_count = 4 }, output[0..4]);
        try expectRefused(sequence, 0, .{ .query_count = 5 });
    }
}

/// Bytes of the tables of a sequence.
fn tableBytes(sequence: *const Sequence) u64 {
    var bytes: u64 = 0;
    for (sequence.state.tables) |*table| bytes += table.metadataBytes();
    return bytes;
}

test "tables keep their size over a million rows, and those of forks are as small" {
    var cache: PagedCache = try .init(testing.allocator, .{
        .layers = &.{ line, .{ .kv_head_count = 1, .head_dim = 1, .window_tokens = 1000 } },
        .block_size = 16,
        .max_seq_len = 1 << 20,
        .dtype_k = .f32,
        .dtype_v = .f32,
        .retention = .{ .tokens = 2000, .sink_tokens = 40 },
        .policy = .{ .kind = .tiered, .sink_tokens = 20 },
    });
    defer cache.deinit();
    const sequence = try cache.createSequence();
    var rows: [1000]f32 = undefined;
    var metadata_bytes: u64 = 0;
    const steps = 1000;
    for (0..steps) |step| {
        @memset(&rows, @floatFromInt(step));
        for (0..2) |layer| _ = try sequence.append(@intCast(layer), .fromF32(&rows), .fromF32(&rows));
        try sequence.commit(rows.len);
        if (step == 9) metadata_bytes = (try cache.stats()).metadata_bytes;
    }
    try testing.expectEqual(metadata_bytes, (try cache.stats()).metadata_bytes);
    const seq_len = steps * rows.len;
    for (0..2) |layer| {
        const blocks = try sequence.blockTable(@intCast(layer));
        try testing.expectEqual(seq_len / 16, blocks.len);
        const newest: u32 = if (layer == 0) 1960 else 1000;
        for (0..blocks.len) |entry| {
            const is_sink = entry < 3;
            const is_there = is_sink or (entry + 1) * 16 > seq_len - newest - 16; // rows to rewind to stay
            try testing.expectEqual(is_there, blocks.at(entry) >= 0);
            const is_seen = is_sink or (entry + 1) * 16 > seq_len - newest;
            try testing.expectEqual(is_seen, sequence.seenBlock(@intCast(layer), @intCast(entry)) != null);
        }
    }
    const child = try cache.fork(sequence);
    try testing.expect(tableBytes(child) <= tableBytes(sequence));
    try testing.expectEqual(40 + 1960, (try child.rows(0)).residentCount());
    try child.truncate(child.rewindableTo());
    try testing.expectEqual(40 + 1000, (try child.rows(1)).residentCount());

    // One long prompt: its table is as small once most of it was let go.
    const prompt = try testing.allocator.alloc(f32, 500_000);
    defer testing.allocator.free(prompt);
    @memset(prompt, 1);
    const other = try cache.createSequence();
    for (0..2) |layer| _ = try other.append(@intCast(layer), .fromF32(prompt), .fromF32(prompt));
    try testing.expect(tableBytes(other) > 4 * tableBytes(sequence));
    try other.commit(500_000);
    try testing.expect(tableBytes(other) <= 2 * tableBytes(sequence));
    try other.truncate(40); // among its sinks
    try testing.expectEqual(40, (try other.rows(0)).residentCount());
    try testing.expectEqual(3, (try other.blockTable(0)).len);
    _ = try other.append(0, .fromF32(&rows), .fromF32(&rows));
    try testing.expectEqual(1040, (try other.rows(0)).residentCount());
}
