//! Attention over a contiguous cache against `kernels/reference/attention.zig`, on every level this CPU has.

const std = @import("std");
const testing = std.testing;
const attention = @import("attend.zig");
const contiguous = @import("../cache/contiguous.zig");
const ContiguousCache = contiguous.ContiguousCache;
const dispatch = @import("../kernels/dispatch.zig");
const Dtype = @import("../dtype.zig").Dtype;
const memcheck = @import("build_options").memcheck;
const float_reference = @import("../kernels/reference/float.zig");
const reference = @import("../kernels/reference/attention.zig");
const workers = @import("../device/workers.zig");

/// One comparison: a cache of `token_count` random rows and a query step over it.
const Case = struct {
    token_count: u32,
    kv_head_count: u32 = 1,
    ratio: u32 = 1,
    head_dim: u32 = 64,
    dtype_k: Dtype = .f32,
    dtype_v: Dtype = .f32,
    options: attention.Options = .{},
    /// Scores reach about this magnitude.
    score_magnitude: f32 = 4,
    /// mean|difference| / mean|reference|
    tolerance: f64 = 1e-5,
};

fn forEachLevel(comptime body: fn () anyerror!void) !void {
    const before = dispatch.kernels().level;
    defer dispatch.changeLevel(before) catch unreachable;
    for (std.enums.values(dispatch.Level)) |level| {
        if (dispatch.tableOf(level) == null) continue;
        try dispatch.changeLevel(level);
        body() catch |err| {
            std.debug.print("level {s}\n", .{@tagName(level)});
            return err;
        };
    }
}

fn check(case: Case) !void {
    const gpa = testing.allocator;
    var prng: std.Random.DefaultPrng = .init(case.token_count * 1000 + case.head_dim);
    const random = prng.random();
    var cache: ContiguousCache = try .init(gpa, .{
        .layer_count = 1,
        .kv_head_count = case.kv_head_count,
        .head_dim = case.head_dim,
        .max_seq_len = @max(case.token_count, 1),
        .dtype_k = case.dtype_k,
        .dtype_v = case.dtype_v,
    });
    defer cache.deinit();
    const kv_dim = case.kv_head_count * case.head_dim;
    const q_head_count = case.kv_head_count * case.ratio;
    const query_count = case.options.query_count;

    const rows = try gpa.alloc(f32, 2 * case.token_count * kv_dim);
    defer gpa.free(rows);
    for (rows) |*element| element.* = random.floatNorm(f32);
    const k = rows[0 .. case.token_count * kv_dim];
    const v = rows[case.token_count * kv_dim ..];
    _ = try cache.append(0, 0, .fromF32(k), .fromF32(v));

    const head_dim: f32 = @floatFromInt(case.head_dim);
    const q = try gpa.alloc(f32, query_count * q_head_count * case.head_dim);
    defer gpa.free(q);
    for (q) |*element| element.* = random.floatNorm(f32) * case.score_magnitude / 4;

    const output = try gpa.alloc(f32, q.len);
    defer gpa.free(output);
    @memset(output, std.math.nan(f32));
    const lse = try gpa.alloc(f32, query_count * q_head_count);
    defer gpa.free(lse);
    try attention.attend(try cache.rows(0, 0), q, case.options, output, lse);

    const stored = try cache.rows(0, 0);
    const truth = try gpa.alloc(f64, case.head_dim);
    defer gpa.free(truth);
    const keys = try gpa.alloc(f64, case.token_count * case.head_dim);
    defer gpa.free(keys);
    const values = try gpa.alloc(f64, case.token_count * case.head_dim);
    defer gpa.free(values);
    var difference_sum: f64 = 0;
    var truth_sum: f64 = 0;
    for (0..q_head_count) |head| {
        const kv_head = head / case.ratio;
        const bytes_k = stored.memory.contiguous.keys[0 .. case.token_count * kv_dim * case.dtype_k.elementBytes()];
        const bytes_v = stored.memory.contiguous.values[0 .. case.token_count * kv_dim * case.dtype_v.elementBytes()];
        for (0..case.token_count) |token| for (0..case.head_dim) |d| {
            const index = token * kv_dim + kv_head * case.head_dim + d;
            keys[token * case.head_dim + d] = float_reference.element(case.dtype_k, bytes_k, index);
            values[token * case.head_dim + d] = float_reference.element(case.dtype_v, bytes_v, index);
        };
        for (0..query_count) |query| {
            const at = (query * q_head_count + head) * case.head_dim;
            const slopes = case.options.alibi_slopes;
            const sinks = case.options.sink_logits;
            const truth_lse = reference.attend(.{
                .query = q[at..][0..case.head_dim],
                .keys = keys,
                .values = values,
                .position = @as(i64, case.token_count) - query_count + @as(i64, @intCast(query)),
                .softmax_scale = case.options.softmax_scale orelse 1 / @sqrt(head_dim),
                .causal = case.options.causal,
                .window_tokens = case.options.window_tokens,
                .sink_tokens = case.options.sink_tokens,
                .softcap = if (case.options.softcap) |cap| cap else null,
                .alibi_slope = if (slopes.len == 0) 0 else slopes[head],
                .sink_logit = if (sinks.len == 0) null else sinks[head],
            }, truth);
            for (output[at..][0..case.head_dim], truth) |got, expected| {
                difference_sum += @abs(got - expected);
                truth_sum += @abs(expected);
                if (std.math.isNan(got)) return error.NotWritten;
            }
            const got_lse: f64 = lse[query * q_head_count + head];
            if (std.math.isInf(truth_lse)) {
                try testing.expectEqual(truth_lse, got_lse);
            } else {
                // f32 scores: an absolute error that grows with the score.
                try testing.expect(@abs(got_lse - truth_lse) <= case.tolerance * (1 + @abs(truth_lse)));
            }
        }
    }
    if (truth_sum == 0) return testing.expectEqual(0, difference_sum);
    if (!(difference_sum / truth_sum <= case.tolerance)) {
        std.debug.print("error {e} in {any}\n", .{ difference_sum / truth_sum, case });
        return error.OverTolerance;
    }
}

test "every number of keys about a tile, and 2048" {
    try forEachLevel(struct {
        fn run() !void {
            for ([_]u32{ 0, 1, 2, 3, 63, 64, 65, 100, 127, 128, 129, 2048 }) |token_count| {
                try check(.{ .token_count = token_count });
            }
        }
    }.run);
}

test "every head_dim about a vector, and the largest" {
    try forEachLevel(struct {
        fn run() !void {
            for ([_]u32{ 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 65, 80, 96, 127, 128, 129, 255, 256 }) |dim| {
                try check(.{ .token_count = 70, .head_dim = dim, .kv_head_count = 2 });
                try check(.{ .token_count = 70, .head_dim = dim, .kv_head_count = 2, .ratio = 3, .dtype_k = .f16, .dtype_v = .bf16 });
            }
        }
    }.run);
}

test "every pair of float formats" {
    try forEachLevel(struct {
        fn run() !void {
            const floats = [_]Dtype{ .f32, .f16, .bf16 };
            for (floats) |dtype_k| for (floats) |dtype_v| {
                try check(.{ .token_count = 200, .kv_head_count = 2, .ratio = 4, .dtype_k = dtype_k, .dtype_v = dtype_v });
            };
        }
    }.run);
}

test "grouped and multi-query heads, one to many query rows, causal" {
    try forEachLevel(struct {
        fn run() !void {
            for ([_]u32{ 1, 2, 3, 4, 5, 7, 8, 17, 32 }) |ratio| {
                for ([_]u32{ 1, 2, 5, 8 }) |query_count| {
                    try check(.{ .token_count = 130, .kv_head_count = 2, .ratio = ratio, .options = .{ .query_count = query_count } });
                }
            }
            try check(.{ .token_count = 100, .ratio = 4, .options = .{ .query_count = 100 } });
            // Queries older than the oldest row see nothing.
            try check(.{ .token_count = 3, .ratio = 2, .options = .{ .query_count = 6 } });
            try check(.{ .token_count = 90, .ratio = 2, .options = .{ .query_count = 3, .causal = false } });
        }
    }.run);
}

test "windows and sink tokens" {
    try forEachLevel(struct {
        fn run() !void {
            for ([_]u32{ 1, 63, 64, 65, 150, 400 }) |window| for ([_]u32{ 0, 1, 4, 64, 70, 300 }) |sink| {
                try check(.{ .token_count = 300, .ratio = 2, .options = .{ .query_count = 3, .window_tokens = window, .sink_tokens = sink } });
            };
        }
    }.run);
}

test "softmax scale, softcap, ALiBi and sink logits" {
    try forEachLevel(struct {
        fn run() !void {
            const slopes = [_]f32{ 0.5, 0.25, 0.125, 0.0625 };
            const sinks = [_]f32{ -3, 0, 2, 30 };
            const options = [_]attention.Options{
                .{ .softmax_scale = 0.3 },
                .{ .softcap = 5 },
                .{ .alibi_slopes = &slopes },
                .{ .sink_logits = &sinks },
                .{ .softcap = 20, .alibi_slopes = &slopes, .sink_logits = &sinks, .query_count = 4, .window_tokens = 80, .sink_tokens = 2 },
            };
            for (options) |option| {
                try check(.{ .token_count = 150, .kv_head_count = 2, .ratio = 2, .options = option });
                try check(.{ .token_count = 0, .kv_head_count = 2, .ratio = 2, .options = option });
            }
        }
    }.run);
}

test "scores of 1e4 in magnitude" {
    try forEachLevel(struct {
        fn run() !void {
            // A score of 1e4 is a sum of 64 products in f32, each rounded at 2^-24 of up to 1e4: the softmax may be off
            // by exp(1e4 * 64 * 2^-24) - 1 = 4 % in the worst case, by 0.5 % as a random walk. Never NaN.
            try check(.{ .token_count = 300, .ratio = 2, .score_magnitude = 1e4, .tolerance = 5e-3 });
        }
    }.run);
}

test "100 keys of (i, 7i, 13i mod 100) / 100: no rescaling error past a tile" {
    try forEachLevel(struct {
        fn run() !void {
            var cache: ContiguousCache = try .init(testing.allocator, .{ .layer_count = 1, .kv_head_count = 1, .head_dim = 64, .max_seq_len = 100 });
            defer cache.deinit();
            var q: [64]f32 = undefined;
            var k: [6400]f32 = undefined;
            var v: [6400]f32 = undefined;
            for (&q, 0..) |*element, i| element.* = @as(f32, @floatFromInt(i % 100)) * 0.01;
            for (&k, 0..) |*element, i| element.* = @as(f32, @floatFromInt(7 * i % 100)) * 0.01;
            for (&v, 0..) |*element, i| element.* = @as(f32, @floatFromInt(13 * i % 100)) * 0.01;
            _ = try cache.append(0, 0, .fromF32(&k), .fromF32(&v));
            var output: [64]f32 = undefined;
            try attention.attend(try cache.rows(0, 0), &q, .{}, &output, &.{});
            for (output) |element| try testing.expect(element > 0.47 and element < 0.52);
        }
    }.run);
}

test "a row's bits do not depend on the rows beside it" {
    try forEachLevel(struct {
        fn run() !void {
            var cache: ContiguousCache = try .init(testing.allocator, .{
                .layer_count = 1,
                .kv_head_count = 1,
                .head_dim = 80,
                .max_seq_len = 200,
                .dtype_k = .f16,
                .dtype_v = .bf16,
            });
            defer cache.deinit();
            var prng: std.Random.DefaultPrng = .init(7);
            var rows: [200 * 80]f32 = undefined;
            for (&rows) |*element| element.* = prng.random().floatNorm(f32);
            _ = try cache.append(0, 0, .fromF32(&rows), .fromF32(&rows));
            var q: [7 * 3 * 80]f32 = undefined;
            for (&q) |*element| element.* = prng.random().floatNorm(f32);
            var together: [7 * 3 * 80]f32 = undefined;
            var lse_together: [21]f32 = undefined;
            const options: attention.Options = .{ .query_count = 7, .causal = false };
            try attention.attend(try cache.rows(0, 0), &q, options, &together, &lse_together);
            for (0..21) |row| {
                var alone: [80]f32 = undefined;
                var lse_alone: [1]f32 = undefined;
                try attention.attend(try cache.rows(0, 0), q[row * 80 ..][0..80], .{ .causal = false }, &alone, &lse_alone);
                try testing.expectEqualSlices(u8, std.mem.asBytes(together[row * 80 ..][0..80]), std.mem.asBytes(&alone));
                try testing.expectEqual(lse_together[row], lse_alone[0]);
            }
        }
    }.run);
}

test "attend refuses and writes nothing" {
    var cache: ContiguousCache = try .init(testing.allocator, .{ .layer_count = 1, .kv_head_count = 2, .head_dim = 4, .max_seq_len = 4 });
    defer cache.deinit();
    const row: [8]f32 = @splat(1);
    _ = try cache.append(0, 0, .fromF32(&row), .fromF32(&row));
    var output: [32]f32 = @splat(9);
    var lse: [8]f32 = @splat(9);
    const q: [16]f32 = @splat(1); // 4 query heads
    const attend = attention.attend;
    const rows = try cache.rows(0, 0);
    try testing.expectError(error.InvalidSize, attend(rows, q[0..0], .{}, &output, &lse));
    try testing.expectError(error.InvalidSize, attend(rows, q[0..4], .{}, &output, &lse)); // 1 head over 2
    try testing.expectError(error.InvalidSize, attend(rows, q[0..15], .{}, &output, &lse));
    try testing.expectError(error.InvalidSize, attend(rows, &q, .{ .query_count = 3 }, &output, &lse));
    try testing.expectError(error.InvalidSize, attend(rows, &q, .{}, output[0..15], &lse));
    try testing.expectError(error.InvalidSize, attend(rows, &q, .{}, &output, lse[0..3]));
    try testing.expectError(error.InvalidSize, attend(rows, &q, .{ .alibi_slopes = q[0..3] }, &output, &lse));
    try testing.expectError(error.InvalidSize, attend(rows, &q, .{ .sink_logits = q[0..5] }, &output, &lse));
    const nan = std.math.nan(f32);
    const bad_options = [_]attention.Options{
        .{ .query_count = 0 },                                .{ .window_tokens = 0 },                 .{ .window_tokens = 4, .causal = false },
        .{ .softcap = 0 },                                    .{ .softcap = nan },                     .{ .softcap = -1 },
        .{ .softmax_scale = nan },                            .{ .softmax_scale = std.math.inf(f32) }, .{ .alibi_slopes = &.{ 1, nan, 1, 1 } },
        .{ .sink_logits = &.{ 1, 1, 1, std.math.inf(f32) } },
    };
    for (bad_options) |options| {
        try testing.expectError(error.InvalidConfig, attend(rows, &q, options, &output, &lse));
    }
    const bad_q: [16]f32 = @as([15]f32, @splat(1)) ++ [1]f32{nan};
    try testing.expectError(error.NotFinite, attend(rows, &bad_q, .{}, &output, &lse));
    try testing.expectEqual(@as([32]f32, @splat(9)), output);
    try testing.expectEqual(@as([8]f32, @splat(9)), lse);
    // Nothing is written behind what was asked for.
    try attend(rows, &q, .{}, &output, &lse);
    try testing.expectEqual(@as([16]f32, @splat(1)), output[0..16].*);
    try testing.expectEqual(@as([16]f32, @splat(9)), output[16..].*);
    try testing.expectEqual(@as([4]f32, @splat(9)), lse[4..].*);
}

/// Sequences of these lengths in one batch, each with as many queries.
fn batchBits(gpa: std.mem.Allocator, lengths: []const u32, query_count: u32, output: []f32, lse: []f32) !void {
    const heads = 4;
    const ratio = 2;
    const dim = 32;
    var cache: ContiguousCache = try .init(gpa, .{
        .layer_count = 1,
        .sequence_count = @intCast(lengths.len),
        .kv_head_count = heads,
        .head_dim = dim,
        .max_seq_len = std.mem.max(u32, lengths),
        .dtype_k = .f16,
        .dtype_v = .f16,
    });
    defer cache.deinit();
    var prng: std.Random.DefaultPrng = .init(17);
    const random = prng.random();
    const queries = try gpa.alloc(attention.Query, lengths.len);
    defer gpa.free(queries);
    const q = try gpa.alloc(f32, output.len);
    defer gpa.free(q);
    for (q) |*element| element.* = random.floatNorm(f32);
    const elements = query_count * heads * ratio * dim;
    for (lengths, queries, 0..) |length, *query, i| {
        const rows = try gpa.alloc(f32, length * heads * dim);
        defer gpa.free(rows);
        for (rows) |*element| element.* = random.floatNorm(f32);
        _ = try cache.append(0, @intCast(i), .fromF32(rows), .fromF32(rows));
        query.* = try .init(
            try cache.rows(0, @intCast(i)),
            q[i * elements ..][0..elements],
            .{ .query_count = query_count, .sink_logits = &(.{0.25} ** (heads * ratio)) },
            output[i * elements ..][0..elements],
            lse[i * query_count * heads * ratio ..][0 .. query_count * heads * ratio],
        );
    }
    attention.attendAll(queries);
}

test "the same bits by any number of threads: one sequence, a batch of unequal ones, many queries" {
    if (memcheck) return error.SkipZigTest; // one thread at a time runs there
    const gpa = testing.allocator;
    const before = workers.threadCount();
    defer workers.setThreadCount(before) catch unreachable;
    const Batch = struct { lengths: []const u32, query_count: u32 };
    for ([_]Batch{
        .{ .lengths = &.{9000}, .query_count = 1 },
        .{ .lengths = &.{ 9000, 1, 700, 1024, 1025, 3000 }, .query_count = 1 },
        .{ .lengths = &.{ 1100, 2100 }, .query_count = 70 },
    }) |case| {
        const rows = case.lengths.len * case.query_count * 8;
        const outputs = try gpa.alloc(f32, 2 * rows * 32);
        defer gpa.free(outputs);
        const lses = try gpa.alloc(f32, 2 * rows);
        defer gpa.free(lses);
        const expected, const got = .{ outputs[0 .. rows * 32], outputs[rows * 32 ..] };
        try workers.setThreadCount(1);
        try batchBits(gpa, case.lengths, case.query_count, expected, lses[0..rows]);
        for (expected) |x| try testing.expect(std.math.isFinite(x));
        for ([_]u32{ 2, 3, 7 }) |count| {
            try workers.setThreadCount(count);
            @memset(got, std.math.nan(f32));
            try batchBits(gpa, case.lengths, case.query_count, got, lses[rows..]);
            try testing.expectEqualSlices(u8, std.mem.sliceAsBytes(expected), std.mem.sliceAsBytes(got));
            try testing.expectEqualSlices(u8, std.mem.sliceAsBytes(lses[0..rows]), std.mem.sliceAsBytes(lses[rows..]));
        }
    }
}

fn attendOften(failures: *std.atomic.Value(u32)) void {
    var expected: [256]f32 = undefined;
    var got: [256]f32 = undefined;
    attendAgain(failures, &expected, &got) catch {
        _ = failures.fetchAdd(1, .monotonic);
    };
}

fn attendAgain(failures: *std.atomic.Value(u32), expected: *[256]f32, got: *[256]f32) !void {
    const gpa = std.heap.page_allocator;
    var lse: [8]f32 = undefined;
    try batchBits(gpa, &.{5000}, 1, expected, &lse);
    for (0..10) |_| {
        try batchBits(gpa, &.{5000}, 1, got, &lse);
        if (!std.mem.eql(u8, std.mem.asBytes(expected), std.mem.asBytes(got))) _ = failures.fetchAdd(1, .monotonic);
    }
}

test "several callers attend at once" {
    if (memcheck) return error.SkipZigTest; // one thread at a time runs there
    const before = workers.threadCount();
    defer workers.setThreadCount(before) catch unreachable;
    try workers.setThreadCount(3);
    var failures: std.atomic.Value(u32) = .init(0);
    var callers: [3]std.Thread = undefined;
    for (&callers) |*caller| caller.* = try std.Thread.spawn(.{}, attendOften, .{&failures});
    for (callers) |caller| caller.join();
    try testing.expectEqual(0, failures.load(.monotonic));
}
