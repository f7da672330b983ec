//! One call at a time uses an object: a second one waits for its lock.

const std = @import("std");
const testing = std.testing;
const buffers = @import("aligned_buffer.zig");
const buffer_pool = @import("buffer_pool.zig");
const contiguous = @import("contiguous.zig");
const handle = @import("handle.zig");
const memcheck = @import("build_options").memcheck;
const paged = @import("paged.zig");
const pool = @import("pool.zig");
const records = @import("test_records.zig");
const bytes = records.bytes;
const size = records.size;
const sequences = @import("sequence.zig");
const status = @import("status.zig");

/// A call in a thread of its own.
const Call = struct {
    body: *const fn (u32) i32,
    word: u32,
    answer: i32 = 0,
    is_done: std.atomic.Value(bool) = .init(false),

    fn run(call: *Call) void {
        call.answer = call.body(call.word);
        call.is_done.store(true, .seq_cst);
    }
};

/// Makes a call while the object is used here. It must come to wait for the lock, which the lock itself tells, whenever the
/// other thread gets a core; it must not be done before that.
fn expectWaits(comptime kind: handle.Kind, word: u32, body: *const fn (u32) i32) !void {
    const use = try handle.begin(kind, word);
    var call: Call = .{ .body = body, .word = word };
    const thread = try std.Thread.spawn(.{}, Call.run, .{&call});
    const waited = while (!call.is_done.load(.seq_cst)) {
        if (use.object.lock.state.load(.seq_cst) == .contended) break true;
        std.Thread.yield() catch {};
    } else false;
    const was_done = call.is_done.load(.seq_cst);
    use.end();
    thread.join();
    try testing.expect(waited and !was_done);
    try testing.expect(call.answer >= 0);
}

fn contiguousCommit(word: u32) i32 {
    return sequences.commit(word, 0, 0);
}

fn contiguousAppend(word: u32) i32 {
    const row: [4]f32 = @splat(1);
    return sequences.append(word, 0, 0, bytes(&row), 4, bytes(&row), 4, 0, 0, 0, null, 0);
}

fn sequenceCreate(word: u32) i32 {
    return sequences.create(word);
}

fn sequenceAppend(word: u32) i32 {
    const row: [4]f32 = @splat(1);
    return sequences.append(word, 0, 0, bytes(&row), 4, bytes(&row), 4, 0, 0, 0, null, 0);
}

fn sequenceLength(word: u32) i32 {
    return sequences.seqLen(word, 0);
}

fn poolPrewarm(word: u32) i32 {
    return pool.prewarm(word, 2, 0, 0);
}

fn bufferAcquire(word: u32) i32 {
    return buffer_pool.acquire(word, 100);
}

fn bufferExtend(word: u32) i32 {
    const values: [3]f32 = @splat(1);
    return buffers.extend(word, bytes(&values), 3);
}

/// Keeps a buffer of one class ready.
fn bufferPrewarm(word: u32) i32 {
    return buffer_pool.prewarm(word, 1 << 10, 1);
}

fn bufferPoolFree(word: u32) i32 {
    return buffer_pool.free(word);
}

test "a call that waits for a buffer pool while it is freed finds it open or gone" {
    if (memcheck) return error.SkipZigTest; // one thread at a time runs there
    const stale = @intFromEnum(status.Status.stale_handle);
    for (0..200) |_| {
        const word: u32 = @intCast(buffer_pool.create(bytes(&[_]u32{ 16, 2, 1 << 20, 0 }), 16));
        var calls = [_]Call{ .{ .body = bufferPrewarm, .word = word }, .{ .body = bufferPoolFree, .word = word } };
        var threads: [2]std.Thread = undefined;
        // Both wait for this lock, and which one gets it first is a matter of luck.
        const use = try handle.begin(.buffer_pool, word);
        for (&threads, &calls) |*thread, *call| thread.* = try std.Thread.spawn(.{}, Call.run, .{call});
        while (use.object.lock.state.load(.seq_cst) != .contended) std.Thread.yield() catch {};
        use.end();
        for (threads) |thread| thread.join();
        try testing.expect(calls[0].answer == 0 or calls[0].answer == stale);
        try testing.expectEqual(0, calls[1].answer);
    }
}

test "a call on an object waits until the one before it is over" {
    if (memcheck) return error.SkipZigTest; // one thread at a time runs there
    const flat_options = records.contiguousOf(1, 1, 4, 8);
    const flat: u32 = @intCast(contiguous.create(bytes(&flat_options), size(&flat_options)));
    const options = records.pagedOf(1, 2, 8);
    const layer = records.layerOf(1, 4);
    const cache: u32 = @intCast(paged.create(bytes(&options), size(&options), bytes(&layer), size(&layer)));
    const sequence: u32 = @intCast(sequences.create(cache));
    const blocks: u32 = @intCast(pool.create(bytes(&[_]u32{ 36, 1, 1, 4, 2, 0, 0, 1 << 20, 0 }), 36));
    const buffer_source: u32 = @intCast(buffer_pool.create(bytes(&[_]u32{ 16, 2, 1 << 20, 0 }), 16));
    const buffer: u32 = @intCast(buffer_pool.acquire(buffer_source, 100));

    try expectWaits(.contiguous, flat, contiguousCommit);
    try expectWaits(.contiguous, flat, contiguousAppend);
    try expectWaits(.paged, cache, sequenceCreate);
    try expectWaits(.sequence, sequence, sequenceAppend);
    try expectWaits(.sequence, sequence, sequenceLength);
    try expectWaits(.pool, blocks, poolPrewarm);
    try expectWaits(.buffer_pool, buffer_source, bufferAcquire);
    try expectWaits(.buffer, buffer, bufferExtend);

    try testing.expectEqual(0, contiguous.free(flat));
    try testing.expectEqual(0, paged.free(cache));
    try testing.expectEqual(0, pool.free(blocks));
    try testing.expectEqual(0, buffers.free(buffer));
    try testing.expectEqual(0, buffer_pool.free(buffer_source));
}
