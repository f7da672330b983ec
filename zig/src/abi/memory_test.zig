//! The bodies of the C ABI with memory that fails.

const std = @import("std");
const testing = std.testing;
const contiguous = @import("contiguous.zig");
const handle = @import("handle.zig");
const memory = @import("memory.zig");
const records = @import("test_records.zig");
const reserved = @import("../device/reserved.zig");
const status = @import("status.zig");

/// What lives: caches that have a handle, and bytes.
fn held() struct { u32, u64 } {
    return .{ handle.liveCacheCount(), reserved.total() };
}

test "a body whose memory fails refuses, takes nothing, and works again afterwards" {
    const options = records.contiguousOf(1, 1, 4, 8);
    const before = held();
    var fail_index: usize = 0;
    while (true) : (fail_index += 1) {
        var failing: std.testing.FailingAllocator = .init(memory.system.gpa, .{ .fail_index = fail_index });
        const replaced = memory.replace(.{ .gpa = failing.allocator(), .slabs = memory.system.slabs });
        const word = contiguous.create(records.bytes(&options), records.size(&options));
        _ = memory.replace(replaced);
        if (word > 0) {
            try testing.expectEqual(0, contiguous.free(@intCast(word)));
            try testing.expect(!failing.has_induced_failure);
            break;
        }
        try testing.expectEqual(status.fromError(error.OutOfMemory), word);
        try testing.expectEqual(before, held());
    }
    try testing.expect(fail_index > 3);

    var none: std.testing.FailingAllocator = .init(memory.system.slabs, .{ .fail_index = 0 });
    const replaced = memory.replace(.{ .gpa = memory.system.gpa, .slabs = none.allocator() });
    const word = contiguous.create(records.bytes(&options), records.size(&options));
    _ = memory.replace(replaced);
    try testing.expectEqual(status.fromError(error.OutOfMemory), word);
    try testing.expectEqual(before, held());
}
