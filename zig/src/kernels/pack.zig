//! Vectors of floats as bytes, with x86's instructions that round and saturate: what codes are packed with.

const convert = @import("convert.zig");

const lanes = convert.lanes;
const Vector = convert.Vector;
const VectorI32 = @Vector(lanes, i32);
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

// What does not fit becomes the smallest i32: defined, unlike @intFromFloat.

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
