//! Conversions of floats and the check before a store, on every level, against `reference/float.zig`.

const std = @import("std");
const testing = std.testing;
const dispatch = @import("dispatch.zig");
const float_reference = @import("reference/float.zig");
const Dtype = @import("../dtype.zig").Dtype;

const dtypes = [_]Dtype{ .f32, .f16, .bf16 };
const lengths = [_]usize{ 0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 67, 127, 129, 1023 };

test {
    _ = @import("convert.zig");
}

/// An f32 that is likely to be awkward: ties, denormals of the narrow types, extremes, zeros of both signs.
fn awkward(random: std.Random) f32 {
    return switch (random.uintLessThan(u8, 6)) {
        0 => random.floatNorm(f32),
        1 => @as(f32, @floatFromInt(random.intRangeAtMost(i32, -5000, 5000))) * 0x1p-25, // f16 denormals and their ties
        2 => @bitCast((random.int(u32) & 0xbfff_8000) | 0x8000), // ties of bf16
        3 => @bitCast((@as(u32, random.uintLessThan(u32, 30)) + 113) << 23 | (random.int(u32) & 0x7ff) << 12), // of f16
        4 => if (random.boolean()) 0.0 else -0.0,
        else => 65519.99 * (random.float(f32) * 2 - 1),
    };
}

test "convert equals the reference bit for bit, at every length and alignment" {
    var buffer: [dispatch.linked_level_count]*const dispatch.Table = undefined;
    var prng: std.Random.DefaultPrng = .init(testing.random_seed);
    const random = prng.random();
    var source: [1023 * 4 + 16]u8 = undefined;
    var got: [1023 * 4 + 32]u8 = undefined;
    for (dispatch.availableTables(&buffer)) |table| for (dtypes) |from| for (dtypes) |to| for (lengths, 0..) |length, i| {
        const shift = i; // 0 to 15
        const in = source[shift..];
        for (0..length) |index| {
            const value: f64 = awkward(random);
            switch (from) {
                .f32 => std.mem.writeInt(u32, in[index * 4 ..][0..4], @bitCast(@as(f32, @floatCast(value))), .little),
                else => std.mem.writeInt(u16, in[index * 2 ..][0..2], float_reference.round16(from, value), .little),
            }
        }
        @memset(&got, 0xaa);
        const out = got[shift..];
        table.convert(&.{
            .destination = out.ptr,
            .destination_dtype = to,
            .source = in.ptr,
            .source_dtype = from,
            .element_count = length,
        });
        for (0..length) |index| {
            const value = float_reference.element(from, in, index);
            if (std.math.isInf(value)) continue;
            switch (to) {
                .f32 => try testing.expectEqual(
                    @as(u32, @bitCast(@as(f32, @floatCast(value)))),
                    std.mem.readInt(u32, out[index * 4 ..][0..4], .little),
                ),
                else => try testing.expectEqual(
                    float_reference.round16(to, value),
                    std.mem.readInt(u16, out[index * 2 ..][0..2], .little),
                ),
            }
        }
        // Nothing is written beside the elements.
        for (got[0..shift]) |byte| try testing.expectEqual(0xaa, byte);
        for (out[length * to.elementBytes() ..]) |byte| try testing.expectEqual(0xaa, byte);
    };
}

test "every f16 and bf16 widens to its value and narrows back to itself" {
    var buffer: [dispatch.linked_level_count]*const dispatch.Table = undefined;
    for (dispatch.availableTables(&buffer)) |table| for ([_]Dtype{ .f16, .bf16 }) |dtype| {
        var bits: u32 = 0;
        while (bits < 0x1_0000) : (bits += 16) {
            var narrow: [16]u16 = undefined;
            for (&narrow, 0..) |*word, i| word.* = @intCast(bits + i);
            var wide: [16]f32 = undefined;
            table.convert(&.{
                .destination = @ptrCast(&wide),
                .destination_dtype = .f32,
                .source = @ptrCast(&narrow),
                .source_dtype = dtype,
                .element_count = 16,
            });
            var back: [16]u16 = undefined;
            table.convert(&.{
                .destination = @ptrCast(&back),
                .destination_dtype = dtype,
                .source = @ptrCast(&wide),
                .source_dtype = .f32,
                .element_count = 16,
            });
            for (narrow, wide, back, 0..) |word, value, again, i| {
                const truth = float_reference.element(dtype, std.mem.asBytes(&narrow), i);
                if (std.math.isNan(truth)) {
                    try testing.expect(std.math.isNan(value));
                } else {
                    try testing.expectEqual(truth, value);
                    try testing.expectEqual(word, again);
                }
            }
        }
    };
}

test "convert_checked converts rows as convert does, and sees what storable refuses" {
    var buffer: [dispatch.linked_level_count]*const dispatch.Table = undefined;
    var prng: std.Random.DefaultPrng = .init(testing.random_seed);
    const random = prng.random();
    const row_count = 3;
    const gap = 5;
    for (dispatch.availableTables(&buffer)) |table| for (dtypes) |from| for (dtypes) |to| for ([_]usize{ 1, 7, 16, 40, 67 }) |length| {
        var source: [row_count * (67 * 4 + gap)]u8 = @splat(0xff); // NaN between the rows must not be looked at
        const source_stride = length * from.elementBytes() + gap;
        for (0..row_count) |row| {
            var values: [67]f32 = undefined;
            for (values[0..length]) |*value| value.* = random.floatNorm(f32);
            table.convert(&.{
                .destination = source[row * source_stride ..].ptr,
                .destination_dtype = from,
                .source = @ptrCast(&values),
                .source_dtype = .f32,
                .element_count = length,
            });
        }
        const destination_stride = length * to.elementBytes() + 2 * gap;
        var expected: [row_count * (67 * 4 + 2 * gap)]u8 = @splat(0xaa);
        var got = expected;
        var task: dispatch.ConvertTask = .{
            .destination = &expected,
            .destination_dtype = to,
            .destination_stride = destination_stride,
            .source = &source,
            .source_dtype = from,
            .source_stride = source_stride,
            .row_count = row_count,
            .element_count = length,
        };
        table.convert(&task);
        task.destination = &got;
        try testing.expectEqual(1, table.convert_checked(&task, .f16));
        try testing.expectEqualSlices(u8, &expected, &got);
        // One bad element, in any row, at any place of it.
        const row = random.uintLessThan(usize, row_count);
        const element = random.uintLessThan(usize, length);
        const place = source[row * source_stride + element * from.elementBytes() ..];
        const good = place[0..4].*;
        switch (from) {
            .f32 => std.mem.writeInt(u32, place[0..4], @bitCast(@as(f32, -65520)), .little),
            .f16 => std.mem.writeInt(u16, place[0..2], 0xfc00, .little),
            else => std.mem.writeInt(u16, place[0..2], 0x4780, .little), // 65536
        }
        try testing.expectEqual(0, table.convert_checked(&task, .f16));
        try testing.expectEqual(@intFromBool(from != .f16), table.convert_checked(&task, .f32));
        @memcpy(place[0..from.elementBytes()], good[0..from.elementBytes()]);
        try testing.expectEqual(1, table.convert_checked(&task, .f16));
    };
}

test "storable refuses NaN, Inf and what would become Inf, wherever it stands" {
    var buffer: [dispatch.linked_level_count]*const dispatch.Table = undefined;
    for (dispatch.availableTables(&buffer)) |table| for (lengths) |length| {
        var values: [1023]f32 = undefined;
        @memset(&values, -65519.9);
        const bytes: [*]const u8 = @ptrCast(&values);
        for (dtypes) |to| try testing.expectEqual(1, table.storable(bytes, .f32, to, length));
        if (length == 0) continue;
        for ([_]usize{ 0, length / 2, length - 1 }) |at| {
            for ([_]f32{ std.math.nan(f32), std.math.inf(f32), -std.math.inf(f32) }) |bad| {
                values[at] = bad;
                for (dtypes) |to| try testing.expectEqual(0, table.storable(bytes, .f32, to, length));
            }
            values[at] = -65520;
            try testing.expectEqual(0, table.storable(bytes, .f32, .f16, length));
            try testing.expectEqual(1, table.storable(bytes, .f32, .bf16, length));
            values[at] = @bitCast(@as(u32, 0xff7f_8000));
            try testing.expectEqual(0, table.storable(bytes, .f32, .bf16, length));
            try testing.expectEqual(1, table.storable(bytes, .f32, .f32, length));
            values[at] = 0;
        }
    };
    const words = [_]u16{ 0x477f, 0x4780, 0x7f80 };
    const bytes: [*]const u8 = @ptrCast(&words);
    try testing.expectEqual(1, dispatch.kernels().storable(bytes, .bf16, .f16, 1));
    try testing.expectEqual(0, dispatch.kernels().storable(bytes, .bf16, .f16, 2));
    try testing.expectEqual(1, dispatch.kernels().storable(bytes, .bf16, .f32, 2));
    try testing.expectEqual(0, dispatch.kernels().storable(bytes, .bf16, .f32, 3));
    const half_inf = [_]u16{ 0x7bff, 0xfc00 };
    try testing.expectEqual(1, dispatch.kernels().storable(@ptrCast(&half_inf), .f16, .f16, 1));
    try testing.expectEqual(0, dispatch.kernels().storable(@ptrCast(&half_inf), .f16, .f16, 2));
}
