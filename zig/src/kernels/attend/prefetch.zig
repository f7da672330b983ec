//! Asks for what will be read next, line by line, evenly over the work before it.
//!
//! A core has a few dozen buffers for lines under way. Asked for in bursts, the lines of a tile fill them all, and the work
//! stops or the lines are forgotten; asked for one by one, they come as fast as memory gives them. So there is one queue
//! of lines, in the order they are read in: loops take a few for each of their steps, and the rest is asked for between
//! the loops.

const std = @import("std");
const group = @import("../../group.zig");
const simd = @import("../lanes.zig");
const table = @import("../table.zig");
const Dtype = @import("../../dtype.zig").Dtype;

const line_bytes = simd.cache_line_bytes;

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

    /// A stretch of the plane at `bytes`.
    fn at(bytes: [*]const u8, of_plane: group.Plane.Stretch) Stretch {
        return .{
            .first = bytes + of_plane.offset,
            .row_bytes = of_plane.row_bytes,
            .row_stride = of_plane.row_stride,
            .row_count = of_plane.row_count,
        };
    }

    /// Rows without gaps are one.
    fn joined(stretch: Stretch) Stretch {
        if (stretch.row_bytes != stretch.row_stride) return stretch;
        var one = stretch;
        one.row_bytes *= stretch.row_count;
        one.row_count = 1;
        return one;
    }
};

/// One side of a tile as what is asked for: a head's stretches of rows, then those of the next head.
pub const Source = struct {
    tile: *const table.TileRuns,
    dtype: Dtype,
    side: group.Side,
    /// Of a row that is asked for whole.
    elements: u32,
    head_stride: u64,
    /// Stretches of a head, and their lines.
    stretch_count: u32,
    line_count: u32,
    /// Those of a plane; of rows of floats each run has one.
    of_plane: [3]Stretch,

    /// `head_count` heads side by side are one.
    pub fn init(source: *Source, tile: *const table.TileRuns, side: group.Side, head_dim: u32, head_count: u32) void {
        const storage = &tile.storage;
        source.tile = tile;
        source.side = side;
        source.elements = head_dim * head_count;
        source.dtype = if (side == .keys) storage.dtype_k else storage.dtype_v;
        source.head_stride = if (side == .keys) storage.head_stride_k else storage.head_stride_v;
        source.stretch_count = 0;
        source.line_count = 0;
        if (tile.run_count == 0) return;
        if (source.dtype.isFloat()) source.stretch_count = tile.run_count else source.setPlane();
        for (0..source.stretch_count) |i| source.line_count += linesOf(source.stretch(@intCast(i)));
    }

    fn setPlane(source: *Source) void {
        const tile_token = source.tile.storage.tile_token;
        const bytes = source.bytesOf(0);
        const plane: group.Plane = .{
            .dtype = source.dtype,
            .side = source.side,
            .block_size = source.tile.storage.block_size,
            .head_dim = source.elements,
        };
        if (plane.block_size == table.tile_tokens) {
            source.stretch_count = 1;
            source.of_plane[0] = .{ .first = bytes, .row_bytes = plane.bytes(), .row_stride = 0, .row_count = 1 };
            return;
        }
        // First what is needed first.
        source.of_plane[0] = .at(bytes, plane.scaleStretch(tile_token));
        if (plane.dtype.isAffine()) source.of_plane[1] = .at(bytes, plane.minStretch(tile_token));
        source.stretch_count = if (plane.dtype.isAffine()) 3 else 2;
        source.of_plane[source.stretch_count - 1] = .at(bytes, plane.codeStretch(tile_token));
    }

    /// Of the first head.
    fn stretch(source: *const Source, index: u32) Stretch {
        if (!source.dtype.isFloat()) return source.of_plane[index];
        const storage = &source.tile.storage;
        const rows: Stretch = .{
            .first = source.bytesOf(index),
            .row_bytes = @as(u64, source.elements) * source.dtype.elementBytes(),
            .row_stride = if (source.side == .keys) storage.token_stride_k else storage.token_stride_v,
            .row_count = source.tile.runs[index].token_count,
        };
        return rows.joined();
    }

    fn bytesOf(source: *const Source, run: usize) [*]const u8 {
        const run_of = &source.tile.runs[run];
        return if (source.side == .keys) run_of.keys else run_of.values;
    }
};

inline fn prefetch(line: usize) void {
    @prefetch(@as([*]const u8, @ptrFromInt(line)), first_level);
}

fn linesOf(rows: Stretch) u32 {
    return rows.row_count * @as(u32, @intCast((rows.row_bytes + line_bytes - 1) / line_bytes));
}

/// What is asked for while something else is at work: some heads of two sources, one after the other.
pub const Ahead = struct {
    parts: [2]Part,
    part_next: u32,
    /// Lines to ask for in one turn of work.
    share: u32,
    /// Lines that each call of `askSome` asks for.
    pace: u32,
    place: Place,

    pub const Part = struct { source: *const Source, head_first: u32, head_count: u32 };

    /// How far it is.
    const Place = struct {
        at: usize,
        row_end: usize,
        row_bytes: usize,
        row_stride: usize,
        rows_left: u32,
        /// Of the head.
        stretch: u32,
        /// From the first head to this one.
        head_offset: u64,
        /// With this one; 0 when all has been asked for.
        heads_left: u32,

        fn begin(place: *Place, rows: Stretch) void {
            place.at = @intFromPtr(rows.first) + place.head_offset;
            place.row_end = place.at + rows.row_bytes;
            place.row_bytes = rows.row_bytes;
            place.row_stride = rows.row_stride;
            place.rows_left = rows.row_count;
        }
    };

    /// For `turn_count` turns of work.
    pub fn init(ahead: *Ahead, parts: [2]Part, turn_count: u32) void {
        ahead.parts = parts;
        ahead.part_next = 0;
        ahead.share = turn_count - 1;
        for (parts) |part| ahead.share += part.source.line_count * part.head_count;
        ahead.share /= turn_count;
        ahead.pace = 0;
        ahead.place.at = 0;
        ahead.place.row_end = 0;
        ahead.place.heads_left = 0;
    }

    /// Of a turn's lines `taken_count` will be taken by loops; the others are left to `ask_count` calls of `askSome`.
    pub fn plan(ahead: *Ahead, taken_count: u32, ask_count: u32) void {
        ahead.pace = (ahead.share -| taken_count + ask_count - 1) / ask_count;
    }

    /// Between the loops.
    pub inline fn askSome(ahead: *Ahead) void {
        for (0..ahead.pace) |_| {
            if (ahead.takeOfRow(1)) |line| prefetch(line);
        }
    }

    /// Lines that a loop asks for, some in each step.
    pub const Lines = struct {
        at: usize,

        pub inline fn ask(lines: *Lines, comptime count: u32) void {
            inline for (0..count) |i| prefetch(lines.at + i * line_bytes);
            lines.at += count * line_bytes;
        }
    };

    /// The next lines where it is the turn of a loop: rows that do not fit the registers together take turns in asking.
    pub inline fn takeIf(ahead: *Ahead, is_turn: bool, count: u32, instead: [*]const u8) Lines {
        return if (is_turn) ahead.take(count, instead) else .{ .at = @intFromPtr(instead) };
    }

    /// The next `count` lines, for a loop to ask for them. Where there are none it asks for those `instead`, which it reads
    /// itself: they are there. To look for a page that is not, or to ask twice for a line that is under way, takes long.
    pub inline fn take(ahead: *Ahead, count: u32, instead: [*]const u8) Lines {
        return .{ .at = ahead.takeOfRow(count) orelse @intFromPtr(instead) };
    }

    /// The first of the next `count` lines. Where a row ends before, they are asked for at once.
    inline fn takeOfRow(ahead: *Ahead, count: u32) ?usize {
        const place = &ahead.place;
        const at = place.at;
        const end = at + count * line_bytes;
        if (end > place.row_end) {
            @branchHint(.unlikely);
            ahead.askAcross(count);
            return null;
        }
        place.at = end;
        return at;
    }

    noinline fn askAcross(ahead: *Ahead, count: u32) void {
        for (0..count) |_| {
            prefetch(ahead.next() orelse {
                // Nothing is left to look for.
                ahead.pace = 0;
                return;
            });
        }
    }

    /// The next line, or null when all have been asked for.
    fn next(ahead: *Ahead) ?usize {
        while (ahead.place.at >= ahead.place.row_end) {
            if (!ahead.nextRow()) return null;
        }
        defer ahead.place.at += line_bytes;
        return ahead.place.at;
    }

    fn nextRow(ahead: *Ahead) bool {
        const place = &ahead.place;
        if (place.heads_left == 0) return ahead.nextPart();
        place.rows_left -= 1;
        if (place.rows_left != 0) {
            place.at = place.row_end - place.row_bytes + place.row_stride;
            place.row_end += place.row_stride;
            return true;
        }
        const source = ahead.parts[ahead.part_next - 1].source;
        place.stretch += 1;
        if (place.stretch == source.stretch_count) {
            place.stretch = 0;
            place.heads_left -= 1;
            if (place.heads_left == 0) return ahead.nextPart();
            place.head_offset += source.head_stride;
        }
        place.begin(source.stretch(place.stretch));
        return true;
    }

    fn nextPart(ahead: *Ahead) bool {
        const place = &ahead.place;
        if (ahead.part_next == ahead.parts.len) return false;
        const part = ahead.parts[ahead.part_next];
        ahead.part_next += 1;
        if (part.source.stretch_count == 0 or part.head_count == 0) return ahead.nextPart();
        place.stretch = 0;
        place.heads_left = part.head_count;
        place.head_offset = if (part.head_first == 0) 0 else part.head_first * part.source.head_stride;
        var rows = part.source.stretch(0);
        if (part.source.stretch_count == 1 and rows.row_count == 1 and rows.row_bytes == part.source.head_stride) {
            // Heads without gaps are one.
            rows.row_bytes *= part.head_count;
            place.heads_left = 1;
        }
        place.begin(rows);
        return true;
    }
};

const testing = std.testing;

/// Some heads of one source, and nothing behind them.
fn headsOf(source: *const Source, first: u32, count: u32) [2]Ahead.Part {
    return .{
        .{ .source = source, .head_first = first, .head_count = count },
        .{ .source = source, .head_first = 0, .head_count = 0 },
    };
}

/// Every line of `expected` once.
fn expectLines(ahead: *Ahead, expected: []const usize) !void {
    var seen: [4096]bool = @splat(false);
    try testing.expectEqual(expected.len, ahead.share);
    for (0..expected.len) |_| {
        const line = ahead.next() orelse return error.LineMissing;
        const index = std.mem.indexOfScalar(usize, expected, line) orelse return error.OtherLine;
        try testing.expect(!seen[index]);
        seen[index] = true;
    }
    try testing.expectEqual(null, ahead.next());
}

/// The lines of some bytes of a plane.
const Needed = struct {
    lines: [4096]usize = undefined,
    count: usize = 0,

    fn add(needed: *Needed, at: usize) void {
        const line = at / line_bytes * line_bytes;
        if (std.mem.indexOfScalar(usize, needed.lines[0..needed.count], line) != null) return;
        needed.lines[needed.count] = line;
        needed.count += 1;
    }
};

test "Ahead asks for each line of a tile's planes once" {
    // Nothing at these addresses is read.
    const first = 0x10_0000;
    const head_stride = 0x8_0000;
    for ([_]Dtype{ .q8_0, .i4, .i2 }) |dtype| for (std.enums.values(group.Side)) |side| for ([_]u32{ 64, 256 }) |block_size| {
        const plane: group.Plane = .{ .dtype = dtype, .side = side, .block_size = block_size, .head_dim = 128 };
        const run: table.Run = .{ .keys = @ptrFromInt(first), .values = @ptrFromInt(first), .position = 0, .token_count = 1 };
        const tile: table.TileRuns = .{
            .storage = .{
                .dtype_k = dtype,
                .dtype_v = dtype,
                .token_stride_k = undefined,
                .token_stride_v = undefined,
                .head_stride_k = head_stride,
                .head_stride_v = head_stride,
                .block_size = block_size,
                .tile_token = block_size - table.tile_tokens,
            },
            .runs = @ptrCast(&run),
            .run_count = 1,
        };
        var needed: Needed = .{};
        for (1..3) |head| for (0..table.tile_tokens) |token| for (0..plane.head_dim) |dim| {
            const bytes = first + head * head_stride;
            const at: u32 = @intCast(tile.storage.tile_token + token);
            needed.add(bytes + plane.codePlace(at, @intCast(dim)).byte);
            needed.add(bytes + plane.scaleOffset(at, @intCast(dim)));
            if (dtype.isAffine()) needed.add(bytes + plane.minOffset(at, @intCast(dim)));
        };
        var source: Source = undefined;
        source.init(&tile, side, plane.head_dim, 1);
        var ahead: Ahead = undefined;
        ahead.init(headsOf(&source, 1, 2), 1);
        try expectLines(&ahead, needed.lines[0..needed.count]);
    };
}

test "Heads without gaps are one row" {
    const plane: group.Plane = .{ .dtype = .i8, .side = .keys, .block_size = table.tile_tokens, .head_dim = 32 };
    const run: table.Run = .{ .keys = @ptrFromInt(0x10_0000), .values = @ptrFromInt(0x10_0000), .position = 0, .token_count = 1 };
    const tile: table.TileRuns = .{
        .storage = .{
            .dtype_k = .i8,
            .dtype_v = .i8,
            .token_stride_k = undefined,
            .token_stride_v = undefined,
            .head_stride_k = plane.bytes(),
            .head_stride_v = plane.bytes(),
            .block_size = plane.block_size,
        },
        .runs = @ptrCast(&run),
        .run_count = 1,
    };
    var source: Source = undefined;
    source.init(&tile, .keys, plane.head_dim, 1);
    var ahead: Ahead = undefined;
    ahead.init(headsOf(&source, 0, 3), 1);
    const line_count = 3 * plane.bytes() / line_bytes;
    try testing.expectEqual(0x10_0000, ahead.next());
    ahead.plan(0, 1);
    const instead: [*]const u8 = @ptrFromInt(0x20_0000);
    try testing.expectEqual(0x10_0000 + line_bytes, ahead.take(line_count - 1, instead).at);
    try testing.expectEqual(line_count, ahead.pace);
    try testing.expectEqual(0x20_0000, ahead.take(1, instead).at);
    try testing.expectEqual(0, ahead.pace);
    try testing.expectEqual(null, ahead.next());
}

test "Ahead asks for two sources one after the other, and plans what is left to ask for" {
    const run: table.Run = .{ .keys = @ptrFromInt(0x10_0000), .values = @ptrFromInt(0x20_0000), .position = 0, .token_count = 2 };
    const tile: table.TileRuns = .{
        .storage = .{
            .dtype_k = .f32,
            .dtype_v = .f32,
            .token_stride_k = 128,
            .token_stride_v = 128,
            .head_stride_k = 0x1000,
            .head_stride_v = 0x1000,
        },
        .runs = @ptrCast(&run),
        .run_count = 1,
    };
    var keys: Source = undefined;
    keys.init(&tile, .keys, 32, 1);
    var values: Source = undefined;
    values.init(&tile, .values, 32, 1);
    var ahead: Ahead = undefined;
    ahead.init(.{ headsOf(&values, 0, 2)[0], headsOf(&keys, 1, 1)[0] }, 1);
    ahead.plan(5, 2);
    try testing.expectEqual(4, ahead.pace); // of 12 lines
    try expectLines(&ahead, &.{
        0x20_0000, 0x20_0040, 0x20_0080, 0x20_00c0,
        0x20_1000, 0x20_1040, 0x20_1080, 0x20_10c0,
        0x10_1000, 0x10_1040, 0x10_1080, 0x10_10c0,
    });
    ahead.plan(13, 2);
    try testing.expectEqual(0, ahead.pace);
}

test "Ahead asks for each line of rows of floats once" {
    const runs = [_]table.Run{
        .{ .keys = @ptrFromInt(0x10_0000), .values = @ptrFromInt(0x20_0000), .position = 3, .token_count = 2 },
        .{ .keys = @ptrFromInt(0x11_0000), .values = @ptrFromInt(0x21_0000), .position = 9, .token_count = 1 },
    };
    const tile: table.TileRuns = .{
        .storage = .{ .dtype_k = .f16, .dtype_v = .f32, .token_stride_k = 1000, .token_stride_v = 512, .head_stride_k = 0x1000, .head_stride_v = 0x1000 },
        .runs = &runs,
        .run_count = runs.len,
    };
    // 80 elements: 160 bytes are 3 lines, 320 bytes are 5.
    var source: Source = undefined;
    source.init(&tile, .keys, 80, 1);
    var keys: Ahead = undefined;
    keys.init(headsOf(&source, 0, 1), 1);
    try expectLines(&keys, &.{
        0x10_0000,        0x10_0000 + 64,        0x10_0000 + 128,
        0x10_0000 + 1000, 0x10_0000 + 1000 + 64, 0x10_0000 + 1000 + 128,
        0x11_0000,        0x11_0000 + 64,        0x11_0000 + 128,
    });
    // The head behind it.
    keys.init(headsOf(&source, 1, 1), 1);
    try testing.expectEqual(0x10_1000, keys.next());
    // Two heads side by side: each of two turns asks for half of the lines.
    source.init(&tile, .values, 40, 2);
    var values: Ahead = undefined;
    values.init(headsOf(&source, 0, 1), 2);
    try testing.expectEqual(8, values.share);
    values.init(headsOf(&source, 0, 1), 1);
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
    var source: Source = undefined;
    source.init(&tile, .keys, 80, 1);
    var ahead: Ahead = undefined;
    ahead.init(headsOf(&source, 0, 1), 1);
    ahead.plan(3, 2);
    ahead.askSome();
    try testing.expectEqual(0x10_0000, ahead.take(2, @ptrFromInt(0x10_0000)).at);
}
