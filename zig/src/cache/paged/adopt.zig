//! Starting a sequence from rows that were computed before: the longest prefix of its tokens that the index, or a sequence
//! that is still at work, has in every layer group.
//!
//! It is a fork of what is there, cut at the first token that differs: tables and reference counts, no K/V byte. The block
//! that is kept in part is copied when the next row is appended, and not before.
//!
//! A layer that sees a window of rows needs the last blocks of a prefix alone. Where one of those has gone, the sequence
//! starts at the nearest earlier border at which every layer has what it needs.

const std = @import("std");
const assert = std.debug.assert;
const block_table = @import("../blocks/table.zig");
const Dtype = @import("../../dtype.zig").Dtype;
const indexes = @import("../prefix/index.zig");
const Index = indexes.Index;
const state = @import("state.zig");
const CacheState = state.CacheState;
const SequenceState = state.SequenceState;
const Tokens = @import("../prefix/tokens.zig").Tokens;
const trees = @import("../prefix/tree.zig");

/// Why a prompt was not found any further. The numbers cross the ABI and are never changed.
pub const Reason = enum(u32) {
    /// All of it was found, but for the last token, which is always left to compute.
    whole = 0,
    /// Another token stands where it goes on.
    differs = 1,
    /// Nothing was stored there.
    not_stored = 2,
    /// A layer with a window no longer has the rows it needs.
    window_passed = 3,
    /// The rows behind it are quantized, and only floats were wanted.
    quantized = 4,
    /// It was there, and had to go.
    evicted = 5,
    /// It is there for another model: another fingerprint.
    other_fingerprint = 6,
};

/// What a prompt would find, and why no more.
pub const Explanation = struct {
    token_count: u32,
    known_count: u32,
    reason: Reason,
    /// The token that stands where the prompt differs; null unless that is why.
    other_token: ?u32,
    /// The formats of the rows, those of keys and of values.
    formats: [formats_max]?[2]Dtype,

    pub const formats_max = 8;
};

/// Explains what `find` finds. `shows_all` for the owner of the cache: a tenant is told of nothing that depends on others.
pub fn explain(cache: *const CacheState, root: u32, tokens: []const u32, shows_all: bool) error{OutOfMemory}!Explanation {
    const index = cache.prefix.?;
    var found = try find(cache, root, tokens);
    defer found.deinit(cache);
    const depth: u32 = @intCast(found.nodes.items.len);
    const last = if (depth == 0) root else found.nodes.items[depth - 1];
    const rest = tokens[depth * cache.block_size ..];
    var reason = found.reason;
    if ((reason == .not_stored or reason == .differs) and shows_all) {
        if (index.wasEvicted(last, rest)) reason = .evicted else if (index.roots.hasOtherModel(&index.tree, root, tokens)) reason = .other_fingerprint;
    }
    var explanation: Explanation = .{
        .token_count = found.token_count,
        .known_count = found.known_count,
        .reason = reason,
        .other_token = if (reason == .differs) otherToken(index, last, rest, found.next) else null,
        .formats = @splat(null),
    };
    const entry_count = (found.token_count + cache.block_size - 1) / cache.block_size;
    for (0..entry_count) |entry| for (cache.groups, 0..) |group, g| {
        const held = heldBlock(cache, &found, @intCast(entry), @intCast(g)) orelse continue;
        const shape = group.formats.items[held.format].shape;
        const format: [2]Dtype = .{ shape.dtype_k, shape.dtype_v };
        for (&explanation.formats) |*place| {
            const known = place.* orelse {
                place.* = format;
                break;
            };
            if (std.meta.eql(known, format)) break;
        }
    };
    return explanation;
}

/// The token that stands where a prompt differs from what is nearest to it.
fn otherToken(index: *const Index, last: u32, rest: []const u32, next: ?Next) ?u32 {
    const one = next orelse {
        const child = index.tree.neighbour(last, rest) orelse return null;
        return index.tree.tokensOf(child)[0];
    };
    const tokens = one.tokens(index);
    return if (one.common < tokens.len) tokens[one.common] else null;
}

/// What was found for a prompt.
pub const Found = struct {
    /// Rows that are there: where the sequence starts.
    token_count: u32 = 0,
    /// Tokens that were found, whether or not their rows can be used.
    known_count: u32 = 0,
    reason: Reason = .not_stored,
    /// Whole blocks from the first on, and the block behind them.
    nodes: std.ArrayList(u32) = .empty,
    next: ?Next = null,

    pub fn deinit(found: *Found, cache: *const CacheState) void {
        found.nodes.deinit(cache.gpa);
    }
};

/// The block behind the whole ones that are equal, of which the first rows are.
const Next = struct {
    common: u32,
    from: union(enum) {
        node: u32,
        /// A sequence that still writes to it.
        sequence: *const Tokens,
    },

    fn tokens(next: Next, index: *const Index) []const u32 {
        return switch (next.from) {
            .node => |node| index.tree.tokensOf(node),
            .sequence => |sequence| sequence.newest.items,
        };
    }

    /// The block of a group, and its format.
    fn block(next: Next, index: *const Index, group: u32, entry: u32) ?Held {
        switch (next.from) {
            .node => |node| {
                const held = index.tree.blockOf(node, group) orelse return null;
                return .{ .block = held.block, .format = held.format };
            },
            .sequence => |sequence| {
                const entries = sequence.tables[group].entries();
                if (entry >= entries.count() or entries.isEvicted(entry)) return null;
                return .{ .block = entries.block(entry), .format = entries.format(entry) };
            },
        }
    }
};

const Held = struct { block: i32, format: u8 };

/// Looks up how many rows of a prompt are there.
pub fn find(cache: *const CacheState, root: u32, tokens: []const u32) error{OutOfMemory}!Found {
    const index = cache.prefix.?;
    var found: Found = .{};
    errdefer found.deinit(cache);
    try index.tree.walk(root, tokens, &found.nodes);
    const depth: u32 = @intCast(found.nodes.items.len);
    const last = if (depth == 0) root else found.nodes.items[depth - 1];
    const whole = depth * cache.block_size;
    found.next = nearest(cache, root, last, tokens[whole..]);
    found.known_count = whole + (if (found.next) |next| next.common else 0);
    found.reason = if (found.known_count == tokens.len)
        .whole
    else if (otherToken(index, last, tokens[whole..], found.next) != null) .differs else .not_stored;

    // One token is left to compute: its query is what the caller wants.
    const most = @min(found.known_count, @as(u32, @intCast(tokens.len)) -| 1);
    var presence: Presence = try .init(cache, &found);
    defer presence.deinit(cache);
    if (presence.usable(most)) {
        found.token_count = most;
        return found;
    }
    found.reason = if (presence.floats < found.known_count) .quantized else .window_passed;
    var border = std.mem.alignBackward(u32, most, cache.block_size);
    if (border == most) border -|= cache.block_size;
    while (border > 0 and !presence.usable(border)) border -= cache.block_size;
    found.token_count = border;
    return found;
}

/// The block of which most tokens are equal: a node, or what a sequence at work has behind that same node.
fn nearest(cache: *const CacheState, root: u32, last: u32, tokens: []const u32) ?Next {
    const index = cache.prefix.?;
    var best: ?Next = null;
    if (index.tree.nearestChild(last, tokens)) |child| best = .{ .common = child.common, .from = .{ .node = child.node } };
    for (cache.living.of(root)) |told| {
        if (told.newest.items.len == 0 or told.lastNode() != last) continue;
        const common = trees.commonCount(told.newest.items, tokens);
        if (common > (if (best) |one| one.common else 0)) best = .{ .common = common, .from = .{ .sequence = told } };
    }
    return best;
}

/// Which blocks of what was found are there, by group.
const Presence = struct {
    cache: *const CacheState,
    found: *const Found,
    /// Rows from the first on whose blocks are in floats, or may be in others.
    floats: u32,
    /// The first entry from which on a group has every block up to this one, [entry][group].
    since: []u32,
    entry_count: u32,

    fn init(cache: *const CacheState, found: *const Found) error{OutOfMemory}!Presence {
        const tiers = cache.prefix.?.options.tiers;
        const entry_count: u32 = @intCast(found.nodes.items.len + @intFromBool(found.next != null));
        const group_count = cache.groups.len;
        const since = try cache.gpa.alloc(u32, entry_count * group_count);
        var presence: Presence = .{
            .cache = cache,
            .found = found,
            .floats = if (tiers == .any) std.math.maxInt(u32) else entry_count * cache.block_size,
            .since = since,
            .entry_count = entry_count,
        };
        for (0..entry_count) |i| for (0..group_count) |g| {
            const entry: u32 = @intCast(i);
            const held = heldBlock(cache, found, entry, @intCast(g));
            const before = if (entry == 0) 0 else since[(i - 1) * group_count + g];
            since[i * group_count + g] = if (held == null) entry + 1 else before;
            // Rows that were codes once were rounded, whatever they are now.
            const is_float = held == null or held.?.format == block_table.tail_format;
            if (tiers == .float and !is_float) presence.floats = @min(presence.floats, entry * cache.block_size);
        };
        return presence;
    }

    fn deinit(presence: Presence, cache: *const CacheState) void {
        cache.gpa.free(presence.since);
    }

    /// Every group has what a sequence of so many rows needs.
    fn usable(presence: Presence, token_count: u32) bool {
        if (token_count == 0) return true;
        if (token_count > presence.floats) return false;
        const cache = presence.cache;
        const group_count = cache.groups.len;
        const last = (token_count - 1) / cache.block_size;
        for (cache.groups, 0..) |group, g| {
            const kept = cache.retention.kept(group.window_tokens, token_count);
            if (presence.since[last * group_count + g] > kept.first / cache.block_size) return false;
            const sink_entries = group.shape.blockCount(kept.sink_end);
            if (sink_entries > 0 and presence.since[(sink_entries - 1) * group_count + g] > 0) return false;
        }
        return true;
    }
};

fn heldBlock(cache: *const CacheState, found: *const Found, entry: u32, group: u32) ?Held {
    const index = cache.prefix.?;
    if (entry == found.nodes.items.len) return found.next.?.block(index, group, entry);
    const held = index.tree.blockOf(found.nodes.items[entry], group) orelse return null;
    return .{ .block = held.block, .format = held.format };
}

/// Gives an empty sequence the rows that were found.
pub fn adopt(sequence: *SequenceState, found: *const Found) error{OutOfMemory}!void {
    const cache = sequence.cache;
    const index = cache.prefix.?;
    const told = &sequence.tokens.?;
    assert(sequence.seq_len == 0);
    const token_count = found.token_count;
    if (token_count == 0) return;
    const entry_count = (token_count + cache.block_size - 1) / cache.block_size;
    for (sequence.tables) |*table| try table.ensureTotalCapacity(cache.gpa, entry_count);

    for (sequence.tables, cache.groups, 0..) |*table, *group, g| {
        const kept = cache.retention.kept(group.window_tokens, token_count);
        const sink_entries = group.shape.blockCount(kept.sink_end);
        // Blocks before those that are seen are taken along as far back as a rewind may want them.
        const wanted = cache.retention.oldest(group.window_tokens, token_count, cache.rewind_tokens) / cache.block_size;
        var from = kept.first / cache.block_size;
        while (from > @max(wanted, sink_entries) and heldBlock(cache, found, from - 1, @intCast(g)) != null) from -= 1;
        from = @max(from, sink_entries);
        table.sink_end = kept.sink_end;
        table.first = kept.first;
        if (from > sink_entries) {
            table.evicted_first = sink_entries;
            table.evicted_count = from - sink_entries;
            const oldest = cache.retention.oldest(group.window_tokens, token_count, cache.rewind_tokens);
            table.oldest = @max(oldest, from * cache.block_size);
        }
        for (0..entry_count) |i| {
            const entry: u32 = @intCast(i);
            if (entry >= sink_entries and entry < from) continue;
            const held = heldBlock(cache, found, entry, @intCast(g)).?;
            table.appendAssumeCapacity(held.block, held.format);
        }
        table.retain(group.formats.items);
    }
    sequence.seq_len = token_count;

    const depth = token_count / cache.block_size;
    const rest = token_count % cache.block_size;
    const node = if (depth == 0) told.root else found.nodes.items[depth - 1];
    told.last = index.tree.refOf(node);
    if (rest != 0) {
        const source = if (depth < found.nodes.items.len)
            index.tree.tokensOf(found.nodes.items[depth])
        else
            found.next.?.tokens(index);
        told.newest.appendSliceAssumeCapacity(source[0..rest]);
    }
    index.touch(node);
    if (rest != 0 and depth < found.nodes.items.len) index.touch(found.nodes.items[depth]);
}
