//! The prefix index: blocks of rows by the tokens they were computed for.
//!
//!     root of a tenant
//!       [the quick brown fox]          a node: a block's tokens, and the block of each layer group
//!         [jumps over the lazy]
//!           [dog and]                  fewer tokens than a block has: nothing follows these
//!         [sat on the mat]
//!
//! Nodes are found by their tokens alone (`tree.zig`). Trees of different tenants and models have nothing in common: what one
//! tenant looks up, and how long that takes, does not depend on what another one has.
//!
//! The index holds one reference to each block it names, as a block table does, so a block that no sequence has stays until
//! memory is wanted. Then the blocks of lowest priority go first, of these the least recently used (`tenants.zig`), and a node
//! never before its children. In layers that do not need all rows, those of a window or under retention, a block may go by itself.

const std = @import("std");
const assert = std.debug.assert;
const Allocator = std.mem.Allocator;
const BlockTable = @import("../blocks/table.zig").BlockTable;
const chain = @import("chain.zig");
const cpu = @import("../../device/cpu.zig");
const Events = @import("events.zig").Events;
const Gone = @import("gone.zig").Gone;
const Group = @import("../paged/layer_group.zig").Group;
const Roots = @import("roots.zig").Roots;
const Tenants = @import("tenants.zig").Tenants;
const trees = @import("tree.zig");
const Ref = trees.Ref;
const Tree = trees.Tree;

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
    /// Layers of a group see all rows: a node without its block is none. [group]
    sees_all: []bool,
    /// The first group that sees all, whose slots stand for their nodes in the heaps.
    lead: ?u32,
    options: Options,
    tree: Tree,
    roots: Roots,
    tenants: Tenants,
    /// Blocks that were given up not long ago.
    gone: Gone = .{},
    /// What changed; null where nobody asks.
    log: ?Events,
    /// Nodes whose priority is for a time, and when the first of these times ends, or an earlier one that no node has any more.
    expiring: std.AutoArrayHashMapUnmanaged(u32, void) = .empty,
    expires_next_ms: u64 = trees.never,
    clock: *const fn () u64 = milliseconds,
    /// Nodes that a sequence left before its end, where none is to outlive its sequences.
    left: std.AutoArrayHashMapUnmanaged(Ref, void) = .empty,
    /// A node none of whose blocks may go for now.
    pinned: u32 = trees.none,
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
            .tree = .{ .gpa = gpa, .block_size = block_size, .group_count = groups.len },
            .roots = .{ .gpa = gpa },
            .tenants = .{ .gpa = gpa },
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
        index.tree.deinit();
        index.roots.deinit();
        index.tenants.deinit();
        gpa.free(index.sees_all);
        index.left.deinit(gpa);
        index.expiring.deinit(gpa);
        index.gone.deinit(gpa);
        index.* = undefined;
    }

    /// Forgets every block. Sequences keep theirs, and their roots.
    pub fn clear(index: *Index) void {
        var log = index.log;
        index.log = null; // one event says it all
        index.tenants.takeAllBack(&index.tree, null);
        while (index.tenants.first(null)) |slot| index.drop(slot);
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
            for (index.roots.by_key.values()) |root| try next.append(index.gpa, index.roots.items.items[root].node);
            while (next.pop()) |node| {
                try index.tell(log, node);
                try next.appendSlice(index.gpa, index.tree.nodes.items[node].children.items);
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
        const own = index.tree.nodes.items[node];
        if (own.token_count < index.tree.block_size) return;
        try log.append(index.gpa, .stored, own.hash, index.tree.nodes.items[own.parent].hash, index.tree.tokensOf(node));
    }

    /// The root of a tenant, by their keys, for a sequence, which closes it.
    /// `newWriter` names the tenant at the pools where it is a new one.
    pub fn open(index: *Index, key: chain.Key, tenant: chain.Key, newWriter: *const fn () u64) error{OutOfMemory}!Ref {
        return index.roots.open(&index.tree, &index.tenants, key, tenant, newWriter);
    }

    /// The root of a tenant that has a sequence already, for another one.
    pub fn openAgain(index: *Index, node: u32) Ref {
        return index.roots.openAgain(&index.tree, node);
    }

    /// A sequence that began at a root has ended.
    pub fn close(index: *Index, node: u32) void {
        index.roots.close(&index.tree, &index.tenants, node);
    }

    /// The name of a root's tenant at the pools.
    pub fn writerOf(index: *const Index, node: u32) u64 {
        return index.tenants.of(&index.tree, node).writer;
    }

    /// Marks the blocks of a node as used now.
    pub fn touch(index: *Index, node: u32) void {
        index.uses += 1;
        for (0..index.groups.len) |group| {
            const slot = index.tree.slotOf(node, @intCast(group));
            index.tree.slots.items[slot].used = index.uses;
            index.tenants.touch(&index.tree, slot);
        }
    }

    /// A sequence that had the blocks of a node has ended: they may go as any other, and were used until now.
    pub fn ended(index: *Index, node: u32) void {
        index.touch(node);
        index.relist(node);
    }

    /// A child has all of these tokens: it counts as used now.
    pub fn covers(index: *Index, node: u32, tokens: []const u32) bool {
        const nearest = index.tree.nearestChild(node, tokens) orelse return false;
        if (nearest.common < tokens.len) return false;
        index.touch(nearest.node);
        return true;
    }

    /// Adds the block of `tokens` behind a node: the blocks of an entry of these tables, which the index holds from now on
    /// too. Where the node is there already, it keeps its blocks and takes those it lacks. Null where there is no room.
    pub fn add(index: *Index, parent: u32, tokens: []const u32, tables: []const BlockTable, entry: u32, rank: Rank) ?u32 {
        assert(tokens.len > 0 and tokens.len <= index.tree.block_size);
        assert(index.tree.nodes.items[parent].depth == entry);
        assert(index.tree.nodes.items[parent].token_count == (if (entry == 0) 0 else index.tree.block_size));
        index.uses += 1;
        const at = index.tree.lowerBound(index.tree.nodes.items[parent].children.items, tokens);
        const siblings = index.tree.nodes.items[parent].children.items;
        if (at < siblings.len and std.mem.eql(u32, index.tree.tokensOf(siblings[at]), tokens)) {
            const node = siblings[at];
            const ref = index.tree.refOf(node);
            if (index.makeRoomBehind(node, index.lackingBytes(node, tables, entry))) index.fill(node, tables, entry);
            if (index.tree.get(ref) == null) return null; // it had no block, and could get none
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
        const has_room = index.makeRoom(index.tree.nodes.items[node].tenant, bytes);
        index.pinned = trees.none;
        index.relist(node);
        if (!has_room) index.dropEmpty(node);
        return has_room;
    }

    /// Bytes of the blocks of an entry that a node has not.
    fn lackingBytes(index: *const Index, node: u32, tables: []const BlockTable, entry: u32) u64 {
        var bytes: u64 = 0;
        for (tables, index.groups, 0..) |*table, group, i| {
            const entries = table.entries();
            if (entries.isEvicted(entry) or index.tree.slots.items[index.tree.slotOf(node, @intCast(i))].block >= 0) continue;
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
        const tenant = index.tree.nodes.items[parent].tenant;
        try index.tree.nodes.items[parent].children.ensureUnusedCapacity(gpa, 1);
        try index.tenants.ensureNodeCapacity(&index.tree, tenant);
        const node = try index.tree.takeNode();
        const before = index.tree.nodes.items[parent];
        index.tenants.items.items[tenant].node_count += 1;
        index.tree.nodes.items[node] = .{
            .parent = parent,
            .root = before.root,
            .tenant = tenant,
            .depth = before.depth + 1,
            .token_count = @intCast(tokens.len),
            .generation = index.tree.nodes.items[node].generation,
            .priority = rank.priority,
            .hash = chain.next(&index.roots.items.items[before.root].key, before.hash, tokens),
        };
        @memcpy(index.tree.tokens.items[@as(usize, node) * index.tree.block_size ..][0..tokens.len], tokens);
        const at = index.tree.lowerBound(index.tree.nodes.items[parent].children.items, tokens);
        index.tree.nodes.items[parent].children.insertAssumeCapacity(at, node);
        index.fill(node, tables, entry);
        index.setExpiry(node, index.expiryOf(rank));
        index.relist(parent);
        if (tokens.len == index.tree.block_size) if (index.log) |*log| {
            log.add(gpa, .stored, index.tree.nodes.items[node].hash, before.hash, tokens);
        };
        if (at > 0) index.dropCovered(index.tree.nodes.items[parent].children.items[at - 1], tokens);
        return node;
    }

    /// Drops a node of fewer tokens than a block has, if a sibling has all of them and more.
    fn dropCovered(index: *Index, node: u32, tokens: []const u32) void {
        const covered = index.tree.tokensOf(node);
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
            const slot = index.tree.slotOf(node, group);
            const entries = table.entries();
            if (index.tree.slots.items[slot].block < 0 and !entries.isEvicted(entry)) {
                index.hold(slot, group, entries.block(entry), entries.format(entry));
            }
            index.tree.slots.items[slot].used = index.uses;
        }
        index.relist(node);
    }

    fn hold(index: *Index, slot: u32, group: u32, block: i32, format: u8) void {
        const pool = &index.groups[group].formats.items[format].pool;
        pool.retain(&.{block});
        index.tree.slots.items[slot].block = block;
        index.tree.slots.items[slot].format = format;
        index.tenants.items.items[index.tree.nodeOf(slot).tenant].bytes += pool.block_bytes;
        index.stats.cached_bytes += pool.block_bytes;
        index.stats.cached_blocks += 1;
    }

    fn letGo(index: *Index, slot: u32) void {
        const group = slot % @as(u32, @intCast(index.groups.len));
        const held = &index.tree.slots.items[slot];
        if (held.block < 0) return;
        const pool = &index.groups[group].formats.items[held.format].pool;
        pool.release(&.{held.block});
        held.block = -1;
        index.tenants.items.items[index.tree.nodeOf(slot).tenant].bytes -= pool.block_bytes;
        index.stats.cached_bytes -= pool.block_bytes;
        index.stats.cached_blocks -= 1;
    }

    /// A block of a sequence became another one: the index names that in its place, if it named the first.
    pub fn follow(index: *Index, node: u32, group: u32, old: i32, new: i32, format: u8) void {
        const slot = index.tree.slotOf(node, group);
        if (index.tree.slots.items[slot].block != old) return;
        index.letGo(slot);
        index.hold(slot, group, new, format);
    }

    /// Gives a node at least that priority, for at least that time.
    fn raise(index: *Index, node: u32, rank: Rank) void {
        const own = index.tree.nodes.items[node];
        const expires_ms = index.expiryOf(rank);
        if (rank.priority < own.priority) return;
        if (rank.priority == own.priority and expires_ms <= own.expires_ms) return;
        index.setPriority(node, rank.priority);
        index.setExpiry(node, expires_ms);
    }

    /// When a priority that is given now ends; `trees.never` is later than any other time.
    fn expiryOf(index: *const Index, rank: Rank) u64 {
        return if (rank.ttl_ms) |ms| index.clock() + ms else trees.never;
    }

    fn setExpiry(index: *Index, node: u32, expires_ms: u64) void {
        const own = &index.tree.nodes.items[node];
        if (expires_ms == trees.never) {
            if (own.expires_ms != trees.never) assert(index.expiring.swapRemove(node));
        } else if (own.expires_ms == trees.never) {
            index.expiring.put(index.gpa, node, {}) catch return; // without memory for it the priority stays
        }
        own.expires_ms = expires_ms;
        index.expires_next_ms = @min(index.expires_next_ms, expires_ms);
    }

    /// Gives the default priority to those whose time has ended.
    fn expire(index: *Index) void {
        if (index.expires_next_ms == trees.never) return;
        const now = index.clock();
        if (now < index.expires_next_ms) return;
        index.expires_next_ms = trees.never;
        var i = index.expiring.count();
        while (i > 0) {
            i -= 1; // what takes the place of one that has ended was looked at before
            const node = index.expiring.keys()[i];
            const expires_ms = index.tree.nodes.items[node].expires_ms;
            if (expires_ms > now) {
                index.expires_next_ms = @min(index.expires_next_ms, expires_ms);
                continue;
            }
            index.setExpiry(node, trees.never);
            index.setPriority(node, priority_default);
        }
    }

    fn setPriority(index: *Index, node: u32, priority: u8) void {
        index.unlist(node);
        index.tree.nodes.items[node].priority = priority;
        index.relist(node);
    }

    /// Puts the slots of a node into the heap of its tenant where they may go by themselves, or takes them out.
    fn relist(index: *Index, node: u32) void {
        const tenant = index.tree.nodes.items[node].tenant;
        const is_leaf = index.tree.nodes.items[node].children.items.len == 0;
        for (0..index.groups.len) |i| {
            const group: u32 = @intCast(i);
            const slot = index.tree.slotOf(node, group);
            const may_go = node != index.pinned and index.tree.slots.items[slot].block >= 0 and
                (if (index.sees_all[group]) is_leaf and index.lead == group else true);
            index.tenants.list(&index.tree, slot, may_go);
        }
        index.tenants.settle(&index.tree, tenant);
    }

    /// Takes the slots of a node out of the heap of its tenant, so that none of them goes until `relist`.
    fn unlist(index: *Index, node: u32) void {
        const tenant = index.tree.nodes.items[node].tenant;
        for (0..index.groups.len) |group| index.tenants.list(&index.tree, index.tree.slotOf(node, @intCast(group)), false);
        index.tenants.settle(&index.tree, tenant);
    }

    /// Lets blocks go until so many bytes more of a tenant are within the limits. False where that cannot be.
    fn makeRoom(index: *Index, tenant: u32, bytes: u64) bool {
        const own_max = index.options.max_bytes_per_salt orelse std.math.maxInt(u64);
        const max = index.options.max_bytes orelse std.math.maxInt(u64);
        if (bytes > own_max or bytes > max) return false;
        while (index.tenants.items.items[tenant].bytes > own_max - bytes) {
            index.evict(index.unused(tenant) orelse index.any(tenant) orelse return false);
        }
        while (index.stats.cached_bytes > max - bytes) {
            index.evict(index.unused(null) orelse index.any(null) orelse return false);
        }
        return true;
    }

    /// Forgets this node and those before it, as far as nobody has their blocks and nothing follows them. Returns the one at
    /// which that ended, if any.
    fn forgetUnused(index: *Index, last: Ref) ?Ref {
        var node = index.tree.get(last) orelse return null;
        while (index.tree.parentOf(node)) |parent| : (node = parent) {
            if (index.tree.hasChildren(node)) return null; // whoever takes the last child away comes back to it
            if (index.isNodeUsed(node)) return index.tree.refOf(node);
            const before = index.tree.refOf(parent);
            for (0..index.groups.len) |group| index.letGo(index.tree.slotOf(node, @intCast(group)));
            index.remove(node);
            if (index.tree.get(before) == null) return null;
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
            const slot = index.tree.slotOf(node, @intCast(group));
            if (index.tree.slots.items[slot].block >= 0 and index.isUsed(slot)) return true;
        }
        return false;
    }

    /// Lets the block go that is wanted least, so that its memory can be used. False where no memory is held by the index
    /// alone.
    pub fn reclaim(index: *Index) bool {
        if (index.unused(null)) |slot| {
            index.evict(slot);
            return true;
        }
        // What nobody else has may stand before a node whose block is used: that one is forgotten then.
        for (0..index.tree.slots.items.len) |slot| {
            if (index.tree.slots.items[slot].block < 0 or index.isUsed(@intCast(slot))) continue;
            index.evict(index.any(null) orelse return false);
            return true;
        }
        return false;
    }

    /// A sequence has the block of a slot, too.
    fn isUsed(index: *const Index, slot: u32) bool {
        const held = index.tree.slots.items[slot];
        const group = slot % index.groups.len;
        return index.groups[group].formats.items[held.format].pool.refCount(@intCast(held.block)) > 1;
    }

    /// The slot that goes first of those that no sequence uses, of a tenant or of all. The used ones before it are set aside.
    fn unused(index: *Index, tenant: ?u32) ?u32 {
        index.expire();
        for ([_]bool{ false, true }) |again| {
            if (again) index.tenants.takeAllBack(&index.tree, tenant);
            while (index.tenants.first(tenant)) |slot| {
                if (!index.isUsed(slot)) return slot;
                index.tenants.setAside(&index.tree, slot);
            }
        }
        return null;
    }

    /// The slot that goes first, used or not.
    fn any(index: *Index, tenant: ?u32) ?u32 {
        index.tenants.takeAllBack(&index.tree, tenant);
        return index.tenants.first(tenant);
    }

    /// The whole block of these tokens behind a node was given up not long ago.
    pub fn wasEvicted(index: *const Index, node: u32, tokens: []const u32) bool {
        if (tokens.len < index.tree.block_size) return false;
        const key = &index.roots.of(&index.tree, node).key;
        return index.gone.has(chain.next(key, index.tree.nodes.items[node].hash, tokens[0..index.tree.block_size]));
    }

    /// Forgets the block of a group in a node, and the node where that is nothing without it.
    pub fn forget(index: *Index, node: u32, group: u32) void {
        assert(!index.sees_all[group] or !index.tree.hasChildren(node));
        index.evict(index.tree.slotOf(node, group));
    }

    /// Forgets the block of a slot: its node too, where the group sees all rows or nothing else is left of it.
    fn evict(index: *Index, slot: u32) void {
        const before = index.stats.cached_blocks;
        // Sequences that went on from there know no way to the nodes before it.
        const node: u32 = slot / @as(u32, @intCast(index.groups.len));
        if (!index.options.outlives) index.leave(index.tree.refOf(index.tree.parentOf(node).?));
        index.gone.remember(index.gpa, index.tree.nodes.items[node].hash);
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
        while (index.tree.parentOf(node)) |parent| : (node = parent) {
            if (node == index.pinned or index.tree.hasChildren(node) or index.tree.hasBlocks(node)) return;
            index.remove(node);
        }
    }

    fn dropLeaf(index: *Index, node: u32) void {
        const parent = index.tree.parentOf(node).?;
        for (0..index.groups.len) |group| index.letGo(index.tree.slotOf(node, @intCast(group)));
        index.remove(node);
        index.dropEmpty(parent);
    }

    /// Takes a leaf without blocks out of its tree. What was used after it was used with it.
    fn remove(index: *Index, node: u32) void {
        assert(index.tree.nodes.items[node].children.items.len == 0 and !index.tree.hasBlocks(node));
        const parent = index.tree.nodes.items[node].parent;
        const root = index.tree.nodes.items[node].root;
        index.setExpiry(node, trees.never);
        index.unlist(node);
        index.unlist(parent);
        for (0..index.groups.len) |group| {
            const before = &index.tree.slots.items[index.tree.slotOf(parent, @intCast(group))];
            before.used = @max(before.used, index.tree.slots.items[index.tree.slotOf(node, @intCast(group))].used);
        }
        if (index.tree.nodes.items[node].token_count == index.tree.block_size) if (index.log) |*log| {
            log.add(index.gpa, .removed, index.tree.nodes.items[node].hash, index.tree.nodes.items[parent].hash, &.{});
        };
        const siblings = &index.tree.nodes.items[parent].children;
        const at = index.tree.lowerBound(siblings.items, index.tree.tokensOf(node));
        assert(siblings.orderedRemove(at) == node);
        index.tree.giveNode(node);
        index.tenants.of(&index.tree, parent).node_count -= 1;
        index.relist(parent);
        index.roots.dropIfUnused(&index.tree, &index.tenants, root);
    }

    pub fn metadataBytes(index: *const Index) u64 {
        var bytes: u64 = @sizeOf(Index) + index.groups.len;
        bytes += index.tree.metadataBytes() + index.roots.metadataBytes() + index.tenants.metadataBytes();
        bytes += index.gone.metadataBytes();
        bytes += index.expiring.capacity() * 2 * @sizeOf(u32);
        bytes += index.left.capacity() * (@sizeOf(Ref) + @sizeOf(u32));
        return bytes;
    }
};

/// The clock of the machine while it is awake.
fn milliseconds() u64 {
    return @intCast(@divFloor(std.Io.Clock.awake.now(cpu.io()).nanoseconds, std.time.ns_per_ms));
}

test {
    _ = @import("index_test.zig");
    _ = @import("gone.zig");
    _ = @import("heap.zig");
    _ = @import("events.zig");
    _ = chain;
}
