//! What a CPU level offers: one function pointer for each kernel, and the records they take.
//!
//! `kernels.zig` is compiled once per level and exports one `Table`. Both sides of that line are separate compilations,
//! so everything here is `extern`. A kernel never checks its arguments against the caller: `shape.zig`, the caches and
//! `abi/` have done that; it asserts.

const std = @import("std");
const assert = std.debug.assert;
const group = @import("../group.zig");
const shape = @import("../shape.zig");
const Dtype = @import("../dtype.zig").Dtype;
const Plane = group.Plane;

/// An instruction set the kernels are compiled for. The numbers cross the C ABI and are never changed.
pub const Level = enum(u32) {
    v2 = 1,
    v3 = 2,
    avx512 = 3,
    amx = 4,
    neon = 5,
    dotprod = 6,

    /// f32 lanes of a vector.
    pub fn lanes(level: Level) u32 {
        return switch (level) {
            .v2, .neon, .dotprod => 4,
            .v3 => 8,
            .avx512, .amx => 16,
        };
    }
};

/// Positions of a tile. Tiles begin at multiples of it, whatever block or slab the rows lie in, so that the same rows give
/// the same bits in every layout.
pub const tile_tokens = 64;

/// Query rows one task may hold for each head: a query row is one query of one query head.
pub const query_row_count_max = 16;

pub const head_dim_max = shape.head_dim_max;

/// A query or a weight that is multiplied by codes is a whole number of at most `number_max` steps, in two digits:
/// `digit_base` * high + low.
pub const digit_base = 128;
pub const digit_max = 127;
pub const number_max = digit_base * digit_max;

/// A query as `Table.prepare` leaves it: numbers of two digits.
pub const PreparedQuery = extern struct { bytes: [2 * head_dim_max + 64]u8 align(64) };

/// f32 lanes of the widest level; head_dim is padded with zeros to a multiple of it.
pub const lanes_max = 16;

comptime {
    // A block of codes is whole tiles: a tile never lies in two of them.
    assert(group.token_multiple % tile_tokens == 0);
    assert(head_dim_max % lanes_max == 0 and lanes_max == group.lane_count);
    assert(number_max == 16256);
    for (std.enums.values(Level)) |level| assert(level.lanes() <= lanes_max);
}

/// Adjacent rows of the first KV head.
pub const Run = extern struct {
    /// First key, [head_dim]; of quantized keys the first byte of their plane.
    keys: [*]const u8,
    /// First value, [head_dim]; of quantized values the first byte of their plane.
    values: [*]const u8,
    /// Absolute position of the first row.
    position: u32,
    token_count: u32,
};

/// How the rows of a tile are stored: all of them alike, and all in one block where a side is quantized.
pub const Storage = extern struct {
    dtype_k: Dtype,
    dtype_v: Dtype,
    /// Bytes from one row of a run to the next; unused where the side is quantized.
    token_stride_k: u64,
    token_stride_v: u64,
    /// Bytes from a row, or a plane, to that of the next KV head.
    head_stride_k: u64,
    head_stride_v: u64,
    /// Tokens of a plane, and which of them has the position at which the tile begins; unused where both sides are floats.
    block_size: u32 = 0,
    tile_token: u32 = 0,

    /// Whether keys are multiplied by prepared queries, see `Table.prepare`.
    pub fn isPrepared(storage: Storage) bool {
        return !storage.dtype_k.isFloat() and !storage.dtype_k.isAffine();
    }

    pub fn isFloat(storage: Storage) bool {
        return storage.dtype_k.isFloat() and storage.dtype_v.isFloat();
    }
};

/// The rows of the first of a few KV heads in one tile, ascending; nobody may see positions in a gap.
pub const TileRuns = extern struct {
    storage: Storage,
    runs: [*]const Run,
    run_count: u32,
};

/// One query row: what it may see, how its scores are biased, and its running softmax.
pub const QueryRow = extern struct {
    /// Visible are the positions in [0, sink_end) and in [first, end).
    first: u32,
    end: u32,
    sink_end: u32,
    /// Absolute position of the query.
    position: u32,
    /// The score of a key `n` positions back is lowered by `slope * n`; 0 for none.
    alibi_slope: f32,
    /// From this position on, the row sees only the positions whose bit is set: bit 0 is `tree_first`. The end of the rows
    /// where there is no tree.
    tree_first: u32,
    tree_mask: u64,
    /// Largest score so far, -Inf before the first visible key.
    score_max: f32,
    /// Sum of exp(score - score_max) so far: at least 1 once a key was visible, NaN once a score left the range of f32.
    weight_sum: f32,
};

/// One step of online-softmax attention: a few query rows for each of a few KV heads, over one tile of their keys and values.
///
/// The kernel reads each key and value once for all rows and leaves the sums unnormalized; the tiles of a row are given
/// in ascending position.
pub const AttendTask = extern struct {
    /// Queries times softmax_scale, [head][row][head_dim_padded], padding 0.
    queries: [*]const f32,
    /// Prepared queries, [head][row], for keys of which each token has its own scales: q8_0 and q4_0.
    prepared: [*]PreparedQuery,
    /// Sums of weight * value, [head][row][head_dim_padded].
    sums: [*]f32,
    /// [head][row]
    rows: [*]QueryRow,
    head_count: u32,
    /// Query rows of each head.
    row_count: u32,
    head_dim: u32,
    head_dim_padded: u32,
    /// Scores become softcap * tanh(score / softcap); 0 for none.
    softcap: f32,
    tile: TileRuns,
    /// The tile that is read next, prefetched while this one computes. It may have no runs.
    next_tile: TileRuns,
    /// 1 where the rows of a token's heads lie side by side, and those of the next token behind them.
    is_token_major: u32,
    /// Bound on the magnitude of the queries' elements: tells whether a score may leave the range of f32.
    query_max: f32 = std.math.floatMax(f32),
};

/// Turns the sums of one query row into its output.
pub const FinishTask = extern struct {
    /// [head_dim]
    sums: [*]const f32,
    /// [head_dim], unaligned
    output: [*]u8,
    row: *const QueryRow,
    head_dim: u32,
    has_sink_logit: u32,
    /// exp(sink_logit) joins the denominator and adds no value.
    sink_logit: f32,
};

/// Rows of floats from one dtype to another, rounded half to even. Nothing is aligned.
pub const ConvertTask = extern struct {
    destination: [*]u8,
    source: [*]const u8,
    destination_dtype: Dtype,
    source_dtype: Dtype,
    row_count: u64 = 1,
    /// Elements of a row.
    element_count: u64,
    /// Bytes from row to row.
    destination_stride: u64 = 0,
    source_stride: u64 = 0,
};

/// Turns float rows into the codes of one plane.
pub const QuantizeTask = extern struct {
    plane: Plane,
    /// [token][head_dim], rows `token_stride` bytes apart, `plane.block_size` of them; finite. Unaligned.
    rows: [*]const u8,
    rows_dtype: Dtype,
    token_stride: u64,
    /// `plane.bytes()` of them, unaligned.
    bytes: [*]u8,
};

/// Turns codes of one plane back into float rows.
pub const DequantizeTask = extern struct {
    plane: Plane,
    /// `plane.bytes()` of them, unaligned.
    bytes: [*]const u8,
    token_first: u32,
    token_count: u32,
    /// [token][head_dim], rows `token_stride` bytes apart, the first of them that of `token_first`. Unaligned.
    rows: [*]u8,
    /// A value past the largest finite one of this format becomes that one.
    rows_dtype: Dtype,
    token_stride: u64,
};

pub const Table = extern struct {
    level: Level,
    /// f32 lanes of a vector.
    lanes: u32,
    convert: *const fn (task: *const ConvertTask) callconv(.c) void,
    /// `convert` that checks what it converts: 1 when all elements are finite and stay finite when stored as `narrowest`; else
    /// 0, and the destination holds anything.
    convert_checked: *const fn (task: *const ConvertTask, narrowest: Dtype) callconv(.c) u32,
    /// 1 when all elements are finite and stay finite when stored as `destination_dtype`, else 0.
    storable: *const fn (
        source: [*]const u8,
        source_dtype: Dtype,
        destination_dtype: Dtype,
        element_count: usize,
    ) callconv(.c) u32,
    quantize: *const fn (task: *const QuantizeTask) callconv(.c) void,
    dequantize: *const fn (task: *const DequantizeTask) callconv(.c) void,
    /// `element_count` elements, a multiple of 32, to ggml's records of q8_0 or q4_0. Nothing is aligned.
    quantize_records: *const fn (
        records: [*]u8,
        dtype: Dtype,
        source: [*]align(1) const f32,
        element_count: usize,
    ) callconv(.c) void,
    /// The elements of `element_count / 32` records of q8_0 or q4_0. Nothing is aligned.
    dequantize_records: *const fn (
        destination: [*]align(1) f32,
        records: [*]const u8,
        dtype: Dtype,
        element_count: usize,
    ) callconv(.c) void,
    attend: *const fn (task: *const AttendTask) callconv(.c) void,
    /// Fills `prepared`, before the first tile with keys of q8_0 or q4_0.
    prepare: *const fn (task: *const AttendTask) callconv(.c) void,
    /// Merges the state of the positions that come next into the state of a query row.
    merge: *const fn (
        row: *QueryRow,
        sums: [*]f32,
        next_row: *const QueryRow,
        next_sums: [*]const f32,
        head_dim_padded: u32,
    ) callconv(.c) void,
    /// Writes the output and returns the log-sum-exp of the row's scores, natural logarithm. NaN where a number left the
    /// range of f32 on the way: then nothing is written.
    finish: *const fn (task: *const FinishTask) callconv(.c) f32,
    /// The exclusive or of all words of `byte_count` bytes, a multiple of 512, prefetching `prefetch_bytes` ahead.
    read: *const fn (source: [*]const u8, byte_count: usize, prefetch_bytes: usize) callconv(.c) u32,
};
