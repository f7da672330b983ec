//! exp, tanh and ln in our own arithmetic, so that their bits depend on the CPU level alone.
//!
//! The C library's versions differ between its releases and between CPUs.

const std = @import("std");
const simd = @import("lanes.zig");
const Vector = simd.Vector;
const VectorU32 = simd.VectorU32;
const mulAdd = simd.mulAdd;

/// exp(x) for x <= 88, relative error below 3e-7; 0 from -87 down (and for -Inf), where the true value is below the
/// smallest normal f32. NaN stays NaN, so that bad queries are seen in the output.
///
/// x = n * ln 2 + r with |r| <= ln 2 / 2; exp(r) by a polynomial of degree 6 (Taylor's remainder there is
/// 0.3466^7 / 5040 = 1.2e-7); 2^n is put into the exponent bits.
pub inline fn exp(x: Vector) Vector {
    const magic: Vector = @splat(simd.round_magic);
    const shifted = mulAdd(x, @as(Vector, @splat(std.math.log2e)), magic);
    const n = shifted - magic;
    // ln 2 in two parts: the first has 15 significant bits, so n * ln2_high is exact.
    const ln2_high: Vector = @splat(0x1.62e4p-1);
    const ln2_low: Vector = @splat(0x1.7f7d1cp-20);
    const r = mulAdd(n, -ln2_low, mulAdd(n, -ln2_high, x));

    var y: Vector = @splat(1.0 / 720.0);
    inline for (.{ 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0 }) |coefficient| {
        y = mulAdd(y, r, @as(Vector, @splat(coefficient)));
    }

    // The low bits of n + magic are n itself; put where the exponent is they multiply by 2^n.
    const n_bits: VectorU32 = @bitCast(shifted);
    const scaled: Vector = @bitCast(@as(VectorU32, @bitCast(y)) +% (n_bits << @splat(23)));
    const underflows = x < @as(Vector, @splat(-87.0));
    return @select(f32, underflows, @as(Vector, @splat(0)), scaled);
}

/// exp of a single number.
pub fn expOne(x: f32) f32 {
    return exp(@splat(x))[0];
}

/// tanh(x), relative error below 1e-6: a soft cap far above the scores must leave them as they are.
///
/// Below 0.55 Lambert's continued fraction x / (1 + z / (3 + z / (5 + z / (7 + z / 9)))), z = x * x, cut off there and
/// written as a quotient (the part left out is below 1e-9 of it); above, 1 - 2 / (exp(2|x|) + 1) with the sign of x.
pub inline fn tanh(x: Vector) Vector {
    const one: Vector = @splat(1);
    const two: Vector = @splat(2);
    const z = x * x;
    const numerator = mulAdd(mulAdd(one, z, @as(Vector, @splat(105))), z, @as(Vector, @splat(945)));
    const denominator = mulAdd(mulAdd(@as(Vector, @splat(15)), z, @as(Vector, @splat(420))), z, @as(Vector, @splat(945)));
    const small = x * numerator / denominator;
    // From 10 on tanh rounds to 1 in f32, and exp stays finite.
    const magnitude = @min(@abs(x), @as(Vector, @splat(10)));
    const large = one - two / (exp(two * magnitude) + one);
    const signed = @select(f32, x < @as(Vector, @splat(0)), -large, large);
    const result = @select(f32, @abs(x) < @as(Vector, @splat(0.55)), small, signed);
    // @min drops NaN.
    return @select(f32, x == x, result, x);
}

/// Natural logarithm of a positive finite x, relative error below 1e-12, in f64 without fused steps: the same bits on
/// every level.
///
/// x = m * 2^e with m in [0.707, 1.414); ln m = 2 artanh(s) with s = (m - 1) / (m + 1), |s| <= 0.172; the series ends
/// at s^15 (the next term is 2 * 0.172^17 / 17 = 1.2e-14).
pub fn ln(x: f32) f64 {
    const parts = std.math.frexp(@as(f64, x));
    var m = parts.significand; // in [0.5, 1)
    var e: f64 = @floatFromInt(parts.exponent);
    if (m < std.math.sqrt1_2) {
        m *= 2;
        e -= 1;
    }
    const s = (m - 1) / (m + 1);
    const s2 = s * s;
    var series: f64 = 1.0 / 15.0;
    inline for (.{ 13, 11, 9, 7, 5, 3, 1 }) |odd| series = series * s2 + 1.0 / @as(f64, odd);
    return e * std.math.ln2 + 2 * s * series;
}

test exp {
    var x: f64 = -87;
    while (x <= 20) : (x += 0.00731) {
        const rounded: f32 = @floatCast(x);
        const truth = std.math.exp(@as(f64, rounded));
        const got: f64 = exp(@splat(rounded))[0];
        try std.testing.expect(@abs(got - truth) <= 3e-7 * truth);
    }
    try std.testing.expectEqual(1, exp(@splat(0))[0]);
    try std.testing.expectEqual(0, exp(@splat(-std.math.inf(f32)))[0]);
    try std.testing.expectEqual(0, exp(@splat(-1e30))[0]);
    try std.testing.expect(std.math.isNan(exp(@splat(std.math.nan(f32)))[0]));
}

test tanh {
    var x: f64 = -12;
    while (x <= 12) : (x += 0.0137) {
        for ([_]f64{ x, x * 1e-6, x * 0.05 }) |argument| {
            const rounded: f32 = @floatCast(argument);
            const truth = std.math.tanh(@as(f64, rounded));
            const got: f64 = tanh(@splat(rounded))[0];
            try std.testing.expect(@abs(got - truth) <= 1e-6 * @abs(truth));
        }
    }
    try std.testing.expectEqual(1, tanh(@splat(1e30))[0]);
    try std.testing.expectEqual(-1, tanh(@splat(-std.math.inf(f32)))[0]);
    try std.testing.expect(std.math.isNan(tanh(@splat(std.math.nan(f32)))[0]));
}

test ln {
    for ([_]f32{ 1e-30, 0.1, 0.5, 0.99, 1, 1.01, 1.5, 2, 3, 1e4, 3e38 }) |x| {
        const truth = @log(@as(f64, x));
        try std.testing.expect(@abs(ln(x) - truth) <= 1e-12 * @max(1, @abs(truth)));
    }
    try std.testing.expectEqual(0, ln(1));
}
