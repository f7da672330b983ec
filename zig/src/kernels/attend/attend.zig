//! Attention over one tile of the keys and values of a few KV heads, for a few query rows of each.
//!
//! Positions are taken in tiles of 64. For each tile, in three passes over a few of its heads:
//!
//!     1. scores[row][token] = query . key            every key is loaded once for all query rows
//!     2. weights = exp(score - maximum)              the online softmax; older sums are rescaled
//!     3. sums[row][dim] += weight * value            every value is loaded once for all query rows
//!
//! Passes 1 and 3 are those of the format of their side: `float.zig` for rows of floats, `codes.zig` for planes of codes,
//! or `amx.zig` where the level has tile registers. Any format of keys goes with any of values.
//!
//! A tile lies within a multiple of 64 positions, so neither slabs nor blocks show in the result; and no number below
//! depends on how many query rows are attended together. The result of a query row is a function of its query, the stored
//! bytes and the level alone.
//!
//! Not here: threads, blocks, tables. A tile is what fits the first cache level (64 rows of 128 f16 are 16 KiB).

const std = @import("std");
const builtin = @import("builtin");
const assert = std.debug.assert;
const amx = @import("amx.zig");
const codes = @import("codes.zig");
const float = @import("float.zig");
const exp = @import("../exp.zig");
const simd = @import("../lanes.zig");
const state = @import("state.zig");
const table = @import("../table.zig");
const Heads = @import("scratch.zig").Heads;
const Scratch = @import("scratch.zig").Scratch;
const TileTokens = @import("tokens.zig").TileTokens;

const lanes = simd.lanes;
const Vector = simd.Vector;
const VectorU32 = simd.VectorU32;
const rows_at_once = simd.rows_at_once;
const tile_tokens = table.tile_tokens;
const row_count_max = table.query_row_count_max;
const negative_infinity = -std.math.inf(f32);

/// Whether planes of codes are multiplied in tile registers.
const has_amx = builtin.cpu.arch == .x86_64 and builtin.cpu.has(.x86, .amx_int8);
const code_passes = if (has_amx) amx else codes;

/// See `Table.attend`.
pub fn attend(task: *const table.AttendTask) callconv(.c) void {
    assert(task.row_count >= 1 and task.row_count <= table.query_row_count_max);
    assert(task.head_dim_padded % table.lanes_max == 0);
    if (task.tile.run_count == 0) return;
    var scratch: Scratch = undefined;
    scratch.init(task);
    const uses_registers = has_amx and !task.tile.storage.isFloat();
    if (uses_registers) amx.begin(task);
    var heads: Heads = .{ .first = 0, .count = undefined, .limit = headsTogether(task) };
    // The same task from the first of these heads on.
    var of_heads = task.*;
    while (heads.first < task.head_count) : (heads.first += heads.limit) {
        heads.count = @min(heads.limit, task.head_count - heads.first);
        const row = heads.first * task.row_count;
        of_heads.queries = task.queries + row * task.head_dim_padded;
        of_heads.prepared = task.prepared + row;
        of_heads.sums = task.sums + row * task.head_dim_padded;
        of_heads.rows = task.rows + row;
        scratch.beginPrefetches(task, heads);
        planPrefetches(task, &scratch, heads.count);
        attendHeads(&of_heads, &scratch, heads);
    }
    if (uses_registers) amx.end();
}

/// See `Table.prepare`.
pub fn prepare(task: *const table.AttendTask) callconv(.c) void {
    codes.prepareQueries(task);
}

/// Heads whose query rows are at work together, in shares of all heads as equal as can be.
///
/// The few rows of one head wait for their largest score, then for the sum of their weights, with little to do meanwhile;
/// those of several wait at once. Rows of floats leave the first cache level before their turn comes again.
fn headsTogether(task: *const table.AttendTask) u32 {
    const most: u32 = if (task.tile.storage.isFloat()) 1 else 4;
    const limit = @max(1, @min(most, row_count_max / task.row_count));
    const turn_count = (task.head_count + limit - 1) / limit;
    return (task.head_count + turn_count - 1) / turn_count;
}

/// Cuts the prefetches into those of the loops of passes 1 and 3 and those between the loops.
fn planPrefetches(task: *const table.AttendTask, scratch: *Scratch, head_count: u32) void {
    const storage = &task.tile.storage;
    const of_scores = switch (storage.dtype_k) {
        inline .f32, .f16, .bf16 => |dtype| float.linesOfScores(dtype, task, scratch),
        inline .q8_0, .q4_0, .i8, .i4, .i2 => |dtype| code_passes.linesOfPass(dtype, task),
    };
    const of_sums = switch (storage.dtype_v) {
        inline .f32, .f16, .bf16 => |dtype| float.linesOfSums(dtype, task, scratch),
        inline .q8_0, .q4_0, .i8, .i4, .i2 => |dtype| code_passes.linesOfPass(dtype, task),
    };
    // For each row: with its weights, with its query's digits, with the digits of its weights for each group of dims.
    var calls_per_row: u32 = 1;
    if (storage.dtype_k.isAffine()) calls_per_row += 1;
    if (!storage.dtype_v.isFloat()) calls_per_row += codes.groupCount(task);
    scratch.prefetches.plan(head_count * (of_scores + of_sums), head_count * task.row_count * calls_per_row);
}

/// All passes for some heads. `task` begins with the first of them.
fn attendHeads(task: *const table.AttendTask, scratch: *Scratch, heads: Heads) void {
    switch (task.tile.storage.dtype_k) {
        .f32, .f16, .bf16, .q8_0, .q4_0 => {},
        inline .i8, .i4, .i2 => |dtype| for (0..heads.count) |index| {
            scratch.select(task, heads, @intCast(index));
            codes.setQueries(dtype, task, scratch);
        },
    }
    switch (task.tile.storage.dtype_k) {
        inline .f32, .f16, .bf16 => |dtype| for (0..heads.count) |index| {
            scratch.select(task, heads, @intCast(index));
            float.scoreTile(dtype, task, scratch);
        },
        inline .q8_0, .q4_0, .i8, .i4, .i2 => |dtype| for (0..heads.count) |index| {
            scratch.select(task, heads, @intCast(index));
            code_passes.scoreTile(dtype, task, scratch);
        },
    }
    weighTile(task, scratch, heads.count * task.row_count);
    switch (task.tile.storage.dtype_v) {
        inline .f32, .f16, .bf16 => |dtype| for (0..heads.count) |index| {
            scratch.select(task, heads, @intCast(index));
            float.accumulateTile(dtype, task, scratch);
        },
        inline .q8_0, .q4_0, .i8, .i4, .i2 => |dtype| for (0..heads.count) |index| {
            scratch.select(task, heads, @intCast(index));
            code_passes.accumulateTile(dtype, task, scratch);
        },
    }
}

/// Vectors of a query row's scores.
const score_vectors = tile_tokens / lanes;

/// Pass 2: bias and mask the scores of `row_count` rows, move their maxima, turn scores into weights.
///
/// Each step is done for all rows before the next: it waits for a fold of lanes, and so all wait together.
fn weighTile(task: *const table.AttendTask, scratch: *Scratch, row_count: u32) void {
    const rows = task.rows[0..row_count];
    const scores = scratch.scores[0..row_count];
    const may_overflow = !areScoresBounded(task);
    for (rows, scores) |*row, *of_row| {
        if (task.softcap == 0 and row.alibi_slope == 0 and scratch.tokens.isSeenBy(row)) {
            if (may_overflow and !state.areFinite(of_row, tile_tokens)) row.weight_sum = std.math.nan(f32);
            continue;
        }
        scratch.tokens.setPositions();
        maskRow(task.softcap, row, &scratch.tokens, of_row);
    }
    // What scores are relative to. Floats take weights as they are; codes take them as numbers of few digits, those of the
    // tile's largest weight.
    const is_relative = !task.tile.storage.dtype_v.isFloat();
    var bases: [row_count_max]f32 = undefined;
    var r: u32 = 0;
    while (r < row_count) : (r += rows_at_once) {
        bases[r..][0..rows_at_once].* = largestScores(scratch, r, row_count);
    }
    for (rows, bases[0..row_count], scratch.base_weights[0..row_count], 0..) |*row, *base, *base_weight, i| {
        const score_max = @max(row.score_max, base.*);
        // Where nothing is visible so far nothing has been summed, and exp(-Inf - -Inf) would be NaN.
        if (score_max != row.score_max) {
            state.moveMaximum(row, score_max, task.sums[i * task.head_dim_padded ..][0..task.head_dim_padded]);
        }
        // Where a row sees nothing its scores are -Inf, and so may be the maximum.
        base.* = @max(if (is_relative) base.* else score_max, -std.math.floatMax(f32));
        base_weight.* = base.* - @max(score_max, -std.math.floatMax(f32));
    }
    r = 0;
    while (r < row_count) : (r += lanes) {
        const exponents: Vector = scratch.base_weights[r..][0..lanes].*;
        scratch.base_weights[r..][0..lanes].* = exp.exp(exponents);
    }
    var weight_sums: [row_count_max]Vector = undefined;
    for (scores, bases[0..row_count], weight_sums[0..row_count]) |*of_row, row_base, *weight_sum| {
        scratch.prefetches.prefetchSome();
        const base: Vector = @splat(row_base);
        weight_sum.* = @splat(0);
        for (0..score_vectors) |v| {
            const score: Vector = of_row[v * lanes ..][0..lanes].*;
            const weight = exp.exp(score - base);
            of_row[v * lanes ..][0..lanes].* = weight;
            weight_sum.* += weight;
        }
    }
    r = 0;
    while (r < row_count) : (r += rows_at_once) {
        const sums: [rows_at_once]f32 = simd.sumFour(weight_sums[r..][0..rows_at_once].*);
        const count = @min(rows_at_once, row_count - r);
        for (rows[r..][0..count], sums[0..count], scratch.base_weights[r..][0..count]) |*row, sum, base_weight| {
            row.weight_sum += sum * base_weight;
        }
    }
}

/// The largest scores of four rows from `first` on; where fewer are left the last one is taken again.
inline fn largestScores(scratch: *const Scratch, first: u32, row_count: u32) @Vector(rows_at_once, f32) {
    var most: [rows_at_once]Vector = undefined;
    inline for (&most, 0..) |*vector, i| {
        const scores = &scratch.scores[@min(first + i, row_count - 1)];
        vector.* = @splat(negative_infinity);
        for (0..score_vectors) |v| vector.* = simd.larger(scores[v * lanes ..][0..lanes].*, vector.*);
    }
    return simd.largestFour(most);
}

/// No code stands for more: at most 128 scales, and a min.
const code_value_max = 512 * std.math.floatMax(f16);

/// Whether no sum of products of these queries and keys, nor a partial one, can leave the range of f32. Keys that have that
/// range themselves are not bounded; codes are by what a scale and a min of f16 may make.
fn areScoresBounded(task: *const table.AttendTask) bool {
    const key_max: f32 = switch (task.tile.storage.dtype_k) {
        .f32, .bf16 => std.math.floatMax(f32),
        .f16 => std.math.floatMax(f16),
        .q8_0, .q4_0, .i8, .i4, .i2 => code_value_max,
    };
    return task.query_max * @as(f32, @floatFromInt(task.head_dim)) < 0.5 * std.math.floatMax(f32) / key_max;
}

/// Biases the scores of a row. Scores that the row may not see become -Inf, those that left the range of f32 NaN; no other
/// one is infinite.
fn maskRow(softcap: f32, row: *const table.QueryRow, tokens: *const TileTokens, scores: *[tile_tokens]f32) void {
    var token: u32 = 0;
    while (token < tile_tokens) : (token += lanes) {
        const positions: VectorU32 = tokens.positions[token..][0..lanes].*;
        const plain: Vector = scores[token..][0..lanes].*;
        var score = plain;
        if (softcap != 0) {
            const cap: Vector = @splat(softcap);
            score = cap * exp.tanh(score / cap);
        }
        if (row.alibi_slope != 0) {
            const behind = @as(VectorU32, @splat(row.position)) -% positions;
            const distance: Vector = @floatFromInt(@as(simd.VectorI32, @bitCast(behind)));
            score = score - @as(Vector, @splat(row.alibi_slope)) * distance;
        }
        const slots = @as(VectorU32, @splat(token)) + std.simd.iota(u32, lanes);
        const in_tile = slots < @as(VectorU32, @splat(tokens.token_count));
        const in_window = simd.both(
            positions >= @as(VectorU32, @splat(row.first)),
            positions < @as(VectorU32, @splat(row.end)),
        );
        const in_sink = positions < @as(VectorU32, @splat(row.sink_end));
        const visible = simd.both(in_tile, simd.either(in_window, in_sink));
        // A cap makes a number of an infinite score, which need not be the right one.
        const largest: Vector = @splat(std.math.floatMax(f32));
        const is_finite = simd.both(@abs(plain) <= largest, @abs(score) <= largest);
        score = @select(f32, is_finite, score, @as(Vector, @splat(std.math.nan(f32))));
        scores[token..][0..lanes].* = @select(f32, visible, score, @as(Vector, @splat(negative_infinity)));
    }
    if (tokens.position_last >= row.tree_first) maskTree(row, tokens, scores);
}

/// Hides the positions of a tree that a row does not descend from.
fn maskTree(row: *const table.QueryRow, tokens: *const TileTokens, scores: *[tile_tokens]f32) void {
    for (scores[0..tokens.token_count], tokens.positions[0..tokens.token_count]) |*score, position| {
        if (position < row.tree_first) continue;
        const node = position - row.tree_first;
        if (node >= 64 or row.tree_mask >> @intCast(node) & 1 == 0) score.* = negative_infinity;
    }
}

test {
    _ = @import("amx_test.zig");
    _ = @import("attend_test.zig");
    _ = @import("digits.zig");
    _ = @import("prefetch.zig");
}
