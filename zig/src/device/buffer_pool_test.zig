//! The buffer pool: its classes, what it counts and keeps, its limits, and every allocation that may fail.

const std = @import("std");
const Allocator = std.mem.Allocator;
const buffer_pool = @import("buffer_pool.zig");
const AlignedBuffer = buffer_pool.AlignedBuffer;
const BufferPool = buffer_pool.BufferPool;
const Options = buffer_pool.Options;
const buffer_bytes_max = buffer_pool.buffer_bytes_max;
const class_sizes = buffer_pool.class_sizes;
const testing = std.testing;

fn expectZero(buffer: AlignedBuffer) !void {
    try testing.expect(std.mem.allEqual(u8, buffer.memory, 0));
}

test "every class: the smallest that fits, 64-byte aligned, zero, kept and found again" {
    var pool: BufferPool = .init(testing.allocator, .{});
    defer pool.deinit();
    for (class_sizes, 0..) |class_bytes, class| {
        const least: u64 = if (class == 0) 0 else class_sizes[class - 1] + 1;
        for ([_]u64{ least, class_bytes - 1, class_bytes }, 0..) |bytes, round| {
            var buffer = try pool.acquire(bytes);
            try testing.expectEqual(class_bytes, buffer.memory.len);
            try testing.expectEqual(class_bytes / 4, buffer.capacity());
            try testing.expectEqual(buffer.capacity(), buffer.floats().len);
            try testing.expectEqual(0, buffer.items().len);
            try testing.expectEqual(0, @intFromPtr(buffer.memory.ptr) % 64);
            try expectZero(buffer);
            @memset(buffer.memory, 0x5a);
            buffer.deinit();
            try testing.expectEqual(1, pool.stats().free_buffers[class]);
            try testing.expectEqual(class + 1, pool.stats().misses);
            try testing.expectEqual(class * 2 + round, pool.stats().hits);
        }
    }
    const facts = pool.stats();
    try testing.expectEqual(@as([class_sizes.len]u32, @splat(1)), facts.free_buffers);
    try testing.expectEqual([_]u64{ 8, 24, 0 }, [_]u64{ facts.allocations, facts.returns, facts.drops });
    try testing.expectEqual(22_369_280, facts.reserved_bytes); // the sum of the classes
    try testing.expectEqual(22_369_280, facts.kept_bytes);
}

test "past the largest class a buffer has the size asked for, up to an element, and is not kept" {
    var pool: BufferPool = .init(testing.allocator, .{});
    defer pool.deinit();
    for ([_]u64{ 1, 4, 5, 1 << 20 }, [_]u64{ 4, 4, 8, 1 << 20 }, 1..) |more, expected, count| {
        var buffer = try pool.acquire((16 << 20) + more);
        try testing.expectEqual((16 << 20) + expected, buffer.memory.len);
        try testing.expectEqual(0, @intFromPtr(buffer.memory.ptr) % 64);
        try testing.expectEqual(buffer.memory.len, pool.stats().reserved_bytes);
        try expectZero(buffer);
        buffer.memory[buffer.memory.len - 1] = 1;
        buffer.deinit();
        const facts = pool.stats();
        try testing.expectEqual([_]u64{ count, count, 0, 0 }, [_]u64{ facts.misses, facts.drops, facts.hits, facts.returns });
        try testing.expectEqual(0, facts.reserved_bytes);
        try testing.expectEqual(@as([class_sizes.len]u32, @splat(0)), facts.free_buffers);
    }
    try testing.expectError(error.InvalidSize, pool.acquire(buffer_bytes_max + 1));
    try testing.expectError(error.InvalidSize, pool.acquire(std.math.maxInt(u64)));
    try testing.expectEqual(4, pool.stats().allocations);
}

test "32 buffers of a class are kept, or as many as the pool was told, and the rest is dropped" {
    inline for ([_]struct { options: Options, kept: u32 }{
        .{ .options = .{}, .kept = 32 },
        .{ .options = .{ .buffers_per_class = 3 }, .kept = 3 },
        .{ .options = .{ .buffers_per_class = 0 }, .kept = 0 },
    }) |case| {
        var pool: BufferPool = .init(testing.allocator, case.options);
        defer pool.deinit();
        var buffers: [34]AlignedBuffer = undefined;
        for (0..2) |round| {
            for (&buffers) |*buffer| buffer.* = try pool.acquire(1024);
            try testing.expectEqual(34 * 1024, pool.stats().reserved_bytes);
            for (&buffers) |*buffer| buffer.deinit();
            const facts = pool.stats();
            try testing.expectEqual(case.kept, facts.free_buffers[0]);
            try testing.expectEqual((round + 1) * case.kept, facts.returns);
            try testing.expectEqual((round + 1) * (34 - case.kept), facts.drops);
            try testing.expectEqual(round * case.kept, facts.hits);
            try testing.expectEqual((round + 1) * 34, facts.hits + facts.misses);
            try testing.expectEqual(facts.misses, facts.allocations);
            try testing.expectEqual(case.kept * 1024, facts.reserved_bytes);
        }
    }
}

test "a class has buffers of its own: the next one does not serve it" {
    var pool: BufferPool = .init(testing.allocator, .{});
    defer pool.deinit();
    var large = try pool.acquire(4096);
    large.deinit();
    var small = try pool.acquire(1024);
    defer small.deinit();
    try testing.expectEqual(1024, small.memory.len);
    try testing.expectEqual([_]u64{ 0, 2 }, [_]u64{ pool.stats().hits, pool.stats().misses });
}

test "the next owner sees zeros, whoever had the memory before" {
    var pool: BufferPool = .init(testing.allocator, .{});
    defer pool.deinit();
    var first = try pool.acquire(4096);
    const address = @intFromPtr(first.memory.ptr);
    @memset(first.memory, 0x5a);
    first.deinit();
    var second = try pool.acquire(2000);
    defer second.deinit();
    try testing.expectEqual(address, @intFromPtr(second.memory.ptr));
    try testing.expectEqual(0, second.len);
    try expectZero(second);
}

test "extend appends up to the capacity, clear starts over, a refusal changes nothing" {
    var pool: BufferPool = .init(testing.allocator, .{});
    defer pool.deinit();
    var buffer = try pool.acquire(1);
    defer buffer.deinit();
    try buffer.extend(&.{});
    try buffer.extend(&.{ 1, 2, 3 });
    try buffer.extend(&.{4});
    try testing.expectEqualSlices(f32, &.{ 1, 2, 3, 4 }, buffer.items());
    const many: [253]f32 = @splat(9);
    try testing.expectError(error.InvalidSize, buffer.extend(&many));
    try testing.expectEqualSlices(f32, &.{ 1, 2, 3, 4, 0 }, buffer.floats()[0..5]);
    try testing.expectEqual(4, buffer.len);
    try buffer.extend(many[1..]);
    try testing.expectEqual(256, buffer.len);
    try testing.expectEqual(9, buffer.items()[255]);
    try buffer.extend(&.{});
    try testing.expectError(error.InvalidSize, buffer.extend(&.{5}));
    buffer.clear();
    try testing.expectEqual(0, buffer.items().len);
    try testing.expectEqual(4, buffer.floats()[3]);
    // From an address that is no multiple of 4.
    var odd: [9]u8 = @splat(0);
    @memcpy(odd[1..5], std.mem.asBytes(&@as(f32, 7)));
    try buffer.extend(@as([*]align(1) const f32, @ptrCast(odd[1..]))[0..2]);
    try testing.expectEqualSlices(f32, &.{ 7, 0 }, buffer.items());
}

test "a buffer may be extended by a part of itself, and gets what was there before" {
    var pool: BufferPool = .init(testing.allocator, .{});
    defer pool.deinit();
    var buffer = try pool.acquire(1024);
    defer buffer.deinit();
    for (buffer.floats(), 0..) |*value, i| value.* = @floatFromInt(i);
    try buffer.extend(&.{ 50, 51 });
    try buffer.extend(buffer.floats()[0..5]); // over the elements 2 to 6 of itself
    try testing.expectEqualSlices(f32, &.{ 50, 51, 50, 51, 2, 3, 4, 7 }, buffer.floats()[0..8]);
    try testing.expectEqual(7, buffer.len);
    try buffer.extend(buffer.items());
    try testing.expectEqualSlices(f32, &.{ 50, 51, 50, 51, 2, 3, 4, 50, 51, 50, 51, 2, 3, 4 }, buffer.items());
}

test "a clone has the same bytes and length, and a life of its own" {
    var pool: BufferPool = .init(testing.allocator, .{});
    defer pool.deinit();
    for ([_]u64{ 100, (16 << 20) + 4 }) |bytes| {
        var buffer = try pool.acquire(bytes);
        try buffer.extend(&.{ 1, 2 });
        buffer.floats()[200] = 3;
        var copy = try buffer.clone();
        defer copy.deinit();
        try testing.expect(copy.memory.ptr != buffer.memory.ptr);
        try testing.expectEqualSlices(u8, buffer.memory, copy.memory);
        try testing.expectEqualSlices(f32, &.{ 1, 2 }, copy.items());
        buffer.floats()[0] = 9;
        buffer.deinit();
        try testing.expectEqual(1, copy.items()[0]);
    }
    try testing.expectEqual(4, pool.stats().misses);
}

test "prewarm makes so many free, is counted as neither hit nor return, and refuses what would not be kept" {
    var pool: BufferPool = .init(testing.allocator, .{ .buffers_per_class = 4, .bytes_max = 1 << 20 });
    defer pool.deinit();
    try pool.prewarm(4096, 3);
    try pool.prewarm(4096, 2);
    try pool.prewarm(4096, 0);
    var facts = pool.stats();
    try testing.expectEqual([_]u32{ 0, 3, 0, 0, 0, 0, 0, 0 }, facts.free_buffers);
    try testing.expectEqual([_]u64{ 3, 0, 0, 0, 0 }, [_]u64{ facts.allocations, facts.hits, facts.misses, facts.returns, facts.drops });
    try testing.expectError(error.InvalidConfig, pool.prewarm(4096, 5));
    for ([_]u64{ 0, 1023, 1025, (16 << 20) + 1, std.math.maxInt(u64) }) |bytes| {
        try testing.expectError(error.InvalidConfig, pool.prewarm(bytes, 1));
    }
    var buffers: [4]AlignedBuffer = undefined;
    for (&buffers) |*buffer| buffer.* = try pool.acquire(4096);
    try testing.expectEqual([_]u64{ 3, 1 }, [_]u64{ pool.stats().hits, pool.stats().misses });
    try pool.prewarm(4096, 2); // free ones are counted, not those in use
    try testing.expectEqual(2, pool.stats().free_buffers[1]);
    for (&buffers) |*buffer| buffer.deinit();
    facts = pool.stats();
    try testing.expectEqual([_]u64{ 4, 2, 2 }, [_]u64{ facts.free_buffers[1], facts.returns, facts.drops });
}

test "prewarmAll makes all classes ready, or none" {
    var pool: BufferPool = .init(testing.allocator, .{ .bytes_max = 60 << 20 });
    defer pool.deinit();
    try pool.prewarmAll(1);
    try pool.prewarmAll(2);
    const facts = pool.stats();
    try testing.expectEqual(@as([class_sizes.len]u32, @splat(2)), facts.free_buffers);
    try testing.expectEqual([_]u64{ 16, 2 * 22_369_280 }, [_]u64{ facts.allocations, facts.reserved_bytes });
    try testing.expectError(error.OutOfMemory, pool.prewarmAll(3));
    try testing.expectError(error.InvalidConfig, pool.prewarmAll(33));
    try testing.expectEqual(facts, pool.stats());
}

test "the limit counts what is in use and what is kept" {
    var pool: BufferPool = .init(testing.allocator, .{ .bytes_max = 10_000 });
    defer pool.deinit();
    var first = try pool.acquire(4096);
    var second = try pool.acquire(4096);
    try testing.expectError(error.OutOfMemory, pool.acquire(4096));
    try testing.expectError(error.OutOfMemory, first.clone());
    try testing.expectError(error.OutOfMemory, pool.acquire(17 << 20));
    second.deinit();
    try testing.expectError(error.OutOfMemory, pool.acquire(16 << 10));
    try testing.expectError(error.OutOfMemory, pool.prewarm(1024, 3));
    try pool.prewarm(1024, 1);
    try testing.expectEqual([_]u64{ 9216, 5120 }, [_]u64{ pool.stats().reserved_bytes, pool.stats().kept_bytes });
    pool.clear();
    try testing.expectEqual(4096, pool.stats().reserved_bytes);
    first.deinit();
}

test "clear gives back what is kept, and close keeps nothing more" {
    var pool: BufferPool = .init(testing.allocator, .{});
    defer pool.deinit();
    try pool.prewarm(1024, 8);
    var buffer = try pool.acquire(1024);
    pool.clear();
    var facts = pool.stats();
    try testing.expectEqual([_]u64{ 0, 1024, 8, 0 }, [_]u64{ facts.free_buffers[0], facts.reserved_bytes, facts.allocations, facts.drops });
    buffer.deinit();
    try testing.expectEqual(1, pool.stats().free_buffers[0]);
    buffer = try pool.acquire(1024);
    pool.close();
    var copy = try buffer.clone();
    buffer.deinit();
    copy.deinit();
    facts = pool.stats();
    try testing.expectEqual([_]u64{ 0, 0, 2 }, [_]u64{ facts.free_buffers[0], facts.reserved_bytes, facts.drops });
}

/// Remembers how everything was allocated; freeing it otherwise fails the test.
const CheckingAllocator = struct {
    live: std.AutoHashMapUnmanaged([*]u8, struct { len: usize, alignment: std.mem.Alignment }) = .empty,
    mismatch_count: u32 = 0,

    const vtable: Allocator.VTable = .{ .alloc = alloc, .resize = Allocator.noResize, .remap = Allocator.noRemap, .free = free };

    fn allocator(checking: *CheckingAllocator) Allocator {
        return .{ .ptr = checking, .vtable = &vtable };
    }

    fn alloc(context: *anyopaque, len: usize, asked: std.mem.Alignment, address: usize) ?[*]u8 {
        const checking: *CheckingAllocator = @ptrCast(@alignCast(context));
        const pointer = testing.allocator.rawAlloc(len, asked, address) orelse return null;
        checking.live.put(testing.allocator, pointer, .{ .len = len, .alignment = asked }) catch @panic("out of memory");
        return pointer;
    }

    fn free(context: *anyopaque, memory: []u8, given: std.mem.Alignment, address: usize) void {
        const checking: *CheckingAllocator = @ptrCast(@alignCast(context));
        const known = checking.live.fetchRemove(memory.ptr) orelse @panic("freed what is not allocated");
        if (known.value.len != memory.len or known.value.alignment != given) checking.mismatch_count += 1;
        testing.allocator.rawFree(memory.ptr[0..known.value.len], known.value.alignment, address);
    }
};

test "memory is freed with the length and the alignment it was allocated with" {
    var checking: CheckingAllocator = .{};
    defer checking.live.deinit(testing.allocator);
    {
        var pool: BufferPool = .init(checking.allocator(), .{ .buffers_per_class = 1 });
        defer pool.deinit();
        try pool.prewarmAll(1);
        for (class_sizes ++ [_]u32{ class_sizes[class_sizes.len - 1] + 5, 1 }) |bytes| {
            var first = try pool.acquire(bytes);
            var second = try first.clone();
            const alignments = [_]std.mem.Alignment{ .@"64", .@"64" };
            try testing.expectEqual(alignments, [_]std.mem.Alignment{
                checking.live.get(first.memory.ptr).?.alignment,
                checking.live.get(second.memory.ptr).?.alignment,
            });
            first.deinit();
            second.deinit();
        }
        pool.clear();
        try pool.prewarm(1024, 1);
    }
    try testing.expectEqual(0, checking.live.count());
    try testing.expectEqual(0, checking.mismatch_count);
}

test "every allocation may fail, and nothing has changed" {
    var fail_index: usize = 0;
    while (true) : (fail_index += 1) {
        var failing: testing.FailingAllocator = .init(testing.allocator, .{ .fail_index = fail_index });
        var pool: BufferPool = .init(failing.allocator(), .{ .buffers_per_class = 9 });
        defer pool.deinit();
        var held: [9]AlignedBuffer = undefined;
        var held_count: usize = 0;
        defer for (held[0..held_count]) |*buffer| buffer.deinit();
        for (0..5) |step| {
            const before = pool.stats();
            const done: (BufferPool.AcquireError || BufferPool.PrewarmError)!void = switch (step) {
                0, 1 => if (pool.acquire(if (step == 0) 1000 else 17 << 20)) |buffer| {
                    held[held_count] = buffer;
                    held_count += 1;
                } else |err| err,
                2 => pool.prewarm(1024, 9),
                3 => pool.prewarmAll(2),
                else => if (held_count == 0) {} else if (held[held_count - 1].clone()) |buffer| {
                    held[held_count] = buffer;
                    held_count += 1;
                } else |err| err,
            };
            done catch |err| {
                try testing.expectEqual(error.OutOfMemory, err);
                try testing.expectEqual(before, pool.stats());
            };
        }
        if (!failing.has_induced_failure) break;
    }
    // A list and a buffer, a large buffer; 9 buffers; a list and 2 buffers for each of 7 classes; a clone.
    try testing.expect(fail_index >= 3 + 9 + 7 * 3 + 1);
}

const ThreadFacts = struct { pool: *BufferPool, mark: u8, failure_count: u32 = 0 };

fn useBuffers(facts: *ThreadFacts) void {
    for (0..500) |round| {
        var buffers: [3]AlignedBuffer = undefined;
        for (&buffers, 0..) |*buffer, i| {
            buffer.* = facts.pool.acquire(class_sizes[(round + i) % 3]) catch unreachable; // there is memory for that
            if (!std.mem.allEqual(u8, buffer.memory, 0)) facts.failure_count += 1;
            @memset(buffer.memory, facts.mark);
        }
        if (round % 50 == 0) facts.pool.clear();
        for (&buffers) |*buffer| {
            if (!std.mem.allEqual(u8, buffer.memory, facts.mark)) facts.failure_count += 1;
            buffer.deinit();
        }
    }
}

test "threads share a pool, and no buffer" {
    var pool: BufferPool = .init(testing.allocator, .{ .buffers_per_class = 2 });
    defer pool.deinit();
    var facts: [4]ThreadFacts = undefined;
    var threads: [4]std.Thread = undefined;
    for (&facts, &threads, 1..) |*fact, *thread, mark| {
        fact.* = .{ .pool = &pool, .mark = @intCast(mark) };
        thread.* = try std.Thread.spawn(.{}, useBuffers, .{fact});
    }
    for (threads) |thread| thread.join();
    for (facts) |fact| try testing.expectEqual(0, fact.failure_count);
    const totals = pool.stats();
    try testing.expectEqual(4 * 500 * 3, totals.hits + totals.misses);
    try testing.expectEqual(4 * 500 * 3, totals.returns + totals.drops);
    try testing.expectEqual(totals.misses, totals.allocations);
}
