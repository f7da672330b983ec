//! Tests of appending: rows are those that the call was given as it began, wherever they lie and whoever writes them
//! meanwhile, and a call that is refused has changed nothing, whatever it had done by then.

const std = @import("std");
const testing = std.testing;
const Allocator = std.mem.Allocator;
const block_table = @import("../blocks/table.zig");
const Dtype = @import("../../dtype.zig").Dtype;
const paged = @import("cache.zig");
const PagedCache = paged.PagedCache;
const Sequence = paged.Sequence;
const input_types = @import("../input.zig");
const Input = input_types.Input;
const slab_memory = @import("../../device/slab.zig");

const memcheck = @import("build_options").memcheck;
const nan = std.math.nan(f32);

/// An allocator that does something in the middle of a call.
const Meddler = struct {
    child: Allocator,
    act: union(enum) {
        nothing,
        /// Refuses the allocation of that number, counted from 0.
        refuse: usize,
        /// Refuses that one and all that follow.
        refuse_from: usize,
        /// Writes what cannot be stored into a caller's row.
        write: *f32,
    } = .nothing,
    count: usize = 0,
    acted: bool = false,

    fn allocator(meddler: *Meddler) Allocator {
        return .{ .ptr = meddler, .vtable = &.{ .alloc = alloc, .resize = resize, .remap = remap, .free = free } };
    }

    fn alloc(context: *anyopaque, len: usize, alignment: std.mem.Alignment, address: usize) ?[*]u8 {
        const meddler: *Meddler = @ptrCast(@alignCast(context));
        const number = meddler.count;
        meddler.count += 1;
        const acts = switch (meddler.act) {
            .nothing => false,
            .refuse => |refused| number == refused,
            .refuse_from => |first| number >= first,
            .write => true,
        };
        meddler.acted = meddler.acted or acts;
        if (acts) switch (meddler.act) {
            .write => |row| row.* = nan,
            else => return null,
        };
        return meddler.child.rawAlloc(len, alignment, address);
    }

    /// Lists that grow must ask `alloc`.
    fn resize(_: *anyopaque, _: []u8, _: std.mem.Alignment, _: usize, _: usize) bool {
        return false;
    }

    fn remap(context: *anyopaque, memory: []u8, alignment: std.mem.Alignment, len: usize, address: usize) ?[*]u8 {
        const meddler: *Meddler = @ptrCast(@alignCast(context));
        return if (len > memory.len) null else meddler.child.rawRemap(memory, alignment, len, address);
    }

    fn free(context: *anyopaque, memory: []u8, alignment: std.mem.Alignment, address: usize) void {
        const meddler: *Meddler = @ptrCast(@alignCast(context));
        meddler.child.rawFree(memory, alignment, address);
    }
};

/// What becomes of the block in which the next row lands.
const Path = enum { in_place, free_block, mapped, many_mapped, copied, reopened, reopened_shared, batch };

const layer_count = 2;
const row_elements = 64;

/// Two layers of 2 heads of 32, blocks of 64, a tail of 64 rows in f32, all others in 8 bits.
fn tiered(gpa: Allocator) !PagedCache {
    return .initSlabs(gpa, gpa, .{
        .layers = &@as([layer_count]paged.Layer, @splat(.{ .kv_head_count = 2, .head_dim = 32 })),
        .max_seq_len = 8192,
        .dtype_k = .f32,
        .dtype_v = .f32,
        .policy = .{ .kind = .tiered, .store = .{ .dtype_k = .q8_0, .dtype_v = .q8_0 }, .tail_tokens = 64 },
    });
}

fn fillRandom(seed: u64, elements: []f32) void {
    var prng: std.Random.DefaultPrng = .init(seed);
    for (elements) |*element| element.* = prng.random().floatNorm(f32);
}

/// Random rows, the same for both sides, of every layer.
fn extend(cache: *PagedCache, sequence: *Sequence, token_count: u32) !void {
    const rows = try testing.allocator.alloc(f32, token_count * row_elements);
    defer testing.allocator.free(rows);
    fillRandom(sequence.seqLen(), rows);
    for (0..layer_count) |layer| try cache.append(@intCast(layer), &.{sequence}, &.{token_count}, .fromF32(rows), .fromF32(rows));
    try sequence.commit(token_count);
}

/// Sequences, and how many rows of layer 0 each gets in one call.
const Scene = struct {
    sequences: [3]*Sequence = undefined,
    token_counts: [3]u32 = undefined,
    len: usize = 0,

    fn init(cache: *PagedCache, path: Path) !Scene {
        var scene: Scene = .{};
        const first = try cache.createSequence();
        switch (path) {
            .mapped => scene.add(first, 3),
            .many_mapped => scene.add(first, 65 * 64 + 1),
            .in_place => {
                try extend(cache, first, 10);
                scene.add(first, 3);
            },
            .free_block => {
                try extend(cache, first, 64);
                scene.add(first, 3);
            },
            .copied => {
                try extend(cache, first, 10);
                _ = try cache.fork(first);
                scene.add(first, 60); // the rest of the copy, and a new block
            },
            .reopened, .reopened_shared => {
                try extend(cache, first, 192);
                if (path == .reopened_shared) _ = try cache.fork(first);
                try first.truncate(100);
                scene.add(first, 3);
            },
            .batch => {
                // The first has pending rows where the last one, which keeps their block, will write.
                try extend(cache, first, 10);
                const pending: [5 * row_elements]f32 = @splat(7);
                try cache.append(0, &.{first}, &.{5}, .fromF32(&pending), .fromF32(&pending));
                const second = try cache.fork(first);
                const third = try cache.fork(first);
                scene.add(first, 2);
                scene.add(second, 1);
                scene.add(third, 60);
            },
        }
        return scene;
    }

    fn add(scene: *Scene, sequence: *Sequence, token_count: u32) void {
        scene.sequences[scene.len] = sequence;
        scene.token_counts[scene.len] = token_count;
        scene.len += 1;
    }

    fn tokenCount(scene: *const Scene) u32 {
        var sum: u32 = 0;
        for (scene.token_counts[0..scene.len]) |count| sum += count;
        return sum;
    }

    fn append(scene: *const Scene, cache: *PagedCache, k: []const f32, v: []const f32) PagedCache.AppendError!void {
        return cache.append(0, scene.sequences[0..scene.len], scene.token_counts[0..scene.len], .fromF32(k), .fromF32(v));
    }
};

/// All that a call may change, as text; the caller frees it.
fn stateOf(cache: *PagedCache) ![]u8 {
    const gpa = testing.allocator;
    var text: std.ArrayList(u8) = .empty;
    errdefer text.deinit(gpa);
    try text.print(gpa, "budget {d}, evictions {d}\n", .{ cache.budget.left.load(.monotonic), cache.state.evictions });
    for (cache.state.groups) |*group| {
        for (group.formats.items, 0..) |format, index| {
            if (index == block_table.reopened_format) continue;
            const pool = &format.pool;
            try text.print(gpa, "pool {d} {any}\n", .{ index, pool.stats() });
            const words = [_][]const u32{ pool.serials.items, pool.ref_counts.items, pool.free.items };
            for (words) |list| try text.print(gpa, "{d} {x}\n", .{ list.len, hashOf(u32, list) });
            for (0..pool.slabs.end) |slab| if (pool.slabs.at(@intCast(slab)) != null) {
                try text.print(gpa, "slab {d} {d}\n", .{ slab, pool.slabs.freeCount(@intCast(slab)).* });
            };
        }
        try text.print(gpa, "twins {d}\n", .{group.twins.count()});
    }
    for (cache.sequences.items) |sequence| {
        try text.print(gpa, "sequence {d} {any} {any}\n", .{
            sequence.seqLen(), sequence.state.pending, sequence.state.generations,
        });
        for (sequence.state.tables) |table| {
            try text.print(gpa, "blocks {any}\nformats {any}\n", .{ table.blocks.items, table.formats.items });
            try text.print(gpa, "evicted {d} {d}\n", .{ table.evicted_first, table.evicted_count });
            try text.print(gpa, "rows {d} {d} {d}\n", .{ table.sink_end, table.first, table.tail_first });
        }
        for (0..layer_count) |layer| try text.print(gpa, "layer {x}\n", .{try rowsHash(sequence, @intCast(layer))});
    }
    return text.toOwnedSlice(gpa);
}

fn rowsHash(sequence: *Sequence, layer: u32) !u64 {
    const gathered: Gathered = try .of(sequence, layer);
    defer gathered.deinit();
    return hashOf(f32, gathered.elements);
}

fn hashOf(comptime Word: type, words: []const Word) u64 {
    return std.hash.Wyhash.hash(0, std.mem.sliceAsBytes(words));
}

/// The rows of both sides.
const Gathered = struct {
    elements: []f32,

    fn of(sequence: *Sequence, layer: u32) !Gathered {
        const rows = try sequence.rows(layer);
        const count = rows.residentCount() * rows.kv_head_count * rows.head_dim;
        const elements = try testing.allocator.alloc(f32, 2 * count);
        errdefer testing.allocator.free(elements);
        _ = try sequence.gather(
            layer,
            .{ .bytes = @ptrCast(elements.ptr), .element_count = count },
            .{ .bytes = @ptrCast(elements.ptr + count), .element_count = count },
        );
        return .{ .elements = elements };
    }

    fn deinit(gathered: Gathered) void {
        testing.allocator.free(gathered.elements);
    }
};

fn expectState(expected: []const u8, cache: *PagedCache) !void {
    const state = try stateOf(cache);
    defer testing.allocator.free(state);
    try testing.expectEqualStrings(expected, state);
}

/// Nothing that is not finite may stand behind the rows of a block.
fn expectFiniteBlocks(cache: *PagedCache) !void {
    if (memcheck) return; // there bytes that nobody wrote are no zeros, and must not be looked at
    for (cache.sequences.items) |sequence| for (sequence.state.tables, cache.state.groups) |table, group| {
        for (table.blocks.items, table.formats.items) |block, format| {
            if (!block_table.isTail(format)) continue;
            const elements = std.mem.bytesAsSlice(f32, group.tailPool().bytes(@intCast(block)));
            for (elements) |element| try testing.expect(std.math.isFinite(element));
        }
    };
}

test "a row that cannot be stored: whatever had to be made for the others, nothing has changed" {
    for (std.enums.values(Path)) |path| {
        var cache = try tiered(slab_memory.system);
        defer cache.deinit();
        const scene: Scene = try .init(&cache, path);
        const rows = try testing.allocator.alloc(f32, scene.tokenCount() * row_elements);
        defer testing.allocator.free(rows);
        fillRandom(1, rows);
        const bad = try testing.allocator.dupe(f32, rows);
        defer testing.allocator.free(bad);
        const before = try stateOf(&cache);
        defer testing.allocator.free(before);
        for ([_]usize{ 0, rows.len - 1 }) |at| {
            bad[at] = nan;
            for ([_][2][]const f32{ .{ bad, rows }, .{ rows, bad } }) |pair| {
                try testing.expectError(error.NotFinite, scene.append(&cache, pair[0], pair[1]));
                try expectState(before, &cache);
                try expectFiniteBlocks(&cache);
            }
            bad[at] = rows[at];
        }
        // And then it works as if nothing had been tried.
        try scene.append(&cache, rows, rows);
        var twin = try tiered(slab_memory.system);
        defer twin.deinit();
        const twin_scene: Scene = try .init(&twin, path);
        try twin_scene.append(&twin, rows, rows);
        const after = try stateOf(&twin);
        defer testing.allocator.free(after);
        try expectState(after, &cache);
    }
}

test "rows that change while memory is mapped for them are refused, and nothing has changed" {
    for ([_]Path{ .mapped, .many_mapped }) |path| for ([_]bool{ true, false }) |is_key| {
        var meddler: Meddler = .{ .child = slab_memory.system };
        var cache = try tiered(meddler.allocator());
        defer cache.deinit();
        const scene: Scene = try .init(&cache, path);
        const rows = try testing.allocator.alloc(f32, scene.tokenCount() * row_elements);
        defer testing.allocator.free(rows);
        fillRandom(1, rows);
        const changing = try testing.allocator.dupe(f32, rows);
        defer testing.allocator.free(changing);
        const before = try stateOf(&cache);
        defer testing.allocator.free(before);
        meddler.act = .{ .write = &changing[changing.len - 1] };
        const k, const v = if (is_key) .{ changing, rows } else .{ rows, changing };
        try testing.expectError(error.NotFinite, scene.append(&cache, k, v));
        try testing.expect(meddler.acted);
        try expectState(before, &cache);
        meddler.act = .nothing;
        try scene.append(&cache, rows, rows);
    };
}

test "every allocation of an append may fail, alone or with all that follow, and nothing has changed" {
    if (memcheck) return error.SkipZigTest; // slabs of its own are what it watches
    for (std.enums.values(Path)) |path| for ([_]bool{ true, false }) |alone| {
        var number: usize = 0;
        while (true) : (number += 1) {
            var meddler: Meddler = .{ .child = testing.allocator };
            var cache = try tiered(meddler.allocator());
            defer cache.deinit();
            const scene: Scene = try .init(&cache, path);
            const rows = try testing.allocator.alloc(f32, scene.tokenCount() * row_elements);
            defer testing.allocator.free(rows);
            fillRandom(1, rows);
            const before = try stateOf(&cache);
            defer testing.allocator.free(before);
            meddler.count = 0;
            meddler.act = if (alone) .{ .refuse = number } else .{ .refuse_from = number };
            if (scene.append(&cache, rows, rows)) {
                try testing.expect(!meddler.acted);
                break;
            } else |err| try testing.expectEqual(error.OutOfMemory, err);
            meddler.act = .nothing;
            try expectState(before, &cache);
            try scene.append(&cache, rows, rows);
        }
        // Tables, where they grow; those of the pool and a slab for each that is mapped, and a list of blocks.
        const least: usize = switch (path) {
            .mapped => 7,
            .many_mapped => 9,
            else => 0,
        };
        try testing.expect(number >= least);
    };
}

/// A small cache in blocks of 4 whose store is f16: codes would need blocks of 64.
fn small(dtype: Dtype) !PagedCache {
    return .init(testing.allocator, .{
        .layers = &@as([2]paged.Layer, @splat(.{ .kv_head_count = 2, .head_dim = 4 })),
        .block_size = 4,
        .max_seq_len = 64,
        .dtype_k = dtype,
        .dtype_v = dtype,
        .policy = .{ .kind = .tiered, .store = .{ .dtype_k = .f16, .dtype_v = .bf16 }, .tail_tokens = 8 },
    });
}

/// One of 3 sequences of 18 rows, of which some share blocks, and some were rewound into the tail or into the store.
fn smallScene(cache: *PagedCache, variant: u32) !Scene {
    var scene: Scene = .{};
    const first = try cache.createSequence();
    var rows: [18 * 8]f32 = undefined;
    fillRandom(variant, &rows);
    for (0..2) |layer| try cache.append(@intCast(layer), &.{first}, &.{18}, .fromF32(&rows), .fromF32(&rows));
    try first.commit(18);
    const second = if (variant % 2 == 0) try cache.fork(first) else first;
    try first.truncate(([_]u32{ 18, 17, 13, 6, 2 })[variant % 5]);
    scene.add(first, 1 + variant % 7);
    if (second != first) scene.add(second, 1 + variant % 3);
    return scene;
}

/// Rows for a call somewhere in a block of its first sequence, in the one they go to more often than in others; and the same
/// rows in `buffer`.
fn rowsInside(scene: Scene, random: std.Random, buffer: []u8) ?[2]Input {
    const sequence = scene.sequences[0];
    const formats = sequence.cache.state.groups[0].formats.items;
    const table = &sequence.state.tables[0];
    const last = table.count() - 1;
    const entry = if (random.boolean()) last else random.uintAtMost(u32, last);
    const memory = formats[table.format(entry)].pool.bytes(@intCast(table.block(entry)));
    const dtype = random.enumValue(enum { f32, f16, bf16 });
    const inside: Input = .{
        .bytes = undefined,
        .element_count = scene.tokenCount() * 8,
        .dtype = std.meta.stringToEnum(Dtype, @tagName(dtype)).?,
        .layout = random.enumValue(input_types.Layout),
    };
    const byte_count: usize = @intCast(inside.element_count * inside.dtype.elementBytes());
    if (byte_count > memory.len) return null;
    const at = random.uintAtMost(usize, memory.len - byte_count);
    var pair: [2]Input = @splat(inside);
    pair[0].bytes = memory.ptr + at;
    pair[1].bytes = buffer.ptr;
    @memcpy(buffer[0..byte_count], memory[at..][0..byte_count]);
    return pair;
}

test "rows that lie in the cache's own memory are those that were there as the call began" {
    if (memcheck) return error.SkipZigTest; // reads holes of blocks
    var prng: std.Random.DefaultPrng = .init(12);
    const random = prng.random();
    var done: u32 = 0;
    for ([_]Dtype{ .f32, .f16, .bf16 }) |dtype| {
        var caches: [2]PagedCache = .{ try small(dtype), try small(dtype) };
        defer for (&caches) |*cache| cache.deinit();
        // Memory that stays mapped: a block that is given back is not gone, but poisoned.
        for (&caches) |*cache| for (cache.state.groups[0].formats.items) |format| try format.pool.prewarm(1);
        for (0..420) |variant| {
            var scenes: [2]Scene = undefined;
            for (&scenes, &caches) |*scene, *cache| scene.* = try smallScene(cache, @intCast(variant));
            var buffers: [2][2048]u8 = undefined;
            const k = rowsInside(scenes[0], random, &buffers[0]) orelse continue;
            var v = rowsInside(scenes[0], random, &buffers[1]) orelse continue;
            if (v[0].dtype != k[0].dtype) v = k;
            const counts = scenes[0].token_counts[0..scenes[0].len];
            const outcome = caches[0].append(1, scenes[0].sequences[0..counts.len], counts, k[0], v[0]);
            const expected = caches[1].append(1, scenes[1].sequences[0..counts.len], counts, k[1], v[1]);
            try testing.expectEqual(expected, outcome);
            if (outcome) done += 1 else |_| {}
            const state = try stateOf(&caches[1]);
            defer testing.allocator.free(state);
            try expectState(state, &caches[0]);
            for (&caches) |*cache| while (cache.sequences.items.len != 0) cache.freeSequence(cache.sequences.items[0]);
        }
    }
    try testing.expect(done > 300); // of the others some bits are those of no number
}

test "rows in a stored block that goes with the call are read before its memory does" {
    var options: paged.Options = .{
        .layers = &.{.{ .kv_head_count = 1, .head_dim = 32 }},
        .max_seq_len = 256,
        .policy = .{ .kind = .tiered, .store = .{ .dtype_k = .bf16, .dtype_v = .bf16 } },
    };
    for ([_]u32{ 64, 128 }) |row_count| {
        options.dtype_k = if (row_count == 64) .f16 else .f32;
        var cache: PagedCache = try .init(testing.allocator, options);
        defer cache.deinit();
        const sequence = try cache.createSequence();
        var rows: [128 * 32]f32 = undefined;
        fillRandom(3, &rows);
        const given: Input = .fromF32(rows[0 .. row_count * 32]);
        try cache.append(0, &.{sequence}, &.{row_count}, given, given);
        try sequence.commit(row_count);
        const before: Gathered = try .of(sequence, 0);
        defer before.deinit();
        const cut = row_count - 24;
        try sequence.truncate(cut);
        // The only block of its format: once it is given back, its slab is unmapped.
        const run = (try sequence.rows(0)).run(0, cut - 1, cut);
        const k: Input = .{ .bytes = run.keys + 64, .element_count = 24 * 32, .dtype = .bf16 };
        const v: Input = .{ .bytes = run.values + 64, .element_count = 24 * 32, .dtype = .bf16 };
        try cache.append(0, &.{sequence}, &.{24}, k, v);
        try sequence.commit(24);
        const after: Gathered = try .of(sequence, 0);
        defer after.deinit();
        try testing.expectEqualSlices(f32, before.elements, after.elements);
    }
}

/// Makes some elements NaN and numbers in turn until it is told to stop.
const Scribbler = struct {
    elements: []f32,
    stop: std.atomic.Value(bool) = .init(false),
    thread: std.Thread = undefined,

    fn start(scribbler: *Scribbler) !void {
        scribbler.thread = try .spawn(.{}, run, .{scribbler});
    }

    fn run(scribbler: *Scribbler) void {
        var value: f32 = 1;
        while (!scribbler.stop.load(.monotonic)) {
            for (scribbler.elements) |*element| @as(*volatile f32, element).* = value;
            value = if (value == 1) nan else 1;
        }
    }

    fn end(scribbler: *Scribbler) void {
        scribbler.stop.store(true, .monotonic);
        scribbler.thread.join();
    }
};

test "rows that another thread writes are refused or stored as numbers, on every path" {
    const rows = try testing.allocator.alloc(f32, 70 * row_elements);
    defer testing.allocator.free(rows);
    @memset(rows, 1);
    var scribbler: Scribbler = .{ .elements = rows };
    try scribbler.start();
    defer scribbler.end();
    for ([_]Path{ .in_place, .free_block, .mapped, .copied, .reopened, .reopened_shared, .batch }) |path| {
        for (0..30) |_| {
            var cache = try tiered(slab_memory.system);
            defer cache.deinit();
            const scene: Scene = try .init(&cache, path);
            const given = rows[0 .. scene.tokenCount() * row_elements];
            const before = try stateOf(&cache);
            defer testing.allocator.free(before);
            if (scene.append(&cache, given, given)) {} else |err| {
                try testing.expectEqual(error.NotFinite, err);
                try expectState(before, &cache);
            }
            try expectFiniteBlocks(&cache);
        }
    }
}
