//! The contiguous cache: every sequence owns max_seq_len positions in each layer, from creation to the end.
//!
//!     keys, values: [layer][sequence][position][kv_head][head_dim]
//!
//!                    sequence 0            sequence 1
//!     layer 0   | rows . . pending _ _ | rows . pending _ _ _ |      a span: max_seq_len positions
//!     layer 1   | rows . . _ _ _ _ _ _ | rows . _ _ _ _ _ _ _ |
//!
//! Writing has two phases. Rows are appended to each layer and are *pending* there: reads of that layer see them, reads
//! of the next layer do not see stale ones. A commit makes them count once every layer has them.
//!
//! The spans lie in slabs of at most 1 GiB (or one span, where that is longer), each span whole in one of them, straight
//! from the operating system: reserved at creation, zero, and backed by memory only as rows arrive.
//!
//! Not thread safe; a caller that shares a cache holds a lock. Nothing is ever overwritten but rows dropped by
//! `truncate` or `reset`, and every refusal leaves the cache as it was.

const std = @import("std");
const assert = std.debug.assert;
const Allocator = std.mem.Allocator;
const cpu = @import("../device/cpu.zig");
const Dtype = @import("../dtype.zig").Dtype;
const shapes = @import("../shape.zig");
const Shape = shapes.Shape;
const dispatch = @import("../kernels/dispatch.zig");
const slab_memory = @import("../device/slab.zig");
const gathers = @import("gather.zig");
const input_types = @import("input.zig");
const checkKept = input_types.checkKept;
const Input = input_types.Input;
const Inputs = input_types.Inputs;
const Output = input_types.Output;
const Range = gathers.Range;
const Rows = @import("rows.zig").Rows;
const Slab = slab_memory.Slab;
const Spans = @import("spans.zig").Spans;

/// The size of a contiguous cache, and the formats of its rows: floats.
pub const Options = struct {
    layer_count: u32,
    sequence_count: u32 = 1,
    kv_head_count: u32,
    head_dim: u32,
    /// Query heads of each query, a multiple of `kv_head_count`: queries that do not have as many are refused. Null where
    /// the length of the queries tells.
    q_head_count: ?u32 = null,
    max_seq_len: u32,
    dtype_k: Dtype = .f32,
    dtype_v: Dtype = .f32,
    /// Refuse a cache whose slabs would take more; null for what the process may use.
    max_bytes: ?u64 = null,

    pub fn shape(options: Options) Shape {
        return .{
            .layer_count = options.layer_count,
            .sequence_count = options.sequence_count,
            .kv_head_count = options.kv_head_count,
            .head_dim = options.head_dim,
            .max_seq_len = options.max_seq_len,
        };
    }

    /// Bytes of keys and values that a cache of these options has; nothing is allocated.
    pub fn memoryBytes(options: Options) Shape.Error!u64 {
        try options.validate();
        return options.shape().memoryBytes(options.dtype_k, options.dtype_v);
    }

    fn validate(options: Options) Shape.Error!void {
        try options.shape().validate();
        try shapes.checkQueryHeads(options.q_head_count, options.kv_head_count);
        if (!options.dtype_k.isFloat() or !options.dtype_v.isFloat()) return error.InvalidConfig;
    }
};

/// Rows take memory as they arrive, the tables beside them at once: up to 12 bytes for each layer of each sequence. Where
/// rows are small and layers many, those could be more than the machine has, and the system would end the process.
fn checkTables(shape: Shape) error{OutOfMemory}!void {
    const table_bytes = shape.spanCount() *| 12;
    if (table_bytes > 1 << 24 and table_bytes > cpu.memoryLimit() / 8) return error.OutOfMemory;
}

/// Rows of several sequences, for each of which `max_seq_len` positions are set aside in every layer.
pub const ContiguousCache = struct {
    gpa: Allocator,
    slab_allocator: Allocator,
    shape: Shape,
    q_head_count: ?u32,
    dtype_k: Dtype,
    dtype_v: Dtype,
    keys: Spans,
    values: Spans,
    /// Committed rows, [sequence].
    seq_lens: []u32,
    /// Appended and not committed rows, [layer][sequence].
    pending: []u32,
    /// Counts what makes a view of a (layer, sequence) stale, [layer][sequence]; wraps.
    generations: []u32,

    pub const InitError = error{ InvalidConfig, OutOfMemory, Unsupported };
    pub const IndexError = error{ LayerOutOfRange, SequenceOutOfRange };
    pub const StoreError = AppendError || error{CommitMismatch};
    pub const AppendError = IndexError || error{ CacheFull, InvalidConfig, InvalidSize, NotFinite, OutOfMemory };
    pub const AdvanceError = error{ CacheFull, CommitMismatch };
    pub const CommitError = error{ SequenceOutOfRange, CommitMismatch };
    pub const CommitKeptError = CommitError || error{InvalidSize};
    pub const TruncateError = error{ SequenceOutOfRange, PositionOutOfRange };
    pub const OffsetError = IndexError || error{PositionOutOfRange};
    pub const GatherError = IndexError || gathers.Error;

    /// Small tables come from `gpa`, the slabs from the operating system.
    pub fn init(gpa: Allocator, options: Options) InitError!ContiguousCache {
        return initSlabs(gpa, slab_memory.system, options);
    }

    /// As `init`, with an allocator for the slabs. Its memory must be zero and is not touched before rows arrive.
    pub fn initSlabs(gpa: Allocator, slab_allocator: Allocator, options: Options) InitError!ContiguousCache {
        try dispatch.checkCpu();
        const kv_bytes = try options.memoryBytes();
        if (kv_bytes > options.max_bytes orelse cpu.memoryLimit()) return error.OutOfMemory;
        const shape = options.shape();
        try checkTables(shape);
        const span_count = std.math.cast(usize, shape.spanCount()) orelse return error.OutOfMemory;

        const seq_lens = try gpa.alloc(u32, shape.sequence_count);
        errdefer gpa.free(seq_lens);
        const pending = try gpa.alloc(u32, span_count);
        errdefer gpa.free(pending);
        const generations = try gpa.alloc(u32, span_count);
        errdefer gpa.free(generations);
        @memset(seq_lens, 0);
        @memset(pending, 0);
        @memset(generations, 0);

        var keys: Spans = try .init(gpa, slab_allocator, shape, options.dtype_k);
        errdefer keys.deinit(gpa, slab_allocator);
        const values: Spans = try .init(gpa, slab_allocator, shape, options.dtype_v);
        return .{
            .gpa = gpa,
            .slab_allocator = slab_allocator,
            .shape = shape,
            .q_head_count = options.q_head_count,
            .dtype_k = options.dtype_k,
            .dtype_v = options.dtype_v,
            .keys = keys,
            .values = values,
            .seq_lens = seq_lens,
            .pending = pending,
            .generations = generations,
        };
    }

    pub fn deinit(self: *ContiguousCache) void {
        self.values.deinit(self.gpa, self.slab_allocator);
        self.keys.deinit(self.gpa, self.slab_allocator);
        self.gpa.free(self.generations);
        self.gpa.free(self.pending);
        self.gpa.free(self.seq_lens);
        self.* = undefined;
    }

    /// Appends one row of one layer: `k` and `v` are [kv_head][head_dim]. A second `store` before `advance` is
    /// `CommitMismatch`.
    pub fn store(self: *ContiguousCache, layer_index: u32, sequence_index: u32, k: Input, v: Input) StoreError!void {
        try self.checkIndices(layer_index, sequence_index);
        if (self.seq_lens[sequence_index] == self.shape.max_seq_len) return error.CacheFull;
        if (k.element_count != self.shape.kvDim() or v.element_count != self.shape.kvDim()) return error.InvalidSize;
        if (self.pending[self.shape.spanIndex(layer_index, sequence_index)] != 0) return error.CommitMismatch;
        const start = try self.append(layer_index, sequence_index, k, v);
        assert(start == self.seq_lens[sequence_index]);
    }

    /// Appends n >= 0 rows of one layer and returns the position of the first.
    pub fn append(self: *ContiguousCache, layer_index: u32, sequence_index: u32, k: Input, v: Input) AppendError!u32 {
        try self.checkIndices(layer_index, sequence_index);
        const token_count = try k.tokenCount(self.shape);
        if (try v.tokenCount(self.shape) != token_count) return error.InvalidSize;
        const span = self.shape.spanIndex(layer_index, sequence_index);
        const start = self.seq_lens[sequence_index] + self.pending[span];
        assert(start <= self.shape.max_seq_len);
        if (token_count > self.shape.max_seq_len - start) return error.CacheFull;
        if (token_count == 0) return start;
        const keys = self.keys.spanRows(self.shape, span, start, @intCast(token_count));
        const values = self.values.spanRows(self.shape, span, start, @intCast(token_count));
        var inputs: Inputs = .{ .k = k, .v = v };
        defer inputs.deinit(self.gpa);
        for ([_][]const u8{ keys, values }) |written| try inputs.leave(self.gpa, written);
        if (!self.write(keys, self.dtype_k, @intCast(token_count), inputs.k) or
            !self.write(values, self.dtype_v, @intCast(token_count), inputs.v))
        {
            // What lies behind the rows is never seen, and finite all the same.
            for ([_][]u8{ keys, values }) |written| @memset(written, 0);
            return error.NotFinite;
        }
        self.pending[span] += @intCast(token_count);
        self.generations[span] +%= 1;
        return start;
    }

    /// Writes rows of one side. False where one cannot be stored. Each element is read once: another thread may write a
    /// caller's memory.
    fn write(self: *ContiguousCache, destination: []u8, dtype: Dtype, token_count: u32, input: Input) bool {
        const shape = self.shape;
        const kernels = dispatch.kernels();
        switch (input.layout) {
            .token_major => return kernels.convert_checked(&.{
                .destination = destination.ptr,
                .destination_dtype = dtype,
                .source = input.bytes,
                .source_dtype = input.dtype,
                .element_count = input.element_count,
            }, dtype) != 0,
            .head_major => for (0..shape.kv_head_count) |kv_head| {
                if (kernels.convert_checked(&.{
                    .destination = destination.ptr + shape.headBytes(@intCast(kv_head), dtype),
                    .destination_dtype = dtype,
                    .destination_stride = shape.rowBytes(dtype),
                    .source = input.headRow(shape, token_count, @intCast(kv_head), 0),
                    .source_dtype = input.dtype,
                    .source_stride = @as(u64, shape.head_dim) * input.dtype.elementBytes(),
                    .row_count = token_count,
                    .element_count = shape.head_dim,
                }, dtype) == 0) return false;
            },
        }
        return true;
    }

    /// Commits one row for every sequence that has exactly one pending in every layer; sequences without a new row
    /// stay. Anything else pending, or no new row at all, is `CommitMismatch` and changes nothing.
    ///
    /// When a sequence just committed is now full, the answer is `CacheFull` *after* committing: the one call that
    /// reports after acting. With nothing pending and a sequence full, it is `CacheFull` again.
    pub fn advance(self: *ContiguousCache) AdvanceError!void {
        var any_pending = false;
        var any_full = false;
        for (self.seq_lens, 0..) |seq_len, index| {
            any_full = any_full or seq_len == self.shape.max_seq_len;
            const row_count = self.pendingEverywhere(@intCast(index)) orelse return error.CommitMismatch;
            if (row_count > 1) return error.CommitMismatch;
            any_pending = any_pending or row_count == 1;
        }
        if (!any_pending) return if (any_full) error.CacheFull else error.CommitMismatch;

        var now_full = false;
        for (self.seq_lens, 0..) |*seq_len, index| {
            if (self.pendingEverywhere(@intCast(index)).? == 0) continue;
            self.clearPending(@intCast(index));
            seq_len.* += 1;
            now_full = now_full or seq_len.* == self.shape.max_seq_len;
        }
        if (now_full) return error.CacheFull;
    }

    /// Makes `token_count` pending rows of one sequence count. Every layer must have exactly that many.
    pub fn commit(self: *ContiguousCache, sequence_index: u32, token_count: u32) CommitError!void {
        if (sequence_index >= self.shape.sequence_count) return error.SequenceOutOfRange;
        if (token_count == 0) return;
        if (self.pendingEverywhere(sequence_index) != token_count) return error.CommitMismatch;
        self.clearPending(sequence_index);
        self.seq_lens[sequence_index] += token_count;
        assert(self.seq_lens[sequence_index] <= self.shape.max_seq_len);
    }

    /// Commits only the pending rows whose index is in `kept`, ascending: the accepted path of a tree of drafted tokens.
    /// The others are dropped, and the kept ones move up next to the committed rows.
    pub fn commitKept(self: *ContiguousCache, sequence_index: u32, kept: []const u32) CommitKeptError!void {
        if (sequence_index >= self.shape.sequence_count) return error.SequenceOutOfRange;
        const pending = self.pendingEverywhere(sequence_index) orelse return error.CommitMismatch;
        try checkKept(kept, pending);
        const start = self.seq_lens[sequence_index];
        for (0..self.shape.layer_count) |layer| {
            const span = self.shape.spanIndex(@intCast(layer), sequence_index);
            for ([_]*const Spans{ &self.keys, &self.values }) |spans| for (kept, 0..) |index, i| {
                if (index == i) continue;
                const from = spans.spanRows(self.shape, span, start + index, 1);
                @memcpy(spans.spanRows(self.shape, span, start + @as(u32, @intCast(i)), 1), from);
            };
            self.generations[span] +%= 1;
        }
        self.clearPending(sequence_index);
        self.seq_lens[sequence_index] = start + @as(u32, @intCast(kept.len));
    }

    /// Rewinds one sequence to `seq_len` rows and drops its pending ones. No K/V byte is touched.
    pub fn truncate(self: *ContiguousCache, sequence_index: u32, seq_len: u32) TruncateError!void {
        if (sequence_index >= self.shape.sequence_count) return error.SequenceOutOfRange;
        if (seq_len > self.seq_lens[sequence_index]) return error.PositionOutOfRange;
        self.clearPending(sequence_index);
        self.seq_lens[sequence_index] = seq_len;
        for (0..self.shape.layer_count) |layer| {
            self.generations[self.shape.spanIndex(@intCast(layer), sequence_index)] +%= 1;
        }
    }

    /// Empties every sequence. No K/V byte is touched; old rows are never visible.
    pub fn reset(self: *ContiguousCache) void {
        for (0..self.shape.sequence_count) |index| {
            self.truncate(@intCast(index), 0) catch unreachable; // 0 is never past the end
        }
    }

    /// One of the sequences, as `sequence.zig` has them. Its calls refuse an index that is out of range.
    pub fn sequence(self: *ContiguousCache, sequence_index: u32) Sequence {
        return .{ .cache = self, .index = sequence_index };
    }

    /// Element offset of one number in the logical array of all keys, or of all values.
    pub fn offset(
        self: *const ContiguousCache,
        layer_index: u32,
        sequence_index: u32,
        position: u32,
        kv_head_index: u32,
        dim: u32,
    ) OffsetError!u64 {
        try self.checkIndices(layer_index, sequence_index);
        const shape = self.shape;
        if (position >= shape.max_seq_len or kv_head_index >= shape.kv_head_count or dim >= shape.head_dim) {
            return error.PositionOutOfRange;
        }
        return shape.offset(layer_index, sequence_index, position, kv_head_index, dim);
    }

    /// Committed rows of a sequence.
    pub fn seqLen(self: *const ContiguousCache, sequence_index: u32) error{SequenceOutOfRange}!u32 {
        if (sequence_index >= self.shape.sequence_count) return error.SequenceOutOfRange;
        return self.seq_lens[sequence_index];
    }

    /// The longest committed length.
    pub fn currentPos(self: *const ContiguousCache) u32 {
        return std.mem.max(u32, self.seq_lens);
    }

    /// Bytes of keys and values by the formula, and 4 for each sequence's length.
    pub fn memoryBytes(self: *const ContiguousCache) u64 {
        const kv_bytes = self.shape.memoryBytes(self.dtype_k, self.dtype_v) catch unreachable; // checked by init
        return kv_bytes + self.seq_lens.len * @sizeOf(u32);
    }

    /// What is really allocated.
    pub const Stats = struct {
        kv_bytes: u64,
        reserved_bytes: u64,
        metadata_bytes: u64,
        /// Reserved bytes that are no keys or values: the ends of pages.
        padding_bytes: u64,
        slab_count: u32,
    };

    pub fn stats(self: *const ContiguousCache) Stats {
        const words = self.seq_lens.len + self.pending.len + self.generations.len;
        const tables = self.keys.slabs.len + self.values.slabs.len;
        const kv_bytes = self.shape.memoryBytes(self.dtype_k, self.dtype_v) catch unreachable; // checked by init
        const reserved_bytes = self.keys.reservedBytes() + self.values.reservedBytes();
        return .{
            .kv_bytes = kv_bytes,
            .reserved_bytes = reserved_bytes,
            .padding_bytes = reserved_bytes - kv_bytes,
            .metadata_bytes = words * @sizeOf(u32) + tables * @sizeOf(Slab),
            .slab_count = @intCast(tables),
        };
    }

    /// The rows of a layer as a reader sees them now: committed and, of this layer, pending ones.
    pub fn rows(self: *const ContiguousCache, layer_index: u32, sequence_index: u32) IndexError!Rows {
        try self.checkIndices(layer_index, sequence_index);
        const span = self.shape.spanIndex(layer_index, sequence_index);
        return .{
            .kv_head_count = self.shape.kv_head_count,
            .head_dim = self.shape.head_dim,
            .q_head_count = self.q_head_count,
            .row_count = self.seq_lens[sequence_index] + self.pending[span],
            .memory = .{ .contiguous = .{
                .shape = self.shape,
                .dtype_k = self.dtype_k,
                .dtype_v = self.dtype_v,
                .keys = self.keys.span(span),
                .values = self.values.span(span),
            } },
        };
    }

    /// A number that changes whenever a view of this layer and sequence goes stale.
    pub fn generation(self: *const ContiguousCache, layer_index: u32, sequence_index: u32) IndexError!u32 {
        try self.checkIndices(layer_index, sequence_index);
        return self.generations[self.shape.spanIndex(layer_index, sequence_index)];
    }

    /// Copies all rows of a layer and returns their count. The copies share no memory, with one another or with the rows.
    pub fn gather(self: *const ContiguousCache, layer_index: u32, sequence_index: u32, k: Output, v: Output) GatherError!u32 {
        return self.gatherRange(layer_index, sequence_index, .{}, k, v);
    }

    /// The same of some of the rows, by their positions.
    pub fn gatherRange(
        self: *const ContiguousCache,
        layer_index: u32,
        sequence_index: u32,
        range: Range,
        k: Output,
        v: Output,
    ) GatherError!u32 {
        const stored = try self.rows(layer_index, sequence_index);
        return gathers.gather(&stored, range, k, v);
    }

    /// A layer there is.
    pub fn checkLayer(self: *const ContiguousCache, layer_index: u32) error{LayerOutOfRange}!void {
        if (layer_index >= self.shape.layer_count) return error.LayerOutOfRange;
    }

    fn checkIndices(self: *const ContiguousCache, layer_index: u32, sequence_index: u32) IndexError!void {
        try self.checkLayer(layer_index);
        if (sequence_index >= self.shape.sequence_count) return error.SequenceOutOfRange;
    }

    /// The rows a sequence has pending, if that is the same number in every layer.
    fn pendingEverywhere(self: *const ContiguousCache, sequence_index: u32) ?u32 {
        const first = self.pending[self.shape.spanIndex(0, sequence_index)];
        for (1..self.shape.layer_count) |layer| {
            if (self.pending[self.shape.spanIndex(@intCast(layer), sequence_index)] != first) return null;
        }
        return first;
    }

    fn clearPending(self: *ContiguousCache, sequence_index: u32) void {
        for (0..self.shape.layer_count) |layer| {
            self.pending[self.shape.spanIndex(@intCast(layer), sequence_index)] = 0;
        }
    }
};

/// One sequence of a contiguous cache: which it is. The cache outlives it, and there is nothing to free.
pub const Sequence = struct {
    cache: *ContiguousCache,
    index: u32,

    /// Appends n >= 0 rows of one layer and returns the position of the first.
    pub fn append(self: Sequence, layer_index: u32, k: Input, v: Input) ContiguousCache.AppendError!u32 {
        return self.cache.append(layer_index, self.index, k, v);
    }

    /// Makes `token_count` pending rows count; every layer must have exactly that many.
    pub fn commit(self: Sequence, token_count: u32) ContiguousCache.CommitError!void {
        return self.cache.commit(self.index, token_count);
    }

    /// Commits only some of the pending rows, by their index, ascending.
    pub fn commitKept(self: Sequence, kept: []const u32) ContiguousCache.CommitKeptError!void {
        return self.cache.commitKept(self.index, kept);
    }

    /// Rewinds to `seq_len` rows and drops the pending ones.
    pub fn truncate(self: Sequence, seq_len: u32) ContiguousCache.TruncateError!void {
        return self.cache.truncate(self.index, seq_len);
    }

    /// Committed rows.
    pub fn seqLen(self: Sequence) error{SequenceOutOfRange}!u32 {
        return self.cache.seqLen(self.index);
    }

    /// 0, as every length can be gone back to.
    pub fn rewindableTo(self: Sequence) error{SequenceOutOfRange}!u32 {
        _ = try self.cache.seqLen(self.index);
        return 0;
    }

    /// The rows of a layer as a reader sees them now.
    pub fn rows(self: Sequence, layer_index: u32) ContiguousCache.IndexError!Rows {
        return self.cache.rows(layer_index, self.index);
    }

    /// A number that changes whenever a view of this layer goes stale.
    pub fn generation(self: Sequence, layer_index: u32) ContiguousCache.IndexError!u32 {
        return self.cache.generation(layer_index, self.index);
    }

    /// Copies all rows of a layer and returns their count.
    pub fn gather(self: Sequence, layer_index: u32, k: Output, v: Output) ContiguousCache.GatherError!u32 {
        return self.cache.gather(layer_index, self.index, k, v);
    }

    /// The same of some of the rows, by their positions.
    pub fn gatherRange(self: Sequence, layer_index: u32, range: Range, k: Output, v: Output) ContiguousCache.GatherError!u32 {
        return self.cache.gatherRange(layer_index, self.index, range, k, v);
    }
};

test {
    _ = @import("contiguous_test.zig");
}
