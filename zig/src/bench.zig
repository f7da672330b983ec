//! How near do the kernels come to the speed of memory?
//!
//!     zig build bench                   a table
//!     zig build bench -- --json         one line a row
//!     zig build bench -- --level v3     the kernels of a lower level
//!     zig build bench -- --threads 2    by two threads; R then is theirs too
//!
//! Decode is one query of 32 heads over 8 KV heads of 128 (GQA 4), by one thread unless said otherwise; each step takes the
//! next layer of a cache of at least 1 GiB, so that no key is in the last cache level. `share` is the part of R that the
//! stored bytes were read at; R is measured in the same run (`device/bandwidth.zig`). Storing is compared with a copy of the
//! same f32 bytes into memory that was touched before.
//!
//! What was tried for the speed of decode, and what it gave (f16 rows side by side, 8 heads of 128, GQA 4, one thread, Zen 5,
//! GB/s of stored bytes; R is 43):
//!
//!     head by head over all positions                                8
//!     tile by tile, in a tile head by head                          16
//!     prefetching the next head's rows, in a burst                  18
//!     the same into the second cache level                          24
//!     spread evenly over the work, a line at a time                 23
//!     asking for the next tile's rows whole, all heads at once      26
//!     into the first cache level, spread and whole                  32
//!     cheaper sums across vectors                                   no change
//!     no prefetching at all, with all of the above                  10
//!     an eighth to a quarter of it during the softmax               33
//!     a tile with all its heads in one call, addresses made once    no change
//!     not to keep the lines in any level (non-temporal)             no change
//!     one of two lines, for the hardware to bring the other         26
//!     8 rows by 2 tokens for many queries, half the conversions     no change
//!
//! A tile of one head takes 700 ns in f16 where it lies in the second level already, 483 of them for its multiplications,
//! and memory takes 762 ns to bring it. They overlap but for about a third of the shorter one: a loop of nothing but loads,
//! prefetches and as many multiplications reaches 36 to 38 GB/s, and 33 with pauses as long as the softmax.
//!
//! Codes, i8 and i4 in the same way:
//!
//!     prefetching spread over the products                          24     16
//!     half of it while digits are made and during the softmax       29     18
//!     digits of four rows at once, packed with saturation           29     18
//!     digits of the next head beside the softmax of this one        no change
//!
//! A tile of a head takes 2048 dot-product instructions whatever the bits, 241 ns on their two ports. All together it took
//! 9000 instructions in i4, 4.9 a cycle: what is not a product is held by their number, not by waiting. So (time of a
//! tile, before and after in alternating runs, f16, q8_0, q4_0, i8, i4):
//!
//!     digits cut from words of 16 bits, products and sums fused     -      -8 %   -6 %   -4 %   -4 %
//!     weights by a bound: no fold before their digits               -      -3 %   -5 %   no change
//!     digits of queries once for 1024 tokens                        -      -9 %   -10 %  -      -
//!     lines by 2 instructions in place of 5 to 7                    -      -2 %   -4 %   -3 %   -1 %
//!     one queue of lines in the order of reading, paced             -5 %   -6 %   no change
//!     four heads at a time (floats: no change)                      -      -      -3 %   -5 %   -1 %
//!     all of it together                                            -13 %  -11 %  -23 %  -8 %   -11 %
//!     of several blocks of rows each in turn asks (GQA 8)           -20 %  -26 %
//!     asking for all lines within the products                      twice the time: lines are forgotten
//!     asking two heads ahead, or into the second level              no change
//!     lines of a loop at a fixed distance, one instruction each     -4 %   -8 %   -3 %   no change   +2 %
//!     asking between the loops in tighter bursts                    i8 +12 %
//!     smaller bursts there, more of them                            q8_0 -9 %, i8 and q4_0 +25 %, not understood
//!     5 lines in a loop that asked for 4, or 6                      i8 +50 %, +100 %
//!     a line asked for twice while it is under way                  10 ns each, as long as memory takes for five lines
//!     lines of a loop in another order                              no change, or slower
//!     keys and values of a head side by side, not of all heads      +16 %
//!     slabs of whole huge pages to their ends                       no change
//!     the softmax spread over the products                          no change: the same ports
//!
//! In the second level a tile now takes 440 to 490 ns. The bytes of i8 take memory 405 ns, those of i4 214: 8 bits are near
//! what memory gives, 4 and 2 are held by computing.
//!
//! Every row checks its result against the reference before it is timed. Not a goal: absolute numbers, as machines are
//! shared; the ratios within one run are what counts.

const std = @import("std");
const kvern = @import("kvern.zig");
const float_reference = @import("kernels/reference/float.zig");
const reference = @import("kernels/reference/attention.zig");

const kv_head_count = 8;
const ratio = 4;
const head_dim = 128;
const rotated_bytes = 1 << 30;
const repeats = 5;

const float_dtypes = [_]kvern.Dtype{ .f32, .f16, .bf16 };

const Row = struct {
    name: []const u8,
    kv: []const u8,
    tokens: u32,
    milliseconds: f64,
    gigabytes_per_second: f64,
    share: f64,
};

const Output = struct {
    json: bool,
    writer: *std.Io.Writer,

    fn row(out: Output, line: Row) !void {
        if (out.json) {
            try out.writer.print("{{\"bench\":\"{s}\",\"runtime\":\"zig\",\"level\":\"{s}\",\"kv\":\"{s}\",\"tokens\":{d}," ++
                "\"ms\":{d:.4},\"gbps\":{d:.2},\"share\":{d:.3}}}\n", .{
                line.name,         @tagName(kvern.kernels().level), line.kv,    line.tokens,
                line.milliseconds, line.gigabytes_per_second,       line.share,
            });
        } else {
            try out.writer.print("{s:<10} {s:<5} {d:>7} tokens {d:>9.3} ms {d:>7.2} GB/s {d:>6.2}\n", .{
                line.name,  line.kv, line.tokens, line.milliseconds, line.gigabytes_per_second,
                line.share,
            });
        }
        try out.writer.flush();
    }
};

pub fn main(init: std.process.Init) !void {
    var json = false;
    var thread_count: u32 = 1;
    var arguments = try init.minimal.args.iterateAllocator(init.gpa);
    defer arguments.deinit();
    _ = arguments.skip();
    while (arguments.next()) |argument| {
        if (std.mem.eql(u8, argument, "--json")) {
            json = true;
        } else if (std.mem.eql(u8, argument, "--level")) {
            const name = arguments.next() orelse fail("--level wants a name");
            const level = std.meta.stringToEnum(kvern.Level, name) orelse fail("no such level");
            kvern.setLevel(level) catch fail("this CPU does not have that level");
        } else if (std.mem.eql(u8, argument, "--threads")) {
            thread_count = std.fmt.parseInt(u32, arguments.next() orelse "", 10) catch fail("--threads wants a number");
        } else fail("options: --json, --level NAME, --threads N");
    }
    var buffer: [1024]u8 = undefined;
    var file_writer = std.Io.File.stdout().writer(init.io, &buffer);
    const out: Output = .{ .json = json, .writer = &file_writer.interface };

    kvern.setThreadCount(thread_count) catch fail("--threads wants 1 to 256");
    const read_rate = try kvern.readRate(rotated_bytes, thread_count);
    if (!json) {
        try out.writer.print("level {s}, R {d:.2} GB/s, {d} threads; the last column is the share of R, of a copy for store\n", .{
            @tagName(kvern.kernels().level), read_rate / 1e9, thread_count,
        });
    }
    for (std.enums.values(kvern.Dtype)) |dtype| {
        for ([_]u32{ 4096, 32_768 }) |tokens| {
            if (dtype.isFloat()) try decodeContiguous(init.gpa, init.io, out, dtype, tokens, read_rate);
            try decodePaged(init.gpa, init.io, out, dtype, tokens, read_rate);
        }
    }
    for (float_dtypes) |dtype| try store(init.gpa, init.io, out, dtype);
    for (std.enums.values(kvern.Dtype)) |dtype| if (!dtype.isFloat()) try quantize(init.gpa, init.io, out, dtype);
}

fn fail(text: []const u8) noreturn {
    std.debug.print("bench: {s}\n", .{text});
    std.process.exit(2);
}

fn seconds(io: std.Io, since: std.Io.Clock.Timestamp) f64 {
    return @as(f64, @floatFromInt(since.untilNow(io).raw.nanoseconds)) / std.time.ns_per_s;
}

fn start(io: std.Io) std.Io.Clock.Timestamp {
    return .now(io, .awake);
}

fn median(values: []f64) f64 {
    std.mem.sort(f64, values, {}, std.sort.asc(f64));
    return values[values.len / 2];
}

fn decodeContiguous(gpa: std.mem.Allocator, io: std.Io, out: Output, dtype: kvern.Dtype, tokens: u32, read_rate: f64) !void {
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
    const rows = try randomRows(gpa, tokens * shape.kvDim());
    defer gpa.free(rows);
    for (0..layer_count) |layer| _ = try cache.append(@intCast(layer), 0, .fromF32(rows), .fromF32(rows));
    const layers = try gpa.alloc(kvern.Rows, layer_count);
    defer gpa.free(layers);
    for (layers, 0..) |*layer, i| layer.* = try cache.rows(@intCast(i), 0);
    const stored = try gpa.alloc(f32, 2 * rows.len);
    defer gpa.free(stored);
    const k, const v = outputs(stored);
    _ = try cache.gather(0, 0, k, v);
    try decode(gpa, io, out, .{ .layers = layers, .stored = stored, .bytes = layer_bytes, .kv = dtype, .name = "decode", .tolerance = 1e-5 }, read_rate);
}

/// Floats in a tail and nothing else, codes in a store without a tail.
fn decodePaged(gpa: std.mem.Allocator, io: std.Io, out: Output, dtype: kvern.Dtype, tokens: u32, read_rate: f64) !void {
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
    var cache: kvern.PagedCache = try .init(gpa, options);
    defer cache.deinit();
    const rows = try randomRows(gpa, tokens * kv_head_count * head_dim);
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
    const k, const v = outputs(stored);
    _ = try first.gather(0, k, v);
    try decode(gpa, io, out, .{ .layers = layers, .stored = stored, .bytes = layer_bytes, .kv = dtype, .name = "paged", .tolerance = 1e-3 }, read_rate);
}

fn randomRows(gpa: std.mem.Allocator, count: usize) ![]f32 {
    var prng: std.Random.DefaultPrng = .init(1);
    const rows = try gpa.alloc(f32, count);
    for (rows) |*element| element.* = prng.random().floatNorm(f32);
    return rows;
}

/// Both halves of an array, keys first.
fn outputs(stored: []f32) struct { kvern.Output, kvern.Output } {
    const half = stored.len / 2;
    return .{
        .{ .bytes = @ptrCast(stored.ptr), .element_count = half },
        .{ .bytes = @ptrCast(stored[half..].ptr), .element_count = half },
    };
}

/// What a decode step is timed on.
const Decode = struct {
    /// One after the other is attended.
    layers: []const kvern.Rows,
    /// Keys, then values of the first layer.
    stored: []const f32,
    /// Of a layer.
    bytes: u64,
    kv: kvern.Dtype,
    name: []const u8,
    tolerance: f64,
};

fn decode(gpa: std.mem.Allocator, io: std.Io, out: Output, case: Decode, read_rate: f64) !void {
    var prng: std.Random.DefaultPrng = .init(2);
    var q: [kv_head_count * ratio * head_dim]f32 = undefined;
    for (&q) |*element| element.* = prng.random().floatNorm(f32);
    var output: [q.len]f32 = undefined;
    try checkDecode(gpa, case, &q, &output);

    var times: [repeats]f64 = undefined;
    for (&times) |*time| {
        const begin = start(io);
        for (case.layers) |layer| try kvern.attend(layer, &q, .{}, &output, &.{});
        time.* = seconds(io, begin) / @as(f64, @floatFromInt(case.layers.len));
    }
    const time = median(&times);
    const rate = @as(f64, @floatFromInt(case.bytes)) / time;
    try out.row(.{
        .name = case.name,
        .kv = @tagName(case.kv),
        .tokens = case.layers[0].row_count,
        .milliseconds = time * 1e3,
        .gigabytes_per_second = rate / 1e9,
        .share = rate / read_rate,
    });
}

/// The last query head against the reference.
fn checkDecode(gpa: std.mem.Allocator, case: Decode, q: []const f32, output: []f32) !void {
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
    if (!(difference <= case.tolerance * magnitude)) fail("attend is wrong");
}

/// Appends that end in a store, beside the copy: all blocks but the last migrate.
fn quantize(gpa: std.mem.Allocator, io: std.Io, out: Output, dtype: kvern.Dtype) !void {
    const tokens = 16_384; // 64 MiB of f32 keys, 64 MiB of values
    var cache: kvern.PagedCache = try .init(gpa, .{
        .layers = &.{.{ .kv_head_count = kv_head_count, .head_dim = head_dim }},
        .max_seq_len = tokens,
        .policy = .{ .kind = .tiered, .store = .{ .dtype_k = dtype, .dtype_v = dtype } },
    });
    defer cache.deinit();
    // Blocks stay mapped from round to round, as the copy does.
    for (cache.state.groups[0].formats.items) |format| try format.pool.prewarm(tokens / 64);
    const rows = try randomRows(gpa, tokens * kv_head_count * head_dim);
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
        const begin = start(io);
        var at: usize = 0;
        while (at < rows.len) : (at += step_elements) {
            const part = rows[at..][0..step_elements];
            try cache.append(0, &.{sequence}, &.{step_tokens}, .fromF32(part), .fromF32(part));
            try sequence.commit(step_tokens);
        }
        time.* = seconds(io, begin);
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
    if ((try cache.stats()).store_token_count != 64) fail("nothing migrated");
    const stored = try gpa.alloc(f32, 2 * first.len);
    defer gpa.free(stored);
    const k, const v = outputs(stored);
    _ = try sequence.gather(0, k, v);
    for (stored, 0..) |got, i| if (!(@abs(got - first[i % first.len]) <= 10.0 / 6.0)) fail("quantize is wrong");
}

/// Two copies: as many bytes as the keys and the values that a row is about.
fn copySeconds(io: std.Io, copy: []f32, rows: []const f32) f64 {
    const begin = start(io);
    @memcpy(copy, rows);
    @memcpy(copy, rows);
    return seconds(io, begin);
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
    const time = median(times);
    try out.row(.{
        .name = name,
        .kv = @tagName(dtype),
        .tokens = tokens,
        .milliseconds = time * 1e3,
        .gigabytes_per_second = bytes / time / 1e9,
        .share = median(copies) / time,
    });
}

fn store(gpa: std.mem.Allocator, io: std.Io, out: Output, dtype: kvern.Dtype) !void {
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
    if (!(@abs(last - rows[rows.len - 1]) <= 0x1p-8)) fail("append is wrong");

    var times: [repeats]f64 = undefined;
    var copies: [repeats]f64 = undefined;
    for (&times, &copies) |*time, *copy_time| {
        try cache.truncate(0, 0);
        const begin = start(io);
        _ = try cache.append(0, 0, .fromF32(rows), .fromF32(rows));
        time.* = seconds(io, begin);
        copy_time.* = copySeconds(io, copy, rows);
    }
    try tellStored(out, "store", dtype, tokens, rows.len, &times, &copies);
}
