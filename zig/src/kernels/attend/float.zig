//! Attention over float rows: passes 1 and 3 of `attend.zig` for f32, f16 and bf16 sides.
//!
//! A tile knows its rows by pointer. No number below depends on how many query rows are attended together.

const convert = @import("../convert.zig");
const simd = @import("../lanes.zig");
const table = @import("../table.zig");
const PrefetchQueue = @import("prefetch.zig").PrefetchQueue;
const Dtype = @import("../../dtype.zig").Dtype;
const Scratch = @import("scratch.zig").Scratch;
const TileTokens = @import("tokens.zig").TileTokens;

const lanes = simd.lanes;
const Vector = simd.Vector;

/// Query rows that share the registers of one pass: 4 rows * 4 tokens are 16 accumulators, half of 32 vector registers. With
/// 16 registers (SSE, AVX2) it is 2 rows.
const row_block = simd.register_count / 8;

/// Keys that share one load of the queries.
const token_block = TileTokens.token_block;

/// Vectors of head_dim that one sweep over a tile's values accumulates.
const dim_block = 4;

/// Cache lines that a step of so many vectors of a side reads, and as many that it prefetches. Some steps prefetch none:
/// what they leave is prefetched between the passes, where memory would be idle.
fn linesAStep(comptime dtype: Dtype, comptime vectors: u32) u32 {
    return @max(1, vectors * lanes * dtype.elementBytes() / simd.cache_line_bytes);
}

/// Blocks of query rows that are at work one after the other.
fn blockCount(row_count: u32) u32 {
    return row_count / row_block + row_count % row_block;
}

/// The block of query rows at work: blocks take turns in prefetching.
const Turn = struct { index: u32, count: u32 };

/// Lines that pass 1 prefetches for one head.
pub fn linesOfScores(comptime dtype: Dtype, task: *const table.AttendTask, scratch: *const Scratch) u32 {
    const blocks = (scratch.tokens.token_count + token_block - 1) / token_block;
    return blocks * @as(u32, task.head_dim / lanes -| 1) * linesAStep(dtype, token_block);
}

/// Lines that pass 3 prefetches for one head.
pub fn linesOfSums(comptime dtype: Dtype, task: *const table.AttendTask, scratch: *const Scratch) u32 {
    const vectors = (task.head_dim + lanes - 1) / lanes;
    const sweeps = vectors / dim_block + vectors % dim_block;
    return sweeps * (scratch.tokens.token_count - (scratch.tokens.token_count + 3) / 4) * linesAStep(dtype, dim_block);
}

/// Pass 1: scores[row][token] = query . key.
pub fn scoreTile(comptime dtype: Dtype, task: *const table.AttendTask, scratch: *Scratch) void {
    const row_end = scratch.row_first + task.row_count;
    const block_count = blockCount(task.row_count);
    var turn: u32 = 0; // counted on, as a division takes longer than a block of tokens waits
    var token: u32 = 0;
    while (token < scratch.tokens.token_count) : (token += token_block) {
        var block = turn;
        var r = scratch.row_first;
        while (r + row_block <= row_end) : (r += row_block) {
            scoreBlock(dtype, row_block, task, r, token, scratch, block == 0);
            block -%= 1;
        }
        while (r < row_end) : (r += 1) {
            scoreBlock(dtype, 1, task, r, token, scratch, block == 0);
            block -%= 1;
        }
        turn += 1;
        if (turn == block_count) turn = 0;
    }
}

inline fn scoreBlock(
    comptime dtype: Dtype,
    comptime row_count: u32,
    task: *const table.AttendTask,
    row_first: u32,
    token_first: u32,
    scratch: *Scratch,
    is_turn: bool,
) void {
    const element_bytes = comptime dtype.elementBytes();
    const keys = scratch.tokens.keys[token_first..][0..token_block];
    const offset = scratch.tokens.offset_k;
    const queries = task.queries + row_first * task.head_dim_padded;
    var products: [row_count][token_block]Vector = @splat(@splat(@splat(0)));

    var lines = scratch.prefetches.takeIf(is_turn, @as(u32, task.head_dim / lanes -| 1) * linesAStep(dtype, token_block), keys[0] + offset);
    var dim: u32 = 0;
    while (dim + lanes <= task.head_dim) : (dim += lanes) {
        if (dim != 0) lines.prefetch(linesAStep(dtype, token_block));
        var key: [token_block]Vector = undefined;
        inline for (&key, keys) |*vector, source| vector.* = convert.load(dtype, source + offset + dim * element_bytes);
        inline for (0..row_count) |r| {
            const query: Vector = queries[r * task.head_dim_padded + dim ..][0..lanes].*;
            inline for (0..token_block) |t| products[r][t] = simd.mulAdd(query, key[t], products[r][t]);
        }
    }
    if (dim < task.head_dim) {
        const rest = task.head_dim - dim;
        inline for (0..token_block) |t| {
            const key = convert.loadPartial(dtype, keys[t] + offset + dim * element_bytes, rest);
            inline for (0..row_count) |r| {
                const query: Vector = queries[r * task.head_dim_padded + dim ..][0..lanes].*;
                products[r][t] = simd.mulAdd(query, key, products[r][t]);
            }
        }
    }
    const product_count = row_count * token_block;
    if (product_count % lanes == 0) {
        const flat: [product_count]Vector = @bitCast(products);
        inline for (0..product_count / lanes) |chunk| {
            const sums: [lanes]f32 = simd.sumLanes(flat[chunk * lanes ..][0..lanes].*);
            inline for (0..lanes / token_block) |i| {
                const r = chunk * lanes / token_block + i;
                scratch.scores[row_first + r][token_first..][0..token_block].* = sums[i * token_block ..][0..token_block].*;
            }
        }
    } else inline for (0..row_count) |r| {
        scratch.scores[row_first + r][token_first..][0..token_block].* = simd.sumFour(products[r]);
    }
}

/// Pass 3: sums[row][dim] += weight * value, tokens in order.
pub fn accumulateTile(comptime dtype: Dtype, task: *const table.AttendTask, scratch: *Scratch) void {
    const row_end = scratch.row_first + task.row_count;
    var turn: Turn = .{ .index = 0, .count = blockCount(task.row_count) };
    var r = scratch.row_first;
    while (r + row_block <= row_end) : (r += row_block) {
        accumulateRows(dtype, row_block, task, scratch, r, turn);
        turn.index += 1;
    }
    while (r < row_end) : (r += 1) {
        accumulateRows(dtype, 1, task, scratch, r, turn);
        turn.index += 1;
    }
}

fn accumulateRows(
    comptime dtype: Dtype,
    comptime row_count: u32,
    task: *const table.AttendTask,
    scratch: *Scratch,
    row_first: u32,
    turn: Turn,
) void {
    var dim: u32 = 0;
    while (dim + dim_block * lanes <= task.head_dim) : (dim += dim_block * lanes) {
        accumulateDims(dtype, row_count, dim_block, task, scratch, turn, row_first, dim, lanes);
    }
    while (dim + lanes <= task.head_dim) : (dim += lanes) {
        accumulateDims(dtype, row_count, 1, task, scratch, turn, row_first, dim, lanes);
    }
    if (dim < task.head_dim) {
        accumulateDims(dtype, row_count, 1, task, scratch, turn, row_first, dim, task.head_dim - dim);
    }
}

inline fn accumulateDims(
    comptime dtype: Dtype,
    comptime row_count: u32,
    comptime vector_count: u32,
    task: *const table.AttendTask,
    scratch: *Scratch,
    turn: Turn,
    row_first: u32,
    dim_first: u32,
    /// Elements of the last vector; below `lanes` only for a single vector at the end of a row.
    element_count: u32,
) void {
    const element_bytes = comptime dtype.elementBytes();
    const sums = task.sums + row_first * task.head_dim_padded + dim_first;
    var sum: [row_count][vector_count]Vector = undefined;
    inline for (&sum, 0..) |*row, r| {
        inline for (row, 0..) |*vector, i| vector.* = sums[r * task.head_dim_padded + i * lanes ..][0..lanes].*;
    }
    const offset = scratch.tokens.offset_v;
    var lines: PrefetchQueue.Lines = undefined;
    var at_work: u32 = 0; // counts the blocks of rows round, a step for four tokens
    for (scratch.tokens.values[0..scratch.tokens.token_count], 0..) |source, token| {
        // One of each four tokens prefetches nothing.
        const line_count = comptime linesAStep(dtype, dim_block);
        if (token % 4 == 0) {
            lines = scratch.prefetches.takeIf(at_work == turn.index, 3 * @as(u32, line_count), source + offset);
            at_work += 1;
            if (at_work == turn.count) at_work = 0;
        } else lines.prefetch(line_count);
        var value: [vector_count]Vector = undefined;
        inline for (&value, 0..) |*vector, i| {
            const at = source + offset + (dim_first + i * lanes) * element_bytes;
            vector.* = if (vector_count == 1 and element_count < lanes)
                convert.loadPartial(dtype, at, element_count)
            else
                convert.load(dtype, at);
        }
        inline for (0..row_count) |r| {
            const weight: Vector = @splat(scratch.scores[row_first + r][token]);
            inline for (0..vector_count) |i| sum[r][i] = simd.mulAdd(weight, value[i], sum[r][i]);
        }
    }
    inline for (sum, 0..) |row, r| {
        inline for (row, 0..) |vector, i| sums[r * task.head_dim_padded + i * lanes ..][0..lanes].* = vector;
    }
}
