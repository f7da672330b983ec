//! Reading memory, on every level.

const std = @import("std");
const testing = std.testing;
const dispatch = @import("dispatch.zig");

test "read folds every word once" {
    var buffer: [dispatch.linked_level_count]*const dispatch.Table = undefined;
    var words: [1536 / 4]u32 = undefined;
    var expected: u32 = 0;
    for (&words, 0..) |*word, i| {
        word.* = @as(u32, @truncate(i)) *% 0x9e37_79b9;
        expected ^= word.*;
    }
    for (dispatch.availableTables(&buffer)) |table| for ([_]usize{ 0, 512 }) |distance| {
        try testing.expectEqual(expected, table.read(@ptrCast(&words), @sizeOf(@TypeOf(words)), distance));
        try testing.expectEqual(0, table.read(@ptrCast(&words), 0, distance));
    };
}
