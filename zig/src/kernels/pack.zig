//! Vectors as bytes, by x86's instructions that round and saturate: what codes and digits are packed with.

const builtin = @import("builtin");
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

/// Four vectors of integers that fit bytes, as bytes in their order.
pub inline fn narrow(integers: [4]VectorI32) @Vector(lanes * 4, i8) {
    if (builtin.cpu.arch != .x86_64) {
        var parts: [4][lanes]i8 = undefined;
        inline for (&parts, integers) |*to, from| to.* = @as(@Vector(lanes, i8), @truncate(from));
        return @bitCast(parts);
    }
    const packed_bytes = packSigned(packWords(integers[0], integers[1]), packWords(integers[2], integers[3]));
    // Of each four lanes, those of the first vector come first.
    comptime var order: [lanes]i32 = undefined;
    inline for (&order, 0..) |*from, i| from.* = i % (lanes / 4) * 4 + i / (lanes / 4);
    return @bitCast(@shuffle(i32, @as(VectorI32, @bitCast(packed_bytes)), undefined, order));
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
