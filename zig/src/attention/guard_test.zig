//! Attention and appends with keys, values, queries and outputs beside pages that nobody may touch: what kernels read past
//! the last element of a row, or write past the last of an output, is found, on every level.

const std = @import("std");
const testing = std.testing;
const attention = @import("attend.zig");
const ContiguousCache = @import("../cache/contiguous.zig").ContiguousCache;
const dispatch = @import("../kernels/dispatch.zig");
const Dtype = @import("../dtype.zig").Dtype;
const guarded = @import("../device/guarded.zig");
const PagedCache = @import("../cache/paged/cache.zig").PagedCache;
const Rows = @import("../cache/rows.zig").Rows;

/// Elements at an odd address or not, beside the page.
const Floats = struct {
    edge: guarded.Edge,
    memory: []u8,
    elements: []align(1) f32,

    fn init(edge: guarded.Edge, count: usize, shift: usize) !Floats {
        const memory = try guarded.allocator(edge).alloc(u8, 4 * count + shift);
        const first = if (edge == .start) shift else 0;
        const elements: []align(1) f32 = @ptrCast(memory[first..][0 .. 4 * count]);
        for (elements, 0..) |*element, i| element.* = @as(f32, @floatFromInt(i * 29 % 64)) / 64 - 0.5;
        return .{ .edge = edge, .memory = memory, .elements = elements };
    }

    fn deinit(floats: Floats) void {
        guarded.allocator(floats.edge).free(floats.memory);
    }
};

const Setting = struct {
    edge: guarded.Edge,
    shift: usize,

    fn attend(setting: Setting, rows: Rows, query_count: u32, ratio: u32) !void {
        const q_head_count = rows.kv_head_count * ratio;
        const q: Floats = try .init(setting.edge, query_count * q_head_count * rows.head_dim, setting.shift);
        defer q.deinit();
        const output: Floats = try .init(setting.edge, q.elements.len, setting.shift);
        defer output.deinit();
        const lse: Floats = try .init(setting.edge, query_count * q_head_count, setting.shift);
        defer lse.deinit();
        const slopes: Floats = try .init(setting.edge, q_head_count, setting.shift);
        defer slopes.deinit();
        // The oldest rows and the newest ones: both ends of what is stored.
        try attention.attend(rows, q.elements, .{
            .query_count = query_count,
            .window_tokens = 70,
            .sink_tokens = 5,
            .alibi_slopes = slopes.elements,
            .sink_logits = slopes.elements,
        }, output.elements, lse.elements);
        for (output.elements) |element| try testing.expect(std.math.isFinite(element));
    }

    /// Rows that fill their pages to the last byte.
    fn checkFlat(setting: Setting, dtype: Dtype, head_dim: u32) !void {
        const row_count = 2048;
        var cache: ContiguousCache = try .initSlabs(testing.allocator, guarded.allocator(setting.edge), .{
            .layer_count = 1,
            .kv_head_count = 1,
            .head_dim = head_dim,
            .max_seq_len = row_count,
            .dtype_k = dtype,
            .dtype_v = dtype,
        });
        defer cache.deinit();
        const rows: Floats = try .init(setting.edge, row_count * head_dim, setting.shift);
        defer rows.deinit();
        _ = try cache.append(0, 0, .fromF32(rows.elements), .fromF32(rows.elements));
        try setting.attend(try cache.rows(0, 0), 1, 1);
        try setting.attend(try cache.rows(0, 0), 3, 5);
    }

    /// One block of the store, and a tail of one.
    fn checkCodes(setting: Setting, dtype_k: Dtype, dtype_v: Dtype, head_dim: u32) !void {
        var cache: PagedCache = try .initSlabs(testing.allocator, guarded.allocator(setting.edge), .{
            .layers = &.{.{ .kv_head_count = 2, .head_dim = head_dim }},
            .max_seq_len = 128,
            .dtype_k = .f32,
            .dtype_v = .f32,
            .policy = .{ .kind = .tiered, .store = .{ .dtype_k = dtype_k, .dtype_v = dtype_v } },
        });
        defer cache.deinit();
        const sequence = try cache.createSequence();
        const rows: Floats = try .init(setting.edge, 127 * 2 * head_dim, setting.shift);
        defer rows.deinit();
        try cache.append(0, &.{sequence}, &.{127}, .fromF32(rows.elements), .fromF32(rows.elements));
        try sequence.commit(127);
        try setting.attend(try sequence.rows(0), 1, 1);
        try setting.attend(try sequence.rows(0), 3, 5);
    }
};

fn onEveryLevel(comptime body: fn (Setting) anyerror!void) !void {
    if (!guarded.is_here) return error.SkipZigTest; // said there
    const before = dispatch.kernels().level;
    defer dispatch.changeLevel(before) catch unreachable;
    for (std.enums.values(dispatch.Level)) |level| {
        if (dispatch.tableOf(level) == null) continue;
        try dispatch.changeLevel(level);
        for ([_]guarded.Edge{ .start, .end }) |edge| for ([_]usize{ 0, 1 }) |shift| {
            errdefer std.debug.print("level {s}, {s}, {}\n", .{ @tagName(level), @tagName(edge), shift });
            try body(.{ .edge = edge, .shift = shift });
        };
    }
}

test "floats of any head_dim: nothing beside rows, queries and outputs is touched" {
    try onEveryLevel(struct {
        fn run(setting: Setting) !void {
            for ([_]u32{ 1, 3, 7, 15, 16, 17, 33, 66, 127 }, 0..) |head_dim, i| {
                try setting.checkFlat(([_]Dtype{ .f32, .f16, .bf16 })[(i + setting.shift) % 3], head_dim);
                try setting.checkFlat(([_]Dtype{ .f32, .f16, .bf16 })[(i + setting.shift + 1) % 3], head_dim);
            }
        }
    }.run);
}

test "codes of every format: nothing beside planes, queries and outputs is touched" {
    try onEveryLevel(struct {
        fn run(setting: Setting) !void {
            const formats = [_]Dtype{ .q8_0, .q4_0, .i8, .i4, .i2 };
            for (formats, 0..) |dtype, i| for ([_]u32{ 32, 96 }) |head_dim| {
                try setting.checkCodes(dtype, formats[(i + 2) % formats.len], head_dim);
            };
        }
    }.run);
}
