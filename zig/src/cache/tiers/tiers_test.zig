//! Tests of tiers: when blocks migrate, what is left when they cannot, and attention over tail and store together.

const std = @import("std");
const testing = std.testing;
const attention = @import("../../attention/attend.zig");
const BlockPool = @import("../blocks/pool.zig").BlockPool;
const dispatch = @import("../../kernels/dispatch.zig");
const Dtype = @import("../../dtype.zig").Dtype;
const paged = @import("../paged/cache.zig");
const PagedCache = paged.PagedCache;
const Sequence = paged.Sequence;
const reference = @import("../../kernels/reference/attention.zig");
const slab_memory = @import("../../device/slab.zig");
const workers = @import("../../device/workers.zig");

const memcheck = @import("build_options").memcheck;
const all_dtypes = std.enums.values(Dtype);

/// One layer of 2 heads of 32, an f32 tail of `tail_tokens`, and a store.
fn tiered(tail_tokens: u32, store: paged.Store) paged.Options {
    return .{
        .layers = &.{.{ .kv_head_count = 2, .head_dim = 32 }},
        .max_seq_len = 4096,
        .dtype_k = .f32,
        .dtype_v = .f32,
        .policy = .{ .kind = .tiered, .store = store, .tail_tokens = tail_tokens },
    };
}

const q4: paged.Store = .{ .dtype_k = .q4_0, .dtype_v = .q4_0 };
const q8: paged.Store = .{ .dtype_k = .q8_0, .dtype_v = .q8_0 };
const row_elements = 64;

/// Deterministic rows: element `i` of the row at `position`, with an outlier channel.
fn element(position: u32, i: usize) f32 {
    var prng: std.Random.DefaultPrng = .init(position * @as(u64, 1000) + i);
    const x = prng.random().floatNorm(f32);
    return if (i % 32 == 5) 2 * x + 6 else x;
}

fn append(cache: *PagedCache, sequence: *Sequence, count: u32) !void {
    const start = sequence.seqLen();
    for (0..cache.layerCount()) |layer| {
        const kv_dim = (try cache.layerShape(@intCast(layer))).kvDim();
        const rows = try testing.allocator.alloc(f32, count * kv_dim);
        defer testing.allocator.free(rows);
        for (rows, 0..) |*value, i| value.* = element(start + @as(u32, @intCast(i / kv_dim)), i % kv_dim);
        try cache.append(@intCast(layer), &.{sequence}, &.{count}, .fromF32(rows), .fromF32(rows));
    }
}

fn step(cache: *PagedCache, sequence: *Sequence, count: u32) !void {
    try append(cache, sequence, count);
    try sequence.commit(count);
}

/// All rows of layer 0 that are there; the caller frees both.
const Gathered = struct {
    k: []f32,
    v: []f32,

    fn of(sequence: *Sequence) !Gathered {
        const rows = try sequence.rows(0);
        const count = rows.residentCount() * rows.kv_head_count * rows.head_dim;
        const k = try testing.allocator.alloc(f32, count);
        const v = try testing.allocator.alloc(f32, count);
        const resident = try sequence.gather(
            0,
            .{ .bytes = @ptrCast(k.ptr), .element_count = k.len },
            .{ .bytes = @ptrCast(v.ptr), .element_count = v.len },
        );
        try testing.expectEqual(rows.residentCount(), resident);
        return .{ .k = k, .v = v };
    }

    fn deinit(self: Gathered) void {
        testing.allocator.free(self.k);
        testing.allocator.free(self.v);
    }
};

/// Rows in the tail are exact (it is f32), those in the store within a coarse bound of 4 bits.
fn expectRows(sequence: *Sequence, row_count: u32, tail_first: u32) !void {
    const got: Gathered = try .of(sequence);
    defer got.deinit();
    try testing.expectEqual(row_count * row_elements, got.k.len);
    for (got.k, got.v, 0..) |k, v, i| {
        const position: u32 = @intCast(i / row_elements);
        const expected = element(position, i % row_elements);
        const bound: f32 = if (position >= tail_first) 0 else 1.2;
        try testing.expect(@abs(k - expected) <= bound);
        try testing.expect(@abs(v - expected) <= bound);
    }
}

test "a filled tail has tail_tokens to tail_tokens + block_size - 1 rows" {
    for ([_]u32{ 1, 7, 256 }) |at_once| {
        var cache: PagedCache = try .init(testing.allocator, tiered(64, q4));
        defer cache.deinit();
        const sequence = try cache.createSequence();
        while (sequence.seqLen() + at_once <= 256) {
            try step(&cache, sequence, at_once);
            const stats = try cache.stats();
            try testing.expectEqual(sequence.seqLen(), stats.tokenCount());
            if (sequence.seqLen() >= 64) {
                try testing.expect(stats.tail_token_count >= 64 and stats.tail_token_count < 128);
            }
            try testing.expectEqual(0, stats.store_token_count % 64);
        }
        if (at_once == 7) continue;
        const stats = try cache.stats();
        try testing.expectEqual(64, stats.tail_token_count);
        try testing.expectEqual(192, stats.store_token_count);
        try testing.expectEqual(64 * 512, stats.tail_bytes);
        try testing.expectEqual(192 * 72, stats.store_bytes);
        try testing.expectEqual(256 * 512, stats.f32_bytes);
        try expectRows(sequence, 256, 192);
    }
}

test "no room for a migration: the rows stay in the tail, readable, and the next commit tries again" {
    // Four blocks of the tail, of 64 * 512 = 32 KiB, are all there may be: nothing is left for the store.
    var options = tiered(0, q4);
    options.max_bytes = 4 << 15;
    var cache: PagedCache = try .init(testing.allocator, options);
    defer cache.deinit();
    const sequence = try cache.createSequence();
    try step(&cache, sequence, 200);
    try testing.expectEqual(200, (try cache.stats()).tail_token_count);
    try expectRows(sequence, 200, 0);
    try step(&cache, sequence, 1);
    try testing.expectEqual(201, (try cache.stats()).tail_token_count);
    // Room appears: everything that should have gone goes, in order.
    cache.budget.left.store(1 << 20, .monotonic);
    try step(&cache, sequence, 1);
    try testing.expectEqual(202 - 192, (try cache.stats()).tail_token_count);
    try expectRows(sequence, 202, 192);
}

test "an allocation that fails in the middle of anything leaves every row readable" {
    var fail_index: usize = 0;
    while (true) : (fail_index += 1) {
        var failing: testing.FailingAllocator = .init(testing.allocator, .{ .fail_index = fail_index });
        const gpa = failing.allocator();
        var cache: PagedCache = PagedCache.initSlabs(gpa, gpa, tiered(0, q4)) catch |err| {
            try testing.expectEqual(error.OutOfMemory, err);
            continue;
        };
        defer cache.deinit();
        const parent = cache.createSequence() catch continue;
        step(&cache, parent, 130) catch |err| {
            try testing.expectEqual(error.OutOfMemory, err);
            try testing.expectEqual(0, parent.seqLen());
            continue;
        };
        // The commit stands, whether or not blocks could migrate.
        try testing.expectEqual(130, parent.seqLen());
        try expectRows(parent, 130, 128);
        const child = cache.fork(parent) catch continue;
        if (step(&cache, child, 70)) {
            try expectRows(child, 200, 192);
        } else |_| {
            try expectRows(child, 130, 128);
        }
        try expectRows(parent, 130, 128);
        if (!failing.has_induced_failure) break;
    }
    try testing.expect(fail_index > 15);
}

test "truncate into a quantized block: the next append turns its kept rows back into floats, and nobody else's" {
    var cache: PagedCache = try .init(testing.allocator, tiered(0, q8));
    defer cache.deinit();
    const sequence = try cache.createSequence();
    try step(&cache, sequence, 256);
    const other = try cache.fork(sequence);
    const before: Gathered = try .of(sequence);
    defer before.deinit();
    const shared = (try sequence.blockTable(0)).at(1);

    try sequence.truncate(100);
    try testing.expectEqual(.store, sequence.tier(0, 99)); // not a byte was touched
    try append(&cache, sequence, 3);
    try testing.expectEqual(.store, sequence.tier(0, 63));
    try testing.expectEqual(.tail, sequence.tier(0, 64));
    const after: Gathered = try .of(sequence);
    defer after.deinit();
    try testing.expectEqualSlices(f32, before.k[0 .. 100 * row_elements], after.k[0 .. 100 * row_elements]);
    try testing.expectEqual(element(100, 0), after.k[100 * row_elements]);
    try sequence.commit(3);
    try testing.expectEqual(39, (try cache.stats()).tail_token_count);

    // The fork still has what it had.
    try testing.expectEqual(shared, (try other.blockTable(0)).at(1));
    const others: Gathered = try .of(other);
    defer others.deinit();
    try testing.expectEqualSlices(f32, before.k, others.k);
    try testing.expectEqualSlices(f32, before.v, others.v);

    // To a border: nothing is opened, the next rows go to a new block.
    try other.truncate(128);
    try step(&cache, other, 1);
    try testing.expectEqual(.store, other.tier(0, 127));
    try testing.expectEqual(.tail, other.tier(0, 128));
}

test "forks share what migrated before them, and what one of them lets migrate after" {
    var cache: PagedCache = try .init(testing.allocator, tiered(128, q4));
    defer cache.deinit();
    const first = try cache.createSequence();
    try step(&cache, first, 256); // 2 blocks of 64 in the store, 2 in the tail
    const second = try cache.fork(first);
    const third = try cache.fork(first);
    try testing.expectEqualDeep(try first.blockTable(0), try second.blockTable(0));
    for ([_]*Sequence{ first, second, third }) |sequence| try step(&cache, sequence, 128);
    for (0..4) |entry| {
        try testing.expectEqual(.store, first.tier(0, @intCast(entry * 64)));
        const block = (try first.blockTable(0)).at(entry);
        try testing.expectEqual(block, (try second.blockTable(0)).at(entry));
        try testing.expectEqual(block, (try third.blockTable(0)).at(entry));
    }
    const format = cache.state.groups[0].pool.find(.q4_0, .q4_0).?;
    try testing.expectEqual(4, format.pool.stats().used_blocks);
    try testing.expectEqual(3, format.pool.refCount(@intCast((try first.blockTable(0)).at(3))));
    // Their blocks behind the fork are their own.
    try testing.expectEqual(6, cache.state.groups[0].tailPool().stats().used_blocks);
    cache.freeSequence(first);
    cache.freeSequence(third);
    try expectRows(second, 384, 256);
}

/// A sequence whose first block has migrated, and a fork of it that still has that block in floats: what the first became
/// is the fork's, too, as long as all is as it was.
const Twins = struct {
    cache: PagedCache,
    first: *Sequence,
    fork: *Sequence,

    fn init(twins: *Twins) !void {
        twins.cache = try .init(testing.allocator, tiered(64, q4));
        errdefer twins.cache.deinit();
        twins.first = try twins.cache.createSequence();
        try step(&twins.cache, twins.first, 127);
        twins.fork = try twins.cache.fork(twins.first);
        try step(&twins.cache, twins.first, 1);
        try testing.expectEqual(.store, twins.first.tier(0, 0));
        try testing.expectEqual(.tail, twins.fork.tier(0, 0));
    }

    /// A sequence of 192 pending rows of zeros, whose first two blocks are about to migrate.
    fn addStranger(twins: *Twins) !*Sequence {
        const stranger = try twins.cache.createSequence();
        const zeros: [192 * row_elements]f32 = @splat(0);
        try twins.cache.append(0, &.{stranger}, &.{192}, .fromF32(&zeros), .fromF32(&zeros));
        return stranger;
    }

    fn expectZeros(stranger: *Sequence) !void {
        try stranger.commit(192);
        try testing.expectEqual(.store, stranger.tier(0, 64));
        const rows: Gathered = try .of(stranger);
        defer rows.deinit();
        try testing.expect(std.mem.allEqual(f32, rows.k, 0) and std.mem.allEqual(f32, rows.v, 0));
    }

    /// What the migrated rows of the fork must be, whoever made their block.
    fn migrateFork(twins: *Twins) !void {
        try step(&twins.cache, twins.fork, 1);
        try testing.expectEqual(.store, twins.fork.tier(0, 0));
        try expectRows(twins.fork, 128, 64);
    }

    fn blockOf(sequence: *const Sequence, entry: usize) !i32 {
        return (try sequence.blockTable(0)).at(entry);
    }
};

test "a twin that nobody has any more is not taken" {
    var twins: Twins = undefined;
    try twins.init();
    defer twins.cache.deinit();
    const format = twins.cache.state.groups[0].pool.find(.q4_0, .q4_0).?;
    twins.cache.freeSequence(twins.first);
    try testing.expectEqual(0, format.pool.stats().used_blocks);
    try twins.migrateFork();
    try testing.expectEqual(1, format.pool.stats().used_blocks);
    try testing.expectEqual(1, format.pool.refCount(@intCast(try Twins.blockOf(twins.fork, 0))));
}

test "a twin whose block is another sequence's now is not taken" {
    var twins: Twins = undefined;
    try twins.init();
    defer twins.cache.deinit();
    const block = try Twins.blockOf(twins.first, 0);
    twins.cache.freeSequence(twins.first);
    const stranger = try twins.addStranger();
    try Twins.expectZeros(stranger);
    try testing.expectEqual(block, try Twins.blockOf(stranger, 0));
    try twins.migrateFork();
    try testing.expect(try Twins.blockOf(twins.fork, 0) != block);
}

test "a float block that was given back and taken again has no twin" {
    var twins: Twins = undefined;
    try twins.init();
    defer twins.cache.deinit();
    // A block that is taken before it: where the first row of an append lands, twins are forgotten anyway.
    const other = try twins.cache.createSequence();
    try step(&twins.cache, other, 1);
    const block = try Twins.blockOf(twins.fork, 0);
    twins.cache.freeSequence(twins.fork);
    twins.cache.freeSequence(other);
    const stranger = try twins.addStranger();
    try testing.expectEqual(block, try Twins.blockOf(stranger, 1));
    try Twins.expectZeros(stranger);
    try testing.expect(try Twins.blockOf(stranger, 1) != try Twins.blockOf(twins.first, 0));
    try expectRows(twins.first, 128, 64);
}

test "updatePolicy: acts at the next commit, and what is quantized keeps its format" {
    var cache: PagedCache = try .init(testing.allocator, tiered(64, q4));
    defer cache.deinit();
    const sequence = try cache.createSequence();
    try step(&cache, sequence, 192);
    const old = (try sequence.blockTable(0)).at(0);
    const format = cache.state.groups[0].pool.find(.q4_0, .q4_0).?;
    const bytes = try testing.allocator.dupe(u8, format.pool.bytes(@intCast(old)));
    defer testing.allocator.free(bytes);

    // To another store: blocks 0 and 1 are warm from now on, the next ones go to the new one.
    try cache.updatePolicy(.{ .kind = .tiered, .store = .{ .dtype_k = .i8, .dtype_v = .i4 }, .tail_tokens = 0 });
    try testing.expectEqual(.tail, sequence.tier(0, 128));
    try step(&cache, sequence, 64);
    const expected = [_]paged.Tier{ .warm, .warm, .store, .store };
    for (expected, 0..) |tier, entry| try testing.expectEqual(tier, sequence.tier(0, @intCast(entry * 64)));
    const stats = try cache.stats();
    try testing.expectEqual(128, stats.warm_token_count);
    try testing.expectEqual(256, stats.store_token_count);
    try testing.expectEqual(old, (try sequence.blockTable(0)).at(0));
    try testing.expectEqualSlices(u8, bytes, format.pool.bytes(@intCast(old)));

    // Tail-only: nothing more leaves, nothing comes back.
    try cache.updatePolicy(.{});
    try step(&cache, sequence, 300);
    try testing.expectEqual(300, (try cache.stats()).tail_token_count);
    try testing.expectEqualSlices(u8, bytes, format.pool.bytes(@intCast(old)));
    // And back to the first one, whose blocks are its store again.
    try cache.updatePolicy(.{ .kind = .tiered, .store = q4, .tail_tokens = 64 });
    try step(&cache, sequence, 1);
    try testing.expectEqual(.store, sequence.tier(0, 0));
    try testing.expectEqual(.warm, sequence.tier(0, 128));
    try testing.expectEqual(557 - 448, (try cache.stats()).tail_token_count);

    try testing.expectError(error.InvalidConfig, cache.updatePolicy(.{ .kind = .tiered, .store = q4, .tail_tokens = 1 }));
    try testing.expectEqual(64, cache.state.policy.tail_tokens);
}

test "precision sinks: whole blocks that never leave the tail, on top of it" {
    var options = tiered(64, q4);
    options.policy.sink_tokens = 4;
    var cache: PagedCache = try .init(testing.allocator, options);
    defer cache.deinit();
    const sequence = try cache.createSequence();
    try step(&cache, sequence, 320);
    try testing.expectEqual(.tail, sequence.tier(0, 0));
    try testing.expectEqual(.store, sequence.tier(0, 64));
    const stats = try cache.stats();
    try testing.expectEqual(128, stats.tail_token_count); // 64 of the sinks' block, 64 of the tail
    try testing.expectEqual(192, stats.store_token_count);
    try testing.expectEqual(128 * 512, stats.tail_bytes);
}

test "retention over a store: exactly the rows asked for, whole blocks freed, partly kept ones attended" {
    var options = tiered(64, .{ .dtype_k = .i4, .dtype_v = .q8_0 });
    options.retention = .{ .tokens = 200, .sink_tokens = 3 };
    var cache: PagedCache = try .init(testing.allocator, options);
    defer cache.deinit();
    const sequence = try cache.createSequence();
    while (sequence.seqLen() < 700) {
        try step(&cache, sequence, 1);
        try testing.expectEqual(@min(200, sequence.seqLen()), (try cache.stats()).tokenCount());
    }
    const kept: Gathered = try .of(sequence);
    defer kept.deinit();
    try testing.expectEqual(200 * row_elements, kept.k.len);
    const rows = try sequence.rows(0);
    try testing.expectEqual(503, rows.first);
    try expectAttention(sequence, 1, 1e-3);
}

test "formats are of a layer group: one layer in 8 bits, one in floats, one as the policy says" {
    var options = tiered(0, q4);
    options.layers = &.{
        .{ .kv_head_count = 2, .head_dim = 32 },
        .{ .kv_head_count = 2, .head_dim = 32, .store = q8 },
        .{ .kv_head_count = 2, .head_dim = 32, .store = .{ .dtype_k = .f32, .dtype_v = .f32 } },
    };
    var cache: PagedCache = try .init(testing.allocator, options);
    defer cache.deinit();
    const sequence = try cache.createSequence();
    try step(&cache, sequence, 128);
    const stored = [_]Dtype{ .q4_0, .q8_0, .f32 };
    for (stored, 0..) |dtype, layer| {
        const rows = try sequence.rows(@intCast(layer));
        try testing.expectEqual(dtype, rows.storage(0).dtype_k);
        try testing.expectEqual(dtype, rows.storage(0).dtype_v);
    }
    const stats = try cache.stats();
    try testing.expectEqual(128 * 512, stats.tail_bytes);
    try testing.expectEqual(128 * (72 + 136), stats.store_bytes);
}

test "what a store could not hold is refused at the append" {
    var cache: PagedCache = try .init(testing.allocator, tiered(64, .{ .dtype_k = .i4, .dtype_v = .q8_0 }));
    defer cache.deinit();
    const sequence = try cache.createSequence();
    var row: [row_elements]f32 = @splat(1);
    const good = row;
    row[3] = 65520;
    try testing.expectError(error.NotFinite, cache.append(0, &.{sequence}, &.{1}, .fromF32(&row), .fromF32(&good)));
    try cache.append(0, &.{sequence}, &.{1}, .fromF32(&good), .fromF32(&row)); // q8_0 holds 65520
    row[3] = 8.4e6;
    try testing.expectError(error.NotFinite, cache.append(0, &.{sequence}, &.{1}, .fromF32(&good), .fromF32(&row)));
    try testing.expectEqual(1, (try sequence.rows(0)).row_count);
}

test "rows of an earlier policy that the store cannot hold stay in the tail" {
    var options = tiered(0, q4);
    options.policy = .{};
    var cache: PagedCache = try .init(testing.allocator, options);
    defer cache.deinit();
    const sequence = try cache.createSequence();
    try step(&cache, sequence, 64);
    var rows: [64 * row_elements]f32 = @splat(1);
    rows[77] = 1e6;
    try cache.append(0, &.{sequence}, &.{64}, .fromF32(&rows), .fromF32(&rows));
    try sequence.commit(64);
    try cache.updatePolicy(.{ .kind = .tiered, .store = q4 });
    try step(&cache, sequence, 64);
    try testing.expectEqual(.store, sequence.tier(0, 0));
    try testing.expectEqual(.tail, sequence.tier(0, 64));
    try testing.expectEqual(.store, sequence.tier(0, 128));
    const got: Gathered = try .of(sequence);
    defer got.deinit();
    try testing.expectEqual(1e6, got.k[64 * row_elements + 77]);
}

test "bad policies and shapes are refused" {
    var options = tiered(64, q4);
    options.block_size = 32;
    try testing.expectError(error.InvalidConfig, PagedCache.init(testing.allocator, options));
    options = tiered(64, q4);
    options.layers = &.{.{ .kv_head_count = 1, .head_dim = 48 }};
    try testing.expectError(error.InvalidConfig, PagedCache.init(testing.allocator, options));
    options = tiered(65, q4);
    try testing.expectError(error.InvalidConfig, PagedCache.init(testing.allocator, options));
    options = tiered(256, q4);
    options.retention = .{ .tokens = 200 };
    try testing.expectError(error.InvalidConfig, PagedCache.init(testing.allocator, options));
    options = tiered(64, q4);
    options.dtype_k = .q8_0; // rows are written in floats
    try testing.expectError(error.InvalidConfig, PagedCache.init(testing.allocator, options));
}

/// Attention over layer 0 against the definition, on the values that are stored.
fn expectAttention(sequence: *Sequence, query_count: u32, tolerance: f64) !void {
    const gpa = testing.allocator;
    const rows = try sequence.rows(0);
    const ratio = 2;
    const q_heads = rows.kv_head_count * ratio;
    const dim = rows.head_dim;
    const stored: Gathered = try .of(sequence);
    defer stored.deinit();
    const resident = rows.residentCount();

    var prng: std.Random.DefaultPrng = .init(query_count);
    const q = try gpa.alloc(f32, query_count * q_heads * dim);
    defer gpa.free(q);
    for (q) |*value| value.* = prng.random().floatNorm(f32);
    const output = try gpa.alloc(f32, q.len);
    defer gpa.free(output);
    const lse = try gpa.alloc(f32, query_count * q_heads);
    defer gpa.free(lse);
    try attention.attend(rows, q, .{ .query_count = query_count }, output, lse);

    const keys = try gpa.alloc(f64, resident * dim);
    defer gpa.free(keys);
    const values = try gpa.alloc(f64, resident * dim);
    defer gpa.free(values);
    const truth = try gpa.alloc(f64, dim);
    defer gpa.free(truth);
    var difference: f64 = 0;
    var magnitude: f64 = 0;
    for (0..q_heads) |head| {
        for (0..resident) |row| for (0..dim) |d| {
            const at = (row * rows.kv_head_count + head / ratio) * dim + d;
            keys[row * dim + d] = stored.k[at];
            values[row * dim + d] = stored.v[at];
        };
        for (0..query_count) |i| {
            const at = (i * q_heads + head) * dim;
            const truth_lse = reference.attend(.{
                .query = q[at..][0..dim],
                .keys = keys,
                .values = values,
                // Rows that retention let go are before all others that a query sees, so that positions may close up.
                .position = @as(i64, resident) - query_count + @as(i64, @intCast(i)),
                .softmax_scale = 1 / @sqrt(@as(f64, @floatFromInt(dim))),
            }, truth);
            for (output[at..][0..dim], truth) |got, expected| {
                difference += @abs(got - expected);
                magnitude += @abs(expected);
            }
            if (!(@abs(lse[i * q_heads + head] - truth_lse) <= tolerance * (1 + @abs(truth_lse)))) return error.Lse;
        }
    }
    if (!(difference / magnitude <= tolerance)) {
        std.debug.print("error {e}\n", .{difference / magnitude});
        return error.OverTolerance;
    }
}

test "attention over tail and store: every K format with every V format, on every level, 1 to 5 queries" {
    const before = dispatch.kernels().level;
    defer dispatch.changeLevel(before) catch unreachable;
    for (std.enums.values(dispatch.Level)) |level| {
        if (dispatch.tableOf(level) == null) continue;
        try dispatch.changeLevel(level);
        for (all_dtypes) |dtype_k| for (all_dtypes) |dtype_v| {
            // Valgrind takes thirty times as long, and has seen all kernels in `kernels/attend/attend_test.zig`.
            if (memcheck and (dtype_k != .i4 or dtype_v != .q8_0)) continue;
            errdefer std.debug.print("{s}: {s} {s}\n", .{ @tagName(level), @tagName(dtype_k), @tagName(dtype_v) });
            var options = tiered(64, .{ .dtype_k = dtype_k, .dtype_v = dtype_v });
            options.block_size = if (dtype_k == dtype_v) 128 else 64;
            options.policy.tail_tokens = 128;
            options.layers = &.{.{ .kv_head_count = 2, .head_dim = 64 }};
            var cache: PagedCache = try .init(testing.allocator, options);
            defer cache.deinit();
            const sequence = try cache.createSequence();
            try step(&cache, sequence, 400);
            for (1..6) |query_count| try expectAttention(sequence, @intCast(query_count), 1e-3);
            // A query that sees a part of a quantized block.
            try sequence.truncate(100);
            try expectAttention(sequence, 3, 1e-3);
        };
    }
}

test "float stores in small blocks: a tile of two formats" {
    var options = tiered(4, .{ .dtype_k = .f16, .dtype_v = .bf16 });
    options.block_size = 4;
    options.policy.sink_tokens = 5;
    options.layers = &.{.{ .kv_head_count = 2, .head_dim = 40 }};
    var cache: PagedCache = try .init(testing.allocator, options);
    defer cache.deinit();
    const sequence = try cache.createSequence();
    try step(&cache, sequence, 75);
    try testing.expectEqual(.store, sequence.tier(0, 8));
    try testing.expectEqual(.tail, sequence.tier(0, 7));
    try expectAttention(sequence, 3, 1e-4);
}

test "store-only keeps no more floats than the rows of a block" {
    var cache: PagedCache = try .init(testing.allocator, tiered(0, q4));
    defer cache.deinit();
    const sequence = try cache.createSequence();
    for (0..300) |_| {
        try step(&cache, sequence, 1);
        const stats = try cache.stats();
        try testing.expectEqual(sequence.seqLen() % 64, stats.tail_token_count);
        try testing.expect(cache.state.groups[0].tailPool().stats().used_blocks <= 1);
    }
}

test "two caches on one set of pools, each with its own store" {
    var pools: BlockPool = try .init(testing.allocator, slab_memory.system, .{
        .layer_count = 1,
        .kv_head_count = 2,
        .head_dim = 32,
        .block_size = 64,
        .dtype_k = .f32,
        .dtype_v = .f32,
    }, 64 << 20);
    defer pools.deinit();
    var options = tiered(0, q4);
    options.pool = &pools;
    var a: PagedCache = try .init(testing.allocator, options);
    defer a.deinit();
    options.policy.store = q8;
    var b: PagedCache = try .init(testing.allocator, options);
    defer b.deinit();
    const in_a = try a.createSequence();
    const in_b = try b.createSequence();
    try step(&a, in_a, 130);
    try step(&b, in_b, 130);
    try expectRows(in_a, 130, 128);
    try expectRows(in_b, 130, 128);
    try testing.expectEqual(2, pools.find(.q4_0, .q4_0).?.pool.stats().used_blocks);
    try testing.expectEqual(2, pools.find(.q8_0, .q8_0).?.pool.stats().used_blocks);
    options.layers = &.{.{ .kv_head_count = 4, .head_dim = 32 }};
    try testing.expectError(error.InvalidConfig, PagedCache.init(testing.allocator, options));
}

/// Rows in which a few channels lie far from the others, as keys of real models do.
fn outliers(random: std.Random, rows: []f32, head_dim: usize) void {
    for (rows, 0..) |*value, i| {
        value.* = random.floatNorm(f32);
        switch (i % head_dim) {
            3, 77 => value.* = 2 * value.* + 12,
            40, 111 => value.* = 2 * value.* - 12,
            else => {},
        }
    }
}

test "fidelity: what is reported is what was done, and no score is off by more than its bound" {
    const gpa = testing.allocator;
    const dim = 128;
    const tokens = 128;
    for (all_dtypes) |dtype| {
        if (dtype.isFloat()) continue;
        errdefer std.debug.print("{s}\n", .{@tagName(dtype)});
        var options = tiered(0, .{ .dtype_k = dtype, .dtype_v = dtype });
        options.layers = &.{.{ .kv_head_count = 1, .head_dim = dim }};
        options.measures_fidelity = true;
        var cache: PagedCache = try .init(gpa, options);
        defer cache.deinit();
        const sequence = try cache.createSequence();
        var prng: std.Random.DefaultPrng = .init(3);
        const rows = try gpa.alloc(f32, tokens * dim);
        defer gpa.free(rows);
        outliers(prng.random(), rows, dim);
        try cache.append(0, &.{sequence}, &.{tokens}, .fromF32(rows), .fromF32(rows));
        try sequence.commit(tokens);

        const stored: Gathered = try .of(sequence);
        defer stored.deinit();
        var error_max: f64 = 0;
        var cosine_sum: f64 = 0;
        for (0..tokens) |t| {
            var dot: f64 = 0;
            var squares: [3]f64 = @splat(0);
            for (rows[t * dim ..][0..dim], stored.k[t * dim ..][0..dim]) |x, y| {
                dot += @as(f64, x) * y;
                squares[0] += @as(f64, x) * x;
                squares[1] += @as(f64, y) * y;
                squares[2] += (@as(f64, x) - y) * (@as(f64, x) - y);
            }
            cosine_sum += dot / @sqrt(squares[0] * squares[1]);
            error_max = @max(error_max, @sqrt(squares[2]));
        }
        const head = (try cache.fidelity(0))[0];
        try testing.expectEqual(tokens, head.keys.row_count);
        try testing.expectApproxEqAbs(error_max, head.keys.error_max, 1e-9);
        try testing.expectApproxEqAbs(cosine_sum / tokens, head.keys.cosineMean(), 1e-9);
        try testing.expect(head.keys.cosine_min <= head.keys.cosineMean() and head.values.error_max > 0);

        // Each query over one key at a time: then the lse is the score.
        var q: [dim]f32 = undefined;
        for (0..8) |i| {
            for (&q) |*value| value.* = prng.random().floatNorm(f32) * @as(f32, @floatFromInt(i + 1));
            var output: [dim]f32 = undefined;
            try attention.attend(try sequence.rows(0), &q, .{ .softmax_scale = 1 }, &output, &.{});
            const bound = (try cache.fidelity(0))[0].logitErrorBound(dim);
            for (0..tokens) |t| {
                var truth: f64 = 0;
                for (q, rows[t * dim ..][0..dim]) |a, b| truth += @as(f64, a) * b;
                // The newest row that a query far before the end sees, and a window of one.
                var lse: [1]f32 = undefined;
                const other = try cache.fork(sequence);
                defer cache.freeSequence(other);
                try other.truncate(@intCast(t + 1));
                try attention.attend(try other.rows(0), &q, .{ .softmax_scale = 1, .window_tokens = 1 }, &output, &lse);
                // f32 arithmetic on top: 2^-20 of the sum of the magnitudes is far more than it makes.
                const slack = 1e-6 * 40 * @as(f64, @floatFromInt(i + 1)) * dim;
                if (!(@abs(lse[0] - truth) <= bound + slack)) return error.PastBound;
            }
        }
    }
}

test "attend: what is recorded is the norm of the queries, whatever takes their place" {
    const gpa = testing.allocator;
    var cache: PagedCache = try .init(gpa, .{
        .layers = &.{ .{ .kv_head_count = 1, .head_dim = 32 }, .{ .kv_head_count = 2, .head_dim = 32 } },
        .max_seq_len = 64,
        .measures_fidelity = true,
    });
    defer cache.deinit();
    const sequence = try cache.createSequence();
    const rows: [64]f32 = @splat(0.001);
    _ = try sequence.append(0, .fromF32(rows[0..32]), .fromF32(rows[0..32]));
    _ = try sequence.append(1, .fromF32(&rows), .fromF32(&rows));
    try sequence.commit(1);
    var q: [64]f32 = @splat(0);
    q[3] = 1000;
    q[32 + 5] = -20;
    try attention.attend(try sequence.rows(1), &q, .{ .softmax_scale = 0.5 }, &q, &.{});
    const heads = try cache.fidelity(1);
    try testing.expectEqual(500, heads[0].query_norm_max);
    try testing.expectEqual(10, heads[1].query_norm_max);
    try testing.expectEqual(0, (try cache.fidelity(0))[0].query_norm_max);
    // Refused queries are not seen.
    q[3] = 3000;
    const refused = attention.attend(try sequence.rows(1), &q, .{ .query_count = 3 }, &q, &.{});
    try testing.expectError(error.InvalidSize, refused);
    try testing.expectEqual(500, heads[0].query_norm_max);
}

test "max_logit_error: keys that 4 bits would harm take 8, and at last floats" {
    const gpa = testing.allocator;
    const dim = 128;
    const rows = try gpa.alloc(f32, 64 * dim);
    defer gpa.free(rows);
    var prng: std.Random.DefaultPrng = .init(4);
    outliers(prng.random(), rows, dim);
    const Case = struct { limit: f32, expected: Dtype };
    // With a query of norm 12 the bounds of these keys are about 5.6 in q4_0, 0.33 in q8_0 and 0 in f32.
    for ([_]Case{
        .{ .limit = 100, .expected = .q4_0 },
        .{ .limit = 1, .expected = .q8_0 },
        .{ .limit = 0.001, .expected = .f32 },
    }) |case| {
        var options = tiered(0, q4);
        options.layers = &.{.{ .kv_head_count = 1, .head_dim = dim }};
        options.measures_fidelity = true;
        options.policy.max_logit_error = case.limit;
        options.policy.query_norm = 12;
        var cache: PagedCache = try .init(gpa, options);
        defer cache.deinit();
        const sequence = try cache.createSequence();
        try cache.append(0, &.{sequence}, &.{64}, .fromF32(rows), .fromF32(rows));
        try sequence.commit(64);
        const storage = (try sequence.rows(0)).storage(0);
        try testing.expectEqual(case.expected, storage.dtype_k);
        try testing.expectEqual(.q4_0, storage.dtype_v);
        try testing.expectEqual(.store, sequence.tier(0, 0));
        try testing.expectEqual(64, (try cache.stats()).store_token_count);
        // What was tried on the way was given back.
        var used: u32 = 0;
        for (cache.state.groups[0].distinctFormats()) |format| used += format.pool.stats().used_blocks;
        try testing.expectEqual(1, used);
    }
    var options = tiered(0, q4);
    options.policy.max_logit_error = 1;
    try testing.expectError(error.InvalidConfig, PagedCache.init(gpa, options));
}

test "migration by several threads stores the same bytes" {
    if (memcheck) return error.SkipZigTest; // one thread at a time runs there
    const gpa = testing.allocator;
    const before = workers.threadCount();
    defer workers.setThreadCount(before) catch unreachable;
    const layer: paged.Layer = .{ .kv_head_count = 8, .head_dim = 64 };
    const tokens = 256; // 4 blocks of 8 layers, 2 sides and 64 * 512 values: enough to be shared out
    const rows = try gpa.alloc(f32, tokens * 512);
    defer gpa.free(rows);
    var prng: std.Random.DefaultPrng = .init(6);
    for (rows) |*value| value.* = prng.random().floatNorm(f32);
    var expected: ?[]u8 = null;
    defer if (expected) |bytes| gpa.free(bytes);
    for ([_]u32{ 1, 2, 5 }) |thread_count| {
        try workers.setThreadCount(thread_count);
        var cache: PagedCache = try .init(gpa, .{
            .layers = &@as([8]paged.Layer, @splat(layer)),
            .max_seq_len = tokens,
            .policy = .{ .kind = .tiered, .store = .{ .dtype_k = .i4, .dtype_v = .q8_0 } },
        });
        defer cache.deinit();
        const sequence = try cache.createSequence();
        for (0..8) |i| try cache.append(@intCast(i), &.{sequence}, &.{tokens}, .fromF32(rows), .fromF32(rows));
        try sequence.commit(tokens);
        try testing.expectEqual(tokens, (try cache.stats()).store_token_count);
        const format = cache.state.groups[0].pool.find(.i4, .q8_0).?;
        var bytes: std.ArrayList(u8) = .empty;
        defer bytes.deinit(gpa);
        const blocks = try sequence.blockTable(0);
        for (0..blocks.len) |entry| {
            const block = blocks.at(entry);
            try bytes.appendSlice(gpa, format.pool.bytes(@intCast(block))[0..@intCast(format.shape.blockBytes())]);
        }
        if (expected) |first| {
            try testing.expectEqualSlices(u8, first, bytes.items);
        } else {
            expected = try bytes.toOwnedSlice(gpa);
        }
    }
}

test "a block that did not fit the store is judged again when a part of it was rewritten" {
    var options = tiered(0, q4);
    options.policy = .{};
    var cache: PagedCache = try .init(testing.allocator, options);
    defer cache.deinit();
    const sequence = try cache.createSequence();
    try step(&cache, sequence, 65);
    const huge: [63 * row_elements]f32 = @splat(1e6);
    try cache.append(0, &.{sequence}, &.{63}, .fromF32(&huge), .fromF32(&huge));
    try sequence.commit(63);
    try cache.updatePolicy(.{ .kind = .tiered, .store = q4 });
    try step(&cache, sequence, 1);
    try testing.expectEqual(.store, sequence.tier(0, 0));
    try testing.expectEqual(.tail, sequence.tier(0, 64));
    try sequence.truncate(65);
    try step(&cache, sequence, 63);
    try testing.expectEqual(.store, sequence.tier(0, 64));
}
