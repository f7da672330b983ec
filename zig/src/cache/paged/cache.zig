//! The paged cache: sequences of any length as tables of blocks from a pool.
//!
//!     sequence 0   | 4 | 7 | 2 |            a block table: which block holds positions 0..63, 64..127, ...
//!     sequence 1   | 4 | 7 | 9 |            forked from it: two blocks shared, one copied at the first append
//!
//!     block        [layer][keys, values][kv_head] plane     64 positions in every layer of a group
//!
//! Layers of equal KV heads, head_dim, window and store formats form a layer group, with its own block shape, pools and
//! table; most models have one. Rows are written in floats; blocks that leave the tail are quantized (`tiers/policy.zig`), and the
//! one in which the next row lands, should it be such a block, is turned back into floats first and stays so.
//!
//! A reference count in the pool is the number of table entries that name the block, so a fork is a copy of a table, and only
//! the block in which the next row lands is ever copied: when it is shared, at that append.
//!
//! Writing has two phases, as in `contiguous.zig`: rows appended to a layer are pending, a commit makes them count.
//! Several sequences take part in one `append`, all of them or none. Pending rows belong to their sequence alone.
//!
//! Retention and windows hide rows at a commit, and let those go that lie `rewind_tokens` further back. Positions never
//! change by that: a row keeps its place for ever, and blocks whose rows are all let go leave the table as -1.
//!
//! Not thread safe but for the pools: a caller that shares a cache holds a lock.

const std = @import("std");
const assert = std.debug.assert;
const Allocator = std.mem.Allocator;
const format_pool = @import("../blocks/format_pool.zig");
const FormatPool = format_pool.FormatPool;
const BlockPool = @import("../blocks/pool.zig").BlockPool;
const Block = @import("../blocks/block.zig").Block;
const block_table = @import("../blocks/table.zig");
const BlockTable = block_table.BlockTable;
const tail_format = block_table.tail_format;
const dispatch = @import("../../kernels/dispatch.zig");
const Dtype = @import("../../dtype.zig").Dtype;
const Head = @import("../tiers/fidelity.zig").Head;
const layer_group = @import("layer_group.zig");
const Migration = @import("../tiers/migration.zig").Migration;
const paged_append = @import("append.zig");
const paged_stats = @import("stats.zig");
pub const Stats = paged_stats.Stats;
pub const Layer = layer_group.Layer;
pub const Store = layer_group.Store;
const Group = layer_group.Group;
const Place = layer_group.Place;
pub const Retention = @import("../tiers/retention.zig").Retention;
const checkApart = @import("../overlap.zig").checkApart;
const input_types = @import("../input.zig");
const Input = input_types.Input;
const Output = input_types.Output;
const Rows = @import("../rows.zig").Rows;
const shapes = @import("../../shape.zig");
const BlockShape = shapes.BlockShape;
const slab_memory = @import("../../device/slab.zig");
const tiers = @import("../tiers/policy.zig");
pub const Policy = tiers.Policy;
pub const Tier = tiers.Tier;

pub const Options = struct {
    layers: []const Layer,
    block_size: u32 = 64,
    max_seq_len: u32,
    /// Of the tail, to which all rows are written: float formats.
    dtype_k: Dtype = .f16,
    dtype_v: Dtype = .f16,
    policy: Policy = .{},
    /// Compares the rows of every block that migrates with what they became, for `fidelity`. A policy with
    /// `max_logit_error` needs it.
    measures_fidelity: bool = false,
    retention: Retention = .{},
    /// Rows that stay beyond those that retention and the windows of layers keep, unseen: a sequence may be rewound by as
    /// many as if it had never been longer. At most `max_seq_len_max`; null for block_size.
    rewind_tokens: ?u32 = null,
    /// Bound of all slabs; unused with `pools`.
    max_bytes: u64 = std.math.maxInt(u64),
    /// Blocks of another owner, for a cache of one layer group whose tail has their shape. Outlives the cache.
    pools: ?*BlockPool = null,
};

/// Names the owner of a block's bytes; 0 is nobody, the largest is the pool's own.
var writer_count: std.atomic.Value(u32) = .init(0);

pub const PagedCache = struct {
    gpa: Allocator,
    max_seq_len: u32,
    dtype_k: Dtype,
    dtype_v: Dtype,
    block_size: u32,
    policy: Policy,
    retention: Retention,
    rewind_tokens: u32,
    writer: u32,
    groups: []Group,
    places: []Place,
    owned_pools: []BlockPool,
    budget: *format_pool.Budget,
    sequences: std.ArrayList(*Sequence) = .empty,
    /// Rows that went out of sight.
    evictions: u64 = 0,

    pub const InitError = error{ InvalidConfig, OutOfMemory, BlockTooLarge };
    pub const AppendError = error{
        LayerOutOfRange,
        InvalidConfig,
        InvalidSize,
        CacheFull,
        NotFinite,
        PoolEmpty,
        OutOfMemory,
    };
    pub const CommitError = error{ CommitMismatch, InvalidSize };
    pub const TruncateError = error{PositionOutOfRange};
    pub const ReorderError = error{ InvalidConfig, CommitMismatch, OutOfMemory };
    pub const GatherError = error{ LayerOutOfRange, InvalidSize, InvalidConfig };

    /// Nothing is mapped before the first row.
    pub fn init(gpa: Allocator, options: Options) InitError!PagedCache {
        return initSlabs(gpa, slab_memory.system, options);
    }

    pub fn initSlabs(gpa: Allocator, slab_allocator: Allocator, options: Options) InitError!PagedCache {
        if (options.layers.len == 0 or options.max_seq_len == 0) return error.InvalidConfig;
        if (options.max_seq_len > shapes.max_seq_len_max) return error.InvalidConfig;
        if (!options.dtype_k.isFloat() or !options.dtype_v.isFloat()) return error.InvalidConfig;
        try options.retention.validate();
        for (options.layers) |layer| try shapes.checkQueryHeads(layer.q_head_count, layer.kv_head_count);
        const rewind_tokens = options.rewind_tokens orelse options.block_size;
        if (rewind_tokens > shapes.max_seq_len_max) return error.InvalidConfig;

        const places = try gpa.alloc(Place, options.layers.len);
        errdefer gpa.free(places);
        const groups = try layer_group.groupLayers(gpa, options.layers, places, .{
            .layer_count = 0,
            .kv_head_count = 0,
            .head_dim = 0,
            .block_size = options.block_size,
            .dtype_k = options.dtype_k,
            .dtype_v = options.dtype_v,
        });
        errdefer {
            for (groups) |*group| group.deinit(gpa);
            gpa.free(groups);
        }
        for (groups) |group| try group.shape.validate();
        try options.policy.validate(options.block_size, options.retention);
        if (options.policy.max_logit_error != null and !options.measures_fidelity) return error.InvalidConfig;

        const budget = try gpa.create(format_pool.Budget);
        errdefer gpa.destroy(budget);
        budget.* = .init(options.max_bytes);
        const owned_pools = try gpa.alloc(BlockPool, if (options.pools == null) groups.len else 0);
        errdefer gpa.free(owned_pools);
        if (options.pools) |pools| {
            if (groups.len != 1 or !std.meta.eql(pools.shape, groups[0].shape)) return error.InvalidConfig;
            groups[0].pools = pools;
        }
        for (owned_pools, 0..) |*pools, i| {
            errdefer for (owned_pools[0..i]) |*made| made.deinit();
            pools.* = try .init(gpa, slab_allocator, groups[i].shape, options.max_bytes, budget);
            groups[i].pools = pools;
        }
        errdefer for (owned_pools) |*pools| pools.deinit();
        for (groups) |*group| {
            assert(try group.formatIndex(gpa, options.dtype_k, options.dtype_v) == tail_format);
            try group.formats.append(gpa, group.formats.items[tail_format]);
            assert(group.formats.items.len == block_table.reopened_format + 1);
            group.store_format = try storeFormat(gpa, group, options.policy);
            if (group.store_format) |index| group.store_mask = Group.formatBit(index);
            if (!options.measures_fidelity) continue;
            group.fidelity = try gpa.alloc(Head, group.shape.layer_count * group.shape.kv_head_count);
            @memset(group.fidelity, .{});
        }
        const writer = writer_count.fetchAdd(1, .monotonic) % (std.math.maxInt(u32) - 1) + 1;
        return .{
            .gpa = gpa,
            .max_seq_len = options.max_seq_len,
            .dtype_k = options.dtype_k,
            .dtype_v = options.dtype_v,
            .block_size = options.block_size,
            .policy = options.policy,
            .retention = options.retention,
            .rewind_tokens = rewind_tokens,
            .writer = writer,
            .groups = groups,
            .places = places,
            .owned_pools = owned_pools,
            .budget = budget,
        };
    }

    fn storeFormat(gpa: Allocator, group: *Group, policy: Policy) BlockPool.Error!?u8 {
        const store = policy.storeOf(group.*) orelse return null;
        return try group.formatIndex(gpa, store.dtype_k, store.dtype_v);
    }

    /// From the next commit on, what becomes of old rows: blocks of the tail that are older than the new one migrate, and
    /// blocks that have migrated keep their format.
    pub fn updatePolicy(self: *PagedCache, policy: Policy) InitError!void {
        try policy.validate(self.block_size, self.retention);
        if (policy.max_logit_error != null and self.groups[0].fidelity.len == 0) return error.InvalidConfig;
        // The pools first: this is all that can fail, and a pool that nobody uses yet changes nothing.
        for (self.groups) |*group| _ = try storeFormat(self.gpa, group, policy);
        for (self.groups) |*group| {
            group.store_format = storeFormat(self.gpa, group, policy) catch unreachable; // just made
            group.store_mask = if (group.store_format) |index| Group.formatBit(index) else 0;
            group.twins.clearRetainingCapacity(); // what they became is not what they would become now
        }
        self.policy = policy;
        for (self.sequences.items) |sequence| for (sequence.tables) |*table| {
            table.tail_first = 0;
        };
    }

    /// What migration did to each KV head of a layer, [kv_head]; empty unless the cache was made to measure it.
    pub fn fidelity(self: *const PagedCache, layer_index: u32) error{LayerOutOfRange}![]const Head {
        if (layer_index >= self.places.len) return error.LayerOutOfRange;
        const place = self.places[layer_index];
        return self.groups[place.group].heads(place.index);
    }

    /// Frees all sequences too.
    pub fn deinit(self: *PagedCache) void {
        while (self.sequences.items.len != 0) self.freeSequence(self.sequences.items[self.sequences.items.len - 1]);
        self.sequences.deinit(self.gpa);
        for (self.owned_pools) |*pools| pools.deinit();
        self.gpa.free(self.owned_pools);
        self.gpa.destroy(self.budget);
        for (self.groups) |*group| group.deinit(self.gpa);
        self.gpa.free(self.groups);
        self.gpa.free(self.places);
        self.* = undefined;
    }

    pub fn layerCount(self: *const PagedCache) u32 {
        return @intCast(self.places.len);
    }

    /// The shape of a layer's blocks in the tail.
    pub fn layerShape(self: *const PagedCache, layer_index: u32) error{LayerOutOfRange}!BlockShape {
        if (layer_index >= self.places.len) return error.LayerOutOfRange;
        return self.groups[self.places[layer_index].group].shape;
    }

    /// An empty sequence, owned by the cache.
    pub fn createSequence(self: *PagedCache) error{OutOfMemory}!*Sequence {
        try self.sequences.ensureUnusedCapacity(self.gpa, 1);
        const sequence = try self.gpa.create(Sequence);
        errdefer self.gpa.destroy(sequence);
        const tables = try self.gpa.alloc(BlockTable, self.groups.len);
        errdefer self.gpa.free(tables);
        const pending = try self.gpa.alloc(u32, self.places.len);
        errdefer self.gpa.free(pending);
        const generations = try self.gpa.alloc(u32, self.places.len);
        for (tables) |*table| table.* = .{};
        @memset(pending, 0);
        @memset(generations, 0);
        sequence.* = .{
            .cache = self,
            .index = self.sequences.items.len,
            .tables = tables,
            .pending = pending,
            .generations = generations,
        };
        self.sequences.appendAssumeCapacity(sequence);
        return sequence;
    }

    /// Gives all references of a sequence back.
    pub fn freeSequence(self: *PagedCache, sequence: *Sequence) void {
        assert(sequence.cache == self);
        for (sequence.tables, self.groups) |*table, group| {
            table.shrink(group.formats.items, 0);
            table.deinit(self.gpa);
        }
        self.gpa.free(sequence.tables);
        self.gpa.free(sequence.pending);
        self.gpa.free(sequence.generations);
        assert(self.sequences.swapRemove(sequence.index) == sequence);
        if (sequence.index < self.sequences.items.len) self.sequences.items[sequence.index].index = sequence.index;
        self.gpa.destroy(sequence);
    }

    /// Empties the cache: frees all sequences but those in `kept`, which stay and have no rows any more. No block is used
    /// then.
    pub fn reset(self: *PagedCache, kept: []const *Sequence) void {
        for (kept) |sequence| {
            assert(sequence.cache == self);
            sequence.marked = true;
        }
        var index = self.sequences.items.len;
        while (index > 0) {
            index -= 1; // what takes the place of a freed one was looked at before
            const sequence = self.sequences.items[index];
            if (!sequence.marked) {
                self.freeSequence(sequence);
                continue;
            }
            sequence.marked = false;
            self.truncate(sequence, 0) catch unreachable; // no position is before the first
        }
    }

    /// A sequence that begins as a copy of the committed rows of `parent`, which it shares: no K/V byte is copied.
    pub fn fork(self: *PagedCache, parent: *const Sequence) error{OutOfMemory}!*Sequence {
        assert(parent.cache == self);
        const child = try self.createSequence();
        errdefer self.freeSequence(child);
        for (child.tables, parent.tables, self.groups) |*table, from, group| {
            table.* = try from.copy(self.gpa, group.shape.blockCount(parent.seq_len));
            table.retain(group.formats.items);
        }
        child.seq_len = parent.seq_len;
        return child;
    }

    /// Appends rows of one layer to one or more sequences: token_counts[i] rows to sequences[i], whose rows stand one
    /// after the other in `k` and `v`. A sequence may occur once. All of it happens or nothing.
    pub fn append(
        self: *PagedCache,
        layer_index: u32,
        sequences: []const *Sequence,
        token_counts: []const u32,
        k: Input,
        v: Input,
    ) AppendError!void {
        return paged_append.append(self, layer_index, sequences, token_counts, k, v);
    }

    /// Makes `token_count` pending rows of a sequence count. Every layer must have exactly that many.
    pub fn commit(self: *PagedCache, sequence: *Sequence, token_count: u32) CommitError!void {
        assert(sequence.cache == self);
        if (token_count == 0) return;
        for (sequence.pending) |rows| if (rows != token_count) return error.CommitMismatch;
        @memset(sequence.pending, 0);
        sequence.seq_len += token_count;
        assert(sequence.seq_len <= self.max_seq_len);
        self.evict(sequence);
        self.migrate(sequence);
    }

    /// Lets blocks leave the tail.
    fn migrate(self: *PagedCache, sequence: *Sequence) void {
        for (sequence.tables, self.groups, 0..) |*table, *group, group_index| {
            const migration: Migration = .{
                .gpa = self.gpa,
                .group = group,
                .table = table,
                .policy = self.policy,
                .seq_len = sequence.seq_len,
                .writer = self.writer,
            };
            if (migration.run() != 0) sequence.ageViews(@intCast(group_index));
        }
    }

    /// Commits only the pending rows whose index is in `kept`, ascending: the accepted path of a tree of drafted tokens.
    /// The others are dropped, and the kept ones move up next to the committed rows.
    pub fn commitKept(self: *PagedCache, sequence: *Sequence, kept: []align(1) const u32) CommitError!void {
        assert(sequence.cache == self);
        const pending = sequence.pending[0];
        for (sequence.pending) |rows| if (rows != pending) return error.CommitMismatch;
        for (kept, 0..) |index, i| {
            if (index >= pending or (i != 0 and index <= kept[i - 1])) return error.InvalidSize;
        }
        // Nobody else sees what lies behind the committed rows, not even in a block that was shared in the middle of a step.
        for (kept, 0..) |index, i| {
            if (index != i) self.moveRow(sequence, sequence.seq_len + index, sequence.seq_len + @as(u32, @intCast(i)));
        }
        @memset(sequence.pending, 0);
        sequence.seq_len += @intCast(kept.len);
        self.dropBlocks(sequence);
        for (sequence.generations) |*generation| generation.* +%= 1;
        self.evict(sequence);
        self.migrate(sequence);
    }

    fn moveRow(self: *PagedCache, sequence: *const Sequence, from: u32, to: u32) void {
        for (self.places) |place| {
            const format = self.groups[place.group].formats.items[tail_format];
            const blocks = sequence.tables[place.group].blocks.items;
            const source: Block = .of(format, blocks[from / self.block_size]);
            const target: Block = .of(format, blocks[to / self.block_size]);
            source.moveRow(from % self.block_size, target, to % self.block_size, place.index);
        }
    }

    /// Rewinds a sequence to `seq_len` rows and drops its pending ones: every layer shows what it shows of a sequence that
    /// was never longer. Refused where rows of that were let go, see `Sequence.rewindableTo`. No K/V byte is copied.
    pub fn truncate(self: *PagedCache, sequence: *Sequence, seq_len: u32) TruncateError!void {
        assert(sequence.cache == self);
        if (seq_len > sequence.seq_len) return error.PositionOutOfRange;
        for (sequence.tables, self.groups) |*table, group| {
            // Of a sequence that ends among its sinks, nothing else is seen.
            if (seq_len < self.rewindableTo(table, group) and seq_len > table.sink_end) return error.PositionOutOfRange;
        }
        @memset(sequence.pending, 0);
        sequence.seq_len = seq_len;
        self.dropBlocks(sequence);
        for (sequence.tables, self.groups) |*table, group| {
            if (seq_len < table.oldest) table.oldest = 0; // what was let go lies behind the end now
            const kept = self.retention.kept(group.window_tokens, seq_len);
            // Blocks that nobody saw may yet have to migrate.
            if (kept.first < table.first) table.tail_first = @min(table.tail_first, kept.first / self.block_size * self.block_size);
            table.sink_end = kept.sink_end;
            table.first = kept.first;
            // The block that is kept in part is of the tail once more rows are written to it, whatever it was.
            table.tail_first = @min(table.tail_first, seq_len / self.block_size * self.block_size);
        }
        for (sequence.generations) |*generation| generation.* +%= 1;
    }

    /// The length from which on a table has all rows that are seen at a length.
    fn rewindableTo(self: *const PagedCache, table: *const BlockTable, group: Group) u32 {
        if (table.oldest == 0) return 0;
        return table.oldest + self.retention.newestTokensOf(group.window_tokens).?; // nothing else lets rows go
    }

    /// Gives back the blocks behind the last committed row.
    fn dropBlocks(self: *PagedCache, sequence: *Sequence) void {
        for (sequence.tables, self.groups) |*table, group| {
            table.shrink(group.formats.items, group.shape.blockCount(sequence.seq_len));
        }
    }

    /// Hides what retention and the layers' windows no longer want, and lets go what is too far back to be rewound to.
    fn evict(self: *PagedCache, sequence: *Sequence) void {
        for (sequence.tables, self.groups, 0..) |*table, group, group_index| {
            const kept = self.retention.kept(group.window_tokens, sequence.seq_len);
            if (kept.first <= table.first) continue;
            self.evictions += kept.first - @max(table.first, kept.sink_end);
            // Blocks none of whose rows is wanted: after the last sink's and before the first wanted row's; those before
            // the row that was the first are none already.
            const sink_entries = group.shape.blockCount(kept.sink_end);
            if (@max(sink_entries, table.first / self.block_size) < kept.first / self.block_size) {
                sequence.ageViews(@intCast(group_index));
            }
            table.sink_end = kept.sink_end;
            table.first = kept.first;
            const oldest = self.retention.oldest(group.window_tokens, sequence.seq_len, self.rewind_tokens);
            if (oldest <= table.oldest) continue;
            const from = @max(sink_entries, table.oldest / self.block_size);
            const to = oldest / self.block_size;
            table.oldest = oldest;
            if (from < to) table.evict(group.formats.items, from, to);
        }
    }

    /// beams[i] becomes what beams[parents[i]] was. Tables and reference counts only; rows pending anywhere refuse.
    pub fn reorder(self: *PagedCache, beams: []const *Sequence, parents: []align(1) const u32) ReorderError!void {
        if (beams.len != parents.len) return error.InvalidConfig;
        try paged_append.checkDistinct(beams);
        for (beams) |beam| {
            assert(beam.cache == self);
            for (beam.pending) |rows| if (rows != 0) return error.CommitMismatch;
        }
        for (parents) |parent| if (parent >= beams.len) return error.InvalidConfig;

        // The new tables first: this is all that can fail.
        const tables = try self.gpa.alloc(BlockTable, beams.len * self.groups.len);
        defer self.gpa.free(tables);
        var made: usize = 0;
        errdefer for (tables[0..made]) |*table| table.deinit(self.gpa);
        const seq_lens = try self.gpa.alloc(u32, beams.len);
        defer self.gpa.free(seq_lens);
        for (parents, seq_lens) |parent, *seq_len| {
            seq_len.* = beams[parent].seq_len;
            for (beams[parent].tables) |from| {
                tables[made] = try from.copy(self.gpa, from.len());
                made += 1;
            }
        }
        for (tables, 0..) |table, i| table.retain(self.groups[i % self.groups.len].formats.items);
        for (beams, seq_lens, 0..) |beam, seq_len, i| {
            for (beam.tables, self.groups, 0..) |*table, group, group_index| {
                table.shrink(group.formats.items, 0);
                table.deinit(self.gpa);
                table.* = tables[i * self.groups.len + group_index];
            }
            beam.seq_len = seq_len;
            for (beam.generations) |*generation| generation.* +%= 1;
        }
    }

    /// Copies the resident rows of a layer, [row][kv_head][head_dim], and returns their count. The copies share no memory,
    /// with one another or with the rows.
    pub fn gather(self: *const PagedCache, sequence: *const Sequence, layer_index: u32, k: Output, v: Output) GatherError!u32 {
        const rows = try sequence.rows(layer_index);
        const shape = self.groups[self.places[layer_index].group].shape;
        const resident = rows.residentCount();
        const element_count = shapes.rowElements(shape, resident) orelse return error.InvalidSize;
        if (k.element_count < element_count or v.element_count < element_count) return error.InvalidSize;
        const outputs = [_]Output{ k, v };
        try checkApart(k.written(element_count), v.written(element_count));
        for (outputs) |output| try rows.checkApartFrom(output.written(element_count));
        var row: u64 = 0;
        var position: u32 = 0;
        while (position < rows.row_count) {
            const end = rows.residentEnd(position) orelse {
                position = rows.first;
                continue;
            };
            const place = rows.place.paged;
            const block: Block = .of(place.formatAt(position), place.blocks[position / self.block_size]);
            const token = position % self.block_size;
            const count = @min(end - position, self.block_size - token);
            for ([_]shapes.Side{ .keys, .values }, outputs) |side, output| for (0..shape.kv_head_count) |head| {
                const kv_head: u32 = @intCast(head);
                const element_bytes = output.dtype.elementBytes();
                const destination = output.bytes + shapes.tokenMajorOffset(shape, kv_head, row) * element_bytes;
                block.read(place.layer, side, kv_head, token, count, destination, output.dtype, shape.kvDim() * element_bytes);
            };
            row += count;
            position += count;
        }
        assert(row == resident);
        return resident;
    }

    pub fn stats(self: *const PagedCache) error{OutOfMemory}!Stats {
        return paged_stats.collect(self);
    }
};

/// One token stream. Made, forked and freed by its cache.
pub const Sequence = struct {
    cache: *PagedCache,
    /// Its number among the sequences of the cache, which changes when another one is freed.
    index: usize,
    /// [group]
    tables: []BlockTable,
    /// Committed tokens.
    seq_len: u32 = 0,
    /// Rows appended and not committed, [layer].
    pending: []u32,
    /// Counts what makes a view of a layer stale, [layer]; wraps.
    generations: []u32,
    /// In a set that is being checked for doubles.
    marked: bool = false,
    /// The block in which its next row lands, while an append puts another one in its place.
    replaced: ?paged_append.Replaced = null,
    /// Blocks that an append under way has put into the table of the layer's group.
    entries_added: u32 = 0,

    /// Appends n >= 0 rows of one layer and returns the position of the first.
    pub fn append(self: *Sequence, layer_index: u32, k: Input, v: Input) PagedCache.AppendError!u32 {
        const shape = try self.cache.layerShape(layer_index);
        const token_count = shapes.rowCount(shape, k.element_count) orelse return error.InvalidSize;
        const start = self.rowCount(layer_index);
        if (k.element_count != v.element_count) return error.InvalidSize;
        if (token_count > self.cache.max_seq_len - start) return error.CacheFull;
        try self.cache.append(layer_index, &.{self}, &.{@intCast(token_count)}, k, v);
        return start;
    }

    /// The smallest length such that a truncate to it, and to all from it up to `seq_len`, leaves every layer with all rows
    /// it shows at that length; those before it were let go. A truncate to no more rows than the sinks is legal, too.
    pub fn rewindableTo(self: *const Sequence) u32 {
        var length: u32 = 0;
        for (self.tables, self.cache.groups) |*table, group| length = @max(length, self.cache.rewindableTo(table, group));
        return length;
    }

    /// Committed and pending rows of a layer.
    pub fn rowCount(self: *const Sequence, layer_index: u32) u32 {
        return self.seq_len + self.pending[layer_index];
    }

    /// Makes views of the layers of a group stale: blocks of theirs are others now.
    pub fn ageViews(self: *Sequence, group_index: u32) void {
        for (self.cache.places, self.generations) |place, *generation_now| {
            if (place.group == group_index) generation_now.* +%= 1;
        }
    }

    /// The rows of a layer as a reader sees them now.
    pub fn rows(self: *const Sequence, layer_index: u32) error{LayerOutOfRange}!Rows {
        if (layer_index >= self.pending.len) return error.LayerOutOfRange;
        const place = self.cache.places[layer_index];
        const group = self.cache.groups[place.group];
        const table = &self.tables[place.group];
        return .{
            .kv_head_count = group.shape.kv_head_count,
            .head_dim = group.shape.head_dim,
            .q_head_count = place.q_head_count,
            .row_count = self.rowCount(layer_index),
            .sink_end = table.sink_end,
            .first = table.first,
            .window_tokens = group.window_tokens,
            .fidelity = group.heads(place.index),
            .newest_tokens = self.cache.retention.newestTokens(),
            .place = .{ .paged = .{
                .block_size = self.cache.block_size,
                .formats = group.formats.items,
                .blocks = table.blocks.items,
                .block_formats = table.formats.items,
                .layer = place.index,
            } },
        };
    }

    /// The blocks of a layer in order, those that hold its rows; -1 where all of a block's were let go. One whose rows are
    /// there to be rewound to, and not seen, is named: `seenBlock` is what readers are told.
    pub fn blockTable(self: *const Sequence, layer_index: u32) error{LayerOutOfRange}![]const i32 {
        const shape = try self.cache.layerShape(layer_index);
        return self.tables[self.cache.places[layer_index].group].blocks.items[0..shape.blockCount(self.rowCount(layer_index))];
    }

    /// The block of an entry of `blockTable`; -1 where none of its rows is seen.
    pub fn seenBlock(self: *const Sequence, layer_index: u32, entry: usize) i32 {
        const table = &self.tables[self.cache.places[layer_index].group];
        return if (table.isSeen(entry, self.cache.block_size)) table.blocks.items[entry] else -1;
    }

    /// The tier of the block that has a resident position of a layer.
    pub fn tier(self: *const Sequence, layer_index: u32, position: u32) tiers.Tier {
        const group_index = self.cache.places[layer_index].group;
        const format = self.tables[group_index].formats.items[position / self.cache.block_size];
        return tiers.tierOf(&self.cache.groups[group_index], format);
    }

    /// A number that changes whenever a view of this layer goes stale.
    pub fn generation(self: *const Sequence, layer_index: u32) error{LayerOutOfRange}!u32 {
        if (layer_index >= self.generations.len) return error.LayerOutOfRange;
        return self.generations[layer_index];
    }
};

test {
    _ = @import("cache_test.zig");
    _ = @import("append_test.zig");
    _ = @import("rewind_test.zig");
}
