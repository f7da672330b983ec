//! The ABI through its C face: what a caller can get wrong, and one life of a cache.

const std = @import("std");
const testing = std.testing;
const contiguous = @import("contiguous.zig");
const paged = @import("paged.zig");
const pool = @import("pool.zig");
const reserved = @import("../device/reserved.zig");
const sequences = @import("sequence.zig");
const library = @import("library.zig");
const Status = @import("status.zig").Status;

fn bytes(pointer: anytype) [*]u8 {
    return @ptrCast(@constCast(pointer));
}

const options = [_]u32{ 40, 2, 1, 1, 4, 8, 0, 0, 0, 0 };

fn expectStatus(expected: Status, got: i32) !void {
    try testing.expectEqual(expected.result(), got);
}

test "one life of a cache" {
    const handle: u32 = @intCast(contiguous.create(bytes(&options), 40));
    const row = [_]f32{ 1, 2, 3, 4 };
    for (0..2) |layer| {
        try testing.expectEqual(0, contiguous.append(handle, @intCast(layer), 0, bytes(&row), 4, bytes(&row), 4, 0, 0));
        try testing.expectEqual(1, contiguous.rowCount(handle, @intCast(layer), 0));
    }
    try testing.expectEqual(0, contiguous.commit(handle, 0, 1));
    try testing.expectEqual(1, contiguous.seqLen(handle, 0));
    const attend_options = [_]u32{ 28, 1, 1, 0, 0, 0, 0 };
    var output: [4]f32 = undefined;
    var lse: [1]f32 = undefined;
    try testing.expectEqual(0, contiguous.attend(
        handle,
        1,
        0,
        bytes(&row),
        4,
        bytes(&attend_options),
        28,
        null,
        0,
        null,
        0,
        null,
        0,
        bytes(&output),
        4,
        bytes(&lse),
        1,
    ));
    try testing.expectEqual(row, output);
    try testing.expectApproxEqAbs(15, lse[0], 1e-5); // 30 / sqrt(4)
    var memory: f64 = 0;
    try testing.expectEqual(0, contiguous.cacheMemoryBytes(handle, bytes(&memory), 1));
    try testing.expectEqual(2 * 2 * 8 * 4 * 4 + 4, memory);
    try testing.expectEqual(0, contiguous.free(handle));
    try expectStatus(.stale_handle, contiguous.free(handle));
    try expectStatus(.stale_handle, contiguous.seqLen(handle, 0));
}

test "buffers: null, short and absurd counts are refused, a null for no elements is not" {
    const handle: u32 = @intCast(contiguous.create(bytes(&options), 40));
    defer _ = contiguous.free(handle);
    const row = [_]f32{ 1, 2, 3, 4 };
    try testing.expectEqual(0, contiguous.append(handle, 0, 0, null, 0, null, 0, 0, 0));
    try expectStatus(.invalid_size, contiguous.append(handle, 0, 0, null, 4, bytes(&row), 4, 0, 0));
    try expectStatus(.invalid_size, contiguous.append(handle, 0, 0, bytes(&row), 3, bytes(&row), 3, 0, 0));
    try expectStatus(.cache_full, contiguous.append(handle, 0, 0, bytes(&row), 0xffff_fffc, bytes(&row), 0xffff_fffc, 0, 0));
    try expectStatus(.invalid_config, contiguous.append(handle, 0, 0, bytes(&row), 4, bytes(&row), 4, 3, 0));
    try expectStatus(.invalid_config, contiguous.append(handle, 0, 0, bytes(&row), 4, bytes(&row), 4, 0, 2));
    try expectStatus(.invalid_size, contiguous.cacheMemoryBytes(handle, null, 1));
    try expectStatus(.invalid_size, contiguous.cacheMemoryBytes(handle, bytes(&row), 0));
    try expectStatus(.invalid_size, contiguous.stats(handle, null, 48));
    try expectStatus(.invalid_size, contiguous.attend(handle, 0, 0, bytes(&row), 4, null, 28, null, 0, null, 0, null, 0, null, 0, null, 0));
    const attend_options = [_]u32{ 28, 1, 1, 0, 0, 0, 0 };
    try expectStatus(.invalid_size, contiguous.attend(
        handle,
        0,
        0,
        bytes(&row),
        4,
        bytes(&attend_options),
        28,
        null,
        0,
        null,
        0,
        null,
        0,
        null,
        0,
        null,
        0,
    ));
    try testing.expectEqual(0, contiguous.rowCount(handle, 0, 0));
}

test "records: unknown flags and fields are unsupported, bad words are refused" {
    var unknown = options ++ [_]u32{ 0, 5 };
    unknown[0] = 48;
    try expectStatus(.unsupported, contiguous.create(bytes(&unknown), 48));
    // Query heads that KV heads do not divide, of a caller that knows them.
    unknown[3] = 2;
    unknown[10] = 3;
    try expectStatus(.invalid_config, contiguous.create(bytes(&([_]u32{44} ++ unknown[1..11].*)), 44));
    for (1..6) |field| {
        var bad = options;
        bad[field] = 0;
        try expectStatus(.invalid_config, contiguous.create(bytes(&bad), 40));
    }
    var bad_dtype = options;
    bad_dtype[6] = 9;
    try expectStatus(.invalid_config, contiguous.create(bytes(&bad_dtype), 40));
    var absurd = options;
    for (1..4) |field| absurd[field] = 0xffff_ffff;
    try expectStatus(.invalid_config, contiguous.create(bytes(&absurd), 40)); // a row of 2^34 elements
    absurd[3] = 1;
    try expectStatus(.out_of_memory, contiguous.create(bytes(&absurd), 40));
    var limited = options;
    limited[8] = 511;
    try expectStatus(.out_of_memory, contiguous.create(bytes(&limited), 40));

    const handle: u32 = @intCast(contiguous.create(bytes(&options), 40));
    defer _ = contiguous.free(handle);
    const row = [_]f32{ 1, 2, 3, 4 };
    const flags = [_]u32{ 28, 1, 1 | 1 << 31, 0, 0, 0, 0 };
    try expectStatus(.unsupported, contiguous.attend(
        handle,
        0,
        0,
        bytes(&row),
        4,
        bytes(&flags),
        28,
        null,
        0,
        null,
        0,
        null,
        0,
        null,
        0,
        null,
        0,
    ));
}

test "levels: unknown ones are refused, the one in force is among those this CPU has" {
    try expectStatus(.unsupported, library.levelSet(99));
    var info = [_]u32{ 40, 0, 0, 0, 0, 0, 0, 0, 0, 0 };
    try testing.expectEqual(0, library.systemInfo(bytes(&info), 40));
    try testing.expect(info[2] >> @intCast(info[1]) & 1 == 1);
    try testing.expect(info[3] >= 1);
    const level: i32 = @intCast(info[1]);
    try testing.expectEqual(level, library.levelSet(info[1]));
    try testing.expectEqual(level, library.levelSet(0));
    for (1..32) |other| {
        if (other == level) continue;
        const has_it = info[2] >> @intCast(other) & 1 == 1;
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
    var info = [_]u32{ 48, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 };
    try testing.expectEqual(0, library.systemInfo(bytes(&info), 48));
    try testing.expectEqual(limit, info[10] + (@as(u64, info[11]) << 32));
    // K and V of 2 layers of 8 rows of 4: two pages; then of 64 Ki rows, 4 MiB.
    const small = contiguous.create(bytes(&options), 40);
    try testing.expect(small > 0);
    var large = options;
    large[5] = 1 << 16;
    try expectStatus(.out_of_memory, contiguous.create(bytes(&large), 40));
    try testing.expectEqual(0, contiguous.free(@intCast(small)));
}

/// 2 layers of 1 KV head of 4, blocks of 2, at most 8 tokens, f32.
const paged_options = [_]u32{ 48, 2, 2, 8, 0, 0, 0, 0, 0, 0, 0, 0 };
const paged_layers = [_]u32{ 1, 4, 0, 0, 0, 1, 4, 0, 0, 0 };

test "one life of a paged cache: a batch, a fork, views, a reorder" {
    const handle: u32 = @intCast(paged.create(bytes(&paged_options), 48, bytes(&paged_layers), 10));
    const first: u32 = @intCast(sequences.create(handle));
    const second: u32 = @intCast(sequences.create(handle));
    const words = [_]u32{ first, second };
    const counts = [_]u32{ 3, 1 };
    var rows: [16]f32 = undefined;
    for (&rows, 0..) |*element, i| element.* = @floatFromInt(i);
    for (0..2) |layer| {
        try testing.expectEqual(0, paged.append(handle, @intCast(layer), bytes(&words), bytes(&counts), 2, bytes(&rows), 16, bytes(&rows), 16, 0, 0));
    }
    try testing.expectEqual(0, sequences.commit(first, 3));
    try testing.expectEqual(0, sequences.commit(second, 1));
    try testing.expectEqual(3, sequences.seqLen(first));
    const child: u32 = @intCast(sequences.fork(first));
    try testing.expectEqual(3, sequences.seqLen(child));

    var table: [4]i32 = @splat(-9);
    try testing.expectEqual(2, sequences.blockTable(first, 0, bytes(&table), 4));
    var references: [4]i32 = @splat(-9);
    try testing.expectEqual(2, sequences.blockReferences(child, 0, bytes(&references), 4));
    try testing.expectEqual([4]i32{ 2, 2, -9, -9 }, references);

    var records: [2][18]u32 = @splat(@splat(0));
    records[0][0] = 72;
    try testing.expectEqual(2, sequences.views(first, 1, 0, 0, bytes(&records), 144));
    try testing.expectEqual(72, records[1][0]);
    try testing.expectEqual(2, records[1][5]); // start
    try testing.expectEqual(1, records[1][6]); // length
    const address = @as(usize, records[1][2]) << 32 | records[1][1];
    try testing.expectEqual(8, @as(*const f32, @ptrFromInt(address)).*);
    try testing.expectEqual(1, sequences.views(first, 1, 2, 0, bytes(&records), 72));

    // Queries of zeros: every row weighs the same, so the output is the mean of the values.
    const q: [8]f32 = @splat(0);
    const attend_options = [_]u32{ 28, 1, 1, 0, 0, 0, 0 };
    const one_each = [_]u32{ 1, 1 };
    var output: [8]f32 = undefined;
    var lse: [2]f32 = undefined;
    try testing.expectEqual(0, paged.attend(handle, 0, bytes(&words), bytes(&one_each), 2, bytes(&q), 8, bytes(&attend_options), 28, null, 0, null, 0, null, 0, bytes(&output), 8, bytes(&lse), 2));
    try testing.expectEqual(4, output[0]);
    try testing.expectEqual(12, output[4]);
    try testing.expectApproxEqAbs(@log(3.0), lse[0], 1e-6);
    const beams = [_]u32{ first, second };
    const parents = [_]u32{ 1, 1 };
    try testing.expectEqual(0, paged.reorder(handle, bytes(&beams), bytes(&parents), 2));
    try testing.expectEqual(1, sequences.seqLen(first));
    try testing.expectEqual(3, sequences.seqLen(child));
    var info: [16]u32 = @splat(0);
    info[0] = 64;
    try testing.expectEqual(0, paged.stats(handle, bytes(&info), 64));
    try testing.expectEqual(3, info[1]);
    try testing.expectEqual(0, paged.poolStats(handle, 0, 0, 0, bytes(&info), 64));
    try expectStatus(.layer_out_of_range, paged.poolStats(handle, 1, 0, 0, bytes(&info), 64));
    try testing.expectEqual(0, sequences.free(child));
    try expectStatus(.stale_handle, sequences.free(child));
    try testing.expectEqual(0, paged.free(handle));
    for (words) |word| try expectStatus(.stale_handle, sequences.seqLen(word));
    try expectStatus(.stale_handle, paged.free(handle));
}

test "a batch of a stranger's sequence, a doubled one, or short buffers is refused" {
    const handle: u32 = @intCast(paged.create(bytes(&paged_options), 48, bytes(&paged_layers), 10));
    defer _ = paged.free(handle);
    const other: u32 = @intCast(paged.create(bytes(&paged_options), 48, bytes(&paged_layers), 10));
    defer _ = paged.free(other);
    const mine: u32 = @intCast(sequences.create(handle));
    const theirs: u32 = @intCast(sequences.create(other));
    const row: [8]f32 = @splat(1);
    const counts = [_]u32{ 1, 1 };
    const strange = [_]u32{ mine, theirs };
    const doubled = [_]u32{ mine, mine };
    try expectStatus(.stale_handle, paged.append(handle, 0, bytes(&strange), bytes(&counts), 2, bytes(&row), 8, bytes(&row), 8, 0, 0));
    try expectStatus(.invalid_config, paged.append(handle, 0, bytes(&doubled), bytes(&counts), 2, bytes(&row), 8, bytes(&row), 8, 0, 0));
    try expectStatus(.invalid_size, paged.append(handle, 0, null, bytes(&counts), 2, bytes(&row), 8, bytes(&row), 8, 0, 0));
    try expectStatus(.invalid_size, paged.append(handle, 0, bytes(&strange), bytes(&counts), 1, bytes(&row), 8, bytes(&row), 8, 0, 0));
    try expectStatus(.layer_out_of_range, paged.append(handle, 2, bytes(&strange), bytes(&counts), 1, bytes(&row), 4, bytes(&row), 4, 0, 0));
    const absurd = [_]u32{ 0xffff_ffff, 0xffff_ffff };
    try expectStatus(.invalid_size, paged.append(handle, 0, bytes(&strange), bytes(&absurd), 1, bytes(&row), 4, bytes(&row), 4, 0, 0));
    try expectStatus(.stale_handle, paged.reorder(handle, bytes(&strange), bytes(&counts), 2));
    try expectStatus(.stale_handle, sequences.create(mine));
    try testing.expectEqual(0, sequences.rowCount(mine, 0));
    var wrong = paged_options;
    wrong[2] = 3; // no power of two
    try expectStatus(.invalid_config, paged.create(bytes(&wrong), 48, bytes(&paged_layers), 10));
    try expectStatus(.invalid_size, paged.create(bytes(&paged_options), 48, bytes(&paged_layers), 9));
    wrong = paged_options;
    wrong[10] = 12345; // no such pool
    try expectStatus(.stale_handle, paged.create(bytes(&wrong), 48, bytes(&paged_layers), 10));
    wrong = paged_options;
    wrong[8] = 100; // less than a block
    try expectStatus(.block_too_large, paged.create(bytes(&wrong), 48, bytes(&paged_layers), 10));
}

test "a pool of its own: two caches on it, one limit for both" {
    // Blocks of 2 layers * 2 sides * 2 tokens * 4 f32 = 128 B; 3 of them.
    const pool_options = [_]u32{ 36, 2, 1, 4, 2, 0, 0, 3 * 128, 0 };
    const pool_handle: u32 = @intCast(pool.create(bytes(&pool_options), 36));
    try testing.expectEqual(0, pool.prewarm(pool_handle, 2, 0, 0));
    var on_pool = paged_options;
    on_pool[10] = pool_handle;
    const a: u32 = @intCast(paged.create(bytes(&on_pool), 48, bytes(&paged_layers), 10));
    const b: u32 = @intCast(paged.create(bytes(&on_pool), 48, bytes(&paged_layers), 10));
    const in_a: u32 = @intCast(sequences.create(a));
    const in_b: u32 = @intCast(sequences.create(b));
    const rows: [16]f32 = @splat(1);
    try testing.expectEqual(0, sequences.append(in_a, 0, bytes(&rows), 16, bytes(&rows), 16, 0, 0));
    try expectStatus(.pool_empty, sequences.append(in_b, 0, bytes(&rows), 16, bytes(&rows), 16, 0, 0));
    try testing.expectEqual(0, sequences.append(in_b, 0, bytes(&rows), 8, bytes(&rows), 8, 0, 0));
    var info: [32]u32 = @splat(0);
    info[0] = 88;
    try testing.expectEqual(0, pool.stats(pool_handle, 0, 0, bytes(&info), 88));
    try testing.expectEqual(3, info[3]); // used
    try testing.expectEqual(0, pool.free(pool_handle));
    try testing.expectEqual(0, sequences.append(in_a, 1, bytes(&rows), 4, bytes(&rows), 4, 0, 0));
    try testing.expectEqual(0, paged.free(a));
    try testing.expectEqual(0, paged.free(b));
    try expectStatus(.stale_handle, pool.stats(pool_handle, 0, 0, bytes(&info), 88));
}
