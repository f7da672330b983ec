//! Bodies of the exports that turn rows into quantized bytes and back, without a cache: ggml's records, the planes of
//! blocks, and one into the other.
//!
//! Memory that is read and written by one call must not overlap: a code would be read where it was just written.

const std = @import("std");
const arguments = @import("buffer.zig");
const dispatch = @import("../kernels/dispatch.zig");
const group = @import("../group.zig");
const checkApart = @import("../cache/overlap.zig").checkApart;
const shape = @import("../shape.zig");
const status = @import("status.zig");
const Dtype = @import("../dtype.zig").Dtype;
const Plane = group.Plane;

const Error = error{ InvalidConfig, InvalidSize, NotFinite };

/// (dtype, f32 rows, count, records out, bytes)
pub fn rowsQuantize(dtype: u32, rows: ?[*]const u8, count: u32, records: ?[*]u8, byte_count: u32) callconv(.c) i32 {
    return status.word(quantizeRows(dtype, rows, count, records, byte_count));
}

fn quantizeRows(dtype_word: u32, rows: ?[*]const u8, count: u32, records: ?[*]u8, byte_count: u32) Error!void {
    const dtype = try recordDtype(dtype_word);
    if (count % group.record_values != 0) return error.InvalidSize;
    const needed = @as(u64, count / group.record_values) * group.recordBytes(dtype);
    const source = try arguments.words(f32, rows, count);
    const destination = try output(records, byte_count, needed);
    try checkApart(std.mem.sliceAsBytes(source), destination);
    if (dispatch.kernels().storable(@ptrCast(source.ptr), .f32, dtype, count) == 0) return error.NotFinite;
    dispatch.kernels().quantize_records(destination.ptr, dtype, source.ptr, count);
}

/// (dtype, records, bytes, f32 rows out, count)
pub fn rowsDequantize(dtype: u32, records: ?[*]const u8, byte_count: u32, rows: ?[*]u8, count: u32) callconv(.c) i32 {
    return status.word(dequantizeRows(dtype, records, byte_count, rows, count));
}

fn dequantizeRows(dtype_word: u32, records: ?[*]const u8, byte_count: u32, rows: ?[*]u8, count: u32) Error!void {
    const dtype = try recordDtype(dtype_word);
    const record_bytes = group.recordBytes(dtype);
    if (byte_count % record_bytes != 0) return error.InvalidSize;
    const value_count = @as(u64, byte_count / record_bytes) * group.record_values;
    if (count < value_count) return error.InvalidSize;
    const source = (try arguments.in(records, byte_count))[0..byte_count];
    const destination = (try arguments.floatsOut(rows, count))[0..@intCast(value_count)];
    try checkApart(source, std.mem.sliceAsBytes(destination));
    try checkScales(source, 0, record_bytes, byte_count / record_bytes);
    dispatch.kernels().dequantize_records(destination.ptr, source.ptr, dtype, destination.len);
}

/// (dtype, side, block_size, head_dim, f32 rows [token][head_dim], count, plane out, bytes)
pub fn blockQuantize(
    dtype: u32,
    side: u32,
    block_size: u32,
    head_dim: u32,
    rows: ?[*]const u8,
    count: u32,
    bytes: ?[*]u8,
    byte_count: u32,
) callconv(.c) i32 {
    const plane = planeOf(dtype, side, block_size, head_dim) catch |err| return status.fromError(err);
    return status.word(quantizeBlock(plane, rows, count, bytes, byte_count));
}

fn quantizeBlock(plane: Plane, rows: ?[*]const u8, count: u32, bytes: ?[*]u8, byte_count: u32) Error!void {
    if (count != plane.block_size * plane.head_dim) return error.InvalidSize;
    const source = try arguments.words(f32, rows, count);
    const destination = try output(bytes, byte_count, plane.bytes());
    try checkApart(std.mem.sliceAsBytes(source), destination);
    if (dispatch.kernels().storable(@ptrCast(source.ptr), .f32, plane.dtype, count) == 0) return error.NotFinite;
    dispatch.kernels().quantize(&.{
        .plane = plane,
        .rows = @ptrCast(source.ptr),
        .rows_dtype = .f32,
        .token_stride = plane.head_dim * @sizeOf(f32),
        .bytes = destination.ptr,
    });
}

/// (dtype, side, block_size, head_dim, plane, bytes, f32 rows out [token][head_dim], count)
pub fn blockDequantize(
    dtype: u32,
    side: u32,
    block_size: u32,
    head_dim: u32,
    bytes: ?[*]const u8,
    byte_count: u32,
    rows: ?[*]u8,
    count: u32,
) callconv(.c) i32 {
    const plane = planeOf(dtype, side, block_size, head_dim) catch |err| return status.fromError(err);
    return status.word(dequantizeBlock(plane, bytes, byte_count, rows, count));
}

fn dequantizeBlock(plane: Plane, bytes: ?[*]const u8, byte_count: u32, rows: ?[*]u8, count: u32) Error!void {
    const value_count = plane.block_size * plane.head_dim;
    if (byte_count != plane.bytes() or count < value_count) return error.InvalidSize;
    const source = (try arguments.in(bytes, byte_count))[0..byte_count];
    const destination = (try arguments.floatsOut(rows, count))[0..value_count];
    try checkApart(source, std.mem.sliceAsBytes(destination));
    // Scales and mins lie behind each other.
    try checkScales(source, plane.codeBytes(), 2, (byte_count - plane.codeBytes()) / 2);
    dispatch.kernels().dequantize(&.{
        .plane = plane,
        .bytes = source.ptr,
        .token_first = 0,
        .token_count = plane.block_size,
        .rows = @ptrCast(destination.ptr),
        .rows_dtype = .f32,
        .token_stride = plane.head_dim * @sizeOf(f32),
    });
}

/// (dtype, side, block_size, head_dim, records [token][head_dim / 32], bytes, plane out, bytes)
pub fn blockPack(
    dtype: u32,
    side: u32,
    block_size: u32,
    head_dim: u32,
    records: ?[*]const u8,
    record_byte_count: u32,
    bytes: ?[*]u8,
    byte_count: u32,
) callconv(.c) i32 {
    const plane = recordPlane(dtype, side, block_size, head_dim) catch |err| return status.fromError(err);
    return status.word(packBlock(plane, records, record_byte_count, bytes, byte_count));
}

fn packBlock(plane: Plane, records: ?[*]const u8, record_byte_count: u32, bytes: ?[*]u8, byte_count: u32) Error!void {
    // Records have as many bytes as the plane.
    if (record_byte_count != plane.bytes()) return error.InvalidSize;
    const source = (try arguments.in(records, record_byte_count))[0..record_byte_count];
    const destination = try output(bytes, byte_count, plane.bytes());
    try checkApart(source, destination);
    try checkScales(source, 0, group.recordBytes(plane.dtype), plane.scaleCount());
    plane.fromRecords(destination, source);
}

/// (dtype, side, block_size, head_dim, plane, bytes, records out [token][head_dim / 32], bytes)
pub fn blockUnpack(
    dtype: u32,
    side: u32,
    block_size: u32,
    head_dim: u32,
    bytes: ?[*]const u8,
    byte_count: u32,
    records: ?[*]u8,
    record_byte_count: u32,
) callconv(.c) i32 {
    const plane = recordPlane(dtype, side, block_size, head_dim) catch |err| return status.fromError(err);
    return status.word(unpackBlock(plane, bytes, byte_count, records, record_byte_count));
}

fn unpackBlock(plane: Plane, bytes: ?[*]const u8, byte_count: u32, records: ?[*]u8, record_byte_count: u32) Error!void {
    if (byte_count != plane.bytes()) return error.InvalidSize;
    const source = (try arguments.in(bytes, byte_count))[0..byte_count];
    const destination = try output(records, record_byte_count, plane.bytes());
    try checkApart(source, destination);
    plane.toRecords(source, destination);
}

/// A format that ggml has.
fn recordDtype(word: u32) Error!Dtype {
    const dtype = Dtype.fromWord(word) orelse return error.InvalidConfig;
    return switch (dtype) {
        .q8_0, .q4_0 => dtype,
        .f32, .f16, .bf16, .i8, .i4, .i2 => error.InvalidConfig,
    };
}

fn recordPlane(dtype: u32, side: u32, block_size: u32, head_dim: u32) Error!Plane {
    _ = try recordDtype(dtype);
    return planeOf(dtype, side, block_size, head_dim);
}

/// A plane that a cache may have.
fn planeOf(dtype: u32, side: u32, block_size: u32, head_dim: u32) Error!Plane {
    const plane: Plane = .{
        .dtype = Dtype.fromWord(dtype) orelse return error.InvalidConfig,
        .side = std.enums.fromInt(group.Side, side) orelse return error.InvalidConfig,
        .block_size = block_size,
        .head_dim = head_dim,
    };
    if (block_size > shape.block_size_max or head_dim > shape.head_dim_max) return error.InvalidConfig;
    if (!plane.isValid() or !std.math.isPowerOfTwo(block_size)) return error.InvalidConfig;
    return plane;
}

/// The first `needed` bytes of a buffer.
fn output(destination: ?[*]u8, byte_count: u32, needed: u64) Error![]u8 {
    if (byte_count < needed) return error.InvalidSize;
    return (try arguments.out(destination, byte_count))[0..@intCast(needed)];
}

/// Foreign bytes may hold any scale; one that is not finite would make its whole group so.
fn checkScales(bytes: []const u8, first: usize, stride: usize, count: usize) Error!void {
    const exponent = 0x7c00;
    for (0..count) |i| {
        const bits = std.mem.readInt(u16, bytes[first + i * stride ..][0..2], .little);
        if (bits & exponent == exponent) return error.NotFinite;
    }
}
