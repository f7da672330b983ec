//! Codecs through the C face: what comes back, and what a caller can get wrong.

const std = @import("std");
const testing = std.testing;
const group = @import("../group.zig");
const quantization = @import("quantization.zig");
const Dtype = @import("../dtype.zig").Dtype;
const Status = @import("status.zig").Status;

const Buffer = ?[*]u8;
/// Exports that take a plane's shape, an input and an output, with their counts.
const BlockExport = *const fn (u32, u32, u32, u32, ?[*]const u8, u32, Buffer, u32) callconv(.c) i32;

const poison = 0xaa;

fn bytesOf(pointer: anytype) [*]u8 {
    return @ptrCast(@constCast(pointer));
}

fn expectStatus(expected: Status, got: i32) !void {
    try testing.expectEqual(expected.result(), got);
}

fn expectOk(got: i32) !void {
    try expectStatus(.ok, got);
}

/// Whole numbers from -127 to 127, each group with one of its ends: exact in q8_0 with scale 1.
fn fill(rows: []f32) void {
    for (rows, 0..) |*x, i| x.* = @floatFromInt(@as(i32, @intCast(i * 37 % 255)) - 127);
    for (0..rows.len / 32) |g| rows[g * 32] = if (g % 2 == 0) 127 else -127;
}

test "rows of whole numbers to records of q8_0, to planes, and all the way back" {
    var rows: [64 * 64]f32 = undefined;
    fill(&rows);
    var records: [rows.len / 32 * 34 + 1]u8 = @splat(poison);
    const record_bytes = records.len - 1;
    try expectOk(quantization.rowsQuantize(3, bytesOf(&rows), rows.len, &records, record_bytes));
    try testing.expectEqual([3]u8{ 0x00, 0x3c, 127 }, records[0..3].*); // f16(1), little-endian; the first code
    try testing.expectEqual(poison, records[record_bytes]);
    for (std.enums.values(group.Side)) |side| {
        const word = @intFromEnum(side);
        var packed_plane: [record_bytes]u8 = undefined;
        try expectOk(quantization.blockPack(3, word, 64, 64, &records, record_bytes, &packed_plane, record_bytes));
        var plane: [record_bytes]u8 = undefined;
        try expectOk(quantization.blockQuantize(3, word, 64, 64, bytesOf(&rows), rows.len, &plane, record_bytes));
        try testing.expectEqualSlices(u8, &packed_plane, &plane);
        var back: [rows.len]f32 = undefined;
        try expectOk(quantization.blockDequantize(3, word, 64, 64, &plane, record_bytes, bytesOf(&back), back.len));
        try testing.expectEqualSlices(f32, &rows, &back);
        var again: [record_bytes]u8 = undefined;
        try expectOk(quantization.blockUnpack(3, word, 64, 64, &plane, record_bytes, &again, record_bytes));
        try testing.expectEqualSlices(u8, records[0..record_bytes], &again);
    }
    var back: [rows.len]f32 = undefined;
    try expectOk(quantization.rowsDequantize(3, &records, record_bytes, bytesOf(&back), back.len));
    try testing.expectEqualSlices(f32, &rows, &back);
    try expectOk(quantization.rowsQuantize(4, null, 0, null, 0));
    try expectOk(quantization.rowsDequantize(4, null, 0, null, 0));
}

test "formats, sides and shapes that there are not are refused" {
    var rows: [64 * 32]f32 = @splat(1);
    var bytes: [64 * 34 * 2]u8 = @splat(poison);
    for ([_]u32{ 0, 1, 2, 5, 6, 7, 8, 0xffff_ffff }) |dtype| {
        try expectStatus(.invalid_config, quantization.rowsQuantize(dtype, bytesOf(&rows), 32, &bytes, 34));
        try expectStatus(.invalid_config, quantization.rowsDequantize(dtype, &bytes, 0, bytesOf(&rows), 32));
        try expectStatus(.invalid_config, quantization.blockPack(dtype, 0, 64, 32, &bytes, 2176, bytes[2176..].ptr, 2176));
        try expectStatus(.invalid_config, quantization.blockUnpack(dtype, 0, 64, 32, &bytes, 2176, bytes[2176..].ptr, 2176));
    }
    const absurd = [_]u32{ 1 << 31, 0xffff_ffff };
    const good = [_]u32{ 3, 0, 64, 32 };
    const wrong = [_][]const u32{
        &.{ 0, 2, 8 },
        &.{2},
        &.{ 0, 32, 63, 96, 192, 512, 0xffff_ffc0 },
        &.{ 0, 16, 48, 257, 288, 0xffff_ffe0 },
    };
    var shapes: [32][4]u32 = @splat(.{ 3, 0, 1 << 16, 1 << 16 }); // 0 bytes in 32 bits
    var shape_count: usize = 1;
    for (wrong, 0..) |list, at| for ([_][]const u32{ list, &absurd }) |words| for (words) |word| {
        shapes[shape_count] = good;
        shapes[shape_count][at] = word;
        shape_count += 1;
    };
    for (shapes[0..shape_count]) |shape| {
        const dtype, const side, const block_size, const head_dim = shape;
        for ([_]BlockExport{
            &quantization.blockQuantize,
            &quantization.blockDequantize,
            &quantization.blockPack,
            &quantization.blockUnpack,
        }) |call| {
            const got = call(dtype, side, block_size, head_dim, bytesOf(&rows), rows.len, &bytes, bytes.len);
            try expectStatus(.invalid_config, got);
        }
    }
    try testing.expect(std.mem.allEqual(u8, &bytes, poison));
}

test "short, odd and missing buffers are refused untouched, longer outputs are not" {
    var rows: [64 * 32]f32 = @splat(1);
    var bytes: [2 * 2176]u8 = @splat(poison);
    const in = bytesOf(&rows);
    for ([_]u32{ 1, 31, 33, 63, 65 }) |count| {
        try expectStatus(.invalid_size, quantization.rowsQuantize(3, in, count, &bytes, bytes.len));
    }
    try expectStatus(.invalid_size, quantization.rowsQuantize(3, in, 64, &bytes, 67));
    try expectStatus(.invalid_size, quantization.rowsQuantize(3, null, 64, &bytes, 68));
    try expectStatus(.invalid_size, quantization.rowsQuantize(3, in, 64, null, 68));
    try expectStatus(.invalid_size, quantization.rowsQuantize(3, in, 0xffff_ffe0, &bytes, bytes.len));
    for ([_]u32{ 1, 33, 35, 67 }) |count| {
        try expectStatus(.invalid_size, quantization.rowsDequantize(3, &bytes, count, in, rows.len));
    }
    try expectStatus(.invalid_size, quantization.rowsDequantize(3, &bytes, 68, in, 63));
    try expectStatus(.invalid_size, quantization.rowsDequantize(3, null, 68, in, 64));
    try expectStatus(.invalid_size, quantization.rowsDequantize(3, &bytes, 68, null, 64));
    const Case = struct { BlockExport, [*]u8, u32, [*]u8, u32 };
    const cases = [_]Case{
        .{ &quantization.blockQuantize, in, rows.len, &bytes, 2176 },
        .{ &quantization.blockDequantize, &bytes, 2176, in, rows.len },
        .{ &quantization.blockPack, &bytes, 2176, bytes[2176..].ptr, 2176 },
        .{ &quantization.blockUnpack, &bytes, 2176, bytes[2176..].ptr, 2176 },
    };
    for (cases) |case| {
        const call, const input, const input_count, const output, const output_count = case;
        for ([_]u32{ 0, 1, input_count - 1, input_count + 1, 0xffff_ffff }) |count| {
            try expectStatus(.invalid_size, call(3, 0, 64, 32, input, count, output, output_count));
        }
        for ([_]u32{ 0, 1, output_count - 1 }) |count| {
            try expectStatus(.invalid_size, call(3, 0, 64, 32, input, input_count, output, count));
        }
        try expectStatus(.invalid_size, call(3, 0, 64, 32, null, input_count, output, output_count));
        try expectStatus(.invalid_size, call(3, 0, 64, 32, input, input_count, null, output_count));
    }
    try testing.expect(std.mem.allEqual(u8, &bytes, poison));
    try testing.expect(std.mem.allEqual(f32, &rows, 1));
    try expectOk(quantization.rowsQuantize(3, in, 64, &bytes, bytes.len));
    try testing.expect(std.mem.allEqual(u8, bytes[68..], poison));
}

test "values and scales that are not finite, or would not be, are refused untouched" {
    var bytes: [64 * 36]u8 = @splat(poison); // 64 tokens of 32 dims in i8, the largest
    for ([_]Dtype{ .q8_0, .q4_0, .i8, .i4, .i2 }) |dtype| for ([_]usize{ 0, 2047 }) |at| {
        const limit: f32 = switch (dtype) {
            .q8_0 => 65520 * 127,
            .q4_0 => 65520 * 8,
            else => 65520,
        };
        for ([_]f32{ std.math.nan(f32), std.math.inf(f32), -std.math.inf(f32), limit, -limit }) |bad| {
            var rows: [64 * 32]f32 = @splat(1);
            rows[at] = bad;
            const word = @intFromEnum(dtype);
            const got = quantization.blockQuantize(word, 1, 64, 32, bytesOf(&rows), rows.len, &bytes, bytes.len);
            try expectStatus(.not_finite, got);
            if (!dtype.isAffine()) {
                try expectStatus(.not_finite, quantization.rowsQuantize(word, bytesOf(&rows), rows.len, &bytes, bytes.len));
            }
        }
    };
    try testing.expect(std.mem.allEqual(u8, &bytes, poison));

    const plane: group.Plane = .{ .dtype = .i4, .side = .values, .block_size = 64, .head_dim = 32 };
    var rows: [64 * 32]f32 = @splat(7);
    for ([_]u8{ 0x7c, 0xfc, 0x7e }) |high| {
        // The last scale, and the last min.
        for ([_]usize{ plane.minOffset(0, 0) - 1, plane.bytes() - 1 }) |at| {
            var codes: [64 * 36]u8 = @splat(0);
            codes[at] = high;
            const got = quantization.blockDequantize(6, 1, 64, 32, &codes, plane.bytes(), bytesOf(&rows), rows.len);
            try expectStatus(.not_finite, got);
        }
        var records: [64 * 34]u8 = @splat(0);
        records[63 * 34 + 1] = high;
        try expectStatus(.not_finite, quantization.blockPack(3, 0, 64, 32, &records, records.len, &bytes, bytes.len));
        try expectStatus(.not_finite, quantization.rowsDequantize(3, &records, records.len, bytesOf(&rows), rows.len));
    }
    try testing.expect(std.mem.allEqual(u8, &bytes, poison));
    try testing.expect(std.mem.allEqual(f32, &rows, 7));
}

test "memory that overlaps is refused" {
    var memory: [64 * 32 * 4 + 2176]u8 align(4) = @splat(0);
    const rows = bytesOf(&memory);
    try expectStatus(.invalid_config, quantization.rowsQuantize(3, rows, 64, rows + 255, 68));
    try expectStatus(.invalid_config, quantization.rowsDequantize(3, rows + 67, 68, rows, 64));
    try expectStatus(.invalid_config, quantization.blockQuantize(3, 0, 64, 32, rows, 2048, rows, 2176));
    try expectStatus(.invalid_config, quantization.blockDequantize(3, 0, 64, 32, rows + 8191, 2176, rows, 2048));
    try expectStatus(.invalid_config, quantization.blockPack(3, 0, 64, 32, rows, 2176, rows + 2175, 2176));
    try expectStatus(.invalid_config, quantization.blockUnpack(3, 0, 64, 32, rows + 2175, 2176, rows, 2176));
    try expectOk(quantization.blockPack(3, 0, 64, 32, rows, 2176, rows + 2176, 2176));
}
