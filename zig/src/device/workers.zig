//! Threads that share the items of a job with the thread that asks for it.
//!
//! A job is a function and a number of items; whoever is free takes the next one. The thread that asks takes part, and when
//! its call returns every item is done. Which thread did which item shows nowhere: an item writes what is its alone.
//!
//!     caller    job = ..., epoch += 1, wake | items | job = null | wait until nobody is active
//!     worker    sleeps on epoch ...         | active += 1, items, active -= 1 | sleeps
//!
//! Workers are started with the first job that can use them and stay for the life of the process. Between two jobs that
//! follow each other within some microseconds, as the layers of a model do, they look for the next one; then they sleep.
//! One caller has them at a time: another one does its work alone.
//!
//! They touch native memory only: an item must not read or write what belongs to a runtime.

const std = @import("std");
const builtin = @import("builtin");
const assert = std.debug.assert;
const cpu = @import("cpu.zig");
const memcheck = @import("build_options").memcheck;

/// More threads than this help nobody: memory is the limit long before.
pub const thread_count_max = 256;

/// Looks at the epoch before a worker goes to sleep, and at the active ones before a caller does; a look with its pause
/// takes 10 to 40 ns.
const looks_before_sleep = 1000;

/// Only what is used of it takes memory. The C library puts a program's thread-local variables there, too, and refuses a
/// thread whose stack they fill.
const stack_bytes = 8 << 20;

const Job = struct {
    context: *const anyopaque,
    run: *const fn (context: *const anyopaque, item: u32) void,
    item_count: u32,
    /// Workers that may take part; there may be more of them, for another caller.
    helper_count: u32,
    next: std.atomic.Value(u32) = .init(0),

    fn work(job: *Job) void {
        while (true) {
            const item = job.next.fetchAdd(1, .monotonic);
            if (item >= job.item_count) return;
            job.run(job.context, item);
        }
    }
};

/// The workers of the process.
var pool: struct {
    /// Held by the caller whose session it is.
    lock: std.Io.Mutex = .init,
    job: std.atomic.Value(?*Job) = .init(null),
    epoch: std.atomic.Value(u32) = .init(0),
    active: std.atomic.Value(u32) = .init(0),
    /// Workers that sleep on the epoch.
    asleep: std.atomic.Value(u32) = .init(0),
    started_count: u32 = 0,
    scratch: []align(64) u8 = &.{},
} = .{};

/// Threads of a job that this thread asks for, its own included; 0 where it did not say. It belongs to the thread, so that
/// one that uses the library beside another changes nothing for it.
threadlocal var wanted_count: u32 = 0;

/// Threads of a job where the caller did not say; 0 before the first use.
var default_count: std.atomic.Value(u32) = .init(0);

/// Threads that a job of the calling thread may use, its own included: the physical cores this process may use, unless
/// `setThreadCount` said otherwise.
pub fn threadCount() u32 {
    if (wanted_count != 0) return wanted_count;
    const known = default_count.load(.monotonic);
    if (known != 0) return known;
    // Valgrind runs one thread at a time, and looking for work would be most of what it runs.
    const count = if (memcheck) 1 else @min(cpu.coreCount(), thread_count_max);
    default_count.store(count, .monotonic);
    return count;
}

/// For the jobs of the calling thread, from the next one on. No result depends on it.
pub fn setThreadCount(count: u32) error{InvalidConfig}!void {
    if (count == 0 or count > thread_count_max) return error.InvalidConfig;
    wanted_count = count;
}

/// The workers, taken by one caller. To be ended by it.
pub const Session = struct {
    /// Native memory for what the items of a job read and write, kept from session to session; null when there is none.
    pub fn scratch(_: Session, byte_count: usize) ?[]align(64) u8 {
        if (pool.scratch.len < byte_count) {
            std.heap.c_allocator.free(pool.scratch);
            pool.scratch = &.{};
            pool.scratch = std.heap.c_allocator.alignedAlloc(u8, .@"64", byte_count) catch return null;
        }
        return pool.scratch;
    }

    /// Runs `body(context, item)` for every item below `item_count`, each once, on up to `threadCount` threads.
    pub fn run(
        _: Session,
        comptime Context: type,
        context: *const Context,
        item_count: u32,
        comptime body: fn (*const Context, u32) void,
    ) void {
        const erased = struct {
            fn run(pointer: *const anyopaque, item: u32) void {
                body(@ptrCast(@alignCast(pointer)), item);
            }
        };
        const helper_count = @min(threadCount(), item_count) -| 1;
        var job: Job = .{
            .context = context,
            .run = erased.run,
            .item_count = item_count,
            .helper_count = helper_count,
        };
        if (helper_count == 0) return job.work();
        start(helper_count);
        pool.job.store(&job, .seq_cst);
        _ = pool.epoch.fetchAdd(1, .seq_cst);
        if (pool.asleep.load(.seq_cst) != 0) cpu.io().futexWake(u32, &pool.epoch.raw, pool.started_count);
        job.work();
        // Whoever is active from here on has the job or sees that there is none.
        pool.job.store(null, .seq_cst);
        waitForHelpers();
    }

    pub fn end(_: Session) void {
        pool.lock.unlock(cpu.io());
    }
};

/// The workers, or null when another caller has them.
pub fn begin() ?Session {
    return if (pool.lock.tryLock()) .{} else null;
}

fn waitForHelpers() void {
    var looks: u32 = 0;
    while (true) : (looks += 1) {
        const active = pool.active.load(.seq_cst);
        if (active == 0) return;
        if (looks < looks_before_sleep) {
            std.atomic.spinLoopHint();
        } else {
            cpu.io().futexWaitUncancelable(u32, &pool.active.raw, active);
        }
    }
}

/// Makes sure that there are as many workers, or as many as the system allows.
fn start(helper_count: u32) void {
    while (pool.started_count < helper_count) {
        const thread = std.Thread.spawn(.{ .stack_size = stack_bytes }, worker, .{pool.started_count}) catch return;
        thread.detach();
        pool.started_count += 1;
    }
}

fn worker(index: u32) void {
    var seen = pool.epoch.load(.seq_cst) -% 1; // the job it was started for may have begun
    while (true) {
        seen = nextEpoch(seen);
        _ = pool.active.fetchAdd(1, .seq_cst);
        if (pool.job.load(.seq_cst)) |job| if (index < job.helper_count) job.work();
        if (pool.active.fetchSub(1, .seq_cst) == 1) cpu.io().futexWake(u32, &pool.active.raw, 1);
    }
}

/// Waits for an epoch other than `seen`.
fn nextEpoch(seen: u32) u32 {
    for (0..looks_before_sleep) |_| {
        const now = pool.epoch.load(.seq_cst);
        if (now != seen) return now;
        std.atomic.spinLoopHint();
    }
    _ = pool.asleep.fetchAdd(1, .seq_cst);
    defer _ = pool.asleep.fetchSub(1, .seq_cst);
    while (true) {
        const now = pool.epoch.load(.seq_cst);
        if (now != seen) return now;
        cpu.io().futexWaitUncancelable(u32, &pool.epoch.raw, seen);
    }
}

const testing = std.testing;

const Tally = struct {
    counts: []std.atomic.Value(u32),

    fn count(tally: *const Tally, item: u32) void {
        var noise: u32 = item;
        for (0..100) |_| noise = noise *% 1664525 +% 1013904223;
        std.mem.doNotOptimizeAway(noise);
        _ = tally.counts[item].fetchAdd(1, .monotonic);
    }
};

test "every item is done once, by however many threads" {
    if (memcheck) return error.SkipZigTest; // one thread at a time runs there
    const before = threadCount();
    defer setThreadCount(before) catch unreachable;
    var counts: [1000]std.atomic.Value(u32) = undefined;
    for ([_]u32{ 1, 2, 3, 8 }) |threads| {
        try setThreadCount(threads);
        for (0..200) |round| {
            const item_count = round * 5;
            for (&counts) |*count| count.* = .init(0);
            const session = begin().?;
            defer session.end();
            session.run(Tally, &.{ .counts = &counts }, @intCast(item_count), Tally.count);
            for (counts[0..item_count]) |count| try testing.expectEqual(1, count.raw);
            for (counts[item_count..]) |count| try testing.expectEqual(0, count.raw);
        }
    }
    try testing.expectError(error.InvalidConfig, setThreadCount(0));
    try testing.expectError(error.InvalidConfig, setThreadCount(thread_count_max + 1));
}

/// Which threads did an item.
const Presence = struct {
    ids: [thread_count_max]std.atomic.Value(std.Thread.Id) = @splat(.init(0)),

    fn note(presence: *const Presence, _: u32) void {
        const id = std.Thread.getCurrentId();
        // Long enough that whoever may take part does.
        for (0..2000) |_| std.atomic.spinLoopHint();
        for (@constCast(&presence.ids)) |*slot| {
            const before = slot.cmpxchgStrong(0, id, .monotonic, .monotonic) orelse return;
            if (before == id) return;
        }
    }

    fn count(presence: *const Presence) usize {
        var used: usize = 0;
        for (presence.ids) |slot| used += @intFromBool(slot.raw != 0);
        return used;
    }
};

fn useEight(answer: *u32) void {
    setThreadCount(8) catch return;
    const session = while (true) break begin() orelse continue;
    defer session.end();
    var presence: Presence = .{};
    session.run(Presence, &presence, 1000, Presence.note);
    answer.* = threadCount();
}

test "the number of threads is that of the caller, whatever others use" {
    if (memcheck) return error.SkipZigTest; // one thread at a time runs there
    const before = threadCount();
    defer setThreadCount(before) catch unreachable;
    try setThreadCount(2);
    var answer: u32 = 0;
    const other = try std.Thread.spawn(.{}, useEight, .{&answer});
    other.join();
    try testing.expectEqual(8, answer);
    try testing.expectEqual(2, threadCount());
    // Seven workers are there now, and one of them may take part.
    for (0..50) |_| {
        const session = begin().?;
        defer session.end();
        var presence: Presence = .{};
        session.run(Presence, &presence, 200, Presence.note);
        try testing.expect(presence.count() <= 2);
    }
}

fn hammer(failures: *std.atomic.Value(u32)) void {
    setThreadCount(3) catch unreachable;
    var counts: [64]std.atomic.Value(u32) = undefined;
    for (0..500) |_| {
        for (&counts) |*count| count.* = .init(0);
        const session = begin() orelse continue;
        defer session.end();
        session.run(Tally, &.{ .counts = &counts }, counts.len, Tally.count);
        for (counts) |count| {
            if (count.load(.monotonic) != 1) _ = failures.fetchAdd(1, .monotonic);
        }
    }
}

test "several callers at once" {
    if (memcheck) return error.SkipZigTest; // one thread at a time runs there
    const before = threadCount();
    defer setThreadCount(before) catch unreachable;
    try setThreadCount(3);
    var failures: std.atomic.Value(u32) = .init(0);
    var callers: [4]std.Thread = undefined;
    for (&callers) |*caller| caller.* = try std.Thread.spawn(.{}, hammer, .{&failures});
    for (callers) |caller| caller.join();
    try testing.expectEqual(0, failures.load(.monotonic));
}

/// CPU time of all threads but this one, of which there are none but workers here.
fn workersNanoseconds() i96 {
    const io = cpu.io();
    return std.Io.Clock.now(.cpu_process, io).nanoseconds - std.Io.Clock.now(.cpu_thread, io).nanoseconds;
}

test "idle workers take no time" {
    if (memcheck or builtin.os.tag != .linux) return error.SkipZigTest; // no other way to read a thread's time is written here
    const before = threadCount();
    defer setThreadCount(before) catch unreachable;
    try setThreadCount(4);
    var counts: [64]std.atomic.Value(u32) = @splat(.init(0));
    const session = begin().?;
    session.run(Tally, &.{ .counts = &counts }, counts.len, Tally.count);
    session.end();
    const io = std.testing.io;
    // They fall asleep, however late each of them gets a core.
    var waits: u32 = 0;
    while (pool.asleep.load(.seq_cst) != pool.started_count) : (waits += 1) {
        if (waits == 60_000) return error.StillAwake;
        try io.sleep(.fromMilliseconds(1), .awake);
    }
    const busy_before = workersNanoseconds();
    try io.sleep(.fromMilliseconds(1000), .awake);
    // One that looks for work all the time takes a core, or its share of a busy one.
    try testing.expect(workersNanoseconds() - busy_before < 10 * std.time.ns_per_ms);
}
