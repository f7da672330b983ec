//! Bodies of the exports of a buffer pool; those of its buffers are in `aligned_buffer.zig`.

const aligned_buffer = @import("aligned_buffer.zig");
const buffer_pool = @import("../device/buffer_pool.zig");
const cpu = @import("../device/cpu.zig");
const handle = @import("handle.zig");
const memory = @import("memory.zig");
const record = @import("record.zig");
const status = @import("status.zig");

pub const BufferPoolRecord = extern struct {
    size_bytes: u32 = 0,
    buffers_per_class: u32,
    /// 0 for what the process may use.
    max_bytes: record.Wide,
};

pub const BufferPoolStatsRecord = extern struct {
    size_bytes: u32 = 0,
    hits: record.Wide,
    misses: record.Wide,
    allocations: record.Wide,
    returns: record.Wide,
    drops: record.Wide,
    reserved_bytes: record.Wide,
    /// [class]
    free_buffers: [buffer_pool.class_sizes.len]u32,
};

pub fn create(options: ?[*]const u8, options_bytes: u32) callconv(.c) i32 {
    const parsed = record.read(BufferPoolRecord, options, options_bytes) catch |err| return status.fromError(err);
    const max_bytes = parsed.max_bytes.value();
    return handle.create(.buffer_pool, .{ .buffer_pool = .init(memory.gpa, .{
        .buffers_per_class = parsed.buffers_per_class,
        .bytes_max = if (max_bytes == 0) cpu.memoryLimit() else max_bytes,
    }) }, null) catch |err| status.fromError(err);
}

/// Buffers in use stay, and the pool with them; what it keeps goes at once.
pub fn free(word: u32) callconv(.c) i32 {
    const use = handle.begin(.buffer_pool, word) catch |err| return status.fromError(err);
    defer use.end();
    // The handle goes first: no call may find a pool that is closed already, and be refused for what it keeps.
    handle.free(.buffer_pool, word) catch |err| return status.fromError(err);
    use.target.close();
    return 0;
}

pub fn prewarm(word: u32, class_bytes: u32, buffer_count: u32) callconv(.c) i32 {
    const use = handle.begin(.buffer_pool, word) catch |err| return status.fromError(err);
    defer use.end();
    return status.word(use.target.prewarm(class_bytes, buffer_count));
}

pub fn prewarmAll(word: u32, buffer_count: u32) callconv(.c) i32 {
    const use = handle.begin(.buffer_pool, word) catch |err| return status.fromError(err);
    defer use.end();
    return status.word(use.target.prewarmAll(buffer_count));
}

pub fn clear(word: u32) callconv(.c) i32 {
    const use = handle.begin(.buffer_pool, word) catch |err| return status.fromError(err);
    defer use.end();
    use.target.clear();
    return 0;
}

pub fn stats(word: u32, out: ?[*]u8, out_bytes: u32) callconv(.c) i32 {
    const use = handle.begin(.buffer_pool, word) catch |err| return status.fromError(err);
    defer use.end();
    const facts = use.target.stats();
    return status.word(record.write(BufferPoolStatsRecord, out, out_bytes, .{
        .hits = .from(facts.hits),
        .misses = .from(facts.misses),
        .allocations = .from(facts.allocations),
        .returns = .from(facts.returns),
        .drops = .from(facts.drops),
        .reserved_bytes = .from(facts.reserved_bytes),
        .free_buffers = facts.free_buffers,
    }));
}

pub fn acquire(word: u32, bytes: f64) callconv(.c) i32 {
    const use = handle.begin(.buffer_pool, word) catch |err| return status.fromError(err);
    defer use.end();
    // Written so that NaN is refused.
    if (!(bytes >= 0 and bytes <= buffer_pool.buffer_bytes_max)) return status.fromError(error.InvalidSize);
    const buffer = use.target.acquire(@intFromFloat(@ceil(bytes))) catch |err| return status.fromError(err);
    return aligned_buffer.name(buffer, use.object, use.object);
}
