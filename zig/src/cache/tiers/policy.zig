//! Tiers: which blocks of a sequence stay in floats. How the others leave them is told in `migration.zig`.
//!
//!     0        sinks           tail_first                            seq_len
//!     | tail   | store store store store | tail  tail  tail ...    ta|          blocks
//!
//! Rows are written to the *tail*, in floats. At a commit, while the tail holds `tail_tokens` rows and a block more, its
//! oldest block migrates to the *store*, in every layer of its group: its rows are quantized into a new block, which takes
//! its place in the table. So a filled tail has tail_tokens to tail_tokens + block_size - 1 rows, rows are quantized once,
//! and 64 tokens cost one migration, not 64. The blocks of the first `sink_tokens` rows never migrate.
//!
//! A block of the store that was rewound into is turned back into floats by the next append, and stays there on top of the
//! tail, as sinks do: were it quantized again, what was rounded once would be rounded once more, at every such turn.

const std = @import("std");
const assert = std.debug.assert;
const block_table = @import("../blocks/table.zig");
const layer_group = @import("../paged/layer_group.zig");
const Group = layer_group.Group;
const Retention = @import("retention.zig").Retention;
const shapes = @import("../../shape.zig");

/// The tier that a block is in. The numbers cross the ABI and are never changed.
pub const Tier = enum(u32) {
    /// Written to, in floats.
    tail = 0,
    /// Left the tail, in the format the policy says.
    store = 1,
    /// Left the tail under an earlier policy, in the format that one said.
    warm = 2,
};

/// The policy for old rows, in force from the next commit.
pub const Policy = struct {
    kind: Kind = .tail_only,
    /// The store of layers that do not say their own; null where those stay in the tail.
    store: ?layer_group.Store = null,
    /// Newest rows that stay in floats, a multiple of the block size.
    tail_tokens: u32 = 0,
    /// First rows that stay in floats, with the blocks they lie in.
    sink_tokens: u32 = 0,
    /// A block of whose keys a score could be off by more than this takes a wider format for them, at last the tail's.
    max_logit_error: ?f32 = null,
    /// The norm of queries that is expected, for `max_logit_error`; null for the largest seen so far.
    query_norm: ?f32 = null,

    pub const Kind = enum(u32) { tail_only = 0, tiered = 1 };

    pub fn validate(policy: Policy, block_size: u32, retention: Retention) error{InvalidConfig}!void {
        if (policy.kind == .tail_only) return;
        if (policy.tail_tokens % block_size != 0) return error.InvalidConfig;
        // Whole blocks of them must be countable.
        if (policy.sink_tokens > shapes.max_seq_len_max) return error.InvalidConfig;
        for ([_]?f32{ policy.max_logit_error, policy.query_norm }) |limit| if (limit) |value| {
            if (!(value > 0 and std.math.isFinite(value))) return error.InvalidConfig;
        };
        if (policy.query_norm != null and policy.max_logit_error == null) return error.InvalidConfig;
        if (retention.tokens) |tokens| if (policy.tail_tokens > tokens) return error.InvalidConfig;
    }

    /// The store that the layers of a group migrate to; null where nothing does. A store in the tail's own formats is no other place.
    pub fn storeOf(policy: Policy, group: Group) ?layer_group.Store {
        if (policy.kind == .tail_only) return null;
        const store = group.store orelse policy.store orelse return null;
        const same = store.dtype_k == group.shape.dtype_k and store.dtype_v == group.shape.dtype_v;
        return if (same) null else store;
    }
};

/// The tier of a block in one of a group's formats.
pub fn tierOf(group: *const Group, format: u8) Tier {
    assert(format < group.formats.items.len);
    if (block_table.isTail(format)) return .tail;
    return if (group.store_mask & Group.formatBit(format) != 0) .store else .warm;
}

test "Policy.validate: whole blocks, and no more tail than there are rows" {
    const testing = std.testing;
    const policy: Policy = .{ .kind = .tiered, .tail_tokens = 128 };
    try policy.validate(64, .{});
    try policy.validate(64, .{ .tokens = 128 });
    try testing.expectError(error.InvalidConfig, policy.validate(256, .{}));
    try testing.expectError(error.InvalidConfig, policy.validate(64, .{ .tokens = 127 }));
    const sinks: Policy = .{ .kind = .tiered, .sink_tokens = std.math.maxInt(u32) };
    try testing.expectError(error.InvalidConfig, sinks.validate(64, .{}));
    try (Policy{ .tail_tokens = 100 }).validate(64, .{ .tokens = 10 }); // tail-only: not read
}

test {
    _ = @import("tiers_test.zig");
    _ = @import("reopen_test.zig");
}
