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
    row_bytes: u64,
    row_stride: u64,
    row_count: u32,

    /// Rows without gaps are one.
    fn joined(stretch: Stretch) Stretch {
        if (stretch.row_bytes != stretch.row_stride) return stretch;
        var one = stretch;
        one.row_bytes *= stretch.row_count;
        one.row_count = 1;
        return one;
    }
};

/// One side of what is read next: a KV head of a tile, or a tile with all heads.
pub const Ahead = struct {
    tile: *const table.TileRuns,
    dtype: Dtype,
    side: group.Side,
    /// Of a row that is asked for whole.
    elements: u32,
    /// From the first head to the one that is meant.
    head_offset: u64,
    /// Lines that are asked for while one head is at work, and those of them that are not asked for or reserved yet.
    share: u32,
    left: u32,
    place: Place,

    /// How far it is. A loop keeps it in registers and gives it back.
    pub const Place = struct {
        at: usize,
        row_end: usize,
        /// From line to line; 0 when all has been asked for.
        line_stride: usize,
        row_bytes: usize,
        row_stride: usize,
        rows_left: u32,
        /// Of the runs whose rows are asked for one after the other, those that are not begun.
        run_next: u32,
        run_end: u32,

        /// One line for ever. It is one that is there: to look for a page that is not takes long.
        fn nothing(line: *const anyopaque) Place {
            return .{
                .at = @intFromPtr(line),
                .row_end = std.math.maxInt(usize),
                .line_stride = 0,
                .row_bytes = 0,
                .row_stride = 0,
                .rows_left = 0,
                .run_next = 0,
                .run_end = 0,
            };
        }

        fn begin(place: *Place, rows: Stretch) void {
            place.at = @intFromPtr(rows.first);
            place.row_end = place.at + rows.row_bytes;
            place.row_bytes = rows.row_bytes;
            place.row_stride = rows.row_stride;
            place.rows_left = rows.row_count;
        }
    };

    /// `head_count` heads at work share what is asked for: one head of the tile, or all of them where they lie side by side.
    pub fn init(
        ahead: *Ahead,
        tile: *const table.TileRuns,
        side: group.Side,
        head_dim: u32,
        head_offset: u64,
        head_count: u32,
    ) void {
        ahead.tile = tile;
        ahead.side = side;
        ahead.elements = head_dim * head_count;
        ahead.head_offset = head_offset;
        ahead.dtype = if (side == .keys) tile.storage.dtype_k else tile.storage.dtype_v;
        ahead.share = 0;
        ahead.left = 0;
        ahead.place = .nothing(tile);
        if (tile.run_count == 0) return;
        ahead.place.line_stride = line_bytes;
        const line_count = if (ahead.dtype.isFloat()) ahead.beginRows() else ahead.beginPlane();
        ahead.share = (line_count + head_count - 1) / head_count;
        ahead.left = ahead.share;
    }

    fn beginRows(ahead: *Ahead) u32 {
        ahead.place.run_next = 1;
        ahead.place.run_end = ahead.tile.run_count;
        ahead.place.begin(ahead.floatRows(0));
        var line_count: u32 = 0;
        for (0..ahead.tile.run_count) |run| line_count += linesOf(ahead.floatRows(run));
        return line_count;
    }

    fn beginPlane(ahead: *Ahead) u32 {
        const of = ahead.plane();
        const bytes = ahead.bytesOf(0);
        // First what is needed first.
        ahead.askScales(of, bytes);
        const rows = codes(of, bytes, ahead.tile.storage.tile_token);
        ahead.place.begin(rows);
        return linesOf(rows);
    }

    /// The next head at work begins.
    pub fn nextHead(ahead: *Ahead) void {
        ahead.left = ahead.share;
    }

    /// Asks for a few lines, as far as they are left.
    pub inline fn ask(ahead: *Ahead, line_count: u32) void {
        const count = @min(line_count, ahead.left);
        ahead.left -= count;
        var place = ahead.place;
        for (0..count) |_| ahead.step(1, &place);
        ahead.place = place;
    }

    /// Calls of `step` will ask for so many of the lines that are left.
    pub fn reserve(ahead: *Ahead, line_count: u32) void {
        ahead.left -|= line_count;
    }

    /// Asks for what is left, as far as it may be asked for at once.
    pub fn askRest(ahead: *Ahead) void {
        ahead.ask(burst_max);
    }

    /// Lines that are asked for at once: more would wait for each other.
    const burst_max = 64;

    fn linesOf(rows: Stretch) u32 {
        return rows.row_count * @as(u32, @intCast((rows.row_bytes + line_bytes - 1) / line_bytes));
    }

    /// Asks for the next lines. Nothing is called from here: across a call the loops around it would keep none of their
    /// sums in registers (i8, 4 rows, Zen 5: 395 ns for the sums of a tile's values in place of 165).
    pub inline fn step(ahead: *const Ahead, comptime line_count: u32, place: *Place) void {
        inline for (0..line_count) |_| @prefetch(@as([*]const u8, @ptrFromInt(ahead.next(place))), first_level);
    }

    /// The next line.
    inline fn next(ahead: *const Ahead, place: *Place) usize {
        const line = place.at;
        place.at += place.line_stride;
        if (place.at >= place.row_end) {
            @branchHint(.unlikely);
            ahead.nextRow(place);
        }
        return line;
    }

    inline fn nextRow(ahead: *const Ahead, place: *Place) void {
        place.rows_left -= 1;
        if (place.rows_left != 0) {
            place.at = place.row_end - place.row_bytes + place.row_stride;
            place.row_end += place.row_stride;
        } else if (place.run_next != place.run_end) {
            const run = place.run_next;
            place.run_next += 1;
            place.begin(ahead.floatRows(run));
        } else {
            // The last line over and over.
            place.at -= line_bytes;
            place.row_end = std.math.maxInt(usize);
            place.line_stride = 0;
        }
    }

    inline fn floatRows(ahead: *const Ahead, run: usize) Stretch {
        const storage = &ahead.tile.storage;
        const rows: Stretch = .{
            .first = ahead.bytesOf(run),
            .row_bytes = @as(u64, ahead.elements) * ahead.dtype.elementBytes(),
            .row_stride = if (ahead.side == .keys) storage.token_stride_k else storage.token_stride_v,
            .row_count = ahead.tile.runs[run].token_count,
        };
        return rows.joined();
    }

    inline fn bytesOf(ahead: *const Ahead, run: usize) [*]const u8 {
        const run_of = &ahead.tile.runs[run];
        return (if (ahead.side == .keys) run_of.keys else run_of.values) + ahead.head_offset;
    }

    fn plane(ahead: *const Ahead) group.Plane {
        return .{
            .dtype = ahead.dtype,
            .side = ahead.side,
            .block_size = ahead.tile.storage.block_size,
            .head_dim = ahead.elements,
        };
    }

    fn askScales(ahead: *const Ahead, of: group.Plane, bytes: [*]const u8) void {
        const rows = scales(of, bytes + of.codeBytes(), ahead.tile.storage.tile_token);
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
    try testing.expectEqual(expected.len, ahead.share);
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
                .head_stride_k = undefined,
                .head_stride_v = undefined,
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
        var ahead: Ahead = undefined;
        ahead.init(&tile, side, plane.head_dim, 0, 1);
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
        .storage = .{ .dtype_k = .f16, .dtype_v = .f32, .token_stride_k = 1000, .token_stride_v = 512, .head_stride_k = 160, .head_stride_v = 320 },
        .runs = &runs,
        .run_count = runs.len,
    };
    // 80 elements: 160 bytes are 3 lines, 320 bytes are 5.
    var keys: Ahead = undefined;
    keys.init(&tile, .keys, 80, 0, 1);
    try expectLines(&keys, &.{
        0x10_0000,        0x10_0000 + 64,        0x10_0000 + 128,
        0x10_0000 + 1000, 0x10_0000 + 1000 + 64, 0x10_0000 + 1000 + 128,
        0x11_0000,        0x11_0000 + 64,        0x11_0000 + 128,
    });
    // The head behind it.
    keys.init(&tile, .keys, 80, 0x1000, 1);
    try testing.expectEqual(0x10_1000, keys.place.at);
    // One of two heads side by side: each of them asks for half of the lines.
    var values: Ahead = undefined;
    values.init(&tile, .values, 40, 0, 2);
    try testing.expectEqual(8, values.share);
    values.init(&tile, .values, 80, 0, 1);
    var expected: [15]usize = undefined;
    for ([_]usize{ 0x20_0000, 0x20_0000 + 512, 0x21_0000 }, 0..) |row, r| {
        for (0..5) |line| expected[r * 5 + line] = row + line * 64;
    }
    try expectLines(&values, &expected);
}

test "Ahead of no rows asks for nothing" {
    const tile: table.TileRuns = .{
        .storage = .{ .dtype_k = .f16, .dtype_v = .f16, .token_stride_k = 2, .token_stride_v = 2, .head_stride_k = 2, .head_stride_v = 2 },
        .runs = undefined,
        .run_count = 0,
    };
    var ahead: Ahead = undefined;
    ahead.init(&tile, .keys, 80, 0, 1);
    ahead.ask(3);
    ahead.reserve(7);
    ahead.askRest();
    ahead.step(2, &ahead.place);
    try testing.expectEqual(@intFromPtr(&tile), ahead.place.at);
}
