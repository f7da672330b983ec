//! Attention over float rows: f32, f16 and bf16 keys and values of one KV head.
//!
//! Positions are taken in tiles of 64. For each tile, in three passes:
//!
//!     1. scores[row][token] = query . key            every key is loaded once for all query rows
//!     2. weights = exp(score - running maximum)      the online softmax; older sums are rescaled
//!     3. sums[row][dim] += weight * value            every value is loaded once for all query rows
//!
//! A tile lies within a multiple of 64 positions and knows its rows by pointer, so neither slabs nor blocks show in the
//! result; and no number below depends on how many query rows stand beside a row. What a row gets is a function of its
//! query, the stored bytes and the level alone.
//!
//! Not here: threads, blocks, tables. A tile is what fits the first cache level (64 rows of 128 f16 are 16 KiB).

const std = @import("std");
const assert = std.debug.assert;
const convert = @import("convert.zig");
const softmax = @import("softmax.zig");
const table = @import("table.zig");
const Dtype = @import("../dtype.zig").Dtype;

const lanes = convert.lanes;
const Vector = convert.Vector;
const tile_tokens = table.tile_tokens;
const row_count_max = table.row_count_max;
const negative_infinity = -std.math.inf(f32);

/// Rows that share the registers of one pass: 4 rows * 4 tokens are 16 accumulators, half of 32 vector registers. With
/// 16 registers (SSE, AVX2) it is 2 rows.
const row_block = if (lanes == 16 or @import("builtin").cpu.arch == .aarch64) 4 else 2;

/// Keys that share one load of the queries.
const token_block = 4;

/// Vectors of head_dim that one sweep over a tile's values accumulates.
const dim_block = 4;

/// The rows of a tile, one by one.
const TileRows = struct {
    token_count: u32,
    /// Absolute position of each token; behind the last one it repeats.
    positions: [tile_tokens]u32,
    keys: [tile_tokens][*]const u8,
    values: [tile_tokens][*]const u8,

    fn fill(rows: *TileRows, task: *const table.AttendTask, runs: []const table.Run) void {
        rows.token_count = 0;
        for (runs) |run| {
            for (0..run.token_count) |i| {
                const slot = rows.token_count + i;
                rows.positions[slot] = run.position + @as(u32, @intCast(i));
                rows.keys[slot] = run.keys + i * task.token_stride_k;
                rows.values[slot] = run.values + i * task.token_stride_v;
            }
            rows.token_count += run.token_count;
        }
        if (rows.token_count == 0) return;
        // The last row is repeated until whole blocks of tokens can be read.
        const last = rows.token_count - 1;
        for (rows.token_count..std.mem.alignForward(u32, rows.token_count, token_block)) |slot| {
            rows.positions[slot] = rows.positions[last];
            rows.keys[slot] = rows.keys[last];
            rows.values[slot] = rows.values[last];
        }
    }
};

/// The tile at work.
const Tile = struct {
    rows: TileRows,
    /// What is read next: asked for bit by bit while this tile computes, which takes about ten times as long as memory
    /// takes to answer.
    next: TileRows,
    /// Scores, later weights, [row][token].
    scores: [row_count_max][tile_tokens]f32 align(64),
};

/// See `Table.attend`.
pub fn attend(task: *const table.AttendTask) callconv(.c) void {
    assert(task.row_count >= 1 and task.row_count <= row_count_max);
    assert(task.head_dim_padded % table.lanes_max == 0);
    var tile: Tile = undefined;
    tile.rows.fill(task, task.runs[0..task.run_count]);
    tile.next.fill(task, task.ahead[0..task.ahead_count]);
    if (tile.rows.token_count == 0) return;
    assert(tile.rows.positions[0] / tile_tokens == tile.rows.positions[tile.rows.token_count - 1] / tile_tokens);
    attendTile(task, &tile);
}

fn attendTile(task: *const table.AttendTask, tile: *Tile) void {
    switch (task.dtype_k) {
        inline else => |dtype| scoreTile(dtype, task, tile),
    }
    for (task.rows[0..task.row_count], 0..) |*row, r| {
        const sums = task.sums[r * task.head_dim_padded ..][0..task.head_dim_padded];
        weighTile(task.softcap, row, sums, &tile.rows, &tile.scores[r]);
    }
    switch (task.dtype_v) {
        inline else => |dtype| accumulateTile(dtype, task, tile),
    }
}

/// Asks for `byte_count` bytes of a row, one line of 64 bytes at a time, into the second cache level: the first one's few
/// miss buffers are for what is needed now (f16, 8 heads, Zen 5: 18 GB/s into the first level, 25 GB/s into the second).
inline fn prefetchRow(row: [*]const u8, byte_count: u32) void {
    var at: u32 = 0;
    while (at < byte_count) : (at += 64) @prefetch(row + at, .{ .locality = 2 });
}

/// Pass 1: scores[row][token] = query . key.
fn scoreTile(comptime dtype: Dtype, task: *const table.AttendTask, tile: *Tile) void {
    var token: u32 = 0;
    while (token < tile.rows.token_count) : (token += token_block) {
        const keys = tile.rows.keys[token..][0..token_block];
        if (token < tile.next.token_count) {
            for (tile.next.keys[token..][0..token_block]) |row| prefetchRow(row, task.head_dim * comptime dtype.elementBytes());
        }
        var r: u32 = 0;
        while (r + row_block <= task.row_count) : (r += row_block) {
            scoreBlock(dtype, row_block, task, keys, r, token, tile);
        }
        while (r < task.row_count) : (r += 1) scoreBlock(dtype, 1, task, keys, r, token, tile);
    }
}

inline fn scoreBlock(
    comptime dtype: Dtype,
    comptime row_count: u32,
    task: *const table.AttendTask,
    keys: *const [token_block][*]const u8,
    row_first: u32,
    token_first: u32,
    tile: *Tile,
) void {
    const element_bytes = comptime dtype.elementBytes();
    const queries = task.queries + row_first * task.head_dim_padded;
    var products: [row_count][token_block]Vector = @splat(@splat(@splat(0)));

    var dim: u32 = 0;
    while (dim + lanes <= task.head_dim) : (dim += lanes) {
        var key: [token_block]Vector = undefined;
        inline for (&key, keys) |*vector, source| vector.* = convert.load(dtype, source + dim * element_bytes);
        inline for (0..row_count) |r| {
            const query: Vector = queries[r * task.head_dim_padded + dim ..][0..lanes].*;
            inline for (0..token_block) |t| products[r][t] = softmax.mulAdd(query, key[t], products[r][t]);
        }
    }
    if (dim < task.head_dim) {
        const rest = task.head_dim - dim;
        inline for (0..token_block) |t| {
            const key = convert.loadPartial(dtype, keys[t] + dim * element_bytes, rest);
            inline for (0..row_count) |r| {
                const query: Vector = queries[r * task.head_dim_padded + dim ..][0..lanes].*;
                products[r][t] = softmax.mulAdd(query, key, products[r][t]);
            }
        }
    }
    const product_count = row_count * token_block;
    if (product_count % lanes == 0) {
        const flat: [product_count]Vector = @bitCast(products);
        inline for (0..product_count / lanes) |chunk| {
            const sums: [lanes]f32 = softmax.sumLanes(flat[chunk * lanes ..][0..lanes].*);
            inline for (0..lanes / token_block) |i| {
                const r = chunk * lanes / token_block + i;
                tile.scores[row_first + r][token_first..][0..token_block].* = sums[i * token_block ..][0..token_block].*;
            }
        }
    } else inline for (0..row_count) |r| {
        const p = products[r];
        tile.scores[row_first + r][token_first..][0..token_block].* = softmax.sumFour(p[0], p[1], p[2], p[3]);
    }
}

/// Pass 2: bias and mask the scores of one row, move its maximum, turn scores into weights.
fn weighTile(softcap: f32, row: *table.Row, sums: []f32, tile: *const TileRows, scores: *[tile_tokens]f32) void {
    var tile_max: Vector = @splat(negative_infinity);
    var token: u32 = 0;
    while (token < tile.token_count) : (token += lanes) {
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
        score = @select(f32, visible, score, @as(Vector, @splat(negative_infinity)));
        scores[token..][0..lanes].* = score;
        tile_max = @max(tile_max, score);
    }
    if (tile.positions[tile.token_count - 1] >= row.tree_first) tile_max = @splat(maskTree(row, tile, scores));

    const score_max = @max(row.score_max, @reduce(.Max, tile_max));
    if (score_max == negative_infinity) {
        // Nothing visible so far: exp(-Inf - -Inf) would be NaN.
        @memset(scores[0..tile.token_count], 0);
        return;
    }
    if (score_max != row.score_max) {
        const rescale = softmax.exp(@as(Vector, @splat(row.score_max - score_max)));
        row.score_max = score_max;
        row.weight_sum *= rescale[0];
        var dim: usize = 0;
        while (dim < sums.len) : (dim += lanes) {
            const old: Vector = sums[dim..][0..lanes].*;
            sums[dim..][0..lanes].* = old * rescale;
        }
    }
    var tile_sum: Vector = @splat(0);
    token = 0;
    while (token < tile.token_count) : (token += lanes) {
        const score: Vector = scores[token..][0..lanes].*;
        const weight = softmax.exp(score - @as(Vector, @splat(score_max)));
        scores[token..][0..lanes].* = weight;
        tile_sum += weight;
    }
    row.weight_sum += softmax.sum(tile_sum);
}

/// Hides the positions of a tree that a row does not descend from, and returns the largest score left.
fn maskTree(row: *const table.Row, tile: *const TileRows, scores: *[tile_tokens]f32) f32 {
    var score_max = negative_infinity;
    for (scores[0..tile.token_count], tile.positions[0..tile.token_count]) |*score, position| {
        if (position >= row.tree_first) {
            const node = position - row.tree_first;
            if (node >= 64 or row.tree_mask >> @intCast(node) & 1 == 0) score.* = negative_infinity;
        }
        score_max = @max(score_max, score.*);
    }
    return score_max;
}

inline fn and_(a: @Vector(lanes, bool), b: @Vector(lanes, bool)) @Vector(lanes, bool) {
    return @select(bool, a, b, @as(@Vector(lanes, bool), @splat(false)));
}

inline fn or_(a: @Vector(lanes, bool), b: @Vector(lanes, bool)) @Vector(lanes, bool) {
    return @select(bool, a, @as(@Vector(lanes, bool), @splat(true)), b);
}

/// Pass 3: sums[row][dim] += weight * value, tokens in order.
fn accumulateTile(comptime dtype: Dtype, task: *const table.AttendTask, tile: *const Tile) void {
    var r: u32 = 0;
    while (r + row_block <= task.row_count) : (r += row_block) accumulateRows(dtype, row_block, task, tile, r);
    while (r < task.row_count) : (r += 1) accumulateRows(dtype, 1, task, tile, r);
}

fn accumulateRows(
    comptime dtype: Dtype,
    comptime row_count: u32,
    task: *const table.AttendTask,
    tile: *const Tile,
    row_first: u32,
) void {
    var dim: u32 = 0;
    while (dim + dim_block * lanes <= task.head_dim) : (dim += dim_block * lanes) {
        accumulateDims(dtype, row_count, dim_block, task, tile, row_first, dim, lanes);
    }
    while (dim + lanes <= task.head_dim) : (dim += lanes) {
        accumulateDims(dtype, row_count, 1, task, tile, row_first, dim, lanes);
    }
    if (dim < task.head_dim) {
        accumulateDims(dtype, row_count, 1, task, tile, row_first, dim, task.head_dim - dim);
    }
}

inline fn accumulateDims(
    comptime dtype: Dtype,
    comptime row_count: u32,
    comptime vector_count: u32,
    task: *const table.AttendTask,
    tile: *const Tile,
    row_first: u32,
    dim_first: u32,
    /// Elements of the last vector; below `lanes` only for a single vector at the end of a row.
    element_count: u32,
) void {
    const element_bytes = comptime dtype.elementBytes();
    const sums = task.sums + row_first * task.head_dim_padded + dim_first;
    var sum: [row_count][vector_count]Vector = undefined;
    inline for (&sum, 0..) |*row, r| {
        inline for (row, 0..) |*vector, i| vector.* = sums[r * task.head_dim_padded + i * lanes ..][0..lanes].*;
    }
    for (tile.rows.values[0..tile.rows.token_count], 0..) |source, token| {
        if (row_first == 0 and token < tile.next.token_count) {
            prefetchRow(tile.next.values[token] + dim_first * element_bytes, vector_count * lanes * element_bytes);
        }
        var value: [vector_count]Vector = undefined;
        inline for (&value, 0..) |*vector, i| {
            const at = source + (dim_first + i * lanes) * element_bytes;
            vector.* = if (vector_count == 1 and element_count < lanes)
                convert.loadPartial(dtype, at, element_count)
            else
                convert.load(dtype, at);
        }
        inline for (0..row_count) |r| {
            const weight: Vector = @splat(tile.scores[row_first + r][token]);
            inline for (0..vector_count) |i| sum[r][i] = softmax.mulAdd(weight, value[i], sum[r][i]);
        }
    }
    inline for (sum, 0..) |row, r| {
        inline for (row, 0..) |vector, i| sums[r * task.head_dim_padded + i * lanes ..][0..lanes].* = vector;
    }
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
