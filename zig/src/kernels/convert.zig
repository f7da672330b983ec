//! Loads, stores and conversions of float elements, and the check that comes before a store.
//!
//! Rounding is half to even. f16 goes through the CPU's own instructions where the level has them (F16C, AVX-512, NEON)
//! and through integer arithmetic elsewhere; both give the same bits, and `reference/float.zig` gives them too.

const std = @import("std");
const builtin = @import("builtin");
const assert = std.debug.assert;
const dtypes = @import("../dtype.zig");
const simd = @import("lanes.zig");
const table = @import("table.zig");
const Dtype = dtypes.Dtype;

const lanes = simd.lanes;
const Vector = simd.Vector;
const VectorU16 = simd.VectorU16;
const VectorU32 = simd.VectorU32;

const converts_f16 = switch (builtin.cpu.arch) {
    .x86_64 => builtin.cpu.has(.x86, .f16c),
    .aarch64 => true,
    else => false,
};

/// `lanes` elements at `source`, unaligned, as f32.
pub inline fn load(comptime dtype: Dtype, source: [*]const u8) Vector {
    switch (dtype) {
        .f32 => return @as(*align(1) const [lanes]f32, @ptrCast(source)).*,
        .bf16 => {
            const bits: VectorU16 = @as(*align(1) const [lanes]u16, @ptrCast(source)).*;
            return @bitCast(@as(VectorU32, bits) << @splat(16));
        },
        .f16 => {
            const bits: VectorU16 = @as(*align(1) const [lanes]u16, @ptrCast(source)).*;
            return f16Values(bits);
        },
        else => comptime unreachable,
    }
}

/// The first `element_count` < `lanes` elements at `source`, then zeros. Reads nothing behind them: what follows the
/// last row may be another page, and what follows any row may be NaN.
pub inline fn loadPartial(comptime dtype: Dtype, source: [*]const u8, element_count: usize) Vector {
    assert(element_count < lanes);
    const element_bytes = comptime dtype.elementBytes();
    var buffer: [lanes * element_bytes]u8 = @splat(0);
    for (0..element_count * element_bytes) |i| buffer[i] = source[i];
    return load(dtype, &buffer);
}

/// Stores `lanes` elements at `destination`, unaligned, rounded half to even.
pub inline fn store(comptime dtype: Dtype, destination: [*]u8, values: Vector) void {
    switch (dtype) {
        .f32 => @as(*align(1) [lanes]f32, @ptrCast(destination)).* = values,
        .bf16 => {
            const bits: VectorU32 = @bitCast(values);
            const odd = (bits >> @splat(16)) & @as(VectorU32, @splat(1));
            const rounded = (bits +% @as(VectorU32, @splat(0x7fff)) +% odd) >> @splat(16);
            @as(*align(1) [lanes]u16, @ptrCast(destination)).* = @as(VectorU16, @truncate(rounded));
        },
        .f16 => {
            @as(*align(1) [lanes]u16, @ptrCast(destination)).* = f16Bits(values);
        },
        else => comptime unreachable,
    }
}

/// The values of f16 bits.
pub inline fn f16Values(bits: VectorU16) Vector {
    return if (converts_f16) @floatCast(@as(@Vector(lanes, f16), @bitCast(bits))) else widenF16(bits);
}

/// The bits of values as f16, rounded half to even.
pub inline fn f16Bits(values: Vector) VectorU16 {
    return if (converts_f16) @bitCast(@as(@Vector(lanes, f16), @floatCast(values))) else narrowF16(values);
}

/// f16 to f32 without conversion instructions: the exponent is rebased by one exact multiplication, which normalizes
/// denormals on the way; Inf and NaN get their exponent back.
fn widenF16(bits: VectorU16) Vector {
    const wide: VectorU32 = bits;
    const magnitude = (wide & @as(VectorU32, @splat(0x7fff))) << @splat(13);
    const rebased: VectorU32 = @bitCast(@as(Vector, @bitCast(magnitude)) * @as(Vector, @splat(0x1p112)));
    const special = magnitude >= @as(VectorU32, @splat(0x7c00 << 13));
    const finished = @select(u32, special, magnitude | @as(VectorU32, @splat(0x7f80_0000)), rebased);
    const sign = (wide & @as(VectorU32, @splat(0x8000))) << @splat(16);
    return @bitCast(finished | sign);
}

/// f32 to f16 without conversion instructions, half to even. Adding 0.5 to a magnitude below 2^-14 lets the FPU round
/// it at the place where f16 denormals end (2^-24 is the last bit of 0.5 in f32).
fn narrowF16(values: Vector) VectorU16 {
    const bits: VectorU32 = @bitCast(values);
    const magnitude = simd.magnitudes(values);
    const sign = (bits >> @splat(16)) & @as(VectorU32, @splat(0x8000));

    const half: VectorU32 = @splat(0x3f00_0000);
    const shifted: VectorU32 = @bitCast(@as(Vector, @bitCast(magnitude)) + @as(Vector, @splat(0.5)));
    const denormal = shifted -% half;

    const odd = (magnitude >> @splat(13)) & @as(VectorU32, @splat(1));
    const half_ulp: VectorU32 = @splat(0xfff);
    const rebase: VectorU32 = @splat(112 << 23);
    const normal = (magnitude +% half_ulp +% odd -% rebase) >> @splat(13);

    const is_denormal = magnitude < @as(VectorU32, @splat(113 << 23));
    const finite = @select(u32, is_denormal, denormal, normal);
    const is_inf = magnitude >= @as(VectorU32, @splat(dtypes.refusedF32Bits(.f16)));
    const is_nan = magnitude > @as(VectorU32, @splat(0x7f80_0000));
    const with_inf = @select(u32, is_inf, @as(VectorU32, @splat(0x7c00)), finite);
    const result = @select(u32, is_nan, @as(VectorU32, @splat(0x7e00)), with_inf);
    return @truncate(result | sign);
}

/// See `Table.convert`.
pub fn convert(task: *const table.ConvertTask) callconv(.c) void {
    switch (task.destination_dtype) {
        inline .f32, .f16, .bf16 => |to| switch (task.source_dtype) {
            inline .f32, .f16, .bf16 => |from| for (0..task.row_count) |row| {
                const destination = task.destination + row * task.destination_stride;
                const source = task.source + row * task.source_stride;
                if (to == from) {
                    const bytes = task.element_count * comptime to.elementBytes();
                    @memcpy(destination[0..bytes], source[0..bytes]);
                } else {
                    convertRow(to, destination, from, source, task.element_count, null);
                }
            },
            else => unreachable,
        },
        else => unreachable,
    }
}

/// See `Table.convert_checked`.
pub fn convertChecked(task: *const table.ConvertTask, narrowest: Dtype) callconv(.c) u32 {
    var largest: VectorU32 = @splat(0);
    switch (task.destination_dtype) {
        inline .f32, .f16, .bf16 => |to| switch (task.source_dtype) {
            inline .f32, .f16, .bf16 => |from| for (0..task.row_count) |row| convertRow(
                to,
                task.destination + row * task.destination_stride,
                from,
                task.source + row * task.source_stride,
                task.element_count,
                &largest,
            ),
            else => unreachable,
        },
        else => unreachable,
    }
    return @intFromBool(@reduce(.Max, largest) < dtypes.refusedF32Bits(narrowest));
}

/// Converts one row. A given `largest` becomes the largest magnitude so far, as f32 bits.
inline fn convertRow(
    comptime to: Dtype,
    destination: [*]u8,
    comptime from: Dtype,
    source: [*]const u8,
    element_count: usize,
    largest: ?*VectorU32,
) void {
    const to_bytes = comptime to.elementBytes();
    const from_bytes = comptime from.elementBytes();
    var i: usize = 0;
    while (i + lanes <= element_count) : (i += lanes) {
        @prefetch(source + i * from_bytes + prefetch_bytes, .{});
        const values = load(from, source + i * from_bytes);
        if (largest) |most| most.* = @max(most.*, simd.magnitudes(values));
        store(to, destination + i * to_bytes, values);
    }
    const rest = element_count - i;
    if (rest == 0) return;
    const values = loadPartial(from, source + i * from_bytes, rest);
    if (largest) |most| most.* = @max(most.*, simd.magnitudes(values));
    var buffer: [lanes * to_bytes]u8 = undefined;
    store(to, &buffer, values);
    @memcpy(destination[i * to_bytes ..][0 .. rest * to_bytes], buffer[0 .. rest * to_bytes]);
}

/// See `Table.storable`.
pub fn storable(
    source: [*]const u8,
    source_dtype: Dtype,
    destination_dtype: Dtype,
    element_count: usize,
) callconv(.c) u32 {
    // A magnitude is refused from some bit pattern of the *source* on, so the check compares integers and converts
    // nothing. No f16 overflows any format; of bf16, the upper half of an f32, it is the first at the limit or past it.
    const limit = dtypes.refusedF32Bits(destination_dtype);
    return @intFromBool(switch (source_dtype) {
        .f32 => allBelow(u32, limit, source, element_count),
        .f16 => allBelow(u16, 0x7c00, source, element_count),
        .bf16 => allBelow(u16, @intCast((limit + 0xffff) >> 16), source, element_count),
        else => unreachable,
    });
}

/// Distance of prefetches; past the end nothing is read.
const prefetch_bytes = 2048;

/// Whether all magnitudes (sign bit cleared) are below `limit`.
fn allBelow(comptime Bits: type, limit: Bits, source: [*]const u8, element_count: usize) bool {
    const magnitude_mask = std.math.maxInt(Bits) >> 1;
    const width = lanes * 4 / @sizeOf(Bits);
    const Wide = @Vector(width, Bits);
    const elements: [*]align(1) const Bits = @ptrCast(source);
    const in_line = simd.cache_line_bytes / @sizeOf(Bits);
    var most: [in_line / width]Wide = @splat(@splat(0));
    var i: usize = 0;
    while (i + in_line <= element_count) : (i += in_line) {
        // These rows come from the caller's memory and are often read here first.
        @prefetch(source + i * @sizeOf(Bits) + prefetch_bytes, .{});
        inline for (&most, 0..) |*largest, part| {
            const bits: Wide = elements[i + part * width ..][0..width].*;
            largest.* = @max(largest.*, bits & @as(Wide, @splat(magnitude_mask)));
        }
    }
    var below = true;
    for (most) |largest| below = below and @reduce(.Max, largest) < limit;
    while (i < element_count) : (i += 1) below = below and (elements[i] & magnitude_mask) < limit;
    return below;
}
