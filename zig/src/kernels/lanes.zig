//! The vectors of a level: how many lanes they have, arithmetic that every level gives alike, and folds across lanes.
//!
//! Each fold goes in one fixed order, so that its bits depend on the level alone. Four vectors are folded in the time of
//! one: their steps wait for each other otherwise.

const std = @import("std");
const builtin = @import("builtin");
const assert = std.debug.assert;
const table = @import("table.zig");

/// f32 lanes of this level's vectors: 4, 8 or 16.
pub const lanes = std.simd.suggestVectorLength(f32) orelse 4;

pub const Vector = @Vector(lanes, f32);
pub const VectorU32 = @Vector(lanes, u32);
pub const VectorI32 = @Vector(lanes, i32);
pub const VectorU16 = @Vector(lanes, u16);
pub const Mask = @Vector(lanes, bool);

comptime {
    assert(lanes <= table.lanes_max and table.lanes_max % lanes == 0);
}

/// Vector registers of this level: 32 with AVX-512 and on aarch64, 16 with SSE and AVX2.
pub const register_count = if (lanes == 16 or builtin.cpu.arch == .aarch64) 32 else 16;

/// Bytes of a cache line, on every CPU the kernels are compiled for. A prefetch brings one line.
pub const cache_line_bytes = 64;

const has_fma = switch (builtin.cpu.arch) {
    .x86_64 => builtin.cpu.has(.x86, .fma),
    .aarch64 => true,
    else => false,
};

/// a * b + c: fused where the level has the instruction, else rounded twice (a call into libm would be 50 times slower).
pub inline fn mulAdd(a: anytype, b: @TypeOf(a), c: @TypeOf(a)) @TypeOf(a) {
    return if (has_fma) @mulAdd(@TypeOf(a), a, b, c) else a * b + c;
}

/// Added to a float below 2^22 in magnitude, 1.5 * 2^23 rounds it to an integer, half to even, on every level alike: the
/// low bits of the sum are the integer, in two's complement.
pub const round_magic = 0x1.8p23;

/// All bits of an f32 but its sign. As integers, the magnitudes of floats have the order of the floats; NaN is larger than
/// Inf.
pub const magnitude_mask = 0x7fff_ffff;

/// The bits of the magnitude in each lane.
pub inline fn magnitudes(x: Vector) VectorU32 {
    return @as(VectorU32, @bitCast(x)) & @as(VectorU32, @splat(magnitude_mask));
}

// One instruction each on x86, which @min and @max, with their rule for NaN, are not.

/// The smaller of x and `bound` in each lane; `bound` where x is NaN.
pub inline fn smaller(x: Vector, bound: Vector) Vector {
    return @select(f32, x < bound, x, bound);
}

/// The larger of x and `bound` in each lane; `bound` where x is NaN.
pub inline fn larger(x: Vector, bound: Vector) Vector {
    return @select(f32, x > bound, x, bound);
}

pub inline fn both(a: Mask, b: Mask) Mask {
    return @select(bool, a, b, @as(Mask, @splat(false)));
}

pub inline fn either(a: Mask, b: Mask) Mask {
    return @select(bool, a, @as(Mask, @splat(true)), b);
}

/// The sum of the lanes, halves added to halves, then (0 + 2) + (1 + 3): one fixed order for a level.
pub inline fn sum(values: Vector) f32 {
    const four = foldToFour(f32, added, values);
    return (four[0] + four[2]) + (four[1] + four[3]);
}

/// Query rows, or groups, that are at work together where each waits for a fold of its lanes.
pub const rows_at_once = 4;

/// Rows that are taken together when `rest` of them are left.
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

/// The lanes of each of four vectors combined, in the order of `sum`.
inline fn foldFour(comptime T: type, comptime combine: anytype, vectors: [4]@Vector(lanes, T)) @Vector(4, T) {
    var four: [4]@Vector(4, T) = undefined;
    inline for (&four, vectors) |*to, from| to.* = foldToFour(T, combine, from);
    const low = [4]i32{ 0, -1, 1, -2 }; // a0 b0 a1 b1
    const high = [4]i32{ 2, -3, 3, -4 }; // a2 b2 a3 b3
    const ab = combine(@shuffle(T, four[0], four[1], low), @shuffle(T, four[0], four[1], high));
    const cd = combine(@shuffle(T, four[2], four[3], low), @shuffle(T, four[2], four[3], high));
    return combine(@shuffle(T, ab, cd, [4]i32{ 0, 1, -1, -2 }), @shuffle(T, ab, cd, [4]i32{ 2, 3, -3, -4 }));
}

/// The sums of `lanes` vectors, each in the order of `sum`; lane i is that of vector i.
pub inline fn sumLanes(vectors: [lanes]Vector) Vector {
    return foldLanes(added, vectors);
}

inline fn added(a: anytype, b: @TypeOf(a)) @TypeOf(a) {
    return a + b;
}

/// The lanes of each of `lanes` vectors combined; lane i is that of vector i. Halves of two vectors are taken at a time: 3
/// instructions a pair, where folding each vector by itself takes more than twice as many.
pub inline fn foldLanes(
    comptime combine: anytype,
    vectors: [lanes]Vector,
) Vector {
    var folded = vectors;
    comptime var count = lanes;
    inline while (count > 1) : (count /= 2) {
        inline for (0..count / 2) |i| folded[i] = foldPair(combine, count, folded[i], folded[i + count / 2]);
    }
    return folded[0];
}

/// Both halves of each group of `width` lanes made one; the groups of `a` and `b` take turns.
///
/// What stays in its lane is a blend, which any port takes: only what moves is a shuffle.
inline fn foldPair(
    comptime combine: anytype,
    comptime width: comptime_int,
    a: Vector,
    b: Vector,
) Vector {
    const half = width / 2;
    comptime var staying: [lanes]i32 = undefined;
    comptime var moving: [lanes]i32 = undefined;
    inline for (0..lanes) |lane| {
        const is_of_a = lane % width < half;
        staying[lane] = if (is_of_a) lane else ~@as(i32, lane);
        moving[lane] = if (is_of_a) lane + half else ~@as(i32, lane - half);
    }
    return combine(@shuffle(f32, a, b, staying), @shuffle(f32, a, b, moving));
}

inline fn foldToFour(comptime T: type, comptime combine: anytype, values: @Vector(lanes, T)) @Vector(4, T) {
    if (lanes == 4) return values;
    const eight: @Vector(8, T) = if (lanes == 8) values else blk: {
        const halves: [2][8]T = @bitCast(values);
        break :blk combine(@as(@Vector(8, T), halves[0]), @as(@Vector(8, T), halves[1]));
    };
    const halves: [2][4]T = @bitCast(eight);
    return combine(@as(@Vector(4, T), halves[0]), @as(@Vector(4, T), halves[1]));
}

fn largest(vector: Vector) f32 {
    const others: [3]Vector = .{ @splat(-std.math.inf(f32)), @splat(0), @splat(1e30) };
    const found = largestFour(.{ others[0], vector, others[1], others[2] });
    assert(found[0] == -std.math.inf(f32) and found[2] == 0 and found[3] == 1e30);
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
