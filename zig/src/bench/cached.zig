//! Decode of rows that stay in the second cache level: what the kernels compute where memory takes no time, and how many
//! instructions that is. A kernel that is no faster here than memory reads cannot be as fast as memory.

const std = @import("std");
const decode = @import("decode.zig");
const figures = @import("figures.zig");
const kvern = @import("../kvern.zig");
const steps = @import("steps.zig");
const Output = figures.Output;
const kv_head_count = figures.kv_head_count;
const head_dim = figures.head_dim;

/// Bytes of rows, beside all else that is in that level.
const cached_bytes = 512 << 10;

/// Tokens of a call: so many that what a call costs by itself does not count.
const token_count = 8192;

const block_size = 64;
const entry_count = token_count / block_size;

/// A few blocks again and again, which a table names many times.
const Repeated = struct {
    cache: kvern.PagedCache,
    blocks: [entry_count]i32,
    formats: [entry_count]u8,
    rows: kvern.Rows,
    /// Keys, then values, as they are stored.
    stored: []f32,
    bytes: u64,

    /// Stays where it is.
    fn init(repeated: *Repeated, gpa: std.mem.Allocator, dtype: kvern.Dtype) !void {
        repeated.cache = try .init(gpa, decode.optionsOf(dtype, token_count));
        errdefer repeated.cache.deinit();
        // Codes take a byte or less, and their blocks are as many.
        const element_bytes: u32 = if (dtype.isFloat()) dtype.elementBytes() else 1;
        const block_count = @max(1, cached_bytes / (2 * block_size * kv_head_count * head_dim * element_bytes));
        const rows = try figures.randomRows(gpa, block_count * block_size * kv_head_count * head_dim);
        defer gpa.free(rows);
        const sequence = try repeated.cache.createSequence();
        const tokens: u32 = block_count * block_size;
        try repeated.cache.append(0, &.{sequence}, &.{tokens}, .fromF32(rows), .fromF32(rows));
        try sequence.commit(tokens);
        const facts = try repeated.cache.stats();
        repeated.bytes = (facts.tail_bytes + facts.store_bytes) / block_count * entry_count;
        repeated.rows = try sequence.rows(0);
        const entries = &repeated.rows.memory.paged.entries;
        for (&repeated.blocks, &repeated.formats, 0..) |*block, *format, i| {
            block.* = entries.blocks[i % block_count];
            format.* = entries.formats[i % block_count];
        }
        entries.* = .{ .blocks = &repeated.blocks, .formats = &repeated.formats };
        repeated.rows.row_count = token_count;

        repeated.stored = try gpa.alloc(f32, 2 * token_count * kv_head_count * head_dim);
        errdefer gpa.free(repeated.stored);
        const k, const v = figures.outputs(repeated.stored);
        _ = try sequence.gather(0, k, v);
        const half = repeated.stored.len / 2;
        for ([_][]f32{ repeated.stored[0..half], repeated.stored[half..] }) |side| {
            for (side[rows.len..], 0..) |*element, i| element.* = side[i];
        }
    }

    fn deinit(repeated: *Repeated, gpa: std.mem.Allocator) void {
        gpa.free(repeated.stored);
        repeated.cache.deinit();
    }
};

/// Prints how fast the rows are attended.
pub fn time(gpa: std.mem.Allocator, io: std.Io, out: Output, dtype: kvern.Dtype, read_rate: f64) !void {
    var repeated: Repeated = undefined;
    try repeated.init(gpa, dtype);
    defer repeated.deinit(gpa);
    try decode.time(gpa, io, out, .{
        .layers = &.{repeated.rows},
        .stored = repeated.stored,
        .bytes = repeated.bytes,
        .kv = dtype,
        .name = "cached",
        .tolerance = 1e-3,
        .takes_best = true,
    }, read_rate);
}

/// Prints the instructions of a tile of one head: 64 tokens, keys and values, four query heads. What a call costs by itself
/// is taken off, as the difference of two calls.
pub fn count(gpa: std.mem.Allocator, out: Output, dtype: kvern.Dtype, shows_addresses: bool) !void {
    var repeated: Repeated = undefined;
    try repeated.init(gpa, dtype);
    defer repeated.deinit(gpa);
    var few = try stepsOf(gpa, repeated.rows, 2);
    defer few.deinit(gpa);
    var many = try stepsOf(gpa, repeated.rows, 4);
    defer many.deinit(gpa);
    const tiles: f64 = 2 * kv_head_count;
    const instructions = @as(f64, @floatFromInt(many.total - few.total)) / tiles;
    try out.steps(@tagName(dtype), instructions);
    if (!shows_addresses) return;
    for (many.by_address.keys(), many.by_address.values()) |address, all| {
        const extra = all -| (few.by_address.get(address) orelse 0);
        if (extra != 0) try out.address(address, @as(f64, @floatFromInt(extra)) / tiles);
    }
}

/// The instructions of one call on so many blocks.
fn stepsOf(gpa: std.mem.Allocator, all: kvern.Rows, blocks: u32) !steps.Counts {
    var rows = all;
    rows.row_count = blocks * block_size;
    return steps.count(gpa, kvern.Rows, rows, attendOnce);
}

fn attendOnce(rows: kvern.Rows) void {
    var prng: std.Random.DefaultPrng = .init(2);
    var q: [kv_head_count * figures.ratio * head_dim]f32 = undefined;
    for (&q) |*element| element.* = prng.random().floatNorm(f32);
    var output: [q.len]f32 = undefined;
    kvern.attend(rows, &q, .{}, &output, &.{}) catch figures.fail("attend failed");
}
