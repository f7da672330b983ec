//! Rows where they lie, as a reader sees them, whatever layout that is.

const std = @import("std");
const assert = std.debug.assert;
const Dtype = @import("../dtype.zig").Dtype;
const dispatch = @import("../kernels/dispatch.zig");
const Block = @import("blocks/block.zig").Block;
const checkApart = @import("overlap.zig").checkApart;
const Entries = @import("blocks/table.zig").Entries;
const Format = @import("blocks/pool.zig").Format;
const Head = @import("tiers/fidelity.zig").Head;
const shapes = @import("../shape.zig");

/// The rows of one layer of one sequence as a reader sees them now, committed and pending, in place.
///
/// Resident are the positions in [0, sink_end) and in [first, row_count): all of them unless retention or the layer's
/// window hides some. Valid until rows are appended to the layer or dropped, blocks migrate, or the cache is freed.
pub const Rows = struct {
    kv_head_count: u32,
    head_dim: u32,
    /// Query heads that every query has; null where nobody said.
    q_head_count: ?u32 = null,
    /// Positions, evicted ones included.
    row_count: u32,
    sink_end: u32 = 0,
    first: u32 = 0,
    /// The newest rows a query may see, by the layer's own window; null for all.
    window_tokens: ?u32 = null,
    /// The heads that queries are measured for, [kv_head]; empty where nobody asked.
    fidelity: []Head = &.{},
    /// The newest rows that retention keeps beside the sinks; null for all.
    newest_tokens: ?u32 = null,
    memory: Memory,

    /// The memory in which the rows lie.
    pub const Memory = union(enum) {
        contiguous: Contiguous,
        paged: Paged,
    };

    pub const Contiguous = struct {
        shape: shapes.Shape,
        dtype_k: Dtype,
        dtype_v: Dtype,
        /// [position][kv_head][head_dim]
        keys: [*]const u8,
        values: [*]const u8,
    };

    pub const Paged = struct {
        block_size: u32,
        formats: []const *Format,
        /// A block of each `block_size` positions, in a format of `formats`.
        entries: Entries,
        /// Within the group.
        layer: u32,

        /// The format of the block that has a position.
        pub fn formatAt(paged: Paged, position: u32) *const Format {
            return paged.formats[paged.entries.format(position / paged.block_size)];
        }

        /// The block that has a position.
        pub fn blockAt(paged: Paged, position: u32) Block {
            return .of(paged.formatAt(position), paged.entries.block(position / paged.block_size));
        }
    };

    /// Adjacent rows of one head, in one format.
    pub const Run = struct {
        /// The first row; of a quantized side the first byte of its plane.
        keys: [*]const u8,
        values: [*]const u8,
        token_count: u32,
    };

    /// The longest adjacent run of resident rows from `position` on, ending before `end`.
    pub fn run(rows: *const Rows, kv_head: u32, position: u32, end: u32) Run {
        assert(position < end and end <= rows.row_count);
        assert(end <= rows.sink_end or position >= rows.first);
        switch (rows.memory) {
            .contiguous => |contiguous| {
                const shape = contiguous.shape;
                return .{
                    .keys = contiguous.keys + shape.positionBytes(position, contiguous.dtype_k) + shape.headBytes(kv_head, contiguous.dtype_k),
                    .values = contiguous.values + shape.positionBytes(position, contiguous.dtype_v) + shape.headBytes(kv_head, contiguous.dtype_v),
                    .token_count = end - position,
                };
            },
            .paged => |paged| {
                const token = position % paged.block_size;
                const block = paged.blockAt(position);
                return .{
                    .keys = block.bytes.ptr + rowOrPlane(block.shape, paged.layer, .keys, kv_head, token),
                    .values = block.bytes.ptr + rowOrPlane(block.shape, paged.layer, .values, kv_head, token),
                    .token_count = @min(end - position, paged.block_size - token),
                };
            },
        }
    }

    /// Memory that a call is about to write must not be that of the rows it reads: all of their blocks.
    pub fn checkApartFrom(rows: *const Rows, written: []const u8) error{InvalidConfig}!void {
        switch (rows.memory) {
            .contiguous => |contiguous| {
                try checkApart(contiguous.keys[0..@intCast(contiguous.shape.positionBytes(rows.row_count, contiguous.dtype_k))], written);
                try checkApart(contiguous.values[0..@intCast(contiguous.shape.positionBytes(rows.row_count, contiguous.dtype_v))], written);
            },
            .paged => |paged| {
                const count = std.math.divCeil(u32, rows.row_count, paged.block_size) catch unreachable; // not 0
                const stored = paged.entries.storedBefore(count);
                for (paged.entries.blocks[0..stored], paged.entries.formats[0..stored]) |block, format| {
                    try checkApart(paged.formats[format].pool.bytes(@intCast(block)), written);
                }
            },
        }
    }

    /// Copies resident rows of one side of a head from `position` on, [row][head_dim], as many as fit and as are before
    /// `end` and in one block; returns how many.
    pub fn read(rows: *const Rows, side: shapes.Side, kv_head: u32, position: u32, end: u32, destination: []f32) u32 {
        const adjacent = rows.run(kv_head, position, end);
        const row_bytes = rows.head_dim * @sizeOf(f32);
        const count: u32 = @intCast(@min(adjacent.token_count, destination.len / rows.head_dim));
        switch (rows.memory) {
            .contiguous => |contiguous| {
                const dtype = if (side == .keys) contiguous.dtype_k else contiguous.dtype_v;
                dispatch.kernels().convert(&.{
                    .destination = @ptrCast(destination.ptr),
                    .destination_dtype = .f32,
                    .destination_stride = row_bytes,
                    .source = if (side == .keys) adjacent.keys else adjacent.values,
                    .source_dtype = dtype,
                    .source_stride = contiguous.shape.rowBytes(dtype),
                    .row_count = count,
                    .element_count = rows.head_dim,
                });
            },
            .paged => |paged| {
                const block = paged.blockAt(position);
                const token = position % paged.block_size;
                block.read(paged.layer, side, kv_head, token, count, @ptrCast(destination.ptr), .f32, row_bytes);
            },
        }
        return count;
    }

    fn rowOrPlane(shape: shapes.BlockShape, layer: u32, side: shapes.Side, kv_head: u32, token: u32) u64 {
        if (shape.dtype(side).isFloat()) return shape.rowOffset(layer, side, kv_head, token);
        return shape.planeOffset(layer, side, kv_head);
    }

    /// The storage of the row at a resident position, and with it of those up to `storageEnd`.
    pub fn storage(rows: *const Rows, position: u32) dispatch.Storage {
        switch (rows.memory) {
            .contiguous => |contiguous| return .{
                .dtype_k = contiguous.dtype_k,
                .dtype_v = contiguous.dtype_v,
                .token_stride_k = contiguous.shape.rowBytes(contiguous.dtype_k),
                .token_stride_v = contiguous.shape.rowBytes(contiguous.dtype_v),
                .head_stride_k = @as(u64, contiguous.shape.head_dim) * contiguous.dtype_k.elementBytes(),
                .head_stride_v = @as(u64, contiguous.shape.head_dim) * contiguous.dtype_v.elementBytes(),
            },
            .paged => |paged| {
                const shape = paged.formatAt(position).shape;
                const tile_first = position - position % dispatch.tile_tokens;
                return .{
                    .dtype_k = shape.dtype_k,
                    .dtype_v = shape.dtype_v,
                    .token_stride_k = if (shape.dtype_k.isFloat()) shape.tokenBytes(.keys) else 0,
                    .token_stride_v = if (shape.dtype_v.isFloat()) shape.tokenBytes(.values) else 0,
                    .head_stride_k = shape.planeBytes(.keys),
                    .head_stride_v = shape.planeBytes(.values),
                    .block_size = paged.block_size,
                    .tile_token = tile_first % paged.block_size,
                };
            },
        }
    }

    /// The position, at most `end`, up to which rows are stored as the one at `position` is. Evicted ones do not count.
    pub fn storageEnd(rows: *const Rows, position: u32, end: u32) u32 {
        const paged = switch (rows.memory) {
            .contiguous => return end,
            .paged => |paged| paged,
        };
        const format = paged.formatAt(position);
        var entry = position / paged.block_size;
        while (true) {
            entry = paged.entries.skipEvicted(entry + 1);
            if (entry * paged.block_size >= end) return end;
            if (paged.formats[paged.entries.format(entry)] != format) return entry * paged.block_size;
        }
    }

    /// Elements of one row of one side: kv_head_count * head_dim.
    pub fn kvDim(rows: *const Rows) u32 {
        return rows.kv_head_count * rows.head_dim;
    }

    /// Resident rows, pending ones included.
    pub fn residentCount(rows: *const Rows) u32 {
        return if (rows.first <= rows.sink_end) rows.row_count else rows.sink_end + rows.row_count - rows.first;
    }

    /// The end of the resident rows from `position` on, or null where the row there was evicted.
    pub fn residentEnd(rows: *const Rows, position: u32) ?u32 {
        if (position < rows.sink_end and rows.sink_end < rows.first) return rows.sink_end;
        return if (position >= rows.first or position < rows.sink_end) rows.row_count else null;
    }
};
