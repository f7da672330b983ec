//! Bodies of the exports that are about the library itself: version, level, system facts.

const std = @import("std");
const builtin = @import("builtin");
const bandwidth = @import("../device/bandwidth.zig");
const cpu = @import("../device/cpu.zig");
const dispatch = @import("../kernels/dispatch.zig");
const handle = @import("handle.zig");
const record = @import("record.zig");
const reserved = @import("../device/reserved.zig");
const status = @import("status.zig");
const workers = @import("../device/workers.zig");

/// Raised whenever a symbol or a record changes in a way older callers cannot see past.
const version_number = 6;

pub fn version() callconv(.c) i32 {
    pin();
    return version_number;
}

/// Keeps the library loaded for the life of the process: unloading it with a call in flight crashes both runtimes.
fn pin() void {
    switch (builtin.os.tag) {
        .linux, .macos => {
            var info: DlInfo = undefined;
            if (dladdr(@ptrCast(&version), &info) == 0) return;
            const path = info.file_name orelse return;
            // NODELETE outlives the dlclose below, which only takes our own reference back.
            const library = std.c.dlopen(path, .{ .LAZY = true, .NOLOAD = true, .NODELETE = true }) orelse return;
            _ = std.c.dlclose(library);
        },
        .windows => {
            var module: ?*anyopaque = null;
            const from_address = 4;
            const pin_flag = 1;
            _ = GetModuleHandleExW(from_address | pin_flag, @ptrCast(&version), &module);
        },
        else => @compileError("pin() does not know this system"),
    }
}

const DlInfo = extern struct {
    file_name: ?[*:0]const u8,
    base: ?*anyopaque,
    symbol_name: ?[*:0]const u8,
    symbol_address: ?*anyopaque,
};
extern "c" fn dladdr(address: *const anyopaque, info: *DlInfo) c_int;
extern "kernel32" fn GetModuleHandleExW(flags: u32, address: *const anyopaque, module: *?*anyopaque) callconv(.winapi) i32;

pub const SystemRecord = extern struct {
    size_bytes: u32 = 0,
    /// 0 where the library has no kernels for this CPU.
    level: u32,
    /// One bit for each level that this library and this CPU have: 1 << level.
    levels: u32,
    cpu_count: u32,
    memory_limit_bytes: record.Wide,
    live_handles: u32,
    /// Threads that a call of the calling thread may use, the caller's included.
    thread_count: u32,
    /// Of all caches, pools and buffers together.
    reserved_bytes: record.Wide,
    /// The most they may be; 0 for no limit.
    max_bytes: record.Wide,
    /// One bit for each level the library was built for.
    built_levels: u32,
};

pub fn systemInfo(out: ?[*]u8, out_bytes: u32) callconv(.c) i32 {
    record.write(SystemRecord, out, out_bytes, .{
        .level = if (dispatch.levelInForce()) |level| @intFromEnum(level) else 0,
        .levels = dispatch.levelMask(),
        .cpu_count = cpu.cpuCount(),
        .memory_limit_bytes = .from(cpu.memoryLimit()),
        .live_handles = handle.liveCacheCount(),
        .thread_count = workers.threadCount(),
        .reserved_bytes = .from(reserved.total()),
        .max_bytes = .from(reserved.max() orelse 0),
        .built_levels = dispatch.linked_level_mask,
    }) catch |err| return status.fromError(err);
    return 0;
}

/// (level) -> the level in force. The first call chooses it for the life of the process, with 0 the highest there is;
/// `unsupported` where the CPU or the library lacks it, `invalid_config` where another one is in force.
pub fn levelSet(level: u32) callconv(.c) i32 {
    if (level != 0) {
        const wanted = std.enums.fromInt(dispatch.Level, level) orelse return status.fromError(error.Unsupported);
        dispatch.setLevel(wanted) catch |err| return status.fromError(err);
    }
    const in_force = dispatch.levelInForce() orelse return status.fromError(error.Unsupported);
    return status.count(@intFromEnum(in_force));
}

/// (bytes, 0 for no limit): the most that all caches, pools and buffers of the process may reserve. The first call settles
/// it for the life of the process: `invalid_config` where another limit holds. 0 is right whatever holds.
pub fn maxBytesSet(byte_count: f64) callconv(.c) i32 {
    // Written so that NaN is refused.
    if (!(byte_count >= 0 and byte_count <= 1 << 53 and @floor(byte_count) == byte_count)) {
        return status.fromError(error.InvalidConfig);
    }
    return status.word(reserved.setMax(if (byte_count == 0) null else @intFromFloat(byte_count)));
}

/// MiB that the caches, pools and buffers of the process have reserved, rounded down.
pub fn reservedMib() callconv(.c) i32 {
    return std.math.lossyCast(i32, reserved.total() >> 20);
}

/// Threads that calls of the calling thread may use from now on, the caller's included.
pub fn threadCountSet(count: u32) callconv(.c) i32 {
    workers.setThreadCount(count) catch |err| return status.fromError(err);
    return 0;
}

/// (bytes, thread_count, f64 out, count): R of `device/bandwidth.zig`, in bytes a second.
pub fn readRate(byte_count: f64, thread_count: u32, out: ?[*]u8, out_count: u32) callconv(.c) i32 {
    // Written so that NaN is refused.
    if (!(byte_count >= 0 and byte_count <= 1 << 40)) return status.fromError(error.InvalidConfig);
    const rate = bandwidth.readRate(@intFromFloat(byte_count), thread_count) catch |err| return status.fromError(err);
    record.writeF64(out, out_count, @intFromFloat(rate)) catch |err| return status.fromError(err);
    return 0;
}
