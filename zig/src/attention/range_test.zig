//! Attention whose numbers leave the range of f32 on the way, against `kernels/reference/attention.zig` in f64: every level, every
//! format, every option, by one thread and by several.

const std = @import("std");
const memcheck = @import("build_options").memcheck;
const testing = std.testing;
const attention = @import("attend.zig");
const ContiguousCache = @import("../cache/contiguous.zig").ContiguousCache;
const dispatch = @import("../kernels/dispatch.zig");
const Dtype = @import("../dtype.zig").Dtype;
const PagedCache = @import("../cache/paged/cache.zig").PagedCache;
const reference = @import("../kernels/reference/attention.zig");
const Rows = @import("../cache/rows.zig").Rows;
const workers = @import("../device/workers.zig");

const huge = 3e38;
const largest = std.math.floatMax(f32);

fn forEachLevel(comptime body: fn () anyerror!void) !void {
    const before = dispatch.kernels().level;
    defer dispatch.changeLevel(before) catch unreachable;
    for (std.enums.values(dispatch.Level)) |level| {
        if (dispatch.tableOf(level) == null) continue;
        try dispatch.changeLevel(level);
        body() catch |err| {
            std.debug.print("level {s}\n", .{@tagName(level)});
            return err;
        };
    }
}

/// Attends with a scale that is given, alone, in place and by three threads, and compares with the truth about the rows,
/// which are [token][kv_head][head_dim] as they are stored.
fn check(rows: Rows, k: []const f32, v: []const f32, q: []const f32, options: attention.Options) !void {
    const gpa = testing.allocator;
    const head_dim = rows.head_dim;
    const q_head_count = q.len / options.query_count / head_dim;
    const output = try gpa.alloc(f32, q.len);
    defer gpa.free(output);
    @memset(output, std.math.nan(f32));
    const lse = try gpa.alloc(f32, q.len / head_dim);
    defer gpa.free(lse);
    try attention.attend(rows, q, options, output, lse);
    try expectTruth(rows, k, v, q, options, output, lse);

    const in_place = try gpa.dupe(f32, q);
    defer gpa.free(in_place);
    try attention.attend(rows, in_place, options, in_place, &.{});
    try testing.expectEqualSlices(f32, output, in_place);

    if (memcheck) return; // one thread at a time runs there
    const before = workers.threadCount();
    defer workers.setThreadCount(before) catch unreachable;
    try workers.setThreadCount(3);
    const shared_lse = try gpa.alloc(f32, options.query_count * q_head_count);
    defer gpa.free(shared_lse);
    try attention.attend(rows, q, options, in_place, shared_lse);
    try testing.expectEqualSlices(f32, output, in_place);
    try testing.expectEqualSlices(f32, lse, shared_lse);
}

fn expectTruth(
    rows: Rows,
    k: []const f32,
    v: []const f32,
    q: []const f32,
    options: attention.Options,
    output: []const f32,
    lse: []const f32,
) !void {
    const gpa = testing.allocator;
    const head_dim = rows.head_dim;
    const kv_dim = rows.kv_head_count * head_dim;
    const token_count = k.len / kv_dim;
    const keys = try gpa.alloc(f64, token_count * head_dim);
    defer gpa.free(keys);
    const values = try gpa.alloc(f64, token_count * head_dim);
    defer gpa.free(values);
    var truth: [256]f64 = undefined;
    const q_head_count = lse.len / options.query_count;
    for (0..lse.len) |row| {
        const head = row % q_head_count;
        const kv_head = head / (q_head_count / rows.kv_head_count);
        for (0..token_count) |token| for (0..head_dim) |d| {
            keys[token * head_dim + d] = k[token * kv_dim + kv_head * head_dim + d];
            values[token * head_dim + d] = v[token * kv_dim + kv_head * head_dim + d];
        };
        const truth_lse = reference.attend(.{
            .query = q[row * head_dim ..][0..head_dim],
            .keys = keys,
            .values = values,
            .position = @as(i64, @intCast(token_count)) - options.query_count + @as(i64, @intCast(row / q_head_count)),
            .softmax_scale = options.softmax_scale.?,
            .causal = options.causal,
            .window_tokens = options.window_tokens,
            .sink_tokens = options.sink_tokens,
            .softcap = if (options.softcap) |cap| cap else null,
            .alibi_slope = if (options.alibi_slopes.len == 0) 0 else options.alibi_slopes[head],
            .sink_logit = if (options.sink_logits.len == 0) null else options.sink_logits[head],
        }, truth[0..head_dim]);
        if (std.math.isInf(truth_lse)) {
            try testing.expectEqual(-std.math.inf(f32), lse[row]);
        } else {
            const expected = std.math.clamp(truth_lse, -largest, largest);
            // Where one huge score is all, it has the roundings of its products: 64 of 2^-24 at most.
            const query = q[row * head_dim ..][0..head_dim];
            const slack = if (@abs(truth_lse) < 1e30) 0 else 4e-6 * @abs(options.softmax_scale.?) * magnitude(query, keys);
            if (!(@abs(lse[row] - expected) <= 1e-5 * (1 + @abs(expected)) + slack)) {
                std.debug.print("row {}: lse {e} for {e}\n", .{ row, lse[row], truth_lse });
                return error.WrongLse;
            }
        }
        for (truth[0..head_dim], output[row * head_dim ..][0..head_dim]) |expected, got| {
            if (!(@abs(got - expected) <= 1e-4 * (1 + @abs(expected)))) {
                std.debug.print("row {}: {e} for {e}\n", .{ row, got, expected });
                return error.WrongOutput;
            }
        }
    }
}

/// The largest sum of the magnitudes of products of a query and a key.
fn magnitude(query: []const f32, keys: []const f64) f64 {
    var most: f64 = 0;
    for (0..keys.len / query.len) |token| {
        var sum: f64 = 0;
        for (query, keys[token * query.len ..][0..query.len]) |a, b| sum += @abs(@as(f64, a) * b);
        most = @max(most, sum);
    }
    return most;
}

/// What is out of the ordinary.
const Kind = enum {
    /// A key of 3e38 in every element: its scores pass the largest f32, above and below.
    key,
    /// A key of 3e38 and -3e38 in turn: Inf - Inf within a score, which is 0 for a query of ones.
    signs,
    /// All keys -3e38: every score is below the smallest f32, and equally so.
    depth,
    /// All values 3e38: their sums pass the largest f32, their average does not.
    values,
    /// Nothing: the scale is 3e38, or the queries are.
    plain,
};

fn fill(random: std.Random, kind: Kind, head_dim: usize, k: []f32, v: []f32) void {
    for (k) |*x| x.* = random.floatNorm(f32);
    for (v) |*x| x.* = random.floatNorm(f32);
    const at = k.len / head_dim / 2 * head_dim; // one head of a token in the middle
    switch (kind) {
        .key => @memset(k[at..][0..head_dim], huge),
        .signs => for (k[at..][0..head_dim], 0..) |*x, d| {
            x.* = if (d % 2 == 0) huge else -huge;
        },
        .depth => @memset(k, -huge),
        .values => @memset(v, huge),
        .plain => {},
    }
}

const Case = struct {
    kind: Kind,
    dtype_k: Dtype = .f32,
    dtype_v: Dtype = .f32,
    head_dim: u32 = 64,
    token_count: u32 = 70,
    ratio: u32 = 1,
    /// Every other query is of ones; the others are random, of this magnitude.
    magnitude: f32 = 1,
    options: attention.Options = .{ .softmax_scale = 0.125 },
};

fn checkContiguous(case: Case) !void {
    errdefer std.debug.print("{any}\n", .{case});
    const gpa = testing.allocator;
    var prng: std.Random.DefaultPrng = .init(case.token_count + case.head_dim);
    const kv_dim = 2 * case.head_dim;
    const rows = try gpa.alloc(f32, 2 * case.token_count * kv_dim);
    defer gpa.free(rows);
    const k = rows[0 .. rows.len / 2];
    const v = rows[rows.len / 2 ..];
    fill(prng.random(), case.kind, case.head_dim, k, v);
    const q = try gpa.alloc(f32, case.options.query_count * 2 * case.ratio * case.head_dim);
    defer gpa.free(q);
    for (q, 0..) |*x, i| {
        x.* = if (i / case.head_dim % 2 == 0) 1 else case.magnitude * (2 * prng.random().float(f32) - 1);
    }
    var cache: ContiguousCache = try .init(gpa, .{
        .layer_count = 1,
        .kv_head_count = 2,
        .head_dim = case.head_dim,
        .max_seq_len = case.token_count,
        .dtype_k = case.dtype_k,
        .dtype_v = case.dtype_v,
    });
    defer cache.deinit();
    _ = try cache.append(0, 0, .fromF32(k), .fromF32(v));
    const element_count = k.len;
    _ = try cache.gather(0, 0, .{ .bytes = @ptrCast(k.ptr), .element_count = element_count }, .{
        .bytes = @ptrCast(v.ptr),
        .element_count = element_count,
    });
    try check(try cache.rows(0, 0), k, v, q, case.options);
}

test "keys and values near the largest f32, in every format of floats that has them" {
    try forEachLevel(struct {
        fn run() !void {
            for (std.enums.values(Kind)) |kind| for ([_]Dtype{ .f32, .bf16 }) |dtype| {
                try checkContiguous(.{ .kind = kind, .dtype_k = dtype, .dtype_v = dtype });
                try checkContiguous(.{ .kind = kind, .dtype_k = dtype, .dtype_v = dtype, .head_dim = 5, .ratio = 3 });
            };
            for ([_]Kind{ .key, .signs, .depth }) |kind| try checkContiguous(.{ .kind = kind, .dtype_k = .bf16, .dtype_v = .f16 });
        }
    }.run);
}

test "a scale of 3e38, and queries of it" {
    try forEachLevel(struct {
        fn run() !void {
            for ([_]Dtype{ .f32, .f16, .bf16 }) |dtype| for ([_]f32{ huge, -huge }) |scale| {
                try checkContiguous(.{ .kind = .plain, .dtype_k = dtype, .options = .{ .softmax_scale = scale } });
                try checkContiguous(.{ .kind = .plain, .dtype_k = dtype, .magnitude = scale, .options = .{ .softmax_scale = 1 } });
                try checkContiguous(.{ .kind = .plain, .dtype_k = dtype, .magnitude = scale, .options = .{ .softmax_scale = scale } });
            };
        }
    }.run);
}

test "every option, of many queries and few" {
    if (memcheck) return error.SkipZigTest; // takes minutes there, and reads what the other tests read
    try forEachLevel(struct {
        fn run() !void {
            const all = [_]attention.Options{
                .{ .causal = false },
                .{ .window_tokens = 33 },
                .{ .window_tokens = 8, .sink_tokens = 36 },
                .{ .softcap = 2 },
                .{ .softcap = 3e37 },
                .{ .alibi_slopes = &.{ 0.5, 0.25, 3e38, -3e38 } },
                .{ .alibi_slopes = &.{ 3e38, 3e38, 3e38, 3e38 }, .causal = false },
                .{ .sink_logits = &.{ 0, 3e38, -3e38, 1 } },
                .{ .window_tokens = 33, .softcap = 5, .sink_logits = &.{ 0, 4, -1, 1 }, .alibi_slopes = &.{ 0.5, 0.25, 1e30, 0.1 } },
            };
            for (all) |given| for ([_]u32{ 1, 40, 75 }) |query_count| for ([_]Kind{ .key, .signs, .depth, .values }) |kind| {
                var options = given;
                options.query_count = query_count;
                options.softmax_scale = 0.125;
                try checkContiguous(.{ .kind = kind, .ratio = 2, .options = options });
            };
        }
    }.run);
}

test "several chunks of positions: one row of them is out of range" {
    if (memcheck) return error.SkipZigTest; // takes minutes there, and reads what the other tests read
    for ([_]Kind{ .key, .signs, .values }) |kind| {
        try checkContiguous(.{ .kind = kind, .token_count = 3000, .dtype_k = .bf16, .options = .{ .softmax_scale = 0.1, .query_count = 3 } });
    }
}

test "what was right in f32 keeps its bits beside what was not" {
    const gpa = testing.allocator;
    var prng: std.Random.DefaultPrng = .init(3);
    var k: [70 * 128]f32 = undefined;
    var v: [70 * 128]f32 = undefined;
    fill(prng.random(), .plain, 64, &k, &v);
    var cache: ContiguousCache = try .init(gpa, .{ .layer_count = 1, .kv_head_count = 2, .head_dim = 64, .max_seq_len = 70 });
    defer cache.deinit();
    _ = try cache.append(0, 0, .fromF32(k[0 .. 69 * 128]), .fromF32(v[0 .. 69 * 128]));
    const q: [128]f32 = @splat(0.5);
    var alone: [128]f32 = undefined;
    try attention.attend(try cache.rows(0, 0), &q, .{}, &alone, &.{});
    // The row that comes next is hidden from the query before its own, and stands in its tile.
    @memset(k[69 * 128 ..], huge);
    _ = try cache.append(0, 0, .fromF32(k[69 * 128 ..]), .fromF32(v[69 * 128 ..]));
    const both: [256]f32 = @splat(0.5);
    var output: [256]f32 = undefined;
    try attention.attend(try cache.rows(0, 0), &both, .{ .query_count = 2 }, &output, &.{});
    try testing.expectEqualSlices(f32, &alone, output[0..128]);
    try testing.expectApproxEqAbs(v[69 * 128], output[128], 1e-6);
}

test "a tree: a node is none the worse for a sibling that is out of range" {
    const gpa = testing.allocator;
    var prng: std.Random.DefaultPrng = .init(4);
    var k: [10 * 32]f32 = undefined;
    var v: [10 * 32]f32 = undefined;
    fill(prng.random(), .plain, 32, &k, &v);
    var cache: ContiguousCache = try .init(gpa, .{ .layer_count = 1, .sequence_count = 2, .kv_head_count = 1, .head_dim = 32, .max_seq_len = 10 });
    defer cache.deinit();
    // The other sequence has a sibling like any.
    _ = try cache.append(0, 1, .fromF32(&k), .fromF32(&v));
    @memset(k[8 * 32 ..][0..32], huge);
    _ = try cache.append(0, 0, .fromF32(&k), .fromF32(&v));
    const q: [64]f32 = @splat(1);
    var output: [64]f32 = undefined;
    var lse: [2]f32 = undefined;
    const options: attention.Options = .{ .query_count = 2, .tree_parents = &.{ -1, -1 } };
    try attention.attend(try cache.rows(0, 0), &q, options, &output, &lse);
    var other: [64]f32 = undefined;
    try attention.attend(try cache.rows(0, 1), &q, options, &other, &.{});
    try testing.expectEqualSlices(f32, other[32..], output[32..]);
    try testing.expectEqualSlices(f32, v[8 * 32 ..][0..32], output[0..32]);
    try testing.expectEqual(largest, lse[0]);
}

test "rows in blocks, of every format, with gaps" {
    try forEachLevel(struct {
        fn run() !void {
            // Valgrind takes one of each kind.
            const dtypes: []const Dtype = if (memcheck) &.{ .f32, .q8_0, .i2 } else std.enums.values(Dtype);
            for (dtypes) |dtype| for ([_]?u32{ null, 130 }) |retention_tokens| {
                try checkPaged(dtype, retention_tokens);
            };
        }
    }.run);
}

fn checkPaged(dtype: Dtype, retention_tokens: ?u32) !void {
    errdefer std.debug.print("{s}, {any} rows stay\n", .{ @tagName(dtype), retention_tokens });
    const gpa = testing.allocator;
    const dim = 64;
    const tokens = 300;
    var cache: PagedCache = try .init(gpa, .{
        .layers = &.{.{ .kv_head_count = 2, .head_dim = dim }},
        .max_seq_len = tokens,
        .dtype_k = .f32,
        .dtype_v = .f16,
        .policy = .{ .kind = .tiered, .store = .{ .dtype_k = dtype, .dtype_v = dtype } },
        .retention = .{ .tokens = retention_tokens, .sink_tokens = if (retention_tokens == null) 0 else 3 },
    });
    defer cache.deinit();
    const sequence = try cache.createSequence();
    const k = try gpa.alloc(f32, tokens * 2 * dim);
    defer gpa.free(k);
    const v = try gpa.alloc(f32, tokens * 2 * dim);
    defer gpa.free(v);
    var prng: std.Random.DefaultPrng = .init(5);
    fill(prng.random(), .plain, dim, k, v);
    _ = try sequence.append(0, .fromF32(k), .fromF32(v));
    try sequence.commit(tokens);
    const rows = try sequence.rows(0);
    const stored = rows.residentCount() * 2 * dim;
    _ = try sequence.gather(0, .{ .bytes = @ptrCast(k.ptr), .element_count = stored }, .{
        .bytes = @ptrCast(v.ptr),
        .element_count = stored,
    });
    var q: [4 * dim]f32 = undefined;
    for (&q) |*x| x.* = huge * (2 * prng.random().float(f32) - 1);
    // One query sees all that is left, whatever the positions are.
    try check(rows, k[0..stored], v[0..stored], &q, .{ .softmax_scale = 1 });
    try check(rows, k[0..stored], v[0..stored], &q, .{ .softmax_scale = 1e38, .softcap = 4 });
    try check(rows, k[0..stored], v[0..stored], &q, .{ .softmax_scale = -1, .sink_logits = &.{ 3e38, -3e38, 0, 1 } });
}
