//! The closed list of results that cross the C ABI: 0 is ok, positive is a count or a handle, negative is one of these.
//! A number is never changed and never used again.

const std = @import("std");

pub const Status = enum(i32) {
    ok = 0,
    invalid_config = -1,
    layer_out_of_range = -2,
    sequence_out_of_range = -3,
    position_out_of_range = -4,
    invalid_size = -5,
    not_finite = -6,
    cache_full = -7,
    pool_empty = -8,
    out_of_memory = -9,
    block_too_large = -10,
    commit_mismatch = -11,
    stale_handle = -12,
    /// Given by the TypeScript side alone.
    stale_view = -13,
    unsupported = -14,
    /// Given by nothing yet.
    bad_snapshot = -15,
    /// Given by nothing yet.
    snapshot_mismatch = -16,
    /// Given by nothing yet.
    no_device = -17,
    /// Given by the TypeScript side alone.
    needs_permission = -18,
    /// Given by nothing yet.
    aborted = -19,

    pub fn result(status: Status) i32 {
        return @intFromEnum(status);
    }
};

/// Every error that a body of the ABI can end with.
pub const Error = error{
    InvalidConfig,
    LayerOutOfRange,
    SequenceOutOfRange,
    PositionOutOfRange,
    InvalidSize,
    NotFinite,
    CacheFull,
    PoolEmpty,
    OutOfMemory,
    BlockTooLarge,
    CommitMismatch,
    StaleHandle,
    Unsupported,
};

/// The result word of an error.
pub fn fromError(err: Error) i32 {
    const status: Status = switch (err) {
        error.InvalidConfig => .invalid_config,
        error.LayerOutOfRange => .layer_out_of_range,
        error.SequenceOutOfRange => .sequence_out_of_range,
        error.PositionOutOfRange => .position_out_of_range,
        error.InvalidSize => .invalid_size,
        error.NotFinite => .not_finite,
        error.CacheFull => .cache_full,
        error.PoolEmpty => .pool_empty,
        error.OutOfMemory => .out_of_memory,
        error.BlockTooLarge => .block_too_large,
        error.CommitMismatch => .commit_mismatch,
        error.StaleHandle => .stale_handle,
        error.Unsupported => .unsupported,
    };
    return status.result();
}

/// The result word of a body that answers with a status alone.
pub fn word(outcome: Error!void) i32 {
    outcome catch |err| return fromError(err);
    return 0;
}

/// A count as a result word. Counts that cross are positions, rows or bytes of small records: all fit.
pub fn count(value: anytype) i32 {
    return @intCast(value);
}

test "every status is negative and none is used twice" {
    var seen: [64]bool = @splat(false);
    for (std.enums.values(Status)) |status| {
        if (status == .ok) continue;
        try std.testing.expect(status.result() < 0);
        const index: usize = @intCast(-status.result());
        try std.testing.expect(!seen[index]);
        seen[index] = true;
    }
}
