//! One row of a query step in f64, scalar and slow: for what leaves the range of f32 on the way.
//!
//!     a key of 3e38 in bf16 * a query of 2       scores past the largest f32, or Inf - Inf within one
//!     values of 3e38 under equal weights         sums past it, of which the output is an average
//!
//! In f64 nothing does: a score is at most 256 * (2^128)^3 < 2^392, and an output lies between the values it is made of.
//! Only the log-sum-exp may be past the largest f32, and then is that one.
//!
//! Results that were right in f32 are never made again: bits of theirs are what they were.

const std = @import("std");
const assert = std.debug.assert;
const dispatch = @import("../kernels/dispatch.zig");
const Query = @import("query.zig").Query;
const shapes = @import("../shape.zig");
const Visible = @import("visible.zig").Visible;

/// Keys or values that are decoded together.
const rows_at_once = 16;

/// Online softmax over the rows so far.
const State = struct {
    score_max: f64,
    /// Sum of exp(score - score_max).
    weight_sum: f64,
    /// [head_dim]
    sums: [shapes.head_dim_max]f64 = @splat(0),

    fn add(state: *State, score: f64, value: []const f32) void {
        if (score > state.score_max) {
            const rescale = exp(state.score_max - score);
            state.score_max = score;
            state.weight_sum *= rescale;
            for (state.sums[0..value.len]) |*sum| sum.* *= rescale;
        }
        const weight = exp(score - state.score_max);
        state.weight_sum += weight;
        for (state.sums[0..value.len], value) |*sum, element| sum.* += weight * element;
    }
};

/// Writes the output of one row of a KV head and returns its log-sum-exp. Its query is read before: the output may take
/// its place. Never inlined: its arrays would be part of the frame of every short attention.
pub noinline fn attendRow(query: *const Query, kv_head: u32, row: u32) f32 {
    const rows = &query.rows;
    const head_dim = rows.head_dim;
    const index = query.rowIndex(kv_head, row);
    const q = query.q[index * head_dim ..][0..head_dim];
    const limits = query.visibility(kv_head, row);
    const sink_logits = query.options.sink_logits;
    var state: State = if (sink_logits.len == 0)
        .{ .score_max = -std.math.inf(f64), .weight_sum = 0 }
    else
        .{ .score_max = sink_logits[index % query.q_head_count], .weight_sum = 1 };

    const see: Visible = .{ .rows = rows, .first = limits.first, .end = limits.end, .sink_end = limits.sink_end };
    var keys: [rows_at_once * shapes.head_dim_max]f32 = undefined;
    var values: [rows_at_once * shapes.head_dim_max]f32 = undefined;
    var position: u32 = 0;
    while (see.stretchFrom(position)) |stretch| {
        position = stretch.first;
        while (position < stretch.end) {
            const end = @min(stretch.end, position + rows_at_once);
            const count = rows.read(.keys, kv_head, position, end, &keys);
            const value_count = rows.read(.values, kv_head, position, end, &values);
            assert(count == value_count);
            for (0..count) |i| {
                const at: u32 = position + @as(u32, @intCast(i));
                if (isHidden(limits, at)) continue;
                const score = scoreOf(query, limits, at, q, keys[i * head_dim ..][0..head_dim]);
                state.add(score, values[i * head_dim ..][0..head_dim]);
            }
            position += count;
        }
    }
    const factor = if (state.weight_sum == 0) 0 else 1 / state.weight_sum;
    for (query.output[index * head_dim ..][0..head_dim], state.sums[0..head_dim]) |*to, sum| to.* = @floatCast(sum * factor);
    if (state.weight_sum == 0) return -std.math.inf(f32);
    const largest: f64 = std.math.floatMax(f32);
    // The sum is at least 1: it has the weight of the largest score.
    return @floatCast(std.math.clamp(state.score_max + std.math.log1p(state.weight_sum - 1), -largest, largest));
}

/// A node of the tree from which the row does not descend?
fn isHidden(limits: dispatch.QueryRow, position: u32) bool {
    if (position < limits.tree_first) return false;
    const node = position - limits.tree_first;
    return node >= 64 or limits.tree_mask >> @intCast(node) & 1 == 0;
}

fn scoreOf(query: *const Query, limits: dispatch.QueryRow, position: u32, q: []align(1) const f32, key: []const f32) f64 {
    var dot: f64 = 0;
    for (q, key) |a, b| dot += @as(f64, a) * b;
    var score = dot * query.softmax_scale;
    if (query.options.softcap) |cap| score = cap * std.math.tanh(score / cap);
    const distance: i32 = @bitCast(limits.position -% position);
    return score - @as(f64, limits.alibi_slope) * @as(f64, @floatFromInt(distance));
}

/// exp(x) of x <= 0, in our own arithmetic: the C library's differs between its releases.
///
/// x = n * ln 2 + r with |r| <= ln 2 / 2; the series of exp(r) ends at r^13, where 0.3466^14 / 14! = 4e-18 is left out.
fn exp(x: f64) f64 {
    if (std.math.isNan(x)) return x;
    if (x < -745) return 0; // below the smallest f64
    const n = @round(x * std.math.log2e);
    // ln 2 in two parts: the first has 33 significant bits, so n times it is exact.
    const r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
    var y: f64 = 1;
    var term: u32 = 13;
    while (term > 0) : (term -= 1) y = 1 + y * r / @as(f64, @floatFromInt(term));
    return std.math.ldexp(y, @intFromFloat(n));
}

test exp {
    var x: f64 = 0;
    while (x > -740) : (x -= 0.317) {
        const truth = @exp(x);
        // Below 2^-1022 the numbers of f64 are 2^-1074 apart.
        try std.testing.expect(@abs(exp(x) - truth) <= 1e-15 * truth + 0x1p-1073);
    }
    try std.testing.expectEqual(1, exp(0));
    try std.testing.expectEqual(0, exp(-std.math.inf(f64)));
    try std.testing.expect(std.math.isNan(exp(std.math.nan(f64))));
}
