//! One sequence, whatever layout is behind it: what can be done with a token stream is said once, here.
//!
//! A feature that both layouts have is a function of both and one line below. What only one of them can do (a fork, a block
//! table) is asked of that one.

const std = @import("std");
const contiguous = @import("contiguous.zig");
const paged = @import("paged/cache.zig");
const input = @import("input.zig");
const Input = input.Input;
const Output = input.Output;
const Range = @import("gather.zig").Range;
const Rows = @import("rows.zig").Rows;
const views = @import("view.zig");
const ContiguousKv = views.ContiguousKv;
const View = views.View;

/// Where a layer lives.
pub const Device = enum(u32) { cpu = 0 };

/// A sequence of either cache.
pub const Sequence = union(enum) {
    contiguous: contiguous.Sequence,
    paged: *paged.Sequence,

    /// Appends n >= 0 rows of one layer and returns the position of the first.
    pub fn append(self: Sequence, layer_index: u32, k: Input, v: Input) !u32 {
        switch (self) {
            inline else => |sequence| return sequence.append(layer_index, k, v),
        }
    }

    /// Makes `token_count` pending rows count. Every layer must have exactly that many.
    pub fn commit(self: Sequence, token_count: u32) !void {
        switch (self) {
            inline else => |sequence| return sequence.commit(token_count),
        }
    }

    /// Commits only the pending rows whose index is in `kept`, ascending; the others are dropped.
    pub fn commitKept(self: Sequence, kept: []const u32) !void {
        switch (self) {
            inline else => |sequence| return sequence.commitKept(kept),
        }
    }

    /// Rewinds to `seq_len` committed rows and drops the pending ones.
    pub fn truncate(self: Sequence, seq_len: u32) !void {
        switch (self) {
            inline else => |sequence| return sequence.truncate(seq_len),
        }
    }

    /// Committed rows.
    pub fn seqLen(self: Sequence) !u32 {
        switch (self) {
            inline else => |sequence| return sequence.seqLen(),
        }
    }

    /// The smallest length such that a truncate to it, and to all from it up to the present one, is exact.
    pub fn rewindableTo(self: Sequence) !u32 {
        switch (self) {
            inline else => |sequence| return sequence.rewindableTo(),
        }
    }

    /// The rows of a layer as a reader sees them now: committed and, in this layer, pending ones.
    pub fn rows(self: Sequence, layer_index: u32) !Rows {
        switch (self) {
            inline else => |sequence| return sequence.rows(layer_index),
        }
    }

    /// A number that changes whenever a view of this layer goes stale.
    pub fn generation(self: Sequence, layer_index: u32) !u32 {
        switch (self) {
            inline else => |sequence| return sequence.generation(layer_index),
        }
    }

    /// Copies the rows of a layer that are seen and returns their count: token-major or head-major, as the outputs say.
    pub fn gather(self: Sequence, layer_index: u32, k: Output, v: Output) !u32 {
        return self.gatherRange(layer_index, .{}, k, v);
    }

    /// Copies some rows of a layer, by their positions, and returns their count. Where a count is given, that many or none:
    /// `PositionOutOfRange` unless each of them is seen.
    pub fn gatherRange(self: Sequence, layer_index: u32, range: Range, k: Output, v: Output) !u32 {
        switch (self) {
            inline else => |sequence| return sequence.gatherRange(layer_index, range, k, v),
        }
    }

    /// Where a layer lives.
    pub fn layerDevice(self: Sequence, layer_index: u32) !Device {
        _ = try self.generation(layer_index); // is there such a layer, and such a sequence
        return .cpu;
    }

    /// The windows on the resident rows of a layer from position `start` on, ascending: one for each block, or one over all.
    pub fn viewsFrom(self: Sequence, layer_index: u32, start: u32) !Views {
        return .{ .sequence = self, .layer_index = layer_index, .rows = try self.rows(layer_index), .position = start };
    }

    /// The first `row_count` rows of a layer in one piece, or why they are not. Never copies.
    pub fn contiguousKv(self: Sequence, layer_index: u32, row_count: u32) !ContiguousKv {
        const now = try self.rows(layer_index);
        return views.contiguousKv(&now, row_count);
    }
};

/// Windows, one after the other.
pub const Views = struct {
    sequence: Sequence,
    layer_index: u32,
    rows: Rows,
    position: u32,

    pub fn next(self: *Views) ?View {
        if (self.position >= self.rows.row_count) return null;
        const resident_end = self.rows.residentEnd(self.position) orelse {
            self.position = self.rows.first;
            return self.next();
        };
        const position = self.position;
        self.position = switch (self.rows.memory) {
            .contiguous => resident_end,
            .paged => |blocks| @min(resident_end, (position / blocks.block_size + 1) * blocks.block_size),
        };
        var view: View = .of(&self.rows, position, self.position);
        if (self.sequence == .paged) view.tier = self.sequence.paged.tier(self.layer_index, position);
        return view;
    }
};

test {
    _ = @import("sequence_test.zig");
}
