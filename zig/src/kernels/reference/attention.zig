//! The scalar truth of attention: one query row, one key at a time, in f64, by the definition.
//!
//! Slow on purpose; nothing here is shared with the kernels.

const std = @import("std");
const assert = std.debug.assert;

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
