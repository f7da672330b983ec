//! Prefixes without memory: any allocation may fail, and what is known of sequences, roots and tenants stays true.

const std = @import("std");
const memcheck = @import("build_options").memcheck;
const testing = std.testing;
const gpa = testing.allocator;
const paged = @import("cache.zig");
const PagedCache = paged.PagedCache;
const Sequence = paged.Sequence;
const trees = @import("../prefix/tree.zig");

const block_size = 4;

/// The number that the row of the last of these tokens holds.
fn rowOf(tokens: []const u32) f32 {
    var hash: u32 = 2166136261;
    for (tokens) |token| hash = (hash ^ token) *% 16777619;
    return @floatFromInt(hash >> 20);
}

/// A sequence of the model, and the tokens of its rows.
const Told = struct {
    sequence: *Sequence,
    salt: [1]u8,
    tokens: std.ArrayList(u32) = .empty,
};

/// Appends and commits `count` rows of tokens that nobody knows.
fn grow(cache: *PagedCache, one: *Told, random: std.Random, count: u32) !void {
    const start = one.sequence.seqLen();
    one.tokens.shrinkRetainingCapacity(start);
    defer one.tokens.shrinkRetainingCapacity(one.sequence.seqLen());
    var rows: [16]f32 = undefined;
    for (rows[0..count]) |*row| {
        try one.tokens.append(gpa, random.uintLessThan(u32, 2));
        row.* = rowOf(one.tokens.items);
    }
    errdefer one.sequence.truncate(start) catch unreachable; // drops what is pending
    for (0..cache.layerCount()) |layer| {
        try cache.append(@intCast(layer), &.{one.sequence}, &.{count}, .fromF32(rows[0..count]), .fromF32(rows[0..count]));
    }
    const ttl_ms: ?u32 = if (random.boolean()) 1 + random.uintLessThan(u32, 1 << 20) else null;
    try one.sequence.commitTokens(one.tokens.items[start..], .{ .priority = random.int(u8), .ttl_ms = ttl_ms });
}

fn expectRows(cache: *PagedCache, one: *const Told) !void {
    var rows: [256]f32 = undefined;
    for (0..cache.layerCount()) |layer| {
        const stored = try one.sequence.rows(@intCast(layer));
        const count = try one.sequence.gather(
            @intCast(layer),
            .{ .bytes = @ptrCast(&rows), .element_count = rows.len / 2 },
            .{ .bytes = @ptrCast(rows[rows.len / 2 ..]), .element_count = rows.len / 2 },
        );
        for (rows[0..count], stored.row_count - count..) |found, position| {
            try testing.expectEqual(rowOf(one.tokens.items[0 .. position + 1]), found);
        }
    }
}

/// What several lists say of the same things agrees.
fn expectSound(cache: *const PagedCache) !void {
    const index = cache.state.prefix.?;
    var living: usize = 0;
    for (index.roots.by_key.values()) |number| {
        const root = index.roots.items.items[number];
        try testing.expectEqual(root.users, cache.state.living.of(root.node).len);
        for (cache.state.living.of(root.node), 0..) |tokens, place| try testing.expectEqual(place, tokens.place);
        living += root.users;
    }
    try testing.expectEqual(cache.sequences.items.len, living);
    for (cache.state.living.lists.values()) |list| try testing.expect(list.items.len != 0);
    var root_count: usize = 0;
    var node_count: usize = 0;
    var bytes: u64 = 0;
    for (index.tenants.by_key.values()) |number| {
        const tenant = index.tenants.items.items[number];
        try testing.expect(tenant.root_count != 0);
        root_count += tenant.root_count;
        node_count += tenant.node_count;
        bytes += tenant.bytes;
    }
    try testing.expectEqual(index.roots.by_key.count(), root_count);
    try testing.expectEqual(index.stats.cached_bytes, bytes);
    try testing.expectEqual(index.tree.nodes.items.len - index.tree.free_nodes.items.len, node_count + root_count);
    for (index.expiring.keys()) |node| try testing.expect(index.tree.nodes.items[node].expires_ms != trees.never);
}

test "any allocation may fail, and nobody has what is not theirs" {
    const line: paged.Layer = .{ .kv_head_count = 1, .head_dim = 1 };
    const windowed: paged.Layer = .{ .kv_head_count = 1, .head_dim = 1, .window_tokens = 6 };
    for ([_][]const paged.Layer{ &.{line}, &.{ line, windowed }, &.{windowed} }, 0..) |layers, seed| for ([_]bool{ true, false }) |outlives| {
        var failing: testing.FailingAllocator = .init(gpa, .{});
        var cache: PagedCache = try .init(failing.allocator(), .{
            .layers = layers,
            .block_size = block_size,
            .max_seq_len = 100,
            .dtype_k = .f32,
            .dtype_v = .f32,
            .prefix = .{ .outlives = outlives, .max_bytes_per_salt = 30 * 64, .has_events = outlives },
        });
        defer cache.deinit();
        var told: std.ArrayList(Told) = .empty;
        defer {
            for (told.items) |*one| one.tokens.deinit(gpa);
            told.deinit(gpa);
        }
        var prng: std.Random.DefaultPrng = .init(seed);
        const random = prng.random();
        var failures: u32 = 0;
        for (0..if (memcheck) 60 else 1500) |_| {
            if (random.boolean()) failing.fail_index = failing.alloc_index + random.uintLessThan(usize, 14);
            const outcome = step(&cache, &told, random);
            failing.fail_index = std.math.maxInt(usize);
            outcome catch |err| switch (err) {
                error.OutOfMemory => failures += 1,
                else => return err,
            };
            try expectSound(&cache);
            for (told.items) |*one| try expectRows(&cache, one);
        }
        if (!memcheck) try testing.expect(failures > 50);
        if (!memcheck and outlives) try testing.expect(cache.prefixStats().hits > 3);
        while (told.pop()) |one| {
            cache.freeSequence(one.sequence);
            var tokens = one.tokens;
            tokens.deinit(gpa);
        }
        const index = cache.state.prefix.?;
        index.clear();
        index.forgetLeft();
        try expectSound(&cache);
        try testing.expectEqual(0, index.roots.by_key.count() + index.tenants.by_key.count() + index.expiring.count());
    };
}

/// Does one thing of a model's life.
fn step(cache: *PagedCache, told: *std.ArrayList(Told), random: std.Random) !void {
    const action = random.uintLessThan(u32, 12);
    if (told.items.len == 0 or (action < 3 and told.items.len < 8)) {
        const salt = [1]u8{random.uintLessThan(u8, 3)};
        var tokens: [12]u32 = undefined;
        for (&tokens) |*token| token.* = random.uintLessThan(u32, 2);
        const prompt: paged.Prompt = .{
            .tokens = tokens[0..random.uintAtMost(usize, tokens.len)],
            .salt = &salt,
            .fingerprint = if (random.boolean()) "a" else "",
        };
        try told.ensureUnusedCapacity(gpa, 1);
        _ = try cache.pendingPrefix(prompt);
        _ = try cache.explain(prompt);
        var one: Told = .{ .sequence = try cache.createSequenceFor(prompt), .salt = salt };
        one.tokens.appendSlice(gpa, tokens[0..one.sequence.seqLen()]) catch unreachable; // the model's own memory
        return told.appendAssumeCapacity(one);
    }
    const at = random.uintLessThan(usize, told.items.len);
    const one = &told.items[at];
    switch (action) {
        0...6 => if (one.sequence.seqLen() < 80) try grow(cache, one, random, 1 + random.uintLessThan(u32, 9)),
        7 => {
            const seq_len = @max(one.sequence.rewindableTo(), random.uintAtMost(u32, one.sequence.seqLen()));
            if (seq_len > one.sequence.seqLen()) return;
            try one.sequence.truncate(seq_len);
            one.tokens.shrinkRetainingCapacity(seq_len);
        },
        8 => if (told.items.len < 8) {
            try told.ensureUnusedCapacity(gpa, 1);
            const parent = told.items[at]; // the list may have moved
            var child: Told = .{ .sequence = try cache.fork(parent.sequence), .salt = parent.salt };
            child.tokens.appendSlice(gpa, parent.tokens.items) catch unreachable; // the model's own memory
            told.appendAssumeCapacity(child);
        },
        9 => {
            const other = &told.items[random.uintLessThan(usize, told.items.len)];
            if (other == one) return;
            cache.reorder(&.{ one.sequence, other.sequence }, &.{ 1, 1 }) catch |err| switch (err) {
                error.InvalidConfig => return, // of another tenant or model
                else => return err,
            };
            one.tokens.clearRetainingCapacity();
            one.tokens.appendSlice(gpa, other.tokens.items) catch unreachable; // the model's own memory
        },
        10 => {
            cache.freeSequence(one.sequence);
            var gone = told.swapRemove(at);
            gone.tokens.deinit(gpa);
        },
        else => {
            if (try cache.events() != null) cache.takeEvents();
            if (random.uintLessThan(u32, 40) != 0) return;
            var kept: [8]*Sequence = undefined;
            for (told.items, kept[0..told.items.len]) |*each, *sequence| sequence.* = each.sequence;
            try cache.reset(kept[0..told.items.len]);
            for (told.items) |*each| each.tokens.clearRetainingCapacity();
        },
    }
}
