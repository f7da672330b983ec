//! Prefetching: the cache lines that are read next, one by one, evenly over the work before they are read.
//!
//! A core has a few dozen buffers for cache lines in flight. Prefetches in bursts fill them all, and the work stops or the
//! prefetches are dropped; spread out, lines come as fast as memory gives them. So there is one queue of lines, in the
//! order they are read in: loops take a few for each of their steps, and the rest is prefetched between the loops.

const std = @import("std");
const assert = std.debug.assert;
const group = @import("../../group.zig");
const simd = @import("../lanes.zig");
const table = @import("../table.zig");
const Dtype = @import("../../dtype.zig").Dtype;

const line_bytes = simd.cache_line_bytes;

/// The first cache level, from where lines go to the second if they are not used soon. Spread evenly they do not fill the
/// first level's few miss buffers (f16, 8 heads of 128, Zen 5: 32 GB/s, against 26 GB/s into the second level alone; in
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

    /// The same bytes as one row, where there are no gaps between the rows.
    fn joined(stretch: Stretch) Stretch {
        if (stretch.row_bytes != stretch.row_stride) return stretch;
        var one = stretch;
        one.row_bytes *= stretch.row_count;
        one.row_count = 1;
        return one;
    }
};

/// One side of a tile as what is prefetched: a head's stretches of rows, then those of the next head.
pub const Source = struct {
    tile: *const table.TileRuns,
    dtype: Dtype,
    side: group.Side,
    /// Elements of a row: of one head, or of all heads where a token's heads lie side by side.
    row_elements: u32,
    head_stride: u64,
    /// Stretches of a head, and their lines.
    stretch_count: u32,
    line_count: u32,
    /// Stretches of a plane: scales, mins, codes. Unused for rows of floats, where each run is a stretch.
    plane_stretches: [3]Stretch,

    /// The rows of `head_count` heads side by side are taken as those of one.
    pub fn init(source: *Source, tile: *const table.TileRuns, side: group.Side, head_dim: u32, head_count: u32) void {
        const storage = &tile.storage;
        source.tile = tile;
        source.side = side;
        source.row_elements = head_dim * head_count;
        source.dtype = if (side == .keys) storage.dtype_k else storage.dtype_v;
        source.head_stride = if (side == .keys) storage.head_stride_k else storage.head_stride_v;
        assert(head_count >= 1 and head_dim >= 1);
        // Planes of several heads are never one row.
        assert(source.dtype.isFloat() or head_count == 1);
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
            .head_dim = source.row_elements,
        };
        assert(plane.isValid());
        assert(tile_token % table.tile_tokens == 0 and tile_token < plane.block_size);
        if (plane.block_size == table.tile_tokens) {
            source.stretch_count = 1;
            source.plane_stretches[0] = .{ .first = bytes, .row_bytes = plane.bytes(), .row_stride = 0, .row_count = 1 };
            return;
        }
        // In the order they are read in.
        source.plane_stretches[0] = .at(bytes, plane.scaleStretch(tile_token));
        if (plane.dtype.isAffine()) source.plane_stretches[1] = .at(bytes, plane.minStretch(tile_token));
        source.stretch_count = if (plane.dtype.isAffine()) 3 else 2;
        source.plane_stretches[source.stretch_count - 1] = .at(bytes, plane.codeStretch(tile_token));
    }

    /// A stretch of the first head.
    fn stretch(source: *const Source, index: u32) Stretch {
        assert(index < source.stretch_count);
        if (!source.dtype.isFloat()) return source.plane_stretches[index];
        const storage = &source.tile.storage;
        const rows: Stretch = .{
            .first = source.bytesOf(index),
            .row_bytes = @as(u64, source.row_elements) * source.dtype.elementBytes(),
            .row_stride = if (source.side == .keys) storage.token_stride_k else storage.token_stride_v,
            .row_count = source.tile.runs[index].token_count,
        };
        return rows.joined();
    }

    fn bytesOf(source: *const Source, run: usize) [*]const u8 {
        const found = &source.tile.runs[run];
        return if (source.side == .keys) found.keys else found.values;
    }
};

inline fn prefetchLine(line: usize) void {
    @prefetch(@as([*]const u8, @ptrFromInt(line)), first_level);
}

fn linesOf(rows: Stretch) u32 {
    return rows.row_count * @as(u32, @intCast((rows.row_bytes + line_bytes - 1) / line_bytes));
}

/// The lines that are prefetched while something else is at work: some heads of two sources, one after the other.
pub const PrefetchQueue = struct {
    spans: [2]HeadSpan,
    span_next: u32,
    /// Lines of one turn of work.
    share: u32,
    /// Lines of each call of `prefetchSome`.
    pace: u32,
    cursor: Cursor,

    pub const HeadSpan = struct { source: *const Source, head_first: u32, head_count: u32 };

    /// The next line, and the row, stretch and head it is in.
    const Cursor = struct {
        at: usize,
        row_end: usize,
        row_bytes: usize,
        row_stride: usize,
        rows_left: u32,
        /// Index of the stretch within the head.
        stretch: u32,
        /// Bytes from the first head to this one.
        head_offset: u64,
        /// Heads that are left, this one included; 0 when the queue is empty.
        heads_left: u32,

        fn begin(cursor: *Cursor, rows: Stretch) void {
            cursor.at = @intFromPtr(rows.first) + cursor.head_offset;
            cursor.row_end = cursor.at + rows.row_bytes;
            cursor.row_bytes = rows.row_bytes;
            cursor.row_stride = rows.row_stride;
            cursor.rows_left = rows.row_count;
        }
    };

    /// Fills the queue for `turn_count` turns of work.
    pub fn init(queue: *PrefetchQueue, spans: [2]HeadSpan, turn_count: u32) void {
        assert(turn_count >= 1);
        queue.spans = spans;
        queue.span_next = 0;
        queue.share = turn_count - 1;
        for (spans) |span| queue.share += span.source.line_count * span.head_count;
        queue.share /= turn_count;
        queue.pace = 0;
        queue.cursor.at = 0;
        queue.cursor.row_end = 0;
        queue.cursor.heads_left = 0;
    }

    /// Sets the pace of a turn: loops will take `taken_count` of its lines, `call_count` calls of `prefetchSome` the others.
    pub fn plan(queue: *PrefetchQueue, taken_count: u32, call_count: u32) void {
        assert(call_count >= 1);
        queue.pace = (queue.share -| taken_count + call_count - 1) / call_count;
    }

    /// Prefetches a few lines, between the loops.
    pub inline fn prefetchSome(queue: *PrefetchQueue) void {
        for (0..queue.pace) |_| {
            if (queue.takeOfRow(1)) |line| prefetchLine(line);
        }
    }

    /// Lines that a loop prefetches, some in each step.
    pub const Lines = struct {
        at: usize,

        pub inline fn prefetch(lines: *Lines, comptime count: u32) void {
            inline for (0..count) |i| prefetchLine(lines.at + i * line_bytes);
            lines.at += count * line_bytes;
        }
    };

    /// The next lines where it is the turn of a loop: query rows that do not fit the registers together take turns.
    pub inline fn takeIf(queue: *PrefetchQueue, is_turn: bool, count: u32, instead: [*]const u8) Lines {
        return if (is_turn) queue.take(count, instead) else .{ .at = @intFromPtr(instead) };
    }

    /// The next `count` lines, for a loop to prefetch. Where there are none it prefetches those at `instead`, which it reads
    /// itself: they are there. A prefetch takes long where its page is not there, or where its line is in flight already.
    pub inline fn take(queue: *PrefetchQueue, count: u32, instead: [*]const u8) Lines {
        return .{ .at = queue.takeOfRow(count) orelse @intFromPtr(instead) };
    }

    /// The first of the next `count` lines, or null where the row ends before: then they are prefetched at once.
    inline fn takeOfRow(queue: *PrefetchQueue, count: u32) ?usize {
        const cursor = &queue.cursor;
        const at = cursor.at;
        const end = at + count * line_bytes;
        if (end > cursor.row_end) {
            @branchHint(.unlikely);
            queue.prefetchAcross(count);
            return null;
        }
        cursor.at = end;
        return at;
    }

    noinline fn prefetchAcross(queue: *PrefetchQueue, count: u32) void {
        for (0..count) |_| {
            prefetchLine(queue.next() orelse {
                // Nothing is left to look for.
                queue.pace = 0;
                return;
            });
        }
    }

    /// The next line, or null when the queue is empty.
    fn next(queue: *PrefetchQueue) ?usize {
        while (queue.cursor.at >= queue.cursor.row_end) {
            if (!queue.nextRow()) return null;
        }
        defer queue.cursor.at += line_bytes;
        return queue.cursor.at;
    }

    fn nextRow(queue: *PrefetchQueue) bool {
        const cursor = &queue.cursor;
        if (cursor.heads_left == 0) return queue.nextSpan();
        assert(cursor.rows_left != 0);
        cursor.rows_left -= 1;
        if (cursor.rows_left != 0) {
            cursor.at = cursor.row_end - cursor.row_bytes + cursor.row_stride;
            cursor.row_end += cursor.row_stride;
            return true;
        }
        const source = queue.spans[queue.span_next - 1].source;
        cursor.stretch += 1;
        if (cursor.stretch == source.stretch_count) {
            cursor.stretch = 0;
            cursor.heads_left -= 1;
            if (cursor.heads_left == 0) return queue.nextSpan();
            cursor.head_offset += source.head_stride;
        }
        cursor.begin(source.stretch(cursor.stretch));
        return true;
    }

    fn nextSpan(queue: *PrefetchQueue) bool {
        const cursor = &queue.cursor;
        if (queue.span_next == queue.spans.len) return false;
        const span = queue.spans[queue.span_next];
        queue.span_next += 1;
        if (span.source.stretch_count == 0 or span.head_count == 0) return queue.nextSpan();
        cursor.stretch = 0;
        cursor.heads_left = span.head_count;
        cursor.head_offset = if (span.head_first == 0) 0 else span.head_first * span.source.head_stride;
        var rows = span.source.stretch(0);
        if (span.source.stretch_count == 1 and rows.row_count == 1 and rows.row_bytes == span.source.head_stride) {
            // Heads without gaps are one row.
            rows.row_bytes *= span.head_count;
            cursor.heads_left = 1;
        }
        cursor.begin(rows);
        return true;
    }
};

const testing = std.testing;

/// Some heads of one source, and nothing behind them.
fn headsOf(source: *const Source, first: u32, count: u32) [2]PrefetchQueue.HeadSpan {
    return .{
        .{ .source = source, .head_first = first, .head_count = count },
        .{ .source = source, .head_first = 0, .head_count = 0 },
    };
}

/// Every line of `expected` once.
fn expectLines(queue: *PrefetchQueue, expected: []const usize) !void {
    var seen: [4096]bool = @splat(false);
    try testing.expectEqual(expected.len, queue.share);
    for (0..expected.len) |_| {
        const line = queue.next() orelse return error.LineMissing;
        const index = std.mem.indexOfScalar(usize, expected, line) orelse return error.OtherLine;
        try testing.expect(!seen[index]);
        seen[index] = true;
    }
    try testing.expectEqual(null, queue.next());
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

test "PrefetchQueue gives each line of a tile's planes once" {
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
        var queue: PrefetchQueue = undefined;
        queue.init(headsOf(&source, 1, 2), 1);
        try expectLines(&queue, needed.lines[0..needed.count]);
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
    var queue: PrefetchQueue = undefined;
    queue.init(headsOf(&source, 0, 3), 1);
    const line_count = 3 * plane.bytes() / line_bytes;
    try testing.expectEqual(0x10_0000, queue.next());
    queue.plan(0, 1);
    const instead: [*]const u8 = @ptrFromInt(0x20_0000);
    try testing.expectEqual(0x10_0000 + line_bytes, queue.take(line_count - 1, instead).at);
    try testing.expectEqual(line_count, queue.pace);
    try testing.expectEqual(0x20_0000, queue.take(1, instead).at);
    try testing.expectEqual(0, queue.pace);
    try testing.expectEqual(null, queue.next());
}

test "PrefetchQueue gives two sources one after the other, and plans what the loops leave" {
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
    var queue: PrefetchQueue = undefined;
    queue.init(.{ headsOf(&values, 0, 2)[0], headsOf(&keys, 1, 1)[0] }, 1);
    queue.plan(5, 2);
    try testing.expectEqual(4, queue.pace); // of 12 lines
    try expectLines(&queue, &.{
        0x20_0000, 0x20_0040, 0x20_0080, 0x20_00c0,
        0x20_1000, 0x20_1040, 0x20_1080, 0x20_10c0,
        0x10_1000, 0x10_1040, 0x10_1080, 0x10_10c0,
    });
    queue.plan(13, 2);
    try testing.expectEqual(0, queue.pace);
}

test "PrefetchQueue gives each line of rows of floats once" {
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
    var keys: PrefetchQueue = undefined;
    keys.init(headsOf(&source, 0, 1), 1);
    try expectLines(&keys, &.{
        0x10_0000,        0x10_0000 + 64,        0x10_0000 + 128,
        0x10_0000 + 1000, 0x10_0000 + 1000 + 64, 0x10_0000 + 1000 + 128,
        0x11_0000,        0x11_0000 + 64,        0x11_0000 + 128,
    });
    // The head behind it.
    keys.init(headsOf(&source, 1, 1), 1);
    try testing.expectEqual(0x10_1000, keys.next());
    // Two heads side by side: each of two turns has half of the lines.
    source.init(&tile, .values, 40, 2);
    var values: PrefetchQueue = undefined;
    values.init(headsOf(&source, 0, 1), 2);
    try testing.expectEqual(8, values.share);
    values.init(headsOf(&source, 0, 1), 1);
    var expected: [15]usize = undefined;
    for ([_]usize{ 0x20_0000, 0x20_0000 + 512, 0x21_0000 }, 0..) |row, r| {
        for (0..5) |line| expected[r * 5 + line] = row + line * 64;
    }
    try expectLines(&values, &expected);
}

test "PrefetchQueue of no rows gives nothing" {
    const tile: table.TileRuns = .{
        .storage = .{ .dtype_k = .f16, .dtype_v = .f16, .token_stride_k = 2, .token_stride_v = 2, .head_stride_k = 2, .head_stride_v = 2 },
        .runs = undefined,
        .run_count = 0,
    };
    var source: Source = undefined;
    source.init(&tile, .keys, 80, 1);
    var queue: PrefetchQueue = undefined;
    queue.init(headsOf(&source, 0, 1), 1);
    queue.plan(3, 2);
    queue.prefetchSome();
    try testing.expectEqual(0x10_0000, queue.take(2, @ptrFromInt(0x10_0000)).at);
}
