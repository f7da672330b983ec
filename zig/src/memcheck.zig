//! A planted error, for valgrind: the program decides something by a row that was never written.
//!
//! `zig build memcheck` runs it beside the tests and fails unless valgrind reports it; without that, a silent valgrind
//! would prove nothing.

const std = @import("std");
const kvern = @import("kvern.zig");

pub fn main() !void {
    var cache: kvern.ContiguousCache = try .init(std.heap.c_allocator, .{
        .layer_count = 1,
        .kv_head_count = 1,
        .head_dim = 4,
        .max_seq_len = 2,
    });
    defer cache.deinit();
    const row = [_]f32{ 1, 2, 3, 4 };
    _ = try cache.append(0, 0, .fromF32(&row), .fromF32(&row));
    const rows = try cache.rows(0, 0);
    const unwritten = rows.memory.contiguous.keys[row.len * @sizeOf(f32)];
    std.process.exit(if (unwritten == 0) 0 else 1);
}
