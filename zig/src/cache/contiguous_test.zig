//! Tests of the contiguous cache: the figures of the original design, refusals in their order, and what they must leave
//! alone.

const std = @import("std");
const testing = std.testing;
const memcheck = @import("build_options").memcheck;
const contiguous = @import("contiguous.zig");
const ContiguousCache = contiguous.ContiguousCache;
const input_types = @import("input.zig");
const Input = input_types.Input;
const Dtype = @import("../dtype.zig").Dtype;
const float_reference = @import("../kernels/reference/float.zig");

fn input(elements: []const f32) Input {
    return .fromF32(elements);
}

/// A value that tells where it belongs.
fn mark(layer: usize, token: usize, element: usize) f32 {
    return @floatFromInt(layer * 10_000 + token * 100 + element);
}

fn storeMarked(cache: *ContiguousCache, layer: u32, sequence: u32, token: usize) !void {
    var k: [64]f32 = undefined;
    var v: [64]f32 = undefined;
    const row = cache.shape.kvDim();
    for (0..row) |i| {
        k[i] = mark(layer, token, i);
        v[i] = -mark(layer, token, i);
    }
    try cache.store(layer, sequence, input(k[0..row]), input(v[0..row]));
}

fn expectMarked(cache: *const ContiguousCache, layer: u32, sequence: u32, row_count: u32) !void {
    const rows = try cache.rows(layer, sequence);
    try testing.expectEqual(row_count, rows.row_count);
    const keys: [*]const f32 = @ptrCast(@alignCast(rows.memory.contiguous.keys));
    const values: [*]const f32 = @ptrCast(@alignCast(rows.memory.contiguous.values));
    const row = cache.shape.kvDim();
    for (0..row_count) |token| for (0..row) |i| {
        try testing.expectEqual(mark(layer, token, i), keys[token * row + i]);
        try testing.expectEqual(-mark(layer, token, i), values[token * row + i]);
    };
}

test "two layers stored, advanced: position 1, length 1, 5124 bytes" {
    var cache: ContiguousCache = try .init(testing.allocator, .{
        .layer_count = 2,
        .kv_head_count = 4,
        .head_dim = 8,
        .max_seq_len = 10,
    });
    defer cache.deinit();
    for (0..2) |layer| try storeMarked(&cache, @intCast(layer), 0, 0);
    try cache.advance();
    try testing.expectEqual(1, cache.currentPos());
    try testing.expectEqual(1, try cache.seqLen(0));
    try testing.expectEqual(5124, cache.memoryBytes());
    try testing.expectEqual(5120, try cache.shape.memoryBytes(.f32, .f32));
    for (0..2) |layer| try expectMarked(&cache, @intCast(layer), 0, 1);
}

test "three tokens: 24 floats a side, each as stored" {
    var cache: ContiguousCache = try .init(testing.allocator, .{
        .layer_count = 1,
        .kv_head_count = 2,
        .head_dim = 4,
        .max_seq_len = 5,
    });
    defer cache.deinit();
    for (0..3) |token| {
        try storeMarked(&cache, 0, 0, token);
        try cache.advance();
    }
    try testing.expectEqual(24, 3 * cache.shape.kvDim());
    try expectMarked(&cache, 0, 0, 3);
}

test "the latch: the third advance of three commits and says so; nothing is overwritten after it" {
    var cache: ContiguousCache = try .init(testing.allocator, .{
        .layer_count = 1,
        .kv_head_count = 1,
        .head_dim = 4,
        .max_seq_len = 3,
    });
    defer cache.deinit();
    for (0..3) |token| {
        try storeMarked(&cache, 0, 0, token);
        if (token < 2) try cache.advance() else try testing.expectError(error.CacheFull, cache.advance());
    }
    try testing.expectEqual(3, try cache.seqLen(0));
    for (0..2) |_| {
        try testing.expectError(error.CacheFull, storeMarked(&cache, 0, 0, 9));
        try testing.expectError(error.CacheFull, cache.advance());
    }
    try expectMarked(&cache, 0, 0, 3); // 12 floats intact
    try cache.truncate(0, 2);
    try storeMarked(&cache, 0, 0, 2);
    try testing.expectError(error.CacheFull, cache.advance());
    try expectMarked(&cache, 0, 0, 3);
}

test "reset empties, touches no byte, and storing works again" {
    var cache: ContiguousCache = try .init(testing.allocator, .{
        .layer_count = 1,
        .kv_head_count = 2,
        .head_dim = 4,
        .max_seq_len = 5,
    });
    defer cache.deinit();
    for (0..2) |token| {
        try storeMarked(&cache, 0, 0, token);
        try cache.advance();
    }
    try testing.expectEqual(2, cache.currentPos());
    cache.reset();
    try testing.expectEqual(0, cache.currentPos());
    try testing.expectEqual(0, try cache.seqLen(0));
    try expectMarked(&cache, 0, 0, 0);
    const rows = try cache.rows(0, 0);
    try testing.expectEqual(mark(0, 1, 1), @as([*]const f32, @ptrCast(@alignCast(rows.memory.contiguous.keys)))[9]);
    try storeMarked(&cache, 0, 0, 0);
    try cache.advance();
    try expectMarked(&cache, 0, 0, 1);
}

test "12 layers of 12 heads of 64 at 2048 tokens: 144 MiB" {
    const options: contiguous.Options = .{ .layer_count = 12, .kv_head_count = 12, .head_dim = 64, .max_seq_len = 2048 };
    try testing.expectEqual(150_994_944, try options.shape().memoryBytes(.f32, .f32));
}

test "store refuses in one order: layer, sequence, full, size, mismatch, finite" {
    var cache: ContiguousCache = try .init(testing.allocator, .{
        .layer_count = 1,
        .kv_head_count = 1,
        .head_dim = 2,
        .max_seq_len = 2,
        .dtype_k = .f16,
    });
    defer cache.deinit();
    const nan = std.math.nan(f32);
    const ragged = input(&.{nan});
    const bad = input(&.{ nan, 0 });
    const good = input(&.{ 1, 2 });
    try testing.expectError(error.LayerOutOfRange, cache.store(1, 1, ragged, ragged));
    try testing.expectError(error.SequenceOutOfRange, cache.store(0, 1, ragged, ragged));
    try testing.expectError(error.InvalidSize, cache.store(0, 0, ragged, bad));
    try testing.expectError(error.InvalidSize, cache.store(0, 0, bad, ragged));
    try testing.expectError(error.NotFinite, cache.store(0, 0, bad, good));
    try testing.expectError(error.NotFinite, cache.store(0, 0, good, bad));
    try testing.expectError(error.NotFinite, cache.store(0, 0, input(&.{ 65520, 0 }), good)); // Inf in f16
    try cache.store(0, 0, good, input(&.{ 65520, 0 })); // V is f32
    try testing.expectError(error.CommitMismatch, cache.store(0, 0, bad, bad));
    try cache.advance();
    try cache.store(0, 0, good, good);
    try testing.expectError(error.CacheFull, cache.advance());
    try testing.expectError(error.CacheFull, cache.store(0, 0, ragged, ragged));
}

test "a refused append leaves rows, counts and generation as they were, and nothing that is not finite behind them" {
    var cache: ContiguousCache = try .init(testing.allocator, .{
        .layer_count = 2,
        .kv_head_count = 1,
        .head_dim = 2,
        .max_seq_len = 4,
    });
    defer cache.deinit();
    const row = input(&.{ 1, 2 });
    const four = input(&.{ 1, 2, 3, 4, 5, 6, 7, 8 });
    _ = try cache.append(0, 0, four, four);
    try cache.truncate(0, 0);
    _ = try cache.append(0, 0, row, row);
    const before = try cache.rows(0, 0);
    const generation = try cache.generation(0, 0);

    const inf = std.math.inf(f32);
    try testing.expectError(error.NotFinite, cache.append(0, 0, row, input(&.{ 3, inf })));
    try testing.expectError(error.NotFinite, cache.append(0, 0, input(&.{ 3, 4, 5, -inf }), input(&.{ 3, 4, 5, 6 })));
    try testing.expectError(error.InvalidSize, cache.append(0, 0, row, input(&.{ 3, 4, 5, 6 })));
    try testing.expectError(error.InvalidSize, cache.append(0, 0, input(&.{ 1, 2, 3 }), input(&.{ 1, 2, 3 })));
    try testing.expectError(error.CacheFull, cache.append(0, 0, four, four));
    try testing.expectError(error.LayerOutOfRange, cache.append(2, 0, row, row));
    try testing.expectError(error.SequenceOutOfRange, cache.append(0, 1, row, row));

    for ([_][*]const u8{ before.memory.contiguous.keys, before.memory.contiguous.values }) |side| {
        // Rows 1 and 2 were written in vain; row 3 is one that was dropped.
        const elements: [8]f32 = @bitCast(side[0..32].*);
        try testing.expectEqual([_]f32{ 1, 2, 0, 0, 0, 0, 7, 8 }, elements);
    }
    try testing.expectEqual(generation, try cache.generation(0, 0));
    try testing.expectEqual(1, (try cache.rows(0, 0)).row_count);
    try testing.expectEqual(0, (try cache.rows(1, 0)).row_count);
    // No rows at all is legal and does nothing.
    try testing.expectEqual(1, try cache.append(0, 0, input(&.{}), input(&.{})));
    try testing.expectEqual(generation, try cache.generation(0, 0));
}

test "reads in the middle of a step are per layer, and a commit wants every layer" {
    var cache: ContiguousCache = try .init(testing.allocator, .{
        .layer_count = 2,
        .kv_head_count = 1,
        .head_dim = 1,
        .max_seq_len = 8,
    });
    defer cache.deinit();
    const three = input(&.{ 1, 2, 3 });
    for (0..2) |layer| try testing.expectEqual(0, try cache.append(@intCast(layer), 0, three, three));
    try cache.commit(0, 3);
    const five = input(&.{ 4, 5, 6, 7, 8 });
    try testing.expectEqual(3, try cache.append(0, 0, five, five));
    try testing.expectEqual(8, (try cache.rows(0, 0)).row_count);
    try testing.expectEqual(3, (try cache.rows(1, 0)).row_count);
    try testing.expectEqual(3, try cache.seqLen(0));
    try testing.expectError(error.CommitMismatch, cache.commit(0, 5));
    try testing.expectError(error.CommitMismatch, cache.advance());
    _ = try cache.append(1, 0, five, five);
    try testing.expectError(error.CommitMismatch, cache.commit(0, 4));
    try testing.expectError(error.CommitMismatch, cache.commit(0, 6));
    try testing.expectError(error.SequenceOutOfRange, cache.commit(1, 5));
    try cache.commit(0, 0);
    try cache.commit(0, 5);
    try testing.expectEqual(8, try cache.seqLen(0));
}

test "truncate drops rows and what is pending, and refuses to go forward" {
    var cache: ContiguousCache = try .init(testing.allocator, .{
        .layer_count = 2,
        .kv_head_count = 1,
        .head_dim = 1,
        .max_seq_len = 8,
    });
    defer cache.deinit();
    const three = input(&.{ 1, 2, 3 });
    for (0..2) |layer| _ = try cache.append(@intCast(layer), 0, three, three);
    try cache.commit(0, 3);
    _ = try cache.append(0, 0, three, three);
    const generation = try cache.generation(1, 0);
    try testing.expectError(error.PositionOutOfRange, cache.truncate(0, 4));
    try testing.expectError(error.SequenceOutOfRange, cache.truncate(1, 0));
    try testing.expectEqual(6, (try cache.rows(0, 0)).row_count);
    try cache.truncate(0, 3); // abandons the half-done step
    try testing.expectEqual(3, (try cache.rows(0, 0)).row_count);
    try testing.expect(generation != try cache.generation(1, 0));
    try cache.truncate(0, 1);
    try testing.expectEqual(1, try cache.seqLen(0));
    try testing.expectEqual(1, try cache.append(0, 0, three, three));
}

test "a ragged batch: each sequence has its own length" {
    var cache: ContiguousCache = try .init(testing.allocator, .{
        .layer_count = 2,
        .sequence_count = 2,
        .kv_head_count = 1,
        .head_dim = 4,
        .max_seq_len = 3,
    });
    defer cache.deinit();
    try testing.expectError(error.CommitMismatch, cache.advance()); // no new row at all
    for (0..3) |token| {
        for (0..2) |layer| try storeMarked(&cache, @intCast(layer), 0, token);
        if (token < 2) try cache.advance() else try testing.expectError(error.CacheFull, cache.advance());
    }
    try testing.expectEqual(3, try cache.seqLen(0));
    try testing.expectEqual(0, try cache.seqLen(1));
    try testing.expectError(error.SequenceOutOfRange, cache.seqLen(2));
    // The full sequence does not stop the other one, whose first row is row 0.
    for (0..2) |layer| try storeMarked(&cache, @intCast(layer), 1, 0);
    try cache.advance();
    for (0..2) |layer| {
        try expectMarked(&cache, @intCast(layer), 0, 3);
        try expectMarked(&cache, @intCast(layer), 1, 1);
    }
    try testing.expectEqual(3, cache.currentPos());
}

test "head-major and token-major input store the same bytes, whatever the dtypes" {
    const heads = 3;
    const dim = 5;
    const tokens = 4;
    var prng: std.Random.DefaultPrng = .init(testing.random_seed);
    const dtypes = [_]Dtype{ .f32, .f16, .bf16 };
    for (dtypes) |from| for (dtypes) |to| {
        var token_major: [heads * dim * tokens * 4]u8 = undefined;
        var head_major: [heads * dim * tokens * 4]u8 = undefined;
        const size = from.elementBytes();
        for (0..tokens) |t| for (0..heads) |h| for (0..dim) |d| {
            const value = prng.random().floatNorm(f32);
            var bytes: [4]u8 = undefined;
            switch (from) {
                .f32 => std.mem.writeInt(u32, &bytes, @bitCast(value), .little),
                else => std.mem.writeInt(u16, bytes[0..2], float_reference.round16(from, value), .little),
            }
            @memcpy(token_major[((t * heads + h) * dim + d) * size ..][0..size], bytes[0..size]);
            @memcpy(head_major[((h * tokens + t) * dim + d) * size ..][0..size], bytes[0..size]);
        };
        var cache: ContiguousCache = try .init(testing.allocator, .{
            .layer_count = 1,
            .sequence_count = 2,
            .kv_head_count = heads,
            .head_dim = dim,
            .max_seq_len = tokens,
            .dtype_k = to,
            .dtype_v = to,
        });
        defer cache.deinit();
        const count = heads * dim * tokens;
        const rows: Input = .{ .bytes = &token_major, .element_count = count, .dtype = from };
        const heads_first: Input = .{ .bytes = &head_major, .element_count = count, .dtype = from, .layout = .head_major };
        _ = try cache.append(0, 0, rows, rows);
        _ = try cache.append(0, 1, heads_first, heads_first);
        const a = try cache.rows(0, 0);
        const b = try cache.rows(0, 1);
        const bytes = count * to.elementBytes();
        try testing.expectEqualSlices(u8, a.memory.contiguous.keys[0..bytes], b.memory.contiguous.keys[0..bytes]);
        try testing.expectEqualSlices(u8, a.memory.contiguous.values[0..bytes], b.memory.contiguous.values[0..bytes]);
        // And gather gives them back, rounded as the dtype says.
        var k: [count]f32 = undefined;
        var v: [count]f32 = undefined;
        const out_k: input_types.Output = .{ .bytes = @ptrCast(&k), .element_count = count };
        const out_v: input_types.Output = .{ .bytes = @ptrCast(&v), .element_count = count };
        try testing.expectEqual(tokens, try cache.gather(0, 1, out_k, out_v));
        for (k, v, 0..) |got_k, got_v, i| {
            const value = float_reference.element(from, &token_major, i);
            const stored: f64 = switch (to) {
                .f32 => value,
                else => stored: {
                    const bits = float_reference.round16(to, value);
                    break :stored float_reference.element(to, std.mem.asBytes(&bits), 0);
                },
            };
            try testing.expectEqual(stored, got_k);
            try testing.expectEqual(stored, got_v);
        }
    };
}

test "gather refuses a short buffer" {
    var cache: ContiguousCache = try .init(testing.allocator, .{ .layer_count = 1, .kv_head_count = 1, .head_dim = 2, .max_seq_len = 4 });
    defer cache.deinit();
    const rows = input(&.{ 1, 2, 3, 4 });
    _ = try cache.append(0, 0, rows, rows);
    var k: [4]f32 = @splat(9);
    const full: input_types.Output = .{ .bytes = @ptrCast(&k), .element_count = 4 };
    const short: input_types.Output = .{ .bytes = @ptrCast(&k), .element_count = 3 };
    try testing.expectError(error.InvalidSize, cache.gather(0, 0, short, full));
    try testing.expectError(error.InvalidSize, cache.gather(0, 0, full, short));
    try testing.expectEqual(@as([4]f32, @splat(9)), k);
}

test "init refuses bad counts and sizes past the limit, before anything is taken" {
    const good: contiguous.Options = .{ .layer_count = 1, .kv_head_count = 1, .head_dim = 1, .max_seq_len = 1 };
    var bad = good;
    bad.max_seq_len = 0;
    try testing.expectError(error.InvalidConfig, ContiguousCache.init(testing.failing_allocator, bad));
    bad = good;
    bad.head_dim = 257;
    try testing.expectError(error.InvalidConfig, ContiguousCache.init(testing.failing_allocator, bad));
    var limited = good;
    limited.max_seq_len = 1000;
    limited.max_bytes = 7999;
    try testing.expectError(error.OutOfMemory, ContiguousCache.init(testing.failing_allocator, limited));
    limited.max_bytes = 8000;
    var cache: ContiguousCache = try .init(testing.allocator, limited);
    cache.deinit();
}

fn initAndFree(gpa: std.mem.Allocator, slabs: std.mem.Allocator) !void {
    var cache: ContiguousCache = try .initSlabs(gpa, slabs, .{
        .layer_count = 3,
        .kv_head_count = 1,
        .head_dim = 1,
        .max_seq_len = 1000,
    });
    cache.deinit();
}

test "every allocation of init may fail" {
    try testing.checkAllAllocationFailures(testing.allocator, struct {
        fn run(gpa: std.mem.Allocator) !void {
            try initAndFree(gpa, gpa);
        }
    }.run, .{});
}

test "a cache of 8 GiB: rows past 2^32 bytes and past several slabs" {
    if (memcheck) return error.SkipZigTest; // valgrind has no 8 GiB of its own
    // Llama-7B at 8192 tokens. Only the pages that are written take memory.
    var cache: ContiguousCache = ContiguousCache.init(testing.allocator, .{
        .layer_count = 32,
        .kv_head_count = 32,
        .head_dim = 128,
        .max_seq_len = 8192,
    }) catch |err| switch (err) {
        error.OutOfMemory => return error.SkipZigTest, // the system does not lend 8 GiB of addresses
        else => return err,
    };
    defer cache.deinit();
    try testing.expectEqual(8_589_934_592 + 4, cache.memoryBytes());
    try testing.expectEqual(8, cache.stats().slab_count); // 4 of 1 GiB a side
    var k: [4096]f32 = undefined;
    for (0..32) |layer| {
        for (&k, 0..) |*element, i| element.* = mark(layer, 0, i % 100);
        try cache.store(@intCast(layer), 0, input(&k), input(&k));
    }
    try cache.advance();
    for (0..32) |layer| {
        const rows = try cache.rows(@intCast(layer), 0);
        const keys: [*]const f32 = @ptrCast(@alignCast(rows.memory.contiguous.keys));
        const values: [*]const f32 = @ptrCast(@alignCast(rows.memory.contiguous.values));
        for (0..4096) |i| {
            try testing.expectEqual(mark(layer, 0, i % 100), keys[i]);
            try testing.expectEqual(mark(layer, 0, i % 100), values[i]);
        }
    }
}

test "new slabs are zero" {
    if (memcheck) return error.SkipZigTest; // undefined on purpose there
    var cache: ContiguousCache = try .init(testing.allocator, .{ .layer_count = 2, .kv_head_count = 2, .head_dim = 64, .max_seq_len = 64 });
    defer cache.deinit();
    const rows = try cache.rows(1, 0);
    try testing.expect(std.mem.allEqual(u8, rows.memory.contiguous.keys[0..@intCast(cache.shape.spanBytes(.f32))], 0));
}
