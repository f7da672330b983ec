//! The ABI through its C face: what a caller can get wrong, and one life of a cache.

const std = @import("std");
const testing = std.testing;
const attention = @import("attend.zig");
const contiguous = @import("contiguous.zig");
const paged = @import("paged.zig");
const pool = @import("pool.zig");
const reserved = @import("../device/reserved.zig");
const records = @import("test_records.zig");
const bytes = records.bytes;
const size = records.size;
const sequences = @import("sequence.zig");
const library = @import("library.zig");
const Status = @import("status.zig").Status;

const options = records.contiguousOf(2, 1, 4, 8);

fn expectStatus(expected: Status, got: i32) !void {
    try testing.expectEqual(expected.result(), got);
}

/// One query of a sequence of a contiguous cache.
fn attendOne(cache: u32, layer: u32, sequence: u32, q: []const f32, how: *const attention.AttendRecord, output: []f32, lse: []f32) i32 {
    const q_count: u32 = @intCast(q.len);
    const output_count: u32 = @intCast(output.len);
    const lse_count: u32 = @intCast(lse.len);
    return attention.attend(cache, layer, bytes(&sequence), bytes(&one), 1, bytes(how), size(how), bytes(q.ptr), q_count, null, 0, null, 0, null, 0, bytes(output.ptr), output_count, bytes(lse.ptr), lse_count);
}

const none: u32 = 0;
const one: u32 = 1;

test "one life of a cache" {
    const handle: u32 = @intCast(contiguous.create(bytes(&options), size(&options)));
    const row = [_]f32{ 1, 2, 3, 4 };
    for (0..2) |layer| {
        try testing.expectEqual(0, sequences.append(handle, 0, @intCast(layer), bytes(&row), 4, bytes(&row), 4, 0, 0, 0, null, 0));
        try testing.expectEqual(1, sequences.rowCount(handle, 0, @intCast(layer)));
    }
    try testing.expectEqual(0, sequences.commit(handle, 0, 1));
    try testing.expectEqual(1, sequences.seqLen(handle, 0));
    var output: [4]f32 = undefined;
    var lse: [1]f32 = undefined;
    try testing.expectEqual(0, attendOne(handle, 1, 0, &row, &records.causal, &output, &lse));
    try testing.expectEqual(row, output);
    try testing.expectApproxEqAbs(15, lse[0], 1e-5); // 30 / sqrt(4)
    var memory: f64 = 0;
    try testing.expectEqual(0, contiguous.cacheMemoryBytes(handle, bytes(&memory), 1));
    try testing.expectEqual(2 * 2 * 8 * 4 * 4 + 4, memory);
    try testing.expectEqual(0, contiguous.free(handle));
    try expectStatus(.stale_handle, contiguous.free(handle));
    try expectStatus(.stale_handle, sequences.seqLen(handle, 0));
}

test "buffers: null, short and absurd counts are refused, a null for no elements is not" {
    const handle: u32 = @intCast(contiguous.create(bytes(&options), size(&options)));
    defer _ = contiguous.free(handle);
    const row = [_]f32{ 1, 2, 3, 4 };
    try testing.expectEqual(0, sequences.append(handle, 0, 0, null, 0, null, 0, 0, 0, 0, null, 0));
    try expectStatus(.invalid_size, sequences.append(handle, 0, 0, null, 4, bytes(&row), 4, 0, 0, 0, null, 0));
    try expectStatus(.invalid_size, sequences.append(handle, 0, 0, bytes(&row), 3, bytes(&row), 3, 0, 0, 0, null, 0));
    try expectStatus(.cache_full, sequences.append(handle, 0, 0, bytes(&row), 0xffff_fffc, bytes(&row), 0xffff_fffc, 0, 0, 0, null, 0));
    try expectStatus(.invalid_config, sequences.append(handle, 0, 0, bytes(&row), 4, bytes(&row), 4, 3, 0, 0, null, 0));
    try expectStatus(.invalid_config, sequences.append(handle, 0, 0, bytes(&row), 4, bytes(&row), 4, 0, 2, 0, null, 0));
    try expectStatus(.invalid_size, contiguous.cacheMemoryBytes(handle, null, 1));
    try expectStatus(.invalid_size, contiguous.cacheMemoryBytes(handle, bytes(&row), 0));
    try expectStatus(.invalid_size, contiguous.stats(handle, null, @sizeOf(contiguous.StatsRecord)));
    try expectStatus(.invalid_size, attention.attend(handle, 0, bytes(&none), bytes(&one), 1, null, size(&records.causal), bytes(&row), 4, null, 0, null, 0, null, 0, null, 0, null, 0));
    try expectStatus(.invalid_size, attendOne(handle, 0, 0, &row, &records.causal, &.{}, &.{}));
    try testing.expectEqual(0, sequences.rowCount(handle, 0, 0));
}

test "records: unknown flags and fields are unsupported, bad words are refused" {
    const Longer = extern struct { known: contiguous.ContiguousRecord, unknown: u32 };
    var longer: Longer = .{ .known = options, .unknown = 5 };
    longer.known.size_bytes = @sizeOf(Longer);
    try expectStatus(.unsupported, contiguous.create(bytes(&longer), @sizeOf(Longer)));
    // Query heads that KV heads do not divide.
    var odd = options;
    odd.kv_head_count = 2;
    odd.q_head_count = 3;
    try expectStatus(.invalid_config, contiguous.create(bytes(&odd), size(&odd)));
    inline for (.{ "layer_count", "sequence_count", "kv_head_count", "head_dim", "max_seq_len" }) |field| {
        var bad = options;
        @field(bad, field) = 0;
        try expectStatus(.invalid_config, contiguous.create(bytes(&bad), size(&bad)));
    }
    var bad_dtype = options;
    bad_dtype.dtype_k = 9;
    try expectStatus(.invalid_config, contiguous.create(bytes(&bad_dtype), size(&bad_dtype)));
    var absurd = options;
    absurd.layer_count = 0xffff_ffff;
    absurd.sequence_count = 0xffff_ffff;
    absurd.kv_head_count = 0xffff_ffff;
    try expectStatus(.invalid_config, contiguous.create(bytes(&absurd), size(&absurd))); // a row of 2^34 elements
    absurd.kv_head_count = 1;
    try expectStatus(.out_of_memory, contiguous.create(bytes(&absurd), size(&absurd)));
    var limited = options;
    limited.max_bytes = .from(511);
    try expectStatus(.out_of_memory, contiguous.create(bytes(&limited), size(&limited)));

    const handle: u32 = @intCast(contiguous.create(bytes(&options), size(&options)));
    defer _ = contiguous.free(handle);
    const row = [_]f32{ 1, 2, 3, 4 };
    var flags = records.causal;
    flags.flags |= 1 << 31;
    try expectStatus(.unsupported, attendOne(handle, 0, 0, &row, &flags, &.{}, &.{}));
}

test "levels: unknown ones are refused, the one in force is among those this CPU has" {
    try expectStatus(.unsupported, library.levelSet(99));
    var info = records.empty(library.SystemRecord);
    try testing.expectEqual(0, library.systemInfo(bytes(&info), size(&info)));
    try testing.expect(info.levels >> @intCast(info.level) & 1 == 1);
    try testing.expect(info.cpu_count >= 1);
    const level: i32 = @intCast(info.level);
    try testing.expectEqual(level, library.levelSet(info.level));
    try testing.expectEqual(level, library.levelSet(0));
    for (1..32) |other| {
        if (other == level) continue;
        const has_it = info.levels >> @intCast(other) & 1 == 1;
        try expectStatus(if (has_it) .invalid_config else .unsupported, library.levelSet(@intCast(other)));
    }
    try testing.expectEqual(level, library.levelSet(0));
}

test "the limit of the process: absurd ones are refused, and past it nothing is reserved" {
    const before = reserved.changeMax(0);
    defer _ = reserved.changeMax(before);
    for ([_]f64{ -1, 0.5, 1e300, std.math.inf(f64), std.math.nan(f64) }) |wrong| {
        try expectStatus(.invalid_config, library.maxBytesSet(wrong));
    }
    const limit = reserved.total() + (1 << 20);
    try testing.expectEqual(0, library.maxBytesSet(@floatFromInt(limit)));
    try testing.expectEqual(0, library.maxBytesSet(0));
    try expectStatus(.invalid_config, library.maxBytesSet(@floatFromInt(limit + 1)));
    var info = records.empty(library.SystemRecord);
    try testing.expectEqual(0, library.systemInfo(bytes(&info), size(&info)));
    try testing.expectEqual(limit, info.max_bytes.value());
    // K and V of 2 layers of 8 rows of 4: two pages; then of 64 Ki rows, 4 MiB.
    const small = contiguous.create(bytes(&options), size(&options));
    try testing.expect(small > 0);
    var large = options;
    large.max_seq_len = 1 << 16;
    try expectStatus(.out_of_memory, contiguous.create(bytes(&large), size(&large)));
    try testing.expectEqual(0, contiguous.free(@intCast(small)));
}

/// 2 layers of 1 KV head of 4, blocks of 2, at most 8 tokens, f32.
const paged_options = records.pagedOf(2, 2, 8);
const paged_layers: [2]paged.LayerRecord = @splat(records.layerOf(1, 4));

fn createPaged(options_of: paged.PagedRecord) i32 {
    return paged.create(bytes(&options_of), size(&options_of), bytes(&paged_layers), size(&paged_layers));
}

test "one life of a paged cache: a batch, a fork, views, a reorder" {
    const handle: u32 = @intCast(createPaged(paged_options));
    const first: u32 = @intCast(sequences.create(handle));
    const second: u32 = @intCast(sequences.create(handle));
    const words = [_]u32{ first, second };
    const counts = [_]u32{ 3, 1 };
    var rows: [16]f32 = undefined;
    for (&rows, 0..) |*element, i| element.* = @floatFromInt(i);
    for (0..2) |layer| {
        try testing.expectEqual(0, paged.append(handle, @intCast(layer), bytes(&words), bytes(&counts), 2, bytes(&rows), 16, bytes(&rows), 16, 0, 0, 0));
    }
    try testing.expectEqual(0, sequences.commit(first, 0, 3));
    try testing.expectEqual(0, sequences.commit(second, 0, 1));
    try testing.expectEqual(3, sequences.seqLen(first, 0));
    const child: u32 = @intCast(sequences.fork(first));
    try testing.expectEqual(3, sequences.seqLen(child, 0));

    var table: [4]i32 = @splat(-9);
    try testing.expectEqual(2, sequences.blockTable(first, 0, bytes(&table), 4));
    var references: [4]i32 = @splat(-9);
    try testing.expectEqual(2, sequences.blockReferences(child, 0, bytes(&references), 4));
    try testing.expectEqual([4]i32{ 2, 2, -9, -9 }, references);

    var views: [2]sequences.ViewRecord = @splat(records.empty(sequences.ViewRecord));
    try testing.expectEqual(2, sequences.views(first, 0, 1, 0, 0, bytes(&views), size(&views)));
    try testing.expectEqual(size(&views[0]), views[1].size_bytes);
    try testing.expectEqual(2, views[1].start);
    try testing.expectEqual(1, views[1].length);
    try testing.expectEqual(8, @as(*const f32, @ptrFromInt(@as(usize, @intCast(views[1].keys.value())))).*);
    try testing.expectEqual(1, sequences.views(first, 0, 1, 2, 0, bytes(&views), size(&views[0])));

    // Queries of zeros: every row weighs the same, so the output is the mean of the values.
    const q: [8]f32 = @splat(0);
    const one_each = [_]u32{ 1, 1 };
    var output: [8]f32 = undefined;
    var lse: [2]f32 = undefined;
    try testing.expectEqual(0, attention.attend(handle, 0, bytes(&words), bytes(&one_each), 2, bytes(&records.causal), size(&records.causal), bytes(&q), 8, null, 0, null, 0, null, 0, bytes(&output), 8, bytes(&lse), 2));
    try testing.expectEqual(4, output[0]);
    try testing.expectEqual(12, output[4]);
    try testing.expectApproxEqAbs(@log(3.0), lse[0], 1e-6);
    const beams = [_]u32{ first, second };
    const parents = [_]u32{ 1, 1 };
    try testing.expectEqual(0, paged.reorder(handle, bytes(&beams), bytes(&parents), 2));
    try testing.expectEqual(1, sequences.seqLen(first, 0));
    try testing.expectEqual(3, sequences.seqLen(child, 0));
    var stats = records.empty(paged.StatsRecord);
    try testing.expectEqual(0, paged.stats(handle, bytes(&stats), size(&stats)));
    try testing.expectEqual(3, stats.sequence_count);
    var pool_stats = records.empty(pool.StatsRecord);
    try testing.expectEqual(0, paged.poolStats(handle, 0, 0, 0, bytes(&pool_stats), size(&pool_stats)));
    try expectStatus(.layer_out_of_range, paged.poolStats(handle, 1, 0, 0, bytes(&pool_stats), size(&pool_stats)));
    try testing.expectEqual(0, sequences.free(child));
    try expectStatus(.stale_handle, sequences.free(child));
    try testing.expectEqual(0, paged.free(handle));
    for (words) |word| try expectStatus(.stale_handle, sequences.seqLen(word, 0));
    try expectStatus(.stale_handle, paged.free(handle));
}

test "a batch of a stranger's sequence, a doubled one, or short buffers is refused" {
    const handle: u32 = @intCast(createPaged(paged_options));
    defer _ = paged.free(handle);
    const other: u32 = @intCast(createPaged(paged_options));
    defer _ = paged.free(other);
    const mine: u32 = @intCast(sequences.create(handle));
    const theirs: u32 = @intCast(sequences.create(other));
    const row: [8]f32 = @splat(1);
    const counts = [_]u32{ 1, 1 };
    const strange = [_]u32{ mine, theirs };
    const doubled = [_]u32{ mine, mine };
    try expectStatus(.stale_handle, paged.append(handle, 0, bytes(&strange), bytes(&counts), 2, bytes(&row), 8, bytes(&row), 8, 0, 0, 0));
    try expectStatus(.invalid_config, paged.append(handle, 0, bytes(&doubled), bytes(&counts), 2, bytes(&row), 8, bytes(&row), 8, 0, 0, 0));
    try expectStatus(.invalid_size, paged.append(handle, 0, null, bytes(&counts), 2, bytes(&row), 8, bytes(&row), 8, 0, 0, 0));
    try expectStatus(.invalid_size, paged.append(handle, 0, bytes(&strange), bytes(&counts), 1, bytes(&row), 8, bytes(&row), 8, 0, 0, 0));
    try expectStatus(.layer_out_of_range, paged.append(handle, 2, bytes(&strange), bytes(&counts), 1, bytes(&row), 4, bytes(&row), 4, 0, 0, 0));
    const absurd = [_]u32{ 0xffff_ffff, 0xffff_ffff };
    try expectStatus(.invalid_size, paged.append(handle, 0, bytes(&strange), bytes(&absurd), 1, bytes(&row), 4, bytes(&row), 4, 0, 0, 0));
    try expectStatus(.stale_handle, paged.reorder(handle, bytes(&strange), bytes(&counts), 2));
    try expectStatus(.stale_handle, sequences.create(mine));
    try testing.expectEqual(0, sequences.rowCount(mine, 0, 0));
    var wrong = paged_options;
    wrong.block_size = 3; // no power of two
    try expectStatus(.invalid_config, createPaged(wrong));
    try expectStatus(.invalid_size, paged.create(bytes(&paged_options), size(&paged_options), bytes(&paged_layers), size(&paged_layers) - 4));
    wrong = paged_options;
    wrong.pool = 12345; // no such pool
    try expectStatus(.stale_handle, createPaged(wrong));
    wrong = paged_options;
    wrong.max_bytes = .from(100); // less than a block
    try expectStatus(.block_too_large, createPaged(wrong));
}

test "a pool of its own: two caches on it, one limit for both" {
    // Blocks of 2 layers * 2 sides * 2 tokens * 4 f32 = 128 B; 3 of them.
    const pool_options = records.poolOf(2, 1, 4, 2, 3 * 128);
    const pool_handle: u32 = @intCast(pool.create(bytes(&pool_options), size(&pool_options)));
    try testing.expectEqual(0, pool.prewarm(pool_handle, 2, 0, 0));
    var on_pool = paged_options;
    on_pool.pool = pool_handle;
    const a: u32 = @intCast(createPaged(on_pool));
    const b: u32 = @intCast(createPaged(on_pool));
    const in_a: u32 = @intCast(sequences.create(a));
    const in_b: u32 = @intCast(sequences.create(b));
    const rows: [16]f32 = @splat(1);
    try testing.expectEqual(0, sequences.append(in_a, 0, 0, bytes(&rows), 16, bytes(&rows), 16, 0, 0, 0, null, 0));
    try expectStatus(.pool_empty, sequences.append(in_b, 0, 0, bytes(&rows), 16, bytes(&rows), 16, 0, 0, 0, null, 0));
    try testing.expectEqual(0, sequences.append(in_b, 0, 0, bytes(&rows), 8, bytes(&rows), 8, 0, 0, 0, null, 0));
    var stats = records.empty(pool.StatsRecord);
    try testing.expectEqual(0, pool.stats(pool_handle, 0, 0, bytes(&stats), size(&stats)));
    try testing.expectEqual(3, stats.used_blocks);
    try testing.expectEqual(0, pool.free(pool_handle));
    try testing.expectEqual(0, sequences.append(in_a, 0, 1, bytes(&rows), 4, bytes(&rows), 4, 0, 0, 0, null, 0));
    try testing.expectEqual(0, paged.free(a));
    try testing.expectEqual(0, paged.free(b));
    try expectStatus(.stale_handle, pool.stats(pool_handle, 0, 0, bytes(&stats), size(&stats)));
}
