//! The integer dot product of a level: every lane adds four products of bytes.
//!
//!     sums[lane] += codes[lane][0] * digits[0] + ... + codes[lane][3] * digits[3]        for all lanes at once
//!
//! Codes differ from lane to lane, the four digits are the same for all: `group.zig` lays codes out for this, so that no
//! sum ever runs across a vector. Digits are -127 to 127, as every way below needs them:
//!
//!     avx512         vpdpbusd multiplies unsigned by signed bytes: 8-bit codes have their sign bit flipped, which adds
//!                    `code_offset` to each of them
//!     v3, v2         pmaddubsw multiplies unsigned by signed bytes and adds pairs with saturation at 32767: the sign of an
//!                    8-bit code goes to the digit. The largest pair is 2 * 128 * 127 = 32512. Pairs of smaller codes stay
//!                    in 16 bits for 32 numbers: 8 * 2 * 15 * 127 = 30480
//!     dotprod        sdot multiplies signed bytes; codes of 4 and 2 bits are below 128
//!     others         products and pairs of them in 16 bits
//!
//! All of them are exact, so all levels give the same sums.

const std = @import("std");
const builtin = @import("builtin");
const group = @import("../../group.zig");
const simd = @import("../lanes.zig");
const lanes = simd.lanes;

pub const Sums = simd.VectorI32;

/// [lane][4], unsigned.
pub const Codes = @Vector(lanes * group.quad, u8);

/// [lane][4], the same four in every lane.
pub const Digits = @Vector(lanes * group.quad, i8);

const Way = enum { vnni, ssse3, sdot, generic };

const way: Way = switch (builtin.cpu.arch) {
    .x86_64 => if (lanes == 16 and builtin.cpu.has(.x86, .avx512vnni))
        .vnni
    else if (lanes <= 8 and builtin.cpu.has(.x86, .ssse3))
        .ssse3
    else
        .generic,
    .aarch64 => if (builtin.cpu.has(.aarch64, .dotprod)) .sdot else .generic,
    else => .generic,
};

/// Added by `load` to codes of 8 bits: a dot product is too large by this times the sum of the digits.
pub const code_offset = if (way == .vnni) 128 else 0;

/// Vectors of codes in one stretch of `lanes * 4` stored bytes: 8 bits hold one, two or four codes.
pub fn vectorCount(comptime bits: u4) comptime_int {
    return 8 / bits;
}

/// The codes of `lanes * 4` bytes at `source`: those of the first quad of sums, then those of the next.
pub inline fn load(comptime bits: u4, source: [*]const u8) [vectorCount(bits)]Codes {
    const bytes: Codes = @as(*align(1) const [lanes * group.quad]u8, @ptrCast(source)).*;
    switch (bits) {
        8 => return .{if (code_offset != 0) bytes ^ @as(Codes, @splat(0x80)) else bytes},
        4, 2 => {
            const mask: Codes = @splat((1 << bits) - 1);
            var codes: [vectorCount(bits)]Codes = undefined;
            inline for (&codes, 0..) |*vector, i| vector.* = (bytes >> @splat(i * bits)) & mask;
            return codes;
        },
        else => comptime unreachable,
    }
}

/// Four digits for every lane.
pub inline fn broadcast(digits: *const [group.quad]i8) Digits {
    return @bitCast(@as(Sums, @splat(@as(i32, @bitCast(digits.*)))));
}

/// Sums of products: of 32 bits, or of 16 where `mustFold`.
pub fn Partial(comptime bits: u4) type {
    return if (mustFold(bits)) Pairs else Sums;
}

/// Whether sums are of 16 bits, and must be folded into sums of 32 bits after each `fold_numbers` numbers.
pub fn mustFold(comptime bits: u4) bool {
    return way == .ssse3 and bits < 8;
}

pub const fold_numbers = 32;

/// Adds the products of codes of `bits` bits, as `load` gives them, to `partial`.
pub inline fn add(comptime bits: u4, partial: Partial(bits), codes: Codes, digits: Digits) Partial(bits) {
    return switch (way) {
        .vnni => asm ("vpdpbusd %[digits], %[codes], %[sums]"
            : [sums] "=v" (-> Sums),
            : [codes] "v" (codes),
              [digits] "v" (digits),
              [_] "0" (partial),
        ),
        .ssse3 => if (bits == 8)
            partial +% addPairs(multiplyPairs(@abs(@as(Digits, @bitCast(codes))), negateBy(digits, codes)))
        else
            partial +% multiplyPairs(codes, digits),
        .sdot => asm ("sdot %[sums].4s, %[codes].16b, %[digits].16b"
            : [sums] "=w" (-> Sums),
            : [codes] "w" (codes),
              [digits] "w" (digits),
              [_] "0" (partial),
        ),
        .generic => partial +% dotGeneric(bits, codes, digits),
    };
}

/// Sums of 16 bits as sums of 32 bits: neighbours added.
pub inline fn fold(pairs: Pairs) Sums {
    return addPairs(pairs);
}

const Pairs = @Vector(lanes * 2, i16);

/// Unsigned times signed bytes, neighbours added.
inline fn multiplyPairs(codes: Codes, digits: Digits) Pairs {
    return if (lanes == 8) asm ("vpmaddubsw %[digits], %[codes], %[pairs]"
        : [pairs] "=x" (-> Pairs),
        : [codes] "x" (codes),
          [digits] "x" (digits),
    ) else asm ("pmaddubsw %[digits], %[pairs]"
        : [pairs] "=x" (-> Pairs),
        : [_] "0" (codes),
          [digits] "x" (digits),
    );
}

/// Neighbours added.
inline fn addPairs(pairs: Pairs) Sums {
    const ones: Pairs = @splat(1);
    return if (lanes == 8) asm ("vpmaddwd %[ones], %[pairs], %[sums]"
        : [sums] "=x" (-> Sums),
        : [pairs] "x" (pairs),
          [ones] "x" (ones),
    ) else asm ("pmaddwd %[ones], %[sums]"
        : [sums] "=x" (-> Sums),
        : [_] "0" (pairs),
          [ones] "x" (ones),
    );
}

/// Digits with the sign of signed codes, 0 where the code is 0.
inline fn negateBy(digits: Digits, codes: Codes) Digits {
    return if (lanes == 8) asm ("vpsignb %[codes], %[digits], %[signed]"
        : [signed] "=x" (-> Digits),
        : [codes] "x" (codes),
          [digits] "x" (digits),
    ) else asm ("psignb %[codes], %[signed]"
        : [signed] "=x" (-> Digits),
        : [_] "0" (digits),
          [codes] "x" (codes),
    );
}

inline fn dotGeneric(comptime bits: u4, codes: Codes, digits: Digits) Sums {
    const Products = @Vector(lanes * group.quad, i16);
    const factors: Products = if (bits == 8) @as(Digits, @bitCast(codes)) else codes;
    const products = factors *% @as(Products, digits);
    const pairs = @shuffle(i16, products, undefined, every_second) +% @shuffle(i16, products, undefined, every_second_after);
    const even_pairs: Sums = @shuffle(i16, pairs, undefined, every_second[0..lanes].*);
    const odd_pairs: Sums = @shuffle(i16, pairs, undefined, every_second_after[0..lanes].*);
    return even_pairs +% odd_pairs;
}

/// 0, 2, 4 and so on, and 1, 3, 5 and so on.
const every_second: [lanes * 2]i32 = std.simd.iota(i32, lanes * 2) * @as(@Vector(lanes * 2, i32), @splat(2));
const every_second_after: [lanes * 2]i32 = @as(@Vector(lanes * 2, i32), every_second) + @as(@Vector(lanes * 2, i32), @splat(1));
