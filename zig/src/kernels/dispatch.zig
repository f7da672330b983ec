//! Picks the kernel table of this CPU, once, at start. Everything above `kernels/` reaches them through here.

const std = @import("std");
const builtin = @import("builtin");
const assert = std.debug.assert;
const cpu_features = @import("cpu_features.zig");
const kernel_table = @import("table.zig");

pub const AttendTask = kernel_table.AttendTask;
pub const ConvertTask = kernel_table.ConvertTask;
pub const DequantizeTask = kernel_table.DequantizeTask;
pub const FinishTask = kernel_table.FinishTask;
pub const Level = kernel_table.Level;
pub const QuantizeTask = kernel_table.QuantizeTask;
pub const QueryRow = kernel_table.QueryRow;
pub const Run = kernel_table.Run;
pub const Storage = kernel_table.Storage;
pub const Table = kernel_table.Table;
pub const TileRuns = kernel_table.TileRuns;
pub const head_dim_max = kernel_table.head_dim_max;
pub const lanes_max = kernel_table.lanes_max;
pub const number_max = kernel_table.number_max;
pub const PreparedQuery = kernel_table.PreparedQuery;
pub const query_row_count_max = kernel_table.query_row_count_max;
pub const tile_tokens = kernel_table.tile_tokens;

/// The levels that `build.zig` compiled `kernels.zig` for, lowest first: all those of the architecture, unless a build
/// asked for fewer.
pub const linked_levels = levels: {
    const names = @import("build_options").levels;
    var list: [names.len]Level = undefined;
    for (names, &list) |name, *level| level.* = @field(Level, name);
    for (list[0..list.len -| 1], list[@min(1, list.len)..]) |lower, higher| assert(@intFromEnum(lower) < @intFromEnum(higher));
    break :levels list;
};

/// Their tables, in the same order. Each is the export of one compilation.
const linked_tables = tables: {
    var list: [linked_levels.len]*const Table = undefined;
    for (linked_levels, &list) |level, *table| {
        table.* = @extern(*const Table, .{ .name = "kvern_kernels_" ++ @tagName(level) });
    }
    break :tables list;
};

/// Whether the lowest level is linked, which every CPU of the architecture has that runs the rest of the library.
const fits_every_cpu = linked_levels.len > 0 and switch (linked_levels[0]) {
    .v2, .neon => true,
    else => false,
};

/// The table in force, or null before the first use.
var chosen: std.atomic.Value(?*const Table) = .init(null);

/// The kernels of the level in force: the highest this CPU has, unless `setLevel` chose a lower one before. It is the same
/// for the life of the process: equal stored bytes give equal bits on one level, and any thread may be in a call.
pub fn kernels() *const Table {
    return chosen.load(.acquire) orelse choose().?;
}

/// `Unsupported` where no linked level fits this CPU. Whatever needs kernels calls it first, so `kernels` finds some.
pub fn checkCpu() error{Unsupported}!void {
    if (fits_every_cpu) return;
    if (levelInForce() == null) return error.Unsupported;
}

/// The level in force, null where no linked level fits this CPU.
pub fn levelInForce() ?Level {
    const table = chosen.load(.acquire) orelse choose() orelse return null;
    return table.level;
}

fn choose() ?*const Table {
    @branchHint(.cold);
    var best: ?*const Table = null;
    for (linked_levels) |candidate| best = tableOf(candidate) orelse best;
    const table = best orelse return null;
    // Two threads may come here at once: both choose the same table.
    _ = chosen.cmpxchgStrong(null, table, .acq_rel, .acquire);
    return chosen.load(.acquire).?;
}

/// The table of a level, or null when this library or this CPU does not have it.
pub fn tableOf(wanted: Level) ?*const Table {
    inline for (linked_levels, linked_tables) |candidate, table| {
        if (candidate == wanted) {
            if (!cpu_features.has(candidate)) return null;
            assert(table.level == candidate);
            return table;
        }
    }
    return null;
}

/// Chooses the level, before anything else does: `InvalidConfig` once another one is in force.
pub fn setLevel(wanted: Level) error{ Unsupported, InvalidConfig }!void {
    const table = tableOf(wanted) orelse return error.Unsupported;
    const in_force = chosen.cmpxchgStrong(null, table, .acq_rel, .acquire) orelse return;
    if (in_force != table) return error.InvalidConfig;
}

/// Changes the level, in tests alone, which run all of them in one process.
pub fn changeLevel(wanted: Level) error{Unsupported}!void {
    comptime assert(builtin.is_test);
    chosen.store(tableOf(wanted) orelse return error.Unsupported, .release);
}

test setLevel {
    const in_force = kernels().level;
    for (std.enums.values(Level)) |level| {
        if (tableOf(level) == null) {
            try std.testing.expectError(error.Unsupported, setLevel(level));
        } else if (level == in_force) {
            try setLevel(level);
        } else {
            try std.testing.expectError(error.InvalidConfig, setLevel(level));
        }
        try std.testing.expectEqual(in_force, kernels().level);
    }
}

/// One bit for each level this library and this CPU have: 1 << level.
pub fn levelMask() u32 {
    var mask: u32 = 0;
    for (linked_levels) |candidate| {
        if (tableOf(candidate) != null) mask |= bitOf(candidate);
    }
    return mask;
}

/// One bit for each level this library has kernels for, whatever the CPU.
pub const linked_level_mask = mask: {
    var mask: u32 = 0;
    for (linked_levels) |level| mask |= bitOf(level);
    break :mask mask;
};

fn bitOf(level: Level) u32 {
    return @as(u32, 1) << @intCast(@intFromEnum(level));
}

/// How many levels this library has kernels for, whatever the CPU.
pub const linked_level_count = linked_levels.len;

/// Tables of all levels this CPU has, lowest first: what a test of a kernel runs on.
pub fn availableTables(buffer: *[linked_level_count]*const Table) []const *const Table {
    var count: usize = 0;
    for (linked_levels) |candidate| {
        buffer[count] = tableOf(candidate) orelse continue;
        count += 1;
    }
    return buffer[0..count];
}

test {
    _ = @import("attend/attend.zig");
    _ = @import("codec/quantize_test.zig");
    _ = @import("convert_test.zig");
    _ = @import("exp.zig");
    _ = @import("lanes.zig");
    _ = @import("read_test.zig");
    _ = @import("reference/attention.zig");
    _ = @import("reference/codec.zig");
    _ = @import("reference/float.zig");
    _ = cpu_features;
}

const testing = std.testing;

test "each level has its own lanes" {
    var buffer: [linked_level_count]*const Table = undefined;
    const tables = availableTables(&buffer);
    try testing.expect(tables.len >= 1);
    for (tables) |table| {
        const expected: u32 = switch (table.level) {
            .v2, .neon, .dotprod => 4,
            .v3 => 8,
            .avx512, .amx => 16,
        };
        try testing.expectEqual(expected, table.lanes);
        try testing.expectEqual(expected, table.level.lanes());
        try testing.expect(levelMask() & bitOf(table.level) != 0);
    }
    try testing.expectEqual(tables[tables.len - 1], kernels());
    try testing.expectEqual(kernels().level, levelInForce());
    try testing.expectEqual(levelMask(), levelMask() & linked_level_mask);
    try checkCpu();
}
