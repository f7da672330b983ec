//! Fidelity, or what migration did to the rows: by layer and KV head, how near the stored rows are to those that were appended.
//!
//! With k' the stored key of k, the score of a query q is off by softmax_scale * q . (k' - k), at most
//!
//!     softmax_scale * |q| * |k' - k|  +  softmax_scale * |q| * scale * code * head_dim / (2 * 16256)
//!
//! The second term is that of the kernels, which round the query, folded with the scales, to two digits of 8 bits: 16256
//! steps, each off by half a step at most, times the codes (`kernels/attend/digits.zig`). |q| is the largest norm of a query seen
//! so far: the bound holds for those, and a larger one that comes later moves it.

const std = @import("std");
const assert = std.debug.assert;
const dispatch = @import("../../kernels/dispatch.zig");
const Block = @import("../blocks/block.zig").Block;
const shapes = @import("../../shape.zig");

/// Rows of one side of one head, before and after.
pub const SideFidelity = struct {
    row_count: u64 = 0,
    cosine_sum: f64 = 0,
    /// The smallest cosine of a row with what it became; 1 before the first row.
    cosine_min: f64 = 1,
    /// The largest Euclidean norm of a difference.
    error_max: f64 = 0,

    pub fn cosineMean(side: SideFidelity) f64 {
        return if (side.row_count == 0) 1 else side.cosine_sum / @as(f64, @floatFromInt(side.row_count));
    }

    fn add(side: *SideFidelity, before: []const f32, after: []const f32) void {
        var dot: f64 = 0;
        var before_square: f64 = 0;
        var after_square: f64 = 0;
        var error_square: f64 = 0;
        for (before, after) |x, y| {
            dot += @as(f64, x) * y;
            before_square += @as(f64, x) * x;
            after_square += @as(f64, y) * y;
            error_square += (@as(f64, x) - y) * (@as(f64, x) - y);
        }
        // Zeros that stayed zeros point where they pointed.
        const norms = @sqrt(before_square) * @sqrt(after_square);
        const cosine = if (norms != 0) dot / norms else @as(f64, @floatFromInt(@intFromBool(before_square == after_square)));
        side.row_count += 1;
        // A row that was made NaN or Inf behind the cache's back, through a view, must not pass for a good one.
        const is_finite = std.math.isFinite(cosine) and std.math.isFinite(error_square);
        side.cosine_sum += if (is_finite) cosine else 0;
        side.cosine_min = @min(side.cosine_min, if (is_finite) cosine else 0);
        side.error_max = @max(side.error_max, if (is_finite) @sqrt(error_square) else std.math.inf(f64));
    }

    fn merge(side: *SideFidelity, other: SideFidelity) void {
        side.row_count += other.row_count;
        side.cosine_sum += other.cosine_sum;
        side.cosine_min = @min(side.cosine_min, other.cosine_min);
        side.error_max = @max(side.error_max, other.error_max);
    }
};

/// One KV head of one layer.
pub const Head = struct {
    keys: SideFidelity = .{},
    values: SideFidelity = .{},
    /// The largest value a key's code may stand for, beside its min: scale * code.
    range_max: f64 = 0,
    /// The largest softmax_scale * |q| of a query that used this head.
    query_norm_max: f64 = 0,

    /// The most that a score of a query no longer than `query_norm_max` may be off.
    pub fn logitErrorBound(head: Head, head_dim: u32) f64 {
        return boundOf(head.keys.error_max, head.range_max, head_dim, head.query_norm_max);
    }

    pub fn merge(head: *Head, other: Head) void {
        head.keys.merge(other.keys);
        head.values.merge(other.values);
        head.range_max = @max(head.range_max, other.range_max);
    }

    /// A query row that uses this head, [head_dim].
    pub fn observe(head: *Head, query: []align(1) const f32, softmax_scale: f32) void {
        var square: f64 = 0;
        for (query) |x| square += @as(f64, x) * x;
        head.query_norm_max = @max(head.query_norm_max, @abs(softmax_scale) * @sqrt(square));
    }
};

/// See the top of this file; `query_norm` has the softmax_scale in it.
pub fn boundOf(key_error: f64, range: f64, head_dim: u32, query_norm: f64) f64 {
    if (std.math.isInf(key_error)) return key_error; // also of queries not seen yet
    const digit_error = range * @as(f64, @floatFromInt(head_dim)) / (2 * dispatch.number_max);
    return query_norm * (key_error + digit_error);
}

const rows_at_once = 16;

/// Compares the rows of one head of a full block with what they became.
pub fn measure(from: Block, to: Block, layer: u32, kv_head: u32) Head {
    assert(from.shape.isFloat() and from.shape.block_size == to.shape.block_size);
    assert(from.shape.head_dim == to.shape.head_dim and from.shape.kv_head_count == to.shape.kv_head_count);
    var head: Head = .{};
    inline for (.{ .keys, .values }) |side| {
        const result = if (side == .keys) &head.keys else &head.values;
        var token: u32 = 0;
        while (token < from.shape.block_size) {
            const count = @min(rows_at_once, from.shape.block_size - token);
            var before: [rows_at_once * shapes.head_dim_max]f32 = undefined;
            var after: [rows_at_once * shapes.head_dim_max]f32 = undefined;
            const dim = from.shape.head_dim;
            from.read(layer, side, kv_head, token, count, @ptrCast(&before), .f32, dim * @sizeOf(f32));
            to.read(layer, side, kv_head, token, count, @ptrCast(&after), .f32, dim * @sizeOf(f32));
            for (0..count) |i| result.add(before[i * dim ..][0..dim], after[i * dim ..][0..dim]);
            token += count;
        }
    }
    head.range_max = to.keyRange(layer, kv_head);
    return head;
}

test "add: equal rows, zeros, and a right angle" {
    const testing = std.testing;
    var side: SideFidelity = .{};
    try testing.expectEqual(1, side.cosineMean());
    side.add(&.{ 3, 4 }, &.{ 3, 4 });
    side.add(&.{ 0, 0 }, &.{ 0, 0 });
    try testing.expectEqual(1, side.cosine_min);
    try testing.expectEqual(0, side.error_max);
    side.add(&.{ 3, 4 }, &.{ -4, 3 });
    try testing.expectEqual(0, side.cosine_min);
    try testing.expectApproxEqAbs(2.0 / 3.0, side.cosineMean(), 1e-12);
    try testing.expectApproxEqAbs(@sqrt(50.0), side.error_max, 1e-12);
    side.add(&.{ 0, 0 }, &.{ 1, 0 });
    try testing.expectEqual(0, side.cosine_min);
    try testing.expect(std.math.isFinite(side.error_max));
    side.add(&.{ std.math.nan(f32), 0 }, &.{ 0, 0 });
    try testing.expect(std.math.isFinite(side.cosineMean()));
    try testing.expectEqual(std.math.inf(f64), side.error_max);
}

test "boundOf: the error of the key and that of the digits" {
    try std.testing.expectApproxEqAbs(2 * (0.5 + 3.0 * 64.0 / 32512.0), boundOf(0.5, 3, 64, 2), 1e-12);
}
