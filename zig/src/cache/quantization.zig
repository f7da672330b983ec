//! Rows into quantized bytes and back, without a cache: ggml's records, the planes of blocks, and one into the other.
//!
//! Memory that a call reads and memory that it writes must not overlap: a code would be read where it was just written.
//! Outputs may be longer than what is written.

const std = @import("std");
const checkApart = @import("overlap.zig").checkApart;
const dispatch = @import("../kernels/dispatch.zig");
const Dtype = @import("../dtype.zig").Dtype;
const group = @import("../group.zig");
const Plane = group.Plane;
const shape = @import("../shape.zig");

pub const Error = error{ InvalidConfig, InvalidSize, NotFinite, Unsupported };

/// Quantizes rows, whose length is a multiple of 32, into records of `q8_0` or `q4_0`.
pub fn quantizeRows(dtype: Dtype, rows: []align(1) const f32, records: []u8) Error!void {
    try dispatch.checkCpu();
    try checkRecords(dtype);
    if (rows.len % group.record_values != 0) return error.InvalidSize;
    const destination = try front(records, @as(u64, rows.len / group.record_values) * group.recordBytes(dtype));
    try checkApart(std.mem.sliceAsBytes(rows), destination);
    if (dispatch.kernels().storable(@ptrCast(rows.ptr), .f32, dtype, rows.len) == 0) return error.NotFinite;
    dispatch.kernels().quantize_records(destination.ptr, dtype, rows.ptr, rows.len);
}

/// Turns records of `q8_0` or `q4_0` back into rows.
pub fn dequantizeRows(dtype: Dtype, records: []const u8, rows: []align(1) f32) Error!void {
    try dispatch.checkCpu();
    try checkRecords(dtype);
    const record_bytes = group.recordBytes(dtype);
    if (records.len % record_bytes != 0) return error.InvalidSize;
    const value_count = @as(u64, records.len / record_bytes) * group.record_values;
    if (rows.len < value_count) return error.InvalidSize;
    const destination = rows[0..@intCast(value_count)];
    try checkApart(records, std.mem.sliceAsBytes(destination));
    try checkRecordScales(dtype, records);
    dispatch.kernels().dequantize_records(destination.ptr, records.ptr, dtype, destination.len);
}

/// Quantizes the rows of one KV head of a block, [token][head_dim], into a plane.
pub fn quantizePlane(plane: Plane, rows: []align(1) const f32, bytes: []u8) Error!void {
    try dispatch.checkCpu();
    try checkPlane(plane);
    if (rows.len != plane.block_size * plane.head_dim) return error.InvalidSize;
    const destination = try front(bytes, plane.bytes());
    try checkApart(std.mem.sliceAsBytes(rows), destination);
    if (dispatch.kernels().storable(@ptrCast(rows.ptr), .f32, plane.dtype, rows.len) == 0) return error.NotFinite;
    dispatch.kernels().quantize(&.{
        .plane = plane,
        .rows = @ptrCast(rows.ptr),
        .rows_dtype = .f32,
        .token_stride = plane.head_dim * @sizeOf(f32),
        .bytes = destination.ptr,
    });
}

/// Turns a plane back into rows, [token][head_dim].
pub fn dequantizePlane(plane: Plane, bytes: []const u8, rows: []align(1) f32) Error!void {
    try dispatch.checkCpu();
    try checkPlane(plane);
    const value_count = plane.block_size * plane.head_dim;
    if (bytes.len != plane.bytes() or rows.len < value_count) return error.InvalidSize;
    const destination = rows[0..value_count];
    try checkApart(bytes, std.mem.sliceAsBytes(destination));
    for (plane.scalesAndMins(bytes)) |bits| if (!isFinite(std.mem.littleToNative(u16, bits))) return error.NotFinite;
    dispatch.kernels().dequantize(&.{
        .plane = plane,
        .bytes = bytes.ptr,
        .token_first = 0,
        .token_count = plane.block_size,
        .rows = @ptrCast(destination.ptr),
        .rows_dtype = .f32,
        .token_stride = plane.head_dim * @sizeOf(f32),
    });
}

/// Packs records, [token][head_dim / 32], into a plane of the same format, which has as many bytes.
pub fn packPlane(plane: Plane, records: []const u8, bytes: []u8) Error!void {
    try checkRecords(plane.dtype);
    try checkPlane(plane);
    if (records.len != plane.bytes()) return error.InvalidSize;
    const destination = try front(bytes, plane.bytes());
    try checkApart(records, destination);
    try checkRecordScales(plane.dtype, records);
    plane.fromRecords(destination, records);
}

/// Unpacks a plane into records, [token][head_dim / 32].
pub fn unpackPlane(plane: Plane, bytes: []const u8, records: []u8) Error!void {
    try checkRecords(plane.dtype);
    try checkPlane(plane);
    if (bytes.len != plane.bytes()) return error.InvalidSize;
    const destination = try front(records, plane.bytes());
    try checkApart(bytes, destination);
    plane.toRecords(bytes, destination);
}

/// A format that ggml has.
fn checkRecords(dtype: Dtype) error{InvalidConfig}!void {
    switch (dtype) {
        .q8_0, .q4_0 => {},
        .f32, .f16, .bf16, .i8, .i4, .i2 => return error.InvalidConfig,
    }
}

/// A plane that a block may have.
fn checkPlane(plane: Plane) error{InvalidConfig}!void {
    if (plane.block_size > shape.block_size_max or plane.head_dim > shape.head_dim_max) return error.InvalidConfig;
    if (!plane.isValid() or !std.math.isPowerOfTwo(plane.block_size)) return error.InvalidConfig;
}

/// The first `byte_count` bytes of an output.
fn front(bytes: []u8, byte_count: u64) error{InvalidSize}![]u8 {
    if (bytes.len < byte_count) return error.InvalidSize;
    return bytes[0..@intCast(byte_count)];
}

/// Foreign records may hold any scale; one that is not finite would make its whole group so.
fn checkRecordScales(dtype: Dtype, records: []const u8) error{NotFinite}!void {
    const record_bytes = group.recordBytes(dtype);
    var first: usize = 0;
    while (first < records.len) : (first += record_bytes) {
        if (!isFinite(std.mem.readInt(u16, records[first..][0..group.scale_bytes], .little))) return error.NotFinite;
    }
}

/// Is an f16 neither infinite nor a NaN?
fn isFinite(bits: u16) bool {
    const exponent = 0x7c00;
    return bits & exponent != exponent;
}
