//! Where the bodies of the C ABI take their memory: the one place of it, so that a test can make it fail.
//!
//! In a build of the tests both allocators pass every call on to what `replace` put in their place. The memory of one
//! must be known to the other: what a test puts there takes from `system` in the end, so that objects made before it and
//! after it can be freed by either.

const std = @import("std");
const builtin = @import("builtin");
const Allocator = std.mem.Allocator;
const slab = @import("../device/slab.zig");

/// The allocators of the library.
pub const Memory = struct {
    /// Objects, tables, and what a call needs beside them.
    gpa: Allocator,
    /// Keys and values.
    slabs: Allocator,
};

/// The allocators in force unless a test says otherwise.
pub const system: Memory = .{ .gpa = std.heap.c_allocator, .slabs = slab.system };

pub const gpa: Allocator = if (builtin.is_test) passedOn("gpa") else system.gpa;
pub const slabs: Allocator = if (builtin.is_test) passedOn("slabs") else system.slabs;

var current: Memory = system;

/// Puts other allocators in their place, in tests alone: call it while no call is under way. Returns those before.
pub fn replace(memory: Memory) Memory {
    comptime std.debug.assert(builtin.is_test);
    defer current = memory;
    return current;
}

/// An allocator that asks the one in force.
fn passedOn(comptime field: []const u8) Allocator {
    const to = struct {
        fn alloc(_: *anyopaque, len: usize, alignment: std.mem.Alignment, address: usize) ?[*]u8 {
            return @field(current, field).rawAlloc(len, alignment, address);
        }
        fn resize(_: *anyopaque, memory: []u8, alignment: std.mem.Alignment, len: usize, address: usize) bool {
            return @field(current, field).rawResize(memory, alignment, len, address);
        }
        fn remap(_: *anyopaque, memory: []u8, alignment: std.mem.Alignment, len: usize, address: usize) ?[*]u8 {
            return @field(current, field).rawRemap(memory, alignment, len, address);
        }
        fn free(_: *anyopaque, memory: []u8, alignment: std.mem.Alignment, address: usize) void {
            @field(current, field).rawFree(memory, alignment, address);
        }
    };
    return .{ .ptr = undefined, .vtable = &.{ .alloc = to.alloc, .resize = to.resize, .remap = to.remap, .free = to.free } };
}
