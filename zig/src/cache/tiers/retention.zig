//! Retention: which rows of a sequence are seen, and which stay so that it can be rewound.
//!
//!     0        sink_end                oldest        first              seq_len
//!     | sinks  |  let go, by block     |  unseen     |  the newest rows |
//!
//! A row keeps its position for ever. Nobody sees a row before `first` that is no sink. The `rewind_tokens` rows before it
//! stay in their blocks all the same: a sequence that is rewound by as many shows what it showed when it was that long.

const std = @import("std");
const assert = std.debug.assert;

/// The rows of each sequence that a cache keeps after a commit.
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

    /// Rows that stay beside the sinks, the newest ones; null for all.
    pub fn newestTokens(retention: Retention) ?u32 {
        const tokens = retention.tokens orelse return null;
        assert(retention.sink_tokens < tokens);
        return tokens - retention.sink_tokens;
    }

    /// The same in a layer that sees `window_tokens` of the newest rows, or all.
    pub fn newestTokensOf(retention: Retention, window_tokens: ?u32) ?u32 {
        const newest = retention.newestTokens() orelse return window_tokens;
        // The newest committed query, at position seq_len - 1, sees seq_len - window and later.
        return @min(newest, window_tokens orelse newest);
    }

    /// Rows that are seen: [0, sink_end) and [first, seq_len). Both are 0 where all are.
    pub const Kept = struct { sink_end: u32, first: u32 };

    /// The rows that are seen at `seq_len` of a layer that sees `window_tokens` of the newest rows, or all.
    pub fn kept(retention: Retention, window_tokens: ?u32, seq_len: u32) Kept {
        const newest = retention.newestTokensOf(window_tokens) orelse return .{ .sink_end = 0, .first = 0 };
        const first = seq_len -| newest;
        if (first <= retention.sink_tokens) return .{ .sink_end = 0, .first = 0 };
        assert(first <= seq_len);
        return .{ .sink_end = retention.sink_tokens, .first = first };
    }

    /// The oldest row beside the sinks that stays at `seq_len`, with `rewind_tokens` that are not seen; 0 where all do.
    pub fn oldest(retention: Retention, window_tokens: ?u32, seq_len: u32, rewind_tokens: u32) u32 {
        const position = retention.kept(window_tokens, seq_len).first -| rewind_tokens;
        return if (position <= retention.sink_tokens) 0 else position;
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

test "kept: nothing is hidden before a row behind the sinks is" {
    const testing = std.testing;
    const newest: Retention = .{ .tokens = 8, .sink_tokens = 2 };
    for (0..9) |seq_len| {
        try testing.expectEqual(Retention.Kept{ .sink_end = 0, .first = 0 }, newest.kept(null, @intCast(seq_len)));
    }
    try testing.expectEqual(Retention.Kept{ .sink_end = 2, .first = 3 }, newest.kept(null, 9));
    try testing.expectEqual(Retention.Kept{ .sink_end = 2, .first = 3 }, newest.kept(1, 4));
}

test "oldest: rows to rewind to stay before the first that is seen, and sinks are none of them" {
    const testing = std.testing;
    const all: Retention = .{};
    try testing.expectEqual(0, all.oldest(null, 1000, 0));
    try testing.expectEqual(84, all.oldest(16, 100, 0));
    try testing.expectEqual(79, all.oldest(16, 100, 5));
    try testing.expectEqual(1, all.oldest(16, 100, 83));
    try testing.expectEqual(0, all.oldest(16, 100, 84));
    try testing.expectEqual(0, all.oldest(16, 100, std.math.maxInt(u32)));
    const newest: Retention = .{ .tokens = 8, .sink_tokens = 2 };
    try testing.expectEqual(3, newest.oldest(null, 13, 4));
    try testing.expectEqual(0, newest.oldest(null, 12, 4)); // of rows 2 to 5, all that are hidden, none has been let go
    try testing.expectEqual(33, newest.oldest(3, 40, 4));
}

test "validate: sinks are part of the rows that stay" {
    const testing = std.testing;
    try (Retention{}).validate();
    try (Retention{ .tokens = 1 }).validate();
    try testing.expectError(error.InvalidConfig, (Retention{ .tokens = 0 }).validate());
    try testing.expectError(error.InvalidConfig, (Retention{ .tokens = 4, .sink_tokens = 4 }).validate());
    try testing.expectError(error.InvalidConfig, (Retention{ .sink_tokens = 1 }).validate());
}
