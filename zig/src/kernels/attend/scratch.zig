//! What a few heads of a tile need between the passes: scores, digits of queries, and what is prefetched meanwhile.

const std = @import("std");
const assert = std.debug.assert;
const digits_of = @import("digits.zig");
const table = @import("../table.zig");
const PrefetchQueue = @import("prefetch.zig").PrefetchQueue;
const Source = @import("prefetch.zig").Source;
const TileTokens = @import("tokens.zig").TileTokens;
const tile_tokens = table.tile_tokens;
const head_dim_max = table.head_dim_max;
const row_count_max = table.query_row_count_max;

/// A query as numbers of two digits.
pub const QueryDigits = digits_of.Digits(head_dim_max);

comptime {
    assert(@sizeOf(QueryDigits) == @sizeOf(table.PreparedQuery));
}

/// What a tile has for a few of its heads, whose query rows are at work together: those of the first head, then those of the
/// next. All arrays are in that order of rows.
pub const Scratch = struct {
    tokens: TileTokens,
    /// Index of the first query row of the head at work.
    row_first: u32,
    /// Queries times the scales of the keys, where each dim has its own, and what the mins add to every score.
    queries: [row_count_max]QueryDigits,
    query_constants: [row_count_max]f32,
    /// Scores, later weights, [row][token].
    scores: [row_count_max][tile_tokens]f32 align(64),
    /// What a weight of 1 stands for, [row].
    base_weights: [row_count_max]f32 align(64),
    /// The lines that are read next, and the sides they are in.
    prefetches: PrefetchQueue,
    keys: Source,
    values: Source,
    next_keys: Source,
    next_values: Source,

    /// Begins a tile, which has runs.
    pub fn init(scratch: *Scratch, task: *const table.AttendTask) void {
        scratch.tokens.fill(&task.tile);
        if (task.is_token_major != 0) {
            scratch.next_keys.init(&task.next_tile, .keys, task.head_dim, task.head_count);
            scratch.next_values.init(&task.next_tile, .values, task.head_dim, task.head_count);
        } else {
            scratch.keys.init(&task.tile, .keys, task.head_dim, 1);
            scratch.values.init(&task.tile, .values, task.head_dim, 1);
            scratch.next_keys.init(&task.next_tile, .keys, task.head_dim, 1);
        }
    }

    /// Fills the queue of prefetches for some heads: their values, then the keys of the heads after them. Where the heads of a
    /// token lie side by side, each turn has its share of the next tile's rows, in the order they lie in.
    pub fn beginPrefetches(scratch: *Scratch, task: *const table.AttendTask, heads: Heads) void {
        if (task.is_token_major != 0) {
            if (heads.first != 0) return;
            scratch.prefetches.init(.{
                .{ .source = &scratch.next_keys, .head_first = 0, .head_count = 1 },
                .{ .source = &scratch.next_values, .head_first = 0, .head_count = 1 },
            }, (task.head_count + heads.count - 1) / heads.count);
            return;
        }
        const end = heads.first + heads.count;
        scratch.prefetches.init(.{
            .{ .source = &scratch.values, .head_first = heads.first, .head_count = heads.count },
            if (end == task.head_count)
                .{ .source = &scratch.next_keys, .head_first = 0, .head_count = heads.limit }
            else
                .{ .source = &scratch.keys, .head_first = end, .head_count = @min(heads.limit, task.head_count - end) },
        }, 1);
    }

    /// Digits of the queries at work, [row].
    pub fn queryDigits(scratch: *const Scratch, task: *const table.AttendTask) [*]const QueryDigits {
        return if (task.tile.storage.dtype_k.isAffine()) &scratch.queries else @ptrCast(task.prepared);
    }

    /// Sets one of the heads to work.
    pub fn select(scratch: *Scratch, task: *const table.AttendTask, heads: Heads, index: u32) void {
        scratch.tokens.select(heads.first + index);
        scratch.row_first = index * task.row_count;
    }
};

/// Heads whose rows are at work together.
pub const Heads = struct {
    first: u32,
    count: u32,
    /// The heads at work together, but for the last ones: `count` may be less.
    limit: u32,
};
