//! Codes to floats: code * scale + min in f32, for planes and for records. The inverse of `quantize.zig`, by the same rules.

const std = @import("std");
const assert = std.debug.assert;
const convert = @import("../convert.zig");
const group = @import("../../group.zig");
const simd = @import("../lanes.zig");
const table = @import("../table.zig");
const Dtype = @import("../../dtype.zig").Dtype;
const Plane = group.Plane;
const Side = group.Side;

const lanes = simd.lanes;
const Vector = simd.Vector;
const VectorI32 = simd.VectorI32;
const VectorU32 = simd.VectorU32;
const Quad = @Vector(group.quad, u32);

/// Tokens whose scales are widened together.
const chunk = group.token_multiple;
/// Dims that are worked on together.
const columns = group.dim_multiple;
const vectors = columns / lanes;

/// See `Table.dequantize`.
pub fn dequantize(task: *const table.DequantizeTask) callconv(.c) void {
    assert(task.plane.isValid());
    assert(task.token_first <= task.plane.block_size);
    assert(task.token_count <= task.plane.block_size - task.token_first);
    switch (task.plane.dtype) {
        inline .q8_0, .q4_0, .i8, .i4, .i2 => |dtype| switch (task.plane.side) {
            inline else => |side| switch (task.rows_dtype) {
                inline .f32, .f16, .bf16 => |rows_dtype| dequantizePlane(dtype, side, rows_dtype, task),
                else => unreachable,
            },
        },
        .f32, .f16, .bf16 => unreachable,
    }
}

/// See `Table.dequantize_records`.
pub fn dequantizeRecords(
    destination: [*]align(1) f32,
    records: [*]const u8,
    dtype: Dtype,
    element_count: usize,
) callconv(.c) void {
    assert(element_count % group.record_values == 0);
    switch (dtype) {
        inline .q8_0, .q4_0 => |format| for (0..element_count / group.record_values) |r| {
            const record = records[r * comptime group.recordBytes(format) ..];
            const scale = convert.f16Values(@splat(std.mem.readInt(u16, record[0..2], .little)));
            inline for (0..vectors) |v| {
                // In q4_0 the first half of the values are low nibbles, the second half high ones.
                const at = v * lanes % (if (format == .q8_0) columns else columns / 2);
                const bytes: @Vector(lanes, u8) = record[2 + at ..][0..lanes].*;
                const shift = v * lanes / (columns / 2) * 4;
                const code = if (format == .q8_0) bytes else bytes >> @splat(shift) & @as(@Vector(lanes, u8), @splat(15));
                const values: *align(1) [lanes]f32 = @ptrCast(destination + r * columns + v * lanes);
                values.* = codeValues(format, code) * scale;
            }
        },
        else => unreachable,
    }
}

/// Codes as numbers: signed, or less 8, where the format has it so.
inline fn codeValues(comptime dtype: Dtype, code: @Vector(lanes, u8)) Vector {
    if (dtype.codeBits() == 8) return @floatFromInt(@as(VectorI32, @as(@Vector(lanes, i8), @bitCast(code))));
    const value: Vector = @floatFromInt(@as(VectorI32, code));
    return if (comptime dtype.codeZero() != 0) value - @as(Vector, @splat(comptime dtype.codeZero())) else value;
}

fn dequantizePlane(
    comptime dtype: Dtype,
    comptime side: Side,
    comptime rows_dtype: Dtype,
    task: *const table.DequantizeTask,
) void {
    const is_per_channel = comptime dtype.isAffine() and side == .keys;
    const plane = task.plane.of(dtype, side);
    const end = task.token_first + task.token_count;
    var chunk_first = task.token_first / chunk * chunk;
    while (chunk_first < end) : (chunk_first += chunk) {
        const first = @max(task.token_first, chunk_first);
        const stop = @min(end, chunk_first + chunk);
        var dim: u32 = 0;
        while (dim < plane.head_dim) : (dim += columns) {
            const count = if (is_per_channel) columns else chunk;
            var scale: [count]f32 = undefined;
            var min: [count]f32 = undefined;
            widen(count, task.bytes + plane.scaleOffset(chunk_first, dim), &scale);
            if (comptime dtype.isAffine()) widen(count, task.bytes + plane.minOffset(chunk_first, dim), &min);
            var quad = first / group.quad * group.quad;
            while (quad < stop) : (quad += group.quad) {
                const words = loadQuad(dtype, side, plane, task.bytes, quad, dim);
                for (@max(quad, first)..@min(quad + group.quad, stop)) |token| {
                    const row = task.rows + (token - task.token_first) * task.token_stride;
                    const shift: u5 = @intCast(token % group.quad * 8);
                    inline for (words, 0..) |word, v| {
                        const of = if (is_per_channel) v * lanes else token - chunk_first;
                        var x = codeValues(dtype, @truncate(word >> @splat(shift)));
                        x *= if (is_per_channel) scale[of..][0..lanes].* else @splat(scale[of]);
                        if (comptime dtype.isAffine()) x += if (is_per_channel) min[of..][0..lanes].* else @splat(min[of]);
                        storeClamped(rows_dtype, row + (dim + v * lanes) * comptime rows_dtype.elementBytes(), x);
                    }
                }
            }
        }
    }
}

inline fn widen(comptime count: usize, bits: [*]const u8, values: *[count]f32) void {
    inline for (0..count / lanes) |v| values[v * lanes ..][0..lanes].* = convert.load(.f16, bits + group.scale_bytes * v * lanes);
}

/// The codes of four tokens, from `token` on, and 32 dims: byte i of a lane is that of token i.
inline fn loadQuad(
    comptime dtype: Dtype,
    comptime side: Side,
    plane: Plane,
    bytes: [*]const u8,
    token: u32,
    dim: u32,
) [vectors]VectorU32 {
    const bits = comptime @as(u32, dtype.codeBits());
    const quads = comptime 8 / bits;
    const mask = comptime ((1 << bits) - 1) * 0x0101_0101;
    var words: [vectors]VectorU32 = undefined;
    if (side == .values) {
        const shift: u5 = plane.codePlace(token, dim).shift;
        inline for (&words, 0..) |*word, v| {
            const source = bytes + plane.codeOffset(token, dim + @as(u32, v * lanes));
            const stored: VectorU32 = @bitCast(source[0 .. 4 * lanes].*);
            word.* = stored >> @splat(shift) & @as(VectorU32, @splat(mask));
        }
        return words;
    }
    const source = bytes + plane.codeOffset(token, dim);
    var pieces: [columns / group.quad]Quad = undefined;
    inline for (0..pieces.len / quads) |w| {
        // [token][dim] to [dim][token]
        const stored: @Vector(16, u8) = source[w * group.vector_bytes ..][0..16].*;
        const transposed = [16]i32{ 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15 };
        const four: Quad = @bitCast(@shuffle(u8, stored, undefined, transposed));
        inline for (0..quads) |k| pieces[w * quads + k] = four >> @splat(bits * k) & @as(Quad, @splat(mask));
    }
    inline for (&words, 0..) |*word, v| word.* = joined(pieces[v * lanes / group.quad ..][0 .. lanes / group.quad]);
    return words;
}

inline fn joined(pieces: *const [lanes / group.quad]Quad) VectorU32 {
    return switch (lanes) {
        4 => pieces[0],
        8 => std.simd.join(pieces[0], pieces[1]),
        16 => std.simd.join(std.simd.join(pieces[0], pieces[1]), std.simd.join(pieces[2], pieces[3])),
        else => comptime unreachable,
    };
}

/// Past the largest f16 lies Inf; the other formats hold every code * scale + min.
inline fn storeClamped(comptime dtype: Dtype, destination: [*]u8, x: Vector) void {
    if (dtype != .f16) return convert.store(dtype, destination, x);
    const largest: Vector = @splat(std.math.floatMax(f16));
    // NaN, of a scale that nobody should have stored, stays NaN.
    const below = @select(f32, x > largest, largest, x);
    convert.store(dtype, destination, @select(f32, below < -largest, -largest, below));
}
