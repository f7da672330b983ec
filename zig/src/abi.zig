//! The C ABI: one table of symbols and one of records, from which come the exports and the manifest that callers compare
//! their own tables with.
//!
//! A result is an i32: 0 or a positive count or handle, or a negative status (`abi/status.zig`). Only u32, i32, f32, f64
//! and buffers cross. To add a symbol: its body in `abi/<noun>.zig`, a row here and in `abi/zig_names_test.zig`, a call in
//! `abi/every_export.zig`, a row in `src/ffi/exports.ts`, a test.

const std = @import("std");
const aligned_buffer = @import("abi/aligned_buffer.zig");
const attention = @import("abi/attend.zig");
const buffer_pool_bodies = @import("abi/buffer_pool.zig");
const contiguous_bodies = @import("abi/contiguous.zig");
const kvern = @import("kvern.zig");
const library = @import("abi/library.zig");
const paged_bodies = @import("abi/paged.zig");
const pool_bodies = @import("abi/pool.zig");
const prompts = @import("abi/prompt.zig");
const quantization = @import("abi/quantization.zig");
const record = @import("abi/record.zig");
const sequence = @import("abi/sequence.zig");
const shape = @import("shape.zig");
const slab = @import("device/slab.zig");
const buffers = @import("device/buffer_pool.zig");
const workers = @import("device/workers.zig");
const status_list = @import("abi/status.zig");

pub const panic = @import("abi/panic.zig").handler;

/// Threads get no stack for signals: the library handles none, and the C library would reserve 256 KiB for each thread of
/// the process.
pub const std_options: std.Options = .{ .signal_stack_size = null };

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
    pub const kv_memory_bytes = contiguous_bodies.memoryBytes;

    pub const kv_attend = attention.attend;

    pub const kv_rows_quantize = quantization.rowsQuantize;
    pub const kv_rows_dequantize = quantization.rowsDequantize;
    pub const kv_block_quantize = quantization.blockQuantize;
    pub const kv_block_dequantize = quantization.blockDequantize;
    pub const kv_block_pack = quantization.blockPack;
    pub const kv_block_unpack = quantization.blockUnpack;

    pub const kv_contiguous_create = contiguous_bodies.create;
    pub const kv_contiguous_free = contiguous_bodies.free;
    pub const kv_contiguous_config = contiguous_bodies.config;
    pub const kv_contiguous_store = contiguous_bodies.store;
    pub const kv_contiguous_advance = contiguous_bodies.advance;
    pub const kv_contiguous_reset = contiguous_bodies.reset;
    pub const kv_contiguous_memory_bytes = contiguous_bodies.cacheMemoryBytes;
    pub const kv_contiguous_stats = contiguous_bodies.stats;
    pub const kv_contiguous_offset = contiguous_bodies.offset;

    pub const kv_pool_create = pool_bodies.create;
    pub const kv_pool_free = pool_bodies.free;
    pub const kv_pool_prewarm = pool_bodies.prewarm;
    pub const kv_pool_stats = pool_bodies.stats;

    pub const kv_paged_create = paged_bodies.create;
    pub const kv_paged_free = paged_bodies.free;
    pub const kv_paged_config = paged_bodies.config;
    pub const kv_paged_append = paged_bodies.append;
    pub const kv_paged_reorder = paged_bodies.reorder;
    pub const kv_paged_reset = paged_bodies.reset;
    pub const kv_paged_update_policy = paged_bodies.updatePolicy;
    pub const kv_paged_fidelity = paged_bodies.fidelity;
    pub const kv_paged_stats = paged_bodies.stats;
    pub const kv_paged_prefix_stats = prompts.prefixStats;
    pub const kv_paged_pending_prefix = prompts.pendingPrefix;
    pub const kv_paged_events = prompts.events;
    pub const kv_paged_explain = prompts.explain;
    pub const kv_paged_pool_stats = paged_bodies.poolStats;

    pub const kv_sequence_create = sequence.create;
    pub const kv_sequence_create_for = prompts.createSequence;
    pub const kv_sequence_free = sequence.free;
    pub const kv_sequence_cache = sequence.cacheOf;
    pub const kv_sequence_fork = sequence.fork;
    pub const kv_sequence_append = sequence.append;
    pub const kv_sequence_commit = sequence.commit;
    pub const kv_sequence_commit_kept = sequence.commitKept;
    pub const kv_sequence_commit_tokens = sequence.commitTokens;
    pub const kv_sequence_commit_kept_tokens = sequence.commitKeptTokens;
    pub const kv_sequence_explain = prompts.explainTo;
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

    pub const kv_buffer_pool_create = buffer_pool_bodies.create;
    pub const kv_buffer_pool_free = buffer_pool_bodies.free;
    pub const kv_buffer_pool_prewarm = buffer_pool_bodies.prewarm;
    pub const kv_buffer_pool_prewarm_all = buffer_pool_bodies.prewarmAll;
    pub const kv_buffer_pool_clear = buffer_pool_bodies.clear;
    pub const kv_buffer_pool_stats = buffer_pool_bodies.stats;

    pub const kv_buffer_acquire = buffer_pool_bodies.acquire;
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

/// Every record that crosses.
const records = struct {
    pub const system = library.SystemRecord;
    pub const contiguous = contiguous_bodies.ContiguousRecord;
    pub const contiguous_stats = contiguous_bodies.StatsRecord;
    pub const append = sequence.AppendRecord;
    pub const view = sequence.ViewRecord;
    pub const attend = attention.AttendRecord;
    pub const pool = pool_bodies.PoolRecord;
    pub const pool_stats = pool_bodies.StatsRecord;
    pub const paged = paged_bodies.PagedRecord;
    pub const layer = paged_bodies.LayerRecord;
    pub const policy = paged_bodies.PolicyRecord;
    pub const head_fidelity = paged_bodies.HeadFidelityRecord;
    pub const paged_stats = paged_bodies.StatsRecord;
    pub const prefix_stats = prompts.PrefixStatsRecord;
    pub const explanation = prompts.ExplanationRecord;
    pub const buffer_pool = buffer_pool_bodies.BufferPoolRecord;
    pub const buffer_pool_stats = buffer_pool_bodies.BufferPoolStatsRecord;
    pub const buffer = aligned_buffer.BufferRecord;
};

/// Every enum whose numbers cross.
const enums = struct {
    pub const status = status_list.Status;
    pub const dtype = kvern.Dtype;
    pub const side = kvern.Side;
    pub const layout = kvern.Layout;
    pub const tier = kvern.Tier;
    pub const reason = kvern.Reason;
    pub const policy_kind = kvern.Policy.Kind;
    pub const prefix_mode = paged_bodies.PrefixMode;
    pub const prefix_tiers = kvern.PrefixTiers;
    pub const prefix_event = kvern.PrefixEvent;
    pub const prefix_reason = kvern.PrefixReason;
    pub const device = kvern.Device;
    pub const level = kvern.Level;
    pub const attend_flag = attention.Flag;
};

/// Limits and defaults that callers have, too.
const values = struct {
    pub const head_dim_max = shape.head_dim_max;
    pub const block_size_max = shape.block_size_max;
    pub const block_size_default = (kvern.PagedOptions{ .layers = &.{}, .max_seq_len = 1 }).block_size;
    pub const max_seq_len_max = shape.max_seq_len_max;
    pub const slab_bytes_max = slab.bytes_max;
    pub const tree_node_count_max = kvern.tree_node_count_max;
    pub const priority_default = kvern.priority_default;
    pub const all_rows = sequence.all_rows;
    pub const thread_count_max = workers.thread_count_max;
    pub const buffer_class_bytes = buffers.class_sizes;
};

/// A line for each symbol, `kv_sequence_commit(u32, u32, u32) i32`, and for each record, enum and value.
const manifest_text = text: {
    @setEvalBranchQuota(1_000_000);
    var text: []const u8 = "";
    for (std.meta.declarations(exports)) |row| {
        const function = @typeInfo(@TypeOf(@field(exports, row.name))).@"fn";
        text = text ++ row.name ++ "(";
        for (function.params, 0..) |parameter, i| {
            text = text ++ (if (i == 0) "" else ", ") ++ wordName(parameter.type.?);
        }
        text = text ++ ") " ++ wordName(function.return_type.?) ++ "\n";
    }
    for (std.meta.declarations(records)) |row| {
        text = text ++ "record " ++ record.describe(row.name, @field(records, row.name)) ++ "\n";
    }
    for (std.meta.declarations(enums)) |row| {
        text = text ++ "enum " ++ row.name ++ ":";
        for (@typeInfo(@field(enums, row.name)).@"enum".fields, 0..) |field, i| {
            text = text ++ std.fmt.comptimePrint("{s} {s} {d}", .{ if (i == 0) "" else ",", field.name, field.value });
        }
        text = text ++ "\n";
    }
    for (std.meta.declarations(values)) |row| {
        text = text ++ "value " ++ row.name;
        const value = @field(values, row.name);
        const list = if (@typeInfo(@TypeOf(value)) == .array) value else [_]u64{value};
        for (list) |each| text = text ++ std.fmt.comptimePrint(" {d}", .{each});
        text = text ++ "\n";
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
    return status_list.count(manifest_text.len);
}

// The root of all tests: `kvern.zig` pulls in those of the Zig API.
test {
    _ = kvern;
    _ = aligned_buffer;
    _ = attention;
    _ = buffer_pool_bodies;
    _ = contiguous_bodies;
    _ = library;
    _ = paged_bodies;
    _ = pool_bodies;
    _ = quantization;
    _ = sequence;
    _ = status_list;
    _ = @import("abi/entries.zig");
    _ = @import("abi/fault_test.zig");
    _ = @import("abi/guard_test.zig");
    _ = @import("abi/handle.zig");
    _ = @import("abi/lock_test.zig");
    _ = @import("abi/memory_test.zig");
    _ = record;
    _ = @import("device/guarded.zig");
    _ = @import("abi/abi_test.zig");
    _ = @import("abi/buffer_pool_test.zig");
    _ = @import("abi/freed_test.zig");
    _ = @import("abi/quantization_test.zig");
    _ = @import("abi/zig_names_test.zig");
}

test "the manifest has a line for each symbol, record, enum and value" {
    const declarations = std.meta.declarations;
    const rows = declarations(exports).len + declarations(records).len + declarations(enums).len + declarations(values).len;
    try std.testing.expectEqual(rows, std.mem.count(u8, manifest_text, "\n"));
    try std.testing.expect(std.mem.startsWith(u8, manifest_text, "kv_abi_version() i32\n"));
    for ([_][]const u8{
        "kv_sequence_commit(u32, u32, u32) i32",
        "record append 12: size_bytes u32 @0, start u32 @4, generation u32 @8",
        "enum tier: tail 0, store 1, warm 2",
        "value head_dim_max 256",
    }) |line| {
        errdefer std.debug.print("{s}\n", .{line});
        try std.testing.expect(std.mem.indexOf(u8, manifest_text, line) != null);
    }
}

test "every export has a Zig name" {
    const zig_names = @import("abi/zig_names_test.zig");
    for (std.meta.declarations(exports)) |row| {
        errdefer std.debug.print("{s}\n", .{row.name});
        try std.testing.expect(zig_names.isNamed(row.name));
    }
    try std.testing.expectEqual(std.meta.declarations(exports).len, zig_names.count);
}

test "every export but the manifest, which is called here, has a call in every_export.zig" {
    const every_export = @import("abi/every_export.zig");
    for (std.meta.declarations(exports)) |row| {
        errdefer std.debug.print("{s}\n", .{row.name});
        const is_manifest = std.mem.eql(u8, row.name, "kv_abi_manifest");
        try std.testing.expect(is_manifest != every_export.has(row.name));
    }
    inline for (every_export.calls) |call| try std.testing.expect(@hasDecl(exports, "kv_" ++ call.name));
}
