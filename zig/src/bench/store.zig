//! How fast rows are stored, in floats and in codes, beside a copy of as many f32.

const std = @import("std");
const figures = @import("figures.zig");
const float_reference = @import("../kernels/reference/float.zig");
const kvern = @import("../kvern.zig");
const Output = figures.Output;
const repeats = figures.repeats;
const kv_head_count = figures.kv_head_count;
const head_dim = figures.head_dim;

/// Appends that end in a store, beside the copy: all blocks but the last migrate.
pub fn quantize(gpa: std.mem.Allocator, io: std.Io, out: Output, dtype: kvern.Dtype) !void {
    const tokens = 16_384; // 64 MiB of f32 keys, 64 MiB of values
    var cache: kvern.PagedCache = try .init(gpa, .{
        .layers = &.{.{ .kv_head_count = kv_head_count, .head_dim = head_dim }},
        .max_seq_len = tokens,
        .policy = .{ .kind = .tiered, .store = .{ .dtype_k = dtype, .dtype_v = dtype } },
    });
    defer cache.deinit();
    // Blocks stay mapped from round to round, as the copy does.
    for (cache.state.groups[0].formats.items) |format| try format.pool.prewarm(tokens / 64);
    const rows = try figures.randomRows(gpa, tokens * kv_head_count * head_dim);
    defer gpa.free(rows);
    const copy = try gpa.alloc(f32, rows.len);
    defer gpa.free(copy);
    @memcpy(copy, rows);
    const sequence = try cache.createSequence();
    try checkQuantized(gpa, &cache, sequence, rows);
    const step_tokens = 512; // as a prefill hands them over
    const step_elements = step_tokens * kv_head_count * head_dim;
    var times: [repeats]f64 = undefined;
    var copies: [repeats]f64 = undefined;
    for (&times, &copies) |*time, *copy_time| {
        try sequence.truncate(0);
        const begin = figures.start(io);
        var at: usize = 0;
        while (at < rows.len) : (at += step_elements) {
            const part = rows[at..][0..step_elements];
            try cache.append(0, &.{sequence}, &.{step_tokens}, .fromF32(part), .fromF32(part));
            try sequence.commit(step_tokens);
        }
        time.* = figures.seconds(io, begin);
        copy_time.* = copySeconds(io, copy, rows);
    }
    try tellStored(out, "quantize", dtype, tokens, rows.len, &times, &copies);
}

/// The first block of rows comes back from the store as near as the coarsest format has it: with 2 bits, half of a third of
/// what random rows span, which is less than 10.
fn checkQuantized(gpa: std.mem.Allocator, cache: *kvern.PagedCache, sequence: *kvern.PagedSequence, rows: []const f32) !void {
    const first = rows[0 .. 64 * kv_head_count * head_dim];
    try cache.append(0, &.{sequence}, &.{64}, .fromF32(first), .fromF32(first));
    try sequence.commit(64);
    if ((try cache.stats()).store_token_count != 64) figures.fail("nothing migrated");
    const stored = try gpa.alloc(f32, 2 * first.len);
    defer gpa.free(stored);
    const k, const v = figures.outputs(stored);
    _ = try sequence.gather(0, k, v);
    for (stored, 0..) |got, i| if (!(@abs(got - first[i % first.len]) <= 10.0 / 6.0)) figures.fail("quantize is wrong");
}

/// Two copies: as many bytes as the keys and the values that a row is about.
fn copySeconds(io: std.Io, copy: []f32, rows: []const f32) f64 {
    const begin = figures.start(io);
    @memcpy(copy, rows);
    @memcpy(copy, rows);
    return figures.seconds(io, begin);
}

fn tellStored(
    out: Output,
    name: []const u8,
    dtype: kvern.Dtype,
    tokens: u32,
    side_elements: usize,
    times: []f64,
    copies: []f64,
) !void {
    const bytes: f64 = @floatFromInt(2 * side_elements * @sizeOf(f32));
    const time = figures.median(times);
    try out.row(.{
        .name = name,
        .kv = @tagName(dtype),
        .tokens = tokens,
        .milliseconds = time * 1e3,
        .gigabytes_per_second = bytes / time / 1e9,
        .share = figures.median(copies) / time,
    });
}

pub fn store(gpa: std.mem.Allocator, io: std.Io, out: Output, dtype: kvern.Dtype) !void {
    const tokens = 16_384; // 64 MiB of f32 keys, 64 MiB of values
    var cache: kvern.ContiguousCache = try .init(gpa, .{
        .layer_count = 1,
        .kv_head_count = kv_head_count,
        .head_dim = head_dim,
        .max_seq_len = tokens,
        .dtype_k = dtype,
        .dtype_v = dtype,
    });
    defer cache.deinit();
    const rows = try gpa.alloc(f32, tokens * cache.shape.kvDim());
    defer gpa.free(rows);
    var prng: std.Random.DefaultPrng = .init(1);
    for (rows) |*element| element.* = prng.random().float(f32);
    const copy = try gpa.alloc(f32, rows.len);
    defer gpa.free(copy);
    @memcpy(copy, rows);

    _ = try cache.append(0, 0, .fromF32(rows), .fromF32(rows)); // touches every page
    const stored = try cache.rows(0, 0);
    const last = float_reference.element(dtype, stored.memory.contiguous.values[0..@intCast(cache.shape.spanBytes(dtype))], rows.len - 1);
    if (!(@abs(last - rows[rows.len - 1]) <= 0x1p-8)) figures.fail("append is wrong");

    var times: [repeats]f64 = undefined;
    var copies: [repeats]f64 = undefined;
    for (&times, &copies) |*time, *copy_time| {
        try cache.truncate(0, 0);
        const begin = figures.start(io);
        _ = try cache.append(0, 0, .fromF32(rows), .fromF32(rows));
        time.* = figures.seconds(io, begin);
        copy_time.* = copySeconds(io, copy, rows);
    }
    try tellStored(out, "store", dtype, tokens, rows.len, &times, &copies);
}
