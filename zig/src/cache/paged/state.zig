//! The data of a paged cache and its sequences, and what can be told of it without a change.
//!
//! Appends (`append.zig`), commits (`commit.zig`) and the sums over a cache (`stats.zig`) work on these two; `cache.zig` owns
//! them.

const std = @import("std");
const assert = std.debug.assert;
const Allocator = std.mem.Allocator;
const BlockTable = @import("../blocks/table.zig").BlockTable;
const Dtype = @import("../../dtype.zig").Dtype;
const gathers = @import("../gather.zig");
const layer_group = @import("layer_group.zig");
const Group = layer_group.Group;
const GroupedLayer = layer_group.GroupedLayer;
const Index = @import("../prefix/index.zig").Index;
const Living = @import("../prefix/living.zig").Living;
const Output = @import("../input.zig").Output;
const policies = @import("../tiers/policy.zig");
const Policy = policies.Policy;
const Range = gathers.Range;
const Retention = @import("../tiers/retention.zig").Retention;
const Rows = @import("../rows.zig").Rows;
const shapes = @import("../../shape.zig");
const BlockShape = shapes.BlockShape;
const Tokens = @import("../prefix/tokens.zig").Tokens;

/// The data that all sequences of a cache have in common.
pub const CacheState = struct {
    gpa: Allocator,
    max_seq_len: u32,
    dtype_k: Dtype,
    dtype_v: Dtype,
    block_size: u32,
    policy: Policy,
    retention: Retention,
    rewind_tokens: u32,
    /// The name by which pools know who wrote a block.
    writer: u64,
    groups: []Group,
    /// [layer]
    layers: []GroupedLayer,
    /// Rows that went out of sight.
    evictions: u64 = 0,
    /// Finds blocks by their tokens; null where nobody tells any.
    prefix: ?*Index = null,
    /// The tokens of sequences that may tell them.
    living: Living = .{},

    /// The group of a layer, and its number there.
    pub fn layer(state: *const CacheState, layer_index: u32) error{LayerOutOfRange}!GroupedLayer {
        return if (layer_index < state.layers.len) state.layers[layer_index] else error.LayerOutOfRange;
    }

    /// The shape of a layer's blocks in the tail.
    pub fn layerShape(state: *const CacheState, layer_index: u32) error{LayerOutOfRange}!BlockShape {
        return state.groups[(try state.layer(layer_index)).group].shape;
    }
};

/// The data of one token stream.
pub const SequenceState = struct {
    cache: *CacheState,
    /// [group]
    tables: []BlockTable,
    /// Committed tokens.
    seq_len: u32 = 0,
    /// Rows appended and not committed, [layer].
    pending: []u32,
    /// Counts what makes a view of a layer stale, [layer]; wraps.
    generations: []u32,
    /// The name by which pools know who wrote a block.
    writer: u64,
    /// In a cache with a prefix index.
    tokens: ?Tokens = null,

    pub const GatherError = gathers.Error || error{LayerOutOfRange};

    /// An empty sequence.
    pub fn init(cache: *CacheState) error{OutOfMemory}!SequenceState {
        const gpa = cache.gpa;
        const tables = try gpa.alloc(BlockTable, cache.groups.len);
        errdefer gpa.free(tables);
        const pending = try gpa.alloc(u32, cache.layers.len);
        errdefer gpa.free(pending);
        const generations = try gpa.alloc(u32, cache.layers.len);
        @memset(tables, .{});
        @memset(pending, 0);
        @memset(generations, 0);
        return .{ .cache = cache, .tables = tables, .pending = pending, .generations = generations, .writer = cache.writer };
    }

    /// Gives all references back.
    pub fn deinit(self: *SequenceState) void {
        const gpa = self.cache.gpa;
        if (self.tokens) |*tokens| tokens.keepNewest();
        for (self.tables, self.cache.groups) |*table, group| {
            table.shrink(group.formats.items, 0);
            table.deinit(gpa);
        }
        if (self.tokens) |*tokens| tokens.deinit();
        gpa.free(self.tables);
        gpa.free(self.pending);
        gpa.free(self.generations);
        self.* = undefined;
    }

    /// Committed and pending rows of a layer.
    pub fn rowCount(self: *const SequenceState, layer_index: u32) u32 {
        return self.seq_len + self.pending[layer_index];
    }

    pub fn hasPending(self: *const SequenceState) bool {
        return !std.mem.allEqual(u32, self.pending, 0);
    }

    /// Makes views of all layers stale.
    pub fn ageAllViews(self: *SequenceState) void {
        for (self.generations) |*generation| generation.* +%= 1;
    }

    /// Makes views of the layers of a group stale: blocks of theirs are others now.
    pub fn ageViews(self: *SequenceState, group_index: u32) void {
        for (self.cache.layers, self.generations) |layer, *generation| {
            if (layer.group == group_index) generation.* +%= 1;
        }
    }

    /// The rows of a layer as a reader sees them now.
    pub fn rows(self: *const SequenceState, layer_index: u32) error{LayerOutOfRange}!Rows {
        const layer = try self.cache.layer(layer_index);
        const group = &self.cache.groups[layer.group];
        const table = &self.tables[layer.group];
        return .{
            .kv_head_count = group.shape.kv_head_count,
            .head_dim = group.shape.head_dim,
            .q_head_count = layer.q_head_count,
            .row_count = self.rowCount(layer_index),
            .sink_end = table.sink_end,
            .first = table.first,
            .window_tokens = group.window_tokens,
            .fidelity = group.heads(layer.index),
            .newest_tokens = self.cache.retention.newestTokens(),
            .memory = .{ .paged = .{
                .block_size = self.cache.block_size,
                .formats = group.formats.items,
                .entries = table.entries(),
                .layer = layer.index,
            } },
        };
    }

    /// Copies rows of a layer that are seen, and returns their count.
    pub fn gather(self: *const SequenceState, layer_index: u32, range: Range, k: Output, v: Output) GatherError!u32 {
        const stored = try self.rows(layer_index);
        return gathers.gather(&stored, range, k, v);
    }

    /// The tier of the block that has a position of a layer; the tail where its rows were let go.
    pub fn tier(self: *const SequenceState, layer_index: u32, position: u32) policies.Tier {
        const group_index = self.cache.layers[layer_index].group;
        const entries = self.tables[group_index].entries();
        const entry = position / self.cache.block_size;
        return if (entries.isEvicted(entry)) .tail else policies.tierOf(&self.cache.groups[group_index], entries.format(entry));
    }
};
