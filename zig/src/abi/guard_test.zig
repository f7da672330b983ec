//! Every export with each of its buffers, and all keys and values, beside a page that nobody may touch, at addresses that
//! are multiples of 4 and at others.

const std = @import("std");
const testing = std.testing;
const every_export = @import("every_export.zig");
const guarded = @import("../device/guarded.zig");
const memory = @import("memory.zig");

fn makeAll(edge: guarded.Edge, shift: usize) !void {
    const replaced = memory.replace(.{ .gpa = memory.system.gpa, .slabs = guarded.allocator(edge) });
    defer _ = memory.replace(replaced);
    for (every_export.calls) |call| {
        errdefer std.debug.print("{s}\n", .{call.name});
        const world: every_export.World = .init();
        defer world.deinit();
        var buffers: every_export.Buffers = .{
            .allocator = guarded.allocator(edge),
            .before = if (edge == .start) shift else 0,
            .behind = if (edge == .end) shift else 0,
        };
        defer buffers.deinit();
        const result = call.make(world, &buffers);
        try testing.expect(result >= 0);
        if (call.free) |free| try testing.expectEqual(0, free(@intCast(result)));
    }
}

test "no export goes past the end of a buffer" {
    if (!guarded.is_here) return error.SkipZigTest; // said there
    for ([_]usize{ 0, 1, 3 }) |shift| try makeAll(.end, shift);
}

test "no export goes before the start of a buffer" {
    if (!guarded.is_here) return error.SkipZigTest; // said there
    for ([_]usize{ 0, 1, 2 }) |shift| try makeAll(.start, shift);
}
