//! Which levels this machine has: what its CPU can do and its operating system saves.

const std = @import("std");
const builtin = @import("builtin");
pub const Level = @import("table.zig").Level;
const memcheck = @import("build_options").memcheck;

/// AMX is requested from Linux alone: on Windows and macOS `build.zig` links no kernels that need it.
pub const may_have_amx = builtin.cpu.arch == .x86_64 and builtin.os.tag == .linux;

/// Whether this CPU has the instructions of a level, and its operating system saves their registers.
pub fn has(level: Level) bool {
    return switch (level) {
        .v2, .neon => true,
        .v3 => builtin.cpu.arch == .x86_64 and hasAvx2(),
        .avx512 => builtin.cpu.arch == .x86_64 and hasAvx2() and hasAvx512(),
        .amx => may_have_amx and hasAvx2() and hasAvx512() and hasAmx(),
        .dotprod => builtin.cpu.arch == .aarch64 and hasDotprod(),
    };
}

/// SDOT and UDOT of ARMv8.4, optional before.
fn hasDotprod() bool {
    return switch (builtin.os.tag) {
        .linux => std.os.linux.getauxval(std.elf.AT_HWCAP) >> 20 & 1 == 1, // HWCAP_ASIMDDP
        .macos => true, // every Apple CPU for the Mac has them
        else => false,
    };
}

const Cpuid = struct { eax: u32, ebx: u32, ecx: u32, edx: u32 };

fn cpuid(leaf: u32, subleaf: u32) Cpuid {
    var eax: u32 = undefined;
    var ebx: u32 = undefined;
    var ecx: u32 = undefined;
    var edx: u32 = undefined;
    asm volatile ("cpuid"
        : [_] "={eax}" (eax),
          [_] "={ebx}" (ebx),
          [_] "={ecx}" (ecx),
          [_] "={edx}" (edx),
        : [_] "{eax}" (leaf),
          [_] "{ecx}" (subleaf),
    );
    return .{ .eax = eax, .ebx = ebx, .ecx = ecx, .edx = edx };
}

/// The register states the operating system saves (XCR0). Call only when CPUID reports OSXSAVE.
fn xgetbv() u32 {
    return asm volatile (
        \\ xor %%ecx, %%ecx
        \\ xgetbv
        : [_] "={eax}" (-> u32),
        :
        : .{ .edx = true, .ecx = true });
}

fn allSet(word: u32, comptime bits: []const u5) bool {
    comptime var mask: u32 = 0;
    inline for (bits) |bit| mask |= @as(u32, 1) << bit;
    return word & mask == mask;
}

/// All that `x86_64_v3` may emit: AVX2, BMI1, BMI2, F16C, FMA, LZCNT, MOVBE, and YMM saved by the system.
fn hasAvx2() bool {
    if (cpuid(0, 0).eax < 7) return false;
    const leaf1 = cpuid(1, 0);
    // FMA 12, MOVBE 22, XSAVE 26, OSXSAVE 27, AVX 28, F16C 29
    if (!allSet(leaf1.ecx, &.{ 12, 22, 26, 27, 28, 29 })) return false;
    if (!allSet(xgetbv(), &.{ 1, 2 })) return false;
    // BMI1 3, AVX2 5, BMI2 8
    if (!allSet(cpuid(7, 0).ebx, &.{ 3, 5, 8 })) return false;
    if (cpuid(0x8000_0000, 0).eax < 0x8000_0001) return false;
    return allSet(cpuid(0x8000_0001, 0).ecx, &.{5}); // LZCNT
}

/// All that `x86_64_v4` and VNNI may emit: AVX-512 F, DQ, CD, BW, VL, VNNI, and ZMM saved by the system.
fn hasAvx512() bool {
    const leaf7 = cpuid(7, 0);
    // F 16, DQ 17, CD 28, BW 30, VL 31
    if (!allSet(leaf7.ebx, &.{ 16, 17, 28, 30, 31 })) return false;
    if (!allSet(leaf7.ecx, &.{11})) return false; // VNNI
    return allSet(xgetbv(), &.{ 1, 2, 5, 6, 7 });
}

/// AMX with products of bytes and of bf16, tile registers saved by the system, and its leave to use them.
fn hasAmx() bool {
    // BF16 22, TILE 24, INT8 25
    if (!allSet(cpuid(7, 0).edx, &.{ 22, 24, 25 })) return false;
    // The configuration of the tile registers, and their data.
    return allSet(xgetbv(), &.{ 17, 18 }) and mayUseTileRegisters();
}

/// The answer of Linux to whether this process may use tile registers.
var tile_register_answer: std.atomic.Value(enum(u8) { not_asked, no, yes }) = .init(.not_asked);

/// Whether Linux lets this process use tile registers. It saves them only for a process that requested them once; from then on
/// all its threads may use them, present and future ones, and all their signal stacks must have room for 8 KiB more. It
/// refuses while one is smaller: the first answer is kept, as a level may not come and go. Linux before 5.16 knows no such
/// request, and refuses.
fn mayUseTileRegisters() bool {
    if (tile_register_answer.load(.acquire) == .not_asked) {
        const request_permission = 0x1023; // ARCH_REQ_XCOMP_PERM
        const register_data = 18;
        const refused = std.os.linux.syscall2(.arch_prctl, request_permission, register_data);
        // Where two threads request them at once, the first answer is kept.
        _ = tile_register_answer.cmpxchgStrong(.not_asked, if (refused == 0) .yes else .no, .acq_rel, .acquire);
    }
    return tile_register_answer.load(.acquire) == .yes;
}

test "Linux lets a process use tile registers or not, for good" {
    if (!may_have_amx) return error.SkipZigTest; // requested from no other system
    if (memcheck) return error.SkipZigTest; // valgrind stops at the question
    const answer = mayUseTileRegisters();
    for (0..3) |_| try std.testing.expectEqual(answer, mayUseTileRegisters());
    if (has(.amx)) try std.testing.expect(answer);
}
