//! Floats to codes, for planes and for records; `group.zig` has the formulas and the places of the bytes.
//!
//! Two passes over a few rows that stay in the first cache between them: (1) the extremes of every group, and from them
//! scale, min and 1 / scale of many groups at once; (2) the codes, four sums to a word.
//!
//! Every step is one f32 operation, rounded half to even and never fused, in an order that does not depend on the vector
//! length: all levels give the same bits, those of `reference/codec.zig`. A float becomes an integer by an addition or
//! after it was clamped, so that no input, NaN and Inf included, is undefined behaviour.

const std = @import("std");
const builtin = @import("builtin");
const assert = std.debug.assert;
const convert = @import("../convert.zig");
const group = @import("../../group.zig");
const packed_integers = @import("pack.zig");
const scales = @import("scale.zig");
const simd = @import("../lanes.zig");
const table = @import("../table.zig");
const block_size_max = @import("../../shape.zig").block_size_max;
const Dtype = @import("../../dtype.zig").Dtype;
const Plane = group.Plane;
const Side = group.Side;

const lanes = simd.lanes;
const Vector = simd.Vector;
const VectorU32 = simd.VectorU32;
const Parameters = scales.Parameters;
const larger = simd.larger;
const smaller = simd.smaller;
const zero = scales.zero;

/// Groups whose parameters are computed together: the tokens of a chunk, or records.
const chunk = group.token_multiple;
/// Dims that are worked on together: those of a record, which every head_dim is a multiple of.
const columns = group.dim_multiple;
const vectors = columns / lanes;

/// See `Table.quantize`.
pub fn quantize(task: *const table.QuantizeTask) callconv(.c) void {
    assert(task.plane.isValid());
    assert(task.plane.block_size <= block_size_max);
    switch (task.plane.dtype) {
        inline .q8_0, .q4_0, .i8, .i4, .i2 => |dtype| switch (task.plane.side) {
            inline else => |side| {
                if (comptime dtype.isAffine() and side == .keys) {
                    quantizeChannels(dtype, task);
                } else {
                    quantizeTokens(dtype, side, task);
                }
            },
        },
        .f32, .f16, .bf16 => unreachable,
    }
}

/// See `Table.quantize_records`.
pub fn quantizeRecords(
    records: [*]u8,
    dtype: Dtype,
    source: [*]align(1) const f32,
    element_count: usize,
) callconv(.c) void {
    assert(element_count % group.record_values == 0);
    switch (dtype) {
        inline .q8_0, .q4_0 => |format| {
            // A record is the row of a token of 32 dims.
            const record_bytes = comptime group.recordBytes(format);
            const record_count = element_count / group.record_values;
            var first: usize = 0;
            while (first < record_count) : (first += chunk) {
                const count = @min(chunk, record_count - first);
                const rows: Rows = .{
                    .first = @ptrCast(source + first * group.record_values),
                    .token_stride = group.record_values * @sizeOf(f32),
                };
                var parameters: Parameters(chunk) = undefined;
                tokenParameters(format, group.record_values, rows, count, &parameters);
                for (0..count) |i| {
                    const record = records[(first + i) * record_bytes ..][0..record_bytes];
                    std.mem.writeInt(u16, record[0..2], parameters.scale_bits[i], .little);
                    packRecord(format, rows, i, parameters.inverse[i], record[2..]);
                }
            }
        },
        else => unreachable,
    }
}

/// Some tokens and dims of the rows as f32, the first of both being 0.
const Rows = struct {
    first: [*]const u8,
    token_stride: u64,

    /// `lanes` adjacent dims of a token.
    inline fn at(rows: Rows, token: usize, dim: usize) Vector {
        return convert.load(.f32, rows.first + token * rows.token_stride + dim * @sizeOf(f32));
    }

    /// Rows of `token_count` tokens and `dim_count` dims, widened in `scratch` where they are stored in fewer bits.
    fn of(
        task: *const table.QuantizeTask,
        token_first: usize,
        token_count: usize,
        dim_first: usize,
        dim_count: usize,
        scratch: []f32,
    ) Rows {
        const source = task.rows + token_first * task.token_stride + dim_first * task.rows_dtype.elementBytes();
        if (task.rows_dtype == .f32) return .{ .first = source, .token_stride = task.token_stride };
        assert(token_count * dim_count <= scratch.len);
        switch (task.rows_dtype) {
            inline .f16, .bf16 => |dtype| for (0..token_count) |token| {
                var dim: usize = 0;
                while (dim < dim_count) : (dim += lanes) {
                    const from = source + token * task.token_stride + dim * comptime dtype.elementBytes();
                    scratch[token * dim_count + dim ..][0..lanes].* = convert.load(dtype, from);
                }
            },
            else => unreachable,
        }
        return .{ .first = @ptrCast(scratch.ptr), .token_stride = dim_count * @sizeOf(f32) };
    }
};

/// The codes of `lanes` values before they are rounded.
inline fn exactCodes(comptime dtype: Dtype, x: Vector, inverse: Vector, min: Vector) Vector {
    return switch (dtype) {
        .q8_0 => x * inverse,
        .q4_0 => x * inverse + @as(Vector, @splat(8.5)), // which is rounded down
        .i8, .i4, .i2 => (x - min) * inverse,
        else => comptime unreachable,
    };
}

/// The codes of `lanes` values, in the low bits that they have in a plane, zeros above them.
inline fn codes(comptime dtype: Dtype, exact: Vector) VectorU32 {
    const least, const largest = comptime dtype.codeRange();
    const clamped = smaller(larger(exact, @splat(least)), @splat(largest));
    if (dtype == .q4_0) return @intFromFloat(clamped);
    // Rounds to an integer, half to even, and leaves it in the low bits, in two's complement.
    const rounded: VectorU32 = @bitCast(clamped + @as(Vector, @splat(simd.round_magic)));
    return rounded & @as(VectorU32, @splat(scales.codeMask(dtype)));
}

/// The codes of four vectors of values as bytes: of each four lanes those of the first vector, then those of the second,
/// and so on.
inline fn codesOfFour(comptime dtype: Dtype, exact: [group.quad]Vector) Bytes {
    if (builtin.cpu.arch == .x86_64) {
        const bytes = packed_integers.bytes(dtype.codeBits() == 8, exact, dtype == .q4_0);
        return if (dtype.codeBits() == 8) bytes else @min(bytes, @as(Bytes, @splat(scales.codeMask(dtype))));
    }
    var narrow: [group.quad][lanes]u8 = undefined;
    inline for (&narrow, exact) |*bytes, vector| bytes.* = @as(@Vector(lanes, u8), @truncate(codes(dtype, vector)));
    var bytes: [group.quad * lanes]u8 = undefined;
    inline for (0..lanes / group.quad) |four| inline for (narrow, 0..) |of, i| {
        bytes[(four * group.quad + i) * group.quad ..][0..group.quad].* = of[four * group.quad ..][0..group.quad].*;
    };
    return bytes;
}

/// Bytes of the codes of four vectors: see `codesOfFour`.
const Bytes = @Vector(group.quad * lanes, u8);

/// Formats with a group for each token: 64 tokens by one group at a time.
fn quantizeTokens(comptime dtype: Dtype, comptime side: Side, task: *const table.QuantizeTask) void {
    const plane = task.plane.of(dtype, side);
    const group_size = plane.groupSize();
    var scratch: [chunk * 2 * columns]f32 align(64) = undefined;
    var token: u32 = 0;
    while (token < plane.block_size) : (token += chunk) {
        var dim: u32 = 0;
        while (dim < plane.head_dim) : (dim += group_size) {
            const rows: Rows = .of(task, token, chunk, dim, group_size, &scratch);
            var parameters: Parameters(chunk) = undefined;
            tokenParameters(dtype, group_size, rows, chunk, &parameters);
            storeParameters(dtype, plane, task.bytes, token, dim, chunk, &parameters);
            if (side == .keys) {
                packKeys(dtype, plane, task.bytes, rows, token, chunk, dim, &parameters);
            } else {
                packValues(dtype, plane, task.bytes, rows, token, dim, group_size, &parameters);
            }
        }
    }
}

/// The parameters of the groups of `count` <= 64 tokens.
inline fn tokenParameters(
    comptime dtype: Dtype,
    group_size: u32,
    rows: Rows,
    count: usize,
    parameters: *Parameters(chunk),
) void {
    var first: usize = 0;
    while (first < count) : (first += lanes) {
        parameters.set(first, if (comptime dtype.isAffine()) blk: {
            var least: [lanes]Vector = undefined;
            var largest: [lanes]Vector = undefined;
            for (&least, &largest, 0..) |*low, *high, i| {
                // Lanes behind the last token are computed and not used.
                const token = @min(first + i, count - 1);
                low.* = rows.at(token, 0);
                high.* = low.*;
                var dim: u32 = lanes;
                while (dim < group_size) : (dim += lanes) {
                    low.* = smaller(rows.at(token, dim), low.*);
                    high.* = larger(rows.at(token, dim), high.*);
                }
            }
            break :blk scales.affine(dtype, simd.foldLanes(smaller, least), simd.foldLanes(larger, largest));
        } else scales.symmetric(dtype, extremes(dtype, rows, first, count)));
    }
}

/// Extremes of `lanes` tokens: for q8_0 the largest magnitude, for q4_0 the first value that has it.
inline fn extremes(comptime dtype: Dtype, rows: Rows, first: usize, count: usize) Vector {
    var least: [lanes]Vector = undefined;
    var largest: [lanes]Vector = undefined;
    for (&least, &largest, 0..) |*low, *high, i| {
        const token = @min(first + i, count - 1);
        var x: [vectors]Vector = undefined;
        inline for (&x, 0..) |*vector, v| vector.* = rows.at(token, v * lanes);
        if (dtype == .q8_0) {
            high.* = @abs(x[0]);
            inline for (x[1..]) |vector| high.* = larger(@abs(vector), high.*);
        } else {
            low.* = x[0];
            high.* = x[0];
            inline for (x[1..]) |vector| {
                low.* = smaller(vector, low.*);
                high.* = larger(vector, high.*);
            }
        }
    }
    const high = simd.foldLanes(larger, largest);
    if (dtype == .q8_0) return high;
    const low = simd.foldLanes(smaller, least);
    var found: [lanes]f32 = @select(f32, -low > high, low, high);
    // Where both x and -x are extremes, the one that comes first; where all are zeros, any.
    const is_tie: std.meta.Int(.unsigned, lanes) = @bitCast((-low == high) & (high != zero));
    if (is_tie != 0) for (0..lanes) |i| {
        if (is_tie >> @intCast(i) & 1 == 0) continue;
        const token = @min(first + i, count - 1);
        var x: [vectors]Vector = undefined;
        inline for (&x, 0..) |*vector, v| vector.* = rows.at(token, v * lanes);
        found[i] = scales.firstExtreme(x);
    };
    return found;
}

/// Affine keys, a group for each channel: 32 channels over all tokens at a time.
fn quantizeChannels(comptime dtype: Dtype, task: *const table.QuantizeTask) void {
    const plane = task.plane.of(dtype, .keys);
    var scratch: [block_size_max * columns]f32 align(64) = undefined;
    var dim: u32 = 0;
    while (dim < plane.head_dim) : (dim += columns) {
        const rows: Rows = .of(task, 0, plane.block_size, dim, columns, &scratch);
        // Even and odd tokens apart, for the length of the chains of comparisons.
        var least: [2][vectors]Vector = undefined;
        inline for (0..vectors) |v| least[0][v] = rows.at(0, v * lanes);
        least[1] = least[0];
        var largest = least;
        var token: u32 = 0;
        while (token < plane.block_size) : (token += 2) {
            inline for (0..2) |odd| inline for (0..vectors) |v| {
                const x = rows.at(token + odd, v * lanes);
                least[odd][v] = smaller(x, least[odd][v]);
                largest[odd][v] = larger(x, largest[odd][v]);
            };
        }
        var parameters: Parameters(columns) = undefined;
        inline for (0..vectors) |v| {
            const low = smaller(least[0][v], least[1][v]);
            const high = larger(largest[0][v], largest[1][v]);
            parameters.set(v * lanes, scales.affine(dtype, low, high));
        }
        storeParameters(dtype, plane, task.bytes, 0, dim, columns, &parameters);
        packKeys(dtype, plane, task.bytes, rows, 0, plane.block_size, dim, &parameters);
    }
}

/// Writes adjacent scales and mins, those of `token` and `dim` first.
inline fn storeParameters(
    comptime dtype: Dtype,
    plane: Plane,
    bytes: [*]u8,
    token: u32,
    dim: u32,
    comptime count: u32,
    parameters: *const Parameters(count),
) void {
    @memcpy(bytes[plane.scaleOffset(token, dim)..][0 .. group.scale_bytes * count], std.mem.asBytes(&parameters.scale_bits));
    if (comptime !dtype.isAffine()) return;
    @memcpy(bytes[plane.minOffset(token, dim)..][0 .. group.scale_bytes * count], std.mem.asBytes(&parameters.min_bits));
}

/// The words of `token_count` tokens and 32 dims. Codes of four tokens with lanes = dims are packed as a plane has them: four
/// dims of each.
inline fn packKeys(
    comptime dtype: Dtype,
    plane: Plane,
    bytes: [*]u8,
    rows: Rows,
    token_first: usize,
    token_count: usize,
    dim: usize,
    parameters: anytype,
) void {
    const is_per_channel = comptime dtype.isAffine();
    const bits = comptime @as(u32, dtype.codeBits());
    const quads = comptime 8 / bits; // of sums in a word
    const vectors_filled = comptime columns / group.quad / quads;
    const pieces_a_vector = lanes / group.quad;
    var t: usize = 0;
    while (t < token_count) : (t += group.quad) {
        const token = token_first + t;
        var four_tokens: [vectors]Bytes = undefined;
        inline for (&four_tokens, 0..) |*bytes_of, v| {
            var exact: [group.quad]Vector = undefined;
            inline for (&exact, 0..) |*vector, i| {
                const inverse: Vector, const min: Vector = if (is_per_channel) .{
                    parameters.inverse[v * lanes ..][0..lanes].*,
                    parameters.min[v * lanes ..][0..lanes].*,
                } else .{ @splat(parameters.inverse[t + i]), @splat(parameters.min[t + i]) };
                vector.* = exactCodes(dtype, rows.at(t + i, v * lanes), inverse, min);
            }
            bytes_of.* = codesOfFour(dtype, exact);
        }
        const destination = bytes + plane.codeOffset(@intCast(token), @intCast(dim));
        const line_first = bytes + plane.codeOffset(@intCast(token / group.lane_count * group.lane_count), @intCast(dim));
        inline for (0..vectors_filled) |w| {
            var sixteen: @Vector(4, u32) = @splat(0);
            inline for (0..quads) |k| {
                const index = w * quads + k;
                const piece = std.simd.extract(four_tokens[index / pieces_a_vector], index % pieces_a_vector * 16, 16);
                sixteen |= @as(@Vector(4, u32), @bitCast(piece)) << @splat(bits * k);
            }
            destination[w * group.vector_bytes ..][0..16].* = @bitCast(sixteen);
        }
        // All lines are written four times, four tokens at a time.
        const lines_at_once = (vectors_filled + group.quad - 1) / group.quad;
        inline for (0..lines_at_once) |i| {
            const line = token % group.lane_count / group.quad * lines_at_once + i;
            prefetchNext(plane, line_first + line * group.vector_bytes);
        }
    }
}

/// Prefetches the line of the next plane that is where one of this plane was written: codes go to memory that was not used
/// for long, and planes are stored one after the other.
inline fn prefetchNext(plane: Plane, line: [*]const u8) void {
    @prefetch(line + plane.bytes(), .{ .rw = .write });
}

/// The words of 64 tokens and the `group_size` dims of a group: lanes = dims, so a word is four tokens' codes as they come.
inline fn packValues(
    comptime dtype: Dtype,
    plane: Plane,
    bytes: [*]u8,
    rows: Rows,
    token_first: usize,
    dim_first: usize,
    group_size: u32,
    parameters: *const Parameters(chunk),
) void {
    const bits = comptime @as(u32, dtype.codeBits());
    const tokens_a_word = comptime group.quad * (8 / bits);
    var dim: usize = 0;
    while (dim < group_size) : (dim += lanes) {
        var destination = bytes + plane.codeOffset(@intCast(token_first), @intCast(dim_first + dim));
        var t: usize = 0;
        while (t < chunk) : (t += tokens_a_word) {
            var words: VectorU32 = @splat(0);
            inline for (0..tokens_a_word / group.quad) |k| {
                var exact: [group.quad]Vector = undefined;
                inline for (&exact, 0..) |*vector, i| {
                    const source = t + k * group.quad + i;
                    const inverse: Vector = @splat(parameters.inverse[source]);
                    const min: Vector = @splat(parameters.min[source]);
                    vector.* = exactCodes(dtype, rows.at(source, dim), inverse, min);
                }
                words |= @as(VectorU32, @bitCast(codesOfFour(dtype, exact))) << @splat(bits * k);
            }
            destination[0 .. 4 * lanes].* = transposed(@bitCast(words));
            prefetchNext(plane, destination);
            destination += group.vector_bytes;
        }
    }
}

/// Bytes [4][4] of each 16, rows and columns exchanged: from four lanes of each vector to four vectors of each lane.
inline fn transposed(bytes: Bytes) Bytes {
    comptime var order: [group.quad * lanes]i32 = undefined;
    inline for (&order, 0..) |*from, i| from.* = i / 16 * 16 + i % 4 * 4 + i % 16 / 4;
    return @shuffle(u8, bytes, undefined, order);
}

/// The codes of one record.
inline fn packRecord(
    comptime dtype: Dtype,
    rows: Rows,
    index: usize,
    inverse: f32,
    bytes: *[group.recordBytes(dtype) - 2]u8,
) void {
    const high_dims = group.record_values / 2;
    comptime var at = 0;
    inline while (at < bytes.len) : (at += lanes) {
        var word = codes(dtype, exactCodes(dtype, rows.at(index, at), @splat(inverse), zero));
        if (dtype == .q4_0) {
            word |= codes(dtype, exactCodes(dtype, rows.at(index, at + high_dims), @splat(inverse), zero)) << @splat(4);
        }
        bytes[at..][0..lanes].* = @as(@Vector(lanes, u8), @truncate(word));
    }
}
