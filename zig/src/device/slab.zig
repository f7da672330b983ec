//! Slabs: the large stretches of memory in which keys and values lie, straight from the operating system.
//!
//! A slab is reserved at once and backed by memory only where it is written. It is zero, page aligned, and asks for huge
//! pages: attention walks through gigabytes, and with 4 KiB pages it would walk through page tables as well.
//!
//! A build for valgrind (`-Dmemcheck`) takes slabs from the C allocator instead, where valgrind watches them, and marks
//! them undefined: a kernel that reads a row nobody wrote is then reported.

const std = @import("std");
const builtin = @import("builtin");
const Allocator = std.mem.Allocator;
const memcheck = @import("build_options").memcheck;

/// Slabs are no larger than this unless one unit of a cache is: every view of one then fits a JavaScript ArrayBuffer.
pub const bytes_max = 1 << 30;

const huge_page_bytes = 2 << 20;

const alignment: std.mem.Alignment = .fromByteUnits(std.heap.page_size_max);

pub const Slab = []align(std.heap.page_size_max) u8;

/// Where slabs come from unless a test says otherwise.
pub const system: Allocator = if (memcheck) std.heap.c_allocator else std.heap.page_allocator;

/// `rawAlloc`, because `alloc` writes a pattern over the memory in safe builds: that would touch every page of it, and
/// the zeros would be gone.
pub fn alloc(allocator: Allocator, bytes: u64) error{OutOfMemory}!Slab {
    const len = std.math.cast(usize, bytes) orelse return error.OutOfMemory;
    const asked: std.mem.Alignment = if (len >= huge_page_bytes) .fromByteUnits(huge_page_bytes) else alignment;
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

test "an absurd slab is out of memory" {
    try std.testing.expectError(error.OutOfMemory, alloc(system, 1 << 62));
}
