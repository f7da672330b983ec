//! The buffer pool: staging memory, scratch and targets of gather, kept by size. Blocks of keys and values never lie here.
//!
//!     1 KiB | 4 KiB | 16 KiB | 64 KiB | 256 KiB | 1 MiB | 4 MiB | 16 MiB        larger ones have the size asked for
//!
//! Life of a buffer:
//!   1. `acquire` hands out the one of the smallest class that fits which was given back last (it may still lie in a CPU
//!      cache), or takes memory from the allocator.
//!   2. `deinit` gives it back. The pool keeps it for the next, unless it has enough of that class already. One larger
//!      than every class goes back to the allocator at once.
//!
//! Every buffer is handed out zero: what lies in memory that was used before is another owner's.
//!
//! hits + misses = buffers handed out; returns + drops = buffers given back.
//!
//! Safe for several threads at once: every call takes the pool's lock. A single buffer is one owner's.

const std = @import("std");
const builtin = @import("builtin");
const assert = std.debug.assert;
const Allocator = std.mem.Allocator;
const cpu = @import("cpu.zig");
const reserved = @import("reserved.zig");

/// Bytes of each size class, smallest first.
pub const class_sizes = [_]u32{ 1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24 };

/// Buffers of a class that a pool keeps unless it is told otherwise.
pub const buffers_per_class_default = 32;

/// No buffer is larger: its elements are counted in 31 bits where a count is a result. (2^31 - 1) * 4 B = 8 GiB - 4.
pub const buffer_bytes_max = std.math.maxInt(i32) * @sizeOf(f32);

/// A cache line; an AVX-512 register.
const alignment_bytes = 64;
const alignment: std.mem.Alignment = .fromByteUnits(alignment_bytes);

const Memory = []align(alignment_bytes) u8;

comptime {
    for (class_sizes, 0..) |bytes, i| {
        assert(bytes % alignment_bytes == 0);
        if (i > 0) assert(bytes > class_sizes[i - 1]);
    }
}

/// How much memory a buffer pool keeps and hands out.
pub const Options = struct {
    /// Free buffers kept of each class.
    buffers_per_class: u32 = buffers_per_class_default,
    /// Most bytes of all buffers together, those in use and those that are kept.
    bytes_max: u64 = std.math.maxInt(u64),
};

pub const Stats = struct {
    /// Buffers handed out that were kept, and that had to be allocated first.
    hits: u64,
    misses: u64,
    /// Buffers taken from the allocator: the misses, and those of `prewarm`.
    allocations: u64,
    /// Buffers given back that were kept, and that were not.
    returns: u64,
    drops: u64,
    /// [class]
    free_buffers: [class_sizes.len]u32,
    /// Of buffers in use and of those that are kept.
    reserved_bytes: u64,
    /// Of those that are kept.
    kept_bytes: u64,
};

/// Its address must not change while a buffer of it is in use.
pub const BufferPool = struct {
    gpa: Allocator,
    lock: std.Io.Mutex = .init,
    buffers_per_class: u32,
    bytes_max: u64,
    /// [class]. Each list has room for every buffer that may come back to it, so that giving one back cannot fail.
    free: [class_sizes.len]std.ArrayList([*]align(alignment_bytes) u8) = @splat(.empty),
    /// Buffers in use, [class].
    used_counts: [class_sizes.len]usize = @splat(0),
    /// Buffers in use that are larger than every class.
    used_exact: usize = 0,
    reserved_bytes: u64 = 0,
    hits: u64 = 0,
    misses: u64 = 0,
    allocations: u64 = 0,
    returns: u64 = 0,
    drops: u64 = 0,

    pub const AcquireError = error{ InvalidSize, OutOfMemory };
    pub const PrewarmError = error{ InvalidConfig, OutOfMemory };

    pub fn init(gpa: Allocator, options: Options) BufferPool {
        return .{ .gpa = gpa, .buffers_per_class = options.buffers_per_class, .bytes_max = options.bytes_max };
    }

    /// All buffers must have been given back.
    pub fn deinit(pool: *BufferPool) void {
        for (pool.used_counts) |count| assert(count == 0);
        assert(pool.used_exact == 0);
        pool.clear();
        assert(pool.reserved_bytes == 0);
        for (&pool.free) |*list| list.deinit(pool.gpa);
        pool.* = undefined;
    }

    /// An empty buffer of zeros, of the smallest class with `bytes` bytes; past the largest class of `bytes` bytes, up to
    /// a whole element.
    pub fn acquire(pool: *BufferPool, bytes: u64) AcquireError!AlignedBuffer {
        const memory = try pool.take(bytes);
        @memset(memory, 0);
        return .{ .pool = pool, .memory = memory };
    }

    /// At least `buffer_count` buffers of the class with exactly `bytes` bytes are free then; or nothing has changed.
    pub fn prewarm(pool: *BufferPool, bytes: u64, buffer_count: u32) PrewarmError!void {
        const class = classFor(bytes) orelse return error.InvalidConfig;
        if (class_sizes[class] != bytes) return error.InvalidConfig;
        return pool.fill(class, class + 1, buffer_count);
    }

    /// At least `buffer_count` buffers of every class are free then; or nothing has changed.
    pub fn prewarmAll(pool: *BufferPool, buffer_count: u32) PrewarmError!void {
        return pool.fill(0, class_sizes.len, buffer_count);
    }

    /// Gives the memory of all free buffers back to the allocator.
    pub fn clear(pool: *BufferPool) void {
        pool.lock.lockUncancelable(cpu.io());
        defer pool.lock.unlock(cpu.io());
        pool.dropFree();
    }

    /// As `clear`, and nothing is kept from then on: for a pool that only its last buffers still need.
    pub fn close(pool: *BufferPool) void {
        pool.lock.lockUncancelable(cpu.io());
        defer pool.lock.unlock(cpu.io());
        pool.buffers_per_class = 0;
        pool.dropFree();
    }

    pub fn stats(pool: *BufferPool) Stats {
        pool.lock.lockUncancelable(cpu.io());
        defer pool.lock.unlock(cpu.io());
        var free_buffers: [class_sizes.len]u32 = undefined;
        var kept_bytes: u64 = 0;
        for (&free_buffers, pool.free, class_sizes) |*count, list, bytes| {
            count.* = @intCast(list.items.len);
            kept_bytes += list.items.len * @as(u64, bytes);
        }
        return .{
            .hits = pool.hits,
            .misses = pool.misses,
            .allocations = pool.allocations,
            .returns = pool.returns,
            .drops = pool.drops,
            .free_buffers = free_buffers,
            .reserved_bytes = pool.reserved_bytes,
            .kept_bytes = kept_bytes,
        };
    }

    /// Memory for a buffer, with whatever lies in it.
    fn take(pool: *BufferPool, bytes: u64) AcquireError!Memory {
        if (bytes > buffer_bytes_max) return error.InvalidSize;
        pool.lock.lockUncancelable(cpu.io());
        defer pool.lock.unlock(cpu.io());
        if (classFor(bytes)) |class| {
            if (pool.free[class].pop()) |kept| {
                pool.hits += 1;
                pool.used_counts[class] += 1;
                return kept[0..class_sizes[class]];
            }
            try pool.makeRoom(class, 1);
            const memory = try pool.allocate(class_sizes[class]);
            pool.used_counts[class] += 1;
            pool.misses += 1;
            pool.allocations += 1;
            return memory;
        }
        const memory = try pool.allocate(std.mem.alignForward(u64, bytes, @sizeOf(f32)));
        pool.used_exact += 1;
        pool.misses += 1;
        pool.allocations += 1;
        return memory;
    }

    /// Takes the memory of a buffer back.
    fn give(pool: *BufferPool, memory: Memory) void {
        // A read of a buffer that was given back shows as NaN.
        if (builtin.mode == .Debug) @memset(memory, 0xff);
        pool.lock.lockUncancelable(cpu.io());
        defer pool.lock.unlock(cpu.io());
        if (classFor(memory.len)) |class| {
            assert(class_sizes[class] == memory.len);
            pool.used_counts[class] -= 1;
            if (pool.free[class].items.len < pool.buffers_per_class) {
                pool.free[class].appendAssumeCapacity(memory.ptr);
                pool.returns += 1;
                return;
            }
        } else {
            pool.used_exact -= 1;
        }
        pool.drops += 1;
        pool.release(memory);
    }

    /// Makes classes `first` to `end - 1` have `buffer_count` free buffers. Call without the lock.
    fn fill(pool: *BufferPool, first: usize, end: usize, buffer_count: u32) PrewarmError!void {
        pool.lock.lockUncancelable(cpu.io());
        defer pool.lock.unlock(cpu.io());
        if (buffer_count > pool.buffers_per_class) return error.InvalidConfig;
        var added: [class_sizes.len]usize = @splat(0);
        errdefer for (added, 0..) |count, class| {
            for (0..count) |_| pool.release(pool.free[class].pop().?[0..class_sizes[class]]);
        };
        // Known before anything is allocated: an absurd wish must not fill the memory first.
        var bytes: u64 = 0;
        for (first..end) |class| bytes +|= (buffer_count -| pool.free[class].items.len) *| @as(u64, class_sizes[class]);
        if (bytes > pool.bytes_max - pool.reserved_bytes) return error.OutOfMemory;
        for (first..end) |class| {
            const missing = buffer_count -| pool.free[class].items.len;
            try pool.makeRoom(class, missing);
            for (0..missing) |_| {
                const memory = try pool.allocate(class_sizes[class]);
                // Memory that nobody wrote to is only a promise of the system.
                @memset(memory, 0);
                pool.free[class].appendAssumeCapacity(memory.ptr);
                added[class] += 1;
            }
        }
        for (added) |count| pool.allocations += count;
    }

    /// Room in the list of a class for `new_count` buffers more than there are.
    fn makeRoom(pool: *BufferPool, class: usize, new_count: usize) error{OutOfMemory}!void {
        const buffer_count = pool.used_counts[class] + pool.free[class].items.len + new_count;
        try pool.free[class].ensureTotalCapacity(pool.gpa, @min(buffer_count, pool.buffers_per_class));
    }

    fn dropFree(pool: *BufferPool) void {
        for (&pool.free, class_sizes) |*list, bytes| {
            while (list.pop()) |memory| pool.release(memory[0..bytes]);
        }
    }

    /// `rawAlloc`, because `alloc` writes a pattern over the memory in safe builds, and zeros are written to it anyway.
    fn allocate(pool: *BufferPool, bytes: u64) error{OutOfMemory}!Memory {
        if (bytes > pool.bytes_max - pool.reserved_bytes) return error.OutOfMemory;
        const len = std.math.cast(usize, bytes) orelse return error.OutOfMemory;
        try reserved.take(bytes);
        errdefer reserved.give(bytes);
        const pointer = pool.gpa.rawAlloc(len, alignment, @returnAddress()) orelse return error.OutOfMemory;
        pool.reserved_bytes += bytes;
        return @alignCast(pointer[0..len]);
    }

    fn release(pool: *BufferPool, memory: Memory) void {
        pool.gpa.rawFree(memory, alignment, @returnAddress());
        reserved.give(memory.len);
        pool.reserved_bytes -= memory.len;
    }
};

/// The smallest class with `bytes` bytes, if one is large enough.
fn classFor(bytes: u64) ?usize {
    return for (class_sizes, 0..) |class_bytes, class| {
        if (bytes <= class_bytes) break class;
    } else null;
}

/// A buffer of a pool, 64-byte aligned. It has one owner, who gives it back with `deinit`.
pub const AlignedBuffer = struct {
    pool: *BufferPool,
    memory: Memory,
    /// Elements that were appended, at most `capacity`.
    len: usize = 0,

    /// Gives the buffer back to its pool.
    pub fn deinit(buffer: *AlignedBuffer) void {
        buffer.pool.give(buffer.memory);
        buffer.* = undefined;
    }

    /// Elements the buffer can hold.
    pub fn capacity(buffer: *const AlignedBuffer) usize {
        return buffer.memory.len / @sizeOf(f32);
    }

    /// All of its elements, appended or not, [capacity].
    pub fn floats(buffer: *const AlignedBuffer) []align(alignment_bytes) f32 {
        return std.mem.bytesAsSlice(f32, buffer.memory);
    }

    /// The elements that were appended, [len].
    pub fn items(buffer: *const AlignedBuffer) []align(alignment_bytes) f32 {
        return buffer.floats()[0..buffer.len];
    }

    /// Appends elements, which may lie in this buffer too. Past the capacity nothing has changed.
    pub fn extend(buffer: *AlignedBuffer, values: []align(1) const f32) error{InvalidSize}!void {
        assert(buffer.len <= buffer.capacity());
        if (values.len > buffer.capacity() - buffer.len) return error.InvalidSize;
        const source = std.mem.sliceAsBytes(values);
        @memmove(buffer.memory[buffer.len * @sizeOf(f32) ..][0..source.len], source);
        buffer.len += values.len;
    }

    /// Forgets what was appended; the bytes stay.
    pub fn clear(buffer: *AlignedBuffer) void {
        buffer.len = 0;
    }

    /// Another buffer of the pool with the same bytes and the same length.
    pub fn clone(buffer: *const AlignedBuffer) BufferPool.AcquireError!AlignedBuffer {
        const memory = try buffer.pool.take(buffer.memory.len);
        assert(memory.len == buffer.memory.len);
        @memcpy(memory, buffer.memory);
        return .{ .pool = buffer.pool, .memory = memory, .len = buffer.len };
    }
};

test {
    _ = @import("buffer_pool_test.zig");
}
