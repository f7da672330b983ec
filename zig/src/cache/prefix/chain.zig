//! The names of blocks of tokens: each is a hash of its tokens and of the name of the block before it, under a key of the
//! model and the tenant. Equal names mean equal tokens from the first one on, of one model and one tenant.
//!
//! The key makes names of different tenants unrelated: who knows the tokens and not the salt cannot tell a name.

const std = @import("std");
const Blake3 = std.crypto.hash.Blake3;

/// The name of a block.
pub const BlockHash = [16]u8;

/// The parent of a first block.
pub const no_parent: BlockHash = @splat(0);

/// The key of the names of a tenant's blocks.
pub const Key = [Blake3.key_length]u8;

/// The key for a model, described by its parts in an order of the caller's, and a tenant; null where there is none.
pub fn keyOf(model: []const []const u8, salt: ?[]const u8) Key {
    var hasher: Blake3 = .initKdf("kvern 2026-11 block names", .{});
    for (model) |part| field(&hasher, part);
    hasher.update(&.{@intFromBool(salt != null)});
    field(&hasher, salt orelse "");
    var key: Key = undefined;
    hasher.final(&key);
    return key;
}

/// A field with its length, so that no two lists of fields give one text.
fn field(hasher: *Blake3, text: []const u8) void {
    var length: [8]u8 = undefined;
    std.mem.writeInt(u64, &length, text.len, .little);
    hasher.update(&length);
    hasher.update(text);
}

/// The name of the block of these tokens that follows the block named `parent`.
pub fn next(key: *const Key, parent: BlockHash, tokens: []const u32) BlockHash {
    var hasher: Blake3 = .init(.{ .key = key.* });
    hasher.update(&parent);
    if (comptime @import("builtin").cpu.arch.endian() == .little) {
        hasher.update(std.mem.sliceAsBytes(tokens));
    } else for (tokens) |token| {
        var bytes: [4]u8 = undefined;
        std.mem.writeInt(u32, &bytes, token, .little);
        hasher.update(&bytes);
    }
    var hash: BlockHash = undefined;
    hasher.final(&hash);
    return hash;
}

const testing = std.testing;

test "a key differs with each part of the model, with the salt, and with where a part ends" {
    const keys = [_]Key{
        keyOf(&.{ "llama", "f16" }, null),
        keyOf(&.{ "llama", "f16" }, ""),
        keyOf(&.{ "llama", "f16" }, "a"),
        keyOf(&.{ "llama", "q8_0" }, null),
        keyOf(&.{ "llam", "af16" }, null),
        keyOf(&.{"llamaf16"}, null),
        keyOf(&.{ "llama", "f16", "" }, null),
    };
    for (keys, 0..) |a, i| for (keys[0..i]) |b| try testing.expect(!std.mem.eql(u8, &a, &b));
    try testing.expectEqual(keys[2], keyOf(&.{ "llama", "f16" }, "a"));
}

test "a name differs with the key, with what comes before and with each token" {
    const key = keyOf(&.{}, null);
    const other = keyOf(&.{}, "salt");
    const tokens = [_]u32{ 1, 2, 3, 4 };
    const name = next(&key, no_parent, &tokens);
    const names = [_]BlockHash{
        name,
        next(&other, no_parent, &tokens),
        next(&key, name, &tokens),
        next(&key, no_parent, tokens[0..3]),
        next(&key, no_parent, &.{ 1, 2, 3, 5 }),
        next(&key, no_parent, &.{ 0, 2, 3, 4 }),
    };
    for (names, 0..) |a, i| for (names[0..i]) |b| try testing.expect(!std.mem.eql(u8, &a, &b));
    try testing.expectEqual(name, next(&key, no_parent, &tokens));
}

test "names are never changed: others have stored them" {
    const key = keyOf(&.{"model"}, "tenant");
    const name = next(&key, next(&key, no_parent, &.{ 1, 2 }), &.{ 3, 0xffff_ffff });
    try testing.expectEqualStrings("c8a6bfc73f5a0ca74144105c423377d1", &std.fmt.bytesToHex(name, .lower));
}
