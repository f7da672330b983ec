//! One query of each head over all rows of a layer, which come from memory.

const std = @import("std");
const figures = @import("figures.zig");
const kvern = @import("../kvern.zig");
const reference = @import("../kernels/reference/attention.zig");
const Output = figures.Output;
const repeats = figures.repeats;
const kv_head_count = figures.kv_head_count;
const ratio = figures.ratio;
const head_dim = figures.head_dim;

/// Bytes of all layers that a figure from memory goes through: more than any cache holds.
pub const rotated_bytes = 1 << 30;

pub fn contiguous(gpa: std.mem.Allocator, io: std.Io, out: Output, dtype: kvern.Dtype, tokens: u32, read_rate: f64) !void {
    const shape: kvern.Shape = .{ .layer_count = 1, .kv_head_count = kv_head_count, .head_dim = head_dim, .max_seq_len = tokens };
    const layer_bytes = try shape.memoryBytes(dtype, dtype);
    const layer_count: u32 = @intCast(try std.math.divCeil(u64, rotated_bytes, layer_bytes));
    var cache: kvern.ContiguousCache = try .init(gpa, .{
        .layer_count = layer_count,
        .kv_head_count = kv_head_count,
        .head_dim = head_dim,
        .max_seq_len = tokens,
        .dtype_k = dtype,
        .dtype_v = dtype,
    });
    defer cache.deinit();
    const rows = try figures.randomRows(gpa, tokens * shape.kvDim());
    defer gpa.free(rows);
    for (0..layer_count) |layer| _ = try cache.append(@intCast(layer), 0, .fromF32(rows), .fromF32(rows));
    const layers = try gpa.alloc(kvern.Rows, layer_count);
    defer gpa.free(layers);
    for (layers, 0..) |*layer, i| layer.* = try cache.rows(@intCast(i), 0);
    const stored = try gpa.alloc(f32, 2 * rows.len);
    defer gpa.free(stored);
    const k, const v = figures.outputs(stored);
    _ = try cache.gather(0, 0, k, v);
    try time(gpa, io, out, .{ .layers = layers, .stored = stored, .bytes = layer_bytes, .kv = dtype, .name = "decode", .tolerance = 1e-5 }, read_rate);
}

/// Floats in a tail and nothing else, codes in a store without a tail.
pub fn optionsOf(dtype: kvern.Dtype, tokens: u32) kvern.PagedOptions {
    var options: kvern.PagedOptions = .{
        .layers = &.{.{ .kv_head_count = kv_head_count, .head_dim = head_dim }},
        .max_seq_len = tokens,
    };
    if (dtype.isFloat()) {
        options.dtype_k = dtype;
        options.dtype_v = dtype;
    } else {
        options.policy = .{ .kind = .tiered, .store = .{ .dtype_k = dtype, .dtype_v = dtype } };
    }
    return options;
}

pub fn paged(gpa: std.mem.Allocator, io: std.Io, out: Output, dtype: kvern.Dtype, tokens: u32, read_rate: f64) !void {
    var cache: kvern.PagedCache = try .init(gpa, optionsOf(dtype, tokens));
    defer cache.deinit();
    const rows = try figures.randomRows(gpa, tokens * kv_head_count * head_dim);
    defer gpa.free(rows);
    const first = try cache.createSequence();
    try cache.append(0, &.{first}, &.{tokens}, .fromF32(rows), .fromF32(rows));
    try first.commit(tokens);
    const facts = try cache.stats();
    const layer_bytes = facts.tail_bytes + facts.store_bytes;
    // Layers to rotate through are sequences here: their rows are in blocks of their own.
    const layer_count: u32 = @intCast(try std.math.divCeil(u64, rotated_bytes, layer_bytes));
    const layers = try gpa.alloc(kvern.Rows, layer_count);
    defer gpa.free(layers);
    layers[0] = try first.rows(0);
    for (layers[1..]) |*layer| {
        const sequence = try cache.createSequence();
        try cache.append(0, &.{sequence}, &.{tokens}, .fromF32(rows), .fromF32(rows));
        try sequence.commit(tokens);
        layer.* = try sequence.rows(0);
    }
    const stored = try gpa.alloc(f32, 2 * rows.len);
    defer gpa.free(stored);
    const k, const v = figures.outputs(stored);
    _ = try first.gather(0, k, v);
    try time(gpa, io, out, .{ .layers = layers, .stored = stored, .bytes = layer_bytes, .kv = dtype, .name = "paged", .tolerance = 1e-3 }, read_rate);
}

/// Rounds of which the best is taken.
const best_of = 100;

/// What a decode step is timed on.
pub const Decode = struct {
    /// One after the other is attended.
    layers: []const kvern.Rows,
    /// Keys, then values of the first layer.
    stored: []const f32,
    /// Bytes of a layer.
    bytes: u64,
    kv: kvern.Dtype,
    name: []const u8,
    tolerance: f64,
    /// The best of many rounds, not the median of a few: what no memory slows down, only other programs do.
    takes_best: bool = false,
};

/// Times the step, and prints it.
pub fn time(gpa: std.mem.Allocator, io: std.Io, out: Output, case: Decode, read_rate: f64) !void {
    var prng: std.Random.DefaultPrng = .init(2);
    var q: [kv_head_count * ratio * head_dim]f32 = undefined;
    for (&q) |*element| element.* = prng.random().floatNorm(f32);
    var output: [q.len]f32 = undefined;
    try check(gpa, case, &q, &output);

    var times: [best_of]f64 = undefined;
    const rounds = times[0..if (case.takes_best) best_of else repeats];
    for (rounds) |*taken| {
        const begin = figures.start(io);
        for (case.layers) |layer| try kvern.attend(layer, &q, .{}, &output, &.{});
        taken.* = figures.seconds(io, begin) / @as(f64, @floatFromInt(case.layers.len));
    }
    const seconds = if (case.takes_best) std.mem.min(f64, rounds) else figures.median(rounds);
    const rate = @as(f64, @floatFromInt(case.bytes)) / seconds;
    try out.row(.{
        .name = case.name,
        .kv = @tagName(case.kv),
        .tokens = case.layers[0].row_count,
        .milliseconds = seconds * 1e3,
        .gigabytes_per_second = rate / 1e9,
        .share = rate / read_rate,
    });
}

/// The last query head against the reference.
fn check(gpa: std.mem.Allocator, case: Decode, q: []const f32, output: []f32) !void {
    const rows = case.layers[0];
    try kvern.attend(rows, q, .{}, output, &.{});
    const keys = try gpa.alloc(f64, rows.row_count * head_dim);
    defer gpa.free(keys);
    const values = try gpa.alloc(f64, rows.row_count * head_dim);
    defer gpa.free(values);
    for (0..rows.row_count) |token| for (0..head_dim) |d| {
        const at = (token * kv_head_count + kv_head_count - 1) * head_dim + d;
        keys[token * head_dim + d] = case.stored[at];
        values[token * head_dim + d] = case.stored[case.stored.len / 2 + at];
    };
    var truth: [head_dim]f64 = undefined;
    _ = reference.attend(.{
        .query = q[q.len - head_dim ..],
        .keys = keys,
        .values = values,
        .position = rows.row_count - 1,
        .softmax_scale = 1 / @sqrt(@as(f64, head_dim)),
    }, &truth);
    var difference: f64 = 0;
    var magnitude: f64 = 0;
    for (output[output.len - head_dim ..], truth) |got, expected| {
        difference += @abs(got - expected);
        magnitude += @abs(expected);
    }
    if (!(difference <= case.tolerance * magnitude)) figures.fail("attend is wrong");
}
