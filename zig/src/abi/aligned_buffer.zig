//! Bodies of the exports of a buffer of a pool. It has a handle of its own, and keeps its pool.

const AlignedBuffer = @import("../device/buffer_pool.zig").AlignedBuffer;
const arguments = @import("buffer.zig");
const handle = @import("handle.zig");
const record = @import("record.zig");
const status = @import("status.zig");

/// Where a buffer lies, for the runtimes to make arrays over.
pub const BufferRecord = extern struct {
    size_bytes: u32 = 0,
    address: record.Wide,
    /// Elements it can hold, and elements that were appended.
    capacity: u32,
    length: u32,
};

/// Gives a buffer of `pool` a handle, or goes without it. `from` is what it was asked of: the pool, or another buffer,
/// which may be what still keeps a pool that was freed.
pub fn name(buffer: AlignedBuffer, pool: *handle.Object, from: *handle.Object) i32 {
    return handle.create(.buffer, .{ .buffer = .{ .buffer = buffer, .pool = pool } }, from) catch |err| {
        var unnamed = buffer;
        unnamed.deinit();
        return status.fromError(err);
    };
}

pub fn free(word: u32) callconv(.c) i32 {
    return status.word(handle.free(.buffer, word));
}

pub fn clone(word: u32) callconv(.c) i32 {
    const use = handle.begin(.buffer, word) catch |err| return status.fromError(err);
    defer use.end();
    const buffer = use.target.clone() catch |err| return status.fromError(err);
    return name(buffer, use.object.body.buffer.pool, use.object);
}

pub fn info(word: u32, out: ?[*]u8, out_bytes: u32) callconv(.c) i32 {
    const use = handle.begin(.buffer, word) catch |err| return status.fromError(err);
    defer use.end();
    return status.word(record.write(BufferRecord, out, out_bytes, .{
        .address = .from(@intFromPtr(use.target.memory.ptr)),
        .capacity = @intCast(use.target.capacity()),
        .length = @intCast(use.target.len),
    }));
}

pub fn length(word: u32) callconv(.c) i32 {
    const use = handle.begin(.buffer, word) catch |err| return status.fromError(err);
    defer use.end();
    return status.count(use.target.len);
}

pub fn extend(word: u32, values: ?[*]const u8, value_count: u32) callconv(.c) i32 {
    const use = handle.begin(.buffer, word) catch |err| return status.fromError(err);
    defer use.end();
    const elements = arguments.words(f32, values, value_count) catch |err| return status.fromError(err);
    use.target.extend(elements) catch |err| return status.fromError(err);
    return status.count(use.target.len);
}

pub fn clear(word: u32) callconv(.c) i32 {
    const use = handle.begin(.buffer, word) catch |err| return status.fromError(err);
    defer use.end();
    use.target.clear();
    return 0;
}
