//! A window on rows in place: where they lie, how far apart, and in which format.

const std = @import("std");
const Dtype = @import("../dtype.zig").Dtype;
const Rows = @import("rows.zig").Rows;
const shapes = @import("../shape.zig");
const BlockShape = shapes.BlockShape;
const Tier = @import("tiers/policy.zig").Tier;

/// One live block, or all rows of a contiguous layer. Valid as long as the generation of its layer stays what it was.
pub const View = struct {
    /// The first row of the first head; of a quantized side its first plane.
    keys: [*]const u8,
    values: [*]const u8,
    /// Absolute position of the first row.
    start: u32,
    row_count: u32,
    dtype_k: Dtype,
    dtype_v: Dtype,
    /// In elements; 0 where a side is quantized.
    token_stride: u32,
    head_stride: u32,
    tier: Tier = .tail,
    /// Positions the block can hold; 0 where there are no blocks.
    block_size: u32 = 0,
    /// Bytes of all heads of a quantized side; 0 for a side in floats.
    bytes_k: u32 = 0,
    bytes_v: u32 = 0,

    /// The window on the resident rows [position, end), which lie in one block.
    pub fn of(rows: *const Rows, position: u32, end: u32) View {
        const run = rows.run(0, position, end);
        var view: View = .{
            .keys = run.keys,
            .values = run.values,
            .start = position,
            .row_count = end - position,
            .dtype_k = undefined,
            .dtype_v = undefined,
            .token_stride = rows.kv_head_count * rows.head_dim,
            .head_stride = rows.head_dim,
        };
        switch (rows.memory) {
            .contiguous => |span| {
                view.dtype_k = span.dtype_k;
                view.dtype_v = span.dtype_v;
            },
            .paged => |blocks| {
                const shape = blocks.formatAt(position).shape;
                view.dtype_k = shape.dtype_k;
                view.dtype_v = shape.dtype_v;
                view.token_stride = if (shape.isFloat()) shape.head_dim else 0;
                view.head_stride = if (shape.isFloat()) shape.block_size * shape.head_dim else 0;
                view.block_size = shape.block_size;
                view.bytes_k = codeBytes(shape, .keys);
                view.bytes_v = codeBytes(shape, .values);
            },
        }
        return view;
    }

    fn codeBytes(shape: BlockShape, side: shapes.Side) u32 {
        return if (shape.dtype(side).isFloat()) 0 else @intCast(shape.sideBytes(side));
    }
};

/// Why rows do not lie in one piece, token-major. The numbers cross the C ABI and are never changed.
pub const Reason = enum(u32) {
    none = 0,
    head_major = 1,
    not_adjacent = 2,
    quantized = 3,
    evicted = 4,
    /// Given by nothing yet.
    on_gpu = 5,
};

/// The first rows of a layer in one piece, token-major, or why they are not.
pub const ContiguousKv = union(enum) {
    view: View,
    reason: Reason,
};

/// Looks for the first `row_count` rows of a layer in one piece. Never copies.
pub fn contiguousKv(rows: *const Rows, row_count: u32) error{PositionOutOfRange}!ContiguousKv {
    if (row_count > rows.row_count) return error.PositionOutOfRange;
    switch (rows.memory) {
        .contiguous => |span| return .{ .view = .{
            .keys = span.keys,
            .values = span.values,
            .start = 0,
            .row_count = row_count,
            .dtype_k = span.dtype_k,
            .dtype_v = span.dtype_v,
            .token_stride = rows.kv_head_count * rows.head_dim,
            .head_stride = rows.head_dim,
        } },
        .paged => |blocks| {
            const reason = whyNot(rows, row_count);
            if (reason != .none or row_count == 0) return .{ .reason = reason };
            var view: View = .of(rows, 0, @min(row_count, blocks.block_size));
            view.row_count = row_count;
            view.token_stride = rows.kv_head_count * rows.head_dim;
            view.head_stride = rows.head_dim;
            return .{ .view = view };
        },
    }
}

fn whyNot(rows: *const Rows, row_count: u32) Reason {
    const paged = rows.memory.paged;
    if (rows.sink_end < rows.first and row_count > rows.sink_end) return .evicted;
    if (row_count == 0) return .none;
    const shape = paged.formatAt(0).shape;
    var position: u32 = 0;
    while (position < row_count) : (position += paged.block_size) {
        if (!paged.formatAt(position).shape.isFloat()) return .quantized;
    }
    if (rows.kv_head_count != 1 and paged.block_size != 1) return .head_major;
    // Adjacent are blocks of one format that hold this layer's side alone and follow one another in their slab.
    position = 0;
    while (position + paged.block_size < row_count) : (position += paged.block_size) {
        const next = position + paged.block_size;
        if (paged.formatAt(next) != paged.formatAt(0)) return .not_adjacent;
        const here = rows.run(0, position, next);
        const there = rows.run(0, next, next + 1);
        if (@intFromPtr(here.keys) + shape.sideBytes(.keys) != @intFromPtr(there.keys)) return .not_adjacent;
        if (@intFromPtr(here.values) + shape.sideBytes(.values) != @intFromPtr(there.values)) return .not_adjacent;
    }
    return .none;
}
