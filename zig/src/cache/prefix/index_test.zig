//! The prefix index against a list of what was added, with blocks of a real pool.

const std = @import("std");
const memcheck = @import("build_options").memcheck;
const testing = std.testing;
const gpa = testing.allocator;
const BlockPool = @import("../blocks/pool.zig").BlockPool;
const BlockTable = @import("../blocks/table.zig").BlockTable;
const chain = @import("chain.zig");
const indexes = @import("index.zig");
const Index = indexes.Index;
const layer_group = @import("../paged/layer_group.zig");
const slab_memory = @import("../../device/slab.zig");
const trees = @import("tree.zig");

const block_size = 4;

/// Groups of one layer each, their pools, and an index.
const Fixture = struct {
    pools: []BlockPool,
    groups: []layer_group.Group,
    index: Index,

    fn init(windows: []const ?u32, options: indexes.Options) !*Fixture {
        const self = try gpa.create(Fixture);
        self.pools = try gpa.alloc(BlockPool, windows.len);
        self.groups = try gpa.alloc(layer_group.Group, windows.len);
        for (self.pools, self.groups, windows) |*pool, *group, window| {
            pool.* = try .init(gpa, slab_memory.system, .{
                .layer_count = 1,
                .kv_head_count = 1,
                .head_dim = 4,
                .block_size = block_size,
                .dtype_k = .f32,
                .dtype_v = .f32,
            }, 64 << 20);
            group.* = .{ .shape = pool.shape, .window_tokens = window, .store = null, .pool = pool };
            _ = try group.formatIndex(gpa, .f32, .f32);
        }
        self.index = try .init(gpa, self.groups, block_size, false, options);
        return self;
    }

    fn deinit(self: *Fixture) void {
        self.index.deinit();
        for (self.groups) |*group| group.deinit(gpa);
        for (self.pools) |*pool| {
            testing.expectEqual(0, pool.formats.items[0].pool.stats().used_blocks) catch @panic("blocks are left");
            pool.deinit();
        }
        gpa.free(self.groups);
        gpa.free(self.pools);
        gpa.destroy(self);
    }

    /// A sequence of these tokens: its blocks, which `free` gives back.
    fn tables(self: *Fixture, token_count: usize) ![]BlockTable {
        const entry_count: u32 = @intCast((token_count + block_size - 1) / block_size);
        const made = try gpa.alloc(BlockTable, self.groups.len);
        for (made, self.groups) |*table, *group| {
            table.* = .{};
            try table.ensureTotalCapacity(gpa, entry_count);
            for (0..entry_count) |_| {
                var block: [1]i32 = undefined;
                try group.tailPool().take(1, &block);
                table.appendAssumeCapacity(block[0], 0);
            }
        }
        return made;
    }

    fn free(self: *Fixture, made: []BlockTable) void {
        for (made, self.groups) |*table, *group| {
            table.shrink(group.formats.items, 0);
            table.deinit(gpa);
        }
        gpa.free(made);
    }

    /// Adds all tokens, the last ones as a node of fewer; returns how many were taken.
    fn addAll(self: *Fixture, root: u32, tokens: []const u32, priority: u8) !u32 {
        const made = try self.tables(tokens.len);
        defer self.free(made);
        var node = root;
        var start: u32 = 0;
        while (start < tokens.len) : (start += block_size) {
            const block = tokens[start..@min(start + block_size, tokens.len)];
            node = self.index.add(node, block, made, start / block_size, .{ .priority = priority }) orelse return start;
        }
        return @intCast(tokens.len);
    }

    /// How many of the tokens are there from the first on.
    fn matched(self: *Fixture, root: u32, tokens: []const u32) !u32 {
        var path: std.ArrayList(u32) = .empty;
        defer path.deinit(gpa);
        try self.index.tree.walk(root, tokens, &path);
        const whole: u32 = @intCast(path.items.len * block_size);
        const last = if (path.items.len == 0) root else path.items[path.items.len - 1];
        const nearest = self.index.tree.nearestChild(last, tokens[whole..]) orelse return whole;
        return whole + nearest.common;
    }
};

fn newWriter() u64 {
    return 1;
}

fn keyOf(salt: ?[]const u8) chain.Key {
    return chain.keyOf(&.{"model"}, salt);
}

test "the longest prefix anyone added is found, whole blocks and tokens behind them" {
    const fixture: *Fixture = try .init(&.{null}, .{});
    defer fixture.deinit();
    const index = &fixture.index;
    const root = (try index.open(keyOf(null), keyOf(null), newWriter)).node;
    defer index.close(root);
    const other = (try index.open(keyOf("salt"), keyOf("salt"), newWriter)).node;
    defer index.close(other);
    const a = [_]u32{ 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 };
    try testing.expectEqual(10, try fixture.addAll(root, &a, indexes.priority_default));
    try testing.expectEqual(8, try fixture.matched(root, &.{ 1, 2, 3, 4, 5, 6, 7, 8, 90, 91 }));
    try testing.expectEqual(8, try fixture.matched(root, a[0..8]));
    try testing.expectEqual(6, try fixture.matched(root, &.{ 1, 2, 3, 4, 5, 6, 70, 80 }));
    try testing.expectEqual(10, try fixture.matched(root, &(a ++ [_]u32{ 11, 12 })));
    try testing.expectEqual(0, try fixture.matched(other, &a));
    try testing.expectEqual(3, index.stats.cached_blocks);
}

test "random prompts match as in a list of them" {
    for ([_][]const ?u32{ &.{null}, &.{ 8, null } }) |windows| {
        const fixture: *Fixture = try .init(windows, .{});
        defer fixture.deinit();
        const index = &fixture.index;
        var prng: std.Random.DefaultPrng = .init(7);
        const random = prng.random();
        const roots = [_]u32{ (try index.open(keyOf("a"), keyOf("a"), newWriter)).node, (try index.open(keyOf("b"), keyOf("b"), newWriter)).node };
        defer for (roots) |root| index.close(root);
        var known: [roots.len]std.ArrayList([24]u32) = @splat(.empty);
        var lengths: [roots.len]std.ArrayList(u32) = @splat(.empty);
        defer for (&known, &lengths) |*list, *counts| {
            list.deinit(gpa);
            counts.deinit(gpa);
        };
        for (0..if (memcheck) 60 else 600) |_| {
            var prompt: [24]u32 = undefined;
            for (&prompt) |*token| token.* = random.uintLessThan(u32, 2);
            const tokens = prompt[0 .. 1 + random.uintLessThan(usize, 24)];
            const tenant = random.uintLessThan(usize, 2);
            var expected: u32 = 0;
            for (known[tenant].items, lengths[tenant].items) |added, length| {
                expected = @max(expected, trees.commonCount(added[0..length], tokens));
            }
            try testing.expectEqual(expected, try fixture.matched(roots[tenant], tokens));
            try testing.expectEqual(tokens.len, try fixture.addAll(roots[tenant], tokens, indexes.priority_default));
            try known[tenant].append(gpa, prompt);
            try lengths[tenant].append(gpa, @intCast(tokens.len));
        }
        index.clear();
        try testing.expectEqual(0, index.stats.cached_bytes);
    }
}

test "memory that is wanted comes from the least important, then from the oldest, a child before its parent" {
    const fixture: *Fixture = try .init(&.{null}, .{});
    defer fixture.deinit();
    const index = &fixture.index;
    const root = (try index.open(keyOf(null), keyOf(null), newWriter)).node;
    defer index.close(root);
    _ = try fixture.addAll(root, &.{ 1, 1, 1, 1, 2, 2, 2, 2 }, 50);
    _ = try fixture.addAll(root, &.{ 3, 3, 3, 3, 4, 4, 4, 4, 5, 5 }, 35);
    _ = try fixture.addAll(root, &.{ 6, 6, 6, 6 }, 35);
    for ([_]u32{ 8, 4, 0 }) |left| {
        try testing.expect(index.reclaim());
        try testing.expectEqual(left, try fixture.matched(root, &.{ 3, 3, 3, 3, 4, 4, 4, 4, 5, 5 }));
        try testing.expectEqual(4, try fixture.matched(root, &.{ 6, 6, 6, 6 }));
    }
    // What was used again goes later.
    _ = try fixture.addAll(root, &.{ 7, 7, 7, 7 }, 35);
    index.touch(index.tree.nearestChild(root, &.{ 6, 6, 6, 6 }).?.node);
    try testing.expect(index.reclaim());
    try testing.expectEqual(0, try fixture.matched(root, &.{ 7, 7, 7, 7 }));
    try testing.expectEqual(4, try fixture.matched(root, &.{ 6, 6, 6, 6 }));
    try testing.expect(index.reclaim());
    try testing.expectEqual(8, try fixture.matched(root, &.{ 1, 1, 1, 1, 2, 2, 2, 2 }));
    try testing.expect(index.reclaim());
    try testing.expect(index.reclaim());
    try testing.expect(!index.reclaim());
    try testing.expectEqual(7, index.stats.evicted_blocks);
}

var now_ms: u64 = 0;

fn testClock() u64 {
    return now_ms;
}

test "a priority for a time ends with it" {
    const fixture: *Fixture = try .init(&.{null}, .{});
    defer fixture.deinit();
    const index = &fixture.index;
    index.clock = testClock;
    const root = (try index.open(keyOf(null), keyOf(null), newWriter)).node;
    defer index.close(root);
    for ([_]bool{ false, true }) |has_ended| {
        now_ms = 1000;
        const made = try fixture.tables(block_size);
        defer fixture.free(made);
        const tokens = [_]u32{ 1, 1, 1, 1 };
        _ = index.add(root, &tokens, made, 0, .{ .priority = 90, .ttl_ms = 500 }).?;
        now_ms = 1300;
        _ = index.add(root, &tokens, made, 0, .{ .priority = 90, .ttl_ms = 400 }).?; // until 1700 now
        _ = try fixture.addAll(root, &.{ 2, 2, 2, 2 }, 50);
        const pool = fixture.groups[0].tailPool();
        const block = made[0].block(0);
        pool.retain(&.{block});
        made[0].shrink(&.{index.groups[0].formats.items[0]}, 0);
        pool.release(&.{block});
        now_ms = if (has_ended) 1700 else 1699;
        try testing.expect(index.reclaim());
        const left: []const u32 = if (has_ended) &.{ 2, 2, 2, 2 } else &.{ 1, 1, 1, 1 };
        try testing.expectEqual(4, try fixture.matched(root, left));
        try testing.expect(index.reclaim());
        try testing.expectEqual(0, index.stats.cached_blocks);
    }
}

test "a priority that holds for ever does not end with a later one that holds for a time" {
    const fixture: *Fixture = try .init(&.{null}, .{});
    defer fixture.deinit();
    const index = &fixture.index;
    index.clock = testClock;
    now_ms = 1000;
    const root = (try index.open(keyOf(null), keyOf(null), newWriter)).node;
    defer index.close(root);
    const made = try fixture.tables(block_size);
    const tokens = [_]u32{ 1, 1, 1, 1 };
    for ([_]?u32{ null, 500, 1 }) |ttl_ms| _ = index.add(root, &tokens, made, 0, .{ .priority = 90, .ttl_ms = ttl_ms }).?;
    fixture.free(made);
    _ = try fixture.addAll(root, &.{ 2, 2, 2, 2 }, 50);
    now_ms = 5000;
    try testing.expect(index.reclaim());
    try testing.expectEqual(4, try fixture.matched(root, &tokens));
}

test "what has gone is not waited for, however long its priority was to hold" {
    const fixture: *Fixture = try .init(&.{null}, .{});
    defer fixture.deinit();
    const index = &fixture.index;
    index.clock = testClock;
    now_ms = 1000;
    const root = (try index.open(keyOf(null), keyOf(null), newWriter)).node;
    defer index.close(root);
    const made = try fixture.tables(block_size);
    defer fixture.free(made);
    const tokens = [_]u32{ 1, 1, 1, 1 };
    for (0..100) |_| {
        _ = index.add(root, &tokens, made, 0, .{ .priority = 90, .ttl_ms = std.math.maxInt(u32) }).?;
        try testing.expectEqual(1, index.expiring.count());
        index.clear();
        try testing.expectEqual(0, index.expiring.count());
    }
    // Nor is one whose priority holds for ever after all.
    _ = index.add(root, &tokens, made, 0, .{ .priority = 90, .ttl_ms = 500 }).?;
    _ = index.add(root, &tokens, made, 0, .{ .priority = 90 }).?;
    try testing.expectEqual(0, index.expiring.count());
}

test "events that were lost are replaced by all there is, a block behind the one before it" {
    const fixture: *Fixture = try .init(&.{null}, .{ .has_events = true });
    defer fixture.deinit();
    const index = &fixture.index;
    const root = (try index.open(keyOf(null), keyOf(null), newWriter)).node;
    defer index.close(root);
    _ = try fixture.addAll(root, &.{ 1, 1, 1, 1, 2, 2, 2, 2, 3 }, 35);
    _ = try fixture.addAll(root, &.{ 1, 1, 1, 1, 4, 4, 4, 4, 5, 5, 5, 5 }, 35);
    try testing.expectEqual(4 * (12 + 4), (try index.events()).?.len);
    index.takeEvents();
    index.log.?.is_incomplete = true;
    const words = (try index.events()).?;
    try testing.expectEqual(12 + 4 * (12 + 4), words.len);
    try testing.expectEqual(@intFromEnum(@import("events.zig").Kind.cleared), words[0]);
    var known: std.AutoHashMapUnmanaged([4]u32, void) = .empty;
    defer known.deinit(gpa);
    try known.put(gpa, @splat(0), {});
    var at: usize = 12;
    for (5..9) |number| {
        try testing.expectEqual(number, words[at + 1]);
        try testing.expect(known.contains(words[at + 7 ..][0..4].*));
        try known.put(gpa, words[at + 3 ..][0..4].*, {});
        at += 12 + 4;
    }
}

test "what a sequence has stays, and gives way where something unused stands before it" {
    const fixture: *Fixture = try .init(&.{null}, .{});
    defer fixture.deinit();
    const index = &fixture.index;
    const root = (try index.open(keyOf(null), keyOf(null), newWriter)).node;
    defer index.close(root);
    const made = try fixture.tables(8);
    defer fixture.free(made);
    const first = index.add(root, &.{ 1, 2, 3, 4 }, made, 0, .{}).?;
    _ = index.add(first, &.{ 5, 6, 7, 8 }, made, 1, .{}).?;
    _ = try fixture.addAll(root, &.{ 9, 9, 9, 9 }, 90);
    try testing.expect(index.reclaim());
    try testing.expectEqual(0, try fixture.matched(root, &.{ 9, 9, 9, 9 }));
    try testing.expect(!index.reclaim());
    try testing.expectEqual(8, try fixture.matched(root, &.{ 1, 2, 3, 4, 5, 6, 7, 8 }));
    // The sequence leaves its first block, as one does that is quantized where the index keeps floats.
    const pool = fixture.groups[0].tailPool();
    var other: [1]i32 = undefined;
    try pool.take(1, &other);
    const old = made[0].block(0);
    made[0].set(0, other[0], 0);
    pool.release(&.{old});
    try testing.expect(index.reclaim());
    try testing.expect(index.reclaim());
    try testing.expectEqual(0, index.stats.cached_blocks);
}

test "slots that were set aside come back, however many nodes are added meanwhile" {
    const fixture: *Fixture = try .init(&.{ null, 4 }, .{});
    defer fixture.deinit();
    const index = &fixture.index;
    const root = (try index.open(keyOf(null), keyOf(null), newWriter)).node;
    defer index.close(root);
    const made = try fixture.tables(4 * block_size);
    defer fixture.free(made);
    // Each is used, so each attempt sets all of them aside.
    for (0..200) |i| {
        const number: u32 = @intCast(i);
        _ = index.add(root, &.{ number, 1, 2, 3 }, made, 0, .{}).?;
        try testing.expect(!index.reclaim());
    }
    try testing.expectEqual(400, index.stats.cached_blocks);
}

test "a limit for all and one for a tenant hold, and a flood stays in its own" {
    const block_bytes = block_size * 4 * 4 * 2;
    const fixture: *Fixture = try .init(&.{null}, .{ .max_bytes = 10 * block_bytes, .max_bytes_per_salt = 6 * block_bytes });
    defer fixture.deinit();
    const index = &fixture.index;
    const quiet = (try index.open(keyOf("quiet"), keyOf("quiet"), newWriter)).node;
    defer index.close(quiet);
    const loud = (try index.open(keyOf("loud"), keyOf("loud"), newWriter)).node;
    defer index.close(loud);
    const kept = [_]u32{ 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4 };
    try testing.expectEqual(16, try fixture.addAll(quiet, &kept, 35));
    for (0..100) |i| {
        const number: u32 = @intCast(i);
        try testing.expectEqual(4, try fixture.addAll(loud, &.{ number, 0, 0, 0 }, 35));
        try testing.expect(index.stats.cached_bytes <= 10 * block_bytes);
    }
    try testing.expectEqual(16, try fixture.matched(quiet, &kept));
    // A prompt that is longer than the limit is taken as far as it goes.
    var long: [40]u32 = undefined;
    for (&long, 0..) |*token, i| token.* = @intCast(i);
    try testing.expectEqual(24, try fixture.addAll(loud, &long, 35));
    try testing.expectEqual(16, try fixture.matched(quiet, &kept));
    try testing.expectEqual(24, try fixture.matched(loud, &long));
}

test "a limit for a tenant is one for all of its models, and what is wanted least of these goes" {
    const block_bytes = block_size * 4 * 4 * 2;
    const fixture: *Fixture = try .init(&.{null}, .{ .max_bytes_per_salt = 6 * block_bytes });
    defer fixture.deinit();
    const index = &fixture.index;
    const other = (try index.open(keyOf("other"), keyOf("other"), newWriter)).node;
    defer index.close(other);
    _ = try fixture.addAll(other, &.{ 7, 7, 7, 7 }, 35);
    var keys: [20]chain.Key = undefined;
    for (&keys, 0..) |*key, i| key.* = chain.keyOf(&.{ "model", &.{@intCast(i)} }, "salt");
    for (keys, 0..) |key, i| {
        const root = (try index.open(key, keyOf("salt"), newWriter)).node;
        defer index.close(root);
        const priority: u8 = if (i == 1) 90 else 35;
        try testing.expectEqual(8, try fixture.addAll(root, &.{ 1, 1, 1, 1, 2, 2, 2, 2 }, priority));
        try testing.expect(index.tenants.of(&index.tree, root).bytes <= 6 * block_bytes);
    }
    for (keys, 0..) |key, i| {
        const root = (try index.open(key, keyOf("salt"), newWriter)).node;
        defer index.close(root);
        const left: u32 = if (i == 1 or i >= keys.len - 2) 8 else 0;
        try testing.expectEqual(left, try fixture.matched(root, &.{ 1, 1, 1, 1, 2, 2, 2, 2 }));
    }
    try testing.expectEqual(4, try fixture.matched(other, &.{ 7, 7, 7, 7 }));
}

test "in a layer with a window a block goes by itself, and comes back with the next who has it" {
    const fixture: *Fixture = try .init(&.{ null, 4 }, .{});
    defer fixture.deinit();
    const index = &fixture.index;
    const root = (try index.open(keyOf(null), keyOf(null), newWriter)).node;
    defer index.close(root);
    const tokens = [_]u32{ 1, 2, 3, 4, 5, 6, 7, 8 };
    _ = try fixture.addAll(root, &tokens, 35);
    const first = index.tree.nearestChild(root, tokens[0..4]).?.node;
    try testing.expect(index.tree.blockOf(first, 1) != null);
    try testing.expect(index.reclaim());
    try testing.expectEqual(null, index.tree.blockOf(first, 1));
    try testing.expect(index.tree.blockOf(first, 0) != null);
    try testing.expectEqual(8, try fixture.matched(root, &tokens));
    _ = try fixture.addAll(root, tokens[0..4], 35);
    try testing.expect(index.tree.blockOf(first, 1) != null);
}

test "a root goes with its last sequence and block, and a node that went is known to have gone" {
    const fixture: *Fixture = try .init(&.{null}, .{});
    defer fixture.deinit();
    const index = &fixture.index;
    for (0..if (memcheck) 20 else 1000) |i| {
        var salt: [8]u8 = undefined;
        std.mem.writeInt(u64, &salt, i, .little);
        const root = try index.open(keyOf(&salt), keyOf(&salt), newWriter);
        try testing.expectEqual(root.node, index.tree.get(root).?);
        _ = try fixture.addAll(root.node, &.{ 1, 2, 3, 4 }, 35);
        const node = index.tree.refOf(index.tree.nearestChild(root.node, &.{1}).?.node);
        index.close(root.node);
        try testing.expectEqual(root.node, index.tree.get(root).?);
        try testing.expect(index.reclaim());
        try testing.expectEqual(null, index.tree.get(node));
        try testing.expectEqual(null, index.tree.get(root));
    }
    try testing.expect(index.tree.nodes.items.len <= 2 and index.roots.items.items.len <= 1 and index.tenants.items.items.len <= 1);
    try testing.expectEqual(0, index.roots.by_key.count() + index.tenants.by_key.count());
}

test "blocks that are set aside while they are used come back, however many follow" {
    const fixture: *Fixture = try .init(&.{ null, 4 }, .{});
    defer fixture.deinit();
    const index = &fixture.index;
    const root = (try index.open(keyOf(null), keyOf(null), newWriter)).node;
    defer index.close(root);
    var sequences: [160][]BlockTable = undefined;
    for (&sequences, 0..) |*made, i| {
        made.* = try fixture.tables(4);
        _ = index.add(root, &.{ @intCast(i), 0, 0, 0 }, made.*, 0, .{}).?;
        if (i % 20 == 19) try testing.expect(!index.reclaim());
    }
    try testing.expectEqual(320, index.stats.cached_blocks);
    for (sequences) |made| fixture.free(made);
    while (index.reclaim()) {}
    try testing.expectEqual(0, index.stats.cached_blocks);
}

test "blocks that a node lacked count against the limit" {
    const block_bytes = block_size * 4 * 4 * 2;
    const fixture: *Fixture = try .init(&.{ 4, 4 }, .{ .max_bytes = 4 * block_bytes });
    defer fixture.deinit();
    const index = &fixture.index;
    const root = (try index.open(keyOf(null), keyOf(null), newWriter)).node;
    defer index.close(root);
    for ([_]u32{ 1, 2 }) |token| _ = try fixture.addAll(root, &.{ token, 0, 0, 0 }, 35);
    index.forget(index.tree.nearestChild(root, &.{1}).?.node, 1);
    _ = try fixture.addAll(root, &.{ 3, 0, 0, 0 }, 35);
    _ = try fixture.addAll(root, &.{ 2, 0, 0, 0 }, 35);
    for ([_]u32{ 1, 2, 3 }) |token| {
        _ = try fixture.addAll(root, &.{ token, 0, 0, 0 }, 35);
        try testing.expect(index.stats.cached_bytes <= 4 * block_bytes);
        try testing.expectEqual(4, try fixture.matched(root, &.{ token, 0, 0, 0 }));
    }
}

test "a node without blocks stays while room is made for the block behind it" {
    const block_bytes = block_size * 4 * 4 * 2;
    const fixture: *Fixture = try .init(&.{4}, .{ .max_bytes = 2 * block_bytes });
    defer fixture.deinit();
    const index = &fixture.index;
    const root = (try index.open(keyOf(null), keyOf(null), newWriter)).node;
    defer index.close(root);
    const made = try fixture.tables(8);
    defer fixture.free(made);
    const first = index.add(root, &.{ 1, 1, 1, 1 }, made, 0, .{}).?;
    _ = index.add(first, &.{ 2, 2, 2, 2 }, made, 1, .{}).?;
    index.forget(first, 0);
    _ = index.add(root, &.{ 9, 9, 9, 9 }, made, 0, .{ .priority = 90 }).?;
    // The only child goes for the new one.
    try testing.expect(index.add(first, &.{ 3, 3, 3, 3 }, made, 1, .{}) != null);
    try testing.expectEqual(8, try fixture.matched(root, &.{ 1, 1, 1, 1, 3, 3, 3, 3 }));
    try testing.expectEqual(4, try fixture.matched(root, &.{ 1, 1, 1, 1, 2, 2, 2, 2 }));
}

test "with several groups blocks go in the order of their priorities, whatever is raised and used" {
    const fixture: *Fixture = try .init(&.{ 4, 4, 4 }, .{});
    defer fixture.deinit();
    const index = &fixture.index;
    const root = (try index.open(keyOf(null), keyOf(null), newWriter)).node;
    defer index.close(root);
    var prng: std.Random.DefaultPrng = .init(3);
    const random = prng.random();
    for (0..400) |_| {
        _ = try fixture.addAll(root, &.{ random.uintLessThan(u32, 40), 0, 0, 0 }, random.int(u8));
    }
    while (index.stats.cached_blocks != 0) {
        var counts: [256]u32 = @splat(0);
        for (index.tree.slots.items, 0..) |slot, i| counts[index.tree.nodes.items[i / 3].priority] += @intFromBool(slot.block >= 0);
        const least = std.mem.indexOfNone(u32, &counts, &.{0}).?;
        const count = counts[least];
        try testing.expect(index.reclaim());
        counts = @splat(0);
        for (index.tree.slots.items, 0..) |slot, i| counts[index.tree.nodes.items[i / 3].priority] += @intFromBool(slot.block >= 0);
        try testing.expectEqual(count - 1, counts[least]);
    }
}
