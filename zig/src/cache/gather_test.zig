//! Head-major rows in and out, of either cache and every format: each against the plain call on the same rows.

const std = @import("std");
const testing = std.testing;
const ContiguousCache = @import("contiguous.zig").ContiguousCache;
const Dtype = @import("../dtype.zig").Dtype;
const gathers = @import("gather.zig");
const input_types = @import("input.zig");
const Input = input_types.Input;
const Output = input_types.Output;
const paged = @import("paged/cache.zig");
const PagedCache = paged.PagedCache;
const Rows = @import("rows.zig").Rows;
const Sequence = @import("sequence.zig").Sequence;
const dispatch = @import("../kernels/dispatch.zig");

const head_dim = 32;
const rows_max = 320;
/// Heads of every cache here.
const kv_head_count = 3;
const kv_dim = kv_head_count * head_dim;

/// Rows of one side, token-major, as the caller's dtype.
const Given = struct {
    dtype: Dtype,
    bytes: []u8,

    fn init(random: std.Random, dtype: Dtype) !Given {
        const floats = try testing.allocator.alloc(f32, rows_max * kv_dim);
        defer testing.allocator.free(floats);
        for (floats) |*value| value.* = random.floatNorm(f32);
        const bytes = try testing.allocator.alloc(u8, @intCast(floats.len * dtype.elementBytes()));
        dispatch.kernels().convert(&.{
            .destination = bytes.ptr,
            .destination_dtype = dtype,
            .source = @ptrCast(floats.ptr),
            .source_dtype = .f32,
            .element_count = floats.len,
        });
        return .{ .dtype = dtype, .bytes = bytes };
    }

    fn deinit(given: Given) void {
        testing.allocator.free(given.bytes);
    }

    fn rowBytes(given: Given) usize {
        return @intCast(head_dim * given.dtype.elementBytes());
    }

    /// Rows [first, first + count), token-major.
    fn plain(given: Given, first: u32, count: u32) Input {
        const start = first * kv_head_count * given.rowBytes();
        return .{ .bytes = given.bytes.ptr + start, .element_count = count * kv_dim, .dtype = given.dtype };
    }

    /// All rows as a head-major tensor; the caller frees it.
    fn tensor(given: Given) ![]u8 {
        const turned = try testing.allocator.alloc(u8, given.bytes.len);
        for (0..rows_max) |token| for (0..kv_head_count) |head| {
            const from = given.bytes[(token * kv_head_count + head) * given.rowBytes() ..][0..given.rowBytes()];
            @memcpy(turned[(head * rows_max + token) * given.rowBytes() ..][0..from.len], from);
        };
        return turned;
    }

    /// The same rows, at the stride of the tensor that has all of them.
    fn strided(given: Given, tensor_bytes: []const u8, first: u32, count: u32) Input {
        return .{
            .bytes = tensor_bytes.ptr + first * given.rowBytes(),
            .element_count = (kv_head_count - 1) * rows_max * head_dim + count * head_dim,
            .dtype = given.dtype,
            .layout = .head_major,
            .head_stride = rows_max * head_dim,
        };
    }
};

/// The positions that a reader sees in a range, in order.
fn seenIn(rows: *const Rows, start: u32, end: u32, buffer: []u32) []const u32 {
    var count: usize = 0;
    for (start..end) |position| {
        if (position >= rows.sink_end and position < rows.first) continue;
        buffer[count] = @intCast(position);
        count += 1;
    }
    return buffer[0..count];
}

const untouched = 0xa5;

/// A copy at a stride, checked row by row against one that is token-major and whole.
fn expectRange(sequence: Sequence, random: std.Random, dtype: Dtype, layout: input_types.Layout) !void {
    const rows = try sequence.rows(1);
    var all_buffer: [rows_max]u32 = undefined;
    const all = seenIn(&rows, 0, rows.row_count, &all_buffer);
    const element_bytes: usize = @intCast(dtype.elementBytes());
    const row_bytes = head_dim * element_bytes;

    var whole: [2][]u8 = undefined;
    for (&whole) |*side| side.* = try testing.allocator.alloc(u8, @max(1, all.len * kv_dim * element_bytes));
    defer for (whole) |side| testing.allocator.free(side);
    const count_all = try sequence.gather(
        1,
        .{ .bytes = whole[0].ptr, .element_count = all.len * kv_dim, .dtype = dtype },
        .{ .bytes = whole[1].ptr, .element_count = all.len * kv_dim, .dtype = dtype },
    );
    try testing.expectEqual(all.len, count_all);

    const start = random.uintAtMost(u32, rows.row_count);
    const given_count: ?u32 = if (random.boolean()) random.uintAtMost(u32, rows.row_count - start) else null;
    var wanted_buffer: [rows_max]u32 = undefined;
    const wanted = seenIn(&rows, start, start + (given_count orelse rows.row_count - start), &wanted_buffer);
    const stride: ?u64 = if (layout == .head_major and random.boolean())
        wanted.len * head_dim + random.uintLessThan(u64, 100)
    else
        null;

    const room = (kv_head_count - 1) * (stride orelse 0) + wanted.len * kv_dim + random.uintLessThan(usize, 9);
    var copies: [2][]u8 = undefined;
    for (&copies) |*side| {
        side.* = try testing.allocator.alloc(u8, @intCast(@max(1, room * element_bytes)));
        @memset(side.*, untouched);
    }
    defer for (copies) |side| testing.allocator.free(side);
    var outputs: [2]Output = undefined;
    for (&outputs, copies) |*output, side| output.* = .{
        .bytes = side.ptr,
        .element_count = room,
        .dtype = dtype,
        .layout = layout,
        .head_stride = stride,
    };
    const result = sequence.gatherRange(1, .{ .start = start, .count = given_count }, outputs[0], outputs[1]);
    if (given_count != null and wanted.len != given_count.?) {
        try testing.expectError(error.PositionOutOfRange, result);
        for (copies) |side| try testing.expect(std.mem.allEqual(u8, side, untouched));
        return;
    }
    try testing.expectEqual(wanted.len, try result);

    for (copies, whole) |side, source| {
        for (wanted, 0..) |position, row| for (0..kv_head_count) |head| {
            const number = std.mem.indexOfScalar(u32, all, position).?;
            const to: usize = switch (layout) {
                .token_major => (row * kv_head_count + head) * head_dim,
                .head_major => @intCast(head * (stride orelse wanted.len * head_dim) + row * head_dim),
            };
            const copy = side[to * element_bytes ..][0..row_bytes];
            try testing.expectEqualSlices(u8, source[(number * kv_head_count + head) * row_bytes ..][0..row_bytes], copy);
            @memset(copy, untouched); // what is left is what lies between
        };
        try testing.expect(std.mem.allEqual(u8, side, untouched));
    }
}

/// Two sequences get the same rows, one of them token-major and one out of a head-major tensor.
fn expectSame(plain: Sequence, strided: Sequence, random: std.Random) !void {
    const dtype = random.enumValue(enum { f32, f16, bf16 });
    const given_dtype: Dtype = switch (dtype) {
        inline else => |tag| @field(Dtype, @tagName(tag)),
    };
    var given: [2]Given = undefined;
    for (&given) |*side| side.* = try .init(random, given_dtype);
    defer for (given) |side| side.deinit();
    var tensors: [2][]u8 = undefined;
    for (&tensors, given) |*tensor, side| tensor.* = try side.tensor();
    defer for (tensors) |tensor| testing.allocator.free(tensor);

    var first: u32 = 0;
    while (first < rows_max) {
        const count = @min(rows_max - first, 1 + random.uintLessThan(u32, 90));
        for (0..2) |layer| {
            const index: u32 = @intCast(layer);
            const k = given[layer];
            const v = given[1 - layer];
            const start = try plain.append(index, k.plain(first, count), v.plain(first, count));
            const strided_k = k.strided(tensors[layer], first, count);
            const strided_v = v.strided(tensors[1 - layer], first, count);
            try testing.expectEqual(start, try strided.append(index, strided_k, strided_v));
            try testing.expectEqual(first, start);
        }
        if (random.boolean()) try expectRange(strided, random, .f32, .head_major); // pending rows, too
        try plain.commit(count);
        try strided.commit(count);
        first += count;
        for ([_]Dtype{ .f32, .f16, .bf16 }) |out| for (std.enums.values(input_types.Layout)) |layout| {
            try expectRange(strided, random, out, layout);
        };
        try expectEqual(plain, strided);
    }
}

fn expectEqual(plain: Sequence, strided: Sequence) !void {
    var sides: [4][rows_max * kv_dim]f32 = @splat(@splat(0));
    for ([_]Sequence{ plain, strided }, 0..) |sequence, i| {
        var outputs: [2]Output = undefined;
        for (&outputs, sides[2 * i ..][0..2]) |*output, *side| output.* = .{ .bytes = @ptrCast(side), .element_count = side.len };
        _ = try sequence.gather(1, outputs[0], outputs[1]);
    }
    try testing.expectEqualSlices(f32, &sides[0], &sides[2]);
    try testing.expectEqualSlices(f32, &sides[1], &sides[3]);
    try testing.expect(!std.mem.allEqual(f32, &sides[0], 0));
}

test "head-major rows of a contiguous cache are those of the plain calls, in every dtype" {
    var prng: std.Random.DefaultPrng = .init(testing.random_seed);
    for ([_][2]Dtype{ .{ .f32, .f32 }, .{ .f16, .bf16 }, .{ .bf16, .f32 } }) |formats| {
        var cache: ContiguousCache = try .init(testing.allocator, .{
            .layer_count = 2,
            .sequence_count = 2,
            .kv_head_count = kv_head_count,
            .head_dim = head_dim,
            .max_seq_len = rows_max,
            .dtype_k = formats[0],
            .dtype_v = formats[1],
        });
        defer cache.deinit();
        try expectSame(.{ .contiguous = cache.sequence(0) }, .{ .contiguous = cache.sequence(1) }, prng.random());
    }
}

test "head-major rows of a paged cache are those of the plain calls, in every format and with rows that were let go" {
    var prng: std.Random.DefaultPrng = .init(testing.random_seed);
    const layer: paged.Layer = .{ .kv_head_count = kv_head_count, .head_dim = head_dim };
    for (std.enums.values(Dtype)) |stored| for ([_]?u32{ null, 100 }) |kept| {
        const tail: [2]Dtype = if (stored.isFloat()) .{ stored, .f16 } else .{ .f16, .f32 };
        var cache: PagedCache = try .init(testing.allocator, .{
            .layers = &.{ layer, layer },
            .max_seq_len = rows_max,
            .dtype_k = tail[0],
            .dtype_v = tail[1],
            .policy = if (stored.isFloat()) .{} else .{
                .kind = .tiered,
                .store = .{ .dtype_k = stored, .dtype_v = stored },
                .tail_tokens = 64,
            },
            .retention = .{ .tokens = kept, .sink_tokens = if (kept == null) 0 else 5 },
        });
        defer cache.deinit();
        const plain = try cache.createSequence();
        const strided = try cache.createSequence();
        try expectSame(.{ .paged = plain }, .{ .paged = strided }, prng.random());
    };
}

test "a batch takes head-major rows at a stride, and refuses a size that does not fit its tokens" {
    const layer: paged.Layer = .{ .kv_head_count = kv_head_count, .head_dim = head_dim };
    var cache: PagedCache = try .init(testing.allocator, .{
        .layers = &.{layer},
        .max_seq_len = rows_max,
        .block_size = 4,
        .dtype_k = .f32,
        .dtype_v = .f32,
    });
    defer cache.deinit();
    var prng: std.Random.DefaultPrng = .init(testing.random_seed);
    const given: Given = try .init(prng.random(), .f32);
    defer given.deinit();
    const tensor = try given.tensor();
    defer testing.allocator.free(tensor);
    const first = try cache.createSequence();
    const second = try cache.createSequence();
    const batch = [_]*paged.Sequence{ first, second };
    const input = given.strided(tensor, 2, 9);
    try testing.expectError(error.InvalidSize, cache.append(0, &batch, &.{ 3, 5 }, input, input));
    try testing.expectEqual(0, first.rowCount(0) + second.rowCount(0));
    try cache.append(0, &batch, &.{ 3, 6 }, input, input);
    for (batch, [_]u32{ 3, 6 }, [_]u32{ 2, 5 }) |sequence, count, row| {
        var k: [6 * kv_dim]f32 = undefined;
        var v: [6 * kv_dim]f32 = undefined;
        const outputs = [_]Output{
            .{ .bytes = @ptrCast(&k), .element_count = k.len },
            .{ .bytes = @ptrCast(&v), .element_count = v.len },
        };
        try testing.expectEqual(count, try sequence.gather(0, outputs[0], outputs[1]));
        const expected = given.bytes[row * kv_head_count * given.rowBytes() ..][0 .. count * kv_head_count * given.rowBytes()];
        try testing.expectEqualSlices(u8, expected, std.mem.sliceAsBytes(k[0 .. count * kv_dim]));
        try testing.expectEqualSlices(u8, expected, std.mem.sliceAsBytes(v[0 .. count * kv_dim]));
    }
}

test "a stride that fits neither layout nor rows is refused, and nothing changes" {
    const layer: paged.Layer = .{ .kv_head_count = 2, .head_dim = 4 };
    var cache: PagedCache = try .init(testing.allocator, .{ .layers = &.{layer}, .max_seq_len = 16, .block_size = 4 });
    defer cache.deinit();
    var flat: ContiguousCache = try .init(testing.allocator, .{ .layer_count = 1, .kv_head_count = 2, .head_dim = 4, .max_seq_len = 16 });
    defer flat.deinit();
    const sequences = [_]Sequence{ .{ .paged = try cache.createSequence() }, .{ .contiguous = flat.sequence(0) } };
    var numbers: [64]f32 = @splat(1);
    const Stride = struct {
        fn input(elements: []f32, layout: input_types.Layout, stride: u64) Input {
            return .{ .bytes = @ptrCast(elements.ptr), .element_count = elements.len, .layout = layout, .head_stride = stride };
        }
        fn output(elements: []f32, layout: input_types.Layout, stride: u64) Output {
            return .{ .bytes = @ptrCast(elements.ptr), .element_count = elements.len, .layout = layout, .head_stride = stride };
        }
    };
    for (sequences) |sequence| {
        // 3 rows of 2 heads that are 16 elements apart: 16 + 12.
        const right = Stride.input(numbers[0..28], .head_major, 16);
        const wrong = [_]struct { Input, anyerror }{
            .{ Stride.input(numbers[0..24], .token_major, 12), error.InvalidConfig },
            .{ Stride.input(numbers[0..27], .head_major, 16), error.InvalidSize },
            .{ Stride.input(numbers[0..15], .head_major, 16), error.InvalidSize },
            .{ Stride.input(numbers[0..36], .head_major, 16), error.InvalidSize },
            .{ Stride.input(numbers[0..32], .head_major, 16), error.InvalidSize }, // 4 rows, and 3 beside them
            .{ Stride.input(numbers[0..28], .head_major, std.math.maxInt(u64)), error.InvalidSize },
        };
        for (wrong) |one| {
            try testing.expectError(one[1], sequence.append(0, one[0], right));
            try testing.expectError(one[1], sequence.append(0, right, one[0]));
        }
        try testing.expectEqual(0, try sequence.append(0, right, right));
        var k: [32]f32 = @splat(7);
        var v: [32]f32 = @splat(7);
        const room = Stride.output(&v, .head_major, 16);
        const refused = [_]struct { Output, anyerror }{
            .{ Stride.output(&k, .token_major, 16), error.InvalidConfig },
            .{ Stride.output(&k, .head_major, 11), error.InvalidSize },
            .{ Stride.output(k[0..27], .head_major, 16), error.InvalidSize },
            .{ Stride.output(&k, .head_major, std.math.maxInt(u64)), error.InvalidSize },
        };
        for (refused) |one| {
            try testing.expectError(one[1], sequence.gather(0, one[0], room));
            try testing.expectError(one[1], sequence.gather(0, room, one[0]));
        }
        for ([_]gathers.Range{ .{ .start = 4 }, .{ .start = 3, .count = 1 }, .{ .count = 4 }, .{ .start = std.math.maxInt(u32), .count = 1 } }) |range| {
            try testing.expectError(error.PositionOutOfRange, sequence.gatherRange(0, range, room, Stride.output(&k, .head_major, 16)));
        }
        try testing.expectError(error.InvalidConfig, sequence.gather(0, room, room)); // one memory
        for (k, v) |in_k, in_v| try testing.expect(in_k == 7 and in_v == 7);
        try testing.expectEqual(0, try sequence.gatherRange(0, .{ .start = 3 }, room, Stride.output(&k, .head_major, 16)));
        try testing.expectEqual(3, try sequence.gather(0, room, Stride.output(&k, .head_major, 16)));
    }
}
