//! Floats as numbers of two digits, so that sums of products with codes are sums of integers.
//!
//!     n = round(x / step)        step = largest |x| / 16256        n = 128 * high + low
//!
//! 16256 = 127 * 128, so that high is -127 to 127 and low -64 to 63: both are bytes that every way of `dot.zig` takes. A
//! number is wrong by at most half a step, 2^-14.99 of the largest one of its row, or of a bound on it.

const std = @import("std");
const assert = std.debug.assert;
const pack = @import("../codec/pack.zig");
const simd = @import("../lanes.zig");
const table = @import("../table.zig");
const lanes = simd.lanes;
const number_max = table.number_max;
const rows_at_once = simd.rows_at_once;
const Vector = simd.Vector;
const VectorU32 = simd.VectorU32;
const VectorI32 = simd.VectorI32;

/// Values whose largest magnitude is below this become zeros: its reciprocal times 16256 would be Inf at 2^-114. No weight is
/// that small beside the largest, which is 1, and no score that small counts.
const magnitude_min = 0x1p-100;

/// A query, or weights, of up to `number_count_max` numbers.
pub fn Digits(comptime number_count_max: u32) type {
    return struct {
        high: [number_count_max]i8 align(64),
        low: [number_count_max]i8 align(64),
        /// 1 / step.
        factor: f32,
        step: f32,
        /// Sum of all numbers, or of each 32: see `Totals`.
        totals: [number_count_max / group_numbers]i32,

        const Self = @This();

        /// Chooses the steps of up to four rows, by the largest of their magnitudes: call it before `write`. Where a magnitude
        /// is not finite, neither is the step, and the numbers mean nothing.
        pub inline fn choose(rows: []Self, magnitudes: [rows_at_once]Magnitudes) void {
            const steps, const factors = stepsOf(magnitudes);
            for (rows, steps[0..rows.len], factors[0..rows.len]) |*row, step, factor| {
                row.step = step;
                row.factor = factor;
            }
        }

        /// Writes the digits of values[i] * factors[i] * factor, for `count` values, a multiple of 32. Returns the sums of the
        /// numbers, lane by lane and `low_offset` too large for each number, for `setTotals`.
        pub inline fn write(
            digits: *Self,
            comptime totals: Totals,
            values: [*]const f32,
            factors: [*]const Vector,
            factor: f32,
            count: u32,
        ) VectorI32 {
            assert(count % group_numbers == 0 and count <= number_count_max);
            var total: VectorI32 = @splat(0);
            var at: u32 = 0;
            // Four vectors at a time. Two of the widest may be left at the end: nobody reads what is behind them.
            while (at < count) : (at += 4 * lanes) {
                var numbers: [4]VectorI32 = undefined;
                inline for (&numbers, 0..) |*number, i| {
                    const is_there = (i + 1) * lanes <= group_numbers or at + i * lanes < count;
                    const value: Vector = if (is_there) values[at + i * lanes ..][0..lanes].* else @splat(0);
                    number.* = shiftedNumbers(value, factors[at / lanes + i] * @as(Vector, @splat(factor)));
                    if (totals == .none) continue;
                    const end = at + (i + 1) * lanes;
                    if (end <= count) total +%= number.*;
                    if (totals == .groups and end % group_numbers == 0) {
                        digits.totals[end / group_numbers - 1] = @reduce(.Add, total) -% low_offset * group_numbers;
                        total = @splat(0);
                    }
                }
                const high, const low = pack.digits(numbers);
                digits.high[at..][0 .. 4 * lanes].* = high;
                digits.low[at..][0 .. 4 * lanes].* = low -% @as(@Vector(4 * lanes, i8), @splat(low_offset));
            }
            return total;
        }

        /// Sets the first total of each row, the sum of all its `count` numbers.
        pub inline fn setTotals(rows: []Self, totals: [rows_at_once]VectorI32, count: u32) void {
            const sums: [rows_at_once]i32 = simd.sumFourIntegers(totals);
            const excess = low_offset * @as(i32, @intCast(count));
            for (rows, sums[0..rows.len]) |*row, sum| row.totals[0] = sum -% excess;
        }
    };
}

/// Sums of numbers that `write` makes: none, one of all numbers, or one of each 32.
pub const Totals = enum { none, whole, groups };

/// Numbers of a total of `groups`.
const group_numbers = 32;

/// Step and factor for each of four largest magnitudes.
pub inline fn stepsOf(magnitudes: [rows_at_once]Magnitudes) struct { [rows_at_once]f32, [rows_at_once]f32 } {
    var bits: [rows_at_once]VectorU32 = undefined;
    inline for (&bits, magnitudes) |*to, from| to.* = from.bits;
    const Four = @Vector(rows_at_once, f32);
    const largest: Four = @bitCast(simd.largestFourIntegers(bits));
    const is_zero = largest < @as(Four, @splat(magnitude_min));
    const zeros: Four = @splat(0);
    const number: Four = @splat(number_max);
    const steps = @select(f32, is_zero, zeros, largest * @as(Four, @splat(1.0 / @as(f32, number_max))));
    const factors = @select(f32, is_zero, zeros, number / largest);
    return .{ steps, factors };
}

/// The magnitudes of values, compared as integers: NaN is larger than Inf.
pub const Magnitudes = struct {
    bits: VectorU32 = @splat(0),

    pub inline fn add(magnitudes: *Magnitudes, values: Vector) void {
        magnitudes.bits = @max(magnitudes.bits, simd.magnitudes(values));
    }
};

/// Added to a number, so that its low digit is 0 to 127.
const low_offset = 64;

/// values * factors to the nearest integer, half to even, and `low_offset` more; defined for any bits.
inline fn shiftedNumbers(values: Vector, factors: Vector) VectorI32 {
    const sums: VectorI32 = @bitCast(simd.mulAdd(values, factors, @as(Vector, @splat(simd.round_magic + low_offset))));
    return sums -% @as(VectorI32, @splat(@bitCast(@as(f32, simd.round_magic))));
}

fn set(digits: anytype, values: anytype) void {
    var magnitudes: [rows_at_once]Magnitudes = @splat(.{});
    var at: usize = 0;
    while (at < values.len) : (at += lanes) magnitudes[0].add(values[at..][0..lanes].*);
    @TypeOf(digits.*).choose(digits[0..1], magnitudes);
    const ones: [values.len / lanes]Vector = @splat(@splat(1));
    _ = digits.write(.groups, values, &ones, digits.factor, values.len);
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
