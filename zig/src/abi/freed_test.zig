//! Objects that are freed while another thread is in a call that makes a part of them, or something on them.

const std = @import("std");
const testing = std.testing;
const buffers = @import("aligned_buffer.zig");
const buffer_pool = @import("buffer_pool.zig");
const handle = @import("handle.zig");
const paged = @import("paged.zig");
const pool = @import("pool.zig");
const reserved = @import("../device/reserved.zig");
const records = @import("test_records.zig");
const bytes = records.bytes;
const size = records.size;
const sequences = @import("sequence.zig");
const status = @import("status.zig");

const stale = @intFromEnum(status.Status.stale_handle);

/// What lives: caches that have a handle, and bytes.
fn held() struct { u32, u64 } {
    return .{ handle.liveCacheCount(), reserved.total() };
}

fn live(word: i32) !u32 {
    return std.math.cast(u32, word) orelse error.Refused;
}

/// A pool for one layer of a head of 8, in blocks of 2 rows.
fn makePool() !u32 {
    var pool_options = records.poolOf(1, 1, 8, 2, 1 << 20);
    pool_options.dtype_k = records.f16_word;
    pool_options.dtype_v = records.f16_word;
    return live(pool.create(bytes(&pool_options), size(&pool_options)));
}

/// A cache for it, which it is on; 0 for one with a pool of its own.
fn makeCache(pool_word: u32) !u32 {
    return live(createCache(pool_word));
}

fn createCache(pool_word: u32) i32 {
    var options = records.pagedOf(1, 2, 64);
    options.dtype_k = records.f16_word;
    options.dtype_v = records.f16_word;
    options.pool = pool_word;
    const layer = records.layerOf(1, 8);
    return paged.create(bytes(&options), size(&options), bytes(&layer), size(&layer));
}

/// Three rows: two blocks.
fn fill(sequence: u32) i32 {
    const rows: [24]f32 = @splat(1);
    const start = sequences.append(sequence, 0, 0, bytes(&rows), 24, bytes(&rows), 24, 0, 0, 0, null, 0);
    return if (start < 0) start else sequences.commit(sequence, 0, 3);
}

fn usedBlocks(pool_word: u32) !u32 {
    var stats = records.empty(pool.StatsRecord);
    try testing.expectEqual(0, pool.stats(pool_word, records.f16_word, records.f16_word, bytes(&stats), size(&stats)));
    return stats.used_blocks;
}

/// What `call(word)` gives in another thread when the object it works on is freed after the call has begun.
fn freedMeanwhile(comptime kind: handle.Kind, word: u32, call: *const fn (u32) i32, free_word: u32, free: *const fn (u32) callconv(.c) i32) !i32 {
    const use = try handle.begin(kind, word);
    const references = @atomicLoad(u32, &use.object.references, .seq_cst);
    var answer: i32 = 0;
    const Caller = struct {
        fn run(to: *i32, body: *const fn (u32) i32, argument: u32) void {
            to.* = body(argument);
        }
    };
    const thread = try std.Thread.spawn(.{}, Caller.run, .{ &answer, call, word });
    // It holds a reference now and waits for the lock, which is ours.
    while (@atomicLoad(u32, &use.object.references, .seq_cst) == references) std.Thread.yield() catch {};
    const freed = free(free_word);
    use.end();
    thread.join();
    try testing.expectEqual(0, freed);
    return answer;
}

fn acquireOne(word: u32) i32 {
    return buffer_pool.acquire(word, 100);
}

fn createSequence(word: u32) i32 {
    return sequences.create(word);
}

fn fork(word: u32) i32 {
    return sequences.fork(word);
}

fn clone(word: u32) i32 {
    return buffers.clone(word);
}

test "a cache that is freed during sequence() or fork() takes no sequence, and its pool is empty" {
    const before = held();
    const pool_word = try makePool();
    for ([_]bool{ true, false }) |forks| {
        const cache = try makeCache(pool_word);
        const sequence = try live(sequences.create(cache));
        try testing.expectEqual(0, fill(sequence));
        try testing.expectEqual(2, try usedBlocks(pool_word));
        try testing.expectEqual(stale, if (forks)
            try freedMeanwhile(.sequence, sequence, fork, cache, paged.free)
        else
            try freedMeanwhile(.paged, cache, createSequence, cache, paged.free));
        try testing.expectEqual(0, try usedBlocks(pool_word));
        try testing.expectEqual(stale, sequences.seqLen(sequence, 0));
    }
    try testing.expectEqual(0, pool.free(pool_word));
    try testing.expectEqual(before, held());
}

test "a buffer pool or a buffer that is freed meanwhile gives no buffer" {
    const before = held();
    const options = records.sized(buffer_pool.BufferPoolRecord{ .buffers_per_class = 2, .max_bytes = .from(1 << 20) });
    const first = try live(buffer_pool.create(bytes(&options), size(&options)));
    const buffer = try live(buffer_pool.acquire(first, 100));
    try testing.expectEqual(stale, try freedMeanwhile(.buffer, buffer, clone, buffer, buffers.free));
    // `free` itself takes the pool's lock first, so here it is only its handle that goes.
    const FreeHandle = struct {
        fn free(word: u32) callconv(.c) i32 {
            return status.word(handle.free(.buffer_pool, word));
        }
    };
    try testing.expectEqual(stale, try freedMeanwhile(.buffer_pool, first, acquireOne, first, FreeHandle.free));
    try testing.expectEqual(before, held());
}

test "a pool that was freed while a cache on it is being made has no cache" {
    const before = held();
    const pool_word = try makePool();
    const object = try handle.retain(.pool, pool_word);
    var cache: @import("../cache/paged/cache.zig").PagedCache = try .init(testing.allocator, .{
        .layers = &.{.{ .kv_head_count = 1, .head_dim = 8 }},
        .block_size = 2,
        .max_seq_len = 8,
        .pool = &object.body.pool,
    });
    try testing.expectEqual(0, pool.free(pool_word));
    const body: handle.Object.Body = .{ .paged = .{ .cache = cache, .pool = object } };
    try testing.expectError(error.StaleHandle, handle.create(.paged, body, object));
    cache.deinit();
    handle.release(object);
    try testing.expectEqual(before, held());
}

test "a sequence tells its cache, as long as both are there" {
    const cache = try makeCache(0);
    const other = try makeCache(0);
    const first = try live(sequences.create(cache));
    const child = try live(sequences.fork(first));
    const stranger = try live(sequences.create(other));
    for ([_]u32{ first, child }) |word| try testing.expectEqual(cache, try live(sequences.cacheOf(word)));
    try testing.expectEqual(other, try live(sequences.cacheOf(stranger)));
    for ([_]u32{ 0, cache, first ^ 1 << 16 }) |wrong| try testing.expectEqual(stale, sequences.cacheOf(wrong));
    try testing.expectEqual(0, sequences.free(first));
    try testing.expectEqual(stale, sequences.cacheOf(first));
    try testing.expectEqual(cache, try live(sequences.cacheOf(child)));
    try testing.expectEqual(0, paged.free(cache));
    try testing.expectEqual(stale, sequences.cacheOf(child));
    try testing.expectEqual(0, paged.free(other));
}

test "reset frees the sequences of a cache, whoever made them, but those that are to stay" {
    const before = held();
    const pool_word = try makePool();
    const cache = try makeCache(pool_word);
    var made: [5]u32 = undefined;
    for (&made) |*word| {
        word.* = try live(sequences.create(cache));
        try testing.expectEqual(0, fill(word.*));
    }
    const shared = try live(sequences.fork(made[1]));
    try testing.expectEqual(10, try usedBlocks(pool_word));
    // One that is no sequence of this cache: nothing has changed.
    const other = try makeCache(pool_word);
    const stranger = try live(sequences.create(other));
    for ([_]u32{ stranger, cache, 0, made[0] ^ 1 << 16 }) |wrong| {
        try testing.expectEqual(stale, paged.reset(cache, bytes(&[_]u32{ made[0], wrong }), 2));
    }
    try testing.expectEqual(10, try usedBlocks(pool_word));
    try testing.expectEqual(3, sequences.seqLen(shared, 0));
    try testing.expectEqual(0, paged.reset(cache, bytes(&[_]u32{ made[3], made[1], made[3] }), 3));
    try testing.expectEqual(0, try usedBlocks(pool_word));
    for (made, [_]i32{ stale, 0, stale, 0, stale }) |word, expected| {
        try testing.expectEqual(expected, sequences.seqLen(word, 0));
    }
    try testing.expectEqual(stale, sequences.seqLen(shared, 0));
    try testing.expectEqual(stale, sequences.free(made[0]));
    try testing.expectEqual(0, sequences.seqLen(stranger, 0));
    // Those that stayed can be written to, and a reset that keeps none takes them, too.
    try testing.expectEqual(0, fill(made[3]));
    try testing.expectEqual(2, try usedBlocks(pool_word));
    try testing.expectEqual(0, paged.reset(cache, null, 0));
    try testing.expectEqual(0, try usedBlocks(pool_word));
    try testing.expectEqual(stale, sequences.seqLen(made[3], 0));
    try testing.expectEqual(0, paged.free(cache));
    try testing.expectEqual(stale, paged.reset(cache, null, 0));
    try testing.expectEqual(0, paged.free(other));
    try testing.expectEqual(0, pool.free(pool_word));
    try testing.expectEqual(before, held());
}

/// Makes and frees sequences of a cache until it is gone.
fn hammer(cache: u32, failures: *std.atomic.Value(u32)) void {
    const first = live(sequences.create(cache)) catch return;
    if (fill(first) != 0) return; // freed in between
    while (true) {
        for ([_]i32{ sequences.create(cache), sequences.fork(first) }) |word| {
            if (word == stale) return;
            const sequence = live(word) catch {
                _ = failures.fetchAdd(1, .monotonic);
                return;
            };
            const freed = sequences.free(sequence);
            if (freed != 0 and freed != stale) _ = failures.fetchAdd(1, .monotonic);
        }
    }
}

test "whoever frees a cache under the hands of others leaves its pool empty" {
    const before = held();
    const pool_word = try makePool();
    var failures: std.atomic.Value(u32) = .init(0);
    for (0..100) |round| {
        const cache = try makeCache(pool_word);
        var threads: [2]std.Thread = undefined;
        for (&threads) |*thread| thread.* = try std.Thread.spawn(.{}, hammer, .{ cache, &failures });
        for (0..round % 10) |_| std.Thread.yield() catch {};
        try testing.expectEqual(0, paged.free(cache));
        for (threads) |thread| thread.join();
        try testing.expectEqual(0, try usedBlocks(pool_word));
        try testing.expectEqual(0, paged.free(try live(createCache(pool_word))));
    }
    try testing.expectEqual(0, failures.load(.monotonic));
    try testing.expectEqual(0, pool.free(pool_word));
    try testing.expectEqual(stale, createCache(pool_word));
    try testing.expectEqual(before, held());
}
