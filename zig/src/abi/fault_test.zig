//! Every export with memory that fails: each allocation of a call by itself, and each with all that follow it. The call is
//! refused or does without, nothing has changed where it is refused, nothing is lost, and the same call works afterwards.

const std = @import("std");
const testing = std.testing;
const Allocator = std.mem.Allocator;
const every_export = @import("every_export.zig");
const handle = @import("handle.zig");
const memcheck = @import("build_options").memcheck;
const memory = @import("memory.zig");
const reserved = @import("../device/reserved.zig");
const Status = @import("status.zig").Status;

/// Passes calls on, counts what is out, and fails when it is told to.
const Faults = struct {
    /// Allocations until the one that fails; null for none.
    until: ?usize = null,
    /// Those behind it fail, too.
    lasts: bool = false,
    failed_count: usize = 0,
    out_count: isize = 0,

    fn arm(faults: *Faults, until: ?usize, lasts: bool) void {
        faults.until = until;
        faults.lasts = lasts;
        faults.failed_count = 0;
    }

    fn fails(faults: *Faults) bool {
        const until = if (faults.until) |*until| until else return false;
        if (until.* > 0) {
            until.* -= 1;
            return false;
        }
        if (!faults.lasts) faults.until = null;
        faults.failed_count += 1;
        return true;
    }

    /// The memory of the library in the place of which this is put.
    fn memoryOf(faults: *Faults) memory.Memory {
        return .{ .gpa = faults.over("gpa"), .slabs = faults.over("slabs") };
    }

    fn over(faults: *Faults, comptime field: []const u8) Allocator {
        const under = @field(memory.system, field);
        const to = struct {
            fn of(pointer: *anyopaque) *Faults {
                return @ptrCast(@alignCast(pointer));
            }
            fn alloc(pointer: *anyopaque, len: usize, alignment: std.mem.Alignment, address: usize) ?[*]u8 {
                if (of(pointer).fails()) return null;
                const made = under.rawAlloc(len, alignment, address) orelse return null;
                of(pointer).out_count += 1;
                return made;
            }
            fn resize(pointer: *anyopaque, old: []u8, alignment: std.mem.Alignment, len: usize, address: usize) bool {
                if (len > old.len and of(pointer).fails()) return false;
                return under.rawResize(old, alignment, len, address);
            }
            fn remap(_: *anyopaque, _: []u8, _: std.mem.Alignment, _: usize, _: usize) ?[*]u8 {
                return null; // then memory is allocated anew, which may fail
            }
            fn free(pointer: *anyopaque, old: []u8, alignment: std.mem.Alignment, address: usize) void {
                of(pointer).out_count -= 1;
                under.rawFree(old, alignment, address);
            }
        };
        return .{ .ptr = faults, .vtable = &.{ .alloc = to.alloc, .resize = to.resize, .remap = to.remap, .free = to.free } };
    }
};

/// Makes a call whose allocation number `until` fails. True when there was one.
fn makeWithFault(faults: *Faults, call: every_export.Call, until: usize, lasts: bool) !bool {
    const world: every_export.World = .init();
    defer world.deinit();
    var buffers: every_export.Buffers = .{ .allocator = testing.allocator };
    defer buffers.deinit();
    const before = world.digest();
    faults.arm(until, lasts);
    const result = call.make(world, &buffers);
    const failed = faults.failed_count != 0;
    faults.arm(null, false);
    if (result >= 0) {
        if (call.free) |free| try testing.expectEqual(0, free(@intCast(result)));
        return failed;
    }
    try testing.expect(failed);
    try testing.expectEqual(Status.out_of_memory.result(), result);
    try testing.expectEqual(before, world.digest());
    const again = call.make(world, &buffers);
    try testing.expect(again >= 0);
    if (call.free) |free| try testing.expectEqual(0, free(@intCast(again)));
    return true;
}

test "every export without memory is refused or does without, changes nothing and loses nothing" {
    if (memcheck) return error.SkipZigTest; // hundreds of worlds, thirty times as slow; no more is read or written here
    var faults: Faults = .{};
    const replaced = memory.replace(faults.memoryOf());
    defer _ = memory.replace(replaced);
    const live_count = handle.liveCacheCount();
    const reserved_bytes = reserved.total();
    // The table of handles stays for ever: it is there from now on, larger or smaller.
    every_export.World.init().deinit();
    const out_count = faults.out_count;
    var fault_count: usize = 0;
    for (every_export.calls) |call| for ([_]bool{ false, true }) |lasts| {
        var until: usize = 0;
        errdefer std.debug.print("{s}: allocation {}, {s}\n", .{ call.name, until, if (lasts) "and all behind it" else "alone" });
        while (try makeWithFault(&faults, call, until, lasts)) : (until += 1) fault_count += 1;
        try testing.expectEqual(out_count, faults.out_count);
        try testing.expectEqual(live_count, handle.liveCacheCount());
        try testing.expectEqual(reserved_bytes, reserved.total());
    };
    // As many as there are, about: a list of calls without any would pass, too.
    try testing.expect(fault_count > 100);
}
