//! How fast this machine reads memory: R, the number that attention over a cache is compared with.
//!
//! R is the best of plain and prefetched reading (512 B to 4 KiB ahead), with huge pages and without, over more memory
//! than the last cache level holds, by as many threads as the row it is compared with.

const std = @import("std");
const dispatch = @import("../kernels/dispatch.zig");
const cpu = @import("cpu.zig");
const slab = @import("slab.zig");

const prefetch_distances = [_]usize{ 0, 512, 1024, 2048, 4096 };

/// The granularity of `Table.read`.
const step_bytes = 512;

pub const Error = error{ InvalidConfig, OutOfMemory, Unsupported };

/// R in bytes a second. Takes `bytes` of memory, twice one after the other, and about a second a GiB.
pub fn readRate(bytes: u64, thread_count: u32) Error!f64 {
    try dispatch.checkCpu();
    if (thread_count == 0 or thread_count > 1024) return error.InvalidConfig;
    if (bytes / thread_count < step_bytes or bytes > 1 << 40) return error.InvalidConfig;
    // All of it is touched: past the limit the system would end the process.
    if (bytes > cpu.memoryLimit()) return error.OutOfMemory;
    var best: f64 = 0;
    for ([_]bool{ true, false }) |huge_pages| {
        const memory = try slab.alloc(slab.system, bytes);
        defer slab.free(slab.system, memory);
        if (!huge_pages) slab.refuseHugePages(memory);
        // Touched with different words, so that no page is the shared zero page.
        for (0..memory.len / 8) |i| std.mem.writeInt(u64, memory[i * 8 ..][0..8], i *% 0x9e37_79b9_7f4a_7c15, .little);
        for (prefetch_distances) |distance| {
            const rate = try pass(memory, distance, thread_count);
            best = @max(best, rate);
        }
    }
    return best;
}

/// One pass of all threads over equal parts of `memory`.
fn pass(memory: []const u8, distance: usize, thread_count: u32) error{OutOfMemory}!f64 {
    const part = memory.len / thread_count / step_bytes * step_bytes;
    var threads: [1024]std.Thread = undefined;
    var started: u32 = 0;
    var word: std.atomic.Value(u32) = .init(0);
    const begin = now();
    // The caller reads the first part itself.
    var failed = false;
    while (started + 1 < thread_count) : (started += 1) {
        const from = memory[(started + 1) * part ..][0..part];
        threads[started] = std.Thread.spawn(.{}, readPart, .{ from, distance, &word }) catch {
            failed = true;
            break;
        };
    }
    readPart(memory[0..part], distance, &word);
    for (threads[0..started]) |thread| thread.join();
    if (failed) return error.OutOfMemory;
    // A coarse clock may not have moved.
    const seconds: f64 = @as(f64, @floatFromInt(@max(now() - begin, 1))) / std.time.ns_per_s;
    return @as(f64, @floatFromInt(part * thread_count)) / seconds;
}

fn readPart(memory: []const u8, distance: usize, word: *std.atomic.Value(u32)) void {
    // The result is kept, or the loads could be dropped.
    _ = word.fetchXor(dispatch.kernels().read(memory.ptr, memory.len, distance), .monotonic);
}

fn now() i96 {
    return std.Io.Clock.awake.now(cpu.io()).nanoseconds;
}

/// The best rate at which this thread reads memory that it has read before.
fn rateAlone(memory: []const u8) f64 {
    var best: i96 = std.math.maxInt(i96);
    for (0..50) |_| {
        const begin = now();
        std.mem.doNotOptimizeAway(dispatch.kernels().read(memory.ptr, memory.len, 0));
        best = @min(best, @max(now() - begin, 1));
    }
    return @as(f64, @floatFromInt(memory.len)) / (@as(f64, @floatFromInt(best)) / std.time.ns_per_s);
}

test readRate {
    const bytes = 1 << 22;
    const begin = now();
    const rate = try readRate(bytes, 2);
    const seconds = @as(f64, @floatFromInt(now() - begin)) / std.time.ns_per_s;
    // The best pass is no slower than all of them together, and each of them read every byte.
    try std.testing.expect(rate >= 2 * prefetch_distances.len * bytes / seconds);
    // Nor is it faster than two threads that each read their half alone; twice, as clocks change.
    const half = try std.testing.allocator.alloc(u8, bytes / 2);
    defer std.testing.allocator.free(half);
    @memset(half, 1);
    try std.testing.expect(rate <= 2 * 2 * rateAlone(half));
    try std.testing.expectError(error.InvalidConfig, readRate(1 << 22, 0));
    try std.testing.expectError(error.InvalidConfig, readRate(100, 1));
}
