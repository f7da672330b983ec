//! One part of a query step: a few query rows of a few KV heads, and their way through the positions they see.
//!
//! All query rows that share a KV head are attended together, up to 16 at a time, so that each key and value is read once for all
//! of them. The work goes tile by tile, and in a tile KV head by KV head. That is the order in which both layouts lie in
//! memory: a token's heads side by side, or a block's planes one after the other. Head by head over all positions would
//! read every page once for each head (measured on a contiguous f16 cache of 8 heads, Zen 5, one thread: 16 GB/s that way,
//! 18 GB/s this way).
//!
//! While a head of a tile is at work, the kernel prefetches what comes next: the next head or, where a token's heads lie side
//! by side, the next tile with all of its heads. Then memory is read in the order it lies in.
//!
//! Each chunk of positions gives a state of its own: sums, largest score, sum of weights. The states of a row are merged in
//! the order of positions, one after the other, whoever made them and when.

const std = @import("std");
const assert = std.debug.assert;
const dispatch = @import("../kernels/dispatch.zig");
const group = @import("../group.zig");
const exact = @import("exact.zig");
const Query = @import("query.zig").Query;
const visible_rows = @import("visible.zig");
const Visible = visible_rows.Visible;
const chunk_tokens = visible_rows.chunk_tokens;

/// The most KV heads of a part: their queries fit the second cache level.
pub const head_count_max = 32;

/// The most elements of the queries, and of the sums, of a part.
pub const elements_max = head_count_max * dispatch.head_dim_max;

/// Query rows of a part whose keys are codes, which have a multiple of 32 elements.
const prepared_max = elements_max / group.dim_multiple;

/// Elements of queries that are scaled together; divides what a head is padded to.
const query_lanes = 8;

comptime {
    assert(dispatch.lanes_max % query_lanes == 0);
}

pub const Part = struct {
    query: *const Query,
    head_first: u32,
    head_count: u32,
    row_first: u32,
    row_count: u32,
    head_dim_padded: u32,
    /// The largest magnitude of its scaled queries; see `scaleQueries`.
    query_max: f32 = std.math.floatMax(f32),

    /// Elements of its queries, and of the sums of one state: [head][row][head_dim_padded].
    pub fn elements(part: Part) u32 {
        return part.head_count * part.row_count * part.head_dim_padded;
    }

    /// Query rows of all its heads.
    pub fn rows(part: Part) u32 {
        return part.head_count * part.row_count;
    }

    fn kvHead(part: Part, row: usize) u32 {
        return part.head_first + @as(u32, @intCast(row / part.row_count));
    }

    fn rowOf(part: Part, row: usize) u32 {
        return part.row_first + @as(u32, @intCast(row % part.row_count));
    }

    /// Positions that any of its rows may see. For the calling thread alone, as it reads the caller's options.
    pub fn visible(part: Part) Visible {
        const query = part.query;
        var result: Visible = .{ .rows = &query.rows, .first = std.math.maxInt(u32), .end = 0, .sink_end = 0 };
        // All heads see the same.
        for (0..part.row_count) |i| {
            const row = query.visibility(part.head_first, part.rowOf(i));
            result.first = @min(result.first, row.first);
            result.end = @max(result.end, row.end);
            result.sink_end = @max(result.sink_end, row.sink_end);
        }
        return result;
    }

    /// Writes its rows as they are before the first key, [head][row]. For the calling thread alone, too.
    pub fn beginRows(part: Part, fresh: []dispatch.QueryRow) void {
        assert(fresh.len == part.rows());
        for (fresh, 0..) |*row, i| row.* = part.query.visibility(part.kvHead(i), part.rowOf(i));
    }

    /// Writes its queries times softmax_scale, padded with zeros.
    pub fn scaleQueries(part: *Part, queries: []f32) void {
        assert(queries.len == part.elements());
        // Bounds that the loops below keep by construction would be checked for every vector.
        @setRuntimeSafety(false);
        const query = part.query;
        const Vector = @Vector(query_lanes, f32);
        const Bits = @Vector(query_lanes, i32);
        // Magnitudes are compared as integers: NaN is larger than Inf.
        var largest: Bits = @splat(0);
        const head_dim = query.rows.head_dim;
        for (0..part.rows()) |row| {
            const at = query.rowIndex(part.kvHead(row), part.rowOf(row)) * head_dim;
            const scaled = queries[row * part.head_dim_padded ..][0..part.head_dim_padded];
            const q = query.q[at..][0..head_dim];
            const whole = head_dim - head_dim % query_lanes;
            @memset(scaled[whole..], 0);
            for (scaled[whole..head_dim], q[whole..]) |*to, from| to.* = from * query.softmax_scale;
            var dim: u32 = 0;
            while (dim < whole) : (dim += query_lanes) {
                const given: [query_lanes]f32 = q[dim..][0..query_lanes].*;
                scaled[dim..][0..query_lanes].* = @as(Vector, given) * @as(Vector, @splat(query.softmax_scale));
            }
            dim = 0;
            while (dim < part.head_dim_padded) : (dim += query_lanes) {
                const product: Vector = scaled[dim..][0..query_lanes].*;
                largest = @max(largest, @as(Bits, @bitCast(product)) & @as(Bits, @splat(std.math.maxInt(i32))));
            }
        }
        part.query_max = @bitCast(@reduce(.Max, largest));
    }

    /// The state of a chunk, of all rows.
    pub const State = struct {
        /// [head][row][head_dim_padded]
        sums: []f32,
        /// [head][row]
        rows: []dispatch.QueryRow,

        pub fn clear(state: State, fresh: []const dispatch.QueryRow) void {
            @memset(state.sums, 0);
            @memcpy(state.rows, fresh);
        }

        /// Adds the state of the positions that come next.
        pub fn merge(state: State, part: Part, next: State) void {
            const kernels = dispatch.kernels();
            for (state.rows, next.rows, 0..) |*row, *other, i| {
                const at = i * part.head_dim_padded;
                kernels.merge(row, state.sums[at..].ptr, other, next.sums[at..].ptr, part.head_dim_padded);
            }
        }
    };

    /// Attends the positions of one chunk, adding to a cleared state. `goes_on` says whether the rows of the next chunk
    /// are prefetched at the end. Reads and writes nothing of the caller's but through `queries` and `state`.
    pub fn attendChunk(part: Part, see: Visible, queries: []const f32, state: State, chunk: u32, goes_on: bool) void {
        // Safe builds fill undefined memory with 0xaa, which takes longer than a short attention itself.
        @setRuntimeSafety(false);
        var runs: [2]visible_rows.TileRuns = undefined;
        var prepared: [prepared_max]dispatch.PreparedQuery = undefined;
        part.attendTiles(see, queries, state, chunk, goes_on, &runs, &prepared);
    }

    fn attendTiles(
        part: Part,
        see: Visible,
        queries: []const f32,
        state: State,
        chunk: u32,
        goes_on: bool,
        runs: *[2]visible_rows.TileRuns,
        prepared: *[prepared_max]dispatch.PreparedQuery,
    ) void {
        const kernels = dispatch.kernels();
        const chunk_end = @as(u64, chunk + 1) * chunk_tokens;
        var task: dispatch.AttendTask = .{
            .queries = queries.ptr,
            .prepared = prepared,
            .sums = state.sums.ptr,
            .rows = state.rows.ptr,
            .head_count = part.head_count,
            .row_count = part.row_count,
            .head_dim = part.query.rows.head_dim,
            .head_dim_padded = part.head_dim_padded,
            .softcap = part.query.options.softcap orelse 0,
            .tile = undefined,
            .next_tile = undefined,
            .is_token_major = @intFromBool(part.query.rows.memory == .contiguous),
            .query_max = part.query_max,
        };
        var is_prepared = false;
        var turn: u1 = 0;
        var tile = see.tileFrom(chunk * chunk_tokens);
        if (tile) |first| see.tileRuns(part.head_first, first, &runs[turn]);
        while (tile) |now| {
            if (now.first >= chunk_end) return;
            task.tile = runs[turn].of(now);
            turn +%= 1;
            runs[turn].count = 0;
            task.next_tile = runs[turn].of(now);
            tile = see.tileFrom(now.end);
            const is_next = if (tile) |next| goes_on or next.first < chunk_end else false;
            if (is_next) {
                see.tileRuns(part.head_first, tile.?, &runs[turn]);
                task.next_tile = runs[turn].of(tile.?);
            }
            if (!is_prepared and task.tile.storage.isPrepared()) {
                is_prepared = true;
                kernels.prepare(&task);
            }
            kernels.attend(&task);
            // A tile that was not prefetched has no runs yet.
            if (!is_next) return;
        }
    }

    /// Writes the outputs of a state that has seen everything. A row in which f32 did not suffice is done again.
    pub fn finish(part: Part, state: State) void {
        const kernels = dispatch.kernels();
        const query = part.query;
        const sink_logits = query.options.sink_logits;
        for (state.rows, 0..) |*row, i| {
            const kv_head = part.kvHead(i);
            const query_row = part.rowOf(i);
            const index = query.rowIndex(kv_head, query_row);
            var row_lse = kernels.finish(&.{
                .sums = state.sums[i * part.head_dim_padded ..].ptr,
                .output = @ptrCast(query.output[index * query.rows.head_dim ..].ptr),
                .row = row,
                .head_dim = query.rows.head_dim,
                .has_sink_logit = @intFromBool(sink_logits.len != 0),
                .sink_logit = if (sink_logits.len == 0) 0 else sink_logits[index % query.q_head_count],
            });
            if (std.math.isNan(row_lse)) row_lse = exact.attendRow(query, kv_head, query_row);
            if (query.lse.len != 0) query.lse[index] = row_lse;
        }
    }
};
