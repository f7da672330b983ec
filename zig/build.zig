//! The library, the package and the tests.
//!
//!     zig build                             the shared library, for any x86_64 or aarch64 CPU of its baseline
//!     zig build test                        all Zig tests, in Debug
//!     zig build test -Doptimize=ReleaseSafe
//!
//! The kernels are compiled once per CPU level and linked side by side; the library picks a level when it starts. So the
//! target is a baseline CPU, not this machine's: a library built here runs elsewhere.

const std = @import("std");
const OptimizeMode = std.builtin.OptimizeMode;

pub fn build(b: *std.Build) void {
    const target = baseline(b, b.standardTargetOptions(.{}));
    const optimize = b.option(OptimizeMode, "optimize", "Build mode of all but the kernels (library: ReleaseSafe, tests: Debug)");

    const library_module = rootModule(b, "src/abi.zig", target, optimize orelse .ReleaseSafe);
    const library = b.addLibrary(.{
        .name = "kvern",
        .linkage = .dynamic,
        .root_module = library_module,
        .use_llvm = true,
    });
    b.installArtifact(library);

    // The package: `b.dependency("kvern", .{ .target = target, .optimize = optimize }).module("kvern")`.
    const package = b.addModule("kvern", .{
        .root_source_file = b.path("src/kvern.zig"),
        .target = target,
        .optimize = optimize orelse .ReleaseSafe,
        .link_libc = true,
    });
    addKernels(b, package, target, .ReleaseFast);

    const test_step = b.step("test", "Run all tests");
    const filters: []const []const u8 = b.option([]const []const u8, "test-filter", "Run only tests whose name has this") orelse &.{};
    const tests = b.addTest(.{
        .root_module = rootModule(b, "src/abi.zig", target, optimize orelse .Debug),
        .filters = filters,
        .use_llvm = true,
    });
    test_step.dependOn(&b.addRunArtifact(tests).step);
}

/// A module with the kernels of every level linked in.
fn rootModule(b: *std.Build, root: []const u8, target: std.Build.ResolvedTarget, optimize: OptimizeMode) *std.Build.Module {
    const module = b.createModule(.{
        .root_source_file = b.path(root),
        .target = target,
        .optimize = optimize,
        .link_libc = true,
        .pic = true,
    });
    // Debug tests assert inside the kernels too; everything else links what is shipped.
    addKernels(b, module, target, if (optimize == .Debug) .Debug else .ReleaseFast);
    return module;
}

/// x86_64 gets the baseline of the lowest level in place of the native CPU, unless a CPU was asked for.
fn baseline(b: *std.Build, target: std.Build.ResolvedTarget) std.Build.ResolvedTarget {
    if (target.query.cpu_model != .determined_by_arch_os and target.query.cpu_model != .native) return target;
    var query = target.query;
    query.cpu_arch = target.result.cpu.arch;
    query.cpu_model = .{ .explicit = levels(target.result.cpu.arch)[0].model };
    return b.resolveTargetQuery(query);
}

const Level = struct {
    name: []const u8,
    model: *const std.Target.Cpu.Model,
    add: std.Target.Cpu.Feature.Set = .empty,
    subtract: std.Target.Cpu.Feature.Set = .empty,
};

/// CPU levels, lowest first. The names are those of `Level` in `src/kernels/table.zig`.
fn levels(arch: std.Target.Cpu.Arch) []const Level {
    const x86 = std.Target.x86;
    return switch (arch) {
        .x86_64 => comptime &.{
            .{ .name = "v2", .model = &x86.cpu.x86_64_v2 },
            .{ .name = "v3", .model = &x86.cpu.x86_64_v3 },
            .{
                .name = "avx512",
                .model = &x86.cpu.x86_64_v4,
                .add = x86.featureSet(&.{.avx512vnni}),
                // With it LLVM would give vectors of 8 lanes.
                .subtract = x86.featureSet(&.{.prefer_256_bit}),
            },
        },
        .aarch64 => comptime &.{.{ .name = "neon", .model = &std.Target.aarch64.cpu.generic }},
        else => @panic("kvern has kernels for x86_64 and aarch64 only"),
    };
}

fn addKernels(b: *std.Build, module: *std.Build.Module, target: std.Build.ResolvedTarget, optimize: OptimizeMode) void {
    for (levels(target.result.cpu.arch)) |level| {
        var query = target.query;
        query.cpu_arch = target.result.cpu.arch;
        query.cpu_model = .{ .explicit = level.model };
        query.cpu_features_add = level.add;
        query.cpu_features_sub = level.subtract;
        const options = b.addOptions();
        options.addOption([]const u8, "name", level.name);
        const kernels = b.addObject(.{
            .name = b.fmt("kernels_{s}", .{level.name}),
            .root_module = b.createModule(.{
                .root_source_file = b.path("src/kernels.zig"),
                .target = b.resolveTargetQuery(query),
                .optimize = optimize,
                .pic = true,
                .strip = optimize != .Debug,
                .imports = &.{.{ .name = "level", .module = options.createModule() }},
            }),
            // Zig's own backend for Debug cannot take AVX-512.
            .use_llvm = true,
        });
        module.addObject(kernels);
    }
}
