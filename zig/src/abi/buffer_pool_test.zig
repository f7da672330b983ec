//! Buffer pools and their buffers through the C face: one life, and what a caller can get wrong.

const std = @import("std");
const testing = std.testing;
const buffers = @import("aligned_buffer.zig");
const buffer_pool = @import("buffer_pool.zig");
const handle = @import("handle.zig");
const reserved = @import("../device/reserved.zig");
const records = @import("test_records.zig");
const bytes = records.bytes;
const size = records.size;
const Status = @import("status.zig").Status;

fn expectStatus(expected: Status, got: i32) !void {
    try testing.expectEqual(expected.result(), got);
}

const two_each = records.sized(buffer_pool.BufferPoolRecord{ .buffers_per_class = 2, .max_bytes = .from(64 << 20) });

/// A pool that keeps 2 buffers of each class, and has at most 64 MiB.
fn makePool() !u32 {
    return std.math.cast(u32, buffer_pool.create(bytes(&two_each), size(&two_each))) orelse error.NoPool;
}

fn acquire(pool: u32, byte_count: f64) !u32 {
    return std.math.cast(u32, buffer_pool.acquire(pool, byte_count)) orelse error.NoBuffer;
}

const StatsRecord = buffer_pool.BufferPoolStatsRecord;

/// Hits, misses, allocations, returns, drops, reserved bytes, then the free buffers of each class.
fn statsOf(pool: u32) ![14]u64 {
    var record = records.empty(StatsRecord);
    try testing.expectEqual(0, buffer_pool.stats(pool, bytes(&record), size(&record)));
    var facts: [14]u64 = undefined;
    inline for (.{ "hits", "misses", "allocations", "returns", "drops", "reserved_bytes" }, 0..) |name, i| {
        facts[i] = @field(record, name).value();
    }
    for (facts[6..], record.free_buffers) |*fact, count| fact.* = count;
    return facts;
}

fn infoOf(buffer: u32) !buffers.BufferRecord {
    var info = records.empty(buffers.BufferRecord);
    try testing.expectEqual(0, buffers.info(buffer, bytes(&info), size(&info)));
    return info;
}

test "one life of a pool and its buffers" {
    const pool = try makePool();
    try testing.expectEqual(0, buffer_pool.prewarm(pool, 4096, 1));
    const first = try acquire(pool, 1025);
    try testing.expectEqual(3, buffers.extend(first, bytes(&[_]f32{ 1, 2, 3 }), 3));
    try testing.expectEqual(5, buffers.extend(first, bytes(&[_]f32{ 4, 5 }), 2));
    try testing.expectEqual(5, buffers.length(first));
    const info = try infoOf(first);
    try testing.expectEqual([_]u32{ size(&info), 1024, 5 }, [_]u32{ info.size_bytes, info.capacity, info.length });
    try testing.expectEqual(0, info.address.value() % 64);
    const floats: [*]f32 = @ptrFromInt(@as(usize, @intCast(info.address.value())));
    try testing.expectEqualSlices(f32, &.{ 1, 2, 3, 4, 5, 0 }, floats[0..6]);
    floats[1023] = 7;
    const second: u32 = @intCast(buffers.clone(first));
    try testing.expect(second != first);
    const copy = try infoOf(second);
    try testing.expect(copy.address.value() != info.address.value());
    try testing.expectEqual([_]u32{ 1024, 5 }, [_]u32{ copy.capacity, copy.length });
    try testing.expectEqual(7, @as([*]f32, @ptrFromInt(@as(usize, @intCast(copy.address.value()))))[1023]);
    try testing.expectEqual(0, buffers.clear(first));
    try testing.expectEqual(0, buffers.length(first));
    try testing.expectEqual(5, buffers.length(second));
    try testing.expectEqual([14]u64{ 1, 1, 2, 0, 0, 8192, 0, 0, 0, 0, 0, 0, 0, 0 }, try statsOf(pool));
    try testing.expectEqual(0, buffers.free(first));
    try testing.expectEqual(0, buffers.free(second));
    try testing.expectEqual([14]u64{ 1, 1, 2, 2, 0, 8192, 0, 2, 0, 0, 0, 0, 0, 0 }, try statsOf(pool));
    try testing.expectEqual(0, buffer_pool.prewarmAll(pool, 1));
    try testing.expectEqual([8]u64{ 1, 2, 1, 1, 1, 1, 1, 1 }, (try statsOf(pool))[6..].*);
    try testing.expectEqual(0, buffer_pool.clear(pool));
    try testing.expectEqual([14]u64{ 1, 1, 9, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }, try statsOf(pool));
    try testing.expectEqual(0, buffer_pool.free(pool));
}

test "a pool that was freed lives as long as its buffers, and keeps nothing" {
    const reserved_before = reserved.total();
    const pool = try makePool();
    try testing.expectEqual(0, buffer_pool.prewarm(pool, 1024, 2));
    const buffer = try acquire(pool, 100_000);
    try testing.expectEqual(reserved_before + 2048 + (256 << 10), reserved.total());
    try testing.expectEqual(0, buffer_pool.free(pool));
    try expectStatus(.stale_handle, buffer_pool.acquire(pool, 1));
    try testing.expectEqual(reserved_before + (256 << 10), reserved.total());
    try testing.expectEqual(1, buffers.extend(buffer, bytes(&[_]f32{6}), 1));
    const copy: u32 = @intCast(buffers.clone(buffer));
    try testing.expectEqual(0, buffers.free(buffer));
    try testing.expectEqual(1, buffers.length(copy));
    try testing.expectEqual(reserved_before + (256 << 10), reserved.total());
    try testing.expectEqual(0, buffers.free(copy));
    try testing.expectEqual(reserved_before, reserved.total());
}

test "a buffer freed during a call lives until the call is over" {
    const pool = try makePool();
    const buffer = try acquire(pool, 1);
    const use = try handle.begin(.buffer, buffer);
    try testing.expectEqual(0, buffers.free(buffer));
    try testing.expectEqual(0, buffer_pool.free(pool));
    try use.target.extend(&.{ 1, 2 });
    try testing.expectEqualSlices(f32, &.{ 1, 2 }, use.target.items());
    use.end();
    try expectStatus(.stale_handle, buffers.length(buffer));
}

test "zero, stale and swapped handles are refused by every export, and nothing is written" {
    const pool = try makePool();
    defer _ = buffer_pool.free(pool);
    const buffer = try acquire(pool, 1);
    defer _ = buffers.free(buffer);
    const stale = try acquire(pool, 1);
    try testing.expectEqual(0, buffers.free(stale));
    const stale_pool = try makePool();
    try testing.expectEqual(0, buffer_pool.free(stale_pool));
    const before = try statsOf(pool);
    var stats = records.empty(StatsRecord);
    stats.hits = .from(7);
    const untouched = stats;
    for ([_]u32{ 0, stale, pool, stale_pool, buffer ^ 1 << 16, buffer | 7 << 28, 0x8000_0000, 0xffff_ffff }) |wrong| {
        try expectStatus(.stale_handle, buffers.free(wrong));
        try expectStatus(.stale_handle, buffers.clone(wrong));
        try expectStatus(.stale_handle, buffers.info(wrong, bytes(&stats), size(&stats)));
        try expectStatus(.stale_handle, buffers.length(wrong));
        try expectStatus(.stale_handle, buffers.extend(wrong, bytes(&stats), 1));
        try expectStatus(.stale_handle, buffers.clear(wrong));
    }
    for ([_]u32{ 0, stale, buffer, stale_pool, pool ^ 1 << 16, pool | 7 << 28, 0x8000_0000, 0xffff_ffff }) |wrong| {
        try expectStatus(.stale_handle, buffer_pool.free(wrong));
        try expectStatus(.stale_handle, buffer_pool.prewarm(wrong, 1024, 1));
        try expectStatus(.stale_handle, buffer_pool.prewarmAll(wrong, 1));
        try expectStatus(.stale_handle, buffer_pool.clear(wrong));
        try expectStatus(.stale_handle, buffer_pool.stats(wrong, bytes(&stats), size(&stats)));
        try expectStatus(.stale_handle, buffer_pool.acquire(wrong, 1));
    }
    try testing.expectEqual(untouched, stats);
    try testing.expectEqual(before, try statsOf(pool));
}

test "absurd sizes and counts, short and unknown records are refused, and nothing has changed" {
    const pool = try makePool();
    defer _ = buffer_pool.free(pool);
    const before = try statsOf(pool);
    for ([_]f64{ std.math.nan(f64), -1, -0.5, -std.math.inf(f64), std.math.inf(f64), 8589934589, 1e300 }) |byte_count| {
        try expectStatus(.invalid_size, buffer_pool.acquire(pool, byte_count));
    }
    for ([_]f64{ 64 << 20 | 1, 8589934588 }) |byte_count| try expectStatus(.out_of_memory, buffer_pool.acquire(pool, byte_count));
    for ([_]u32{ 0, 1, 1023, 1025, 32 << 20, 0xffff_ffff }) |class| {
        try expectStatus(.invalid_config, buffer_pool.prewarm(pool, class, 1));
    }
    for ([_]u32{ 3, 0x8000_0000, 0xffff_ffff }) |count| {
        try expectStatus(.invalid_config, buffer_pool.prewarm(pool, 1024, count));
        try expectStatus(.invalid_config, buffer_pool.prewarmAll(pool, count));
    }
    try testing.expectEqual(before, try statsOf(pool));

    var untouched = records.empty(StatsRecord);
    untouched.hits = .from(7);
    try expectStatus(.invalid_size, buffer_pool.stats(pool, null, size(&untouched)));
    untouched.size_bytes = 7;
    try expectStatus(.invalid_size, buffer_pool.stats(pool, bytes(&untouched), size(&untouched)));
    untouched.size_bytes = size(&untouched);
    try expectStatus(.invalid_size, buffer_pool.stats(pool, bytes(&untouched), size(&untouched) - 1));
    try testing.expectEqual(7, untouched.hits.value());

    try expectStatus(.invalid_size, buffer_pool.create(null, size(&two_each)));
    try expectStatus(.invalid_size, buffer_pool.create(bytes(&two_each), size(&two_each) - 1));
    const Longer = extern struct { known: buffer_pool.BufferPoolRecord, unknown: u32 };
    var longer: Longer = .{ .known = two_each, .unknown = 1 };
    longer.known.size_bytes = @sizeOf(Longer);
    try expectStatus(.unsupported, buffer_pool.create(bytes(&longer), @sizeOf(Longer)));
    // An absurd number of buffers to keep is no memory yet, and none that cannot be had is asked for.
    const many = records.sized(buffer_pool.BufferPoolRecord{ .buffers_per_class = 0xffff_ffff, .max_bytes = .{} });
    const endless: u32 = @intCast(buffer_pool.create(bytes(&many), size(&many)));
    try expectStatus(.out_of_memory, buffer_pool.prewarm(endless, 16 << 20, 0xffff_ffff));
    try expectStatus(.out_of_memory, buffer_pool.prewarmAll(endless, 0xffff_ffff));
    try testing.expectEqual(0, (try statsOf(endless))[5]);
    try testing.expectEqual(0, buffer_pool.free(endless));
}

test "extend takes what fits, from anywhere, and refuses the rest untouched" {
    const pool = try makePool();
    defer _ = buffer_pool.free(pool);
    const buffer = try acquire(pool, 1000.5); // 1001 bytes
    defer _ = buffers.free(buffer);
    const values: [257]f32 = @splat(3);
    try testing.expectEqual(0, buffers.extend(buffer, null, 0));
    try testing.expectEqual(2, buffers.extend(buffer, bytes(&values), 2));
    try expectStatus(.invalid_size, buffers.extend(buffer, null, 1));
    try expectStatus(.invalid_size, buffers.extend(buffer, bytes(&values), 255));
    try expectStatus(.invalid_size, buffers.extend(buffer, bytes(&values), 0x4000_0000));
    try expectStatus(.invalid_size, buffers.extend(buffer, bytes(&values), 0xffff_ffff));
    const info = try infoOf(buffer);
    try testing.expectEqual([_]u32{ 256, 2 }, [_]u32{ info.capacity, info.length });
    const floats: [*]f32 = @ptrFromInt(@as(usize, @intCast(info.address.value())));
    try testing.expectEqual(0, floats[2]);
    try testing.expectEqual(256, buffers.extend(buffer, bytes(&values) + 1, 254));
    try testing.expectEqual(256, buffers.extend(buffer, bytes(&values), 0));
    try expectStatus(.invalid_size, buffers.extend(buffer, bytes(floats), 1));
    var short = records.empty(buffers.BufferRecord);
    short.address = .from(9);
    try expectStatus(.invalid_size, buffers.info(buffer, bytes(&short), size(&short) - 1));
    try expectStatus(.invalid_size, buffers.info(buffer, null, size(&short)));
    try testing.expectEqual(9, short.address.value());
}

test "a buffer that gets no handle goes back to its pool" {
    const pool = try makePool();
    var words: std.ArrayList(u32) = .empty;
    defer words.deinit(testing.allocator);
    while (true) {
        const result = buffer_pool.acquire(pool, 1);
        if (result < 0) break try expectStatus(.out_of_memory, result);
        try words.append(testing.allocator, @intCast(result));
        if (words.items.len == 1 << 15) try testing.expectEqual(0, buffer_pool.prewarm(pool, 1024, 1));
    }
    // The limit of the pool would allow 65536 buffers of 1 KiB: what ran out are handles.
    try testing.expect(words.items.len > 60_000 and words.items.len < 65_536);
    const full = try statsOf(pool);
    try testing.expectEqual(words.items.len * 1024 + 1024, full[5]);
    try testing.expectEqual(1, full[6]);
    try expectStatus(.out_of_memory, buffers.clone(words.items[0]));
    try testing.expectEqual(full[5], (try statsOf(pool))[5]);
    for (words.items) |word| try testing.expectEqual(0, buffers.free(word));
    try testing.expectEqual(2, (try statsOf(pool))[6]);
    try testing.expectEqual(0, buffer_pool.free(pool));
}
