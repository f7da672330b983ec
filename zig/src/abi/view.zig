//! A window on rows in place, as it crosses the ABI: addresses for the runtimes to make arrays over.

const record = @import("record.zig");
const std = @import("std");

/// One live block, one appended run, or all rows of a contiguous layer.
pub const ViewRecord = extern struct {
    size_bytes: u32 = 0,
    /// First row of the first head.
    keys: record.Wide,
    values: record.Wide,
    /// Absolute position of the first row.
    start: u32,
    /// Rows.
    length: u32,
    dtype_k: u32,
    dtype_v: u32,
    /// In elements; 0 where a side is quantized.
    token_stride: u32,
    head_stride: u32,
    /// A `Tier`.
    tier: u32 = 0,
    delta: i32 = 0,
    generation: u32,
    /// Tokens the block can hold; 0 where there are no blocks.
    block_size: u32 = 0,
    /// Why there is no such window, for `contiguous_kv`; 0 where there is one.
    reason: u32 = 0,
    /// Bytes of all heads of a side of a quantized block, which begin at `keys` and `values`; 0 for a side in floats.
    bytes_k: u32 = 0,
    bytes_v: u32 = 0,
};

/// A generation in 31 bits, so that it is a positive result.
pub fn generationWord(generation: u32) u32 {
    return generation & std.math.maxInt(i32);
}

/// Why rows do not lie in one piece, token-major. The numbers cross the ABI and are never changed.
pub const Reason = enum(u32) {
    none = 0,
    head_major = 1,
    not_adjacent = 2,
    quantized = 3,
    evicted = 4,
    on_gpu = 5,
};
