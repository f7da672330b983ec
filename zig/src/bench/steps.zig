//! Counts the instructions of a call, one by one: on a busy machine a time says little, and this number is always the same.
//!
//! A copy of the process makes the call under the eyes of its parent, which steps through it (Linux on x86_64 alone). An
//! instruction is counted for the function whose address is the last one before it in the symbol table of the program.

const std = @import("std");
const builtin = @import("builtin");
const assert = std.debug.assert;
const linux = std.os.linux;

pub const is_available = builtin.os.tag == .linux and builtin.cpu.arch == .x86_64;

/// Instructions by address.
pub const Counts = struct {
    by_address: std.AutoArrayHashMapUnmanaged(usize, u64) = .empty,
    total: u64 = 0,

    pub fn deinit(counts: *Counts, gpa: std.mem.Allocator) void {
        counts.by_address.deinit(gpa);
    }
};

/// Counts the instructions of `call(context)`, and those of a few lines around it, the same for every call.
pub fn count(gpa: std.mem.Allocator, comptime Context: type, context: Context, comptime call: fn (Context) void) !Counts {
    const child: isize = @bitCast(linux.fork());
    if (child < 0) return error.NoProcess;
    if (child == 0) {
        _ = linux.ptrace(linux.PTRACE.TRACEME, 0, 0, 0, 0);
        _ = linux.kill(linux.getpid(), .STOP);
        call(context);
        linux.exit_group(0);
    }
    const pid: linux.pid_t = @intCast(child);
    var counts: Counts = .{};
    errdefer counts.deinit(gpa);
    var status: u32 = 0;
    _ = linux.waitpid(pid, &status, 0);
    while (linux.W.IFSTOPPED(status)) {
        var address: usize = 0;
        const rip_offset = 16 * @sizeOf(usize);
        if (linux.ptrace(linux.PTRACE.PEEKUSER, pid, rip_offset, @intFromPtr(&address), 0) != 0) return error.NotStopped;
        const entry = try counts.by_address.getOrPutValue(gpa, address, 0);
        entry.value_ptr.* += 1;
        counts.total += 1;
        if (linux.ptrace(linux.PTRACE.SINGLESTEP, pid, 0, 0, 0) != 0) return error.NotStopped;
        _ = linux.waitpid(pid, &status, 0);
    }
    if (!linux.W.IFEXITED(status) or linux.W.EXITSTATUS(status) != 0) return error.CallFailed;
    return counts;
}
