//! The C ABI: one table, from which come the exported symbols and the manifest that callers compare their own with.
//!
//! A result is an i32: 0 or a positive count or handle, or a negative status (`abi/status.zig`). Only u32, i32, f32, f64
//! and buffers cross. To add a symbol: its body in `abi/<noun>.zig`, a row here, a row in `src/ffi/exports.ts`, a test.

const std = @import("std");
const aligned_buffer = @import("abi/aligned_buffer.zig");
const buffer_pool = @import("abi/buffer_pool.zig");
const contiguous = @import("abi/contiguous.zig");
const library = @import("abi/library.zig");
const paged = @import("abi/paged.zig");
const pool = @import("abi/pool.zig");
const quantization = @import("abi/quantization.zig");
const sequence = @import("abi/sequence.zig");
const status = @import("abi/status.zig");

/// Every symbol of the library.
const exports = struct {
    pub const kv_abi_version = library.version;
    pub const kv_abi_manifest = manifest;
    pub const kv_system_info = library.systemInfo;
    pub const kv_level_set = library.levelSet;
    pub const kv_max_bytes_set = library.maxBytesSet;
    pub const kv_reserved_mib = library.reservedMib;
    pub const kv_thread_count_set = library.threadCountSet;
    pub const kv_read_rate = library.readRate;
    pub const kv_memory_bytes = contiguous.memoryBytes;

    pub const kv_rows_quantize = quantization.rowsQuantize;
    pub const kv_rows_dequantize = quantization.rowsDequantize;
    pub const kv_block_quantize = quantization.blockQuantize;
    pub const kv_block_dequantize = quantization.blockDequantize;
    pub const kv_block_pack = quantization.blockPack;
    pub const kv_block_unpack = quantization.blockUnpack;

    pub const kv_contiguous_create = contiguous.create;
    pub const kv_contiguous_free = contiguous.free;
    pub const kv_contiguous_config = contiguous.config;
    pub const kv_contiguous_store = contiguous.store;
    pub const kv_contiguous_append = contiguous.append;
    pub const kv_contiguous_advance = contiguous.advance;
    pub const kv_contiguous_reset = contiguous.reset;
    pub const kv_contiguous_commit = contiguous.commit;
    pub const kv_contiguous_truncate = contiguous.truncate;
    pub const kv_contiguous_seq_len = contiguous.seqLen;
    pub const kv_contiguous_row_count = contiguous.rowCount;
    pub const kv_contiguous_generation = contiguous.generation;
    pub const kv_contiguous_memory_bytes = contiguous.cacheMemoryBytes;
    pub const kv_contiguous_stats = contiguous.stats;
    pub const kv_contiguous_offset = contiguous.offset;
    pub const kv_contiguous_keys = contiguous.keys;
    pub const kv_contiguous_values = contiguous.values;
    pub const kv_contiguous_views = contiguous.views;
    pub const kv_contiguous_contiguous_kv = contiguous.contiguousKv;
    pub const kv_contiguous_gather = contiguous.gather;
    pub const kv_contiguous_layer_device = contiguous.layerDevice;
    pub const kv_contiguous_attend = contiguous.attend;

    pub const kv_pool_create = pool.create;
    pub const kv_pool_free = pool.free;
    pub const kv_pool_prewarm = pool.prewarm;
    pub const kv_pool_stats = pool.stats;

    pub const kv_paged_create = paged.create;
    pub const kv_paged_free = paged.free;
    pub const kv_paged_config = paged.config;
    pub const kv_paged_append = paged.append;
    pub const kv_paged_attend = paged.attend;
    pub const kv_paged_reorder = paged.reorder;
    pub const kv_paged_reset = paged.reset;
    pub const kv_paged_update_policy = paged.updatePolicy;
    pub const kv_paged_fidelity = paged.fidelity;
    pub const kv_paged_stats = paged.stats;
    pub const kv_paged_pool_stats = paged.poolStats;

    pub const kv_sequence_create = sequence.create;
    pub const kv_sequence_free = sequence.free;
    pub const kv_sequence_cache = sequence.cacheOf;
    pub const kv_sequence_fork = sequence.fork;
    pub const kv_sequence_append = sequence.append;
    pub const kv_sequence_commit = sequence.commit;
    pub const kv_sequence_commit_kept = sequence.commitKept;
    pub const kv_sequence_truncate = sequence.truncate;
    pub const kv_sequence_seq_len = sequence.seqLen;
    pub const kv_sequence_rewindable_to = sequence.rewindableTo;
    pub const kv_sequence_row_count = sequence.rowCount;
    pub const kv_sequence_resident_count = sequence.residentCount;
    pub const kv_sequence_generation = sequence.generation;
    pub const kv_sequence_views = sequence.views;
    pub const kv_sequence_contiguous_kv = sequence.contiguousKv;
    pub const kv_sequence_gather = sequence.gather;
    pub const kv_sequence_layer_device = sequence.layerDevice;
    pub const kv_sequence_block_table = sequence.blockTable;
    pub const kv_sequence_block_references = sequence.blockReferences;
    pub const kv_sequence_block_tiers = sequence.blockTiers;
    pub const kv_sequence_attend = sequence.attend;

    pub const kv_buffer_pool_create = buffer_pool.create;
    pub const kv_buffer_pool_free = buffer_pool.free;
    pub const kv_buffer_pool_prewarm = buffer_pool.prewarm;
    pub const kv_buffer_pool_prewarm_all = buffer_pool.prewarmAll;
    pub const kv_buffer_pool_clear = buffer_pool.clear;
    pub const kv_buffer_pool_stats = buffer_pool.stats;

    pub const kv_buffer_acquire = buffer_pool.acquire;
    pub const kv_buffer_free = aligned_buffer.free;
    pub const kv_buffer_clone = aligned_buffer.clone;
    pub const kv_buffer_info = aligned_buffer.info;
    pub const kv_buffer_length = aligned_buffer.length;
    pub const kv_buffer_extend = aligned_buffer.extend;
    pub const kv_buffer_clear = aligned_buffer.clear;
};

comptime {
    for (std.meta.declarations(exports)) |row| {
        @export(&@field(exports, row.name), .{ .name = row.name });
    }
}

/// One line for each symbol: `kv_contiguous_commit(u32, u32, u32) i32`.
const manifest_text = text: {
    @setEvalBranchQuota(100_000);
    var text: []const u8 = "";
    for (std.meta.declarations(exports)) |row| {
        const function = @typeInfo(@TypeOf(@field(exports, row.name))).@"fn";
        text = text ++ row.name ++ "(";
        for (function.params, 0..) |parameter, i| {
            text = text ++ (if (i == 0) "" else ", ") ++ wordName(parameter.type.?);
        }
        text = text ++ ") " ++ wordName(function.return_type.?) ++ "\n";
    }
    break :text text;
};

fn wordName(comptime Word: type) []const u8 {
    return switch (Word) {
        u32, i32, f32, f64 => @typeName(Word),
        ?[*]u8, ?[*]const u8 => "buffer",
        else => @compileError(@typeName(Word) ++ " may not cross the C ABI"),
    };
}

/// Bytes of the manifest; the text itself is written when `text_bytes` is enough for it.
fn manifest(text: ?[*]u8, text_bytes: u32) callconv(.c) i32 {
    if (text) |destination| {
        if (text_bytes >= manifest_text.len) @memcpy(destination[0..manifest_text.len], manifest_text);
    }
    return status.count(manifest_text.len);
}

// The root of all tests: `kvern.zig` pulls in those of the Zig API.
test {
    _ = @import("kvern.zig");
    _ = aligned_buffer;
    _ = buffer_pool;
    _ = contiguous;
    _ = library;
    _ = paged;
    _ = pool;
    _ = quantization;
    _ = sequence;
    _ = status;
    _ = @import("abi/entries.zig");
    _ = @import("abi/fault_test.zig");
    _ = @import("abi/guard_test.zig");
    _ = @import("abi/handle.zig");
    _ = @import("abi/lock_test.zig");
    _ = @import("abi/memory_test.zig");
    _ = @import("abi/record.zig");
    _ = @import("device/guarded.zig");
    _ = @import("abi/abi_test.zig");
    _ = @import("abi/buffer_pool_test.zig");
    _ = @import("abi/freed_test.zig");
    _ = @import("abi/quantization_test.zig");
}

test "the manifest has a line for each symbol" {
    const lines = std.mem.count(u8, manifest_text, "\n");
    try std.testing.expectEqual(std.meta.declarations(exports).len, lines);
    try std.testing.expect(std.mem.startsWith(u8, manifest_text, "kv_abi_version() i32\n"));
    try std.testing.expect(std.mem.indexOf(u8, manifest_text, "kv_contiguous_commit(u32, u32, u32) i32\n") != null);
}

test "every export but the manifest, which is called here, has a call in every_export.zig" {
    const every_export = @import("abi/every_export.zig");
    for (std.meta.declarations(exports)) |row| {
        errdefer std.debug.print("{s}\n", .{row.name});
        const is_manifest = std.mem.eql(u8, row.name, "kv_abi_manifest");
        try std.testing.expect(is_manifest != every_export.has(row.name));
    }
    try std.testing.expectEqual(std.meta.declarations(exports).len - 1, every_export.calls.len);
}
