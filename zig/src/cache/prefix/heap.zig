//! A heap of items that know their place in it, so that one can be moved or taken out wherever it stands.

const std = @import("std");
const assert = std.debug.assert;
const Allocator = std.mem.Allocator;

/// The place of an item that is in no heap.
pub const nowhere = std.math.maxInt(u32);

/// A heap of items named by numbers. `Context` tells which of two comes first and keeps the place of each:
/// `isBefore(context, a, b) bool` and `place(context, item) *u32`.
pub fn Heap(comptime Context: type) type {
    return struct {
        const Self = @This();

        items: std.ArrayList(u32) = .empty,

        pub fn deinit(heap: *Self, gpa: Allocator) void {
            heap.items.deinit(gpa);
        }

        /// The item that comes first.
        pub fn first(heap: *const Self) ?u32 {
            return if (heap.items.items.len == 0) null else heap.items.items[0];
        }

        /// Makes room for `count` items.
        pub fn ensureCapacity(heap: *Self, gpa: Allocator, count: usize) error{OutOfMemory}!void {
            try heap.items.ensureTotalCapacity(gpa, count);
        }

        /// Adds an item that is in no heap.
        pub fn addAssumeCapacity(heap: *Self, context: Context, item: u32) void {
            assert(context.place(item).* == nowhere);
            context.place(item).* = @intCast(heap.items.items.len);
            heap.items.appendAssumeCapacity(item);
            heap.rise(context, heap.items.items.len - 1);
        }

        /// Takes an item out.
        pub fn remove(heap: *Self, context: Context, item: u32) void {
            const at = context.place(item).*;
            assert(heap.items.items[at] == item);
            context.place(item).* = nowhere;
            const last = heap.items.pop().?;
            if (last == item) return;
            heap.put(context, at, last);
            heap.settle(context, last);
        }

        /// Moves an item to where it belongs, after what `isBefore` says of it has changed.
        pub fn settle(heap: *Self, context: Context, item: u32) void {
            const at = context.place(item).*;
            heap.rise(context, at);
            heap.sink(context, context.place(item).*);
        }

        fn put(heap: *Self, context: Context, at: usize, item: u32) void {
            heap.items.items[at] = item;
            context.place(item).* = @intCast(at);
        }

        fn rise(heap: *Self, context: Context, from: usize) void {
            const item = heap.items.items[from];
            var at = from;
            while (at > 0) {
                const parent = (at - 1) / 2;
                if (!context.isBefore(item, heap.items.items[parent])) break;
                heap.put(context, at, heap.items.items[parent]);
                at = parent;
            }
            heap.put(context, at, item);
        }

        fn sink(heap: *Self, context: Context, from: usize) void {
            const items = heap.items.items;
            const item = items[from];
            var at = from;
            while (2 * at + 1 < items.len) {
                var child = 2 * at + 1;
                if (child + 1 < items.len and context.isBefore(items[child + 1], items[child])) child += 1;
                if (!context.isBefore(items[child], item)) break;
                heap.put(context, at, items[child]);
                at = child;
            }
            heap.put(context, at, item);
        }
    };
}

test Heap {
    const testing = std.testing;
    const Keys = struct {
        keys: [64]u32 = undefined,
        places: [64]u32 = @splat(nowhere),

        pub fn isBefore(self: *@This(), a: u32, b: u32) bool {
            return if (self.keys[a] != self.keys[b]) self.keys[a] < self.keys[b] else a < b;
        }
        pub fn place(self: *@This(), item: u32) *u32 {
            return &self.places[item];
        }
    };
    const gpa = testing.allocator;
    var keys: Keys = .{};
    var heap: Heap(*Keys) = .{};
    defer heap.deinit(gpa);
    try heap.ensureCapacity(gpa, 64);
    try testing.expectEqual(null, heap.first());
    var prng: std.Random.DefaultPrng = .init(1);
    const random = prng.random();
    var inside: std.StaticBitSet(64) = .initEmpty();
    for (0..20_000) |_| {
        const item = random.uintLessThan(u32, 64);
        const key = random.uintLessThan(u32, 40);
        if (!inside.isSet(item)) {
            keys.keys[item] = key;
            heap.addAssumeCapacity(&keys, item);
            inside.set(item);
        } else if (random.boolean()) {
            keys.keys[item] = key;
            heap.settle(&keys, item);
        } else {
            heap.remove(&keys, item);
            inside.unset(item);
        }
        try testing.expectEqual(inside.count(), heap.items.items.len);
        var expected: ?u32 = null;
        var members = inside.iterator(.{});
        while (members.next()) |member| {
            if (expected == null or keys.isBefore(@intCast(member), expected.?)) expected = @intCast(member);
        }
        try testing.expectEqual(expected, heap.first());
    }
}
