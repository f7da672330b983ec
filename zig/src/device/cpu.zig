//! What this process may use of the machine: CPUs and memory, as affinity masks and control groups allow.

const std = @import("std");
const builtin = @import("builtin");

/// The `Io` of a library, which has no `main` to be given one: waiting, waking and clocks, and nothing else. The whole
/// table of `std.Io.Threaded` would link files, networks and processes into the library.
pub fn io() std.Io {
    return .{ .userdata = std.Io.Threaded.global_single_threaded, .vtable = &vtable };
}

const vtable: std.Io.VTable = vtable: {
    const threaded = std.Io.Threaded.global_single_threaded.io().vtable;
    var some = std.Io.failing.vtable.*;
    some.futexWait = threaded.futexWait;
    some.futexWaitUncancelable = threaded.futexWaitUncancelable;
    some.futexWake = threaded.futexWake;
    some.now = threaded.now;
    break :vtable some;
};

/// CPUs this process may run on; at least 1.
pub fn cpuCount() u32 {
    const count = std.Thread.getCpuCount() catch 1;
    return @intCast(@max(1, count));
}

/// Physical cores this process may run on, or as much time as a control group gives it, in whole cores; at least 1. Two
/// threads of one core share its path to memory: attention gains nothing from the second one.
pub fn coreCount() u32 {
    const count = if (builtin.os.tag == .linux) @min(physicalCount(), quotaCount()) else cpuCount();
    return @max(1, count);
}

/// Cores of the affinity mask: of CPUs that are threads of one core the first one counts.
fn physicalCount() u32 {
    const set = std.posix.sched_getaffinity(0) catch return cpuCount();
    var count: u32 = 0;
    for (set, 0..) |word, i| {
        var bits = word;
        while (bits != 0) : (bits &= bits - 1) {
            const index = i * @bitSizeOf(usize) + @ctz(bits);
            count += @intFromBool(isFirstSibling(&set, index));
        }
    }
    return count;
}

/// Is a CPU the first of those of its core that are in the mask? So it is where the system does not say.
fn isFirstSibling(set: *const std.os.linux.cpu_set_t, index: usize) bool {
    var path_buffer: [96]u8 = undefined;
    const path = std.fmt.bufPrintZ(&path_buffer, "/sys/devices/system/cpu/cpu{d}/topology/thread_siblings_list", .{index}) catch
        return true;
    var buffer: [256]u8 = undefined;
    const text = readSystemFile(path, &buffer) orelse return true;
    return (firstListed(std.mem.trim(u8, text, " \n"), set) orelse index) == index;
}

/// The first CPU of a list like "0,4" or "0-1" that is in a mask.
fn firstListed(list: []const u8, set: *const std.os.linux.cpu_set_t) ?usize {
    var ranges = std.mem.tokenizeScalar(u8, list, ',');
    while (ranges.next()) |range| {
        var ends = std.mem.splitScalar(u8, range, '-');
        const first_text = ends.first();
        const first = std.fmt.parseInt(usize, first_text, 10) catch return null;
        const last = std.fmt.parseInt(usize, ends.next() orelse first_text, 10) catch return null;
        for (first..last + 1) |index| {
            const word = index / @bitSizeOf(usize);
            if (word < set.len and set[word] >> @intCast(index % @bitSizeOf(usize)) & 1 == 1) return index;
        }
    }
    return null;
}

/// What a version 2 control group allows, "200000 100000" for 2 cores, or "max".
fn quotaCount() u32 {
    var count: u32 = std.math.maxInt(u32);
    var groups: GroupWalk = .init();
    while (groups.next("cpu.max")) |text| {
        var numbers = std.mem.tokenizeAny(u8, text, " \n");
        const quota = std.fmt.parseInt(u64, numbers.next() orelse continue, 10) catch continue;
        const period = std.fmt.parseInt(u64, numbers.next() orelse continue, 10) catch continue;
        if (period != 0) count = @min(count, std.math.lossyCast(u32, std.math.divCeil(u64, quota, period) catch unreachable));
    }
    return count;
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
    var groups: GroupWalk = .init();
    while (groups.next("memory.max")) |text| limit = @min(limit, parseLimit(text));
    return limit;
}

/// The version 2 group of this process and its ancestors, up to the root: the limit of each of them counts.
const GroupWalk = struct {
    membership: [4096]u8 = undefined,
    text: [64]u8 = undefined,
    /// What is left of the path; null past the root.
    path_bytes: ?usize,
    path_first: usize = 0,

    fn init() GroupWalk {
        var walk: GroupWalk = .{ .path_bytes = null };
        const text = readSystemFile("/proc/self/cgroup", &walk.membership) orelse return walk;
        const path = groupPath(text) orelse return walk;
        walk.path_first = @intFromPtr(path.ptr) - @intFromPtr(text.ptr);
        walk.path_bytes = path.len;
        return walk;
    }

    /// What the file of the next group says; a group that has no such file says "max".
    fn next(walk: *GroupWalk, file_name: []const u8) ?[]const u8 {
        const length = walk.path_bytes orelse return null;
        const path = walk.membership[walk.path_first..][0..length];
        walk.path_bytes = if (length == 0) null else std.mem.lastIndexOfScalar(u8, path, '/') orelse 0;
        var path_buffer: [4096 + 64]u8 = undefined;
        const file = std.fmt.bufPrintZ(&path_buffer, "/sys/fs/cgroup{s}/{s}", .{ path, file_name }) catch return "max";
        return readSystemFile(file, &walk.text) orelse "max";
    }
};

/// The path of the version 2 group ("0::/path") without a trailing slash.
fn groupPath(text: []const u8) ?[]const u8 {
    var lines = std.mem.tokenizeScalar(u8, text, '\n');
    while (lines.next()) |line| {
        if (!std.mem.startsWith(u8, line, "0::/")) continue;
        return std.mem.trimEnd(u8, line["0::".len..], "/");
    }
    return null;
}

/// What a small file of the Linux kernel says, or null where there is none. By system calls: `std.Io.Dir` looks through the
/// path with vectors, which Zig 0.16's own backend gets wrong on CPUs with AVX-512, and a package's user may build with it.
fn readSystemFile(path: [*:0]const u8, buffer: []u8) ?[]const u8 {
    if (builtin.os.tag != .linux) return null;
    const linux = std.os.linux;
    const opened = linux.open(path, .{ .ACCMODE = .RDONLY, .CLOEXEC = true }, 0);
    if (linux.errno(opened) != .SUCCESS) return null;
    const file: linux.fd_t = @intCast(opened);
    defer _ = linux.close(file);
    const length = linux.read(file, buffer.ptr, buffer.len);
    return if (linux.errno(length) == .SUCCESS) buffer[0..length] else null;
}

/// The number in a limit file; a missing one is no limit.
fn readLimit(path: [*:0]const u8) u64 {
    var buffer: [64]u8 = undefined;
    return parseLimit(readSystemFile(path, &buffer) orelse return std.math.maxInt(u64));
}

/// "max" and anything that is no number are no limit.
fn parseLimit(text: []const u8) u64 {
    return std.fmt.parseInt(u64, std.mem.trim(u8, text, " \n"), 10) catch std.math.maxInt(u64);
}

test cpuCount {
    try std.testing.expect(cpuCount() >= 1);
}

test coreCount {
    try std.testing.expect(coreCount() >= 1);
    try std.testing.expect(coreCount() <= cpuCount());
}

test firstListed {
    if (builtin.os.tag != .linux) return error.SkipZigTest;
    var set: std.os.linux.cpu_set_t = @splat(0);
    set[0] = 0b1010;
    try std.testing.expectEqual(1, firstListed("0-1", &set));
    try std.testing.expectEqual(3, firstListed("2,3", &set));
    try std.testing.expectEqual(null, firstListed("0,2", &set));
    try std.testing.expectEqual(null, firstListed("", &set));
}

test parseLimit {
    try std.testing.expectEqual(4096, parseLimit("4096\n"));
    try std.testing.expectEqual(std.math.maxInt(u64), parseLimit("max\n"));
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
