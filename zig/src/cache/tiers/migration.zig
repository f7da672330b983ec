//! Migration: the oldest blocks of a tail leave it, in every layer of their group at once.
//!
//!     1. take      a block of the store for each that is due, or what another sequence already made of a shared one
//!     2. store     their rows, plane by plane, by all threads there are
//!     3. swap      the new blocks into the table, the old ones back to their pool
//!
//! A block for which there is no other one stays in the tail, readable as ever, and the next commit tries again. A float
//! block that several sequences share is quantized by the first of them; the others find what it became.

const std = @import("std");
const assert = std.debug.assert;
const Allocator = std.mem.Allocator;
const Block = @import("../blocks/block.zig").Block;
const block_table = @import("../blocks/table.zig");
const BlockTable = block_table.BlockTable;
const tail_format = block_table.tail_format;
const BlockShape = @import("../../shape.zig").BlockShape;
const dtypes = @import("../../dtype.zig");
const Dtype = dtypes.Dtype;
const fidelity = @import("fidelity.zig");
const Head = fidelity.Head;
const layer_group = @import("../paged/layer_group.zig");
const Group = layer_group.Group;
const Twin = layer_group.Twin;
const Index = @import("../prefix/index.zig").Index;
const Policy = @import("policy.zig").Policy;
const Ref = @import("../prefix/tree.zig").Ref;
const Side = @import("../../shape.zig").Side;
const workers = @import("../../device/workers.zig");

/// Most blocks that leave at once.
const batch_max = 32;

/// Values below which waking a thread takes longer than what it could do: a million are about 100 us of work.
const shared_values_min = 1 << 21;

/// A block on its way.
const Move = struct {
    entry: u32,
    /// The block it becomes.
    new: Twin,
    /// False where another sequence made that one.
    is_new: bool,
};

/// Migration of the blocks of one table of a sequence.
pub const Migration = struct {
    gpa: Allocator,
    group: *Group,
    table: *BlockTable,
    policy: Policy,
    seq_len: u32,
    writer: u64,
    prefix: ?Prefix = null,

    /// The prefix index, which gives memory back and names what blocks of its become.
    pub const Prefix = struct {
        index: *Index,
        /// The number of the group.
        group: u32,
        /// The nodes of the entries from this one on.
        entry_first: u32,
        nodes: []const Ref,

        fn follow(prefix: Prefix, entry: u32, old: i32, new: Twin) void {
            if (entry < prefix.entry_first or entry - prefix.entry_first >= prefix.nodes.len) return;
            const node = prefix.index.tree.get(prefix.nodes[entry - prefix.entry_first]) orelse return;
            prefix.index.follow(node, prefix.group, old, new.block, new.format);
        }
    };

    /// Lets the oldest blocks of a tail leave it, as many as the policy says or as there is room for. Returns how many.
    pub fn moveDue(self: Migration) u32 {
        const store = self.group.store_format orelse return 0;
        assert(!block_table.isTail(store));
        const block_size = self.group.shape.block_size;
        assert(self.table.tail_first % block_size == 0);
        assert(self.group.shape.blockCount(self.seq_len) <= self.table.count());
        // Where blocks are measured, how one is stored depends on what was seen of those before it.
        const at_once: usize = if (self.group.fidelity.len == 0) batch_max else 1;
        var moves: [batch_max]Move = undefined;
        const oldest = @max(self.table.tail_first / block_size, self.group.shape.blockCount(self.policy.sink_tokens));
        var entry = self.table.entries().skipEvicted(oldest);
        var moved: u32 = 0;
        while (true) {
            var count: usize = 0;
            const has_room = while (count < at_once and self.isDue(entry)) : (entry += 1) {
                if (!self.mayLeave(entry)) continue;
                switch (self.take(entry, store)) {
                    .taken => |move| {
                        moves[count] = move;
                        count += 1;
                    },
                    .unfit => {},
                    .no_room => break false,
                }
            } else true;
            self.storeAll(moves[0..count]);
            for (moves[0..count]) |*move| switch (self.swap(move)) {
                .moved => moved += 1,
                .unfit => {},
                .no_room => {
                    self.table.tail_first = @max(self.table.tail_first, move.entry * block_size);
                    return moved; // the only one of its batch: see `at_once`
                },
            };
            if (entry * block_size > self.table.tail_first) self.table.tail_first = entry * block_size;
            if (!has_room or !self.isDue(entry)) return moved;
        }
    }

    fn isDue(self: Migration, entry: u32) bool {
        const block_size = self.group.shape.block_size;
        return @as(u64, entry) * block_size + self.policy.tail_tokens + block_size <= self.seq_len;
    }

    /// A block may leave the tail that is seen and was never turned back into floats. One that nobody sees is about to go.
    fn mayLeave(self: Migration, entry: u32) bool {
        if (!self.table.isSeen(entry, self.group.shape.block_size)) return false;
        return self.table.format(entry) == tail_format;
    }

    const Outcome = enum { moved, unfit, no_room };

    const Taken = union(enum) { taken: Move, unfit, no_room };

    fn take(self: Migration, entry: u32, store: u8) Taken {
        const group = self.group;
        assert(self.table.format(entry) == tail_format);
        const old = self.table.block(entry);
        if (findTwin(group, old)) |twin| {
            group.formats.items[twin.format].pool.retain(&.{twin.block});
            return .{ .taken = .{ .entry = entry, .new = twin, .is_new = false } };
        }
        const format = group.formats.items[store];
        if (!fits(.of(group.formats.items[tail_format], old), format.shape)) return .unfit;
        var block: [1]i32 = undefined;
        while (true) {
            format.pool.take(self.writer, &block) catch {
                if (self.prefix) |prefix| if (prefix.index.reclaim()) continue;
                return .no_room;
            };
            break;
        }
        const serial = format.pool.serial(@intCast(block[0]));
        const new: Twin = .{ .tail_serial = 0, .format = store, .block = block[0], .serial = serial };
        return .{ .taken = .{ .entry = entry, .new = new, .is_new = true } };
    }

    /// The rows of a block before and after.
    fn blocksOf(self: Migration, move: Move) struct { Block, Block } {
        const formats = self.group.formats.items;
        return .{ .of(formats[tail_format], self.table.block(move.entry)), .of(formats[move.new.format], move.new.block) };
    }

    const Planes = struct {
        migration: *const Migration,
        moves: []const Move,

        /// Items of a block: one for each side of each layer.
        fn perBlock(planes: Planes) u32 {
            return 2 * planes.migration.group.shape.layer_count;
        }

        fn store(planes: *const Planes, item: u32) void {
            const move = planes.moves[item / planes.perBlock()];
            if (!move.is_new) return;
            const from, const to = planes.migration.blocksOf(move);
            const within = item % planes.perBlock();
            from.storeSide(to, within / 2, if (within % 2 == 0) Side.keys else Side.values);
        }
    };

    fn storeAll(self: Migration, moves: []const Move) void {
        assert(moves.len <= batch_max);
        const planes: Planes = .{ .migration = &self, .moves = moves };
        const item_count: u32 = @as(u32, @intCast(moves.len)) * planes.perBlock();
        const shape = self.group.shape;
        if (@as(u64, item_count) * shape.block_size * shape.kvDim() >= shared_values_min) if (workers.begin()) |session| {
            defer session.end();
            return session.run(Planes, &planes, item_count, Planes.store);
        };
        for (0..item_count) |item| planes.store(@intCast(item));
    }

    /// Puts a new block in the place of the old one, unless it stays in the tail after all.
    fn swap(self: Migration, move: *Move) Outcome {
        const group = self.group;
        const tail = group.tailPool();
        const old = self.table.block(move.entry);
        if (move.is_new and group.fidelity.len != 0) {
            const outcome = self.measureAndWiden(move);
            if (outcome != .moved) return outcome;
        }
        assert(self.table.format(move.entry) == tail_format and !block_table.isTail(move.new.format));
        self.table.set(move.entry, move.new.block, move.new.format);
        group.store_mask |= Group.formatBit(move.new.format);
        if (self.prefix) |prefix| prefix.follow(move.entry, old, move.new);
        if (tail.refCount(@intCast(old)) > 1) {
            // Only a chance to share is lost where there is no memory for this.
            move.new.tail_serial = tail.serial(@intCast(old));
            group.twins.put(self.gpa, old, move.new) catch {};
        } else {
            _ = group.twins.remove(old);
        }
        tail.release(&.{old});
        return .moved;
    }

    /// Compares the rows of a block with what they became; where a score could be off by more than the policy allows, they
    /// become wider keys. Where that cannot be, or would be the tail again, the new block is given back.
    fn measureAndWiden(self: Migration, move: *Move) Outcome {
        const group = self.group;
        const measured = self.gpa.alloc(Head, group.fidelity.len) catch {
            group.formats.items[move.new.format].pool.release(&.{move.new.block});
            return .no_room;
        };
        defer self.gpa.free(measured);
        while (true) {
            const from, const to = self.blocksOf(move.*);
            const kv_head_count = from.shape.kv_head_count;
            for (measured, 0..) |*head, i| {
                head.* = fidelity.measure(from, to, @intCast(i / kv_head_count), @intCast(i % kv_head_count));
            }
            const wider = widerKeys(to.shape.dtype_k, group.shape.dtype_k);
            if (wider == null or isNearEnough(group, measured, self.policy)) break;
            group.formats.items[move.new.format].pool.release(&.{move.new.block});
            const index = group.formatIndex(self.gpa, wider.?, to.shape.dtype_v) catch return .no_room;
            if (index == tail_format) return .unfit;
            move.* = switch (self.take(move.entry, index)) {
                .taken => |again| again,
                .unfit => return .unfit,
                .no_room => return .no_room,
            };
            self.storeAll(&.{move.*});
        }
        for (group.fidelity, measured) |*head, more| head.merge(more);
        return .moved;
    }
};

/// Every score is off by no more than the policy allows.
fn isNearEnough(group: *const Group, measured: []const Head, policy: Policy) bool {
    const limit = policy.max_logit_error orelse return true;
    const head_dim = group.shape.head_dim;
    for (measured, group.fidelity) |head, so_far| {
        const query_norm = if (policy.query_norm) |norm| norm / @sqrt(@as(f64, @floatFromInt(head_dim))) else so_far.query_norm_max;
        if (!(fidelity.boundOf(head.keys.error_max, head.range_max, head_dim, query_norm) <= limit)) return false;
    }
    return true;
}

/// The next wider format for keys, at last the tail's; null for keys in floats.
fn widerKeys(dtype: Dtype, tail: Dtype) ?Dtype {
    return switch (dtype) {
        .i2 => .i4,
        .i4 => .i8,
        .q4_0 => .q8_0,
        .i8, .q8_0 => tail,
        .f32, .f16, .bf16 => null,
    };
}

/// A block may hold a row that was appended under another policy and is not storable under this one: it stays where it is.
fn fits(from: Block, shape: BlockShape) bool {
    for ([_][2]Dtype{ .{ from.shape.dtype_k, shape.dtype_k }, .{ from.shape.dtype_v, shape.dtype_v } }) |pair| {
        // An f16 is at most 65504, which every format can store.
        if (pair[0] != .f16 and dtypes.refusedF32Bits(pair[1]) < dtypes.refusedF32Bits(pair[0])) return from.storable(shape);
    }
    return true;
}

fn findTwin(group: *Group, old: i32) ?Twin {
    const twin = group.twins.get(old) orelse return null;
    const tail = group.tailPool();
    const pool = &group.formats.items[twin.format].pool;
    if (tail.serial(@intCast(old)) != twin.tail_serial) return null;
    return if (pool.isAlive(@intCast(twin.block), twin.serial)) twin else null;
}
