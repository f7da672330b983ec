//! Memory of the tests in which each allocation lies beside a page that nobody may read or write: whoever goes one byte too
//! far, or uses memory after it was given back, ends the process.
//!
//!     end:    | unreadable |       | memory | unreadable |
//!     start:  | unreadable | memory |       | unreadable |

const std = @import("std");
const builtin = @import("builtin");
const Allocator = std.mem.Allocator;
const memcheck = @import("build_options").memcheck;

/// Windows protects pages by other means than are written here; valgrind watches every byte by itself.
pub const is_here = builtin.os.tag != .windows and !memcheck;

/// Which end of an allocation the unreadable page touches.
pub const Edge = enum { start, end };

pub fn allocator(edge: Edge) Allocator {
    return .{ .ptr = undefined, .vtable = switch (edge) {
        .start => &At(.start).vtable,
        .end => &At(.end).vtable,
    } };
}

fn At(comptime edge: Edge) type {
    return struct {
        const vtable: Allocator.VTable = .{ .alloc = alloc, .resize = Allocator.noResize, .remap = Allocator.noRemap, .free = free };

        fn alloc(_: *anyopaque, len: usize, alignment: std.mem.Alignment, _: usize) ?[*]u8 {
            const page_bytes = std.heap.pageSize();
            // Where more than the largest page is asked for, as huge pages are, that one is enough.
            const asked = @min(alignment.toByteUnits(), std.heap.page_size_max);
            const usable = std.mem.alignForward(usize, len, page_bytes);
            const spare = asked -| page_bytes;
            const whole = usable + 2 * page_bytes + spare;
            const mapping = std.posix.mmap(null, whole, .{}, .{ .TYPE = .PRIVATE, .ANONYMOUS = true }, -1, 0) catch return null;
            const skipped = std.mem.alignForward(usize, @intFromPtr(mapping.ptr) + page_bytes, asked) - page_bytes - @intFromPtr(mapping.ptr);
            if (skipped != 0) std.posix.munmap(mapping[0..skipped]);
            if (skipped != spare) std.posix.munmap(@alignCast(mapping[skipped + usable + 2 * page_bytes ..]));
            const inner = mapping.ptr + skipped + page_bytes;
            if (std.c.mprotect(@ptrCast(@alignCast(inner)), usable, .{ .READ = true, .WRITE = true }) != 0) {
                std.posix.munmap(mapping);
                return null;
            }
            return switch (edge) {
                .start => inner,
                .end => inner + std.mem.alignBackward(usize, usable - len, asked),
            };
        }

        fn free(_: *anyopaque, memory: []u8, _: std.mem.Alignment, _: usize) void {
            const page_bytes = std.heap.pageSize();
            const usable = std.mem.alignForward(usize, memory.len, page_bytes);
            const first = std.mem.alignBackward(usize, @intFromPtr(memory.ptr), page_bytes) - page_bytes;
            const mapping: [*]align(std.heap.page_size_min) u8 = @ptrFromInt(first);
            std.posix.munmap(mapping[0 .. usable + 2 * page_bytes]);
        }
    };
}

test "the pages beside an allocation are no one's" {
    if (!is_here) return error.SkipZigTest; // said at `is_here`
    const page_bytes = std.heap.pageSize();
    for ([_]Edge{ .start, .end }) |edge| for ([_]usize{ 1, 7, 64, page_bytes, page_bytes + 3 }) |len| {
        const memory = try allocator(edge).alloc(u8, len);
        defer allocator(edge).free(memory);
        @memset(memory, 1);
        const address = @intFromPtr(memory.ptr);
        const border = if (edge == .start) address else address + len;
        try std.testing.expectEqual(0, border % page_bytes);
        // The system itself is asked to read there: it answers and does not end anything.
        const beside: [*]const u8 = @ptrFromInt(if (edge == .start) address - 1 else address + len);
        try std.testing.expect(!try isReadable(beside));
        try std.testing.expect(try isReadable(memory.ptr));
    };
}

/// Can a byte be read? A pipe takes it or refuses its address.
fn isReadable(byte: [*]const u8) !bool {
    var ends: [2]std.c.fd_t = undefined;
    if (std.c.pipe(&ends) != 0) return error.NoPipe;
    defer for (ends) |end| {
        _ = std.c.close(end);
    };
    return std.c.write(ends[1], byte, 1) == 1;
}
