//! A block table: which block holds which positions of a sequence, and in which format.
//!
//!     entry      0      1      2      3         positions 0..63, 64..127, ...
//!     block      4     -1      2      9         -1: all rows of it were let go
//!     format     2      2      2      0         an index of the group's formats; 0 and 1 are the tail's
//!
//! A table holds one reference to each block it names.

const std = @import("std");
const assert = std.debug.assert;
const Allocator = std.mem.Allocator;
const Format = @import("pool.zig").Format;

/// The index of the tail's format in every list of formats.
pub const tail_format = 0;

/// The tail's once more, for a block that was turned back into floats: it never migrates again, so no row of it is rounded
/// a second time.
pub const reopened_format = 1;

/// Is a block of this format in the tail?
pub fn isTail(format: u8) bool {
    return format == tail_format or format == reopened_format;
}

pub const BlockTable = struct {
    blocks: std.ArrayList(i32) = .empty,
    /// As long as `blocks`.
    formats: std.ArrayList(u8) = .empty,
    /// Seen are the rows [0, sink_end) and [first, row count).
    sink_end: u32 = 0,
    first: u32 = 0,
    /// Rows [oldest, first) are there and unseen, for a sequence that is rewound; those behind the sinks and before it were
    /// let go. 0 where none was.
    oldest: u32 = 0,
    /// A multiple of the block size. Blocks before it have migrated, or never will.
    tail_first: u32 = 0,

    /// The references must have been given back.
    pub fn deinit(table: *BlockTable, gpa: Allocator) void {
        table.blocks.deinit(gpa);
        table.formats.deinit(gpa);
    }

    pub fn len(table: *const BlockTable) usize {
        assert(table.blocks.items.len == table.formats.items.len);
        return table.blocks.items.len;
    }

    pub fn ensureTotalCapacity(table: *BlockTable, gpa: Allocator, entry_count: usize) error{OutOfMemory}!void {
        try table.blocks.ensureTotalCapacity(gpa, entry_count);
        try table.formats.ensureTotalCapacity(gpa, entry_count);
    }

    pub fn appendAssumeCapacity(table: *BlockTable, block: i32, format: u8) void {
        table.blocks.appendAssumeCapacity(block);
        table.formats.appendAssumeCapacity(format);
    }

    /// A table of its own with the first entries, without references to their blocks yet.
    pub fn copy(table: *const BlockTable, gpa: Allocator, entry_count: usize) error{OutOfMemory}!BlockTable {
        var other: BlockTable = .{
            .sink_end = table.sink_end,
            .first = table.first,
            .oldest = table.oldest,
            .tail_first = table.tail_first,
        };
        errdefer other.deinit(gpa);
        try other.blocks.appendSlice(gpa, table.blocks.items[0..entry_count]);
        try other.formats.appendSlice(gpa, table.formats.items[0..entry_count]);
        return other;
    }

    /// One more reference to the blocks of all entries.
    pub fn retain(table: *const BlockTable, formats: []const *Format) void {
        var stretches = table.stretchesOf(0, table.len());
        while (stretches.next()) |stretch| formats[stretch.format].pool.retain(stretch.blocks);
    }

    /// Gives the references of some entries back; the entries are the caller's to overwrite.
    pub fn release(table: *const BlockTable, formats: []const *Format, from: usize, to: usize) void {
        var stretches = table.stretchesOf(from, to);
        while (stretches.next()) |stretch| formats[stretch.format].pool.release(stretch.blocks);
    }

    /// Releases all entries from `entry_count` on.
    pub fn shrink(table: *BlockTable, formats: []const *Format, entry_count: usize) void {
        if (entry_count >= table.len()) return;
        table.release(formats, entry_count, table.len());
        table.blocks.items.len = entry_count;
        table.formats.items.len = entry_count;
    }

    /// Is any row of an entry seen?
    pub fn isSeen(table: *const BlockTable, entry: usize, block_size: u32) bool {
        const position = entry * block_size;
        return position < table.sink_end or position + block_size > table.first;
    }

    /// Releases some entries, whose rows are all let go.
    pub fn evict(table: *BlockTable, formats: []const *Format, from: usize, to: usize) void {
        table.release(formats, from, to);
        @memset(table.blocks.items[from..to], -1);
    }

    const Stretch = struct { format: u8, blocks: []const i32 };

    /// Neighbours of one format: a pool takes its lock once for each of these.
    const Stretches = struct {
        table: *const BlockTable,
        at: usize,
        end: usize,

        fn next(self: *Stretches) ?Stretch {
            if (self.at >= self.end) return null;
            const first = self.at;
            const formats = self.table.formats.items;
            while (self.at < self.end and formats[self.at] == formats[first]) self.at += 1;
            return .{ .format = formats[first], .blocks = self.table.blocks.items[first..self.at] };
        }
    };

    fn stretchesOf(table: *const BlockTable, from: usize, to: usize) Stretches {
        return .{ .table = table, .at = from, .end = to };
    }
};

test "stretches: neighbours of one format together, all entries once" {
    const testing = std.testing;
    var table: BlockTable = .{};
    defer table.deinit(testing.allocator);
    try table.ensureTotalCapacity(testing.allocator, 6);
    for ([_]u8{ 0, 1, 1, 1, 0, 2 }, 0..) |format, i| table.appendAssumeCapacity(@intCast(10 + i), format);
    var stretches = table.stretchesOf(0, 6);
    var seen: i32 = 10;
    for ([_]struct { u8, usize }{ .{ 0, 1 }, .{ 1, 3 }, .{ 0, 1 }, .{ 2, 1 } }) |row| {
        const stretch = stretches.next().?;
        try testing.expectEqual(row[0], stretch.format);
        try testing.expectEqual(row[1], stretch.blocks.len);
        for (stretch.blocks) |block| {
            try testing.expectEqual(seen, block);
            seen += 1;
        }
    }
    try testing.expectEqual(null, stretches.next());
    var copy = try table.copy(testing.allocator, 2);
    defer copy.deinit(testing.allocator);
    try testing.expectEqual(2, copy.len());
}
