//! Sequences that start from a prefix: the rows are those that its tokens were computed to, whatever became of the
//! sequences that computed them.
//!
//! A row is made from all tokens up to its own, as a model makes it. So a row that does not belong to the tokens of its
//! sequence is seen.

const std = @import("std");
const memcheck = @import("build_options").memcheck;
const testing = std.testing;
const gpa = testing.allocator;
const indexes = @import("../prefix/index.zig");
const trees = @import("../prefix/tree.zig");
const Output = @import("../input.zig").Output;
const paged = @import("cache.zig");
const PagedCache = paged.PagedCache;
const Sequence = paged.Sequence;
const Prompt = paged.Prompt;

const head_dim = 32;

fn optionsOf(layers: []const paged.Layer, block_size: u32) paged.Options {
    return .{
        .layers = layers,
        .block_size = block_size,
        .max_seq_len = 4096,
        .dtype_k = .f32,
        .dtype_v = .f32,
        .prefix = .{},
    };
}

const line: paged.Layer = .{ .kv_head_count = 1, .head_dim = head_dim };

/// The number that the row of the last of these tokens holds.
fn rowOf(tokens: []const u32) f32 {
    var hash: u32 = 2166136261;
    for (tokens) |token| hash = (hash ^ token) *% 16777619;
    return @floatFromInt(hash >> 20);
}

/// Appends and commits the rows of these tokens behind those a sequence has.
fn grow(cache: *PagedCache, sequence: *Sequence, tokens: []const u32, told: bool) !void {
    const start = sequence.seqLen();
    const count = tokens.len - start;
    const rows = try gpa.alloc(f32, count * head_dim);
    defer gpa.free(rows);
    for (0..count) |i| @memset(rows[i * head_dim ..][0..head_dim], rowOf(tokens[0 .. start + i + 1]));
    for (0..cache.layerCount()) |layer| {
        try cache.append(@intCast(layer), &.{sequence}, &.{@intCast(count)}, .fromF32(rows), .fromF32(rows));
    }
    if (told) try sequence.commitTokens(tokens[start..], .{}) else try sequence.commit(@intCast(count));
}

fn outputOf(rows: []f32) Output {
    return .{ .bytes = @ptrCast(rows.ptr), .element_count = rows.len };
}

/// Every row that a sequence shows is the one of its token.
fn expectRows(cache: *PagedCache, sequence: *const Sequence, tokens: []const u32) !void {
    const seq_len = sequence.seqLen();
    const k = try gpa.alloc(f32, seq_len * head_dim);
    defer gpa.free(k);
    const v = try gpa.alloc(f32, seq_len * head_dim);
    defer gpa.free(v);
    for (0..cache.layerCount()) |layer| {
        const rows = try sequence.rows(@intCast(layer));
        const count = try sequence.gather(@intCast(layer), outputOf(k), outputOf(v));
        var at: usize = 0;
        // A code is off by half a 127th of the largest row at most.
        const tolerance: f32 = if (cache.state.policy.kind == .tiered) 4096.0 / 127.0 / 2.0 + 1 else 0;
        for (0..seq_len) |position| {
            if (position >= rows.sink_end and position < rows.first) continue;
            const expected = rowOf(tokens[0 .. position + 1]);
            for ([_]f32{ k[at * head_dim], v[at * head_dim + head_dim - 1] }) |found| {
                try testing.expectApproxEqAbs(expected, found, tolerance);
            }
            at += 1;
        }
        try testing.expectEqual(at, count);
    }
}

fn usedBlocks(cache: *const PagedCache) u64 {
    var count: u64 = 0;
    for (cache.state.groups) |group| for (group.distinctFormats()) |format| {
        count += format.pool.stats().used_blocks;
    };
    return count;
}

test "a prompt starts where the longest prefix of its tenant ends" {
    var cache: PagedCache = try .init(gpa, optionsOf(&.{line}, 4));
    defer cache.deinit();
    const a = [_]u32{ 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 };
    const first = try cache.createSequenceFor(.{ .tokens = &a });
    try testing.expectEqual(0, first.seqLen());
    try grow(&cache, first, &a, true);

    const Row = struct { tokens: []const u32, salt: ?[]const u8 = null, fingerprint: []const u8 = "", start: u32 };
    const rows = [_]Row{
        .{ .tokens = &.{ 1, 2, 3, 4, 5, 6, 7, 8, 90, 91 }, .start = 8 },
        .{ .tokens = a[0..8], .start = 7 },
        .{ .tokens = &.{ 1, 2, 3, 4, 5, 6, 70, 80 }, .start = 6 },
        .{ .tokens = &(a ++ [_]u32{ 11, 12 }), .start = 10 },
        .{ .tokens = &a, .start = 9 },
        .{ .tokens = a[0..1], .start = 0 },
        .{ .tokens = &.{}, .start = 0 },
        .{ .tokens = &a, .salt = "other", .start = 0 },
        .{ .tokens = &a, .salt = "", .start = 0 },
        .{ .tokens = &a, .fingerprint = "other", .start = 0 },
    };
    // While the donor lives, and after it has ended.
    for ([_]bool{ true, false }) |lives| {
        if (!lives) cache.freeSequence(first);
        for (rows) |row| {
            const prompt: Prompt = .{ .tokens = row.tokens, .salt = row.salt, .fingerprint = row.fingerprint };
            const sequence = try cache.createSequenceFor(prompt);
            defer cache.freeSequence(sequence);
            try testing.expectEqual(row.start, sequence.seqLen());
            try expectRows(&cache, sequence, row.tokens);
        }
    }
    const stats = cache.state.prefix.?.stats;
    try testing.expectEqual(21, stats.lookups);
    try testing.expectEqual(10, stats.hits);
    try testing.expectEqual(80, stats.hit_tokens);
    try testing.expectEqual(3, stats.cached_blocks);
    try testing.expectEqual(0, stats.evicted_blocks);
}

test "the block that is kept in part is copied at the first append, and the donor keeps its rows" {
    var cache: PagedCache = try .init(gpa, optionsOf(&.{line}, 4));
    defer cache.deinit();
    const a = [_]u32{ 1, 2, 3, 4, 5, 6 };
    const donor = try cache.createSequence();
    try grow(&cache, donor, &a, true);
    try testing.expectEqual(2, usedBlocks(&cache));
    const b = [_]u32{ 1, 2, 3, 4, 5, 7, 8 };
    const other = try cache.createSequenceFor(.{ .tokens = &b });
    try testing.expectEqual(5, other.seqLen());
    try testing.expectEqual(2, usedBlocks(&cache));
    try grow(&cache, other, &b, true);
    try testing.expectEqual(3, usedBlocks(&cache));
    try grow(&cache, donor, &(a ++ [_]u32{9}), true);
    try expectRows(&cache, donor, &(a ++ [_]u32{9}));
    try expectRows(&cache, other, &b);
}

test "a burst of equal prompts shares what the first has committed, and knows what is to come" {
    var cache: PagedCache = try .init(gpa, optionsOf(&.{line}, 4));
    defer cache.deinit();
    var prompt: [40]u32 = undefined;
    for (&prompt, 0..) |*token, i| token.* = @intCast(i);
    const first = try cache.createSequenceFor(.{ .tokens = &prompt });
    try testing.expectEqual(40, try cache.pendingPrefix(.{ .tokens = &prompt }));
    try testing.expectEqual(0, try cache.pendingPrefix(.{ .tokens = &prompt, .salt = "other" }));
    try testing.expectEqual(20, try cache.pendingPrefix(.{ .tokens = prompt[0..20] ++ [_]u32{99} }));
    try grow(&cache, first, prompt[0..18], true);
    try testing.expectEqual(22, try cache.pendingPrefix(.{ .tokens = &prompt }));
    const second = try cache.createSequenceFor(.{ .tokens = &prompt });
    try testing.expectEqual(18, second.seqLen());
    try grow(&cache, first, &prompt, true);
    try testing.expectEqual(0, try cache.pendingPrefix(.{ .tokens = &prompt }));
}

test "without a keeper nothing outlives its sequences" {
    var options = optionsOf(&.{line}, 4);
    options.prefix = .{ .outlives = false };
    var cache: PagedCache = try .init(gpa, options);
    defer cache.deinit();
    const a = [_]u32{ 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 };
    const first = try cache.createSequence();
    try grow(&cache, first, &a, true);
    const second = try cache.createSequenceFor(.{ .tokens = &a });
    try testing.expectEqual(9, second.seqLen());
    cache.freeSequence(first);
    const third = try cache.createSequenceFor(.{ .tokens = &a });
    try testing.expectEqual(9, third.seqLen());
    cache.freeSequence(second);
    cache.freeSequence(third);
    try testing.expectEqual(0, usedBlocks(&cache));
    try testing.expectEqual(0, cache.state.prefix.?.stats.cached_blocks);
    try testing.expectEqual(0, (try cache.createSequenceFor(.{ .tokens = &a })).seqLen());
}

test "without a keeper a sequence and beams that go on for ever keep what they have, and no more" {
    var options = optionsOf(&.{line}, 4);
    options.prefix = .{ .outlives = false };
    var cache: PagedCache = try .init(gpa, options);
    defer cache.deinit();
    const beams = [_]*Sequence{ try cache.createSequence(), try cache.createSequence() };
    for (0..50) |i| {
        const round: u32 = @intCast(i);
        for (beams, 0..) |beam, b| {
            try beam.truncate(0);
            try grow(&cache, beam, &.{ round, @intCast(b), 0, 0, 1, 1, 1, 1, 2 }, true);
        }
        try testing.expectEqual(6, usedBlocks(&cache));
        try cache.reorder(&beams, &.{ 0, 0 });
        try testing.expectEqual(3, usedBlocks(&cache));
    }
    try beams[0].truncate(5);
    try beams[1].truncate(5);
    try testing.expectEqual(2, usedBlocks(&cache));
    try testing.expect(cache.state.prefix.?.left.count() <= 2);
}

test "rows that were codes are no floats, whatever they are now" {
    var options = optionsOf(&.{line}, 64);
    options.policy = .{ .kind = .tiered, .store = .{ .dtype_k = .i8, .dtype_v = .i8 }, .tail_tokens = 64 };
    options.prefix = .{ .tiers = .float };
    var cache: PagedCache = try .init(gpa, options);
    defer cache.deinit();
    var tokens: [300]u32 = undefined;
    for (&tokens, 0..) |*token, i| token.* = @intCast(i % 7);
    const donor = try cache.createSequence();
    try grow(&cache, donor, &tokens, true);
    try donor.truncate(100);
    @memset(tokens[100..200], 99);
    try grow(&cache, donor, tokens[0..200], true);
    const again = try cache.createSequenceFor(.{ .tokens = tokens[0..200] });
    try testing.expectEqual(64, again.seqLen());
    try testing.expectEqual(.quantized, (try cache.explain(.{ .tokens = tokens[0..200] })).reason);
}

test "an append takes the memory of prefixes that nobody uses, and no other" {
    var options = optionsOf(&.{line}, 4);
    options.max_bytes = 64 * 4 * head_dim * 4 * 2; // 64 blocks
    var cache: PagedCache = try .init(gpa, options);
    defer cache.deinit();
    const kept = [_]u32{ 7, 7, 7, 7, 8, 8, 8, 8 };
    const living = try cache.createSequence();
    try grow(&cache, living, &kept, true);
    for (0..if (memcheck) 12 else 100) |i| {
        var tokens: [30]u32 = @splat(@intCast(100 + i));
        const sequence = try cache.createSequenceFor(.{ .tokens = &tokens });
        try grow(&cache, sequence, &tokens, true);
        try expectRows(&cache, sequence, &tokens);
        cache.freeSequence(sequence);
    }
    if (!memcheck) try testing.expect(cache.state.prefix.?.stats.evicted_blocks > 600);
    try expectRows(&cache, living, &kept);
    try testing.expectEqual(7, (try cache.createSequenceFor(.{ .tokens = &kept })).seqLen());
    // A sequence of all the pool has gets all of it.
    cache.freeSequence(living);
    var whole: [60 * 4]u32 = undefined;
    for (&whole, 0..) |*token, i| token.* = @intCast(i);
    const last = try cache.createSequence();
    try grow(&cache, last, &whole, false);
    try expectRows(&cache, last, &whole);
}

test "tenants read neither each other's rows nor what is left of them" {
    var cache: PagedCache = try .init(gpa, optionsOf(&.{line}, 4));
    defer cache.deinit();
    const a = [_]u32{ 1, 2, 3, 4 };
    const keeper = try cache.createSequence(); // the slab stays
    try grow(&cache, keeper, &a, false);
    const first = try cache.createSequenceFor(.{ .tokens = &a, .salt = "a" });
    try grow(&cache, first, &a, true);
    const left = (try first.blockTable(0)).at(0);
    cache.freeSequence(first);
    cache.state.prefix.?.clear();
    const second = try cache.createSequenceFor(.{ .tokens = &a, .salt = "b" });
    try testing.expectEqual(0, second.seqLen());
    var row: [head_dim]f32 = @splat(1);
    try cache.append(0, &.{second}, &.{1}, .fromF32(&row), .fromF32(&row));
    const block = (try second.blockTable(0)).at(0);
    try testing.expectEqual(left, block);
    const bytes = cache.state.groups[0].tailPool().bytes(@intCast(block));
    // [keys, values][token][head_dim]: one row of each, and zeros.
    const elements: []const f32 = @alignCast(std.mem.bytesAsSlice(f32, bytes));
    for (elements, 0..) |element, i| {
        try testing.expectEqual(@as(f32, if (i / head_dim % 4 == 0) 1 else 0), element);
    }
}

test "a layer with a window starts at the nearest border at which its rows are there" {
    const layers = [_]paged.Layer{ line, .{ .kv_head_count = 1, .head_dim = head_dim, .window_tokens = 6 } };
    var cache: PagedCache = try .init(gpa, optionsOf(&layers, 4));
    defer cache.deinit();
    var tokens: [32]u32 = undefined;
    for (&tokens, 0..) |*token, i| token.* = @intCast(i);
    const donor = try cache.createSequence();
    try grow(&cache, donor, &tokens, true);
    cache.freeSequence(donor);
    const index = cache.state.prefix.?;
    {
        const again = try cache.createSequenceFor(.{ .tokens = &tokens });
        defer cache.freeSequence(again);
        try testing.expectEqual(31, again.seqLen());
        try expectRows(&cache, again, &tokens);
    }
    // An edit in the middle costs what follows it, as the blocks that left the window are kept.
    var edited = tokens;
    edited[13] = 99;
    {
        const again = try cache.createSequenceFor(.{ .tokens = &edited });
        defer cache.freeSequence(again);
        try testing.expectEqual(13, again.seqLen());
        try expectRows(&cache, again, &edited);
    }
    // Once those of tokens 8 to 11 have gone from the windowed layer, what is edited behind them starts before them.
    var path: std.ArrayList(u32) = .empty;
    defer path.deinit(gpa);
    const reader = try cache.createSequence();
    defer cache.freeSequence(reader);
    try index.tree.walk(reader.state.tokens.?.root, &tokens, &path);
    index.forget(path.items[2], 1);
    edited[13] = 98;
    const again = try cache.createSequenceFor(.{ .tokens = &edited });
    try testing.expectEqual(8, again.seqLen());
    try expectRows(&cache, again, &edited);
    try grow(&cache, again, &edited, true);
    try expectRows(&cache, again, &edited);
}

test "with floats alone a match ends before the first quantized block; otherwise it has it" {
    for ([_]indexes.Tiers{ .any, .float }) |tiers| {
        var options = optionsOf(&.{line}, 64);
        options.policy = .{ .kind = .tiered, .store = .{ .dtype_k = .i8, .dtype_v = .i8 }, .tail_tokens = 64 };
        options.prefix = .{ .tiers = tiers };
        var cache: PagedCache = try .init(gpa, options);
        defer cache.deinit();
        var tokens: [400]u32 = undefined;
        for (&tokens, 0..) |*token, i| token.* = @intCast(i % 7);
        const donor = try cache.createSequence();
        try grow(&cache, donor, &tokens, true);
        cache.freeSequence(donor);
        const again = try cache.createSequenceFor(.{ .tokens = &tokens });
        try testing.expectEqual(399, again.seqLen());
        try expectRows(&cache, again, &tokens);
        const tail = cache.state.groups[0].tailPool().stats().used_blocks;
        // Quantized, the index names the codes alone; else it keeps the floats that the donor let go.
        try testing.expectEqual(@as(u32, if (tiers == .any) 2 else 7), tail);
        try grow(&cache, again, &(tokens ++ [_]u32{ 1, 2, 3 }), true);
        try expectRows(&cache, again, &(tokens ++ [_]u32{ 1, 2, 3 }));
    }
}

/// A sequence of the model: its tokens, and what is known of them.
const Told = struct {
    sequence: *Sequence,
    tenant: usize,
    tokens: std.ArrayList(u32) = .empty,
};

test "random sequences of two tenants: every row belongs to its tokens, and nothing that is there is missed" {
    const windowed: paged.Layer = .{ .kv_head_count = 1, .head_dim = head_dim, .window_tokens = 6 };
    const store: paged.Store = .{ .dtype_k = .i8, .dtype_v = .i8 };
    const tiered: paged.Policy = .{ .kind = .tiered, .store = store };
    const Case = struct {
        layers: []const paged.Layer = &.{line},
        block_size: u32 = 4,
        blocks: ?u32 = null,
        retention: paged.Retention = .{},
        policy: paged.Policy = .{},
        tiers: indexes.Tiers = .any,
        outlives: bool = true,
        /// All that was told is found again.
        finds_all: bool = false,
    };
    const cases = [_]Case{
        .{ .finds_all = true },
        .{ .layers = &.{ line, line, windowed } },
        .{ .layers = &.{windowed} },
        .{ .blocks = 40 },
        .{ .blocks = 40, .layers = &.{ line, windowed } },
        .{ .blocks = 40, .outlives = false },
        .{ .retention = .{ .tokens = 12, .sink_tokens = 3 } },
        .{ .retention = .{ .tokens = 12, .sink_tokens = 3 }, .blocks = 60, .layers = &.{ line, windowed } },
        .{ .block_size = 64, .policy = tiered },
        .{ .block_size = 64, .policy = tiered, .tiers = .float },
        .{ .block_size = 64, .policy = tiered, .tiers = .float, .blocks = 30 },
        .{ .block_size = 64, .policy = tiered, .blocks = 30, .layers = &.{ line, windowed } },
    };
    const step_count: u32 = if (memcheck) 30 else 1500;
    for (cases, 0..) |case, seed| {
        var options = optionsOf(case.layers, case.block_size);
        options.retention = case.retention;
        options.policy = case.policy;
        options.prefix = .{ .tiers = case.tiers, .outlives = case.outlives };
        if (case.blocks) |count| options.max_bytes = @as(u64, count) * case.block_size * head_dim * 4 * 2;
        var cache: PagedCache = try .init(gpa, options);
        defer cache.deinit();
        var told: std.ArrayList(Told) = .empty;
        defer {
            for (told.items) |*one| one.tokens.deinit(gpa);
            told.deinit(gpa);
        }
        var known: [2]std.ArrayList([]const u32) = @splat(.empty);
        defer for (&known) |*list| {
            for (list.items) |tokens| gpa.free(tokens);
            list.deinit(gpa);
        };
        var prng: std.Random.DefaultPrng = .init(seed);
        const random = prng.random();
        errdefer std.debug.print("case {d}\n", .{seed});
        for (0..step_count) |_| {
            const action = random.uintLessThan(u32, 10);
            if (told.items.len == 0 or (action < 2 and told.items.len < 6)) {
                // A prompt that begins as an earlier one does.
                const tenant = random.uintLessThan(usize, 2);
                var tokens: std.ArrayList(u32) = .empty;
                if (known[tenant].items.len != 0) {
                    const earlier = known[tenant].items[random.uintLessThan(usize, known[tenant].items.len)];
                    try tokens.appendSlice(gpa, earlier[0..random.uintAtMost(usize, earlier.len)]);
                }
                for (0..random.uintAtMost(usize, case.block_size * 2)) |_| try tokens.append(gpa, random.uintLessThan(u32, 3));
                var one: Told = .{
                    .sequence = try cache.createSequenceFor(.{ .tokens = tokens.items, .salt = &.{@intCast(tenant)} }),
                    .tenant = tenant,
                    .tokens = tokens,
                };
                errdefer one.tokens.deinit(gpa);
                var most: u32 = 0;
                for (known[tenant].items) |earlier| most = @max(most, trees.commonCount(earlier, tokens.items));
                for (told.items) |other| if (other.tenant == tenant) {
                    most = @max(most, trees.commonCount(other.tokens.items[0..other.sequence.seqLen()], tokens.items));
                };
                most = @min(most, @as(u32, @intCast(tokens.items.len)) -| 1);
                const start = one.sequence.seqLen();
                if (case.finds_all) try testing.expectEqual(most, start) else try testing.expect(start <= most);
                try expectRows(&cache, one.sequence, tokens.items);
                try told.append(gpa, one);
                continue;
            }
            const at = random.uintLessThan(usize, told.items.len);
            const one = &told.items[at];
            switch (action) {
                0...5 => {
                    // What was asked for is computed, then some more.
                    const start = one.sequence.seqLen();
                    if (start == one.tokens.items.len) try one.tokens.append(gpa, random.uintLessThan(u32, 3));
                    if (one.tokens.items.len > 1000) continue;
                    const end = start + 1 + random.uintLessThan(usize, one.tokens.items.len - start);
                    grow(&cache, one.sequence, one.tokens.items[0..end], true) catch |err| switch (err) {
                        error.PoolEmpty => try testing.expect(case.blocks != null),
                        else => return err,
                    };
                    try one.sequence.truncate(one.sequence.seqLen()); // drops what is pending
                    try expectRows(&cache, one.sequence, one.tokens.items);
                    const whole = one.sequence.seqLen() / case.block_size * case.block_size;
                    try known[one.tenant].append(gpa, try gpa.dupe(u32, one.tokens.items[0..whole]));
                },
                6 => {
                    const seq_len = one.sequence.seqLen();
                    const target = @max(one.sequence.rewindableTo(), random.uintAtMost(u32, seq_len));
                    if (target > seq_len) continue;
                    try one.sequence.truncate(target);
                    one.tokens.shrinkRetainingCapacity(target);
                    try expectRows(&cache, one.sequence, one.tokens.items);
                    for (0..random.uintLessThan(usize, 6)) |_| try one.tokens.append(gpa, random.uintLessThan(u32, 3));
                },
                7 => {
                    if (told.items.len >= 6) continue;
                    var child: Told = .{ .sequence = try cache.fork(one.sequence), .tenant = one.tenant };
                    try child.tokens.appendSlice(gpa, one.tokens.items);
                    try told.append(gpa, child);
                },
                8 => {
                    const other = random.uintLessThan(usize, told.items.len);
                    if (other == at) continue;
                    const beams = [_]*Sequence{ one.sequence, told.items[other].sequence };
                    const reordered = cache.reorder(&beams, &.{ 1, 1 });
                    if (told.items[other].tenant != one.tenant) {
                        try testing.expectError(error.InvalidConfig, reordered);
                        continue;
                    }
                    try reordered;
                    one.tokens.clearRetainingCapacity();
                    try one.tokens.appendSlice(gpa, told.items[other].tokens.items);
                    try expectRows(&cache, one.sequence, one.tokens.items);
                },
                else => {
                    try known[one.tenant].append(gpa, try gpa.dupe(u32, one.tokens.items[0..one.sequence.seqLen()]));
                    cache.freeSequence(one.sequence);
                    one.tokens.deinit(gpa);
                    _ = told.swapRemove(at);
                },
            }
        }
        const index = cache.state.prefix.?;
        if (case.outlives and case.blocks == null and !memcheck) try testing.expect(index.stats.hits > 20);
        while (told.pop()) |one| {
            cache.freeSequence(one.sequence);
            var tokens = one.tokens;
            tokens.deinit(gpa);
        }
        if (!case.outlives) try testing.expectEqual(0, usedBlocks(&cache));
        while (index.reclaim()) {}
        try testing.expectEqual(0, usedBlocks(&cache));
        try testing.expectEqual(0, index.stats.cached_bytes);
    }
}
