//! The AMX instructions of the kernels for tests on machines without them: a CPU that lacks one raises SIGILL, and the
//! handler here does what the instruction would have done. No part of the library.
//!
//! Written from the operation sections of Intel's Software Developer's Manual, volume 2 (LDTILECFG, TILELOADD, TILESTORED,
//! TILEZERO, TILERELEASE, TDPBSSD) and not from `attend/tile_register.zig`, since no CPU here would contradict the two of them:
//!
//!     opcode            mod   instruction
//!     NP 0F38.W0 49     mem   LDTILECFG: shapes from memory, all tile registers zeroed
//!     NP 0F38.W0 49     11    TILERELEASE
//!     F2 0F38.W0 49     11    TILEZERO reg
//!     F2 0F38.W0 4B     mem   TILELOADD reg: row i from base + i * index; zeros beyond the rows and bytes of the shape
//!     F3 0F38.W0 4B     mem   TILESTORED reg
//!     F2 0F38.W0 5E     11    TDPBSSD: reg[m].dword[n] += the dot product of rm[m].dword[k] and vvvv[k].dword[n], all k
//!
//! all of them VEX.128. What the manual answers with a fault, and what the kernels never need, panics here. Any other
//! instruction that the CPU does not know crashes as it would have.
//!
//! Not here: that interrupted loads and stores go on at their start row, and faults of memory on the way.

const std = @import("std");
const builtin = @import("builtin");
const dispatch = @import("../dispatch.zig");
const assert = std.debug.assert;
const linux = std.os.linux;
const posix = std.posix;

/// Where the handler knows the machine it is on.
pub const is_here = builtin.cpu.arch == .x86_64 and builtin.os.tag == .linux;

/// The kernels of the level `amx`: on the CPU's own tile registers, or on those of this file. Null where the CPU lacks
/// other instructions of that level.
pub fn kernels() ?*const dispatch.Table {
    if (comptime !is_here) return null;
    if (dispatch.tableOf(.amx)) |table| return table;
    if (dispatch.tableOf(.avx512) == null) return null;
    install();
    return linked.kvern_kernels_amx;
}

const linked = struct {
    const kvern_kernels_amx = @extern(*const dispatch.Table, .{ .name = "kvern_kernels_amx" });
};

/// Instructions this thread has emulated.
pub threadlocal var instruction_count: u64 = 0;

/// Whether this thread has released the tile registers it configured.
pub fn isReleased() bool {
    return !tile_registers.is_configured;
}

var previous: ?posix.Sigaction = null;

fn install() void {
    if (previous != null) return;
    var old: posix.Sigaction = undefined;
    posix.sigaction(.ILL, &.{
        .handler = .{ .sigaction = onIllegalInstruction },
        .mask = posix.sigemptyset(),
        .flags = posix.SA.SIGINFO,
    }, &old);
    previous = old;
}

fn onIllegalInstruction(_: posix.SIG, _: *const posix.siginfo_t, context_pointer: ?*anyopaque) callconv(.c) void {
    const context: *Context = @ptrCast(@alignCast(context_pointer.?));
    const instruction = Instruction.decode(@ptrFromInt(context.rip), &context.registers) orelse {
        // Back at the instruction, the handler that was there before is called for it.
        posix.sigaction(.ILL, &previous.?, null);
        return;
    };
    tile_registers.execute(instruction);
    instruction_count += 1;
    context.rip += instruction.byte_count;
}

/// What Linux gives a handler: `ucontext_t`, as far as it is needed.
const Context = extern struct {
    flags: usize,
    link: ?*anyopaque,
    stack: linux.stack_t,
    /// r8 to r15, then rdi rsi rbp rbx rdx rax rcx rsp.
    registers: Registers,
    rip: u64,
};

const Registers = [16]u64;

/// Where the register of a number lies in `Registers`: rax rcx rdx rbx rsp rbp rsi rdi r8 to r15.
const register_places = [16]u8{ 13, 14, 12, 11, 15, 10, 9, 8, 0, 1, 2, 3, 4, 5, 6, 7 };

const Instruction = struct {
    operation: Operation,
    /// ModRM.reg, ModRM.rm and VEX.vvvv as tile registers.
    reg: u3 = 0,
    rm: u3 = 0,
    vvvv: u3 = 0,
    /// Address of the first row, and bytes from one row to the next.
    base: u64 = 0,
    index: u64 = 0,
    byte_count: u8,

    const Operation = enum { ldtilecfg, tilerelease, tilezero, tileloadd, tilestored, tdpbssd };

    const Prefix = enum(u2) { none = 0, x66 = 1, xf3 = 2, xf2 = 3 };

    const vex_byte_count = 4; // C4, two bytes of VEX, the opcode

    /// The instruction at `code`, or null when it is none of those above.
    fn decode(code: [*]const u8, registers: *const Registers) ?Instruction {
        if (code[0] != 0xc4) return null;
        const map = code[1] & 0x1f;
        const is_w0_128 = code[2] & 0b1000_0100 == 0;
        if (map != 2 or !is_w0_128) return null;
        const prefix: Prefix = @enumFromInt(code[2] & 3);
        const modrm = code[4];
        const has_memory = modrm >> 6 != 3;
        const operation: Operation = switch (code[3]) {
            0x49 => if (prefix == .none and has_memory)
                .ldtilecfg
            else if (prefix == .none and modrm == 0xc0)
                .tilerelease
            else if (prefix == .xf2 and !has_memory and modrm & 7 == 0)
                .tilezero
            else
                return null,
            0x4b => if (!has_memory) return null else switch (prefix) {
                .xf2 => .tileloadd,
                .xf3 => .tilestored,
                else => return null,
            },
            0x5e => if (has_memory or prefix != .xf2) return null else .tdpbssd,
            else => return null,
        };
        // VEX holds the top bits of register numbers inverted: there are 8 tile registers.
        const vvvv = ~code[2] >> 3 & 0xf;
        expect(code[1] & 0x80 != 0, "a tile register above tmm7");
        expect(vvvv == 0 or operation == .tdpbssd and vvvv < 8, "VEX.vvvv names no tile register");
        var instruction: Instruction = .{
            .operation = operation,
            .reg = @intCast(modrm >> 3 & 7),
            .rm = if (has_memory) 0 else @intCast(modrm & 7),
            .vvvv = @intCast(vvvv),
            .byte_count = vex_byte_count + 1,
        };
        if (has_memory) instruction.decodeMemory(code, registers);
        return instruction;
    }

    /// The forms `(base)`, `(base,index,1)`, and either with a displacement of 0: some bases have no other form.
    fn decodeMemory(instruction: *Instruction, code: [*]const u8, registers: *const Registers) void {
        const modrm = code[4];
        const mod = modrm >> 6;
        const base_top = ~code[1] >> 5 & 1;
        const index_top = ~code[1] >> 6 & 1;
        var base = modrm & 7;
        if (base == 4) {
            const sib = code[5];
            const index = index_top << 3 | (sib >> 3 & 7);
            instruction.byte_count += 1;
            base = sib & 7;
            expect(sib >> 6 == 0, "a scale other than 1");
            if (index != 4) instruction.index = registers[register_places[index]];
        } else expect(instruction.operation == .ldtilecfg, "rows of a tile register without an index");
        expect(mod == 1 or mod == 0 and base != 5, "a displacement of 32 bits");
        if (mod == 1) {
            expect(code[instruction.byte_count] == 0, "a displacement other than 0");
            instruction.byte_count += 1;
        }
        instruction.base = registers[register_places[base_top << 3 | base]];
        if (instruction.operation == .ldtilecfg) expect(instruction.index == 0, "a configuration with an index");
    }
};

threadlocal var tile_registers: TileRegisters = .{};

/// TILECFG and TILEDATA of palette 1.
const TileRegisters = struct {
    is_configured: bool = false,
    registers: [8]TileRegister = @splat(.{}),

    const rows_max = 16;
    const row_bytes_max = 64;

    const TileRegister = struct {
        row_count: u8 = 0,
        row_bytes: u8 = 0,
        rows: [rows_max][row_bytes_max]u8 = @splat(@splat(0)),

        fn dword(register: *const TileRegister, row: usize, column: usize) [4]i8 {
            return @bitCast(register.rows[row][4 * column ..][0..4].*);
        }
    };

    fn execute(self: *TileRegisters, instruction: Instruction) void {
        switch (instruction.operation) {
            .ldtilecfg => self.configure(@ptrFromInt(instruction.base)),
            .tilerelease => self.* = .{},
            .tilezero => self.configured(instruction.reg).rows = @splat(@splat(0)),
            .tileloadd => {
                const register = self.configured(instruction.reg);
                register.rows = @splat(@splat(0));
                for (register.rows[0..register.row_count], 0..) |*row, i| {
                    const source: [*]const u8 = @ptrFromInt(instruction.base +% i *% instruction.index);
                    @memcpy(row[0..register.row_bytes], source);
                }
            },
            .tilestored => {
                const register = self.configured(instruction.reg);
                for (register.rows[0..register.row_count], 0..) |*row, i| {
                    const destination: [*]u8 = @ptrFromInt(instruction.base +% i *% instruction.index);
                    @memcpy(destination, row[0..register.row_bytes]);
                }
            },
            .tdpbssd => self.multiply(instruction.reg, instruction.rm, instruction.vvvv),
        }
    }

    /// Loads the shapes. Byte 0 is the palette, byte 1 the start row, bytes 16 to 31 the bytes of a row of each tile register,
    /// u16, bytes 48 to 55 the rows of each; all others must be 0.
    fn configure(self: *TileRegisters, bytes: *const [64]u8) void {
        expect(bytes[0] == 1, "a palette other than 1");
        expect(bytes[1] == 0, "a start row");
        expect(std.mem.allEqual(u8, bytes[2..16], 0), "reserved bytes of a configuration");
        expect(std.mem.allEqual(u8, bytes[32..48], 0), "a row of a tile register above tmm7");
        expect(std.mem.allEqual(u8, bytes[56..64], 0), "rows of a tile register above tmm7");
        self.* = .{ .is_configured = true };
        for (&self.registers, 0..) |*register, i| {
            const row_bytes = std.mem.readInt(u16, bytes[16 + 2 * i ..][0..2], .little);
            const row_count = bytes[48 + i];
            expect(row_bytes <= row_bytes_max and row_count <= rows_max, "a tile register larger than 16 rows of 64 bytes");
            expect((row_bytes == 0) == (row_count == 0), "a tile register with rows or bytes alone");
            register.row_bytes = @intCast(row_bytes);
            register.row_count = row_count;
        }
    }

    fn configured(self: *TileRegisters, number: u3) *TileRegister {
        expect(self.is_configured, "a tile register before LDTILECFG");
        expect(self.registers[number].row_count != 0, "a tile register without a shape");
        return &self.registers[number];
    }

    /// TDPBSSD sums, a, b.
    fn multiply(self: *TileRegisters, sums_number: u3, a_number: u3, b_number: u3) void {
        expect(sums_number != a_number and sums_number != b_number and a_number != b_number, "one tile register as two operands");
        const sums = self.configured(sums_number);
        const a = self.configured(a_number);
        const b = self.configured(b_number);
        expect(sums.row_bytes % 4 == 0 and a.row_bytes % 4 == 0 and b.row_bytes % 4 == 0, "rows of no whole dwords");
        expect(sums.row_count == a.row_count, "sums and the first operand differ in rows");
        expect(sums.row_bytes == b.row_bytes, "sums and the second operand differ in columns");
        expect(a.row_bytes / 4 == b.row_count, "the operands do not fit each other");
        for (0..sums.row_count) |m| for (0..a.row_bytes / 4) |k| for (0..sums.row_bytes / 4) |n| {
            const sum: *align(1) i32 = @ptrCast(&sums.rows[m][4 * n]);
            for (a.dword(m, k), b.dword(k, n)) |x, y| sum.* +%= @as(i32, x) * y;
        };
    }
};

fn expect(holds: bool, comptime violation: []const u8) void {
    if (!holds) @panic("AMX: " ++ violation);
}

test "Instruction.decode: what an assembler made of the instructions, and of others" {
    const testing = std.testing;
    var registers: Registers = undefined;
    for (register_places, 100..) |place, value| registers[place] = value;
    const rows = [_]struct { []const u8, Instruction }{
        // ldtilecfg (%rdx), 0(%r13), (%r12)
        .{ &.{ 0xc4, 0xe2, 0x78, 0x49, 0x02 }, .{ .operation = .ldtilecfg, .base = 102, .byte_count = 5 } },
        .{ &.{ 0xc4, 0xc2, 0x78, 0x49, 0x45, 0x00 }, .{ .operation = .ldtilecfg, .base = 113, .byte_count = 6 } },
        .{ &.{ 0xc4, 0xc2, 0x78, 0x49, 0x04, 0x24 }, .{ .operation = .ldtilecfg, .base = 112, .byte_count = 6 } },
        // tilerelease; tilezero %tmm7
        .{ &.{ 0xc4, 0xe2, 0x78, 0x49, 0xc0 }, .{ .operation = .tilerelease, .byte_count = 5 } },
        .{ &.{ 0xc4, 0xe2, 0x7b, 0x49, 0xf8 }, .{ .operation = .tilezero, .reg = 7, .byte_count = 5 } },
        // tileloadd (%rdi,%rsi,1), %tmm3; (%r12,%r13,1), %tmm2
        .{
            &.{ 0xc4, 0xe2, 0x7b, 0x4b, 0x1c, 0x37 },
            .{ .operation = .tileloadd, .reg = 3, .base = 107, .index = 106, .byte_count = 6 },
        },
        .{
            &.{ 0xc4, 0x82, 0x7b, 0x4b, 0x14, 0x2c },
            .{ .operation = .tileloadd, .reg = 2, .base = 112, .index = 113, .byte_count = 6 },
        },
        // tilestored %tmm5, 0(%r13,%r12,1)
        .{
            &.{ 0xc4, 0x82, 0x7a, 0x4b, 0x6c, 0x25, 0x00 },
            .{ .operation = .tilestored, .reg = 5, .base = 113, .index = 112, .byte_count = 7 },
        },
        // tdpbssd %tmm4, %tmm3, %tmm0
        .{
            &.{ 0xc4, 0xe2, 0x5b, 0x5e, 0xc3 },
            .{ .operation = .tdpbssd, .reg = 0, .rm = 3, .vvvv = 4, .byte_count = 5 },
        },
    };
    for (rows) |row| try testing.expectEqual(row[1], Instruction.decode(row[0].ptr, &registers).?);
    const others = [_][]const u8{
        &.{ 0x0f, 0x0b, 0, 0, 0 }, // ud2
        &.{ 0xc4, 0xe2, 0x71, 0x50, 0xc2 }, // vpdpbusd %xmm2, %xmm1, %xmm0
        &.{ 0xc4, 0xe2, 0x5a, 0x5c, 0xc3 }, // tdpbf16ps %tmm4, %tmm3, %tmm0
        &.{ 0xc4, 0xe2, 0x59, 0x5e, 0xc3 }, // tdpbusd %tmm4, %tmm3, %tmm0
    };
    for (others) |code| try testing.expectEqual(null, Instruction.decode(code.ptr, &registers));
}
