//! Scale, min and 1 / scale of a group, from its extremes.
//!
//! A vector here has one group in each lane, where a division costs as much for all of them as for one.

const std = @import("std");
const convert = @import("../convert.zig");
const simd = @import("../lanes.zig");
const Dtype = @import("../../dtype.zig").Dtype;

const lanes = simd.lanes;
const Vector = simd.Vector;
const VectorU16 = simd.VectorU16;
const VectorU32 = simd.VectorU32;

/// The parameters of the codes of `count` groups, a group in each lane.
pub fn Parameters(comptime count: usize) type {
    return struct {
        /// 1 / scale, or 0 where that is not finite.
        inverse: [count]f32,
        /// The min of affine formats.
        min: [count]f32,
        scale_bits: [count]u16,
        min_bits: [count]u16,

        pub inline fn set(parameters: *@This(), first: usize, of: Groups) void {
            parameters.inverse[first..][0..lanes].* = of.inverse;
            parameters.min[first..][0..lanes].* = of.min;
            parameters.scale_bits[first..][0..lanes].* = of.scale_bits;
            parameters.min_bits[first..][0..lanes].* = of.min_bits;
        }
    };
}

/// The parameters of `lanes` groups.
const Groups = struct { inverse: Vector, min: Vector, scale_bits: VectorU16, min_bits: VectorU16 };

pub const zero: Vector = @splat(0);

/// `extreme` is the largest magnitude for q8_0, and the value that has it for q4_0.
pub inline fn symmetric(comptime dtype: Dtype, extreme: Vector) Groups {
    const scale = if (dtype == .q8_0)
        extreme / @as(Vector, @splat(comptime dtype.codeRange()[1]))
    else
        (extreme + zero) / @as(Vector, @splat(-comptime dtype.codeZero())); // + 0 makes a -0 to +0
    return .{
        .inverse = inverseOf(scale),
        .min = zero,
        .scale_bits = convert.f16Bits(scale),
        .min_bits = @splat(0),
    };
}

/// The codes are chosen with the scale and min that are stored, which are f16.
pub inline fn affine(comptime dtype: Dtype, least: Vector, largest: Vector) Groups {
    const low = least + zero;
    const high = largest + zero;
    const code_max: Vector = @splat(codeMask(dtype));
    const step = (high - low) / code_max;
    const rounded = convert.f16Values(convert.f16Bits(step));
    // A step too small for f16 is stored as the smallest one, lest all values become the min.
    const vanished = (rounded == zero) & (high > low);
    const scale = @select(f32, vanished, @as(Vector, @splat(0x1p-24)), rounded);
    // Code 0 is the least one, but in i8.
    const codes_below_zero: Vector = @splat(-comptime dtype.codeRange()[0]);
    const min_bits = convert.f16Bits(if (dtype == .i8) low + codes_below_zero * scale else low);
    return .{
        .inverse = inverseOf(scale),
        .min = convert.f16Values(min_bits),
        .scale_bits = convert.f16Bits(scale),
        .min_bits = min_bits,
    };
}

/// All bits of a code.
pub fn codeMask(comptime dtype: Dtype) comptime_int {
    const least, const largest = comptime dtype.codeRange();
    return largest - least;
}

inline fn inverseOf(scale: Vector) Vector {
    const inverse = @as(Vector, @splat(1)) / scale;
    const is_finite = @abs(inverse) < @as(Vector, @splat(std.math.inf(f32)));
    return @select(f32, is_finite, inverse, zero);
}

/// The bits of the largest magnitude: as integers, magnitudes of floats have the same order.
inline fn magnitude(x: anytype) u32 {
    var largest: VectorU32 = @splat(0);
    inline for (x) |vector| largest = @max(largest, simd.magnitudes(vector));
    return @reduce(.Max, largest);
}

/// The first of the values with the largest magnitude.
pub inline fn firstExtreme(x: anytype) f32 {
    const Mask = std.meta.Int(.unsigned, lanes);
    const largest = magnitude(x);
    var is_largest: u32 = 0;
    var is_negative: u32 = 0;
    inline for (x, 0..) |vector, v| {
        const equal: Mask = @bitCast(simd.magnitudes(vector) == @as(VectorU32, @splat(largest)));
        const negative: Mask = @bitCast(@as(simd.VectorI32, @bitCast(vector)) < @as(simd.VectorI32, @splat(0)));
        is_largest |= @as(u32, equal) << (v * lanes);
        is_negative |= @as(u32, negative) << v * lanes;
    }
    const first = is_largest & (0 -% is_largest);
    const sign: u32 = if (is_negative & first != 0) 0x8000_0000 else 0;
    return @bitCast(largest | sign);
}
