//! Stats: what a paged cache holds, tier by tier, and what it takes.
//!
//! Rows are counted where they are seen: two sequences that share a block have its rows twice. Bytes are counted where they
//! are: a shared block once.

const std = @import("std");
const assert = std.debug.assert;
const BlockShape = @import("../../shape.zig").BlockShape;
const BlockTable = @import("../blocks/table.zig").BlockTable;
const policies = @import("../tiers/policy.zig");
const state = @import("state.zig");
const CacheState = state.CacheState;
const SequenceState = state.SequenceState;

/// Counts of rows, blocks and bytes of a paged cache.
pub const Stats = struct {
    sequence_count: u32 = 0,
    /// Layer groups.
    group_count: u32 = 0,
    /// Committed rows that are there, in layer 0.
    tail_token_count: u64 = 0,
    /// Committed rows that have migrated, under this policy or an earlier one.
    store_token_count: u64 = 0,
    /// Rows of the store that an earlier policy put there, in another format than the present one's.
    warm_token_count: u64 = 0,
    /// Bytes of the rows in all layers, with their scales.
    tail_bytes: u64 = 0,
    store_bytes: u64 = 0,
    /// Bytes these rows would have as f32.
    f32_bytes: u64 = 0,
    /// Table entries that name a block of which something is seen.
    table_entries: u64 = 0,
    /// Rows that retention and windows took out of sight, in each layer group; one that a truncate brings back is counted
    /// again when it goes again.
    evictions: u64 = 0,
    /// Blocks in use, of all formats, and their bytes, those of other caches on the pool included.
    used_blocks: u32 = 0,
    used_bytes: u64 = 0,
    /// Bytes of the slabs.
    reserved_bytes: u64 = 0,
    /// Bytes beside the blocks: tables, and the lists of the pools.
    metadata_bytes: u64 = 0,

    /// Committed rows that are there, in layer 0.
    pub fn tokenCount(stats: Stats) u64 {
        return stats.tail_token_count + stats.store_token_count;
    }
};

/// A block of one format of a layer group.
const BlockKey = struct { group: u32, format: u8, block: i32 };

/// The sum over a cache, sequence by sequence.
pub const Sum = struct {
    cache: *const CacheState,
    stats: Stats = .{},
    /// The most rows of a block that a sequence sees.
    seen_rows: std.AutoHashMapUnmanaged(BlockKey, u32) = .empty,

    pub fn deinit(sum: *Sum) void {
        sum.seen_rows.deinit(sum.cache.gpa);
    }

    pub fn addSequence(sum: *Sum, sequence: *const SequenceState) error{OutOfMemory}!void {
        sum.stats.sequence_count += 1;
        sum.stats.metadata_bytes += 2 * sequence.pending.len * @sizeOf(u32);
        for (sequence.tables, 0..) |*table, group| try sum.addTable(table, @intCast(group), sequence.seq_len);
    }

    fn addTable(sum: *Sum, table: *const BlockTable, group_index: u32, seq_len: u32) error{OutOfMemory}!void {
        const group = &sum.cache.groups[group_index];
        const block_size = sum.cache.block_size;
        sum.stats.metadata_bytes += table.metadataBytes();
        const entries = table.entries();
        var entry: u32 = 0;
        while (true) : (entry += 1) {
            entry = entries.skipEvicted(entry);
            if (entry >= entries.count()) return;
            if (!table.isSeen(entry, block_size)) continue;
            sum.stats.table_entries += 1;
            const rows = residentRows(table, block_size, entry, seq_len);
            const key: BlockKey = .{ .group = group_index, .format = entries.format(entry), .block = entries.block(entry) };
            const found = try sum.seen_rows.getOrPutValue(sum.cache.gpa, key, 0);
            found.value_ptr.* = @max(found.value_ptr.*, rows);
            if (group_index == sum.cache.layers[0].group) sum.countRows(policies.tierOf(group, key.format), rows);
        }
    }

    fn countRows(sum: *Sum, tier: policies.Tier, rows: u32) void {
        switch (tier) {
            .tail => sum.stats.tail_token_count += rows,
            .store => sum.stats.store_token_count += rows,
            .warm => {
                sum.stats.store_token_count += rows;
                sum.stats.warm_token_count += rows;
            },
        }
    }

    /// The stats, once all sequences were added.
    pub fn finish(sum: *const Sum) Stats {
        var stats = sum.stats;
        stats.group_count = @intCast(sum.cache.groups.len);
        stats.evictions = sum.cache.evictions;
        var blocks = sum.seen_rows.iterator();
        while (blocks.next()) |one| {
            const group = &sum.cache.groups[one.key_ptr.group];
            const format = one.key_ptr.format;
            assert(one.value_ptr.* <= sum.cache.block_size);
            const bytes = rowBytes(group.formats.items[format].shape, one.value_ptr.*);
            if (policies.tierOf(group, format) == .tail) stats.tail_bytes += bytes else stats.store_bytes += bytes;
            stats.f32_bytes += rowBytes(group.shape.as(.f32, .f32), one.value_ptr.*);
        }
        for (sum.cache.groups) |*group| for (group.distinctFormats()) |format| {
            const pool = format.pool.stats();
            stats.used_blocks += pool.used_blocks;
            stats.used_bytes += pool.used_blocks * pool.block_bytes;
            stats.reserved_bytes += pool.reserved_bytes;
            stats.metadata_bytes += pool.metadata_bytes;
        };
        return stats;
    }
};

/// Committed rows in the block of an entry that are seen.
fn residentRows(table: *const BlockTable, block_size: u32, entry: u32, seq_len: u32) u32 {
    const from = entry * block_size;
    const to = @min(from + block_size, seq_len);
    if (from >= to) return 0; // its rows are pending
    if (table.first <= table.sink_end) return to - from;
    const sinks = @min(to, table.sink_end) -| from;
    return sinks + (to -| @max(from, table.first));
}

fn rowBytes(shape: BlockShape, rows: u32) u64 {
    return shape.layer_count * (shape.rowsBytes(.keys, rows) + shape.rowsBytes(.values, rows));
}
