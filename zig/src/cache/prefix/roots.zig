//! The roots of the prefix index, one for each model of a tenant.

const std = @import("std");
const Allocator = std.mem.Allocator;
const chain = @import("chain.zig");
const Tenants = @import("tenants.zig").Tenants;
const trees = @import("tree.zig");
const Ref = trees.Ref;
const Tree = trees.Tree;

/// The tree of a tenant, for one model.
pub const Root = struct {
    node: u32,
    key: chain.Key,
    tenant: u32,
    /// Sequences that began here.
    users: u32 = 0,
};

/// All roots of an index. The tree and the tenants are those of the same index in every call.
pub const Roots = struct {
    gpa: Allocator,
    items: std.ArrayList(Root) = .empty,
    free: std.ArrayList(u32) = .empty,
    /// Roots come and go, and this map stays as fast for it.
    by_key: std.AutoArrayHashMapUnmanaged(chain.Key, u32) = .empty,

    pub fn deinit(roots: *Roots) void {
        const gpa = roots.gpa;
        roots.items.deinit(gpa);
        roots.free.deinit(gpa);
        roots.by_key.deinit(gpa);
        roots.* = undefined;
    }

    /// The root of a tenant, by their keys, for a sequence, which closes it.
    /// `newWriter` names the tenant at the pools where it is a new one.
    pub fn open(
        roots: *Roots,
        tree: *Tree,
        tenants: *Tenants,
        key: chain.Key,
        tenant_key: chain.Key,
        newWriter: *const fn () u64,
    ) error{OutOfMemory}!Ref {
        const gpa = roots.gpa;
        if (roots.by_key.get(key)) |root| {
            roots.items.items[root].users += 1;
            return tree.refOf(roots.items.items[root].node);
        }
        try tenants.ensureUnusedCapacity();
        try roots.by_key.ensureUnusedCapacity(gpa, 1);
        try roots.free.ensureTotalCapacity(gpa, roots.items.items.len + 1);
        if (roots.free.items.len == 0) try roots.items.ensureUnusedCapacity(gpa, 1);
        const node = try tree.takeNode();
        const root: u32 = roots.free.pop() orelse blk: {
            _ = roots.items.addOneAssumeCapacity();
            break :blk @intCast(roots.items.items.len - 1);
        };
        const tenant = tenants.openAssumeCapacity(tenant_key, newWriter);
        roots.items.items[root] = .{ .node = node, .key = key, .tenant = tenant, .users = 1 };
        tree.nodes.items[node] = .{
            .parent = trees.none,
            .root = root,
            .tenant = tenant,
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
    pub fn close(roots: *Roots, tree: *Tree, tenants: *Tenants, node: u32) void {
        const root = tree.nodes.items[node].root;
        roots.items.items[root].users -= 1;
        roots.dropIfUnused(tree, tenants, root);
    }

    /// The root of a node.
    pub fn of(roots: *const Roots, tree: *const Tree, node: u32) *Root {
        return &roots.items.items[tree.nodes.items[node].root];
    }

    /// Forgets a root that no sequence began at and that has no nodes.
    pub fn dropIfUnused(roots: *Roots, tree: *Tree, tenants: *Tenants, root: u32) void {
        const unused = &roots.items.items[root];
        if (unused.users != 0 or tree.hasChildren(unused.node)) return;
        std.debug.assert(roots.by_key.swapRemove(unused.key));
        tree.giveNode(unused.node);
        tenants.close(unused.tenant);
        roots.free.appendAssumeCapacity(root);
    }

    /// Another model of the tenant has the first block of these tokens.
    pub fn hasOtherModel(roots: *const Roots, tree: *const Tree, root_node: u32, tokens: []const u32) bool {
        if (tokens.len == 0) return false;
        const own = tree.nodes.items[root_node].root;
        for (roots.by_key.values()) |other| {
            const root = roots.items.items[other];
            if (other == own or root.tenant != roots.items.items[own].tenant) continue;
            const block = tokens[0..@min(tokens.len, tree.block_size)];
            const nearest = tree.nearestChild(root.node, block) orelse continue;
            if (nearest.common == block.len) return true;
        }
        return false;
    }

    pub fn metadataBytes(roots: *const Roots) u64 {
        return roots.items.capacity * @sizeOf(Root) + roots.free.capacity * @sizeOf(u32) +
            roots.by_key.capacity() * (@sizeOf(chain.Key) + 3 * @sizeOf(u32));
    }
};
