//! How the library ends the process when an assertion fails: it says what failed, and no more.
//!
//! Zig's own handler prints a stack trace, too. The reader of debug information behind it, with the files and the threads
//! that takes, would be half of the library. A Debug build keeps it: `zig build -Doptimize=Debug`.

const std = @import("std");
const builtin = @import("builtin");

/// The panic handler of the root file.
pub const handler = std.debug.FullPanic(if (builtin.mode == .Debug) std.debug.defaultPanic else end);

fn end(message: []const u8, _: ?usize) noreturn {
    @branchHint(.cold);
    for ([_][]const u8{ "kvern: ", message, "\n" }) |part| _ = write(standard_error, part.ptr, @intCast(part.len));
    std.c.abort();
}

const standard_error = 2;

const Length = if (builtin.os.tag == .windows) c_uint else usize;
const write = @extern(*const fn (file: c_int, bytes: [*]const u8, length: Length) callconv(.c) c_int, .{
    .name = if (builtin.os.tag == .windows) "_write" else "write",
});
