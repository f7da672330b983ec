//! Memory that callers hand over: what a call writes must be neither what it reads nor what else it writes. It is told by
//! addresses, as two arrays of a caller may be one memory in ways that only these show.

const std = @import("std");

pub const Error = error{InvalidConfig};

/// Two stretches of memory that have no byte in common.
pub fn checkApart(one: []const u8, other: []const u8) Error!void {
    if (overlaps(one, other)) return error.InvalidConfig;
}

/// Have two stretches of memory a byte in common?
pub fn overlaps(one: []const u8, other: []const u8) bool {
    if (one.len == 0 or other.len == 0) return false;
    const one_first = @intFromPtr(one.ptr);
    const other_first = @intFromPtr(other.ptr);
    return one_first < other_first + other.len and other_first < one_first + one.len;
}

test checkApart {
    const bytes: [8]u8 = @splat(0);
    try checkApart(bytes[0..4], bytes[4..]);
    try checkApart(bytes[4..], bytes[0..4]);
    try checkApart(bytes[0..0], &bytes);
    try checkApart(&bytes, bytes[3..3]);
    const expectError = std.testing.expectError;
    try expectError(error.InvalidConfig, checkApart(bytes[0..5], bytes[4..]));
    try expectError(error.InvalidConfig, checkApart(bytes[4..], bytes[0..5]));
    try expectError(error.InvalidConfig, checkApart(&bytes, bytes[3..4]));
    try expectError(error.InvalidConfig, checkApart(bytes[3..4], &bytes));
}
