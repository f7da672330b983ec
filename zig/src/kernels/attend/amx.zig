//! Attention over planes of codes on AMX: passes 1 and 3 of `attend.zig` for q8_0, q4_0, i8, i4 and i2 sides.
//!
//! The sums are those of `codes.zig`, by the same digits. All query rows of a task are the rows of one tile register, and 16
//! lanes of codes fill the other:
//!
//!     sums [row][16 lanes]  +=  digits [row][quad][4]  x  codes [quad][16 lanes][4]        for high digits and for low ones
//!
//! Both operands are signed bytes, so 8-bit codes go from the plane into a tile register as they are stored; codes of 4 and
//! 2 bits are spread out into bytes before. Integers are exact and the floats after them are computed in the order of
//! `codes.zig`: the bits are those of the level `avx512`.
//!
//! A *strip* is 16 lanes. Up to four strips are spread, then multiplied, then added up: each stage reads what the one before
//! it wrote, and a tile register that is loaded right after its bytes were stored would wait for them.

const std = @import("std");
const assert = std.debug.assert;
const registers = @import("tile_register.zig");
const code_passes = @import("codes.zig");
const convert = @import("../convert.zig");
const dot = @import("dot.zig");
const group = @import("../../group.zig");
const pack = @import("../codec/pack.zig");
const simd = @import("../lanes.zig");
const table = @import("../table.zig");
const PrefetchQueue = @import("prefetch.zig").PrefetchQueue;
const Dtype = @import("../../dtype.zig").Dtype;
const Scratch = @import("scratch.zig").Scratch;

const lanes = simd.lanes;
const Vector = simd.Vector;
const VectorI32 = simd.VectorI32;
const tile_tokens = table.tile_tokens;
const row_count_max = table.query_row_count_max;
const head_dim_max = table.head_dim_max;

/// Strips that are multiplied before their sums are added up.
const strip_count_max = tile_tokens / group.lane_count;

/// Numbers of a row of digits in a tile register. Half of them are a group of q8_0 and q4_0, and the end of head_dim 32 or 96.
const whole_numbers = registers.row_bytes_max;
const half_numbers = whole_numbers / 2;

comptime {
    assert(lanes == group.lane_count and row_count_max == registers.row_count_max);
    assert(tile_tokens == whole_numbers and group.record_values == half_numbers and group.dim_multiple == half_numbers);
}

/// The tile registers that one step multiplies.
const Operands = struct {
    number_count: u32,
    high_digits: registers.TileRegister,
    low_digits: registers.TileRegister,
    codes: registers.TileRegister,
};

const high_sums: registers.TileRegister = 0;
const low_sums: registers.TileRegister = 1;
const whole: Operands = .{ .number_count = whole_numbers, .high_digits = 2, .low_digits = 3, .codes = 4 };
const half: Operands = .{ .number_count = half_numbers, .high_digits = 5, .low_digits = 6, .codes = 7 };

/// Configurations by the number of query rows.
const configs: [row_count_max + 1]registers.Config align(64) = configs: {
    var all: [row_count_max + 1]registers.Config = undefined;
    for (all[1..], 1..) |*config, row_count| config.* = configOf(row_count);
    break :configs all;
};

fn configOf(row_count: u8) registers.Config {
    var shapes: [8]registers.Shape = undefined;
    for ([_]registers.TileRegister{ high_sums, low_sums }) |sums| {
        shapes[sums] = .{ .row_count = row_count, .row_bytes = group.lane_count * @sizeOf(i32) };
    }
    for ([_]Operands{ whole, half }) |operands| {
        const digits: registers.Shape = .{ .row_count = row_count, .row_bytes = operands.number_count };
        shapes[operands.high_digits] = digits;
        shapes[operands.low_digits] = digits;
        shapes[operands.codes] = .{ .row_count = operands.number_count / group.quad, .row_bytes = group.vector_bytes };
    }
    return .init(shapes);
}

/// Configures the tile registers, before the passes of a task.
pub fn begin(task: *const table.AttendTask) void {
    assert(task.row_count >= 1 and task.row_count <= row_count_max);
    registers.configure(&configs[task.row_count]);
}

/// Releases the tile registers, after the passes of a task.
pub fn end() void {
    registers.release();
}

/// Sums that `multiply` leaves of a strip, for high digits and for low ones: [row][lane].
const Products = struct {
    high: [row_count_max][lanes]i32 align(64),
    low: [row_count_max][lanes]i32 align(64),

    /// 128 * high + low.
    inline fn sum(products: *const Products, row: usize) Vector {
        const high: VectorI32 = products.high[row];
        const low: VectorI32 = products.low[row];
        return @floatFromInt((high << @splat(pack.low_bits)) +% low);
    }
};

/// Codes of adjacent strips, each from the same number on.
const Strips = struct {
    first: [*]const u8,
    stride: u32,
    count: u32,
};

/// Cache lines that so many codes of 16 lanes take.
fn linesOf(dtype: Dtype, number_count: u32) u32 {
    return number_count * group.lane_count * dtype.codeBits() / 8 / simd.cache_line_bytes;
}

/// Products of the digits from `number_first` on with `number_count` numbers of each strip, a multiple of 32.
inline fn multiply(
    comptime dtype: Dtype,
    strips: Strips,
    /// [row]
    digits: anytype,
    number_first: u32,
    number_count: u32,
    prefetches: *PrefetchQueue,
    /// [strip]
    products: *[strip_count_max]Products,
) void {
    assert(number_count % half_numbers == 0 and number_count <= head_dim_max);
    assert(strips.count <= strip_count_max);
    var bytes: Bytes align(64) = undefined;
    const codes = spreadCodes(dtype, strips, number_count, &bytes);
    for (0..strips.count) |strip| {
        const first = codes.first + strip * codes.stride;
        registers.zero(high_sums);
        registers.zero(low_sums);
        var number: u32 = 0;
        while (number + whole_numbers <= number_count) : (number += whole_numbers) {
            addStep(dtype, whole, first + number * group.lane_count, digits, number_first + number, prefetches);
        }
        if (number < number_count) addStep(dtype, half, first + number * group.lane_count, digits, number_first + number, prefetches);
        registers.store(high_sums, &products[strip].high, @sizeOf([lanes]i32));
        registers.store(low_sums, &products[strip].low, @sizeOf([lanes]i32));
    }
}

/// Codes of a few strips as signed bytes, [strip][quad][16 lanes][4].
const Bytes = [strip_count_max * head_dim_max * group.lane_count]u8;

/// The codes of `number_count` numbers of each strip as signed bytes, less the offset of their format.
inline fn spreadCodes(comptime dtype: Dtype, strips: Strips, number_count: u32, bytes: *align(64) Bytes) Strips {
    const bits = comptime dtype.codeBits();
    if (bits == 8) return strips;
    const offset: dot.Codes = @splat(comptime dtype.codeZero());
    const quads = comptime dot.vectorCount(bits);
    const strip_bytes = number_count * group.lane_count;
    for (0..strips.count) |strip| {
        const stored = strips.first + strip * strips.stride;
        for (0..number_count / group.quad / quads) |vector| {
            const at = strip * strip_bytes + vector * quads * group.vector_bytes;
            inline for (dot.load(bits, stored + vector * group.vector_bytes), 0..) |codes, i| {
                bytes[at + i * group.vector_bytes ..][0..group.vector_bytes].* = codes -% offset;
            }
        }
    }
    return .{ .first = bytes, .stride = strip_bytes, .count = strips.count };
}

/// Adds the products of the codes of one tile register.
inline fn addStep(
    comptime dtype: Dtype,
    comptime operands: Operands,
    codes: [*]const u8,
    digits: anytype,
    number_first: u32,
    prefetches: *PrefetchQueue,
) void {
    const digits_stride = @sizeOf(@TypeOf(digits[0]));
    // Half as many lines as these codes took, a quarter of them at a time. The others are prefetched while digits and
    // weights are made.
    const lines_at_once = comptime @max(1, linesOf(dtype, operands.number_count) / 2 / 4);
    var lines = prefetches.take(4 * @as(u32, lines_at_once), codes);
    registers.load(operands.high_digits, digits[0].high[number_first..].ptr, digits_stride);
    lines.prefetch(lines_at_once);
    registers.load(operands.low_digits, digits[0].low[number_first..].ptr, digits_stride);
    lines.prefetch(lines_at_once);
    registers.load(operands.codes, codes, group.vector_bytes);
    lines.prefetch(lines_at_once);
    registers.addProducts(high_sums, operands.high_digits, operands.codes);
    registers.addProducts(low_sums, operands.low_digits, operands.codes);
    lines.prefetch(lines_at_once);
}

/// Lines that either pass prefetches for one head.
pub fn linesOfPass(comptime dtype: Dtype, task: *const table.AttendTask) u32 {
    return linesOf(dtype, task.head_dim) * strip_count_max / 2;
}

/// Pass 1: scores[row][token] = query . key.
pub fn scoreTile(comptime dtype: Dtype, task: *const table.AttendTask, scratch: *Scratch) void {
    assert(task.head_dim <= head_dim_max);
    const plane = code_passes.planeOf(dtype, .keys, task);
    const token = task.tile.storage.tile_token;
    var strips: Strips = .{
        .first = scratch.tokens.planeK() + plane.codeOffset(token, 0),
        .stride = plane.stripBytes(),
        .count = strip_count_max,
    };
    const digits = scratch.queryDigits(task)[scratch.row_first..][0..task.row_count];
    var products: [strip_count_max]Products = undefined;
    if (comptime dtype.isAffine()) {
        multiply(dtype, strips, digits, 0, task.head_dim, &scratch.prefetches, &products);
        setScores(task.row_count, &products, scratch);
        return;
    }
    for (scratch.scores[scratch.row_first..][0..task.row_count]) |*scores| scores.* = @splat(0);
    var scales = scratch.tokens.planeK() + plane.scaleOffset(token, 0);
    var dim: u32 = 0;
    while (dim < task.head_dim) : (dim += group.record_values) {
        multiply(dtype, strips, digits, dim, group.record_values, &scratch.prefetches, &products);
        addScores(task.row_count, scales, &products, scratch);
        strips.first += plane.stripBytes() / (plane.head_dim / group.record_values);
        scales += plane.scaleStride();
    }
    for (scratch.scores[scratch.row_first..][0..task.row_count], digits) |*scores, of_row| {
        inline for (0..strip_count_max) |strip| {
            const score: Vector = scores[strip * lanes ..][0..lanes].*;
            scores[strip * lanes ..][0..lanes].* = score * @as(Vector, @splat(of_row.step));
        }
    }
}

/// Scores of keys whose scales are in the digits.
inline fn setScores(row_count: u32, products: *const [strip_count_max]Products, scratch: *Scratch) void {
    for (0..row_count) |r| {
        const row = scratch.row_first + r;
        const step: Vector = @splat(scratch.queries[row].step);
        const constant: Vector = @splat(scratch.query_constants[row]);
        inline for (0..strip_count_max) |strip| {
            scratch.scores[row][strip * lanes ..][0..lanes].* = simd.mulAdd(products[strip].sum(r), step, constant);
        }
    }
}

/// Adds to the scores the share of one group of dims, whose scales are at `scales`, f16 [token].
inline fn addScores(row_count: u32, scales: [*]const u8, products: *const [strip_count_max]Products, scratch: *Scratch) void {
    inline for (0..strip_count_max) |strip| {
        const scale = convert.load(.f16, scales + group.scale_bytes * strip * lanes);
        for (0..row_count) |r| {
            const at = scratch.scores[scratch.row_first + r][strip * lanes ..][0..lanes];
            at.* = simd.mulAdd(products[strip].sum(r), scale, at.*);
        }
    }
}

/// Pass 3: sums[row][dim] += weight * value.
pub fn accumulateTile(comptime dtype: Dtype, task: *const table.AttendTask, scratch: *Scratch) void {
    const plane = code_passes.planeOf(dtype, .values, task);
    const group_size = plane.groupSize();
    var strips: Strips = .{
        .first = scratch.tokens.planeV() + plane.codeOffset(task.tile.storage.tile_token, 0),
        .stride = plane.stripBytes(),
        .count = group_size / group.lane_count,
    };
    const scales: code_passes.Scales = .init(dtype, task, scratch);
    var weights: code_passes.Weights = undefined;
    var products: [strip_count_max]Products = undefined;
    var dim: u32 = 0;
    while (dim < task.head_dim) : (dim += group_size) {
        code_passes.setWeights(dtype, task, scratch, &scales, dim / group_size, &weights);
        multiply(dtype, strips, weights.digits[scratch.row_first..], 0, tile_tokens, &scratch.prefetches, &products);
        addSums(task, scratch.row_first, &weights, &products, dim, strips.count);
        strips.first += strips.count * strips.stride;
    }
}

/// Adds the sums of `strip_count` strips of dims from `dim` on.
inline fn addSums(
    task: *const table.AttendTask,
    row_first: u32,
    weights: *const code_passes.Weights,
    products: *const [strip_count_max]Products,
    dim: u32,
    strip_count: u32,
) void {
    for (0..task.row_count) |r| {
        const row = row_first + r;
        const step: Vector = @splat(weights.digits[row].step);
        const constant: Vector = @splat(weights.constants[row]);
        for (0..strip_count) |strip| {
            const at = task.sums[row * task.head_dim_padded + dim + strip * lanes ..][0..lanes];
            at.* = simd.mulAdd(products[strip].sum(r), step, @as(Vector, at.*) + constant);
        }
    }
}
