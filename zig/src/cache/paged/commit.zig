//! Commits and rewinds of a paged sequence: which pending rows count, what goes out of sight by it, and what comes back.

const std = @import("std");
const assert = std.debug.assert;
const Block = @import("../blocks/block.zig").Block;
const block_table = @import("../blocks/table.zig");
const BlockTable = block_table.BlockTable;
const checkKept = @import("../input.zig").checkKept;
const Group = @import("layer_group.zig").Group;
const indexes = @import("../prefix/index.zig");
const Migration = @import("../tiers/migration.zig").Migration;
const Ref = @import("../prefix/tree.zig").Ref;
const state = @import("state.zig");
const CacheState = state.CacheState;
const SequenceState = state.SequenceState;

pub const CommitError = error{ CommitMismatch, InvalidSize };
pub const TruncateError = error{PositionOutOfRange};

/// The tokens of the rows that a commit makes count.
pub const Told = struct {
    /// One for each of these rows; null where they are not told.
    tokens: ?[]align(1) const u32 = null,
    /// How long the index keeps their blocks, against others.
    rank: indexes.Rank = .{},
};

/// Makes `token_count` pending rows of a sequence count. Every layer must have exactly that many.
pub fn commit(sequence: *SequenceState, token_count: u32, told: Told) CommitError!void {
    if (told.tokens) |tokens| if (tokens.len != token_count) return error.InvalidSize;
    if (token_count == 0) return;
    for (sequence.pending) |rows| if (rows != token_count) return error.CommitMismatch;
    @memset(sequence.pending, 0);
    sequence.seq_len += token_count;
    assert(sequence.seq_len <= sequence.cache.max_seq_len);
    settle(sequence, told);
}

/// Commits only the pending rows whose index is in `kept`, ascending: the accepted path of a tree of drafted tokens.
/// The others are dropped, and the kept ones move up next to the committed rows.
pub fn commitKept(sequence: *SequenceState, kept: []align(1) const u32, told: Told) CommitError!void {
    if (told.tokens) |tokens| if (tokens.len != kept.len) return error.InvalidSize;
    const pending = sequence.pending[0];
    for (sequence.pending) |rows| if (rows != pending) return error.CommitMismatch;
    try checkKept(kept, pending);
    // Nobody else sees what lies behind the committed rows, not even in a block that was shared in the middle of a step.
    for (kept, 0..) |index, i| {
        if (index != i) moveRow(sequence, sequence.seq_len + index, sequence.seq_len + @as(u32, @intCast(i)));
    }
    @memset(sequence.pending, 0);
    sequence.seq_len += @intCast(kept.len);
    dropBlocks(sequence);
    sequence.ageAllViews();
    settle(sequence, told);
}

/// Tells the index of rows that count now, then lets what is old go out of sight and out of the tail.
fn settle(sequence: *SequenceState, told: Told) void {
    if (sequence.tokens) |*tokens| tokens.committed(told.tokens, sequence.seq_len, told.rank);
    evict(sequence);
    migrate(sequence);
}

/// Rewinds a sequence to `seq_len` rows and drops its pending ones: every layer shows what it shows of a sequence that
/// was never longer. Refused where rows of that were let go, see `rewindableTo`. No K/V byte is copied.
pub fn truncate(sequence: *SequenceState, seq_len: u32) TruncateError!void {
    const cache = sequence.cache;
    if (seq_len > sequence.seq_len) return error.PositionOutOfRange;
    for (sequence.tables, cache.groups) |*table, *group| {
        // A sequence that ends among its sinks shows nothing else.
        if (seq_len < rewindableLength(cache, table, group) and seq_len > table.sink_end) return error.PositionOutOfRange;
    }
    @memset(sequence.pending, 0);
    sequence.seq_len = seq_len;
    dropBlocks(sequence);
    for (sequence.tables, cache.groups) |*table, *group| {
        if (seq_len < table.oldest) table.oldest = 0; // what was let go lies behind the end now
        const kept = cache.retention.kept(group.window_tokens, seq_len);
        // Blocks that nobody saw may yet have to migrate.
        if (kept.first < table.first) table.tail_first = @min(table.tail_first, blockFirst(cache, kept.first));
        table.sink_end = kept.sink_end;
        table.first = kept.first;
        // The block that is kept in part is of the tail once more rows are written to it, whatever it was.
        table.tail_first = @min(table.tail_first, blockFirst(cache, seq_len));
    }
    if (sequence.tokens) |*tokens| tokens.rewound(seq_len);
    sequence.ageAllViews();
}

/// The smallest length such that a truncate to it, and to all from it up to the present one, leaves every layer with all
/// rows it shows at that length; those before it were let go. A truncate to no more rows than the sinks is legal, too.
pub fn rewindableTo(sequence: *const SequenceState) u32 {
    var length: u32 = 0;
    for (sequence.tables, sequence.cache.groups) |*table, *group| {
        length = @max(length, rewindableLength(sequence.cache, table, group));
    }
    return length;
}

/// The length from which on a table has all rows that are seen at a length.
fn rewindableLength(cache: *const CacheState, table: *const BlockTable, group: *const Group) u32 {
    if (table.oldest == 0) return 0;
    return table.oldest + cache.retention.newestTokensOf(group.window_tokens).?; // nothing else lets rows go
}

/// The first position of the block that has a position.
fn blockFirst(cache: *const CacheState, position: u32) u32 {
    return position - position % cache.block_size;
}

fn moveRow(sequence: *const SequenceState, from: u32, to: u32) void {
    const block_size = sequence.cache.block_size;
    for (sequence.cache.layers) |layer| {
        const format = sequence.cache.groups[layer.group].formats.items[block_table.tail_format];
        const table = &sequence.tables[layer.group];
        const source: Block = .of(format, table.block(from / block_size));
        const target: Block = .of(format, table.block(to / block_size));
        source.moveRow(from % block_size, target, to % block_size, layer.index);
    }
}

/// Gives back the blocks behind the last committed row.
fn dropBlocks(sequence: *SequenceState) void {
    for (sequence.tables, sequence.cache.groups) |*table, *group| {
        table.shrink(group.formats.items, group.shape.blockCount(sequence.seq_len));
    }
}

/// Hides what retention and the layers' windows no longer want, and lets go what is too far back to be rewound to.
fn evict(sequence: *SequenceState) void {
    const cache = sequence.cache;
    for (sequence.tables, cache.groups, 0..) |*table, *group, group_index| {
        const kept = cache.retention.kept(group.window_tokens, sequence.seq_len);
        if (kept.first <= table.first) continue;
        cache.evictions += kept.first - @max(table.first, kept.sink_end);
        // Blocks none of whose rows is wanted: after the last sink's and before the first wanted row's; those before
        // the row that was the first are none already.
        const sink_entries = group.shape.blockCount(kept.sink_end);
        if (@max(sink_entries, table.first / cache.block_size) < kept.first / cache.block_size) {
            sequence.ageViews(@intCast(group_index));
        }
        table.sink_end = kept.sink_end;
        table.first = kept.first;
        const oldest = cache.retention.oldest(group.window_tokens, sequence.seq_len, cache.rewind_tokens);
        if (oldest <= table.oldest) continue;
        const from = @max(sink_entries, table.oldest / cache.block_size);
        const to = oldest / cache.block_size;
        table.oldest = oldest;
        if (from < to) table.evict(cache.gpa, group.formats.items, from, to);
    }
}

/// Lets blocks leave the tail.
fn migrate(sequence: *SequenceState) void {
    const cache = sequence.cache;
    for (sequence.tables, cache.groups, 0..) |*table, *group, group_index| {
        if (group.store_format == null) continue;
        var nodes: std.ArrayList(Ref) = .empty;
        defer nodes.deinit(cache.gpa);
        const entry_first = table.tail_first / cache.block_size;
        if (sequence.tokens) |*tokens| {
            // Without memory for it the index keeps the floats, which nobody but it has then.
            if (cache.prefix.?.options.tiers == .any) tokens.nodesFrom(entry_first, &nodes) catch nodes.clearRetainingCapacity();
        }
        const migration: Migration = .{
            .gpa = cache.gpa,
            .group = group,
            .table = table,
            .policy = cache.policy,
            .seq_len = sequence.seq_len,
            .writer = sequence.writer,
            .prefix = if (cache.prefix) |index|
                .{ .index = index, .group = @intCast(group_index), .entry_first = entry_first, .nodes = nodes.items }
            else
                null,
        };
        if (migration.moveDue() != 0) sequence.ageViews(@intCast(group_index));
    }
}
