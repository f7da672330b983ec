//! exp, tanh and ln in our own arithmetic, so that their bits depend on the CPU level alone.
//!
//! The C library's versions differ between its releases and between CPUs.

const std = @import("std");
const builtin = @import("builtin");
const convert = @import("convert.zig");
const Vector = convert.Vector;
const VectorU32 = convert.VectorU32;
const lanes = convert.lanes;

const has_fma = switch (builtin.cpu.arch) {
    .x86_64 => builtin.cpu.has(.x86, .fma),
    .aarch64 => true,
    else => false,
};

/// a * b + c: fused where the level has the instruction, else rounded twice (a call into libm would be 50 times slower).
pub inline fn mulAdd(a: anytype, b: @TypeOf(a), c: @TypeOf(a)) @TypeOf(a) {
    return if (has_fma) @mulAdd(@TypeOf(a), a, b, c) else a * b + c;
}

/// exp(x) for x <= 88, relative error below 3e-7; 0 from -87 down (and for -Inf), where the true value is below the
/// smallest normal f32. NaN stays NaN, so that bad queries are seen in the output.
///
/// x = n * ln 2 + r with |r| <= ln 2 / 2; exp(r) by a polynomial of degree 6 (Taylor's remainder there is
/// 0.3466^7 / 5040 = 1.2e-7); 2^n is put into the exponent bits.
pub inline fn exp(x: Vector) Vector {
    // Adding and subtracting 1.5 * 2^23 rounds to an integer, half to even, on every level alike.
    const magic: Vector = @splat(0x1.8p23);
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

/// The sum of the lanes, halves added to halves, then (0 + 2) + (1 + 3): one fixed order for a level.
pub inline fn sum(values: Vector) f32 {
    const four = foldToFour(f32, added, values);
    return (four[0] + four[2]) + (four[1] + four[3]);
}

/// Rows that are worked on together where each waits for a fold of its lanes: four are folded in the time of one.
pub const rows_at_once = 4;

/// How many rows are taken together when `rest` of them are left.
pub fn rowsAtOnce(rest: u32) u32 {
    return if (rest >= rows_at_once) rows_at_once else 1;
}

/// The largest lanes of four vectors of numbers. They are compared as integers in their order: floats, of which one may be
/// NaN, take twice the steps, each of which waits for the one before.
pub inline fn largestFour(vectors: [4]Vector) @Vector(4, f32) {
    var ordered: [4]@Vector(lanes, i32) = undefined;
    inline for (&ordered, vectors) |*to, from| to.* = inOrder(@as(@Vector(lanes, i32), @bitCast(from)));
    return @bitCast(inOrder(foldFour(i32, largerOf, ordered)));
}

/// Bits of floats to integers in the same order, and back.
inline fn inOrder(bits: anytype) @TypeOf(bits) {
    return bits ^ ((bits >> @splat(31)) & @as(@TypeOf(bits), @splat(std.math.maxInt(i32))));
}

inline fn largerOf(a: anytype, b: @TypeOf(a)) @TypeOf(a) {
    return @max(a, b);
}

/// The sums of four vectors, each in the order of `sum`.
pub inline fn sumFour(vectors: [4]Vector) @Vector(4, f32) {
    return foldFour(f32, added, vectors);
}

/// The sums of four vectors of integers.
pub inline fn sumFourIntegers(vectors: [4]@Vector(lanes, i32)) @Vector(4, i32) {
    return foldFour(i32, addedWrapping, vectors);
}

/// The largest lanes of four vectors of integers.
pub inline fn largestFourIntegers(vectors: [4]VectorU32) @Vector(4, u32) {
    return foldFour(u32, largerOf, vectors);
}

inline fn addedWrapping(a: anytype, b: @TypeOf(a)) @TypeOf(a) {
    return a +% b;
}

/// What `both` makes of the lanes of each of four vectors, in the order of `sum`.
inline fn foldFour(comptime T: type, comptime both: anytype, vectors: [4]@Vector(lanes, T)) @Vector(4, T) {
    var four: [4]@Vector(4, T) = undefined;
    inline for (&four, vectors) |*to, from| to.* = foldToFour(T, both, from);
    const low = [4]i32{ 0, -1, 1, -2 }; // a0 b0 a1 b1
    const high = [4]i32{ 2, -3, 3, -4 }; // a2 b2 a3 b3
    const ab = both(@shuffle(T, four[0], four[1], low), @shuffle(T, four[0], four[1], high));
    const cd = both(@shuffle(T, four[2], four[3], low), @shuffle(T, four[2], four[3], high));
    return both(@shuffle(T, ab, cd, [4]i32{ 0, 1, -1, -2 }), @shuffle(T, ab, cd, [4]i32{ 2, 3, -3, -4 }));
}

/// The sums of `lanes` vectors, each in the order of `sum`; lane i is that of vector i.
pub inline fn sumLanes(vectors: [lanes]Vector) Vector {
    return foldLanes(added, vectors);
}

inline fn added(a: anytype, b: @TypeOf(a)) @TypeOf(a) {
    return a + b;
}

/// What `both` makes of the lanes of each of `lanes` vectors; lane i is that of vector i. Halves of two vectors are taken
/// at a time: 3 instructions a pair, where folding each vector by itself takes more than twice as many.
pub inline fn foldLanes(
    comptime both: anytype,
    vectors: [lanes]Vector,
) Vector {
    var folded = vectors;
    comptime var count = lanes;
    inline while (count > 1) : (count /= 2) {
        inline for (0..count / 2) |i| folded[i] = foldPair(both, count, folded[i], folded[i + count / 2]);
    }
    return folded[0];
}

/// Both halves of each group of `width` lanes made one; the groups of `a` and `b` take turns.
inline fn foldPair(
    comptime both: anytype,
    comptime width: comptime_int,
    a: Vector,
    b: Vector,
) Vector {
    const half = width / 2;
    comptime var low: [lanes]i32 = undefined;
    comptime var high: [lanes]i32 = undefined;
    inline for (0..lanes) |lane| {
        const group = lane / width;
        const within = lane % width;
        const source: i32 = group * width + within % half;
        low[lane] = if (within < half) source else ~source;
        high[lane] = if (within < half) source + half else ~(source + half);
    }
    return both(@shuffle(f32, a, b, low), @shuffle(f32, a, b, high));
}

inline fn foldToFour(comptime T: type, comptime both: anytype, values: @Vector(lanes, T)) @Vector(4, T) {
    if (lanes == 4) return values;
    const eight: @Vector(8, T) = if (lanes == 8) values else blk: {
        const halves: [2][8]T = @bitCast(values);
        break :blk both(@as(@Vector(8, T), halves[0]), @as(@Vector(8, T), halves[1]));
    };
    const halves: [2][4]T = @bitCast(eight);
    return both(@as(@Vector(4, T), halves[0]), @as(@Vector(4, T), halves[1]));
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

fn largest(vector: Vector) f32 {
    const others: [3]Vector = .{ @splat(-std.math.inf(f32)), @splat(0), @splat(1e30) };
    const found = largestFour(.{ others[0], vector, others[1], others[2] });
    std.debug.assert(found[0] == -std.math.inf(f32) and found[2] == 0 and found[3] == 1e30);
    return found[1];
}

test largestFour {
    var prng: std.Random.DefaultPrng = .init(2);
    for (0..100) |round| {
        var elements: [lanes]f32 = undefined;
        for (&elements) |*element| element.* = prng.random().floatNorm(f32) - @as(f32, @floatFromInt(round % 5));
        try std.testing.expectEqual(std.mem.max(f32, &elements), largest(elements));
    }
    const infinity = std.math.inf(f32);
    try std.testing.expectEqual(-infinity, largest(@splat(-infinity)));
    var mixed: [lanes]f32 = @splat(-infinity);
    mixed[lanes - 1] = -3;
    try std.testing.expectEqual(-3, largest(mixed));
    mixed[1] = infinity;
    try std.testing.expectEqual(infinity, largest(mixed));
}

test sumFour {
    var v: [4]Vector = undefined;
    var prng: std.Random.DefaultPrng = .init(1);
    for (&v) |*vector| {
        var elements: [lanes]f32 = undefined;
        for (&elements) |*element| element.* = prng.random().floatNorm(f32);
        vector.* = elements;
    }
    const sums: [4]f32 = sumFour(v);
    for (v, sums) |vector, expected| try std.testing.expectEqual(expected, sum(vector));

    var many: [lanes]Vector = undefined;
    for (&many) |*vector| {
        var elements: [lanes]f32 = undefined;
        for (&elements) |*element| element.* = prng.random().floatNorm(f32);
        vector.* = elements;
    }
    const all: [lanes]f32 = sumLanes(many);
    for (many, all) |vector, expected| try std.testing.expectEqual(expected, sum(vector));
}
