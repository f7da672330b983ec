//! Asks for what the next tile will read, line by line, evenly over the work on the tile before it.
//!
//! A core has a few dozen buffers for lines under way. Asked for in bursts, the lines of a tile fill them all and the work
//! stops; asked for one by one, they come as fast as memory gives them.

const std = @import("std");
const group = @import("../group.zig");
const table = @import("table.zig");
const Dtype = @import("../dtype.zig").Dtype;

const line_bytes = 64;

/// Into the first cache level, from where lines go to the second if they are not used soon. Spread evenly they do not fill
/// the first level's few miss buffers (f16, 8 heads of 128, Zen 5: 32 GB/s, against 26 GB/s into the second level alone; in
/// bursts it was the other way round).
const first_level: std.builtin.PrefetchOptions = .{ .locality = 3 };

/// Rows of bytes at equal distances.
const Stretch = struct {
    first: [*]const u8,
    row_bytes: u32,
    row_stride: u64,
    row_count: u32,
};

/// One side of a tile.
pub const Ahead = struct {
    tile: *const table.TileRuns,
    dtype: Dtype,
    side: group.Side,
    head_dim: u32,
    lines_a_step: u32,
    place: Place,

    /// How far it is. A loop keeps it in registers and gives it back.
    pub const Place = struct {
        at: usize,
        row_end: usize,
        row_bytes: usize,
        row_stride: usize,
        rows_left: u32,
        /// Of the runs whose rows are asked for one after the other, those that are not begun.
        run_next: u32,
        run_end: u32,
        /// From line to line; 0 when all has been asked for.
        line_stride: u32,
    };

    pub fn init(tile: *const table.TileRuns, side: group.Side, head_dim: u32) Ahead {
        return .{
            .tile = tile,
            .dtype = if (side == .keys) tile.storage.dtype_k else tile.storage.dtype_v,
            .side = side,
            .head_dim = head_dim,
            .lines_a_step = 0,
            .place = undefined,
        };
    }

    /// From here on there are `step_count` calls of `step`. Scales and mins are few and asked for at once.
    pub fn spread(ahead: *Ahead, step_count: u32) void {
        if (ahead.tile.run_count == 0 or step_count == 0) return;
        ahead.lines_a_step = (ahead.lineCount() + step_count - 1) / step_count;
        if (!ahead.dtype.isFloat()) ahead.askScales();
        const rows = if (ahead.dtype.isFloat())
            ahead.floatRows()
        else
            codes(ahead.plane(), ahead.bytesOf(0), ahead.tile.storage.tile_token);
        ahead.place = .{
            .at = @intFromPtr(rows.first),
            .row_end = @intFromPtr(rows.first) + rows.row_bytes,
            .row_bytes = rows.row_bytes,
            .row_stride = rows.row_stride,
            .rows_left = rows.row_count,
            .run_next = 1,
            .run_end = if (ahead.dtype.isFloat()) ahead.tile.run_count else 1,
            .line_stride = line_bytes,
        };
    }

    fn lineCount(ahead: *const Ahead) u32 {
        if (!ahead.dtype.isFloat()) return ahead.head_dim / 8 * ahead.dtype.codeBits() * table.tile_tokens / line_bytes;
        var token_count: u32 = 0;
        for (ahead.tile.runs[0..ahead.tile.run_count]) |run| token_count += run.token_count;
        return token_count * ((ahead.head_dim * ahead.dtype.elementBytes() + line_bytes - 1) / line_bytes);
    }

    /// Asks for the next lines. Nothing is called from here: across a call the loops around it would keep none of their
    /// sums in registers (i8, 4 rows, Zen 5: 395 ns for the sums of a tile's values in place of 165).
    pub inline fn step(ahead: *const Ahead, place: *Place) void {
        for (0..ahead.lines_a_step) |_| @prefetch(@as([*]const u8, @ptrFromInt(ahead.next(place))), first_level);
    }

    /// The next line.
    inline fn next(ahead: *const Ahead, place: *Place) usize {
        const line = place.at;
        place.at += place.line_stride;
        if (place.at >= place.row_end) ahead.nextRow(place);
        return line;
    }

    inline fn nextRow(ahead: *const Ahead, place: *Place) void {
        place.rows_left -= 1;
        if (place.rows_left != 0) {
            place.at = place.row_end - place.row_bytes + place.row_stride;
            place.row_end += place.row_stride;
        } else if (place.run_next != place.run_end) {
            const run = &ahead.tile.runs[place.run_next];
            place.run_next += 1;
            place.at = @intFromPtr(if (ahead.side == .keys) run.keys else run.values);
            place.row_end = place.at + place.row_bytes;
            place.rows_left = run.token_count;
        } else {
            // The last line over and over.
            place.at -= line_bytes;
            place.row_end = std.math.maxInt(usize);
            place.line_stride = 0;
        }
    }

    fn floatRows(ahead: *const Ahead) Stretch {
        const tile = ahead.tile;
        return .{
            .first = ahead.bytesOf(0),
            .row_bytes = ahead.head_dim * ahead.dtype.elementBytes(),
            .row_stride = if (ahead.side == .keys) tile.storage.token_stride_k else tile.storage.token_stride_v,
            .row_count = tile.runs[0].token_count,
        };
    }

    fn bytesOf(ahead: *const Ahead, run: u32) [*]const u8 {
        return if (ahead.side == .keys) ahead.tile.runs[run].keys else ahead.tile.runs[run].values;
    }

    fn plane(ahead: *const Ahead) group.Plane {
        return .{
            .dtype = ahead.dtype,
            .side = ahead.side,
            .block_size = ahead.tile.storage.block_size,
            .head_dim = ahead.head_dim,
        };
    }

    fn askScales(ahead: *const Ahead) void {
        const of = ahead.plane();
        const rows = scales(of, ahead.bytesOf(0) + of.codeBytes(), ahead.tile.storage.tile_token);
        askNow(rows);
        if (!of.dtype.isAffine()) return;
        var mins = rows;
        mins.first += of.minOffset() - of.codeBytes();
        askNow(mins);
    }
};

fn askNow(rows: Stretch) void {
    for (0..rows.row_count) |row| {
        var at: u32 = 0;
        while (at < rows.row_bytes) : (at += line_bytes) @prefetch(rows.first + row * rows.row_stride + at, first_level);
    }
}

/// The codes of a tile: keys lie together, values in one stretch for each 16 dims.
fn codes(plane: group.Plane, bytes: [*]const u8, tile_token: u32) Stretch {
    const first = bytes + plane.codePlace(tile_token, 0).byte;
    const tile_bytes = plane.head_dim / 8 * plane.dtype.codeBits() * table.tile_tokens;
    if (plane.side == .keys or plane.block_size == table.tile_tokens) return .{
        .first = first,
        .row_bytes = tile_bytes,
        .row_stride = 0,
        .row_count = 1,
    };
    const lane_groups = plane.head_dim / group.lane_count;
    return .{
        .first = first,
        .row_bytes = tile_bytes / lane_groups,
        .row_stride = plane.codeBytes() / lane_groups,
        .row_count = lane_groups,
    };
}

/// The scales of a tile, which begin at `bytes`, as do those of the plane.
fn scales(plane: group.Plane, bytes: [*]const u8, tile_token: u32) Stretch {
    if (plane.dtype.isAffine() and plane.side == .keys) return .{
        .first = bytes,
        .row_bytes = 2 * plane.head_dim,
        .row_stride = 0,
        .row_count = 1,
    };
    return .{
        .first = bytes + 2 * tile_token,
        .row_bytes = 2 * table.tile_tokens,
        .row_stride = 2 * plane.block_size,
        .row_count = plane.head_dim / plane.groupSize(),
    };
}

const testing = std.testing;

/// Every line of `expected` once, then the last over and over.
fn expectLines(ahead: *Ahead, expected: []const usize) !void {
    var seen: [4096]bool = @splat(false);
    try testing.expectEqual(expected.len, ahead.lineCount());
    ahead.spread(1);
    var place = ahead.place;
    var last: usize = 0;
    for (0..expected.len) |_| {
        last = ahead.next(&place);
        const index = std.mem.indexOfScalar(usize, expected, last) orelse return error.OtherLine;
        try testing.expect(!seen[index]);
        seen[index] = true;
    }
    for (0..100) |_| try testing.expectEqual(last, ahead.next(&place));
}

test "Ahead asks for each line of a tile's codes once" {
    // Nothing at these addresses is read.
    const first = 0x10_0000;
    for ([_]Dtype{ .q8_0, .i4, .i2 }) |dtype| for (std.enums.values(group.Side)) |side| for ([_]u32{ 64, 256 }) |block_size| {
        const plane: group.Plane = .{ .dtype = dtype, .side = side, .block_size = block_size, .head_dim = 96 };
        const run: table.Run = .{ .keys = @ptrFromInt(first), .values = @ptrFromInt(first), .position = 0, .token_count = 1 };
        const tile: table.TileRuns = .{
            .storage = .{
                .dtype_k = dtype,
                .dtype_v = dtype,
                .token_stride_k = undefined,
                .token_stride_v = undefined,
                .block_size = block_size,
                .tile_token = block_size - table.tile_tokens,
            },
            .runs = @ptrCast(&run),
            .run_count = 1,
        };
        var lines: [4096]usize = undefined;
        var count: usize = 0;
        for (0..table.tile_tokens) |token| for (0..plane.head_dim) |dim| {
            const place = plane.codePlace(@intCast(tile.storage.tile_token + token), @intCast(dim));
            const line = first + place.byte / line_bytes * line_bytes;
            if (std.mem.indexOfScalar(usize, lines[0..count], line) != null) continue;
            lines[count] = line;
            count += 1;
        };
        var ahead: Ahead = .init(&tile, side, plane.head_dim);
        try expectLines(&ahead, lines[0..count]);
    };
}

test scales {
    const first = 0x10_0000;
    for ([_]Dtype{ .q4_0, .i8 }) |dtype| for (std.enums.values(group.Side)) |side| for ([_]u32{ 64, 128 }) |block_size| {
        const plane: group.Plane = .{ .dtype = dtype, .side = side, .block_size = block_size, .head_dim = 128 };
        const tile_token = block_size - table.tile_tokens;
        const rows = scales(plane, @ptrFromInt(first), tile_token);
        var asked: [1024]bool = @splat(false);
        for (0..rows.row_count) |row| for (0..rows.row_bytes / 2) |i| {
            asked[(@intFromPtr(rows.first) - first + row * rows.row_stride) / 2 + i] = true;
        };
        var needed: [1024]bool = @splat(false);
        for (0..table.tile_tokens) |token| for (0..plane.head_dim) |dim| {
            needed[plane.scaleIndex(@intCast(tile_token + token), @intCast(dim))] = true;
        };
        try testing.expectEqual(needed, asked);
    };
}

test "Ahead asks for each line of rows of floats once" {
    const runs = [_]table.Run{
        .{ .keys = @ptrFromInt(0x10_0000), .values = @ptrFromInt(0x20_0000), .position = 3, .token_count = 2 },
        .{ .keys = @ptrFromInt(0x11_0000), .values = @ptrFromInt(0x21_0000), .position = 9, .token_count = 1 },
    };
    const tile: table.TileRuns = .{
        .storage = .{ .dtype_k = .f16, .dtype_v = .f32, .token_stride_k = 1000, .token_stride_v = 512 },
        .runs = &runs,
        .run_count = runs.len,
    };
    // 80 elements: 160 bytes are 3 lines, 320 bytes are 5.
    var keys: Ahead = .init(&tile, .keys, 80);
    try expectLines(&keys, &.{
        0x10_0000,        0x10_0000 + 64,        0x10_0000 + 128,
        0x10_0000 + 1000, 0x10_0000 + 1000 + 64, 0x10_0000 + 1000 + 128,
        0x11_0000,        0x11_0000 + 64,        0x11_0000 + 128,
    });
    var values: Ahead = .init(&tile, .values, 80);
    var expected: [15]usize = undefined;
    for ([_]usize{ 0x20_0000, 0x20_0000 + 512, 0x21_0000 }, 0..) |row, r| {
        for (0..5) |line| expected[r * 5 + line] = row + line * 64;
    }
    try expectLines(&values, &expected);
}

test "Ahead of no rows asks for nothing" {
    const tile: table.TileRuns = .{
        .storage = .{ .dtype_k = .f16, .dtype_v = .f16, .token_stride_k = 2, .token_stride_v = 2 },
        .runs = undefined,
        .run_count = 0,
    };
    var ahead: Ahead = .init(&tile, .keys, 80);
    ahead.spread(7);
    try testing.expectEqual(0, ahead.lines_a_step);
    ahead.step(&ahead.place);
}
