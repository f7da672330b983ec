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
//! All 64 tokens of a tile are computed; those that nobody may see weigh 0. Every number is a function of one query row and
//! one tile: neither the rows attended with it nor the other tokens of the block show.

const std = @import("std");
const assert = std.debug.assert;
const convert = @import("../convert.zig");
const digits_of = @import("digits.zig");
const dot = @import("dot.zig");
const group = @import("../../group.zig");
const pack = @import("../codec/pack.zig");
const simd = @import("../lanes.zig");
const table = @import("../table.zig");
const PrefetchQueue = @import("prefetch.zig").PrefetchQueue;
const Dtype = @import("../../dtype.zig").Dtype;
const QueryDigits = @import("scratch.zig").QueryDigits;
const Scratch = @import("scratch.zig").Scratch;

const lanes = simd.lanes;
const Vector = simd.Vector;
const rows_at_once = simd.rows_at_once;
const tile_tokens = table.tile_tokens;
const row_count_max = table.query_row_count_max;
const head_dim_max = table.head_dim_max;

/// Query rows that share the registers of one pass, each with two digits for `vectors_at_once` vectors of lanes: 16
/// accumulators in 32 registers, 8 in 16.
const row_block = simd.register_count / 8;

/// Vectors of lanes that share one load of the digits.
const vectors_at_once = 2;

const block_lanes = vectors_at_once * lanes;

comptime {
    assert(tile_tokens % block_lanes == 0 and group.dim_multiple % block_lanes == 0);
    // The largest sum of a dot product, with the codes as they are loaded: 255 * 127 for each of head_dim_max dims, 128
    // times in the end, less what the offset adds.
    assert(255 * table.number_max * head_dim_max < std.math.maxInt(i32));
    // 128 * high is a shift.
    assert(1 << pack.low_bits == table.digit_base);
}

/// Cache lines that a step prefetches: half of those it reads. The others are prefetched while digits and weights are made.
fn linesAStep() u32 {
    return @max(1, block_lanes * group.quad / simd.cache_line_bytes / 2);
}

/// Query rows that are taken together when `rest` of them are left.
inline fn blockOf(rest: u32) u32 {
    return if (rest >= row_block) row_block else if (rest >= 2) 2 else 1;
}

/// Blocks of query rows that are at work one after the other: they take turns in prefetching.
fn blockCount(row_count: u32) u32 {
    const rest = row_count % row_block;
    return row_count / row_block + rest / 2 + rest % 2;
}

/// Added to every code that `dot.load` gives. A dot product is therefore too large by `codeOffset * sum(digits)`, which
/// `dotRows` subtracts.
fn codeOffset(comptime dtype: Dtype) comptime_int {
    return switch (dtype) {
        .q8_0, .i8 => dot.code_offset,
        .q4_0, .i4, .i2 => dtype.codeZero(),
        else => comptime unreachable,
    };
}

/// The totals of digits that a format needs: none, where nothing is subtracted from its sums.
fn totalsOf(comptime dtype: Dtype, comptime totals: digits_of.Totals) digits_of.Totals {
    return if (codeOffset(dtype) == 0) .none else totals;
}

/// Codes of `vectors_at_once` vectors of lanes; each points at its first four or more sums.
const Codes = [vectors_at_once][*]const u8;

/// The codes of `block_lanes` lanes of the plane at `bytes`, those of `token` and `dim` and on.
inline fn codesAt(plane: group.Plane, bytes: [*]const u8, token: u32, dim: u32) Codes {
    var codes: Codes = undefined;
    inline for (&codes, 0..) |*part, i| {
        const lane: u32 = i * lanes;
        part.* = bytes + if (plane.side == .keys) plane.codeOffset(token + lane, dim) else plane.codeOffset(token, dim + lane);
    }
    return codes;
}

/// [row][vector]: 128 * high + low sums of `number_count` products.
inline fn dotRows(
    comptime dtype: Dtype,
    comptime row_count: u32,
    codes: Codes,
    /// [row]
    digits: anytype,
    number_first: u32,
    number_count: u32,
    prefetches: *PrefetchQueue,
    is_turn: bool,
) [row_count][vectors_at_once]dot.Sums {
    const bits = comptime dtype.codeBits();
    var high: [row_count][vectors_at_once]dot.Sums = @splat(@splat(@splat(0)));
    var low: [row_count][vectors_at_once]dot.Sums = @splat(@splat(@splat(0)));
    const step_count = number_count / group.quad / comptime dot.vectorCount(bits);
    var lines = prefetches.takeIf(is_turn, step_count * linesAStep(), codes[0]);
    if (comptime dot.mustFold(bits)) {
        var first = number_first;
        while (first < number_first + number_count) : (first += dot.fold_numbers) {
            var high_pairs: [row_count][vectors_at_once]dot.Partial(bits) = @splat(@splat(@splat(0)));
            var low_pairs: [row_count][vectors_at_once]dot.Partial(bits) = @splat(@splat(@splat(0)));
            addRows(bits, row_count, &high_pairs, &low_pairs, codes, digits, first, dot.fold_numbers, &lines);
            inline for (0..row_count) |r| inline for (0..vectors_at_once) |p| {
                high[r][p] +%= dot.fold(high_pairs[r][p]);
                low[r][p] +%= dot.fold(low_pairs[r][p]);
            };
        }
    } else {
        addRows(bits, row_count, &high, &low, codes, digits, number_first, number_count, &lines);
    }
    var sums: [row_count][vectors_at_once]dot.Sums = undefined;
    inline for (0..row_count) |r| {
        const excess = if (codeOffset(dtype) == 0) 0 else codeOffset(dtype) *% digits[r].totals[number_first / number_count];
        inline for (0..vectors_at_once) |p| {
            sums[r][p] = (high[r][p] << @splat(pack.low_bits)) +% low[r][p] -% @as(dot.Sums, @splat(excess));
        }
    }
    return sums;
}

/// Adds `number_count` products to both digits of [row][vector].
inline fn addRows(
    comptime bits: u4,
    comptime row_count: u32,
    high: *[row_count][vectors_at_once]dot.Partial(bits),
    low: *[row_count][vectors_at_once]dot.Partial(bits),
    codes: Codes,
    digits: anytype,
    number_first: u32,
    number_count: u32,
    lines: *PrefetchQueue.Lines,
) void {
    const vector_numbers = comptime group.quad * dot.vectorCount(bits);
    var number = number_first;
    while (number < number_first + number_count) : (number += vector_numbers) {
        lines.prefetch(comptime linesAStep());
        var loaded: [vectors_at_once][dot.vectorCount(bits)]dot.Codes = undefined;
        inline for (&loaded, codes) |*part, source| {
            part.* = dot.load(bits, source + number / vector_numbers * group.vector_bytes);
        }
        inline for (0..dot.vectorCount(bits)) |i| inline for (0..row_count) |r| {
            const high_quad = dot.broadcast(digits[r].high[number + i * group.quad ..][0..group.quad]);
            const low_quad = dot.broadcast(digits[r].low[number + i * group.quad ..][0..group.quad]);
            inline for (0..vectors_at_once) |p| {
                high[r][p] = dot.add(bits, high[r][p], loaded[p][i], high_quad);
                low[r][p] = dot.add(bits, low[r][p], loaded[p][i], low_quad);
            }
        };
    }
}

/// The plane of a side of the tile.
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

/// Lines that either pass prefetches for one head.
pub fn linesOfPass(comptime dtype: Dtype, task: *const table.AttendTask) u32 {
    const step_codes = comptime block_lanes * group.quad * dot.vectorCount(dtype.codeBits());
    return task.head_dim * tile_tokens / step_codes * linesAStep();
}

/// Pass 1: scores[row][token] = query . key.
pub fn scoreTile(comptime dtype: Dtype, task: *const table.AttendTask, scratch: *Scratch) void {
    @setEvalBranchQuota(10_000); // what is inlined counts as one function
    assert(task.head_dim <= head_dim_max);
    const plane = planeOf(dtype, .keys, task);
    const block_count = blockCount(task.row_count);
    var next_turn: u32 = 0;
    var token: u32 = 0;
    while (token < tile_tokens) : (token += block_lanes) {
        var turn = next_turn;
        next_turn = if (next_turn + 1 == block_count) 0 else next_turn + 1;
        var r = scratch.row_first;
        const row_end = r + task.row_count;
        while (r < row_end) {
            const block = blockOf(row_end - r);
            switch (block) {
                inline 1, 2, 4 => |row_count| if (row_count <= row_block) {
                    scoreBlock(dtype, row_count, task, plane, r, token, scratch, turn == 0);
                },
                else => unreachable,
            }
            r += block;
            turn -%= 1;
        }
    }
}

/// Writes the digits of all queries of a task, for keys of which each token has its own scales.
pub fn prepareQueries(task: *const table.AttendTask) void {
    const all_rows: [*]QueryDigits = @ptrCast(task.prepared);
    const rows = all_rows[0 .. task.head_count * task.row_count];
    const ones: [head_dim_max / lanes]Vector = @splat(@splat(1));
    for (rows, 0..) |*row, r| {
        const query = task.queries + r * task.head_dim_padded;
        var magnitudes: [rows_at_once]digits_of.Magnitudes = @splat(.{});
        var dim: u32 = 0;
        while (dim < task.head_dim) : (dim += lanes) magnitudes[0].add(query[dim..][0..lanes].*);
        QueryDigits.choose(row[0..1], magnitudes);
        _ = row.write(.groups, query, &ones, row.factor, task.head_dim);
    }
}

/// Writes the digits of the queries of the head at work, and their share of the mins, for keys of which each dim has a scale.
pub fn setQueries(comptime dtype: Dtype, task: *const table.AttendTask, scratch: *Scratch) void {
    @setEvalBranchQuota(10_000); // what is inlined counts as one function
    const plane = planeOf(dtype, .keys, task);
    const vector_count = task.head_dim / lanes;
    var scales: [head_dim_max / lanes]Vector = undefined;
    var mins: [head_dim_max / lanes]Vector = undefined;
    for (scales[0..vector_count], mins[0..vector_count], 0..) |*scale, *min, i| {
        const dim: u32 = @intCast(i * lanes);
        scale.* = convert.load(.f16, scratch.tokens.planeK() + plane.scaleOffset(0, dim));
        min.* = convert.load(.f16, scratch.tokens.planeK() + plane.minOffset(0, dim));
    }
    var r = scratch.row_first;
    const row_end = r + task.row_count;
    while (r < row_end) {
        const count = simd.rowsAtOnce(row_end - r);
        switch (count) {
            inline 1, rows_at_once => |row_count| {
                setQueryRows(dtype, row_count, task, scales[0..vector_count], mins[0..vector_count], scratch, r);
            },
            else => unreachable,
        }
        r += count;
    }
}

/// Does so for a few query rows: each waits for the largest of its values, and all of them together.
inline fn setQueryRows(
    comptime dtype: Dtype,
    comptime row_count: u32,
    task: *const table.AttendTask,
    scales: []const Vector,
    mins: []const Vector,
    scratch: *Scratch,
    first: u32,
) void {
    var magnitudes: [rows_at_once]digits_of.Magnitudes = @splat(.{});
    var constants: [rows_at_once]Vector = @splat(@splat(0));
    for (scales, mins, 0..) |scale, min, v| inline for (0..row_count) |i| {
        const elements: Vector = task.queries[(first + i) * task.head_dim_padded + v * lanes ..][0..lanes].*;
        constants[i] = simd.mulAdd(elements, min, constants[i]);
        magnitudes[i].add(elements * scale);
    };
    const rows = scratch.queries[first..][0..row_count];
    QueryDigits.choose(rows, magnitudes);
    const sums: [rows_at_once]f32 = simd.sumFour(constants);
    scratch.query_constants[first..][0..row_count].* = sums[0..row_count].*;
    const totals = comptime totalsOf(dtype, .whole);
    var total: [rows_at_once]simd.VectorI32 = @splat(@splat(0));
    inline for (rows, 0..) |*digits, i| {
        scratch.prefetches.prefetchSome();
        const query = task.queries + (first + i) * task.head_dim_padded;
        total[i] = digits.write(totals, query, scales.ptr, digits.factor, task.head_dim);
    }
    if (totals == .whole) QueryDigits.setTotals(rows, total, task.head_dim);
}

inline fn scoreBlock(
    comptime dtype: Dtype,
    comptime row_count: u32,
    task: *const table.AttendTask,
    plane: group.Plane,
    row_first: u32,
    token_first: u32,
    scratch: *Scratch,
    is_turn: bool,
) void {
    const bytes = scratch.tokens.planeK();
    const token = task.tile.storage.tile_token + token_first;
    const codes = codesAt(plane, bytes, token, 0);
    const digits = scratch.queryDigits(task)[row_first..][0..row_count];
    var scores: [row_count][vectors_at_once]Vector = @splat(@splat(@splat(0)));
    if (comptime dtype.isAffine()) {
        const sums = dotRows(dtype, row_count, codes, digits, 0, task.head_dim, &scratch.prefetches, is_turn);
        inline for (0..row_count) |r| inline for (0..vectors_at_once) |p| {
            const step: Vector = @splat(digits[r].step);
            const constant: Vector = @splat(scratch.query_constants[row_first + r]);
            scores[r][p] = simd.mulAdd(@as(Vector, @floatFromInt(sums[r][p])), step, constant);
        };
    } else {
        var scales = bytes + plane.scaleOffset(token, 0);
        var dim: u32 = 0;
        while (dim < task.head_dim) : (dim += group.record_values) {
            const sums = dotRows(dtype, row_count, codes, digits, dim, group.record_values, &scratch.prefetches, is_turn);
            inline for (0..vectors_at_once) |p| {
                const scale = convert.load(.f16, scales + group.scale_bytes * p * lanes);
                inline for (0..row_count) |r| {
                    scores[r][p] = simd.mulAdd(@as(Vector, @floatFromInt(sums[r][p])), scale, scores[r][p]);
                }
            }
            scales += plane.scaleStride();
        }
        inline for (0..row_count) |r| inline for (0..vectors_at_once) |p| {
            scores[r][p] *= @splat(digits[r].step);
        };
    }
    inline for (0..row_count) |r| inline for (0..vectors_at_once) |p| {
        scratch.scores[row_first + r][token_first + p * lanes ..][0..lanes].* = scores[r][p];
    };
}

/// Weights of a tile's values, for one group of dims.
pub const Weights = struct {
    digits: [row_count_max]Row,
    /// What the mins add to every sum.
    constants: [row_count_max]f32,

    const Row = digits_of.Digits(tile_tokens);
};

const scale_vectors = tile_tokens / lanes;

/// Steps of the numbers that weights times scales become, for each group of dims of a tile's values.
///
/// A weight is 1 at most, that of the largest score of its row in the tile. So the step is that of the largest scale, for
/// all rows alike: no weight has to be known before. A token whose scale is smaller has so much fewer bits of its weight,
/// and its values are smaller in the same measure.
pub const Scales = struct {
    steps: [groups_max]f32,
    factors: [groups_max]f32,

    const groups_max = head_dim_max / group.record_values;

    pub fn init(comptime dtype: Dtype, task: *const table.AttendTask, scratch: *const Scratch) Scales {
        const plane = planeOf(dtype, .values, task);
        const group_count = task.head_dim / plane.groupSize();
        var scales: Scales = undefined;
        var first: u32 = 0;
        while (first < group_count) : (first += rows_at_once) {
            var magnitudes: [rows_at_once]digits_of.Magnitudes = @splat(.{});
            inline for (&magnitudes, 0..) |*of_group, i| {
                // Where fewer than four groups are left the last one is taken again.
                const dim_group = @min(first + i, group_count - 1);
                for (load(plane, .scales, scratch, dim_group)) |scale| of_group.add(scale);
            }
            const steps, const factors = digits_of.stepsOf(magnitudes);
            scales.steps[first..][0..rows_at_once].* = steps;
            scales.factors[first..][0..rows_at_once].* = factors;
        }
        return scales;
    }

    /// The scales of a group of dims, or its mins, [token].
    inline fn load(
        plane: group.Plane,
        comptime which: enum { scales, mins },
        scratch: *const Scratch,
        dim_group: u32,
    ) [scale_vectors]Vector {
        const token = scratch.tokens.tile.storage.tile_token;
        const offset = if (which == .scales) plane.scaleOffset(token, 0) else plane.minOffset(token, 0);
        const first = scratch.tokens.planeV() + offset + dim_group * plane.scaleStride();
        var vectors: [scale_vectors]Vector = undefined;
        inline for (&vectors, 0..) |*vector, i| vector.* = convert.load(.f16, first + group.scale_bytes * i * lanes);
        return vectors;
    }
};

/// Pass 3: sums[row][dim] += weight * value.
pub fn accumulateTile(comptime dtype: Dtype, task: *const table.AttendTask, scratch: *Scratch) void {
    @setEvalBranchQuota(10_000); // what is inlined counts as one function
    const plane = planeOf(dtype, .values, task);
    const group_size = plane.groupSize();
    const scales: Scales = .init(dtype, task, scratch);
    // The weights of the next group are made before they are needed: both wait for different things, and so together.
    var weights: [2]Weights = undefined;
    setWeights(dtype, task, scratch, &scales, 0, &weights[0]);
    const block_count = blockCount(task.row_count);
    var next_turn: u32 = 0;
    var dim: u32 = 0;
    while (dim < task.head_dim) : (dim += block_lanes) {
        const dim_group = dim / group_size;
        if (dim % group_size == 0 and dim + group_size < task.head_dim) {
            setWeights(dtype, task, scratch, &scales, dim_group + 1, &weights[(dim_group + 1) % 2]);
        }
        var turn = next_turn;
        next_turn = if (next_turn + 1 == block_count) 0 else next_turn + 1;
        var r = scratch.row_first;
        const row_end = r + task.row_count;
        while (r < row_end) {
            const block = blockOf(row_end - r);
            switch (block) {
                inline 1, 2, 4 => |row_count| if (row_count <= row_block) {
                    accumulateBlock(dtype, row_count, task, plane, &weights[dim_group % 2], r, dim, scratch, turn == 0);
                },
                else => unreachable,
            }
            r += block;
            turn -%= 1;
        }
    }
}

/// Groups of dims of the values.
pub fn groupCount(task: *const table.AttendTask) u32 {
    return switch (task.tile.storage.dtype_v) {
        .f32, .f16, .bf16 => unreachable,
        inline else => |dtype| task.head_dim / planeOf(dtype, .values, task).groupSize(),
    };
}

/// Writes the digits of all rows' weights for one group of dims, and their share of the mins.
pub fn setWeights(
    comptime dtype: Dtype,
    task: *const table.AttendTask,
    scratch: *Scratch,
    scales: *const Scales,
    dim_group: u32,
    weights: *Weights,
) void {
    @setEvalBranchQuota(10_000); // what is inlined counts as one function
    const plane = planeOf(dtype, .values, task);
    var factors = Scales.load(plane, .scales, scratch, dim_group);
    for (&factors) |*factor| factor.* *= @splat(scales.factors[dim_group]);
    const mins = if (comptime dtype.isAffine()) Scales.load(plane, .mins, scratch, dim_group);
    var r = scratch.row_first;
    const row_end = r + task.row_count;
    while (r < row_end) {
        const count = simd.rowsAtOnce(row_end - r);
        switch (count) {
            inline 1, rows_at_once => |row_count| {
                setWeightRows(dtype, row_count, scratch, &factors, &mins, scales.steps[dim_group], weights, r);
            },
            else => unreachable,
        }
        r += count;
    }
}

inline fn setWeightRows(
    comptime dtype: Dtype,
    comptime row_count: u32,
    scratch: *Scratch,
    factors: *const [scale_vectors]Vector,
    mins: anytype,
    step: f32,
    weights: *Weights,
    first: u32,
) void {
    const rows = weights.digits[first..][0..row_count];
    const base_weights = scratch.base_weights[first..][0..row_count];
    const constants = weights.constants[first..][0..row_count];
    const totals = comptime totalsOf(dtype, .whole);
    var total: [rows_at_once]simd.VectorI32 = @splat(@splat(0));
    var min_sums: [rows_at_once]Vector = @splat(@splat(0));
    inline for (rows, scratch.scores[first..][0..row_count], base_weights, 0..) |*digits, *of_row, base_weight, r| {
        scratch.prefetches.prefetchSome();
        digits.step = step * base_weight;
        total[r] = digits.write(totals, of_row, factors, 1, tile_tokens);
        if (comptime dtype.isAffine()) inline for (mins, 0..) |min, i| {
            min_sums[r] = simd.mulAdd(@as(Vector, of_row[i * lanes ..][0..lanes].*), min, min_sums[r]);
        };
    }
    if (totals == .whole) Weights.Row.setTotals(rows, total, tile_tokens);
    constants.* = @splat(0);
    if (comptime dtype.isAffine()) {
        const sums: [rows_at_once]f32 = simd.sumFour(min_sums);
        for (constants, sums[0..row_count], base_weights) |*constant, sum, base_weight| constant.* = sum * base_weight;
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
    scratch: *Scratch,
    is_turn: bool,
) void {
    const codes = codesAt(plane, scratch.tokens.planeV(), task.tile.storage.tile_token, dim);
    const digits = weights.digits[row_first..][0..row_count];
    const products = dotRows(dtype, row_count, codes, digits, 0, tile_tokens, &scratch.prefetches, is_turn);
    inline for (0..row_count) |r| inline for (0..vectors_at_once) |p| {
        const step: Vector = @splat(digits[r].step);
        const at = task.sums[(row_first + r) * task.head_dim_padded + dim + p * lanes ..][0..lanes];
        const constant: Vector = @splat(weights.constants[row_first + r]);
        at.* = simd.mulAdd(@as(Vector, @floatFromInt(products[r][p])), step, @as(Vector, at.*) + constant);
    };
}
