//! What changed in the prefix index, for whoever sends prompts where their prefix is: a router of several processes.
//!
//! An event is a few words, so that a list of them crosses the C ABI as it is:
//!
//!     kind, number (low, high), name (4 words), name of the block before it (4 words), token count, tokens
//!
//! Numbers have no gaps. Who asks too rarely gets everything anew: `cleared`, then each block that is there.

const std = @import("std");
const assert = std.debug.assert;
const Allocator = std.mem.Allocator;
const BlockHash = @import("chain.zig").BlockHash;

/// The kinds of events. The numbers cross the ABI and are never changed.
pub const Kind = enum(u32) {
    /// A whole block of tokens is there.
    stored = 1,
    /// It has gone.
    removed = 2,
    /// All have gone.
    cleared = 3,
};

/// Words before the tokens.
const header_words = 12;

/// Words that wait at most: what is more is told anew.
const words_max = 1 << 22;

/// Events that nobody has asked for yet.
pub const Events = struct {
    words: std.ArrayList(u32) = .empty,
    /// Events there were.
    count: u64 = 0,
    /// Some were lost.
    is_incomplete: bool = false,

    pub fn deinit(events: *Events, gpa: Allocator) void {
        events.words.deinit(gpa);
    }

    /// Adds an event; where there is no room for it, all is to be told anew.
    pub fn add(events: *Events, gpa: Allocator, kind: Kind, name: BlockHash, parent: BlockHash, tokens: []const u32) void {
        if (events.is_incomplete) return;
        if (events.words.items.len + header_words + tokens.len > words_max) return events.lose(gpa);
        events.append(gpa, kind, name, parent, tokens) catch events.lose(gpa);
    }

    /// Adds an event however many wait.
    pub fn append(
        events: *Events,
        gpa: Allocator,
        kind: Kind,
        name: BlockHash,
        parent: BlockHash,
        tokens: []const u32,
    ) error{OutOfMemory}!void {
        try events.words.ensureUnusedCapacity(gpa, header_words + tokens.len);
        const number = events.count;
        events.count += 1;
        events.words.appendSliceAssumeCapacity(&.{ @intFromEnum(kind), @truncate(number), @intCast(number >> 32) });
        for ([_]BlockHash{ name, parent }) |hash| {
            events.words.appendSliceAssumeCapacity(&@as([4]u32, @bitCast(hash)));
        }
        events.words.appendAssumeCapacity(@intCast(tokens.len));
        events.words.appendSliceAssumeCapacity(tokens);
    }

    /// Forgets what waits: the numbers of these events are given to others.
    fn lose(events: *Events, gpa: Allocator) void {
        events.restart();
        events.words.shrinkAndFree(gpa, 0);
        events.is_incomplete = true;
    }

    /// Takes back the numbers of what waits.
    pub fn restart(events: *Events) void {
        events.count -= waiting(events.words.items);
        events.words.clearRetainingCapacity();
    }

    /// Events in a list of words.
    fn waiting(words: []const u32) u64 {
        var count: u64 = 0;
        var at: usize = 0;
        while (at < words.len) : (count += 1) at += header_words + words[at + header_words - 1];
        assert(at == words.len);
        return count;
    }
};

test "what waits too long is told anew, and no number is missing" {
    const testing = std.testing;
    const gpa = testing.allocator;
    var events: Events = .{};
    defer events.deinit(gpa);
    const tokens: [256]u32 = @splat(7);
    events.add(gpa, .stored, @splat(1), @splat(0), tokens[0..4]);
    try testing.expectEqual(header_words + 4, events.words.items.len);
    try testing.expectEqual(1, events.count);
    events.words.clearRetainingCapacity(); // taken
    while (!events.is_incomplete) events.add(gpa, .stored, @splat(1), @splat(0), &tokens);
    try testing.expectEqual(1, events.count);
    try testing.expectEqual(0, events.words.items.len);
    events.add(gpa, .removed, @splat(1), @splat(0), &.{});
    try testing.expectEqual(1, events.count);
    try events.append(gpa, .cleared, @splat(0), @splat(0), &.{});
    try testing.expectEqual(2, events.count);
    events.restart();
    try testing.expectEqual(1, events.count);
}
