//! The options of an `attend` as they cross the ABI, the same for every kind of cache.

const attention = @import("../attention/attend.zig");
const buffer = @import("buffer.zig");
const record = @import("record.zig");
const Rows = @import("../cache/rows.zig").Rows;
const status = @import("status.zig");

const AttendRecord = extern struct {
    size_bytes: u32 = 0,
    query_count: u32,
    flags: u32,
    softmax_scale: f32,
    window_tokens: u32,
    sink_tokens: u32,
    softcap: f32,

    const causal = 1;
    const softmax_scale_given = 2;
    const softcap_given = 4;
    const window_given = 8;
    const known_flags = causal | softmax_scale_given | softcap_given | window_given;
};

/// The record and the three optional buffers: slopes and logits are [q_head], parents [query].
pub fn read(
    source: ?[*]const u8,
    source_bytes: u32,
    alibi_slopes: ?[*]const u8,
    alibi_slope_count: u32,
    sink_logits: ?[*]const u8,
    sink_logit_count: u32,
    tree_parents: ?[*]const u8,
    tree_parent_count: u32,
) status.Error!attention.Options {
    const options = try record.read(AttendRecord, source, source_bytes);
    const flags = options.flags;
    if (flags & ~@as(u32, AttendRecord.known_flags) != 0) return error.Unsupported;
    return .{
        .query_count = options.query_count,
        .causal = flags & AttendRecord.causal != 0,
        .softmax_scale = if (flags & AttendRecord.softmax_scale_given != 0) options.softmax_scale else null,
        .window_tokens = if (flags & AttendRecord.window_given != 0) options.window_tokens else null,
        .sink_tokens = options.sink_tokens,
        .softcap = if (flags & AttendRecord.softcap_given != 0) options.softcap else null,
        .alibi_slopes = try buffer.words(f32, alibi_slopes, alibi_slope_count),
        .sink_logits = try buffer.words(f32, sink_logits, sink_logit_count),
        .tree_parents = try buffer.words(i32, tree_parents, tree_parent_count),
    };
}

/// The rest of every `attend` of one sequence, once its rows are found.
pub fn run(
    rows: Rows,
    q: ?[*]const u8,
    q_count: u32,
    options: ?[*]const u8,
    options_bytes: u32,
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
) status.Error!void {
    var parsed = try read(
        options,
        options_bytes,
        alibi_slopes,
        alibi_slope_count,
        sink_logits,
        sink_logit_count,
        tree_parents,
        tree_parent_count,
    );
    const queries = try buffer.words(f32, q, q_count);
    const output_rows = try buffer.floatsOut(output, output_count);
    const lse_rows = try buffer.floatsOut(lse, lse_count);
    // While the parents are still the caller's.
    try attention.Query.checkMemory(&rows, queries, parsed, output_rows, lse_rows);
    // Parents are checked and then followed: another thread may write a caller's shared memory in between.
    var parents: [attention.tree_node_count_max]i32 = undefined;
    if (parsed.tree_parents.len > parents.len) return error.InvalidSize;
    for (parents[0..parsed.tree_parents.len], parsed.tree_parents) |*to, from| to.* = from;
    parsed.tree_parents = parents[0..parsed.tree_parents.len];
    const query: attention.Query = try .init(
        rows,
        queries,
        parsed,
        output_rows,
        lse_rows,
    );
    attention.run(&.{query});
}
