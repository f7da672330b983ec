//! One query step: checks the options, cuts the queries into kernel tasks, and finishes the outputs.
//!
//!     q, output: [query][q_head][head_dim]        lse: [query][q_head]
//!
//! Query head h uses KV head floor(h / ratio), ratio = q_head_count / kv_head_count. All rows that share a KV head are
//! attended together, up to 16 at a time, so that each key and value is read once for all of them: a *row* here is one
//! query of one query head, and row r of a KV head is query r / ratio, head r % ratio of that KV head's.
//!
//! The work goes tile by tile, and in a tile KV head by KV head. That is the order in which both layouts lie in memory:
//! a token's heads side by side, or a block's planes one after the other. Head by head over all positions would read
//! every page once for each head (measured on a contiguous f16 cache of 8 heads, Zen 5, one thread: 16 GB/s that way,
//! 18 GB/s this way).
//!
//! Scratch is on the stack and does not grow with the number of keys.

const std = @import("std");
const row_types = @import("../cache/rows.zig");
const Rows = row_types.Rows;
const shapes = @import("../shape.zig");
const dispatch = @import("../kernels/dispatch.zig");

/// Elements of the queries, and of the sums, that are on the stack at once: those of as many KV heads as fit.
const scratch_elements = 32 * shapes.head_dim_max;

/// Nodes of a tree of drafted tokens: one bit each in a row's mask.
pub const tree_node_count_max = 64;

pub const Options = struct {
    /// Query rows in `q`; the newest of them belongs to the newest row of the cache.
    query_count: u32 = 1,
    /// Query i of m sees the rows 0 to row_count - m + i, inclusive.
    causal: bool = true,
    /// Factor of every score; null for 1 / sqrt(head_dim).
    softmax_scale: ?f32 = null,
    /// The newest rows a query sees, its own included; null for all. Needs `causal`.
    window_tokens: ?u32 = null,
    /// The first rows, seen beside the window.
    sink_tokens: u32 = 0,
    /// Scores become softcap * tanh(score / softcap).
    softcap: ?f32 = null,
    /// [q_head], or empty: a key n positions back is scored slope * n lower.
    alibi_slopes: []align(1) const f32 = &.{},
    /// [q_head], or empty: exp(sink logit) joins the denominator (and the lse) and adds no value.
    sink_logits: []align(1) const f32 = &.{},
    /// [query], or empty: the queries are the nodes of a tree of drafted tokens, whose rows are the newest of the cache
    /// in the same order. Node i sees the rows before the tree, its ancestors and itself; `tree_parents[i] < i` is its
    /// parent, below 0 for a root. At most 64 nodes; needs `causal`, and neither window nor ALiBi.
    tree_parents: []align(1) const i32 = &.{},
};

pub const Error = error{ InvalidConfig, InvalidSize, NotFinite, Unsupported };

/// Attention of `q` over the rows of one layer of one sequence, `cache.rows(layer, ...)`. `output` takes q.len elements;
/// `lse` takes one for each query and head, or is empty. Nothing is written unless all is well.
pub fn attend(
    rows: Rows,
    q: []align(1) const f32,
    options: Options,
    output: []align(1) f32,
    lse: []align(1) f32,
) Error!void {
    const query: Query = try .init(rows, q, options, output, lse);
    query.run();
}

/// A checked call: `run` cannot fail. A batch checks all of its calls before it runs the first.
pub const Query = struct {
    rows: Rows,
    q: []align(1) const f32,
    options: Options,
    output: []align(1) f32,
    lse: []align(1) f32,
    q_head_count: u32,
    /// Query heads of one KV head.
    ratio: u32,
    softmax_scale: f32,

    pub fn init(
        rows: Rows,
        q: []align(1) const f32,
        options: Options,
        output: []align(1) f32,
        lse: []align(1) f32,
    ) Error!Query {
        const head_dim = rows.head_dim;
        if (options.query_count == 0) return error.InvalidConfig;
        if (options.window_tokens) |tokens| if (tokens == 0 or !options.causal) return error.InvalidConfig;
        if (options.softcap) |cap| if (!(cap > 0 and std.math.isFinite(cap))) return error.InvalidConfig;
        try checkTree(rows, options);
        const softmax_scale = options.softmax_scale orelse 1 / @sqrt(@as(f32, @floatFromInt(head_dim)));
        if (!std.math.isFinite(softmax_scale)) return error.InvalidConfig;

        const query_elements = @as(u64, options.query_count) * head_dim;
        if (q.len == 0 or q.len % query_elements != 0) return error.InvalidSize;
        const q_head_count = std.math.cast(u32, q.len / query_elements) orelse return error.InvalidSize;
        if (q_head_count % rows.kv_head_count != 0) return error.InvalidSize;
        // Rows of one KV head are counted in u32.
        const ratio = q_head_count / rows.kv_head_count;
        if (ratio > std.math.maxInt(u32) / options.query_count) return error.InvalidSize;

        for ([_][]align(1) const f32{ options.alibi_slopes, options.sink_logits }) |per_head| {
            if (per_head.len != 0 and per_head.len != q_head_count) return error.InvalidSize;
            for (per_head) |value| if (!std.math.isFinite(value)) return error.InvalidConfig;
        }
        if (output.len < q.len) return error.InvalidSize;
        if (lse.len != 0 and lse.len < q.len / head_dim) return error.InvalidSize;
        if (dispatch.kernels().storable(@ptrCast(q.ptr), .f32, .f32, q.len) == 0) return error.NotFinite;
        return .{
            .rows = rows,
            .q = q,
            .options = options,
            .output = output,
            .lse = lse,
            .q_head_count = q_head_count,
            .ratio = ratio,
            .softmax_scale = softmax_scale,
        };
    }

    fn checkTree(rows: Rows, options: Options) error{ InvalidConfig, InvalidSize, Unsupported }!void {
        const parents = options.tree_parents;
        if (parents.len == 0) return;
        if (parents.len != options.query_count or parents.len > tree_node_count_max) return error.InvalidSize;
        if (parents.len > rows.row_count) return error.InvalidSize;
        if (!options.causal) return error.InvalidConfig;
        if (options.window_tokens != null or rows.window_tokens != null) return error.Unsupported;
        if (options.alibi_slopes.len != 0) return error.Unsupported;
        for (parents, 0..) |parent, node| if (parent >= @as(i64, @intCast(node))) return error.InvalidConfig;
    }

    /// Computes and writes the outputs.
    pub fn run(query: *const Query) void {
        const head_dim_padded = std.mem.alignForward(u32, query.rows.head_dim, dispatch.lanes_max);
        var row_first: u32 = 0;
        while (row_first < query.rowCount()) : (row_first +|= dispatch.row_count_max) {
            const row_count = @min(query.rowCount() - row_first, dispatch.row_count_max);
            const heads_at_once = @min(scratch_elements / (row_count * head_dim_padded), head_count_max);
            var head_first: u32 = 0;
            while (head_first < query.rows.kv_head_count) : (head_first += heads_at_once) {
                const head_count = @min(query.rows.kv_head_count - head_first, heads_at_once);
                query.attendHeads(.{
                    .head_first = head_first,
                    .head_count = head_count,
                    .row_first = row_first,
                    .row_count = row_count,
                    .head_dim_padded = head_dim_padded,
                });
            }
        }
    }

    /// Query rows of one KV head.
    fn rowCount(query: *const Query) u32 {
        return query.options.query_count * query.ratio;
    }

    /// Where row `row` of a KV head stands in `lse`; times head_dim, in `q` and the output.
    fn rowIndex(query: *const Query, kv_head: u32, row: u32) usize {
        const head = kv_head * query.ratio + row % query.ratio;
        return @as(usize, row / query.ratio) * query.q_head_count + head;
    }

    /// What one row may see.
    fn visibility(query: *const Query, kv_head: u32, row: u32) dispatch.Row {
        const options = query.options;
        const row_count: i64 = query.rows.row_count;
        const index = row / query.ratio;
        const position = row_count - options.query_count + index;
        const end = if (options.causal) std.math.clamp(position + 1, 0, row_count) else row_count;
        var first: i64 = 0;
        for ([_]?u32{ options.window_tokens, query.rows.window_tokens }) |window| {
            if (window) |tokens| first = @max(first, position + 1 - @as(i64, tokens));
        }
        const slopes = options.alibi_slopes;
        return .{
            .first = @intCast(@min(first, end)),
            .end = @intCast(end),
            .sink_end = @intCast(@min(options.sink_tokens, end)),
            // Negative for queries older than the oldest row; distances are taken modulo 2^32.
            .position = @truncate(@as(u64, @bitCast(position))),
            .alibi_slope = if (slopes.len == 0) 0 else slopes[kv_head * query.ratio + row % query.ratio],
            .tree_first = query.rows.row_count - @as(u32, @intCast(options.tree_parents.len)),
            .tree_mask = query.treeMask(index),
            .score_max = -std.math.inf(f32),
            .weight_sum = 0,
        };
    }

    /// One bit for each node of the tree that a node sees: its ancestors and itself.
    fn treeMask(query: *const Query, node: u32) u64 {
        const parents = query.options.tree_parents;
        if (parents.len == 0) return 0;
        var mask: u64 = 0;
        var at: i32 = @intCast(node);
        while (at >= 0) : (at = parents[@intCast(at)]) mask |= @as(u64, 1) << @intCast(at);
        return mask;
    }

    /// What is attended at once: the same rows of a few KV heads.
    const Part = struct {
        head_first: u32,
        head_count: u32,
        row_first: u32,
        row_count: u32,
        head_dim_padded: u32,

        /// Where the queries and sums of a head of the part begin.
        fn offset(part: Part, head: u32) usize {
            return @as(usize, head) * part.row_count * part.head_dim_padded;
        }
    };

    const head_count_max = 32;

    const Scratch = struct {
        /// [head][row][head_dim_padded]
        queries: [scratch_elements]f32 align(64),
        sums: [scratch_elements]f32 align(64),
        /// [head][row]
        rows: [head_count_max * dispatch.row_count_max]dispatch.Row,
        /// Of the tile and head at work and of those that come next, in turns.
        runs: [2]TileRuns,
    };

    /// The runs of one head in one tile.
    const TileRuns = struct {
        runs: [dispatch.tile_tokens]dispatch.Run,
        count: u32,
    };

    fn attendHeads(query: *const Query, part: Part) void {
        // Safe builds fill undefined memory with 0xaa, which takes longer than a short attention itself.
        @setRuntimeSafety(false);
        var scratch: Scratch = undefined;
        query.attendHeadsIn(&scratch, part);
    }

    fn attendHeadsIn(query: *const Query, scratch: *Scratch, part: Part) void {
        const visible = query.begin(scratch, part);
        const kernels = dispatch.kernels();
        var task: dispatch.AttendTask = .{
            .queries = undefined,
            .sums = undefined,
            .rows = undefined,
            .row_count = part.row_count,
            .head_dim = query.rows.head_dim,
            .head_dim_padded = part.head_dim_padded,
            .dtype_k = query.rows.dtype_k,
            .dtype_v = query.rows.dtype_v,
            .softcap = query.options.softcap orelse 0,
            .token_stride_k = query.rows.tokenStrideK(),
            .token_stride_v = query.rows.tokenStrideV(),
            .runs = undefined,
            .run_count = 0,
            .ahead = undefined,
            .ahead_count = 0,
        };
        var tile = visible.tileFrom(0);
        var turn: u1 = 0;
        if (tile) |first| query.tileRuns(visible, part.head_first, first, &scratch.runs[turn]);
        while (tile) |tile_index| {
            const next_tile = visible.tileFrom((tile_index + 1) * dispatch.tile_tokens);
            for (0..part.head_count) |i| {
                const head: u32 = @intCast(i);
                const now = &scratch.runs[turn];
                turn +%= 1;
                const next = &scratch.runs[turn];
                next.count = 0;
                if (head + 1 < part.head_count) {
                    query.tileRuns(visible, part.head_first + head + 1, tile_index, next);
                } else if (next_tile) |index| {
                    query.tileRuns(visible, part.head_first, index, next);
                }
                task.queries = scratch.queries[part.offset(head)..].ptr;
                task.sums = scratch.sums[part.offset(head)..].ptr;
                task.rows = scratch.rows[head * part.row_count ..].ptr;
                task.runs = &now.runs;
                task.run_count = now.count;
                task.ahead = &next.runs;
                task.ahead_count = next.count;
                kernels.attend(&task);
            }
            tile = next_tile;
        }
        query.finish(scratch, part);
    }

    /// Scales the queries, empties the sums, and says what any of the rows may see.
    fn begin(query: *const Query, scratch: *Scratch, part: Part) Visible {
        const head_dim = query.rows.head_dim;
        var visible: Visible = .{ .rows = &query.rows, .first = std.math.maxInt(u32), .end = 0, .sink_end = 0 };
        for (0..part.head_count) |head| for (0..part.row_count) |i| {
            const kv_head = part.head_first + @as(u32, @intCast(head));
            const row_index = part.row_first + @as(u32, @intCast(i));
            const row = query.visibility(kv_head, row_index);
            scratch.rows[head * part.row_count + i] = row;
            visible.first = @min(visible.first, row.first);
            visible.end = @max(visible.end, row.end);
            visible.sink_end = @max(visible.sink_end, row.sink_end);
            const at = part.offset(@intCast(head)) + i * part.head_dim_padded;
            const q = query.q[query.rowIndex(kv_head, row_index) * head_dim ..][0..head_dim];
            const scaled = scratch.queries[at..][0..part.head_dim_padded];
            for (scaled[0..head_dim], q) |*to, from| to.* = from * query.softmax_scale;
            @memset(scaled[head_dim..], 0);
            @memset(scratch.sums[at..][0..part.head_dim_padded], 0);
        };
        return visible;
    }

    fn finish(query: *const Query, scratch: *Scratch, part: Part) void {
        const kernels = dispatch.kernels();
        for (0..part.head_count) |head| for (0..part.row_count) |i| {
            const kv_head = part.head_first + @as(u32, @intCast(head));
            const index = query.rowIndex(kv_head, part.row_first + @as(u32, @intCast(i)));
            const sink_logits = query.options.sink_logits;
            const row_lse = kernels.finish(&.{
                .sums = scratch.sums[part.offset(@intCast(head)) + i * part.head_dim_padded ..].ptr,
                .output = @ptrCast(query.output[index * query.rows.head_dim ..].ptr),
                .row = &scratch.rows[head * part.row_count + i],
                .head_dim = query.rows.head_dim,
                .has_sink_logit = @intFromBool(sink_logits.len != 0),
                .sink_logit = if (sink_logits.len == 0) 0 else sink_logits[index % query.q_head_count],
            });
            if (query.lse.len != 0) query.lse[index] = row_lse;
        };
    }

    /// The runs of the visible rows of one tile. A tile is always given whole: where it were split, the bits would be
    /// others.
    fn tileRuns(query: *const Query, visible: Visible, kv_head: u32, tile_index: u32, out: *TileRuns) void {
        const tile_end = @min(query.rows.row_count, (tile_index + 1) * dispatch.tile_tokens);
        var position = tile_index * dispatch.tile_tokens;
        out.count = 0;
        while (visible.stretchFrom(position)) |stretch| {
            if (stretch.first >= tile_end) return;
            const end = @min(stretch.end, tile_end);
            position = stretch.first;
            while (position < end) {
                const found = query.rows.run(kv_head, position, end);
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

/// The positions that any of a few query rows may see and that are there: [0, sink_end) and [first, end) of those that
/// retention left.
const Visible = struct {
    rows: *const Rows,
    first: u32,
    end: u32,
    sink_end: u32,

    const Stretch = struct { first: u32, end: u32 };

    /// The first stretch of visible positions at `from` or later.
    fn stretchFrom(visible: Visible, from: u32) ?Stretch {
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
            return .{ .first = position, .end = end };
        }
    }

    /// The tile of the first visible position at `from` or later.
    fn tileFrom(visible: Visible, from: u32) ?u32 {
        const stretch = visible.stretchFrom(from) orelse return null;
        return stretch.first / dispatch.tile_tokens;
    }
};

test {
    _ = @import("attend_test.zig");
}
