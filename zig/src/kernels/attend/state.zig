//! Merging the states of one row over two stretches of positions: sums, largest score and sum of weights.

const convert = @import("../convert.zig");
const softmax = @import("../exp.zig");
const table = @import("../table.zig");

const lanes = convert.lanes;
const Vector = convert.Vector;

/// See `Table.merge`.
pub fn merge(
    row: *table.Row,
    sums: [*]f32,
    next_row: *const table.Row,
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

fn weightOf(row: *const table.Row, score_max: f32) Vector {
    if (row.weight_sum == 0) return @splat(0);
    return softmax.exp(@as(Vector, @splat(row.score_max - score_max)));
}
