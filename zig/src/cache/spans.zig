//! Where the rows of a contiguous cache lie: a span of max_seq_len positions for each layer of each sequence, in slabs.

const std = @import("std");
const assert = std.debug.assert;
const Allocator = std.mem.Allocator;
const Dtype = @import("../dtype.zig").Dtype;
const Shape = @import("../shape.zig").Shape;
const slab_memory = @import("../device/slab.zig");
const Slab = slab_memory.Slab;

/// The spans of all keys, or those of all values.
pub const Spans = struct {
    dtype: Dtype,
    span_bytes: u64,
    spans_per_slab: u64,
    slabs: []Slab,

    pub fn init(gpa: Allocator, slab_allocator: Allocator, shape: Shape, dtype: Dtype) error{OutOfMemory}!Spans {
        const span_bytes = shape.spanBytes(dtype);
        const spans_per_slab = @max(1, slab_memory.bytes_max / span_bytes);
        const slab_count = std.math.divCeil(u64, shape.spanCount(), spans_per_slab) catch unreachable; // not 0
        const slabs = try gpa.alloc(Slab, std.math.cast(usize, slab_count) orelse return error.OutOfMemory);
        errdefer gpa.free(slabs);
        var spans_left = shape.spanCount();
        for (slabs, 0..) |*slab, i| {
            errdefer for (slabs[0..i]) |taken| slab_memory.free(slab_allocator, taken);
            const span_count = @min(spans_left, spans_per_slab);
            slab.* = try slab_memory.alloc(slab_allocator, span_count * span_bytes);
            spans_left -= span_count;
        }
        assert(spans_left == 0);
        return .{ .dtype = dtype, .span_bytes = span_bytes, .spans_per_slab = spans_per_slab, .slabs = slabs };
    }

    pub fn deinit(spans: *Spans, gpa: Allocator, slab_allocator: Allocator) void {
        for (spans.slabs) |slab| slab_memory.free(slab_allocator, slab);
        gpa.free(spans.slabs);
    }

    /// The memory of a span.
    pub fn span(spans: *const Spans, span_index: u64) [*]u8 {
        const slab = spans.slabs[@intCast(span_index / spans.spans_per_slab)];
        const offset = (span_index % spans.spans_per_slab) * spans.span_bytes;
        assert(offset + spans.span_bytes <= slab.len);
        return slab.ptr + offset;
    }

    /// The memory of some rows of a span.
    pub fn spanRows(spans: *const Spans, shape: Shape, span_index: u64, start: u32, token_count: u32) []u8 {
        const bytes = shape.positionBytes(token_count, spans.dtype);
        return (spans.span(span_index) + shape.positionBytes(start, spans.dtype))[0..@intCast(bytes)];
    }

    /// Bytes of all slabs.
    pub fn reservedBytes(spans: *const Spans) u64 {
        var bytes: u64 = 0;
        for (spans.slabs) |slab| bytes += slab_memory.reservedBytes(slab);
        return bytes;
    }
};
