//! Appending to sequences of a paged cache: all rows of a call are written, or nothing has changed.
//!
//! The blocks come first. Rows are written in the tail's format to blocks that nobody else has, so where the next row of a
//! sequence lands in a block that is shared, or that has left the tail, a new one takes its place with what the sequence sees
//! of the old one.
//!
//! A caller's rows are read once, while they are written: another thread may write them too. One that cannot be stored ends
//! the append, and everything is as it was, by the numbers of the pool too. What a call lets go it lets go at its end, for the
//! rows may lie there.
//!
//! `cache` is a PagedCache and a sequence one of its own; `paged.zig` imports this file.

const std = @import("std");
const Allocator = std.mem.Allocator;
const assert = std.debug.assert;
const Block = @import("../blocks/block.zig").Block;
const FormatPool = @import("../blocks/format_pool.zig").FormatPool;
const block_table = @import("../blocks/table.zig");
const dispatch = @import("../../kernels/dispatch.zig");
const Dtype = @import("../../dtype.zig").Dtype;
const Place = @import("layer_group.zig").Place;
const input_types = @import("../input.zig");
const Input = input_types.Input;
const Inputs = input_types.Inputs;
const shapes = @import("../../shape.zig");

const tail_format = block_table.tail_format;

/// A block of a sequence in whose place an append puts a new one, because others have it too or it has left the tail.
pub const Replaced = struct {
    block: i32,
    format: u8,
    /// Of its table.
    tail_first: u32,

    fn isShared(replaced: Replaced) bool {
        return block_table.isTail(replaced.format);
    }
};

/// Appends rows of one layer to one or more sequences: token_counts[i] rows to sequences[i], whose rows stand one
/// after the other in `k` and `v`. A sequence may occur once. All of it happens or nothing.
pub fn append(
    cache: anytype,
    layer_index: u32,
    sequences: anytype,
    token_counts: []const u32,
    k: Input,
    v: Input,
) @TypeOf(cache.*).AppendError!void {
    if (layer_index >= cache.places.len) return error.LayerOutOfRange;
    if (sequences.len != token_counts.len) return error.InvalidSize;
    const place = cache.places[layer_index];
    const group = cache.groups[place.group];
    try checkDistinct(sequences);
    var token_count: u64 = 0;
    for (token_counts) |count| token_count += count;
    const element_count = shapes.rowElements(group.shape, token_count) orelse return error.InvalidSize;
    if (k.element_count != element_count or v.element_count != element_count) return error.InvalidSize;
    for (sequences, token_counts) |sequence, count| {
        if (count > cache.max_seq_len - sequence.rowCount(layer_index)) return error.CacheFull;
    }
    if (token_count == 0) return;
    var reserved = try reserve(cache, layer_index, sequences, token_counts);
    defer reserved.deinit(cache.gpa);
    errdefer reserved.undo(cache, layer_index, sequences);
    var inputs: Inputs = .{ .k = k, .v = v };
    defer inputs.deinit(cache.gpa);
    try leaveBlocks(&inputs, cache, layer_index, sequences, token_counts);
    if (!writeAll(cache, layer_index, sequences, token_counts, token_count, inputs)) {
        clearAll(cache, layer_index, sequences, token_counts);
        return error.NotFinite;
    }
    for (sequences, token_counts) |sequence, count| {
        if (count != 0) finish(cache, layer_index, sequence, count);
    }
}

/// The rows of a sequence are written.
fn finish(cache: anytype, layer_index: u32, sequence: anytype, count: u32) void {
    const place = cache.places[layer_index];
    const group = &cache.groups[place.group];
    if (sequence.replaced) |replaced| {
        // A shared one was let go when its place was reserved.
        if (!replaced.isShared()) group.formats.items[replaced.format].pool.release(&.{replaced.block});
        sequence.ageViews(place.group); // the new block has the rows of every layer of the group
        sequence.replaced = null;
    }
    // What this block became when it was shared is not what it will become.
    const entry = sequence.rowCount(layer_index) / cache.block_size;
    _ = group.twins.remove(sequence.tables[place.group].blocks.items[entry]);
    sequence.pending[layer_index] += count;
    sequence.generations[layer_index] +%= 1;
}

pub fn checkDistinct(sequences: anytype) error{InvalidConfig}!void {
    defer for (sequences) |sequence| {
        sequence.marked = false;
    };
    for (sequences) |sequence| {
        if (sequence.marked) return error.InvalidConfig;
        sequence.marked = true;
    }
}

/// The blocks that an append took.
const Reserved = struct {
    count: usize,
    few: [64]i32 = undefined,
    many: ?[]i32 = null,
    taken: FormatPool.Taken = .{},

    fn blocks(reserved: *Reserved) []i32 {
        return if (reserved.many) |many| many else reserved.few[0..reserved.count];
    }

    fn deinit(reserved: Reserved, gpa: Allocator) void {
        if (reserved.many) |many| gpa.free(many);
    }

    /// Nothing was appended.
    fn undo(reserved: *Reserved, cache: anytype, layer_index: u32, sequences: anytype) void {
        const place = cache.places[layer_index];
        for (sequences) |sequence| {
            putBack(cache, layer_index, sequence);
            const table = &sequence.tables[place.group];
            table.blocks.items.len -= sequence.entries_added;
            table.formats.items.len -= sequence.entries_added;
        }
        cache.groups[place.group].pool().untake(reserved.blocks(), reserved.taken);
    }
};

/// Makes every block that the rows will lie in exist, be in the tail's format and be unshared.
fn reserve(
    cache: anytype,
    layer_index: u32,
    sequences: anytype,
    token_counts: []const u32,
) @TypeOf(cache.*).AppendError!Reserved {
    const place = cache.places[layer_index];
    const group = cache.groups[place.group];
    const shape = group.shape;
    for (sequences, token_counts) |sequence, count| {
        const block_count = shape.blockCount(sequence.rowCount(layer_index) + count);
        try sequence.tables[place.group].ensureTotalCapacity(cache.gpa, block_count);
    }
    var needed: usize = 0;
    errdefer for (sequences) |sequence| putBack(cache, layer_index, sequence);
    for (sequences, token_counts) |sequence, count| {
        const table = &sequence.tables[place.group];
        const start = sequence.rowCount(layer_index);
        sequence.entries_added = @intCast(shape.blockCount(start + count) -| table.len());
        needed += sequence.entries_added;
        sequence.replaced = toReplace(cache, sequence, place.group, start, count);
        const replaced = sequence.replaced orelse continue;
        needed += 1;
        // Whoever copies a shared block leaves it now: when all but one of those that share it do, the last one keeps it.
        if (replaced.isShared()) group.pool().release(&.{replaced.block});
    }
    var reserved: Reserved = .{ .count = needed };
    if (needed > reserved.few.len) reserved.many = try cache.gpa.alloc(i32, needed);
    errdefer reserved.deinit(cache.gpa);
    const blocks = reserved.blocks();
    reserved.taken = try group.pool().takeUndoable(cache.writer, blocks);

    // Nothing below can fail.
    var next: usize = 0;
    for (sequences) |sequence| {
        const table = &sequence.tables[place.group];
        if (sequence.replaced != null) {
            replace(cache, place.group, sequence, sequence.rowCount(layer_index) / cache.block_size, blocks[next]);
            next += 1;
        }
        for (blocks[next..][0..sequence.entries_added]) |block| table.appendAssumeCapacity(block, tail_format);
        next += sequence.entries_added;
    }
    assert(next == needed);
    return reserved;
}

/// The block in which row `start` lands, if it must be made anew before it is written.
fn toReplace(cache: anytype, sequence: anytype, group_index: u32, start: u32, count: u32) ?Replaced {
    const entry = start / cache.block_size;
    const table = &sequence.tables[group_index];
    if (count == 0 or entry >= table.len()) return null;
    const replaced: Replaced = .{
        .block = table.blocks.items[entry],
        .format = table.formats.items[entry],
        .tail_first = table.tail_first,
    };
    assert(replaced.block >= 0);
    if (!replaced.isShared()) return replaced;
    return if (cache.groups[group_index].pool().refCount(@intCast(replaced.block)) > 1) replaced else null;
}

/// Puts a new block of the tail, with what a sequence sees of the old one, in the place of one of its blocks.
fn replace(cache: anytype, group_index: u32, sequence: anytype, entry: usize, to_block: i32) void {
    const formats = cache.groups[group_index].formats.items;
    const table = &sequence.tables[group_index];
    const old = sequence.replaced.?;
    const from: Block = .of(formats[old.format], old.block);
    const to: Block = .of(formats[tail_format], to_block);
    const block_first: u32 = @intCast(entry * cache.block_size);
    for (cache.places, 0..) |place, layer| {
        if (place.group != group_index) continue;
        const row_count = @min(sequence.rowCount(@intCast(layer)) - block_first, cache.block_size);
        if (row_count != 0) from.copyRows(to, place.index, row_count);
    }
    table.blocks.items[entry] = to_block;
    table.formats.items[entry] = if (old.isShared()) old.format else block_table.reopened_format;
    table.tail_first = @min(table.tail_first, block_first);
}

/// Gives a sequence back the block that was, or was to be, replaced.
fn putBack(cache: anytype, layer_index: u32, sequence: anytype) void {
    const old = sequence.replaced orelse return;
    sequence.replaced = null;
    const place = cache.places[layer_index];
    const group = cache.groups[place.group];
    const table = &sequence.tables[place.group];
    const entry = sequence.rowCount(layer_index) / cache.block_size;
    const new_block = table.blocks.items[entry];
    if (old.isShared()) {
        group.pool().retain(&.{old.block});
        // Whoever kept it wrote rows behind those that are committed, where this sequence may have had pending ones.
        const format = group.formats.items[tail_format];
        const row_count = sequence.rowCount(layer_index) % cache.block_size;
        if (new_block != old.block) Block.of(format, new_block).copyRows(.of(format, old.block), place.index, row_count);
    }
    table.blocks.items[entry] = old.block;
    table.formats.items[entry] = old.format;
    table.tail_first = old.tail_first;
}

/// Where rows lie in a block that will be written, they are read from a copy.
fn leaveBlocks(
    inputs: *Inputs,
    cache: anytype,
    layer_index: u32,
    sequences: anytype,
    token_counts: []const u32,
) error{OutOfMemory}!void {
    const place = cache.places[layer_index];
    const group = cache.groups[place.group];
    for (sequences, token_counts) |sequence, count| {
        if (count == 0) continue;
        const start = sequence.rowCount(layer_index);
        const blocks = sequence.tables[place.group].blocks.items;
        for (blocks[start / cache.block_size .. group.shape.blockCount(start + count)]) |block| {
            try inputs.leave(cache.gpa, group.pool().bytes(@intCast(block)));
        }
    }
}

/// Writes the rows behind those that the sequences have. False where one cannot be stored.
fn writeAll(
    cache: anytype,
    layer_index: u32,
    sequences: anytype,
    token_counts: []const u32,
    token_count: u64,
    inputs: Inputs,
) bool {
    const place = cache.places[layer_index];
    const narrow_k, const narrow_v = cache.groups[place.group].narrowest();
    var token_first: u64 = 0;
    for (sequences, token_counts) |sequence, count| {
        const rows: Rows = .{ .start = sequence.rowCount(layer_index), .count = count, .first = token_first };
        if (!write(cache, place, sequence, rows, token_count, inputs.k, .keys, narrow_k)) return false;
        if (!write(cache, place, sequence, rows, token_count, inputs.v, .values, narrow_v)) return false;
        token_first += count;
    }
    return true;
}

/// Makes the rows that were, or were to be, written zeros: none may hold what is not finite.
fn clearAll(cache: anytype, layer_index: u32, sequences: anytype, token_counts: []const u32) void {
    const place = cache.places[layer_index];
    const format = cache.groups[place.group].formats.items[tail_format];
    for (sequences, token_counts) |sequence, count| {
        const blocks = sequence.tables[place.group].blocks.items;
        const start = sequence.rowCount(layer_index);
        for (start..start + count) |position| {
            const block: Block = .of(format, blocks[position / cache.block_size]);
            block.clearRow(place.index, @intCast(position % cache.block_size));
        }
    }
}

/// Rows of a sequence from position `start` on, and which of the call's tokens the first of them is.
const Rows = struct { start: u32, count: u32, first: u64 };

/// Writes rows of one side; `token_count` are the tokens of the call.
fn write(
    cache: anytype,
    place: Place,
    sequence: anytype,
    rows: Rows,
    token_count: u64,
    input: Input,
    side: shapes.Side,
    narrowest: Dtype,
) bool {
    const group = cache.groups[place.group];
    const shape = group.shape;
    const kernels = dispatch.kernels();
    const head_stride = input.headStride(shape, token_count);
    // Token by token, as the rows of most callers lie.
    for (0..rows.count) |i| {
        const position = rows.start + @as(u32, @intCast(i));
        const index = sequence.tables[place.group].blocks.items[position / cache.block_size];
        const block: Block = .of(group.formats.items[tail_format], index);
        if (kernels.convert_checked(&.{
            .destination = block.row(place.index, side, 0, position % cache.block_size),
            .destination_dtype = shape.dtype(side),
            .destination_stride = shape.planeBytes(side),
            .source = input.headRow(shape, token_count, 0, rows.first + i),
            .source_dtype = input.dtype,
            .source_stride = head_stride,
            .row_count = shape.kv_head_count,
            .element_count = shape.head_dim,
        }, narrowest) == 0) return false;
    }
    return true;
}
