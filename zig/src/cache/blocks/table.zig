//! A block table: which block holds which positions of a sequence, and in which format.
//!
//!     entry      0      1      2      3      4         positions 0..63, 64..127, ...
//!     block      4      -      -      2      9         entries 1 and 2 are evicted: all rows of theirs were let go
//!     format     2                    2      0         an index of the group's formats; 0 and 1 are the tail's
//!
//! Evicted entries stand side by side, behind those of the sinks, and are counted, not stored: so the table of a sequence
//! that keeps its newest rows has the same size however long it grows.
//!
//! A table holds one reference to each block it names.

const std = @import("std");
const assert = std.debug.assert;
const Allocator = std.mem.Allocator;
const Format = @import("pool.zig").Format;

/// The index of the tail's format in every list of formats.
pub const tail_format = 0;

/// The tail's format once more, for a block that was turned back into floats: it never migrates again, so no row of it is
/// rounded a second time.
pub const reopened_format = 1;

/// A block of this format is in the tail.
pub fn isTail(format: u8) bool {
    return format == tail_format or format == reopened_format;
}

/// The entries of a table as readers see them.
pub const Entries = struct {
    /// The blocks of all entries but the evicted ones, and their formats.
    blocks: []const i32 = &.{},
    formats: []const u8 = &.{},
    /// Evicted are the entries [evicted_first, evicted_first + evicted_count).
    evicted_first: u32 = 0,
    evicted_count: u32 = 0,

    pub fn count(entries: Entries) u32 {
        return @as(u32, @intCast(entries.blocks.len)) + entries.evicted_count;
    }

    pub fn isEvicted(entries: Entries, entry: u32) bool {
        return entry -% entries.evicted_first < entries.evicted_count;
    }

    /// The index in `blocks` and `formats` of an entry that is not evicted.
    fn index(entries: Entries, entry: u32) u32 {
        assert(!entries.isEvicted(entry));
        return if (entry < entries.evicted_first) entry else entry - entries.evicted_count;
    }

    /// The block of an entry that is not evicted.
    pub fn block(entries: Entries, entry: u32) i32 {
        return entries.blocks[entries.index(entry)];
    }

    /// The format of the block of an entry that is not evicted.
    pub fn format(entries: Entries, entry: u32) u8 {
        return entries.formats[entries.index(entry)];
    }

    /// The block of an entry; -1 where it is evicted.
    pub fn blockOrNone(entries: Entries, entry: u32) i32 {
        return if (entries.isEvicted(entry)) -1 else entries.block(entry);
    }

    /// Stored entries before an entry.
    pub fn storedBefore(entries: Entries, entry: u32) u32 {
        if (entry <= entries.evicted_first) return entry;
        return @max(entry -| entries.evicted_count, entries.evicted_first);
    }

    /// The first entry from `entry` on that is not evicted.
    pub fn skipEvicted(entries: Entries, entry: u32) u32 {
        return if (entries.isEvicted(entry)) entries.evicted_first + entries.evicted_count else entry;
    }
};

pub const BlockTable = struct {
    /// The block of each stored entry.
    blocks: std.ArrayList(i32) = .empty,
    /// The format of each of these blocks.
    formats: std.ArrayList(u8) = .empty,
    /// Evicted are the entries [evicted_first, evicted_first + evicted_count).
    evicted_first: u32 = 0,
    evicted_count: u32 = 0,
    /// Seen are the rows [0, sink_end) and [first, row count).
    sink_end: u32 = 0,
    first: u32 = 0,
    /// Rows [oldest, first) are there and unseen, for a sequence that is rewound; those behind the sinks and before it were
    /// let go. 0 where none was.
    oldest: u32 = 0,
    /// A multiple of the block size. Blocks before it have migrated, or never will.
    tail_first: u32 = 0,

    /// Frees a table whose references were given back.
    pub fn deinit(table: *BlockTable, gpa: Allocator) void {
        table.blocks.deinit(gpa);
        table.formats.deinit(gpa);
    }

    /// The entries for a reader, until some are appended or dropped.
    pub fn entries(table: *const BlockTable) Entries {
        assert(table.blocks.items.len == table.formats.items.len);
        return .{
            .blocks = table.blocks.items,
            .formats = table.formats.items,
            .evicted_first = table.evicted_first,
            .evicted_count = table.evicted_count,
        };
    }

    /// Entries, evicted ones included.
    pub fn count(table: *const BlockTable) u32 {
        return table.entries().count();
    }

    /// The block of an entry that is not evicted.
    pub fn block(table: *const BlockTable, entry: u32) i32 {
        return table.entries().block(entry);
    }

    /// The format of the block of an entry that is not evicted.
    pub fn format(table: *const BlockTable, entry: u32) u8 {
        return table.entries().format(entry);
    }

    /// Puts another block into an entry. References are the caller's business.
    pub fn set(table: *BlockTable, entry: u32, new_block: i32, new_format: u8) void {
        assert(new_block >= 0);
        const index = table.entries().index(entry);
        table.blocks.items[index] = new_block;
        table.formats.items[index] = new_format;
    }

    /// Makes room for `entry_count` entries, evicted ones included.
    pub fn ensureTotalCapacity(table: *BlockTable, gpa: Allocator, entry_count: u32) error{OutOfMemory}!void {
        const stored = entry_count -| table.evicted_count;
        try table.blocks.ensureTotalCapacity(gpa, stored);
        try table.formats.ensureTotalCapacity(gpa, stored);
    }

    pub fn appendAssumeCapacity(table: *BlockTable, new_block: i32, new_format: u8) void {
        assert(new_block >= 0);
        table.blocks.appendAssumeCapacity(new_block);
        table.formats.appendAssumeCapacity(new_format);
    }

    /// A table of its own with the first entries, without references to their blocks yet.
    pub fn copy(table: *const BlockTable, gpa: Allocator, entry_count: u32) error{OutOfMemory}!BlockTable {
        const stored = table.entries().storedBefore(entry_count);
        var other: BlockTable = .{
            .sink_end = table.sink_end,
            .first = table.first,
            .oldest = table.oldest,
            .tail_first = table.tail_first,
        };
        other.keepEvicted(table.evicted_first, table.evicted_count, entry_count);
        errdefer other.deinit(gpa);
        try other.blocks.appendSlice(gpa, table.blocks.items[0..stored]);
        try other.formats.appendSlice(gpa, table.formats.items[0..stored]);
        return other;
    }

    /// Keeps the evicted entries that stand before `entry_count`.
    fn keepEvicted(table: *BlockTable, evicted_first: u32, evicted_count: u32, entry_count: u32) void {
        const stays = entry_count > evicted_first;
        assert(!stays or evicted_count <= entry_count - evicted_first); // no table ends among them
        table.evicted_first = if (stays) evicted_first else 0;
        table.evicted_count = if (stays) evicted_count else 0;
    }

    /// Adds a reference to the blocks of all entries.
    pub fn retain(table: *const BlockTable, formats: []const *Format) void {
        var stretches = table.stretchesOf(0, table.blocks.items.len);
        while (stretches.next()) |stretch| formats[stretch.format].pool.retain(stretch.blocks);
    }

    /// Gives references back: those of stored entries.
    fn release(table: *const BlockTable, formats: []const *Format, from: usize, to: usize) void {
        var stretches = table.stretchesOf(from, to);
        while (stretches.next()) |stretch| formats[stretch.format].pool.release(stretch.blocks);
    }

    /// Drops all entries from `entry_count` on, with their references.
    pub fn shrink(table: *BlockTable, formats: []const *Format, entry_count: u32) void {
        const stored = table.entries().storedBefore(entry_count);
        if (entry_count >= table.count()) return;
        table.release(formats, stored, table.blocks.items.len);
        table.dropStored(table.blocks.items.len - stored);
        table.keepEvicted(table.evicted_first, table.evicted_count, entry_count);
    }

    /// Drops the newest entries, whose references are the caller's now.
    pub fn dropNewest(table: *BlockTable, entry_count: u32) void {
        table.dropStored(entry_count);
    }

    fn dropStored(table: *BlockTable, stored_count: usize) void {
        table.blocks.items.len -= stored_count;
        table.formats.items.len -= stored_count;
    }

    /// Some row of an entry is seen.
    pub fn isSeen(table: *const BlockTable, entry: u32, block_size: u32) bool {
        const position = @as(u64, entry) * block_size;
        return position < table.sink_end or position + block_size > table.first;
    }

    /// Releases the entries [from, to), whose rows are all let go. They follow those that were evicted before.
    pub fn evict(table: *BlockTable, gpa: Allocator, formats: []const *Format, from: u32, to: u32) void {
        assert(from < to and to <= table.count());
        if (table.evicted_count == 0) table.evicted_first = from;
        assert(from == table.evicted_first + table.evicted_count);
        const gone = to - from;
        const at = table.evicted_first;
        table.release(formats, at, at + gone);
        closeGap(i32, &table.blocks, gpa, at, gone);
        closeGap(u8, &table.formats, gpa, at, gone);
        table.evicted_count += gone;
    }

    /// Takes elements out, and gives memory back where much more is held than used.
    fn closeGap(comptime T: type, list: *std.ArrayList(T), gpa: Allocator, at: u32, gone: u32) void {
        const items = list.items;
        std.mem.copyForwards(T, items[at .. items.len - gone], items[at + gone ..]);
        const len = items.len - gone;
        const capacity = @max(2 * len, 64);
        if (list.capacity >= 2 * capacity) {
            list.items.len = capacity;
            list.shrinkAndFree(gpa, capacity);
        }
        list.items.len = len;
    }

    pub fn metadataBytes(table: *const BlockTable) u64 {
        return @sizeOf(BlockTable) + table.blocks.capacity * @sizeOf(i32) + table.formats.capacity;
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

    /// Stretches of the stored entries [from, to).
    fn stretchesOf(table: *const BlockTable, from: usize, to: usize) Stretches {
        return .{ .table = table, .at = from, .end = to };
    }
};

const testing = std.testing;

test "stretches: neighbours of one format together, all entries once" {
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
    try testing.expectEqual(2, copy.count());
}

test "entries keep their numbers when others before them are evicted" {
    const gpa = testing.allocator;
    const none: []const *Format = &.{};
    var table: BlockTable = .{};
    defer table.deinit(gpa);
    // A table without references: its blocks are nobody's, so entries are evicted by hand here.
    try table.ensureTotalCapacity(gpa, 9);
    for (0..9) |i| table.appendAssumeCapacity(@intCast(10 + i), tail_format);
    const evict = struct {
        fn evict(of: *BlockTable, from: u32, to: u32) void {
            if (of.evicted_count == 0) of.evicted_first = from;
            BlockTable.closeGap(i32, &of.blocks, gpa, of.evicted_first, to - from);
            BlockTable.closeGap(u8, &of.formats, gpa, of.evicted_first, to - from);
            of.evicted_count += to - from;
        }
    }.evict;
    evict(&table, 2, 4);
    evict(&table, 4, 5);
    const entries = table.entries();
    try testing.expectEqual(9, table.count());
    for ([_]i32{ 10, 11, -1, -1, -1, 15, 16, 17, 18 }, 0..) |expected, entry| {
        try testing.expectEqual(expected, entries.blockOrNone(@intCast(entry)));
    }
    for ([_]u32{ 0, 1, 2, 2, 2, 2, 3, 4, 5, 6 }, 0..) |expected, entry| {
        try testing.expectEqual(expected, entries.storedBefore(@intCast(entry)));
    }
    try testing.expectEqual(1, entries.skipEvicted(1));
    for (2..6) |entry| try testing.expectEqual(5, entries.skipEvicted(@intCast(entry)));

    var whole = try table.copy(gpa, 6);
    defer whole.deinit(gpa);
    try testing.expectEqual(6, whole.count());
    try testing.expectEqual(15, whole.block(5));
    var sinks = try table.copy(gpa, 2);
    defer sinks.deinit(gpa);
    try testing.expectEqual(2, sinks.count());
    table.shrink(none, 9);
    table.dropNewest(3);
    try testing.expectEqual(6, table.count());
    table.set(5, 20, reopened_format);
    try testing.expectEqual(20, table.block(5));
    try testing.expectEqual(reopened_format, table.format(5));
}
