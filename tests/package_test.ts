/**
 * `zig/` as other Zig projects use it: a tarball with the files `build.zig.zon` lists, fetched by a small project that
 * imports `kvern`. A file missing from that list, or a name missing from `kvern.zig`, shows here and nowhere else.
 *
 * @module
 */
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { findTool, ToolchainError, ZIG_FOLDER, zigEnvironment } from "../zig/toolchain.ts";

const BUILD_ZON = `.{
    .name = .consumer,
    .version = "0.0.0",
    .fingerprint = 0x705b37275eed0001,
    .minimum_zig_version = "0.16.0",
    .paths = .{""},
}
`;

const BUILD = `const std = @import("std");

pub fn build(b: *std.Build) void {
    const target = b.standardTargetOptions(.{});
    const optimize = b.standardOptimizeOption(.{});
    const kvern = b.dependency("kvern", .{ .target = target, .optimize = optimize });
    const consumer = b.addExecutable(.{
        .name = "consumer",
        .root_module = b.createModule(.{
            .root_source_file = b.path("main.zig"),
            .target = target,
            .optimize = optimize,
            .imports = &.{.{ .name = "kvern", .module = kvern.module("kvern") }},
        }),
    });
    b.step("run", "Run it").dependOn(&b.addRunArtifact(consumer).step);
}
`;

// Two tokens with equal keys: each weighs a half, so the answer is the mean of the values, 2 4 6 8.
const MAIN = `const std = @import("std");
const kvern = @import("kvern");

pub fn main() !void {
    var cache: kvern.ContiguousCache = try .init(std.heap.page_allocator, .{
        .layer_count = 1,
        .kv_head_count = 1,
        .head_dim = 4,
        .max_seq_len = 8,
    });
    defer cache.deinit();

    const k = [_]f32{ 1, 0, 0, 0, 1, 0, 0, 0 };
    const v = [_]f32{ 1, 2, 3, 4, 3, 6, 9, 12 };
    const start = try cache.append(0, 0, .fromF32(&k), .fromF32(&v));
    try cache.commit(0, 2);

    const q = [_]f32{ 1, 1, 1, 1 };
    var output: [4]f32 = undefined;
    try kvern.attend(try cache.rows(0, 0), &q, .{}, &output, &.{});
    std.debug.print("start {d}, tokens {d}, attended {d} {d} {d} {d}\\n", .{
        start, try cache.seqLen(0), output[0], output[1], output[2], output[3],
    });
}
`;

/** Zig's path, or undefined where there is none; the reason then stands in the test's name. */
function zigOrNone(): string | undefined {
  try {
    return findTool("zig");
  } catch (error) {
    if (error instanceof ToolchainError) return undefined;
    throw error;
  }
}

const zig = zigOrNone();
const inBun = process.versions.bun !== undefined;
const reason = inBun ? " (skipped: it tests no TypeScript, and runs under Deno)" : zig ? "" : " (skipped: no Zig 0.16)";

test(`zig/ is a package other Zig projects import${reason}`, { skip: reason !== "", timeout: 600_000 }, () => {
  const folder = mkdtempSync(join(tmpdir(), "kvern-package-"));
  const run = (command: string, args: string[], cwd = folder) => {
    const result = spawnSync(command, args, { cwd, env: zigEnvironment(), encoding: "utf8" });
    assert.equal(
      result.status,
      0,
      `${command} ${args.join(" ")}\n${result.stdout}${result.stderr}${result.error ?? ""}`,
    );
    return result.stdout + result.stderr;
  };
  try {
    const manifest = readFileSync(join(ZIG_FOLDER, "build.zig.zon"), "utf8");
    const listed = /\.paths = \.\{([^}]*)\}/.exec(manifest)?.[1] ?? "";
    const paths = [...listed.matchAll(/"([^"]+)"/g)].map((found) => found[1]!);
    for (const path of paths) assert.ok(existsSync(join(ZIG_FOLDER, path)), `build.zig.zon lists ${path}`);
    run("tar", ["-czf", join(folder, "kvern.tar.gz"), ...paths], ZIG_FOLDER);

    writeFileSync(join(folder, "build.zig"), BUILD);
    writeFileSync(join(folder, "build.zig.zon"), BUILD_ZON);
    writeFileSync(join(folder, "main.zig"), MAIN);
    run(zig!, ["fetch", "--save=kvern", "kvern.tar.gz"]);
    assert.match(run(zig!, ["build", "run"]), /^start 0, tokens 2, attended 2 4 6 8$/m);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
});
