//! Quantized planes and records: where the codes and scales of a group lie.
//!
//! A *plane* is the rows of one KV head of one layer and side of a block: [token][head_dim] in meaning. As codes it is laid
//! out for integer dot products. One axis is summed over, `head_dim` for keys (a score is a sum over dims) and tokens for
//! values (an output is a sum over tokens); the other axis, the *lanes*, gives one result each, so that no sum ever runs
//! across a vector:
//!
//!     keys     lanes = tokens    sums = dims
//!     values   lanes = dims      sums = tokens
//!
//!     codes    [lane / 16][sum / (4 * n)][16 lanes][4 sums]      bytes of n codes, n = 1, 2, 4 for 8, 4, 2 bits
//!     scales   f16, behind the codes; then the mins, in the same order, where the format has them
//!
//! The 64 bytes [16 lanes][4 sums] are one vector of the widest level, and 16 of them one tile of AMX. Byte (lane, i) of a
//! vector of 4-bit codes holds sum i of its first four in the low nibble and sum 4 + i in the high one; with 2 bits, sums
//! i, 4 + i, 8 + i and 12 + i from the low bits up. 8-bit codes are signed, the others unsigned.
//!
//!     keys   of i8 i4 i2    one scale and min a channel     [dim]
//!     values of i8 i4 i2    one for each token and group    [dim / group_size][token]
//!     q8_0, q4_0            one for each token and group    [dim / 32][token]
//!
//! 64 tokens of 128 dims as i4 keys: 64 * 128 / 2 + 2 * 2 * 128 = 4608 bytes, 4.5 bits a value.
//!
//! A *record* is a group as ggml writes it, for rows that come from there or go there: the f16 scale, then the 32 codes.

const std = @import("std");
const assert = std.debug.assert;
const Dtype = @import("dtype.zig").Dtype;

/// Keys or values. The numbers cross the C ABI and are never changed.
pub const Side = enum(u32) { keys = 0, values = 1 };

/// Lanes of a vector of codes, and sums beside each other in one of its 4-byte words.
pub const lane_count = 16;
pub const quad = 4;
pub const vector_bytes = lane_count * quad;

/// Bytes of a scale, and of a min: an f16.
pub const scale_bytes = @sizeOf(f16);

/// Tokens of a block must be a multiple of this for quantized formats, and head_dim of `dim_multiple`.
pub const token_multiple = 64;
pub const dim_multiple = 32;

/// Values of a group of q8_0 and q4_0.
pub const record_values = 32;

/// A group of ggml's q8_0: 8.5 bits a value.
pub const RecordQ8 = extern struct {
    scale: u16,
    codes: [record_values]i8,
};

/// A group of ggml's q4_0, 4.5 bits a value: code i is the low nibble of byte i, code 16 + i the high one.
pub const RecordQ4 = extern struct {
    scale: u16,
    codes: [record_values / 2]u8,
};

comptime {
    // A stretch of 64 tokens is whole vectors of codes in either side, and dims are whole records.
    assert(token_multiple % (lane_count * 8 / 2) == 0 and dim_multiple % record_values == 0);
    assert(@sizeOf(RecordQ8) == 34);
    assert(@sizeOf(RecordQ4) == 18);
}

/// Bytes of one record of q8_0 or q4_0.
pub fn recordBytes(dtype: Dtype) u32 {
    return switch (dtype) {
        .q8_0 => @sizeOf(RecordQ8),
        .q4_0 => @sizeOf(RecordQ4),
        else => unreachable,
    };
}

/// The shape of a plane of codes.
pub const Plane = extern struct {
    dtype: Dtype,
    side: Side,
    /// Tokens.
    block_size: u32,
    head_dim: u32,

    pub fn isValid(plane: Plane) bool {
        return !plane.dtype.isFloat() and plane.block_size != 0 and plane.head_dim != 0 and
            plane.block_size % token_multiple == 0 and plane.head_dim % dim_multiple == 0;
    }

    /// The same plane with its format and side known at compile time, so that the compiler does their arithmetic.
    pub inline fn of(plane: Plane, comptime dtype: Dtype, comptime side: Side) Plane {
        assert(plane.dtype == dtype and plane.side == side);
        return .{ .dtype = dtype, .side = side, .block_size = plane.block_size, .head_dim = plane.head_dim };
    }

    /// Bytes of the codes, behind which the scales begin.
    pub fn codeBytes(plane: Plane) u32 {
        return plane.block_size * plane.head_dim / 8 * plane.dtype.codeBits();
    }

    /// Values that share a scale.
    pub fn groupSize(plane: Plane) u32 {
        if (!plane.dtype.isAffine()) return record_values;
        if (plane.isPerChannel()) return plane.block_size;
        return if (plane.head_dim % 64 == 0) 64 else 32;
    }

    /// Scales of the plane; as many mins where it has them.
    pub fn scaleCount(plane: Plane) u32 {
        return plane.block_size * plane.head_dim / plane.groupSize();
    }

    /// All bytes, a multiple of 64.
    pub fn bytes(plane: Plane) u32 {
        const per_group: u32 = if (plane.dtype.isAffine()) 2 * scale_bytes else scale_bytes;
        return plane.codeBytes() + per_group * plane.scaleCount();
    }

    /// Byte offset of the word that holds a value's code, with those of other sums of the same lane. The words of the lanes
    /// behind it follow, up to the next multiple of 16 lanes.
    pub fn codeOffset(plane: Plane, token: u32, dim: u32) u32 {
        return plane.codePlace(token, dim).byte / quad * quad;
    }

    /// Lanes of the plane: tokens of keys, dims of values.
    pub fn laneCount(plane: Plane) u32 {
        return if (plane.side == .keys) plane.block_size else plane.head_dim;
    }

    /// Bytes of the codes of 16 lanes and all their sums: the distance to those of the next 16 lanes.
    pub fn stripBytes(plane: Plane) u32 {
        return plane.codeBytes() / (plane.laneCount() / lane_count);
    }

    /// Byte offset of the scale that a value belongs to.
    pub fn scaleOffset(plane: Plane, token: u32, dim: u32) u32 {
        return plane.codeBytes() + scale_bytes * plane.scaleIndex(token, dim);
    }

    /// Byte offset of the min that a value belongs to.
    pub fn minOffset(plane: Plane, token: u32, dim: u32) u32 {
        assert(plane.dtype.isAffine());
        return plane.scaleOffset(token, dim) + scale_bytes * plane.scaleCount();
    }

    /// Bytes from the scales of one group of dims, [token], to those of the next.
    pub fn scaleStride(plane: Plane) u32 {
        assert(!plane.isPerChannel());
        return scale_bytes * plane.block_size;
    }

    /// Whether each dim has one scale, that of all tokens.
    pub fn isPerChannel(plane: Plane) bool {
        return plane.dtype.isAffine() and plane.side == .keys;
    }

    /// Bytes at equal distances within a plane.
    pub const Stretch = struct { offset: u32, row_bytes: u32, row_stride: u32, row_count: u32 };

    /// The codes of the 64 tokens from `token` on: those of keys lie together, those of values in one row for each 16 dims.
    pub fn codeStretch(plane: Plane, token: u32) Stretch {
        assert(token % token_multiple == 0);
        const stretch_bytes = plane.codeBytes() / (plane.block_size / token_multiple);
        const is_whole = plane.side == .keys or plane.block_size == token_multiple;
        const row_count = if (is_whole) 1 else plane.laneCount() / lane_count;
        return .{
            .offset = plane.codeOffset(token, 0),
            .row_bytes = stretch_bytes / row_count,
            .row_stride = if (is_whole) 0 else plane.stripBytes(),
            .row_count = row_count,
        };
    }

    /// The scales of the 64 tokens from `token` on: all scales, or one row for each group of dims.
    pub fn scaleStretch(plane: Plane, token: u32) Stretch {
        assert(token % token_multiple == 0);
        const offset = plane.scaleOffset(token, 0);
        if (plane.isPerChannel()) return .{
            .offset = offset,
            .row_bytes = scale_bytes * plane.head_dim,
            .row_stride = 0,
            .row_count = 1,
        };
        return .{
            .offset = offset,
            .row_bytes = scale_bytes * token_multiple,
            .row_stride = plane.scaleStride(),
            .row_count = plane.head_dim / plane.groupSize(),
        };
    }

    /// The mins of the same tokens.
    pub fn minStretch(plane: Plane, token: u32) Stretch {
        var stretch = plane.scaleStretch(token);
        stretch.offset = plane.minOffset(token, 0);
        return stretch;
    }

    /// The number of the scale, and of the min, that a value belongs to.
    pub fn scaleIndex(plane: Plane, token: u32, dim: u32) u32 {
        assert(token < plane.block_size and dim < plane.head_dim);
        if (plane.isPerChannel()) return dim;
        return dim / plane.groupSize() * plane.block_size + token;
    }

    /// The byte that holds a code, and the lowest of its bits.
    pub const CodePlace = struct { byte: u32, shift: u3 };

    pub fn codePlace(plane: Plane, token: u32, dim: u32) CodePlace {
        assert(token < plane.block_size and dim < plane.head_dim);
        const lane = if (plane.side == .keys) token else dim;
        const sum = if (plane.side == .keys) dim else token;
        const sums = if (plane.side == .keys) plane.head_dim else plane.block_size;
        const bits = plane.dtype.codeBits();
        const quads_a_vector = 8 / @as(u32, bits);
        const vector = lane / lane_count * (sums / quad / quads_a_vector) + sum / quad / quads_a_vector;
        return .{
            .byte = vector * vector_bytes + lane % lane_count * quad + sum % quad,
            .shift = @intCast(sum / quad % quads_a_vector * bits),
        };
    }

    /// A code as it is stored: signed where it has 8 bits.
    pub fn code(plane: Plane, codes: []const u8, token: u32, dim: u32) i16 {
        const place = plane.codePlace(token, dim);
        if (plane.dtype.codeBits() == 8) return @as(i8, @bitCast(codes[place.byte]));
        return codes[place.byte] >> place.shift & plane.codeMask();
    }

    /// Writes a code over the one that is there.
    pub fn setCode(plane: Plane, codes: []u8, token: u32, dim: u32, value: i16) void {
        const place = plane.codePlace(token, dim);
        if (plane.dtype.codeBits() == 8) {
            codes[place.byte] = @bitCast(@as(i8, @intCast(value)));
            return;
        }
        assert(value >= 0 and value <= plane.codeMask());
        const mask = @as(u8, plane.codeMask()) << place.shift;
        codes[place.byte] = codes[place.byte] & ~mask | @as(u8, @intCast(value)) << place.shift;
    }

    fn codeMask(plane: Plane) u8 {
        const least, const largest = plane.dtype.codeRange();
        return @intCast(largest - least);
    }

    /// The f16 bits of the scale with this number.
    pub fn scaleBits(plane: Plane, plane_bytes: []const u8, index: u32) u16 {
        assert(index < plane.scaleCount());
        return std.mem.readInt(u16, plane_bytes[plane.codeBytes() + scale_bytes * index ..][0..scale_bytes], .little);
    }

    /// All scales, and all mins where there are any: f16 behind the codes.
    pub fn scalesAndMins(plane: Plane, plane_bytes: []const u8) []align(1) const u16 {
        return std.mem.bytesAsSlice(u16, plane_bytes[plane.codeBytes()..plane.bytes()]);
    }

    /// Writes the f16 bits of the scale that a value belongs to.
    pub fn setScaleBits(plane: Plane, plane_bytes: []u8, token: u32, dim: u32, bits: u16) void {
        std.mem.writeInt(u16, plane_bytes[plane.scaleOffset(token, dim)..][0..scale_bytes], bits, .little);
    }

    /// The f16 bits of the min that a value belongs to.
    pub fn minBits(plane: Plane, plane_bytes: []const u8, token: u32, dim: u32) u16 {
        return std.mem.readInt(u16, plane_bytes[plane.minOffset(token, dim)..][0..scale_bytes], .little);
    }

    /// Writes the f16 bits of the min that a value belongs to.
    pub fn setMinBits(plane: Plane, plane_bytes: []u8, token: u32, dim: u32, bits: u16) void {
        std.mem.writeInt(u16, plane_bytes[plane.minOffset(token, dim)..][0..scale_bytes], bits, .little);
    }

    /// Writes the records of rows [token][head_dim / 32] into a plane of the same format: codes and scales stay what they
    /// are.
    pub fn fromRecords(plane: Plane, plane_bytes: []u8, records: []const u8) void {
        const record_bytes = recordBytes(plane.dtype);
        assert(records.len == plane.block_size * plane.head_dim / record_values * record_bytes);
        const groups = plane.head_dim / record_values;
        for (0..plane.block_size) |t| for (0..groups) |g| {
            const token: u32 = @intCast(t);
            const group: u32 = @intCast(g);
            const record = records[(token * groups + group) * record_bytes ..][0..record_bytes];
            @memcpy(plane_bytes[plane.scaleOffset(token, group * record_values)..][0..scale_bytes], record[0..scale_bytes]);
            for (0..record_values) |i| {
                const dim = group * record_values + @as(u32, @intCast(i));
                plane.setCode(plane_bytes, token, dim, recordCode(plane.dtype, record[scale_bytes..], i));
            }
        };
    }

    /// Writes the records of the plane's rows, [token][head_dim / 32].
    pub fn toRecords(plane: Plane, plane_bytes: []const u8, records: []u8) void {
        const record_bytes = recordBytes(plane.dtype);
        assert(records.len == plane.block_size * plane.head_dim / record_values * record_bytes);
        const groups = plane.head_dim / record_values;
        @memset(records, 0);
        for (0..plane.block_size) |t| for (0..groups) |g| {
            const token: u32 = @intCast(t);
            const group: u32 = @intCast(g);
            const record = records[(token * groups + group) * record_bytes ..][0..record_bytes];
            @memcpy(record[0..scale_bytes], plane_bytes[plane.scaleOffset(token, group * record_values)..][0..scale_bytes]);
            for (0..record_values) |i| {
                const dim = group * record_values + @as(u32, @intCast(i));
                const value = plane.code(plane_bytes, token, dim);
                if (plane.dtype == .q8_0) {
                    record[scale_bytes + i] = @bitCast(@as(i8, @intCast(value)));
                } else {
                    record[scale_bytes + i % 16] |= @as(u8, @intCast(value)) << @intCast(i / 16 * 4);
                }
            }
        };
    }
};

fn recordCode(dtype: Dtype, codes: []const u8, i: usize) i16 {
    if (dtype == .q8_0) return @as(i8, @bitCast(codes[i]));
    return if (i < 16) codes[i] & 15 else codes[i - 16] >> 4;
}

const testing = std.testing;

test "Plane.bytes: 8.5, 4.5 and 2.5 bits a value at 64 tokens, less for larger blocks" {
    const rows = [_]struct { Dtype, Side, u32, u32, u32 }{
        .{ .q8_0, .keys, 64, 128, 64 * 128 * 17 / 16 },
        .{ .q4_0, .values, 64, 128, 64 * 128 * 9 / 16 },
        .{ .i8, .keys, 64, 128, 64 * 128 * 17 / 16 },
        .{ .i4, .keys, 64, 128, 4608 },
        .{ .i4, .values, 64, 128, 4608 },
        .{ .i4, .values, 64, 96, 64 * 96 * 5 / 8 },
        .{ .i2, .keys, 64, 128, 64 * 128 * 5 / 16 },
        .{ .i4, .keys, 256, 128, 256 * 64 + 512 },
        .{ .i2, .values, 128, 32, 128 * 8 + 4 * 128 },
    };
    for (rows) |row| {
        const dtype, const side, const block_size, const head_dim, const bytes = row;
        const plane: Plane = .{ .dtype = dtype, .side = side, .block_size = block_size, .head_dim = head_dim };
        try testing.expect(plane.isValid());
        try testing.expectEqual(bytes, plane.bytes());
        try testing.expectEqual(0, plane.bytes() % 64);
    }
}

test "Plane.isValid: whole vectors only" {
    for ([_][2]u32{ .{ 32, 64 }, .{ 64, 48 }, .{ 0, 32 }, .{ 64, 0 }, .{ 96, 32 } }) |pair| {
        const plane: Plane = .{ .dtype = .i4, .side = .keys, .block_size = pair[0], .head_dim = pair[1] };
        try testing.expect(!plane.isValid());
    }
    try testing.expect(!(Plane{ .dtype = .f16, .side = .keys, .block_size = 64, .head_dim = 64 }).isValid());
}

test "codePlace: every code has its own bits, and they fill the codes" {
    for ([_]Dtype{ .q8_0, .q4_0, .i8, .i4, .i2 }) |dtype| for (std.enums.values(Side)) |side| for ([_]u32{ 32, 96 }) |head_dim| {
        const plane: Plane = .{ .dtype = dtype, .side = side, .block_size = 64, .head_dim = head_dim };
        var seen: [64 * 96]u8 = @splat(0);
        const codes = seen[0..plane.codeBytes()];
        for (0..plane.block_size) |token| for (0..head_dim) |dim| {
            const place = plane.codePlace(@intCast(token), @intCast(dim));
            const mask = @as(u8, plane.codeMask()) << place.shift;
            try testing.expectEqual(0, codes[place.byte] & mask);
            codes[place.byte] |= mask;
        };
        try testing.expect(std.mem.allEqual(u8, codes, 0xff));
    };
}

test "codePlace: the picture at the top of this file" {
    // Token 17, dim 6 of i4 keys of 64 dims: lanes 16 to 31, second quad, so the high nibble of the first vector there.
    const keys: Plane = .{ .dtype = .i4, .side = .keys, .block_size = 64, .head_dim = 64 };
    const place = keys.codePlace(17, 6);
    try testing.expectEqual(8 * 64 + 1 * 4 + 2, place.byte);
    try testing.expectEqual(4, place.shift);
    // Token 6, dim 17 of i2 values: lanes 16 to 31, 4 vectors of 16 tokens each before it, second pair of bits.
    const values: Plane = .{ .dtype = .i2, .side = .values, .block_size = 64, .head_dim = 64 };
    const other = values.codePlace(6, 17);
    try testing.expectEqual(4 * 64 + 1 * 4 + 2, other.byte);
    try testing.expectEqual(2, other.shift);
}

test "records go in and come out byte for byte" {
    var prng: std.Random.DefaultPrng = .init(testing.random_seed);
    for ([_]Dtype{ .q8_0, .q4_0 }) |dtype| for (std.enums.values(Side)) |side| {
        const plane: Plane = .{ .dtype = dtype, .side = side, .block_size = 64, .head_dim = 96 };
        var records: [64 * 3 * 34]u8 = undefined;
        const given = records[0 .. 64 * 3 * recordBytes(dtype)];
        prng.random().bytes(given);
        var plane_bytes: [64 * 96 * 2]u8 = @splat(0xaa);
        plane.fromRecords(plane_bytes[0..plane.bytes()], given);
        var back: [records.len]u8 = undefined;
        plane.toRecords(plane_bytes[0..plane.bytes()], back[0..given.len]);
        try testing.expectEqualSlices(u8, given, back[0..given.len]);
        for (plane_bytes[plane.bytes()..]) |byte| try testing.expectEqual(0xaa, byte);
    };
}

test "Plane.codeStretch, scaleStretch and minStretch: what the values of 64 tokens belong to, and nothing else" {
    for ([_]Dtype{ .q4_0, .q8_0, .i8, .i2 }) |dtype| for (std.enums.values(Side)) |side| for ([_]u32{ 64, 128 }) |block_size| {
        const plane: Plane = .{ .dtype = dtype, .side = side, .block_size = block_size, .head_dim = 128 };
        const first = block_size - token_multiple;
        const plane_bytes_max = 128 * 128 + 2 * 1024;
        var expected: [plane_bytes_max]bool = @splat(false);
        for (first..block_size) |token| for (0..plane.head_dim) |dim| {
            expected[plane.codePlace(@intCast(token), @intCast(dim)).byte] = true;
            @memset(expected[plane.scaleOffset(@intCast(token), @intCast(dim))..][0..scale_bytes], true);
            if (dtype.isAffine()) @memset(expected[plane.minOffset(@intCast(token), @intCast(dim))..][0..scale_bytes], true);
        };
        var got: [plane_bytes_max]bool = @splat(false);
        var stretches: [3]Plane.Stretch = .{ plane.codeStretch(first), plane.scaleStretch(first), undefined };
        if (dtype.isAffine()) stretches[2] = plane.minStretch(first);
        for (stretches[0..if (dtype.isAffine()) 3 else 2]) |stretch| for (0..stretch.row_count) |row| {
            @memset(got[stretch.offset + row * stretch.row_stride ..][0..stretch.row_bytes], true);
        };
        try testing.expectEqual(expected, got);
    };
}
