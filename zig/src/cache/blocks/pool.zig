//! The blocks of one layer group, in every format they come in: a pool for each format, made when it is first asked for,
//! all on one budget.
//!
//! Blocks of all formats have the same positions, layers and heads; only their bytes differ. Several caches may share the
//! pools: then they must agree in what `shape` says. A pool lives as long as its owner.

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

pub const BlockPool = struct {
    gpa: Allocator,
    slab_allocator: Allocator,
    /// Of the tail, which every cache writes to.
    shape: BlockShape,
    bytes_max: u64,
    budget: *format_pool.Budget,
    /// False where the budget is also that of other layer groups.
    owns_budget: bool,
    lock: std.Io.Mutex = .init,
    /// The tail's is the first.
    formats: std.ArrayList(*Format) = .empty,

    pub const Error = FormatPool.InitError;

    /// Nothing is mapped yet. `bytes_max` bounds the slabs of all formats, and so does the budget, if one is given, which
    /// is then shared with others.
    pub fn init(
        gpa: Allocator,
        slab_allocator: Allocator,
        shape: BlockShape,
        bytes_max: u64,
        shared_budget: ?*format_pool.Budget,
    ) Error!BlockPool {
        try shape.validate();
        const budget = shared_budget orelse try gpa.create(format_pool.Budget);
        if (shared_budget == null) budget.* = .init(bytes_max);
        var pools: BlockPool = .{
            .gpa = gpa,
            .slab_allocator = slab_allocator,
            .shape = shape,
            .bytes_max = bytes_max,
            .budget = budget,
            .owns_budget = shared_budget == null,
        };
        errdefer pools.deinit();
        _ = try pools.get(shape.dtype_k, shape.dtype_v);
        return pools;
    }

    /// All blocks must have been released.
    pub fn deinit(pools: *BlockPool) void {
        for (pools.formats.items) |format| {
            format.pool.deinit();
            pools.gpa.destroy(format);
        }
        pools.formats.deinit(pools.gpa);
        if (pools.owns_budget) pools.gpa.destroy(pools.budget);
        pools.* = undefined;
    }

    /// The blocks of a format.
    pub fn get(pools: *BlockPool, dtype_k: Dtype, dtype_v: Dtype) Error!*Format {
        pools.lock.lockUncancelable(cpu.io());
        defer pools.lock.unlock(cpu.io());
        if (pools.known(dtype_k, dtype_v)) |format| return format;
        const shape = pools.shape.as(dtype_k, dtype_v);
        try shape.validate();
        try pools.formats.ensureUnusedCapacity(pools.gpa, 1);
        const format = try pools.gpa.create(Format);
        errdefer pools.gpa.destroy(format);
        format.* = .{
            .shape = shape,
            .pool = try .initBudget(pools.gpa, pools.slab_allocator, shape.blockBytes(), pools.bytes_max, pools.budget),
        };
        pools.formats.appendAssumeCapacity(format);
        return format;
    }

    /// The blocks of a format, or null where nobody has asked for them yet.
    pub fn find(pools: *BlockPool, dtype_k: Dtype, dtype_v: Dtype) ?*Format {
        pools.lock.lockUncancelable(cpu.io());
        defer pools.lock.unlock(cpu.io());
        return pools.known(dtype_k, dtype_v);
    }

    /// Bytes of all slabs.
    pub fn reservedBytes(pools: *BlockPool) u64 {
        pools.lock.lockUncancelable(cpu.io());
        defer pools.lock.unlock(cpu.io());
        var bytes: u64 = 0;
        for (pools.formats.items) |format| bytes += format.pool.stats().reserved_bytes;
        return bytes;
    }

    fn known(pools: *const BlockPool, dtype_k: Dtype, dtype_v: Dtype) ?*Format {
        for (pools.formats.items) |format| {
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
    var pools: BlockPool = try .init(testing.allocator, slab_memory.system, shape, 8 << 20, null);
    defer pools.deinit();
    const tail = try pools.get(.f32, .f32);
    const store = try pools.get(.q4_0, .q4_0);
    try testing.expect(tail != store);
    try testing.expectEqual(store, pools.find(.q4_0, .q4_0).?);
    try testing.expectEqual(null, pools.find(.q4_0, .i4));
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
    const third = try pools.get(.i8, .i8);
    var none: [1]i32 = undefined;
    try testing.expectError(error.PoolEmpty, third.pool.take(1, &none));
    try testing.expectEqual(8 << 20, pools.reservedBytes());
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
    var pools: BlockPool = try .init(testing.allocator, slab_memory.system, shape, 1 << 30, null);
    defer pools.deinit();
    try testing.expectError(error.InvalidConfig, pools.get(.q8_0, .f16));
    try testing.expectError(error.InvalidConfig, pools.get(.f16, .i4));
    _ = try pools.get(.f32, .bf16);
}
