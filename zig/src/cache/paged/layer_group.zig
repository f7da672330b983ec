//! Layer groups: layers of equal KV heads, head_dim, window and store formats share their blocks, so they have one block
//! shape, one set of pools and, in each sequence, one block table. Most models have one group.

const std = @import("std");
const assert = std.debug.assert;
const Allocator = std.mem.Allocator;
const block_pool = @import("../blocks/pool.zig");
const block_table = @import("../blocks/table.zig");
const FormatPool = @import("../blocks/format_pool.zig").FormatPool;
const BlockPool = block_pool.BlockPool;
const BlockShape = @import("../../shape.zig").BlockShape;
const dtypes = @import("../../dtype.zig");
const Dtype = dtypes.Dtype;
const Format = block_pool.Format;
const Head = @import("../tiers/fidelity.zig").Head;

/// The formats of rows that have left the tail.
pub const Store = struct {
    dtype_k: Dtype,
    dtype_v: Dtype,
};

/// A layer, and what it holds.
pub const Layer = struct {
    kv_head_count: u32,
    head_dim: u32,
    /// Query heads of each query, a multiple of `kv_head_count`: queries that do not have as many are refused. Null where
    /// the length of the queries tells. Layers that differ in it share blocks.
    q_head_count: ?u32 = null,
    /// A query of this layer sees that many of the newest rows, its own included; older blocks are freed. Null for all.
    window_tokens: ?u32 = null,
    /// Null for what the policy of the cache says.
    store: ?Store = null,
};

/// The block that a shared one of the tail became when one of its sequences let it migrate. Valid while both are what they
/// were then.
pub const Twin = struct {
    tail_serial: u32,
    format: u8,
    block: i32,
    serial: u32,
};

/// Layers of one shape.
pub const Group = struct {
    /// The shape of its blocks in the tail.
    shape: BlockShape,
    window_tokens: ?u32,
    store: ?Store,
    pool: *BlockPool = undefined,
    /// Every format its blocks have or had, by the index that block tables hold: the tail's first, and once more for reopened
    /// blocks.
    formats: std.ArrayList(*Format) = .empty,
    /// The format of blocks that leave the tail; null where none does.
    store_format: ?u8 = null,
    /// One bit for each format that blocks took when they left the tail under the present policy.
    store_mask: u128 = 0,
    /// [layer in the group][kv_head], or empty where nobody asked.
    fidelity: []Head = &.{},
    /// The twins of shared blocks of the tail, by block.
    twins: std.AutoHashMapUnmanaged(i32, Twin) = .empty,

    pub fn deinit(group: *Group, gpa: Allocator) void {
        group.formats.deinit(gpa);
        group.twins.deinit(gpa);
        gpa.free(group.fidelity);
    }

    /// The fidelity of each head of a layer, [kv_head]; empty where nobody asked.
    pub fn heads(group: *const Group, layer: u32) []Head {
        assert(layer < group.shape.layer_count);
        if (group.fidelity.len == 0) return &.{};
        return group.fidelity[layer * group.shape.kv_head_count ..][0..group.shape.kv_head_count];
    }

    /// The blocks of the tail.
    pub fn tailPool(group: *const Group) *FormatPool {
        return &group.formats.items[0].pool;
    }

    /// The formats of keys and of values, of those a row may come to lie in, that refuse the most.
    pub fn narrowest(group: *const Group) struct { Dtype, Dtype } {
        const shape = group.shape;
        const store = if (group.store_format) |index| group.formats.items[index].shape else shape;
        return .{ narrower(shape.dtype_k, store.dtype_k), narrower(shape.dtype_v, store.dtype_v) };
    }

    fn narrower(a: Dtype, b: Dtype) Dtype {
        return if (dtypes.refusedF32Bits(b) < dtypes.refusedF32Bits(a)) b else a;
    }

    /// Each format once.
    pub fn distinctFormats(group: *const Group) []const *Format {
        return group.formats.items[block_table.reopened_format..];
    }

    /// The bit of a format in `store_mask`.
    pub fn formatBit(index: u8) u128 {
        return @as(u128, 1) << @intCast(index);
    }

    /// The index of a format, which becomes one of the group's if it is not yet.
    pub fn formatIndex(group: *Group, gpa: Allocator, dtype_k: Dtype, dtype_v: Dtype) BlockPool.Error!u8 {
        const wanted = try group.pool.get(dtype_k, dtype_v);
        for (group.formats.items, 0..) |format, i| if (format == wanted) return @intCast(i);
        assert(group.formats.items.len < @bitSizeOf(@TypeOf(group.store_mask))); // 8 formats of keys and 8 of values: 65 at most
        try group.formats.append(gpa, wanted);
        return @intCast(group.formats.items.len - 1);
    }
};

/// A layer's group, and its number in it.
pub const GroupedLayer = struct { group: u32, index: u32, q_head_count: ?u32 };

/// Sorts layers into groups. `empty` is the shape without layers, KV heads and head_dim.
pub fn groupLayers(gpa: Allocator, layers: []const Layer, grouped: []GroupedLayer, empty: BlockShape) error{OutOfMemory}![]Group {
    assert(layers.len == grouped.len and empty.layer_count == 0);
    var groups: std.ArrayList(Group) = .empty;
    errdefer groups.deinit(gpa);
    var known: std.AutoHashMapUnmanaged(Kind, u32) = .empty;
    defer known.deinit(gpa);
    for (layers, grouped) |layer, *one| {
        const entry = try known.getOrPut(gpa, .of(layer));
        if (!entry.found_existing) {
            entry.value_ptr.* = @intCast(groups.items.len);
            var shape = empty;
            shape.kv_head_count = layer.kv_head_count;
            shape.head_dim = layer.head_dim;
            try groups.append(gpa, .{ .shape = shape, .window_tokens = layer.window_tokens, .store = layer.store });
        }
        const index = entry.value_ptr.*;
        const shape = &groups.items[index].shape;
        one.* = .{ .group = index, .index = shape.layer_count, .q_head_count = layer.q_head_count };
        shape.layer_count += 1;
    }
    return groups.toOwnedSlice(gpa);
}

/// The properties that layers of one group have in common.
const Kind = struct {
    kv_head_count: u32,
    head_dim: u32,
    window_tokens: ?u32,
    store: ?Store,

    fn of(layer: Layer) Kind {
        return .{
            .kv_head_count = layer.kv_head_count,
            .head_dim = layer.head_dim,
            .window_tokens = layer.window_tokens,
            .store = layer.store,
        };
    }
};

test groupLayers {
    const testing = std.testing;
    const store: Store = .{ .dtype_k = .q8_0, .dtype_v = .i4 };
    const layers = [_]Layer{
        .{ .kv_head_count = 2, .head_dim = 32 },
        .{ .kv_head_count = 2, .head_dim = 64 },
        .{ .kv_head_count = 2, .head_dim = 32, .window_tokens = 16 },
        .{ .kv_head_count = 2, .head_dim = 32 },
        .{ .kv_head_count = 2, .head_dim = 32, .store = store },
        .{ .kv_head_count = 2, .head_dim = 32, .window_tokens = 16 },
        .{ .kv_head_count = 2, .head_dim = 32, .window_tokens = 17 },
    };
    var grouped: [layers.len]GroupedLayer = undefined;
    const groups = try groupLayers(testing.allocator, &layers, &grouped, .{
        .layer_count = 0,
        .kv_head_count = 0,
        .head_dim = 0,
        .block_size = 64,
        .dtype_k = .f16,
        .dtype_v = .f16,
    });
    defer testing.allocator.free(groups);
    try testing.expectEqual(5, groups.len);
    for ([_]u32{ 0, 1, 2, 0, 3, 2, 4 }, [_]u32{ 0, 0, 0, 1, 0, 1, 0 }, grouped) |group, index, one| {
        try testing.expectEqual(group, one.group);
        try testing.expectEqual(index, one.index);
    }
    for ([_]u32{ 2, 1, 2, 1, 1 }, groups) |layer_count, group| {
        try testing.expectEqual(layer_count, group.shape.layer_count);
    }
    try testing.expectEqual(store, groups[3].store.?);
}
