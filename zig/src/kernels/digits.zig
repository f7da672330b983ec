//! Floats as numbers of two digits, so that sums of products with codes are sums of integers.
//!
//!     n = round(x / step)        step = largest |x| / 16256        n = 128 * high + low
//!
//! 16256 = 127 * 128, so that high is -127 to 127 and low -64 to 63: both are bytes that every way of `dot.zig` takes. A
//! number is wrong by at most half a step, 2^-14.99 of the largest one of its row.

const std = @import("std");
const assert = std.debug.assert;
const convert = @import("convert.zig");
const pack = @import("pack.zig");
const softmax = @import("softmax.zig");
const lanes = convert.lanes;
const rows_at_once = softmax.rows_at_once;
const Vector = convert.Vector;
const VectorU32 = convert.VectorU32;
const VectorI32 = @Vector(lanes, i32);

/// The largest number.
const number_max = 127 * 128;

/// Rows whose largest magnitude is below this are zeros: its reciprocal times 16256 would be Inf at 2^-114. Weights are
/// beside one of 1, and scores of that size are none.
const magnitude_min = 0x1p-100;

/// A row of up to `number_count_max` numbers.
pub fn Digits(comptime number_count_max: u32) type {
    return struct {
        high: [number_count_max]i8 align(64),
        low: [number_count_max]i8 align(64),
        /// 1 / step.
        factor: f32,
        step: f32,
        /// Of each so many numbers as `write` was told.
        totals: [number_count_max / 32]i32,

        const Self = @This();

        /// First chooses the steps of up to four rows, by the largest of their magnitudes. A magnitude that is not finite makes
        /// the step so, and numbers that mean nothing.
        pub inline fn choose(rows: []Self, magnitudes: [rows_at_once]Magnitudes) void {
            var bits: [rows_at_once]VectorU32 = undefined;
            inline for (&bits, magnitudes) |*to, from| to.* = from.bits;
            const Four = @Vector(rows_at_once, f32);
            const largest: Four = @bitCast(softmax.largestFourIntegers(bits));
            const is_zero = largest < @as(Four, @splat(magnitude_min));
            const zeros: Four = @splat(0);
            const number: Four = @splat(number_max);
            const steps: [rows_at_once]f32 = @select(f32, is_zero, zeros, largest * @as(Four, @splat(1.0 / @as(f32, number_max))));
            const factors: [rows_at_once]f32 = @select(f32, is_zero, zeros, number / largest);
            for (rows, steps[0..rows.len], factors[0..rows.len]) |*row, step, factor| {
                row.step = step;
                row.factor = factor;
            }
        }

        /// Then writes the digits of `count` values of a row, a multiple of 32.
        /// `total_numbers`: of how many numbers totals are wanted; 0 for none.
        pub inline fn write(
            digits: *Self,
            comptime total_numbers: u32,
            values: *align(64) const [number_count_max]f32,
            count: u32,
        ) void {
            assert(count % 32 == 0 and count <= number_count_max);
            const factor: Vector = @splat(digits.factor);
            var total: VectorI32 = @splat(0);
            var at: u32 = 0;
            // Four vectors at a time. Of the widest, two may be left at the end: behind them stands what nobody looks at.
            while (at < count) : (at += 4 * lanes) {
                var high: [4]VectorI32 = undefined;
                var low: [4]VectorI32 = undefined;
                inline for (&high, &low, 0..) |*h, *l, i| {
                    const shifted = shiftedNumbers(@as(Vector, values[at + i * lanes ..][0..lanes].*) * factor);
                    h.* = shifted >> @splat(7);
                    l.* = shifted & @as(VectorI32, @splat(127));
                    if (total_numbers != 0) {
                        const end = at + (i + 1) * lanes;
                        if (end <= count) total +%= shifted;
                        if (end % total_numbers == 0 or end == count) {
                            const number_count: i32 = @intCast(if (end % total_numbers == 0) total_numbers else end % total_numbers);
                            digits.totals[(end - 1) / total_numbers] = @reduce(.Add, total) -% low_offset * number_count;
                            total = @splat(0);
                        }
                    }
                }
                digits.high[at..][0 .. 4 * lanes].* = pack.narrow(high);
                digits.low[at..][0 .. 4 * lanes].* = pack.narrow(low) -% @as(@Vector(4 * lanes, i8), @splat(low_offset));
            }
        }
    };
}

/// The magnitudes of values, compared as integers: NaN is larger than Inf.
pub const Magnitudes = struct {
    bits: VectorU32 = @splat(0),

    pub inline fn add(magnitudes: *Magnitudes, values: Vector) void {
        const bits: VectorU32 = @bitCast(values);
        magnitudes.bits = @max(magnitudes.bits, bits & @as(VectorU32, @splat(0x7fff_ffff)));
    }
};

/// What makes low digits of numbers be 0 to 127.
const low_offset = 64;

/// To the nearest integer, half to even, and `low_offset` more; defined for any bits. Adding 1.5 * 2^23 puts the integer into
/// the low bits.
inline fn shiftedNumbers(values: Vector) VectorI32 {
    const magic: Vector = @splat(0x1.8p23);
    return @as(VectorI32, @bitCast(values + magic)) -% (@as(VectorI32, @bitCast(magic)) -% @as(VectorI32, @splat(low_offset)));
}

fn set(digits: anytype, values: anytype) void {
    var magnitudes: [rows_at_once]Magnitudes = @splat(.{});
    var at: usize = 0;
    while (at < values.len) : (at += lanes) magnitudes[0].add(values[at..][0..lanes].*);
    @TypeOf(digits.*).choose(digits[0..1], magnitudes);
    digits.write(32, values, values.len);
}

test Digits {
    var prng: std.Random.DefaultPrng = .init(11);
    for ([_]f32{ 1e-12, 1, 3e30 }) |magnitude| {
        var values: [64]f32 align(64) = undefined;
        for (&values) |*value| value.* = magnitude * (2 * prng.random().float(f32) - 1);
        values[5] = -magnitude;
        var digits: Digits(64) = undefined;
        set(&digits, &values);
        try std.testing.expectEqual(-127, digits.high[5]);
        try std.testing.expectEqual(0, digits.low[5]);
        var totals: [2]i32 = .{ 0, 0 };
        for (values, digits.high, digits.low, 0..) |value, high, low, i| {
            const number = 128 * @as(i32, high) + low;
            totals[i / 32] += number;
            // Half a step, and the roundings of three f32.
            const got = @as(f64, @floatFromInt(number)) * digits.step;
            try std.testing.expect(@abs(got - value) <= 0.502 * magnitude / 16256.0);
        }
        try std.testing.expectEqual(totals, digits.totals);
    }
}

test "Digits of zeros, of almost nothing and of what is not finite" {
    var digits: Digits(64) = undefined;
    for ([_]f32{ 0, 1e-44, -1e-38 }) |value| {
        const values: [64]f32 align(64) = @splat(value);
        set(&digits, &values);
        try std.testing.expectEqual(0, digits.step);
        try std.testing.expectEqual(0, digits.totals[0]);
    }
    for ([_]f32{ std.math.nan(f32), -std.math.inf(f32) }) |value| {
        var values: [64]f32 align(64) = @splat(1);
        values[31] = value;
        set(&digits, &values);
        try std.testing.expect(!std.math.isFinite(digits.step));
    }
}
