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
//! A reference count in the pool is the number of table entries that name the block, and one more where the prefix index
//! does. So a fork is a copy of a table, and only the block in which the next row lands is ever copied: when it is shared, at
//! that append. A sequence that is made for its tokens starts as a fork of the longest prefix there is (`adopt.zig`).
//!
//! Writing has two phases, as in `contiguous.zig`: rows appended to a layer are pending, a commit makes them count.
//! Several sequences take part in one `append`, all of them or none. Pending rows belong to their sequence alone.
//!
//! Retention and windows hide rows at a commit, and let those go that lie `rewind_tokens` further back. Positions never
//! change by that: a row keeps its position for ever, and blocks whose rows are all let go leave the table.
//!
//! Not thread safe but for the pools: a caller that shares a cache holds a lock.

const std = @import("std");
const assert = std.debug.assert;
const Allocator = std.mem.Allocator;
const adoption = @import("adopt.zig");
const appends = @import("append.zig");
const BlockPool = @import("../blocks/pool.zig").BlockPool;
const block_table = @import("../blocks/table.zig");
const BlockTable = block_table.BlockTable;
const Budget = format_pool.Budget;
const chain = @import("../prefix/chain.zig");
const commits = @import("commit.zig");
const cpu = @import("../../device/cpu.zig");
const dispatch = @import("../../kernels/dispatch.zig");
const Dtype = @import("../../dtype.zig").Dtype;
const format_pool = @import("../blocks/format_pool.zig");
const Group = layer_group.Group;
pub const Head = @import("../tiers/fidelity.zig").Head;
const Index = indexes.Index;
const indexes = @import("../prefix/index.zig");
const input_types = @import("../input.zig");
const Input = input_types.Input;
const layer_group = @import("layer_group.zig");
const Output = input_types.Output;
const policies = @import("../tiers/policy.zig");
const Range = @import("../gather.zig").Range;
const Ref = trees.Ref;
const Rows = @import("../rows.zig").Rows;
const shapes = @import("../../shape.zig");
const BlockShape = shapes.BlockShape;
const slab_memory = @import("../../device/slab.zig");
const state = @import("state.zig");
const CacheState = state.CacheState;
const SequenceState = state.SequenceState;
const sums = @import("stats.zig");
const Tokens = @import("../prefix/tokens.zig").Tokens;
const trees = @import("../prefix/tree.zig");

pub const priority_default = indexes.priority_default;
pub const PrefixOptions = indexes.Options;
pub const Rank = indexes.Rank;
pub const PrefixStats = indexes.Stats;
pub const Tiers = indexes.Tiers;
pub const Explanation = adoption.Explanation;
pub const PrefixReason = adoption.Reason;
pub const Layer = layer_group.Layer;
pub const Policy = policies.Policy;
pub const PoolStats = format_pool.Stats;
pub const Retention = @import("../tiers/retention.zig").Retention;
pub const Stats = sums.Stats;
pub const Store = layer_group.Store;
pub const Tier = policies.Tier;

/// The layers of a paged cache, and what becomes of rows as they grow old.
pub const Options = struct {
    layers: []const Layer,
    block_size: u32 = 64,
    max_seq_len: u32,
    /// The formats of the tail, to which all rows are written: floats.
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
    /// Most bytes of all slabs; null for what the process may use. Belongs to a cache without `pool`.
    max_bytes: ?u64 = null,
    /// Blocks of another owner, for a cache of one layer group whose tail has their shape. Outlives the cache.
    pool: ?*BlockPool = null,
    /// Finds rows by their tokens. Needs pools of the cache's own: what one cache keeps, another could not get back.
    prefix: ?PrefixOptions = null,
};

/// What a prompt is looked up by.
pub const Prompt = struct {
    tokens: []align(1) const u32 = &.{},
    /// The tenant: no other one finds its rows. Null for those of this cache that have no salt.
    salt: ?[]const u8 = null,
    /// What the rows depend on beside the tokens and the cache: weights and their revision, rotation, adapter, engine.
    fingerprint: []const u8 = "",
};

/// Names who wrote a block; 0 is nobody, the largest is the pool's own. No name comes twice: whoever made tenants until one
/// did could read what another one left.
var writer_count: std.atomic.Value(u64) = .init(0);

fn newWriter() u64 {
    return writer_count.fetchAdd(1, .monotonic) + 1;
}

/// Sequences as tables of blocks, which forks share and a policy may quantize.
pub const PagedCache = struct {
    state: CacheState,
    /// One for each layer group; none with a pool of another owner.
    owned_pools: []BlockPool,
    budget: *Budget,
    /// What the rows depend on that this cache knows: its layers and formats.
    geometry: [32]u8,
    sequences: std.ArrayList(*Sequence) = .empty,

    pub const InitError = error{ InvalidConfig, OutOfMemory, BlockTooLarge, Unsupported };
    pub const AppendError = appends.Error;
    pub const CommitError = commits.CommitError;
    pub const TruncateError = commits.TruncateError;
    pub const ReorderError = error{ InvalidConfig, CommitMismatch, OutOfMemory };
    pub const GatherError = SequenceState.GatherError;

    /// A cache without sequences. Nothing is mapped before the first row.
    pub fn init(gpa: Allocator, options: Options) InitError!PagedCache {
        return initSlabs(gpa, slab_memory.system, options);
    }

    pub fn initSlabs(gpa: Allocator, slab_allocator: Allocator, options: Options) InitError!PagedCache {
        try dispatch.checkCpu();
        if (options.layers.len == 0 or options.max_seq_len == 0) return error.InvalidConfig;
        if (options.max_seq_len > shapes.max_seq_len_max) return error.InvalidConfig;
        if (!options.dtype_k.isFloat() or !options.dtype_v.isFloat()) return error.InvalidConfig;
        if (options.pool != null and (options.max_bytes != null or options.prefix != null)) return error.InvalidConfig;
        try options.retention.validate();
        for (options.layers) |layer| try shapes.checkQueryHeads(layer.q_head_count, layer.kv_head_count);
        const rewind_tokens = options.rewind_tokens orelse options.block_size;
        if (rewind_tokens > shapes.max_seq_len_max) return error.InvalidConfig;

        const layers = try gpa.alloc(layer_group.GroupedLayer, options.layers.len);
        errdefer gpa.free(layers);
        const groups = try layer_group.groupLayers(gpa, options.layers, layers, .{
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

        const max_bytes = options.max_bytes orelse cpu.memoryLimit();
        const budget = try gpa.create(Budget);
        errdefer gpa.destroy(budget);
        budget.* = .init(max_bytes);
        const owned_pools = try gpa.alloc(BlockPool, if (options.pool == null) groups.len else 0);
        errdefer gpa.free(owned_pools);
        if (options.pool) |pool| {
            if (groups.len != 1 or !std.meta.eql(pool.shape, groups[0].shape)) return error.InvalidConfig;
            groups[0].pool = pool;
        }
        for (owned_pools, 0..) |*pool, i| {
            errdefer for (owned_pools[0..i]) |*made| made.deinit();
            pool.* = try .initBudget(gpa, slab_allocator, groups[i].shape, max_bytes, budget);
            groups[i].pool = pool;
        }
        errdefer for (owned_pools) |*pool| pool.deinit();
        for (groups) |*group| {
            assert(try group.formatIndex(gpa, options.dtype_k, options.dtype_v) == block_table.tail_format);
            try group.formats.append(gpa, group.formats.items[block_table.tail_format]);
            assert(group.formats.items.len == block_table.reopened_format + 1);
            group.store_format = try storeFormat(gpa, group, options.policy);
            if (group.store_format) |index| group.store_mask = Group.formatBit(index);
            if (!options.measures_fidelity) continue;
            group.fidelity = try gpa.alloc(Head, group.shape.layer_count * group.shape.kv_head_count);
            @memset(group.fidelity, .{});
        }
        const prefix = if (options.prefix) |prefix_options| blk: {
            const index = try gpa.create(Index);
            errdefer gpa.destroy(index);
            index.* = try .init(gpa, groups, options.block_size, options.retention.tokens != null, prefix_options);
            break :blk index;
        } else null;
        return .{
            .state = .{
                .prefix = prefix,
                .gpa = gpa,
                .max_seq_len = options.max_seq_len,
                .dtype_k = options.dtype_k,
                .dtype_v = options.dtype_v,
                .block_size = options.block_size,
                .policy = options.policy,
                .retention = options.retention,
                .rewind_tokens = rewind_tokens,
                .writer = newWriter(),
                .groups = groups,
                .layers = layers,
            },
            .owned_pools = owned_pools,
            .budget = budget,
            .geometry = geometryOf(options),
        };
    }

    /// Frees the cache, and all sequences too.
    pub fn deinit(self: *PagedCache) void {
        const gpa = self.state.gpa;
        while (self.sequences.items.len != 0) self.freeSequence(self.sequences.items[self.sequences.items.len - 1]);
        self.sequences.deinit(gpa);
        self.state.living.deinit(gpa);
        if (self.state.prefix) |index| {
            index.deinit();
            gpa.destroy(index);
        }
        for (self.owned_pools) |*pool| pool.deinit();
        gpa.free(self.owned_pools);
        gpa.destroy(self.budget);
        for (self.state.groups) |*group| group.deinit(gpa);
        gpa.free(self.state.groups);
        gpa.free(self.state.layers);
        self.* = undefined;
    }

    /// A digest of the layers and formats.
    fn geometryOf(options: Options) [32]u8 {
        var hasher: std.crypto.hash.Blake3 = .init(.{});
        const formats = [_]u32{ @intFromEnum(options.dtype_k), @intFromEnum(options.dtype_v), options.block_size };
        for (formats) |number| hashNumber(&hasher, number);
        for (options.layers) |layer| {
            const store = layer.store orelse options.policy.store;
            for ([_]u32{
                layer.kv_head_count,
                layer.head_dim,
                layer.window_tokens orelse 0,
                if (store) |formats_of| @intFromEnum(formats_of.dtype_k) else std.math.maxInt(u32),
                if (store) |formats_of| @intFromEnum(formats_of.dtype_v) else std.math.maxInt(u32),
            }) |number| hashNumber(&hasher, number);
        }
        var digest: [32]u8 = undefined;
        hasher.final(&digest);
        return digest;
    }

    fn hashNumber(hasher: *std.crypto.hash.Blake3, number: u32) void {
        var bytes: [4]u8 = undefined;
        std.mem.writeInt(u32, &bytes, number, .little);
        hasher.update(&bytes);
    }

    fn storeFormat(gpa: Allocator, group: *Group, policy: Policy) BlockPool.Error!?u8 {
        const store = policy.storeOf(group.*) orelse return null;
        return try group.formatIndex(gpa, store.dtype_k, store.dtype_v);
    }

    /// Changes what becomes of old rows, from the next commit on: blocks of the tail that are older than the new one migrate,
    /// and blocks that have migrated keep their format.
    pub fn updatePolicy(self: *PagedCache, policy: Policy) InitError!void {
        const cache = &self.state;
        try policy.validate(cache.block_size, cache.retention);
        if (policy.max_logit_error != null and cache.groups[0].fidelity.len == 0) return error.InvalidConfig;
        // The pools first: this is all that can fail, and a pool that nobody uses yet changes nothing.
        for (cache.groups) |*group| _ = try storeFormat(cache.gpa, group, policy);
        for (cache.groups) |*group| {
            group.store_format = storeFormat(cache.gpa, group, policy) catch unreachable; // just made
            group.store_mask = if (group.store_format) |index| Group.formatBit(index) else 0;
            group.twins.clearRetainingCapacity(); // what they became is not what they would become now
        }
        cache.policy = policy;
        for (self.sequences.items) |sequence| for (sequence.state.tables) |*table| {
            table.tail_first = 0;
        };
    }

    /// The fidelity of each KV head of a layer, [kv_head]; empty unless the cache was made to measure it.
    pub fn fidelity(self: *const PagedCache, layer_index: u32) error{LayerOutOfRange}![]const Head {
        const layer = try self.state.layer(layer_index);
        return self.state.groups[layer.group].heads(layer.index);
    }

    pub fn layerCount(self: *const PagedCache) u32 {
        return @intCast(self.state.layers.len);
    }

    /// The shape of a layer's blocks in the tail.
    pub fn layerShape(self: *const PagedCache, layer_index: u32) error{LayerOutOfRange}!BlockShape {
        return self.state.layerShape(layer_index);
    }

    /// An empty sequence, owned by the cache, which must stay where it is from now on.
    pub fn createSequence(self: *PagedCache) error{OutOfMemory}!*Sequence {
        if (self.state.prefix != null) return self.createAt(try self.openRoot(.{}));
        return self.createAt(null);
    }

    pub const PromptError = error{ InvalidConfig, CacheFull, OutOfMemory };

    /// A sequence that starts with the rows of the longest prefix of a prompt that its tenant has here; `seqLen` tells how
    /// many tokens that is, at most all but the last. Owned by the cache as others are. Needs a prefix index.
    pub fn createSequenceFor(self: *PagedCache, prompt: Prompt) PromptError!*Sequence {
        const index = self.state.prefix orelse return error.InvalidConfig;
        if (prompt.tokens.len > self.state.max_seq_len) return error.CacheFull;
        const gpa = self.state.gpa;
        const tokens = try gpa.alloc(u32, prompt.tokens.len);
        errdefer gpa.free(tokens);
        @memcpy(tokens, prompt.tokens);
        const sequence = try self.createAt(try self.openRoot(prompt));
        errdefer self.freeSequence(sequence);
        var found = try adoption.find(&self.state, sequence.state.tokens.?.root, tokens);
        defer found.deinit(&self.state);
        try adoption.adopt(&sequence.state, &found);
        index.stats.lookups += 1;
        if (found.token_count > 0) index.stats.hits += 1;
        index.stats.hit_tokens += found.token_count;
        sequence.state.tokens.?.prompt = tokens;
        return sequence;
    }

    /// What was looked up by tokens, and what is kept for that.
    pub fn prefixStats(self: *const PagedCache) PrefixStats {
        return if (self.state.prefix) |index| index.stats else .{};
    }

    /// Bytes that the prefix index takes beside blocks.
    pub fn prefixMetadataBytes(self: *const PagedCache) u64 {
        return if (self.state.prefix) |index| index.metadataBytes() + self.state.living.metadataBytes() else 0;
    }

    /// What a sequence made for a prompt would start with, and why with no more. It is for the owner of the cache: it tells
    /// what became of rows that others pushed out.
    pub fn explain(self: *PagedCache, prompt: Prompt) PromptError!Explanation {
        const index = self.state.prefix orelse return error.InvalidConfig;
        const root = try self.openRoot(prompt);
        defer index.close(root.node);
        return self.explainAt(root.node, prompt.tokens, true);
    }

    fn explainAt(self: *PagedCache, root: u32, prompt: []align(1) const u32, shows_all: bool) PromptError!Explanation {
        if (prompt.len > self.state.max_seq_len) return error.CacheFull;
        const gpa = self.state.gpa;
        const tokens = try gpa.alloc(u32, prompt.len);
        defer gpa.free(tokens);
        @memcpy(tokens, prompt);
        return adoption.explain(&self.state, root, tokens, shows_all);
    }

    /// Words of what changed in the prefix index since `takeEvents`, see `prefix/events.zig`; null where none are kept.
    pub fn events(self: *PagedCache) error{OutOfMemory}!?[]const u32 {
        return if (self.state.prefix) |index| try index.events() else null;
    }

    /// The events were taken.
    pub fn takeEvents(self: *PagedCache) void {
        self.state.prefix.?.takeEvents();
    }

    /// How many more of a prompt's tokens will be found once the sequences of its tenant that were made with them have
    /// committed theirs. One that tells other tokens or none, or is rewound, is not waited for.
    pub fn pendingPrefix(self: *PagedCache, prompt: Prompt) PromptError!u32 {
        const index = self.state.prefix orelse return error.InvalidConfig;
        if (prompt.tokens.len > self.state.max_seq_len) return error.CacheFull;
        const gpa = self.state.gpa;
        const root = try self.openRoot(prompt);
        defer index.close(root.node);
        const tokens = try gpa.alloc(u32, prompt.tokens.len);
        defer gpa.free(tokens);
        @memcpy(tokens, prompt.tokens);
        var found = try adoption.find(&self.state, root.node, tokens);
        defer found.deinit(&self.state);
        var most: u32 = 0;
        for (self.state.living.of(root.node)) |other| {
            if (other.toldCount() != null) most = @max(most, trees.commonCount(other.prompt, tokens));
        }
        return most -| found.known_count;
    }

    /// The root of a prompt's tenant, for one user of it.
    fn openRoot(self: *PagedCache, prompt: Prompt) error{OutOfMemory}!Ref {
        // Read once: another thread may write a caller's memory, and the tenant is that of the root's key.
        const salt = if (prompt.salt) |borrowed| try self.state.gpa.dupe(u8, borrowed) else null;
        defer if (salt) |copy| self.state.gpa.free(copy);
        const key = chain.keyOf(&.{ &self.geometry, prompt.fingerprint }, salt);
        return self.state.prefix.?.open(key, chain.keyOf(&.{}, salt), newWriter);
    }

    /// A sequence at a root of the prefix index that was opened for it.
    fn createAt(self: *PagedCache, root: ?Ref) error{OutOfMemory}!*Sequence {
        const gpa = self.state.gpa;
        const living = &self.state.living;
        errdefer if (root) |opened| self.state.prefix.?.close(opened.node);
        if (root) |opened| try living.ensureUnusedCapacity(gpa, opened.node);
        errdefer if (root) |opened| living.dropIfEmpty(gpa, opened.node);
        try self.sequences.ensureUnusedCapacity(gpa, 1);
        const sequence = try gpa.create(Sequence);
        errdefer gpa.destroy(sequence);
        sequence.* = .{ .cache = self, .index = self.sequences.items.len, .state = try .init(&self.state) };
        errdefer sequence.state.deinit();
        if (root) |opened| {
            sequence.state.tokens = try .init(self.state.prefix.?, opened, sequence.state.tables);
            living.addAssumeCapacity(&sequence.state.tokens.?);
            sequence.state.writer = self.state.prefix.?.writerOf(opened.node);
        }
        self.sequences.appendAssumeCapacity(sequence);
        return sequence;
    }

    /// Gives all references of a sequence back. What it told of its tokens is found by others from now on.
    pub fn freeSequence(self: *PagedCache, sequence: *Sequence) void {
        assert(sequence.cache == self);
        if (sequence.state.tokens) |*tokens| self.state.living.remove(self.state.gpa, tokens);
        sequence.state.deinit();
        assert(self.sequences.swapRemove(sequence.index) == sequence);
        if (sequence.index < self.sequences.items.len) self.sequences.items[sequence.index].index = sequence.index;
        self.state.gpa.destroy(sequence);
    }

    /// Empties the cache: frees all sequences but those in `kept`, which stay and have no rows any more. No block is used
    /// then.
    pub fn reset(self: *PagedCache, kept: []const *Sequence) error{OutOfMemory}!void {
        var set = try self.setOf(kept);
        defer set.deinit(self.state.gpa);
        self.resetAllBut(set);
    }

    /// Sequences of a cache, by their index.
    pub const Set = std.DynamicBitSetUnmanaged;

    /// A set that has these sequences until one of the cache is freed; the caller's to free, with the allocator of the cache.
    pub fn setOf(self: *const PagedCache, sequences: []const *Sequence) error{OutOfMemory}!Set {
        var set: Set = try .initEmpty(self.state.gpa, self.sequences.items.len);
        for (sequences) |sequence| {
            assert(sequence.cache == self);
            set.set(sequence.index);
        }
        return set;
    }

    /// Empties the cache as `reset` does. Cannot fail.
    pub fn resetAllBut(self: *PagedCache, kept: Set) void {
        var index = self.sequences.items.len;
        while (index > 0) {
            index -= 1; // what takes the place of a freed one was looked at before
            const sequence = self.sequences.items[index];
            if (kept.isSet(index)) {
                sequence.truncate(0) catch unreachable; // no position is before the first
            } else self.freeSequence(sequence);
        }
        if (self.state.prefix) |prefixes| prefixes.clear();
    }

    /// A sequence that begins as a copy of the committed rows of `parent`, which it shares: no K/V byte is copied.
    pub fn fork(self: *PagedCache, parent: *const Sequence) error{OutOfMemory}!*Sequence {
        assert(parent.cache == self);
        const child = if (parent.state.tokens) |*tokens|
            try self.createAt(self.state.prefix.?.openAgain(tokens.root))
        else
            try self.createAt(null);
        errdefer self.freeSequence(child);
        for (child.state.tables, parent.state.tables, self.state.groups) |*table, *from, *group| {
            table.* = try from.copy(self.state.gpa, group.shape.blockCount(parent.seqLen()));
            table.retain(group.formats.items);
        }
        child.state.seq_len = parent.seqLen();
        if (child.state.tokens) |*tokens| tokens.copyFrom(&parent.state.tokens.?);
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
        if (layer_index >= self.state.layers.len) return error.LayerOutOfRange;
        if (sequences.len != token_counts.len) return error.InvalidSize;
        try self.checkDistinct(sequences);
        var few: [few_max]appends.Portion = undefined;
        const many = try self.state.gpa.alloc(appends.Portion, if (sequences.len > few.len) sequences.len else 0);
        defer self.state.gpa.free(many);
        const portions = if (sequences.len > few.len) many else few[0..sequences.len];
        for (portions, sequences, token_counts) |*portion, sequence, count| {
            portion.* = .{ .sequence = &sequence.state, .token_count = count };
        }
        return appends.append(&self.state, layer_index, portions, k, v);
    }

    /// Sequences of a call that need no memory beside the stack.
    const few_max = 8;

    fn checkDistinct(self: *const PagedCache, sequences: []const *Sequence) error{ InvalidConfig, OutOfMemory }!void {
        if (sequences.len <= few_max) {
            for (sequences, 0..) |sequence, i| for (sequences[0..i]) |other| {
                if (sequence == other) return error.InvalidConfig;
            };
            return;
        }
        var set = try self.setOf(sequences);
        defer set.deinit(self.state.gpa);
        if (set.count() != sequences.len) return error.InvalidConfig;
    }

    /// beams[i] becomes what beams[parents[i]] was. Tables and reference counts only; rows pending anywhere refuse.
    pub fn reorder(self: *PagedCache, beams: []const *Sequence, parents: []align(1) const u32) ReorderError!void {
        const gpa = self.state.gpa;
        const groups = self.state.groups;
        if (beams.len != parents.len) return error.InvalidConfig;
        try self.checkDistinct(beams);
        for (beams) |beam| {
            assert(beam.cache == self);
            if (beam.state.hasPending()) return error.CommitMismatch;
        }
        for (parents, beams) |parent, beam| {
            if (parent >= beams.len) return error.InvalidConfig;
            const own = &(beam.state.tokens orelse continue);
            if (own.root != beams[parent].state.tokens.?.root) return error.InvalidConfig; // rows of another tenant
        }

        // The new tables first: this is all that can fail.
        const tables = try gpa.alloc(BlockTable, beams.len * groups.len);
        defer gpa.free(tables);
        var made: usize = 0;
        errdefer for (tables[0..made]) |*table| table.deinit(gpa);
        const seq_lens = try gpa.alloc(u32, beams.len);
        defer gpa.free(seq_lens);
        for (parents, seq_lens) |parent, *seq_len| {
            seq_len.* = beams[parent].seqLen();
            for (beams[parent].state.tables) |*from| {
                tables[made] = try from.copy(gpa, from.count());
                made += 1;
            }
        }
        const told = try gpa.alloc(Tokens, if (self.state.prefix != null) beams.len else 0);
        defer gpa.free(told);
        var told_count: usize = 0;
        errdefer for (told[0..told_count]) |*one| one.newest.deinit(gpa);
        for (told, 0..) |*one, i| {
            one.* = try beams[parents[i]].state.tokens.?.clone();
            told_count += 1;
        }
        for (tables, 0..) |*table, i| table.retain(groups[i % groups.len].formats.items);
        for (told, beams[0..told.len]) |*one, beam| {
            beam.state.tokens.?.copyFrom(one);
            one.newest.deinit(gpa);
        }
        for (beams, seq_lens, 0..) |beam, seq_len, i| {
            for (beam.state.tables, groups, 0..) |*table, *group, group_index| {
                table.shrink(group.formats.items, 0);
                table.deinit(gpa);
                table.* = tables[i * groups.len + group_index];
            }
            beam.state.seq_len = seq_len;
            beam.state.ageAllViews();
        }
        if (self.state.prefix) |index| index.forgetLeft();
    }

    pub fn stats(self: *const PagedCache) error{OutOfMemory}!Stats {
        var sum: sums.Sum = .{ .cache = &self.state };
        defer sum.deinit();
        for (self.sequences.items) |sequence| try sum.addSequence(&sequence.state);
        sum.stats.metadata_bytes += self.sequences.capacity * @sizeOf(*Sequence) + self.sequences.items.len * @sizeOf(Sequence);
        return sum.finish();
    }

    /// The blocks of a layer group in one format.
    pub fn poolStats(
        self: *const PagedCache,
        group_index: u32,
        dtype_k: Dtype,
        dtype_v: Dtype,
    ) (BlockPool.Error || error{LayerOutOfRange})!PoolStats {
        if (group_index >= self.state.groups.len) return error.LayerOutOfRange;
        return self.state.groups[group_index].pool.stats(dtype_k, dtype_v);
    }
};

/// One token stream. Made, forked and freed by its cache.
pub const Sequence = struct {
    cache: *PagedCache,
    /// Its number among the sequences of the cache, which changes when another one is freed.
    index: usize,
    state: SequenceState,

    /// Committed tokens.
    pub fn seqLen(self: *const Sequence) u32 {
        return self.state.seq_len;
    }

    /// Committed and pending rows of a layer.
    pub fn rowCount(self: *const Sequence, layer_index: u32) u32 {
        return self.state.rowCount(layer_index);
    }

    /// Appends n >= 0 rows of one layer and returns the position of the first.
    pub fn append(self: *Sequence, layer_index: u32, k: Input, v: Input) PagedCache.AppendError!u32 {
        const cache = &self.cache.state;
        const shape = try cache.layerShape(layer_index);
        const token_count = try k.tokenCount(shape);
        const start = self.rowCount(layer_index);
        if (try v.tokenCount(shape) != token_count) return error.InvalidSize;
        if (token_count > cache.max_seq_len - start) return error.CacheFull;
        var portions = [_]appends.Portion{.{ .sequence = &self.state, .token_count = @intCast(token_count) }};
        try appends.append(cache, layer_index, &portions, k, v);
        return start;
    }

    /// Makes `token_count` pending rows count. Every layer must have exactly that many.
    pub fn commit(self: *Sequence, token_count: u32) PagedCache.CommitError!void {
        return commits.commit(&self.state, token_count, .{});
    }

    /// The same, and tells their tokens: others find their rows by them from now on, where the cache has a prefix index.
    pub fn commitTokens(self: *Sequence, tokens: []align(1) const u32, rank: Rank) PagedCache.CommitError!void {
        if (tokens.len > self.cache.state.max_seq_len) return error.CommitMismatch;
        return commits.commit(&self.state, @intCast(tokens.len), .{ .tokens = tokens, .rank = rank });
    }

    /// The same as `PagedCache.explain` for the tenant of this sequence, who is told nothing that depends on others.
    pub fn explain(self: *Sequence, tokens: []align(1) const u32) PagedCache.PromptError!Explanation {
        const told = self.state.tokens orelse return error.InvalidConfig;
        return self.cache.explainAt(told.root, tokens, false);
    }

    /// Commits only the pending rows whose index is in `kept`, ascending: the accepted path of a tree of drafted tokens.
    /// The others are dropped, and the kept ones move up next to the committed rows.
    pub fn commitKept(self: *Sequence, kept: []align(1) const u32) PagedCache.CommitError!void {
        return commits.commitKept(&self.state, kept, .{});
    }

    /// The same, and tells the tokens of the kept rows.
    pub fn commitKeptTokens(
        self: *Sequence,
        kept: []align(1) const u32,
        tokens: []align(1) const u32,
        rank: Rank,
    ) PagedCache.CommitError!void {
        return commits.commitKept(&self.state, kept, .{ .tokens = tokens, .rank = rank });
    }

    /// Rewinds to `seq_len` rows and drops the pending ones: every layer shows what it shows of a sequence that was never
    /// longer. Refused where rows of that were let go, see `rewindableTo`. No K/V byte is copied.
    pub fn truncate(self: *Sequence, seq_len: u32) PagedCache.TruncateError!void {
        return commits.truncate(&self.state, seq_len);
    }

    /// The smallest length such that a truncate to it, and to all from it up to `seqLen`, leaves every layer with all rows
    /// it shows at that length; those before it were let go. A truncate to no more rows than the sinks is legal, too.
    pub fn rewindableTo(self: *const Sequence) u32 {
        return commits.rewindableTo(&self.state);
    }

    /// The rows of a layer as a reader sees them now.
    pub fn rows(self: *const Sequence, layer_index: u32) error{LayerOutOfRange}!Rows {
        return self.state.rows(layer_index);
    }

    /// Copies the rows of a layer that are seen and returns their count. The copies share no memory, with one another or with
    /// the rows.
    pub fn gather(self: *const Sequence, layer_index: u32, k: Output, v: Output) PagedCache.GatherError!u32 {
        return self.state.gather(layer_index, .{}, k, v);
    }

    /// The same of some of the rows, by their positions.
    pub fn gatherRange(self: *const Sequence, layer_index: u32, range: Range, k: Output, v: Output) PagedCache.GatherError!u32 {
        return self.state.gather(layer_index, range, k, v);
    }

    /// The blocks of a layer in order, those that hold its rows. A block whose rows are there to be rewound to, and not
    /// seen, is named: `seenBlock` is what readers are told.
    pub fn blockTable(self: *const Sequence, layer_index: u32) error{LayerOutOfRange}!Blocks {
        const layer = try self.cache.state.layer(layer_index);
        const count = self.cache.state.groups[layer.group].shape.blockCount(self.rowCount(layer_index));
        return .{ .entries = self.state.tables[layer.group].entries(), .len = count };
    }

    /// Blocks by their number in a sequence.
    pub const Blocks = struct {
        entries: block_table.Entries,
        len: u32,

        /// The block of an entry; -1 where all of its rows were let go.
        pub fn at(blocks: Blocks, entry: usize) i32 {
            assert(entry < blocks.len);
            return blocks.entries.blockOrNone(@intCast(entry));
        }
    };

    /// What a reader is told of an entry of `blockTable`; null where none of its rows is seen.
    pub fn seenBlock(self: *const Sequence, layer_index: u32, entry: u32) ?SeenBlock {
        const group_index = self.state.cache.layers[layer_index].group;
        const table = &self.state.tables[group_index];
        if (!table.isSeen(entry, self.state.cache.block_size)) return null;
        const group = &self.state.cache.groups[group_index];
        const block = table.block(entry);
        const format = table.format(entry);
        return .{
            .block = block,
            .ref_count = group.formats.items[format].pool.refCount(@intCast(block)),
            .tier = policies.tierOf(group, format),
        };
    }

    pub const SeenBlock = struct {
        block: i32,
        /// Table entries that name the block, those of other sequences included.
        ref_count: u32,
        tier: Tier,
    };

    /// The tier of the block that has a position of a layer; the tail where its rows were let go.
    pub fn tier(self: *const Sequence, layer_index: u32, position: u32) Tier {
        return self.state.tier(layer_index, position);
    }

    /// A number that changes whenever a view of this layer goes stale.
    pub fn generation(self: *const Sequence, layer_index: u32) error{LayerOutOfRange}!u32 {
        if (layer_index >= self.state.generations.len) return error.LayerOutOfRange;
        return self.state.generations[layer_index];
    }
};

test {
    _ = @import("cache_test.zig");
    _ = @import("append_test.zig");
    _ = @import("rewind_test.zig");
    _ = @import("../prefix/index.zig");
    _ = @import("prefix_test.zig");
    _ = @import("prefix_memory_test.zig");
}
