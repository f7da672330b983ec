//! Attention over one tile of the keys and values of a few KV heads, for a few query rows of each.
//!
//! Positions are taken in tiles of 64. For each tile and head, in three passes:
//!
//!     1. scores[row][token] = query . key            every key is loaded once for all query rows
//!     2. weights = exp(score - running maximum)      the online softmax; older sums are rescaled
//!     3. sums[row][dim] += weight * value            every value is loaded once for all query rows
//!
//! Passes 1 and 3 are those of the format of their side: `attend_float.zig` for rows of floats, `attend_integer.zig` for
//! planes of codes, or `attend_amx.zig` where the level has tiles. Any format of keys goes with any of values.
//!
//! A tile lies within a multiple of 64 positions, so neither slabs nor blocks show in the result; and no number below
//! depends on how many query rows stand beside a row. What a row gets is a function of its query, the stored bytes and
//! the level alone.
//!
//! Not here: threads, blocks, tables. A tile is what fits the first cache level (64 rows of 128 f16 are 16 KiB).

const std = @import("std");
const builtin = @import("builtin");
const assert = std.debug.assert;
const attend_amx = @import("attend_amx.zig");
const attend_float = @import("attend_float.zig");
const attend_integer = @import("attend_integer.zig");
const convert = @import("convert.zig");
const softmax = @import("softmax.zig");
const table = @import("table.zig");
const tiles = @import("tile.zig");
const Tile = tiles.Tile;
const TileRows = tiles.TileRows;

const lanes = convert.lanes;
const Vector = convert.Vector;
const rows_at_once = softmax.rows_at_once;
const tile_tokens = table.tile_tokens;
const negative_infinity = -std.math.inf(f32);

/// Planes of codes are multiplied by tiles of AMX.
const has_amx = builtin.cpu.arch == .x86_64 and builtin.cpu.has(.x86, .amx_int8);
const attend_codes = if (has_amx) attend_amx else attend_integer;

/// See `Table.attend`.
pub fn attend(task: *const table.AttendTask) callconv(.c) void {
    assert(task.row_count >= 1 and task.row_count <= table.row_count_max);
    assert(task.head_dim_padded % table.lanes_max == 0);
    if (task.tile.run_count == 0) return;
    var tile: Tile = undefined;
    tile.rows.fill(&task.tile);
    const uses_tiles = has_amx and !task.tile.storage.isFloat();
    if (uses_tiles) attend_amx.begin(task);
    tile.turn = 0;
    var of_head = task.*;
    for (0..task.head_count) |head| {
        if (head != 0) {
            tile.rows.nextHead();
            of_head.queries += task.row_count * task.head_dim_padded;
            of_head.sums += task.row_count * task.head_dim_padded;
            of_head.rows += task.row_count;
        }
        tile.beginAhead(task, @intCast(head));
        if (head == 0) setQueries(task, task.queries, tile.rows.plane_k, &tile);
        attendHead(&of_head, &tile, head + 1 == task.head_count);
    }
    if (uses_tiles) attend_amx.end();
}

/// Digits of a head's queries, where its keys are codes.
fn setQueries(task: *const table.AttendTask, of_head: [*]const f32, plane_k: [*]const u8, tile: *Tile) void {
    switch (task.tile.storage.dtype_k) {
        .f32, .f16, .bf16 => {},
        inline .q8_0, .q4_0, .i8, .i4, .i2 => |dtype| {
            attend_integer.setQueries(dtype, task, of_head, plane_k, &tile.keys_ahead, &tile.queries_in_turn[tile.turn]);
        },
    }
}

fn attendHead(task: *const table.AttendTask, tile: *Tile, is_last: bool) void {
    switch (task.tile.storage.dtype_k) {
        inline .f32, .f16, .bf16 => |dtype| attend_float.scoreTile(dtype, task, tile),
        inline .q8_0, .q4_0, .i8, .i4, .i2 => |dtype| attend_codes.scoreTile(dtype, task, tile),
    }
    weighTile(task, tile);
    // The next head's queries wait for their steps while this one's weights do.
    tile.turn +%= 1;
    if (!is_last) {
        const next_queries = task.queries + task.row_count * task.head_dim_padded;
        setQueries(task, next_queries, tile.rows.plane_k + task.tile.storage.head_stride_k, tile);
    }
    tile.keys_ahead.askRest();
    switch (task.tile.storage.dtype_v) {
        inline .f32, .f16, .bf16 => |dtype| attend_float.accumulateTile(dtype, task, tile),
        inline .q8_0, .q4_0, .i8, .i4, .i2 => |dtype| attend_codes.accumulateTile(dtype, task, tile),
    }
}

/// Vectors of a row's scores.
const score_vectors = tile_tokens / lanes;

/// Pass 2: bias and mask the scores of each row, move its maximum, turn scores into weights.
fn weighTile(task: *const table.AttendTask, tile: *Tile) void {
    @setEvalBranchQuota(10_000); // what is inlined counts as one function
    var r: u32 = 0;
    while (r < task.row_count) {
        const count = softmax.rowsAtOnce(task.row_count - r);
        switch (count) {
            inline 1, rows_at_once => |row_count| weighRows(row_count, task, tile, r),
            else => unreachable,
        }
        r += count;
    }
}

/// Each row waits for its maximum, and then for the sum of its weights.
inline fn weighRows(comptime row_count: u32, task: *const table.AttendTask, tile: *Tile, first: u32) void {
    const rows = task.rows[first..][0..row_count];
    const scores = tile.scores[first..][0..row_count];
    for (rows, scores) |*row, *of_row| {
        if (task.softcap == 0 and row.alibi_slope == 0 and tile.rows.isSeenBy(row)) continue;
        tile.rows.setPositions();
        maskRow(task.softcap, row, &tile.rows, of_row);
    }
    // Of fewer than four rows the last one is taken again.
    var most: [rows_at_once]Vector = undefined;
    inline for (&most, 0..) |*vector, i| {
        vector.* = @splat(negative_infinity);
        for (0..score_vectors) |v| vector.* = larger(vector.*, scores[@min(i, row_count - 1)][v * lanes ..][0..lanes].*);
    }
    const maxima: [rows_at_once]f32 = softmax.largestFour(most);
    for (rows, maxima[0..row_count], first..) |*row, maximum, r| {
        const score_max = @max(row.score_max, maximum);
        // Where nothing is visible so far nothing has been summed, and exp(-Inf - -Inf) would be NaN.
        if (score_max == row.score_max) continue;
        moveMaximum(row, score_max, task.sums[r * task.head_dim_padded ..][0..task.head_dim_padded]);
    }
    var weight_sums: [rows_at_once]Vector = @splat(@splat(0));
    inline for (rows, scores, 0..) |*row, *of_row, i| {
        tile.values_ahead.ask(tile.values_ahead.share / 16);
        // Where a row sees nothing its scores are -Inf, and so may be the maximum.
        const score_max: Vector = @splat(@max(row.score_max, -std.math.floatMax(f32)));
        for (0..score_vectors) |v| {
            const score: Vector = of_row[v * lanes ..][0..lanes].*;
            const weight = softmax.exp(score - score_max);
            of_row[v * lanes ..][0..lanes].* = weight;
            weight_sums[i] += weight;
        }
    }
    const sums: [rows_at_once]f32 = softmax.sumFour(weight_sums);
    for (rows, sums[0..row_count]) |*row, sum| row.weight_sum += sum;
}

/// Biases the scores of a row, and makes -Inf of those that it may not see: all 64 are numbers then.
fn maskRow(softcap: f32, row: *const table.Row, tile: *const TileRows, scores: *[tile_tokens]f32) void {
    var token: u32 = 0;
    while (token < tile_tokens) : (token += lanes) {
        const positions: convert.VectorU32 = tile.positions[token..][0..lanes].*;
        var score: Vector = scores[token..][0..lanes].*;
        if (softcap != 0) {
            const cap: Vector = @splat(softcap);
            score = cap * softmax.tanh(score / cap);
        }
        if (row.alibi_slope != 0) {
            const behind = @as(convert.VectorU32, @splat(row.position)) -% positions;
            const distance: Vector = @floatFromInt(@as(@Vector(lanes, i32), @bitCast(behind)));
            score = score - @as(Vector, @splat(row.alibi_slope)) * distance;
        }
        const slots = @as(convert.VectorU32, @splat(token)) + std.simd.iota(u32, lanes);
        const in_tile = slots < @as(convert.VectorU32, @splat(tile.token_count));
        const in_window = and_(
            positions >= @as(convert.VectorU32, @splat(row.first)),
            positions < @as(convert.VectorU32, @splat(row.end)),
        );
        const in_sink = positions < @as(convert.VectorU32, @splat(row.sink_end));
        const visible = and_(in_tile, or_(in_window, in_sink));
        scores[token..][0..lanes].* = @select(f32, visible, score, @as(Vector, @splat(negative_infinity)));
    }
    if (tile.position_last >= row.tree_first) maskTree(row, tile, scores);
}

/// The larger of each two; of NaN and a number the number.
inline fn larger(most: Vector, candidates: Vector) Vector {
    return @select(f32, candidates > most, candidates, most);
}

/// Makes `score_max` the maximum of a row: older sums are rescaled.
inline fn moveMaximum(row: *table.Row, score_max: f32, sums: []f32) void {
    const rescale = softmax.exp(@as(Vector, @splat(row.score_max - score_max)));
    row.score_max = score_max;
    row.weight_sum *= rescale[0];
    var dim: usize = 0;
    while (dim < sums.len) : (dim += lanes) {
        const old: Vector = sums[dim..][0..lanes].*;
        sums[dim..][0..lanes].* = old * rescale;
    }
}

/// Hides the positions of a tree that a row does not descend from.
fn maskTree(row: *const table.Row, tile: *const TileRows, scores: *[tile_tokens]f32) void {
    for (scores[0..tile.token_count], tile.positions[0..tile.token_count]) |*score, position| {
        if (position < row.tree_first) continue;
        const node = position - row.tree_first;
        if (node >= 64 or row.tree_mask >> @intCast(node) & 1 == 0) score.* = negative_infinity;
    }
}

inline fn and_(a: @Vector(lanes, bool), b: @Vector(lanes, bool)) @Vector(lanes, bool) {
    return @select(bool, a, b, @as(@Vector(lanes, bool), @splat(false)));
}

inline fn or_(a: @Vector(lanes, bool), b: @Vector(lanes, bool)) @Vector(lanes, bool) {
    return @select(bool, a, @as(@Vector(lanes, bool), @splat(true)), b);
}

/// See `Table.finish`.
pub fn finish(task: *const table.FinishTask) callconv(.c) f32 {
    const row = task.row;
    var score_max = row.score_max;
    var weight_sum = row.weight_sum;
    var rescale: f32 = 1;
    if (task.has_sink_logit != 0) {
        score_max = @max(row.score_max, task.sink_logit);
        rescale = if (row.score_max == negative_infinity) 0 else expOne(row.score_max - score_max);
        weight_sum = row.weight_sum * rescale + expOne(task.sink_logit - score_max);
    }
    const output: [*]align(1) f32 = @ptrCast(task.output);
    if (weight_sum == 0) {
        // No visible key: the empty attention state, output 0 and lse -Inf.
        for (0..task.head_dim) |dim| output[dim] = 0;
        return negative_infinity;
    }
    const factor = rescale / weight_sum;
    for (0..task.head_dim) |dim| output[dim] = task.sums[dim] * factor;
    return @floatCast(@as(f64, score_max) + softmax.ln(weight_sum));
}

fn expOne(x: f32) f32 {
    return softmax.exp(@splat(x))[0];
}

test {
    _ = @import("amx_emulator.zig");
    _ = @import("attend_amx_test.zig");
    _ = @import("attend_test.zig");
}
