//! The entries of the handle table, by number: which is used again, and when.
//!
//!     word     bit 30..28 kind | 27..16 generation | 15..0 entry        0 is never one
//!
//! Giving an entry back changes its generation, so that old words of it name nothing. They could name a stranger once the
//! generation has wrapped, 4096 turns later. Free entries are used again first in, first out, and only while at least
//! `waiting_min` others are free: then a turn of an entry takes 4096 frees, and a word stays stale for at least
//! 4096 * 4096 = 2^24 of them. That holds while fewer than 61,439 entries are in use. With more of them fewer wait, and
//! with all 65,535 in use there is none.

const std = @import("std");
const assert = std.debug.assert;
const Allocator = std.mem.Allocator;

const Word = packed struct(u32) {
    entry: u16,
    generation: u12,
    kind: u3,
    zero: u1 = 0,
};

/// The kind that a word says, live or not.
pub fn kindOf(word: u32) u3 {
    return @as(Word, @bitCast(word)).kind;
}

pub const count_max = std.math.maxInt(u16);

/// Free entries that wait behind one that is used again.
const waiting_min = 1 << 12;

pub const none: u32 = std.math.maxInt(u32);

/// Entries that hold a `Content` each while they are in use.
pub fn Entries(comptime Content: type) type {
    return struct {
        const Self = @This();

        rows: std.ArrayList(Row) = .empty,
        free_first: u32 = none,
        free_last: u32 = none,
        free_count: u32 = 0,

        const Row = struct {
            generation: u12 = 0,
            /// Null when the entry is free.
            content: ?Content = null,
            next_free: u32 = none,
        };

        /// An entry to be used.
        pub fn take(self: *Self, gpa: Allocator, content: Content) error{OutOfMemory}!u16 {
            const index = try self.takeIndex(gpa);
            assert(self.rows.items[index].content == null);
            self.rows.items[index].content = content;
            return @intCast(index);
        }

        fn takeIndex(self: *Self, gpa: Allocator) error{OutOfMemory}!u32 {
            if (self.free_count <= waiting_min and self.rows.items.len < count_max) fresh: {
                // Without memory for another one an early turn is better than none.
                self.rows.append(gpa, .{}) catch break :fresh;
                return @intCast(self.rows.items.len - 1);
            }
            if (self.free_count == 0) return error.OutOfMemory;
            const index = self.free_first;
            const row = &self.rows.items[index];
            self.free_first = row.next_free;
            if (self.free_first == none) self.free_last = none;
            row.next_free = none;
            self.free_count -= 1;
            return index;
        }

        /// Gives an entry back: its words name nothing from now on.
        pub fn give(self: *Self, index: u32) void {
            const row = &self.rows.items[index];
            assert(row.content != null);
            row.content = null;
            row.generation +%= 1;
            assert(row.next_free == none);
            if (self.free_last == none) {
                self.free_first = index;
            } else {
                self.rows.items[self.free_last].next_free = index;
            }
            self.free_last = index;
            self.free_count += 1;
        }

        /// What an entry in use holds.
        pub fn at(self: *const Self, index: u32) *Content {
            return &self.rows.items[index].content.?;
        }

        /// The word that names an entry in use.
        pub fn word(self: *const Self, index: u16, kind: u3) u32 {
            const generation = self.rows.items[index].generation;
            return @bitCast(Word{ .entry = index, .generation = generation, .kind = kind });
        }

        /// The entry in use that a word names, whatever kind it says.
        pub fn find(self: *const Self, given: u32) ?struct { index: u16, kind: u3 } {
            const parts: Word = @bitCast(given);
            if (parts.zero != 0 or parts.entry >= self.rows.items.len) return null;
            const row = self.rows.items[parts.entry];
            if (row.content == null or row.generation != parts.generation) return null;
            return .{ .index = parts.entry, .kind = parts.kind };
        }
    };
}

const testing = std.testing;

const TestEntries = struct {
    entries: Entries(void) = .{},
    /// Frees so far.
    free_count: u64 = 0,
    /// [entry]; the number of its last free.
    last_frees: [count_max]u64 = @splat(0),

    fn take(self: *TestEntries) !u16 {
        return self.entries.take(testing.allocator, {});
    }

    fn give(self: *TestEntries, index: u16) void {
        self.entries.give(index);
        self.free_count += 1;
        self.last_frees[index] = self.free_count;
    }

    /// Frees since an entry was given back; as good as endless for one that never was.
    fn waited(self: *const TestEntries, index: u16) u64 {
        const last = self.last_frees[index];
        return if (last == 0) std.math.maxInt(u64) else self.free_count - last;
    }
};

test "an entry waits for 4096 frees, so its 4096 generations last for 2^24" {
    comptime assert(@as(u64, 1 << @bitSizeOf(u12)) * waiting_min == 1 << 24);
    const self = try testing.allocator.create(TestEntries);
    defer testing.allocator.destroy(self);
    self.* = .{};
    defer self.entries.rows.deinit(testing.allocator);
    var live: std.ArrayList(u16) = .empty;
    defer live.deinit(testing.allocator);
    var random: std.Random.DefaultPrng = .init(15);
    // One live at a time, a hundred, and as many as the promise is made for.
    for ([_]usize{ 1, 100, 60_000 }) |live_max| {
        for (0..5 * waiting_min) |_| {
            while (live.items.len < live_max) {
                const index = try self.take();
                try testing.expect(self.waited(index) >= waiting_min);
                try live.append(testing.allocator, index);
            }
            self.give(live.swapRemove(random.random().uintLessThan(usize, live.items.len)));
        }
    }
    try testing.expect(self.entries.rows.items.len > 60_000);
    try testing.expect(self.free_count == 3 * 5 * waiting_min);
}

test "no word comes back in as many frees as a generation more than there are entries" {
    var entries: Entries(void) = .{};
    defer entries.rows.deinit(testing.allocator);
    var words: std.AutoHashMapUnmanaged(u32, void) = .empty;
    defer words.deinit(testing.allocator);
    for (0..20 * waiting_min) |_| {
        const index = try entries.take(testing.allocator, {});
        const word = entries.word(index, 1);
        try testing.expect(!(try words.getOrPut(testing.allocator, word)).found_existing);
        try testing.expectEqual(index, entries.find(word).?.index);
        entries.give(index);
        try testing.expectEqual(null, entries.find(word));
    }
}

test "all entries in use, and one more; the last one free is used again at once" {
    var entries: Entries(void) = .{};
    defer entries.rows.deinit(testing.allocator);
    for (0..count_max) |_| _ = try entries.take(testing.allocator, {});
    try testing.expectError(error.OutOfMemory, entries.take(testing.allocator, {}));
    const old = entries.word(7, 1);
    entries.give(7);
    try testing.expectEqual(7, try entries.take(testing.allocator, {}));
    try testing.expect(entries.word(7, 1) != old);
    try testing.expectError(error.OutOfMemory, entries.take(testing.allocator, {}));
}
