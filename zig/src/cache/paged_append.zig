//! Appending to sequences of a paged cache: all rows of a call are written, or nothing has changed.
//!
//! The blocks come first. Rows are written in the tail's format to blocks that nobody else has, so where the next row of a
//! sequence lands in a block that is shared, or that has left the tail, a new one takes its place with what the sequence sees
//! of the old one. When every block is there nothing can fail any more.
//!
//! `cache` is a PagedCache and a sequence one of its own; `paged.zig` imports this file.

const std = @import("std");
const assert = std.debug.assert;
const Block = @import("block_rows.zig").Block;
const BlockPool = @import("block_pool.zig").BlockPool;
const tail_format = @import("block_table.zig").tail_format;
const dispatch = @import("../kernels/dispatch.zig");
const Place = @import("layer_group.zig").Place;
const Input = @import("rows.zig").Input;
const shapes = @import("../shape.zig");

/// What must happen to a block before rows are written to it.
pub const Renewal = enum {
    none,
    /// Others have it too; the reference to it was given back.
    copy,
    /// It has left the tail.
    reopen,
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
    const kernels = dispatch.kernels();
    const narrow_k, const narrow_v = group.narrowest();
    if (kernels.storable(k.bytes, k.dtype, narrow_k, element_count) == 0) return error.NotFinite;
    if (kernels.storable(v.bytes, v.dtype, narrow_v, element_count) == 0) return error.NotFinite;

    try reserve(cache, layer_index, sequences, token_counts);
    var token_first: u64 = 0;
    for (sequences, token_counts) |sequence, count| {
        const start = sequence.rowCount(layer_index);
        write(cache, place, sequence, start, count, token_first, token_count, k, .keys);
        write(cache, place, sequence, start, count, token_first, token_count, v, .values);
        sequence.pending[layer_index] += count;
        if (count != 0) sequence.generations[layer_index] +%= 1;
        token_first += count;
    }
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

/// Makes every block that the rows will lie in exist, be in the tail's format and be unshared.
fn reserve(cache: anytype, layer_index: u32, sequences: anytype, token_counts: []const u32) BlockPool.TakeError!void {
    const place = cache.places[layer_index];
    const group = cache.groups[place.group];
    const shape = group.shape;
    for (sequences, token_counts) |sequence, count| {
        const block_count = shape.blockCount(sequence.rowCount(layer_index) + count);
        try sequence.tables[place.group].ensureTotalCapacity(cache.gpa, block_count);
    }
    var needed: usize = 0;
    for (sequences, token_counts) |sequence, count| {
        const table = &sequence.tables[place.group];
        const start = sequence.rowCount(layer_index);
        needed += shape.blockCount(start + count) -| table.len();
        sequence.renewal = renewalOf(cache, sequence, place.group, start, count);
        if (sequence.renewal == .none) continue;
        needed += 1;
        // Whoever copies a shared block leaves it now: when all but one of those that share it do, the last one keeps it.
        if (sequence.renewal == .copy) table.release(group.formats.items, start / cache.block_size, start / cache.block_size + 1);
    }
    errdefer for (sequences) |sequence| {
        const entry = sequence.rowCount(layer_index) / cache.block_size;
        if (sequence.renewal == .copy) group.pool().retain(sequence.tables[place.group].blocks.items[entry..][0..1]);
        sequence.renewal = .none;
    };
    var few: [64]i32 = undefined;
    const many: ?[]i32 = if (needed <= few.len) null else try cache.gpa.alloc(i32, needed);
    defer if (many) |taken| cache.gpa.free(taken);
    const blocks = many orelse few[0..needed];
    try group.pool().take(cache.tenant, blocks);

    // Nothing below can fail.
    var next: usize = 0;
    for (sequences, token_counts) |sequence, count| {
        const table = &sequence.tables[place.group];
        const start = sequence.rowCount(layer_index);
        if (sequence.renewal != .none) {
            renew(cache, place.group, sequence, start / cache.block_size, blocks[next]);
            next += 1;
        } else if (count != 0 and start / cache.block_size < table.len()) {
            // What this block became when it was shared is not what it will become.
            _ = cache.groups[place.group].twins.remove(table.blocks.items[start / cache.block_size]);
        }
        while (table.len() < shape.blockCount(start + count)) : (next += 1) {
            table.appendAssumeCapacity(blocks[next], tail_format);
        }
    }
    assert(next == needed);
}

/// Must the block in which row `start` lands be made anew before it is written?
fn renewalOf(cache: anytype, sequence: anytype, group_index: u32, start: u32, count: u32) Renewal {
    const entry = start / cache.block_size;
    const table = &sequence.tables[group_index];
    if (count == 0 or entry >= table.len()) return .none;
    assert(table.blocks.items[entry] >= 0);
    if (table.formats.items[entry] != tail_format) return .reopen;
    return if (cache.groups[group_index].pool().refCount(@intCast(table.blocks.items[entry])) > 1) .copy else .none;
}

/// Puts a new block of the tail, with what a sequence sees of the old one, in the place of one of its blocks.
fn renew(cache: anytype, group_index: u32, sequence: anytype, entry: usize, to_block: i32) void {
    const formats = cache.groups[group_index].formats.items;
    const table = &sequence.tables[group_index];
    const from: Block = .of(formats[table.formats.items[entry]], table.blocks.items[entry]);
    const to: Block = .of(formats[tail_format], to_block);
    const block_first: u32 = @intCast(entry * cache.block_size);
    for (cache.places, 0..) |place, layer| {
        if (place.group != group_index) continue;
        const row_count = @min(sequence.rowCount(@intCast(layer)) - block_first, cache.block_size);
        if (row_count != 0) from.copyRows(to, place.index, row_count);
    }
    if (sequence.renewal == .reopen) table.release(formats, entry, entry + 1);
    sequence.renewal = .none;
    table.blocks.items[entry] = to_block;
    table.formats.items[entry] = tail_format;
    table.tail_first = @min(table.tail_first, block_first);
    sequence.ageViews(group_index); // the new block has the rows of every layer of the group
}

/// Writes rows of one side of a sequence from position `start` on; the first of them is `token_first` of the call's `token_count`.
fn write(
    cache: anytype,
    place: Place,
    sequence: anytype,
    start: u32,
    count: u32,
    token_first: u64,
    token_count: u64,
    input: Input,
    side: shapes.Side,
) void {
    const group = cache.groups[place.group];
    const shape = group.shape;
    const kernels = dispatch.kernels();
    for (0..count) |i| {
        const position = start + @as(u32, @intCast(i));
        const index = sequence.tables[place.group].blocks.items[position / cache.block_size];
        const block: Block = .of(group.formats.items[tail_format], index);
        for (0..shape.kv_head_count) |head| {
            const kv_head: u32 = @intCast(head);
            kernels.convert(
                block.row(place.index, side, kv_head, position % cache.block_size),
                shape.dtype(side),
                input.headRow(shape, token_count, kv_head, token_first + i),
                input.dtype,
                shape.head_dim,
            );
        }
    }
}
