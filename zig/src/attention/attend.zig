//! Attention: query steps over the rows of caches, by one thread or several.
//!
//! A step is cut into parts (`part.zig`), and where several threads share the work a long part into its chunks. What is cut
//! where, and who does what, shows in no bit of a result.
//!
//! Native threads touch native memory only: the caller copies the queries in before they start, and writes the outputs when
//! they are done. Alone, it needs no memory but its stack.

const std = @import("std");
const Allocator = std.mem.Allocator;
const dispatch = @import("../kernels/dispatch.zig");
const parts = @import("part.zig");
const Part = parts.Part;
const query_steps = @import("query.zig");
const Rows = @import("../cache/rows.zig").Rows;
const Sequence = @import("../cache/sequence.zig").Sequence;
const Visible = @import("visible.zig").Visible;
const workers = @import("../device/workers.zig");

pub const Error = query_steps.Error;
pub const Options = query_steps.Options;
pub const Query = query_steps.Query;
pub const tree_node_count_max = query_steps.tree_node_count_max;

/// Attention of `q` over the rows of one layer of one sequence, `cache.rows(layer, ...)`. `output` takes q.len elements;
/// `lse` takes one for each query and head, or is empty. Nothing is written unless all is well.
pub fn attend(
    rows: Rows,
    q: []align(1) const f32,
    options: Options,
    output: []align(1) f32,
    lse: []align(1) f32,
) Error!void {
    attendAll(&.{try .init(rows, q, options, output, lse)});
}

/// Attention for several sequences in one layer: query_counts[i] queries of sequences[i], whose rows stand one after the
/// other in `q`, the outputs, `lse` and the parents of trees, each parent an index among the queries of its sequence. Every
/// other option is that of each sequence; `options.query_count` must be 1, as the counts say it. Each query sees the rows of
/// its own sequence, with the bits it would get alone. Nothing is written unless all is well.
pub fn attendSequences(
    gpa: Allocator,
    sequences: []const Sequence,
    layer_index: u32,
    query_counts: []const u32,
    q: []align(1) const f32,
    options: Options,
    output: []align(1) f32,
    lse: []align(1) f32,
) (Error || error{ LayerOutOfRange, SequenceOutOfRange, OutOfMemory })!void {
    if (options.query_count != 1) return error.InvalidConfig;
    if (sequences.len != query_counts.len) return error.InvalidSize;
    if (sequences.len == 0) return if (q.len == 0) {} else error.InvalidSize;
    var own = options;
    // One sequence takes the way that needs no memory.
    if (sequences.len == 1) {
        if (query_counts[0] == 0) return error.InvalidSize;
        own.query_count = query_counts[0];
        return attend(try sequences[0].rows(layer_index), q, own, output, lse);
    }
    var query_count: u64 = 0;
    for (query_counts) |count| query_count += count;
    if (options.tree_parents.len != 0 and options.tree_parents.len != query_count) return error.InvalidSize;
    const head_dim = (try sequences[0].rows(layer_index)).head_dim;
    const query_elements = query_count * head_dim;
    if (query_count == 0 or q.len % query_elements != 0) return error.InvalidSize;
    const q_head_count: usize = @intCast(q.len / query_elements);
    if (output.len < q.len) return error.InvalidSize;
    if (lse.len != 0 and lse.len < query_count * q_head_count) return error.InvalidSize;

    // All steps are checked before the first is computed.
    const queries = try gpa.alloc(Query, sequences.len);
    defer gpa.free(queries);
    var made: usize = 0;
    var first: usize = 0;
    for (sequences, query_counts) |sequence, count| {
        if (count == 0) continue;
        const rows = try sequence.rows(layer_index);
        try Query.checkMemory(&rows, q, options, output, lse);
        own.query_count = count;
        if (options.tree_parents.len != 0) own.tree_parents = options.tree_parents[first..][0..count];
        const row_count = @as(usize, count) * q_head_count;
        const at = first * q_head_count;
        queries[made] = try .init(
            rows,
            q[at * head_dim ..][0 .. row_count * head_dim],
            own,
            output[at * head_dim ..][0 .. row_count * head_dim],
            if (lse.len == 0) lse else lse[at..][0..row_count],
        );
        made += 1;
        first += count;
    }
    attendAll(queries[0..made]);
}

/// Computes and writes the outputs of some steps.
pub fn attendAll(queries: []const Query) void {
    // Before anything is written: an output may take the place of its queries.
    for (queries) |*query| query.observe();
    if (workers.threadCount() > 1 and isWorthSharing(queries)) {
        if (workers.begin()) |session| {
            defer session.end();
            return attendShared(session, queries);
        }
    }
    var each: PartIterator = .init(queries, parts.head_count_max);
    while (each.next()) |part| attendPart(part);
}

/// Elements of keys below which waking a thread takes longer than what it could do: 10 us at 40 GB/s and 2 bytes each are
/// 200 000.
const shared_elements_min = 200_000;

fn isWorthSharing(queries: []const Query) bool {
    var elements: u64 = 0;
    for (queries) |query| {
        elements += @as(u64, query.rows.row_count) * query.rows.kv_head_count * query.rows.head_dim *
            (std.math.divCeil(u32, query.rowCount(), dispatch.query_row_count_max) catch unreachable);
    }
    return elements >= shared_elements_min;
}

/// The parts of some steps, one after the other.
const PartIterator = struct {
    queries: []const Query,
    head_limit: u32,
    index: usize = 0,
    row_first: u32 = 0,
    head_first: u32 = 0,

    fn init(queries: []const Query, head_limit: u32) PartIterator {
        return .{ .queries = queries, .head_limit = head_limit };
    }

    fn next(each: *PartIterator) ?Part {
        if (each.index == each.queries.len) return null;
        const query = &each.queries[each.index];
        const head_dim_padded = std.mem.alignForward(u32, query.rows.head_dim, dispatch.lanes_max);
        const row_count = @min(query.rowCount() - each.row_first, dispatch.query_row_count_max);
        const fitting = @min(parts.elements_max / (row_count * head_dim_padded), each.head_limit);
        const part: Part = .{
            .query = query,
            .head_first = each.head_first,
            .head_count = @min(query.rows.kv_head_count - each.head_first, fitting),
            .row_first = each.row_first,
            .row_count = row_count,
            .head_dim_padded = head_dim_padded,
        };
        each.head_first += part.head_count;
        if (each.head_first == query.rows.kv_head_count) {
            each.head_first = 0;
            each.row_first +|= dispatch.query_row_count_max;
            if (each.row_first >= query.rowCount()) {
                each.row_first = 0;
                each.index += 1;
            }
        }
        return part;
    }
};

/// What a thread needs for a part that it does whole.
const Scratch = struct {
    queries: [parts.elements_max]f32 align(64),
    sums: [2][parts.elements_max]f32 align(64),
    rows: [2][parts.head_count_max * dispatch.query_row_count_max]dispatch.QueryRow,
    fresh: [parts.head_count_max * dispatch.query_row_count_max]dispatch.QueryRow,

    fn state(scratch: *Scratch, which: u1, part: Part) Part.State {
        return .{ .sums = scratch.sums[which][0..part.elements()], .rows = scratch.rows[which][0..part.rows()] };
    }
};

/// A part, and all that may be read of it while it is at work.
const Work = struct {
    part: Part,
    see: Visible,
    /// [head][row][head_dim_padded]
    queries: []f32,
    /// [head][row]
    fresh: []dispatch.QueryRow,

    fn init(of: Part, queries: []f32, fresh: []dispatch.QueryRow) Work {
        var part = of;
        part.scaleQueries(queries);
        part.beginRows(fresh);
        return .{ .part = part, .see = part.visible(), .queries = queries, .fresh = fresh };
    }

    fn attendChunk(work: Work, state: Part.State, chunk: u32, ahead: bool) void {
        state.clear(work.fresh);
        work.part.attendChunk(work.see, work.queries, state, chunk, ahead);
    }

    /// All chunks, in order.
    fn attendAll(work: Work, total: Part.State, other: Part.State) void {
        const first = work.see.chunkFrom(0) orelse return total.clear(work.fresh);
        var chunk = work.see.chunkAfter(first);
        work.attendChunk(total, first, chunk != null);
        while (chunk) |now| {
            chunk = work.see.chunkAfter(now);
            work.attendChunk(other, now, chunk != null);
            total.merge(work.part, other);
        }
    }
};

fn attendPart(part: Part) void {
    // Safe builds fill undefined memory with 0xaa, which takes longer than a short attention itself.
    @setRuntimeSafety(false);
    var scratch: Scratch = undefined;
    attendPartIn(part, &scratch);
}

fn attendPartIn(part: Part, scratch: *Scratch) void {
    const work: Work = .init(part, scratch.queries[0..part.elements()], scratch.fresh[0..part.rows()]);
    const total = scratch.state(0, part);
    work.attendAll(total, scratch.state(1, part));
    work.part.finish(total);
}

/// What one thread does in one go.
const Item = struct {
    part: u32,
    /// Null for all of the part's.
    chunk: ?u32,
    /// Where the state goes.
    state: Part.State,
};

/// A part in a wave, and its states in the order of positions.
const WavePart = struct {
    work: Work,
    item_first: u32,
    item_count: u32,
};

const wave_part_max = 512;
const wave_item_max = 4096;
const wave_bytes_min = 4 << 20;

/// Items that are done together, before the caller writes their outputs.
const Wave = struct {
    parts: [wave_part_max]WavePart,
    items: [wave_item_max]Item,
    part_count: u32,
    item_count: u32,

    fn reset(wave: *Wave) void {
        wave.part_count = 0;
        wave.item_count = 0;
    }

    /// Takes a part in, whole or by its chunks; false when there is no room for it.
    fn add(wave: *Wave, memory: *std.heap.FixedBufferAllocator, part: Part, by_chunks: bool) bool {
        const item_count: u32 = if (by_chunks) chunkCount(part) else 1;
        if (wave.part_count == wave_part_max or item_count > wave_item_max - wave.item_count) return false;
        const rollback = memory.end_index;
        wave.place(memory.allocator(), part, by_chunks, item_count) catch {
            memory.end_index = rollback;
            return false;
        };
        return true;
    }

    fn place(wave: *Wave, allocator: std.mem.Allocator, part: Part, by_chunks: bool, item_count: u32) error{OutOfMemory}!void {
        const work: Work = .init(
            part,
            try allocator.alignedAlloc(f32, .@"64", part.elements()),
            try allocator.alloc(dispatch.QueryRow, part.rows()),
        );
        var chunk: ?u32 = if (by_chunks) work.see.chunkFrom(0) else null;
        for (wave.items[wave.item_count..][0..item_count]) |*item| {
            item.* = .{
                .part = wave.part_count,
                .chunk = chunk,
                .state = .{
                    .sums = try allocator.alignedAlloc(f32, .@"64", part.elements()),
                    .rows = try allocator.alloc(dispatch.QueryRow, part.rows()),
                },
            };
            if (chunk) |now| chunk = work.see.chunkAfter(now);
        }
        wave.parts[wave.part_count] = .{ .work = work, .item_first = wave.item_count, .item_count = item_count };
        wave.part_count += 1;
        wave.item_count += item_count;
    }

    fn attendItem(wave: *const Wave, index: u32) void {
        const item = wave.items[index];
        const work = wave.parts[item.part].work;
        if (item.chunk) |chunk| work.attendChunk(item.state, chunk, false) else attendWhole(work, item.state);
    }

    fn attendWhole(work: Work, total: Part.State) void {
        @setRuntimeSafety(false);
        var scratch: Scratch = undefined;
        work.attendAll(total, scratch.state(1, work.part));
    }

    fn finish(wave: *const Wave) void {
        for (wave.parts[0..wave.part_count]) |of| {
            const items = wave.items[of.item_first..][0..of.item_count];
            for (items[1..]) |item| items[0].state.merge(of.work.part, item.state);
            of.work.part.finish(items[0].state);
        }
    }
};

fn attendShared(session: workers.Session, queries: []const Query) void {
    const plan: Plan = .of(queries);
    var needed: usize = wave_bytes_min;
    var each: PartIterator = .init(queries, plan.head_limit);
    var waiting = each.next();
    while (waiting != null) {
        const bytes = session.scratch(@sizeOf(Wave) + needed) orelse {
            // No memory: the caller does the rest alone.
            while (waiting) |part| : (waiting = each.next()) attendPart(part);
            return;
        };
        // Not by `create`, which in safe builds writes a pattern over it.
        const wave: *Wave = @ptrCast(@alignCast(bytes.ptr));
        var memory: std.heap.FixedBufferAllocator = .init(bytes[@sizeOf(Wave)..]);
        wave.reset();
        while (waiting) |part| : (waiting = each.next()) {
            if (!wave.add(&memory, part, plan.splits(part))) break;
        }
        if (wave.part_count == 0) {
            // A part larger than all there is.
            needed *= 2;
            if (chunkCount(waiting.?) <= wave_item_max and needed <= 1 << 30) continue;
            attendPart(waiting.?);
            waiting = each.next();
            continue;
        }
        session.run(Wave, wave, wave.item_count, Wave.attendItem);
        wave.finish();
    }
}

/// How the work is cut: into pieces that are no more than an eighth of a thread's share, where that can be.
const Plan = struct {
    head_limit: u32,
    /// Cost of the largest part that is done in one go.
    cost_max: u64,

    const pieces_a_thread = 8;

    fn of(queries: []const Query) Plan {
        const thread_count = workers.threadCount();
        var total: u64 = 0;
        var pieces: u64 = 0;
        var each: PartIterator = .init(queries, parts.head_count_max);
        while (each.next()) |part| {
            const chunks = chunkCount(part);
            total += cost(part, chunks);
            pieces += chunks;
        }
        // Short sequences, and few of them: their heads are shared out, too.
        var head_limit: u32 = parts.head_count_max;
        while (head_limit > 1 and pieces * (parts.head_count_max / head_limit) < 2 * thread_count) head_limit /= 2;
        const heads = @min(queries[0].rows.kv_head_count, parts.head_count_max);
        if (head_limit < parts.head_count_max) head_limit = @max(1, heads * head_limit / parts.head_count_max);
        return .{ .head_limit = head_limit, .cost_max = total / (thread_count * pieces_a_thread) };
    }

    fn splits(plan: Plan, part: Part) bool {
        const chunks = chunkCount(part);
        return chunks > 1 and cost(part, chunks) > plan.cost_max;
    }

    /// Proportional to time, about.
    fn cost(part: Part, chunks: u32) u64 {
        return @as(u64, chunks) * part.head_count * part.row_count;
    }
};

/// Chunks in which a part sees something; at least 1.
fn chunkCount(part: Part) u32 {
    const see = part.visible();
    var count: u32 = 0;
    var chunk = see.chunkFrom(0);
    while (chunk) |now| : (chunk = see.chunkAfter(now)) count += 1;
    return @max(count, 1);
}

test {
    _ = @import("sequences_test.zig");
    _ = @import("attend_test.zig");
    _ = @import("exact.zig");
    _ = @import("range_test.zig");
    _ = @import("guard_test.zig");
}
