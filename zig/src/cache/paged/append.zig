//! Appending to sequences of a paged cache: all rows of a call are written, or nothing has changed.
//!
//! The blocks come first. Rows are written in the tail's format to blocks that nobody else has, so where the next row of a
//! sequence lands in a block that is shared, or that has left the tail, a new one takes its place with what the sequence sees
//! of the old one.
//!
//! A caller's rows are read once, while they are written: another thread may write them too. One that cannot be stored ends
//! the append, and everything is as it was, by the numbers of the pool too. What a call lets go it lets go at its end, for the
//! rows may lie there.

const std = @import("std");
const Allocator = std.mem.Allocator;
const assert = std.debug.assert;
const Block = @import("../blocks/block.zig").Block;
const block_table = @import("../blocks/table.zig");
const BlockTable = block_table.BlockTable;
const dispatch = @import("../../kernels/dispatch.zig");
const Dtype = @import("../../dtype.zig").Dtype;
const FormatPool = @import("../blocks/format_pool.zig").FormatPool;
const layer_group = @import("layer_group.zig");
const Group = layer_group.Group;
const GroupedLayer = layer_group.GroupedLayer;
const input_types = @import("../input.zig");
const Input = input_types.Input;
const Inputs = input_types.Inputs;
const shapes = @import("../../shape.zig");
const state = @import("state.zig");
const CacheState = state.CacheState;
const SequenceState = state.SequenceState;

const tail_format = block_table.tail_format;

pub const Error = error{
    LayerOutOfRange,
    InvalidConfig,
    InvalidSize,
    CacheFull,
    NotFinite,
    PoolEmpty,
    OutOfMemory,
};

/// One sequence's part in an append, and what was done for it so far.
pub const Portion = struct {
    sequence: *SequenceState,
    /// Rows of the call.
    token_count: u32,
    /// The first of its rows, among those of the call.
    token_first: u64 = 0,
    /// Blocks put into the table of the layer's group.
    entries_added: u32 = 0,
    /// The block in which the next row lands, where a new one takes its place.
    replaced: ?Replaced = null,
};

/// A block in whose place an append puts a new one, because other sequences have it too or it has left the tail.
const Replaced = struct {
    block: i32,
    format: u8,
    /// What its table had in `tail_first`.
    tail_first: u32,

    fn isShared(replaced: Replaced) bool {
        return block_table.isTail(replaced.format);
    }
};

/// Appends rows of one layer to one or more sequences, each of which occurs once. The rows of all stand one after the other
/// in `k` and `v`. All of it happens or nothing.
pub fn append(cache: *CacheState, layer_index: u32, portions: []Portion, k: Input, v: Input) Error!void {
    const layer = try cache.layer(layer_index);
    var token_count: u64 = 0;
    for (portions) |*portion| {
        assert(portion.sequence.cache == cache);
        portion.token_first = token_count;
        token_count += portion.token_count;
    }
    const group = &cache.groups[layer.group];
    for ([_]Input{ k, v }) |input| if (try input.tokenCount(group.shape) != token_count) return error.InvalidSize;
    for (portions) |portion| {
        if (portion.token_count > cache.max_seq_len - portion.sequence.rowCount(layer_index)) return error.CacheFull;
    }
    if (token_count == 0) return;
    const call: Call = .{
        .cache = cache,
        .group = group,
        .layer = layer,
        .layer_index = layer_index,
        .portions = portions,
        .token_count = token_count,
    };
    var reserved = while (true) {
        break call.reserve() catch |err| switch (err) {
            error.PoolEmpty, error.OutOfMemory => {
                // Memory that is kept for prefixes nobody is using is wanted now.
                if (cache.prefix) |index| if (index.reclaim()) continue;
                return err;
            },
            else => return err,
        };
    };
    defer reserved.deinit(cache.gpa);
    errdefer call.undo(&reserved);
    var inputs: Inputs = .{ .k = k, .v = v };
    defer inputs.deinit(cache.gpa);
    try call.leaveBlocks(&inputs);
    if (!call.writeAll(inputs)) {
        call.clearAll();
        return error.NotFinite;
    }
    for (portions) |*portion| if (portion.token_count != 0) call.finish(portion);
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
};

/// An append under way.
const Call = struct {
    cache: *CacheState,
    group: *Group,
    layer: GroupedLayer,
    layer_index: u32,
    portions: []Portion,
    /// Rows of all portions.
    token_count: u64,

    fn table(call: Call, portion: *const Portion) *BlockTable {
        return &portion.sequence.tables[call.layer.group];
    }

    /// Rows that the sequence of a portion had before.
    fn rowCount(call: Call, portion: *const Portion) u32 {
        return portion.sequence.rowCount(call.layer_index);
    }

    /// The entry of the block in which the next row of a portion lands.
    fn nextEntry(call: Call, portion: *const Portion) u32 {
        return call.rowCount(portion) / call.cache.block_size;
    }

    /// Makes every block that the rows will lie in exist, be in the tail's format and be unshared.
    fn reserve(call: Call) Error!Reserved {
        const cache = call.cache;
        const shape = call.group.shape;
        for (call.portions) |*portion| {
            const block_count = shape.blockCount(call.rowCount(portion) + portion.token_count);
            try call.table(portion).ensureTotalCapacity(cache.gpa, block_count);
        }
        var needed: usize = 0;
        errdefer for (call.portions) |*portion| call.putBack(portion);
        for (call.portions) |*portion| {
            const block_count = shape.blockCount(call.rowCount(portion) + portion.token_count);
            portion.entries_added = block_count -| call.table(portion).count();
            needed += portion.entries_added;
            portion.replaced = call.toReplace(portion);
            const replaced = portion.replaced orelse continue;
            needed += 1;
            // Whoever copies a shared block leaves it now: when all but one of those that share it do, the last one keeps it.
            if (replaced.isShared()) call.group.tailPool().release(&.{replaced.block});
        }
        var reserved: Reserved = .{ .count = needed };
        if (needed > reserved.few.len) reserved.many = try cache.gpa.alloc(i32, needed);
        errdefer reserved.deinit(cache.gpa);
        const blocks = reserved.blocks();
        reserved.taken = try call.group.tailPool().takeUndoable(null, blocks);

        // Nothing below can fail.
        var next: usize = 0;
        for (call.portions) |*portion| {
            const count = portion.entries_added + @intFromBool(portion.replaced != null);
            call.group.tailPool().claim(portion.sequence.writer, blocks[next..][0..count]);
            if (portion.replaced != null) {
                call.replace(portion, blocks[next]);
                next += 1;
            }
            for (blocks[next..][0..portion.entries_added]) |block| {
                call.table(portion).appendAssumeCapacity(block, tail_format);
            }
            next += portion.entries_added;
        }
        assert(next == needed);
        return reserved;
    }

    /// Nothing was appended.
    fn undo(call: Call, reserved: *Reserved) void {
        for (call.portions) |*portion| {
            call.putBack(portion);
            call.table(portion).dropNewest(portion.entries_added);
        }
        call.group.tailPool().untake(reserved.blocks(), reserved.taken);
    }

    /// The block in which the next row lands, if it must be made anew before it is written.
    fn toReplace(call: Call, portion: *const Portion) ?Replaced {
        const entry = call.nextEntry(portion);
        const own = call.table(portion);
        if (portion.token_count == 0 or entry >= own.count()) return null;
        const replaced: Replaced = .{
            .block = own.block(entry),
            .format = own.format(entry),
            .tail_first = own.tail_first,
        };
        if (!replaced.isShared()) return replaced;
        return if (call.group.tailPool().refCount(@intCast(replaced.block)) > 1) replaced else null;
    }

    /// Puts a new block of the tail, with what a sequence sees of the old one, in the place of that.
    fn replace(call: Call, portion: *const Portion, to_block: i32) void {
        const formats = call.group.formats.items;
        const old = portion.replaced.?;
        const from: Block = .of(formats[old.format], old.block);
        const to: Block = .of(formats[tail_format], to_block);
        const entry = call.nextEntry(portion);
        const block_first = entry * call.cache.block_size;
        for (call.cache.layers, 0..) |layer, layer_index| {
            if (layer.group != call.layer.group) continue;
            const row_count = @min(portion.sequence.rowCount(@intCast(layer_index)) - block_first, call.cache.block_size);
            if (row_count != 0) from.copyRows(to, layer.index, row_count);
        }
        const own = call.table(portion);
        own.set(entry, to_block, if (old.isShared()) old.format else block_table.reopened_format);
        own.tail_first = @min(own.tail_first, block_first);
    }

    /// Gives a sequence back the block that was, or was to be, replaced.
    fn putBack(call: Call, portion: *Portion) void {
        const old = portion.replaced orelse return;
        portion.replaced = null;
        const own = call.table(portion);
        const entry = call.nextEntry(portion);
        const new_block = own.block(entry);
        if (old.isShared()) {
            call.group.tailPool().retain(&.{old.block});
            // Whoever kept it wrote rows behind those that are committed, where this sequence may have had pending ones.
            const format = call.group.formats.items[tail_format];
            const row_count = call.rowCount(portion) % call.cache.block_size;
            if (new_block != old.block) Block.of(format, new_block).copyRows(.of(format, old.block), call.layer.index, row_count);
        }
        own.set(entry, old.block, old.format);
        own.tail_first = old.tail_first;
    }

    /// Reads rows that lie in a block that will be written from a copy.
    fn leaveBlocks(call: Call, inputs: *Inputs) error{OutOfMemory}!void {
        for (call.portions) |*portion| {
            if (portion.token_count == 0) continue;
            const end = call.group.shape.blockCount(call.rowCount(portion) + portion.token_count);
            for (call.nextEntry(portion)..end) |entry| {
                const block = call.table(portion).block(@intCast(entry));
                try inputs.leave(call.cache.gpa, call.group.tailPool().bytes(@intCast(block)));
            }
        }
    }

    /// Writes the rows behind those that the sequences have. False where one cannot be stored.
    fn writeAll(call: Call, inputs: Inputs) bool {
        const narrow_k, const narrow_v = call.group.narrowest();
        for (call.portions) |*portion| {
            if (!call.write(portion, inputs.k, .keys, narrow_k)) return false;
            if (!call.write(portion, inputs.v, .values, narrow_v)) return false;
        }
        return true;
    }

    /// Writes the keys or the values of a portion.
    fn write(call: Call, portion: *const Portion, input: Input, side: shapes.Side, narrowest: Dtype) bool {
        // A single token is equally far from its heads in both layouts.
        if (input.layout == .head_major and portion.token_count > 1) return call.writeHeads(portion, input, side, narrowest);
        const shape = call.group.shape;
        const kernels = dispatch.kernels();
        const head_stride = input.headStride(shape, call.token_count);
        const start = call.rowCount(portion);
        for (0..portion.token_count) |i| {
            const position = start + @as(u32, @intCast(i));
            if (kernels.convert_checked(&.{
                .destination = call.blockAt(portion, position).row(call.layer.index, side, 0, position % shape.block_size),
                .destination_dtype = shape.dtype(side),
                .destination_stride = shape.planeBytes(side),
                .source = input.headRow(shape, call.token_count, 0, portion.token_first + i),
                .source_dtype = input.dtype,
                .source_stride = head_stride,
                .row_count = shape.kv_head_count,
                .element_count = shape.head_dim,
            }, narrowest) == 0) return false;
        }
        return true;
    }

    /// The same for head-major rows: those of one head that go to one block are one piece here and there.
    fn writeHeads(call: Call, portion: *const Portion, input: Input, side: shapes.Side, narrowest: Dtype) bool {
        const shape = call.group.shape;
        const kernels = dispatch.kernels();
        const start = call.rowCount(portion);
        var i: u32 = 0;
        while (i < portion.token_count) {
            const token = (start + i) % shape.block_size;
            const count = @min(portion.token_count - i, shape.block_size - token);
            for (0..shape.kv_head_count) |head| {
                const kv_head: u32 = @intCast(head);
                if (kernels.convert_checked(&.{
                    .destination = call.blockAt(portion, start + i).row(call.layer.index, side, kv_head, token),
                    .destination_dtype = shape.dtype(side),
                    .source = input.headRow(shape, call.token_count, kv_head, portion.token_first + i),
                    .source_dtype = input.dtype,
                    .element_count = @as(u64, count) * shape.head_dim,
                }, narrowest) == 0) return false;
            }
            i += count;
        }
        return true;
    }

    /// The block of the tail that has a position.
    fn blockAt(call: Call, portion: *const Portion, position: u32) Block {
        return .of(call.group.formats.items[tail_format], call.table(portion).block(position / call.cache.block_size));
    }

    /// Makes the rows that were, or were to be, written zeros: none may hold what is not finite.
    fn clearAll(call: Call) void {
        for (call.portions) |*portion| {
            const start = call.rowCount(portion);
            for (start..start + portion.token_count) |i| {
                const position: u32 = @intCast(i);
                call.blockAt(portion, position).clearRow(call.layer.index, position % call.cache.block_size);
            }
        }
    }

    /// Lets the rows of a portion count as pending: they are written.
    fn finish(call: Call, portion: *Portion) void {
        const sequence = portion.sequence;
        if (portion.replaced) |replaced| {
            // A shared one was let go when its place was reserved.
            if (!replaced.isShared()) call.group.formats.items[replaced.format].pool.release(&.{replaced.block});
            sequence.ageViews(call.layer.group); // the new block has the rows of every layer of the group
        }
        // What this block became when it was shared is not what it will become.
        _ = call.group.twins.remove(call.table(portion).block(call.nextEntry(portion)));
        sequence.pending[call.layer_index] += portion.token_count;
        sequence.generations[call.layer_index] +%= 1;
    }
};
