//! Rows in blocks: writing, copying and reading them in whatever format a block has.
//!
//! The choice of a block, and whether it may be written, is the business of its cache.

const std = @import("std");
const assert = std.debug.assert;
const dispatch = @import("../../kernels/dispatch.zig");
const Dtype = @import("../../dtype.zig").Dtype;
const Format = @import("pool.zig").Format;
const shapes = @import("../../shape.zig");
const BlockShape = shapes.BlockShape;
const Side = shapes.Side;

const sides = [_]Side{ .keys, .values };

pub const Block = struct {
    shape: BlockShape,
    bytes: []u8,

    pub fn of(format: *const Format, index: i32) Block {
        return .{ .shape = format.shape, .bytes = format.pool.bytes(@intCast(index)) };
    }

    /// The row of a head in a float side: [head_dim].
    pub fn row(block: Block, layer: u32, side: Side, kv_head: u32, token: u32) [*]u8 {
        return block.bytes.ptr + block.shape.rowOffset(layer, side, kv_head, token);
    }

    fn plane(block: Block, layer: u32, side: Side, kv_head: u32) [*]u8 {
        return block.bytes.ptr + block.shape.planeOffset(layer, side, kv_head);
    }

    /// Reads rows of one head: `token_count` of them, `token_stride` bytes apart in `destination`.
    pub fn read(
        block: Block,
        layer: u32,
        side: Side,
        kv_head: u32,
        token_first: u32,
        token_count: u32,
        destination: [*]u8,
        dtype: Dtype,
        token_stride: u64,
    ) void {
        const shape = block.shape;
        assert(token_first + token_count <= shape.block_size);
        const kernels = dispatch.kernels();
        if (!shape.dtype(side).isFloat()) return kernels.dequantize(&.{
            .plane = shape.plane(side),
            .bytes = block.plane(layer, side, kv_head),
            .token_first = token_first,
            .token_count = token_count,
            .rows = destination,
            .rows_dtype = dtype,
            .token_stride = token_stride,
        });
        if (token_count == 0) return;
        // Rows of a head are adjacent here; where they are there, too, they are one piece.
        const is_one_piece = token_stride == shape.head_dim * dtype.elementBytes();
        kernels.convert(&.{
            .destination = destination,
            .destination_dtype = dtype,
            .destination_stride = token_stride,
            .source = block.row(layer, side, kv_head, token_first),
            .source_dtype = shape.dtype(side),
            .source_stride = shape.tokenBytes(side),
            .row_count = if (is_one_piece) 1 else token_count,
            .element_count = if (is_one_piece) @as(u64, token_count) * shape.head_dim else shape.head_dim,
        });
    }

    /// Copies the first rows of a layer into a block of the same geometry whose sides are in floats. A value past the largest
    /// finite one of its format becomes that one.
    pub fn copyRows(from: Block, to: Block, layer: u32, row_count: u32) void {
        assert(to.shape.isFloat());
        for (sides) |side| for (0..to.shape.kv_head_count) |head| {
            const kv_head: u32 = @intCast(head);
            const destination = to.row(layer, side, kv_head, 0);
            if (from.shape.dtype(side) == to.shape.dtype(side)) {
                const bytes: usize = @intCast(row_count * to.shape.tokenBytes(side));
                @memcpy(destination[0..bytes], from.row(layer, side, kv_head, 0)[0..bytes]);
            } else {
                from.read(layer, side, kv_head, 0, row_count, destination, to.shape.dtype(side), to.shape.tokenBytes(side));
                // The largest f16 is 65504, which bf16 rounds to 65536.
                if (to.shape.dtype(side) == .f16) makeFinite(destination, row_count * to.shape.head_dim);
            }
        };
    }

    fn makeFinite(elements: [*]u8, element_count: u32) void {
        const bits: [*]align(1) u16 = @ptrCast(elements);
        for (bits[0..element_count]) |*one| {
            if (one.* & 0x7fff == 0x7c00) one.* -= 1;
        }
    }

    /// Makes one row of a layer zeros; the sides are in floats.
    pub fn clearRow(block: Block, layer: u32, token: u32) void {
        for (sides) |side| for (0..block.shape.kv_head_count) |head| {
            const bytes: usize = @intCast(block.shape.tokenBytes(side));
            @memset(block.row(layer, side, @intCast(head), token)[0..bytes], 0);
        };
    }

    /// Moves one row of a layer, between blocks of one float format.
    pub fn moveRow(from: Block, from_token: u32, to: Block, to_token: u32, layer: u32) void {
        for (sides) |side| for (0..to.shape.kv_head_count) |head| {
            const kv_head: u32 = @intCast(head);
            const bytes: usize = @intCast(to.shape.tokenBytes(side));
            const source = from.row(layer, side, kv_head, from_token);
            @memcpy(to.row(layer, side, kv_head, to_token)[0..bytes], source[0..bytes]);
        };
    }

    /// Stores one side of one layer of a full block of floats in another format.
    pub fn storeSide(from: Block, to: Block, layer: u32, side: Side) void {
        const shape = from.shape;
        const kernels = dispatch.kernels();
        for (0..shape.kv_head_count) |head| {
            const kv_head: u32 = @intCast(head);
            const rows = from.row(layer, side, kv_head, 0);
            const destination = to.plane(layer, side, kv_head);
            if (to.shape.dtype(side).isFloat()) {
                kernels.convert(&.{
                    .destination = destination,
                    .destination_dtype = to.shape.dtype(side),
                    .source = rows,
                    .source_dtype = shape.dtype(side),
                    .element_count = @as(u64, shape.block_size) * shape.head_dim,
                });
            } else {
                kernels.quantize(&.{
                    .plane = to.shape.plane(side),
                    .rows = rows,
                    .rows_dtype = shape.dtype(side),
                    .token_stride = shape.tokenBytes(side),
                    .bytes = destination,
                });
            }
        }
    }

    /// The largest scale * code that a key of a head may have; 0 for keys in floats.
    pub fn keyRange(block: Block, layer: u32, kv_head: u32) f64 {
        const shape = block.shape;
        if (shape.dtype_k.isFloat()) return 0;
        const code_max: f64 = switch (shape.dtype_k) {
            .q8_0, .i8 => 128,
            .q4_0, .i4 => 15,
            .i2 => 3,
            .f32, .f16, .bf16 => unreachable,
        };
        const shape_k = shape.plane(.keys);
        const bytes = block.plane(layer, .keys, kv_head)[0..shape_k.bytes()];
        var largest: f64 = 0;
        for (0..shape_k.scaleCount()) |i| {
            const scale: f16 = @bitCast(shape_k.scaleBits(bytes, @intCast(i)));
            largest = @max(largest, @abs(@as(f64, scale)));
        }
        return largest * code_max;
    }

    /// Would every value of a full block of floats stay finite in another format?
    pub fn storable(from: Block, to: BlockShape) bool {
        const kernels = dispatch.kernels();
        for (0..to.layer_count) |layer| for (sides) |side| {
            const element_count = @as(usize, from.shape.block_size) * from.shape.kvDim();
            const rows = from.row(@intCast(layer), side, 0, 0);
            if (kernels.storable(rows, from.shape.dtype(side), to.dtype(side), element_count) == 0) return false;
        };
        return true;
    }
};
