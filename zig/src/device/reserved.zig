//! What the process has reserved for keys, values and buffers, all of its caches and pools together, and the most it may.
//!
//! Reserved is what was taken of the address space, whole pages: a contiguous cache reserves room for all of its rows when
//! it is made, pools of blocks a slab at a time. So a limit that holds here holds before any page is touched.

const std = @import("std");
const builtin = @import("builtin");
const assert = std.debug.assert;

/// Bytes.
var total_bytes: std.atomic.Value(u64) = .init(0);

const unsettled = 0;
const unlimited = std.math.maxInt(u64);

var bytes_max: std.atomic.Value(u64) = .init(unsettled);

/// Bytes that are reserved now.
pub fn total() u64 {
    return total_bytes.load(.monotonic);
}

/// The most that may be; null for no limit.
pub fn max() ?u64 {
    const known = bytes_max.load(.monotonic);
    return if (known == unsettled or known == unlimited) null else known;
}

/// Settles the limit for the life of the process, null for none: `InvalidConfig` once another one holds. Null is right
/// whatever holds.
pub fn setMax(wanted: ?u64) error{InvalidConfig}!void {
    const limit = wanted orelse unlimited;
    if (limit == unsettled) return error.InvalidConfig;
    const known = bytes_max.cmpxchgStrong(unsettled, limit, .monotonic, .monotonic) orelse return;
    if (wanted != null and known != limit) return error.InvalidConfig;
}

/// Changes the limit, in tests alone. Returns the one before.
pub fn changeMax(limit: u64) u64 {
    comptime assert(builtin.is_test);
    return bytes_max.swap(limit, .monotonic);
}

/// Counts bytes that are about to be reserved.
pub fn take(bytes: u64) error{OutOfMemory}!void {
    const limit = max() orelse unlimited;
    var before = total_bytes.load(.monotonic);
    while (true) {
        if (before > limit or bytes > limit - before) return error.OutOfMemory;
        before = total_bytes.cmpxchgWeak(before, before + bytes, .monotonic, .monotonic) orelse return;
    }
}

/// Bytes that were given back.
pub fn give(bytes: u64) void {
    const before = total_bytes.fetchSub(bytes, .monotonic);
    assert(before >= bytes);
}

const testing = std.testing;

test "the first limit holds, the same one and none are right after it" {
    const before = changeMax(unsettled);
    defer _ = changeMax(before);
    try testing.expectEqual(null, max());
    try testing.expectError(error.InvalidConfig, setMax(0));
    try setMax(1 << 40);
    try setMax(1 << 40);
    try setMax(null);
    try testing.expectError(error.InvalidConfig, setMax(1 << 41));
    try testing.expectEqual(1 << 40, max().?);
    _ = changeMax(unsettled);
    try setMax(null);
    try testing.expectError(error.InvalidConfig, setMax(1 << 40));
    try testing.expectEqual(null, max());
}

test "what would pass the limit is refused and counts nowhere" {
    const held = total();
    const before = changeMax(held + 100);
    defer _ = changeMax(before);
    try take(60);
    try testing.expectError(error.OutOfMemory, take(41));
    try testing.expectError(error.OutOfMemory, take(std.math.maxInt(u64)));
    try testing.expectEqual(held + 60, total());
    try take(40);
    try take(0);
    try testing.expectError(error.OutOfMemory, take(1));
    give(100);
    try testing.expectEqual(held, total());
}
