//! Packing vectors into bytes, for codes and for digits, by x86's instructions that round and saturate.

const builtin = @import("builtin");
const simd = @import("../lanes.zig");

const lanes = simd.lanes;
const Vector = simd.Vector;
const VectorI32 = simd.VectorI32;
const VectorI16 = @Vector(lanes * 2, i16);
const Bytes = @Vector(lanes * 4, u8);

/// Four vectors of floats below 2^31 in magnitude, NaN and Inf allowed and turned into any byte, rounded half to even or,
/// where `is_cut`, towards zero, and saturated to signed or unsigned bytes. Of each four lanes, those of the first
/// vector come first, then those of the second, and so on.
pub inline fn bytes(comptime is_signed: bool, floats: [4]Vector, comptime is_cut: bool) Bytes {
    var integers: [4]VectorI32 = undefined;
    inline for (&integers, floats) |*to, from| to.* = if (is_cut) cut(from) else rounded(from);
    const pairs = .{ packWords(integers[0], integers[1]), packWords(integers[2], integers[3]) };
    return if (is_signed) packSigned(pairs[0], pairs[1]) else packUnsigned(pairs[0], pairs[1]);
}

const Digits = @Vector(lanes * 4, i8);

/// Bits of a low digit: a number is 2^7 times its high digit and the low one.
pub const low_bits = 7;

/// Numbers of 15 bits, -2^14 to 2^14 - 1, as high digits and low ones: a low digit is the lowest seven bits, 0 to 127.
pub inline fn digits(numbers: [4]VectorI32) struct { Digits, Digits } {
    const mask: VectorI16 = @splat((1 << low_bits) - 1);
    const words = if (builtin.cpu.arch == .x86_64)
        .{ packWords(numbers[0], numbers[1]), packWords(numbers[2], numbers[3]) }
    else
        .{ joinWords(numbers[0], numbers[1]), joinWords(numbers[2], numbers[3]) };
    const shift: @Vector(lanes * 2, u4) = @splat(low_bits);
    return .{ joinBytes(words[0] >> shift, words[1] >> shift), joinBytes(words[0] & mask, words[1] & mask) };
}

/// Words that fit bytes, as bytes in the order of the numbers.
inline fn joinBytes(a: VectorI16, b: VectorI16) Digits {
    if (builtin.cpu.arch != .x86_64) {
        const parts = [2][lanes * 2]i8{ @as(@Vector(lanes * 2, i8), @truncate(a)), @as(@Vector(lanes * 2, i8), @truncate(b)) };
        return @bitCast(parts);
    }
    // Of each four lanes, those of the first vector come first.
    comptime var order: [lanes]i32 = undefined;
    inline for (&order, 0..) |*from, i| from.* = i % (lanes / 4) * 4 + i / (lanes / 4);
    return @bitCast(@shuffle(i32, @as(VectorI32, @bitCast(packSigned(a, b))), undefined, order));
}

inline fn joinWords(a: VectorI32, b: VectorI32) VectorI16 {
    const parts = [2][lanes]i16{ @as(@Vector(lanes, i16), @truncate(a)), @as(@Vector(lanes, i16), @truncate(b)) };
    return @bitCast(parts);
}

// A float that does not fit becomes the smallest i32: defined, unlike @intFromFloat.

inline fn rounded(x: Vector) VectorI32 {
    return if (lanes == 4) asm ("cvtps2dq %[x], %[n]"
        : [n] "=x" (-> VectorI32),
        : [x] "x" (x),
    ) else asm ("vcvtps2dq %[x], %[n]"
        : [n] "=v" (-> VectorI32),
        : [x] "v" (x),
    );
}

inline fn cut(x: Vector) VectorI32 {
    return if (lanes == 4) asm ("cvttps2dq %[x], %[n]"
        : [n] "=x" (-> VectorI32),
        : [x] "x" (x),
    ) else asm ("vcvttps2dq %[x], %[n]"
        : [n] "=v" (-> VectorI32),
        : [x] "v" (x),
    );
}

inline fn packWords(a: VectorI32, b: VectorI32) VectorI16 {
    return if (lanes == 4) asm ("packssdw %[b], %[words]"
        : [words] "=x" (-> VectorI16),
        : [_] "0" (a),
          [b] "x" (b),
    ) else asm ("vpackssdw %[b], %[a], %[words]"
        : [words] "=v" (-> VectorI16),
        : [a] "v" (a),
          [b] "v" (b),
    );
}

inline fn packSigned(a: VectorI16, b: VectorI16) Bytes {
    return if (lanes == 4) asm ("packsswb %[b], %[bytes]"
        : [bytes] "=x" (-> Bytes),
        : [_] "0" (a),
          [b] "x" (b),
    ) else asm ("vpacksswb %[b], %[a], %[bytes]"
        : [bytes] "=v" (-> Bytes),
        : [a] "v" (a),
          [b] "v" (b),
    );
}

inline fn packUnsigned(a: VectorI16, b: VectorI16) Bytes {
    return if (lanes == 4) asm ("packuswb %[b], %[bytes]"
        : [bytes] "=x" (-> Bytes),
        : [_] "0" (a),
          [b] "x" (b),
    ) else asm ("vpackuswb %[b], %[a], %[bytes]"
        : [bytes] "=v" (-> Bytes),
        : [a] "v" (a),
          [b] "v" (b),
    );
}
