//! What a C caller can do a Zig caller can, too: every export has a name in `kvern.zig`.

const std = @import("std");
const kvern = @import("../kvern.zig");

/// The Zig name behind a symbol: declarations and fields of `kvern.zig`, one after the other.
const Name = struct { symbol: []const u8, zig: []const u8 };

/// Symbols that are about the C ABI and nothing else: its version, its tables, and what its handles name.
const of_the_c_abi = [_][]const u8{ "kv_abi_version", "kv_abi_manifest", "kv_sequence_cache" };

const names = [_]Name{
    .{ .symbol = "kv_system_info", .zig = "levelMask kernels cpuCount memoryLimit threadCount reservedBytes maxBytes" },
    .{ .symbol = "kv_level_set", .zig = "setLevel" },
    .{ .symbol = "kv_max_bytes_set", .zig = "setMaxBytes" },
    .{ .symbol = "kv_reserved_mib", .zig = "reservedBytes" },
    .{ .symbol = "kv_thread_count_set", .zig = "setThreadCount" },
    .{ .symbol = "kv_read_rate", .zig = "readRate" },
    .{ .symbol = "kv_memory_bytes", .zig = "ContiguousOptions.memoryBytes" },
    .{ .symbol = "kv_attend", .zig = "attendSequences" },
    .{ .symbol = "kv_rows_quantize", .zig = "quantizeRows" },
    .{ .symbol = "kv_rows_dequantize", .zig = "dequantizeRows" },
    .{ .symbol = "kv_block_quantize", .zig = "quantizePlane" },
    .{ .symbol = "kv_block_dequantize", .zig = "dequantizePlane" },
    .{ .symbol = "kv_block_pack", .zig = "packPlane" },
    .{ .symbol = "kv_block_unpack", .zig = "unpackPlane" },
    .{ .symbol = "kv_contiguous_create", .zig = "ContiguousCache.init" },
    .{ .symbol = "kv_contiguous_free", .zig = "ContiguousCache.deinit" },
    .{ .symbol = "kv_contiguous_config", .zig = "ContiguousCache.shape" },
    .{ .symbol = "kv_contiguous_store", .zig = "ContiguousCache.store" },
    .{ .symbol = "kv_contiguous_advance", .zig = "ContiguousCache.advance" },
    .{ .symbol = "kv_contiguous_reset", .zig = "ContiguousCache.reset" },
    .{ .symbol = "kv_contiguous_memory_bytes", .zig = "ContiguousCache.memoryBytes" },
    .{ .symbol = "kv_contiguous_stats", .zig = "ContiguousCache.stats" },
    .{ .symbol = "kv_contiguous_offset", .zig = "ContiguousCache.offset" },
    .{ .symbol = "kv_pool_create", .zig = "BlockPool.init" },
    .{ .symbol = "kv_pool_free", .zig = "BlockPool.deinit" },
    .{ .symbol = "kv_pool_prewarm", .zig = "FormatPool.prewarm" },
    .{ .symbol = "kv_pool_stats", .zig = "FormatPool.stats" },
    .{ .symbol = "kv_paged_create", .zig = "PagedCache.init" },
    .{ .symbol = "kv_paged_free", .zig = "PagedCache.deinit" },
    .{ .symbol = "kv_paged_config", .zig = "PagedCache.layerShape PagedCache.state" },
    .{ .symbol = "kv_paged_append", .zig = "PagedCache.append" },
    .{ .symbol = "kv_paged_reorder", .zig = "PagedCache.reorder" },
    .{ .symbol = "kv_paged_reset", .zig = "PagedCache.reset" },
    .{ .symbol = "kv_paged_update_policy", .zig = "PagedCache.updatePolicy" },
    .{ .symbol = "kv_paged_fidelity", .zig = "PagedCache.fidelity" },
    .{ .symbol = "kv_paged_stats", .zig = "PagedCache.stats" },
    .{ .symbol = "kv_paged_prefix_stats", .zig = "PagedCache.prefixStats PagedCache.prefixMetadataBytes" },
    .{ .symbol = "kv_paged_pending_prefix", .zig = "PagedCache.pendingPrefix" },
    .{ .symbol = "kv_paged_events", .zig = "PagedCache.events PagedCache.takeEvents" },
    .{ .symbol = "kv_paged_explain", .zig = "PagedCache.explain" },
    .{ .symbol = "kv_paged_pool_stats", .zig = "PagedCache.poolStats" },
    .{ .symbol = "kv_sequence_create", .zig = "PagedCache.createSequence ContiguousCache.sequence" },
    .{ .symbol = "kv_sequence_create_for", .zig = "PagedCache.createSequenceFor" },
    .{ .symbol = "kv_sequence_free", .zig = "PagedCache.freeSequence" },
    .{ .symbol = "kv_sequence_fork", .zig = "PagedCache.fork" },
    .{ .symbol = "kv_sequence_append", .zig = "Sequence.append" },
    .{ .symbol = "kv_sequence_commit", .zig = "Sequence.commit" },
    .{ .symbol = "kv_sequence_commit_kept", .zig = "Sequence.commitKept" },
    .{ .symbol = "kv_sequence_commit_tokens", .zig = "PagedSequence.commitTokens" },
    .{ .symbol = "kv_sequence_commit_kept_tokens", .zig = "PagedSequence.commitKeptTokens" },
    .{ .symbol = "kv_sequence_explain", .zig = "PagedSequence.explain" },
    .{ .symbol = "kv_sequence_truncate", .zig = "Sequence.truncate" },
    .{ .symbol = "kv_sequence_seq_len", .zig = "Sequence.seqLen" },
    .{ .symbol = "kv_sequence_rewindable_to", .zig = "Sequence.rewindableTo" },
    .{ .symbol = "kv_sequence_row_count", .zig = "Sequence.rows Rows.row_count" },
    .{ .symbol = "kv_sequence_resident_count", .zig = "Sequence.rows Rows.residentCount" },
    .{ .symbol = "kv_sequence_generation", .zig = "Sequence.generation" },
    .{ .symbol = "kv_sequence_views", .zig = "Sequence.viewsFrom" },
    .{ .symbol = "kv_sequence_contiguous_kv", .zig = "Sequence.contiguousKv" },
    .{ .symbol = "kv_sequence_gather", .zig = "Sequence.gather" },
    .{ .symbol = "kv_sequence_layer_device", .zig = "Sequence.layerDevice" },
    .{ .symbol = "kv_sequence_block_table", .zig = "PagedSequence.blockTable" },
    .{ .symbol = "kv_sequence_block_references", .zig = "PagedSequence.seenBlock" },
    .{ .symbol = "kv_sequence_block_tiers", .zig = "PagedSequence.seenBlock" },
    .{ .symbol = "kv_buffer_pool_create", .zig = "BufferPool.init" },
    .{ .symbol = "kv_buffer_pool_free", .zig = "BufferPool.deinit BufferPool.close" },
    .{ .symbol = "kv_buffer_pool_prewarm", .zig = "BufferPool.prewarm" },
    .{ .symbol = "kv_buffer_pool_prewarm_all", .zig = "BufferPool.prewarmAll" },
    .{ .symbol = "kv_buffer_pool_clear", .zig = "BufferPool.clear" },
    .{ .symbol = "kv_buffer_pool_stats", .zig = "BufferPool.stats" },
    .{ .symbol = "kv_buffer_acquire", .zig = "BufferPool.acquire" },
    .{ .symbol = "kv_buffer_free", .zig = "AlignedBuffer.deinit" },
    .{ .symbol = "kv_buffer_clone", .zig = "AlignedBuffer.clone" },
    .{ .symbol = "kv_buffer_info", .zig = "AlignedBuffer.memory AlignedBuffer.capacity AlignedBuffer.len" },
    .{ .symbol = "kv_buffer_length", .zig = "AlignedBuffer.len" },
    .{ .symbol = "kv_buffer_extend", .zig = "AlignedBuffer.extend" },
    .{ .symbol = "kv_buffer_clear", .zig = "AlignedBuffer.clear" },
};

/// A symbol of the library has a Zig name, or is about the C ABI.
pub fn isNamed(symbol: []const u8) bool {
    for (of_the_c_abi) |other| if (std.mem.eql(u8, other, symbol)) return true;
    for (names) |name| if (std.mem.eql(u8, name.symbol, symbol)) return true;
    return false;
}

pub const count = names.len + of_the_c_abi.len;

fn exists(comptime Container: type, comptime path: []const u8) bool {
    const dot = comptime std.mem.indexOfScalar(u8, path, '.') orelse
        return @hasDecl(Container, path) or (@typeInfo(Container) == .@"struct" and @hasField(Container, path));
    if (!@hasDecl(Container, path[0..dot])) return false;
    return exists(@field(Container, path[0..dot]), path[dot + 1 ..]);
}

test "every Zig name behind an export exists" {
    @setEvalBranchQuota(100_000);
    inline for (names) |name| {
        comptime var each = std.mem.tokenizeScalar(u8, name.zig, ' ');
        inline while (comptime each.next()) |path| {
            errdefer std.debug.print("{s}: kvern.{s}\n", .{ name.symbol, path });
            try std.testing.expect(comptime exists(kvern, path));
        }
    }
    try std.testing.expect(comptime !exists(kvern, "ContiguousCache.nothing"));
    try std.testing.expect(comptime !exists(kvern, "nothing"));
}
