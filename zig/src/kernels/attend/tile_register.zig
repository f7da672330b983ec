//! The instructions of AMX that the kernels use, one function for each.
//!
//!     sums[row][lane] += digits[row][0] * codes[0][lane] + ... + digits[row][n] * codes[n][lane]
//!
//! There are 8 tiles, tmm0 to tmm7, each of up to 16 rows of up to 64 bytes: the shapes are those of the last `configure`,
//! and whoever computes with tiles of other shapes than the sum needs is stopped by the CPU. The number of a tile is part
//! of an instruction, so it is known at compile time.
//!
//! To the compiler tiles do not exist: these functions keep their order as all are volatile, and no others may touch tiles.

const std = @import("std");
const assert = std.debug.assert;
const comptimePrint = std.fmt.comptimePrint;

pub const row_count_max = 16;
pub const row_bytes_max = 64;

/// The number of a tile.
pub const Tile = u3;

pub const Shape = struct { row_count: u8, row_bytes: u16 };

/// What `configure` loads: the shape of each tile.
pub const Config = extern struct {
    /// 1: eight tiles of up to 1 KiB, the only palette there is.
    palette: u8 = 1,
    /// Not 0 only where a load or store of a tile was interrupted.
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

/// Gives the tiles their shapes, and zeros.
pub inline fn configure(config: *const Config) void {
    asm volatile ("ldtilecfg (%[config])"
        :
        : [config] "r" (config),
        : .{ .memory = true });
}

/// Gives the tiles back: a thread that is interrupted without tiles in use has 8 KiB less to save.
pub inline fn release() void {
    asm volatile ("tilerelease");
}

pub inline fn zero(comptime tile: Tile) void {
    asm volatile (comptimePrint("tilezero %%tmm{d}", .{tile}));
}

/// The rows of a tile from memory, `stride` bytes from one to the next.
pub inline fn load(comptime tile: Tile, source: *const anyopaque, stride: usize) void {
    asm volatile (comptimePrint("tileloadd (%[source],%[stride],1), %%tmm{d}", .{tile})
        :
        : [source] "r" (source),
          [stride] "r" (stride),
        : .{ .memory = true });
}

/// The rows of a tile to memory, `stride` bytes from one to the next.
pub inline fn store(comptime tile: Tile, destination: *anyopaque, stride: usize) void {
    asm volatile (comptimePrint("tilestored %%tmm{d}, (%[destination],%[stride],1)", .{tile})
        :
        : [destination] "r" (destination),
          [stride] "r" (stride),
        : .{ .memory = true });
}

/// Adds to sums of 32 bits, [row][lane], the products of signed bytes, [row][quad][4] and [quad][lane][4].
pub inline fn addProducts(comptime sums: Tile, comptime digits: Tile, comptime codes: Tile) void {
    comptime assert(sums != digits and sums != codes and digits != codes);
    asm volatile (comptimePrint("tdpbssd %%tmm{d}, %%tmm{d}, %%tmm{d}", .{ codes, digits, sums }));
}
