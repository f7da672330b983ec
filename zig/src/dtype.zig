//! The element types a cache can hold, and what each costs.
//!
//! Everything that depends on an element type asks here; no other file knows a size.

const std = @import("std");

/// The type of one stored element. The numbers cross the C ABI and are never changed.
pub const Dtype = enum(u32) {
    f32 = 0,
    f16 = 1,
    bf16 = 2,

    /// Bytes of one element.
    pub fn elementBytes(dtype: Dtype) u32 {
        return switch (dtype) {
            .f32 => 4,
            .f16, .bf16 => 2,
        };
    }

    /// The dtype with this number, or null when there is none.
    pub fn fromWord(word: u32) ?Dtype {
        return std.enums.fromInt(Dtype, word);
    }
};

/// The magnitude bits (sign cleared) of an f32 from which on it is refused for storage as `dtype`: NaN, Inf, and what
/// rounding half to even would turn into Inf.
pub fn refusedF32Bits(dtype: Dtype) u32 {
    return switch (dtype) {
        .f32 => 0x7f80_0000, // Inf
        .f16 => 0x477f_f000, // 65520, half-way between the largest f16 (65504, odd) and 2^16
        .bf16 => 0x7f7f_8000, // half-way between the largest bf16 (0x7f7f, odd) and 2^128
    };
}

test refusedF32Bits {
    // The next f32 below each limit still rounds to a finite value.
    const below_f16: f16 = @floatCast(@as(f32, @bitCast(refusedF32Bits(.f16) - 1)));
    const at_f16: f16 = @floatCast(@as(f32, @bitCast(refusedF32Bits(.f16))));
    try std.testing.expect(std.math.isFinite(below_f16));
    try std.testing.expect(std.math.isInf(at_f16));
    try std.testing.expect(std.math.isInf(@as(f32, @bitCast(refusedF32Bits(.f32)))));
}

test "fromWord refuses numbers that name no dtype" {
    try std.testing.expectEqual(Dtype.bf16, Dtype.fromWord(2).?);
    try std.testing.expectEqual(null, Dtype.fromWord(3));
    try std.testing.expectEqual(null, Dtype.fromWord(0xffff_ffff));
}
