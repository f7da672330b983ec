//! The tokens of living sequences, by the root that these began at: what a prompt is compared with beside the index, and in
//! what the sequences of another tenant have no part.

const std = @import("std");
const assert = std.debug.assert;
const Allocator = std.mem.Allocator;
const Tokens = @import("tokens.zig").Tokens;

/// Tokens of the sequences of one root.
const List = std.ArrayList(*Tokens);

pub const Living = struct {
    /// By the node of the root; a root without sequences is not there.
    lists: std.AutoArrayHashMapUnmanaged(u32, List) = .empty,

    /// All sequences have ended.
    pub fn deinit(living: *Living, gpa: Allocator) void {
        assert(living.lists.count() == 0);
        living.lists.deinit(gpa);
        living.* = undefined;
    }

    /// The sequences that began at a root.
    pub fn of(living: *const Living, root: u32) []const *Tokens {
        return if (living.lists.get(root)) |list| list.items else &.{};
    }

    /// Makes room for one more at a root, which `dropIfEmpty` takes back where none comes.
    pub fn ensureUnusedCapacity(living: *Living, gpa: Allocator, root: u32) error{OutOfMemory}!void {
        const entry = try living.lists.getOrPutValue(gpa, root, .empty);
        errdefer living.dropIfEmpty(gpa, root);
        try entry.value_ptr.ensureUnusedCapacity(gpa, 1);
    }

    /// Adds the tokens of a sequence, which stay where they are while it lives.
    pub fn addAssumeCapacity(living: *Living, tokens: *Tokens) void {
        const list = living.lists.getPtr(tokens.root).?;
        tokens.place = list.items.len;
        list.appendAssumeCapacity(tokens);
    }

    /// Takes the tokens of a sequence out that is to end.
    pub fn remove(living: *Living, gpa: Allocator, tokens: *Tokens) void {
        const list = living.lists.getPtr(tokens.root).?;
        assert(list.swapRemove(tokens.place) == tokens);
        if (tokens.place < list.items.len) list.items[tokens.place].place = tokens.place;
        living.dropIfEmpty(gpa, tokens.root);
    }

    /// Forgets the list of a root that has none.
    pub fn dropIfEmpty(living: *Living, gpa: Allocator, root: u32) void {
        const list = living.lists.getPtr(root).?;
        if (list.items.len != 0) return;
        list.deinit(gpa);
        assert(living.lists.swapRemove(root));
    }

    pub fn metadataBytes(living: *const Living) u64 {
        var bytes: u64 = living.lists.capacity() * (@sizeOf(List) + 2 * @sizeOf(u32));
        for (living.lists.values()) |list| bytes += list.capacity * @sizeOf(*Tokens);
        return bytes;
    }
};
