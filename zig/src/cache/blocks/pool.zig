//! The block pool of a layer group: its blocks in every format they come in, all on one budget. The blocks of a format are
//! made when they are first asked for.
//!
//! Blocks of all formats have the same positions, layers and heads; only their bytes differ. Several caches may share the
//! pool: then they must agree in what `shape` says. A pool lives as long as its owner.

const std = @import("std");
const Allocator = std.mem.Allocator;
const format_pool = @import("format_pool.zig");
const FormatPool = format_pool.FormatPool;
const BlockShape = @import("../../shape.zig").BlockShape;
const cpu = @import("../../device/cpu.zig");
const Dtype = @import("../../dtype.zig").Dtype;

/// Blocks of one format.
pub const Format = struct {
    shape: BlockShape,
    pool: FormatPool,
};

/// Blocks of one shape in every format they come in, which several paged caches may share.
pub const BlockPool = struct {
    gpa: Allocator,
    slab_allocator: Allocator,
    /// The shape of a block of the tail, which every cache writes to.
    shape: BlockShape,
    max_bytes: u64,
    budget: *format_pool.Budget,
    /// False where other layer groups are on the budget too.
    owns_budget: bool,
    lock: std.Io.Mutex = .init,
    /// The formats there are blocks of; the tail's is the first.
    formats: std.ArrayList(*Format) = .empty,

    pub const Error = FormatPool.InitError;

    /// Nothing is mapped yet. `max_bytes` bounds the slabs of all formats; null for what the process may use.
    pub fn init(gpa: Allocator, slab_allocator: Allocator, shape: BlockShape, max_bytes: ?u64) Error!BlockPool {
        const bytes = max_bytes orelse cpu.memoryLimit();
        const budget = try gpa.create(format_pool.Budget);
        errdefer gpa.destroy(budget);
        budget.* = .init(bytes);
        var pool: BlockPool = try .initBudget(gpa, slab_allocator, shape, bytes, budget);
        pool.owns_budget = true;
        return pool;
    }

    /// A pool on a budget that others share, which outlives it; else as `init`.
    pub fn initBudget(
        gpa: Allocator,
        slab_allocator: Allocator,
        shape: BlockShape,
        max_bytes: u64,
        budget: *format_pool.Budget,
    ) Error!BlockPool {
        try shape.validate();
        var pool: BlockPool = .{
            .gpa = gpa,
            .slab_allocator = slab_allocator,
            .shape = shape,
            .max_bytes = max_bytes,
            .budget = budget,
            .owns_budget = false,
        };
        errdefer pool.deinit();
        _ = try pool.get(shape.dtype_k, shape.dtype_v);
        return pool;
    }

    /// Frees a pool whose blocks were all released.
    pub fn deinit(pool: *BlockPool) void {
        for (pool.formats.items) |format| {
            format.pool.deinit();
            pool.gpa.destroy(format);
        }
        pool.formats.deinit(pool.gpa);
        if (pool.owns_budget) pool.gpa.destroy(pool.budget);
        pool.* = undefined;
    }

    /// The blocks of a format.
    pub fn get(pool: *BlockPool, dtype_k: Dtype, dtype_v: Dtype) Error!*Format {
        pool.lock.lockUncancelable(cpu.io());
        defer pool.lock.unlock(cpu.io());
        if (pool.known(dtype_k, dtype_v)) |format| return format;
        const shape = pool.shape.as(dtype_k, dtype_v);
        try shape.validate();
        try pool.formats.ensureUnusedCapacity(pool.gpa, 1);
        const format = try pool.gpa.create(Format);
        errdefer pool.gpa.destroy(format);
        format.* = .{
            .shape = shape,
            .pool = try .initBudget(pool.gpa, pool.slab_allocator, shape.blockBytes(), pool.max_bytes, pool.budget),
        };
        pool.formats.appendAssumeCapacity(format);
        return format;
    }

    /// The blocks of a format, or null where nobody has asked for them yet.
    pub fn find(pool: *BlockPool, dtype_k: Dtype, dtype_v: Dtype) ?*Format {
        pool.lock.lockUncancelable(cpu.io());
        defer pool.lock.unlock(cpu.io());
        return pool.known(dtype_k, dtype_v);
    }

    /// The blocks of a format in numbers, and what became of the requests for them.
    pub fn stats(pool: *BlockPool, dtype_k: Dtype, dtype_v: Dtype) Error!format_pool.Stats {
        return (try pool.get(dtype_k, dtype_v)).pool.stats();
    }

    /// Bytes of all slabs.
    pub fn reservedBytes(pool: *BlockPool) u64 {
        pool.lock.lockUncancelable(cpu.io());
        defer pool.lock.unlock(cpu.io());
        var bytes: u64 = 0;
        for (pool.formats.items) |format| bytes += format.pool.stats().reserved_bytes;
        return bytes;
    }

    fn known(pool: *const BlockPool, dtype_k: Dtype, dtype_v: Dtype) ?*Format {
        for (pool.formats.items) |format| {
            if (format.shape.dtype_k == dtype_k and format.shape.dtype_v == dtype_v) return format;
        }
        return null;
    }
};

const testing = std.testing;
const slab_memory = @import("../../device/slab.zig");

test "a pool for each format, under one budget" {
    const shape: BlockShape = .{
        .layer_count = 1,
        .kv_head_count = 2,
        .head_dim = 32,
        .block_size = 64,
        .dtype_k = .f32,
        .dtype_v = .f32,
    };
    var pool: BlockPool = try .init(testing.allocator, slab_memory.system, shape, 8 << 20);
    defer pool.deinit();
    const tail = try pool.get(.f32, .f32);
    const store = try pool.get(.q4_0, .q4_0);
    try testing.expect(tail != store);
    try testing.expectEqual(store, pool.find(.q4_0, .q4_0).?);
    try testing.expectEqual(null, pool.find(.q4_0, .i4));
    try testing.expectEqual(64 * 512, tail.pool.block_bytes);
    try testing.expectEqual(64 * 72, store.pool.block_bytes);
    // A slab is a sixteenth of the budget: what one format has taken, the other ones cannot.
    var blocks: [15 * 16]i32 = undefined;
    try tail.pool.take(1, &blocks);
    defer tail.pool.release(&blocks);
    try testing.expectEqual(blocks.len * 64 * 512, tail.pool.stats().reserved_bytes);
    var last: [1]i32 = undefined;
    try store.pool.take(1, &last);
    defer store.pool.release(&last);
    const third = try pool.get(.i8, .i8);
    var none: [1]i32 = undefined;
    try testing.expectError(error.PoolEmpty, third.pool.take(1, &none));
    try testing.expectEqual(8 << 20, pool.reservedBytes());
}

test "a quantized format needs whole vectors of codes" {
    const shape: BlockShape = .{
        .layer_count = 1,
        .kv_head_count = 1,
        .head_dim = 48,
        .block_size = 64,
        .dtype_k = .f16,
        .dtype_v = .f16,
    };
    var pool: BlockPool = try .init(testing.allocator, slab_memory.system, shape, 1 << 30);
    defer pool.deinit();
    try testing.expectError(error.InvalidConfig, pool.get(.q8_0, .f16));
    try testing.expectError(error.InvalidConfig, pool.get(.f16, .i4));
    _ = try pool.get(.f32, .bf16);
}
