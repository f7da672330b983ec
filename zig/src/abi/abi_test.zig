//! The ABI through its C face: what a caller can get wrong, and one life of a cache.

const std = @import("std");
const testing = std.testing;
const contiguous = @import("contiguous.zig");
const library = @import("library.zig");
const Status = @import("status.zig").Status;

fn bytes(pointer: anytype) [*]u8 {
    return @ptrCast(@constCast(pointer));
}

const options = [_]u32{ 40, 2, 1, 1, 4, 8, 0, 0, 0, 0 };

fn expectStatus(expected: Status, got: i32) !void {
    try testing.expectEqual(expected.result(), got);
}

test "one life of a cache" {
    const handle: u32 = @intCast(contiguous.create(bytes(&options), 40));
    const row = [_]f32{ 1, 2, 3, 4 };
    for (0..2) |layer| {
        try testing.expectEqual(0, contiguous.append(handle, @intCast(layer), 0, bytes(&row), 4, bytes(&row), 4, 0, 0));
        try testing.expectEqual(1, contiguous.rowCount(handle, @intCast(layer), 0));
    }
    try testing.expectEqual(0, contiguous.commit(handle, 0, 1));
    try testing.expectEqual(1, contiguous.seqLen(handle, 0));
    const attend_options = [_]u32{ 28, 1, 1, 0, 0, 0, 0 };
    var output: [4]f32 = undefined;
    var lse: [1]f32 = undefined;
    try testing.expectEqual(0, contiguous.attend(
        handle,
        1,
        0,
        bytes(&row),
        4,
        bytes(&attend_options),
        28,
        null,
        0,
        null,
        0,
        bytes(&output),
        4,
        bytes(&lse),
        1,
    ));
    try testing.expectEqual(row, output);
    try testing.expectApproxEqAbs(15, lse[0], 1e-5); // 30 / sqrt(4)
    var memory: f64 = 0;
    try testing.expectEqual(0, contiguous.cacheMemoryBytes(handle, bytes(&memory), 1));
    try testing.expectEqual(2 * 2 * 8 * 4 * 4 + 4, memory);
    try testing.expectEqual(0, contiguous.free(handle));
    try expectStatus(.stale_handle, contiguous.free(handle));
    try expectStatus(.stale_handle, contiguous.seqLen(handle, 0));
}

test "buffers: null, short and absurd counts are refused, a null for no elements is not" {
    const handle: u32 = @intCast(contiguous.create(bytes(&options), 40));
    defer _ = contiguous.free(handle);
    const row = [_]f32{ 1, 2, 3, 4 };
    try testing.expectEqual(0, contiguous.append(handle, 0, 0, null, 0, null, 0, 0, 0));
    try expectStatus(.invalid_size, contiguous.append(handle, 0, 0, null, 4, bytes(&row), 4, 0, 0));
    try expectStatus(.invalid_size, contiguous.append(handle, 0, 0, bytes(&row), 3, bytes(&row), 3, 0, 0));
    try expectStatus(.cache_full, contiguous.append(handle, 0, 0, bytes(&row), 0xffff_fffc, bytes(&row), 0xffff_fffc, 0, 0));
    try expectStatus(.invalid_config, contiguous.append(handle, 0, 0, bytes(&row), 4, bytes(&row), 4, 3, 0));
    try expectStatus(.invalid_config, contiguous.append(handle, 0, 0, bytes(&row), 4, bytes(&row), 4, 0, 2));
    try expectStatus(.invalid_size, contiguous.cacheMemoryBytes(handle, null, 1));
    try expectStatus(.invalid_size, contiguous.cacheMemoryBytes(handle, bytes(&row), 0));
    try expectStatus(.invalid_size, contiguous.stats(handle, null, 48));
    try expectStatus(.invalid_size, contiguous.attend(handle, 0, 0, bytes(&row), 4, null, 28, null, 0, null, 0, null, 0, null, 0));
    const attend_options = [_]u32{ 28, 1, 1, 0, 0, 0, 0 };
    try expectStatus(.invalid_size, contiguous.attend(
        handle,
        0,
        0,
        bytes(&row),
        4,
        bytes(&attend_options),
        28,
        null,
        0,
        null,
        0,
        null,
        0,
        null,
        0,
    ));
    try testing.expectEqual(0, contiguous.rowCount(handle, 0, 0));
}

test "records: unknown flags and fields are unsupported, bad words are refused" {
    var unknown = options ++ [_]u32{5};
    unknown[0] = 44;
    try expectStatus(.unsupported, contiguous.create(bytes(&unknown), 44));
    for (1..6) |field| {
        var bad = options;
        bad[field] = 0;
        try expectStatus(.invalid_config, contiguous.create(bytes(&bad), 40));
    }
    var bad_dtype = options;
    bad_dtype[6] = 9;
    try expectStatus(.invalid_config, contiguous.create(bytes(&bad_dtype), 40));
    var absurd = options;
    for (1..4) |field| absurd[field] = 0xffff_ffff;
    try expectStatus(.invalid_config, contiguous.create(bytes(&absurd), 40)); // a row of 2^34 elements
    absurd[3] = 1;
    try expectStatus(.out_of_memory, contiguous.create(bytes(&absurd), 40));
    var limited = options;
    limited[8] = 511;
    try expectStatus(.out_of_memory, contiguous.create(bytes(&limited), 40));

    const handle: u32 = @intCast(contiguous.create(bytes(&options), 40));
    defer _ = contiguous.free(handle);
    const row = [_]f32{ 1, 2, 3, 4 };
    const flags = [_]u32{ 28, 1, 1 | 1 << 31, 0, 0, 0, 0 };
    try expectStatus(.unsupported, contiguous.attend(
        handle,
        0,
        0,
        bytes(&row),
        4,
        bytes(&flags),
        28,
        null,
        0,
        null,
        0,
        null,
        0,
        null,
        0,
    ));
}

test "levels: unknown ones are refused, the one in force is among those this CPU has" {
    try expectStatus(.invalid_config, library.levelSet(0));
    try expectStatus(.invalid_config, library.levelSet(99));
    var info = [_]u32{ 40, 0, 0, 0, 0, 0, 0, 0, 0, 0 };
    try testing.expectEqual(0, library.systemInfo(bytes(&info), 40));
    try testing.expect(info[2] >> @intCast(info[1]) & 1 == 1);
    try testing.expect(info[3] >= 1);
    try testing.expectEqual(0, library.levelSet(info[1]));
}
