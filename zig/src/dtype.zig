//! The formats a cache can hold, and what each costs.
//!
//! Everything that depends on a format asks here or in `group.zig`; no other file knows a size.

const std = @import("std");
const assert = std.debug.assert;

/// How values are stored. The numbers cross the C ABI and are never changed.
///
/// The first three are *float* formats: each value by itself. The others are *quantized*: codes of 8, 4 or 2 bits in groups
/// that share a scale, see `group.zig`.
pub const Dtype = enum(u32) {
    f32 = 0,
    f16 = 1,
    bf16 = 2,
    /// Groups of 32 along head_dim: x = code * scale, signed codes. ggml's format.
    q8_0 = 3,
    /// Groups of 32 along head_dim: x = (code - 8) * scale. ggml's format.
    q4_0 = 4,
    /// x = code * scale + min; keys in one group for each channel of a block, values in groups of one token.
    i8 = 5,
    i4 = 6,
    i2 = 7,

    pub fn isFloat(dtype: Dtype) bool {
        return switch (dtype) {
            .f32, .f16, .bf16 => true,
            .q8_0, .q4_0, .i8, .i4, .i2 => false,
        };
    }

    /// Bytes of one element of a float format.
    pub fn elementBytes(dtype: Dtype) u32 {
        return switch (dtype) {
            .f32 => 4,
            .f16, .bf16 => 2,
            .q8_0, .q4_0, .i8, .i4, .i2 => unreachable,
        };
    }

    /// Bits of one code of a quantized format.
    pub fn codeBits(dtype: Dtype) u4 {
        return switch (dtype) {
            .f32, .f16, .bf16 => unreachable,
            .q8_0, .i8 => 8,
            .q4_0, .i4 => 4,
            .i2 => 2,
        };
    }

    /// The smallest and the largest code, as stored.
    pub fn codeRange(dtype: Dtype) [2]i16 {
        return switch (dtype) {
            .f32, .f16, .bf16 => unreachable,
            .q8_0, .i8 => .{ -128, 127 },
            .q4_0, .i4 => .{ 0, 15 },
            .i2 => .{ 0, 3 },
        };
    }

    /// The code of 0: x = (code - codeZero) * scale.
    pub fn codeZero(dtype: Dtype) i16 {
        return switch (dtype) {
            .f32, .f16, .bf16 => unreachable,
            .q4_0 => 8,
            .q8_0, .i8, .i4, .i2 => 0,
        };
    }

    /// Has a min beside the scale.
    pub fn isAffine(dtype: Dtype) bool {
        return switch (dtype) {
            .i8, .i4, .i2 => true,
            .f32, .f16, .bf16, .q8_0, .q4_0 => false,
        };
    }

    /// The format with this number, or null when there is none.
    pub fn fromWord(word: u32) ?Dtype {
        return std.enums.fromInt(Dtype, word);
    }

    /// The float format with this number, or null when there is none.
    pub fn floatFromWord(word: u32) ?Dtype {
        const dtype = fromWord(word) orelse return null;
        return if (dtype.isFloat()) dtype else null;
    }
};

comptime {
    for ([_]Dtype{ .q8_0, .q4_0, .i8, .i4, .i2 }) |dtype| {
        const least, const largest = dtype.codeRange();
        assert(largest - least + 1 == 1 << dtype.codeBits());
        // Codes of 8 bits are signed, the others are not.
        assert(least == if (dtype.codeBits() == 8) -(1 << 7) else 0);
        assert(dtype.codeZero() == 0 or (!dtype.isAffine() and dtype.codeZero() == (largest + 1) / 2));
    }
    // What refuses a value: half a step past the largest f16, times what the largest magnitude of a group is divided by.
    assert(refusedF32Bits(.f16) == @as(u32, @bitCast(@as(f32, 65520))));
    assert(refusedF32Bits(.q8_0) == @as(u32, @bitCast(@as(f32, 65520) * @as(f32, Dtype.q8_0.codeRange()[1]))));
    assert(refusedF32Bits(.q4_0) == @as(u32, @bitCast(@as(f32, 65520) * @as(f32, Dtype.q4_0.codeZero()))));
    assert(refusedF32Bits(.i4) == refusedF32Bits(.f16));
}

/// The magnitude bits (sign cleared) of an f32 from which on it is refused for storage as `dtype`: NaN, Inf, and what
/// rounding half to even would turn into Inf, be it the value or, in a quantized format, the scale or min of its group.
pub fn refusedF32Bits(dtype: Dtype) u32 {
    return switch (dtype) {
        .f32 => 0x7f80_0000, // Inf
        .f16 => 0x477f_f000, // 65520, half-way between the largest f16 (65504, odd) and 2^16
        .bf16 => 0x7f7f_8000, // half-way between the largest bf16 (0x7f7f, odd) and 2^128
        .q8_0 => 0x4afd_f020, // 65520 * 127: the scale is the largest magnitude over 127
        .q4_0 => 0x48ff_f000, // 65520 * 8: over 8
        // The min is an f16, and the scale, at most 2 * 65520 / 3, smaller.
        .i8, .i4, .i2 => 0x477f_f000,
    };
}

test refusedF32Bits {
    // The next f32 below each limit still rounds to a finite value.
    const below_f16: f16 = @floatCast(@as(f32, @bitCast(refusedF32Bits(.f16) - 1)));
    const at_f16: f16 = @floatCast(@as(f32, @bitCast(refusedF32Bits(.f16))));
    try std.testing.expect(std.math.isFinite(below_f16));
    try std.testing.expect(std.math.isInf(at_f16));
    try std.testing.expect(std.math.isInf(@as(f32, @bitCast(refusedF32Bits(.f32)))));
    // So do the scales of groups.
    for ([_]struct { Dtype, f32 }{ .{ .q8_0, 127 }, .{ .q4_0, 8 } }) |row| {
        const dtype, const divisor = row;
        const below: f16 = @floatCast(@as(f32, @bitCast(refusedF32Bits(dtype) - 1)) / divisor);
        const at: f16 = @floatCast(@as(f32, @bitCast(refusedF32Bits(dtype))) / divisor);
        try std.testing.expect(std.math.isFinite(below));
        try std.testing.expect(std.math.isInf(at));
    }
}

test "fromWord refuses numbers that name no dtype" {
    try std.testing.expectEqual(Dtype.bf16, Dtype.fromWord(2).?);
    try std.testing.expectEqual(Dtype.i2, Dtype.fromWord(7).?);
    try std.testing.expectEqual(null, Dtype.fromWord(8));
    try std.testing.expectEqual(null, Dtype.fromWord(0xffff_ffff));
    try std.testing.expectEqual(Dtype.bf16, Dtype.floatFromWord(2).?);
    try std.testing.expectEqual(null, Dtype.floatFromWord(3));
}
