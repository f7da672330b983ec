//! Which rows of a sequence stay.
//!
//!     0        sink_end                   first                  seq_len
//!     | sinks  |  gone, block by block    |  the newest rows     |
//!
//! A row keeps its position for ever; what is gone is seen by nobody.

const std = @import("std");

/// What a cache keeps of each sequence after a commit.
pub const Retention = struct {
    /// The newest rows, sinks included; null for all.
    tokens: ?u32 = null,
    /// The first rows, which never leave.
    sink_tokens: u32 = 0,

    pub fn validate(retention: Retention) error{InvalidConfig}!void {
        const tokens = retention.tokens orelse {
            return if (retention.sink_tokens != 0) error.InvalidConfig;
        };
        if (tokens == 0 or retention.sink_tokens >= tokens) return error.InvalidConfig;
    }

    /// Resident rows: [0, sink_end) and [first, seq_len).
    pub const Kept = struct { sink_end: u32, first: u32 };

    /// What stays at `seq_len` of a layer that sees `window_tokens` of the newest rows, or all.
    pub fn kept(retention: Retention, window_tokens: ?u32, seq_len: u32) Kept {
        var result: Kept = .{ .sink_end = 0, .first = 0 };
        if (retention.tokens) |tokens| {
            result.sink_end = retention.sink_tokens;
            result.first = seq_len -| (tokens - retention.sink_tokens);
        }
        if (window_tokens) |tokens| {
            // The newest committed query, at position seq_len - 1, sees seq_len - window and later.
            result.first = @max(result.first, seq_len -| tokens);
        }
        result.sink_end = @min(result.sink_end, result.first);
        return result;
    }
};

test "kept: the newest rows, sinks beside them, and a layer's window" {
    const testing = std.testing;
    const newest: Retention = .{ .tokens = 8, .sink_tokens = 2 };
    try testing.expectEqual(Retention.Kept{ .sink_end = 0, .first = 0 }, newest.kept(null, 6));
    try testing.expectEqual(Retention.Kept{ .sink_end = 2, .first = 4 }, newest.kept(null, 10));
    try testing.expectEqual(Retention.Kept{ .sink_end = 2, .first = 34 }, newest.kept(null, 40));
    try testing.expectEqual(Retention.Kept{ .sink_end = 2, .first = 37 }, newest.kept(3, 40));
    const all: Retention = .{};
    try testing.expectEqual(Retention.Kept{ .sink_end = 0, .first = 0 }, all.kept(null, 1000));
    try testing.expectEqual(Retention.Kept{ .sink_end = 0, .first = 994 }, all.kept(6, 1000));
}

test "validate: sinks are part of the rows that stay" {
    const testing = std.testing;
    try (Retention{}).validate();
    try (Retention{ .tokens = 1 }).validate();
    try testing.expectError(error.InvalidConfig, (Retention{ .tokens = 0 }).validate());
    try testing.expectError(error.InvalidConfig, (Retention{ .tokens = 4, .sink_tokens = 4 }).validate());
    try testing.expectError(error.InvalidConfig, (Retention{ .sink_tokens = 1 }).validate());
}
