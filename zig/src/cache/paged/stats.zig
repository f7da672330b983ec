//! What a paged cache holds, tier by tier.
//!
//! Rows are counted where they are seen: two sequences that share a block have its rows twice. Bytes are counted where they
//! are: a shared block once.

const std = @import("std");
const BlockShape = @import("../../shape.zig").BlockShape;
const BlockTable = @import("../blocks/table.zig").BlockTable;
const layer_group = @import("layer_group.zig");
const tiers = @import("../tiers/policy.zig");

pub const Stats = struct {
    sequence_count: u32 = 0,
    /// Committed rows that are there, in layer 0.
    tail_token_count: u64 = 0,
    /// Those that have migrated, under this policy or an earlier one.
    store_token_count: u64 = 0,
    /// Of the store's rows those that an earlier policy put there, in another format than the present one's.
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
    metadata_bytes: u64 = 0,

    /// Committed rows that are there, in layer 0.
    pub fn tokenCount(stats: Stats) u64 {
        return stats.tail_token_count + stats.store_token_count;
    }
};

/// Of one block of one format, how many of its rows are seen at most.
const Seen = std.AutoHashMapUnmanaged(struct { format: u8, block: i32 }, u32);

/// `cache` is a PagedCache, which imports this file.
pub fn collect(cache: anytype) error{OutOfMemory}!Stats {
    var stats: Stats = .{
        .sequence_count = @intCast(cache.sequences.items.len),
        .evictions = cache.evictions,
        .metadata_bytes = cache.sequences.capacity * @sizeOf(usize),
    };
    var seen: Seen = .empty;
    defer seen.deinit(cache.gpa);
    for (cache.groups, 0..) |*group, group_index| {
        seen.clearRetainingCapacity();
        for (cache.sequences.items) |sequence| {
            const table = &sequence.tables[group_index];
            stats.metadata_bytes += @sizeOf(BlockTable) + table.blocks.capacity * @sizeOf(i32) + table.formats.capacity;
            for (table.blocks.items, table.formats.items, 0..) |block, format, entry| {
                if (block < 0 or !table.isSeen(entry, group.shape.block_size)) continue;
                stats.table_entries += 1;
                const rows = residentRows(table, group.shape.block_size, @intCast(entry), sequence.seq_len);
                const found = try seen.getOrPutValue(cache.gpa, .{ .format = format, .block = block }, 0);
                found.value_ptr.* = @max(found.value_ptr.*, rows);
                if (group_index == cache.places[0].group) countRows(&stats, tiers.tierOf(group, format), rows);
            }
        }
        var entries = seen.iterator();
        while (entries.next()) |entry| {
            const format = entry.key_ptr.format;
            const bytes = rowBytes(group.formats.items[format].shape, entry.value_ptr.*);
            if (tiers.tierOf(group, format) == .tail) stats.tail_bytes += bytes else stats.store_bytes += bytes;
            stats.f32_bytes += rowBytes(group.shape.as(.f32, .f32), entry.value_ptr.*);
        }
    }
    for (cache.sequences.items) |sequence| {
        stats.metadata_bytes += @sizeOf(@TypeOf(sequence.*)) + 2 * sequence.pending.len * @sizeOf(u32);
    }
    return stats;
}

fn countRows(stats: *Stats, tier: tiers.Tier, rows: u32) void {
    switch (tier) {
        .tail => stats.tail_token_count += rows,
        .store => stats.store_token_count += rows,
        .warm => {
            stats.store_token_count += rows;
            stats.warm_token_count += rows;
        },
    }
}

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
