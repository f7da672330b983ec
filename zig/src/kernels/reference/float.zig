//! The scalar truth of float elements: what their bits mean, and how a value is rounded to them.
//!
//! Slow on purpose; nothing here is shared with the kernels but the element types.

const std = @import("std");
const assert = std.debug.assert;
const Dtype = @import("../../dtype.zig").Dtype;

/// The value of the element `index` of an array of `dtype`.
pub fn element(dtype: Dtype, bytes: []const u8, index: usize) f64 {
    const size = dtype.elementBytes();
    const at = bytes[index * size ..][0..size];
    return switch (dtype) {
        .f32 => @as(f32, @bitCast(std.mem.readInt(u32, at[0..4], .little))),
        .f16 => decode(std.mem.readInt(u16, at[0..2], .little), 5, 10),
        .bf16 => decode(std.mem.readInt(u16, at[0..2], .little), 8, 7),
        else => unreachable, // no element stands by itself
    };
}

/// A 16-bit float by its definition: (-1)^sign * 2^(exponent - bias) * 1.fraction, denormals without the 1.
fn decode(bits: u16, comptime exponent_bits: u4, comptime fraction_bits: u4) f64 {
    comptime assert(1 + @as(u8, exponent_bits) + fraction_bits == 16);
    const exponent_max = (1 << exponent_bits) - 1;
    const bias = exponent_max >> 1;
    const sign: f64 = if (bits >> 15 == 1) -1 else 1;
    const exponent: i32 = (bits >> fraction_bits) & exponent_max;
    const fraction: f64 = @floatFromInt(bits & ((1 << fraction_bits) - 1));
    const unit = 1.0 / @as(f64, 1 << fraction_bits);
    if (exponent == exponent_max) return if (fraction == 0) sign * std.math.inf(f64) else std.math.nan(f64);
    if (exponent == 0) return sign * std.math.ldexp(fraction * unit, 1 - bias);
    return sign * std.math.ldexp(1 + fraction * unit, exponent - bias);
}

/// The bits of a finite value as a 16-bit float, half to even, Inf where it overflows: the neighbour with the smaller
/// distance, the even one of two at equal distance.
pub fn round16(dtype: Dtype, value: f64) u16 {
    const magnitude = @abs(value);
    const sign: u16 = if (std.math.signbit(value)) 0x8000 else 0;
    // Magnitudes ascend with their bits, so the neighbour below is found by bisection.
    const infinity: u16 = if (dtype == .f16) 0x7c00 else 0x7f80;
    var low: u16 = 0;
    var high: u16 = infinity;
    while (low + 1 < high) {
        const middle = low + (high - low) / 2;
        if (value16(dtype, middle) <= magnitude) low = middle else high = middle;
    }
    const below = magnitude - value16(dtype, low);
    const above = valueAsIfUnbounded(dtype, high) - magnitude;
    const up = above < below or (above == below and low & 1 == 1);
    return sign | (if (up) high else low);
}

fn value16(dtype: Dtype, bits: u16) f64 {
    return if (dtype == .f16) decode(bits, 5, 10) else decode(bits, 8, 7);
}

/// Rounding to Inf goes by the number that would follow the largest finite one.
fn valueAsIfUnbounded(dtype: Dtype, bits: u16) f64 {
    const value = value16(dtype, bits);
    if (!std.math.isInf(value)) return value;
    return if (dtype == .f16) 0x1p16 else 0x1p128;
}

test round16 {
    const testing = std.testing;
    try testing.expectEqual(0x3c00, round16(.f16, 1));
    try testing.expectEqual(0xc000, round16(.f16, -2));
    try testing.expectEqual(0x7bff, round16(.f16, 65519.9));
    try testing.expectEqual(0x7c00, round16(.f16, 65520));
    try testing.expectEqual(0x0001, round16(.f16, 0x1p-24));
    try testing.expectEqual(0x0000, round16(.f16, 0x1p-25)); // a tie, and 0 is even
    try testing.expectEqual(0x0002, round16(.f16, 0x1.8p-24)); // a tie, and 2 is even
    try testing.expectEqual(0x3f80, round16(.bf16, 1));
    try testing.expectEqual(0x3f80, round16(.bf16, 1 + 0x1p-8)); // a tie, and 0x3f80 is even
    try testing.expectEqual(0x3f82, round16(.bf16, 1 + 0x1.8p-7)); // a tie, and 0x3f82 is even
}
