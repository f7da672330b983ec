//! Names of blocks that were given up not long ago, so that a prompt can be told why it was not found.

const std = @import("std");
const Allocator = std.mem.Allocator;
const BlockHash = @import("chain.zig").BlockHash;

/// Names that a list has at most.
const names_max = 4096;

const List = std.AutoHashMapUnmanaged(BlockHash, void);

/// The last `names_max` names at least, and twice as many at most.
pub const Gone = struct {
    /// The second list takes the place of the first when it is full.
    lists: [2]List = @splat(.empty),

    pub fn deinit(gone: *Gone, gpa: Allocator) void {
        for (&gone.lists) |*list| list.deinit(gpa);
    }

    /// Without memory for it only an explanation is lost.
    pub fn remember(gone: *Gone, gpa: Allocator, name: BlockHash) void {
        if (gone.lists[1].count() >= names_max) {
            std.mem.swap(List, &gone.lists[0], &gone.lists[1]);
            gone.lists[1].clearRetainingCapacity();
        }
        gone.lists[1].put(gpa, name, {}) catch {};
    }

    pub fn has(gone: *const Gone, name: BlockHash) bool {
        return gone.lists[0].contains(name) or gone.lists[1].contains(name);
    }

    pub fn metadataBytes(gone: *const Gone) u64 {
        var bytes: u64 = 0;
        for (gone.lists) |list| bytes += list.capacity() * (@sizeOf(BlockHash) + 1);
        return bytes;
    }
};

/// A name for a test.
fn nameOf(number: usize) BlockHash {
    var name: BlockHash = @splat(0);
    std.mem.writeInt(u32, name[0..4], @intCast(number), .little);
    return name;
}

test Gone {
    const testing = std.testing;
    var gone: Gone = .{};
    defer gone.deinit(testing.allocator);
    for (0..3 * names_max) |number| gone.remember(testing.allocator, nameOf(number));
    for (2 * names_max..3 * names_max) |number| try testing.expect(gone.has(nameOf(number)));
    try testing.expect(!gone.has(nameOf(0)));
}
