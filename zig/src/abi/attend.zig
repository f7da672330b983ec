//! The body of the export of attend: any number of sequences of one cache, of either layout, in one call.

const std = @import("std");
const attention = @import("../attention/attend.zig");
const buffer = @import("buffer.zig");
const handle = @import("handle.zig");
const memory = @import("memory.zig");
const record = @import("record.zig");
const Sequence = @import("../cache/sequence.zig").Sequence;
const status = @import("status.zig");

/// How every sequence of a call attends.
pub const AttendRecord = extern struct {
    size_bytes: u32 = 0,
    flags: u32,
    softmax_scale: f32,
    window_tokens: u32,
    sink_tokens: u32,
    softcap: f32,
};

/// Flags of an `AttendRecord`: which of its fields count.
pub const Flag = enum(u32) {
    causal = 1,
    softmax_scale = 2,
    softcap = 4,
    window = 8,

    const known = known: {
        var bits: u32 = 0;
        for (std.enums.values(Flag)) |flag| bits |= @intFromEnum(flag);
        break :known bits;
    };

    fn isIn(flag: Flag, bits: u32) bool {
        return bits & @intFromEnum(flag) != 0;
    }
};

/// More sequences than this take part in no call.
pub const sequence_count_max = 1 << 16;

/// `sequences` are the handles of sequences of a paged cache, or the indices of those of a contiguous one. The queries of
/// the sequences stand one after the other, [query][q_head][head_dim], and so do outputs, `lse` and the parents of trees.
pub fn attend(
    cache: u32,
    layer: u32,
    sequences: ?[*]const u8,
    query_counts: ?[*]const u8,
    sequence_count: u32,
    options: ?[*]const u8,
    options_bytes: u32,
    q: ?[*]const u8,
    q_count: u32,
    alibi_slopes: ?[*]const u8,
    alibi_slope_count: u32,
    sink_logits: ?[*]const u8,
    sink_logit_count: u32,
    tree_parents: ?[*]const u8,
    tree_parent_count: u32,
    output: ?[*]u8,
    output_count: u32,
    lse: ?[*]u8,
    lse_count: u32,
) callconv(.c) i32 {
    const use = handle.beginCache(cache) catch |err| return status.fromError(err);
    defer use.end();
    return status.word(run(use, layer, .{
        .options = .{ options, options_bytes },
        .sequences = .{ sequences, sequence_count },
        .query_counts = .{ query_counts, sequence_count },
        .q = .{ q, q_count },
        .alibi_slopes = .{ alibi_slopes, alibi_slope_count },
        .sink_logits = .{ sink_logits, sink_logit_count },
        .tree_parents = .{ tree_parents, tree_parent_count },
        .output = .{ output, output_count },
        .lse = .{ lse, lse_count },
    }));
}

const In = struct { ?[*]const u8, u32 };
const Out = struct { ?[*]u8, u32 };

/// The buffers of a call, each with its element count.
const Buffers = struct {
    options: In,
    sequences: In,
    query_counts: In,
    q: In,
    alibi_slopes: In,
    sink_logits: In,
    tree_parents: In,
    output: Out,
    lse: Out,
};

fn run(use: handle.Locked(handle.Cache), layer: u32, buffers: Buffers) status.Error!void {
    const given = try record.read(AttendRecord, buffers.options[0], buffers.options[1]);
    if (given.flags & ~Flag.known != 0) return error.Unsupported;
    const options: attention.Options = .{
        .causal = Flag.causal.isIn(given.flags),
        .softmax_scale = if (Flag.softmax_scale.isIn(given.flags)) given.softmax_scale else null,
        .window_tokens = if (Flag.window.isIn(given.flags)) given.window_tokens else null,
        .sink_tokens = given.sink_tokens,
        .softcap = if (Flag.softcap.isIn(given.flags)) given.softcap else null,
        .alibi_slopes = try buffer.words(f32, buffers.alibi_slopes[0], buffers.alibi_slopes[1]),
        .sink_logits = try buffer.words(f32, buffers.sink_logits[0], buffers.sink_logits[1]),
        .tree_parents = try buffer.words(i32, buffers.tree_parents[0], buffers.tree_parents[1]),
    };
    const q = try buffer.words(f32, buffers.q[0], buffers.q[1]);
    const output = try buffer.floatsOut(buffers.output[0], buffers.output[1]);
    const lse = try buffer.floatsOut(buffers.lse[0], buffers.lse[1]);
    try use.target.checkLayer(layer);
    // Most calls are for a few sequences and need no memory.
    var few = std.heap.stackFallback(2048, memory.gpa);
    const gpa = few.get();
    const words = try buffer.words(u32, buffers.sequences[0], buffers.sequences[1]);
    if (words.len > sequence_count_max) return error.InvalidConfig;
    const sequences = try gpa.alloc(Sequence, words.len);
    defer gpa.free(sequences);
    for (sequences, words) |*sequence, word| sequence.* = try handle.sequenceIn(use, word);
    const counts = try buffer.copyWords(u32, gpa, buffers.query_counts[0], buffers.query_counts[1]);
    defer gpa.free(counts);
    try attention.attendSequences(memory.gpa, sequences, layer, counts, q, options, output, lse);
}
