//! The paged cache: sequences of any length as tables of blocks from a pool.
//!
//!     sequence 0   | 4 | 7 | 2 |            a block table: which block holds positions 0..63, 64..127, ...
//!     sequence 1   | 4 | 7 | 9 |            forked from it: two blocks shared, one copied at the first append
//!
//!     block        [layer][keys, values][kv_head][token][head_dim]     64 positions in every layer of a group
//!
//! Layers of equal KV heads, head_dim and window form a layer group, with its own block shape, pool and table; most
//! models have one. A reference count in the pool is the number of table entries that name the block, so a fork is a
//! copy of a table, and only the block in which the next row lands is ever copied: when it is shared, at that append.
//!
//! Writing has two phases, as in `contiguous.zig`: rows appended to a layer are pending, a commit makes them count.
//! Several sequences take part in one `append`, all of them or none. Pending rows belong to their sequence alone.
//!
//! Retention may let rows go at a commit. Positions never change by that: a row keeps its place for ever, and blocks
//! whose rows are all gone leave the table as -1.
//!
//! Not thread safe but for the pools: a caller that shares a cache holds a lock.

const std = @import("std");
const assert = std.debug.assert;
const Allocator = std.mem.Allocator;
const block_pool = @import("block_pool.zig");
const BlockPool = block_pool.BlockPool;
const dispatch = @import("../kernels/dispatch.zig");
const Dtype = @import("../dtype.zig").Dtype;
const layer_group = @import("layer_group.zig");
pub const Layer = layer_group.Layer;
const Group = layer_group.Group;
const Place = layer_group.Place;
pub const Retention = @import("retention.zig").Retention;
const row_types = @import("rows.zig");
const Input = row_types.Input;
const Output = row_types.Output;
const Rows = row_types.Rows;
const shapes = @import("../shape.zig");
const BlockShape = shapes.BlockShape;
const slab_memory = @import("../device/slab.zig");

pub const Options = struct {
    layers: []const Layer,
    block_size: u32 = 64,
    max_seq_len: u32,
    dtype_k: Dtype = .f16,
    dtype_v: Dtype = .f16,
    retention: Retention = .{},
    /// Bound of all slabs; unused with `pool`.
    max_bytes: u64 = std.math.maxInt(u64),
    /// Blocks of another owner, for a cache of one layer group and equal block bytes. Outlives the cache.
    pool: ?*BlockPool = null,
};

/// Names the owner of a block's bytes; 0 is nobody, the largest is the pool's own.
var tenant_count: std.atomic.Value(u32) = .init(0);

pub const Stats = struct {
    sequence_count: u32,
    /// Resident rows of all sequences, each counted where it is seen.
    token_count: u64,
    /// Table entries, and the blocks they name.
    table_entries: u64,
    evictions: u64,
    metadata_bytes: u64,
};

pub const PagedCache = struct {
    gpa: Allocator,
    max_seq_len: u32,
    dtype_k: Dtype,
    dtype_v: Dtype,
    block_size: u32,
    retention: Retention,
    tenant: u32,
    groups: []Group,
    places: []Place,
    owned_pools: []BlockPool,
    budget: *block_pool.Budget,
    sequences: std.ArrayList(*Sequence) = .empty,
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
    pub const GatherError = error{ LayerOutOfRange, InvalidSize };

    /// Nothing is mapped before the first row.
    pub fn init(gpa: Allocator, options: Options) InitError!PagedCache {
        return initSlabs(gpa, slab_memory.system, options);
    }

    pub fn initSlabs(gpa: Allocator, slab_allocator: Allocator, options: Options) InitError!PagedCache {
        if (options.layers.len == 0 or options.max_seq_len == 0) return error.InvalidConfig;
        if (options.max_seq_len > shapes.max_seq_len_max) return error.InvalidConfig;
        try options.retention.validate();

        const places = try gpa.alloc(Place, options.layers.len);
        errdefer gpa.free(places);
        const groups = try layer_group.groupLayers(gpa, options.layers, places, .{
            .shape = .{
                .layer_count = 0,
                .kv_head_count = 0,
                .head_dim = 0,
                .block_size = options.block_size,
                .dtype_k = options.dtype_k,
                .dtype_v = options.dtype_v,
            },
            .window_tokens = null,
            .pool = undefined,
        });
        errdefer gpa.free(groups);
        for (groups) |group| try group.shape.validate();

        const budget = try gpa.create(block_pool.Budget);
        errdefer gpa.destroy(budget);
        budget.* = .init(options.max_bytes);
        const owned_pools = try gpa.alloc(BlockPool, if (options.pool == null) groups.len else 0);
        errdefer gpa.free(owned_pools);
        if (options.pool) |pool| {
            if (groups.len != 1) return error.InvalidConfig;
            const wanted = std.mem.alignForward(u64, groups[0].shape.blockBytes(), 64);
            if (pool.block_bytes != wanted) return error.InvalidConfig;
            groups[0].pool = pool;
        }
        for (owned_pools, 0..) |*pool, i| {
            errdefer for (owned_pools[0..i]) |*made| made.deinit();
            pool.* = try .initBudget(gpa, slab_allocator, groups[i].shape.blockBytes(), options.max_bytes, budget);
            groups[i].pool = pool;
        }
        errdefer for (owned_pools) |*pool| pool.deinit();
        const tenant = tenant_count.fetchAdd(1, .monotonic) % (std.math.maxInt(u32) - 1) + 1;
        return .{
            .gpa = gpa,
            .max_seq_len = options.max_seq_len,
            .dtype_k = options.dtype_k,
            .dtype_v = options.dtype_v,
            .block_size = options.block_size,
            .retention = options.retention,
            .tenant = tenant,
            .groups = groups,
            .places = places,
            .owned_pools = owned_pools,
            .budget = budget,
        };
    }

    /// Frees all sequences too.
    pub fn deinit(self: *PagedCache) void {
        while (self.sequences.items.len != 0) self.freeSequence(self.sequences.items[self.sequences.items.len - 1]);
        self.sequences.deinit(self.gpa);
        for (self.owned_pools) |*pool| pool.deinit();
        self.gpa.free(self.owned_pools);
        self.gpa.destroy(self.budget);
        self.gpa.free(self.groups);
        self.gpa.free(self.places);
        self.* = undefined;
    }

    pub fn layerCount(self: *const PagedCache) u32 {
        return @intCast(self.places.len);
    }

    /// The shape of a layer's blocks.
    pub fn layerShape(self: *const PagedCache, layer_index: u32) error{LayerOutOfRange}!BlockShape {
        if (layer_index >= self.places.len) return error.LayerOutOfRange;
        return self.groups[self.places[layer_index].group].shape;
    }

    /// An empty sequence, owned by the cache.
    pub fn createSequence(self: *PagedCache) error{OutOfMemory}!*Sequence {
        try self.sequences.ensureUnusedCapacity(self.gpa, 1);
        const sequence = try self.gpa.create(Sequence);
        errdefer self.gpa.destroy(sequence);
        const tables = try self.gpa.alloc(Table, self.groups.len);
        errdefer self.gpa.free(tables);
        const pending = try self.gpa.alloc(u32, self.places.len);
        errdefer self.gpa.free(pending);
        const generations = try self.gpa.alloc(u32, self.places.len);
        for (tables) |*table| table.* = .{};
        @memset(pending, 0);
        @memset(generations, 0);
        sequence.* = .{ .cache = self, .tables = tables, .pending = pending, .generations = generations };
        self.sequences.appendAssumeCapacity(sequence);
        return sequence;
    }

    /// Gives all references of a sequence back.
    pub fn freeSequence(self: *PagedCache, sequence: *Sequence) void {
        assert(sequence.cache == self);
        for (sequence.tables, self.groups) |*table, group| {
            group.pool.release(table.blocks.items);
            table.blocks.deinit(self.gpa);
        }
        self.gpa.free(sequence.tables);
        self.gpa.free(sequence.pending);
        self.gpa.free(sequence.generations);
        const index = std.mem.indexOfScalar(*Sequence, self.sequences.items, sequence).?;
        _ = self.sequences.swapRemove(index);
        self.gpa.destroy(sequence);
    }

    /// A sequence that begins as a copy of the committed rows of `parent`, which it shares: no K/V byte is copied.
    pub fn fork(self: *PagedCache, parent: *const Sequence) error{OutOfMemory}!*Sequence {
        assert(parent.cache == self);
        const child = try self.createSequence();
        errdefer self.freeSequence(child);
        for (child.tables, parent.tables, self.groups) |*table, from, group| {
            const shared = from.blocks.items[0..group.shape.blockCount(parent.seq_len)];
            try table.blocks.appendSlice(self.gpa, shared);
            group.pool.retain(shared);
            table.sink_end = from.sink_end;
            table.first = from.first;
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
        if (layer_index >= self.places.len) return error.LayerOutOfRange;
        if (sequences.len != token_counts.len) return error.InvalidSize;
        const place = self.places[layer_index];
        const group = self.groups[place.group];
        try checkDistinct(sequences);
        var token_count: u64 = 0;
        for (token_counts) |count| token_count += count;
        const element_count = shapes.rowElements(group.shape, token_count) orelse return error.InvalidSize;
        if (k.element_count != element_count or v.element_count != element_count) return error.InvalidSize;
        for (sequences, token_counts) |sequence, count| {
            if (count > self.max_seq_len - sequence.rowCount(layer_index)) return error.CacheFull;
        }
        if (token_count == 0) return;
        const kernels = dispatch.kernels();
        if (kernels.storable(k.bytes, k.dtype, self.dtype_k, element_count) == 0) return error.NotFinite;
        if (kernels.storable(v.bytes, v.dtype, self.dtype_v, element_count) == 0) return error.NotFinite;

        try self.reserve(layer_index, sequences, token_counts);
        var token_first: u64 = 0;
        for (sequences, token_counts) |sequence, count| {
            const start = sequence.rowCount(layer_index);
            self.write(place, sequence, start, count, token_first, token_count, k, .keys);
            self.write(place, sequence, start, count, token_first, token_count, v, .values);
            sequence.pending[layer_index] += count;
            if (count != 0) sequence.generations[layer_index] +%= 1;
            token_first += count;
        }
    }

    fn checkDistinct(sequences: []const *Sequence) error{InvalidConfig}!void {
        defer for (sequences) |sequence| {
            sequence.marked = false;
        };
        for (sequences) |sequence| {
            if (sequence.marked) return error.InvalidConfig;
            sequence.marked = true;
        }
    }

    /// Makes every block that the rows will lie in exist and be unshared.
    fn reserve(self: *PagedCache, layer_index: u32, sequences: []const *Sequence, token_counts: []const u32) BlockPool.TakeError!void {
        const place = self.places[layer_index];
        const group = self.groups[place.group];
        const shape = group.shape;
        for (sequences, token_counts) |sequence, count| {
            const block_count = shape.blockCount(sequence.rowCount(layer_index) + count);
            try sequence.tables[place.group].blocks.ensureTotalCapacity(self.gpa, block_count);
        }
        var needed: usize = 0;
        for (sequences, token_counts) |sequence, count| {
            const table = &sequence.tables[place.group];
            const start = sequence.rowCount(layer_index);
            needed += shape.blockCount(start + count) -| table.blocks.items.len;
            // Whoever copies a block leaves it now: when all but one of those that share it do, the last one keeps it.
            if (self.sharedBlock(sequence, place.group, start, count)) |entry| {
                group.pool.release(table.blocks.items[entry..][0..1]);
                sequence.leaves_block = true;
                needed += 1;
            }
        }
        errdefer for (sequences) |sequence| if (sequence.leaves_block) {
            const entry = sequence.rowCount(layer_index) / self.block_size;
            group.pool.retain(sequence.tables[place.group].blocks.items[entry..][0..1]);
            sequence.leaves_block = false;
        };
        var few: [64]i32 = undefined;
        const many: ?[]i32 = if (needed <= few.len) null else try self.gpa.alloc(i32, needed);
        defer if (many) |taken| self.gpa.free(taken);
        const blocks = many orelse few[0..needed];
        try group.pool.take(self.tenant, blocks);

        // Nothing below can fail.
        var next: usize = 0;
        for (sequences, token_counts) |sequence, count| {
            const table = &sequence.tables[place.group];
            const start = sequence.rowCount(layer_index);
            if (sequence.leaves_block) {
                const entry = start / self.block_size;
                self.copyRows(place.group, sequence, entry, blocks[next]);
                table.blocks.items[entry] = blocks[next];
                sequence.leaves_block = false;
                next += 1;
                // The copy has the rows of every layer of the group: views of all of them tell of the old block.
                for (self.places, sequence.generations) |other, *generation| {
                    if (other.group == place.group) generation.* +%= 1;
                }
            }
            while (table.blocks.items.len < shape.blockCount(start + count)) : (next += 1) {
                table.blocks.appendAssumeCapacity(blocks[next]);
            }
        }
        assert(next == needed);
    }

    /// The table entry of the block in which row `start` lands, if another table names that block too.
    fn sharedBlock(self: *const PagedCache, sequence: *const Sequence, group_index: u32, start: u32, count: u32) ?usize {
        const entry = start / self.block_size;
        const blocks = sequence.tables[group_index].blocks.items;
        if (count == 0 or entry >= blocks.len) return null;
        assert(blocks[entry] >= 0);
        return if (self.groups[group_index].pool.refCount(@intCast(blocks[entry])) > 1) entry else null;
    }

    /// Copies what a sequence sees of one of its blocks.
    fn copyRows(self: *PagedCache, group_index: u32, sequence: *const Sequence, entry: usize, to_block: i32) void {
        const group = self.groups[group_index];
        const shape = group.shape;
        const from = group.pool.bytes(@intCast(sequence.tables[group_index].blocks.items[entry]));
        const to = group.pool.bytes(@intCast(to_block));
        const block_first: u32 = @intCast(entry * self.block_size);
        for (self.places, 0..) |place, layer| {
            if (place.group != group_index) continue;
            const row_count = @min(sequence.rowCount(@intCast(layer)) - block_first, self.block_size);
            if (row_count == 0) continue;
            for ([_]BlockShape.Side{ .keys, .values }) |side| for (0..shape.kv_head_count) |kv_head| {
                const offset: usize = @intCast(shape.rowOffset(place.index, side, @intCast(kv_head), 0));
                const bytes: usize = @intCast(row_count * shape.tokenBytes(side));
                @memcpy(to[offset..][0..bytes], from[offset..][0..bytes]);
            };
        }
    }

    fn write(
        self: *PagedCache,
        place: Place,
        sequence: *Sequence,
        start: u32,
        count: u32,
        token_first: u64,
        token_count: u64,
        input: Input,
        side: BlockShape.Side,
    ) void {
        const group = self.groups[place.group];
        const shape = group.shape;
        const dtype = shape.dtype(side);
        const kernels = dispatch.kernels();
        for (0..count) |i| {
            const position = start + @as(u32, @intCast(i));
            const block = sequence.tables[place.group].blocks.items[position / self.block_size];
            const bytes = group.pool.bytes(@intCast(block));
            for (0..shape.kv_head_count) |head| {
                const kv_head: u32 = @intCast(head);
                kernels.convert(
                    bytes.ptr + shape.rowOffset(place.index, side, kv_head, position % self.block_size),
                    dtype,
                    input.headRow(shape, token_count, kv_head, token_first + i),
                    input.dtype,
                    shape.head_dim,
                );
            }
        }
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
        // Pending rows are in blocks of this sequence alone: moving them touches nobody else's bytes.
        for (kept, 0..) |index, i| {
            if (index != i) self.moveRow(sequence, sequence.seq_len + index, sequence.seq_len + @as(u32, @intCast(i)));
        }
        @memset(sequence.pending, 0);
        sequence.seq_len += @intCast(kept.len);
        self.dropBlocks(sequence);
        for (sequence.generations) |*generation| generation.* +%= 1;
        self.evict(sequence);
    }

    fn moveRow(self: *PagedCache, sequence: *const Sequence, from: u32, to: u32) void {
        for (self.places) |place| {
            const group = self.groups[place.group];
            const shape = group.shape;
            const blocks = sequence.tables[place.group].blocks.items;
            const from_bytes = group.pool.bytes(@intCast(blocks[from / self.block_size]));
            const to_bytes = group.pool.bytes(@intCast(blocks[to / self.block_size]));
            for ([_]BlockShape.Side{ .keys, .values }) |side| for (0..shape.kv_head_count) |head| {
                const kv_head: u32 = @intCast(head);
                const size: usize = @intCast(shape.tokenBytes(side));
                const source: usize = @intCast(shape.rowOffset(place.index, side, kv_head, from % self.block_size));
                const target: usize = @intCast(shape.rowOffset(place.index, side, kv_head, to % self.block_size));
                @memcpy(to_bytes[target..][0..size], from_bytes[source..][0..size]);
            };
        }
    }

    /// Rewinds a sequence to `seq_len` rows and drops its pending ones. No K/V byte is copied.
    pub fn truncate(self: *PagedCache, sequence: *Sequence, seq_len: u32) TruncateError!void {
        assert(sequence.cache == self);
        if (seq_len > sequence.seq_len) return error.PositionOutOfRange;
        for (sequence.tables) |table| {
            if (seq_len > table.sink_end and seq_len < table.first) return error.PositionOutOfRange;
        }
        @memset(sequence.pending, 0);
        sequence.seq_len = seq_len;
        self.dropBlocks(sequence);
        for (sequence.tables) |*table| if (seq_len <= table.sink_end) {
            table.sink_end = 0;
            table.first = 0;
        };
        for (sequence.generations) |*generation| generation.* +%= 1;
    }

    /// Gives back the blocks behind the last committed row.
    fn dropBlocks(self: *PagedCache, sequence: *Sequence) void {
        for (sequence.tables, self.groups) |*table, group| {
            const kept = group.shape.blockCount(sequence.seq_len);
            if (kept >= table.blocks.items.len) continue;
            group.pool.release(table.blocks.items[kept..]);
            table.blocks.items.len = kept;
        }
    }

    /// Lets go what retention and the layers' windows no longer want.
    fn evict(self: *PagedCache, sequence: *Sequence) void {
        for (sequence.tables, self.groups, 0..) |*table, group, group_index| {
            const kept = self.retention.kept(group.window_tokens, sequence.seq_len);
            if (kept.first <= kept.sink_end or kept.first <= table.first) continue;
            self.evictions += kept.first - @max(table.first, kept.sink_end);
            table.sink_end = kept.sink_end;
            table.first = kept.first;
            // Blocks all of whose rows are gone: after the last sink's and before the first retained row's.
            const from = group.shape.blockCount(kept.sink_end);
            const to = kept.first / self.block_size;
            if (from >= to) continue;
            const gone = table.blocks.items[from..to];
            group.pool.release(gone);
            @memset(gone, -1);
            for (self.places, sequence.generations) |place, *generation| {
                if (place.group == group_index) generation.* +%= 1;
            }
        }
    }

    /// beams[i] becomes what beams[parents[i]] was. Tables and reference counts only; rows pending anywhere refuse.
    pub fn reorder(self: *PagedCache, beams: []const *Sequence, parents: []align(1) const u32) ReorderError!void {
        if (beams.len != parents.len) return error.InvalidConfig;
        try checkDistinct(beams);
        for (beams) |beam| {
            assert(beam.cache == self);
            for (beam.pending) |rows| if (rows != 0) return error.CommitMismatch;
        }
        for (parents) |parent| if (parent >= beams.len) return error.InvalidConfig;

        // The new tables first: this is all that can fail.
        const tables = try self.gpa.alloc(Table, beams.len * self.groups.len);
        defer self.gpa.free(tables);
        var made: usize = 0;
        errdefer for (tables[0..made]) |*table| table.blocks.deinit(self.gpa);
        const seq_lens = try self.gpa.alloc(u32, beams.len);
        defer self.gpa.free(seq_lens);
        for (parents, seq_lens) |parent, *seq_len| {
            seq_len.* = beams[parent].seq_len;
            for (beams[parent].tables) |from| {
                tables[made] = .{ .sink_end = from.sink_end, .first = from.first };
                try tables[made].blocks.appendSlice(self.gpa, from.blocks.items);
                made += 1;
            }
        }
        for (tables, 0..) |table, i| self.groups[i % self.groups.len].pool.retain(table.blocks.items);
        for (beams, seq_lens, 0..) |beam, seq_len, i| {
            for (beam.tables, self.groups, 0..) |*table, group, group_index| {
                group.pool.release(table.blocks.items);
                table.blocks.deinit(self.gpa);
                table.* = tables[i * self.groups.len + group_index];
            }
            beam.seq_len = seq_len;
            for (beam.generations) |*generation| generation.* +%= 1;
        }
    }

    /// Copies the resident rows of a layer, [row][kv_head][head_dim], and returns their count.
    pub fn gather(self: *const PagedCache, sequence: *const Sequence, layer_index: u32, k: Output, v: Output) GatherError!u32 {
        const rows = try sequence.rows(layer_index);
        const shape = self.groups[self.places[layer_index].group].shape;
        const resident = rows.residentCount();
        const element_count = shapes.rowElements(shape, resident) orelse return error.InvalidSize;
        if (k.element_count < element_count or v.element_count < element_count) return error.InvalidSize;
        const kernels = dispatch.kernels();
        var row: u64 = 0;
        for (0..rows.row_count) |i| {
            const position: u32 = @intCast(i);
            if (position >= rows.sink_end and position < rows.first) continue;
            for (0..shape.kv_head_count) |head| {
                const kv_head: u32 = @intCast(head);
                const place = rows.run(kv_head, position, position + 1);
                const element = shapes.tokenMajorOffset(shape, kv_head, row);
                kernels.convert(k.bytes + element * k.dtype.elementBytes(), k.dtype, place.keys, rows.dtype_k, shape.head_dim);
                kernels.convert(v.bytes + element * v.dtype.elementBytes(), v.dtype, place.values, rows.dtype_v, shape.head_dim);
            }
            row += 1;
        }
        assert(row == resident);
        return resident;
    }

    pub fn stats(self: *const PagedCache) Stats {
        var result: Stats = .{
            .sequence_count = @intCast(self.sequences.items.len),
            .token_count = 0,
            .table_entries = 0,
            .evictions = self.evictions,
            .metadata_bytes = self.sequences.capacity * @sizeOf(*Sequence),
        };
        for (self.sequences.items) |sequence| {
            result.metadata_bytes += @sizeOf(Sequence) + 2 * sequence.pending.len * @sizeOf(u32);
            for (sequence.tables) |table| {
                result.metadata_bytes += @sizeOf(Table) + table.blocks.capacity * @sizeOf(i32);
                for (table.blocks.items) |block| result.table_entries += @intFromBool(block >= 0);
            }
            const rows = sequence.rows(0) catch unreachable; // there is a layer 0
            result.token_count += rows.residentCount() - sequence.pending[0];
        }
        return result;
    }
};

/// The blocks of a sequence in one layer group.
const Table = struct {
    /// Block of each `block_size` positions; -1 where all rows were evicted.
    blocks: std.ArrayList(i32) = .empty,
    /// Resident are [0, sink_end) and [first, row count).
    sink_end: u32 = 0,
    first: u32 = 0,
};

/// One token stream. Made, forked and freed by its cache.
pub const Sequence = struct {
    cache: *PagedCache,
    /// [group]
    tables: []Table,
    /// Committed tokens.
    seq_len: u32 = 0,
    /// Rows appended and not committed, [layer].
    pending: []u32,
    /// Counts what makes a view of a layer stale, [layer]; wraps.
    generations: []u32,
    /// In a set that is being checked for doubles.
    marked: bool = false,
    /// The block in which its next row lands is about to be copied, and its reference was given back.
    leaves_block: bool = false,

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

    /// Committed and pending rows of a layer.
    fn rowCount(self: *const Sequence, layer_index: u32) u32 {
        return self.seq_len + self.pending[layer_index];
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
            .dtype_k = group.shape.dtype_k,
            .dtype_v = group.shape.dtype_v,
            .row_count = self.rowCount(layer_index),
            .sink_end = table.sink_end,
            .first = table.first,
            .window_tokens = group.window_tokens,
            .place = .{ .paged = .{
                .shape = group.shape,
                .pool = group.pool,
                .table = table.blocks.items,
                .layer = place.index,
            } },
        };
    }

    /// The blocks of a layer in order, -1 where one was evicted; those that hold its rows.
    pub fn blockTable(self: *const Sequence, layer_index: u32) error{LayerOutOfRange}![]const i32 {
        const layer_rows = try self.rows(layer_index);
        const paged = layer_rows.place.paged;
        return paged.table[0..paged.shape.blockCount(layer_rows.row_count)];
    }

    /// A number that changes whenever a view of this layer goes stale.
    pub fn generation(self: *const Sequence, layer_index: u32) error{LayerOutOfRange}!u32 {
        if (layer_index >= self.generations.len) return error.LayerOutOfRange;
        return self.generations[layer_index];
    }
};

test {
    _ = @import("paged_test.zig");
}
