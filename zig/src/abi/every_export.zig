//! Right calls of every export, one or more, for tests that make all of them with buffers in odd places or with memory that fails.

const std = @import("std");
const testing = std.testing;
const Allocator = std.mem.Allocator;
const attention = @import("attend.zig");
const buffers = @import("aligned_buffer.zig");
const buffer_pool = @import("buffer_pool.zig");
const contiguous = @import("contiguous.zig");
const group = @import("../group.zig");
const library = @import("library.zig");
const paged = @import("paged.zig");
const pool = @import("pool.zig");
const prompts = @import("prompt.zig");
const quantization = @import("quantization.zig");
const records = @import("test_records.zig");
const bytes = records.bytes;
const causal = records.causal;
const size = records.size;
const sized = records.sized;
const bf16_word = records.bf16_word;
const f16_word = records.f16_word;
const f32_word = records.f32_word;
const i4_word = records.i4_word;
const q8_0_word = records.q8_0_word;
const sequences = @import("sequence.zig");
const all = sequences.all_rows;

/// Callers' buffers, each an allocation of its own, with bytes nobody asked for before or behind it.
pub const Buffers = struct {
    allocator: Allocator,
    before: usize = 0,
    behind: usize = 0,
    memory: std.ArrayList([]u8) = .empty,

    fn place(self: *Buffers, len: usize) [*]u8 {
        const memory = self.allocator.alloc(u8, self.before + len + self.behind) catch @panic("no memory");
        self.memory.append(testing.allocator, memory) catch @panic("no memory");
        return memory.ptr + self.before;
    }

    /// A copy of an array or a record.
    fn in(self: *Buffers, array: anytype) [*]u8 {
        const is_record = @typeInfo(std.meta.Child(@TypeOf(array))) == .@"struct";
        const source = if (is_record) std.mem.asBytes(array) else std.mem.sliceAsBytes(array);
        const buffer = self.place(source.len);
        @memcpy(buffer, source);
        return buffer;
    }

    fn out(self: *Buffers, len: usize) [*]u8 {
        const buffer = self.place(len);
        @memset(buffer[0..len], 0);
        return buffer;
    }

    /// A record to be filled.
    fn record(self: *Buffers, comptime Record: type) [*]u8 {
        const buffer = self.out(@sizeOf(Record));
        std.mem.writeInt(u32, buffer[0..4], @sizeOf(Record), .little);
        return buffer;
    }

    pub fn deinit(self: *Buffers) void {
        for (self.memory.items) |memory| self.allocator.free(memory);
        self.memory.deinit(testing.allocator);
    }
};

/// 2 KV heads of an odd head_dim, and of one that has codes.
const flat_dim = 33;
const flat_row = 2 * flat_dim;
const dim = 32;
const row = 2 * dim;
const block_size = 64;

fn numbers(comptime count: usize) [count]f32 {
    @setEvalBranchQuota(100_000);
    var result: [count]f32 = undefined;
    for (&result, 0..) |*value, i| value.* = @as(f32, @floatFromInt(i * 37 % 101)) / 50 - 1;
    return result;
}

const rows_data = numbers(130 * row);
const flat_data = numbers(11 * flat_row);

fn live(word: i32) u32 {
    if (word <= 0) std.debug.panic("refused: {}", .{word});
    return @intCast(word);
}

const flat_options = records.contiguousOf(1, 2, flat_dim, 64);
/// An f32 tail without rows of its own, keys in i4 and values in q8_0 behind it; what that does is measured.
const tiered_options = tiered: {
    var options = records.pagedOf(1, block_size, 512);
    options.policy = .{ .kind = 1, .store_k = i4_word + 1, .store_v = q8_0_word + 1 };
    options.measures_fidelity = 1;
    options.prefix_mode = 2;
    options.prefix_has_events = 1;
    break :tiered options;
};
const tiered_layer = records.layerOf(2, dim);
const small_options = records.pagedOf(1, 2, 64);
const small_layer = records.layerOf(2, flat_dim);
const pool_options = records.poolOf(1, 2, flat_dim, 2, 1 << 20);
/// For one buffer of every class.
const buffer_pool_options = sized(buffer_pool.BufferPoolRecord{ .buffers_per_class = 2, .max_bytes = .from(32 << 20) });
const policy_options = sized(paged.PolicyRecord{ .policy = .{ .kind = 1, .store_k = 5, .store_v = 5, .tail_tokens = 64 } });

/// The objects that calls are made on.
pub const World = struct {
    flat: u32,
    /// Two blocks of `first` have left the tail, two rows are committed there; `second` has 2 pending ones.
    tiered: u32,
    first: u32,
    second: u32,
    /// On `blocks`, of small blocks.
    small: u32,
    small_first: u32,
    small_second: u32,
    blocks: u32,
    buffer_source: u32,
    buffer: u32,

    pub fn init() World {
        var world: World = undefined;
        world.flat = live(contiguous.create(bytes(&flat_options), size(&flat_options)));
        fine(sequences.append(world.flat, 0, 0, bytes(&flat_data), 9 * flat_row, bytes(&flat_data), 9 * flat_row, 0, 0, 0, null, 0));
        fine(sequences.commit(world.flat, 0, 9));
        fine(sequences.append(world.flat, 0, 0, bytes(&flat_data), 2 * flat_row, bytes(&flat_data), 2 * flat_row, 0, 0, 0, null, 0));
        world.tiered = live(paged.create(bytes(&tiered_options), size(&tiered_options), bytes(&tiered_layer), size(&tiered_layer)));
        world.first = live(sequences.create(world.tiered));
        fine(sequences.append(world.first, 0, 0, bytes(&rows_data), 130 * row, bytes(&rows_data), 130 * row, 0, 0, 0, null, 0));
        fine(sequences.commit(world.first, 0, 130));
        world.second = live(sequences.create(world.tiered));
        fine(sequences.append(world.second, 0, 0, bytes(&rows_data), 2 * row, bytes(&rows_data), 2 * row, 0, 0, 0, null, 0));
        world.blocks = live(pool.create(bytes(&pool_options), size(&pool_options)));
        var on_pool = small_options;
        on_pool.pool = world.blocks;
        world.small = live(paged.create(bytes(&on_pool), size(&on_pool), bytes(&small_layer), size(&small_layer)));
        world.small_first = live(sequences.create(world.small));
        fine(sequences.append(world.small_first, 0, 0, bytes(&flat_data), 5 * flat_row, bytes(&flat_data), 5 * flat_row, 0, 0, 0, null, 0));
        fine(sequences.commit(world.small_first, 0, 5));
        world.small_second = live(sequences.fork(world.small_first));
        world.buffer_source = live(buffer_pool.create(bytes(&buffer_pool_options), size(&buffer_pool_options)));
        world.buffer = live(buffer_pool.acquire(world.buffer_source, 100));
        fine(buffers.extend(world.buffer, bytes(&rows_data), 7));
        return world;
    }

    fn fine(result: i32) void {
        if (result < 0) std.debug.panic("refused: {}", .{result});
    }

    /// Some may be gone.
    pub fn deinit(world: World) void {
        _ = contiguous.free(world.flat);
        _ = paged.free(world.tiered);
        _ = paged.free(world.small);
        _ = pool.free(world.blocks);
        _ = buffers.free(world.buffer);
        _ = buffer_pool.free(world.buffer_source);
    }

    /// All rows and lengths, the blocks in use, the policy and the elements of the buffer.
    pub fn digest(world: World) u64 {
        var hasher: std.hash.Wyhash = .init(0);
        const k = testing.allocator.alloc(f32, 140 * row) catch @panic("no memory");
        defer testing.allocator.free(k);
        const v = testing.allocator.alloc(f32, 140 * row) catch @panic("no memory");
        defer testing.allocator.free(v);
        const count: u32 = @intCast(k.len);
        @memset(k, 0);
        @memset(v, 0);
        hashWord(&hasher, sequences.gather(world.flat, 0, 0, 0, all, bytes(k.ptr), count, bytes(v.ptr), count, 0, 0, 0));
        hasher.update(std.mem.sliceAsBytes(k));
        hasher.update(std.mem.sliceAsBytes(v));
        hashWord(&hasher, sequences.seqLen(world.flat, 0));
        for ([_]u32{ world.first, world.second, world.small_first, world.small_second }) |word| {
            @memset(k, 0);
            @memset(v, 0);
            hashWord(&hasher, sequences.gather(word, 0, 0, 0, all, bytes(k.ptr), count, bytes(v.ptr), count, 0, 0, 0));
            hasher.update(std.mem.sliceAsBytes(k));
            hasher.update(std.mem.sliceAsBytes(v));
            hashWord(&hasher, sequences.seqLen(word, 0));
            hashWord(&hasher, sequences.rowCount(word, 0, 0));
        }
        for ([_]u32{ world.tiered, world.small }) |word| {
            var config = records.empty(paged.PagedRecord);
            var layer = records.empty(paged.LayerRecord);
            hashWord(&hasher, paged.config(word, bytes(&config), size(&config), bytes(&layer), size(&layer)));
            hasher.update(std.mem.asBytes(&config));
            var stats = records.empty(paged.StatsRecord);
            hashWord(&hasher, paged.stats(word, bytes(&stats), size(&stats)));
            hashWord(&hasher, @bitCast(stats.sequence_count));
            hashWord(&hasher, @bitCast(stats.used_blocks));
        }
        hashWord(&hasher, buffers.length(world.buffer));
        return hasher.final();
    }

    fn hashWord(hasher: *std.hash.Wyhash, word: i32) void {
        hasher.update(std.mem.asBytes(&word));
    }
};

/// A call of one export. Where several calls are of one, each is made on its own.
pub const Call = struct {
    /// That of the symbol, without `kv_`.
    name: []const u8,
    make: *const fn (world: World, b: *Buffers) i32,
    /// Frees the handle that the call gave.
    free: ?*const fn (word: u32) callconv(.c) i32 = null,
};

pub fn has(symbol: []const u8) bool {
    for (calls) |call| if (std.mem.eql(u8, call.name, symbol["kv_".len..])) return true;
    return false;
}

/// An attend of 3 queries of 4 heads, with slopes or in a tree.
fn attend(b: *Buffers, cache: u32, words: []const u32, counts: []const u32, q: []const f32, is_tree: bool) i32 {
    const q_count: u32 = @intCast(q.len);
    const given_slopes: ?[*]u8 = if (is_tree) null else b.in(&slopes);
    const parents: ?[*]u8 = if (is_tree) b.in(&chain) else null;
    const word_count: u32 = @intCast(words.len);
    const sequence_words = b.in(words);
    return attention.attend(cache, 0, sequence_words, b.in(counts), word_count, b.in(&causal), size(&causal), b.in(q), q_count, given_slopes, if (is_tree) 0 else 4, b.in(&slopes), 4, parents, if (is_tree) 3 else 0, b.out(4 * q_count), q_count, b.out(48), 12);
}

const flat_queries = numbers(3 * 4 * flat_dim);
const queries = numbers(3 * 4 * dim);
const slopes = [_]f32{ 0.1, 0.2, 0.3, 0.4 };
const chain = [_]i32{ -1, 0, 1 };
const record_rows = numbers(64);
const block_rows = numbers(block_size * dim);
const plane_bytes = block_size * dim + 2 * block_size;

pub const calls = library_calls ++ attend_calls ++ quantization_calls ++ contiguous_calls ++ pool_calls ++ paged_calls ++ sequence_calls ++ buffer_calls;

const library_calls = [_]Call{
    .{ .name = "abi_version", .make = struct {
        fn make(_: World, _: *Buffers) i32 {
            return library.version();
        }
    }.make },
    .{ .name = "system_info", .make = struct {
        fn make(_: World, b: *Buffers) i32 {
            return library.systemInfo(b.record(library.SystemRecord), @sizeOf(library.SystemRecord));
        }
    }.make },
    .{ .name = "level_set", .make = struct {
        fn make(_: World, _: *Buffers) i32 {
            return library.levelSet(0);
        }
    }.make },
    .{ .name = "max_bytes_set", .make = struct {
        fn make(_: World, _: *Buffers) i32 {
            return library.maxBytesSet(0);
        }
    }.make },
    .{ .name = "reserved_mib", .make = struct {
        fn make(_: World, _: *Buffers) i32 {
            return library.reservedMib();
        }
    }.make },
    .{ .name = "thread_count_set", .make = struct {
        fn make(_: World, _: *Buffers) i32 {
            return library.threadCountSet(@import("../device/workers.zig").threadCount());
        }
    }.make },
    .{ .name = "read_rate", .make = struct {
        fn make(_: World, b: *Buffers) i32 {
            return library.readRate(4096, 1, b.out(8), 1);
        }
    }.make },
    .{ .name = "memory_bytes", .make = struct {
        fn make(_: World, b: *Buffers) i32 {
            return contiguous.memoryBytes(b.in(&flat_options), size(&flat_options), b.out(8), 1);
        }
    }.make },
};

const attend_calls = [_]Call{
    .{ .name = "attend", .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            for ([_]i32{
                attend(b, world.tiered, &.{ world.first, world.second }, &.{ 2, 1 }, &queries, false),
                attend(b, world.tiered, &.{world.first}, &.{3}, &queries, false),
                attend(b, world.small, &.{world.small_first}, &.{3}, &flat_queries, true),
                attend(b, world.flat, &.{0}, &.{3}, &flat_queries, false),
                attend(b, world.flat, &.{0}, &.{3}, &flat_queries, true),
            }) |result| if (result < 0) return result;
            return 0;
        }
    }.make },
};

const quantization_calls = [_]Call{
    .{ .name = "rows_quantize", .make = struct {
        fn make(_: World, b: *Buffers) i32 {
            return quantization.rowsQuantize(3, b.in(&record_rows), 64, b.out(68), 68);
        }
    }.make },
    .{ .name = "rows_dequantize", .make = struct {
        fn make(_: World, b: *Buffers) i32 {
            return quantization.rowsDequantize(3, b.out(68), 68, b.out(256), 64);
        }
    }.make },
    .{ .name = "block_quantize", .make = struct {
        fn make(_: World, b: *Buffers) i32 {
            for ([_]u32{ 3, 4, 5, 6, 7 }) |dtype| for ([_]u32{ 0, 1 }) |side| {
                const plane: group.Plane = .{ .dtype = @enumFromInt(dtype), .side = @enumFromInt(side), .block_size = block_size, .head_dim = dim };
                const result = quantization.blockQuantize(dtype, side, block_size, dim, b.in(&block_rows), block_rows.len, b.out(plane.bytes()), plane.bytes());
                if (result < 0) return result;
                const back = quantization.blockDequantize(dtype, side, block_size, dim, b.out(plane.bytes()), plane.bytes(), b.out(4 * block_rows.len), block_rows.len);
                if (back < 0) return back;
            };
            return 0;
        }
    }.make },
    .{ .name = "block_dequantize", .make = struct {
        fn make(_: World, b: *Buffers) i32 {
            return quantization.blockDequantize(3, 0, block_size, dim, b.out(plane_bytes), plane_bytes, b.out(4 * block_rows.len), block_rows.len);
        }
    }.make },
    .{ .name = "block_pack", .make = struct {
        fn make(_: World, b: *Buffers) i32 {
            return quantization.blockPack(3, 0, block_size, dim, b.out(plane_bytes), plane_bytes, b.out(plane_bytes), plane_bytes);
        }
    }.make },
    .{ .name = "block_unpack", .make = struct {
        fn make(_: World, b: *Buffers) i32 {
            return quantization.blockUnpack(3, 0, block_size, dim, b.out(plane_bytes), plane_bytes, b.out(plane_bytes), plane_bytes);
        }
    }.make },
};

const contiguous_calls = [_]Call{
    .{ .name = "contiguous_create", .free = contiguous.free, .make = struct {
        fn make(_: World, b: *Buffers) i32 {
            return contiguous.create(b.in(&flat_options), size(&flat_options));
        }
    }.make },
    .{ .name = "contiguous_free", .make = struct {
        fn make(world: World, _: *Buffers) i32 {
            return contiguous.free(world.flat);
        }
    }.make },
    .{ .name = "contiguous_config", .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            return contiguous.config(world.flat, b.record(contiguous.ContiguousRecord), size(&flat_options));
        }
    }.make },
    .{
        .name = "contiguous_store",
        .make = struct {
            fn make(world: World, b: *Buffers) i32 {
                const data = flat_data[0..flat_row];
                const result = sequences.truncate(world.flat, 0, 9); // a store and pending rows exclude each other
                if (result < 0) return result;
                return contiguous.store(world.flat, 0, 0, b.in(data), flat_row, b.in(data), flat_row, 0);
            }
        }.make,
    },
    .{ .name = "contiguous_advance", .make = struct {
        fn make(world: World, _: *Buffers) i32 {
            const result = sequences.truncate(world.flat, 0, 9);
            if (result < 0) return result;
            const data = flat_data[0..flat_row];
            const stored = contiguous.store(world.flat, 0, 0, bytes(data), flat_row, bytes(data), flat_row, 0);
            return if (stored < 0) stored else contiguous.advance(world.flat);
        }
    }.make },
    .{ .name = "contiguous_reset", .make = struct {
        fn make(world: World, _: *Buffers) i32 {
            return contiguous.reset(world.flat);
        }
    }.make },
    .{ .name = "contiguous_memory_bytes", .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            return contiguous.cacheMemoryBytes(world.flat, b.out(8), 1);
        }
    }.make },
    .{ .name = "contiguous_stats", .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            return contiguous.stats(world.flat, b.record(contiguous.StatsRecord), @sizeOf(contiguous.StatsRecord));
        }
    }.make },
    .{ .name = "contiguous_offset", .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            return contiguous.offset(world.flat, 0, 0, 1, 1, 1, b.out(8), 1);
        }
    }.make },
};

const pool_calls = [_]Call{
    .{ .name = "pool_create", .free = pool.free, .make = struct {
        fn make(_: World, b: *Buffers) i32 {
            return pool.create(b.in(&pool_options), size(&pool_options));
        }
    }.make },
    .{ .name = "pool_free", .make = struct {
        fn make(world: World, _: *Buffers) i32 {
            return pool.free(world.blocks);
        }
    }.make },
    .{ .name = "pool_prewarm", .make = struct {
        fn make(world: World, _: *Buffers) i32 {
            return pool.prewarm(world.blocks, 8, 0, 0);
        }
    }.make },
    .{ .name = "pool_stats", .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            return pool.stats(world.blocks, 0, 0, b.record(pool.StatsRecord), @sizeOf(pool.StatsRecord));
        }
    }.make },
};

const paged_calls = [_]Call{
    .{ .name = "paged_create", .free = paged.free, .make = struct {
        fn make(_: World, b: *Buffers) i32 {
            return paged.create(b.in(&tiered_options), size(&tiered_options), b.in(&tiered_layer), size(&tiered_layer));
        }
    }.make },
    .{ .name = "paged_free", .make = struct {
        fn make(world: World, _: *Buffers) i32 {
            return paged.free(world.tiered);
        }
    }.make },
    .{ .name = "paged_config", .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            return paged.config(world.tiered, b.record(paged.PagedRecord), size(&tiered_options), b.record(paged.LayerRecord), size(&tiered_layer));
        }
    }.make },
    .{
        .name = "paged_append",
        .make = struct {
            fn make(world: World, b: *Buffers) i32 {
                // The first turns a migrated block back, the other needs blocks of its own.
                const words = [_]u32{ world.first, world.second };
                const counts = [_]u32{ 1, 70 };
                const data = rows_data[0 .. 71 * row];
                const result = paged.append(world.tiered, 0, b.in(&words), b.in(&counts), 2, b.in(data), data.len, b.in(data), data.len, 0, 0, 0);
                return result;
            }
        }.make,
    },
    .{ .name = "paged_reorder", .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            const words = [_]u32{ world.small_first, world.small_second };
            return paged.reorder(world.small, b.in(&words), b.in(&[_]u32{ 1, 0 }), 2);
        }
    }.make },
    .{ .name = "paged_reset", .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            return paged.reset(world.small, b.in(&[_]u32{world.small_first}), 1);
        }
    }.make },
    .{ .name = "paged_update_policy", .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            return paged.updatePolicy(world.tiered, b.in(&policy_options), size(&policy_options));
        }
    }.make },
    .{ .name = "paged_fidelity", .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            return paged.fidelity(world.tiered, 0, b.record(paged.HeadFidelityRecord), @sizeOf(paged.HeadFidelityRecord));
        }
    }.make },
    .{ .name = "paged_stats", .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            return paged.stats(world.tiered, b.record(paged.StatsRecord), @sizeOf(paged.StatsRecord));
        }
    }.make },
    .{ .name = "paged_prefix_stats", .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            return prompts.prefixStats(world.tiered, b.record(prompts.PrefixStatsRecord), @sizeOf(prompts.PrefixStatsRecord));
        }
    }.make },
    .{ .name = "paged_pending_prefix", .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            return prompts.pendingPrefix(world.tiered, b.in(&prompt), prompt.len, 1, b.in("salt"), 4, b.in("model"), 5);
        }
    }.make },
    .{ .name = "paged_events", .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            return prompts.events(world.tiered, b.in(&prompt), prompt.len);
        }
    }.make },
    .{ .name = "paged_explain", .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            const out = b.record(prompts.ExplanationRecord);
            return prompts.explain(world.tiered, b.in(&prompt), prompt.len, 0, null, 0, null, 0, out, @sizeOf(prompts.ExplanationRecord));
        }
    }.make },
    .{ .name = "paged_pool_stats", .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            return paged.poolStats(world.tiered, 0, 6, 3, b.record(pool.StatsRecord), @sizeOf(pool.StatsRecord));
        }
    }.make },
};

fn appendHeadMajor(b: *Buffers, word: u32) i32 {
    const data = flat_data[0 .. 3 * flat_row];
    const appended = b.record(sequences.AppendRecord);
    return sequences.append(word, 0, 0, b.in(data), data.len, b.in(data), data.len, f32_word, 1, 0, appended, @sizeOf(sequences.AppendRecord));
}

const prompt = [_]u32{ 1, 2, 3 };

const sequence_calls = [_]Call{
    .{ .name = "sequence_create", .free = sequences.free, .make = struct {
        fn make(world: World, _: *Buffers) i32 {
            return sequences.create(world.tiered);
        }
    }.make },
    .{ .name = "sequence_create_for", .free = sequences.free, .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            return prompts.createSequence(world.tiered, b.in(&prompt), prompt.len, 1, b.in("salt"), 4, b.in("model"), 5);
        }
    }.make },
    .{ .name = "sequence_free", .make = struct {
        fn make(world: World, _: *Buffers) i32 {
            return sequences.free(world.first);
        }
    }.make },
    .{ .name = "sequence_cache", .make = struct {
        fn make(world: World, _: *Buffers) i32 {
            return sequences.cacheOf(world.first);
        }
    }.make },
    .{ .name = "sequence_fork", .free = sequences.free, .make = struct {
        fn make(world: World, _: *Buffers) i32 {
            return sequences.fork(world.first);
        }
    }.make },
    .{
        .name = "sequence_append",
        .make = struct {
            fn make(world: World, b: *Buffers) i32 {
                return appendHeadMajor(b, world.small_second); // to a shared block of an odd shape
            }
        }.make,
    },
    .{ .name = "sequence_append", .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            return appendHeadMajor(b, world.flat);
        }
    }.make },
    .{ .name = "sequence_append", .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            const halves: [flat_row]u16 = @splat(0x3c00);
            return sequences.append(world.flat, 0, 0, b.in(&halves), flat_row, b.in(&halves), flat_row, f16_word, 0, 0, null, 0);
        }
    }.make },
    .{
        .name = "sequence_append",
        .make = struct {
            fn make(world: World, b: *Buffers) i32 {
                // 2 of 9 rows of each head, from the third on.
                const from_third = flat_data[2 * flat_dim .. 8 * flat_row + 4 * flat_dim];
                return sequences.append(
                    world.small_second,
                    0,
                    0,
                    b.in(from_third),
                    from_third.len,
                    b.in(from_third),
                    from_third.len,
                    f32_word,
                    1,
                    9 * flat_dim,
                    null,
                    0,
                );
            }
        }.make,
    },
    .{ .name = "sequence_commit", .make = struct {
        fn make(world: World, _: *Buffers) i32 {
            return sequences.commit(world.second, 0, 2);
        }
    }.make },
    .{ .name = "sequence_commit", .make = struct {
        fn make(world: World, _: *Buffers) i32 {
            return sequences.commit(world.flat, 0, 2);
        }
    }.make },
    .{ .name = "sequence_commit_kept", .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            return sequences.commitKept(world.second, 0, b.in(&[_]u32{1}), 1);
        }
    }.make },
    .{ .name = "sequence_commit_kept", .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            return sequences.commitKept(world.flat, 0, b.in(&[_]u32{1}), 1);
        }
    }.make },
    .{ .name = "sequence_commit_tokens", .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            return sequences.commitTokens(world.second, b.in(&[_]u32{ 5, 6 }), 2, 35, 1000);
        }
    }.make },
    .{ .name = "sequence_commit_kept_tokens", .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            return sequences.commitKeptTokens(world.second, b.in(&[_]u32{1}), 1, b.in(&[_]u32{6}), 1, 35, 1000);
        }
    }.make },
    .{ .name = "sequence_explain", .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            const out = b.record(prompts.ExplanationRecord);
            return prompts.explainTo(world.first, b.in(&prompt), prompt.len, out, @sizeOf(prompts.ExplanationRecord));
        }
    }.make },
    .{ .name = "sequence_truncate", .make = struct {
        fn make(world: World, _: *Buffers) i32 {
            return sequences.truncate(world.first, 0, 100);
        }
    }.make },
    .{ .name = "sequence_truncate", .make = struct {
        fn make(world: World, _: *Buffers) i32 {
            return sequences.truncate(world.flat, 0, 3);
        }
    }.make },
    .{ .name = "sequence_rewindable_to", .make = struct {
        fn make(world: World, _: *Buffers) i32 {
            return sequences.rewindableTo(world.first, 0);
        }
    }.make },
    .{ .name = "sequence_rewindable_to", .make = struct {
        fn make(world: World, _: *Buffers) i32 {
            return sequences.rewindableTo(world.flat, 0);
        }
    }.make },
    .{ .name = "sequence_seq_len", .make = struct {
        fn make(world: World, _: *Buffers) i32 {
            return sequences.seqLen(world.first, 0);
        }
    }.make },
    .{ .name = "sequence_seq_len", .make = struct {
        fn make(world: World, _: *Buffers) i32 {
            return sequences.seqLen(world.flat, 0);
        }
    }.make },
    .{ .name = "sequence_row_count", .make = struct {
        fn make(world: World, _: *Buffers) i32 {
            return sequences.rowCount(world.first, 0, 0);
        }
    }.make },
    .{ .name = "sequence_row_count", .make = struct {
        fn make(world: World, _: *Buffers) i32 {
            return sequences.rowCount(world.flat, 0, 0);
        }
    }.make },
    .{ .name = "sequence_resident_count", .make = struct {
        fn make(world: World, _: *Buffers) i32 {
            return sequences.residentCount(world.first, 0, 0);
        }
    }.make },
    .{ .name = "sequence_resident_count", .make = struct {
        fn make(world: World, _: *Buffers) i32 {
            return sequences.residentCount(world.flat, 0, 0);
        }
    }.make },
    .{ .name = "sequence_generation", .make = struct {
        fn make(world: World, _: *Buffers) i32 {
            return sequences.generation(world.first, 0, 0);
        }
    }.make },
    .{ .name = "sequence_generation", .make = struct {
        fn make(world: World, _: *Buffers) i32 {
            return sequences.generation(world.flat, 0, 0);
        }
    }.make },
    .{ .name = "sequence_views", .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            return sequences.views(world.first, 0, 0, 0, 0, b.record(sequences.ViewRecord), @sizeOf(sequences.ViewRecord));
        }
    }.make },
    .{ .name = "sequence_views", .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            return sequences.views(world.flat, 0, 0, 0, 0, b.record(sequences.ViewRecord), @sizeOf(sequences.ViewRecord));
        }
    }.make },
    .{ .name = "sequence_contiguous_kv", .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            return sequences.contiguousKv(world.first, 0, 0, 5, b.record(sequences.ViewRecord), @sizeOf(sequences.ViewRecord));
        }
    }.make },
    .{ .name = "sequence_contiguous_kv", .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            return sequences.contiguousKv(world.flat, 0, 0, 5, b.record(sequences.ViewRecord), @sizeOf(sequences.ViewRecord));
        }
    }.make },
    .{ .name = "sequence_gather", .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            const count = 130 * row;
            const result = sequences.gather(world.first, 0, 0, 0, all, b.out(4 * count), count, b.out(4 * count), count, f32_word, 0, 0);
            if (result < 0) return result;
            const odd = 5 * flat_row;
            const gathered = sequences.gather(world.small_first, 0, 0, 0, all, b.out(2 * odd), odd, b.out(2 * odd), odd, bf16_word, 0, 0);
            if (gathered < 0) return gathered;
            const flat = 11 * flat_row;
            const copied = sequences.gather(world.flat, 0, 0, 0, all, b.out(4 * flat), flat, b.out(4 * flat), flat, f32_word, 0, 0);
            if (copied < 0) return copied;
            return sequences.gather(world.flat, 0, 0, 0, all, b.out(2 * flat), flat, b.out(2 * flat), flat, f16_word, 0, 0);
        }
    }.make },
    .{
        .name = "sequence_gather",
        .make = struct {
            fn make(world: World, b: *Buffers) i32 {
                // Head-major: rows of three blocks, two of them in codes; then rows 2 to 4 of two heads that are 7 rows apart.
                const count = 100 * row;
                const stored = sequences.gather(world.first, 0, 0, 29, 100, b.out(2 * count), count, b.out(2 * count), count, f16_word, 1, 0);
                if (stored < 0) return stored;
                const apart = 7 * flat_dim + 3 * flat_dim;
                for ([_]u32{ world.flat, world.small_first }) |sequence| {
                    const gathered = sequences.gather(sequence, 0, 0, 2, 3, b.out(4 * apart), apart, b.out(4 * apart), apart, f32_word, 1, 7 * flat_dim);
                    if (gathered < 0) return gathered;
                }
                return 0;
            }
        }.make,
    },
    .{ .name = "sequence_layer_device", .make = struct {
        fn make(world: World, _: *Buffers) i32 {
            return sequences.layerDevice(world.first, 0, 0);
        }
    }.make },
    .{ .name = "sequence_layer_device", .make = struct {
        fn make(world: World, _: *Buffers) i32 {
            return sequences.layerDevice(world.flat, 0, 0);
        }
    }.make },
    .{ .name = "sequence_block_table", .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            return sequences.blockTable(world.first, 0, b.out(12), 3);
        }
    }.make },
    .{ .name = "sequence_block_references", .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            return sequences.blockReferences(world.first, 0, b.out(12), 3);
        }
    }.make },
    .{ .name = "sequence_block_tiers", .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            return sequences.blockTiers(world.first, 0, b.out(12), 3);
        }
    }.make },
};

const buffer_calls = [_]Call{
    .{ .name = "buffer_pool_create", .free = buffer_pool.free, .make = struct {
        fn make(_: World, b: *Buffers) i32 {
            return buffer_pool.create(b.in(&buffer_pool_options), size(&buffer_pool_options));
        }
    }.make },
    .{ .name = "buffer_pool_free", .make = struct {
        fn make(world: World, _: *Buffers) i32 {
            return buffer_pool.free(world.buffer_source);
        }
    }.make },
    .{ .name = "buffer_pool_prewarm", .make = struct {
        fn make(world: World, _: *Buffers) i32 {
            return buffer_pool.prewarm(world.buffer_source, 4096, 2);
        }
    }.make },
    .{ .name = "buffer_pool_prewarm_all", .make = struct {
        fn make(world: World, _: *Buffers) i32 {
            return buffer_pool.prewarmAll(world.buffer_source, 1);
        }
    }.make },
    .{ .name = "buffer_pool_clear", .make = struct {
        fn make(world: World, _: *Buffers) i32 {
            return buffer_pool.clear(world.buffer_source);
        }
    }.make },
    .{ .name = "buffer_pool_stats", .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            return buffer_pool.stats(world.buffer_source, b.record(buffer_pool.BufferPoolStatsRecord), @sizeOf(buffer_pool.BufferPoolStatsRecord));
        }
    }.make },
    .{ .name = "buffer_acquire", .free = buffers.free, .make = struct {
        fn make(world: World, _: *Buffers) i32 {
            return buffer_pool.acquire(world.buffer_source, 5000);
        }
    }.make },
    .{ .name = "buffer_free", .make = struct {
        fn make(world: World, _: *Buffers) i32 {
            return buffers.free(world.buffer);
        }
    }.make },
    .{ .name = "buffer_clone", .free = buffers.free, .make = struct {
        fn make(world: World, _: *Buffers) i32 {
            return buffers.clone(world.buffer);
        }
    }.make },
    .{ .name = "buffer_info", .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            return buffers.info(world.buffer, b.record(buffers.BufferRecord), @sizeOf(buffers.BufferRecord));
        }
    }.make },
    .{ .name = "buffer_length", .make = struct {
        fn make(world: World, _: *Buffers) i32 {
            return buffers.length(world.buffer);
        }
    }.make },
    .{ .name = "buffer_extend", .make = struct {
        fn make(world: World, b: *Buffers) i32 {
            return buffers.extend(world.buffer, b.in(rows_data[0..11]), 11);
        }
    }.make },
    .{ .name = "buffer_clear", .make = struct {
        fn make(world: World, _: *Buffers) i32 {
            return buffers.clear(world.buffer);
        }
    }.make },
};
