//! Attention over tiles of any two formats against `reference/attention.zig`, on every level this CPU has, and on `amx` where
//! it can be emulated.

const std = @import("std");
const testing = std.testing;
const amx_emulator = @import("../reference/amx_emulator.zig");
const cases = @import("cases.zig");
const dispatch = @import("../dispatch.zig");
const reference = @import("../reference/attention.zig");
const Dtype = @import("../../dtype.zig").Dtype;
const Results = cases.Results;
const Sees = cases.Sees;
const Stored = cases.Stored;
const Table = dispatch.Table;
const attendRows = cases.attendRows;
const randomQueries = cases.randomQueries;
const row_max = cases.row_max;
const tile_tokens = dispatch.tile_tokens;

const dtypes = std.enums.values(Dtype);

/// Valgrind takes thirty times as long: it sees every line of the kernels with fewer cases, too.
const memcheck = @import("build_options").memcheck;
const quantized = [_]Dtype{ .q8_0, .q4_0, .i8, .i4, .i2 };

fn tableOf(level: dispatch.Level) ?*const Table {
    return if (level == .amx) amx_emulator.kernels() else dispatch.tableOf(level);
}

fn forEachLevel(context: anytype, comptime body: fn (@TypeOf(context), *const Table) anyerror!void) !void {
    for (std.enums.values(dispatch.Level)) |level| {
        const table = tableOf(level) orelse continue;
        body(context, table) catch |err| {
            std.debug.print("level {s}, {any}\n", .{ @tagName(level), context });
            return err;
        };
    }
}

const Case = struct {
    dtype_k: Dtype,
    dtype_v: Dtype,
    token_count: u32 = 200,
    head_dim: u32 = 64,
    block_size: u32 = 64,
    row_count: u32 = 4,
    window_tokens: ?u32 = null,
    sink_tokens: u32 = 0,

    /// What is the same on all levels.
    const Truth = struct {
        output: [row_max][dispatch.head_dim_max]f64,
        lse: [row_max]f64,
    };

    fn check(case: Case) !void {
        const stored: Stored = try .init(case.dtype_k, case.dtype_v, case.token_count, case.head_dim, case.block_size);
        defer stored.deinit();
        var queries: [row_max * dispatch.head_dim_max]f32 = undefined;
        randomQueries(&queries, case.head_dim);
        var sees_buffer: [row_max]Sees = undefined;
        const sees = sees_buffer[0..case.row_count];
        for (sees, 0..) |*row, r| {
            // Causal: every row sees one more than the one before.
            const end = case.token_count - case.row_count + @as(u32, @intCast(r)) + 1;
            row.* = .{
                .first = if (case.window_tokens) |tokens| end -| tokens else 0,
                .end = end,
                .sink_end = @min(case.sink_tokens, end),
            };
        }
        var truth: Truth = undefined;
        for (sees, 0..) |row, r| truth.lse[r] = reference.attend(.{
            .query = queries[r * std.mem.alignForward(u32, case.head_dim, dispatch.lanes_max) ..][0..case.head_dim],
            .keys = stored.keys.truth[0 .. case.token_count * case.head_dim],
            .values = stored.values.truth[0 .. case.token_count * case.head_dim],
            .position = @as(i64, row.end) - 1,
            .softmax_scale = 1,
            .window_tokens = case.window_tokens,
            .sink_tokens = case.sink_tokens,
        }, truth.output[r][0..case.head_dim]);
        for (std.enums.values(dispatch.Level)) |level| {
            const table = tableOf(level) orelse continue;
            const results = attendRows(table, stored, &queries, sees);
            case.compare(&truth, &results) catch |err| {
                std.debug.print("level {t}, {any}\n", .{ level, case });
                return err;
            };
        }
    }

    /// mean|difference| / mean|truth|, and the difference of the log-sum-exp.
    ///
    /// A score is a sum over head_dim of codes, about 2^(bits - 1) in magnitude, times numbers that are off by up to
    /// half a step: of the largest |q * scale|, 2^-15. As scales are about 2^(1 - bits) here, and the largest of n
    /// normal numbers times a scale 1.5 times the mean is about 4 * 2 / sqrt(n) * scale, the n random errors add up to
    /// about sqrt(n) * 2^-15 * 8 / sqrt(n) / sqrt(3) = 1.4e-4, and so the weights; those of the sums over tokens are of
    /// the same kind. Without the low digit they would be 128 times that.
    const tolerance = 6e-4;
    const float_tolerance = 1e-5;

    fn compare(case: Case, truth: *const Truth, results: *const Results) !void {
        const bound: f64 = if (case.dtype_k.isFloat() and case.dtype_v.isFloat()) float_tolerance else tolerance;
        var difference_sum: f64 = 0;
        var truth_sum: f64 = 0;
        for (0..case.row_count) |r| {
            for (results.output[r][0..case.head_dim], truth.output[r][0..case.head_dim]) |got, expected| {
                difference_sum += @abs(got - expected);
                truth_sum += @abs(expected);
            }
            const lse = truth.lse[r];
            try testing.expect(@abs(results.lse[r] - lse) <= bound * (1 + @abs(lse)));
        }
        if (!(difference_sum <= bound * truth_sum)) {
            std.debug.print("error {e}\n", .{difference_sum / truth_sum});
            return error.OverTolerance;
        }
    }
};

test "every format of keys with every format of values" {
    for (dtypes) |dtype_k| for (dtypes) |dtype_v| {
        if (memcheck and dtype_k != dtype_v) continue;
        try (Case{ .dtype_k = dtype_k, .dtype_v = dtype_v }).check();
    };
}

test "every head_dim and block size" {
    for (quantized, 0..) |dtype_k, i| for ([_]u32{ 32, 64, 96, 128, 256 }) |head_dim| for ([_]u32{ 64, 128, 256 }) |block_size| {
        if (memcheck and (head_dim != 96 or block_size != 128)) continue;
        try (Case{
            .dtype_k = dtype_k,
            .dtype_v = quantized[(i + block_size / 64) % quantized.len],
            .token_count = 300,
            .head_dim = head_dim,
            .block_size = block_size,
        }).check();
    };
}

test "every number of rows" {
    for (quantized) |dtype| for ([_]u32{ 1, 2, 3, 4, 5, 6, 7, 8, 15, 16 }) |row_count| {
        if (memcheck and row_count > 3) continue;
        try (Case{ .dtype_k = dtype, .dtype_v = dtype, .row_count = row_count }).check();
    };
}

test "tiles of which a part is there or seen" {
    const pairs = [_][2]Dtype{ .{ .i4, .i4 }, .{ .q8_0, .q8_0 }, .{ .f16, .i8 }, .{ .i2, .f32 }, .{ .q4_0, .bf16 } };
    for (pairs) |pair| for ([_]u32{ 5, 63, 64, 65, 129 }) |token_count| {
        for ([_]?u32{ null, 1, 3, 64, 100 }) |window| for ([_]u32{ 0, 1, 4, 70 }) |sink| {
            if (window == null and sink != 0) continue;
            try (Case{
                .dtype_k = pair[0],
                .dtype_v = pair[1],
                .token_count = token_count,
                .head_dim = 32,
                .window_tokens = window,
                .sink_tokens = sink,
            }).check();
        };
    };
}

/// Stored bytes that are all the same, scales of 1 or -1, and queries of 1 or -1: all digits are 127 or -127 (and 0), and
/// every score and sum is an integer.
const Extreme = struct {
    dtype: Dtype,
    byte: ?u8,
    head_dim: u32,

    fn stored(extreme: Extreme) !Stored {
        const fill: cases.Fill = .{ .byte = extreme.byte, .unit_scales = true };
        return .{
            .keys = try .init(extreme.dtype, .keys, tile_tokens, extreme.head_dim, tile_tokens, fill),
            .values = try .init(extreme.dtype, .values, tile_tokens, extreme.head_dim, tile_tokens, fill),
        };
    }

    /// A row that sees one token has its score as log-sum-exp.
    fn checkScores(extreme: Extreme, table: *const Table) !void {
        const both = try extreme.stored();
        defer both.deinit();
        const head_dim = extreme.head_dim;
        var queries: [row_max * dispatch.head_dim_max]f32 = undefined;
        var first: u32 = 0;
        while (first < tile_tokens) : (first += row_max) {
            var sees: [row_max]Sees = undefined;
            for (&sees, first.., 0..) |*row, token, r| {
                row.* = .{ .first = @intCast(token), .end = @intCast(token + 1) };
                const key = both.keys.truth[token * head_dim ..][0..head_dim];
                for (queries[r * head_dim ..][0..head_dim], key, 0..) |*element, k, dim| element.* = switch (token / 2 % 4) {
                    0 => 1,
                    1 => -1,
                    // The signs of the key, for the largest sum there is, or any.
                    2 => if (k < 0) -1 else 1,
                    else => if (cases.hash(5, @intCast(token), @intCast(dim)) & 1 == 0) -1 else 1,
                };
            }
            const results = attendRows(table, both, &queries, &sees);
            for (results.lse, first.., 0..) |lse, token, r| {
                var expected: f64 = 0;
                for (queries[r * head_dim ..][0..head_dim], both.keys.truth[token * head_dim ..][0..head_dim]) |q, k| {
                    expected += q * k;
                }
                try expectInteger(expected, lse);
            }
        }
    }

    /// Queries of 0 weigh all tokens 1: outputs times 64 are the sums.
    fn checkSums(extreme: Extreme, table: *const Table) !void {
        const both = try extreme.stored();
        defer both.deinit();
        const queries: [256]f32 = @splat(0);
        const results = attendRows(table, both, &queries, &.{.{ .end = tile_tokens }});
        for (results.output[0][0..extreme.head_dim], 0..) |got, dim| {
            var expected: f64 = 0;
            for (0..tile_tokens) |token| expected += both.values.truth[token * extreme.head_dim + dim];
            try expectInteger(expected, got * tile_tokens);
        }
    }

    /// The integers are exact; the step, 1 / 16256, and the roundings of f32 are not: 2^15 * 4 * 2^-24 = 2^-7.
    fn expectInteger(expected: f64, got: f32) !void {
        try testing.expectEqual(expected, @round(@as(f64, got)));
        try testing.expect(@abs(got - expected) <= 0x1p-22 * @abs(expected));
    }
};

test "the largest and smallest codes with the largest and smallest digits" {
    for (quantized) |dtype| for ([_]?u8{ 0x00, 0xff, 0x7f, 0x80, 0x81, null }) |byte| {
        for ([_]u32{ 32, 64, 256 }) |head_dim| {
            const extreme: Extreme = .{ .dtype = dtype, .byte = byte, .head_dim = head_dim };
            try forEachLevel(extreme, Extreme.checkScores);
            try forEachLevel(extreme, Extreme.checkSums);
        }
    };
}

const Pair = struct { dtype_k: Dtype, dtype_v: Dtype };

fn expectSameBits(head_dim: u32, results: *const Results, r: usize, other: *const Results, other_r: usize) !void {
    const output = std.mem.sliceAsBytes(results.output[r][0..head_dim]);
    try testing.expectEqualSlices(u8, output, std.mem.sliceAsBytes(other.output[other_r][0..head_dim]));
    try testing.expectEqual(@as(u32, @bitCast(results.lse[r])), @as(u32, @bitCast(other.lse[other_r])));
}

fn checkAlone(pair: Pair, table: *const Table) !void {
    const head_dim = 96;
    const stored: Stored = try .init(pair.dtype_k, pair.dtype_v, 150, head_dim, 128);
    defer stored.deinit();
    var queries: [row_max * head_dim]f32 = undefined;
    randomQueries(&queries, head_dim);
    // Rows of very different size: a step that came from another row would show.
    for (&queries, 0..) |*element, i| element.* *= @floatFromInt(1 + i / head_dim);
    const sees: [row_max]Sees = @splat(.{ .end = 150 });
    for ([_]usize{ 16, 7 }) |row_count| {
        const together = attendRows(table, stored, &queries, sees[0..row_count]);
        for (0..row_count) |r| {
            const alone = attendRows(table, stored, queries[r * head_dim ..], sees[0..1]);
            try testing.expect(!std.math.isNan(alone.lse[0]));
            try expectSameBits(head_dim, &together, r, &alone, 0);
        }
    }
}

test "a row's bits do not depend on the rows beside it" {
    for (dtypes) |dtype| {
        try forEachLevel(Pair{ .dtype_k = dtype, .dtype_v = .i4 }, checkAlone);
        try forEachLevel(Pair{ .dtype_k = .i4, .dtype_v = dtype }, checkAlone);
    }
}

fn checkBlockSizes(pair: Pair, table: *const Table) !void {
    const head_dim = 64;
    const token_count = 500;
    var queries: [5 * head_dim]f32 = undefined;
    randomQueries(&queries, head_dim);
    const sees: [5]Sees = @splat(.{ .first = 70, .end = token_count - 3, .sink_end = 2 });
    var first: ?Results = null;
    for ([_]u32{ 64, 128, 256 }) |block_size| {
        const stored: Stored = try .init(pair.dtype_k, pair.dtype_v, token_count, head_dim, block_size);
        defer stored.deinit();
        const results = attendRows(table, stored, &queries, &sees);
        if (first) |*expected| {
            for (0..sees.len) |r| try expectSameBits(head_dim, expected, r, &results, r);
        } else first = results;
    }
}

test "equal codes and scales give equal bits in blocks of any size" {
    for (dtypes) |dtype| {
        try forEachLevel(Pair{ .dtype_k = dtype, .dtype_v = .q8_0 }, checkBlockSizes);
        try forEachLevel(Pair{ .dtype_k = .q4_0, .dtype_v = dtype }, checkBlockSizes);
    }
}
