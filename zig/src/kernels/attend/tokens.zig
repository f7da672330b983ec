//! A tile at work: which token stands in which slot, and the scores between the passes.

const std = @import("std");
const assert = std.debug.assert;
const table = @import("../table.zig");
const digits_of = @import("digits.zig");
const Ahead = @import("prefetch.zig").Ahead;
const Source = @import("prefetch.zig").Source;
const tile_tokens = table.tile_tokens;
const head_dim_max = table.head_dim_max;
const row_count_max = table.row_count_max;

/// The tokens of a tile, slot by slot, with the rows of one KV head.
///
/// Where both sides are floats the slots are the tokens that are there, one after the other. A plane of codes has its
/// tokens where they are: then slot i is the tile's position i, all 64 are computed, and those that nobody may see are
/// hidden by their position.
pub const TileRows = struct {
    tile: *const table.TileRuns,
    token_count: u32,
    /// The first and the last position that is not hidden.
    position_first: u32,
    position_last: u32,
    /// No token of the 64 is missing or hidden.
    is_whole: bool,
    has_positions: bool,
    /// Absolute position of each token; behind the last one it repeats. See `setPositions`.
    positions: [tile_tokens]u32,
    /// Rows of float sides, those of the first head.
    keys: [tile_tokens][*]const u8,
    values: [tile_tokens][*]const u8,
    /// From the first head to the one at work.
    offset_k: u64,
    offset_v: u64,

    /// No position is this one: every row's end is at most this, and no tree reaches it.
    pub const hidden = std.math.maxInt(u32);

    /// Tokens whose float keys are taken together: rows are repeated until whole blocks of them can be read.
    pub const token_block = 4;

    /// All 64 are there and the row sees them all, by its window and its tree.
    pub inline fn isSeenBy(rows: *const TileRows, row: *const table.Row) bool {
        return rows.is_whole and rows.position_first >= row.first and rows.position_last < row.end and
            rows.position_last < row.tree_first;
    }

    /// Of a tile with runs.
    pub fn fill(rows: *TileRows, tile: *const table.TileRuns) void {
        const last_run = tile.runs[tile.run_count - 1];
        rows.tile = tile;
        rows.position_first = tile.runs[0].position;
        rows.position_last = last_run.position + last_run.token_count - 1;
        assert(rows.position_first / tile_tokens == rows.position_last / tile_tokens);
        rows.has_positions = false;
        var seen: u32 = 0;
        for (tile.runs[0..tile.run_count]) |run| seen += run.token_count;
        rows.is_whole = seen == tile_tokens;
        rows.token_count = if (tile.storage.isFloat()) seen else tile_tokens;
        if (tile.storage.dtype_k.isFloat()) rows.fillSide(&rows.keys, "keys", tile.storage.token_stride_k);
        if (tile.storage.dtype_v.isFloat()) rows.fillSide(&rows.values, "values", tile.storage.token_stride_v);
    }

    fn fillSide(
        rows: *const TileRows,
        slots: *[tile_tokens][*]const u8,
        comptime side: []const u8,
        stride: u64,
    ) void {
        // A slot without a token is read like any other, and weighs nothing.
        if (!rows.is_whole) slots.* = @splat(@field(rows.tile.runs[0], side));
        var each: SlotIterator = .{ .rows = rows };
        while (each.next()) |slot| {
            for (slots[slot.first..][0..slot.run.token_count], 0..) |*row, i| row.* = @field(slot.run, side) + i * stride;
        }
    }

    /// The runs, and in which slots they stand.
    const SlotIterator = struct {
        rows: *const TileRows,
        index: u32 = 0,
        packed_first: u32 = 0,

        fn next(each: *SlotIterator) ?struct { run: table.Run, first: u32 } {
            const tile = each.rows.tile;
            if (each.index == tile.run_count) return null;
            const run = tile.runs[each.index];
            const first = if (tile.storage.isFloat()) each.packed_first else run.position % tile_tokens;
            each.index += 1;
            each.packed_first += run.token_count;
            return .{ .run = run, .first = first };
        }
    };

    /// Sets a head to work.
    pub fn select(rows: *TileRows, head: u32) void {
        const storage = &rows.tile.storage;
        rows.offset_k = if (head == 0) 0 else head * storage.head_stride_k;
        rows.offset_v = if (head == 0) 0 else head * storage.head_stride_v;
    }

    /// The planes of quantized sides, of the head at work.
    pub fn planeK(rows: *const TileRows) [*]const u8 {
        return rows.tile.runs[0].keys + rows.offset_k;
    }

    pub fn planeV(rows: *const TileRows) [*]const u8 {
        return rows.tile.runs[0].values + rows.offset_v;
    }

    /// Writes `positions`, if they are not there yet: few rows look at them.
    pub fn setPositions(rows: *TileRows) void {
        if (rows.has_positions) return;
        rows.has_positions = true;
        rows.positions = @splat(if (rows.tile.storage.isFloat()) rows.position_last else hidden);
        var each: SlotIterator = .{ .rows = rows };
        while (each.next()) |slot| {
            for (rows.positions[slot.first..][0..slot.run.token_count], 0..) |*position, i| {
                position.* = slot.run.position + @as(u32, @intCast(i));
            }
        }
    }
};

/// Queries as numbers of digits.
pub const QueryDigits = digits_of.Digits(head_dim_max);

comptime {
    assert(@sizeOf(QueryDigits) == @sizeOf(table.PreparedRow));
}

/// A tile and a few of its heads, whose rows are at work together: those of the first head, then those of the next. A row
/// has its place among them in all of the arrays.
pub const Tile = struct {
    rows: TileRows,
    /// The first row of the head at work.
    row_first: u32,
    /// Queries times the scales of the keys, where each dim has its own, and what the mins add to every score.
    queries: [row_count_max]QueryDigits,
    query_constants: [row_count_max]f32,
    /// Scores, later weights, [row][token].
    scores: [row_count_max][tile_tokens]f32 align(64),
    /// What a weight of 1 stands for, [row].
    base_weights: [row_count_max]f32 align(64),
    /// What is read next, and where it lies.
    ahead: Ahead,
    keys: Source,
    values: Source,
    next_keys: Source,
    next_values: Source,

    /// Of a tile with runs.
    pub fn init(tile: *Tile, task: *const table.AttendTask) void {
        tile.rows.fill(&task.tile);
        if (task.is_token_major != 0) {
            tile.next_keys.init(&task.ahead, .keys, task.head_dim, task.head_count);
            tile.next_values.init(&task.ahead, .values, task.head_dim, task.head_count);
        } else {
            tile.keys.init(&task.tile, .keys, task.head_dim, 1);
            tile.values.init(&task.tile, .values, task.head_dim, 1);
            tile.next_keys.init(&task.ahead, .keys, task.head_dim, 1);
        }
    }

    /// Some heads are about to be at work. Meanwhile their values are asked for, and then the keys of the next ones. Where
    /// the heads of a token lie side by side, each asks for its share of the next tile's rows, in the order they lie in.
    pub fn beginAhead(tile: *Tile, task: *const table.AttendTask, heads: Heads) void {
        if (task.is_token_major != 0) {
            if (heads.first != 0) return;
            tile.ahead.init(.{
                .{ .source = &tile.next_keys, .head_first = 0, .head_count = 1 },
                .{ .source = &tile.next_values, .head_first = 0, .head_count = 1 },
            }, (task.head_count + heads.count - 1) / heads.count);
            return;
        }
        const end = heads.first + heads.count;
        tile.ahead.init(.{
            .{ .source = &tile.values, .head_first = heads.first, .head_count = heads.count },
            if (end == task.head_count)
                .{ .source = &tile.next_keys, .head_first = 0, .head_count = heads.limit }
            else
                .{ .source = &tile.keys, .head_first = end, .head_count = @min(heads.limit, task.head_count - end) },
        }, 1);
    }

    /// Of the rows at work, [row].
    pub fn queryDigits(tile: *const Tile, task: *const table.AttendTask) [*]const QueryDigits {
        return if (task.tile.storage.dtype_k.isAffine()) &tile.queries else @ptrCast(task.prepared);
    }

    /// Sets one of the heads to work.
    pub fn select(tile: *Tile, task: *const table.AttendTask, heads: Heads, index: u32) void {
        tile.rows.select(heads.first + index);
        tile.row_first = index * task.row_count;
    }
};

/// Heads whose rows are at work together.
pub const Heads = struct {
    first: u32,
    count: u32,
    /// As many as are at work together, but for the last ones.
    limit: u32,
};
