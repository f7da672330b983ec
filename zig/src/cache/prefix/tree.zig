//! The nodes of the prefix index: what is found by its tokens, and how.
//!
//! A node is a block's tokens behind those of its parent, and the block of each layer group. The children of a node are
//! sorted by their tokens, so the one that has most of them in common with a prompt stands beside where the prompt would be.
//! What may go of a tree, and when, is for `tenants.zig`; what its blocks are worth to others, for `index.zig`.

const std = @import("std");
const assert = std.debug.assert;
const Allocator = std.mem.Allocator;
const chain = @import("chain.zig");
const heaps = @import("heap.zig");

/// The parent of a root.
pub const none = std.math.maxInt(u32);

/// The time that does not come.
pub const never = std.math.maxInt(u64);

/// A node that may have gone since it was looked up.
pub const Ref = struct {
    node: u32,
    generation: u32,
};

/// The block of one layer group in a node.
pub const Slot = struct {
    /// -1 where the group has none.
    block: i32 = -1,
    format: u8 = 0,
    /// The place in the heap of its tenant, or among those set aside.
    place: u32 = heaps.nowhere,
    /// A sequence had the block when it was to go.
    is_aside: bool = false,
    /// When it was used last, in uses of the index.
    used: u64 = 0,
};

pub const Node = struct {
    /// The node before; none for a root.
    parent: u32,
    root: u32,
    /// The tenant of the root.
    tenant: u32,
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

/// A child of a node, and how many tokens it has in common with some others from the first on.
pub const Child = struct { node: u32, common: u32 };

/// The nodes of all roots.
pub const Tree = struct {
    gpa: Allocator,
    block_size: u32,
    group_count: usize,
    nodes: std.ArrayList(Node) = .empty,
    /// [node][block_size]
    tokens: std.ArrayList(u32) = .empty,
    /// [node][group]
    slots: std.ArrayList(Slot) = .empty,
    /// Nodes that are none now.
    free_nodes: std.ArrayList(u32) = .empty,

    pub fn deinit(tree: *Tree) void {
        for (tree.nodes.items) |*node| node.children.deinit(tree.gpa);
        tree.nodes.deinit(tree.gpa);
        tree.tokens.deinit(tree.gpa);
        tree.slots.deinit(tree.gpa);
        tree.free_nodes.deinit(tree.gpa);
        tree.* = undefined;
    }

    /// A reference that tells whether the node is still there.
    pub fn refOf(tree: *const Tree, node: u32) Ref {
        return .{ .node = node, .generation = tree.nodes.items[node].generation };
    }

    /// The node of a reference, unless it has gone.
    pub fn get(tree: *const Tree, ref: Ref) ?u32 {
        return if (tree.nodes.items[ref.node].generation == ref.generation) ref.node else null;
    }

    pub fn parentOf(tree: *const Tree, node: u32) ?u32 {
        const parent = tree.nodes.items[node].parent;
        return if (parent == none) null else parent;
    }

    pub fn depthOf(tree: *const Tree, node: u32) u32 {
        return tree.nodes.items[node].depth;
    }

    /// The tokens of a node.
    pub fn tokensOf(tree: *const Tree, node: u32) []const u32 {
        return tree.tokens.items[@as(usize, node) * tree.block_size ..][0..tree.nodes.items[node].token_count];
    }

    /// The block of a group in a node, and its format; null where it has none.
    pub fn blockOf(tree: *const Tree, node: u32, group: u32) ?struct { block: i32, format: u8 } {
        const slot = tree.slots.items[tree.slotOf(node, group)];
        return if (slot.block < 0) null else .{ .block = slot.block, .format = slot.format };
    }

    pub fn slotOf(tree: *const Tree, node: u32, group: u32) u32 {
        return node * @as(u32, @intCast(tree.group_count)) + group;
    }

    pub fn nodeOf(tree: *const Tree, slot: u32) *Node {
        return &tree.nodes.items[slot / tree.group_count];
    }

    pub fn hasChildren(tree: *const Tree, node: u32) bool {
        return tree.nodes.items[node].children.items.len != 0;
    }

    /// The child that has most tokens in common with `tokens`; null where none has any.
    pub fn nearestChild(tree: *const Tree, node: u32, tokens: []const u32) ?Child {
        const children = tree.nodes.items[node].children.items;
        const at = tree.lowerBound(children, tokens);
        var nearest: ?Child = null;
        if (at < children.len) nearest = tree.child(children[at], tokens);
        if (at > 0) {
            const before = tree.child(children[at - 1], tokens);
            if (nearest == null or before.common > nearest.?.common) nearest = before;
        }
        return if (nearest != null and nearest.?.common > 0) nearest else null;
    }

    /// A child that stands beside where these tokens would.
    pub fn neighbour(tree: *const Tree, node: u32, tokens: []const u32) ?u32 {
        const children = tree.nodes.items[node].children.items;
        if (children.len == 0) return null;
        return children[@min(tree.lowerBound(children, tokens), children.len - 1)];
    }

    /// Walks down from a node along `tokens`, as far as whole blocks of them are there, and appends the nodes to `path`.
    pub fn walk(tree: *const Tree, from: u32, tokens: []const u32, path: *std.ArrayList(u32)) error{OutOfMemory}!void {
        var node = from;
        var rest = tokens;
        while (rest.len >= tree.block_size) : (rest = rest[tree.block_size..]) {
            const block = rest[0..tree.block_size];
            const children = tree.nodes.items[node].children.items;
            const at = tree.lowerBound(children, block);
            if (at == children.len or !std.mem.eql(u32, tree.tokensOf(children[at]), block)) return;
            node = children[at];
            try path.append(tree.gpa, node);
        }
    }

    fn child(tree: *const Tree, node: u32, tokens: []const u32) Child {
        return .{ .node = node, .common = commonCount(tree.tokensOf(node), tokens) };
    }

    /// The first child whose tokens do not stand before `tokens`.
    pub fn lowerBound(tree: *const Tree, children: []const u32, tokens: []const u32) usize {
        var low: usize = 0;
        var high = children.len;
        while (low < high) {
            const middle = low + (high - low) / 2;
            if (std.mem.order(u32, tree.tokensOf(children[middle]), tokens) == .lt) low = middle + 1 else high = middle;
        }
        return low;
    }

    pub fn hasBlocks(tree: *const Tree, node: u32) bool {
        for (0..tree.group_count) |group| {
            if (tree.slots.items[tree.slotOf(node, @intCast(group))].block >= 0) return true;
        }
        return false;
    }

    /// A node without tokens and blocks.
    pub fn takeNode(tree: *Tree) error{OutOfMemory}!u32 {
        const gpa = tree.gpa;
        if (tree.free_nodes.items.len == 0) {
            const count = tree.nodes.items.len + 1;
            try tree.free_nodes.ensureTotalCapacity(gpa, count);
            try tree.tokens.ensureTotalCapacity(gpa, count * tree.block_size);
            try tree.slots.ensureTotalCapacity(gpa, count * tree.group_count);
            try tree.nodes.ensureTotalCapacity(gpa, count);
            tree.tokens.items.len = count * tree.block_size;
            tree.slots.appendNTimesAssumeCapacity(.{}, tree.group_count);
            tree.nodes.appendAssumeCapacity(undefined);
            tree.nodes.items[count - 1].generation = 0;
            return @intCast(count - 1);
        }
        return tree.free_nodes.pop().?;
    }

    pub fn giveNode(tree: *Tree, node: u32) void {
        tree.nodes.items[node].children.deinit(tree.gpa);
        tree.nodes.items[node].children = .empty;
        tree.nodes.items[node].generation +%= 1;
        for (0..tree.group_count) |group| {
            const slot = &tree.slots.items[tree.slotOf(node, @intCast(group))];
            assert(slot.block < 0 and slot.place == heaps.nowhere);
            slot.* = .{};
        }
        tree.free_nodes.appendAssumeCapacity(node);
    }

    pub fn metadataBytes(tree: *const Tree) u64 {
        var bytes = tree.nodes.capacity * @sizeOf(Node) + tree.tokens.capacity * @sizeOf(u32);
        bytes += tree.slots.capacity * @sizeOf(Slot) + tree.free_nodes.capacity * @sizeOf(u32);
        for (tree.nodes.items) |node| bytes += node.children.capacity * @sizeOf(u32);
        return bytes;
    }
};

/// How many tokens two lists have in common from the first on.
pub fn commonCount(a: []const u32, b: []const u32) u32 {
    const count = @min(a.len, b.len);
    return @intCast(std.mem.indexOfDiff(u32, a[0..count], b[0..count]) orelse count);
}
