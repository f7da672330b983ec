//! The attention state of a query row: sums of weight * value, the largest score, and the sum of weights.
//!
//!     empty      score_max = -Inf, weight_sum = 0, sums = 0
//!     output     sums / weight_sum
//!     lse        score_max + ln(weight_sum)
//!
//! Sums are relative to `score_max`: where that moves, or two states are merged, they are rescaled.

const std = @import("std");
const dtypes = @import("../../dtype.zig");
const exp = @import("../exp.zig");
const simd = @import("../lanes.zig");
const table = @import("../table.zig");

const lanes = simd.lanes;
const Vector = simd.Vector;
const VectorU32 = simd.VectorU32;
const negative_infinity = -std.math.inf(f32);

/// Makes `score_max` the maximum of a row, and rescales its sums.
pub inline fn moveMaximum(row: *table.QueryRow, score_max: f32, sums: []f32) void {
    const rescale = exp.exp(@as(Vector, @splat(row.score_max - score_max)));
    row.score_max = score_max;
    row.weight_sum *= rescale[0];
    var dim: usize = 0;
    while (dim < sums.len) : (dim += lanes) {
        const old: Vector = sums[dim..][0..lanes].*;
        sums[dim..][0..lanes].* = old * rescale;
    }
}

/// See `Table.merge`.
pub fn merge(
    row: *table.QueryRow,
    sums: [*]f32,
    next_row: *const table.QueryRow,
    next_sums: [*]const f32,
    head_dim_padded: u32,
) callconv(.c) void {
    // Nothing visible: exp(-Inf - -Inf) would be NaN.
    if (next_row.weight_sum == 0) return;
    const score_max = @max(row.score_max, next_row.score_max);
    const factor = weightOf(row, score_max);
    const next_factor = weightOf(next_row, score_max);
    row.score_max = score_max;
    row.weight_sum = row.weight_sum * factor[0] + next_row.weight_sum * next_factor[0];
    var dim: u32 = 0;
    while (dim < head_dim_padded) : (dim += lanes) {
        const sum: Vector = sums[dim..][0..lanes].*;
        const next_sum: Vector = next_sums[dim..][0..lanes].*;
        sums[dim..][0..lanes].* = sum * factor + next_sum * next_factor;
    }
}

fn weightOf(row: *const table.QueryRow, score_max: f32) Vector {
    if (row.weight_sum == 0) return @splat(0);
    return exp.exp(@as(Vector, @splat(row.score_max - score_max)));
}

/// See `Table.finish`.
pub fn finish(task: *const table.FinishTask) callconv(.c) f32 {
    const row = task.row;
    var score_max = row.score_max;
    var weight_sum = row.weight_sum;
    var rescale: f32 = 1;
    if (task.has_sink_logit != 0) {
        score_max = @max(row.score_max, task.sink_logit);
        rescale = if (row.score_max == negative_infinity) 0 else exp.expOne(row.score_max - score_max);
        weight_sum = row.weight_sum * rescale + exp.expOne(task.sink_logit - score_max);
    }
    if (!std.math.isFinite(weight_sum) or !areFinite(task.sums, task.head_dim)) return std.math.nan(f32);
    const output: [*]align(1) f32 = @ptrCast(task.output);
    if (weight_sum == 0) {
        // No visible key: the empty attention state, output 0 and lse -Inf.
        for (0..task.head_dim) |dim| output[dim] = 0;
        return negative_infinity;
    }
    const factor = rescale / weight_sum;
    for (0..task.head_dim) |dim| output[dim] = task.sums[dim] * factor;
    return @floatCast(@as(f64, score_max) + exp.ln(weight_sum));
}

/// Whether none of `count` numbers is infinite or NaN.
pub inline fn areFinite(numbers: [*]const f32, count: u32) bool {
    var largest: VectorU32 = @splat(0);
    var at: u32 = 0;
    while (at + lanes <= count) : (at += lanes) {
        largest = @max(largest, simd.magnitudes(numbers[at..][0..lanes].*));
    }
    const is_infinite = largest >= @as(VectorU32, @splat(dtypes.refusedF32Bits(.f32)));
    if (@as(std.meta.Int(.unsigned, lanes), @bitCast(is_infinite)) != 0) return false;
    for (numbers[at..count]) |number| if (!std.math.isFinite(number)) return false;
    return true;
}
