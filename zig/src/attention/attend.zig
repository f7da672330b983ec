//! One query step: checks the options, cuts the queries into kernel tasks, and finishes the outputs.
//!
//!     q, output: [query][q_head][head_dim]        lse: [query][q_head]
//!
//! Query head h uses KV head floor(h / ratio), ratio = q_head_count / kv_head_count. All rows that share a KV head are
//! attended together, up to 16 at a time, so that each key and value is read once for all of them: a *row* here is one
//! query of one query head, and row r of a KV head is query r / ratio, head r % ratio of that KV head's.
//!
//! Scratch is on the stack and does not grow with the number of keys.

const std = @import("std");
const assert = std.debug.assert;
const row_types = @import("../cache/rows.zig");
const Rows = row_types.Rows;
const shapes = @import("../shape.zig");
const dispatch = @import("../kernels/dispatch.zig");

/// Runs handed to a kernel at once; it is called again where a sequence has more.
const run_count_max = 256;

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
        for (0..query.rows.kv_head_count) |kv_head| {
            var row_first: u32 = 0;
            while (row_first < query.rowCount()) : (row_first += dispatch.row_count_max) {
                const row_count = @min(query.rowCount() - row_first, dispatch.row_count_max);
                query.attendRows(@intCast(kv_head), row_first, row_count);
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

    fn attendRows(query: *const Query, kv_head: u32, row_first: u32, row_count: u32) void {
        // Safe builds fill undefined memory with 0xaa: 32 KiB of scratch for each KV head, measured at 3.8 us.
        @setRuntimeSafety(false);
        var scratch: Scratch = undefined;
        query.attendRowsIn(&scratch, kv_head, row_first, row_count);
    }

    /// What one call of a kernel works on.
    const Scratch = struct {
        queries: [dispatch.row_count_max * shapes.head_dim_max]f32 align(64),
        sums: [dispatch.row_count_max * shapes.head_dim_max]f32 align(64),
        rows: [dispatch.row_count_max]dispatch.Row,
        runs: [run_count_max]dispatch.Run,
    };

    fn attendRowsIn(query: *const Query, scratch: *Scratch, kv_head: u32, row_first: u32, row_count: u32) void {
        const head_dim = query.rows.head_dim;
        const head_dim_padded = std.mem.alignForward(u32, head_dim, dispatch.lanes_max);
        @memset(scratch.sums[0 .. row_count * head_dim_padded], 0);

        var first: u32 = std.math.maxInt(u32);
        var end: u32 = 0;
        var sink_end: u32 = 0;
        for (scratch.rows[0..row_count], 0..) |*row, i| {
            const row_index = row_first + @as(u32, @intCast(i));
            row.* = query.visibility(kv_head, row_index);
            first = @min(first, row.first);
            end = @max(end, row.end);
            sink_end = @max(sink_end, row.sink_end);
            const q = query.q[query.rowIndex(kv_head, row_index) * head_dim ..][0..head_dim];
            const scaled = scratch.queries[i * head_dim_padded ..][0..head_dim_padded];
            for (scaled[0..head_dim], q) |*to, from| to.* = from * query.softmax_scale;
            @memset(scaled[head_dim..], 0);
        }

        const kernels = dispatch.kernels();
        var task: dispatch.AttendTask = .{
            .queries = &scratch.queries,
            .sums = &scratch.sums,
            .rows = &scratch.rows,
            .row_count = row_count,
            .head_dim = head_dim,
            .head_dim_padded = head_dim_padded,
            .dtype_k = query.rows.dtype_k,
            .dtype_v = query.rows.dtype_v,
            .softcap = query.options.softcap orelse 0,
            .token_stride_k = query.rows.tokenStrideK(),
            .token_stride_v = query.rows.tokenStrideV(),
            .runs = &scratch.runs,
            .run_count = 0,
        };
        // What any of the rows may see: [0, sink_end) and [first, end), one stretch where they touch.
        if (sink_end >= first) {
            query.attendStretch(kernels, &task, scratch, kv_head, 0, @max(sink_end, end));
        } else {
            query.attendStretch(kernels, &task, scratch, kv_head, 0, sink_end);
            query.attendStretch(kernels, &task, scratch, kv_head, first, end);
        }
        if (task.run_count != 0) kernels.attend(&task);

        for (scratch.rows[0..row_count], 0..) |*row, i| {
            const index = query.rowIndex(kv_head, row_first + @as(u32, @intCast(i)));
            const sink_logits = query.options.sink_logits;
            const row_lse = kernels.finish(&.{
                .sums = scratch.sums[i * head_dim_padded ..].ptr,
                .output = @ptrCast(query.output[index * head_dim ..].ptr),
                .row = row,
                .head_dim = head_dim,
                .has_sink_logit = @intFromBool(sink_logits.len != 0),
                .sink_logit = if (sink_logits.len == 0) 0 else sink_logits[index % query.q_head_count],
            });
            if (query.lse.len != 0) query.lse[index] = row_lse;
        }
    }

    /// Adds the resident runs of [first, end) to the task, and lets the kernel have them whenever there is no room for
    /// another tile: it must be given whole tiles, or the bits would depend on where the runs end.
    fn attendStretch(
        query: *const Query,
        kernels: *const dispatch.Table,
        task: *dispatch.AttendTask,
        scratch: *Scratch,
        kv_head: u32,
        first: u32,
        end: u32,
    ) void {
        const rows = &query.rows;
        var position = first;
        while (position < end) {
            const in_sink = position < rows.sink_end;
            if (!in_sink and position < rows.first) {
                position = rows.first;
                continue;
            }
            const resident_end = if (in_sink and rows.sink_end < rows.first) @min(end, rows.sink_end) else end;
            if (task.run_count + dispatch.tile_tokens > run_count_max) {
                const last = scratch.runs[task.run_count - 1];
                const last_tile = (last.position + last.token_count - 1) / dispatch.tile_tokens;
                if (position / dispatch.tile_tokens != last_tile) {
                    kernels.attend(task);
                    task.run_count = 0;
                }
            }
            const found = rows.run(kv_head, position, resident_end);
            scratch.runs[task.run_count] = .{
                .keys = found.keys,
                .values = found.values,
                .position = position,
                .token_count = found.token_count,
            };
            task.run_count += 1;
            position += found.token_count;
        }
    }
};

test {
    _ = @import("attend_test.zig");
}
