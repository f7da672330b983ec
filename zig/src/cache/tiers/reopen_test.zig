//! Tests of blocks that are turned back into floats: their rows were rounded once and are never rounded again.

const std = @import("std");
const testing = std.testing;
const attention = @import("../../attention/attend.zig");
const Dtype = @import("../../dtype.zig").Dtype;
const paged = @import("../paged/cache.zig");
const PagedCache = paged.PagedCache;
const Sequence = paged.Sequence;

const row_elements = 64;

/// One layer of 2 heads of 32 in blocks of 64 with an f16 tail of 64 rows.
fn tiered(store: Dtype) !PagedCache {
    return .init(testing.allocator, .{
        .layers = &.{.{ .kv_head_count = 2, .head_dim = 32 }},
        .max_seq_len = 1024,
        .policy = .{ .kind = .tiered, .store = .{ .dtype_k = store, .dtype_v = store }, .tail_tokens = 64 },
    });
}

/// Element `i` of the row at `position`: the same whenever it is written again.
fn element(position: u32, i: usize) f32 {
    var prng: std.Random.DefaultPrng = .init(position * @as(u64, 1000) + i);
    return @floatCast(@as(f16, @floatCast(2 * prng.random().float(f32) - 1)));
}

fn extend(cache: *PagedCache, sequence: *Sequence, token_count: u32) !void {
    const rows = try testing.allocator.alloc(f32, token_count * row_elements);
    defer testing.allocator.free(rows);
    for (rows, 0..) |*value, i| {
        value.* = element(sequence.seqLen() + @as(u32, @intCast(i / row_elements)), i % row_elements);
    }
    try cache.append(0, &.{sequence}, &.{token_count}, .fromF32(rows), .fromF32(rows));
    try sequence.commit(token_count);
}

/// The largest error of a key or a value.
fn errorOf(sequence: *Sequence) !f32 {
    const count = sequence.seqLen() * row_elements;
    const rows = try testing.allocator.alloc(f32, 2 * count);
    defer testing.allocator.free(rows);
    _ = try sequence.gather(
        0,
        .{ .bytes = @ptrCast(rows.ptr), .element_count = count },
        .{ .bytes = @ptrCast(rows.ptr + count), .element_count = count },
    );
    var largest: f32 = 0;
    for (rows, 0..) |value, i| {
        const position: u32 = @intCast(i % count / row_elements);
        largest = @max(largest, @abs(value - element(position, i % row_elements)));
    }
    return largest;
}

test "an answer that is cut and written again, again and again, has the errors of the first time" {
    const stores = [_]Dtype{ .f32, .bf16, .q8_0, .q4_0, .i8, .i4, .i2 };
    for (stores) |store| for ([_]bool{ false, true }) |varies| {
        var cache = try tiered(store);
        defer cache.deinit();
        const sequence = try cache.createSequence();
        try extend(&cache, sequence, 182);
        try extend(&cache, sequence, 150);
        const first = try errorOf(sequence);
        for (0..51) |turn| {
            const cut = if (varies) 70 + @as(u32, @intCast(turn * 37 % 190)) else 182;
            try sequence.truncate(cut);
            try extend(&cache, sequence, 332 - cut);
        }
        // What was opened again is f16 of what was rounded once.
        try testing.expect(try errorOf(sequence) <= first + 0x1p-11);
    };
}

test "a reopened block is of the tail, on top of it, and forks, beams and policies leave it there" {
    var cache = try tiered(.i4);
    defer cache.deinit();
    const sequence = try cache.createSequence();
    try extend(&cache, sequence, 256);
    const other = try cache.fork(sequence);
    try sequence.truncate(100);
    try testing.expectEqual(.store, sequence.tier(0, 64));
    try extend(&cache, sequence, 220);
    const tiers_now = [_]paged.Tier{ .store, .tail, .store, .store, .tail };
    for (tiers_now, 0..) |tier, entry| try testing.expectEqual(tier, sequence.tier(0, @intCast(entry * 64)));
    try testing.expectEqual(.store, other.tier(0, 64));
    try testing.expectEqual(128 + 64, (try cache.stats()).tail_token_count); // the fork has 64 of them

    const child = try cache.fork(sequence);
    try cache.reorder(&.{ other, child }, &.{ 1, 1 });
    try cache.updatePolicy(.{ .kind = .tiered, .store = .{ .dtype_k = .i2, .dtype_v = .i2 } });
    for ([_]*Sequence{ sequence, other, child }) |each| {
        try extend(&cache, each, 64);
        try testing.expectEqual(.tail, each.tier(0, 64));
        try testing.expectEqual(.store, each.tier(0, 256));
    }
    // Shared and cut into: the copy is as it was.
    try child.truncate(80);
    try extend(&cache, child, 200);
    try testing.expectEqual(.tail, child.tier(0, 64));
    try testing.expectEqual(.store, child.tier(0, 128));
    // Cut before it: what comes then is new.
    try child.truncate(64);
    try extend(&cache, child, 200);
    try testing.expectEqual(.store, child.tier(0, 64));
}

test "a tail in f16 holds what a store in bf16 rounded past it" {
    var cache = try tiered(.bf16);
    defer cache.deinit();
    const sequence = try cache.createSequence();
    const rows: [128 * row_elements]f32 = @splat(-65504);
    try cache.append(0, &.{sequence}, &.{128}, .fromF32(&rows), .fromF32(&rows));
    try sequence.commit(128);
    try sequence.truncate(10);
    try cache.append(0, &.{sequence}, &.{1}, .fromF32(rows[0..row_elements]), .fromF32(rows[0..row_elements]));
    var k: [11 * row_elements]f32 = undefined;
    var v: [11 * row_elements]f32 = undefined;
    _ = try sequence.gather(0, .{ .bytes = @ptrCast(&k), .element_count = k.len }, .{ .bytes = @ptrCast(&v), .element_count = v.len });
    for (k ++ v) |value| try testing.expectEqual(-65504, value);
    var output: [row_elements]f32 = undefined;
    const q: [row_elements]f32 = @splat(1e-3);
    try attention.attend(try sequence.rows(0), &q, .{}, &output, &.{});
    for (output) |value| try testing.expectApproxEqRel(-65504, value, 1e-5);
}
