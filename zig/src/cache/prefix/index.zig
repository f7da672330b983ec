//! The prefix index: blocks of rows by the tokens they were computed for.
//!
//!     root of a tenant
//!       [the quick brown fox]          a node: a block's tokens, and the block of each layer group
//!         [jumps over the lazy]
//!           [dog and]                  fewer tokens than a block has: nothing follows these
//!         [sat on the mat]
//!
//! Nodes are found by their tokens alone. The children of a node are sorted, so the one that has most tokens in common with
//! a prompt stands beside where the prompt would be. Trees of different tenants and models have nothing in common: what one
//! tenant looks up, and how long that takes, does not depend on what another one has.
//!
//! The index holds one reference to each block it names, as a block table does, so a block that no sequence has stays until
//! memory is wanted. Then the blocks of lowest priority go first, of these the least recently used, and a node never before
//! its children. In layers that do not need all rows, those of a window or under retention, a block may go by itself.

const std = @import("std");
const assert = std.debug.assert;
const Allocator = std.mem.Allocator;
const BlockTable = @import("../blocks/table.zig").BlockTable;
const chain = @import("chain.zig");
const cpu = @import("../../device/cpu.zig");
const Events = @import("events.zig").Events;
const Group = @import("../paged/layer_group.zig").Group;
const heaps = @import("heap.zig");

const none = std.math.maxInt(u32);
const never = std.math.maxInt(u64);

/// The priority of tokens that nobody gave another one.
pub const priority_default = 35;

/// How long blocks stay, against others.
pub const Rank = struct {
    priority: u8 = priority_default,
    /// After so many milliseconds the priority is the default one; null for never.
    ttl_ms: ?u32 = null,
};

/// Which blocks a sequence may start from. The numbers cross the ABI and are never changed.
pub const Tiers = enum(u32) {
    /// Any: rows may have been rounded that a sequence that computes them itself would have in floats.
    any = 0,
    /// Blocks of the tail alone.
    float = 1,
};

/// What is kept of rows, so that they are found by their tokens.
pub const Options = struct {
    tiers: Tiers = .any,
    /// False where no block outlives the sequences that have it.
    outlives: bool = true,
    /// Most bytes of the blocks that the index names; null for no limit but the pools'.
    max_bytes: ?u64 = null,
    /// Most of them for one tenant.
    max_bytes_per_salt: ?u64 = null,
    /// Keeps a list of what changed, for `events`.
    has_events: bool = false,
};

/// A node that may have gone since it was looked up.
pub const Ref = struct {
    node: u32,
    generation: u32,
};

/// The block of one layer group in a node.
const Slot = struct {
    /// -1 where the group has none.
    block: i32 = -1,
    format: u8 = 0,
    /// The place in the heap of its root, or among those set aside.
    place: u32 = heaps.nowhere,
    /// A sequence had the block when it was to go.
    is_aside: bool = false,
    /// When it was used last, in uses of the index.
    used: u64 = 0,
};

const Node = struct {
    /// The node before; none for a root.
    parent: u32,
    root: u32,
    /// Blocks from the first to this one; 0 for a root.
    depth: u32,
    /// Its tokens, as many as a block has or fewer; 0 for a root.
    token_count: u32,
    /// Counts the nodes that were here.
    generation: u32,
    priority: u8,
    /// When that becomes the default one, in milliseconds of the index's clock; none for never.
    expires_ms: u64 = never,
    hash: chain.BlockHash,
    /// Sorted by their tokens.
    children: std.ArrayList(u32) = .empty,
};

/// The tree of a tenant, for one model.
const Root = struct {
    node: u32,
    key: chain.Key,
    /// The key of its tenant, whatever the model.
    tenant: chain.Key,
    /// The name by which pools know who wrote a block: one tenant does not read what another one left there.
    writer: u32,
    /// Sequences that began here.
    users: u32 = 0,
    /// Nodes, itself not among them.
    node_count: u32 = 0,
    bytes: u64 = 0,
    heap: SlotHeap = .{},
    /// Slots that would be in the heap, but that their blocks are used.
    aside: std.ArrayList(u32) = .empty,
    /// The place in the heap of roots.
    place: u32 = heaps.nowhere,
};

const SlotHeap = heaps.Heap(SlotOrder);
const RootHeap = heaps.Heap(RootOrder);

/// What of a root goes first.
const SlotOrder = struct {
    index: *Index,

    pub fn isBefore(order: SlotOrder, a: u32, b: u32) bool {
        const index = order.index;
        const priority_a = index.nodeOf(a).priority;
        const priority_b = index.nodeOf(b).priority;
        if (priority_a != priority_b) return priority_a < priority_b;
        return index.slots.items[a].used < index.slots.items[b].used;
    }

    pub fn place(order: SlotOrder, slot: u32) *u32 {
        return &order.index.slots.items[slot].place;
    }
};

/// Which root has what goes first.
const RootOrder = struct {
    index: *Index,

    pub fn isBefore(order: RootOrder, a: u32, b: u32) bool {
        const roots = order.index.roots.items;
        return (SlotOrder{ .index = order.index }).isBefore(roots[a].heap.first().?, roots[b].heap.first().?);
    }

    pub fn place(order: RootOrder, root: u32) *u32 {
        return &order.index.roots.items[root].place;
    }
};

/// What prompts found, and what is kept so that they do.
pub const Stats = struct {
    /// Prompts that were looked up, those of which a part was found, and the tokens of these parts.
    lookups: u64 = 0,
    hits: u64 = 0,
    hit_tokens: u64 = 0,
    /// Blocks the index names, and their bytes.
    cached_blocks: u64 = 0,
    cached_bytes: u64 = 0,
    /// Blocks that it named and had to give up.
    evicted_blocks: u64 = 0,
};

pub const Index = struct {
    gpa: Allocator,
    groups: []Group,
    block_size: u32,
    /// Layers of a group see all rows: a node without its block is none. [group]
    sees_all: []bool,
    /// The first group that sees all, whose slots stand for their nodes in the heaps.
    lead: ?u32,
    options: Options,
    nodes: std.ArrayList(Node) = .empty,
    /// [node][block_size]
    tokens: std.ArrayList(u32) = .empty,
    /// [node][group]
    slots: std.ArrayList(Slot) = .empty,
    /// Nodes that are none now.
    free_nodes: std.ArrayList(u32) = .empty,
    roots: std.ArrayList(Root) = .empty,
    free_roots: std.ArrayList(u32) = .empty,
    /// Tenants come and go, and this map stays as fast for it.
    by_key: std.AutoArrayHashMapUnmanaged(chain.Key, u32) = .empty,
    /// Blocks that were given up not long ago: the second list takes the place of the first when it is full.
    gone: [2]std.AutoHashMapUnmanaged(chain.BlockHash, void) = @splat(.empty),
    root_heap: RootHeap = .{},
    /// What changed; null where nobody asks.
    log: ?Events,
    /// Nodes whose priority is for a time, and when the first of these times ends.
    expiring: std.AutoArrayHashMapUnmanaged(Ref, void) = .empty,
    expires_next_ms: u64 = never,
    clock: *const fn () u64 = milliseconds,
    /// Nodes that a sequence left before its end, where none is to outlive its sequences.
    left: std.AutoArrayHashMapUnmanaged(Ref, void) = .empty,
    /// A node none of whose blocks may go for now.
    pinned: u32 = none,
    uses: u64 = 0,
    stats: Stats = .{},

    /// An empty index of blocks of these groups, which outlive it. `has_retention` where every layer may let rows go.
    pub fn init(gpa: Allocator, groups: []Group, block_size: u32, has_retention: bool, options: Options) error{OutOfMemory}!Index {
        const sees_all = try gpa.alloc(bool, groups.len);
        var lead: ?u32 = null;
        for (sees_all, groups, 0..) |*sees, group, i| {
            sees.* = !has_retention and group.window_tokens == null;
            if (sees.* and lead == null) lead = @intCast(i);
        }
        return .{
            .gpa = gpa,
            .groups = groups,
            .block_size = block_size,
            .sees_all = sees_all,
            .lead = lead,
            .options = options,
            .log = if (options.has_events) .{} else null,
        };
    }

    /// Gives all references back.
    pub fn deinit(index: *Index) void {
        index.clear();
        const gpa = index.gpa;
        if (index.log) |*log| log.deinit(gpa);
        for (index.roots.items) |*root| {
            root.heap.deinit(gpa);
            root.aside.deinit(gpa);
        }
        for (index.nodes.items) |*node| node.children.deinit(gpa);
        gpa.free(index.sees_all);
        index.nodes.deinit(gpa);
        index.tokens.deinit(gpa);
        index.slots.deinit(gpa);
        index.free_nodes.deinit(gpa);
        index.roots.deinit(gpa);
        index.free_roots.deinit(gpa);
        index.left.deinit(gpa);
        index.expiring.deinit(gpa);
        index.by_key.deinit(gpa);
        for (&index.gone) |*list| list.deinit(gpa);
        index.root_heap.deinit(gpa);
        index.* = undefined;
    }

    /// Forgets every block. Sequences keep theirs, and their roots.
    pub fn clear(index: *Index) void {
        var log = index.log;
        index.log = null; // one event says it all
        index.relistAll();
        while (index.root_heap.first()) |root| index.drop(index.roots.items[root].heap.first().?);
        if (log) |*one| one.add(index.gpa, .cleared, chain.no_parent, chain.no_parent, &.{});
        index.log = log;
    }

    /// Words of the events since the last `takeEvents`; null where none are kept.
    pub fn events(index: *Index) error{OutOfMemory}!?[]const u32 {
        const log = if (index.log) |*one| one else return null;
        if (log.is_incomplete) {
            log.restart();
            errdefer log.restart();
            try log.append(index.gpa, .cleared, chain.no_parent, chain.no_parent, &.{});
            var next: std.ArrayList(u32) = .empty;
            defer next.deinit(index.gpa);
            for (index.by_key.values()) |root| try next.append(index.gpa, index.roots.items[root].node);
            while (next.pop()) |node| {
                try index.tell(log, node);
                try next.appendSlice(index.gpa, index.nodes.items[node].children.items);
            }
            log.is_incomplete = false;
        }
        return log.words.items;
    }

    /// The events were taken.
    pub fn takeEvents(index: *Index) void {
        index.log.?.words.clearRetainingCapacity();
    }

    /// Tells of a node that has a whole block.
    fn tell(index: *const Index, log: *Events, node: u32) error{OutOfMemory}!void {
        const own = index.nodes.items[node];
        if (own.token_count < index.block_size) return;
        try log.append(index.gpa, .stored, own.hash, index.nodes.items[own.parent].hash, index.tokensOf(node));
    }

    /// The root of a tenant for a sequence, which closes it.
    /// `newWriter` names it at the pools where it is a new one.
    pub fn open(index: *Index, key: chain.Key, tenant: chain.Key, newWriter: *const fn () u32) error{OutOfMemory}!Ref {
        const gpa = index.gpa;
        if (index.by_key.get(key)) |root| {
            index.roots.items[root].users += 1;
            return index.refOf(index.roots.items[root].node);
        }
        try index.by_key.ensureUnusedCapacity(gpa, 1);
        try index.root_heap.ensureCapacity(gpa, index.roots.items.len + 1);
        try index.free_roots.ensureTotalCapacity(gpa, index.roots.items.len + 1);
        if (index.free_roots.items.len == 0) try index.roots.ensureUnusedCapacity(gpa, 1);
        const node = try index.takeNode();
        const root: u32 = index.free_roots.pop() orelse blk: {
            _ = index.roots.addOneAssumeCapacity();
            break :blk @intCast(index.roots.items.len - 1);
        };
        index.roots.items[root] = .{ .node = node, .key = key, .tenant = tenant, .writer = newWriter(), .users = 1 };
        index.nodes.items[node] = .{
            .parent = none,
            .root = root,
            .depth = 0,
            .token_count = 0,
            .generation = index.nodes.items[node].generation,
            .priority = 0,
            .hash = chain.no_parent,
        };
        index.by_key.putAssumeCapacity(key, root);
        return index.refOf(node);
    }

    /// The root of a tenant that has a sequence already, for another one.
    pub fn openAgain(index: *Index, node: u32) Ref {
        index.roots.items[index.nodes.items[node].root].users += 1;
        return index.refOf(node);
    }

    /// A sequence that began at a root has ended.
    pub fn close(index: *Index, node: u32) void {
        const root = index.nodes.items[node].root;
        index.roots.items[root].users -= 1;
        index.dropRootIfUnused(root);
    }

    /// A reference that tells whether the node is still there.
    pub fn refOf(index: *const Index, node: u32) Ref {
        return .{ .node = node, .generation = index.nodes.items[node].generation };
    }

    /// The node of a reference, unless it has gone.
    pub fn get(index: *const Index, ref: Ref) ?u32 {
        return if (index.nodes.items[ref.node].generation == ref.generation) ref.node else null;
    }

    pub fn parentOf(index: *const Index, node: u32) ?u32 {
        const parent = index.nodes.items[node].parent;
        return if (parent == none) null else parent;
    }

    /// The name of a root's tenant at the pools.
    pub fn writerOf(index: *const Index, node: u32) u32 {
        return index.roots.items[index.nodes.items[node].root].writer;
    }

    pub fn depthOf(index: *const Index, node: u32) u32 {
        return index.nodes.items[node].depth;
    }

    /// The tokens of a node.
    pub fn tokensOf(index: *const Index, node: u32) []const u32 {
        return index.tokens.items[@as(usize, node) * index.block_size ..][0..index.nodes.items[node].token_count];
    }

    /// The block of a group in a node, and its format; null where it has none.
    pub fn blockOf(index: *const Index, node: u32, group: u32) ?struct { block: i32, format: u8 } {
        const slot = index.slots.items[index.slotOf(node, group)];
        return if (slot.block < 0) null else .{ .block = slot.block, .format = slot.format };
    }

    fn slotOf(index: *const Index, node: u32, group: u32) u32 {
        return node * @as(u32, @intCast(index.groups.len)) + group;
    }

    fn nodeOf(index: *const Index, slot: u32) *Node {
        return &index.nodes.items[slot / index.groups.len];
    }

    /// A child of a node, and how many tokens it has in common with some others from the first on.
    pub const Child = struct { node: u32, common: u32 };

    pub fn hasChildren(index: *const Index, node: u32) bool {
        return index.nodes.items[node].children.items.len != 0;
    }

    /// The child that has most tokens in common with `tokens`; null where none has any.
    pub fn nearestChild(index: *const Index, node: u32, tokens: []const u32) ?Child {
        const children = index.nodes.items[node].children.items;
        const at = index.lowerBound(children, tokens);
        var nearest: ?Child = null;
        if (at < children.len) nearest = index.child(children[at], tokens);
        if (at > 0) {
            const before = index.child(children[at - 1], tokens);
            if (nearest == null or before.common > nearest.?.common) nearest = before;
        }
        return if (nearest != null and nearest.?.common > 0) nearest else null;
    }

    /// A child that stands beside where these tokens would.
    pub fn neighbour(index: *const Index, node: u32, tokens: []const u32) ?u32 {
        const children = index.nodes.items[node].children.items;
        if (children.len == 0) return null;
        return children[@min(index.lowerBound(children, tokens), children.len - 1)];
    }

    /// Walks down from a node along `tokens`, as far as whole blocks of them are there, and appends the nodes to `path`.
    pub fn walk(index: *const Index, from: u32, tokens: []const u32, path: *std.ArrayList(u32)) error{OutOfMemory}!void {
        var node = from;
        var rest = tokens;
        while (rest.len >= index.block_size) : (rest = rest[index.block_size..]) {
            const block = rest[0..index.block_size];
            const children = index.nodes.items[node].children.items;
            const at = index.lowerBound(children, block);
            if (at == children.len or !std.mem.eql(u32, index.tokensOf(children[at]), block)) return;
            node = children[at];
            try path.append(index.gpa, node);
        }
    }

    fn child(index: *const Index, node: u32, tokens: []const u32) Child {
        return .{ .node = node, .common = commonCount(index.tokensOf(node), tokens) };
    }

    /// The first child whose tokens do not stand before `tokens`.
    fn lowerBound(index: *const Index, children: []const u32, tokens: []const u32) usize {
        var low: usize = 0;
        var high = children.len;
        while (low < high) {
            const middle = low + (high - low) / 2;
            if (std.mem.order(u32, index.tokensOf(children[middle]), tokens) == .lt) low = middle + 1 else high = middle;
        }
        return low;
    }

    /// Marks the blocks of a node as used now.
    pub fn touch(index: *Index, node: u32) void {
        index.uses += 1;
        for (0..index.groups.len) |group| index.touchSlot(index.slotOf(node, @intCast(group)));
    }

    /// A sequence that had the blocks of a node has ended: they may go as any other, and were used until now.
    pub fn ended(index: *Index, node: u32) void {
        index.touch(node);
        index.relist(node);
    }

    fn touchSlot(index: *Index, slot: u32) void {
        index.slots.items[slot].used = index.uses;
        if (!index.isListed(slot)) return;
        const root = index.nodeOf(slot).root;
        index.roots.items[root].heap.settle(.{ .index = index }, slot);
        index.settleRoot(root);
    }

    /// The slot is in the heap of its root.
    fn isListed(index: *const Index, slot: u32) bool {
        return index.slots.items[slot].place != heaps.nowhere and !index.slots.items[slot].is_aside;
    }

    fn settleRoot(index: *Index, root: u32) void {
        const is_listed = index.roots.items[root].place != heaps.nowhere;
        const has_slots = index.roots.items[root].heap.first() != null;
        const order: RootOrder = .{ .index = index };
        if (is_listed and has_slots) index.root_heap.settle(order, root);
        if (!is_listed and has_slots) index.root_heap.addAssumeCapacity(order, root);
        if (is_listed and !has_slots) index.root_heap.remove(order, root);
    }

    /// A child has all of these tokens: it counts as used now.
    pub fn covers(index: *Index, node: u32, tokens: []const u32) bool {
        const nearest = index.nearestChild(node, tokens) orelse return false;
        if (nearest.common < tokens.len) return false;
        index.touch(nearest.node);
        return true;
    }

    /// Adds the block of `tokens` behind a node: the blocks of an entry of these tables, which the index holds from now on
    /// too. Where the node is there already, it keeps its blocks and takes those it lacks. Null where there is no room.
    pub fn add(index: *Index, parent: u32, tokens: []const u32, tables: []const BlockTable, entry: u32, rank: Rank) ?u32 {
        assert(tokens.len > 0 and tokens.len <= index.block_size);
        assert(index.nodes.items[parent].depth == entry);
        assert(index.nodes.items[parent].token_count == (if (entry == 0) 0 else index.block_size));
        index.uses += 1;
        const at = index.lowerBound(index.nodes.items[parent].children.items, tokens);
        const siblings = index.nodes.items[parent].children.items;
        if (at < siblings.len and std.mem.eql(u32, index.tokensOf(siblings[at]), tokens)) {
            const node = siblings[at];
            const ref = index.refOf(node);
            if (index.makeRoomBehind(node, index.lackingBytes(node, tables, entry))) index.fill(node, tables, entry);
            if (index.get(ref) == null) return null; // it had no block, and could get none
            index.raise(node, rank);
            return node;
        }
        const bytes = index.bytesOf(tables, entry) orelse return null;
        if (!index.makeRoomBehind(parent, bytes)) return null;
        return index.create(parent, tokens, tables, entry, rank) catch {
            index.dropEmpty(parent);
            return null;
        };
    }

    /// Makes room for blocks that a node, or a child it gets, is to have: it stays, and so do those before it, which have
    /// children. Without room it goes as any other.
    fn makeRoomBehind(index: *Index, node: u32, bytes: u64) bool {
        if (bytes == 0) return true;
        index.pinned = node;
        index.relist(node);
        const has_room = index.makeRoom(index.nodes.items[node].root, bytes);
        index.pinned = none;
        index.relist(node);
        if (!has_room) index.dropEmpty(node);
        return has_room;
    }

    /// Bytes of the blocks of an entry that a node has not.
    fn lackingBytes(index: *const Index, node: u32, tables: []const BlockTable, entry: u32) u64 {
        var bytes: u64 = 0;
        for (tables, index.groups, 0..) |*table, group, i| {
            const entries = table.entries();
            if (entries.isEvicted(entry) or index.slots.items[index.slotOf(node, @intCast(i))].block >= 0) continue;
            bytes += group.formats.items[entries.format(entry)].pool.block_bytes;
        }
        return bytes;
    }

    fn create(
        index: *Index,
        parent: u32,
        tokens: []const u32,
        tables: []const BlockTable,
        entry: u32,
        rank: Rank,
    ) error{OutOfMemory}!u32 {
        const gpa = index.gpa;
        const root = index.nodes.items[parent].root;
        try index.nodes.items[parent].children.ensureUnusedCapacity(gpa, 1);
        // Every slot there is may come into the heap, or be set aside.
        const node_count = index.roots.items[root].node_count + 1;
        try index.roots.items[root].heap.ensureCapacity(gpa, node_count * index.groups.len);
        try index.roots.items[root].aside.ensureTotalCapacity(gpa, node_count * index.groups.len);
        const node = try index.takeNode();
        const before = index.nodes.items[parent];
        index.roots.items[root].node_count = node_count;
        index.nodes.items[node] = .{
            .parent = parent,
            .root = root,
            .depth = before.depth + 1,
            .token_count = @intCast(tokens.len),
            .generation = index.nodes.items[node].generation,
            .priority = rank.priority,
            .hash = chain.next(&index.roots.items[root].key, before.hash, tokens),
        };
        @memcpy(index.tokens.items[@as(usize, node) * index.block_size ..][0..tokens.len], tokens);
        const at = index.lowerBound(index.nodes.items[parent].children.items, tokens);
        index.nodes.items[parent].children.insertAssumeCapacity(at, node);
        index.fill(node, tables, entry);
        index.setExpiry(node, rank.ttl_ms);
        index.relist(parent);
        if (tokens.len == index.block_size) if (index.log) |*log| {
            log.add(gpa, .stored, index.nodes.items[node].hash, before.hash, tokens);
        };
        if (at > 0) index.dropCovered(index.nodes.items[parent].children.items[at - 1], tokens);
        return node;
    }

    /// Drops a node of fewer tokens than a block has, if a sibling has all of them and more.
    fn dropCovered(index: *Index, node: u32, tokens: []const u32) void {
        const covered = index.tokensOf(node);
        if (covered.len < tokens.len and std.mem.eql(u32, covered, tokens[0..covered.len])) index.dropLeaf(node);
    }

    /// Bytes of the blocks of an entry; null where a group that needs it has none.
    fn bytesOf(index: *const Index, tables: []const BlockTable, entry: u32) ?u64 {
        var bytes: u64 = 0;
        for (tables, index.groups, index.sees_all) |*table, group, sees_all| {
            const entries = table.entries();
            if (entries.isEvicted(entry)) {
                if (sees_all) return null;
                continue;
            }
            bytes += group.formats.items[entries.format(entry)].pool.block_bytes;
        }
        return if (bytes == 0) null else bytes;
    }

    /// Gives a node the blocks it lacks.
    fn fill(index: *Index, node: u32, tables: []const BlockTable, entry: u32) void {
        index.unlist(node); // several slots change: each must be put where it belongs beside the new ones
        for (tables, 0..) |*table, i| {
            const group: u32 = @intCast(i);
            const slot = index.slotOf(node, group);
            const entries = table.entries();
            if (index.slots.items[slot].block < 0 and !entries.isEvicted(entry)) {
                index.hold(slot, group, entries.block(entry), entries.format(entry));
            }
            index.slots.items[slot].used = index.uses;
        }
        index.relist(node);
    }

    fn hold(index: *Index, slot: u32, group: u32, block: i32, format: u8) void {
        const pool = &index.groups[group].formats.items[format].pool;
        pool.retain(&.{block});
        index.slots.items[slot].block = block;
        index.slots.items[slot].format = format;
        index.roots.items[index.nodeOf(slot).root].bytes += pool.block_bytes;
        index.stats.cached_bytes += pool.block_bytes;
        index.stats.cached_blocks += 1;
    }

    fn letGo(index: *Index, slot: u32) void {
        const group = slot % @as(u32, @intCast(index.groups.len));
        const held = &index.slots.items[slot];
        if (held.block < 0) return;
        const pool = &index.groups[group].formats.items[held.format].pool;
        pool.release(&.{held.block});
        held.block = -1;
        index.roots.items[index.nodeOf(slot).root].bytes -= pool.block_bytes;
        index.stats.cached_bytes -= pool.block_bytes;
        index.stats.cached_blocks -= 1;
    }

    /// A block of a sequence became another one: the index names that in its place, if it named the first.
    pub fn follow(index: *Index, node: u32, group: u32, old: i32, new: i32, format: u8) void {
        const slot = index.slotOf(node, group);
        if (index.slots.items[slot].block != old) return;
        index.letGo(slot);
        index.hold(slot, group, new, format);
    }

    /// Gives a node at least that priority, for at least that time.
    fn raise(index: *Index, node: u32, rank: Rank) void {
        const known = index.nodes.items[node].priority;
        if (rank.priority < known) return;
        if (rank.priority > known) index.nodes.items[node].expires_ms = 0;
        index.setPriority(node, rank.priority);
        index.setExpiry(node, rank.ttl_ms);
    }

    /// Lets the priority of a node last that long, if it does not last longer.
    fn setExpiry(index: *Index, node: u32, ttl_ms: ?u32) void {
        const own = &index.nodes.items[node];
        const expires_ms = if (ttl_ms) |ms| index.clock() + ms else never;
        if (own.expires_ms != never and expires_ms <= own.expires_ms) return;
        own.expires_ms = never;
        if (expires_ms == never) return;
        // Without memory for it the priority stays.
        index.expiring.put(index.gpa, index.refOf(node), {}) catch return;
        own.expires_ms = expires_ms;
        index.expires_next_ms = @min(index.expires_next_ms, expires_ms);
    }

    /// Gives the default priority to those whose time has ended.
    fn expire(index: *Index) void {
        if (index.expires_next_ms == never) return;
        const now = index.clock();
        if (now < index.expires_next_ms) return;
        index.expires_next_ms = never;
        var i = index.expiring.count();
        while (i > 0) {
            i -= 1;
            const node = index.get(index.expiring.keys()[i]);
            const expires_ms = if (node) |one| index.nodes.items[one].expires_ms else never;
            if (node != null and expires_ms > now and expires_ms != never) {
                index.expires_next_ms = @min(index.expires_next_ms, expires_ms);
                continue;
            }
            index.expiring.swapRemoveAt(i); // what takes its place was looked at before
            if (node == null or expires_ms == never) continue;
            index.nodes.items[node.?].expires_ms = never;
            index.setPriority(node.?, priority_default);
        }
    }

    fn setPriority(index: *Index, node: u32, priority: u8) void {
        index.unlist(node);
        index.nodes.items[node].priority = priority;
        index.relist(node);
    }

    /// Puts the slots of a node into the heap of its root where they may go by themselves, or takes them out.
    fn relist(index: *Index, node: u32) void {
        const root = index.nodes.items[node].root;
        const is_leaf = index.nodes.items[node].children.items.len == 0;
        for (0..index.groups.len) |i| {
            const group: u32 = @intCast(i);
            const slot = index.slotOf(node, group);
            const may_go = node != index.pinned and index.slots.items[slot].block >= 0 and
                (if (index.sees_all[group]) is_leaf and index.lead == group else true);
            index.takeBack(slot);
            const is_listed = index.isListed(slot);
            const heap = &index.roots.items[root].heap;
            if (may_go and !is_listed) heap.addAssumeCapacity(.{ .index = index }, slot);
            if (!may_go and is_listed) heap.remove(.{ .index = index }, slot);
            if (may_go and is_listed) heap.settle(.{ .index = index }, slot);
        }
        index.settleRoot(root);
    }

    /// Takes the slots of a node out of the heap of its root, so that none of them goes until `relist`.
    fn unlist(index: *Index, node: u32) void {
        const root = index.nodes.items[node].root;
        for (0..index.groups.len) |group| {
            const slot = index.slotOf(node, @intCast(group));
            index.takeBack(slot);
            if (!index.isListed(slot)) continue;
            index.roots.items[root].heap.remove(.{ .index = index }, slot);
        }
        index.settleRoot(root);
    }

    /// Lets blocks go until so many bytes more of a root are within the limits. False where that cannot be.
    fn makeRoom(index: *Index, root: u32, bytes: u64) bool {
        const own_max = index.options.max_bytes_per_salt orelse std.math.maxInt(u64);
        const max = index.options.max_bytes orelse std.math.maxInt(u64);
        if (bytes > own_max or bytes > max) return false;
        while (index.roots.items[root].bytes > own_max - bytes) {
            index.evict(index.unusedOf(root) orelse index.any(root) orelse return false);
        }
        while (index.stats.cached_bytes > max - bytes) {
            index.evict(index.unused() orelse index.any(null) orelse return false);
        }
        return true;
    }

    /// Forgets this node and those before it, as far as nobody has their blocks and nothing follows them. Returns the one at
    /// which that ended, if any.
    fn forgetUnused(index: *Index, last: Ref) ?Ref {
        var node = index.get(last) orelse return null;
        while (index.parentOf(node)) |parent| : (node = parent) {
            if (index.hasChildren(node)) return null; // whoever takes the last child away comes back to it
            if (index.isNodeUsed(node)) return index.refOf(node);
            const before = index.refOf(parent);
            for (0..index.groups.len) |group| index.letGo(index.slotOf(node, @intCast(group)));
            index.remove(node);
            if (index.get(before) == null) return null;
        }
        return null;
    }

    /// A sequence goes on from an earlier node than this one, or has ended, where none is to outlive its sequences: the node
    /// goes once nobody has its block.
    pub fn leave(index: *Index, last: Ref) void {
        // Without memory for it the node stays until its memory is wanted.
        index.left.put(index.gpa, last, {}) catch {};
    }

    /// Looks again at what was left.
    pub fn forgetLeft(index: *Index) void {
        var i = index.left.count();
        while (i > 0) {
            i -= 1;
            const ref = index.left.keys()[i];
            index.left.swapRemoveAt(i); // what takes its place was looked at before
            if (index.forgetUnused(ref)) |rest| index.left.putAssumeCapacity(rest, {});
        }
    }

    fn isNodeUsed(index: *const Index, node: u32) bool {
        for (0..index.groups.len) |group| {
            const slot = index.slotOf(node, @intCast(group));
            if (index.slots.items[slot].block >= 0 and index.isUsed(slot)) return true;
        }
        return false;
    }

    /// Lets the block go that is wanted least, so that its memory can be used. False where no memory is held by the index
    /// alone.
    pub fn reclaim(index: *Index) bool {
        if (index.unused()) |slot| {
            index.evict(slot);
            return true;
        }
        // What nobody else has may stand before a node whose block is used: that one is forgotten then.
        for (0..index.slots.items.len) |slot| {
            if (index.slots.items[slot].block < 0 or index.isUsed(@intCast(slot))) continue;
            index.evict(index.any(null) orelse return false);
            return true;
        }
        return false;
    }

    /// A sequence has the block of a slot, too.
    fn isUsed(index: *const Index, slot: u32) bool {
        const held = index.slots.items[slot];
        const group = slot % index.groups.len;
        return index.groups[group].formats.items[held.format].pool.refCount(@intCast(held.block)) > 1;
    }

    /// The slot of a root that goes first of those that no sequence uses. The used ones before it are set aside.
    fn unusedOf(index: *Index, root: u32) ?u32 {
        index.expire();
        for ([_]bool{ false, true }) |again| {
            if (again) index.relistRoot(root);
            while (index.roots.items[root].heap.first()) |slot| {
                if (!index.isUsed(slot)) return slot;
                index.setAside(root, slot);
            }
        }
        return null;
    }

    /// The same of all roots.
    fn unused(index: *Index) ?u32 {
        index.expire();
        for ([_]bool{ false, true }) |again| {
            if (again) index.relistAll();
            while (index.root_heap.first()) |root| {
                const slot = index.roots.items[root].heap.first().?;
                if (!index.isUsed(slot)) return slot;
                index.setAside(root, slot);
            }
        }
        return null;
    }

    /// Takes a used slot out of the heap, until its sequence says that it has ended or nothing else is left.
    fn setAside(index: *Index, root: u32, slot: u32) void {
        const of = &index.roots.items[root];
        of.heap.remove(.{ .index = index }, slot);
        index.slots.items[slot].place = @intCast(of.aside.items.len);
        index.slots.items[slot].is_aside = true;
        of.aside.appendAssumeCapacity(slot);
        index.settleRoot(root);
    }

    /// A slot is set aside no longer.
    fn takeBack(index: *Index, slot: u32) void {
        const held = &index.slots.items[slot];
        if (!held.is_aside) return;
        const aside = &index.roots.items[index.nodeOf(slot).root].aside;
        const last = aside.items[aside.items.len - 1];
        index.slots.items[last].place = held.place;
        assert(aside.swapRemove(held.place) == slot);
        held.place = heaps.nowhere;
        held.is_aside = false;
    }

    /// Puts what was set aside back into the heap of a root. Other tenants' blocks have no part in it, and no time.
    fn relistRoot(index: *Index, root: u32) void {
        const of = &index.roots.items[root];
        while (of.aside.items.len != 0) {
            const slot = of.aside.items[of.aside.items.len - 1];
            index.takeBack(slot);
            of.heap.addAssumeCapacity(.{ .index = index }, slot);
        }
        index.settleRoot(root);
    }

    fn relistAll(index: *Index) void {
        for (index.by_key.values()) |root| index.relistRoot(root);
    }

    /// The slot that goes first, used or not.
    fn any(index: *Index, root: ?u32) ?u32 {
        if (root) |of| index.relistRoot(of) else index.relistAll();
        const of = root orelse index.root_heap.first() orelse return null;
        return index.roots.items[of].heap.first();
    }

    const gone_max = 4096;

    /// Remembers for a while that a block was there.
    fn remember(index: *Index, hash: chain.BlockHash) void {
        if (index.gone[1].count() >= gone_max) {
            std.mem.swap(std.AutoHashMapUnmanaged(chain.BlockHash, void), &index.gone[0], &index.gone[1]);
            index.gone[1].clearRetainingCapacity();
        }
        index.gone[1].put(index.gpa, hash, {}) catch {}; // only an explanation is lost
    }

    /// The whole block of these tokens behind a node was given up not long ago.
    pub fn wasEvicted(index: *const Index, node: u32, tokens: []const u32) bool {
        if (tokens.len < index.block_size) return false;
        const key = &index.roots.items[index.nodes.items[node].root].key;
        const hash = chain.next(key, index.nodes.items[node].hash, tokens[0..index.block_size]);
        return index.gone[0].contains(hash) or index.gone[1].contains(hash);
    }

    /// Another model of the tenant has the first block of these tokens.
    pub fn hasOtherModel(index: *const Index, root_node: u32, tokens: []const u32) bool {
        if (tokens.len == 0) return false;
        const own = index.nodes.items[root_node].root;
        for (index.by_key.values()) |other| {
            const root = index.roots.items[other];
            if (other == own or !std.mem.eql(u8, &root.tenant, &index.roots.items[own].tenant)) continue;
            const block = tokens[0..@min(tokens.len, index.block_size)];
            const nearest = index.nearestChild(root.node, block) orelse continue;
            if (nearest.common == block.len) return true;
        }
        return false;
    }

    /// Forgets the block of a group in a node, and the node where that is nothing without it.
    pub fn forget(index: *Index, node: u32, group: u32) void {
        assert(!index.sees_all[group] or !index.hasChildren(node));
        index.evict(index.slotOf(node, group));
    }

    /// Forgets the block of a slot: its node too, where the group sees all rows or nothing else is left of it.
    fn evict(index: *Index, slot: u32) void {
        const before = index.stats.cached_blocks;
        // Sequences that went on from there know no way to the nodes before it.
        const node: u32 = slot / @as(u32, @intCast(index.groups.len));
        if (!index.options.outlives) index.leave(index.refOf(index.parentOf(node).?));
        index.remember(index.nodes.items[node].hash);
        index.drop(slot);
        index.stats.evicted_blocks += before - index.stats.cached_blocks;
    }

    fn drop(index: *Index, slot: u32) void {
        const node: u32 = slot / @as(u32, @intCast(index.groups.len));
        if (index.lead == null or index.lead.? != slot % index.groups.len) {
            index.letGo(slot);
            index.relist(node);
            return index.dropEmpty(node);
        }
        index.dropLeaf(node);
    }

    /// Drops a node of which nothing is left, and those before it of which nothing is left then.
    fn dropEmpty(index: *Index, first: u32) void {
        var node = first;
        while (index.parentOf(node)) |parent| : (node = parent) {
            if (node == index.pinned or index.hasChildren(node) or index.hasBlocks(node)) return;
            index.remove(node);
        }
    }

    fn hasBlocks(index: *const Index, node: u32) bool {
        for (0..index.groups.len) |group| {
            if (index.slots.items[index.slotOf(node, @intCast(group))].block >= 0) return true;
        }
        return false;
    }

    fn dropLeaf(index: *Index, node: u32) void {
        const parent = index.parentOf(node).?;
        for (0..index.groups.len) |group| index.letGo(index.slotOf(node, @intCast(group)));
        index.remove(node);
        index.dropEmpty(parent);
    }

    /// Takes a leaf without blocks out of its tree. What was used after it was used with it.
    fn remove(index: *Index, node: u32) void {
        assert(index.nodes.items[node].children.items.len == 0 and !index.hasBlocks(node));
        const parent = index.nodes.items[node].parent;
        const root = index.nodes.items[node].root;
        index.unlist(node);
        index.unlist(parent);
        for (0..index.groups.len) |group| {
            const before = &index.slots.items[index.slotOf(parent, @intCast(group))];
            before.used = @max(before.used, index.slots.items[index.slotOf(node, @intCast(group))].used);
        }
        if (index.nodes.items[node].token_count == index.block_size) if (index.log) |*log| {
            log.add(index.gpa, .removed, index.nodes.items[node].hash, index.nodes.items[parent].hash, &.{});
        };
        const siblings = &index.nodes.items[parent].children;
        const at = index.lowerBound(siblings.items, index.tokensOf(node));
        assert(siblings.orderedRemove(at) == node);
        index.giveNode(node);
        index.roots.items[root].node_count -= 1;
        index.relist(parent);
        index.dropRootIfUnused(root);
    }

    fn dropRootIfUnused(index: *Index, root: u32) void {
        const unused_root = &index.roots.items[root];
        if (unused_root.users != 0 or index.nodes.items[unused_root.node].children.items.len != 0) return;
        assert(unused_root.bytes == 0 and unused_root.node_count == 0 and unused_root.place == heaps.nowhere);
        assert(index.by_key.swapRemove(unused_root.key));
        unused_root.heap.deinit(index.gpa);
        unused_root.heap = .{};
        unused_root.aside.deinit(index.gpa);
        unused_root.aside = .empty;
        index.giveNode(unused_root.node);
        index.free_roots.appendAssumeCapacity(root);
    }

    /// A node without tokens and blocks.
    fn takeNode(index: *Index) error{OutOfMemory}!u32 {
        const gpa = index.gpa;
        if (index.free_nodes.items.len == 0) {
            const count = index.nodes.items.len + 1;
            try index.free_nodes.ensureTotalCapacity(gpa, count);
            try index.tokens.ensureTotalCapacity(gpa, count * index.block_size);
            try index.slots.ensureTotalCapacity(gpa, count * index.groups.len);
            try index.nodes.ensureTotalCapacity(gpa, count);
            index.tokens.items.len = count * index.block_size;
            index.slots.appendNTimesAssumeCapacity(.{}, index.groups.len);
            index.nodes.appendAssumeCapacity(undefined);
            index.nodes.items[count - 1].generation = 0;
            return @intCast(count - 1);
        }
        return index.free_nodes.pop().?;
    }

    fn giveNode(index: *Index, node: u32) void {
        index.nodes.items[node].children.deinit(index.gpa);
        index.nodes.items[node].children = .empty;
        index.nodes.items[node].generation +%= 1;
        for (0..index.groups.len) |group| {
            const slot = &index.slots.items[index.slotOf(node, @intCast(group))];
            assert(slot.block < 0 and slot.place == heaps.nowhere);
            slot.* = .{};
        }
        index.free_nodes.appendAssumeCapacity(node);
    }

    pub fn metadataBytes(index: *const Index) u64 {
        var bytes: u64 = @sizeOf(Index) + index.groups.len;
        bytes += index.nodes.capacity * @sizeOf(Node) + index.tokens.capacity * @sizeOf(u32);
        bytes += index.slots.capacity * @sizeOf(Slot) + index.free_nodes.capacity * @sizeOf(u32);
        bytes += index.roots.capacity * @sizeOf(Root) + index.free_roots.capacity * @sizeOf(u32);
        bytes += index.by_key.capacity() * (@sizeOf(chain.Key) + 3 * @sizeOf(u32)) + index.root_heap.items.capacity * @sizeOf(u32);
        for (index.gone) |list| bytes += list.capacity() * (@sizeOf(chain.BlockHash) + 1);
        bytes += index.expiring.capacity() * (@sizeOf(Ref) + @sizeOf(u32));
        bytes += index.left.capacity() * (@sizeOf(Ref) + @sizeOf(u32));
        for (index.roots.items) |root| bytes += (root.heap.items.capacity + root.aside.capacity) * @sizeOf(u32);
        for (index.nodes.items) |node| bytes += node.children.capacity * @sizeOf(u32);
        return bytes;
    }
};

/// The clock of the machine while it is awake.
fn milliseconds() u64 {
    return @intCast(@divFloor(std.Io.Clock.awake.now(cpu.io()).nanoseconds, std.time.ns_per_ms));
}

/// How many tokens two lists have in common from the first on.
pub fn commonCount(a: []const u32, b: []const u32) u32 {
    const count = @min(a.len, b.len);
    return @intCast(std.mem.indexOfDiff(u32, a[0..count], b[0..count]) orelse count);
}

test {
    _ = @import("index_test.zig");
    _ = heaps;
    _ = @import("events.zig");
    _ = chain;
}
