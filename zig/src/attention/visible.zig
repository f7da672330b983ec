//! The positions that a few query rows see together, cut into the pieces that kernels take.
//!
//!     tile     64 positions from a multiple of 64, or the part of them that is stored alike
//!     chunk    1024 positions from a multiple of 1024: work that may go to another thread
//!
//! Both begin at fixed positions, so that the result of a query row depends on nothing but what is stored.

const std = @import("std");
const assert = std.debug.assert;
const dispatch = @import("../kernels/dispatch.zig");
const Rows = @import("../cache/rows.zig").Rows;

/// Positions of a chunk. A row's state is merged once for each, which costs as much as a few tokens.
pub const chunk_tokens = 1024;

comptime {
    // A tile lies in one chunk, or it would be split, and the bits would be others.
    assert(chunk_tokens % dispatch.tile_tokens == 0);
}

/// Positions that are attended in one call of a kernel.
pub const Tile = struct {
    first: u32,
    end: u32,
    storage: dispatch.Storage,
};

/// The positions that any of a few query rows may see and that are there: [0, sink_end) and [first, end) of those that
/// retention left.
pub const Visible = struct {
    rows: *const Rows,
    first: u32,
    end: u32,
    sink_end: u32,

    pub const Stretch = struct { first: u32, end: u32 };

    /// The first stretch of visible positions at `from` or later.
    pub fn stretchFrom(visible: Visible, from: u32) ?Stretch {
        const rows = visible.rows;
        var position = from;
        while (true) {
            if (position >= visible.sink_end and position < visible.first) position = visible.first;
            if (position >= rows.sink_end and position < rows.first) position = rows.first;
            const in_sink = position < visible.sink_end and visible.sink_end < visible.first;
            var end = if (in_sink) visible.sink_end else @max(visible.end, visible.sink_end);
            if (position >= end) return null;
            if (position < rows.sink_end and rows.sink_end < rows.first) end = @min(end, rows.sink_end);
            // Moving over one gap may have led into the other.
            if (position >= visible.sink_end and position < visible.first) continue;
            assert(position >= from and position < end);
            return .{ .first = position, .end = end };
        }
    }

    /// The tile of the first visible position at `from` or later.
    pub fn tileFrom(visible: Visible, from: u32) ?Tile {
        const stretch = visible.stretchFrom(from) orelse return null;
        const next_tile = (stretch.first / dispatch.tile_tokens + 1) * dispatch.tile_tokens;
        const end = visible.rows.storageEnd(stretch.first, @min(visible.rows.row_count, next_tile));
        assert(stretch.first < end and end <= next_tile);
        return .{ .first = stretch.first, .end = end, .storage = visible.rows.storage(stretch.first) };
    }

    /// The chunk of the first visible position at `from` or later.
    pub fn chunkFrom(visible: Visible, from: u32) ?u32 {
        const stretch = visible.stretchFrom(from) orelse return null;
        return stretch.first / chunk_tokens;
    }

    /// The first chunk behind another one in which something is visible.
    pub fn chunkAfter(visible: Visible, chunk: u32) ?u32 {
        return visible.chunkFrom((chunk + 1) * chunk_tokens);
    }

    /// The runs of one head's visible rows in one tile. A tile is always given whole: where it were split, the bits would
    /// be others.
    pub fn tileRuns(visible: Visible, kv_head: u32, tile: Tile, out: *TileRuns) void {
        assert(tile.first < tile.end);
        assert(tile.first / dispatch.tile_tokens == (tile.end - 1) / dispatch.tile_tokens);
        var position = tile.first;
        out.count = 0;
        while (visible.stretchFrom(position)) |stretch| {
            if (stretch.first >= tile.end) return;
            const end = @min(stretch.end, tile.end);
            position = stretch.first;
            while (position < end) {
                const found = visible.rows.run(kv_head, position, end);
                assert(found.token_count >= 1 and found.token_count <= end - position);
                out.runs[out.count] = .{
                    .keys = found.keys,
                    .values = found.values,
                    .position = position,
                    .token_count = found.token_count,
                };
                out.count += 1;
                position += found.token_count;
            }
        }
    }
};

/// The runs of one head in one tile.
pub const TileRuns = struct {
    runs: [dispatch.tile_tokens]dispatch.Run,
    count: u32,

    pub fn of(tile_runs: *const TileRuns, tile: Tile) dispatch.TileRuns {
        return .{ .storage = tile.storage, .runs = &tile_runs.runs, .run_count = tile_runs.count };
    }
};
