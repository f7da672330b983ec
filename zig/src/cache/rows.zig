//! Rows on their way in and out of a cache: what a caller hands over, where a copy goes, and what a reader sees in place.

const std = @import("std");
const assert = std.debug.assert;
const Dtype = @import("../dtype.zig").Dtype;
const shapes = @import("../shape.zig");
const BlockPool = @import("block_pool.zig").BlockPool;

/// How the rows of an input stand in memory.
pub const Layout = enum(u32) {
    /// [token][kv_head][head_dim]
    token_major = 0,
    /// [kv_head][token][head_dim]
    head_major = 1,
};

/// Rows of one side as a caller hands them over; unaligned.
pub const Input = struct {
    bytes: [*]const u8,
    element_count: u64,
    dtype: Dtype = .f32,
    layout: Layout = .token_major,

    pub fn fromF32(elements: []align(1) const f32) Input {
        return .{ .bytes = @ptrCast(elements.ptr), .element_count = elements.len };
    }

    /// The row of one head of one token, [head_dim]; `token_count` are the tokens of the whole input.
    pub fn headRow(input: Input, shape: anytype, token_count: u64, kv_head: u32, token: u64) [*]const u8 {
        const element = switch (input.layout) {
            .token_major => shapes.tokenMajorOffset(shape, kv_head, token),
            .head_major => shapes.headMajorOffset(shape, token_count, kv_head, token),
        };
        assert(element + shape.head_dim <= input.element_count);
        return input.bytes + element * input.dtype.elementBytes();
    }
};

/// A copy's destination, [token][kv_head][head_dim]; unaligned.
pub const Output = struct {
    bytes: [*]u8,
    element_count: u64,
    dtype: Dtype = .f32,
};

/// The rows of one layer of one sequence as a reader sees them now, committed and pending, in place.
///
/// Resident are the positions in [0, sink_end) and in [first, row_count): all of them unless a retention policy let
/// some go. Valid until rows are appended to the layer or dropped, or the cache is freed.
pub const Rows = struct {
    kv_head_count: u32,
    head_dim: u32,
    dtype_k: Dtype,
    dtype_v: Dtype,
    /// Positions, evicted ones included.
    row_count: u32,
    sink_end: u32 = 0,
    first: u32 = 0,
    /// The newest rows a query may see, by the layer's own window; null for all.
    window_tokens: ?u32 = null,
    place: Place,

    pub const Place = union(enum) {
        contiguous: Contiguous,
        paged: Paged,
    };

    pub const Contiguous = struct {
        shape: shapes.Shape,
        /// [position][kv_head][head_dim]
        keys: [*]const u8,
        values: [*]const u8,
    };

    pub const Paged = struct {
        shape: shapes.BlockShape,
        pool: *const BlockPool,
        /// Block of each `block_size` positions, -1 where it was evicted.
        table: []const i32,
        /// Within the group.
        layer: u32,
    };

    /// Adjacent rows of one head.
    pub const Run = struct {
        keys: [*]const u8,
        values: [*]const u8,
        token_count: u32,
    };

    /// The longest adjacent run of resident rows from `position` on, ending before `end`.
    pub fn run(rows: *const Rows, kv_head: u32, position: u32, end: u32) Run {
        assert(position < end and end <= rows.row_count);
        assert(end <= rows.sink_end or position >= rows.first);
        switch (rows.place) {
            .contiguous => |place| {
                const shape = place.shape;
                return .{
                    .keys = place.keys + shape.positionBytes(position, rows.dtype_k) + shape.headBytes(kv_head, rows.dtype_k),
                    .values = place.values + shape.positionBytes(position, rows.dtype_v) + shape.headBytes(kv_head, rows.dtype_v),
                    .token_count = end - position,
                };
            },
            .paged => |place| {
                const token = position % place.shape.block_size;
                const block: u32 = @intCast(place.table[position / place.shape.block_size]);
                const bytes = place.pool.bytes(block);
                return .{
                    .keys = bytes.ptr + place.shape.rowOffset(place.layer, .keys, kv_head, token),
                    .values = bytes.ptr + place.shape.rowOffset(place.layer, .values, kv_head, token),
                    .token_count = @min(end - position, place.shape.block_size - token),
                };
            },
        }
    }

    /// Bytes from one key of a run to the next.
    pub fn tokenStrideK(rows: *const Rows) u64 {
        return switch (rows.place) {
            .contiguous => |place| place.shape.rowBytes(rows.dtype_k),
            .paged => |place| place.shape.tokenBytes(.keys),
        };
    }

    /// Bytes from one value of a run to the next.
    pub fn tokenStrideV(rows: *const Rows) u64 {
        return switch (rows.place) {
            .contiguous => |place| place.shape.rowBytes(rows.dtype_v),
            .paged => |place| place.shape.tokenBytes(.values),
        };
    }

    /// Resident rows, pending ones included.
    pub fn residentCount(rows: *const Rows) u32 {
        return if (rows.first <= rows.sink_end) rows.row_count else rows.sink_end + rows.row_count - rows.first;
    }
};
