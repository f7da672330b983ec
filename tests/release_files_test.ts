/** What is attached to a release, and the tag that is released. */

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { gunzipSync } from "node:zlib";
import { LIBRARY_FILES, type Target } from "../zig/package.ts";
import { releasedTag } from "../zig/release_check.ts";
import { releaseFiles } from "../zig/release_files.ts";
import { ROOT } from "../zig/toolchain.ts";

const TARGETS = Object.keys(LIBRARY_FILES) as Target[];

/** The files of a tarball by path: headers of 512 bytes, each with its file behind it. */
function unpack(tarball: Uint8Array): Map<string, string> {
  const tar = gunzipSync(tarball);
  const files = new Map<string, string>();
  for (let at = 0; tar[at] !== 0;) {
    const path = tar.toString("latin1", at, at + 100).replace(/\0.*$/s, "");
    const length = parseInt(tar.toString("latin1", at + 124, at + 135), 8);
    files.set(path, tar.toString("latin1", at + 512, at + 512 + length));
    at += 512 + Math.ceil(length / 512) * 512;
  }
  return files;
}

test("a release has an archive of each library, with the license, and their hashes", () => {
  const folder = mkdtempSync(join(tmpdir(), "kvern-release-"));
  try {
    const libraries = Object.fromEntries(TARGETS.map((target) => {
      writeFileSync(join(folder, target), `library of ${target}`);
      return [target, join(folder, target)];
    })) as Record<Target, string>;
    const files = releaseFiles("1.2.3", libraries);
    for (const target of TARGETS) {
      const name = `kvern-1.2.3-${target}`;
      assert.deepEqual(
        unpack(files.get(`${name}.tar.gz`)!),
        new Map([
          [`${name}/LICENSE`, readFileSync(join(ROOT, "LICENSE"), "latin1")],
          [`${name}/${LIBRARY_FILES[target]}`, `library of ${target}`],
        ]),
      );
    }
    const zig = unpack(files.get("kvern-zig-1.2.3.tar.gz")!);
    const version = [...zig.keys()][0]!.split("/")[0];
    for (const file of ["LICENSE", "build.zig", "build.zig.zon", "src/kvern.zig", "src/kernels/dispatch.zig"]) {
      assert.ok(zig.has(`${version}/${file}`), file);
    }
    assert.deepEqual(
      [...zig.keys()].filter((file) => !/^[\w.-]+\/(LICENSE|build\.zig(\.zon)?|src\/.*\.zig)$/.test(file)),
      [],
    );
    const sums = [...files].filter(([name]) => name !== "SHA256SUMS")
      .map(([name, bytes]) => `${createHash("sha256").update(bytes).digest("hex")}  ${name}\n`).join("");
    assert.equal(new TextDecoder().decode(files.get("SHA256SUMS")), sums);
  } finally {
    rmSync(folder, { recursive: true });
  }
});

test("the tag is that of the command, or of the workflow that a tag started", () => {
  const branch = { GITHUB_REF_TYPE: "branch", GITHUB_REF_NAME: "main" };
  const tag = { GITHUB_REF_TYPE: "tag", GITHUB_REF_NAME: "v1.2.3" };
  assert.equal(releasedTag([], {}), undefined);
  assert.equal(releasedTag([], branch), undefined);
  assert.equal(releasedTag([], tag), "v1.2.3");
  assert.equal(releasedTag(["v1.2.4"], tag), "v1.2.4");
});
