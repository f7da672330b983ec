//! The instructions of AMX that the kernels use, one function for each.
//!
//!     sums[row][lane] += digits[row][0] * codes[0][lane] + ... + digits[row][n] * codes[n][lane]
//!
//! There are 8 tile registers, tmm0 to tmm7, each of up to 16 rows of up to 64 bytes. Their shapes are those of the last
//! `configure`; the CPU faults where they do not fit each other. The number of a tile register is part of an instruction, so
//! it is known at compile time.
//!
//! To the compiler tile registers do not exist: these functions keep their order as all are volatile, and no others may touch
//! them.

const std = @import("std");
const assert = std.debug.assert;
const comptimePrint = std.fmt.comptimePrint;

pub const row_count_max = 16;
pub const row_bytes_max = 64;

/// The number of a tile register, tmm0 to tmm7.
pub const TileRegister = u3;

pub const Shape = struct { row_count: u8, row_bytes: u16 };

/// What `configure` loads: the shape of each tile register.
pub const Config = extern struct {
    /// 1: eight tile registers of up to 1 KiB, the only palette there is.
    palette: u8 = 1,
    /// Not 0 only where a load or store of a tile register was interrupted.
    start_row: u8 = 0,
    reserved_0: [14]u8 = @splat(0),
    row_bytes: [8]u16,
    reserved_1: [8]u16 = @splat(0),
    row_counts: [8]u8,
    reserved_2: [8]u8 = @splat(0),

    pub fn init(shapes: [8]Shape) Config {
        var config: Config = .{ .row_bytes = undefined, .row_counts = undefined };
        for (shapes, &config.row_bytes, &config.row_counts) |shape, *row_bytes, *row_count| {
            assert(shape.row_count >= 1 and shape.row_count <= row_count_max);
            assert(shape.row_bytes >= 1 and shape.row_bytes <= row_bytes_max);
            row_bytes.* = shape.row_bytes;
            row_count.* = shape.row_count;
        }
        return config;
    }
};

comptime {
    assert(@sizeOf(Config) == 64);
    assert(@offsetOf(Config, "row_bytes") == 16 and @offsetOf(Config, "row_counts") == 48);
}

/// Gives the tile registers their shapes, and zeros.
pub inline fn configure(config: *const Config) void {
    asm volatile ("ldtilecfg (%[config])"
        :
        : [config] "r" (config),
        : .{ .memory = true });
}

/// Releases the tile registers: a thread that is interrupted with none in use has 8 KiB less to save.
pub inline fn release() void {
    asm volatile ("tilerelease");
}

pub inline fn zero(comptime register: TileRegister) void {
    asm volatile (comptimePrint("tilezero %%tmm{d}", .{register}));
}

/// The rows of a tile register from memory, `stride` bytes from one to the next.
pub inline fn load(comptime register: TileRegister, source: *const anyopaque, stride: usize) void {
    asm volatile (comptimePrint("tileloadd (%[source],%[stride],1), %%tmm{d}", .{register})
        :
        : [source] "r" (source),
          [stride] "r" (stride),
        : .{ .memory = true });
}

/// The rows of a tile register to memory, `stride` bytes from one to the next.
pub inline fn store(comptime register: TileRegister, destination: *anyopaque, stride: usize) void {
    asm volatile (comptimePrint("tilestored %%tmm{d}, (%[destination],%[stride],1)", .{register})
        :
        : [destination] "r" (destination),
          [stride] "r" (stride),
        : .{ .memory = true });
}

/// Adds to sums of 32 bits, [row][lane], the products of signed bytes, [row][quad][4] and [quad][lane][4].
pub inline fn addProducts(comptime sums: TileRegister, comptime digits: TileRegister, comptime codes: TileRegister) void {
    comptime assert(sums != digits and sums != codes and digits != codes);
    asm volatile (comptimePrint("tdpbssd %%tmm{d}, %%tmm{d}, %%tmm{d}", .{ codes, digits, sums }));
}
