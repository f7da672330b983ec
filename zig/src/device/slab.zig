//! Slabs: the large stretches of memory in which keys and values lie, straight from the operating system.
//!
//! A slab is reserved at once and backed by memory only where it is written. It is zero, page aligned, and asks for huge
//! pages: attention walks through gigabytes, and with 4 KiB pages it would walk through page tables as well.
//!
//! The system gives a process a number of mappings (Linux: 65 530), and a runtime that gets no more of them ends the process.
//! So slabs take a part of that number and no more, and nothing here ends the process when it is used up.
//!
//! A build for valgrind (`-Dmemcheck`) takes slabs from the C allocator instead, where valgrind watches them, and marks
//! them undefined: a kernel that reads a row nobody wrote is then reported.

const std = @import("std");
const builtin = @import("builtin");
const Allocator = std.mem.Allocator;
const memcheck = @import("build_options").memcheck;
const reserved = @import("reserved.zig");

/// Slabs are no larger than this unless one unit of a cache is: every view of one then fits a JavaScript ArrayBuffer.
pub const bytes_max = 1 << 30;

const huge_page_bytes = 2 << 20;

/// Most slabs of huge pages in the process; each is a mapping of its own. Smaller ones are joined to their neighbors.
const huge_count_max = 1 << 14;

var huge_count: std.atomic.Value(u32) = .init(0);

const alignment: std.mem.Alignment = .fromByteUnits(std.heap.page_size_max);

pub const Slab = []align(std.heap.page_size_max) u8;

/// Where slabs come from unless a test says otherwise.
pub const system: Allocator = if (memcheck)
    std.heap.c_allocator
else if (builtin.os.tag == .windows)
    std.heap.page_allocator
else
    .{ .ptr = undefined, .vtable = &.{ .alloc = map, .resize = Allocator.noResize, .remap = Allocator.noRemap, .free = unmap } };

/// As the page allocator of `std`, which takes an unmapping that the system refuses for unreachable.
fn map(_: *anyopaque, len: usize, asked: std.mem.Alignment, _: usize) ?[*]u8 {
    const page_bytes = std.heap.pageSize();
    if (len > std.math.maxInt(usize) / 2) return null;
    const wanted = std.mem.alignForward(usize, len, page_bytes);
    const spare = asked.toByteUnits() -| page_bytes;
    const protection: std.posix.PROT = .{ .READ = true, .WRITE = true };
    const mapping = std.posix.mmap(null, wanted + spare, protection, .{ .TYPE = .PRIVATE, .ANONYMOUS = true }, -1, 0) catch
        return null;
    const start = std.mem.alignForward(usize, @intFromPtr(mapping.ptr), asked.toByteUnits()) - @intFromPtr(mapping.ptr);
    giveBack(mapping[0..start]);
    giveBack(@alignCast(mapping[start + wanted ..]));
    return mapping[start..].ptr;
}

fn unmap(_: *anyopaque, memory: []u8, _: std.mem.Alignment, _: usize) void {
    giveBack(@alignCast(memory.ptr[0..std.mem.alignForward(usize, memory.len, std.heap.pageSize())]));
}

/// A hole in the middle of a mapping needs another mapping. Where there is none left, the addresses stay taken and the
/// memory goes.
fn giveBack(pages: []align(std.heap.page_size_min) u8) void {
    if (pages.len == 0) return;
    if (std.posix.errno(std.posix.system.munmap(pages.ptr, pages.len)) == .SUCCESS) return;
    std.posix.madvise(pages.ptr, pages.len, std.posix.MADV.DONTNEED) catch {};
}

/// `rawAlloc`, because `alloc` writes a pattern over the memory in safe builds: that would touch every page of it, and
/// the zeros would be gone.
pub fn alloc(allocator: Allocator, bytes: u64) error{OutOfMemory}!Slab {
    const len = std.math.cast(usize, bytes) orelse return error.OutOfMemory;
    if (len > std.math.maxInt(usize) - std.heap.page_size_max) return error.OutOfMemory;
    const counted = std.mem.alignForward(u64, len, std.heap.pageSize());
    try reserved.take(counted);
    errdefer reserved.give(counted);
    const asked: std.mem.Alignment = if (len >= huge_page_bytes) .fromByteUnits(huge_page_bytes) else alignment;
    if (len >= huge_page_bytes and huge_count.fetchAdd(1, .monotonic) >= huge_count_max) {
        _ = huge_count.fetchSub(1, .monotonic);
        return error.OutOfMemory;
    }
    errdefer if (len >= huge_page_bytes) {
        _ = huge_count.fetchSub(1, .monotonic);
    };
    const pointer = allocator.rawAlloc(len, asked, @returnAddress()) orelse return error.OutOfMemory;
    const slab: Slab = @alignCast(pointer[0..len]);
    if (memcheck) {
        @memset(slab, 0);
        std.valgrind.memcheck.makeMemUndefined(slab);
    } else if (builtin.os.tag == .linux and len >= huge_page_bytes) {
        // A wish: a system without huge pages refuses, and small ones do.
        std.posix.madvise(slab.ptr, slab.len, std.posix.MADV.HUGEPAGE) catch {};
    }
    return slab;
}

/// Takes the wish for huge pages back; for measuring what they give.
pub fn refuseHugePages(slab: Slab) void {
    if (memcheck or builtin.os.tag != .linux or slab.len < huge_page_bytes) return;
    std.posix.madvise(slab.ptr, slab.len, std.posix.MADV.NOHUGEPAGE) catch {};
}

pub fn free(allocator: Allocator, slab: Slab) void {
    const asked: std.mem.Alignment = if (slab.len >= huge_page_bytes) .fromByteUnits(huge_page_bytes) else alignment;
    allocator.rawFree(slab, asked, @returnAddress());
    reserved.give(reservedBytes(slab));
    if (slab.len >= huge_page_bytes) _ = huge_count.fetchSub(1, .monotonic);
}

/// What a slab takes of the address space.
pub fn reservedBytes(slab: Slab) u64 {
    return std.mem.alignForward(u64, slab.len, std.heap.pageSize());
}

test "a slab is zero and can be written to its end" {
    if (memcheck) return error.SkipZigTest; // undefined on purpose there
    for ([_]u64{ 1, 4096, 3 << 20 }) |bytes| {
        const slab = try alloc(system, bytes);
        defer free(system, slab);
        try std.testing.expectEqual(bytes, slab.len);
        try std.testing.expect(std.mem.allEqual(u8, slab, 0));
        slab[slab.len - 1] = 1;
        try std.testing.expect(reservedBytes(slab) >= bytes);
    }
}

test "slabs of huge pages are counted, and one too many is out of memory" {
    if (memcheck) return error.SkipZigTest; // it would touch them
    const count_before = huge_count.load(.monotonic);
    const slabs = try std.testing.allocator.alloc(Slab, huge_count_max - count_before);
    defer std.testing.allocator.free(slabs);
    for (slabs) |*slab| slab.* = try alloc(system, huge_page_bytes);
    try std.testing.expectError(error.OutOfMemory, alloc(system, huge_page_bytes));
    free(system, try alloc(system, 1)); // a small one is none of them
    // Every other one first: the holes between them are what needs mappings.
    for ([_]usize{ 0, 1 }) |first| {
        var i = first;
        while (i < slabs.len) : (i += 2) free(system, slabs[i]);
    }
    try std.testing.expectEqual(count_before, huge_count.load(.monotonic));
}

test "slabs count as reserved, and past the limit of the process there is none" {
    const held = reserved.total();
    const page_bytes = std.heap.pageSize();
    const first = try alloc(system, 1);
    try std.testing.expectEqual(held + page_bytes, reserved.total());
    const before = reserved.changeMax(held + 3 * page_bytes);
    defer _ = reserved.changeMax(before);
    try std.testing.expectError(error.OutOfMemory, alloc(system, 2 * page_bytes + 1));
    const second = try alloc(system, 2 * page_bytes);
    try std.testing.expectEqual(held + 3 * page_bytes, reserved.total());
    try std.testing.expectError(error.OutOfMemory, alloc(system, 1));
    free(system, first);
    free(system, second);
    // An allocator that has none leaves nothing behind either.
    var none: std.testing.FailingAllocator = .init(system, .{ .fail_index = 0 });
    try std.testing.expectError(error.OutOfMemory, alloc(none.allocator(), 1));
    try std.testing.expectEqual(held, reserved.total());
}

test "an absurd slab is out of memory" {
    try std.testing.expectError(error.OutOfMemory, alloc(system, std.math.maxInt(u64)));
    try std.testing.expectError(error.OutOfMemory, alloc(system, 1 << 62));
}
