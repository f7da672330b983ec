//! The tokens of a sequence: what it tells the prefix index of its committed rows.
//!
//!     node of block 0 <- node of block 1        | newest |
//!     whole blocks, in the index                  fewer tokens than a block, here alone until the sequence ends
//!
//! The block that is still written to is not the index's: it would be shared then, and copied at the next append. Others
//! find its tokens here while the sequence lives.
//!
//! A commit that does not tell its tokens, and an index without room, end it: rows behind those are not found by others.

const std = @import("std");
const assert = std.debug.assert;
const BlockTable = @import("../blocks/table.zig").BlockTable;
const indexes = @import("index.zig");
const Index = indexes.Index;
const Ref = @import("tree.zig").Ref;

pub const Tokens = struct {
    index: *Index,
    /// The tenant's root.
    root: u32,
    /// The node of the last whole block, or the root.
    last: Ref,
    /// The blocks of the sequence, [group].
    tables: []const BlockTable,
    /// The tokens behind it; has room for a block.
    newest: std.ArrayList(u32) = .empty,
    /// How long the newest of these stay.
    rank: indexes.Rank = .{},
    /// False once some row's token is not known, or not in the index.
    is_whole: bool = true,
    /// The number of the sequence among the living ones of its root.
    place: usize = 0,
    /// What the sequence was made for, until it has told all of that, or goes on in another way.
    prompt: []u32 = &.{},

    /// Begins without tokens, at a root that was opened for a sequence of these tables.
    pub fn init(index: *Index, root: Ref, tables: []const BlockTable) error{OutOfMemory}!Tokens {
        var tokens: Tokens = .{ .index = index, .root = root.node, .last = root, .tables = tables };
        try tokens.newest.ensureTotalCapacityPrecise(index.gpa, index.tree.block_size);
        return tokens;
    }

    /// The sequence ends, and has its blocks yet: the rows of the last one stay, too, if their tokens are known.
    pub fn keepNewest(tokens: *Tokens) void {
        const index = tokens.index;
        const node = tokens.lastNode() orelse return;
        if (!index.options.outlives or tokens.newest.items.len == 0) return;
        if (index.covers(node, tokens.newest.items)) return;
        _ = index.add(node, tokens.newest.items, tokens.tables, index.tree.depthOf(node), tokens.rank);
    }

    /// The sequence has ended, and gave its blocks back.
    pub fn deinit(tokens: *Tokens) void {
        const index = tokens.index;
        if (!index.options.outlives) {
            index.leave(tokens.last);
            index.forgetLeft();
        } else if (tokens.lastNode()) |last| {
            var node = last;
            while (index.tree.parentOf(node)) |parent| : (node = parent) index.ended(node);
        }
        index.close(tokens.root);
        tokens.newest.deinit(index.gpa);
        tokens.forgetPrompt();
        tokens.* = undefined;
    }

    /// The same tokens once more, without what the sequence was made for; whoever asks frees `newest`.
    pub fn clone(tokens: *const Tokens) error{OutOfMemory}!Tokens {
        var other = tokens.*;
        other.prompt = &.{};
        other.newest = .empty;
        try other.newest.appendSlice(tokens.index.gpa, tokens.newest.items);
        return other;
    }

    /// The tokens of another sequence of this root, once more.
    pub fn copyFrom(tokens: *Tokens, other: *const Tokens) void {
        assert(tokens.root == other.root);
        tokens.forgetPrompt();
        if (!tokens.index.options.outlives) tokens.index.leave(tokens.last);
        tokens.last = other.last;
        tokens.newest.clearRetainingCapacity();
        tokens.newest.appendSliceAssumeCapacity(other.newest.items);
        tokens.rank = other.rank;
        tokens.is_whole = other.is_whole;
    }

    /// The node of the last whole block, or the root; null where others find nothing behind it.
    pub fn lastNode(tokens: *const Tokens) ?u32 {
        return if (tokens.is_whole) tokens.index.tree.get(tokens.last) else null;
    }

    /// Tokens that others find, from the first on; null where they find nothing that is told from now on.
    pub fn toldCount(tokens: *const Tokens) ?u32 {
        const node = tokens.lastNode() orelse return null;
        return tokens.index.tree.depthOf(node) * tokens.index.tree.block_size + @as(u32, @intCast(tokens.newest.items.len));
    }

    /// Rows were committed, up to `seq_len`: their tokens, or none where they were not told.
    pub fn committed(tokens: *Tokens, told: ?[]align(1) const u32, seq_len: u32, rank: indexes.Rank) void {
        const index = tokens.index;
        var node = tokens.lastNode() orelse return tokens.end();
        const more = told orelse return tokens.end();
        assert(index.tree.depthOf(node) * index.tree.block_size + tokens.newest.items.len + more.len == seq_len);
        tokens.rank = rank;
        tokens.followPrompt(more, seq_len - @as(u32, @intCast(more.len)));
        for (more) |token| {
            tokens.newest.appendAssumeCapacity(token);
            if (tokens.newest.items.len < index.tree.block_size) continue;
            node = index.add(node, tokens.newest.items, tokens.tables, index.tree.depthOf(node), rank) orelse return tokens.end();
            tokens.last = index.tree.refOf(node);
            tokens.newest.clearRetainingCapacity();
        }
    }

    /// The sequence was rewound to `seq_len` rows.
    pub fn rewound(tokens: *Tokens, seq_len: u32) void {
        const index = tokens.index;
        if (tokens.toldCount() != seq_len) tokens.forgetPrompt();
        defer if (!index.options.outlives) index.forgetLeft();
        if (!index.options.outlives) index.leave(tokens.last);
        if (seq_len == 0) {
            tokens.last = index.tree.refOf(tokens.root);
            tokens.newest.clearRetainingCapacity();
            tokens.is_whole = true;
            return;
        }
        var node = tokens.lastNode() orelse return;
        const depth = seq_len / index.tree.block_size;
        const rest = seq_len % index.tree.block_size;
        if (index.tree.depthOf(node) == depth) return tokens.newest.shrinkRetainingCapacity(rest);
        while (index.tree.depthOf(node) > depth + 1) node = index.tree.parentOf(node).?;
        tokens.newest.clearRetainingCapacity();
        tokens.newest.appendSliceAssumeCapacity(index.tree.tokensOf(node)[0..rest]);
        tokens.last = index.tree.refOf(index.tree.parentOf(node).?);
    }

    /// Appends the nodes of the whole blocks from an entry on.
    pub fn nodesFrom(tokens: *const Tokens, entry: u32, nodes: *std.ArrayList(Ref)) error{OutOfMemory}!void {
        const index = tokens.index;
        var node = tokens.lastNode() orelse return;
        if (index.tree.depthOf(node) <= entry) return;
        var i = index.tree.depthOf(node) - entry;
        try nodes.resize(index.gpa, i);
        while (i > 0) : (node = index.tree.parentOf(node).?) {
            i -= 1;
            nodes.items[i] = index.tree.refOf(node);
        }
    }

    /// Tokens are told behind the first `start`.
    fn followPrompt(tokens: *Tokens, more: []align(1) const u32, start: u32) void {
        const rest = tokens.prompt[@min(start, tokens.prompt.len)..];
        if (more.len >= rest.len) return tokens.forgetPrompt();
        for (more, rest[0..more.len]) |token, expected| if (token != expected) return tokens.forgetPrompt();
    }

    fn forgetPrompt(tokens: *Tokens) void {
        tokens.index.gpa.free(tokens.prompt);
        tokens.prompt = &.{};
    }

    fn end(tokens: *Tokens) void {
        tokens.forgetPrompt();
        tokens.is_whole = false;
        tokens.newest.clearRetainingCapacity();
    }
};
