//! Copies of rows: out of whatever layout and format they lie in, into a caller's arrays.
//!
//!     token-major   [row][kv_head][head_dim]      as an append takes it by default
//!     head-major    [kv_head][row][head_dim]      as a `past_key_values` tensor has it
//!
//! Rows of a block lie head-major, so that a head-major copy of them is one piece for each block and head.

const std = @import("std");
const assert = std.debug.assert;
const checkApart = @import("overlap.zig").checkApart;
const dispatch = @import("../kernels/dispatch.zig");
const Output = @import("input.zig").Output;
const Rows = @import("rows.zig").Rows;
const shapes = @import("../shape.zig");

/// Which rows of a layer are copied.
pub const Range = struct {
    /// Position of the first one.
    start: u32 = 0,
    /// How many. Each of them must be there, so that a copy never has fewer rows than its reader counts with; null for all that
    /// are seen from `start` on.
    count: ?u32 = null,

    /// The rows that a copy of this range has.
    fn rowCount(range: Range, rows: *const Rows) error{PositionOutOfRange}!u32 {
        if (range.start > rows.row_count) return error.PositionOutOfRange;
        const count = range.count orelse return residentFrom(rows, range.start);
        if (count == 0) return 0;
        const end = rows.residentEnd(range.start) orelse return error.PositionOutOfRange;
        if (count > end - range.start) return error.PositionOutOfRange;
        return count;
    }

    fn residentFrom(rows: *const Rows, start: u32) u32 {
        if (rows.first <= rows.sink_end) return rows.row_count - start;
        return rows.sink_end -| start + rows.row_count - @max(start, rows.first);
    }
};

pub const Error = error{ PositionOutOfRange, InvalidSize, InvalidConfig };

/// Copies rows of a layer that are seen, and returns their count. The copies share no memory, with one another or with the
/// rows. A refused copy has written nothing.
pub fn gather(rows: *const Rows, range: Range, k: Output, v: Output) Error!u32 {
    const row_count = try range.rowCount(rows);
    const outputs = [_]Output{ k, v };
    var written: [outputs.len][]u8 = undefined;
    for (outputs, &written) |output, *memory| {
        const element_count = try output.elements(rows, row_count);
        if (output.element_count < element_count) return error.InvalidSize;
        memory.* = output.written(element_count);
    }
    try checkApart(written[0], written[1]);
    for (written) |memory| try rows.checkApartFrom(memory);
    var row: u32 = 0;
    var position = range.start;
    while (row < row_count) {
        const end = rows.residentEnd(position) orelse {
            position = rows.first;
            continue;
        };
        const adjacent = rows.run(0, position, @min(end, position + (row_count - row)));
        const copy: Copy = .{
            .rows = rows,
            .row_count = row_count,
            .row = row,
            .position = position,
            .token_count = adjacent.token_count,
        };
        for ([_]shapes.Side{ .keys, .values }, outputs) |side, output| copy.write(side, output);
        row += adjacent.token_count;
        position += adjacent.token_count;
    }
    assert(row == row_count);
    return row_count;
}

/// Adjacent rows on their way.
const Copy = struct {
    rows: *const Rows,
    /// Rows of the whole copy.
    row_count: u32,
    /// Where the first one goes.
    row: u32,
    /// Where it is.
    position: u32,
    token_count: u32,

    fn write(copy: Copy, side: shapes.Side, output: Output) void {
        switch (copy.rows.memory) {
            .contiguous => |contiguous| copy.writeContiguous(contiguous, side, output),
            .paged => |paged| {
                const block = paged.blockAt(copy.position);
                for (0..copy.rows.kv_head_count) |head| block.read(
                    paged.layer,
                    side,
                    @intCast(head),
                    copy.position % paged.block_size,
                    copy.token_count,
                    copy.destination(output, @intCast(head)),
                    output.dtype,
                    output.tokenStride(copy.rows),
                );
            },
        }
    }

    fn writeContiguous(copy: Copy, contiguous: Rows.Contiguous, side: shapes.Side, output: Output) void {
        const shape = contiguous.shape;
        const dtype = if (side == .keys) contiguous.dtype_k else contiguous.dtype_v;
        const first = (if (side == .keys) contiguous.keys else contiguous.values) + shape.positionBytes(copy.position, dtype);
        const kernels = dispatch.kernels();
        switch (output.layout) {
            // Rows of one token after the other on both sides: one piece.
            .token_major => kernels.convert(&.{
                .destination = copy.destination(output, 0),
                .destination_dtype = output.dtype,
                .source = first,
                .source_dtype = dtype,
                .element_count = @as(u64, copy.token_count) * shape.kvDim(),
            }),
            .head_major => for (0..shape.kv_head_count) |head| kernels.convert(&.{
                .destination = copy.destination(output, @intCast(head)),
                .destination_dtype = output.dtype,
                .destination_stride = output.tokenStride(shape),
                .source = first + shape.headBytes(@intCast(head), dtype),
                .source_dtype = dtype,
                .source_stride = shape.rowBytes(dtype),
                .row_count = copy.token_count,
                .element_count = shape.head_dim,
            }),
        }
    }

    fn destination(copy: Copy, output: Output, kv_head: u32) [*]u8 {
        return output.headRow(copy.rows, copy.row_count, kv_head, copy.row);
    }
};

test {
    _ = @import("gather_test.zig");
}
