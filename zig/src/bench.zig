//! How near do the kernels come to the speed of memory?
//!
//!     zig build bench                   a table
//!     zig build bench -- --json         one line a row
//!     zig build bench -- --level v3     the kernels of a lower level
//!     zig build bench -- --threads 2    by two threads; R then is theirs too
//!     zig build bench -- --format i4    one format alone
//!     zig build bench -- --in-cache     decode of rows that stay in the second cache level: what the kernels compute
//!     zig build bench -- --steps        the instructions of a tile of a head, counted one by one: no noise in that
//!     zig build bench -- --addresses    the same by address, to be laid beside what `objdump -d` says of the program
//!
//! Decode is one query of 32 heads over 8 KV heads of 128 (GQA 4), by one thread unless said otherwise; each step takes the
//! next layer of a cache of at least 1 GiB, so that no key is in the last cache level. `share` is the part of R that the
//! stored bytes were read at; R is measured in the same run (`device/bandwidth.zig`). Storing is compared with a copy of the
//! same f32 bytes into memory that was touched before.
//!
//! What was tried for the speed of decode, and what it gave (f16 rows side by side, 8 heads of 128, GQA 4, one thread, Zen 5,
//! GB/s of stored bytes; R is 43):
//!
//!     head by head over all positions                                8
//!     tile by tile, in a tile head by head                          16
//!     prefetching the next head's rows, in a burst                  18
//!     the same into the second cache level                          24
//!     spread evenly over the work, a line at a time                 23
//!     asking for the next tile's rows whole, all heads at once      26
//!     into the first cache level, spread and whole                  32
//!     cheaper sums across vectors                                   no change
//!     no prefetching at all, with all of the above                  10
//!     an eighth to a quarter of it during the softmax               33
//!     a tile with all its heads in one call, addresses made once    no change
//!     not to keep the lines in any level (non-temporal)             no change
//!     one of two lines, for the hardware to bring the other         26
//!     8 rows by 2 tokens for many queries, half the conversions     no change
//!
//! A tile of one head takes 700 ns in f16 where it lies in the second level already, 483 of them for its multiplications,
//! and memory takes 762 ns to bring it. They overlap but for about a third of the shorter one: a loop of nothing but loads,
//! prefetches and as many multiplications reaches 36 to 38 GB/s, and 33 with pauses as long as the softmax.
//!
//! Codes, i8 and i4 in the same way:
//!
//!     prefetching spread over the products                          24     16
//!     half of it while digits are made and during the softmax       29     18
//!     digits of four rows at once, packed with saturation           29     18
//!     digits of the next head beside the softmax of this one        no change
//!
//! A tile of a head takes 2048 dot-product instructions whatever the bits, 241 ns on their two ports. All together it took
//! 9000 instructions in i4, 4.9 a cycle: what is not a product is held by their number, not by waiting. So (time of a
//! tile, before and after in alternating runs, f16, q8_0, q4_0, i8, i4):
//!
//!     digits cut from words of 16 bits, products and sums fused     -      -8 %   -6 %   -4 %   -4 %
//!     weights by a bound: no fold before their digits               -      -3 %   -5 %   no change
//!     digits of queries once for 1024 tokens                        -      -9 %   -10 %  -      -
//!     lines by 2 instructions in place of 5 to 7                    -      -2 %   -4 %   -3 %   -1 %
//!     one queue of lines in the order of reading, paced             -5 %   -6 %   no change
//!     four heads at a time (floats: no change)                      -      -      -3 %   -5 %   -1 %
//!     all of it together                                            -13 %  -11 %  -23 %  -8 %   -11 %
//!     of several blocks of rows each in turn asks (GQA 8)           -20 %  -26 %
//!     asking for all lines within the products                      twice the time: lines are forgotten
//!     asking two heads ahead, or into the second level              no change
//!     lines of a loop at a fixed distance, one instruction each     -4 %   -8 %   -3 %   no change   +2 %
//!     asking between the loops in tighter bursts                    i8 +12 %
//!     smaller bursts there, more of them                            q8_0 -9 %, i8 and q4_0 +25 %, not understood
//!     5 lines in a loop that asked for 4, or 6                      i8 +50 %, +100 %
//!     a line asked for twice while it is under way                  10 ns each, as long as memory takes for five lines
//!     lines of a loop in another order                              no change, or slower
//!     keys and values of a head side by side, not of all heads      +16 %
//!     slabs of whole huge pages to their ends                       no change
//!     the softmax spread over the products                          no change: the same ports
//!
//! In the second level a tile now takes 440 to 490 ns. The bytes of i8 take memory 405 ns, those of i4 214: 8 bits are near
//! what memory gives, 4 and 2 are held by computing.
//!
//! Every row checks its result against the reference before it is timed. Not a goal: absolute numbers, as machines are
//! shared; the ratios within one run are what counts.

const std = @import("std");
const cached = @import("bench/cached.zig");
const decode = @import("bench/decode.zig");
const figures = @import("bench/figures.zig");
const kvern = @import("kvern.zig");
const steps = @import("bench/steps.zig");
const store = @import("bench/store.zig");
const fail = figures.fail;

pub fn main(init: std.process.Init) !void {
    var json = false;
    var thread_count: u32 = 1;
    var what: enum { everything, cached, steps, addresses } = .everything;
    var only: ?kvern.Dtype = null;
    var arguments = try init.minimal.args.iterateAllocator(init.gpa);
    defer arguments.deinit();
    _ = arguments.skip();
    while (arguments.next()) |argument| {
        if (std.mem.eql(u8, argument, "--json")) {
            json = true;
        } else if (std.mem.eql(u8, argument, "--level")) {
            const name = arguments.next() orelse fail("--level wants a name");
            const level = std.meta.stringToEnum(kvern.Level, name) orelse fail("no such level");
            kvern.setLevel(level) catch fail("this CPU does not have that level");
        } else if (std.mem.eql(u8, argument, "--threads")) {
            thread_count = std.fmt.parseInt(u32, arguments.next() orelse "", 10) catch fail("--threads wants a number");
        } else if (std.mem.eql(u8, argument, "--format")) {
            const name = arguments.next() orelse fail("--format wants a name");
            only = std.meta.stringToEnum(kvern.Dtype, name) orelse fail("no such format");
        } else if (std.mem.eql(u8, argument, "--in-cache")) {
            what = .cached;
        } else if (std.mem.eql(u8, argument, "--steps")) {
            what = .steps;
        } else if (std.mem.eql(u8, argument, "--addresses")) {
            what = .addresses;
        } else fail("options: --json, --level NAME, --threads N, --format NAME, --in-cache, --steps, --addresses");
    }
    var buffer: [1024]u8 = undefined;
    var file_writer = std.Io.File.stdout().writer(init.io, &buffer);
    const out: figures.Output = .{ .json = json, .writer = &file_writer.interface };
    kvern.setThreadCount(thread_count) catch fail("--threads wants 1 to 256");

    if (what == .steps or what == .addresses) {
        if (!steps.is_available) fail("--steps and --addresses need Linux on x86_64");
        if (thread_count != 1) fail("--steps and --addresses count one thread");
        for (std.enums.values(kvern.Dtype)) |dtype| {
            if (isWanted(only, dtype)) try cached.count(init.gpa, out, dtype, what == .addresses);
        }
        return;
    }
    const read_rate = try kvern.readRate(decode.rotated_bytes, thread_count);
    if (!json) {
        try out.writer.print("level {s}, R {d:.2} GB/s, {d} threads; the last column is the share of R, of a copy for store\n", .{
            @tagName(kvern.kernels().level), read_rate / 1e9, thread_count,
        });
    }
    for (std.enums.values(kvern.Dtype)) |dtype| {
        if (!isWanted(only, dtype)) continue;
        if (what == .cached) {
            try cached.time(init.gpa, init.io, out, dtype, read_rate);
            continue;
        }
        for ([_]u32{ 4096, 32_768 }) |tokens| {
            if (dtype.isFloat()) try decode.contiguous(init.gpa, init.io, out, dtype, tokens, read_rate);
            try decode.paged(init.gpa, init.io, out, dtype, tokens, read_rate);
        }
    }
    if (what == .cached) return;
    for (std.enums.values(kvern.Dtype)) |dtype| {
        if (!isWanted(only, dtype)) continue;
        if (dtype.isFloat()) try store.store(init.gpa, init.io, out, dtype) else try store.quantize(init.gpa, init.io, out, dtype);
    }
}

fn isWanted(only: ?kvern.Dtype, dtype: kvern.Dtype) bool {
    return only == null or only.? == dtype;
}
