//! The library, the package and the tests.
//!
//!     zig build                             the shared library, for any x86_64 or aarch64 CPU of its baseline
//!     zig build -Dlevels=native             the same for this machine's CPU alone, in a third of the time
//!     zig build test                        all Zig tests, in Debug
//!     zig build test -Doptimize=ReleaseSafe
//!     zig build targets                     the library for every target, into ../lib/<target>/
//!     zig build docs                        pages about the module `kvern`, in zig-out/docs: serve them over HTTP
//!     zig build bench -- --json             the kernels against the speed of memory
//!     zig build memcheck                    the tests under valgrind, and a planted error that it must find
//!     zig build test-arm64                  the tests for aarch64, under qemu where this is no aarch64
//!
//! The kernels are compiled once per CPU level and linked side by side; the library picks a level when it starts. So the
//! target is a baseline CPU, not this machine's: a library built here runs elsewhere, unless `-Dlevels` left out the levels
//! it would need there.

const std = @import("std");
const builtin = @import("builtin");
const cpu_features = @import("src/kernels/cpu_features.zig");
const OptimizeMode = std.builtin.OptimizeMode;
const Compile = std.Build.Step.Compile;

pub fn build(b: *std.Build) void {
    const target = baseline(b, b.standardTargetOptions(.{}));
    const optimize = b.option(OptimizeMode, "optimize", "Build mode of all but the kernels (library: ReleaseSafe, tests: Debug)");
    const choice = b.option([]const u8, "levels", "CPU levels to compile kernels for: all (default), native, or names like v3,avx512");
    const strip = b.option(bool, "strip", "Leave debug information out of the library (default: no)") orelse false;

    var kernels: Kernels = .{ .b = b };
    const chosen = chosenLevels(b, target.result, choice orelse "all");

    b.installArtifact(addLibrary(&kernels, target, chosen, optimize orelse .ReleaseSafe, strip));

    const targets_step = b.step("targets", "Build the library for every target into ../lib");
    for (release_targets) |release| {
        const release_target = baseline(b, b.resolveTargetQuery(release.query));
        const release_library = addLibrary(&kernels, release_target, levels(release_target.result), .ReleaseSafe, true);
        const file_name = b.fmt("../lib/{s}/{s}", .{ release.name, release_library.out_filename });
        const copy = b.addUpdateSourceFiles();
        copy.addCopyFileToSource(release_library.getEmittedBin(), file_name);
        targets_step.dependOn(&copy.step);
    }

    // The package: `b.dependency("kvern", .{ .target = target, .optimize = optimize }).module("kvern")`.
    const package = b.addModule("kvern", .{
        .root_source_file = b.path("src/kvern.zig"),
        .target = target,
        .optimize = optimize orelse .ReleaseSafe,
        .link_libc = true,
    });
    addOptions(b, package, chosen, .{});
    kernels.addTo(package, target.result, chosen, .ReleaseFast);

    const documented = b.addObject(.{ .name = "kvern", .root_module = package });
    const pages = b.addInstallDirectory(.{
        .source_dir = documented.getEmittedDocs(),
        .install_dir = .prefix,
        .install_subdir = "docs",
    });
    b.step("docs", "Write pages about the Zig module into zig-out/docs").dependOn(&pages.step);

    const test_step = b.step("test", "Run all tests");
    const filters: []const []const u8 = b.option([]const []const u8, "test-filter", "Run only tests whose name has this") orelse &.{};
    const tests = b.addTest(.{
        .root_module = rootModule(&kernels, "src/abi.zig", target, chosen, optimize orelse .Debug),
        .filters = filters,
        .use_llvm = true,
    });
    test_step.dependOn(&b.addRunArtifact(tests).step);
    // What no test imports is at least read: nobody takes its binary, so none is made.
    for ([_][]const u8{ "bench", "memcheck" }) |name| {
        const module = rootModule(&kernels, b.fmt("src/{s}.zig", .{name}), target, chosen, optimize orelse .Debug);
        test_step.dependOn(&b.addExecutable(.{ .name = name, .root_module = module, .use_llvm = true }).step);
    }

    const bench = b.addExecutable(.{
        .name = "bench",
        .root_module = rootModule(&kernels, "src/bench.zig", target, chosen, .ReleaseFast),
        .use_llvm = true,
    });
    const run_bench = b.addRunArtifact(bench);
    if (b.args) |arguments| run_bench.addArgs(arguments);
    b.step("bench", "Measure the kernels against the speed of memory").dependOn(&run_bench.step);

    addMemcheck(&kernels, target, filters);
    addArm64Tests(&kernels);
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

fn addLibrary(
    kernels: *Kernels,
    target: std.Build.ResolvedTarget,
    chosen: []const Level,
    optimize: OptimizeMode,
    strip: bool,
) *Compile {
    const b = kernels.b;
    const root = b.createModule(.{
        .root_source_file = b.path("src/abi.zig"),
        .target = target,
        .optimize = optimize,
        .link_libc = true,
        .pic = true,
        .strip = strip,
    });
    addOptions(b, root, chosen, .{});
    // An object of its own compiles while the kernels do; a library begins when it has them all. On Windows the entry of
    // a library comes from its root file.
    const linked = if (target.result.os.tag == .windows) root else linked: {
        const object = b.addObject(.{ .name = "abi", .root_module = root, .use_llvm = true });
        const module = b.createModule(.{ .target = target, .optimize = optimize, .link_libc = true, .strip = strip });
        module.addObject(object);
        break :linked module;
    };
    kernels.addTo(linked, target.result, chosen, if (optimize == .Debug) .Debug else .ReleaseFast);
    return b.addLibrary(.{ .name = "kvern", .linkage = .dynamic, .root_module = linked, .use_llvm = true });
}

/// A module with the kernels of those levels linked in.
fn rootModule(
    kernels: *Kernels,
    root: []const u8,
    target: std.Build.ResolvedTarget,
    chosen: []const Level,
    optimize: OptimizeMode,
) *std.Build.Module {
    const b = kernels.b;
    const module = b.createModule(.{
        .root_source_file = b.path(root),
        .target = target,
        .optimize = optimize,
        .link_libc = true,
        .pic = true,
    });
    // Debug tests assert inside the kernels too; everything else links what is shipped.
    kernels.addTo(module, target.result, chosen, if (optimize == .Debug) .Debug else .ReleaseFast);
    addOptions(b, module, chosen, .{});
    return module;
}

/// The tests as a static musl program for aarch64: that runs under Debian's qemu-user-static with nothing else installed.
fn addArm64Tests(kernels: *Kernels) void {
    const b = kernels.b;
    const step = b.step("test-arm64", "Run the tests for aarch64 under qemu");
    const target = baseline(b, b.resolveTargetQuery(.{ .cpu_arch = .aarch64, .os_tag = .linux, .abi = .musl }));
    const tests = b.addTest(.{
        .name = "test_arm64",
        .root_module = rootModule(kernels, "src/abi.zig", target, levels(target.result), .Debug),
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
fn addMemcheck(kernels: *Kernels, target: std.Build.ResolvedTarget, filters: []const []const u8) void {
    const b = kernels.b;
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
        kernels.addTo(module, target.result, levels(target.result), .Debug);
        addOptions(b, module, levels(target.result), .{ .memcheck = true });
        const program = if (row.exit_code == 0)
            b.addTest(.{ .name = "memcheck_tests", .root_module = module, .filters = filters, .use_llvm = true })
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

/// The levels of a target that `-Dlevels` names, lowest first. A library without the lowest one answers `unsupported` on a
/// CPU that has none of its own.
fn chosenLevels(b: *std.Build, target: std.Target, choice: []const u8) []const Level {
    const all = levels(target);
    if (std.mem.eql(u8, choice, "all")) return all;
    var chosen: std.ArrayList(Level) = .empty;
    if (std.mem.eql(u8, choice, "native")) {
        if (target.cpu.arch != builtin.cpu.arch or target.os.tag != builtin.os.tag) {
            refuse(b, target, choice, "that of this machine");
        }
        for (all) |level| {
            if (hostHas(level)) chosen.append(b.allocator, level) catch @panic("OOM");
        }
        // Linux may refuse tile registers to one process and not to another: the level below amx is kept beside it.
        const kept: usize = if (std.mem.eql(u8, chosen.items[chosen.items.len - 1].name, "amx")) 2 else 1;
        return chosen.items[chosen.items.len - kept ..];
    }
    for (all) |level| {
        var names = std.mem.tokenizeScalar(u8, choice, ',');
        while (names.next()) |name| {
            if (std.mem.eql(u8, name, level.name)) chosen.append(b.allocator, level) catch @panic("OOM");
        }
    }
    var names = std.mem.tokenizeScalar(u8, choice, ',');
    while (names.next()) |name| {
        for (all) |level| {
            if (std.mem.eql(u8, name, level.name)) break;
        } else refuse(b, target, choice, name);
    }
    return chosen.items;
}

fn refuse(b: *std.Build, target: std.Target, choice: []const u8, name: []const u8) noreturn {
    var text: []const u8 = "";
    for (levels(target)) |level| text = b.fmt("{s} {s}", .{ text, level.name });
    std.process.fatal("Cannot build -Dlevels={s} for {s}-{s} as the levels there are{s}: {s} is none of them", .{
        choice, @tagName(target.cpu.arch), @tagName(target.os.tag), text, name,
    });
}

/// Whether this machine has a level, as the library will find when it starts here.
fn hostHas(level: Level) bool {
    inline for (@typeInfo(cpu_features.Level).@"enum".fields) |field| {
        if (std.mem.eql(u8, field.name, level.name)) return cpu_features.has(@field(cpu_features.Level, field.name));
    }
    unreachable;
}

/// What the sources see of the build, beside the levels.
const Options = struct {
    /// Slabs from the C allocator, marked undefined: see `src/device/slab.zig`.
    memcheck: bool = false,
};

fn addOptions(b: *std.Build, module: *std.Build.Module, chosen: []const Level, options: Options) void {
    const names = b.allocator.alloc([]const u8, chosen.len) catch @panic("OOM");
    for (chosen, names) |level, *name| name.* = level.name;
    const step = b.addOptions();
    step.addOption([]const []const u8, "levels", names);
    step.addOption(bool, "memcheck", options.memcheck);
    module.addOptions("build_options", step);
}

/// The objects with the kernels. They call no C library, so libraries for glibc and musl, tests and benches share them.
const Kernels = struct {
    b: *std.Build,
    objects: std.ArrayList(Object) = .empty,

    const Object = struct {
        arch: std.Target.Cpu.Arch,
        os: std.Target.Os.Tag,
        level: []const u8,
        optimize: OptimizeMode,
        compile: *Compile,
    };

    /// Links the kernels of those levels into a module.
    fn addTo(kernels: *Kernels, module: *std.Build.Module, target: std.Target, chosen: []const Level, optimize: OptimizeMode) void {
        for (chosen) |level| module.addObject(kernels.object(target, level, optimize));
    }

    /// The object of a level, made once for each instruction set and system.
    fn object(kernels: *Kernels, target: std.Target, level: Level, optimize: OptimizeMode) *Compile {
        const b = kernels.b;
        for (kernels.objects.items) |made| {
            if (made.arch == target.cpu.arch and made.os == target.os.tag and made.optimize == optimize and
                std.mem.eql(u8, made.level, level.name)) return made.compile;
        }
        const options = b.addOptions();
        options.addOption([]const u8, "name", level.name);
        const compile = b.addObject(.{
            .name = b.fmt("kernels_{s}", .{level.name}),
            .root_module = b.createModule(.{
                .root_source_file = b.path("src/kernels.zig"),
                .target = b.resolveTargetQuery(.{
                    .cpu_arch = target.cpu.arch,
                    .cpu_model = .{ .explicit = level.model },
                    .cpu_features_add = level.add,
                    .cpu_features_sub = level.subtract,
                    .os_tag = target.os.tag,
                    .abi = if (target.os.tag == .windows) target.abi else .none,
                }),
                .optimize = optimize,
                .pic = true,
                .strip = optimize != .Debug,
                .imports = &.{.{ .name = "level", .module = options.createModule() }},
            }),
            // Zig's own backend for Debug cannot take AVX-512.
            .use_llvm = true,
        });
        kernels.objects.append(b.allocator, .{
            .arch = target.cpu.arch,
            .os = target.os.tag,
            .level = level.name,
            .optimize = optimize,
            .compile = compile,
        }) catch @panic("OOM");
        return compile;
    }
};
