//! Callers' buffers: borrowed for the call, unaligned, each with its element count. A null buffer is right where the
//! count is 0 and nowhere else.

const Dtype = @import("../dtype.zig").Dtype;
const input_types = @import("../cache/input.zig");
const std = @import("std");

pub const Error = error{InvalidSize};

pub fn in(source: ?[*]const u8, element_count: u32) Error![*]const u8 {
    if (element_count == 0) return &.{};
    return source orelse error.InvalidSize;
}

pub fn out(destination: ?[*]u8, element_count: u32) Error![*]u8 {
    if (element_count == 0) return &.{};
    return destination orelse error.InvalidSize;
}

/// A buffer of 4-byte elements.
pub fn words(comptime Word: type, source: ?[*]const u8, element_count: u32) Error![]align(1) const Word {
    const elements: [*]align(1) const Word = @ptrCast(try in(source, element_count));
    return elements[0..element_count];
}

/// A buffer of bytes.
pub fn bytesIn(source: ?[*]const u8, byte_count: u32) Error![]const u8 {
    return (try in(source, byte_count))[0..byte_count];
}

/// A buffer of bytes to write to.
pub fn bytesOut(destination: ?[*]u8, byte_count: u32) Error![]u8 {
    return (try out(destination, byte_count))[0..byte_count];
}

/// A copy of a buffer of 4-byte elements, for numbers that are checked and then counted or indexed with: another thread may write a
/// caller's shared memory in between.
pub fn copyWords(comptime Word: type, gpa: std.mem.Allocator, source: ?[*]const u8, element_count: u32) (Error || error{OutOfMemory})![]Word {
    const borrowed = try words(Word, source, element_count);
    const copy = try gpa.alloc(Word, borrowed.len);
    for (copy, borrowed) |*to, from| to.* = from;
    return copy;
}

/// A buffer of f32 to write to.
pub fn floatsOut(destination: ?[*]u8, element_count: u32) Error![]align(1) f32 {
    const elements: [*]align(1) f32 = @ptrCast(try out(destination, element_count));
    return elements[0..element_count];
}

/// The two sides of an append.
pub fn inputs(
    k: ?[*]const u8,
    k_count: u32,
    v: ?[*]const u8,
    v_count: u32,
    dtype_word: u32,
    layout_word: u32,
    head_stride: u32,
) error{ InvalidConfig, InvalidSize }!struct { input_types.Input, input_types.Input } {
    const dtype = Dtype.floatFromWord(dtype_word) orelse return error.InvalidConfig;
    const layout = std.enums.fromInt(input_types.Layout, layout_word) orelse return error.InvalidConfig;
    const stride = strideOf(head_stride);
    return .{
        .{ .bytes = try in(k, k_count), .element_count = k_count, .dtype = dtype, .layout = layout, .head_stride = stride },
        .{ .bytes = try in(v, v_count), .element_count = v_count, .dtype = dtype, .layout = layout, .head_stride = stride },
    };
}

/// A head stride that crosses: 0 where there is no gap between the heads.
fn strideOf(head_stride: u32) ?u64 {
    return if (head_stride == 0) null else head_stride;
}

/// The two sides of a gather.
pub fn outputs(
    k: ?[*]u8,
    k_count: u32,
    v: ?[*]u8,
    v_count: u32,
    dtype_word: u32,
    layout_word: u32,
    head_stride: u32,
) error{ InvalidConfig, InvalidSize }!struct { input_types.Output, input_types.Output } {
    const dtype = Dtype.floatFromWord(dtype_word) orelse return error.InvalidConfig;
    const layout = std.enums.fromInt(input_types.Layout, layout_word) orelse return error.InvalidConfig;
    const stride = strideOf(head_stride);
    return .{
        .{ .bytes = try out(k, k_count), .element_count = k_count, .dtype = dtype, .layout = layout, .head_stride = stride },
        .{ .bytes = try out(v, v_count), .element_count = v_count, .dtype = dtype, .layout = layout, .head_stride = stride },
    };
}
