/** Archives that follow from their files alone, and that every tar can read. */

import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { gunzipSync } from "node:zlib";
import { packTarball } from "../zig/tarball.ts";
import { findOnPath, ToolchainError } from "../zig/toolchain.ts";

const text = (length: number) => new TextEncoder().encode("kvern\n".repeat(length)).subarray(0, length);
/** Lengths around a block of the archive. */
const FILES = new Map(
  [0, 1, 511, 512, 513, 20_000].map((length) => [`package/of-${length}/${"a".repeat(60)}.txt`, text(length)]),
);

const tar = findOnPath("tar")[0];
const reason = tar === undefined ? " (skipped: no tar)" : "";

test(`a tarball is read back by tar, file by file${reason}`, { skip: tar === undefined }, () => {
  const folder = mkdtempSync(join(tmpdir(), "kvern-tarball-"));
  try {
    writeFileSync(join(folder, "packed.tar.gz"), packTarball(FILES));
    const { status, stderr } = spawnSync(tar!, ["-xzf", "packed.tar.gz"], { cwd: folder, encoding: "utf8" });
    assert.equal(status, 0, stderr);
    assert.equal(stderr, "");
    for (const [path, bytes] of FILES) assert.deepEqual(new Uint8Array(readFileSync(join(folder, path))), bytes, path);
  } finally {
    rmSync(folder, { recursive: true });
  }
});

test("a tarball has the same bytes whatever the order of its files, in every runtime", () => {
  const packed = packTarball(FILES);
  assert.deepEqual(packTarball(new Map([...FILES].reverse())), packed);
  // What is compressed is compared: runtimes have different versions of zlib.
  const hash = createHash("sha256").update(gunzipSync(packed)).digest("hex");
  assert.equal(hash, "3a46d6b7eb61519cc140720b8b607861e8199c094e62562e61d575c682fdb220");
  assert.deepEqual([...packed.subarray(0, 10)], [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 2, 255]);
});

test("a path that the format does not hold is refused", () => {
  for (const path of ["", "/a", "a/", "../a", "a b", "a\\b", "a".repeat(101)]) {
    const refused = (error: unknown) => error instanceof ToolchainError && error.message.endsWith(`: ${path}`);
    assert.throws(() => packTarball(new Map([[path, text(1)]])), refused);
  }
});
