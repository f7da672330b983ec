//! Bodies of the exports of a block pool that several paged caches share.

const format_pool = @import("../cache/blocks/format_pool.zig");
const block_pool = @import("../cache/blocks/pool.zig");
const BlockPool = block_pool.BlockPool;
const Format = block_pool.Format;
const Dtype = @import("../dtype.zig").Dtype;
const handle = @import("handle.zig");
const memory = @import("memory.zig");
const record = @import("record.zig");
const BlockShape = @import("../shape.zig").BlockShape;
const status = @import("status.zig");

/// The caches a pool is for: one layer group, and the formats of its tail.
pub const PoolRecord = extern struct {
    size_bytes: u32 = 0,
    layer_count: u32,
    kv_head_count: u32,
    head_dim: u32,
    block_size: u32,
    dtype_k: u32,
    dtype_v: u32,
    /// 0 for what the process may use.
    max_bytes: record.Wide,
};

pub const StatsRecord = extern struct {
    size_bytes: u32 = 0,
    total_blocks: u32,
    free_blocks: u32,
    used_blocks: u32,
    peak_blocks: u32,
    prewarmed: u32,
    block_bytes: record.Wide,
    hits: record.Wide,
    misses: record.Wide,
    allocations: record.Wide,
    returns: record.Wide,
    drops: record.Wide,
    reserved_bytes: record.Wide,
    metadata_bytes: record.Wide,

    pub fn from(facts: format_pool.Stats) StatsRecord {
        return .{
            .total_blocks = facts.total_blocks,
            .free_blocks = facts.free_blocks,
            .used_blocks = facts.used_blocks,
            .peak_blocks = facts.peak_blocks,
            .prewarmed = facts.prewarmed,
            .block_bytes = .from(facts.block_bytes),
            .hits = .from(facts.hits),
            .misses = .from(facts.misses),
            .allocations = .from(facts.allocations),
            .returns = .from(facts.returns),
            .drops = .from(facts.drops),
            .reserved_bytes = .from(facts.reserved_bytes),
            .metadata_bytes = .from(facts.metadata_bytes),
        };
    }
};

pub fn create(options: ?[*]const u8, options_bytes: u32) callconv(.c) i32 {
    return createPool(options, options_bytes) catch |err| status.fromError(err);
}

fn createPool(source: ?[*]const u8, source_bytes: u32) status.Error!i32 {
    const options = try record.read(PoolRecord, source, source_bytes);
    const shape: BlockShape = .{
        .layer_count = options.layer_count,
        .kv_head_count = options.kv_head_count,
        .head_dim = options.head_dim,
        .block_size = options.block_size,
        .dtype_k = Dtype.floatFromWord(options.dtype_k) orelse return error.InvalidConfig,
        .dtype_v = Dtype.floatFromWord(options.dtype_v) orelse return error.InvalidConfig,
    };
    const max_bytes = options.max_bytes.value();
    var pool: BlockPool = try .init(memory.gpa, memory.slabs, shape, if (max_bytes == 0) null else max_bytes);
    errdefer pool.deinit();
    return handle.create(.pool, .{ .pool = pool }, null);
}

pub fn free(word: u32) callconv(.c) i32 {
    handle.free(.pool, word) catch |err| return status.fromError(err);
    return 0;
}

/// (pool, blocks, dtype_k, dtype_v): blocks of one format.
pub fn prewarm(word: u32, block_count: u32, dtype_k: u32, dtype_v: u32) callconv(.c) i32 {
    const use = handle.begin(.pool, word) catch |err| return status.fromError(err);
    defer use.end();
    const format = formatOf(use.target, dtype_k, dtype_v) catch |err| return status.fromError(err);
    format.pool.prewarm(block_count) catch |err| return status.fromError(err);
    return 0;
}

/// (pool, dtype_k, dtype_v, PoolStatsRecord out, bytes): the blocks of one format.
pub fn stats(word: u32, dtype_k: u32, dtype_v: u32, out: ?[*]u8, out_bytes: u32) callconv(.c) i32 {
    const use = handle.begin(.pool, word) catch |err| return status.fromError(err);
    defer use.end();
    const format = formatOf(use.target, dtype_k, dtype_v) catch |err| return status.fromError(err);
    record.write(StatsRecord, out, out_bytes, .from(format.pool.stats())) catch |err| return status.fromError(err);
    return 0;
}

/// The blocks of a format.
fn formatOf(pool: *BlockPool, dtype_k: u32, dtype_v: u32) status.Error!*Format {
    return pool.get(
        Dtype.fromWord(dtype_k) orelse return error.InvalidConfig,
        Dtype.fromWord(dtype_v) orelse return error.InvalidConfig,
    );
}
