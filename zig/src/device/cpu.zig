//! What this process may use of the machine: CPUs and memory, as affinity masks and control groups allow.

const std = @import("std");
const builtin = @import("builtin");

/// The `Io` of a library, which has no `main` to be given one. It starts no threads.
pub fn io() std.Io {
    return std.Io.Threaded.global_single_threaded.io();
}

/// CPUs this process may run on; at least 1.
pub fn cpuCount() u32 {
    const count = std.Thread.getCpuCount() catch 1;
    return @intCast(@max(1, count));
}

/// Bytes of memory this process may use: the physical memory or, where it is lower, the limit of a control group
/// (version 2, or version 1 as containers mount it). Swap does not count.
pub fn memoryLimit() u64 {
    const physical = std.process.totalSystemMemory() catch std.math.maxInt(u64);
    if (builtin.os.tag != .linux) return physical;
    return @min(physical, groupLimit());
}

fn groupLimit() u64 {
    var limit = readLimit("/sys/fs/cgroup/memory/memory.limit_in_bytes");
    var buffer: [4096]u8 = undefined;
    const text = std.Io.Dir.cwd().readFile(io(), "/proc/self/cgroup", &buffer) catch return limit;
    // The limit of each ancestor counts: walk from the group of this process up to the root.
    var group: []const u8 = groupPath(text) orelse return limit;
    while (true) {
        var path_buffer: [4096 + 64]u8 = undefined;
        const path = std.fmt.bufPrint(&path_buffer, "/sys/fs/cgroup{s}/memory.max", .{group}) catch return limit;
        limit = @min(limit, readLimit(path));
        if (group.len == 0) return limit;
        group = group[0 .. std.mem.lastIndexOfScalar(u8, group, '/') orelse 0];
    }
}

/// The path of the version 2 group ("0::/path") without a trailing slash.
fn groupPath(text: []const u8) ?[]const u8 {
    var lines = std.mem.tokenizeScalar(u8, text, '\n');
    while (lines.next()) |line| {
        if (!std.mem.startsWith(u8, line, "0::/")) continue;
        return std.mem.trimEnd(u8, line["0::".len..], "/");
    }
    return null;
}

/// The number in a limit file; "max", a missing file and anything else are no limit.
fn readLimit(path: []const u8) u64 {
    var buffer: [64]u8 = undefined;
    const text = std.Io.Dir.cwd().readFile(io(), path, &buffer) catch return std.math.maxInt(u64);
    return std.fmt.parseInt(u64, std.mem.trim(u8, text, " \n"), 10) catch std.math.maxInt(u64);
}

test cpuCount {
    try std.testing.expect(cpuCount() >= 1);
}

test memoryLimit {
    const physical = try std.process.totalSystemMemory();
    try std.testing.expect(memoryLimit() <= physical);
    try std.testing.expect(memoryLimit() > 1 << 24);
}

test groupPath {
    try std.testing.expectEqualStrings("/user.slice/a", groupPath("12:cpu:/x\n0::/user.slice/a\n").?);
    try std.testing.expectEqualStrings("", groupPath("0::/\n").?);
    try std.testing.expectEqual(null, groupPath("12:memory:/x\n"));
}
