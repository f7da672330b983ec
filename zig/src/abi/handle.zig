//! Handles: how callers name native objects without ever holding a pointer.
//!
//! A handle is a word of `entries.zig`, which is checked on every call and says how long an old one stays stale.
//!
//! An object is used under its own lock and counts its references: the handles that name it or a part of it, the calls
//! that use it now, and, for a pool, the caches on it or its buffers. It is destroyed with the last of them, so freeing an
//! object while another thread is in a call on it takes its handles away at once and the object when that call is over.
//! From the free on it takes no new handle: a call that is making a part of it, or something on it, is refused.

const std = @import("std");
const assert = std.debug.assert;
const buffer_pool = @import("../device/buffer_pool.zig");
const AlignedBuffer = buffer_pool.AlignedBuffer;
const BufferPool = buffer_pool.BufferPool;
const cpu = @import("../device/cpu.zig");
const entry_list = @import("entries.zig");
const Entries = entry_list.Entries;
const none = entry_list.none;
const BlockPool = @import("../cache/blocks/pool.zig").BlockPool;
const ContiguousCache = @import("../cache/contiguous.zig").ContiguousCache;
const memory = @import("memory.zig");
const paged = @import("../cache/paged/cache.zig");
const reserved = @import("../device/reserved.zig");
const PagedCache = paged.PagedCache;
const PagedSequence = paged.Sequence;
const Sequence = @import("../cache/sequence.zig").Sequence;

const gpa = memory.gpa;

/// What a handle can name. The numbers cross the ABI inside handles; 0 is never valid.
pub const Kind = enum(u3) {
    contiguous = 1,
    paged = 2,
    sequence = 3,
    pool = 4,
    buffer_pool = 5,
    buffer = 6,

    /// What a call on a handle of this kind works on.
    fn Target(comptime kind: Kind) type {
        return switch (kind) {
            .contiguous => *ContiguousCache,
            .paged => *PagedCache,
            .sequence => *PagedSequence,
            .pool => *BlockPool,
            .buffer_pool => *BufferPool,
            .buffer => *AlignedBuffer,
        };
    }
};

pub const Object = struct {
    lock: std.Io.Mutex = .init,
    /// Counted under the table's lock, as the next two are read and written.
    references: u32 = 0,
    /// Its handle was taken away.
    freed: bool = false,
    /// That of its own handle, while it has one.
    entry_own: u32 = none,
    /// First of its entries: its own and those of its sequences.
    entry_first: u32 = none,
    body: Body,

    pub const Body = union(enum) {
        contiguous: ContiguousCache,
        paged: Paged,
        pool: BlockPool,
        buffer_pool: BufferPool,
        buffer: Buffer,
    };

    pub const Paged = struct {
        cache: PagedCache,
        /// The pool of another handle, if the cache is on one.
        pool: ?*Object = null,
    };

    pub const Buffer = struct {
        buffer: AlignedBuffer,
        /// The pool it came from and goes back to.
        pool: *Object,
    };
};

const Entry = struct {
    kind: Kind,
    object: *Object,
    /// Of a `paged` object, for a handle of that kind.
    sequence: ?*PagedSequence,
    /// In the list of the object's entries.
    next: u32,
    previous: u32 = none,
};

/// All handles of the process. The lock is held for a few instructions at a time, never while an object is used.
var table: struct {
    lock: std.Io.Mutex = .init,
    entries: Entries(Entry) = .{},
} = .{};

/// Under the table's lock.
var live_cache_count: u32 = 0;

/// A locked object for the length of one call, and what of it the call works on.
pub fn Locked(comptime Target: type) type {
    return struct {
        object: *Object,
        target: Target,

        pub fn end(use: @This()) void {
            use.object.lock.unlock(cpu.io());
            release(use.object);
        }
    };
}

/// What a call on a handle of a kind has.
pub fn Use(comptime kind: Kind) type {
    return Locked(kind.Target());
}

pub const CreateError = error{ OutOfMemory, StaleHandle };

/// Takes ownership of a body and names it. `from` is what the body is on or was made of, if there is such an object: when
/// that was freed meanwhile, this is `StaleHandle`. On failure the body is still the caller's.
pub fn create(comptime kind: Kind, body: Object.Body, from: ?*Object) CreateError!i32 {
    const object = try gpa.create(Object);
    errdefer gpa.destroy(object);
    object.* = .{ .body = body };
    table.lock.lockUncancelable(cpu.io());
    defer table.lock.unlock(cpu.io());
    if (from) |origin| if (origin.freed) return error.StaleHandle;
    const word = try enter(kind, object, null);
    object.entry_own = object.entry_first;
    if (body == .paged) if (body.paged.pool) |pool| {
        pool.references += 1;
    };
    if (body == .buffer) body.buffer.pool.references += 1;
    return word;
}

/// Names a sequence of a paged object that the caller holds, by its own handle or by one of another sequence.
pub fn createSequence(object: *Object, sequence: *PagedSequence) CreateError!i32 {
    table.lock.lockUncancelable(cpu.io());
    defer table.lock.unlock(cpu.io());
    return enter(.sequence, object, sequence);
}

/// Looks a handle up and locks what it names, until `end`.
pub fn begin(comptime kind: Kind, word: u32) error{StaleHandle}!Use(kind) {
    const object = try retain(kind, word);
    object.lock.lockUncancelable(cpu.io());
    // A buffer pool is closed when it is freed: a call that waited for the lock meanwhile comes too late. Only its own lock
    // guards `freed` there, as `buffer_pool.free` holds it.
    if (kind == .buffer_pool and object.freed) {
        object.lock.unlock(cpu.io());
        release(object);
        return error.StaleHandle;
    }
    if (kind != .sequence) {
        return .{ .object = object, .target = switch (kind) {
            .contiguous => &object.body.contiguous,
            .paged => &object.body.paged.cache,
            .pool => &object.body.pool,
            .buffer_pool => &object.body.buffer_pool,
            .buffer => &object.body.buffer.buffer,
            .sequence => comptime unreachable,
        } };
    }
    // A sequence may have been freed while this call waited for the lock.
    const sequence = sequenceOf(object, word) catch |err| {
        object.lock.unlock(cpu.io());
        release(object);
        return err;
    };
    return .{ .object = object, .target = sequence };
}

/// Looks a sequence up and locks its cache, until `end`: the sequence that a handle names, with index 0, or one of a
/// contiguous cache by the cache's handle and an index, which the calls of the sequence check.
pub fn beginSequence(word: u32, index: u32) error{ StaleHandle, SequenceOutOfRange }!Locked(Sequence) {
    if (kindOf(word) == .contiguous) {
        const use = try begin(.contiguous, word);
        return .{ .object = use.object, .target = .{ .contiguous = use.target.sequence(index) } };
    }
    const use = try begin(.sequence, word);
    errdefer use.end();
    if (index != 0) return error.SequenceOutOfRange;
    return .{ .object = use.object, .target = .{ .paged = use.target } };
}

/// A cache of either layout.
pub const Cache = union(enum) {
    contiguous: *ContiguousCache,
    paged: *PagedCache,

    pub fn checkLayer(cache: Cache, layer_index: u32) error{LayerOutOfRange}!void {
        switch (cache) {
            .contiguous => |contiguous| try contiguous.checkLayer(layer_index),
            .paged => |pages| _ = try pages.layerShape(layer_index),
        }
    }
};

/// Looks a cache up and locks it, until `end`.
pub fn beginCache(word: u32) error{StaleHandle}!Locked(Cache) {
    if (kindOf(word) == .contiguous) {
        const use = try begin(.contiguous, word);
        return .{ .object = use.object, .target = .{ .contiguous = use.target } };
    }
    const use = try begin(.paged, word);
    return .{ .object = use.object, .target = .{ .paged = use.target } };
}

/// A sequence of a locked cache: by its index in a contiguous one, by its handle in a paged one.
pub fn sequenceIn(use: Locked(Cache), word: u32) error{StaleHandle}!Sequence {
    return switch (use.target) {
        .contiguous => |cache| .{ .contiguous = cache.sequence(word) },
        .paged => .{ .paged = try sequenceOf(use.object, word) },
    };
}

/// The kind that a word says it is of, which `find` compares with the entry's.
fn kindOf(word: u32) ?Kind {
    return std.enums.fromInt(Kind, entry_list.kindOf(word));
}

/// The sequence a handle names, if it is one of this object. Call with the object locked: it stays valid that long.
pub fn sequenceOf(object: *const Object, word: u32) error{StaleHandle}!*PagedSequence {
    table.lock.lockUncancelable(cpu.io());
    defer table.lock.unlock(cpu.io());
    const entry = table.entries.at(try find(.sequence, word));
    if (entry.object != object) return error.StaleHandle;
    return entry.sequence.?;
}

/// The handle of the cache that a sequence is in.
pub fn cacheOf(word: u32) error{StaleHandle}!i32 {
    table.lock.lockUncancelable(cpu.io());
    defer table.lock.unlock(cpu.io());
    const object = table.entries.at(try find(.sequence, word)).object;
    assert(!object.freed); // it would have taken the sequence along
    return @intCast(table.entries.word(@intCast(object.entry_own), @intFromEnum(Kind.paged)));
}

/// Takes the handle away, with those of the sequences of a cache, and frees the object now or when the last call on it
/// is over.
pub fn free(comptime kind: Kind, word: u32) error{StaleHandle}!void {
    if (kind == .sequence) return freeSequence(word);
    var released: u32 = 1;
    const object = taken: {
        table.lock.lockUncancelable(cpu.io());
        defer table.lock.unlock(cpu.io());
        const index = try find(kind, word);
        const object = table.entries.at(index).object;
        leave(index);
        object.freed = true;
        while (object.entry_first != none) : (released += 1) leave(object.entry_first);
        break :taken object;
    };
    for (0..released) |_| release(object);
}

fn freeSequence(word: u32) error{StaleHandle}!void {
    const use = try begin(.sequence, word);
    const object = use.object;
    // The cache may have been freed since: then it takes its sequences along, and this handle's reference is gone.
    const was_named = named: {
        table.lock.lockUncancelable(cpu.io());
        defer table.lock.unlock(cpu.io());
        leave(find(.sequence, word) catch break :named false);
        break :named true;
    };
    if (was_named) use.target.cache.freeSequence(use.target);
    use.end();
    if (was_named) release(object) else return error.StaleHandle;
}

/// Takes the handles of all sequences of a paged object away but those of `kept`, and frees these sequences; the kept ones
/// are emptied. Call with the object locked.
pub fn resetSequences(object: *Object, kept: []const *PagedSequence) error{OutOfMemory}!void {
    const cache = &object.body.paged.cache;
    var set = try cache.setOf(kept);
    defer set.deinit(gpa);
    var released: u32 = 0;
    {
        table.lock.lockUncancelable(cpu.io());
        defer table.lock.unlock(cpu.io());
        var index = object.entry_first;
        while (index != none) {
            const entry = table.entries.at(index).*;
            if (entry.sequence) |sequence| if (!set.isSet(sequence.index)) {
                leave(index);
                released += 1;
            };
            index = entry.next;
        }
        // The caller has one besides, so none of these is the last.
        assert(object.references > released);
        object.references -= released;
    }
    cache.resetAllBut(set);
}

/// The object of a handle, with a reference that the caller holds until `release`.
pub fn retain(comptime kind: Kind, word: u32) error{StaleHandle}!*Object {
    table.lock.lockUncancelable(cpu.io());
    defer table.lock.unlock(cpu.io());
    const object = table.entries.at(try find(kind, word)).object;
    object.references += 1;
    return object;
}

/// Gives one reference back.
pub fn release(object: *Object) void {
    {
        table.lock.lockUncancelable(cpu.io());
        defer table.lock.unlock(cpu.io());
        object.references -= 1;
        if (object.references != 0) return;
    }
    switch (object.body) {
        .contiguous => |*cache| cache.deinit(),
        .pool => |*pool| pool.deinit(),
        .paged => |*body| {
            body.cache.deinit();
            if (body.pool) |pool| release(pool);
        },
        .buffer_pool => |*pool| pool.deinit(),
        .buffer => |*body| {
            body.buffer.deinit();
            release(body.pool);
        },
    }
    gpa.destroy(object);
}

/// Caches that have a handle.
pub fn liveCacheCount() u32 {
    table.lock.lockUncancelable(cpu.io());
    defer table.lock.unlock(cpu.io());
    return live_cache_count;
}

/// The entry of a live handle. Call with the table locked.
fn find(kind: Kind, word: u32) error{StaleHandle}!u16 {
    const found = table.entries.find(word) orelse return error.StaleHandle;
    if (found.kind != @intFromEnum(kind) or table.entries.at(found.index).kind != kind) return error.StaleHandle;
    return found.index;
}

/// Gives an object a handle, which is a reference. Call with the table locked.
fn enter(kind: Kind, object: *Object, sequence: ?*PagedSequence) CreateError!i32 {
    if (object.freed) return error.StaleHandle;
    const index = try table.entries.take(gpa, .{
        .kind = kind,
        .object = object,
        .sequence = sequence,
        .next = object.entry_first,
    });
    if (object.entry_first != none) table.entries.at(object.entry_first).previous = index;
    object.entry_first = index;
    object.references += 1;
    live_cache_count += @intFromBool(kind == .contiguous or kind == .paged);
    return @intCast(table.entries.word(index, @intFromEnum(kind)));
}

/// Takes a handle away; its reference is the caller's now. Call with the table locked.
fn leave(index: u32) void {
    const entry = table.entries.at(index).*;
    if (entry.previous == none) {
        assert(entry.object.entry_first == index);
        entry.object.entry_first = entry.next;
    } else {
        table.entries.at(entry.previous).next = entry.next;
    }
    if (entry.next != none) table.entries.at(entry.next).previous = entry.previous;
    live_cache_count -= @intFromBool(entry.kind == .contiguous or entry.kind == .paged);
    table.entries.give(index);
}

const testing = std.testing;

fn testCache() !Object.Body {
    return .{ .contiguous = try .init(gpa, .{ .layer_count = 1, .kv_head_count = 1, .head_dim = 4, .max_seq_len = 4 }) };
}

test "a handle is positive, stale once freed, and its entry comes back last" {
    const first = try create(.contiguous, try testCache(), null);
    const second = try create(.contiguous, try testCache(), null);
    try testing.expect(first > 0 and second > 0 and first != second);
    (try begin(.contiguous, @intCast(first))).end();
    try testing.expectError(error.StaleHandle, begin(.paged, @intCast(first)));
    try free(.contiguous, @intCast(first));
    try testing.expectError(error.StaleHandle, free(.contiguous, @intCast(first)));
    try testing.expectError(error.StaleHandle, begin(.contiguous, @intCast(first)));
    try free(.contiguous, @intCast(second));
    const third = try create(.contiguous, try testCache(), null);
    try testing.expect(third != first and third != second);
    try free(.contiguous, @intCast(third));
    for ([_]u32{ 0, 1, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff }) |word| {
        try testing.expectError(error.StaleHandle, begin(.contiguous, word));
    }
}

test "an object freed during a call lives until the call is over" {
    const handle = try create(.contiguous, try testCache(), null);
    const before = liveCacheCount();
    const reserved_before = reserved.total();
    const use = try begin(.contiguous, @intCast(handle));
    try free(.contiguous, @intCast(handle));
    try testing.expectError(error.StaleHandle, begin(.contiguous, @intCast(handle)));
    try testing.expectEqual(before - 1, liveCacheCount());
    try testing.expectEqual(reserved_before, reserved.total());
    try testing.expectEqual(0, use.target.currentPos());
    use.end();
    try testing.expect(reserved.total() < reserved_before);
}

test "sequences: handles of their own, gone with the cache; a pool lives as long as a cache on it" {
    const pool_handle = try create(.pool, .{ .pool = try .init(gpa, @import("../device/slab.zig").system, .{
        .layer_count = 1,
        .kv_head_count = 1,
        .head_dim = 8,
        .block_size = 2,
        .dtype_k = .f16,
        .dtype_v = .f16,
    }, 1 << 20) }, null);
    const pool = try retain(.pool, @intCast(pool_handle));
    const handle = try create(.paged, .{ .paged = .{
        .cache = try .init(gpa, .{
            .layers = &.{.{ .kv_head_count = 1, .head_dim = 8 }},
            .block_size = 2,
            .max_seq_len = 8,
            .pool = &pool.body.pool,
        }),
        .pool = pool,
    } }, pool);
    release(pool);
    const use = try begin(.paged, @intCast(handle));
    const first = try createSequence(use.object, try use.target.createSequence());
    const second = try createSequence(use.object, try use.target.createSequence());
    use.end();
    try testing.expect(first != second);
    (try begin(.sequence, @intCast(first))).end();
    try free(.sequence, @intCast(first));
    try testing.expectError(error.StaleHandle, begin(.sequence, @intCast(first)));
    try free(.pool, @intCast(pool_handle));
    const other = try begin(.sequence, @intCast(second));
    const row: [8]f32 = @splat(1);
    try other.target.cache.append(0, &.{other.target}, &.{1}, .fromF32(&row), .fromF32(&row));
    try free(.paged, @intCast(handle));
    try testing.expectEqual(1, (try other.target.rows(0)).row_count);
    other.end();
    try testing.expectError(error.StaleHandle, begin(.sequence, @intCast(second)));
    try testing.expectError(error.StaleHandle, free(.sequence, @intCast(second)));
}
