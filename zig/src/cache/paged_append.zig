//! Appending to sequences of a paged cache: all rows of a call are written, or nothing has changed.
//!
//! The blocks come first. Rows are written in the tail's format to blocks that nobody else has, so where the next row of a
//! sequence lands in a block that is shared, or that has left the tail, a new one takes its place with what the sequence sees
//! of the old one.
//!
//! Rows are looked at while they are written, to blocks nobody sees them in yet: one that cannot be stored ends the append,
//! and everything is as it was.
//!
//! `cache` is a PagedCache and a sequence one of its own; `paged.zig` imports this file.

const std = @import("std");
const Allocator = std.mem.Allocator;
const assert = std.debug.assert;
const Block = @import("block_rows.zig").Block;
const BlockPool = @import("block_pool.zig").BlockPool;
const tail_format = @import("block_table.zig").tail_format;
const dispatch = @import("../kernels/dispatch.zig");
const Dtype = @import("../dtype.zig").Dtype;
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
    const inputs: Inputs = .{ .k = k, .v = v, .token_count = token_count };
    var reserved = try reserve(cache, layer_index, sequences, token_counts, inputs);
    defer reserved.deinit(cache.gpa);
    if (!writeAll(cache, layer_index, sequences, token_counts, inputs)) {
        reserved.undo(cache, layer_index, sequences, token_counts);
        return error.NotFinite;
    }
    for (sequences, token_counts) |sequence, count| {
        if (count == 0) continue;
        // What this block became when it was shared is not what it will become.
        const entry = sequence.rowCount(layer_index) / cache.block_size;
        _ = cache.groups[place.group].twins.remove(sequence.tables[place.group].blocks.items[entry]);
        sequence.pending[layer_index] += count;
        sequence.generations[layer_index] +%= 1;
    }
}

/// The rows of a call.
const Inputs = struct {
    k: Input,
    v: Input,
    token_count: u64,

    fn areStorable(inputs: Inputs, group: anytype) bool {
        const kernels = dispatch.kernels();
        const narrow_k, const narrow_v = group.narrowest();
        return kernels.storable(inputs.k.bytes, inputs.k.dtype, narrow_k, inputs.k.element_count) != 0 and
            kernels.storable(inputs.v.bytes, inputs.v.dtype, narrow_v, inputs.v.element_count) != 0;
    }
};

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
    /// Where the rows may turn out to be refused.
    taken: ?BlockPool.Taken = null,

    fn blocks(reserved: *Reserved) []i32 {
        return if (reserved.many) |many| many else reserved.few[0..reserved.count];
    }

    fn deinit(reserved: Reserved, gpa: Allocator) void {
        if (reserved.many) |many| gpa.free(many);
    }

    /// Nothing was appended. Rows written so far are zeros: none may hold what is not finite.
    fn undo(reserved: *Reserved, cache: anytype, layer_index: u32, sequences: anytype, token_counts: []const u32) void {
        const place = cache.places[layer_index];
        const group = cache.groups[place.group];
        for (sequences, token_counts) |sequence, count| {
            const table = &sequence.tables[place.group];
            const start = sequence.rowCount(layer_index);
            for (start..start + count) |position| {
                const block: Block = .of(group.formats.items[tail_format], table.blocks.items[position / cache.block_size]);
                block.clearRow(place.index, @intCast(position % cache.block_size));
            }
            table.blocks.items.len -= sequence.entries_added;
            table.formats.items.len -= sequence.entries_added;
        }
        group.pool().untake(reserved.blocks(), reserved.taken.?);
    }
};

/// Makes every block that the rows will lie in exist, be in the tail's format and be unshared.
///
/// Rows that come from far are best looked at while they are written. That needs a way back: where a block must be made
/// anew or memory be mapped, they are looked at before, here.
fn reserve(
    cache: anytype,
    layer_index: u32,
    sequences: anytype,
    token_counts: []const u32,
    inputs: Inputs,
) @TypeOf(cache.*).AppendError!Reserved {
    const place = cache.places[layer_index];
    const group = cache.groups[place.group];
    const shape = group.shape;
    for (sequences, token_counts) |sequence, count| {
        const block_count = shape.blockCount(sequence.rowCount(layer_index) + count);
        try sequence.tables[place.group].ensureTotalCapacity(cache.gpa, block_count);
    }
    var needed: usize = 0;
    var renewal_count: usize = 0;
    for (sequences, token_counts) |sequence, count| {
        const table = &sequence.tables[place.group];
        const start = sequence.rowCount(layer_index);
        sequence.entries_added = @intCast(shape.blockCount(start + count) -| table.len());
        needed += sequence.entries_added;
        sequence.renewal = renewalOf(cache, sequence, place.group, start, count);
        if (sequence.renewal == .none) continue;
        renewal_count += 1;
        // Whoever copies a shared block leaves it now: when all but one of those that share it do, the last one keeps it.
        if (sequence.renewal == .copy) table.release(group.formats.items, start / cache.block_size, start / cache.block_size + 1);
    }
    needed += renewal_count;
    errdefer for (sequences) |sequence| {
        const entry = sequence.rowCount(layer_index) / cache.block_size;
        if (sequence.renewal == .copy) group.pool().retain(sequence.tables[place.group].blocks.items[entry..][0..1]);
        sequence.renewal = .none;
    };
    var reserved: Reserved = .{ .count = needed };
    if (needed > reserved.few.len) reserved.many = try cache.gpa.alloc(i32, needed);
    errdefer reserved.deinit(cache.gpa);
    const blocks = reserved.blocks();
    if (renewal_count == 0) reserved.taken = group.pool().tryTake(cache.tenant, blocks);
    if (reserved.taken == null) {
        if (!inputs.areStorable(group)) return error.NotFinite;
        try group.pool().take(cache.tenant, blocks);
    }

    // Nothing below can fail.
    var next: usize = 0;
    for (sequences) |sequence| {
        const table = &sequence.tables[place.group];
        if (sequence.renewal != .none) {
            renew(cache, place.group, sequence, sequence.rowCount(layer_index) / cache.block_size, blocks[next]);
            next += 1;
        }
        for (blocks[next..][0..sequence.entries_added]) |block| table.appendAssumeCapacity(block, tail_format);
        next += sequence.entries_added;
    }
    assert(next == needed);
    return reserved;
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

/// Writes the rows behind those that the sequences have. False where one cannot be stored.
fn writeAll(cache: anytype, layer_index: u32, sequences: anytype, token_counts: []const u32, inputs: Inputs) bool {
    const place = cache.places[layer_index];
    const narrow_k, const narrow_v = cache.groups[place.group].narrowest();
    var token_first: u64 = 0;
    for (sequences, token_counts) |sequence, count| {
        const rows: Rows = .{ .start = sequence.rowCount(layer_index), .count = count, .first = token_first };
        if (!write(cache, place, sequence, rows, inputs.token_count, inputs.k, .keys, narrow_k)) return false;
        if (!write(cache, place, sequence, rows, inputs.token_count, inputs.v, .values, narrow_v)) return false;
        token_first += count;
    }
    return true;
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
