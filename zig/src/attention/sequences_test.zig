//! Attention for several sequences in one call: the bits of one call for each, of sequences of either layout.

const std = @import("std");
const testing = std.testing;
const attention = @import("attend.zig");
const ContiguousCache = @import("../cache/contiguous.zig").ContiguousCache;
const PagedCache = @import("../cache/paged/cache.zig").PagedCache;
const Sequence = @import("../cache/sequence.zig").Sequence;

const kv_head_count = 2;
const ratio = 2;
const q_head_count = kv_head_count * ratio;
const head_dim = 16;
const lengths = [_]u32{ 9, 70, 3, 33 };
const query_counts = [_]u32{ 2, 3, 0, 1 };
const query_count = 6;
const q_elements = query_count * q_head_count * head_dim;

fn fill(sequence: Sequence, length: u32, random: std.Random) !void {
    var rows: [70 * kv_head_count * head_dim]f32 = undefined;
    const own = rows[0 .. length * kv_head_count * head_dim];
    for (own) |*element| element.* = random.floatNorm(f32);
    _ = try sequence.append(0, .fromF32(own), .fromF32(own));
    try sequence.commit(length);
}

fn check(sequences: []const Sequence) !void {
    const gpa = testing.allocator;
    var prng: std.Random.DefaultPrng = .init(7);
    var q: [q_elements]f32 = undefined;
    for (&q) |*element| element.* = prng.random().floatNorm(f32);
    const slopes = [q_head_count]f32{ 0.1, 0.2, 0.3, 0.4 };
    // One tree for each sequence that has queries, their parents one after the other.
    const parents = [query_count]i32{ -1, 0, -1, 0, 0, -5 };
    for ([_]attention.Options{ .{ .alibi_slopes = &slopes, .sink_tokens = 1, .window_tokens = 5 }, .{ .tree_parents = &parents } }) |options| {
        var together: [q_elements]f32 = undefined;
        var lse: [query_count * q_head_count]f32 = undefined;
        try attention.attendSequences(gpa, sequences, 0, &query_counts, &q, options, &together, &lse);
        var first: usize = 0;
        for (sequences, query_counts) |sequence, count| {
            if (count == 0) continue;
            var own = options;
            own.query_count = count;
            if (options.tree_parents.len != 0) own.tree_parents = options.tree_parents[first..][0..count];
            const rows = count * q_head_count;
            const at = first * q_head_count;
            var alone: [q_elements]f32 = undefined;
            var alone_lse: [query_count * q_head_count]f32 = undefined;
            const part = q[at * head_dim ..][0 .. rows * head_dim];
            try attention.attend(try sequence.rows(0), part, own, alone[0..part.len], alone_lse[0..rows]);
            try testing.expectEqualSlices(f32, alone[0..part.len], together[at * head_dim ..][0..part.len]);
            try testing.expectEqualSlices(f32, alone_lse[0..rows], lse[at..][0..rows]);
            first += count;
        }
    }
    // What is refused writes nothing.
    var output: [q_elements]f32 = @splat(7);
    const refused = [_]struct { anyerror, []const u32, usize, attention.Options }{
        .{ error.InvalidSize, &.{ 2, 3, 0, 2 }, q.len, .{} },
        .{ error.InvalidSize, &.{ 0, 0, 0, 0 }, 0, .{} },
        .{ error.InvalidSize, &.{ 2, 3, 1 }, q.len, .{} },
        .{ error.InvalidSize, &query_counts, q.len, .{ .tree_parents = parents[0..5] } },
        .{ error.InvalidConfig, &query_counts, q.len, .{ .query_count = 2 } },
        .{ error.InvalidConfig, &query_counts, q.len, .{ .tree_parents = &.{ -1, 0, -1, 0, 2, -1 } } },
        .{ error.InvalidConfig, &query_counts, q.len, .{ .softcap = 0 } },
    };
    for (refused) |call| {
        try testing.expectError(call[0], attention.attendSequences(gpa, sequences, 0, call[1], q[0..call[2]], call[3], &output, &.{}));
    }
    try testing.expectError(error.LayerOutOfRange, attention.attendSequences(gpa, sequences, 1, &query_counts, &q, .{}, &output, &.{}));
    try testing.expectError(error.InvalidSize, attention.attendSequences(gpa, sequences[0..1], 0, &.{0}, &.{}, .{}, &output, &.{}));
    try testing.expectError(error.InvalidSize, attention.attendSequences(gpa, &.{}, 0, &.{}, &q, .{}, &output, &.{}));
    try attention.attendSequences(gpa, &.{}, 0, &.{}, &.{}, .{}, &output, &.{});
    for (output) |element| try testing.expectEqual(7, element);
}

test "several sequences of a contiguous cache have the bits of one call for each" {
    var cache: ContiguousCache = try .init(testing.allocator, .{
        .layer_count = 1,
        .sequence_count = lengths.len,
        .kv_head_count = kv_head_count,
        .head_dim = head_dim,
        .max_seq_len = 80,
    });
    defer cache.deinit();
    var prng: std.Random.DefaultPrng = .init(5);
    var sequences: [lengths.len]Sequence = undefined;
    for (&sequences, lengths, 0..) |*sequence, length, i| {
        sequence.* = .{ .contiguous = cache.sequence(@intCast(i)) };
        try fill(sequence.*, length, prng.random());
    }
    try check(&sequences);
    const nobody = [_]Sequence{ sequences[0], .{ .contiguous = cache.sequence(lengths.len) } };
    var q: [2 * q_head_count * head_dim]f32 = @splat(1);
    try testing.expectError(error.SequenceOutOfRange, attention.attendSequences(testing.allocator, &nobody, 0, &.{ 1, 1 }, &q, .{}, &q, &.{}));
}

test "several sequences of a paged cache have the bits of one call for each" {
    var cache: PagedCache = try .init(testing.allocator, .{
        .layers = &.{.{ .kv_head_count = kv_head_count, .head_dim = head_dim }},
        .block_size = 16,
        .max_seq_len = 80,
    });
    defer cache.deinit();
    var prng: std.Random.DefaultPrng = .init(5);
    var sequences: [lengths.len]Sequence = undefined;
    for (&sequences, lengths) |*sequence, length| {
        sequence.* = .{ .paged = try cache.createSequence() };
        try fill(sequence.*, length, prng.random());
    }
    try check(&sequences);
}
