//! Rows as a caller hands them over, and where copies of rows go.

const std = @import("std");
const Allocator = std.mem.Allocator;
const assert = std.debug.assert;
const Dtype = @import("../dtype.zig").Dtype;
const overlaps = @import("overlap.zig").overlaps;
const shapes = @import("../shape.zig");

/// The order in which rows stand in a caller's memory.
pub const Layout = enum(u32) {
    /// [token][kv_head][head_dim]
    token_major = 0,
    /// [kv_head][token][head_dim]
    head_major = 1,
};

/// Keys or values as a caller hands them over; unaligned.
pub const Input = struct {
    bytes: [*]const u8,
    element_count: u64,
    dtype: Dtype = .f32,
    layout: Layout = .token_major,
    /// Elements from the rows of one KV head to those of the next in a head-major input; null where there is no gap between
    /// them. With the stride of a longer tensor, `bytes` may begin at any of its rows.
    head_stride: ?u64 = null,

    pub fn fromF32(elements: []align(1) const f32) Input {
        return .{ .bytes = @ptrCast(elements.ptr), .element_count = elements.len };
    }

    /// The tokens that the elements are rows of. `shape` is a Shape or a BlockShape, here and below: their heads are read, which
    /// both have.
    pub fn tokenCount(input: Input, shape: anytype) error{ InvalidConfig, InvalidSize }!u64 {
        const stride = input.head_stride orelse {
            return shapes.rowCount(shape, input.element_count) orelse error.InvalidSize;
        };
        if (input.layout == .token_major) return error.InvalidConfig;
        return shapes.headMajorRowCount(shape, stride, input.element_count) orelse error.InvalidSize;
    }

    /// The row of one head of one token, [head_dim]; `token_count` are the tokens of the whole input.
    pub fn headRow(input: Input, shape: anytype, token_count: u64, kv_head: u32, token: u64) [*]const u8 {
        const element = switch (input.layout) {
            .token_major => shapes.tokenMajorOffset(shape, kv_head, token),
            .head_major => shapes.headMajorOffset(shape, input.elementStride(shape, token_count), kv_head, token),
        };
        assert(element + shape.head_dim <= input.element_count);
        return input.bytes + element * input.dtype.elementBytes();
    }

    /// Bytes from a row of one head to that of the next head of the same token.
    pub fn headStride(input: Input, shape: anytype, token_count: u64) u64 {
        return input.elementStride(shape, token_count) * input.dtype.elementBytes();
    }

    fn elementStride(input: Input, shape: anytype, token_count: u64) u64 {
        if (input.layout == .token_major) return shape.head_dim;
        return input.head_stride orelse shapes.headStride(shape, token_count);
    }

    fn memory(input: Input) []const u8 {
        return input.bytes[0..@intCast(input.element_count * input.dtype.elementBytes())];
    }
};

/// Checks which of the pending rows stay in a commit: their indices, ascending.
pub fn checkKept(kept: []align(1) const u32, pending: u32) error{InvalidSize}!void {
    for (kept, 0..) |index, i| {
        if (index >= pending or (i != 0 and index <= kept[i - 1])) return error.InvalidSize;
    }
}

/// The keys and values of an append, as they are when the call begins.
///
/// A caller's rows may lie where the call writes, in an array over the cache's own memory: those are read from a copy.
pub const Inputs = struct {
    k: Input,
    v: Input,
    copies: [2][]u8 = .{ &.{}, &.{} },

    pub fn deinit(inputs: *const Inputs, gpa: Allocator) void {
        for (inputs.copies) |copy| gpa.free(copy);
    }

    /// Copies an input that lies in memory that will be written. Called for all of it, before any is.
    pub fn leave(inputs: *Inputs, gpa: Allocator, written: []const u8) error{OutOfMemory}!void {
        for ([_]*Input{ &inputs.k, &inputs.v }, &inputs.copies) |input, *copy| {
            if (!overlaps(input.memory(), written)) continue;
            copy.* = try gpa.dupe(u8, input.memory());
            input.bytes = copy.ptr;
        }
    }
};

/// A copy's destination; unaligned.
pub const Output = struct {
    bytes: [*]u8,
    element_count: u64,
    dtype: Dtype = .f32,
    layout: Layout = .token_major,
    /// Elements from the rows of one KV head to those of the next in a head-major copy; null for no gap between them. What lies
    /// in a gap stays as it is.
    head_stride: ?u64 = null,

    /// Elements from the first one written to the last, for `row_count` rows.
    pub fn elements(output: Output, shape: anytype, row_count: u64) error{ InvalidConfig, InvalidSize }!u64 {
        const stride = output.head_stride orelse return shapes.rowElements(shape, row_count) orelse error.InvalidSize;
        if (output.layout == .token_major) return error.InvalidConfig;
        return shapes.headMajorElements(shape, stride, row_count) orelse error.InvalidSize;
    }

    /// Where a row of one head goes, [head_dim]; `row_count` are the rows of the whole copy.
    pub fn headRow(output: Output, shape: anytype, row_count: u64, kv_head: u32, row: u64) [*]u8 {
        const stride = output.head_stride orelse shapes.headStride(shape, row_count);
        const element = switch (output.layout) {
            .token_major => shapes.tokenMajorOffset(shape, kv_head, row),
            .head_major => shapes.headMajorOffset(shape, stride, kv_head, row),
        };
        assert(element + shape.head_dim <= output.element_count);
        return output.bytes + element * output.dtype.elementBytes();
    }

    /// Bytes from a row of one head to the next row of it.
    pub fn tokenStride(output: Output, shape: anytype) u64 {
        const row_elements: u64 = if (output.layout == .token_major) shape.kvDim() else shape.head_dim;
        return row_elements * output.dtype.elementBytes();
    }

    /// The memory that `element_count` elements take.
    pub fn written(output: Output, element_count: u64) []u8 {
        return output.bytes[0..@intCast(element_count * output.dtype.elementBytes())];
    }
};
