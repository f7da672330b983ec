//! The roots of the prefix index, one a tenant and model, and what of each goes first.
//!
//! A root has a heap of the slots that may go by themselves: the one of lowest priority first, of these the least recently
//! used. A heap of roots tells whose first one that is of all. A slot whose block a sequence uses is set aside when its turn
//! comes, until that sequence has ended or nothing else is left; so what one tenant uses costs another one no time.

const std = @import("std");
const assert = std.debug.assert;
const Allocator = std.mem.Allocator;
const chain = @import("chain.zig");
const heaps = @import("heap.zig");
const trees = @import("tree.zig");
const Ref = trees.Ref;
const Tree = trees.Tree;

/// The tree of a tenant, for one model.
pub const Root = struct {
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
    tree: *Tree,

    pub fn isBefore(order: SlotOrder, a: u32, b: u32) bool {
        const priority_a = order.tree.nodeOf(a).priority;
        const priority_b = order.tree.nodeOf(b).priority;
        if (priority_a != priority_b) return priority_a < priority_b;
        return order.tree.slots.items[a].used < order.tree.slots.items[b].used;
    }

    pub fn place(order: SlotOrder, slot: u32) *u32 {
        return &order.tree.slots.items[slot].place;
    }
};

/// Which root has what goes first.
const RootOrder = struct {
    tree: *Tree,
    roots: []Root,

    pub fn isBefore(order: RootOrder, a: u32, b: u32) bool {
        const slots: SlotOrder = .{ .tree = order.tree };
        return slots.isBefore(order.roots[a].heap.first().?, order.roots[b].heap.first().?);
    }

    pub fn place(order: RootOrder, root: u32) *u32 {
        return &order.roots[root].place;
    }
};

/// All roots of an index. The tree is that of the same index in every call.
pub const Roots = struct {
    gpa: Allocator,
    items: std.ArrayList(Root) = .empty,
    free: std.ArrayList(u32) = .empty,
    /// Tenants come and go, and this map stays as fast for it.
    by_key: std.AutoArrayHashMapUnmanaged(chain.Key, u32) = .empty,
    heap: RootHeap = .{},

    pub fn deinit(roots: *Roots) void {
        const gpa = roots.gpa;
        for (roots.items.items) |*root| {
            root.heap.deinit(gpa);
            root.aside.deinit(gpa);
        }
        roots.items.deinit(gpa);
        roots.free.deinit(gpa);
        roots.by_key.deinit(gpa);
        roots.heap.deinit(gpa);
        roots.* = undefined;
    }

    /// The root of a tenant for a sequence, which closes it.
    /// `newWriter` names it at the pools where it is a new one.
    pub fn open(
        roots: *Roots,
        tree: *Tree,
        key: chain.Key,
        tenant: chain.Key,
        newWriter: *const fn () u32,
    ) error{OutOfMemory}!Ref {
        const gpa = roots.gpa;
        if (roots.by_key.get(key)) |root| {
            roots.items.items[root].users += 1;
            return tree.refOf(roots.items.items[root].node);
        }
        try roots.by_key.ensureUnusedCapacity(gpa, 1);
        try roots.heap.ensureCapacity(gpa, roots.items.items.len + 1);
        try roots.free.ensureTotalCapacity(gpa, roots.items.items.len + 1);
        if (roots.free.items.len == 0) try roots.items.ensureUnusedCapacity(gpa, 1);
        const node = try tree.takeNode();
        const root: u32 = roots.free.pop() orelse blk: {
            _ = roots.items.addOneAssumeCapacity();
            break :blk @intCast(roots.items.items.len - 1);
        };
        roots.items.items[root] = .{ .node = node, .key = key, .tenant = tenant, .writer = newWriter(), .users = 1 };
        tree.nodes.items[node] = .{
            .parent = trees.none,
            .root = root,
            .depth = 0,
            .token_count = 0,
            .generation = tree.nodes.items[node].generation,
            .priority = 0,
            .hash = chain.no_parent,
        };
        roots.by_key.putAssumeCapacity(key, root);
        return tree.refOf(node);
    }

    /// The root of a tenant that has a sequence already, for another one.
    pub fn openAgain(roots: *Roots, tree: *const Tree, node: u32) Ref {
        roots.of(tree, node).users += 1;
        return tree.refOf(node);
    }

    /// A sequence that began at a root has ended.
    pub fn close(roots: *Roots, tree: *Tree, node: u32) void {
        const root = tree.nodes.items[node].root;
        roots.items.items[root].users -= 1;
        roots.dropIfUnused(tree, root);
    }

    /// The root of a node.
    pub fn of(roots: *const Roots, tree: *const Tree, node: u32) *Root {
        return &roots.items.items[tree.nodes.items[node].root];
    }

    /// Forgets a root that no sequence began at and that has no nodes.
    pub fn dropIfUnused(roots: *Roots, tree: *Tree, root: u32) void {
        const unused = &roots.items.items[root];
        if (unused.users != 0 or tree.hasChildren(unused.node)) return;
        assert(unused.bytes == 0 and unused.node_count == 0 and unused.place == heaps.nowhere);
        assert(roots.by_key.swapRemove(unused.key));
        unused.heap.deinit(roots.gpa);
        unused.heap = .{};
        unused.aside.deinit(roots.gpa);
        unused.aside = .empty;
        tree.giveNode(unused.node);
        roots.free.appendAssumeCapacity(root);
    }

    /// Another model of the tenant has the first block of these tokens.
    pub fn hasOtherModel(roots: *const Roots, tree: *const Tree, root_node: u32, tokens: []const u32) bool {
        if (tokens.len == 0) return false;
        const own = tree.nodes.items[root_node].root;
        for (roots.by_key.values()) |other| {
            const root = roots.items.items[other];
            if (other == own or !std.mem.eql(u8, &root.tenant, &roots.items.items[own].tenant)) continue;
            const block = tokens[0..@min(tokens.len, tree.block_size)];
            const nearest = tree.nearestChild(root.node, block) orelse continue;
            if (nearest.common == block.len) return true;
        }
        return false;
    }

    /// Makes room for the slots of one node more: each of them may come into the heap, or be set aside.
    pub fn ensureNodeCapacity(roots: *Roots, tree: *const Tree, root: u32) error{OutOfMemory}!void {
        const one = &roots.items.items[root];
        const slot_count = (one.node_count + 1) * tree.group_count;
        try one.heap.ensureCapacity(roots.gpa, slot_count);
        try one.aside.ensureTotalCapacity(roots.gpa, slot_count);
    }

    /// Says whether a slot may go by itself, after that, its priority or its use has changed. `settle` follows.
    pub fn list(roots: *Roots, tree: *Tree, slot: u32, may_go: bool) void {
        roots.takeBack(tree, slot);
        const was_listed = isListed(tree, slot);
        const heap = &roots.items.items[tree.nodeOf(slot).root].heap;
        const order: SlotOrder = .{ .tree = tree };
        if (may_go and !was_listed) heap.addAssumeCapacity(order, slot);
        if (!may_go and was_listed) heap.remove(order, slot);
        if (may_go and was_listed) heap.settle(order, slot);
    }

    /// A slot was used now.
    pub fn touch(roots: *Roots, tree: *Tree, slot: u32) void {
        if (!isListed(tree, slot)) return;
        const root = tree.nodeOf(slot).root;
        roots.items.items[root].heap.settle(.{ .tree = tree }, slot);
        roots.settle(tree, root);
    }

    /// Puts a root where it belongs, after its first slot has changed.
    pub fn settle(roots: *Roots, tree: *Tree, root: u32) void {
        const was_listed = roots.items.items[root].place != heaps.nowhere;
        const has_slots = roots.items.items[root].heap.first() != null;
        const order: RootOrder = .{ .tree = tree, .roots = roots.items.items };
        if (was_listed and has_slots) roots.heap.settle(order, root);
        if (!was_listed and has_slots) roots.heap.addAssumeCapacity(order, root);
        if (was_listed and !has_slots) roots.heap.remove(order, root);
    }

    /// The slot that goes first, of a root or of all, used or not; those set aside are not among them.
    pub fn first(roots: *const Roots, root: ?u32) ?u32 {
        const from = root orelse roots.heap.first() orelse return null;
        return roots.items.items[from].heap.first();
    }

    /// Takes a used slot out of the heap, until its sequence says that it has ended or nothing else is left.
    pub fn setAside(roots: *Roots, tree: *Tree, slot: u32) void {
        const root = tree.nodeOf(slot).root;
        const from = &roots.items.items[root];
        from.heap.remove(.{ .tree = tree }, slot);
        tree.slots.items[slot].place = @intCast(from.aside.items.len);
        tree.slots.items[slot].is_aside = true;
        from.aside.appendAssumeCapacity(slot);
        roots.settle(tree, root);
    }

    /// Puts what was set aside back into the heap, of a root or of all. Of a root, other tenants' blocks have no part in it,
    /// and no time.
    pub fn takeAllBack(roots: *Roots, tree: *Tree, root: ?u32) void {
        const only = root orelse {
            for (roots.by_key.values()) |each| roots.takeAllBack(tree, each);
            return;
        };
        const back = &roots.items.items[only];
        while (back.aside.items.len != 0) {
            const slot = back.aside.items[back.aside.items.len - 1];
            roots.takeBack(tree, slot);
            back.heap.addAssumeCapacity(.{ .tree = tree }, slot);
        }
        roots.settle(tree, only);
    }

    /// A slot is set aside no longer.
    fn takeBack(roots: *Roots, tree: *Tree, slot: u32) void {
        const held = &tree.slots.items[slot];
        if (!held.is_aside) return;
        const aside = &roots.of(tree, slot / @as(u32, @intCast(tree.group_count))).aside;
        const last = aside.items[aside.items.len - 1];
        tree.slots.items[last].place = held.place;
        assert(aside.swapRemove(held.place) == slot);
        held.place = heaps.nowhere;
        held.is_aside = false;
    }

    /// The slot is in the heap of its root.
    fn isListed(tree: *const Tree, slot: u32) bool {
        return tree.slots.items[slot].place != heaps.nowhere and !tree.slots.items[slot].is_aside;
    }

    pub fn metadataBytes(roots: *const Roots) u64 {
        var bytes = roots.items.capacity * @sizeOf(Root) + roots.free.capacity * @sizeOf(u32);
        bytes += roots.by_key.capacity() * (@sizeOf(chain.Key) + 3 * @sizeOf(u32)) + roots.heap.items.capacity * @sizeOf(u32);
        for (roots.items.items) |root| bytes += (root.heap.items.capacity + root.aside.capacity) * @sizeOf(u32);
        return bytes;
    }
};
