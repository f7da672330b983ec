//! A query step, checked: what is asked of which rows, and where each answer goes.
//!
//!     q, output: [query][q_head][head_dim]        lse: [query][q_head]
//!
//! Query head h uses KV head floor(h / ratio), ratio = q_head_count / kv_head_count. A *row* is one query of one query head:
//! row r of a KV head is query r / ratio, head r % ratio of that KV head's.

const std = @import("std");
const assert = std.debug.assert;
const Rows = @import("../cache/rows.zig").Rows;
const checkApart = @import("../cache/overlap.zig").checkApart;
const dispatch = @import("../kernels/dispatch.zig");

/// Nodes of a tree of drafted tokens: one bit each in a row's mask.
pub const tree_node_count_max = 64;

/// How queries attend: which rows they see, and how scores are scaled.
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

/// PositionOutOfRange: a query would see rows that were let go or are hidden, as it belongs to a row before the newest
/// committed one, or asks for sinks that its layer's window has passed.
pub const Error = error{ InvalidConfig, InvalidSize, NotFinite, PositionOutOfRange, Unsupported };

/// A checked step, that cannot fail any more. A batch checks all of its steps before it runs the first.
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
    tree: Tree,

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
        const tree: Tree = try .init(rows, options);
        const softmax_scale = options.softmax_scale orelse 1 / @sqrt(@as(f32, @floatFromInt(head_dim)));
        if (!std.math.isFinite(softmax_scale)) return error.InvalidConfig;

        const query_elements = @as(u64, options.query_count) * head_dim;
        if (q.len == 0 or q.len % query_elements != 0) return error.InvalidSize;
        const q_head_count = std.math.cast(u32, q.len / query_elements) orelse return error.InvalidSize;
        if (q_head_count % rows.kv_head_count != 0) return error.InvalidSize;
        if (rows.q_head_count) |count| if (q_head_count != count) return error.InvalidSize;
        // Rows of one KV head are counted in u32.
        const ratio = q_head_count / rows.kv_head_count;
        if (ratio > std.math.maxInt(u32) / options.query_count) return error.InvalidSize;

        for ([_][]align(1) const f32{ options.alibi_slopes, options.sink_logits }) |per_head| {
            if (per_head.len != 0 and per_head.len != q_head_count) return error.InvalidSize;
            for (per_head) |value| if (!std.math.isFinite(value)) return error.InvalidConfig;
        }
        if (output.len < q.len) return error.InvalidSize;
        if (lse.len != 0 and lse.len < q.len / head_dim) return error.InvalidSize;
        try checkSeen(rows, options);
        try checkMemory(&rows, q, options, output, lse);
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
            .tree = tree,
        };
    }

    /// What a step writes must not be what is read later: the arrays of its options, another query's, the rows. An output
    /// may stand exactly where its queries do, as each is read before it is written. Of a batch this is to be asked for its
    /// whole arrays, beside each step's. `output` and `lse` may be longer than what is written.
    pub fn checkMemory(
        rows: *const Rows,
        q: []align(1) const f32,
        options: Options,
        output: []align(1) f32,
        lse: []align(1) f32,
    ) error{InvalidConfig}!void {
        const output_bytes = std.mem.sliceAsBytes(output[0..@min(output.len, q.len)]);
        const lse_bytes = std.mem.sliceAsBytes(lse[0..@min(lse.len, q.len / rows.head_dim)]);
        if (output.ptr != q.ptr) try checkApart(output_bytes, std.mem.sliceAsBytes(q));
        try checkApart(lse_bytes, std.mem.sliceAsBytes(q));
        try checkApart(lse_bytes, output_bytes);
        for ([_][]const u8{ output_bytes, lse_bytes }) |written| {
            try checkApart(written, std.mem.sliceAsBytes(options.alibi_slopes));
            try checkApart(written, std.mem.sliceAsBytes(options.sink_logits));
            try checkApart(written, std.mem.sliceAsBytes(options.tree_parents));
            try rows.checkApartFrom(written);
        }
    }

    /// Makes the queries known to the heads they ask: the bound on the error of a score holds for queries no longer than
    /// those that were seen.
    pub fn observe(query: *const Query) void {
        if (query.rows.fidelity.len == 0) return;
        const head_dim = query.rows.head_dim;
        for (0..query.q.len / head_dim) |row| {
            const head = &query.rows.fidelity[row % query.q_head_count / query.ratio];
            head.observe(query.q[row * head_dim ..][0..head_dim], query.softmax_scale);
        }
    }

    /// Are all rows there that the queries should see? That is what their windows and sinks name, of what retention keeps
    /// for a query at its position: of a sequence that ends there. A query that is not causal belongs to no position but in
    /// windows, so retention keeps for it what it keeps for the newest row.
    fn checkSeen(rows: Rows, options: Options) error{PositionOutOfRange}!void {
        if (rows.first <= rows.sink_end) return;
        const first: i64 = rows.first;
        const sink_end: i64 = rows.sink_end;
        const row_count: i64 = rows.row_count;
        // The oldest query reaches furthest back. A causal one among the sinks sees nothing else.
        var position = row_count - options.query_count;
        if (options.causal) position = @max(position, sink_end);
        const end = if (options.causal) position + 1 else row_count;
        const kept_first = if (rows.newest_tokens) |tokens| end - tokens else 0;
        var seen_first = kept_first;
        for ([_]?u32{ options.window_tokens, rows.window_tokens }) |window| {
            if (window) |tokens| seen_first = @max(seen_first, position + 1 - @as(i64, tokens));
        }
        if (seen_first < first) return error.PositionOutOfRange;
        if (@max(kept_first, sink_end) < @min(options.sink_tokens, first)) return error.PositionOutOfRange;
    }

    /// Query rows of one KV head.
    pub fn rowCount(query: *const Query) u32 {
        return query.options.query_count * query.ratio;
    }

    /// Where row `row` of a KV head stands in `lse`; times head_dim, in `q` and the output.
    pub fn rowIndex(query: *const Query, kv_head: u32, row: u32) usize {
        const head = kv_head * query.ratio + row % query.ratio;
        return @as(usize, row / query.ratio) * query.q_head_count + head;
    }

    /// What one row may see.
    pub fn visibility(query: *const Query, kv_head: u32, row: u32) dispatch.QueryRow {
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
            .tree_first = query.rows.row_count - query.tree.node_count,
            .tree_mask = query.tree.mask(index),
            .score_max = -std.math.inf(f32),
            .weight_sum = 0,
        };
    }
};

/// A tree of drafted tokens, copied from its parents as they were checked: another thread may write a caller's memory, and
/// parents are followed.
pub const Tree = struct {
    node_count: u32 = 0,
    /// [node], below 0 for a root.
    parents: [tree_node_count_max]i8 = undefined,

    fn init(rows: Rows, options: Options) error{ InvalidConfig, InvalidSize, Unsupported }!Tree {
        const given = options.tree_parents;
        if (given.len == 0) return .{};
        if (given.len != options.query_count or given.len > tree_node_count_max) return error.InvalidSize;
        if (given.len > rows.row_count) return error.InvalidSize;
        if (!options.causal) return error.InvalidConfig;
        if (options.window_tokens != null or rows.window_tokens != null) return error.Unsupported;
        if (options.alibi_slopes.len != 0) return error.Unsupported;
        var tree: Tree = .{ .node_count = @intCast(given.len) };
        for (tree.parents[0..given.len], given, 0..) |*to, from, node| {
            const parent: i32 = @max(-1, from);
            if (parent >= @as(i32, @intCast(node))) return error.InvalidConfig;
            to.* = @intCast(parent);
        }
        return tree;
    }

    /// One bit for each node that a node sees: its ancestors and itself.
    fn mask(tree: *const Tree, node: u32) u64 {
        if (tree.node_count == 0) return 0;
        var bits: u64 = 0;
        var at: i32 = @intCast(node);
        while (at >= 0) : (at = tree.parents[@intCast(at)]) {
            assert(at < tree.node_count);
            bits |= @as(u64, 1) << @intCast(at);
        }
        return bits;
    }
};
