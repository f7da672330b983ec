//! Counts, layouts, offsets and byte sizes: the only file that multiplies indices.
//!
//! A contiguous cache is two arrays, keys and values, each
//!
//!     [layer][sequence][position][kv_head][head_dim]
//!
//!     offset(l, s, p, h, d) = (((l * S + s) * P + p) * H + h) * D + d
//!
//! with S sequences, P = max_seq_len positions, H KV heads and D = head_dim. The rows of one (layer, sequence) pair are
//! adjacent and called a *span*: [position][kv_head][head_dim].
//!
//! All sizes are 64-bit and checked. Llama-7B at 4096 tokens is 2 * 32 * 4096 * 32 * 128 * 4 B = 4 GiB, which is 0 in
//! 32 bits.

const std = @import("std");
const assert = std.debug.assert;
const Dtype = @import("dtype.zig").Dtype;
const group = @import("group.zig");
pub const Side = group.Side;

/// The largest head_dim: scratch for one head lies on the stack.
pub const head_dim_max = 256;

/// The most tokens of a block.
pub const block_size_max = 256;

comptime {
    // The largest block, and the largest head_dim, may be quantized.
    assert(block_size_max % group.token_multiple == 0 and head_dim_max % group.dim_multiple == 0);
}

/// The largest number of positions: a position and a count of rows fit an i32 result.
pub const max_seq_len_max = std.math.maxInt(i32);

/// Each KV head serves equally many query heads.
pub fn checkQueryHeads(q_head_count: ?u32, kv_head_count: u32) error{InvalidConfig}!void {
    const count = q_head_count orelse return;
    if (count == 0 or kv_head_count == 0 or count % kv_head_count != 0) return error.InvalidConfig;
}

/// The counts that fix the size of a contiguous cache.
pub const Shape = struct {
    layer_count: u32,
    sequence_count: u32 = 1,
    kv_head_count: u32,
    head_dim: u32,
    max_seq_len: u32,

    pub const Error = error{ InvalidConfig, OutOfMemory };

    /// Every count at least 1, head_dim at most 256, and every size of it in 64 bits.
    pub fn validate(shape: Shape) Error!void {
        const counts = [_]u32{
            shape.layer_count, shape.sequence_count, shape.kv_head_count, shape.head_dim, shape.max_seq_len,
        };
        for (counts) |count| if (count == 0) return error.InvalidConfig;
        if (shape.head_dim > head_dim_max) return error.InvalidConfig;
        if (shape.max_seq_len > max_seq_len_max) return error.InvalidConfig;
        // One row must be countable in the u32 element counts that cross the C ABI.
        if (shape.kv_head_count > std.math.maxInt(u32) / shape.head_dim) return error.InvalidConfig;
        // The widest element on both sides: every other product below is a part of this one.
        _ = try shape.memoryBytes(.f32, .f32);
    }

    /// Elements of one row of one side: kv_head_count * head_dim.
    pub fn kvDim(shape: Shape) u32 {
        return shape.kv_head_count * shape.head_dim;
    }

    /// Spans a side: one for each (layer, sequence).
    pub fn spanCount(shape: Shape) u64 {
        return @as(u64, shape.layer_count) * shape.sequence_count;
    }

    /// The span of a layer and sequence.
    pub fn spanIndex(shape: Shape, layer_index: u32, sequence_index: u32) u64 {
        assert(layer_index < shape.layer_count);
        assert(sequence_index < shape.sequence_count);
        return @as(u64, layer_index) * shape.sequence_count + sequence_index;
    }

    /// Bytes of one span of one side. Does not overflow once `validate` has passed.
    pub fn spanBytes(shape: Shape, dtype: Dtype) u64 {
        return @as(u64, shape.max_seq_len) * shape.rowBytes(dtype);
    }

    /// Bytes of one row, [kv_head][head_dim]: the token stride.
    pub fn rowBytes(shape: Shape, dtype: Dtype) u64 {
        return @as(u64, shape.kvDim()) * dtype.elementBytes();
    }

    /// Byte offset of a head inside a row: the head stride is head_dim.
    pub fn headBytes(shape: Shape, kv_head_index: u32, dtype: Dtype) u64 {
        assert(kv_head_index < shape.kv_head_count);
        return @as(u64, kv_head_index) * shape.head_dim * dtype.elementBytes();
    }

    /// Byte offset of a position inside its span.
    pub fn positionBytes(shape: Shape, position: u32, dtype: Dtype) u64 {
        assert(position <= shape.max_seq_len);
        return @as(u64, position) * shape.rowBytes(dtype);
    }

    /// Element offset in the logical array of a side, by the formula at the top of this file.
    pub fn offset(
        shape: Shape,
        layer_index: u32,
        sequence_index: u32,
        position: u32,
        kv_head_index: u32,
        dim: u32,
    ) u64 {
        assert(position < shape.max_seq_len);
        assert(kv_head_index < shape.kv_head_count);
        assert(dim < shape.head_dim);
        const row = shape.spanIndex(layer_index, sequence_index) * shape.max_seq_len + position;
        return (row * shape.kv_head_count + kv_head_index) * shape.head_dim + dim;
    }

    /// Bytes of the keys and values:
    /// layers * sequences * positions * KV heads * head_dim * (element bytes of K + element bytes of V).
    pub fn memoryBytes(shape: Shape, dtype_k: Dtype, dtype_v: Dtype) error{OutOfMemory}!u64 {
        const factors = [_]u64{
            shape.sequence_count,
            shape.max_seq_len,
            shape.kv_head_count,
            shape.head_dim,
            dtype_k.elementBytes() + dtype_v.elementBytes(),
        };
        var bytes: u64 = shape.layer_count;
        for (factors) |factor| {
            bytes = std.math.mul(u64, bytes, factor) catch return error.OutOfMemory;
        }
        return bytes;
    }
};

/// One block: `block_size` consecutive positions of one sequence in every layer of its group.
///
///     [layer][keys, values][kv_head] plane
///
/// The rows of one (layer, side, KV head) are its *plane*: [token][head_dim] in a float format, where a block that is not
/// full has a hole behind each head, or codes and scales, see `group.zig`.
pub const BlockShape = struct {
    /// Layers of the group.
    layer_count: u32,
    kv_head_count: u32,
    head_dim: u32,
    /// Tokens of a block: a power of two, 1 to 256; 64, 128 or 256 where a side is quantized.
    block_size: u32,
    dtype_k: Dtype,
    dtype_v: Dtype,

    pub fn validate(shape: BlockShape) error{ InvalidConfig, BlockTooLarge }!void {
        if (shape.layer_count == 0 or shape.kv_head_count == 0 or shape.head_dim == 0) return error.InvalidConfig;
        if (shape.head_dim > head_dim_max) return error.InvalidConfig;
        if (shape.block_size == 0 or shape.block_size > block_size_max) return error.InvalidConfig;
        if (!std.math.isPowerOfTwo(shape.block_size)) return error.InvalidConfig;
        if (shape.kv_head_count > std.math.maxInt(u32) / shape.head_dim) return error.InvalidConfig;
        for ([_]Side{ .keys, .values }) |side| {
            if (!shape.dtype(side).isFloat() and !shape.plane(side).isValid()) return error.InvalidConfig;
        }
        const layer_bytes = std.math.mul(u64, @as(u64, shape.kvDim()) * shape.block_size, 8) catch return error.BlockTooLarge;
        _ = std.math.mul(u64, layer_bytes, shape.layer_count) catch return error.BlockTooLarge;
    }

    pub fn dtype(shape: BlockShape, side: Side) Dtype {
        return if (side == .keys) shape.dtype_k else shape.dtype_v;
    }

    /// The same block in other formats.
    pub fn as(shape: BlockShape, dtype_k: Dtype, dtype_v: Dtype) BlockShape {
        var other = shape;
        other.dtype_k = dtype_k;
        other.dtype_v = dtype_v;
        return other;
    }

    pub fn isFloat(shape: BlockShape) bool {
        return shape.dtype_k.isFloat() and shape.dtype_v.isFloat();
    }

    pub fn kvDim(shape: BlockShape) u32 {
        return shape.kv_head_count * shape.head_dim;
    }

    /// The codes of one KV head of a quantized side.
    pub fn plane(shape: BlockShape, side: Side) group.Plane {
        return .{ .dtype = shape.dtype(side), .side = side, .block_size = shape.block_size, .head_dim = shape.head_dim };
    }

    /// Bytes of the rows of one KV head of one side.
    pub fn planeBytes(shape: BlockShape, side: Side) u64 {
        if (!shape.dtype(side).isFloat()) return shape.plane(side).bytes();
        return shape.block_size * shape.tokenBytes(side);
    }

    /// Bytes of one row of one head of a float side: the token stride.
    pub fn tokenBytes(shape: BlockShape, side: Side) u64 {
        return @as(u64, shape.head_dim) * shape.dtype(side).elementBytes();
    }

    /// Bytes of one layer of one side: [kv_head] planes.
    pub fn sideBytes(shape: BlockShape, side: Side) u64 {
        return shape.kv_head_count * shape.planeBytes(side);
    }

    /// Bytes of a block.
    pub fn blockBytes(shape: BlockShape) u64 {
        return shape.layer_count * (shape.sideBytes(.keys) + shape.sideBytes(.values));
    }

    /// Bytes that `row_count` rows take in one layer of one side. The scales of keys stand for all tokens of a block, so
    /// such a side counts whole whatever is left of it.
    pub fn rowsBytes(shape: BlockShape, side: Side, row_count: u32) u64 {
        assert(row_count <= shape.block_size);
        if (row_count == 0) return 0;
        if (shape.dtype(side).isFloat()) return shape.kv_head_count * row_count * shape.tokenBytes(side);
        if (side == .keys and shape.dtype_k.isAffine()) return shape.sideBytes(.keys);
        return shape.sideBytes(side) / shape.block_size * row_count;
    }

    /// Byte offset of one layer of one side in a block; `layer` counts within the group.
    pub fn sideOffset(shape: BlockShape, layer: u32, side: Side) u64 {
        assert(layer < shape.layer_count);
        const layer_bytes = shape.sideBytes(.keys) + shape.sideBytes(.values);
        return layer * layer_bytes + (if (side == .keys) 0 else shape.sideBytes(.keys));
    }

    /// Byte offset of the rows of a head in a block.
    pub fn planeOffset(shape: BlockShape, layer: u32, side: Side, kv_head_index: u32) u64 {
        assert(kv_head_index < shape.kv_head_count);
        return shape.sideOffset(layer, side) + kv_head_index * shape.planeBytes(side);
    }

    /// Byte offset of a row of a head in a block; the side is in floats.
    pub fn rowOffset(shape: BlockShape, layer: u32, side: Side, kv_head_index: u32, token: u32) u64 {
        assert(token < shape.block_size);
        return shape.planeOffset(layer, side, kv_head_index) + token * shape.tokenBytes(side);
    }

    /// Blocks that hold `row_count` rows.
    pub fn blockCount(shape: BlockShape, row_count: u32) u32 {
        return std.math.divCeil(u32, row_count, shape.block_size) catch unreachable; // not 0
    }
};

/// Elements that `token_count` rows of a side have, or null when that does not fit 64 bits.
pub fn rowElements(shape: anytype, token_count: u64) ?u64 {
    return std.math.mul(u64, token_count, shape.kvDim()) catch null;
}

/// The whole rows in `element_count` elements, or null when the last one is ragged.
pub fn rowCount(shape: anytype, element_count: u64) ?u64 {
    const kv_dim: u64 = shape.kvDim();
    if (element_count % kv_dim != 0) return null;
    return element_count / kv_dim;
}

/// Element offset in rows that stand [token][kv_head][head_dim].
pub fn tokenMajorOffset(shape: anytype, kv_head_index: u32, token_index: u64) u64 {
    assert(kv_head_index < shape.kv_head_count);
    return (token_index * shape.kv_head_count + kv_head_index) * shape.head_dim;
}

/// Elements from the rows of one KV head to those of the next where rows stand [kv_head][token][head_dim] without gaps.
pub fn headStride(shape: anytype, token_count: u64) u64 {
    return token_count * shape.head_dim;
}

/// Element offset in rows that stand [kv_head][token][head_dim], the heads `head_stride` elements apart.
pub fn headMajorOffset(shape: anytype, head_stride: u64, kv_head_index: u32, token_index: u64) u64 {
    assert(kv_head_index < shape.kv_head_count);
    assert((token_index + 1) * shape.head_dim <= head_stride);
    return kv_head_index * head_stride + token_index * shape.head_dim;
}

/// Elements from the first row of the first KV head to the end of the last row of the last one, heads `head_stride` elements
/// apart; null where `token_count` rows do not fit between two heads, or the sum does not fit 64 bits.
pub fn headMajorElements(shape: anytype, head_stride: u64, token_count: u64) ?u64 {
    if (token_count == 0) return 0;
    const head_elements = std.math.mul(u64, token_count, shape.head_dim) catch return null;
    if (head_elements > head_stride) return null;
    const before = std.math.mul(u64, shape.kv_head_count - 1, head_stride) catch return null;
    return std.math.add(u64, before, head_elements) catch null;
}

/// The rows of each KV head in `element_count` elements that stand [kv_head][token][head_dim], heads `head_stride` elements
/// apart; null where they are not whole rows, equally many of each head.
pub fn headMajorRowCount(shape: anytype, head_stride: u64, element_count: u64) ?u64 {
    if (element_count == 0) return 0;
    const before = std.math.mul(u64, shape.kv_head_count - 1, head_stride) catch return null;
    const head_elements = std.math.sub(u64, element_count, before) catch return null;
    if (head_elements % shape.head_dim != 0 or head_elements > head_stride) return null;
    return head_elements / shape.head_dim;
}

const testing = std.testing;

fn f32Bytes(layers: u32, heads: u32, dim: u32, max_seq_len: u32) !u64 {
    const shape: Shape = .{
        .layer_count = layers,
        .kv_head_count = heads,
        .head_dim = dim,
        .max_seq_len = max_seq_len,
    };
    try shape.validate();
    return shape.memoryBytes(.f32, .f32);
}

test "memoryBytes: nine geometries, three of them past 2^32" {
    const lengths = [_]u32{ 2048, 4096, 8192 };
    const rows = [_]struct { layers: u32, heads: u32, dim: u32, bytes: [3]u64 }{
        .{ .layers = 12, .heads = 12, .dim = 64, .bytes = .{ 150_994_944, 301_989_888, 603_979_776 } },
        .{ .layers = 32, .heads = 32, .dim = 80, .bytes = .{ 1_342_177_280, 2_684_354_560, 5_368_709_120 } },
        .{ .layers = 32, .heads = 32, .dim = 128, .bytes = .{ 2_147_483_648, 4_294_967_296, 8_589_934_592 } },
    };
    for (rows) |row| {
        for (lengths, row.bytes) |length, bytes| {
            try testing.expectEqual(bytes, try f32Bytes(row.layers, row.heads, row.dim, length));
        }
    }
}

test "memoryBytes: TinyLlama stores 4 KV heads, not 32 query heads" {
    const shape: Shape = .{ .layer_count = 22, .kv_head_count = 4, .head_dim = 64, .max_seq_len = 2048 };
    try testing.expectEqual(88 << 20, try shape.memoryBytes(.f32, .f32));
    try testing.expectEqual(44 << 20, try shape.memoryBytes(.f16, .f16));
    try testing.expectEqual(66 << 20, try shape.memoryBytes(.f16, .f32));
    try testing.expectEqual(704 << 20, try f32Bytes(22, 32, 64, 2048));
}

test "offset equals the formula for random indices, also past 2^32 elements" {
    var prng: std.Random.DefaultPrng = .init(testing.random_seed);
    const random = prng.random();
    const shape: Shape = .{
        .layer_count = 80,
        .sequence_count = 64,
        .kv_head_count = 8,
        .head_dim = 128,
        .max_seq_len = 131_072,
    };
    try shape.validate();
    for (0..1000) |_| {
        const l = random.uintLessThan(u32, 80);
        const s = random.uintLessThan(u32, 64);
        const p = random.uintLessThan(u32, 131_072);
        const h = random.uintLessThan(u32, 8);
        const d = random.uintLessThan(u32, 128);
        const expected = (((@as(u128, l) * 64 + s) * 131_072 + p) * 8 + h) * 128 + d;
        try testing.expectEqual(expected, shape.offset(l, s, p, h, d));
        // The same place by way of the span: no second truth.
        const in_run = shape.positionBytes(p, .f32) + shape.headBytes(h, .f32) + d * 4;
        try testing.expectEqual(
            expected * 4,
            @as(u128, shape.spanIndex(l, s)) * shape.spanBytes(.f32) + in_run,
        );
    }
    const last = shape.offset(79, 63, 131_071, 7, 127);
    try testing.expectEqual(80 * 64 * 131_072 * 8 * 128 - 1, last);
}

test "validate refuses zero counts, wide heads and sizes past 64 bits" {
    const good: Shape = .{ .layer_count = 1, .kv_head_count = 1, .head_dim = 256, .max_seq_len = 1 };
    try good.validate();
    inline for (std.meta.fields(Shape)) |field| {
        var bad = good;
        @field(bad, field.name) = 0;
        try testing.expectError(error.InvalidConfig, bad.validate());
    }
    var wide = good;
    wide.head_dim = 257;
    try testing.expectError(error.InvalidConfig, wide.validate());
    var long = good;
    long.max_seq_len = 0x8000_0000;
    try testing.expectError(error.InvalidConfig, long.validate());
    const absurd: Shape = .{
        .layer_count = 0xffff_ffff,
        .sequence_count = 0xffff_ffff,
        .kv_head_count = 0xff_ffff,
        .head_dim = 256,
        .max_seq_len = 0x7fff_ffff,
    };
    try testing.expectError(error.OutOfMemory, absurd.validate());
}

test headMajorOffset {
    // [kv_head][token][head_dim] of 2 heads, 4 tokens, head_dim 3: head 1, token 2 begins at (1 * 4 + 2) * 3 = 18.
    const shape: Shape = .{ .layer_count = 1, .kv_head_count = 2, .head_dim = 3, .max_seq_len = 8 };
    try testing.expectEqual(18, headMajorOffset(shape, headStride(shape, 4), 1, 2));
    // The same row where the heads are 20 elements apart: 1 * 20 + 2 * 3.
    try testing.expectEqual(26, headMajorOffset(shape, 20, 1, 2));
}

test "head-major rows at a stride: their elements, and their count again" {
    const shape: Shape = .{ .layer_count = 1, .kv_head_count = 3, .head_dim = 4, .max_seq_len = 8 };
    // 5 rows of 3 heads, 100 elements apart: 2 * 100 + 5 * 4.
    try testing.expectEqual(220, headMajorElements(shape, 100, 5).?);
    try testing.expectEqual(5, headMajorRowCount(shape, 100, 220).?);
    try testing.expectEqual(60, headMajorElements(shape, headStride(shape, 5), 5).?);
    // No row: no element, or as many as lie before those of the last head.
    try testing.expectEqual(0, headMajorElements(shape, 100, 0).?);
    try testing.expectEqual(0, headMajorRowCount(shape, 100, 0).?);
    try testing.expectEqual(0, headMajorRowCount(shape, 100, 200).?);
    // A part of a row, fewer than lie before the last head, and more rows than there are between two heads.
    try testing.expectEqual(null, headMajorRowCount(shape, 100, 221));
    try testing.expectEqual(null, headMajorRowCount(shape, 100, 199));
    try testing.expectEqual(null, headMajorRowCount(shape, 100, 304));
    try testing.expectEqual(null, headMajorElements(shape, 100, 26));
    // Sizes past 64 bits.
    try testing.expectEqual(null, headMajorElements(shape, std.math.maxInt(u64), 1));
    try testing.expectEqual(null, headMajorElements(shape, 100, std.math.maxInt(u64)));
    try testing.expectEqual(null, headMajorRowCount(shape, std.math.maxInt(u64), 4));
}

test "BlockShape: head-major planes with the block size as head stride" {
    // index(h, t, d) = (h * block_size + t) * head_dim + d: 2 heads, blocks of 4, head_dim 3.
    const shape: BlockShape = .{
        .layer_count = 2,
        .kv_head_count = 2,
        .head_dim = 3,
        .block_size = 4,
        .dtype_k = .f32,
        .dtype_v = .f16,
    };
    try shape.validate();
    try testing.expectEqual(19 * 4, shape.rowOffset(0, .keys, 1, 2) + 1 * 4);
    try testing.expectEqual(24 * 4, shape.sideBytes(.keys));
    try testing.expectEqual(24 * 2, shape.sideBytes(.values));
    try testing.expectEqual(2 * (96 + 48), shape.blockBytes());
    try testing.expectEqual(144, shape.sideOffset(1, .keys));
    try testing.expectEqual(144 + 96, shape.sideOffset(1, .values));
    try testing.expectEqual(2, shape.blockCount(5));
    try testing.expectEqual(0, shape.blockCount(0));
}

test "BlockShape refuses block sizes that are no power of two, and blocks past 64 bits" {
    var shape: BlockShape = .{
        .layer_count = 1,
        .kv_head_count = 1,
        .head_dim = 4,
        .block_size = 16,
        .dtype_k = .f16,
        .dtype_v = .f16,
    };
    for ([_]u32{ 0, 3, 48, 512 }) |size| {
        shape.block_size = size;
        try testing.expectError(error.InvalidConfig, shape.validate());
    }
    for ([_]u32{ 1, 2, 64, 256 }) |size| {
        shape.block_size = size;
        try shape.validate();
    }
    shape.head_dim = 257;
    try testing.expectError(error.InvalidConfig, shape.validate());
    shape.head_dim = 256;
    shape.kv_head_count = 1 << 23;
    shape.layer_count = 0xffff_ffff;
    try testing.expectError(error.BlockTooLarge, shape.validate());
}
