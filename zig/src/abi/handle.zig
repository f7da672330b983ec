//! Handles: how callers name native objects without ever holding a pointer.
//!
//!     bit 30..28 kind | 27..16 generation | 15..0 entry        0 is never a handle
//!
//! A handle is checked on every call. Freeing an entry changes its generation, so an old handle is stale until the
//! generation has wrapped, 4096 frees of the same entry later; entries are used again first in, first out, which makes
//! that as late as it can be.
//!
//! An object is used under its own lock. Freeing one while another thread is in a call on it takes the handle away at
//! once and the object when that call is over.

const std = @import("std");
const assert = std.debug.assert;
const cpu = @import("../device/cpu.zig");
const ContiguousCache = @import("../cache/contiguous.zig").ContiguousCache;

const gpa = std.heap.c_allocator;

/// What a handle can name. The numbers cross the ABI inside handles; 0 is never valid.
pub const Kind = enum(u3) {
    contiguous = 1,
};

const Handle = packed struct(u32) {
    entry: u16,
    generation: u12,
    kind: u3,
    zero: u1 = 0,
};

const entry_count_max = std.math.maxInt(u16);
const none: u32 = std.math.maxInt(u32);

const Contiguous = struct {
    lock: std.Io.Mutex = .init,
    cache: ContiguousCache,
};

const Entry = struct {
    generation: u12 = 0,
    /// Null when the entry is free or its handle was freed.
    live: ?*Contiguous = null,
    /// Freed while in use: destroyed by the last user.
    dying: ?*Contiguous = null,
    /// Calls that hold the object now.
    user_count: u32 = 0,
    /// The next free entry.
    next_free: u32 = none,
};

/// All handles of the process. The lock is held for a few instructions at a time, never while an object is used.
var table: struct {
    lock: std.Io.Mutex = .init,
    entries: std.ArrayList(Entry) = .empty,
    free_first: u32 = none,
    free_last: u32 = none,
    live_count: u32 = 0,
    reserved_bytes: u64 = 0,
} = .{};

/// A locked cache for the length of one call.
pub const Use = struct {
    entry: u16,
    object: *Contiguous,
    cache: *ContiguousCache,

    pub fn end(use: Use) void {
        use.object.lock.unlock(cpu.io());
        release(use.entry);
    }
};

/// Takes ownership of a cache and names it.
pub fn create(cache: ContiguousCache) error{OutOfMemory}!i32 {
    const object = try gpa.create(Contiguous);
    errdefer gpa.destroy(object);
    object.* = .{ .cache = cache };

    table.lock.lockUncancelable(cpu.io());
    defer table.lock.unlock(cpu.io());
    const index = try takeEntry();
    const entry = &table.entries.items[index];
    assert(entry.live == null and entry.dying == null and entry.user_count == 0);
    entry.live = object;
    table.live_count += 1;
    table.reserved_bytes += object.cache.stats().reserved_bytes;
    const handle: Handle = .{ .entry = @intCast(index), .generation = entry.generation, .kind = @intFromEnum(Kind.contiguous) };
    return @intCast(@as(u32, @bitCast(handle)));
}

/// Looks a handle up and locks what it names, until `end`.
pub fn begin(word: u32) error{StaleHandle}!Use {
    table.lock.lockUncancelable(cpu.io());
    const entry_index, const object = found: {
        defer table.lock.unlock(cpu.io());
        const entry_index = try find(word);
        const entry = &table.entries.items[entry_index];
        entry.user_count += 1;
        break :found .{ entry_index, entry.live.? };
    };
    object.lock.lockUncancelable(cpu.io());
    return .{ .entry = entry_index, .object = object, .cache = &object.cache };
}

/// Takes the handle away, and frees the object now or when the last call on it is over.
pub fn free(word: u32) error{StaleHandle}!void {
    const doomed = taken: {
        table.lock.lockUncancelable(cpu.io());
        defer table.lock.unlock(cpu.io());
        const index = try find(word);
        const entry = &table.entries.items[index];
        const object = entry.live.?;
        entry.live = null;
        entry.generation +%= 1;
        table.live_count -= 1;
        if (entry.user_count != 0) {
            entry.dying = object;
            return;
        }
        table.reserved_bytes -= object.cache.stats().reserved_bytes;
        giveEntry(index);
        break :taken object;
    };
    destroy(doomed);
}

pub const Totals = struct { live_count: u32, reserved_bytes: u64 };

/// Live handles, and the bytes reserved by their objects and by those that still wait for a call to end.
pub fn totals() Totals {
    table.lock.lockUncancelable(cpu.io());
    defer table.lock.unlock(cpu.io());
    return .{ .live_count = table.live_count, .reserved_bytes = table.reserved_bytes };
}

fn release(index: u16) void {
    const doomed = last: {
        table.lock.lockUncancelable(cpu.io());
        defer table.lock.unlock(cpu.io());
        const entry = &table.entries.items[index];
        entry.user_count -= 1;
        if (entry.user_count != 0) return;
        const object = entry.dying orelse return;
        entry.dying = null;
        table.reserved_bytes -= object.cache.stats().reserved_bytes;
        giveEntry(index);
        break :last object;
    };
    destroy(doomed);
}

fn destroy(object: *Contiguous) void {
    object.cache.deinit();
    gpa.destroy(object);
}

/// The entry of a live handle. Call with the table locked.
fn find(word: u32) error{StaleHandle}!u16 {
    const handle: Handle = @bitCast(word);
    if (handle.zero != 0 or handle.kind != @intFromEnum(Kind.contiguous)) return error.StaleHandle;
    if (handle.entry >= table.entries.items.len) return error.StaleHandle;
    const entry = &table.entries.items[handle.entry];
    if (entry.live == null or entry.generation != handle.generation) return error.StaleHandle;
    return handle.entry;
}

fn takeEntry() error{OutOfMemory}!u32 {
    if (table.free_first == none) {
        if (table.entries.items.len == entry_count_max) return error.OutOfMemory;
        try table.entries.append(gpa, .{});
        return @intCast(table.entries.items.len - 1);
    }
    const index = table.free_first;
    const entry = &table.entries.items[index];
    table.free_first = entry.next_free;
    if (table.free_first == none) table.free_last = none;
    entry.next_free = none;
    return index;
}

fn giveEntry(index: u32) void {
    table.entries.items[index].next_free = none;
    if (table.free_last == none) {
        table.free_first = index;
    } else {
        table.entries.items[table.free_last].next_free = index;
    }
    table.free_last = index;
}

const testing = std.testing;

fn testCache() !ContiguousCache {
    return .init(gpa, .{ .layer_count = 1, .kv_head_count = 1, .head_dim = 4, .max_seq_len = 4 });
}

test "a handle is positive, stale once freed, and its entry comes back last" {
    const first = try create(try testCache());
    const second = try create(try testCache());
    try testing.expect(first > 0 and second > 0 and first != second);
    (try begin(@intCast(first))).end();
    try free(@intCast(first));
    try testing.expectError(error.StaleHandle, free(@intCast(first)));
    try testing.expectError(error.StaleHandle, begin(@intCast(first)));
    try free(@intCast(second));
    const third = try create(try testCache());
    try testing.expect(third != first and third != second);
    try free(@intCast(third));
    for ([_]u32{ 0, 1, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff }) |word| {
        try testing.expectError(error.StaleHandle, begin(word));
    }
}

test "an object freed during a call lives until the call is over" {
    const handle = try create(try testCache());
    const before = totals();
    const use = try begin(@intCast(handle));
    try free(@intCast(handle));
    try testing.expectError(error.StaleHandle, begin(@intCast(handle)));
    try testing.expectEqual(before.live_count - 1, totals().live_count);
    try testing.expectEqual(before.reserved_bytes, totals().reserved_bytes);
    try testing.expectEqual(0, use.cache.currentPos());
    use.end();
    try testing.expect(totals().reserved_bytes < before.reserved_bytes);
}
