//! Bodies of the exports of a contiguous cache as a whole; those of its sequences are in `sequence.zig`.
//!
//! Buffers are borrowed for the call, unaligned, and come with their element count; a null buffer is right where the
//! count is 0.

const std = @import("std");
const contiguous = @import("../cache/contiguous.zig");
const ContiguousCache = contiguous.ContiguousCache;
const buffer = @import("buffer.zig");
const Dtype = @import("../dtype.zig").Dtype;
const handle = @import("handle.zig");
const memory = @import("memory.zig");
const record = @import("record.zig");
const status = @import("status.zig");

const gpa = memory.gpa;

/// What a contiguous cache is made of.
pub const ContiguousRecord = extern struct {
    size_bytes: u32 = 0,
    layer_count: u32,
    sequence_count: u32,
    kv_head_count: u32,
    head_dim: u32,
    max_seq_len: u32,
    dtype_k: u32,
    dtype_v: u32,
    /// 0 for what the process may use.
    max_bytes: record.Wide,
    /// 0 where the length of the queries tells.
    q_head_count: u32 = 0,

    fn read(source: ?[*]const u8, record_bytes: u32) status.Error!contiguous.Options {
        const options = try record.read(ContiguousRecord, source, record_bytes);
        const max_bytes = options.max_bytes.value();
        return .{
            .layer_count = options.layer_count,
            .sequence_count = options.sequence_count,
            .kv_head_count = options.kv_head_count,
            .head_dim = options.head_dim,
            .q_head_count = if (options.q_head_count == 0) null else options.q_head_count,
            .max_seq_len = options.max_seq_len,
            .dtype_k = Dtype.floatFromWord(options.dtype_k) orelse return error.InvalidConfig,
            .dtype_v = Dtype.floatFromWord(options.dtype_v) orelse return error.InvalidConfig,
            .max_bytes = if (max_bytes == 0) null else max_bytes,
        };
    }
};

/// What a cache occupies.
pub const StatsRecord = extern struct {
    size_bytes: u32 = 0,
    sequence_count: u32,
    kv_bytes: record.Wide,
    reserved_bytes: record.Wide,
    metadata_bytes: record.Wide,
    padding_bytes: record.Wide,
    slab_count: u32,
};

/// (ContiguousRecord, bytes, f64 out, count): the bytes of keys and values such a cache would have.
pub fn memoryBytes(options: ?[*]const u8, options_bytes: u32, out: ?[*]u8, out_count: u32) callconv(.c) i32 {
    return status.word(planMemory(options, options_bytes, out, out_count));
}

fn planMemory(source: ?[*]const u8, source_bytes: u32, out: ?[*]u8, out_count: u32) status.Error!void {
    const options = try ContiguousRecord.read(source, source_bytes);
    try record.writeF64(out, out_count, try options.memoryBytes());
}

pub fn create(options: ?[*]const u8, options_bytes: u32) callconv(.c) i32 {
    const parsed = ContiguousRecord.read(options, options_bytes) catch |err| return status.fromError(err);
    var cache = ContiguousCache.initSlabs(gpa, memory.slabs, parsed) catch |err| return status.fromError(err);
    return handle.create(.contiguous, .{ .contiguous = cache }, null) catch |err| {
        cache.deinit();
        return status.fromError(err);
    };
}

pub fn free(word: u32) callconv(.c) i32 {
    return status.word(handle.free(.contiguous, word));
}

pub fn config(word: u32, out: ?[*]u8, out_bytes: u32) callconv(.c) i32 {
    const use = handle.begin(.contiguous, word) catch |err| return status.fromError(err);
    defer use.end();
    const shape = use.target.shape;
    return status.word(record.write(ContiguousRecord, out, out_bytes, .{
        .layer_count = shape.layer_count,
        .sequence_count = shape.sequence_count,
        .kv_head_count = shape.kv_head_count,
        .head_dim = shape.head_dim,
        .max_seq_len = shape.max_seq_len,
        .dtype_k = @intFromEnum(use.target.dtype_k),
        .dtype_v = @intFromEnum(use.target.dtype_v),
        .max_bytes = .{},
        .q_head_count = use.target.q_head_count orelse 0,
    }));
}

pub fn store(
    word: u32,
    layer: u32,
    sequence: u32,
    k: ?[*]const u8,
    k_count: u32,
    v: ?[*]const u8,
    v_count: u32,
    dtype: u32,
) callconv(.c) i32 {
    const use = handle.begin(.contiguous, word) catch |err| return status.fromError(err);
    defer use.end();
    const k_input, const v_input = buffer.inputs(k, k_count, v, v_count, dtype, 0, 0) catch |err| return status.fromError(err);
    return status.word(use.target.store(layer, sequence, k_input, v_input));
}

pub fn advance(word: u32) callconv(.c) i32 {
    const use = handle.begin(.contiguous, word) catch |err| return status.fromError(err);
    defer use.end();
    return status.word(use.target.advance());
}

pub fn reset(word: u32) callconv(.c) i32 {
    const use = handle.begin(.contiguous, word) catch |err| return status.fromError(err);
    defer use.end();
    use.target.reset();
    return 0;
}

pub fn cacheMemoryBytes(word: u32, out: ?[*]u8, out_count: u32) callconv(.c) i32 {
    const use = handle.begin(.contiguous, word) catch |err| return status.fromError(err);
    defer use.end();
    return status.word(record.writeF64(out, out_count, use.target.memoryBytes()));
}

pub fn stats(word: u32, out: ?[*]u8, out_bytes: u32) callconv(.c) i32 {
    const use = handle.begin(.contiguous, word) catch |err| return status.fromError(err);
    defer use.end();
    const facts = use.target.stats();
    return status.word(record.write(StatsRecord, out, out_bytes, .{
        .sequence_count = use.target.shape.sequence_count,
        .kv_bytes = .from(facts.kv_bytes),
        .reserved_bytes = .from(facts.reserved_bytes),
        .metadata_bytes = .from(facts.metadata_bytes),
        .padding_bytes = .from(facts.padding_bytes),
        .slab_count = facts.slab_count,
    }));
}

pub fn offset(
    word: u32,
    layer: u32,
    sequence: u32,
    position: u32,
    kv_head: u32,
    dim: u32,
    out: ?[*]u8,
    out_count: u32,
) callconv(.c) i32 {
    const use = handle.begin(.contiguous, word) catch |err| return status.fromError(err);
    defer use.end();
    const element = use.target.offset(layer, sequence, position, kv_head, dim) catch |err| return status.fromError(err);
    return status.word(record.writeF64(out, out_count, element));
}
