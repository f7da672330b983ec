//! What all rows of the bench have in common: their shape, how they are printed, and how time is taken.

const std = @import("std");
const kvern = @import("../kvern.zig");

pub const kv_head_count = 8;
pub const ratio = 4;
pub const head_dim = 128;

/// The median of so many is a figure.
pub const repeats = 5;

/// A line of figures.
pub const Row = struct {
    name: []const u8,
    kv: []const u8,
    tokens: u32,
    milliseconds: f64,
    gigabytes_per_second: f64,
    share: f64,
};

/// Where figures go.
pub const Output = struct {
    json: bool,
    writer: *std.Io.Writer,

    pub fn row(out: Output, line: Row) !void {
        if (out.json) {
            try out.writer.print("{{\"bench\":\"{s}\",\"runtime\":\"zig\",\"level\":\"{s}\",\"kv\":\"{s}\",\"tokens\":{d}," ++
                "\"ms\":{d:.4},\"gbps\":{d:.2},\"share\":{d:.3}}}\n", .{
                line.name,         @tagName(kvern.kernels().level), line.kv,    line.tokens,
                line.milliseconds, line.gigabytes_per_second,       line.share,
            });
        } else {
            try out.writer.print("{s:<10} {s:<5} {d:>7} tokens {d:>9.3} ms {d:>7.2} GB/s {d:>6.2}\n", .{
                line.name,  line.kv, line.tokens, line.milliseconds, line.gigabytes_per_second,
                line.share,
            });
        }
        try out.writer.flush();
    }

    /// Instructions of a tile of one head.
    pub fn steps(out: Output, kv: []const u8, instructions: f64) !void {
        const level = @tagName(kvern.kernels().level);
        if (out.json) {
            try out.writer.print("{{\"bench\":\"steps\",\"runtime\":\"zig\",\"level\":\"{s}\",\"kv\":\"{s}\",\"instructions\":{d:.0}}}\n", .{
                level, kv, instructions,
            });
        } else {
            try out.writer.print("{s:<10} {s:<5} {d:>7.0} instructions a tile of a head\n", .{ "steps", kv, instructions });
        }
        try out.writer.flush();
    }

    /// Instructions at one address.
    pub fn address(out: Output, at: usize, instructions: f64) !void {
        try out.writer.print("{x} {d:.2}\n", .{ at, instructions });
        try out.writer.flush();
    }
};

pub fn fail(text: []const u8) noreturn {
    std.debug.print("bench: {s}\n", .{text});
    std.process.exit(2);
}

pub fn seconds(io: std.Io, since: std.Io.Clock.Timestamp) f64 {
    return @as(f64, @floatFromInt(since.untilNow(io).raw.nanoseconds)) / std.time.ns_per_s;
}

pub fn start(io: std.Io) std.Io.Clock.Timestamp {
    return .now(io, .awake);
}

pub fn median(values: []f64) f64 {
    std.mem.sort(f64, values, {}, std.sort.asc(f64));
    return values[values.len / 2];
}

pub fn randomRows(gpa: std.mem.Allocator, count: usize) ![]f32 {
    var prng: std.Random.DefaultPrng = .init(1);
    const rows = try gpa.alloc(f32, count);
    for (rows) |*element| element.* = prng.random().floatNorm(f32);
    return rows;
}

/// Both halves of an array, keys first.
pub fn outputs(stored: []f32) struct { kvern.Output, kvern.Output } {
    const half = stored.len / 2;
    return .{
        .{ .bytes = @ptrCast(stored.ptr), .element_count = half },
        .{ .bytes = @ptrCast(stored[half..].ptr), .element_count = half },
    };
}
