//! Bodies of the exports of a contiguous cache. Each one checks what a caller may have got wrong, takes the cache's lock
//! and calls `cache/contiguous.zig`.
//!
//! Buffers are borrowed for the call, unaligned, and come with their element count; a null buffer is right where the
//! count is 0.

const std = @import("std");
const contiguous = @import("../cache/contiguous.zig");
const ContiguousCache = contiguous.ContiguousCache;
const Rows = @import("../cache/rows.zig").Rows;
const attend_options = @import("attend.zig");
const buffer = @import("buffer.zig");
const cpu = @import("../device/cpu.zig");
const Dtype = @import("../dtype.zig").Dtype;
const shapes = @import("../shape.zig");
const Shape = shapes.Shape;
const handle = @import("handle.zig");
const memory = @import("memory.zig");
const record = @import("record.zig");
const status = @import("status.zig");
const view = @import("view.zig");
const ViewRecord = view.ViewRecord;

const gpa = memory.gpa;

/// What a contiguous cache is made of.
const ContiguousRecord = extern struct {
    size_bytes: u32 = 0,
    layer_count: u32,
    sequence_count: u32,
    kv_head_count: u32,
    head_dim: u32,
    max_seq_len: u32,
    dtype_k: u32,
    dtype_v: u32,
    /// 0 for what the process may use.
    max_bytes: record.Wide,
    /// 0 where the length of the queries tells.
    q_head_count: u32 = 0,

    fn read(source: ?[*]const u8, record_bytes: u32) status.Error!contiguous.Options {
        const options = try record.read(ContiguousRecord, source, record_bytes);
        const max_bytes = options.max_bytes.value();
        return .{
            .layer_count = options.layer_count,
            .sequence_count = options.sequence_count,
            .kv_head_count = options.kv_head_count,
            .head_dim = options.head_dim,
            .q_head_count = if (options.q_head_count == 0) null else options.q_head_count,
            .max_seq_len = options.max_seq_len,
            .dtype_k = Dtype.floatFromWord(options.dtype_k) orelse return error.InvalidConfig,
            .dtype_v = Dtype.floatFromWord(options.dtype_v) orelse return error.InvalidConfig,
            .max_bytes = if (max_bytes == 0) cpu.memoryLimit() else max_bytes,
        };
    }
};

/// What a cache occupies.
const StatsRecord = extern struct {
    size_bytes: u32 = 0,
    sequence_count: u32,
    kv_bytes: record.Wide,
    reserved_bytes: record.Wide,
    metadata_bytes: record.Wide,
    padding_bytes: record.Wide,
    slab_count: u32,
    reserved: u32 = 0,
};

/// One side of a run, in place.
const RowsRecord = extern struct {
    size_bytes: u32 = 0,
    address: record.Wide,
    /// Bytes up to the end of the run, rows not yet written included.
    capacity_bytes: record.Wide,
    row_count: u32,
    dtype: u32,
    generation: u32,
};

/// (ContiguousRecord, bytes, f64 out, count): the bytes of keys and values such a cache would have.
pub fn memoryBytes(options: ?[*]const u8, options_bytes: u32, out: ?[*]u8, out_count: u32) callconv(.c) i32 {
    return status.word(planMemory(options, options_bytes, out, out_count));
}

fn planMemory(source: ?[*]const u8, source_bytes: u32, out: ?[*]u8, out_count: u32) status.Error!void {
    const options = try ContiguousRecord.read(source, source_bytes);
    const shape = options.shape();
    try shape.validate();
    try shapes.checkQueryHeads(options.q_head_count, options.kv_head_count);
    try record.writeF64(out, out_count, try shape.memoryBytes(options.dtype_k, options.dtype_v));
}

pub fn create(options: ?[*]const u8, options_bytes: u32) callconv(.c) i32 {
    const parsed = ContiguousRecord.read(options, options_bytes) catch |err| return status.fromError(err);
    checkTables(parsed.shape()) catch |err| return status.fromError(err);
    var cache = ContiguousCache.initSlabs(gpa, memory.slabs, parsed) catch |err| return status.fromError(err);
    return handle.create(.contiguous, .{ .contiguous = cache }, null) catch |err| {
        cache.deinit();
        return status.fromError(err);
    };
}

/// Rows take memory as they arrive, the tables beside them at once: up to 12 bytes for each layer of each sequence.
/// Where rows are small and layers many, those could be more than the machine has, and the system would end the process.
fn checkTables(shape: Shape) Shape.Error!void {
    try shape.validate();
    const table_bytes = shape.runCount() *| 12;
    if (table_bytes > 1 << 24 and table_bytes > cpu.memoryLimit() / 8) return error.OutOfMemory;
}

pub fn free(word: u32) callconv(.c) i32 {
    return status.word(handle.free(.contiguous, word));
}

pub fn config(word: u32, out: ?[*]u8, out_bytes: u32) callconv(.c) i32 {
    const use = handle.begin(.contiguous, word) catch |err| return status.fromError(err);
    defer use.end();
    const shape = use.target.shape;
    return status.word(record.write(ContiguousRecord, out, out_bytes, .{
        .layer_count = shape.layer_count,
        .sequence_count = shape.sequence_count,
        .kv_head_count = shape.kv_head_count,
        .head_dim = shape.head_dim,
        .max_seq_len = shape.max_seq_len,
        .dtype_k = @intFromEnum(use.target.dtype_k),
        .dtype_v = @intFromEnum(use.target.dtype_v),
        .max_bytes = .{},
        .q_head_count = use.target.q_head_count orelse 0,
    }));
}

pub fn store(
    word: u32,
    layer: u32,
    sequence: u32,
    k: ?[*]const u8,
    k_count: u32,
    v: ?[*]const u8,
    v_count: u32,
    dtype: u32,
) callconv(.c) i32 {
    const use = handle.begin(.contiguous, word) catch |err| return status.fromError(err);
    defer use.end();
    const k_input, const v_input = buffer.inputs(k, k_count, v, v_count, dtype, 0) catch |err| return status.fromError(err);
    return status.word(use.target.store(layer, sequence, k_input, v_input));
}

pub fn append(
    word: u32,
    layer: u32,
    sequence: u32,
    k: ?[*]const u8,
    k_count: u32,
    v: ?[*]const u8,
    v_count: u32,
    dtype: u32,
    layout: u32,
) callconv(.c) i32 {
    const use = handle.begin(.contiguous, word) catch |err| return status.fromError(err);
    defer use.end();
    const k_input, const v_input = buffer.inputs(k, k_count, v, v_count, dtype, layout) catch |err| return status.fromError(err);
    const start = use.target.append(layer, sequence, k_input, v_input) catch |err| return status.fromError(err);
    return status.count(start);
}

pub fn advance(word: u32) callconv(.c) i32 {
    const use = handle.begin(.contiguous, word) catch |err| return status.fromError(err);
    defer use.end();
    return status.word(use.target.advance());
}

pub fn reset(word: u32) callconv(.c) i32 {
    const use = handle.begin(.contiguous, word) catch |err| return status.fromError(err);
    defer use.end();
    use.target.reset();
    return 0;
}

pub fn commit(word: u32, sequence: u32, token_count: u32) callconv(.c) i32 {
    const use = handle.begin(.contiguous, word) catch |err| return status.fromError(err);
    defer use.end();
    return status.word(use.target.commit(sequence, token_count));
}

pub fn truncate(word: u32, sequence: u32, seq_len: u32) callconv(.c) i32 {
    const use = handle.begin(.contiguous, word) catch |err| return status.fromError(err);
    defer use.end();
    return status.word(use.target.truncate(sequence, seq_len));
}

pub fn seqLen(word: u32, sequence: u32) callconv(.c) i32 {
    const use = handle.begin(.contiguous, word) catch |err| return status.fromError(err);
    defer use.end();
    return status.count(use.target.seqLen(sequence) catch |err| return status.fromError(err));
}

pub fn rowCount(word: u32, layer: u32, sequence: u32) callconv(.c) i32 {
    const use = handle.begin(.contiguous, word) catch |err| return status.fromError(err);
    defer use.end();
    const rows = use.target.rows(layer, sequence) catch |err| return status.fromError(err);
    return status.count(rows.row_count);
}

pub fn generation(word: u32, layer: u32, sequence: u32) callconv(.c) i32 {
    const use = handle.begin(.contiguous, word) catch |err| return status.fromError(err);
    defer use.end();
    return status.count(view.generationWord(use.target.generation(layer, sequence) catch |err| return status.fromError(err)));
}

pub fn cacheMemoryBytes(word: u32, out: ?[*]u8, out_count: u32) callconv(.c) i32 {
    const use = handle.begin(.contiguous, word) catch |err| return status.fromError(err);
    defer use.end();
    return status.word(record.writeF64(out, out_count, use.target.memoryBytes()));
}

pub fn stats(word: u32, out: ?[*]u8, out_bytes: u32) callconv(.c) i32 {
    const use = handle.begin(.contiguous, word) catch |err| return status.fromError(err);
    defer use.end();
    const facts = use.target.stats();
    return status.word(record.write(StatsRecord, out, out_bytes, .{
        .sequence_count = use.target.shape.sequence_count,
        .kv_bytes = .from(facts.kv_bytes),
        .reserved_bytes = .from(facts.reserved_bytes),
        .metadata_bytes = .from(facts.metadata_bytes),
        .padding_bytes = .from(facts.reserved_bytes - facts.kv_bytes),
        .slab_count = facts.slab_count,
    }));
}

pub fn offset(
    word: u32,
    layer: u32,
    sequence: u32,
    position: u32,
    kv_head: u32,
    dim: u32,
    out: ?[*]u8,
    out_count: u32,
) callconv(.c) i32 {
    const use = handle.begin(.contiguous, word) catch |err| return status.fromError(err);
    defer use.end();
    const shape = use.target.shape;
    if (layer >= shape.layer_count) return status.fromError(error.LayerOutOfRange);
    if (sequence >= shape.sequence_count) return status.fromError(error.SequenceOutOfRange);
    if (position >= shape.max_seq_len or kv_head >= shape.kv_head_count or dim >= shape.head_dim) {
        return status.fromError(error.PositionOutOfRange);
    }
    return status.word(record.writeF64(out, out_count, shape.offset(layer, sequence, position, kv_head, dim)));
}

pub fn keys(word: u32, layer: u32, sequence: u32, out: ?[*]u8, out_bytes: u32) callconv(.c) i32 {
    return sideRows(.keys, word, layer, sequence, out, out_bytes);
}

pub fn values(word: u32, layer: u32, sequence: u32, out: ?[*]u8, out_bytes: u32) callconv(.c) i32 {
    return sideRows(.values, word, layer, sequence, out, out_bytes);
}

fn sideRows(side: enum { keys, values }, word: u32, layer: u32, sequence: u32, out: ?[*]u8, out_bytes: u32) i32 {
    const use = handle.begin(.contiguous, word) catch |err| return status.fromError(err);
    defer use.end();
    const rows = use.target.rows(layer, sequence) catch |err| return status.fromError(err);
    const dtype = if (side == .keys) use.target.dtype_k else use.target.dtype_v;
    record.write(RowsRecord, out, out_bytes, .{
        .address = .from(@intFromPtr(if (side == .keys) rows.memory.contiguous.keys else rows.memory.contiguous.values)),
        .capacity_bytes = .from(use.target.shape.runBytes(dtype)),
        .row_count = rows.row_count,
        .dtype = @intFromEnum(dtype),
        .generation = view.generationWord(use.target.generation(layer, sequence) catch unreachable), // rows() checked both
    }) catch |err| return status.fromError(err);
    return status.count(rows.row_count);
}

/// The views of a layer: one over all its rows, or none.
pub fn views(word: u32, layer: u32, sequence: u32, out: ?[*]u8, out_bytes: u32) callconv(.c) i32 {
    const use = handle.begin(.contiguous, word) catch |err| return status.fromError(err);
    defer use.end();
    const rows = use.target.rows(layer, sequence) catch |err| return status.fromError(err);
    writeView(use.target, rows, layer, sequence, rows.row_count, out, out_bytes) catch |err| return status.fromError(err);
    return @intFromBool(rows.row_count != 0);
}

/// The first `row_count` rows of a layer: a contiguous cache always has them in one piece.
pub fn contiguousKv(word: u32, layer: u32, sequence: u32, row_count: u32, out: ?[*]u8, out_bytes: u32) callconv(.c) i32 {
    const use = handle.begin(.contiguous, word) catch |err| return status.fromError(err);
    defer use.end();
    const rows = use.target.rows(layer, sequence) catch |err| return status.fromError(err);
    if (row_count > rows.row_count) return status.fromError(error.PositionOutOfRange);
    writeView(use.target, rows, layer, sequence, row_count, out, out_bytes) catch |err| return status.fromError(err);
    return status.count(row_count);
}

fn writeView(
    cache: *const ContiguousCache,
    rows: Rows,
    layer: u32,
    sequence: u32,
    row_count: u32,
    out: ?[*]u8,
    out_bytes: u32,
) status.Error!void {
    return record.write(ViewRecord, out, out_bytes, .{
        .keys = .from(@intFromPtr(rows.memory.contiguous.keys)),
        .values = .from(@intFromPtr(rows.memory.contiguous.values)),
        .start = 0,
        .length = row_count,
        .dtype_k = @intFromEnum(cache.dtype_k),
        .dtype_v = @intFromEnum(cache.dtype_v),
        .token_stride = cache.shape.kvDim(),
        .head_stride = rows.head_dim,
        .generation = view.generationWord(try cache.generation(layer, sequence)),
    });
}

pub fn gather(
    word: u32,
    layer: u32,
    sequence: u32,
    k: ?[*]u8,
    k_count: u32,
    v: ?[*]u8,
    v_count: u32,
    dtype: u32,
) callconv(.c) i32 {
    const use = handle.begin(.contiguous, word) catch |err| return status.fromError(err);
    defer use.end();
    const k_out, const v_out = buffer.outputs(k, k_count, v, v_count, dtype) catch |err| return status.fromError(err);
    const row_count = use.target.gather(layer, sequence, k_out, v_out) catch |err| return status.fromError(err);
    return status.count(row_count);
}

/// 0 for the CPU: a contiguous cache has no other place.
pub fn layerDevice(word: u32, layer: u32) callconv(.c) i32 {
    const use = handle.begin(.contiguous, word) catch |err| return status.fromError(err);
    defer use.end();
    if (layer >= use.target.shape.layer_count) return status.fromError(error.LayerOutOfRange);
    return 0;
}

pub fn attend(
    word: u32,
    layer: u32,
    sequence: u32,
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
) callconv(.c) i32 {
    const use = handle.begin(.contiguous, word) catch |err| return status.fromError(err);
    defer use.end();
    attend_options.run(
        use.target.rows(layer, sequence) catch |err| return status.fromError(err),
        q,
        q_count,
        options,
        options_bytes,
        alibi_slopes,
        alibi_slope_count,
        sink_logits,
        sink_logit_count,
        tree_parents,
        tree_parent_count,
        output,
        output_count,
        lse,
        lse_count,
    ) catch |err| return status.fromError(err);
    return 0;
}
