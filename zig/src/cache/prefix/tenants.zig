//! The tenants of the prefix index: how much each has there, and what of it goes first.
//!
//! A tenant has a heap of the slots that may go by themselves: the one of lowest priority first, of these the least recently
//! used. A heap of tenants tells whose first one that is of all. A slot whose block a sequence uses is set aside when its turn
//! comes, until that sequence has ended or nothing else is left; so what one tenant uses costs another one no time.

const std = @import("std");
const assert = std.debug.assert;
const Allocator = std.mem.Allocator;
const chain = @import("chain.zig");
const heaps = @import("heap.zig");
const trees = @import("tree.zig");
const Tree = trees.Tree;

/// One who shares rows with nobody else, whatever the models.
pub const Tenant = struct {
    key: chain.Key,
    /// The name by which pools know who wrote a block: one tenant does not read what another one left there.
    writer: u64,
    /// Its trees, one a model.
    root_count: u32 = 0,
    /// Nodes of these, but for the roots.
    node_count: u32 = 0,
    bytes: u64 = 0,
    heap: SlotHeap = .{},
    /// Slots that would be in the heap, but that their blocks are used.
    aside: std.ArrayList(u32) = .empty,
    /// The place in the heap of tenants.
    place: u32 = heaps.nowhere,
};

const SlotHeap = heaps.Heap(SlotOrder);
const TenantHeap = heaps.Heap(TenantOrder);

/// What of a tenant goes first.
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

/// Which tenant has what goes first.
const TenantOrder = struct {
    tree: *Tree,
    tenants: []Tenant,

    pub fn isBefore(order: TenantOrder, a: u32, b: u32) bool {
        const slots: SlotOrder = .{ .tree = order.tree };
        return slots.isBefore(order.tenants[a].heap.first().?, order.tenants[b].heap.first().?);
    }

    pub fn place(order: TenantOrder, tenant: u32) *u32 {
        return &order.tenants[tenant].place;
    }
};

/// All tenants of an index. The tree is that of the same index in every call.
pub const Tenants = struct {
    gpa: Allocator,
    items: std.ArrayList(Tenant) = .empty,
    free: std.ArrayList(u32) = .empty,
    /// Tenants come and go, and this map stays as fast for it.
    by_key: std.AutoArrayHashMapUnmanaged(chain.Key, u32) = .empty,
    heap: TenantHeap = .{},

    pub fn deinit(tenants: *Tenants) void {
        const gpa = tenants.gpa;
        for (tenants.items.items) |*tenant| {
            tenant.heap.deinit(gpa);
            tenant.aside.deinit(gpa);
        }
        tenants.items.deinit(gpa);
        tenants.free.deinit(gpa);
        tenants.by_key.deinit(gpa);
        tenants.heap.deinit(gpa);
        tenants.* = undefined;
    }

    /// Makes room for one tenant more.
    pub fn ensureUnusedCapacity(tenants: *Tenants) error{OutOfMemory}!void {
        const gpa = tenants.gpa;
        const count = tenants.items.items.len + 1;
        try tenants.by_key.ensureUnusedCapacity(gpa, 1);
        try tenants.heap.ensureCapacity(gpa, count);
        try tenants.free.ensureTotalCapacity(gpa, count);
        try tenants.items.ensureTotalCapacity(gpa, count);
    }

    /// The tenant of a key, for one tree more. `newWriter` names it at the pools where it is a new one.
    pub fn openAssumeCapacity(tenants: *Tenants, key: chain.Key, newWriter: *const fn () u64) u32 {
        const tenant = tenants.by_key.get(key) orelse blk: {
            const number: u32 = tenants.free.pop() orelse new: {
                _ = tenants.items.addOneAssumeCapacity();
                break :new @intCast(tenants.items.items.len - 1);
            };
            tenants.items.items[number] = .{ .key = key, .writer = newWriter() };
            tenants.by_key.putAssumeCapacity(key, number);
            break :blk number;
        };
        tenants.items.items[tenant].root_count += 1;
        return tenant;
    }

    /// Forgets a tree, which is empty, and the tenant with its last one.
    pub fn close(tenants: *Tenants, number: u32) void {
        const tenant = &tenants.items.items[number];
        tenant.root_count -= 1;
        if (tenant.root_count != 0) return;
        assert(tenant.bytes == 0 and tenant.node_count == 0 and tenant.place == heaps.nowhere);
        assert(tenants.by_key.swapRemove(tenant.key));
        tenant.heap.deinit(tenants.gpa);
        tenant.heap = .{};
        tenant.aside.deinit(tenants.gpa);
        tenant.aside = .empty;
        tenants.free.appendAssumeCapacity(number);
    }

    /// The tenant of a node.
    pub fn of(tenants: *const Tenants, tree: *const Tree, node: u32) *Tenant {
        return &tenants.items.items[tree.nodes.items[node].tenant];
    }

    /// Makes room for the slots of one node more: each of them may come into the heap, or be set aside.
    pub fn ensureNodeCapacity(tenants: *Tenants, tree: *const Tree, number: u32) error{OutOfMemory}!void {
        const tenant = &tenants.items.items[number];
        const slot_count = (tenant.node_count + 1) * tree.group_count;
        try tenant.heap.ensureCapacity(tenants.gpa, slot_count);
        try tenant.aside.ensureTotalCapacity(tenants.gpa, slot_count);
    }

    /// Says whether a slot may go by itself, after that, its priority or its use has changed. `settle` follows.
    pub fn list(tenants: *Tenants, tree: *Tree, slot: u32, may_go: bool) void {
        tenants.takeBack(tree, slot);
        const was_listed = isListed(tree, slot);
        const heap = &tenants.items.items[tree.nodeOf(slot).tenant].heap;
        const order: SlotOrder = .{ .tree = tree };
        if (may_go and !was_listed) heap.addAssumeCapacity(order, slot);
        if (!may_go and was_listed) heap.remove(order, slot);
        if (may_go and was_listed) heap.settle(order, slot);
    }

    /// A slot was used now.
    pub fn touch(tenants: *Tenants, tree: *Tree, slot: u32) void {
        if (!isListed(tree, slot)) return;
        const tenant = tree.nodeOf(slot).tenant;
        tenants.items.items[tenant].heap.settle(.{ .tree = tree }, slot);
        tenants.settle(tree, tenant);
    }

    /// Puts a tenant where it belongs, after its first slot has changed.
    pub fn settle(tenants: *Tenants, tree: *Tree, tenant: u32) void {
        const was_listed = tenants.items.items[tenant].place != heaps.nowhere;
        const has_slots = tenants.items.items[tenant].heap.first() != null;
        const order: TenantOrder = .{ .tree = tree, .tenants = tenants.items.items };
        if (was_listed and has_slots) tenants.heap.settle(order, tenant);
        if (!was_listed and has_slots) tenants.heap.addAssumeCapacity(order, tenant);
        if (was_listed and !has_slots) tenants.heap.remove(order, tenant);
    }

    /// The slot that goes first, of a tenant or of all, used or not; those set aside are not among them.
    pub fn first(tenants: *const Tenants, tenant: ?u32) ?u32 {
        const from = tenant orelse tenants.heap.first() orelse return null;
        return tenants.items.items[from].heap.first();
    }

    /// Takes a used slot out of the heap, until its sequence says that it has ended or nothing else is left.
    pub fn setAside(tenants: *Tenants, tree: *Tree, slot: u32) void {
        const tenant = tree.nodeOf(slot).tenant;
        const from = &tenants.items.items[tenant];
        from.heap.remove(.{ .tree = tree }, slot);
        tree.slots.items[slot].place = @intCast(from.aside.items.len);
        tree.slots.items[slot].is_aside = true;
        from.aside.appendAssumeCapacity(slot);
        tenants.settle(tree, tenant);
    }

    /// Puts what was set aside back into the heap, of a tenant or of all. Of a tenant, other tenants' blocks have no part in it,
    /// and no time.
    pub fn takeAllBack(tenants: *Tenants, tree: *Tree, tenant: ?u32) void {
        const only = tenant orelse {
            for (tenants.by_key.values()) |each| tenants.takeAllBack(tree, each);
            return;
        };
        const back = &tenants.items.items[only];
        while (back.aside.items.len != 0) {
            const slot = back.aside.items[back.aside.items.len - 1];
            tenants.takeBack(tree, slot);
            back.heap.addAssumeCapacity(.{ .tree = tree }, slot);
        }
        tenants.settle(tree, only);
    }

    /// A slot is set aside no longer.
    fn takeBack(tenants: *Tenants, tree: *Tree, slot: u32) void {
        const held = &tree.slots.items[slot];
        if (!held.is_aside) return;
        const aside = &tenants.items.items[tree.nodeOf(slot).tenant].aside;
        const last = aside.items[aside.items.len - 1];
        tree.slots.items[last].place = held.place;
        assert(aside.swapRemove(held.place) == slot);
        held.place = heaps.nowhere;
        held.is_aside = false;
    }

    /// The slot is in the heap of its tenant.
    fn isListed(tree: *const Tree, slot: u32) bool {
        return tree.slots.items[slot].place != heaps.nowhere and !tree.slots.items[slot].is_aside;
    }

    pub fn metadataBytes(tenants: *const Tenants) u64 {
        var bytes = tenants.items.capacity * @sizeOf(Tenant) + (tenants.free.capacity + tenants.heap.items.capacity) * @sizeOf(u32);
        bytes += tenants.by_key.capacity() * (@sizeOf(chain.Key) + 3 * @sizeOf(u32));
        for (tenants.items.items) |tenant| bytes += (tenant.heap.items.capacity + tenant.aside.capacity) * @sizeOf(u32);
        return bytes;
    }
};
