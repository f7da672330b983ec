//! A tile at work: which token stands in which slot, and the scores between the passes.

const std = @import("std");
const assert = std.debug.assert;
const table = @import("table.zig");
const Ahead = @import("ahead.zig").Ahead;
const tile_tokens = table.tile_tokens;

/// The tokens of a tile, slot by slot.
///
/// Where both sides are floats the slots are the tokens that are there, one after the other. A plane of codes has its
/// tokens where they are: then slot i is the tile's position i, all 64 are computed, and those that nobody may see are
/// hidden by their position.
pub const TileRows = struct {
    token_count: u32,
    /// The last position that is not hidden.
    position_last: u32,
    /// No token of the 64 is missing or hidden.
    is_whole: bool,
    /// Absolute position of each token; behind the last one it repeats.
    positions: [tile_tokens]u32,
    /// Rows of float sides.
    keys: [tile_tokens][*]const u8,
    values: [tile_tokens][*]const u8,

    /// No position is this one: every row's end is at most this, and no tree reaches it.
    pub const hidden = std.math.maxInt(u32);

    /// Tokens whose float keys are taken together: rows are repeated until whole blocks of them can be read.
    pub const token_block = 4;

    /// All 64 are there and the row sees them all, by its window and its tree.
    pub inline fn isSeenBy(rows: *const TileRows, row: *const table.Row) bool {
        return rows.is_whole and rows.positions[0] >= row.first and rows.position_last < row.end and
            rows.position_last < row.tree_first;
    }

    pub fn fill(rows: *TileRows, tile: *const table.TileRuns) void {
        rows.token_count = 0;
        if (tile.run_count == 0) return;
        const last_run = tile.runs[tile.run_count - 1];
        rows.position_last = last_run.position + last_run.token_count - 1;
        assert(tile.runs[0].position / tile_tokens == rows.position_last / tile_tokens);
        if (tile.storage.isFloat()) rows.fillPacked(tile) else rows.fillInPlace(tile);
    }

    fn fillPacked(rows: *TileRows, tile: *const table.TileRuns) void {
        for (tile.runs[0..tile.run_count]) |run| {
            for (0..run.token_count) |i| {
                const slot = rows.token_count + i;
                rows.positions[slot] = run.position + @as(u32, @intCast(i));
                rows.keys[slot] = run.keys + i * tile.storage.token_stride_k;
                rows.values[slot] = run.values + i * tile.storage.token_stride_v;
            }
            rows.token_count += run.token_count;
        }
        rows.is_whole = rows.token_count == tile_tokens;
        const last = rows.token_count - 1;
        for (rows.token_count..std.mem.alignForward(u32, rows.token_count, token_block)) |slot| {
            rows.positions[slot] = rows.positions[last];
            rows.keys[slot] = rows.keys[last];
            rows.values[slot] = rows.values[last];
        }
    }

    fn fillInPlace(rows: *TileRows, tile: *const table.TileRuns) void {
        const storage = &tile.storage;
        assert(storage.block_size % tile_tokens == 0 and storage.tile_token % tile_tokens == 0);
        assert(storage.tile_token < storage.block_size);
        rows.token_count = tile_tokens;
        rows.positions = @splat(hidden);
        var seen: u32 = 0;
        for (tile.runs[0..tile.run_count]) |run| {
            seen += run.token_count;
            for (rows.positions[run.position % tile_tokens ..][0..run.token_count], 0..) |*position, i| {
                position.* = run.position + @as(u32, @intCast(i));
            }
        }
        rows.is_whole = seen == tile_tokens;
        if (storage.dtype_k.isFloat()) fillSide(&rows.keys, tile, "keys", storage.token_stride_k);
        if (storage.dtype_v.isFloat()) fillSide(&rows.values, tile, "values", storage.token_stride_v);
    }

    fn fillSide(
        slots: *[tile_tokens][*]const u8,
        tile: *const table.TileRuns,
        comptime side: []const u8,
        stride: u64,
    ) void {
        // A hidden row is read like any other, and weighs nothing.
        slots.* = @splat(@field(tile.runs[0], side));
        for (tile.runs[0..tile.run_count]) |run| {
            for (slots[run.position % tile_tokens ..][0..run.token_count], 0..) |*slot, i| {
                slot.* = @field(run, side) + i * stride;
            }
        }
    }
};

pub const Tile = struct {
    rows: TileRows,
    /// What is read next: asked for bit by bit while this tile computes, which takes about ten times as long as memory
    /// takes to answer.
    keys_ahead: Ahead,
    values_ahead: Ahead,
    /// Scores, later weights, [row][token].
    scores: [table.row_count_max][tile_tokens]f32 align(64),
};
