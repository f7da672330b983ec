/**
 * `zig/` as other Zig projects use it: the tarball of a release, fetched by the small project of `docs/zig.md`, whose
 * programs it runs. A file missing from the list in `build.zig.zon`, or a name missing from `kvern.zig`, shows here and nowhere else.
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
import { findToolOrNone, ROOT, zigEnvironment } from "../zig/toolchain.ts";
import { zigPackage } from "../zig/zig_package.ts";

const BUILD_ZON = `.{
    .name = .consumer,
    .version = "0.0.0",
    .fingerprint = 0x705b37275eed0001,
    .minimum_zig_version = "0.16.0",
    .paths = .{""},
}
`;

/** The blocks of Zig in `docs/zig.md`: what a project builds with, and two programs. */
const [BUILD, MAIN, TIERED] = [
  ...readFileSync(join(ROOT, "docs/zig.md"), "utf8").replaceAll("\r\n", "\n").matchAll(/^```zig\n([\s\S]*?\n)```$/gm),
].map((found) => found[1]!);

const zig = findToolOrNone("zig");
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
    writeFileSync(join(folder, "kvern-zig.tar.gz"), zigPackage());
    writeFileSync(join(folder, "build.zig"), BUILD!);
    writeFileSync(join(folder, "build.zig.zon"), BUILD_ZON);
    writeFileSync(join(folder, "main.zig"), MAIN!);
    run(zig!, ["fetch", "--save", "kvern-zig.tar.gz"]);
    const build = ["build", "run", "-Dlevels=native"]; // one level is enough to see that all files are there
    assert.match(run(zig!, build), /^start 0, tokens 2, attended 2 4 6 8$/m);

    writeFileSync(join(folder, "main.zig"), TIERED!);
    const told = /^(\d+) rows in floats, (\d+) in codes: (\d+) bytes in place of (\d+), off by at most ([\d.]+)$/m;
    const [tail, store, cacheBytes, f32Bytes, difference] = told.exec(run(zig!, build))!.slice(1).map(Number);
    // 300 rows of keys and values of two heads; three blocks have left the tail.
    assert.deepEqual([tail, store, f32Bytes], [108, 192, 300 * 2 * 2 * 64 * 4]);
    // 2 bytes a value in the tail; 8.5 bits a key and 4.5 a value in the store.
    assert.equal(cacheBytes, 2 * 64 * (108 * 2 * 2 + 192 * (8.5 + 4.5) / 8));
    assert.ok(difference! > 0 && difference! < 0.05, `off by ${difference}`);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
});
