//! Tests of the paged cache: worked examples, sharing, retention, equal bits with the contiguous cache, and a long random
//! walk beside plain arrays.

const std = @import("std");
const testing = std.testing;
const attention = @import("../../attention/attend.zig");
const contiguous = @import("../contiguous.zig");
const paged = @import("cache.zig");
const PagedCache = paged.PagedCache;
const Sequence = paged.Sequence;
const Block = @import("../blocks/block.zig").Block;
const cpu = @import("../../device/cpu.zig");
const BlockPool = @import("../blocks/pool.zig").BlockPool;
const Dtype = @import("../../dtype.zig").Dtype;
const shapes = @import("../../shape.zig");
const Input = @import("../input.zig").Input;
const slab_memory = @import("../../device/slab.zig");

fn input(elements: []const f32) Input {
    return .fromF32(elements);
}

fn simple(comptime layer: paged.Layer, block_size: u32) paged.Options {
    return .{ .layers = &.{layer}, .block_size = block_size, .max_seq_len = 4096, .dtype_k = .f32, .dtype_v = .f32 };
}

/// Appends rows to every layer, [row][kv_head][head_dim] filled with `value(position)`, and commits them.
fn step(cache: *PagedCache, sequence: *Sequence, row_count: u32, value: *const fn (position: u32) f32) !void {
    const start = sequence.seqLen();
    for (0..cache.layerCount()) |layer| {
        const shape = try cache.layerShape(@intCast(layer));
        const rows = try testing.allocator.alloc(f32, row_count * shape.kvDim());
        defer testing.allocator.free(rows);
        for (rows, 0..) |*element, i| element.* = value(start + @as(u32, @intCast(i / shape.kvDim())));
        try cache.append(@intCast(layer), &.{sequence}, &.{row_count}, input(rows), input(rows));
    }
    try sequence.commit(row_count);
}

fn ascending(position: u32) f32 {
    return @floatFromInt(position);
}

/// The first key element of each resident row of layer 0.
fn gathered(cache: *PagedCache, sequence: *Sequence, buffer: []f32) ![]f32 {
    const kv_dim = (try cache.layerShape(0)).kvDim();
    var k: [8192]f32 = undefined;
    var v: [8192]f32 = undefined;
    const count = try sequence.gather(
        0,
        .{ .bytes = @ptrCast(&k), .element_count = k.len },
        .{ .bytes = @ptrCast(&v), .element_count = v.len },
    );
    for (buffer[0..count], 0..) |*element, row| {
        element.* = k[row * kv_dim];
        try testing.expectEqual(k[row * kv_dim], v[row * kv_dim]);
    }
    return buffer[0..count];
}

fn expectRows(cache: *PagedCache, sequence: *Sequence, expected: []const f32) !void {
    var buffer: [4096]f32 = undefined;
    try testing.expectEqualSlices(f32, expected, try gathered(cache, sequence, &buffer));
}

test "one token takes one block; five in blocks of two take three" {
    var cache: PagedCache = try .init(testing.allocator, simple(.{ .kv_head_count = 2, .head_dim = 4 }, 16));
    defer cache.deinit();
    const sequence = try cache.createSequence();
    try step(&cache, sequence, 1, ascending);
    try testing.expectEqual(1, sequence.seqLen());
    try testing.expectEqual(1, cache.state.groups[0].tailPool().stats().used_blocks);

    var small: PagedCache = try .init(testing.allocator, simple(.{ .kv_head_count = 2, .head_dim = 4 }, 2));
    defer small.deinit();
    const five = try small.createSequence();
    for (0..5) |_| try step(&small, five, 1, ascending);
    try testing.expectEqual(3, small.state.groups[0].tailPool().stats().used_blocks);
    try expectRows(&small, five, &.{ 0, 1, 2, 3, 4 });
}

test "a prewarmed pool: three rounds of append and free take the same block" {
    var pools: BlockPool = try .init(testing.allocator, slab_memory.system, .{
        .layer_count = 1,
        .kv_head_count = 2,
        .head_dim = 4,
        .block_size = 16,
        .dtype_k = .f32,
        .dtype_v = .f32,
    }, 1 << 30);
    defer pools.deinit();
    const pool = &(try pools.get(.f32, .f32)).pool;
    try pool.prewarm(4);
    var options = simple(.{ .kv_head_count = 2, .head_dim = 4 }, 16);
    options.pool = &pools;
    var cache: PagedCache = try .init(testing.allocator, options);
    defer cache.deinit();
    var table: [3]i32 = undefined;
    for (&table) |*block| {
        const sequence = try cache.createSequence();
        try step(&cache, sequence, 1, ascending);
        block.* = (try sequence.blockTable(0)).at(0);
        cache.freeSequence(sequence);
    }
    const stats = pool.stats();
    try testing.expectEqual(0, (try cache.stats()).tokenCount());
    try testing.expectEqual(4, stats.prewarmed);
    try testing.expectEqual(3, stats.hits);
    try testing.expectEqual(0, stats.misses);
    try testing.expectEqual(3, stats.returns);
    try testing.expectEqual(@as([3]i32, @splat(table[0])), table);
    // Another cache of the same shape may use it, one of another shape may not.
    var second: PagedCache = try .init(testing.allocator, options);
    defer second.deinit();
    options.block_size = 8;
    try testing.expectError(error.InvalidConfig, PagedCache.init(testing.allocator, options));
}

test "a step over block borders: pending rows, then a commit of exactly those" {
    var cache: PagedCache = try .init(testing.allocator, .{
        .layers = &.{ .{ .kv_head_count = 1, .head_dim = 1 }, .{ .kv_head_count = 1, .head_dim = 1 } },
        .block_size = 4,
        .max_seq_len = 16,
        .dtype_k = .f32,
        .dtype_v = .f32,
    });
    defer cache.deinit();
    const sequence = try cache.createSequence();
    try step(&cache, sequence, 3, ascending);
    const five = input(&.{ 3, 4, 5, 6, 7 });
    try cache.append(0, &.{sequence}, &.{5}, five, five);
    try testing.expectEqual(8, (try sequence.rows(0)).row_count);
    try testing.expectEqual(3, (try sequence.rows(1)).row_count);
    try testing.expectEqual(2, (try sequence.blockTable(0)).len);
    try testing.expectEqual(1, (try sequence.blockTable(1)).len);
    try testing.expectError(error.CommitMismatch, sequence.commit(5));
    try cache.append(1, &.{sequence}, &.{5}, five, five);
    try testing.expectError(error.CommitMismatch, sequence.commit(4));
    try sequence.commit(5);
    try expectRows(&cache, sequence, &.{ 0, 1, 2, 3, 4, 5, 6, 7 });
}

test "truncate frees whole blocks, refuses to go forward, and is the way to abandon a step" {
    var cache: PagedCache = try .init(testing.allocator, simple(.{ .kv_head_count = 1, .head_dim = 1 }, 4));
    defer cache.deinit();
    const sequence = try cache.createSequence();
    try step(&cache, sequence, 9, ascending);
    try testing.expectEqual(3, cache.state.groups[0].tailPool().stats().used_blocks);
    try sequence.truncate(5);
    try testing.expectEqual(2, cache.state.groups[0].tailPool().stats().used_blocks);
    try testing.expectError(error.PositionOutOfRange, sequence.truncate(6));
    const row = input(&.{ 9, 9, 9, 9 });
    try cache.append(0, &.{sequence}, &.{4}, row, row);
    try testing.expectEqual(3, cache.state.groups[0].tailPool().stats().used_blocks);
    try sequence.truncate(5);
    try testing.expectEqual(2, cache.state.groups[0].tailPool().stats().used_blocks);
    try step(&cache, sequence, 1, ascending);
    try expectRows(&cache, sequence, &.{ 0, 1, 2, 3, 4, 5 });
}

test "a fork shares every block; an append copies the shared partial block and no other" {
    var cache: PagedCache = try .init(testing.allocator, simple(.{ .kv_head_count = 1, .head_dim = 1 }, 4));
    defer cache.deinit();
    const pool = cache.state.groups[0].tailPool();
    const parent = try cache.createSequence();
    try step(&cache, parent, 6, ascending);
    const child = try cache.fork(parent);
    try testing.expectEqual(2, pool.stats().used_blocks);
    try step(&cache, child, 1, struct {
        fn value(_: u32) f32 {
            return 100;
        }
    }.value);
    try testing.expectEqual(3, pool.stats().used_blocks);
    try expectRows(&cache, parent, &.{ 0, 1, 2, 3, 4, 5 });
    try expectRows(&cache, child, &.{ 0, 1, 2, 3, 4, 5, 100 });
    try testing.expectEqual(2, pool.refCount(@intCast((try parent.blockTable(0)).at(0))));
    try testing.expectEqual(1, pool.refCount(@intCast((try parent.blockTable(0)).at(1))));
    // The parent is alone in its last block now and appends in place.
    try step(&cache, parent, 1, ascending);
    try testing.expectEqual(3, pool.stats().used_blocks);
    cache.freeSequence(parent);
    try expectRows(&cache, child, &.{ 0, 1, 2, 3, 4, 5, 100 });
}

test "an append that copies a block ends the views of every layer in it" {
    const layer: paged.Layer = .{ .kv_head_count = 1, .head_dim = 1 };
    var cache: PagedCache = try .init(testing.allocator, .{
        .layers = &.{ layer, layer, .{ .kv_head_count = 1, .head_dim = 2 } },
        .block_size = 4,
        .max_seq_len = 64,
    });
    defer cache.deinit();
    const parent = try cache.createSequence();
    try step(&cache, parent, 6, ascending);
    const child = try cache.fork(parent);
    const before = [_]u32{ try child.generation(0), try child.generation(1), try child.generation(2) };
    const parents = try parent.generation(1);
    try cache.append(0, &.{child}, &.{1}, input(&.{1}), input(&.{1}));
    try testing.expect(try child.generation(0) != before[0]);
    try testing.expect(try child.generation(1) != before[1]);
    try testing.expectEqual(before[2], try child.generation(2));
    try testing.expectEqual(parents, try parent.generation(1));
}

test "a fork in the middle of a step has the committed rows only" {
    var cache: PagedCache = try .init(testing.allocator, simple(.{ .kv_head_count = 1, .head_dim = 1 }, 4));
    defer cache.deinit();
    const parent = try cache.createSequence();
    try step(&cache, parent, 2, ascending);
    const row = input(&.{50});
    try cache.append(0, &.{parent}, &.{1}, row, row);
    const child = try cache.fork(parent);
    try expectRows(&cache, child, &.{ 0, 1 });
    try expectRows(&cache, parent, &.{ 0, 1, 50 });
    try step(&cache, child, 1, ascending);
    try parent.commit(1);
    try expectRows(&cache, parent, &.{ 0, 1, 50 });
    try expectRows(&cache, child, &.{ 0, 1, 2 });
}

test "reorder: beam i becomes what beam parents[i] was" {
    var cache: PagedCache = try .init(testing.allocator, simple(.{ .kv_head_count = 1, .head_dim = 1 }, 2));
    defer cache.deinit();
    var beams: [4]*Sequence = undefined;
    beams[0] = try cache.createSequence();
    try step(&cache, beams[0], 3, ascending);
    for (beams[1..]) |*beam| beam.* = try cache.fork(beams[0]);
    for (beams, 0..) |beam, i| {
        const row = input(&.{@floatFromInt(10 * i)});
        try cache.append(0, &.{beam}, &.{1}, row, row);
        try testing.expectError(error.CommitMismatch, cache.reorder(&beams, &.{ 0, 1, 2, 3 }));
        try beam.commit(1);
    }
    try testing.expectError(error.InvalidConfig, cache.reorder(&beams, &.{ 0, 1, 2, 4 }));
    try testing.expectError(error.InvalidConfig, cache.reorder(&beams, &.{ 0, 1 }));
    try testing.expectError(error.InvalidConfig, cache.reorder(&.{ beams[0], beams[0] }, &.{ 0, 1 }));
    try cache.reorder(&beams, &.{ 2, 0, 0, 1 });
    try expectRows(&cache, beams[0], &.{ 0, 1, 2, 20 });
    try expectRows(&cache, beams[1], &.{ 0, 1, 2, 0 });
    try expectRows(&cache, beams[2], &.{ 0, 1, 2, 0 });
    try expectRows(&cache, beams[3], &.{ 0, 1, 2, 10 });
    try checkInvariants(&cache);
}

test "retention of the newest rows is exact, its sinks stay, and blocks are bounded" {
    const Case = struct { window: u32, sink: u32, tokens: u32, evictions: u64, expected: []const [2]u32 };
    const cases = [_]Case{
        .{ .window = 5, .sink = 0, .tokens = 7, .evictions = 2, .expected = &.{.{ 2, 7 }} },
        .{ .window = 5, .sink = 0, .tokens = 12, .evictions = 7, .expected = &.{.{ 7, 12 }} },
        .{ .window = 5, .sink = 0, .tokens = 8, .evictions = 3, .expected = &.{.{ 3, 8 }} },
        .{ .window = 8, .sink = 2, .tokens = 10, .evictions = 2, .expected = &.{ .{ 0, 2 }, .{ 4, 10 } } },
        .{ .window = 8, .sink = 2, .tokens = 40, .evictions = 32, .expected = &.{ .{ 0, 2 }, .{ 34, 40 } } },
        .{ .window = 3000, .sink = 256, .tokens = 9000, .evictions = 6000, .expected = &.{ .{ 0, 256 }, .{ 6256, 9000 } } },
        .{ .window = 400, .sink = 256, .tokens = 500, .evictions = 100, .expected = &.{ .{ 0, 256 }, .{ 356, 500 } } },
    };
    for (cases) |case| for ([_]u32{ 1, 4, 64 }) |block_size| {
        var options = simple(.{ .kv_head_count = 1, .head_dim = 1 }, block_size);
        options.max_seq_len = 10_000;
        options.retention = .{ .tokens = case.window, .sink_tokens = case.sink };
        var cache: PagedCache = try .init(testing.allocator, options);
        defer cache.deinit();
        const sequence = try cache.createSequence();
        const bound = std.math.divCeil(u32, case.sink, block_size) catch unreachable;
        // Beside the rows that are seen one block's worth stays, as `rewind_tokens` is by default.
        const newest = std.math.divCeil(u32, case.window - case.sink + block_size, block_size) catch unreachable;
        for (0..case.tokens) |_| {
            try step(&cache, sequence, 1, ascending);
            try testing.expect(cache.state.groups[0].tailPool().stats().used_blocks <= bound + newest + 1);
        }
        var expected: std.ArrayList(f32) = .empty;
        defer expected.deinit(testing.allocator);
        for (case.expected) |range| for (range[0]..range[1]) |position| {
            try expected.append(testing.allocator, @floatFromInt(position));
        };
        try expectRows(&cache, sequence, expected.items);
        try testing.expectEqual(case.evictions, (try cache.stats()).evictions);
        // Attention sees exactly those rows: their mean, with equal scores.
        var output: [1]f32 = undefined;
        try attention.attend(try sequence.rows(0), &.{0}, .{}, &output, &.{});
        var mean: f64 = 0;
        for (expected.items) |value| mean += value;
        mean /= @floatFromInt(expected.items.len);
        // 3000 weights of 1 and as many products are summed in f32: 3000 * 2^-24 = 1.8e-4 at most.
        try testing.expectApproxEqRel(mean, output[0], 1.8e-4);
        // Back to where rows of that length were let go is refused, back as far as they are there is not.
        const target = sequence.rewindableTo();
        const is_let_go = case.window + block_size < case.tokens;
        try testing.expectEqual(if (is_let_go) case.tokens - block_size else 0, target);
        if (target > case.sink + 1) try testing.expectError(error.PositionOutOfRange, sequence.truncate(target - 1));
        try sequence.truncate(target);
        const resident = (try sequence.rows(0)).residentCount();
        try testing.expectEqual(@min(target, case.window), resident);
        try checkInvariants(&cache);
    };
}

test "layers of another shape or window have their own blocks, and a window frees what it has passed" {
    var cache: PagedCache = try .init(testing.allocator, .{
        .layers = &.{
            .{ .kv_head_count = 2, .head_dim = 4 },
            .{ .kv_head_count = 2, .head_dim = 4, .window_tokens = 6 },
            .{ .kv_head_count = 1, .head_dim = 8 },
            .{ .kv_head_count = 2, .head_dim = 4 },
        },
        .block_size = 2,
        .max_seq_len = 100,
        .dtype_k = .f32,
        .dtype_v = .f32,
    });
    defer cache.deinit();
    try testing.expectEqual(3, cache.state.groups.len);
    const sequence = try cache.createSequence();
    for (0..20) |_| try step(&cache, sequence, 1, ascending);
    try testing.expectEqual(10, cache.state.groups[0].tailPool().stats().used_blocks);
    try testing.expect(cache.state.groups[1].tailPool().stats().used_blocks <= 4);
    try testing.expectEqual(10, cache.state.groups[2].tailPool().stats().used_blocks);
    // The windowed layer attends its window: mean of 14..19.
    var output: [8]f32 = undefined;
    const q: [8]f32 = @splat(0);
    try attention.attend(try sequence.rows(1), &q, .{}, &output, &.{});
    try testing.expectApproxEqRel(16.5, output[0], 1e-6);
    try attention.attend(try sequence.rows(0), &q, .{}, &output, &.{});
    try testing.expectApproxEqRel(9.5, output[0], 1e-6);
    const child = try cache.fork(sequence);
    try step(&cache, child, 1, ascending);
    try checkInvariants(&cache);
}

test "each of several queries sees the window of its layer, or of the call where that is narrower" {
    var cache: PagedCache = try .init(testing.allocator, .{
        .layers = &.{.{ .kv_head_count = 1, .head_dim = 4, .window_tokens = 6 }},
        .block_size = 4,
        .max_seq_len = 100,
        .dtype_k = .f32,
        .dtype_v = .f32,
    });
    defer cache.deinit();
    const sequence = try cache.createSequence();
    const row_count = 40;
    var values: [row_count * 4]f32 = undefined;
    for (&values, 0..) |*value, i| value.* = ascending(@intCast(i / 4));
    const keys: [row_count * 4]f32 = @splat(0);
    try cache.append(0, &.{sequence}, &.{row_count}, input(&keys), input(&values)); // pending: all rows are there
    const query_count = 20;
    const q: [query_count * 4]f32 = @splat(1);
    const Case = struct { call: ?u32, window: u32 };
    for ([_]Case{ .{ .call = null, .window = 6 }, .{ .call = 9, .window = 6 }, .{ .call = 3, .window = 3 } }) |case| {
        var output: [q.len]f32 = undefined;
        var lse: [query_count]f32 = undefined;
        const options: attention.Options = .{ .query_count = query_count, .window_tokens = case.call };
        try attention.attend(try sequence.rows(0), &q, options, &output, &lse);
        for (0..query_count) |i| {
            // Scores are 0: the mean of `window` rows up to its own.
            const position = ascending(@intCast(row_count - query_count + i));
            const window = ascending(case.window);
            try testing.expectApproxEqRel(position - (window - 1) / 2, output[i * 4], 1e-6);
            try testing.expectApproxEqRel(@log(window), lse[i], 1e-6);
        }
    }
}

test "a batch of ragged sequences is appended whole or not at all" {
    // Blocks of 2 rows, 5 of them.
    var options = simple(.{ .kv_head_count = 1, .head_dim = 1 }, 2);
    options.max_bytes = 5 * 64;
    var cache: PagedCache = try .init(testing.allocator, options);
    defer cache.deinit();
    const pool = cache.state.groups[0].tailPool();
    var sequences: [3]*Sequence = undefined;
    for (&sequences) |*sequence| sequence.* = try cache.createSequence();
    const rows = input(&.{ 0, 1, 2, 0, 0, 1 });
    try cache.append(0, &sequences, &.{ 3, 1, 2 }, rows, rows);
    for (sequences, [_]u32{ 3, 1, 2 }) |sequence, count| try sequence.commit(count);
    try testing.expectEqual(4, pool.stats().used_blocks);
    // Two more blocks are wanted, one is left: nothing happens to any of them.
    const before = pool.stats();
    const more = input(&.{ 3, 4, 1, 2, 2 });
    try testing.expectError(error.PoolEmpty, cache.append(0, &sequences, &.{ 2, 2, 1 }, more, more));
    const after = pool.stats();
    try testing.expectEqual(before.used_blocks, after.used_blocks);
    try testing.expectEqual(before.reserved_bytes, after.reserved_bytes); // what was mapped in vain went back
    for (sequences, [_]u32{ 3, 1, 2 }) |sequence, count| {
        try testing.expectEqual(count, (try sequence.rows(0)).row_count);
    }
    try testing.expectError(error.InvalidConfig, cache.append(0, &.{ sequences[0], sequences[0] }, &.{ 1, 1 }, input(&.{ 1, 2 }), input(&.{ 1, 2 })));
    try testing.expectError(error.InvalidSize, cache.append(0, &sequences, &.{ 1, 1, 1 }, more, more));
    try testing.expectError(error.NotFinite, cache.append(0, &sequences, &.{ 1, 0, 0 }, input(&.{std.math.nan(f32)}), input(&.{1})));
    const one = input(&.{ 3, 1 });
    try cache.append(0, sequences[0..2], &.{ 1, 1 }, one, one);
    try expectRows(&cache, sequences[0], &.{ 0, 1, 2, 3 });
    try expectRows(&cache, sequences[1], &.{ 0, 1 });
    // A copy-on-write that finds no block changes nothing either.
    try sequences[0].truncate(3);
    const child = try cache.fork(sequences[0]);
    const fill = input(&.{ 2, 3 });
    try cache.append(0, sequences[2..], &.{2}, fill, fill);
    try testing.expectEqual(5, pool.stats().used_blocks);
    try testing.expectError(error.PoolEmpty, cache.append(0, &.{child}, &.{1}, input(&.{9}), input(&.{9})));
    try expectRows(&cache, child, &.{ 0, 1, 2 });
    try checkInvariants(&cache);
}

test "a batch of many sequences, and a reset that keeps some: what they need beside the cache may fail" {
    var failing: testing.FailingAllocator = .init(testing.allocator, .{});
    var cache: PagedCache = try .init(failing.allocator(), simple(.{ .kv_head_count = 1, .head_dim = 1 }, 4));
    defer cache.deinit();
    var sequences: [20]*Sequence = undefined;
    for (&sequences) |*sequence| sequence.* = try cache.createSequence();
    const counts: [20]u32 = @splat(3);
    var rows: [60]f32 = undefined;
    for (&rows, 0..) |*row, i| row.* = @floatFromInt(i);
    for (0..2) |attempt| {
        // A double is found wherever it stands, and memory for the call is taken before anything is changed.
        var doubled = sequences;
        doubled[19] = doubled[7 * attempt];
        try testing.expectError(error.InvalidConfig, cache.append(0, &doubled, &counts, input(&rows), input(&rows)));
        failing.fail_index = failing.alloc_index + attempt;
        try testing.expectError(error.OutOfMemory, cache.append(0, &sequences, &counts, input(&rows), input(&rows)));
        failing.fail_index = std.math.maxInt(usize);
        for (sequences) |sequence| try testing.expectEqual(0, sequence.rowCount(0));
    }
    try cache.append(0, &sequences, &counts, input(&rows), input(&rows));
    for (sequences, 0..) |sequence, i| {
        try sequence.commit(3);
        try expectRows(&cache, sequence, &.{ rows[3 * i], rows[3 * i + 1], rows[3 * i + 2] });
    }

    const kept = [_]*Sequence{ sequences[19], sequences[4], sequences[4] };
    failing.fail_index = failing.alloc_index;
    try testing.expectError(error.OutOfMemory, cache.reset(&kept));
    failing.fail_index = std.math.maxInt(usize);
    try testing.expectEqual(20, (try cache.stats()).sequence_count);
    try cache.reset(&kept);
    try testing.expectEqual(2, (try cache.stats()).sequence_count);
    for (kept) |sequence| try testing.expectEqual(0, sequence.seqLen());
    try testing.expectEqual(0, (try cache.stats()).used_blocks);
    try step(&cache, sequences[4], 5, ascending);
    try expectRows(&cache, sequences[4], &.{ 0, 1, 2, 3, 4 });
}

test "stats: what the pools hold is in them, of every format and layer group" {
    const layers = [_]paged.Layer{ .{ .kv_head_count = 1, .head_dim = 32 }, .{ .kv_head_count = 2, .head_dim = 32 } };
    var options = simple(layers[0], 64);
    options.layers = &layers;
    options.policy = .{ .kind = .tiered, .store = .{ .dtype_k = .i8, .dtype_v = .q4_0 } };
    var cache: PagedCache = try .init(testing.allocator, options);
    defer cache.deinit();
    const sequence = try cache.createSequence();
    try step(&cache, sequence, 130, ascending);
    const stats = try cache.stats();
    try testing.expectEqual(2, stats.group_count);
    try testing.expectEqual(6, stats.used_blocks);
    try testing.expectEqual(128, stats.store_token_count);
    try testing.expectEqual(2, stats.tail_token_count);
    var used_bytes: u64 = 0;
    var reserved_bytes: u64 = 0;
    for (0..2) |group| {
        const tail = try cache.poolStats(@intCast(group), .f32, .f32);
        const store = try cache.poolStats(@intCast(group), .i8, .q4_0);
        try testing.expectEqual(1, tail.used_blocks);
        try testing.expectEqual(2, store.used_blocks);
        used_bytes += tail.block_bytes + 2 * store.block_bytes;
        reserved_bytes += tail.reserved_bytes + store.reserved_bytes;
    }
    try testing.expectEqual(used_bytes, stats.used_bytes);
    try testing.expectEqual(reserved_bytes, stats.reserved_bytes);
    try testing.expect(stats.metadata_bytes > 6 * 4 * @sizeOf(u32));
    try testing.expectError(error.LayerOutOfRange, cache.poolStats(2, .f32, .f32));
}

test "without max_bytes a cache may use what the process may, and with a pool it has none of its own" {
    var options = simple(.{ .kv_head_count = 2, .head_dim = 4 }, 16);
    var cache: PagedCache = try .init(testing.allocator, options);
    defer cache.deinit();
    try testing.expectEqual(cpu.memoryLimit(), cache.budget.left.load(.monotonic));
    var pool: BlockPool = try .init(testing.allocator, slab_memory.system, try cache.layerShape(0), null);
    defer pool.deinit();
    try testing.expectEqual(cpu.memoryLimit(), pool.budget.left.load(.monotonic));
    options.pool = &pool;
    options.max_bytes = 1 << 20;
    try testing.expectError(error.InvalidConfig, PagedCache.init(testing.allocator, options));
    options.max_bytes = null;
    var on_pool: PagedCache = try .init(testing.allocator, options);
    on_pool.deinit();
}

test "rows that are refused while they are written leave no trace" {
    // Blocks of 2 rows. The bad one is the last row of the last sequence, behind rows that were written to new blocks.
    const nan = std.math.nan(f32);
    var cache: PagedCache = try .init(testing.allocator, simple(.{ .kv_head_count = 1, .head_dim = 1 }, 2));
    defer cache.deinit();
    const pool = cache.state.groups[0].tailPool();
    var sequences: [2]*Sequence = undefined;
    for (&sequences) |*sequence| {
        sequence.* = try cache.createSequence();
        try step(&cache, sequence.*, 1, ascending);
    }
    const before = pool.stats();
    const next_block = pool.free.getLast();
    const serial_before = pool.serial(next_block);
    const good = input(&.{ 1, 2, 3, 4, 1, 2, 3 });
    const bad = input(&.{ 1, 2, 3, 4, 1, 2, nan });
    for ([_][2]Input{ .{ good, bad }, .{ bad, good } }) |pair| {
        try testing.expectError(error.NotFinite, cache.append(0, &sequences, &.{ 4, 3 }, pair[0], pair[1]));
        try testing.expectEqual(before, pool.stats());
        try testing.expectEqual(next_block, pool.free.getLast());
        try testing.expectEqual(serial_before, pool.serial(next_block));
        for (sequences) |sequence| {
            try expectRows(&cache, sequence, &.{0});
            try testing.expectEqual(1, sequence.state.tables[0].count());
            // Nothing that is not finite may stand behind the rows of a block.
            const block: Block = .of(cache.state.groups[0].formats.items[0], sequence.state.tables[0].blocks.items[0]);
            for ([_]shapes.Side{ .keys, .values }) |side| {
                const bytes = block.row(0, side, 0, 1)[0..@intCast(block.shape.tokenBytes(side))];
                try testing.expect(std.mem.allEqual(u8, bytes, 0));
            }
        }
        try checkInvariants(&cache);
    }
    try cache.append(0, &sequences, &.{ 4, 3 }, good, good);
    try expectRows(&cache, sequences[0], &.{ 0, 1, 2, 3, 4 });
    try expectRows(&cache, sequences[1], &.{ 0, 1, 2, 3 });
    // Where memory must be mapped first, rows are looked at before it is.
    var fresh: PagedCache = try .init(testing.allocator, simple(.{ .kv_head_count = 1, .head_dim = 1 }, 2));
    defer fresh.deinit();
    const sequence = try fresh.createSequence();
    try testing.expectError(error.NotFinite, fresh.append(0, &.{sequence}, &.{1}, input(&.{1}), input(&.{nan})));
    try testing.expectEqual(0, fresh.state.groups[0].tailPool().stats().allocations);
}

test "sequences that share a block append in one batch: all but the last of them copy it" {
    // Blocks of 4 rows, 4 of them.
    var options = simple(.{ .kv_head_count = 1, .head_dim = 1 }, 4);
    options.max_bytes = 4 * 64;
    var cache: PagedCache = try .init(testing.allocator, options);
    defer cache.deinit();
    const pool = cache.state.groups[0].tailPool();
    var sequences: [4]*Sequence = undefined;
    sequences[0] = try cache.createSequence();
    try step(&cache, sequences[0], 2, ascending);
    for (sequences[1..]) |*child| child.* = try cache.fork(sequences[0]);
    const rows = input(&.{ 10, 11, 12, 13 });
    // One of the sharers is not in the batch: three copies, no block left over.
    try cache.append(0, sequences[0..3], &.{ 1, 1, 1 }, input(&.{ 10, 11, 12 }), input(&.{ 10, 11, 12 }));
    try testing.expectEqual(4, pool.stats().used_blocks);
    try expectRows(&cache, sequences[3], &.{ 0, 1 });
    for (sequences[0..3], 10..) |sequence, value| try expectRows(&cache, sequence, &.{ 0, 1, @floatFromInt(value) });
    // All of them: three copies, and the last one keeps the block. A refused batch gives no reference away.
    for (sequences[1..]) |child| cache.freeSequence(child);
    try sequences[0].truncate(2);
    for (sequences[1..]) |*child| child.* = try cache.fork(sequences[0]);
    const other = try cache.createSequence();
    try step(&cache, other, 1, ascending);
    const before = pool.stats();
    try testing.expectError(error.PoolEmpty, cache.append(0, &sequences, &.{ 1, 1, 1, 1 }, rows, rows));
    try testing.expectEqual(before.used_blocks, pool.stats().used_blocks);
    try testing.expectEqual(4, pool.refCount(@intCast(sequences[0].state.tables[0].blocks.items[0])));
    try checkInvariants(&cache);
    cache.freeSequence(other);
    try cache.append(0, &sequences, &.{ 1, 1, 1, 1 }, rows, rows);
    try testing.expectEqual(4, pool.stats().used_blocks);
    for (sequences, 10..) |sequence, value| try expectRows(&cache, sequence, &.{ 0, 1, @floatFromInt(value) });
    try checkInvariants(&cache);
}

test "equal bits: contiguous and every block size, fresh and forked, one by one and at once" {
    const tokens = 300;
    const heads = 2;
    const dim = 40;
    var prng: std.Random.DefaultPrng = .init(11);
    var k: [tokens * heads * dim]f32 = undefined;
    var v: [tokens * heads * dim]f32 = undefined;
    var q: [3 * 4 * dim]f32 = undefined;
    for ([_][]f32{ &k, &v, &q }) |elements| {
        for (elements) |*element| element.* = prng.random().floatNorm(f32);
    }
    for ([_]Dtype{ .f32, .f16, .bf16 }) |dtype| {
        var flat: contiguous.ContiguousCache = try .init(testing.allocator, .{
            .layer_count = 1,
            .kv_head_count = heads,
            .head_dim = dim,
            .max_seq_len = tokens,
            .dtype_k = dtype,
            .dtype_v = dtype,
        });
        defer flat.deinit();
        _ = try flat.append(0, 0, input(&k), input(&v));
        const options = [_]attention.Options{
            .{ .query_count = 3 },
            .{ .query_count = 3, .window_tokens = 100, .sink_tokens = 5 },
            .{ .query_count = 3, .softcap = 3 },
        };
        for (options) |option| {
            var expected: [q.len]f32 = undefined;
            var expected_lse: [12]f32 = undefined;
            try attention.attend(try flat.rows(0, 0), &q, option, &expected, &expected_lse);
            var block_size: u32 = 1;
            while (block_size <= 256) : (block_size *= 2) {
                var cache: PagedCache = try .init(testing.allocator, .{
                    .layers = &.{.{ .kv_head_count = heads, .head_dim = dim }},
                    .block_size = block_size,
                    .max_seq_len = tokens,
                    .dtype_k = dtype,
                    .dtype_v = dtype,
                });
                defer cache.deinit();
                const whole = try cache.createSequence();
                try cache.append(0, &.{whole}, &.{tokens}, input(&k), input(&v));
                try whole.commit(tokens);
                const parent = try cache.createSequence();
                const row = heads * dim;
                for (0..tokens / 2) |token| {
                    try cache.append(0, &.{parent}, &.{1}, input(k[token * row ..][0..row]), input(v[token * row ..][0..row]));
                    try parent.commit(1);
                }
                const child = try cache.fork(parent);
                const rest = tokens / 2 * row;
                try cache.append(0, &.{child}, &.{tokens / 2}, input(k[rest..]), input(v[rest..]));
                for ([_]*Sequence{ whole, child }) |sequence| {
                    var output: [q.len]f32 = undefined;
                    var lse: [12]f32 = undefined;
                    try attention.attend(try sequence.rows(0), &q, option, &output, &lse);
                    try testing.expectEqualSlices(u8, std.mem.asBytes(&expected), std.mem.asBytes(&output));
                    try testing.expectEqualSlices(u8, std.mem.asBytes(&expected_lse), std.mem.asBytes(&lse));
                }
            }
        }
    }
}

test "poisoned holes change nothing" {
    var cache: PagedCache = try .init(testing.allocator, simple(.{ .kv_head_count = 2, .head_dim = 3 }, 4));
    defer cache.deinit();
    const sequence = try cache.createSequence();
    try step(&cache, sequence, 3, ascending);
    const q: [6]f32 = @splat(0.1);
    var before: [6]f32 = undefined;
    try attention.attend(try sequence.rows(0), &q, .{}, &before, &.{});
    const bytes = cache.state.groups[0].tailPool().bytes(@intCast((try sequence.blockTable(0)).at(0)));
    const elements: []f32 = @ptrCast(bytes[0 .. 2 * 24 * 4]);
    // With 3 of 4 rows the holes are elements 9..11 and 21..23 of each side.
    for ([_]usize{ 9, 21, 24 + 9, 24 + 21 }) |at| @memset(elements[at..][0..3], std.math.nan(f32));
    var after: [6]f32 = undefined;
    try attention.attend(try sequence.rows(0), &q, .{}, &after, &.{});
    try testing.expectEqual(before, after);
}

test "a tree of drafted tokens: each node sees the rows before the tree, its ancestors and itself" {
    const dim = 16;
    var cache: PagedCache = try .init(testing.allocator, simple(.{ .kv_head_count = 1, .head_dim = dim }, 4));
    defer cache.deinit();
    const sequence = try cache.createSequence();
    var prng: std.Random.DefaultPrng = .init(5);
    var k: [75 * dim]f32 = undefined;
    for (&k) |*element| element.* = prng.random().floatNorm(f32);
    try cache.append(0, &.{sequence}, &.{70}, input(k[0 .. 70 * dim]), input(k[0 .. 70 * dim]));
    try sequence.commit(70);
    // Two roots; 2 and 3 follow 0, 4 follows 3.
    const parents = [_]i32{ -1, -1, 0, 0, 3 };
    try cache.append(0, &.{sequence}, &.{5}, input(k[70 * dim ..]), input(k[70 * dim ..]));
    var q: [5 * dim]f32 = undefined;
    for (&q) |*element| element.* = prng.random().floatNorm(f32);
    var output: [5 * dim]f32 = undefined;
    const options: attention.Options = .{ .query_count = 5, .tree_parents = &parents };
    try attention.attend(try sequence.rows(0), &q, options, &output, &.{});
    for (parents, 0..) |_, node| {
        // The node's own path as a plain sequence.
        const path = try cache.createSequence();
        defer cache.freeSequence(path);
        try cache.append(0, &.{path}, &.{70}, input(k[0 .. 70 * dim]), input(k[0 .. 70 * dim]));
        var nodes: [5]usize = undefined;
        var depth: usize = 0;
        var at: i32 = @intCast(node);
        while (at >= 0) : (at = parents[@intCast(at)]) {
            nodes[depth] = @intCast(at);
            depth += 1;
        }
        while (depth > 0) {
            depth -= 1;
            const row = k[(70 + nodes[depth]) * dim ..][0..dim];
            try cache.append(0, &.{path}, &.{1}, input(row), input(row));
        }
        var alone: [dim]f32 = undefined;
        try attention.attend(try path.rows(0), q[node * dim ..][0..dim], .{}, &alone, &.{});
        for (alone, output[node * dim ..][0..dim]) |expected, got| try testing.expectApproxEqAbs(expected, got, 1e-5);
    }
    // Accept the path 0, 3, 4: those rows move up and are committed, the others are gone.
    try testing.expectError(error.InvalidSize, sequence.commitKept(&.{ 3, 0 }));
    try testing.expectError(error.InvalidSize, sequence.commitKept(&.{5}));
    try sequence.commitKept(&.{ 0, 3, 4 });
    try testing.expectEqual(73, sequence.seqLen());
    var buffer: [100]f32 = undefined;
    const rows = try gathered(&cache, sequence, &buffer);
    try testing.expectEqual(73, rows.len);
    for ([_]usize{ 70, 73, 74 }, rows[70..]) |from, got| try testing.expectEqual(k[from * dim], got);

    const q1 = q[0..dim];
    const bad = [_]attention.Options{
        .{ .query_count = 1, .tree_parents = &.{0} },
        .{ .query_count = 1, .tree_parents = &.{-1}, .causal = false },
    };
    for (bad) |option| {
        try testing.expectError(error.InvalidConfig, attention.attend(try sequence.rows(0), q1, option, &output, &.{}));
    }
    try testing.expectError(error.InvalidSize, attention.attend(try sequence.rows(0), q1, .{ .tree_parents = &parents }, &output, &.{}));
    try testing.expectError(error.Unsupported, attention.attend(try sequence.rows(0), q1, .{ .tree_parents = &.{-1}, .window_tokens = 3 }, &output, &.{}));
}

/// References are table entries, used and free blocks are all blocks, and no block is in use twice by one table.
fn checkInvariants(cache: *PagedCache) !void {
    for (cache.state.groups, 0..) |group, group_index| {
        const stats = group.tailPool().stats();
        try testing.expectEqual(stats.total_blocks, stats.used_blocks + stats.free_blocks);
        var counts: std.AutoHashMapUnmanaged(i32, u32) = .empty;
        defer counts.deinit(testing.allocator);
        for (cache.sequences.items) |sequence| for (sequence.state.tables[group_index].blocks.items) |block| {
            const entry = try counts.getOrPutValue(testing.allocator, block, 0);
            entry.value_ptr.* += 1;
        };
        try testing.expectEqual(stats.used_blocks, counts.count());
        var entries = counts.iterator();
        while (entries.next()) |entry| {
            try testing.expectEqual(entry.value_ptr.*, group.tailPool().refCount(@intCast(entry.key_ptr.*)));
        }
    }
}

/// A sequence of the model: what its rows in layer 0 should be.
const Model = struct {
    sequence: *Sequence,
    rows: std.ArrayList(f32) = .empty,
    /// Rows appended and not committed.
    pending: u32 = 0,
};

test "a random walk over appends, commits, forks, truncates, reorders and frees" {
    const gpa = testing.allocator;
    var prng: std.Random.DefaultPrng = .init(testing.random_seed);
    const random = prng.random();
    errdefer std.debug.print("seed {d}\n", .{testing.random_seed});
    // Few blocks, so that the pool runs out again and again.
    var cache: PagedCache = try .init(gpa, .{
        .layers = &.{ .{ .kv_head_count = 1, .head_dim = 2 }, .{ .kv_head_count = 1, .head_dim = 2 } },
        .block_size = 4,
        .max_seq_len = 60,
        .dtype_k = .f32,
        .dtype_v = .f32,
        .max_bytes = 60 * 128,
    });
    defer cache.deinit();
    var models: std.ArrayList(Model) = .empty;
    defer {
        for (models.items) |*model| model.rows.deinit(gpa);
        models.deinit(gpa);
    }
    var next_value: f32 = 1;
    for (0..5000) |_| {
        const choice = random.uintLessThan(u8, 12);
        if (models.items.len == 0 or choice == 0) {
            if (models.items.len >= 10) continue;
            try models.append(gpa, .{ .sequence = try cache.createSequence() });
            continue;
        }
        const index = random.uintLessThan(usize, models.items.len);
        const model = &models.items[index];
        switch (choice) {
            1 => { // fork
                if (models.items.len >= 10) continue;
                var rows: std.ArrayList(f32) = .empty;
                try rows.appendSlice(gpa, model.rows.items[0 .. model.rows.items.len - model.pending]);
                try models.append(gpa, .{ .sequence = try cache.fork(model.sequence), .rows = rows });
            },
            2 => { // free
                cache.freeSequence(model.sequence);
                model.rows.deinit(gpa);
                _ = models.swapRemove(index);
            },
            3 => { // truncate
                const committed: u32 = @intCast(model.rows.items.len - model.pending);
                const length = random.uintAtMost(u32, committed);
                try model.sequence.truncate(length);
                model.rows.items.len = length;
                model.pending = 0;
            },
            4 => { // reorder of all, when nobody has pending rows
                var beams: [10]*Sequence = undefined;
                var parents: [10]u32 = undefined;
                var pending = false;
                for (models.items, 0..) |other, i| {
                    beams[i] = other.sequence;
                    parents[i] = random.uintLessThan(u32, @intCast(models.items.len));
                    pending = pending or other.pending != 0;
                }
                const count = models.items.len;
                if (cache.reorder(beams[0..count], parents[0..count])) {
                    try testing.expect(!pending);
                    var old: [10]std.ArrayList(f32) = undefined;
                    for (models.items, 0..) |other, i| old[i] = other.rows;
                    for (models.items, 0..) |*other, i| {
                        other.rows = .empty;
                        try other.rows.appendSlice(gpa, old[parents[i]].items);
                    }
                    for (old[0..count]) |*rows| rows.deinit(gpa);
                } else |err| {
                    try testing.expectEqual(error.CommitMismatch, err);
                    try testing.expect(pending);
                }
            },
            5, 6 => { // commit
                try model.sequence.commit(model.pending);
                model.pending = 0;
            },
            else => { // append to both layers, or to none when the pool is empty
                const count = random.uintLessThan(u32, 9);
                var rows: [16]f32 = undefined;
                for (0..count) |i| {
                    rows[2 * i] = next_value;
                    rows[2 * i + 1] = -next_value;
                    next_value += 1;
                }
                const k = input(rows[0 .. 2 * count]);
                const outcome = cache.append(0, &.{model.sequence}, &.{count}, k, k);
                if (model.rows.items.len + count > 60) {
                    try testing.expectError(error.CacheFull, outcome);
                    continue;
                }
                outcome catch |err| {
                    try testing.expectEqual(error.PoolEmpty, err);
                    continue;
                };
                // The blocks are there now, and unshared.
                try cache.append(1, &.{model.sequence}, &.{count}, k, k);
                for (0..count) |i| try model.rows.append(gpa, rows[2 * i]);
                model.pending += count;
            },
        }
        try checkInvariants(&cache);
        for (models.items) |other| try expectRows(&cache, other.sequence, other.rows.items);
    }
}

test "every allocation may fail, and nothing has changed" {
    var fail_index: usize = 0;
    while (true) : (fail_index += 1) {
        var failing: std.testing.FailingAllocator = .init(testing.allocator, .{ .fail_index = fail_index });
        const gpa = failing.allocator();
        life(gpa) catch |err| {
            try testing.expectEqual(error.OutOfMemory, err);
            continue;
        };
        if (!failing.has_induced_failure) break;
    }
    try testing.expect(fail_index > 15);
}

fn life(gpa: std.mem.Allocator) !void {
    var cache: PagedCache = try .initSlabs(gpa, gpa, simple(.{ .kv_head_count = 1, .head_dim = 1 }, 1));
    defer cache.deinit();
    const parent = try cache.createSequence();
    const row: [70]f32 = @splat(1); // more blocks than fit the stack
    cache.append(0, &.{parent}, &.{70}, input(&row), input(&row)) catch |err| {
        try testing.expectEqual(0, (try parent.rows(0)).row_count);
        try checkInvariants(&cache);
        return err;
    };
    try parent.commit(70);
    const child = cache.fork(parent) catch |err| {
        try testing.expectEqual(1, cache.sequences.items.len);
        try checkInvariants(&cache);
        return err;
    };
    cache.reorder(&.{ parent, child }, &.{ 1, 1 }) catch |err| {
        try checkInvariants(&cache);
        return err;
    };
    try checkInvariants(&cache);
}

test "a fork of 128 K tokens copies a table, and forks and frees leave the pool as it was" {
    var options = simple(.{ .kv_head_count = 1, .head_dim = 1 }, 64);
    options.max_seq_len = 1 << 17;
    var cache: PagedCache = try .init(testing.allocator, options);
    defer cache.deinit();
    const parent = try cache.createSequence();
    const rows = try testing.allocator.alloc(f32, 1 << 17);
    defer testing.allocator.free(rows);
    @memset(rows, 1);
    try cache.append(0, &.{parent}, &.{1 << 17}, input(rows), input(rows));
    try parent.commit(1 << 17);
    const before = cache.state.groups[0].tailPool().stats();
    try testing.expectEqual(2048, before.used_blocks);
    for (0..100) |_| cache.freeSequence(try cache.fork(parent));
    try testing.expectEqual(before, cache.state.groups[0].tailPool().stats());
}
