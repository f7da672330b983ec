//! The codecs of every level against `reference/codec.zig`, byte for byte, and against the error each format promises.

const std = @import("std");
const testing = std.testing;
const codec = @import("../reference/codec.zig");
const dispatch = @import("../dispatch.zig");
const dtypes = @import("../../dtype.zig");
const group = @import("../../group.zig");
const Dtype = dtypes.Dtype;
const Plane = group.Plane;
const Side = group.Side;

const formats = [_]Dtype{ .q8_0, .q4_0, .i8, .i4, .i2 };
const record_formats = [_]Dtype{ .q8_0, .q4_0 };
const sources = [_]Dtype{ .f32, .f16, .bf16 };
// Valgrind takes thirty times as long: it sees every line of the kernels with fewer shapes, too.
const memcheck = @import("build_options").memcheck;
const block_sizes: []const u32 = if (memcheck) &.{64} else &.{ 64, 128, 256 };
const head_dims: []const u32 = if (memcheck) &.{96} else &.{ 32, 64, 96, 128, 256 };
const element_max = 256 * 256;
const source_max = element_max * 4 + 256 * 64 + 64;
const poison = 0xaa;

const LevelIterator = struct {
    index: usize = 0,

    fn next(self: *LevelIterator) ?*const dispatch.Table {
        const levels = std.enums.values(dispatch.Level);
        while (self.index < levels.len) {
            self.index += 1;
            if (dispatch.tableOf(levels[self.index - 1])) |table| return table;
        }
        return null;
    }
};

/// What a row or column of a test is like.
const Kind = enum { normal, ties, zeros, negative_zeros, denormal, subnormal_scale, huge, constant, outlier, wide, one_step };

fn draw(random: std.Random, kind: Kind, index: usize, limit: f32) f32 {
    return switch (kind) {
        .normal => random.floatNorm(f32),
        // Multiples of half a step of 1, between extremes that make the step just that in some format.
        .ties => switch (index % 32) {
            0 => -8,
            1 => 7,
            else => @as(f32, @floatFromInt(random.intRangeAtMost(i32, -16, 14))) / 2,
        },
        .zeros => if (random.boolean()) 0.0 else -0.0,
        .negative_zeros => -0.0,
        .denormal => @bitCast(random.int(u32) & 0x801f_ffff),
        // Steps around and below the smallest f16.
        .subnormal_scale => random.floatNorm(f32) * 0x1p-23,
        .huge => limit * (random.float(f32) * 2 - 1),
        .constant => 3.14159,
        .outlier => if (index % 32 == 13) limit else random.floatNorm(f32),
        .wide => random.floatNorm(f32) * std.math.ldexp(@as(f32, 1), random.intRangeAtMost(i32, -40, 15)),
        // Two values, one f32 apart: a step far too small.
        .one_step => if (random.boolean()) 1.0 else 1.0 + 0x1p-23,
    };
}

/// Rows [token][head_dim] that `source` can express and `format` takes; rows or columns of one kind each.
fn fill(random: std.Random, format: Dtype, source: Dtype, rows: []f32, head_dim: u32) void {
    // No f16 rounds to Inf in any format; below the limit of a format, all are fine.
    const limit: f32 = @bitCast(dtypes.refusedF32Bits(if (source == .f16) .f16 else format) - 1);
    const kinds = std.enums.values(Kind);
    const by_column = random.boolean();
    var column_kinds: [256]Kind = undefined;
    for (&column_kinds) |*kind| kind.* = kinds[random.uintLessThan(usize, kinds.len)];
    for (0..rows.len / head_dim) |token| {
        const row_kind = kinds[random.uintLessThan(usize, kinds.len)];
        for (rows[token * head_dim ..][0..head_dim], 0..) |*x, dim| {
            const exact = if (by_column)
                draw(random, column_kinds[dim], token, limit)
            else
                draw(random, row_kind, dim, limit);
            x.* = nearby(source, @max(-limit, @min(limit, exact)));
        }
    }
}

/// A value that a float format can express, no larger than `x` but where f16 rounds.
fn nearby(dtype: Dtype, x: f32) f32 {
    return switch (dtype) {
        .f16 => @as(f16, @floatCast(x)),
        .bf16 => @bitCast(@as(u32, @bitCast(x)) & 0xffff_0000),
        else => x,
    };
}

/// A value that the format can express.
fn encode(dtype: Dtype, x: f32, bytes: []u8) void {
    switch (dtype) {
        .f16 => std.mem.writeInt(u16, bytes[0..2], @bitCast(@as(f16, @floatCast(x))), .little),
        .bf16 => std.mem.writeInt(u16, bytes[0..2], @intCast(@as(u32, @bitCast(x)) >> 16), .little),
        else => std.mem.writeInt(u32, bytes[0..4], @bitCast(x), .little),
    }
}

/// Any value, rounded.
fn encodeRounded(dtype: Dtype, x: f32, bytes: []u8) void {
    if (dtype == .f32) return encode(.f32, x, bytes);
    std.mem.writeInt(u16, bytes[0..2], codec.rounded16(dtype, x), .little);
}

const Buffers = struct {
    /// [token][head_dim]
    rows: [element_max]f32,
    /// The same as a kernel gets them: strided, unaligned.
    source: [source_max]u8,
    expected: [source_max]u8,
    got: [element_max * 2 + 64]u8,

    fn create() !*Buffers {
        return testing.allocator.create(Buffers);
    }
};

/// Adjacent f32 rows.
fn quantizeRows(table: *const dispatch.Table, plane: Plane, rows: []const f32, bytes: []u8) void {
    table.quantize(&.{
        .plane = plane,
        .rows = @ptrCast(rows.ptr),
        .rows_dtype = .f32,
        .token_stride = plane.head_dim * @sizeOf(f32),
        .bytes = bytes.ptr,
    });
}

test "quantize equals the reference byte for byte: every level, shape, source and alignment" {
    var prng: std.Random.DefaultPrng = .init(testing.random_seed);
    const random = prng.random();
    const buffers = try Buffers.create();
    defer testing.allocator.destroy(buffers);
    for (formats) |format| for (std.enums.values(Side)) |side| for (block_sizes) |block_size| for (head_dims) |head_dim| {
        const plane: Plane = .{ .dtype = format, .side = side, .block_size = block_size, .head_dim = head_dim };
        for (sources) |source| {
            const rows = buffers.rows[0 .. block_size * head_dim];
            fill(random, format, source, rows, head_dim);
            codec.quantize(plane, rows, buffers.expected[0..plane.bytes()]);

            const shift = random.uintLessThan(usize, 16);
            const gap = random.uintLessThan(usize, 64);
            const element_bytes = source.elementBytes();
            const token_stride = head_dim * element_bytes + gap;
            @memset(&buffers.source, 0xff); // NaN beside the rows must not be looked at
            for (0..block_size) |token| for (0..head_dim) |dim| {
                const place = shift + token * token_stride + dim * element_bytes;
                encode(source, rows[token * head_dim + dim], buffers.source[place..]);
            };
            var levels: LevelIterator = .{};
            while (levels.next()) |table| {
                @memset(&buffers.got, poison);
                const out = buffers.got[shift..];
                table.quantize(&.{
                    .plane = plane,
                    .rows = buffers.source[shift..].ptr,
                    .rows_dtype = source,
                    .token_stride = token_stride,
                    .bytes = out.ptr,
                });
                try testing.expectEqualSlices(u8, buffers.expected[0..plane.bytes()], out[0..plane.bytes()]);
                try testing.expect(std.mem.allEqual(u8, buffers.got[0..shift], poison));
                try testing.expect(std.mem.allEqual(u8, out[plane.bytes()..], poison));
            }
        }
    };
}

test "dequantize equals the reference bit for bit: every level, shape, destination, alignment and stretch of tokens" {
    var prng: std.Random.DefaultPrng = .init(testing.random_seed);
    const random = prng.random();
    const buffers = try Buffers.create();
    defer testing.allocator.destroy(buffers);
    for (formats) |format| for (std.enums.values(Side)) |side| for (block_sizes) |block_size| for (head_dims) |head_dim| {
        const plane: Plane = .{ .dtype = format, .side = side, .block_size = block_size, .head_dim = head_dim };
        for (sources, 0..) |destination, i| {
            // Larger blocks are farther apart, and no more: one destination each is enough.
            if (block_size != 64 and i != (head_dim + block_size / 64) % sources.len) continue;
            // Any codes, and any finite scales and mins: more than quantize makes, past the largest f16, too.
            const shift = random.uintLessThan(usize, 16);
            const bytes = buffers.got[shift..][0..plane.bytes()];
            random.bytes(bytes[0..plane.codeBytes()]);
            var at = plane.codeBytes();
            while (at < bytes.len) : (at += 2) {
                const bits = random.int(u16);
                const is_finite = bits & 0x7c00 != 0x7c00;
                std.mem.writeInt(u16, bytes[at..][0..2], if (is_finite) bits else bits & 0xbfff, .little);
            }
            const gap = random.uintLessThan(usize, 64);
            const row_bytes = head_dim * destination.elementBytes();
            const token_stride = row_bytes + gap;
            const token_first = if (random.boolean()) 0 else random.uintLessThan(u32, block_size);
            const rest = block_size - token_first;
            const token_count = if (random.boolean()) rest else random.uintAtMost(u32, rest);
            @memset(&buffers.expected, poison);
            for (0..token_count) |t| for (0..head_dim) |dim| {
                const x = codec.element(plane, bytes, @intCast(token_first + t), @intCast(dim));
                const place = shift + t * token_stride + dim * destination.elementBytes();
                encodeRounded(destination, x, buffers.expected[place..]);
            };
            var levels: LevelIterator = .{};
            while (levels.next()) |table| {
                @memset(&buffers.source, poison);
                table.dequantize(&.{
                    .plane = plane,
                    .bytes = bytes.ptr,
                    .token_first = token_first,
                    .token_count = token_count,
                    .rows = buffers.source[shift..].ptr,
                    .rows_dtype = destination,
                    .token_stride = token_stride,
                });
                try testing.expectEqualSlices(u8, &buffers.expected, &buffers.source);
            }
        }
    };
}

test "records equal the reference byte for byte, and back" {
    var prng: std.Random.DefaultPrng = .init(testing.random_seed);
    const random = prng.random();
    const buffers = try Buffers.create();
    defer testing.allocator.destroy(buffers);
    for (record_formats) |format| for ([_]usize{ 0, 1, 2, 3, 7, 15, 63, 64, 65, 129, 200 }) |record_count| {
        const count = record_count * group.record_values;
        const shift = record_count % 16;
        const values = buffers.rows[0..count];
        fill(random, format, .f32, values, group.record_values);
        const byte_count = record_count * group.recordBytes(format);
        const expected = buffers.expected[0..byte_count];
        codec.quantizeRecords(format, values, expected);
        for (values, 0..) |x, i| encode(.f32, x, buffers.source[shift + 4 * i ..]);
        var levels: LevelIterator = .{};
        while (levels.next()) |table| {
            @memset(&buffers.got, poison);
            const records = buffers.got[shift..];
            table.quantize_records(records.ptr, format, @ptrCast(buffers.source[shift..].ptr), count);
            try testing.expectEqualSlices(u8, expected, records[0..byte_count]);
            try testing.expect(std.mem.allEqual(u8, buffers.got[0..shift], poison));
            try testing.expect(std.mem.allEqual(u8, records[byte_count..], poison));

            const back = try testing.allocator.alloc(u8, count * 4 + 64);
            defer testing.allocator.free(back);
            @memset(back, poison);
            table.dequantize_records(@ptrCast(back[shift..].ptr), records.ptr, format, count);
            for (0..count) |i| {
                const record = expected[i / 32 * group.recordBytes(format) ..];
                const bits = std.mem.readInt(u16, record[0..2], .little);
                const code: i16 = if (format == .q8_0)
                    @as(i8, @bitCast(record[2 + i % 32]))
                else
                    record[2 + i % 16] >> @intCast(i % 32 / 16 * 4) & 15;
                var bytes: [4]u8 = undefined;
                encode(.f32, codec.value(format, code, bits, 0), &bytes);
                try testing.expectEqualSlices(u8, &bytes, back[shift + 4 * i ..][0..4]);
            }
            try testing.expect(std.mem.allEqual(u8, back[0..shift], poison));
            try testing.expect(std.mem.allEqual(u8, back[shift + count * 4 ..], poison));
        }
    };
}

test "no value is further from its code than the format promises" {
    var prng: std.Random.DefaultPrng = .init(testing.random_seed);
    const random = prng.random();
    const buffers = try Buffers.create();
    defer testing.allocator.destroy(buffers);
    for (formats) |format| for (std.enums.values(Side)) |side| for (0..4) |_| {
        const plane: Plane = .{ .dtype = format, .side = side, .block_size = 64, .head_dim = 64 };
        const rows = buffers.rows[0 .. 64 * 64];
        fill(random, format, .f32, rows, 64);
        const bytes = buffers.got[0..plane.bytes()];
        quantizeRows(dispatch.kernels(), plane, rows, bytes);
        for (0..64) |t| for (0..64) |d| {
            const token: u32 = @intCast(t);
            const dim: u32 = @intCast(d);
            const parameters = codec.groupAt(plane, rows, token, dim);
            const code = plane.code(bytes, token, dim);
            try expectWithin(format, parameters, rows[t * 64 + d], code, codec.element(plane, bytes, token, dim));
        };
    };
}

/// The error bound. Where the code is clamped, x lies outside of what the codes reach by what scale and min lost when
/// they became f16; elsewhere it is at most half a step away.
///
/// On top come the roundings of f32, 2^-24 of what is rounded: three on the way to the code, which is at most 256, so
/// 3 * 256 * 2^-24 < 2^-14 steps; and the sum on the way back.
fn expectWithin(format: Dtype, parameters: codec.Group, x: f32, code: i16, got: f32) !void {
    if (parameters.inverse(format) == 0) {
        // Zeros, a constant, or a step whose inverse overflows: every code is that of the min, or of 0.
        const min: f64 = if (format.isAffine()) codec.f16Value(parameters.min_bits) else 0;
        try testing.expectEqual(min, @as(f64, got));
        if (format.isAffine()) {
            try testing.expect(@abs(x - min) <= @abs(min) * 0x1p-11 + 0x1p-25);
        } else try testing.expect(@abs(x) <= 0x1p-118);
        return;
    }
    const step: f64 = @abs(parameters.step);
    const scale: f64 = @abs(parameters.scale());
    const number: f64 = @floatFromInt(@abs(if (format == .q4_0) code - 8 else code));
    // The min of i8 belongs to code 0; it was chosen with the stored scale, and is compared with the exact one.
    const moved: f64 = if (format == .i8) 128 * (@as(f64, parameters.scale()) - parameters.step) else 0;
    const min_error = if (format.isAffine()) @abs(parameters.min - moved - codec.f16Value(parameters.min_bits)) else 0;
    const slack = @max(step, scale) * 0x1p-14 + (@abs(x) + @abs(got)) * 0x1p-23;
    // 8.5 + 8 is code 16 of q4_0, which there is not.
    const is_clipped = format == .q4_0 and @as(f64, x) / parameters.step + 8.5 >= 15.999;
    const clipped: f64 = if (is_clipped) step / 2 else 0;
    const bound = @max(step, scale) / 2 + number * @abs(step - scale) + min_error + clipped;
    const distance = @abs(@as(f64, x) - got);
    try testing.expect(distance <= bound + slack);
    if (format.isAffine() or scale < 0x1p-14) return;
    const relative: f64 = if (format == .q8_0) 0.57 else if (is_clipped) 1.01 else 0.51;
    try testing.expect(distance <= relative * step);
}

test "a group of one value, of zeros and of a barely visible step" {
    const buffers = try Buffers.create();
    defer testing.allocator.destroy(buffers);
    const rows = buffers.rows[0 .. 64 * 32];
    for (formats) |format| for (std.enums.values(Side)) |side| for ([_]f32{ 0, -0.0, 2.5, -2.5 }) |constant| {
        const plane: Plane = .{ .dtype = format, .side = side, .block_size = 64, .head_dim = 32 };
        const bytes = buffers.got[0..plane.bytes()];
        @memset(rows, constant);
        var levels: LevelIterator = .{};
        while (levels.next()) |table| {
            quantizeRows(table, plane, rows, bytes);
            // A constant is exact in all of them: it is the min, or the extreme of its group (127 * f16(2.5 / 127) is not).
            const scale = codec.f16Value(plane.scaleBits(bytes, 0));
            const expected = if (format == .q8_0) 127 * scale else @abs(constant);
            try testing.expectEqual(expected, @abs(codec.element(plane, bytes, 63, 31)));
            if (format == .q4_0 and constant == 0) try testing.expectEqual(0x8000, plane.scaleBits(bytes, 0)); // 0 / -8
            if (format.isAffine()) try testing.expectEqual(0, plane.scaleBits(bytes, 0));
        }
    };
    // 1 and its neighbour: the step vanishes in f16, and the smallest scale stands in.
    for ([_]Dtype{ .i8, .i4, .i2 }) |format| {
        const plane: Plane = .{ .dtype = format, .side = .values, .block_size = 64, .head_dim = 32 };
        const bytes = buffers.got[0..plane.bytes()];
        for (rows, 0..) |*x, i| x.* = if (i % 2 == 0) 1 else 1 + 0x1p-23;
        quantizeRows(dispatch.kernels(), plane, rows, bytes);
        try testing.expectEqual(1, plane.scaleBits(bytes, 0));
    }
}

test "what is not finite does no harm" {
    const buffers = try Buffers.create();
    defer testing.allocator.destroy(buffers);
    const rows = buffers.rows[0 .. 64 * 64];
    const inf = std.math.inf(f32);
    const strange = [_]f32{ std.math.nan(f32), inf, -inf, std.math.floatMax(f32), -std.math.floatMax(f32), 1 };
    for (rows, 0..) |*x, i| x.* = strange[(i *% 2_654_435_761 >> 7) % strange.len];
    for (formats) |format| for (std.enums.values(Side)) |side| {
        const plane: Plane = .{ .dtype = format, .side = side, .block_size = 64, .head_dim = 64 };
        var levels: LevelIterator = .{};
        while (levels.next()) |table| {
            @memset(&buffers.got, poison);
            quantizeRows(table, plane, rows, &buffers.got);
            try testing.expect(std.mem.allEqual(u8, buffers.got[plane.bytes()..], poison));
        }
    };
}

/// Numbers that no library's random generator has a say in.
fn fixed(rows: []f32) void {
    var state: u32 = 1909;
    for (rows) |*x| {
        state = state *% 1_664_525 +% 1_013_904_223;
        x.* = @as(f32, @floatFromInt(@as(i32, @bitCast(state)) >> 8)) * 0x1p-20; // -8 to 8
    }
}

test "the stored formats: if a hash changes, saved caches can no longer be read" {
    const buffers = try Buffers.create();
    defer testing.allocator.destroy(buffers);
    const rows = buffers.rows[0 .. 64 * 128];
    fixed(rows);
    const planes = [_]struct { Dtype, Side, u64 }{
        .{ .q8_0, .keys, 0xa6b8e73dd717f40b },
        .{ .q8_0, .values, 0xac848a313b7c221d },
        .{ .q4_0, .keys, 0x7fbff6c74c91d3c5 },
        .{ .q4_0, .values, 0x2c5138e135c0c9ad },
        .{ .i8, .keys, 0x7aa2b1c37595011 },
        .{ .i8, .values, 0x5a031de108a90b76 },
        .{ .i4, .keys, 0x308403dfe6c01fe1 },
        .{ .i4, .values, 0x32da0685ab0e00d6 },
        .{ .i2, .keys, 0x502e5e80d010f442 },
        .{ .i2, .values, 0x9f0a7c11fb19a0aa },
    };
    for (planes) |row| {
        const format, const side, const hash = row;
        const plane: Plane = .{ .dtype = format, .side = side, .block_size = 64, .head_dim = 128 };
        const bytes = buffers.got[0..plane.bytes()];
        quantizeRows(dispatch.kernels(), plane, rows, bytes);
        try testing.expectEqual(hash, std.hash.XxHash64.hash(0, bytes));
    }
    for ([_]struct { Dtype, u64 }{ .{ .q8_0, 0x2ad4169237cefabd }, .{ .q4_0, 0xa40c9690e854a5c8 } }) |row| {
        const format, const hash = row;
        const bytes = buffers.got[0 .. rows.len / 32 * group.recordBytes(format)];
        dispatch.kernels().quantize_records(bytes.ptr, format, rows.ptr, rows.len);
        try testing.expectEqual(hash, std.hash.XxHash64.hash(0, bytes));
    }
}
