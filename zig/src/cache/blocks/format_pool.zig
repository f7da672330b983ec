//! The blocks of one format: equal pieces of memory, each with a reference count, shared by the sequences of one or more
//! caches.
//!
//!     slab 0 | block 0 | block 1 | ... |      slab 1 | block n | ... |      a slab is at most 1 GiB
//!
//! Life of a block:
//!   1. `grow` maps a slab; its blocks are free and zero.
//!   2. `take` hands out the block that was given back last (it may still lie in a CPU cache), with one reference.
//!   3. `retain` and `release` count the block table entries that name it.
//!   4. With the last reference it is free again. A slab whose blocks are all free goes back to the system, except what
//!      `prewarm` asked for and one slab against trembling at its border.
//!
//! A reference count is the number of block table entries that name the block, and one more where a prefix index does:
//! used + free = total.
//! A block that last belonged to another writer is zeroed before it is handed out.
//!
//! Safe for several caches at once: every call takes the pool's lock. What is in a block is its owner's business.

const std = @import("std");
const builtin = @import("builtin");
const assert = std.debug.assert;
const Allocator = std.mem.Allocator;
const cpu = @import("../../device/cpu.zig");
const process_memory = @import("../../device/reserved.zig");
const slab_memory = @import("../../device/slab.zig");
const SlabTable = @import("slab_table.zig").SlabTable;

/// Slabs are about this large where blocks are large, so that memory comes and goes in steps that are worth a call.
const slab_bytes_target = 64 << 20;

/// Slabs are no smaller than this where blocks are small, so that their number stays small too.
const slab_bytes_min = 4 << 20;

/// Slabs between the two sizes have this many blocks.
const slab_blocks_target = 32;

/// Slabs are no larger than this part of a budget that several pools share.
const slab_share = 16;

const block_alignment = 64;

/// A pool is never larger, whatever its owner allows: block indices are int32 in the tables that kernels read.
const bytes_max_max = std.math.maxInt(i32) * block_alignment;

pub const Stats = struct {
    block_bytes: u64,
    total_blocks: u32,
    free_blocks: u32,
    used_blocks: u32,
    peak_blocks: u32,
    /// Blocks that stay mapped whatever happens.
    prewarmed: u32,
    /// Blocks handed out that were there, and that had to be mapped first.
    hits: u64,
    misses: u64,
    /// Blocks mapped, given back by their last owner, and unmapped, since the pool was made.
    allocations: u64,
    returns: u64,
    drops: u64,
    reserved_bytes: u64,
    metadata_bytes: u64,
};

/// Bytes that several pools may map together.
pub const Budget = struct {
    left: std.atomic.Value(u64),

    pub fn init(bytes_max: u64) Budget {
        return .{ .left = .init(bytes_max) };
    }

    fn take(budget: *Budget, wanted: u64) bool {
        var left = budget.left.load(.monotonic);
        while (left >= wanted) {
            left = budget.left.cmpxchgWeak(left, left - wanted, .monotonic, .monotonic) orelse return true;
        }
        return false;
    }

    fn give(budget: *Budget, bytes: u64) void {
        _ = budget.left.fetchAdd(bytes, .monotonic);
    }
};

/// Blocks of one format, with a reference count each, from slabs that come and go as they are needed.
pub const FormatPool = struct {
    gpa: Allocator,
    slab_allocator: Allocator,
    lock: std.Io.Mutex = .init,
    /// Shared with the other pools of a cache, if there are any.
    budget: ?*Budget,
    /// A multiple of 64.
    block_bytes: u64,
    blocks_per_slab: u32,
    block_count_max: u32,
    /// Every slab but the last has `blocks_per_slab` blocks. The owner of a block reads its slab without the lock.
    slabs: SlabTable,
    /// Block table entries that name a block, [block].
    ref_counts: std.ArrayList(u32) = .empty,
    /// The cache that wrote a block last, [block]; 0 for nobody.
    writers: std.ArrayList(u64) = .empty,
    /// Times that a block was taken, [block]; wraps.
    serials: std.ArrayList(u32) = .empty,
    /// Free blocks of mapped slabs, the last given back on top. Has room for every block.
    free: std.ArrayList(u32) = .empty,
    used_count: u32 = 0,
    peak_count: u32 = 0,
    prewarmed: u32 = 0,
    hits: u64 = 0,
    misses: u64 = 0,
    allocations: u64 = 0,
    returns: u64 = 0,
    drops: u64 = 0,

    pub const InitError = error{ InvalidConfig, BlockTooLarge, OutOfMemory };
    pub const TakeError = error{ PoolEmpty, OutOfMemory };

    /// Nothing is mapped yet. `bytes_max` bounds the slabs.
    pub fn init(gpa: Allocator, slab_allocator: Allocator, block_bytes: u64, bytes_max: u64) InitError!FormatPool {
        return initBudget(gpa, slab_allocator, block_bytes, bytes_max, null);
    }

    /// A pool on a budget that other pools draw on too; else as `init`.
    pub fn initBudget(
        gpa: Allocator,
        slab_allocator: Allocator,
        block_bytes: u64,
        bytes_max: u64,
        budget: ?*Budget,
    ) InitError!FormatPool {
        if (block_bytes == 0) return error.InvalidConfig;
        if (block_bytes > slab_memory.bytes_max) return error.BlockTooLarge;
        const rounded = std.mem.alignForward(u64, block_bytes, block_alignment);
        if (rounded > bytes_max) return error.BlockTooLarge;
        const wanted_bytes = std.math.clamp(slab_blocks_target * rounded, slab_bytes_min, slab_bytes_target);
        // Pools on one budget must not take it all with their first slab, nor one cache what the process may reserve.
        const shared_bytes = @min(bytes_max, process_memory.max() orelse bytes_max);
        const slab_bytes = if (budget == null) wanted_bytes else @min(wanted_bytes, shared_bytes / slab_share);
        const blocks_per_slab: u32 = @intCast(@max(1, slab_bytes / rounded));
        const block_count_max: u32 = @intCast(@min(bytes_max, bytes_max_max) / rounded);
        const slab_count_max = std.math.divCeil(u32, block_count_max, blocks_per_slab) catch unreachable; // not 0
        return .{
            .gpa = gpa,
            .slab_allocator = slab_allocator,
            .budget = budget,
            .block_bytes = rounded,
            .blocks_per_slab = blocks_per_slab,
            .block_count_max = block_count_max,
            .slabs = try .init(gpa, slab_count_max),
        };
    }

    /// Frees a pool whose blocks were all released.
    pub fn deinit(pool: *FormatPool) void {
        assert(pool.used_count == 0);
        for (0..pool.slabs.end) |i| if (pool.slabs.at(@intCast(i))) |slab| slab_memory.free(pool.slab_allocator, slab);
        pool.slabs.deinit(pool.gpa);
        pool.ref_counts.deinit(pool.gpa);
        pool.writers.deinit(pool.gpa);
        pool.serials.deinit(pool.gpa);
        pool.free.deinit(pool.gpa);
        pool.* = undefined;
    }

    /// Maps at least `block_count` blocks for good, or none.
    pub fn prewarm(pool: *FormatPool, block_count: u32) TakeError!void {
        pool.lock.lockUncancelable(cpu.io());
        defer pool.lock.unlock(cpu.io());
        if (block_count > pool.block_count_max) return error.PoolEmpty;
        defer pool.verify();
        _ = try pool.growTo(block_count -| pool.used_count);
        pool.prewarmed = @max(pool.prewarmed, block_count);
    }

    /// Takes `blocks.len` blocks for a writer (not 0), each with one reference: all of them or none.
    pub fn take(pool: *FormatPool, writer: u64, blocks: []i32) TakeError!void {
        _ = try pool.takeUndoable(writer, blocks);
    }

    /// Takes blocks as `take` does, for a writer, or for those that `claim` them before anything is read. `untake` makes it
    /// undone.
    pub fn takeUndoable(pool: *FormatPool, writer: ?u64, blocks: []i32) TakeError!Taken {
        if (blocks.len == 0) return .{};
        pool.lock.lockUncancelable(cpu.io());
        defer pool.lock.unlock(cpu.io());
        defer pool.verify();
        if (!pool.canHave(blocks.len)) return error.PoolEmpty;
        var taken: Taken = .{
            .hits = @min(pool.free.items.len, blocks.len),
            .peak_before = pool.peak_count,
            .tables_before = pool.tableSize(),
        };
        taken.mapped = try pool.growTo(blocks.len);
        pool.hits += taken.hits;
        pool.misses += blocks.len - taken.hits;
        pool.takeFree(blocks);
        if (writer) |one| pool.claimAll(one, blocks);
        return taken;
    }

    /// The numbers of a pool before blocks were taken.
    pub const Taken = struct {
        /// Blocks mapped for them.
        mapped: usize = 0,
        hits: usize = 0,
        peak_before: u32 = 0,
        tables_before: TableSize = .{},
    };

    /// Undoes a take, as if it had never been, by the numbers of the pool too. The blocks come in the order they were taken in.
    pub fn untake(pool: *FormatPool, blocks: []const i32, taken: Taken) void {
        if (blocks.len == 0) return;
        pool.lock.lockUncancelable(cpu.io());
        defer pool.lock.unlock(cpu.io());
        defer pool.verify();
        // Others may have taken blocks meanwhile.
        const used_before = pool.used_count - @as(u32, @intCast(blocks.len));
        if (pool.peak_count == pool.used_count) pool.peak_count = @max(taken.peak_before, used_before);
        pool.hits -= taken.hits;
        pool.misses -= blocks.len - taken.hits;
        var i = blocks.len;
        while (i > 0) {
            i -= 1;
            const block: u32 = @intCast(blocks[i]);
            assert(pool.ref_counts.items[block] == 1);
            pool.ref_counts.items[block] = 0;
            pool.serials.items[block] -%= 1;
            pool.putBack(block);
        }
        // What was mapped last was taken first.
        for (blocks[0..@min(taken.mapped, blocks.len)]) |block| {
            const slab_index = @as(u32, @intCast(block)) / pool.blocks_per_slab;
            if (pool.slabs.at(slab_index) != null and pool.isFree(slab_index)) pool.ungrow(slab_index);
        }
        pool.shrinkTables(taken.tables_before);
        if (pool.used_count == 0) pool.shrink(); // others gave theirs back meanwhile
    }

    /// Makes taken blocks those of a writer (not 0): what another one left there is zeroed.
    pub fn claim(pool: *FormatPool, writer: u64, blocks: []const i32) void {
        if (blocks.len == 0) return;
        pool.lock.lockUncancelable(cpu.io());
        defer pool.lock.unlock(cpu.io());
        pool.claimAll(writer, blocks);
    }

    fn claimAll(pool: *FormatPool, writer: u64, blocks: []const i32) void {
        assert(writer != 0);
        for (blocks) |entry| {
            const block: u32 = @intCast(entry);
            assert(pool.ref_counts.items[block] == 1);
            if (pool.writers.items[block] == writer) continue;
            if (pool.writers.items[block] != 0) @memset(pool.bytes(block), 0);
            pool.writers.items[block] = writer;
        }
    }

    fn takeFree(pool: *FormatPool, blocks: []i32) void {
        for (blocks) |*entry| {
            const block = pool.free.pop().?;
            assert(pool.ref_counts.items[block] == 0);
            pool.ref_counts.items[block] = 1;
            pool.serials.items[block] +%= 1;
            pool.slabs.freeCount(block / pool.blocks_per_slab).* -= 1;
            entry.* = @intCast(block);
        }
        pool.used_count += @intCast(blocks.len);
        pool.peak_count = @max(pool.peak_count, pool.used_count);
    }

    /// One more table entry names each of these blocks; entries below 0 name none.
    pub fn retain(pool: *FormatPool, blocks: []const i32) void {
        pool.lock.lockUncancelable(cpu.io());
        defer pool.lock.unlock(cpu.io());
        defer pool.verify();
        for (blocks) |block| {
            if (block < 0) continue;
            assert(pool.ref_counts.items[@intCast(block)] > 0);
            pool.ref_counts.items[@intCast(block)] += 1;
        }
    }

    /// One table entry fewer names each of these blocks; entries below 0 name none.
    pub fn release(pool: *FormatPool, blocks: []const i32) void {
        pool.lock.lockUncancelable(cpu.io());
        defer pool.lock.unlock(cpu.io());
        defer pool.verify();
        // From the back, so that what is taken next comes in the order it had.
        var i = blocks.len;
        while (i > 0) {
            i -= 1;
            if (blocks[i] >= 0) pool.releaseOne(@intCast(blocks[i]));
        }
    }

    fn releaseOne(pool: *FormatPool, block: u32) void {
        const count = &pool.ref_counts.items[block];
        assert(count.* > 0);
        count.* -= 1;
        if (count.* != 0) return;
        pool.putBack(block);
        pool.returns += 1;
        if (pool.isFree(block / pool.blocks_per_slab)) pool.shrink();
    }

    /// Makes a block free to be taken next.
    fn putBack(pool: *FormatPool, block: u32) void {
        if (builtin.mode == .Debug) {
            // A read of a block that was given back shows as NaN; the mark makes `take` zero it.
            @memset(pool.bytes(block), 0xff);
            pool.writers.items[block] = std.math.maxInt(u64);
        }
        pool.free.appendAssumeCapacity(block);
        pool.used_count -= 1;
        pool.slabs.freeCount(block / pool.blocks_per_slab).* += 1;
    }

    /// All blocks of a mapped slab are free.
    fn isFree(pool: *const FormatPool, slab_index: u32) bool {
        return pool.slabs.freeCount(slab_index).* == pool.slabBlocks(slab_index);
    }

    /// References to a block.
    pub fn refCount(pool: *FormatPool, block: u32) u32 {
        pool.lock.lockUncancelable(cpu.io());
        defer pool.lock.unlock(cpu.io());
        return pool.ref_counts.items[block];
    }

    /// A number that changes whenever a block gets a new owner.
    pub fn serial(pool: *FormatPool, block: u32) u32 {
        pool.lock.lockUncancelable(cpu.io());
        defer pool.lock.unlock(cpu.io());
        return pool.serials.items[block];
    }

    /// A block is still the one that had this serial, and in use.
    pub fn isAlive(pool: *FormatPool, block: u32, expected_serial: u32) bool {
        pool.lock.lockUncancelable(cpu.io());
        defer pool.lock.unlock(cpu.io());
        return pool.ref_counts.items[block] > 0 and pool.serials.items[block] == expected_serial;
    }

    /// The bytes of a block, 64-byte aligned. Valid while a reference is held.
    pub fn bytes(pool: *const FormatPool, block: u32) []align(block_alignment) u8 {
        const slab = pool.slabs.at(block / pool.blocks_per_slab).?;
        const offset = (block % pool.blocks_per_slab) * pool.block_bytes;
        return @alignCast(slab[@intCast(offset)..@intCast(offset + pool.block_bytes)]);
    }

    pub fn stats(pool: *FormatPool) Stats {
        pool.lock.lockUncancelable(cpu.io());
        defer pool.lock.unlock(cpu.io());
        var reserved: u64 = 0;
        for (0..pool.slabs.end) |i| if (pool.slabs.at(@intCast(i))) |slab| {
            reserved += slab_memory.reservedBytes(slab);
        };
        const words = pool.ref_counts.capacity + 2 * pool.writers.capacity + pool.serials.capacity + pool.free.capacity;
        return .{
            .block_bytes = pool.block_bytes,
            .total_blocks = pool.totalCount(),
            .free_blocks = @intCast(pool.free.items.len),
            .used_blocks = pool.used_count,
            .peak_blocks = pool.peak_count,
            .prewarmed = pool.prewarmed,
            .hits = pool.hits,
            .misses = pool.misses,
            .allocations = pool.allocations,
            .returns = pool.returns,
            .drops = pool.drops,
            .reserved_bytes = reserved,
            .metadata_bytes = words * @sizeOf(u32) + pool.slabs.metadataBytes(),
        };
    }

    /// Blocks of a pool whose lists `verify` reads; of a larger one it compares the sums.
    const verified_blocks_max = 1024;

    /// Checks in Debug that the pool is sound: used + free = total, no block is free twice or free and used, and slabs count
    /// their free blocks. Asked after each change, with the lock.
    fn verify(pool: *const FormatPool) void {
        if (builtin.mode != .Debug) return;
        var mapped_count: u64 = 0;
        var free_count: u64 = 0;
        for (0..pool.slabs.end) |index| if (pool.slabs.at(@intCast(index)) != null) {
            mapped_count += pool.slabBlocks(@intCast(index));
            free_count += pool.slabs.freeCount(@intCast(index)).*;
        };
        assert(mapped_count == pool.used_count + free_count);
        assert(free_count == pool.free.items.len);
        assert(pool.peak_count >= pool.used_count);
        assert(pool.allocations - pool.drops == mapped_count);
        assert(pool.free.capacity >= pool.ref_counts.items.len);
        if (pool.ref_counts.items.len > verified_blocks_max) return;
        var is_free: std.StaticBitSet(verified_blocks_max) = .initEmpty();
        for (pool.free.items) |block| {
            assert(!is_free.isSet(block));
            assert(pool.ref_counts.items[block] == 0);
            assert(pool.slabs.at(block / pool.blocks_per_slab) != null);
            is_free.set(block);
        }
        var used_count: u32 = 0;
        for (pool.ref_counts.items, 0..) |references, block| {
            if (references == 0) continue;
            assert(pool.slabs.at(@as(u32, @intCast(block)) / pool.blocks_per_slab) != null);
            used_count += 1;
        }
        assert(used_count == pool.used_count);
    }

    /// So many blocks can be free, as far as slabs and budget go. Asked first, so that a request that is refused has mapped
    /// nothing.
    fn canHave(pool: *const FormatPool, block_count: usize) bool {
        var free_count = pool.free.items.len;
        var bytes_left = if (pool.budget) |budget| budget.left.load(.monotonic) else std.math.maxInt(u64);
        for (0..pool.slabs.count_max) |i| {
            if (free_count >= block_count) return true;
            if (pool.slabs.at(@intCast(i)) != null) continue;
            const gained = pool.slabBlocks(@intCast(i));
            if (gained * pool.block_bytes > bytes_left) return false;
            bytes_left -= gained * pool.block_bytes;
            free_count += gained;
        }
        return free_count >= block_count;
    }

    fn totalCount(pool: *const FormatPool) u32 {
        return pool.used_count + @as(u32, @intCast(pool.free.items.len));
    }

    fn slabBlocks(pool: *const FormatPool, slab_index: u32) u32 {
        return @min(pool.blocks_per_slab, pool.block_count_max - slab_index * pool.blocks_per_slab);
    }

    /// Maps slabs until `free_count` blocks are free, and tells how many blocks that were. Changes nothing when it cannot.
    fn growTo(pool: *FormatPool, free_count: usize) TakeError!usize {
        const free_before = pool.free.items.len;
        if (free_before >= free_count) return 0;
        const tables_before = pool.tableSize();
        errdefer {
            while (pool.free.items.len > free_before) pool.ungrow(pool.free.getLast() / pool.blocks_per_slab);
            pool.shrinkTables(tables_before);
        }
        while (pool.free.items.len < free_count) try pool.grow();
        return pool.free.items.len - free_before;
    }

    /// Maps one more slab.
    fn grow(pool: *FormatPool) TakeError!void {
        const slab_index = pool.slabs.firstFree() orelse return error.PoolEmpty;
        const block_first = slab_index * pool.blocks_per_slab;
        const block_count = pool.slabBlocks(slab_index);
        try pool.growTables(block_first + block_count);
        try pool.slabs.reserve(pool.gpa, slab_index);
        errdefer pool.slabs.unreserve(pool.gpa, slab_index);
        const slab_bytes = block_count * pool.block_bytes;
        if (pool.budget) |budget| if (!budget.take(slab_bytes)) return error.PoolEmpty;
        const slab = slab_memory.alloc(pool.slab_allocator, slab_bytes) catch {
            if (pool.budget) |budget| budget.give(slab_bytes);
            return error.OutOfMemory;
        };
        pool.slabs.enter(slab_index, slab, block_count);
        @memset(pool.writers.items[block_first..][0..block_count], 0);
        var block = block_first + block_count;
        while (block > block_first) {
            block -= 1;
            pool.free.appendAssumeCapacity(block);
        }
        pool.allocations += block_count;
    }

    /// Makes the tables of blocks as long as the slabs mapped so far need.
    fn growTables(pool: *FormatPool, block_count: u32) error{OutOfMemory}!void {
        const known = pool.ref_counts.items.len;
        if (block_count <= known) return;
        inline for (pool.tables()) |table| try table.ensureTotalCapacity(pool.gpa, block_count);
        try pool.free.ensureTotalCapacity(pool.gpa, block_count);
        inline for (pool.tables()) |table| table.appendNTimesAssumeCapacity(0, block_count - known);
    }

    /// The tables with an element for each block.
    fn tables(pool: *FormatPool) struct { *std.ArrayList(u32), *std.ArrayList(u64), *std.ArrayList(u32) } {
        return .{ &pool.ref_counts, &pool.writers, &pool.serials };
    }

    /// The size of the tables of blocks, which are as long as one another.
    const TableSize = struct { len: usize = 0, capacity: usize = 0 };

    fn tableSize(pool: *const FormatPool) TableSize {
        return .{ .len = pool.ref_counts.items.len, .capacity = pool.ref_counts.capacity };
    }

    /// Makes the tables as small as they were, unless a slab that was mapped since needs more.
    fn shrinkTables(pool: *FormatPool, before: TableSize) void {
        const len = @max(before.len, @min(pool.slabs.end * pool.blocks_per_slab, pool.block_count_max));
        inline for (pool.tables()) |table| {
            shrinkCapacity(std.meta.Elem(@TypeOf(table.items)), table, pool.gpa, @max(before.capacity, len));
            table.items.len = @min(len, table.items.len);
        }
        shrinkCapacity(u32, &pool.free, pool.gpa, @max(before.capacity, len));
    }

    fn shrinkCapacity(comptime T: type, list: *std.ArrayList(T), gpa: Allocator, capacity: usize) void {
        if (capacity >= list.capacity) return;
        const len = list.items.len;
        list.items.len = capacity;
        list.shrinkAndFree(gpa, capacity);
        list.items.len = @min(len, capacity);
    }

    /// Gives slabs of free blocks back to the system: all of them when no block is used, else as many as leave one
    /// slab's worth of free blocks.
    fn shrink(pool: *FormatPool) void {
        var slab_index = pool.slabs.end;
        while (slab_index > 0) {
            slab_index -= 1;
            if (pool.slabs.at(slab_index) == null) continue;
            const block_count = pool.slabBlocks(slab_index);
            if (!pool.isFree(slab_index)) continue;
            if (pool.totalCount() - block_count < pool.prewarmed) continue;
            if (pool.used_count != 0 and pool.free.items.len < 2 * @as(usize, block_count)) continue;
            pool.unmap(slab_index);
            pool.drops += block_count;
        }
    }

    /// Unmaps a slab of free blocks that was mapped in vain: its blocks count as never mapped.
    fn ungrow(pool: *FormatPool, slab_index: u32) void {
        pool.unmap(slab_index);
        pool.allocations -= pool.slabBlocks(slab_index);
    }

    fn unmap(pool: *FormatPool, slab_index: u32) void {
        const block_first = slab_index * pool.blocks_per_slab;
        const block_count = pool.slabBlocks(slab_index);
        var kept: usize = 0;
        for (pool.free.items) |block| {
            if (block >= block_first and block < block_first + block_count) continue;
            pool.free.items[kept] = block;
            kept += 1;
        }
        assert(pool.free.items.len - kept == block_count);
        pool.free.items.len = kept;
        slab_memory.free(pool.slab_allocator, pool.slabs.remove(pool.gpa, slab_index));
        if (pool.budget) |budget| budget.give(block_count * pool.block_bytes);
    }
};

const testing = std.testing;

fn testPool(block_bytes: u64, bytes_max: u64) !FormatPool {
    return .init(testing.allocator, slab_memory.system, block_bytes, bytes_max);
}

test "empty, one, two, full, empty again" {
    var pool = try testPool(100, 3 * 128);
    defer pool.deinit();
    try testing.expectEqual(128, pool.block_bytes);
    try testing.expectEqual(0, pool.stats().total_blocks);
    var blocks: [3]i32 = undefined;
    try pool.take(1, blocks[0..1]);
    try testing.expectEqual(1, pool.stats().used_blocks);
    try testing.expectEqual(2, pool.stats().free_blocks);
    var more: [3]i32 = @splat(-7);
    try testing.expectError(error.PoolEmpty, pool.take(1, &more)); // all or none
    try testing.expectEqual(@as([3]i32, @splat(-7)), more);
    try testing.expectEqual(1, pool.stats().used_blocks);
    try pool.take(1, blocks[1..3]);
    try testing.expectError(error.PoolEmpty, pool.take(1, more[0..1]));
    for (blocks) |block| try testing.expectEqual(0, @intFromPtr(pool.bytes(@intCast(block)).ptr) % 64);
    pool.release(&blocks);
    const stats = pool.stats();
    try testing.expectEqual(0, stats.used_blocks);
    try testing.expectEqual(3, stats.peak_blocks);
    try testing.expectEqual(3, stats.returns);
    try testing.expectEqual(0, stats.reserved_bytes); // really given back
    try testing.expectEqual(stats.allocations, stats.drops);
}

test "references are counted, and entries below 0 name nothing" {
    var pool = try testPool(64, 1 << 20);
    defer pool.deinit();
    var blocks: [2]i32 = undefined;
    try pool.take(1, &blocks);
    const table = [_]i32{ blocks[0], -1, blocks[1] };
    pool.retain(&table);
    try testing.expectEqual(2, pool.refCount(@intCast(blocks[0])));
    pool.release(&table);
    try testing.expectEqual(2, pool.stats().used_blocks);
    pool.release(&table);
    try testing.expectEqual(0, pool.stats().used_blocks);
}

test "a prewarmed pool hands out what is there, last given back first" {
    var pool = try testPool(64, 1 << 20);
    defer pool.deinit();
    try pool.prewarm(4);
    try testing.expectEqual(0, pool.stats().returns);
    var first: [1]i32 = undefined;
    var again: [1]i32 = undefined;
    try pool.take(1, &first);
    pool.release(&first);
    for (0..2) |_| {
        try pool.take(1, &again);
        try testing.expectEqual(first, again);
        pool.release(&again);
    }
    const stats = pool.stats();
    try testing.expectEqual(4, stats.prewarmed);
    try testing.expectEqual(3, stats.hits);
    try testing.expectEqual(0, stats.misses);
    try testing.expectEqual(3, stats.returns);
    try testing.expect(stats.total_blocks >= 4);
}

test "a prewarm that cannot be had maps nothing" {
    var pool = try testPool(1 << 20, 8 << 20);
    defer pool.deinit();
    try testing.expectError(error.PoolEmpty, pool.prewarm(9));
    try testing.expectError(error.PoolEmpty, pool.prewarm(std.math.maxInt(u32)));
    try testing.expectEqual(0, pool.stats().reserved_bytes);
    try pool.prewarm(8);
    try testing.expectEqual(8, pool.stats().total_blocks);
}

test "another writer sees zeros, the same one may see its own" {
    var pool = try testPool(64, 1 << 20);
    defer pool.deinit();
    try pool.prewarm(1);
    var block: [1]i32 = undefined;
    try pool.take(1, &block);
    @memset(pool.bytes(@intCast(block[0])), 0x5a);
    pool.release(&block);
    try pool.take(2, &block);
    try testing.expect(std.mem.allEqual(u8, pool.bytes(@intCast(block[0])), 0));
    pool.release(&block);
}

test "blocks of several slabs, and slabs that come back" {
    var pool = try testPool(slab_memory.bytes_max / 64, 1 << 40); // 16 MiB blocks, 4 a slab
    defer pool.deinit();
    try testing.expectEqual(4, pool.blocks_per_slab);
    var blocks: [10]i32 = undefined;
    try pool.take(1, &blocks);
    try testing.expectEqual(12, pool.stats().total_blocks);
    pool.release(blocks[0..8]);
    try testing.expect(pool.stats().reserved_bytes < 3 * 64 << 20);
    try testing.expect(pool.stats().drops >= 4);
    try pool.take(1, blocks[0..8]);
    for (blocks, 0..) |a, i| for (blocks[i + 1 ..]) |b| try testing.expect(a != b);
    pool.release(&blocks);
    try testing.expectEqual(0, pool.stats().reserved_bytes);
}

test "a block larger than the pool, or than a slab, is refused" {
    try testing.expectError(error.BlockTooLarge, testPool(129, 128));
    try testing.expectError(error.BlockTooLarge, testPool((1 << 30) + 1, 1 << 40));
    try testing.expectError(error.InvalidConfig, testPool(0, 128));
}

test "every allocation may fail, and nothing has changed" {
    var fail_index: usize = 0;
    while (true) : (fail_index += 1) {
        var failing: std.testing.FailingAllocator = .init(testing.allocator, .{ .fail_index = fail_index });
        const made = FormatPool.init(failing.allocator(), failing.allocator(), 64, 1 << 20);
        var pool = made catch |err| {
            try testing.expectEqual(error.OutOfMemory, err);
            continue;
        };
        defer pool.deinit();
        var block: [1]i32 = undefined;
        if (pool.take(1, &block)) {
            pool.release(&block);
            if (!failing.has_induced_failure) break;
        } else |err| {
            try testing.expectEqual(error.OutOfMemory, err);
            try testing.expectEqual(0, pool.stats().total_blocks);
            try testing.expectEqual(0, pool.stats().used_blocks);
        }
    }
    try testing.expect(fail_index >= 6);
}
