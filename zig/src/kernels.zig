//! The CPU kernels of one level.
//!
//! `build.zig` compiles this file once per CPU level, with that level's instructions, into an object that exports one
//! table under the level's name; all objects are linked into one library and `kernels/dispatch.zig` picks a table at
//! start. Nothing outside `kernels/` may be imported from here but element types and shapes: whatever is compiled into two
//! objects must not have state.

const std = @import("std");
const attend = @import("kernels/attend/attend.zig");
const convert = @import("kernels/convert.zig");
const dequantize = @import("kernels/codec/dequantize.zig");
const memory_read = @import("kernels/read.zig");
const quantize = @import("kernels/codec/quantize.zig");
const simd = @import("kernels/lanes.zig");
const state = @import("kernels/attend/state.zig");
const table = @import("kernels/table.zig");
const level_name = @import("level").name;

/// No stack traces from kernels: a failed assertion of a Debug build says what failed and stops.
pub const panic = std.debug.simple_panic;

const kernels: table.Table = .{
    .level = @field(table.Level, level_name),
    .lanes = simd.lanes,
    .convert = convert.convert,
    .convert_checked = convert.convertChecked,
    .storable = convert.storable,
    .quantize = quantize.quantize,
    .dequantize = dequantize.dequantize,
    .quantize_records = quantize.quantizeRecords,
    .dequantize_records = dequantize.dequantizeRecords,
    .attend = attend.attend,
    .prepare = attend.prepare,
    .merge = state.merge,
    .finish = state.finish,
    .read = memory_read.read,
};

comptime {
    @export(&kernels, .{ .name = "kvern_kernels_" ++ level_name, .visibility = .hidden });
    std.debug.assert(simd.lanes == kernels.level.lanes());
}
