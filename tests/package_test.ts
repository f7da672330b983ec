/**
 * `zig/` as other Zig projects use it: the tarball of a release, fetched by the small project of `docs/zig.md`. A file
 * missing from the list in `build.zig.zon`, or a name missing from `kvern.zig`, shows here and nowhere else.
 *
 * @module
 */
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { findTool, ROOT, ToolchainError, zigEnvironment } from "../zig/toolchain.ts";
import { zigPackage } from "../zig/zig_package.ts";

const BUILD_ZON = `.{
    .name = .consumer,
    .version = "0.0.0",
    .fingerprint = 0x705b37275eed0001,
    .minimum_zig_version = "0.16.0",
    .paths = .{""},
}
`;

/** The blocks of Zig in `docs/zig.md`: what a project builds with, and a program. */
const [BUILD, MAIN] = [
  ...readFileSync(join(ROOT, "docs/zig.md"), "utf8").replaceAll("\r\n", "\n").matchAll(/^```zig\n([\s\S]*?\n)```$/gm),
].map((found) => found[1]!);

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
const inDeno = process.versions.deno !== undefined;
const reason = !inDeno
  ? " (skipped: it tests no TypeScript, and runs under Deno)"
  : zig
  ? ""
  : " (skipped: no Zig 0.16)";

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
    writeFileSync(join(folder, "kvern.tar.gz"), zigPackage());
    writeFileSync(join(folder, "build.zig"), BUILD!);
    writeFileSync(join(folder, "build.zig.zon"), BUILD_ZON);
    writeFileSync(join(folder, "main.zig"), MAIN!);
    run(zig!, ["fetch", "--save=kvern", "kvern.tar.gz"]);
    assert.match(run(zig!, ["build", "run"]), /^start 0, tokens 2, attended 2 4 6 8$/m);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
});
