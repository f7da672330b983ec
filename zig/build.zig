//! The library, the package and the tests.
//!
//!     zig build                             the shared library, for any x86_64 or aarch64 CPU of its baseline
//!     zig build test                        all Zig tests, in Debug
//!     zig build test -Doptimize=ReleaseSafe
//!     zig build targets                     the library for every target, into ../lib/<target>/
//!     zig build bench -- --json             the kernels against the speed of memory
//!     zig build memcheck                    the tests under valgrind, and a planted error that it must find
//!     zig build test-arm64                  the tests for aarch64, under qemu where this is no aarch64
//!
//! The kernels are compiled once per CPU level and linked side by side; the library picks a level when it starts. So the
//! target is a baseline CPU, not this machine's: a library built here runs elsewhere.

const std = @import("std");
const OptimizeMode = std.builtin.OptimizeMode;

pub fn build(b: *std.Build) void {
    const target = baseline(b, b.standardTargetOptions(.{}));
    const optimize = b.option(OptimizeMode, "optimize", "Build mode of all but the kernels (library: ReleaseSafe, tests: Debug)");

    b.installArtifact(addLibrary(b, target, optimize orelse .ReleaseSafe));

    const targets_step = b.step("targets", "Build the library for every target into ../lib");
    for (release_targets) |release| {
        const library = addLibrary(b, baseline(b, b.resolveTargetQuery(release.query)), .ReleaseSafe);
        library.root_module.strip = true;
        const file_name = b.fmt("../lib/{s}/{s}", .{ release.name, library.out_filename });
        const copy = b.addUpdateSourceFiles();
        copy.addCopyFileToSource(library.getEmittedBin(), file_name);
        targets_step.dependOn(&copy.step);
    }

    // The package: `b.dependency("kvern", .{ .target = target, .optimize = optimize }).module("kvern")`.
    const package = b.addModule("kvern", .{
        .root_source_file = b.path("src/kvern.zig"),
        .target = target,
        .optimize = optimize orelse .ReleaseSafe,
        .link_libc = true,
    });
    addOptions(b, package, .{});
    addKernels(b, package, target, .ReleaseFast);

    const test_step = b.step("test", "Run all tests");
    const filters: []const []const u8 = b.option([]const []const u8, "test-filter", "Run only tests whose name has this") orelse &.{};
    const tests = b.addTest(.{
        .root_module = rootModule(b, "src/abi.zig", target, optimize orelse .Debug),
        .filters = filters,
        .use_llvm = true,
    });
    test_step.dependOn(&b.addRunArtifact(tests).step);
    // What no test imports is at least read: nobody takes its binary, so none is made.
    for ([_][]const u8{ "bench", "memcheck" }) |name| {
        const module = rootModule(b, b.fmt("src/{s}.zig", .{name}), target, optimize orelse .Debug);
        test_step.dependOn(&b.addExecutable(.{ .name = name, .root_module = module, .use_llvm = true }).step);
    }

    const bench = b.addExecutable(.{
        .name = "bench",
        .root_module = rootModule(b, "src/bench.zig", target, .ReleaseFast),
        .use_llvm = true,
    });
    const run_bench = b.addRunArtifact(bench);
    if (b.args) |arguments| run_bench.addArgs(arguments);
    b.step("bench", "Measure the kernels against the speed of memory").dependOn(&run_bench.step);

    addMemcheck(b, target);
    addArm64Tests(b);
}

/// What a release carries. The folder is the name by which the TypeScript side looks for its library.
const release_targets = [_]struct { name: []const u8, query: std.Target.Query }{
    // glibc 2.17 is of 2012: every distribution that the runtimes support has a newer one.
    .{ .name = "x86_64-linux-gnu", .query = .{
        .cpu_arch = .x86_64,
        .os_tag = .linux,
        .abi = .gnu,
        .glibc_version = .{ .major = 2, .minor = 17, .patch = 0 },
    } },
    .{ .name = "aarch64-linux-gnu", .query = .{
        .cpu_arch = .aarch64,
        .os_tag = .linux,
        .abi = .gnu,
        .glibc_version = .{ .major = 2, .minor = 17, .patch = 0 },
    } },
    .{ .name = "x86_64-linux-musl", .query = .{ .cpu_arch = .x86_64, .os_tag = .linux, .abi = .musl } },
    .{ .name = "aarch64-linux-musl", .query = .{ .cpu_arch = .aarch64, .os_tag = .linux, .abi = .musl } },
    .{ .name = "x86_64-macos", .query = .{ .cpu_arch = .x86_64, .os_tag = .macos } },
    .{ .name = "aarch64-macos", .query = .{ .cpu_arch = .aarch64, .os_tag = .macos } },
    .{ .name = "x86_64-windows", .query = .{ .cpu_arch = .x86_64, .os_tag = .windows, .abi = .gnu } },
};

fn addLibrary(b: *std.Build, target: std.Build.ResolvedTarget, optimize: OptimizeMode) *std.Build.Step.Compile {
    return b.addLibrary(.{
        .name = "kvern",
        .linkage = .dynamic,
        .root_module = rootModule(b, "src/abi.zig", target, optimize),
        .use_llvm = true,
    });
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
    addOptions(b, module, .{});
    return module;
}

/// What the sources see of the build.
const Options = struct {
    /// Slabs from the C allocator, marked undefined: see `src/device/slab.zig`.
    memcheck: bool = false,
};

fn addOptions(b: *std.Build, module: *std.Build.Module, options: Options) void {
    const step = b.addOptions();
    step.addOption(bool, "memcheck", options.memcheck);
    module.addOptions("build_options", step);
}

/// The tests as a static musl program for aarch64: that runs under Debian's qemu-user-static with nothing else installed.
fn addArm64Tests(b: *std.Build) void {
    const step = b.step("test-arm64", "Run the tests for aarch64 under qemu");
    const target = b.resolveTargetQuery(.{ .cpu_arch = .aarch64, .os_tag = .linux, .abi = .musl });
    const tests = b.addTest(.{
        .name = "test_arm64",
        .root_module = rootModule(b, "src/abi.zig", baseline(b, target), .Debug),
        .use_llvm = true,
    });
    const qemu = b.findProgram(&.{ "qemu-aarch64-static", "qemu-aarch64" }, &.{}) catch {
        step.dependOn(&b.addFail("qemu-aarch64-static is not on PATH: install qemu-user-static").step);
        return;
    };
    const run = b.addSystemCommand(&.{qemu});
    run.addArtifactArg(tests);
    run.stdio = .inherit; // captured, what tests say would be shown as that of a failed command
    step.dependOn(&run.step);
}

/// The tests under valgrind, on the levels it can emulate, and a program with a planted error that must be reported.
fn addMemcheck(b: *std.Build, target: std.Build.ResolvedTarget) void {
    const step = b.step("memcheck", "Run the tests under valgrind");
    const found = 9;
    for ([_]struct { root: []const u8, exit_code: u8 }{
        .{ .root = "src/abi.zig", .exit_code = 0 },
        .{ .root = "src/memcheck.zig", .exit_code = found },
    }) |row| {
        const module = b.createModule(.{
            .root_source_file = b.path(row.root),
            .target = target,
            .optimize = .Debug,
            .link_libc = true,
            .valgrind = true,
        });
        addKernels(b, module, target, .Debug);
        addOptions(b, module, .{ .memcheck = true });
        const program = if (row.exit_code == 0)
            b.addTest(.{ .name = "memcheck_tests", .root_module = module, .use_llvm = true })
        else
            b.addExecutable(.{ .name = "memcheck_planted", .root_module = module, .use_llvm = true });
        // Valgrind finds no pointer to the start of what the C library keeps for each thread, and is not sure.
        const leaks = "--errors-for-leak-kinds=definite";
        const exit_code = b.fmt("--error-exitcode={d}", .{found});
        const run = b.addSystemCommand(&.{ "valgrind", "--quiet", "--leak-check=full", "--show-leak-kinds=definite", leaks, exit_code });
        run.addArtifactArg(program);
        if (row.exit_code == 0) {
            run.stdio = .inherit;
        } else {
            run.expectExitCode(row.exit_code);
            run.expectStdErrMatch("uninitialised");
        }
        step.dependOn(&run.step);
    }
}

/// x86_64 gets the baseline of the lowest level in place of the native CPU, unless a CPU was asked for.
fn baseline(b: *std.Build, target: std.Build.ResolvedTarget) std.Build.ResolvedTarget {
    if (target.query.cpu_model != .determined_by_arch_os and target.query.cpu_model != .native) return target;
    var query = target.query;
    query.cpu_arch = target.result.cpu.arch;
    query.cpu_model = .{ .explicit = levels(target.result)[0].model };
    return b.resolveTargetQuery(query);
}

const Level = struct {
    name: []const u8,
    model: *const std.Target.Cpu.Model,
    add: std.Target.Cpu.Feature.Set = .empty,
    subtract: std.Target.Cpu.Feature.Set = .empty,
};

/// CPU levels, lowest first. The names are those of `Level` in `src/kernels/table.zig`.
fn levels(target: std.Target) []const Level {
    return switch (target.cpu.arch) {
        // Only Linux is asked for tiles.
        .x86_64 => if (target.os.tag == .linux) &x86_levels else x86_levels[0 .. x86_levels.len - 1],
        .aarch64 => &aarch64_levels,
        else => @panic("kvern has kernels for x86_64 and aarch64 only"),
    };
}

const x86 = std.Target.x86;
const aarch64 = std.Target.aarch64;

const x86_levels = [_]Level{
    .{ .name = "v2", .model = &x86.cpu.x86_64_v2 },
    .{ .name = "v3", .model = &x86.cpu.x86_64_v3 },
    .{
        .name = "avx512",
        .model = &x86.cpu.x86_64_v4,
        .add = x86.featureSet(&.{.avx512vnni}),
        // With it LLVM would give vectors of 8 lanes.
        .subtract = x86.featureSet(&.{.prefer_256_bit}),
    },
    .{
        .name = "amx",
        .model = &x86.cpu.x86_64_v4,
        .add = x86.featureSet(&.{ .avx512vnni, .amx_tile, .amx_int8, .amx_bf16 }),
        .subtract = x86.featureSet(&.{.prefer_256_bit}),
    },
};

const aarch64_levels = [_]Level{
    .{ .name = "neon", .model = &aarch64.cpu.generic },
    .{ .name = "dotprod", .model = &aarch64.cpu.generic, .add = aarch64.featureSet(&.{.dotprod}) },
};

fn addKernels(b: *std.Build, module: *std.Build.Module, target: std.Build.ResolvedTarget, optimize: OptimizeMode) void {
    for (levels(target.result)) |level| {
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
