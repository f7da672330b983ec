//! The truth that every kernel is tested against: one element at a time, in f64, by the definition.
//!
//! Slow on purpose; nothing here is shared with the kernels but the element types.

const std = @import("std");
const assert = std.debug.assert;
const Dtype = @import("../dtype.zig").Dtype;

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

/// What one query row attends, and how.
pub const Attention = struct {
    /// [head_dim]
    query: []const f32,
    /// [token][head_dim], decoded
    keys: []const f64,
    values: []const f64,
    /// Absolute position of the query; token i of `keys` has position i.
    position: i64,
    softmax_scale: f64,
    causal: bool = true,
    window_tokens: ?u32 = null,
    sink_tokens: u32 = 0,
    softcap: ?f64 = null,
    alibi_slope: f64 = 0,
    sink_logit: ?f64 = null,

    fn visible(self: Attention, position: i64) bool {
        if (!self.causal) return true;
        if (position > self.position) return false;
        const window = self.window_tokens orelse return true;
        return position > self.position - @as(i64, window) or position < self.sink_tokens;
    }

    fn score(self: Attention, token: usize) f64 {
        const head_dim = self.query.len;
        var dot: f64 = 0;
        for (self.query, self.keys[token * head_dim ..][0..head_dim]) |q, k| dot += @as(f64, q) * k;
        var result = dot * self.softmax_scale;
        if (self.softcap) |cap| result = cap * std.math.tanh(result / cap);
        const distance: f64 = @floatFromInt(self.position - @as(i64, @intCast(token)));
        return result - self.alibi_slope * distance;
    }
};

/// Softmax attention of one row in two passes; writes [head_dim] and returns the log-sum-exp.
pub fn attend(attention: Attention, output: []f64) f64 {
    const head_dim = attention.query.len;
    assert(output.len == head_dim);
    const token_count = attention.keys.len / head_dim;
    @memset(output, 0);
    var score_max = attention.sink_logit orelse -std.math.inf(f64);
    for (0..token_count) |token| {
        if (attention.visible(@intCast(token))) score_max = @max(score_max, attention.score(token));
    }
    if (score_max == -std.math.inf(f64)) return score_max;
    var weight_sum: f64 = if (attention.sink_logit) |logit| @exp(logit - score_max) else 0;
    for (0..token_count) |token| {
        if (!attention.visible(@intCast(token))) continue;
        const weight = @exp(attention.score(token) - score_max);
        weight_sum += weight;
        for (output, attention.values[token * head_dim ..][0..head_dim]) |*sum, value| sum.* += weight * value;
    }
    for (output) |*sum| sum.* /= weight_sum;
    return score_max + @log(weight_sum);
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

test attend {
    // Two keys with scores 0 and ln 3: weights 1/4 and 3/4.
    var output: [1]f64 = undefined;
    const lse = attend(.{
        .query = &.{1},
        .keys = &.{ 0, @log(3.0) },
        .values = &.{ 8, 4 },
        .position = 1,
        .softmax_scale = 1,
    }, &output);
    try std.testing.expectApproxEqAbs(5, output[0], 1e-12);
    try std.testing.expectApproxEqAbs(@log(4.0), lse, 1e-12);
}
