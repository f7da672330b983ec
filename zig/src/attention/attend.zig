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
const contiguous = @import("../cache/contiguous.zig");
const ContiguousCache = contiguous.ContiguousCache;
const shapes = @import("../shape.zig");
const dispatch = @import("../kernels/dispatch.zig");

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
};

pub const Error = ContiguousCache.IndexError || error{ InvalidConfig, InvalidSize, NotFinite };

/// Attention of `q` over the rows of one layer of one sequence. `output` takes q.len elements; `lse` takes one for each
/// query and head, or is empty. Nothing is written unless all is well.
pub fn attend(
    cache: *const ContiguousCache,
    layer_index: u32,
    sequence_index: u32,
    q: []align(1) const f32,
    options: Options,
    output: []align(1) f32,
    lse: []align(1) f32,
) Error!void {
    const rows = try cache.rows(layer_index, sequence_index);
    const query = try Query.init(rows, q, options);
    if (output.len < q.len) return error.InvalidSize;
    if (lse.len != 0 and lse.len < query.lseCount()) return error.InvalidSize;
    for (0..rows.shape.kv_head_count) |kv_head| {
        var row_first: u32 = 0;
        while (row_first < query.rowCount()) : (row_first += dispatch.row_count_max) {
            const row_count = @min(query.rowCount() - row_first, dispatch.row_count_max);
            query.attendRows(@intCast(kv_head), row_first, row_count, output, lse);
        }
    }
}

/// A checked call.
const Query = struct {
    rows: contiguous.Rows,
    q: []align(1) const f32,
    options: Options,
    q_head_count: u32,
    /// Query heads of one KV head.
    ratio: u32,
    softmax_scale: f32,

    fn init(rows: contiguous.Rows, q: []align(1) const f32, options: Options) error{ InvalidConfig, InvalidSize, NotFinite }!Query {
        const head_dim = rows.shape.head_dim;
        if (options.query_count == 0) return error.InvalidConfig;
        if (options.window_tokens) |tokens| if (tokens == 0 or !options.causal) return error.InvalidConfig;
        if (options.softcap) |cap| if (!(cap > 0 and std.math.isFinite(cap))) return error.InvalidConfig;
        const softmax_scale = options.softmax_scale orelse 1 / @sqrt(@as(f32, @floatFromInt(head_dim)));
        if (!std.math.isFinite(softmax_scale)) return error.InvalidConfig;

        const query_elements = @as(u64, options.query_count) * head_dim;
        if (q.len == 0 or q.len % query_elements != 0) return error.InvalidSize;
        const q_head_count = std.math.cast(u32, q.len / query_elements) orelse return error.InvalidSize;
        if (q_head_count % rows.shape.kv_head_count != 0) return error.InvalidSize;
        // Rows of one KV head are counted in u32.
        const ratio = q_head_count / rows.shape.kv_head_count;
        if (ratio > std.math.maxInt(u32) / options.query_count) return error.InvalidSize;

        for ([_][]align(1) const f32{ options.alibi_slopes, options.sink_logits }) |per_head| {
            if (per_head.len != 0 and per_head.len != q_head_count) return error.InvalidSize;
            for (per_head) |value| if (!std.math.isFinite(value)) return error.InvalidConfig;
        }
        if (dispatch.kernels().storable(@ptrCast(q.ptr), .f32, .f32, q.len) == 0) return error.NotFinite;
        return .{
            .rows = rows,
            .q = q,
            .options = options,
            .q_head_count = q_head_count,
            .ratio = ratio,
            .softmax_scale = softmax_scale,
        };
    }

    fn lseCount(query: *const Query) u64 {
        return @as(u64, query.options.query_count) * query.q_head_count;
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
        const row_count: i64 = query.rows.row_count;
        const position = row_count - query.options.query_count + row / query.ratio;
        const end = if (query.options.causal) std.math.clamp(position + 1, 0, row_count) else row_count;
        const first = if (query.options.window_tokens) |tokens| @max(position + 1 - @as(i64, tokens), 0) else 0;
        const slopes = query.options.alibi_slopes;
        return .{
            .first = @intCast(@min(first, end)),
            .end = @intCast(end),
            .sink_end = @intCast(@min(query.options.sink_tokens, end)),
            // Negative for queries older than the oldest row; distances are taken modulo 2^32.
            .position = @truncate(@as(u64, @bitCast(position))),
            .alibi_slope = if (slopes.len == 0) 0 else slopes[kv_head * query.ratio + row % query.ratio],
            .score_max = -std.math.inf(f32),
            .weight_sum = 0,
        };
    }

    fn attendRows(
        query: *const Query,
        kv_head: u32,
        row_first: u32,
        row_count: u32,
        output: []align(1) f32,
        lse: []align(1) f32,
    ) void {
        // Safe builds fill undefined memory with 0xaa: 32 KiB of scratch for each KV head, measured at 3.8 us.
        @setRuntimeSafety(false);
        var scratch: Scratch = undefined;
        query.attendRowsIn(&scratch, kv_head, row_first, row_count, output, lse);
    }

    /// What one call of a kernel works on.
    const Scratch = struct {
        queries: [dispatch.row_count_max * shapes.head_dim_max]f32 align(64),
        sums: [dispatch.row_count_max * shapes.head_dim_max]f32 align(64),
        rows: [dispatch.row_count_max]dispatch.Row,
    };

    fn attendRowsIn(
        query: *const Query,
        scratch: *Scratch,
        kv_head: u32,
        row_first: u32,
        row_count: u32,
        output: []align(1) f32,
        lse: []align(1) f32,
    ) void {
        const queries = &scratch.queries;
        const sums = &scratch.sums;
        const rows = &scratch.rows;
        const head_dim = query.rows.shape.head_dim;
        const head_dim_padded = std.mem.alignForward(u32, head_dim, dispatch.lanes_max);
        @memset(sums[0 .. row_count * head_dim_padded], 0);

        var first: u32 = std.math.maxInt(u32);
        var end: u32 = 0;
        var sink_end: u32 = 0;
        for (rows[0..row_count], 0..) |*row, i| {
            const row_index = row_first + @as(u32, @intCast(i));
            row.* = query.visibility(kv_head, row_index);
            first = @min(first, row.first);
            end = @max(end, row.end);
            sink_end = @max(sink_end, row.sink_end);
            const q = query.q[query.rowIndex(kv_head, row_index) * head_dim ..][0..head_dim];
            const scaled = queries[i * head_dim_padded ..][0..head_dim_padded];
            for (scaled[0..head_dim], q) |*to, from| to.* = from * query.softmax_scale;
            @memset(scaled[head_dim..], 0);
        }

        var run_buffer: [2]dispatch.Run = undefined;
        const runs = query.visibleRuns(kv_head, first, end, sink_end, &run_buffer);
        const kernels = dispatch.kernels();
        kernels.attend(&.{
            .queries = queries,
            .sums = sums,
            .rows = rows,
            .row_count = row_count,
            .head_dim = head_dim,
            .head_dim_padded = head_dim_padded,
            .dtype_k = query.rows.dtype_k,
            .dtype_v = query.rows.dtype_v,
            .softcap = query.options.softcap orelse 0,
            .token_stride_k = query.rows.shape.rowBytes(query.rows.dtype_k),
            .token_stride_v = query.rows.shape.rowBytes(query.rows.dtype_v),
            .runs = runs.ptr,
            .run_count = @intCast(runs.len),
        });

        for (rows[0..row_count], 0..) |*row, i| {
            const index = query.rowIndex(kv_head, row_first + @as(u32, @intCast(i)));
            const sink_logits = query.options.sink_logits;
            const row_lse = kernels.finish(&.{
                .sums = sums[i * head_dim_padded ..].ptr,
                .output = @ptrCast(output[index * head_dim ..].ptr),
                .row = row,
                .head_dim = head_dim,
                .has_sink_logit = @intFromBool(sink_logits.len != 0),
                .sink_logit = if (sink_logits.len == 0) 0 else sink_logits[index % query.q_head_count],
            });
            if (lse.len != 0) lse[index] = row_lse;
        }
    }

    /// The stretches that any of the rows may see: [0, sink_end) and [first, end), joined where they touch.
    fn visibleRuns(
        query: *const Query,
        kv_head: u32,
        first: u32,
        end: u32,
        sink_end: u32,
        buffer: *[2]dispatch.Run,
    ) []const dispatch.Run {
        if (sink_end == 0 or sink_end >= first) {
            const from = if (sink_end == 0) first else 0;
            if (from >= end) return buffer[0..0];
            buffer[0] = query.runOf(kv_head, from, end);
            return buffer[0..1];
        }
        buffer[0] = query.runOf(kv_head, 0, sink_end);
        if (first >= end) return buffer[0..1];
        buffer[1] = query.runOf(kv_head, first, end);
        return buffer[0..2];
    }

    fn runOf(query: *const Query, kv_head: u32, first: u32, end: u32) dispatch.Run {
        const rows = query.rows;
        assert(first < end and end <= rows.row_count);
        return .{
            .keys = rows.keys + rows.shape.positionBytes(first, rows.dtype_k) + rows.shape.headBytes(kv_head, rows.dtype_k),
            .values = rows.values + rows.shape.positionBytes(first, rows.dtype_v) + rows.shape.headBytes(kv_head, rows.dtype_v),
            .position = first,
            .token_count = end - first,
        };
    }
};

test {
    _ = @import("attend_test.zig");
}
