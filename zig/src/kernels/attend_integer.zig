//! Attention over planes of codes: passes 1 and 3 of `attend.zig` for q8_0, q4_0, i8, i4 and i2 sides.
//!
//! Codes are never turned into floats. Scales and mins go to the small operand, which then becomes numbers of two digits
//! (`digits.zig`), and what is left is a sum of products of bytes (`dot.zig`):
//!
//!     i8 i4 i2 keys      sum (code * scale[dim] + min[dim]) * q[dim]
//!                        = sum code * (scale[dim] * q[dim])  +  sum min[dim] * q[dim]
//!     q8_0 q4_0 keys     sum over groups of 32 dims: scale[group][token] * sum (code - offset) * q[dim]
//!     values             the same with weight[token] for q[dim]: scale and min are those of a token and a group of dims,
//!                        so each group has its own small operand
//!
//! Of a tile only whole 64 tokens are computed; tokens that nobody may see weigh 0. Every number is a function of one row
//! of queries and one tile: neither the rows beside it nor the other tokens of the block show.

const std = @import("std");
const assert = std.debug.assert;
const convert = @import("convert.zig");
const digits_of = @import("digits.zig");
const dot = @import("dot.zig");
const group = @import("../group.zig");
const softmax = @import("softmax.zig");
const table = @import("table.zig");
const Ahead = @import("ahead.zig").Ahead;
const Dtype = @import("../dtype.zig").Dtype;
const Queries = @import("tile.zig").Queries;
const Tile = @import("tile.zig").Tile;

const lanes = convert.lanes;
const Vector = convert.Vector;
const rows_at_once = softmax.rows_at_once;
const tile_tokens = table.tile_tokens;
const row_count_max = table.row_count_max;
const head_dim_max = table.head_dim_max;

/// Rows that share the registers of one pass, each with two digits for `part_count` vectors of lanes: 16 accumulators of
/// 32 registers; 8 where there are 16.
const row_block = if (lanes == 16 or @import("builtin").cpu.arch == .aarch64) 4 else 2;

/// Vectors of lanes that share one load of the digits.
const part_count = 2;

const block_lanes = part_count * lanes;

comptime {
    assert(tile_tokens % block_lanes == 0 and group.dim_multiple % block_lanes == 0);
    // The largest sum of a dot product, with the codes as they are loaded: 255 * 127 for each of head_dim_max dims, 128
    // times in the end, less what the offset adds.
    assert(128 * 255 * 127 * head_dim_max < std.math.maxInt(i32));
}

/// Lines that a step asks for: half of those it reads. The others are asked for while digits and weights are made.
fn linesAStep() u32 {
    return @max(1, block_lanes * group.quad / 64 / 2);
}

/// How many rows are taken together when `rest` of them are left.
inline fn blockOf(rest: u32) u32 {
    return if (rest >= row_block) row_block else if (rest >= 2) 2 else 1;
}

/// What a code holds more than its value, as `dot.load` gives it: a multiple of the sum of the numbers that a sum has too
/// much.
fn codeOffset(comptime dtype: Dtype) comptime_int {
    return switch (dtype) {
        .q8_0, .i8 => dot.code_offset,
        .q4_0 => 8,
        .i4, .i2 => 0,
        else => comptime unreachable,
    };
}

/// Of how many numbers a total is needed, where one product has `number_count`.
fn totalNumbers(comptime dtype: Dtype, comptime number_count: u32) u32 {
    return if (codeOffset(dtype) == 0) 0 else number_count;
}

/// The codes of some lanes, [part]: `stride` bytes from vector to vector, which hold four or more sums each.
const Codes = [part_count][*]const u8;

/// The codes of `block_lanes` lanes from `lane` on; `strip_bytes` is from 16 lanes to the next 16.
inline fn codesAt(bytes: [*]const u8, lane: u32, strip_bytes: u32) Codes {
    var codes: Codes = undefined;
    inline for (&codes, 0..) |*part, i| {
        const at = lane + i * lanes;
        part.* = bytes + at / group.lane_count * strip_bytes + at % group.lane_count * group.quad;
    }
    return codes;
}

/// [row][part]: 128 * high + low sums of `number_count` products.
inline fn dotRows(
    comptime dtype: Dtype,
    comptime row_count: u32,
    codes: Codes,
    /// [row]
    digits: anytype,
    number_first: u32,
    number_count: u32,
    ahead: *Ahead,
) [row_count][part_count]dot.Sums {
    const bits = comptime dtype.codeBits();
    var high: [row_count][part_count]dot.Sums = @splat(@splat(@splat(0)));
    var low: [row_count][part_count]dot.Sums = @splat(@splat(@splat(0)));
    var place = ahead.place;
    if (comptime dot.mustFold(bits)) {
        var first = number_first;
        while (first < number_first + number_count) : (first += dot.fold_numbers) {
            var high_pairs: [row_count][part_count]dot.Partial(bits) = @splat(@splat(@splat(0)));
            var low_pairs: [row_count][part_count]dot.Partial(bits) = @splat(@splat(@splat(0)));
            addRows(bits, row_count, &high_pairs, &low_pairs, codes, digits, first, dot.fold_numbers, ahead, &place);
            inline for (0..row_count) |r| inline for (0..part_count) |p| {
                high[r][p] +%= dot.fold(high_pairs[r][p]);
                low[r][p] +%= dot.fold(low_pairs[r][p]);
            };
        }
    } else {
        addRows(bits, row_count, &high, &low, codes, digits, number_first, number_count, ahead, &place);
    }
    ahead.place = place;
    var sums: [row_count][part_count]dot.Sums = undefined;
    inline for (0..row_count) |r| {
        const excess = if (codeOffset(dtype) == 0) 0 else codeOffset(dtype) *% digits[r].totals[number_first / number_count];
        inline for (0..part_count) |p| {
            sums[r][p] = (high[r][p] << @splat(7)) +% low[r][p] -% @as(dot.Sums, @splat(excess));
        }
    }
    return sums;
}

/// Adds `number_count` products to both digits of [row][part].
inline fn addRows(
    comptime bits: u4,
    comptime row_count: u32,
    high: *[row_count][part_count]dot.Partial(bits),
    low: *[row_count][part_count]dot.Partial(bits),
    codes: Codes,
    digits: anytype,
    number_first: u32,
    number_count: u32,
    ahead: *const Ahead,
    place: *Ahead.Place,
) void {
    const vector_numbers = comptime group.quad * dot.vectorCount(bits);
    var number = number_first;
    while (number < number_first + number_count) : (number += vector_numbers) {
        ahead.step(comptime linesAStep(), place);
        var loaded: [part_count][dot.vectorCount(bits)]dot.Codes = undefined;
        inline for (&loaded, codes) |*part, source| {
            part.* = dot.load(bits, source + number / vector_numbers * group.vector_bytes);
        }
        inline for (0..dot.vectorCount(bits)) |i| inline for (0..row_count) |r| {
            const high_quad = dot.broadcast(digits[r].high[number + i * group.quad ..][0..group.quad]);
            const low_quad = dot.broadcast(digits[r].low[number + i * group.quad ..][0..group.quad]);
            inline for (0..part_count) |p| {
                high[r][p] = dot.add(bits, high[r][p], loaded[p][i], high_quad);
                low[r][p] = dot.add(bits, low[r][p], loaded[p][i], low_quad);
            }
        };
    }
}

/// The shape of a side of the tile.
pub inline fn planeOf(comptime dtype: Dtype, comptime side: group.Side, task: *const table.AttendTask) group.Plane {
    const plane: group.Plane = .{
        .dtype = dtype,
        .side = side,
        .block_size = task.tile.storage.block_size,
        .head_dim = task.head_dim,
    };
    assert(plane.isValid());
    return plane;
}

/// Pass 1: scores[row][token] = query . key.
pub fn scoreTile(comptime dtype: Dtype, task: *const table.AttendTask, tile: *Tile) void {
    @setEvalBranchQuota(10_000); // what is inlined counts as one function
    assert(task.head_dim <= head_dim_max);
    const plane = planeOf(dtype, .keys, task);
    const vector_count = task.head_dim / group.quad / comptime dot.vectorCount(dtype.codeBits());
    tile.keys_ahead.reserve(tile_tokens / block_lanes * vector_count * linesAStep());
    var token: u32 = 0;
    while (token < tile_tokens) : (token += block_lanes) {
        var r: u32 = 0;
        while (r < task.row_count) {
            const block = blockOf(task.row_count - r);
            switch (block) {
                inline 1, 2, 4 => |row_count| if (row_count <= row_block) {
                    scoreBlock(dtype, row_count, task, plane, r, token, tile);
                },
                else => unreachable,
            }
            r += block;
        }
    }
}

/// The digits of a head's queries for the keys at `plane_bytes`, and their share of the mins.
pub fn setQueries(
    comptime dtype: Dtype,
    task: *const table.AttendTask,
    /// [row][head_dim_padded]
    of_head: [*]const f32,
    plane_bytes: [*]const u8,
    ahead: *Ahead,
    queries: *Queries,
) void {
    @setEvalBranchQuota(10_000); // what is inlined counts as one function
    var r: u32 = 0;
    while (r < task.row_count) {
        const count = softmax.rowsAtOnce(task.row_count - r);
        switch (count) {
            inline 1, rows_at_once => |row_count| setQueryRows(dtype, row_count, task, of_head, plane_bytes, ahead, queries, r),
            else => unreachable,
        }
        r += count;
    }
}

/// Of a few rows: each waits for the largest of its values, and all of them together.
inline fn setQueryRows(
    comptime dtype: Dtype,
    comptime row_count: u32,
    task: *const table.AttendTask,
    /// [row][head_dim_padded]
    of_head: [*]const f32,
    plane_bytes: [*]const u8,
    ahead: *Ahead,
    queries: *Queries,
    first: u32,
) void {
    const plane = planeOf(dtype, .keys, task);
    const scales = plane_bytes + plane.codeBytes();
    const mins = plane_bytes + plane.minOffset();
    var scaled: [row_count][head_dim_max]f32 align(64) = undefined;
    var magnitudes: [rows_at_once]digits_of.Magnitudes = @splat(.{});
    var constants: [rows_at_once]Vector = @splat(@splat(0));
    // Not in the loop, whose sums fill the vector registers.
    ahead.ask(ahead.share / 8);
    var dim: u32 = 0;
    while (dim < task.head_dim) : (dim += lanes) {
        const scale = if (comptime dtype.isAffine()) convert.load(.f16, scales + 2 * dim);
        const min = if (comptime dtype.isAffine()) convert.load(.f16, mins + 2 * dim);
        inline for (0..row_count) |i| {
            var elements: Vector = of_head[(first + i) * task.head_dim_padded + dim ..][0..lanes].*;
            if (comptime dtype.isAffine()) {
                constants[i] = softmax.mulAdd(elements, min, constants[i]);
                elements *= scale;
            }
            scaled[i][dim..][0..lanes].* = elements;
            magnitudes[i].add(elements);
        }
    }
    const rows = queries.digits[first..][0..row_count];
    Queries.Row.choose(rows, magnitudes);
    if (comptime dtype.isAffine()) {
        const sums: [rows_at_once]f32 = softmax.sumFour(constants);
        queries.constants[first..][0..row_count].* = sums[0..row_count].*;
    }
    for (rows, &scaled) |*digits, *values| {
        ahead.ask(ahead.share / 16);
        digits.write(comptime totalNumbers(dtype, if (dtype.isAffine()) head_dim_max else group.record_values), values, task.head_dim);
    }
}

inline fn scoreBlock(
    comptime dtype: Dtype,
    comptime row_count: u32,
    task: *const table.AttendTask,
    plane: group.Plane,
    row_first: u32,
    token_first: u32,
    tile: *Tile,
) void {
    const queries = tile.queries();
    const bytes = tile.rows.plane_k;
    const token = task.tile.storage.tile_token + token_first;
    const codes = codesAt(bytes, token, plane.codeBytes() / (plane.block_size / group.lane_count));
    const digits = queries.digits[row_first..][0..row_count];
    var scores: [row_count][part_count]Vector = @splat(@splat(@splat(0)));
    if (comptime dtype.isAffine()) {
        const sums = dotRows(dtype, row_count, codes, digits, 0, task.head_dim, &tile.keys_ahead);
        inline for (0..row_count) |r| inline for (0..part_count) |p| {
            const step: Vector = @splat(digits[r].step);
            const constant: Vector = @splat(queries.constants[row_first + r]);
            scores[r][p] = softmax.mulAdd(@as(Vector, @floatFromInt(sums[r][p])), step, constant);
        };
    } else {
        var scales = bytes + plane.codeBytes() + 2 * token;
        var dim: u32 = 0;
        while (dim < task.head_dim) : (dim += group.record_values) {
            const sums = dotRows(dtype, row_count, codes, digits, dim, group.record_values, &tile.keys_ahead);
            inline for (0..part_count) |p| {
                const scale = convert.load(.f16, scales + 2 * p * lanes);
                inline for (0..row_count) |r| {
                    scores[r][p] = softmax.mulAdd(@as(Vector, @floatFromInt(sums[r][p])), scale, scores[r][p]);
                }
            }
            scales += 2 * plane.block_size;
        }
        inline for (0..row_count) |r| inline for (0..part_count) |p| {
            scores[r][p] *= @splat(digits[r].step);
        };
    }
    inline for (0..row_count) |r| inline for (0..part_count) |p| {
        tile.scores[row_first + r][token_first + p * lanes ..][0..lanes].* = scores[r][p];
    };
}

/// Weights of a tile's values, for one group of dims.
pub const Weights = struct {
    digits: [row_count_max]digits_of.Digits(tile_tokens),
    /// What the mins add to every sum.
    constants: [row_count_max]f32,
};

/// Pass 3: sums[row][dim] += weight * value.
pub fn accumulateTile(comptime dtype: Dtype, task: *const table.AttendTask, tile: *Tile) void {
    @setEvalBranchQuota(10_000); // what is inlined counts as one function
    const plane = planeOf(dtype, .values, task);
    const vector_count = tile_tokens / group.quad / comptime dot.vectorCount(dtype.codeBits());
    tile.values_ahead.reserve(task.head_dim / block_lanes * vector_count * linesAStep());
    const group_size = plane.groupSize();
    // Those of the next group are made before they are needed: both wait for different things, and so together.
    var weights: [2]Weights = undefined;
    setWeights(dtype, task, tile, 0, &weights[0]);
    var dim: u32 = 0;
    while (dim < task.head_dim) : (dim += block_lanes) {
        const dim_group = dim / group_size;
        if (dim % group_size == 0 and dim + group_size < task.head_dim) {
            setWeights(dtype, task, tile, dim_group + 1, &weights[(dim_group + 1) % 2]);
        }
        var r: u32 = 0;
        while (r < task.row_count) {
            const block = blockOf(task.row_count - r);
            switch (block) {
                inline 1, 2, 4 => |row_count| if (row_count <= row_block) {
                    accumulateBlock(dtype, row_count, task, plane, &weights[dim_group % 2], r, dim, tile);
                },
                else => unreachable,
            }
            r += block;
        }
    }
    tile.values_ahead.askRest();
}

/// The digits of all rows' weights for one group of dims, and their share of the mins.
pub fn setWeights(
    comptime dtype: Dtype,
    task: *const table.AttendTask,
    tile: *Tile,
    dim_group: u32,
    weights: *Weights,
) void {
    const plane = planeOf(dtype, .values, task);
    const first = 2 * (dim_group * plane.block_size + task.tile.storage.tile_token);
    const scales = tile.rows.plane_v + plane.codeBytes() + first;
    const mins = tile.rows.plane_v + plane.minOffset() + first;
    var scale: [tile_tokens / lanes]Vector = undefined;
    var min: [tile_tokens / lanes]Vector = undefined;
    inline for (&scale, &min, 0..) |*s, *m, i| {
        s.* = convert.load(.f16, scales + 2 * i * lanes);
        if (comptime dtype.isAffine()) m.* = convert.load(.f16, mins + 2 * i * lanes);
    }
    var r: u32 = 0;
    while (r < task.row_count) {
        const count = softmax.rowsAtOnce(task.row_count - r);
        switch (count) {
            inline 1, rows_at_once => |row_count| setWeightRows(dtype, row_count, tile, &scale, &min, weights, r),
            else => unreachable,
        }
        r += count;
    }
}

inline fn setWeightRows(
    comptime dtype: Dtype,
    comptime row_count: u32,
    tile: *Tile,
    scale: *const [tile_tokens / lanes]Vector,
    min: *const [tile_tokens / lanes]Vector,
    weights: *Weights,
    first: u32,
) void {
    var scaled: [row_count][tile_tokens]f32 align(64) = undefined;
    var magnitudes: [rows_at_once]digits_of.Magnitudes = @splat(.{});
    var constants: [rows_at_once]Vector = @splat(@splat(0));
    inline for (0..row_count) |r| inline for (scale, min, 0..) |s, m, i| {
        const weight: Vector = tile.scores[first + r][i * lanes ..][0..lanes].*;
        scaled[r][i * lanes ..][0..lanes].* = weight * s;
        magnitudes[r].add(weight * s);
        if (comptime dtype.isAffine()) constants[r] = softmax.mulAdd(weight, m, constants[r]);
    };
    const rows = weights.digits[first..][0..row_count];
    digits_of.Digits(tile_tokens).choose(rows, magnitudes);
    if (comptime dtype.isAffine()) {
        const sums: [rows_at_once]f32 = softmax.sumFour(constants);
        weights.constants[first..][0..row_count].* = sums[0..row_count].*;
    } else {
        weights.constants[first..][0..row_count].* = @splat(0);
    }
    for (rows, &scaled) |*digits, *values| {
        tile.values_ahead.ask(tile.values_ahead.share / 32);
        digits.write(comptime totalNumbers(dtype, tile_tokens), values, tile_tokens);
    }
}

inline fn accumulateBlock(
    comptime dtype: Dtype,
    comptime row_count: u32,
    task: *const table.AttendTask,
    plane: group.Plane,
    weights: *const Weights,
    row_first: u32,
    dim: u32,
    tile: *Tile,
) void {
    const token_bytes = group.lane_count * @as(u32, comptime dtype.codeBits()) / 8;
    const bytes = tile.rows.plane_v + task.tile.storage.tile_token * token_bytes;
    const codes = codesAt(bytes, dim, plane.block_size * token_bytes);
    const digits = weights.digits[row_first..][0..row_count];
    const products = dotRows(dtype, row_count, codes, digits, 0, tile_tokens, &tile.values_ahead);
    inline for (0..row_count) |r| inline for (0..part_count) |p| {
        const step: Vector = @splat(digits[r].step);
        const at = task.sums[(row_first + r) * task.head_dim_padded + dim + p * lanes ..][0..lanes];
        const constant: Vector = @splat(weights.constants[row_first + r]);
        at.* = softmax.mulAdd(@as(Vector, @floatFromInt(products[r][p])), step, @as(Vector, at.*) + constant);
    };
}
