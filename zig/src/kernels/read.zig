//! Reads memory and does nothing with it: what the speed of attention is measured against.

const std = @import("std");
const assert = std.debug.assert;
const simd = @import("lanes.zig");
const VectorU32 = simd.VectorU32;

/// Vectors read in one step, each into its own accumulator so that no load waits for another.
const step_vectors = 8;
const step_bytes = step_vectors * simd.lanes * 4;

/// Folds `byte_count` bytes, a multiple of 512, into one word; with `prefetch_bytes` > 0 it prefetches that far ahead. See
/// `Table.read`.
pub fn read(source: [*]const u8, byte_count: usize, prefetch_bytes: usize) callconv(.c) u32 {
    assert(byte_count % 512 == 0);
    comptime assert(512 % step_bytes == 0);
    var folded: [step_vectors]VectorU32 = @splat(@splat(0));
    var at: usize = 0;
    while (at < byte_count) : (at += step_bytes) {
        if (prefetch_bytes != 0) {
            // Past the end a prefetch is harmless.
            comptime var line = 0;
            inline while (line < step_bytes) : (line += simd.cache_line_bytes) {
                @prefetch(source + at + prefetch_bytes + line, .{ .locality = 3 });
            }
        }
        inline for (&folded, 0..) |*vector, i| {
            vector.* ^= @as(*align(1) const [simd.lanes]u32, @ptrCast(source + at + i * simd.lanes * 4)).*;
        }
    }
    var all: VectorU32 = folded[0];
    inline for (folded[1..]) |vector| all ^= vector;
    return @reduce(.Xor, all);
}
