//! A tile at work: which token stands in which slot, and the scores between the passes.

const std = @import("std");
const assert = std.debug.assert;
const table = @import("table.zig");
const digits_of = @import("digits.zig");
const Ahead = @import("ahead.zig").Ahead;
const tile_tokens = table.tile_tokens;
const head_dim_max = table.head_dim_max;

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
    /// Rows of float sides.
    keys: [tile_tokens][*]const u8,
    values: [tile_tokens][*]const u8,
    /// Planes of quantized sides.
    plane_k: [*]const u8,
    plane_v: [*]const u8,

    /// No position is this one: every row's end is at most this, and no tree reaches it.
    pub const hidden = std.math.maxInt(u32);

    /// Tokens whose float keys are taken together: rows are repeated until whole blocks of them can be read.
    pub const token_block = 4;

    /// All 64 are there and the row sees them all, by its window and its tree.
    pub inline fn isSeenBy(rows: *const TileRows, row: *const table.Row) bool {
        return rows.is_whole and rows.position_first >= row.first and rows.position_last < row.end and
            rows.position_last < row.tree_first;
    }

    /// Of a tile with runs, for its first KV head.
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
        rows.plane_k = tile.runs[0].keys;
        rows.plane_v = tile.runs[0].values;
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

    /// Goes on to the next KV head.
    pub fn nextHead(rows: *TileRows) void {
        const storage = &rows.tile.storage;
        rows.plane_k += storage.head_stride_k;
        rows.plane_v += storage.head_stride_v;
        if (storage.dtype_k.isFloat()) for (&rows.keys) |*row| {
            row.* += storage.head_stride_k;
        };
        if (storage.dtype_v.isFloat()) for (&rows.values) |*row| {
            row.* += storage.head_stride_v;
        };
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

/// Queries as numbers of digits, for the keys of one head of a tile.
pub const Queries = struct {
    digits: [table.row_count_max]Row,
    /// What the mins add to every score.
    constants: [table.row_count_max]f32,

    pub const Row = digits_of.Digits(head_dim_max);
};

pub const Tile = struct {
    rows: TileRows,
    /// Of the head at work and of the one after it, in turn.
    queries_in_turn: [2]Queries,
    turn: u1,
    /// What is read next: asked for bit by bit while this tile computes.
    keys_ahead: Ahead,
    values_ahead: Ahead,
    /// Scores, later weights, [row][token].
    scores: [table.row_count_max][tile_tokens]f32 align(64),

    /// Of the head at work.
    pub fn queries(tile: *const Tile) *const Queries {
        return &tile.queries_in_turn[tile.turn];
    }

    /// A head is about to be at work: the next one of this tile comes next, or the first one of the next tile. Where the
    /// heads of a token lie side by side, each asks for its share of the next tile's rows, in the order they lie in.
    pub fn beginAhead(tile: *Tile, task: *const table.AttendTask, head: u32) void {
        if (task.is_token_major != 0) {
            if (head != 0) {
                tile.keys_ahead.nextHead();
                tile.values_ahead.nextHead();
                return;
            }
            tile.keys_ahead.init(&task.ahead, .keys, task.head_dim, 0, task.head_count);
            tile.values_ahead.init(&task.ahead, .values, task.head_dim, 0, task.head_count);
            return;
        }
        const is_last = head + 1 == task.head_count;
        const next = if (is_last) &task.ahead else &task.tile;
        const index: u64 = if (is_last) 0 else head + 1;
        tile.keys_ahead.init(next, .keys, task.head_dim, index * next.storage.head_stride_k, 1);
        tile.values_ahead.init(next, .values, task.head_dim, index * next.storage.head_stride_v, 1);
    }
};
