//! The truth of the codecs: one value at a time, by the formulas of the formats, in f32 where the order of roundings is
//! part of the format.
//!
//! Slow on purpose; nothing here is shared with the kernels but the layout of `group.zig`.

const std = @import("std");
const assert = std.debug.assert;
const group = @import("../../group.zig");
const float_reference = @import("float.zig");
const Dtype = @import("../../dtype.zig").Dtype;
const Plane = group.Plane;

/// The parameters of the codes of a group.
pub const Group = struct {
    /// The scale before it is rounded to f16.
    step: f32,
    /// The min before it is rounded to f16: in i8 it belongs to code 0, 128 above the smallest.
    min: f32,
    scale_bits: u16,
    min_bits: u16,

    /// The parameters for all values of the group, in ascending order of dims or tokens.
    pub fn of(dtype: Dtype, values: []const f32) Group {
        var least = values[0];
        var largest = values[0];
        var extreme: f32 = 0; // the first of those with the largest magnitude
        for (values) |x| {
            least = @min(least, x);
            largest = @max(largest, x);
            if (@abs(x) > @abs(extreme)) extreme = x;
        }
        const step = switch (dtype) {
            .q8_0 => @abs(extreme) / 127,
            .q4_0 => extreme / -8,
            .i8 => (largest - least) / 255,
            .i4 => (largest - least) / 15,
            .i2 => (largest - least) / 3,
            .f32, .f16, .bf16 => unreachable,
        };
        if (!dtype.isAffine()) return .{ .step = step, .min = 0, .scale_bits = f16Bits(step), .min_bits = 0 };
        // Bits 1 are the smallest f16, 2^-24. Zeros of either sign have step 0 and min 0.
        const scale_bits = if (f16Bits(step) & 0x7fff != 0) f16Bits(step) else @intFromBool(largest > least);
        const min = if (dtype == .i8) least + 128 * f16Value(scale_bits) else least;
        return .{ .step = step, .min = min, .scale_bits = scale_bits, .min_bits = f16Bits(if (min == 0) 0 else min) };
    }

    pub fn scale(self: Group) f32 {
        return f16Value(self.scale_bits);
    }

    /// The multiplier of the codes; 0 where it would not be finite.
    pub fn inverse(self: Group, dtype: Dtype) f32 {
        const divisor = if (dtype.isAffine()) self.scale() else self.step;
        if (divisor == 0 or std.math.isInf(1 / divisor)) return 0;
        return 1 / divisor;
    }

    pub fn code(self: Group, dtype: Dtype, x: f32) i16 {
        const factor = self.inverse(dtype);
        return switch (dtype) {
            .q8_0 => clamp(roundHalfEven(x * factor), -127, 127),
            .q4_0 => clamp(@floor(x * factor + 8.5), 0, 15),
            .i8 => clamp(roundHalfEven((x - f16Value(self.min_bits)) * factor), -128, 127),
            .i4 => clamp(roundHalfEven((x - f16Value(self.min_bits)) * factor), 0, 15),
            .i2 => clamp(roundHalfEven((x - f16Value(self.min_bits)) * factor), 0, 3),
            .f32, .f16, .bf16 => unreachable,
        };
    }
};

/// The value of a code.
pub fn value(dtype: Dtype, code: i16, scale_bits: u16, min_bits: u16) f32 {
    const number: f32 = @floatFromInt(if (dtype == .q4_0) code - 8 else code);
    const product = number * f16Value(scale_bits);
    return if (dtype.isAffine()) product + f16Value(min_bits) else product;
}

/// The group that a token and dim of `rows`, [token][head_dim], belong to.
pub fn groupAt(plane: Plane, rows: []const f32, token: u32, dim: u32) Group {
    var values: [256]f32 = undefined;
    const size = plane.groupSize();
    for (values[0..size], 0..) |*x, i| {
        const other: u32 = @intCast(i);
        x.* = if (plane.dtype.isAffine() and plane.side == .keys)
            rows[other * plane.head_dim + dim]
        else
            rows[token * plane.head_dim + dim / size * size + other];
    }
    return .of(plane.dtype, values[0..size]);
}

/// Rows [token][head_dim] to the bytes of a plane.
pub fn quantize(plane: Plane, rows: []const f32, bytes: []u8) void {
    assert(bytes.len == plane.bytes());
    const is_per_channel = plane.dtype.isAffine() and plane.side == .keys;
    const outer = if (is_per_channel) plane.head_dim else plane.block_size;
    const inner = if (is_per_channel) plane.block_size else plane.head_dim;
    for (0..outer) |o| {
        var current: Group = undefined;
        for (0..inner) |i| {
            const token: u32 = @intCast(if (is_per_channel) i else o);
            const dim: u32 = @intCast(if (is_per_channel) o else i);
            if (i % plane.groupSize() == 0) {
                current = groupAt(plane, rows, token, dim);
                plane.setScaleBits(bytes, token, dim, current.scale_bits);
                if (plane.dtype.isAffine()) plane.setMinBits(bytes, token, dim, current.min_bits);
            }
            plane.setCode(bytes, token, dim, current.code(plane.dtype, rows[token * plane.head_dim + dim]));
        }
    }
}

/// The value of one element of a plane.
pub fn element(plane: Plane, bytes: []const u8, token: u32, dim: u32) f32 {
    const scale_bits = plane.scaleBits(bytes, plane.scaleIndex(token, dim));
    const min_bits = if (plane.dtype.isAffine()) plane.minBits(bytes, token, dim) else 0;
    return value(plane.dtype, plane.code(bytes, token, dim), scale_bits, min_bits);
}

/// Values to ggml's records.
pub fn quantizeRecords(dtype: Dtype, values: []const f32, records: []u8) void {
    const record_bytes = group.recordBytes(dtype);
    for (0..values.len / group.record_values) |r| {
        const own = values[r * group.record_values ..][0..group.record_values];
        const record = records[r * record_bytes ..][0..record_bytes];
        const parameters: Group = .of(dtype, own);
        std.mem.writeInt(u16, record[0..2], parameters.scale_bits, .little);
        if (dtype == .q8_0) {
            for (own, record[2..]) |x, *byte| byte.* = @bitCast(@as(i8, @intCast(parameters.code(dtype, x))));
        } else for (record[2..], own[0..16], own[16..]) |*byte, low, high| {
            byte.* = @intCast(parameters.code(dtype, low) | parameters.code(dtype, high) << 4);
        }
    }
}

/// The bits of a value as a 16-bit format, the largest finite one where it would be Inf.
pub fn rounded16(dtype: Dtype, x: f32) u16 {
    const bits = float_reference.round16(dtype, x);
    const infinity: u16 = if (dtype == .f16) 0x7c00 else 0x7f80;
    return if (bits & 0x7fff == infinity) bits - 1 else bits;
}

pub fn f16Value(bits: u16) f32 {
    return @floatCast(float_reference.element(.f16, std.mem.asBytes(&bits), 0));
}

fn f16Bits(x: f32) u16 {
    return float_reference.round16(.f16, x);
}

fn clamp(x: f32, low: i16, high: i16) i16 {
    if (x <= @as(f32, @floatFromInt(low))) return low;
    if (x >= @as(f32, @floatFromInt(high))) return high;
    return @intFromFloat(x);
}

fn roundHalfEven(x: f32) f32 {
    const below = @floor(x);
    const part = x - below;
    if (part != 0.5) return if (part < 0.5) below else below + 1;
    return if (@mod(below, 2) == 0) below else below + 1;
}

const testing = std.testing;

test roundHalfEven {
    const rows = [_][2]f32{ .{ 0.5, 0 }, .{ 1.5, 2 }, .{ 2.5, 2 }, .{ -0.5, 0 }, .{ -1.5, -2 }, .{ 2.4, 2 }, .{ 2.6, 3 } };
    for (rows) |row| {
        try testing.expectEqual(row[1], roundHalfEven(row[0]));
    }
}

test "Group: a ramp from 0 to 15 is its own i4 codes" {
    var ramp: [32]f32 = undefined;
    for (&ramp, 0..) |*x, i| x.* = @floatFromInt(i % 16);
    const four: Group = .of(.i4, &ramp);
    try testing.expectEqual(0x3c00, four.scale_bits);
    try testing.expectEqual(0, four.min_bits);
    for (ramp) |x| try testing.expectEqual(@as(i16, @intFromFloat(x)), four.code(.i4, x));
    // In i2 a step is 5: 0 1 2 | 3 to 7 | 8 to 12 | 13 14 15.
    const two: Group = .of(.i2, &ramp);
    for ([_][2]i16{ .{ 0, 0 }, .{ 2, 0 }, .{ 3, 1 }, .{ 7, 1 }, .{ 8, 2 }, .{ 12, 2 }, .{ 13, 3 }, .{ 15, 3 } }) |row| {
        try testing.expectEqual(row[1], two.code(.i2, @floatFromInt(row[0])));
    }
    // The first value of the largest magnitude becomes code 0 of q4_0, its opposite would be 16 and is clipped.
    const symmetric: Group = .of(.q4_0, &.{ 1, -8, 8 });
    try testing.expectEqual(0x3c00, symmetric.scale_bits);
    for ([_][2]i16{ .{ -8, 0 }, .{ 0, 8 }, .{ 1, 9 }, .{ 7, 15 }, .{ 8, 15 } }) |row| {
        try testing.expectEqual(row[1], symmetric.code(.q4_0, @floatFromInt(row[0])));
    }
}
