/**
 * A library is the same bytes wherever it is built: people can compare a release with what its sources give.
 *
 * One target stands for all here, one that compiles fast. A release compares all of them, built on two machines.
 *
 * @module
 */
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { cpSync, mkdirSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { findToolOrNone, ZIG_FOLDER, zigEnvironment } from "../zig/toolchain.ts";
import { inDeno } from "./child.ts";

const zig = findToolOrNone("zig");
const reason = !inDeno
  ? " (skipped: it tests no TypeScript, and runs under Deno)"
  : zig
  ? ""
  : " (skipped: no Zig 0.16)";
const skip = reason !== "";

/** Builds a library for aarch64-macos, with one level for time's sake, and gives its hash and what it contains. */
function build(sources: string, prefix: string, caches: readonly string[]): { hash: string; text: string } {
  const args = ["build", "-Dtarget=aarch64-macos", "-Dlevels=neon", "-Dstrip", "--prefix", prefix, ...caches];
  const { status, stderr } = spawnSync(zig!, args, { cwd: sources, env: zigEnvironment(), encoding: "utf8" });
  assert.equal(status, 0, stderr);
  const library = readFileSync(join(prefix, "lib", "libkvern.dylib"));
  return { hash: createHash("sha256").update(library).digest("hex"), text: library.toString("latin1") };
}

test(`two folders and two caches give one library${reason}`, { skip, timeout: 900_000 }, () => {
  const folder = mkdtempSync(join(tmpdir(), "kvern-reproducible-"));
  try {
    // The checkout with its own caches, where `build:targets` may have left the objects.
    const here = build(ZIG_FOLDER, join(folder, "here"), []);
    const copy = join(folder, "some", "other folder");
    mkdirSync(copy, { recursive: true });
    for (const name of ["build.zig", "build.zig.zon", "src"]) {
      cpSync(join(ZIG_FOLDER, name), join(copy, name), { recursive: true });
    }
    const caches = ["--cache-dir", join(folder, "local"), "--global-cache-dir", join(folder, "global")];
    const there = build(copy, join(folder, "there"), caches);
    assert.equal(there.hash, here.hash);
    for (const path of [ZIG_FOLDER, folder]) assert.ok(!here.text.includes(path) && !there.text.includes(path), path);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
});
