//! Records: options and answers that cross the C ABI as 4-byte words, the first of them the record's byte size.
//!
//! Fields are appended, never moved. An older caller's record is shorter: what it lacks is 0. A newer caller's is longer:
//! what we do not know must be 0, or it asked for something this library cannot do. 64-bit values take two words, low
//! first. Callers' memory is unaligned and only borrowed for the call.

const std = @import("std");
const assert = std.debug.assert;

/// Reads a record from a caller. `record_bytes` is what the caller's buffer holds.
pub fn read(comptime Record: type, source: ?[*]const u8, record_bytes: u32) error{ InvalidConfig, InvalidSize, Unsupported }!Record {
    comptime check(Record);
    const size = try strideOf(source, record_bytes);
    const bytes = source.?[0..record_bytes];
    var record: Record = std.mem.zeroes(Record);
    const known = @min(size, @sizeOf(Record));
    @memcpy(std.mem.asBytes(&record)[0..known], bytes[0..known]);
    for (bytes[known..size]) |byte| if (byte != 0) return error.Unsupported;
    record.size_bytes = @sizeOf(Record);
    return record;
}

/// Writes as much of a record as the caller asked for in its first word; that word then tells how much it was.
pub fn write(comptime Record: type, destination: ?[*]u8, record_bytes: u32, record: Record) error{InvalidSize}!void {
    comptime check(Record);
    const wanted = try strideOf(destination, record_bytes);
    const bytes = destination.?[0..record_bytes];
    var answer = record;
    answer.size_bytes = @min(wanted, @sizeOf(Record));
    @memcpy(bytes[0..answer.size_bytes], std.mem.asBytes(&answer)[0..answer.size_bytes]);
}

fn check(comptime Record: type) void {
    const fields = std.meta.fields(Record);
    assert(std.mem.eql(u8, fields[0].name, "size_bytes"));
    for (fields) |field| assert(@sizeOf(field.type) % 4 == 0 and @alignOf(field.type) == 4);
    assert(@sizeOf(Record) % 4 == 0);
}

/// The size of a record, which its first word says; in an array that of each, which the first one says.
pub fn strideOf(source: ?[*]const u8, byte_count: u32) error{InvalidSize}!u32 {
    const bytes = (source orelse return error.InvalidSize)[0..byte_count];
    if (bytes.len < 4) return error.InvalidSize;
    const stride = std.mem.readInt(u32, bytes[0..4], .little);
    if (stride < 4 or stride % 4 != 0 or stride > bytes.len) return error.InvalidSize;
    return stride;
}

/// Reads an array of exactly `record_count` records, which stand one after the other.
pub fn readAll(
    comptime Record: type,
    gpa: std.mem.Allocator,
    source: ?[*]const u8,
    byte_count: u32,
    record_count: u32,
) error{ InvalidConfig, InvalidSize, Unsupported, OutOfMemory }![]Record {
    if (record_count == 0) return if (byte_count == 0) &.{} else error.InvalidSize;
    const stride = try strideOf(source, byte_count);
    if (byte_count != @as(u64, stride) * record_count) return error.InvalidSize;
    const records = try gpa.alloc(Record, record_count);
    errdefer gpa.free(records);
    for (records, 0..) |*one, i| one.* = try read(Record, source.? + i * stride, stride);
    return records;
}

/// The records of a caller's array, written one after the other, as many as fit and as large as the caller said.
pub fn Writer(comptime Record: type) type {
    return struct {
        const Self = @This();

        bytes: []u8,
        stride: u32,

        pub fn init(destination: ?[*]u8, byte_count: u32) error{InvalidSize}!Self {
            if (byte_count == 0) return .{ .bytes = &.{}, .stride = @sizeOf(Record) };
            const stride = try strideOf(destination, byte_count);
            return .{ .bytes = destination.?[0..byte_count], .stride = stride };
        }

        /// Writes one more record, if there is room for it.
        pub fn append(self: *Self, record: Record) void {
            if (self.bytes.len < self.stride) return;
            std.mem.writeInt(u32, self.bytes[0..4], self.stride, .little);
            write(Record, self.bytes.ptr, self.stride, record) catch unreachable; // the stride was checked
            self.bytes = self.bytes[self.stride..];
        }
    };
}

/// One line about a record: `view 72: size_bytes u32 @0, keys u64 @4`. The fields of a record in a record have its name
/// before their own.
pub fn describe(comptime name: []const u8, comptime Record: type) []const u8 {
    comptime check(Record);
    return comptime std.fmt.comptimePrint("{s} {d}: {s}", .{ name, @sizeOf(Record), describeFields(Record, "", 0) });
}

fn describeFields(comptime Record: type, comptime prefix: []const u8, comptime offset: u32) []const u8 {
    comptime var text: []const u8 = "";
    inline for (std.meta.fields(Record), 0..) |field, i| {
        const at = offset + @offsetOf(Record, field.name);
        const separator = if (i == 0) "" else ", ";
        text = text ++ separator ++ switch (@typeInfo(field.type)) {
            .@"struct" => if (wordName(field.type)) |word|
                std.fmt.comptimePrint("{s}{s} {s} @{d}", .{ prefix, field.name, word, at })
            else
                describeFields(field.type, prefix ++ field.name ++ "_", at),
            .array => |array| std.fmt.comptimePrint("{s}{s} {s}[{d}] @{d}", .{ prefix, field.name, @typeName(array.child), array.len, at }),
            else => std.fmt.comptimePrint("{s}{s} {s} @{d}", .{ prefix, field.name, @typeName(field.type), at }),
        };
    }
    return text;
}

fn wordName(comptime Field: type) ?[]const u8 {
    return switch (Field) {
        Wide => "u64",
        Double => "f64",
        else => null,
    };
}

/// A 64-bit value in two words, low first.
pub const Wide = extern struct {
    low: u32 = 0,
    high: u32 = 0,

    pub fn from(wide: u64) Wide {
        return .{ .low = @truncate(wide), .high = @truncate(wide >> 32) };
    }

    pub fn value(wide: Wide) u64 {
        return @as(u64, wide.high) << 32 | wide.low;
    }
};

/// An f64 in two words, low first.
pub const Double = extern struct {
    low: u32 = 0,
    high: u32 = 0,

    pub fn from(value: f64) Double {
        const bits: u64 = @bitCast(value);
        return .{ .low = @truncate(bits), .high = @truncate(bits >> 32) };
    }
};

/// A number that is 64-bit and leaves through an f64 out-buffer. Past 2^53 it would not be exact.
pub fn writeF64(destination: ?[*]u8, element_count: u32, value: u64) error{ InvalidSize, OutOfMemory }!void {
    if (element_count < 1) return error.InvalidSize;
    const bytes = (destination orelse return error.InvalidSize)[0..8];
    if (value > 1 << 53) return error.OutOfMemory;
    std.mem.writeInt(u64, bytes, @bitCast(@as(f64, @floatFromInt(value))), .little);
}

const Example = extern struct { size_bytes: u32, first: u32, second: u32 };

test "read: shorter, equal, longer, and malformed records" {
    const testing = std.testing;
    const words = [_]u32{ 12, 7, 8, 0, 9 };
    const bytes: [*]const u8 = @ptrCast(&words);
    try testing.expectEqual(Example{ .size_bytes = 12, .first = 7, .second = 8 }, try read(Example, bytes, 12));
    var shorter = words;
    shorter[0] = 8;
    try testing.expectEqual(0, (try read(Example, @ptrCast(&shorter), 20)).second);
    var longer = words;
    longer[0] = 16;
    try testing.expectEqual(8, (try read(Example, @ptrCast(&longer), 16)).second);
    longer[0] = 20;
    try testing.expectError(error.Unsupported, read(Example, @ptrCast(&longer), 20));
    for ([_]u32{ 0, 3, 6, 24, 0xffff_fffc }) |size| {
        var bad = words;
        bad[0] = size;
        try testing.expectError(error.InvalidSize, read(Example, @ptrCast(&bad), 20));
    }
    try testing.expectError(error.InvalidSize, read(Example, bytes, 3));
    try testing.expectError(error.InvalidSize, read(Example, null, 12));
}

test "write: no more than asked for" {
    const testing = std.testing;
    var words = [_]u32{ 8, 0, 99 };
    try write(Example, @ptrCast(&words), 12, .{ .size_bytes = 0, .first = 7, .second = 8 });
    try testing.expectEqual([_]u32{ 8, 7, 99 }, words);
    words[0] = 16;
    try testing.expectError(error.InvalidSize, write(Example, @ptrCast(&words), 12, undefined));
}

test "arrays: each as large as the first says, no more than fit" {
    const testing = std.testing;
    const words = [_]u32{ 12, 1, 2, 12, 3, 4 };
    const records = try readAll(Example, testing.allocator, @ptrCast(&words), 24, 2);
    defer testing.allocator.free(records);
    try testing.expectEqual(Example{ .size_bytes = 12, .first = 3, .second = 4 }, records[1]);
    try testing.expectError(error.InvalidSize, readAll(Example, testing.allocator, @ptrCast(&words), 24, 3));
    try testing.expectError(error.InvalidSize, readAll(Example, testing.allocator, @ptrCast(&words), 20, 2));
    try testing.expectError(error.InvalidSize, readAll(Example, testing.allocator, @ptrCast(&words), 24, 0));
    var out = [_]u32{ 8, 0, 0, 0, 9 };
    var writer: Writer(Example) = try .init(@ptrCast(&out), 20);
    for (5..8) |i| writer.append(.{ .size_bytes = 0, .first = @intCast(i), .second = 0 });
    try testing.expectEqual([_]u32{ 8, 5, 8, 6, 9 }, out);
}

test describe {
    const Inner = extern struct { kind: u32, share: f32 };
    const Outer = extern struct { size_bytes: u32, address: Wide, policy: Inner, error_max: Double, counts: [3]u32 };
    try std.testing.expectEqualStrings(
        "outer 40: size_bytes u32 @0, address u64 @4, policy_kind u32 @12, policy_share f32 @16, error_max f64 @20, counts u32[3] @28",
        describe("outer", Outer),
    );
}
