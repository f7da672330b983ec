//! The tokens of a tile: which of them is in which of its 64 slots, at which position, and where its rows are.

const std = @import("std");
const assert = std.debug.assert;
const table = @import("../table.zig");
const tile_tokens = table.tile_tokens;

/// The tokens of a tile, slot by slot, with the rows of one KV head.
///
/// Where both sides are floats the slots are the tokens that are there, one after the other. A plane of codes has its
/// tokens where they are: then slot i is the tile's position i, all 64 are computed, and those that nobody may see are
/// hidden by their position.
pub const TileTokens = struct {
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
    /// Bytes from the first head to the one at work.
    offset_k: u64,
    offset_v: u64,

    /// Position of a slot that nobody may see: every row's end is at most this, and no tree reaches it.
    pub const hidden = std.math.maxInt(u32);

    /// Tokens whose float keys are taken together: rows are repeated until whole blocks of them can be read.
    pub const token_block = 4;

    /// Whether all 64 tokens are there and the row sees them all, by its window and its tree.
    pub inline fn isSeenBy(tokens: *const TileTokens, row: *const table.QueryRow) bool {
        return tokens.is_whole and tokens.position_first >= row.first and tokens.position_last < row.end and
            tokens.position_last < row.tree_first;
    }

    /// Begins a tile, which has runs.
    pub fn fill(tokens: *TileTokens, tile: *const table.TileRuns) void {
        const last_run = tile.runs[tile.run_count - 1];
        tokens.tile = tile;
        tokens.position_first = tile.runs[0].position;
        tokens.position_last = last_run.position + last_run.token_count - 1;
        assert(tokens.position_first / tile_tokens == tokens.position_last / tile_tokens);
        tokens.has_positions = false;
        var seen: u32 = 0;
        for (tile.runs[0..tile.run_count]) |run| seen += run.token_count;
        tokens.is_whole = seen == tile_tokens;
        tokens.token_count = if (tile.storage.isFloat()) seen else tile_tokens;
        if (tile.storage.dtype_k.isFloat()) tokens.fillSide(&tokens.keys, "keys", tile.storage.token_stride_k);
        if (tile.storage.dtype_v.isFloat()) tokens.fillSide(&tokens.values, "values", tile.storage.token_stride_v);
    }

    fn fillSide(
        tokens: *const TileTokens,
        slots: *[tile_tokens][*]const u8,
        comptime side: []const u8,
        stride: u64,
    ) void {
        // A slot without a token is read like any other, and weighs nothing.
        if (!tokens.is_whole) slots.* = @splat(@field(tokens.tile.runs[0], side));
        var each: SlotIterator = .{ .tokens = tokens };
        while (each.next()) |slot| {
            for (slots[slot.first..][0..slot.run.token_count], 0..) |*row, i| row.* = @field(slot.run, side) + i * stride;
        }
    }

    /// The runs of the tile, each with its first slot.
    const SlotIterator = struct {
        tokens: *const TileTokens,
        index: u32 = 0,
        packed_first: u32 = 0,

        fn next(each: *SlotIterator) ?struct { run: table.Run, first: u32 } {
            const tile = each.tokens.tile;
            if (each.index == tile.run_count) return null;
            const run = tile.runs[each.index];
            const first = if (tile.storage.isFloat()) each.packed_first else run.position % tile_tokens;
            each.index += 1;
            each.packed_first += run.token_count;
            return .{ .run = run, .first = first };
        }
    };

    /// Sets a head to work.
    pub fn select(tokens: *TileTokens, head: u32) void {
        const storage = &tokens.tile.storage;
        tokens.offset_k = if (head == 0) 0 else head * storage.head_stride_k;
        tokens.offset_v = if (head == 0) 0 else head * storage.head_stride_v;
    }

    /// Plane of the keys of the head at work; the side is quantized.
    pub fn planeK(tokens: *const TileTokens) [*]const u8 {
        return tokens.tile.runs[0].keys + tokens.offset_k;
    }

    /// Plane of the values of the head at work; the side is quantized.
    pub fn planeV(tokens: *const TileTokens) [*]const u8 {
        return tokens.tile.runs[0].values + tokens.offset_v;
    }

    /// Writes `positions`, if they are not there yet: few rows look at them.
    pub fn setPositions(tokens: *TileTokens) void {
        if (tokens.has_positions) return;
        tokens.has_positions = true;
        tokens.positions = @splat(if (tokens.tile.storage.isFloat()) tokens.position_last else hidden);
        var each: SlotIterator = .{ .tokens = tokens };
        while (each.next()) |slot| {
            for (tokens.positions[slot.first..][0..slot.run.token_count], 0..) |*position, i| {
                position.* = slot.run.position + @as(u32, @intCast(i));
            }
        }
    }
};
