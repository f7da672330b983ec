//! One script on both layouts: what a sequence does is the same, whatever is behind it.

const std = @import("std");
const testing = std.testing;
const ContiguousCache = @import("contiguous.zig").ContiguousCache;
const PagedCache = @import("paged/cache.zig").PagedCache;
const Sequence = @import("sequence.zig").Sequence;

const layer_count = 2;
const kv_head_count = 2;
const head_dim = 4;
const kv_dim = kv_head_count * head_dim;
const rows_max = 16;

/// A cache of each layout, and a sequence of each cache; that of the contiguous one is its second.
const Both = struct {
    contiguous: *ContiguousCache,
    paged: *PagedCache,
    sequences: [2]Sequence,

    fn init() !Both {
        const contiguous = try testing.allocator.create(ContiguousCache);
        errdefer testing.allocator.destroy(contiguous);
        contiguous.* = try .init(testing.allocator, .{
            .layer_count = layer_count,
            .sequence_count = 2,
            .kv_head_count = kv_head_count,
            .head_dim = head_dim,
            .max_seq_len = rows_max,
        });
        errdefer contiguous.deinit();
        const paged = try testing.allocator.create(PagedCache);
        errdefer testing.allocator.destroy(paged);
        const layer: @import("paged/layer_group.zig").Layer = .{ .kv_head_count = kv_head_count, .head_dim = head_dim };
        paged.* = try .init(testing.allocator, .{
            .layers = &.{ layer, layer },
            .block_size = 4,
            .max_seq_len = rows_max,
            .dtype_k = .f32,
            .dtype_v = .f32,
        });
        errdefer paged.deinit();
        return .{ .contiguous = contiguous, .paged = paged, .sequences = .{
            .{ .contiguous = contiguous.sequence(1) },
            .{ .paged = try paged.createSequence() },
        } };
    }

    fn deinit(both: Both) void {
        both.paged.deinit();
        testing.allocator.destroy(both.paged);
        both.contiguous.deinit();
        testing.allocator.destroy(both.contiguous);
    }
};

/// Rows whose elements tell the layer, the token and the place in the row.
fn rowsOf(buffer: *[rows_max * kv_dim]f32, layer: u32, first: u32, count: u32) []const f32 {
    const elements = buffer[0 .. count * kv_dim];
    for (elements, 0..) |*element, i| {
        element.* = @floatFromInt(1000 * (layer + 1) + 10 * (first + @as(u32, @intCast(i / kv_dim))) + @as(u32, @intCast(i % kv_dim)));
    }
    return elements;
}

fn append(sequence: Sequence, first: u32, count: u32) !u32 {
    var buffer: [rows_max * kv_dim]f32 = undefined;
    var start: u32 = 0;
    for (0..layer_count) |layer| {
        const rows = rowsOf(&buffer, @intCast(layer), first, count);
        start = try sequence.append(@intCast(layer), .fromF32(rows), .fromF32(rows));
    }
    return start;
}

/// The tokens that a layer shows, by their first element.
fn expectTokens(sequence: Sequence, tokens: []const u32) !void {
    for (0..layer_count) |index| {
        const layer: u32 = @intCast(index);
        var k: [rows_max * kv_dim]f32 = undefined;
        var v: [rows_max * kv_dim]f32 = undefined;
        const count = try sequence.gather(layer, .{ .bytes = @ptrCast(&k), .element_count = k.len }, .{ .bytes = @ptrCast(&v), .element_count = v.len });
        try testing.expectEqual(tokens.len, count);
        var buffer: [rows_max * kv_dim]f32 = undefined;
        for (tokens, 0..) |token, i| {
            const row = rowsOf(&buffer, layer, token, 1);
            try testing.expectEqualSlices(f32, row, k[i * kv_dim ..][0..kv_dim]);
            try testing.expectEqualSlices(f32, row, v[i * kv_dim ..][0..kv_dim]);
        }
        // The views show the same rows, in order and without a gap.
        var each = try sequence.viewsFrom(layer, 0);
        var seen: u32 = 0;
        while (each.next()) |view| {
            try testing.expectEqual(seen, view.start);
            for (0..view.row_count) |row| for (0..kv_head_count) |head| {
                const offset = row * view.token_stride + head * view.head_stride;
                const keys: [*]const f32 = @ptrCast(@alignCast(view.keys));
                try testing.expectEqualSlices(f32, k[(seen + row) * kv_dim + head * head_dim ..][0..head_dim], keys[offset..][0..head_dim]);
            };
            seen += view.row_count;
        }
        try testing.expectEqual(count, seen);
    }
}

test "append, commit, some of the pending rows, truncate: the same rows in either layout" {
    const both: Both = try .init();
    defer both.deinit();
    for (both.sequences) |sequence| {
        try testing.expectEqual(0, try append(sequence, 0, 5));
        try expectTokens(sequence, &.{ 0, 1, 2, 3, 4 });
        try testing.expectEqual(0, try sequence.seqLen());
        try testing.expectError(error.CommitMismatch, sequence.commit(4));
        try sequence.commit(5);
        try testing.expectEqual(5, try sequence.seqLen());

        // Six drafted tokens, of which the first, the third and the last are accepted.
        try testing.expectEqual(5, try append(sequence, 5, 6));
        const before = try sequence.generation(0);
        for ([_][]const u32{ &.{6}, &.{ 1, 0 }, &.{ 2, 2 } }) |wrong| {
            try testing.expectError(error.InvalidSize, sequence.commitKept(wrong));
        }
        try testing.expectEqual(before, try sequence.generation(0));
        try sequence.commitKept(&.{ 0, 2, 5 });
        try testing.expect(before != try sequence.generation(0));
        try testing.expectEqual(8, try sequence.seqLen());
        try expectTokens(sequence, &.{ 0, 1, 2, 3, 4, 5, 7, 10 });

        try testing.expectEqual(8, try append(sequence, 11, 2));
        try sequence.commitKept(&.{});
        try testing.expectEqual(8, try sequence.seqLen());
        var buffer: [rows_max * kv_dim]f32 = undefined;
        const one = rowsOf(&buffer, 0, 8, 1);
        _ = try sequence.append(0, .fromF32(one), .fromF32(one));
        try testing.expectError(error.CommitMismatch, sequence.commitKept(&.{0}));

        try testing.expectError(error.PositionOutOfRange, sequence.truncate(9));
        try testing.expectEqual(0, try sequence.rewindableTo());
        try sequence.truncate(3);
        try expectTokens(sequence, &.{ 0, 1, 2 });
        try testing.expectEqual(.cpu, try sequence.layerDevice(1));
        try testing.expectError(error.LayerOutOfRange, sequence.layerDevice(layer_count));
        try testing.expectError(error.LayerOutOfRange, sequence.rows(layer_count));
        try testing.expectError(error.CacheFull, append(sequence, 3, rows_max - 2));
    }
    try testing.expectEqual(0, try both.contiguous.sequence(0).seqLen());
    try testing.expectError(error.SequenceOutOfRange, both.contiguous.sequence(2).seqLen());
    try testing.expectError(error.SequenceOutOfRange, both.contiguous.sequence(2).commitKept(&.{}));
    const nobody: Sequence = .{ .contiguous = both.contiguous.sequence(2) };
    try testing.expectError(error.SequenceOutOfRange, nobody.layerDevice(0));
}

test "views from a position on, and rows in one piece" {
    const both: Both = try .init();
    defer both.deinit();
    for (both.sequences) |sequence| _ = try append(sequence, 0, 7);
    const starts = [2][]const u32{ &.{5}, &.{5} };
    for (both.sequences, starts) |sequence, expected| {
        var each = try sequence.viewsFrom(1, 5);
        for (expected) |start| try testing.expectEqual(start, each.next().?.start);
        try testing.expectEqual(null, each.next());
        try testing.expectError(error.PositionOutOfRange, sequence.contiguousKv(1, 8));
    }
    const whole = try both.sequences[0].contiguousKv(1, 6);
    try testing.expectEqual(6, whole.view.row_count);
    try testing.expectEqual(kv_dim, whole.view.token_stride);
    try testing.expectEqual(@as(f32, 2000), @as(*align(1) const f32, @ptrCast(whole.view.keys)).*);
    // Blocks of four positions have the rows of each of their two KV heads together.
    try testing.expectEqual(.head_major, (try both.sequences[1].contiguousKv(1, 6)).reason);
    try testing.expectEqual(.none, (try both.sequences[1].contiguousKv(1, 0)).reason);
}
