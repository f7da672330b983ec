//! Layer groups: layers of equal KV heads, head_dim and window share their blocks, so they have one block shape, one
//! pool and, in each sequence, one block table. Most models have one group.

const std = @import("std");
const Allocator = std.mem.Allocator;
const BlockPool = @import("block_pool.zig").BlockPool;
const BlockShape = @import("../shape.zig").BlockShape;

/// What a layer holds.
pub const Layer = extern struct {
    kv_head_count: u32,
    head_dim: u32,
    /// A query of this layer sees that many of the newest rows, its own included; older blocks are freed. 0 for all.
    window_tokens: u32 = 0,
};

/// Layers of one shape.
pub const Group = struct {
    shape: BlockShape,
    window_tokens: ?u32,
    pool: *BlockPool,
};

/// Where a layer stands: its group, and its number in it.
pub const Place = struct { group: u32, index: u32 };

/// Sorts layers into groups. `empty` has what all groups share: a shape without layers, and the pool for now.
pub fn groupLayers(gpa: Allocator, layers: []const Layer, places: []Place, empty: Group) error{OutOfMemory}![]Group {
    std.debug.assert(layers.len == places.len and empty.shape.layer_count == 0);
    var groups: std.ArrayList(Group) = .empty;
    errdefer groups.deinit(gpa);
    for (layers, places) |layer, *place| {
        const index = find(groups.items, layer) orelse index: {
            var group = empty;
            group.shape.kv_head_count = layer.kv_head_count;
            group.shape.head_dim = layer.head_dim;
            group.window_tokens = windowOf(layer);
            try groups.append(gpa, group);
            break :index groups.items.len - 1;
        };
        const shape = &groups.items[index].shape;
        place.* = .{ .group = @intCast(index), .index = shape.layer_count };
        shape.layer_count += 1;
    }
    return groups.toOwnedSlice(gpa);
}

fn find(groups: []const Group, layer: Layer) ?usize {
    for (groups, 0..) |group, i| {
        const shape = group.shape;
        if (shape.kv_head_count != layer.kv_head_count or shape.head_dim != layer.head_dim) continue;
        if (group.window_tokens == windowOf(layer)) return i;
    }
    return null;
}

fn windowOf(layer: Layer) ?u32 {
    return if (layer.window_tokens == 0) null else layer.window_tokens;
}
