//! Bodies of the exports of a contiguous cache. Each one checks what a caller may have got wrong, takes the cache's lock
//! and calls `cache/contiguous.zig`.
//!
//! Buffers are borrowed for the call, unaligned, and come with their element count; a null buffer is right where the
//! count is 0.

const std = @import("std");
const contiguous = @import("../cache/contiguous.zig");
const ContiguousCache = contiguous.ContiguousCache;
const row_types = @import("../cache/rows.zig");
const attention = @import("../attention/attend.zig");
const cpu = @import("../device/cpu.zig");
const Dtype = @import("../dtype.zig").Dtype;
const Shape = @import("../shape.zig").Shape;
const handle = @import("handle.zig");
const record = @import("record.zig");
const status = @import("status.zig");

const gpa = std.heap.c_allocator;

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

    fn read(source: ?[*]const u8, record_bytes: u32) status.Error!contiguous.Options {
        const options = try record.read(ContiguousRecord, source, record_bytes);
        const max_bytes = options.max_bytes.value();
        return .{
            .layer_count = options.layer_count,
            .sequence_count = options.sequence_count,
            .kv_head_count = options.kv_head_count,
            .head_dim = options.head_dim,
            .max_seq_len = options.max_seq_len,
            .dtype_k = Dtype.fromWord(options.dtype_k) orelse return error.InvalidConfig,
            .dtype_v = Dtype.fromWord(options.dtype_v) orelse return error.InvalidConfig,
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

/// Both sides of a run, in place.
const ViewRecord = extern struct {
    size_bytes: u32 = 0,
    keys: record.Wide,
    values: record.Wide,
    start: u32,
    length: u32,
    dtype_k: u32,
    dtype_v: u32,
    /// In elements.
    token_stride: u32,
    head_stride: u32,
    /// 0: the float tail; a contiguous cache has no other tier.
    tier: u32 = 0,
    delta: i32 = 0,
    generation: u32,
};

/// The options of one `attend`.
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

    fn read(source: ?[*]const u8, record_bytes: u32) status.Error!attention.Options {
        const options = try record.read(AttendRecord, source, record_bytes);
        if (options.flags & ~@as(u32, known_flags) != 0) return error.Unsupported;
        return .{
            .query_count = options.query_count,
            .causal = options.flags & causal != 0,
            .softmax_scale = if (options.flags & softmax_scale_given != 0) options.softmax_scale else null,
            .window_tokens = if (options.flags & window_given != 0) options.window_tokens else null,
            .sink_tokens = options.sink_tokens,
            .softcap = if (options.flags & softcap_given != 0) options.softcap else null,
        };
    }
};

/// (ContiguousRecord, bytes, f64 out, count): the bytes of keys and values such a cache would have.
pub fn memoryBytes(options: ?[*]const u8, options_bytes: u32, out: ?[*]u8, out_count: u32) callconv(.c) i32 {
    return result(planMemory(options, options_bytes, out, out_count));
}

fn planMemory(source: ?[*]const u8, source_bytes: u32, out: ?[*]u8, out_count: u32) status.Error!void {
    const options = try ContiguousRecord.read(source, source_bytes);
    const shape = options.shape();
    try shape.validate();
    try record.writeF64(out, out_count, try shape.memoryBytes(options.dtype_k, options.dtype_v));
}

pub fn create(options: ?[*]const u8, options_bytes: u32) callconv(.c) i32 {
    const parsed = ContiguousRecord.read(options, options_bytes) catch |err| return status.fromError(err);
    checkTables(parsed.shape()) catch |err| return status.fromError(err);
    var cache = ContiguousCache.init(gpa, parsed) catch |err| return status.fromError(err);
    return handle.create(cache) catch |err| {
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
    return result(handle.free(word));
}

pub fn config(word: u32, out: ?[*]u8, out_bytes: u32) callconv(.c) i32 {
    const use = handle.begin(word) catch |err| return status.fromError(err);
    defer use.end();
    const shape = use.cache.shape;
    return result(record.write(ContiguousRecord, out, out_bytes, .{
        .layer_count = shape.layer_count,
        .sequence_count = shape.sequence_count,
        .kv_head_count = shape.kv_head_count,
        .head_dim = shape.head_dim,
        .max_seq_len = shape.max_seq_len,
        .dtype_k = @intFromEnum(use.cache.dtype_k),
        .dtype_v = @intFromEnum(use.cache.dtype_v),
        .max_bytes = .{},
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
    const use = handle.begin(word) catch |err| return status.fromError(err);
    defer use.end();
    const k_input, const v_input = inputs(k, k_count, v, v_count, dtype, 0) catch |err| return status.fromError(err);
    return result(use.cache.store(layer, sequence, k_input, v_input));
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
    const use = handle.begin(word) catch |err| return status.fromError(err);
    defer use.end();
    const k_input, const v_input = inputs(k, k_count, v, v_count, dtype, layout) catch |err| return status.fromError(err);
    const start = use.cache.append(layer, sequence, k_input, v_input) catch |err| return status.fromError(err);
    return status.count(start);
}

fn inputs(
    k: ?[*]const u8,
    k_count: u32,
    v: ?[*]const u8,
    v_count: u32,
    dtype_word: u32,
    layout_word: u32,
) error{ InvalidConfig, InvalidSize }!struct { row_types.Input, row_types.Input } {
    const dtype = Dtype.fromWord(dtype_word) orelse return error.InvalidConfig;
    const layout = std.enums.fromInt(row_types.Layout, layout_word) orelse return error.InvalidConfig;
    return .{
        .{ .bytes = try borrow(k, k_count), .element_count = k_count, .dtype = dtype, .layout = layout },
        .{ .bytes = try borrow(v, v_count), .element_count = v_count, .dtype = dtype, .layout = layout },
    };
}

/// A caller's buffer; null is right for no elements only.
fn borrow(source: ?[*]const u8, element_count: u32) error{InvalidSize}![*]const u8 {
    if (element_count == 0) return &.{};
    return source orelse error.InvalidSize;
}

fn borrowOut(destination: ?[*]u8, element_count: u32) error{InvalidSize}![*]u8 {
    if (element_count == 0) return &.{};
    return destination orelse error.InvalidSize;
}

pub fn advance(word: u32) callconv(.c) i32 {
    const use = handle.begin(word) catch |err| return status.fromError(err);
    defer use.end();
    return result(use.cache.advance());
}

pub fn reset(word: u32) callconv(.c) i32 {
    const use = handle.begin(word) catch |err| return status.fromError(err);
    defer use.end();
    use.cache.reset();
    return 0;
}

pub fn commit(word: u32, sequence: u32, token_count: u32) callconv(.c) i32 {
    const use = handle.begin(word) catch |err| return status.fromError(err);
    defer use.end();
    return result(use.cache.commit(sequence, token_count));
}

pub fn truncate(word: u32, sequence: u32, seq_len: u32) callconv(.c) i32 {
    const use = handle.begin(word) catch |err| return status.fromError(err);
    defer use.end();
    return result(use.cache.truncate(sequence, seq_len));
}

pub fn seqLen(word: u32, sequence: u32) callconv(.c) i32 {
    const use = handle.begin(word) catch |err| return status.fromError(err);
    defer use.end();
    return status.count(use.cache.seqLen(sequence) catch |err| return status.fromError(err));
}

pub fn rowCount(word: u32, layer: u32, sequence: u32) callconv(.c) i32 {
    const use = handle.begin(word) catch |err| return status.fromError(err);
    defer use.end();
    const rows = use.cache.rows(layer, sequence) catch |err| return status.fromError(err);
    return status.count(rows.row_count);
}

pub fn generation(word: u32, layer: u32, sequence: u32) callconv(.c) i32 {
    const use = handle.begin(word) catch |err| return status.fromError(err);
    defer use.end();
    return status.count(visibleGeneration(use.cache, layer, sequence) catch |err| return status.fromError(err));
}

/// The generation in 31 bits, so that it is a positive result.
fn visibleGeneration(cache: *const ContiguousCache, layer: u32, sequence: u32) ContiguousCache.IndexError!u32 {
    return try cache.generation(layer, sequence) & std.math.maxInt(i32);
}

pub fn cacheMemoryBytes(word: u32, out: ?[*]u8, out_count: u32) callconv(.c) i32 {
    const use = handle.begin(word) catch |err| return status.fromError(err);
    defer use.end();
    return result(record.writeF64(out, out_count, use.cache.memoryBytes()));
}

pub fn stats(word: u32, out: ?[*]u8, out_bytes: u32) callconv(.c) i32 {
    const use = handle.begin(word) catch |err| return status.fromError(err);
    defer use.end();
    const facts = use.cache.stats();
    return result(record.write(StatsRecord, out, out_bytes, .{
        .sequence_count = use.cache.shape.sequence_count,
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
    const use = handle.begin(word) catch |err| return status.fromError(err);
    defer use.end();
    const shape = use.cache.shape;
    if (layer >= shape.layer_count) return status.fromError(error.LayerOutOfRange);
    if (sequence >= shape.sequence_count) return status.fromError(error.SequenceOutOfRange);
    if (position >= shape.max_seq_len or kv_head >= shape.kv_head_count or dim >= shape.head_dim) {
        return status.fromError(error.PositionOutOfRange);
    }
    return result(record.writeF64(out, out_count, shape.offset(layer, sequence, position, kv_head, dim)));
}

pub fn keys(word: u32, layer: u32, sequence: u32, out: ?[*]u8, out_bytes: u32) callconv(.c) i32 {
    return sideRows(.keys, word, layer, sequence, out, out_bytes);
}

pub fn values(word: u32, layer: u32, sequence: u32, out: ?[*]u8, out_bytes: u32) callconv(.c) i32 {
    return sideRows(.values, word, layer, sequence, out, out_bytes);
}

fn sideRows(side: enum { keys, values }, word: u32, layer: u32, sequence: u32, out: ?[*]u8, out_bytes: u32) i32 {
    const use = handle.begin(word) catch |err| return status.fromError(err);
    defer use.end();
    const rows = use.cache.rows(layer, sequence) catch |err| return status.fromError(err);
    const dtype = if (side == .keys) rows.dtype_k else rows.dtype_v;
    record.write(RowsRecord, out, out_bytes, .{
        .address = .from(@intFromPtr(if (side == .keys) rows.place.contiguous.keys else rows.place.contiguous.values)),
        .capacity_bytes = .from(use.cache.shape.runBytes(dtype)),
        .row_count = rows.row_count,
        .dtype = @intFromEnum(dtype),
        .generation = visibleGeneration(use.cache, layer, sequence) catch unreachable, // rows() checked both
    }) catch |err| return status.fromError(err);
    return status.count(rows.row_count);
}

/// The views of a layer: one over all its rows, or none.
pub fn views(word: u32, layer: u32, sequence: u32, out: ?[*]u8, out_bytes: u32) callconv(.c) i32 {
    const use = handle.begin(word) catch |err| return status.fromError(err);
    defer use.end();
    const rows = use.cache.rows(layer, sequence) catch |err| return status.fromError(err);
    writeView(use.cache, rows, layer, sequence, rows.row_count, out, out_bytes) catch |err| return status.fromError(err);
    return @intFromBool(rows.row_count != 0);
}

/// The first `row_count` rows of a layer: a contiguous cache always has them in one piece.
pub fn contiguousKv(word: u32, layer: u32, sequence: u32, row_count: u32, out: ?[*]u8, out_bytes: u32) callconv(.c) i32 {
    const use = handle.begin(word) catch |err| return status.fromError(err);
    defer use.end();
    const rows = use.cache.rows(layer, sequence) catch |err| return status.fromError(err);
    if (row_count > rows.row_count) return status.fromError(error.PositionOutOfRange);
    writeView(use.cache, rows, layer, sequence, row_count, out, out_bytes) catch |err| return status.fromError(err);
    return status.count(row_count);
}

fn writeView(
    cache: *const ContiguousCache,
    rows: row_types.Rows,
    layer: u32,
    sequence: u32,
    row_count: u32,
    out: ?[*]u8,
    out_bytes: u32,
) status.Error!void {
    return record.write(ViewRecord, out, out_bytes, .{
        .keys = .from(@intFromPtr(rows.place.contiguous.keys)),
        .values = .from(@intFromPtr(rows.place.contiguous.values)),
        .start = 0,
        .length = row_count,
        .dtype_k = @intFromEnum(rows.dtype_k),
        .dtype_v = @intFromEnum(rows.dtype_v),
        .token_stride = cache.shape.kvDim(),
        .head_stride = rows.head_dim,
        .generation = try visibleGeneration(cache, layer, sequence),
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
    dtype_word: u32,
) callconv(.c) i32 {
    const use = handle.begin(word) catch |err| return status.fromError(err);
    defer use.end();
    return gatherRows(use.cache, layer, sequence, k, k_count, v, v_count, dtype_word) catch |err| status.fromError(err);
}

fn gatherRows(
    cache: *const ContiguousCache,
    layer: u32,
    sequence: u32,
    k: ?[*]u8,
    k_count: u32,
    v: ?[*]u8,
    v_count: u32,
    dtype_word: u32,
) status.Error!i32 {
    const dtype = Dtype.fromWord(dtype_word) orelse return error.InvalidConfig;
    return status.count(try cache.gather(
        layer,
        sequence,
        .{ .bytes = try borrowOut(k, k_count), .element_count = k_count, .dtype = dtype },
        .{ .bytes = try borrowOut(v, v_count), .element_count = v_count, .dtype = dtype },
    ));
}

/// 0 for the CPU: a contiguous cache has no other place.
pub fn layerDevice(word: u32, layer: u32) callconv(.c) i32 {
    const use = handle.begin(word) catch |err| return status.fromError(err);
    defer use.end();
    if (layer >= use.cache.shape.layer_count) return status.fromError(error.LayerOutOfRange);
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
    output: ?[*]u8,
    output_count: u32,
    lse: ?[*]u8,
    lse_count: u32,
) callconv(.c) i32 {
    const use = handle.begin(word) catch |err| return status.fromError(err);
    defer use.end();
    var parsed = AttendRecord.read(options, options_bytes) catch |err| return status.fromError(err);
    parsed.alibi_slopes = floats(alibi_slopes, alibi_slope_count) catch |err| return status.fromError(err);
    parsed.sink_logits = floats(sink_logits, sink_logit_count) catch |err| return status.fromError(err);
    return result(attention.attend(
        use.cache.rows(layer, sequence) catch |err| return status.fromError(err),
        floats(q, q_count) catch |err| return status.fromError(err),
        parsed,
        floatsOut(output, output_count) catch |err| return status.fromError(err),
        floatsOut(lse, lse_count) catch |err| return status.fromError(err),
    ));
}

fn floats(source: ?[*]const u8, element_count: u32) error{InvalidSize}![]align(1) const f32 {
    const elements: [*]align(1) const f32 = @ptrCast(try borrow(source, element_count));
    return elements[0..element_count];
}

fn floatsOut(destination: ?[*]u8, element_count: u32) error{InvalidSize}![]align(1) f32 {
    const elements: [*]align(1) f32 = @ptrCast(try borrowOut(destination, element_count));
    return elements[0..element_count];
}

/// The result word of a body that answers with a status alone.
fn result(outcome: status.Error!void) i32 {
    outcome catch |err| return status.fromError(err);
    return 0;
}
