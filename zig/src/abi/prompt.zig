//! Bodies of the exports of prompts: what is found of one by its tokens, what is known of that, and what changed.

const std = @import("std");
const buffer = @import("buffer.zig");
const handle = @import("handle.zig");
const paged = @import("../cache/paged/cache.zig");
const record = @import("record.zig");
const status = @import("status.zig");

/// What crosses of a prompt; `has_salt` tells an empty salt from none.
fn promptOf(
    tokens: ?[*]const u8,
    token_count: u32,
    has_salt: u32,
    salt: ?[*]const u8,
    salt_bytes: u32,
    fingerprint: ?[*]const u8,
    fingerprint_bytes: u32,
) buffer.Error!paged.Prompt {
    const salt_text = try buffer.bytesIn(salt, salt_bytes);
    return .{
        .tokens = try buffer.words(u32, tokens, token_count),
        .salt = if (has_salt == 0) null else salt_text,
        .fingerprint = try buffer.bytesIn(fingerprint, fingerprint_bytes),
    };
}

/// (cache, prompt) -> a sequence that starts with the longest prefix of it that its tenant has
pub fn createSequence(
    word: u32,
    tokens: ?[*]const u8,
    token_count: u32,
    has_salt: u32,
    salt: ?[*]const u8,
    salt_bytes: u32,
    fingerprint: ?[*]const u8,
    fingerprint_bytes: u32,
) callconv(.c) i32 {
    const use = handle.begin(.paged, word) catch |err| return status.fromError(err);
    defer use.end();
    const prompt = promptOf(tokens, token_count, has_salt, salt, salt_bytes, fingerprint, fingerprint_bytes) catch |err|
        return status.fromError(err);
    const sequence = use.target.createSequenceFor(prompt) catch |err| return status.fromError(err);
    return handle.createSequence(use.object, sequence) catch |err| {
        use.target.freeSequence(sequence);
        return status.fromError(err);
    };
}

/// (cache, prompt) -> tokens that more will be found of, once the sequences that were made with them have committed
pub fn pendingPrefix(
    word: u32,
    tokens: ?[*]const u8,
    token_count: u32,
    has_salt: u32,
    salt: ?[*]const u8,
    salt_bytes: u32,
    fingerprint: ?[*]const u8,
    fingerprint_bytes: u32,
) callconv(.c) i32 {
    const use = handle.begin(.paged, word) catch |err| return status.fromError(err);
    defer use.end();
    const prompt = promptOf(tokens, token_count, has_salt, salt, salt_bytes, fingerprint, fingerprint_bytes) catch |err|
        return status.fromError(err);
    return status.count(use.target.pendingPrefix(prompt) catch |err| return status.fromError(err));
}

/// What a prompt would find, and why no more.
pub const ExplanationRecord = extern struct {
    size_bytes: u32 = 0,
    token_count: u32,
    known_count: u32,
    /// A `Reason`.
    reason: u32,
    has_other_token: u32,
    other_token: u32,
    format_count: u32,
    /// The dtypes of keys and of values, a pair for each format.
    dtype_k: [paged.Explanation.formats_max]u32,
    dtype_v: [paged.Explanation.formats_max]u32,

    pub fn from(explanation: paged.Explanation) ExplanationRecord {
        var of: ExplanationRecord = .{
            .token_count = explanation.token_count,
            .known_count = explanation.known_count,
            .reason = @intFromEnum(explanation.reason),
            .has_other_token = @intFromBool(explanation.other_token != null),
            .other_token = explanation.other_token orelse 0,
            .format_count = 0,
            .dtype_k = @splat(0),
            .dtype_v = @splat(0),
        };
        for (explanation.formats) |format| {
            const dtype_k, const dtype_v = format orelse break;
            of.dtype_k[of.format_count] = @intFromEnum(dtype_k);
            of.dtype_v[of.format_count] = @intFromEnum(dtype_v);
            of.format_count += 1;
        }
        return of;
    }
};

/// (cache, prompt, ExplanationRecord out, bytes): for the owner of the cache
pub fn explain(
    word: u32,
    tokens: ?[*]const u8,
    token_count: u32,
    has_salt: u32,
    salt: ?[*]const u8,
    salt_bytes: u32,
    fingerprint: ?[*]const u8,
    fingerprint_bytes: u32,
    out: ?[*]u8,
    out_bytes: u32,
) callconv(.c) i32 {
    const use = handle.begin(.paged, word) catch |err| return status.fromError(err);
    defer use.end();
    const prompt = promptOf(tokens, token_count, has_salt, salt, salt_bytes, fingerprint, fingerprint_bytes) catch |err|
        return status.fromError(err);
    const explanation = use.target.explain(prompt) catch |err| return status.fromError(err);
    return status.word(record.write(ExplanationRecord, out, out_bytes, .from(explanation)));
}

/// (sequence, tokens, count, ExplanationRecord out, bytes): for the tenant of the sequence
pub fn explainTo(word: u32, tokens: ?[*]const u8, token_count: u32, out: ?[*]u8, out_bytes: u32) callconv(.c) i32 {
    const use = handle.begin(.sequence, word) catch |err| return status.fromError(err);
    defer use.end();
    const prompt = buffer.words(u32, tokens, token_count) catch |err| return status.fromError(err);
    const explanation = use.target.explain(prompt) catch |err| return status.fromError(err);
    return status.word(record.write(ExplanationRecord, out, out_bytes, .from(explanation)));
}

/// What was looked up by tokens, and what is kept for that.
pub const PrefixStatsRecord = extern struct {
    size_bytes: u32 = 0,
    lookups: record.Wide,
    hits: record.Wide,
    hit_tokens: record.Wide,
    cached_blocks: record.Wide,
    cached_bytes: record.Wide,
    evicted_blocks: record.Wide,
    metadata_bytes: record.Wide,
};

pub fn prefixStats(word: u32, out: ?[*]u8, out_bytes: u32) callconv(.c) i32 {
    const use = handle.begin(.paged, word) catch |err| return status.fromError(err);
    defer use.end();
    const found = use.target.prefixStats();
    return status.word(record.write(PrefixStatsRecord, out, out_bytes, .{
        .lookups = .from(found.lookups),
        .hits = .from(found.hits),
        .hit_tokens = .from(found.hit_tokens),
        .cached_blocks = .from(found.cached_blocks),
        .cached_bytes = .from(found.cached_bytes),
        .evicted_blocks = .from(found.evicted_blocks),
        .metadata_bytes = .from(use.target.prefixMetadataBytes()),
    }));
}

/// (cache, words, count) -> words of the events there are: written and taken where they fit, see `prefix/events.zig`
pub fn events(word: u32, out: ?[*]u8, count: u32) callconv(.c) i32 {
    const use = handle.begin(.paged, word) catch |err| return status.fromError(err);
    defer use.end();
    const found = (use.target.events() catch |err| return status.fromError(err)) orelse
        return status.fromError(error.Unsupported);
    const word_count: u32 = @intCast(found.len);
    if (word_count > count) return status.count(word_count);
    const to = buffer.out(out, count) catch |err| return status.fromError(err);
    @memcpy(to[0 .. found.len * 4], std.mem.sliceAsBytes(found));
    use.target.takeEvents();
    return status.count(word_count);
}
