//! Picks the kernel table of this CPU, once, at start. Everything above `kernels/` reaches them through here.

const std = @import("std");
const builtin = @import("builtin");
const assert = std.debug.assert;
const kernel_table = @import("table.zig");

pub const AttendTask = kernel_table.AttendTask;
pub const ConvertTask = kernel_table.ConvertTask;
pub const DequantizeTask = kernel_table.DequantizeTask;
pub const FinishTask = kernel_table.FinishTask;
pub const Level = kernel_table.Level;
pub const QuantizeTask = kernel_table.QuantizeTask;
pub const Row = kernel_table.Row;
pub const Run = kernel_table.Run;
pub const Storage = kernel_table.Storage;
pub const Table = kernel_table.Table;
pub const TileRuns = kernel_table.TileRuns;
pub const lanes_max = kernel_table.lanes_max;
pub const PreparedRow = kernel_table.PreparedRow;
pub const row_count_max = kernel_table.row_count_max;
pub const tile_tokens = kernel_table.tile_tokens;

/// Windows and macOS are not asked for tiles: `build.zig` links the kernels that need them for Linux alone.
const has_amx_kernels = builtin.cpu.arch == .x86_64 and builtin.os.tag == .linux;

/// Linked tables, lowest level first. Each is the export of one compilation of `kernels.zig`.
const linked = switch (builtin.cpu.arch) {
    .x86_64 => struct {
        extern const kvern_kernels_v2: Table;
        extern const kvern_kernels_v3: Table;
        extern const kvern_kernels_avx512: Table;
        extern const kvern_kernels_amx: Table;
        const any_system = [_]*const Table{ &kvern_kernels_v2, &kvern_kernels_v3, &kvern_kernels_avx512 };
        const tables = if (has_amx_kernels) any_system ++ [_]*const Table{&kvern_kernels_amx} else any_system;
    },
    .aarch64 => struct {
        extern const kvern_kernels_neon: Table;
        extern const kvern_kernels_dotprod: Table;
        const tables = [_]*const Table{ &kvern_kernels_neon, &kvern_kernels_dotprod };
    },
    else => @compileError("kvern has kernels for x86_64 and aarch64"),
};

/// The levels in `linked`, in the same order.
const linked_levels = switch (builtin.cpu.arch) {
    .x86_64 => if (has_amx_kernels) [_]Level{ .v2, .v3, .avx512, .amx } else [_]Level{ .v2, .v3, .avx512 },
    .aarch64 => [_]Level{ .neon, .dotprod },
    else => unreachable,
};

/// The table in force, or null before the first use.
var chosen: std.atomic.Value(?*const Table) = .init(null);

/// The kernels of the level in force: the highest this CPU has, unless `setLevel` chose a lower one before. It is the same
/// for the life of the process: equal stored bytes give equal bits on one level, and any thread may be in a call.
pub fn kernels() *const Table {
    return chosen.load(.acquire) orelse choose();
}

fn choose() *const Table {
    @branchHint(.cold);
    var best: ?*const Table = null;
    for (linked_levels) |candidate| best = tableOf(candidate) orelse best;
    // The lowest level is the CPU the rest of the library is compiled for.
    const table = best.?;
    // Two threads may come here at once: both choose the same table.
    _ = chosen.cmpxchgStrong(null, table, .acq_rel, .acquire);
    return chosen.load(.acquire).?;
}

/// The table of a level, or null when this library or this CPU does not have it.
pub fn tableOf(wanted: Level) ?*const Table {
    inline for (linked_levels, linked.tables) |candidate, table| {
        if (candidate == wanted) {
            if (!cpuHas(candidate)) return null;
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
        if (tableOf(candidate) != null) mask |= @as(u32, 1) << @intCast(@intFromEnum(candidate));
    }
    return mask;
}

fn cpuHas(wanted: Level) bool {
    return switch (wanted) {
        .v2, .neon => true,
        .v3 => builtin.cpu.arch == .x86_64 and hasAvx2(),
        .avx512 => builtin.cpu.arch == .x86_64 and hasAvx2() and hasAvx512(),
        .amx => has_amx_kernels and hasAvx2() and hasAvx512() and hasAmx(),
        .dotprod => builtin.cpu.arch == .aarch64 and hasDotprod(),
    };
}

/// SDOT and UDOT of ARMv8.4, optional before.
fn hasDotprod() bool {
    return switch (builtin.os.tag) {
        .linux => std.os.linux.getauxval(std.elf.AT_HWCAP) >> 20 & 1 == 1, // HWCAP_ASIMDDP
        .macos => true, // every Apple CPU for the Mac has them
        else => false,
    };
}

const Cpuid = struct { eax: u32, ebx: u32, ecx: u32, edx: u32 };

fn cpuid(leaf: u32, subleaf: u32) Cpuid {
    var eax: u32 = undefined;
    var ebx: u32 = undefined;
    var ecx: u32 = undefined;
    var edx: u32 = undefined;
    asm volatile ("cpuid"
        : [_] "={eax}" (eax),
          [_] "={ebx}" (ebx),
          [_] "={ecx}" (ecx),
          [_] "={edx}" (edx),
        : [_] "{eax}" (leaf),
          [_] "{ecx}" (subleaf),
    );
    return .{ .eax = eax, .ebx = ebx, .ecx = ecx, .edx = edx };
}

/// The register states the operating system saves (XCR0). Call only when CPUID reports OSXSAVE.
fn xgetbv() u32 {
    return asm volatile (
        \\ xor %%ecx, %%ecx
        \\ xgetbv
        : [_] "={eax}" (-> u32),
        :
        : .{ .edx = true, .ecx = true });
}

fn allSet(word: u32, comptime bits: []const u5) bool {
    comptime var mask: u32 = 0;
    inline for (bits) |bit| mask |= @as(u32, 1) << bit;
    return word & mask == mask;
}

/// All that `x86_64_v3` may emit: AVX2, BMI1, BMI2, F16C, FMA, LZCNT, MOVBE, and YMM saved by the system.
fn hasAvx2() bool {
    if (cpuid(0, 0).eax < 7) return false;
    const leaf1 = cpuid(1, 0);
    // FMA 12, MOVBE 22, XSAVE 26, OSXSAVE 27, AVX 28, F16C 29
    if (!allSet(leaf1.ecx, &.{ 12, 22, 26, 27, 28, 29 })) return false;
    if (!allSet(xgetbv(), &.{ 1, 2 })) return false;
    // BMI1 3, AVX2 5, BMI2 8
    if (!allSet(cpuid(7, 0).ebx, &.{ 3, 5, 8 })) return false;
    if (cpuid(0x8000_0000, 0).eax < 0x8000_0001) return false;
    return allSet(cpuid(0x8000_0001, 0).ecx, &.{5}); // LZCNT
}

/// All that `x86_64_v4` and VNNI may emit: AVX-512 F, DQ, CD, BW, VL, VNNI, and ZMM saved by the system.
fn hasAvx512() bool {
    const leaf7 = cpuid(7, 0);
    // F 16, DQ 17, CD 28, BW 30, VL 31
    if (!allSet(leaf7.ebx, &.{ 16, 17, 28, 30, 31 })) return false;
    if (!allSet(leaf7.ecx, &.{11})) return false; // VNNI
    return allSet(xgetbv(), &.{ 1, 2, 5, 6, 7 });
}

/// AMX with products of bytes and of bf16, tiles saved by the system, and its leave to use them.
fn hasAmx() bool {
    // BF16 22, TILE 24, INT8 25
    if (!allSet(cpuid(7, 0).edx, &.{ 22, 24, 25 })) return false;
    // The configuration of the tiles, and their data.
    return allSet(xgetbv(), &.{ 17, 18 }) and mayUseTiles();
}

/// What Linux said when it was asked whether this process may use tiles.
var tile_answer: std.atomic.Value(enum(u8) { not_asked, no, yes }) = .init(.not_asked);

/// Linux saves tiles only for a process that asked for it once; from then on all its threads may use them, those that are
/// there and those to come, and all their signal stacks must have room for 8 KiB more. So it refuses while one is smaller:
/// the first answer is kept, as a level may not come and go. Kernels before 5.16 know of no such question, and refuse.
fn mayUseTiles() bool {
    if (tile_answer.load(.acquire) == .not_asked) {
        const request_permission = 0x1023; // ARCH_REQ_XCOMP_PERM
        const tile_data = 18;
        const refused = std.os.linux.syscall2(.arch_prctl, request_permission, tile_data);
        // Of two threads that ask at once the first to answer is heard.
        _ = tile_answer.cmpxchgStrong(.not_asked, if (refused == 0) .yes else .no, .acq_rel, .acquire);
    }
    return tile_answer.load(.acquire) == .yes;
}

test {
    _ = @import("attend/attend.zig");
    _ = @import("codec/quantize_test.zig");
    _ = @import("convert.zig");
    _ = @import("exp.zig");
    _ = @import("reference/attention.zig");
    _ = @import("reference/codec.zig");
    _ = float_reference;
}

const testing = std.testing;
const float_reference = @import("reference/float.zig");
const Dtype = @import("../dtype.zig").Dtype;
const memcheck = @import("build_options").memcheck;

const dtypes = [_]Dtype{ .f32, .f16, .bf16 };
const lengths = [_]usize{ 0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 67, 127, 129, 1023 };

/// Every table of this CPU; a kernel test runs on all of them.
fn availableTables(buffer: *[linked_levels.len]*const Table) []const *const Table {
    var count: usize = 0;
    for (linked_levels) |candidate| {
        buffer[count] = tableOf(candidate) orelse continue;
        count += 1;
    }
    return buffer[0..count];
}

test "each level has its own lanes" {
    var buffer: [linked_levels.len]*const Table = undefined;
    const tables = availableTables(&buffer);
    try testing.expect(tables.len >= 1);
    for (tables) |table| {
        const expected: u32 = switch (table.level) {
            .v2, .neon, .dotprod => 4,
            .v3 => 8,
            .avx512, .amx => 16,
        };
        try testing.expectEqual(expected, table.lanes);
        try testing.expect(levelMask() >> @intCast(@intFromEnum(table.level)) & 1 == 1);
    }
    try testing.expectEqual(tables[tables.len - 1], kernels());
}

test "Linux lets a process use tiles or not, for good" {
    if (!has_amx_kernels) return error.SkipZigTest; // no other system asks
    if (memcheck) return error.SkipZigTest; // valgrind stops at the question
    const answer = mayUseTiles();
    for (0..3) |_| try testing.expectEqual(answer, mayUseTiles());
    if (tableOf(.amx) != null) try testing.expect(answer);
}

/// An f32 that is likely to be awkward: ties, denormals of the narrow types, extremes, zeros of both signs.
fn awkward(random: std.Random) f32 {
    return switch (random.uintLessThan(u8, 6)) {
        0 => random.floatNorm(f32),
        1 => @as(f32, @floatFromInt(random.intRangeAtMost(i32, -5000, 5000))) * 0x1p-25, // f16 denormals and their ties
        2 => @bitCast((random.int(u32) & 0xbfff_8000) | 0x8000), // ties of bf16
        3 => @bitCast((@as(u32, random.uintLessThan(u32, 30)) + 113) << 23 | (random.int(u32) & 0x7ff) << 12), // of f16
        4 => if (random.boolean()) 0.0 else -0.0,
        else => 65519.99 * (random.float(f32) * 2 - 1),
    };
}

test "convert equals the reference bit for bit, at every length and alignment" {
    var buffer: [linked_levels.len]*const Table = undefined;
    var prng: std.Random.DefaultPrng = .init(testing.random_seed);
    const random = prng.random();
    var source: [1023 * 4 + 16]u8 = undefined;
    var got: [1023 * 4 + 32]u8 = undefined;
    for (availableTables(&buffer)) |table| for (dtypes) |from| for (dtypes) |to| for (lengths, 0..) |length, i| {
        const shift = i; // 0 to 15
        const in = source[shift..];
        for (0..length) |index| {
            const value: f64 = awkward(random);
            switch (from) {
                .f32 => std.mem.writeInt(u32, in[index * 4 ..][0..4], @bitCast(@as(f32, @floatCast(value))), .little),
                else => std.mem.writeInt(u16, in[index * 2 ..][0..2], float_reference.round16(from, value), .little),
            }
        }
        @memset(&got, 0xaa);
        const out = got[shift..];
        table.convert(&.{
            .destination = out.ptr,
            .destination_dtype = to,
            .source = in.ptr,
            .source_dtype = from,
            .element_count = length,
        });
        for (0..length) |index| {
            const value = float_reference.element(from, in, index);
            if (std.math.isInf(value)) continue;
            switch (to) {
                .f32 => try testing.expectEqual(
                    @as(u32, @bitCast(@as(f32, @floatCast(value)))),
                    std.mem.readInt(u32, out[index * 4 ..][0..4], .little),
                ),
                else => try testing.expectEqual(
                    float_reference.round16(to, value),
                    std.mem.readInt(u16, out[index * 2 ..][0..2], .little),
                ),
            }
        }
        // Nothing is written beside the elements.
        for (got[0..shift]) |byte| try testing.expectEqual(0xaa, byte);
        for (out[length * to.elementBytes() ..]) |byte| try testing.expectEqual(0xaa, byte);
    };
}

test "every f16 and bf16 widens to its value and narrows back to itself" {
    var buffer: [linked_levels.len]*const Table = undefined;
    for (availableTables(&buffer)) |table| for ([_]Dtype{ .f16, .bf16 }) |dtype| {
        var bits: u32 = 0;
        while (bits < 0x1_0000) : (bits += 16) {
            var narrow: [16]u16 = undefined;
            for (&narrow, 0..) |*word, i| word.* = @intCast(bits + i);
            var wide: [16]f32 = undefined;
            table.convert(&.{
                .destination = @ptrCast(&wide),
                .destination_dtype = .f32,
                .source = @ptrCast(&narrow),
                .source_dtype = dtype,
                .element_count = 16,
            });
            var back: [16]u16 = undefined;
            table.convert(&.{
                .destination = @ptrCast(&back),
                .destination_dtype = dtype,
                .source = @ptrCast(&wide),
                .source_dtype = .f32,
                .element_count = 16,
            });
            for (narrow, wide, back, 0..) |word, value, again, i| {
                const truth = float_reference.element(dtype, std.mem.asBytes(&narrow), i);
                if (std.math.isNan(truth)) {
                    try testing.expect(std.math.isNan(value));
                } else {
                    try testing.expectEqual(truth, value);
                    try testing.expectEqual(word, again);
                }
            }
        }
    };
}

test "convert_checked converts rows as convert does, and sees what storable refuses" {
    var buffer: [linked_levels.len]*const Table = undefined;
    var prng: std.Random.DefaultPrng = .init(testing.random_seed);
    const random = prng.random();
    const row_count = 3;
    const gap = 5;
    for (availableTables(&buffer)) |table| for (dtypes) |from| for (dtypes) |to| for ([_]usize{ 1, 7, 16, 40, 67 }) |length| {
        var source: [row_count * (67 * 4 + gap)]u8 = @splat(0xff); // NaN between the rows must not be looked at
        const source_stride = length * from.elementBytes() + gap;
        for (0..row_count) |row| {
            var values: [67]f32 = undefined;
            for (values[0..length]) |*value| value.* = random.floatNorm(f32);
            table.convert(&.{
                .destination = source[row * source_stride ..].ptr,
                .destination_dtype = from,
                .source = @ptrCast(&values),
                .source_dtype = .f32,
                .element_count = length,
            });
        }
        const destination_stride = length * to.elementBytes() + 2 * gap;
        var expected: [row_count * (67 * 4 + 2 * gap)]u8 = @splat(0xaa);
        var got = expected;
        var task: kernel_table.ConvertTask = .{
            .destination = &expected,
            .destination_dtype = to,
            .destination_stride = destination_stride,
            .source = &source,
            .source_dtype = from,
            .source_stride = source_stride,
            .row_count = row_count,
            .element_count = length,
        };
        table.convert(&task);
        task.destination = &got;
        try testing.expectEqual(1, table.convert_checked(&task, .f16));
        try testing.expectEqualSlices(u8, &expected, &got);
        // One bad element, in any row, at any place of it.
        const row = random.uintLessThan(usize, row_count);
        const element = random.uintLessThan(usize, length);
        const place = source[row * source_stride + element * from.elementBytes() ..];
        const good = place[0..4].*;
        switch (from) {
            .f32 => std.mem.writeInt(u32, place[0..4], @bitCast(@as(f32, -65520)), .little),
            .f16 => std.mem.writeInt(u16, place[0..2], 0xfc00, .little),
            else => std.mem.writeInt(u16, place[0..2], 0x4780, .little), // 65536
        }
        try testing.expectEqual(0, table.convert_checked(&task, .f16));
        try testing.expectEqual(@intFromBool(from != .f16), table.convert_checked(&task, .f32));
        @memcpy(place[0..from.elementBytes()], good[0..from.elementBytes()]);
        try testing.expectEqual(1, table.convert_checked(&task, .f16));
    };
}

test "storable refuses NaN, Inf and what would become Inf, wherever it stands" {
    var buffer: [linked_levels.len]*const Table = undefined;
    for (availableTables(&buffer)) |table| for (lengths) |length| {
        var values: [1023]f32 = undefined;
        @memset(&values, -65519.9);
        const bytes: [*]const u8 = @ptrCast(&values);
        for (dtypes) |to| try testing.expectEqual(1, table.storable(bytes, .f32, to, length));
        if (length == 0) continue;
        for ([_]usize{ 0, length / 2, length - 1 }) |at| {
            for ([_]f32{ std.math.nan(f32), std.math.inf(f32), -std.math.inf(f32) }) |bad| {
                values[at] = bad;
                for (dtypes) |to| try testing.expectEqual(0, table.storable(bytes, .f32, to, length));
            }
            values[at] = -65520;
            try testing.expectEqual(0, table.storable(bytes, .f32, .f16, length));
            try testing.expectEqual(1, table.storable(bytes, .f32, .bf16, length));
            values[at] = @bitCast(@as(u32, 0xff7f_8000));
            try testing.expectEqual(0, table.storable(bytes, .f32, .bf16, length));
            try testing.expectEqual(1, table.storable(bytes, .f32, .f32, length));
            values[at] = 0;
        }
    };
    const words = [_]u16{ 0x477f, 0x4780, 0x7f80 };
    const bytes: [*]const u8 = @ptrCast(&words);
    try testing.expectEqual(1, kernels().storable(bytes, .bf16, .f16, 1));
    try testing.expectEqual(0, kernels().storable(bytes, .bf16, .f16, 2));
    try testing.expectEqual(1, kernels().storable(bytes, .bf16, .f32, 2));
    try testing.expectEqual(0, kernels().storable(bytes, .bf16, .f32, 3));
    const half_inf = [_]u16{ 0x7bff, 0xfc00 };
    try testing.expectEqual(1, kernels().storable(@ptrCast(&half_inf), .f16, .f16, 1));
    try testing.expectEqual(0, kernels().storable(@ptrCast(&half_inf), .f16, .f16, 2));
}

test "read folds every word once" {
    var buffer: [linked_levels.len]*const Table = undefined;
    var words: [1536 / 4]u32 = undefined;
    var expected: u32 = 0;
    for (&words, 0..) |*word, i| {
        word.* = @as(u32, @truncate(i)) *% 0x9e37_79b9;
        expected ^= word.*;
    }
    for (availableTables(&buffer)) |table| for ([_]usize{ 0, 512 }) |distance| {
        try testing.expectEqual(expected, table.read(@ptrCast(&words), @sizeOf(@TypeOf(words)), distance));
        try testing.expectEqual(0, table.read(@ptrCast(&words), 0, distance));
    };
}
