//! Records as a caller sends them, for the tests of the C ABI: fields by name, the size in front.

const std = @import("std");
const attention = @import("attend.zig");
const contiguous = @import("contiguous.zig");
const paged = @import("paged.zig");
const pool = @import("pool.zig");

/// A record with its own size in front.
pub fn sized(record: anytype) @TypeOf(record) {
    var sent = record;
    sent.size_bytes = @sizeOf(@TypeOf(record));
    return sent;
}

/// An empty record to be filled by a call.
pub fn empty(comptime Record: type) Record {
    return sized(std.mem.zeroes(Record));
}

/// The byte length of a record behind a pointer.
pub fn size(record: anytype) u32 {
    return @sizeOf(@TypeOf(record.*));
}

/// Anything as a buffer.
pub fn bytes(pointer: anytype) [*]u8 {
    return @ptrCast(@constCast(pointer));
}

/// Numbers of formats.
pub const f32_word = 0;
pub const f16_word = 1;
pub const bf16_word = 2;
pub const q8_0_word = 3;
pub const i4_word = 6;

/// A contiguous cache of f32.
pub fn contiguousOf(layer_count: u32, kv_head_count: u32, head_dim: u32, max_seq_len: u32) contiguous.ContiguousRecord {
    return sized(contiguous.ContiguousRecord{
        .layer_count = layer_count,
        .sequence_count = 1,
        .kv_head_count = kv_head_count,
        .head_dim = head_dim,
        .max_seq_len = max_seq_len,
        .dtype_k = f32_word,
        .dtype_v = f32_word,
        .max_bytes = .{},
    });
}

/// A paged cache of f32 that keeps all rows.
pub fn pagedOf(layer_count: u32, block_size: u32, max_seq_len: u32) paged.PagedRecord {
    return sized(paged.PagedRecord{
        .layer_count = layer_count,
        .block_size = block_size,
        .max_seq_len = max_seq_len,
        .dtype_k = f32_word,
        .dtype_v = f32_word,
        .retention_tokens = 0,
        .retention_sink_tokens = 0,
        .max_bytes = .{},
        .pool = 0,
    });
}

/// A layer without a window or a store of its own.
pub fn layerOf(kv_head_count: u32, head_dim: u32) paged.LayerRecord {
    return sized(paged.LayerRecord{
        .kv_head_count = kv_head_count,
        .head_dim = head_dim,
        .window_tokens = 0,
        .store_k = 0,
        .store_v = 0,
    });
}

/// A pool of blocks of f32.
pub fn poolOf(layer_count: u32, kv_head_count: u32, head_dim: u32, block_size: u32, max_bytes: u64) pool.PoolRecord {
    return sized(pool.PoolRecord{
        .layer_count = layer_count,
        .kv_head_count = kv_head_count,
        .head_dim = head_dim,
        .block_size = block_size,
        .dtype_k = f32_word,
        .dtype_v = f32_word,
        .max_bytes = .from(max_bytes),
    });
}

/// Causal attention with nothing else said.
pub const causal = sized(attention.AttendRecord{
    .flags = @intFromEnum(attention.Flag.causal),
    .softmax_scale = 0,
    .window_tokens = 0,
    .sink_tokens = 0,
    .softcap = 0,
});
