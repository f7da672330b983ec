//! Cases for the tests of attention: rows and planes of any format with their values in f64, and queries over them. No tests
//! by itself.

const std = @import("std");
const testing = std.testing;
const dispatch = @import("../dispatch.zig");
const group = @import("../../group.zig");
const float_reference = @import("../reference/float.zig");
const Dtype = @import("../../dtype.zig").Dtype;
const Table = dispatch.Table;

const tile_tokens = dispatch.tile_tokens;
pub const row_max = dispatch.query_row_count_max;

/// A number that depends on nothing but its arguments: the same tokens get the same codes in blocks of any size.
pub fn hash(salt: u32, a: u32, b: u32) u32 {
    var x = salt *% 0x9e37_79b9 +% a;
    inline for (.{ b, 0x85eb_ca6b, 0xc2b2_ae35 }) |next| {
        x = (x ^ x >> 15) *% 0x2c1b_3c6d +% next;
        x = (x ^ x >> 12) *% 0x297a_2d39;
    }
    return x ^ x >> 15;
}

/// Uniform in [-1, 1).
fn hashFloat(salt: u32, a: u32, b: u32) f32 {
    return @as(f32, @floatFromInt(hash(salt, a, b) >> 8)) * 0x1p-23 - 1;
}

/// How the codes, scales and mins of a side are filled.
pub const Fill = struct {
    salt: u32 = 1,
    /// Null for random codes; else the byte that all stored bytes are.
    byte: ?u8 = null,
    /// Scales 1 or -1 and mins 0, for sums that are integers.
    unit_scales: bool = false,

    fn scale(fill: Fill, plane: group.Plane, token: u32, index: u32) f16 {
        const random = hashFloat(fill.salt + 7, token, index);
        if (fill.unit_scales) return if (random < 0) -1 else 1;
        // Values about 1 in magnitude, of either sign.
        const unit: f32 = 2 / @as(f32, @floatFromInt(@as(u32, 1) << plane.dtype.codeBits()));
        return @floatCast(unit * (if (random < 0) random - 0.5 else random + 0.5));
    }

    fn min(fill: Fill, token: u32, index: u32) f16 {
        return if (fill.unit_scales) 0 else @floatCast(hashFloat(fill.salt + 8, token, index));
    }
};

/// Keys or values of one KV head: blocks, one behind the other, and what is in them.
const SideRows = struct {
    dtype: Dtype,
    side: group.Side,
    token_count: u32,
    head_dim: u32,
    block_size: u32,
    block_bytes: u32,
    bytes: []align(64) u8,
    /// [token][head_dim]
    truth: []f64,

    pub fn init(dtype: Dtype, side: group.Side, token_count: u32, head_dim: u32, block_size: u32, fill: Fill) !SideRows {
        const block_count = (token_count + block_size - 1) / block_size;
        const plane: group.Plane = .{ .dtype = dtype, .side = side, .block_size = block_size, .head_dim = head_dim };
        const block_bytes = if (dtype.isFloat()) block_size * head_dim * dtype.elementBytes() else plane.bytes();
        const rows: SideRows = .{
            .dtype = dtype,
            .side = side,
            .token_count = token_count,
            .head_dim = head_dim,
            .block_size = block_size,
            .block_bytes = block_bytes,
            .bytes = try testing.allocator.alignedAlloc(u8, .@"64", block_count * block_bytes),
            .truth = try testing.allocator.alloc(f64, block_count * block_size * head_dim),
        };
        for (0..block_count) |b| {
            const block: u32 = @intCast(b);
            if (dtype.isFloat()) rows.fillFloats(block, fill) else rows.fillPlane(plane, block, fill);
        }
        return rows;
    }

    fn deinit(rows: SideRows) void {
        testing.allocator.free(rows.bytes);
        testing.allocator.free(rows.truth);
    }

    fn blockBytes(rows: SideRows, block: u32) []u8 {
        return rows.bytes[block * rows.block_bytes ..][0..rows.block_bytes];
    }

    fn fillFloats(rows: SideRows, block: u32, fill: Fill) void {
        const bytes = rows.blockBytes(block);
        for (0..rows.block_size * rows.head_dim) |i| {
            const index = block * rows.block_size * rows.head_dim + i;
            const value = hashFloat(fill.salt, @intCast(index / rows.head_dim), @intCast(index % rows.head_dim));
            switch (rows.dtype) {
                .f32 => std.mem.writeInt(u32, bytes[i * 4 ..][0..4], @bitCast(value), .little),
                else => std.mem.writeInt(u16, bytes[i * 2 ..][0..2], float_reference.round16(rows.dtype, value), .little),
            }
            rows.truth[index] = float_reference.element(rows.dtype, bytes, i);
        }
    }

    fn fillPlane(rows: SideRows, plane: group.Plane, block: u32, fill: Fill) void {
        const bytes = rows.blockBytes(block);
        const per_channel = rows.dtype.isAffine() and rows.side == .keys;
        for (0..rows.block_size) |t| for (0..rows.head_dim) |d| {
            const token: u32 = @intCast(t);
            const dim: u32 = @intCast(d);
            const position = block * rows.block_size + token;
            const random: u8 = @truncate(hash(fill.salt, position, dim));
            const byte = fill.byte orelse random;
            const place = plane.codePlace(token, dim);
            const bits = plane.dtype.codeBits();
            plane.setCode(bytes, token, dim, if (bits == 8)
                @as(i8, @bitCast(byte))
            else
                byte >> place.shift & (@as(u8, 1) << @intCast(bits)) - 1);
            // The scales of a channel are those of 256 tokens, so that blocks of any size hold the same values.
            const scale_token = if (per_channel) position / 256 else position;
            const scale_group = if (per_channel) dim else dim / plane.groupSize();
            const scale = fill.scale(plane, scale_token, scale_group);
            const min = fill.min(scale_token, scale_group);
            plane.setScaleBits(bytes, token, dim, @bitCast(scale));
            if (plane.dtype.isAffine()) plane.setMinBits(bytes, token, dim, @bitCast(min));
            const code: f64 = @floatFromInt(plane.code(bytes, token, dim));
            const zero: f64 = if (plane.dtype == .q4_0) 8 else 0;
            rows.truth[position * rows.head_dim + dim] = (code - zero) * scale + if (plane.dtype.isAffine()) @as(f64, min) else 0;
        };
    }

    /// The row of a position, or the plane that holds it.
    fn at(rows: SideRows, position: u32) [*]const u8 {
        const bytes = rows.blockBytes(position / rows.block_size);
        if (!rows.dtype.isFloat()) return bytes.ptr;
        return bytes.ptr + position % rows.block_size * rows.rowBytes();
    }

    fn rowBytes(rows: SideRows) u32 {
        return rows.head_dim * rows.dtype.elementBytes();
    }
};

/// Both sides.
pub const Stored = struct {
    keys: SideRows,
    values: SideRows,

    pub fn init(dtype_k: Dtype, dtype_v: Dtype, token_count: u32, head_dim: u32, block_size: u32) !Stored {
        return .{
            .keys = try .init(dtype_k, .keys, token_count, head_dim, block_size, .{ .salt = 1 }),
            .values = try .init(dtype_v, .values, token_count, head_dim, block_size, .{ .salt = 100 }),
        };
    }

    pub fn deinit(stored: Stored) void {
        stored.keys.deinit();
        stored.values.deinit();
    }

    /// The runs of a tile that are in [first, end) or in [0, sink_end).
    fn tile(stored: Stored, runs: *[2]dispatch.Run, tile_first: u32, sees: Sees) dispatch.TileRuns {
        const tile_end = @min(tile_first + tile_tokens, stored.keys.token_count);
        var run_count: u32 = 0;
        const sink_end = @min(sees.sink_end, sees.first);
        for ([_][2]u32{ .{ 0, sink_end }, .{ sees.first, sees.end } }) |stretch| {
            const first = @max(stretch[0], tile_first);
            const end = @min(stretch[1], tile_end);
            if (first >= end) continue;
            runs[run_count] = .{
                .keys = stored.keys.at(first),
                .values = stored.values.at(first),
                .position = first,
                .token_count = end - first,
            };
            run_count += 1;
        }
        const is_float = stored.keys.dtype.isFloat() and stored.values.dtype.isFloat();
        return .{
            .storage = .{
                .dtype_k = stored.keys.dtype,
                .dtype_v = stored.values.dtype,
                // The stride of a plane is never used.
                .token_stride_k = if (stored.keys.dtype.isFloat()) stored.keys.rowBytes() else std.math.maxInt(u64),
                .token_stride_v = if (stored.values.dtype.isFloat()) stored.values.rowBytes() else std.math.maxInt(u64),
                // There is one head.
                .head_stride_k = std.math.maxInt(u64),
                .head_stride_v = std.math.maxInt(u64),
                .block_size = if (is_float) 0 else stored.keys.block_size,
                .tile_token = if (is_float) 0 else tile_first % stored.keys.block_size,
            },
            .runs = runs,
            .run_count = run_count,
        };
    }
};

/// The positions a row sees.
pub const Sees = struct { first: u32 = 0, end: u32, sink_end: u32 = 0 };

pub const Results = struct {
    output: [row_max][dispatch.head_dim_max]f32,
    lse: [row_max]f32,
};

/// Attends queries, [row][head_dim_padded], over all tiles that any of them sees.
pub fn attendRows(table: *const Table, stored: Stored, queries: []const f32, sees: []const Sees) Results {
    const head_dim = stored.keys.head_dim;
    const padded = std.mem.alignForward(u32, head_dim, dispatch.lanes_max);
    var sums: [row_max * dispatch.head_dim_max]f32 align(64) = @splat(0);
    var rows: [row_max]dispatch.QueryRow = undefined;
    var all: Sees = .{ .first = std.math.maxInt(u32), .end = 0 };
    for (rows[0..sees.len], sees) |*row, row_sees| {
        row.* = .{
            .first = row_sees.first,
            .end = row_sees.end,
            .sink_end = row_sees.sink_end,
            .position = row_sees.end -% 1,
            .alibi_slope = 0,
            .tree_first = stored.keys.token_count,
            .tree_mask = 0,
            .score_max = -std.math.inf(f32),
            .weight_sum = 0,
        };
        all.first = @min(all.first, row_sees.first);
        all.end = @max(all.end, row_sees.end);
        all.sink_end = @max(all.sink_end, row_sees.sink_end);
    }
    var prepared: [row_max]dispatch.PreparedQuery = undefined;
    var tile_first: u32 = 0;
    while (tile_first < stored.keys.token_count) : (tile_first += tile_tokens) {
        var runs: [2]dispatch.Run = undefined;
        var next_runs: [2]dispatch.Run = undefined;
        const task: dispatch.AttendTask = .{
            .queries = queries.ptr,
            .prepared = &prepared,
            .sums = &sums,
            .rows = &rows,
            .head_count = 1,
            .row_count = @intCast(sees.len),
            .head_dim = head_dim,
            .head_dim_padded = padded,
            .softcap = 0,
            .tile = stored.tile(&runs, tile_first, all),
            .next_tile = stored.tile(&next_runs, tile_first + tile_tokens, all),
            .is_token_major = 0,
        };
        if (tile_first == 0 and task.tile.storage.isPrepared()) table.prepare(&task);
        table.attend(&task);
    }
    var results: Results = undefined;
    for (0..sees.len) |r| results.lse[r] = table.finish(&.{
        .sums = sums[r * padded ..].ptr,
        .output = @ptrCast(&results.output[r]),
        .row = &rows[r],
        .head_dim = head_dim,
        .has_sink_logit = 0,
        .sink_logit = 0,
    });
    return results;
}

pub fn randomQueries(queries: []f32, head_dim: u32) void {
    var prng: std.Random.DefaultPrng = .init(head_dim);
    const factor = 2 / @sqrt(@as(f32, @floatFromInt(head_dim)));
    for (queries) |*element| element.* = prng.random().floatNorm(f32) * factor;
}
