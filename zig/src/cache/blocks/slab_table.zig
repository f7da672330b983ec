//! The slabs of a pool that are mapped, by number, and how many of their blocks are free.
//!
//!     chunk 0 | slab 0 | ... | slab 63 |      chunk 1 | null      of a pool that is small so far
//!
//! A pool may grow to thousands of slabs and most have a few, so a table has the chunks that have one. A chunk stays where
//! it is as long as it has a mapped slab: whoever holds a block reads its slab without the pool's lock.

const std = @import("std");
const assert = std.debug.assert;
const Allocator = std.mem.Allocator;
const slab_memory = @import("../../device/slab.zig");
const Slab = slab_memory.Slab;

const chunk_slabs = 64;

const Chunk = struct {
    slabs: [chunk_slabs]?Slab = @splat(null),
    free_counts: [chunk_slabs]u32 = @splat(0),
    mapped_count: u32 = 0,
};

pub const SlabTable = struct {
    /// Null where no slab is mapped.
    chunks: []?*Chunk,
    /// Most slabs there may be.
    count_max: u32,
    /// No slab of this number or a higher one is mapped.
    end: u32 = 0,

    pub fn init(gpa: Allocator, count_max: u32) error{OutOfMemory}!SlabTable {
        const chunks = try gpa.alloc(?*Chunk, std.math.divCeil(u32, count_max, chunk_slabs) catch unreachable); // not 0
        @memset(chunks, null);
        return .{ .chunks = chunks, .count_max = count_max };
    }

    /// The slabs are the caller's to free.
    pub fn deinit(table: SlabTable, gpa: Allocator) void {
        for (table.chunks) |chunk| if (chunk) |made| gpa.destroy(made);
        gpa.free(table.chunks);
    }

    /// A slab, or null where none is mapped.
    pub fn at(table: *const SlabTable, index: u32) ?Slab {
        const chunk = table.chunks[index / chunk_slabs] orelse return null;
        return chunk.slabs[index % chunk_slabs];
    }

    /// Free blocks of a mapped slab.
    pub fn freeCount(table: *const SlabTable, index: u32) *u32 {
        const chunk = table.chunks[index / chunk_slabs].?;
        assert(chunk.slabs[index % chunk_slabs] != null);
        return &chunk.free_counts[index % chunk_slabs];
    }

    /// The first number that has no slab, or null where all have one.
    pub fn firstFree(table: *const SlabTable) ?u32 {
        for (0..table.end) |index| if (table.at(@intCast(index)) == null) return @intCast(index);
        return if (table.end < table.count_max) table.end else null;
    }

    /// Makes room for the slab of a number; without effect once it is there.
    pub fn reserve(table: *SlabTable, gpa: Allocator, index: u32) error{OutOfMemory}!void {
        const chunk = &table.chunks[index / chunk_slabs];
        if (chunk.* != null) return;
        const made = try gpa.create(Chunk);
        made.* = .{};
        chunk.* = made;
    }

    /// Gives the room of a number back, unless its neighbors need it.
    pub fn unreserve(table: *SlabTable, gpa: Allocator, index: u32) void {
        const chunk = table.chunks[index / chunk_slabs] orelse return;
        if (chunk.mapped_count != 0) return;
        gpa.destroy(chunk);
        table.chunks[index / chunk_slabs] = null;
    }

    /// Enters a slab all of whose blocks are free.
    pub fn enter(table: *SlabTable, index: u32, slab: Slab, block_count: u32) void {
        const chunk = table.chunks[index / chunk_slabs].?;
        assert(chunk.slabs[index % chunk_slabs] == null);
        chunk.slabs[index % chunk_slabs] = slab;
        chunk.free_counts[index % chunk_slabs] = block_count;
        chunk.mapped_count += 1;
        table.end = @max(table.end, index + 1);
    }

    /// Takes a slab out, which is the caller's to free.
    pub fn remove(table: *SlabTable, gpa: Allocator, index: u32) Slab {
        const chunk = table.chunks[index / chunk_slabs].?;
        const slab = chunk.slabs[index % chunk_slabs].?;
        chunk.slabs[index % chunk_slabs] = null;
        chunk.free_counts[index % chunk_slabs] = 0;
        chunk.mapped_count -= 1;
        table.unreserve(gpa, index);
        while (table.end > 0 and table.at(table.end - 1) == null) table.end -= 1;
        return slab;
    }

    pub fn metadataBytes(table: *const SlabTable) u64 {
        var bytes: u64 = table.chunks.len * @sizeOf(?*Chunk);
        for (table.chunks) |chunk| bytes += if (chunk == null) 0 else @sizeOf(Chunk);
        return bytes;
    }
};

test "slabs come and go, and chunks with them" {
    const testing = std.testing;
    const gpa = testing.allocator;
    var table: SlabTable = try .init(gpa, 130);
    defer table.deinit(gpa);
    const empty_bytes = table.metadataBytes();
    try testing.expect(empty_bytes < 64);
    const memory = try slab_memory.alloc(slab_memory.system, 1);
    defer slab_memory.free(slab_memory.system, memory);
    for ([_]u32{ 0, 1, 129 }) |index| {
        try table.reserve(gpa, index);
        try table.reserve(gpa, index);
        table.enter(index, memory, index + 5);
        try testing.expectEqual(memory.ptr, table.at(index).?.ptr);
        try testing.expectEqual(index + 5, table.freeCount(index).*);
    }
    try testing.expectEqual(130, table.end);
    try testing.expectEqual(2, table.firstFree().?);
    try testing.expectEqual(null, table.at(64));
    try testing.expectEqual(empty_bytes + 2 * @sizeOf(Chunk), table.metadataBytes());
    _ = table.remove(gpa, 129);
    try testing.expectEqual(2, table.end);
    try testing.expectEqual(empty_bytes + @sizeOf(Chunk), table.metadataBytes());
    _ = table.remove(gpa, 0);
    try testing.expectEqual(0, table.firstFree().?);
    _ = table.remove(gpa, 1);
    try testing.expectEqual(0, table.end);
    try testing.expectEqual(empty_bytes, table.metadataBytes());
    try table.reserve(gpa, 70);
    table.unreserve(gpa, 70);
    try testing.expectEqual(empty_bytes, table.metadataBytes());
}
