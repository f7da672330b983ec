//! Tiles of AMX, on the CPU's own or on those of `reference/amx_emulator.zig`: each instruction by itself, and attention against the
//! level `avx512`.

const std = @import("std");
const testing = std.testing;
const registers = @import("tile_register.zig");
const amx_emulator = @import("../reference/amx_emulator.zig");
const cases = @import("cases.zig");
const dispatch = @import("../dispatch.zig");
const Dtype = @import("../../dtype.zig").Dtype;

const head_dim_max = dispatch.head_dim_max;

/// Rows, dwords of sums, and dwords that are summed over.
const Product = struct {
    row_count: u8,
    lane_count: u8,
    quad_count: u8,

    fn check(product: Product) !void {
        const sums = 0;
        const digits = 3;
        const codes = 7;
        var shapes: [8]registers.Shape = @splat(.{ .row_count = 1, .row_bytes = 4 });
        shapes[sums] = .{ .row_count = product.row_count, .row_bytes = 4 * product.lane_count };
        shapes[digits] = .{ .row_count = product.row_count, .row_bytes = 4 * product.quad_count };
        shapes[codes] = .{ .row_count = product.quad_count, .row_bytes = 4 * product.lane_count };
        var left: [16][64]i8 = undefined;
        var right: [16][80]i8 = undefined;
        for (&left, 0..) |*row, m| for (row, 0..) |*byte, i| {
            byte.* = @bitCast(@as(u8, @truncate(cases.hash(1, @intCast(m), @intCast(i)))));
        };
        for (&right, 0..) |*row, k| for (row, 0..) |*byte, i| {
            byte.* = @bitCast(@as(u8, @truncate(cases.hash(2, @intCast(k), @intCast(i)))));
        };
        // The largest products there are.
        left[0] = @splat(-128);
        for (&right) |*row| row[0..4].* = @splat(-128);
        var got: [16][16]i32 = @splat(@splat(7));
        const config: registers.Config = .init(shapes);
        registers.configure(&config);
        registers.load(digits, &left, @sizeOf(@TypeOf(left[0])));
        registers.load(codes, &right, @sizeOf(@TypeOf(right[0])));
        registers.zero(sums);
        registers.addProducts(sums, digits, codes);
        registers.addProducts(sums, digits, codes);
        registers.store(sums, &got, @sizeOf(@TypeOf(got[0])));
        registers.release();
        for (got, 0..) |row, m| for (row, 0..) |sum, n| {
            var expected: i32 = 0;
            for (0..4 * product.quad_count) |i| expected += 2 * @as(i32, left[m][i]) * right[i / 4][4 * n + i % 4];
            // Nothing is written beside the rows and bytes of a tile register.
            const is_inside = m < product.row_count and n < product.lane_count;
            try testing.expectEqual(if (is_inside) expected else 7, sum);
        };
    }
};

test {
    _ = amx_emulator;
}

test "tile registers of any shape multiply signed bytes" {
    if (comptime !amx_emulator.is_here) return error.SkipZigTest; // no assembler for them
    if (amx_emulator.kernels() == null) return error.SkipZigTest; // neither this CPU's tile registers nor emulated ones
    try (Product{ .row_count = 16, .lane_count = 16, .quad_count = 16 }).check();
    try (Product{ .row_count = 1, .lane_count = 16, .quad_count = 8 }).check();
    try (Product{ .row_count = 5, .lane_count = 3, .quad_count = 1 }).check();
}

const Case = struct {
    dtype_k: Dtype,
    dtype_v: Dtype,
    head_dim: u32,
    block_size: u32,
    row_count: u32,

    fn check(case: Case, avx512: *const dispatch.Table, amx_kernels: *const dispatch.Table) !void {
        const token_count = 150;
        const stored: cases.Stored = try .init(case.dtype_k, case.dtype_v, token_count, case.head_dim, case.block_size);
        defer stored.deinit();
        var queries: [cases.row_max * head_dim_max]f32 = undefined;
        cases.randomQueries(&queries, case.head_dim);
        const sees: [cases.row_max]cases.Sees = @splat(.{ .first = 9, .end = token_count, .sink_end = 3 });
        const expected = cases.attendRows(avx512, stored, &queries, sees[0..case.row_count]);
        const emulated_count = amx_emulator.instruction_count;
        const got = cases.attendRows(amx_kernels, stored, &queries, sees[0..case.row_count]);
        for (0..case.row_count) |r| {
            const output = std.mem.sliceAsBytes(expected.output[r][0..case.head_dim]);
            try testing.expectEqualSlices(u8, output, std.mem.sliceAsBytes(got.output[r][0..case.head_dim]));
            try testing.expectEqual(@as(u32, @bitCast(expected.lse[r])), @as(u32, @bitCast(got.lse[r])));
        }
        if (dispatch.tableOf(.amx) != null) return;
        const uses_tiles = !(case.dtype_k.isFloat() and case.dtype_v.isFloat());
        try testing.expectEqual(uses_tiles, amx_emulator.instruction_count != emulated_count);
        try testing.expect(amx_emulator.isReleased());
    }
};

test "amx gives the bits of avx512" {
    const amx_kernels = amx_emulator.kernels() orelse return error.SkipZigTest; // the CPU lacks AVX-512
    const avx512 = dispatch.tableOf(.avx512).?;
    try testing.expectEqual(.amx, amx_kernels.level);
    for (std.enums.values(Dtype), 0..) |dtype_k, k| for (std.enums.values(Dtype), 0..) |dtype_v, v| {
        try (Case{
            .dtype_k = dtype_k,
            .dtype_v = dtype_v,
            .head_dim = ([_]u32{ 32, 64, 96, 128, 256 })[(k + 2 * v) % 5],
            .block_size = ([_]u32{ 64, 128, 256 })[(k + v) % 3],
            .row_count = @intCast(1 + (7 * k + 3 * v) % cases.row_max),
        }).check(avx512, amx_kernels);
    };
}
