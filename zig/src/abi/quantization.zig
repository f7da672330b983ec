//! Bodies of the exports that turn rows into quantized bytes and back, without a cache.

const std = @import("std");
const buffer = @import("buffer.zig");
const Dtype = @import("../dtype.zig").Dtype;
const group = @import("../group.zig");
const Plane = group.Plane;
const quantization = @import("../cache/quantization.zig");
const status = @import("status.zig");

/// (dtype, f32 rows, count, records out, bytes)
pub fn rowsQuantize(dtype: u32, rows: ?[*]const u8, count: u32, records: ?[*]u8, byte_count: u32) callconv(.c) i32 {
    const format = dtypeOf(dtype) catch |err| return status.fromError(err);
    const source = buffer.words(f32, rows, count) catch |err| return status.fromError(err);
    const destination = buffer.bytesOut(records, byte_count) catch |err| return status.fromError(err);
    return status.word(quantization.quantizeRows(format, source, destination));
}

/// (dtype, records, bytes, f32 rows out, count)
pub fn rowsDequantize(dtype: u32, records: ?[*]const u8, byte_count: u32, rows: ?[*]u8, count: u32) callconv(.c) i32 {
    const format = dtypeOf(dtype) catch |err| return status.fromError(err);
    const source = buffer.bytesIn(records, byte_count) catch |err| return status.fromError(err);
    const destination = buffer.floatsOut(rows, count) catch |err| return status.fromError(err);
    return status.word(quantization.dequantizeRows(format, source, destination));
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
    const source = buffer.words(f32, rows, count) catch |err| return status.fromError(err);
    const destination = buffer.bytesOut(bytes, byte_count) catch |err| return status.fromError(err);
    return status.word(quantization.quantizePlane(plane, source, destination));
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
    const source = buffer.bytesIn(bytes, byte_count) catch |err| return status.fromError(err);
    const destination = buffer.floatsOut(rows, count) catch |err| return status.fromError(err);
    return status.word(quantization.dequantizePlane(plane, source, destination));
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
    const plane = planeOf(dtype, side, block_size, head_dim) catch |err| return status.fromError(err);
    const source = buffer.bytesIn(records, record_byte_count) catch |err| return status.fromError(err);
    const destination = buffer.bytesOut(bytes, byte_count) catch |err| return status.fromError(err);
    return status.word(quantization.packPlane(plane, source, destination));
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
    const plane = planeOf(dtype, side, block_size, head_dim) catch |err| return status.fromError(err);
    const source = buffer.bytesIn(bytes, byte_count) catch |err| return status.fromError(err);
    const destination = buffer.bytesOut(records, record_byte_count) catch |err| return status.fromError(err);
    return status.word(quantization.unpackPlane(plane, source, destination));
}

fn dtypeOf(word: u32) error{InvalidConfig}!Dtype {
    return Dtype.fromWord(word) orelse error.InvalidConfig;
}

fn planeOf(dtype: u32, side: u32, block_size: u32, head_dim: u32) error{InvalidConfig}!Plane {
    return .{
        .dtype = try dtypeOf(dtype),
        .side = std.enums.fromInt(group.Side, side) orelse return error.InvalidConfig,
        .block_size = block_size,
        .head_dim = head_dim,
    };
}
