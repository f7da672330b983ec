//! kvern is the KV cache of a transformer: keys and values in memory of its own, and attention over them at the speed of
//! that memory.
//!
//! A `ContiguousCache` has one span of rows for each layer and sequence. A `PagedCache` has blocks of 64 positions, which
//! sequences share, and may quantize old ones. Either is written in two phases: rows are appended to every layer, then a
//! commit makes them count. Every call does all it says or nothing, and tells an error apart from every other.
//!
//! ```
//! var cache: kvern.ContiguousCache = try .init(gpa, .{
//!     .layer_count = 32, .kv_head_count = 8, .head_dim = 128, .max_seq_len = 4096, .dtype_k = .f16, .dtype_v = .f16,
//! });
//! defer cache.deinit();
//! _ = try cache.append(layer, 0, .fromF32(k), .fromF32(v)); // every layer, then
//! try cache.commit(0, token_count);
//! try kvern.attend(try cache.rows(layer, 0), q, .{}, output, &.{});
//! ```
//!
//! Here the newest 256 rows stay in f16, and the blocks behind them take 4 bits and a half a value:
//!
//! ```
//! var pages: kvern.PagedCache = try .init(gpa, .{
//!     .layers = &@as([32]kvern.PagedLayer, @splat(.{ .kv_head_count = 8, .head_dim = 128 })),
//!     .max_seq_len = 1 << 17,
//!     .policy = .{ .kind = .tiered, .store = .{ .dtype_k = .i4, .dtype_v = .i4 }, .tail_tokens = 256 },
//! });
//! defer pages.deinit();
//! const parent = try pages.createSequence();
//! _ = try parent.append(layer, .fromF32(k), .fromF32(v)); // every layer, then
//! try parent.commit(token_count);
//! const child = try pages.fork(parent); // shares every block
//! try kvern.attend(try child.rows(layer), q, .{}, output, &.{});
//! ```
//!
//! A `Sequence` is one of either cache; `attendSequences` attends for several of them in one call. `Dtype` lists the
//! formats, `AttendOptions` what attention can do besides: windows, sinks, ALiBi, softcap, trees of drafted tokens.
//!
//! The kernels are compiled for every CPU level of the target and picked when they are first used; `setLevel` picks a
//! lower one. Equal stored bytes give equal bits on one level, whatever the layout and the number of threads.
//!
//! Not thread safe: a cache that threads share needs the caller's lock. `setThreadCount` says how many threads of kvern's
//! own one call may use.

pub const Dtype = @import("dtype.zig").Dtype;
const group = @import("group.zig");
pub const Plane = group.Plane;
pub const Side = group.Side;
const shape = @import("shape.zig");
pub const BlockShape = shape.BlockShape;
pub const Shape = shape.Shape;

const contiguous = @import("cache/contiguous.zig");
pub const ContiguousCache = contiguous.ContiguousCache;
pub const ContiguousOptions = contiguous.Options;
pub const ContiguousSequence = contiguous.Sequence;

const format_pool = @import("cache/blocks/format_pool.zig");
pub const FormatPool = format_pool.FormatPool;
pub const BlockPool = @import("cache/blocks/pool.zig").BlockPool;

const paged = @import("cache/paged/cache.zig");
pub const PagedCache = paged.PagedCache;
pub const PagedOptions = paged.Options;
pub const PagedLayer = paged.Layer;
pub const Policy = paged.Policy;
pub const Retention = paged.Retention;
pub const PagedSequence = paged.Sequence;
pub const PagedStats = paged.Stats;
pub const PrefixOptions = paged.PrefixOptions;
pub const priority_default = paged.priority_default;
pub const Rank = paged.Rank;
pub const PrefixStats = paged.PrefixStats;
pub const PrefixTiers = paged.Tiers;
pub const PrefixEvent = @import("cache/prefix/events.zig").Kind;
pub const PrefixExplanation = paged.Explanation;
pub const PrefixReason = paged.PrefixReason;
pub const Prompt = paged.Prompt;
pub const HeadFidelity = paged.Head;
pub const Store = paged.Store;
pub const Tier = paged.Tier;

const sequence = @import("cache/sequence.zig");
pub const Device = sequence.Device;
pub const Sequence = sequence.Sequence;
const view = @import("cache/view.zig");
pub const ContiguousKv = view.ContiguousKv;
pub const Reason = view.Reason;
pub const View = view.View;

const quantization = @import("cache/quantization.zig");
pub const quantizeRows = quantization.quantizeRows;
pub const dequantizeRows = quantization.dequantizeRows;
pub const quantizePlane = quantization.quantizePlane;
pub const dequantizePlane = quantization.dequantizePlane;
pub const packPlane = quantization.packPlane;
pub const unpackPlane = quantization.unpackPlane;

const input = @import("cache/input.zig");
pub const Input = input.Input;
pub const Layout = input.Layout;
pub const Output = input.Output;
const gather = @import("cache/gather.zig");
pub const GatherRange = gather.Range;
pub const Rows = @import("cache/rows.zig").Rows;

const attention = @import("attention/attend.zig");
pub const attend = attention.attend;
pub const attendSequences = attention.attendSequences;
pub const tree_node_count_max = attention.tree_node_count_max;
pub const Query = attention.Query;
pub const AttendOptions = attention.Options;

const dispatch = @import("kernels/dispatch.zig");
pub const Level = dispatch.Level;
pub const kernels = dispatch.kernels;
pub const levelMask = dispatch.levelMask;
pub const setLevel = dispatch.setLevel;

const buffer_pool = @import("device/buffer_pool.zig");
pub const AlignedBuffer = buffer_pool.AlignedBuffer;
pub const BufferPool = buffer_pool.BufferPool;
pub const BufferPoolOptions = buffer_pool.Options;

const cpu = @import("device/cpu.zig");
pub const cpuCount = cpu.cpuCount;
pub const memoryLimit = cpu.memoryLimit;

const workers = @import("device/workers.zig");
pub const threadCount = workers.threadCount;
pub const setThreadCount = workers.setThreadCount;

const reserved = @import("device/reserved.zig");
/// Bytes reserved by all caches and pools of the process, and the most they may be, which is settled once.
pub const reservedBytes = reserved.total;
pub const maxBytes = reserved.max;
pub const setMaxBytes = reserved.setMax;

const bandwidth = @import("device/bandwidth.zig");
pub const readRate = bandwidth.readRate;

test {
    _ = @import("dtype.zig");
    _ = shape;
    _ = dispatch;
    _ = cpu;
    _ = @import("device/slab.zig");
    _ = reserved;
    _ = bandwidth;
    _ = workers;
    _ = buffer_pool;
    _ = format_pool;
    _ = paged;
    _ = @import("cache/blocks/pool.zig");
    _ = @import("cache/blocks/table.zig");
    _ = @import("cache/blocks/slab_table.zig");
    _ = @import("cache/tiers/fidelity.zig");
    _ = @import("cache/paged/layer_group.zig");
    _ = @import("cache/overlap.zig");
    _ = @import("cache/tiers/retention.zig");
    _ = @import("cache/tiers/policy.zig");
    _ = @import("group.zig");
    _ = gather;
    _ = contiguous;
    _ = sequence;
    _ = attention;
}
