/** Where a package and its library lie, by the address of a module and the platform. */

import assert from "node:assert/strict";
import { join } from "node:path";
import { test } from "node:test";
import { fileURLToPath, pathToFileURL } from "node:url";
import { LIBRARY_FILES, packagePlaces, packageRoot, remoteRoot, targetOf } from "../src/ffi/places.ts";

test("the package ends at its root: a bundle and what came over the network have none", () => {
  const root = fileURLToPath(new URL("..", import.meta.url)).replace(/[\\/]$/, "");
  for (const name of ["library.ts", "library.js"]) {
    assert.equal(packageRoot(pathToFileURL(join(root, "src", "ffi", name)).href), root);
  }
  const others = [
    undefined,
    "",
    "file:///app/dist/bundle.js",
    "file:///app/dist/library.ts",
    "file:///$bunfs/root/program",
    "https://example.com/kvern/src/ffi/library.ts",
    "data:text/javascript,0/src/ffi/library.ts",
  ];
  for (const url of others) assert.equal(packageRoot(url), undefined, url);
});

test("only a package that came over the network has a root there", () => {
  const at = (url: string) => remoteRoot(url)?.href;
  assert.equal(at("https://jsr.io/@kvern/kvern/0.1.0/src/ffi/library.ts"), "https://jsr.io/@kvern/kvern/0.1.0/");
  assert.equal(at("http://127.0.0.1:80/src/ffi/library.js?a=1#b"), "http://127.0.0.1/");
  for (const url of ["https://example.com/bundle.js", "file:///kvern/src/ffi/library.ts", "data:,src/ffi/library.ts"]) {
    assert.equal(at(url), undefined, url);
  }
});

test("each platform has its target, musl and glibc apart, and others have none", () => {
  const gnu = () => "gnu" as const, musl = () => "musl" as const;
  const never = () => assert.fail("only Linux has two C libraries");
  const rows = [
    ["linux", "x64", gnu, "x86_64-linux-gnu"],
    ["linux", "arm64", gnu, "aarch64-linux-gnu"],
    ["linux", "x64", musl, "x86_64-linux-musl"],
    ["linux", "arm64", musl, "aarch64-linux-musl"],
    ["darwin", "x64", never, "x86_64-macos"],
    ["darwin", "arm64", never, "aarch64-macos"],
    ["win32", "x64", never, "x86_64-windows"],
    ["win32", "arm64", never, undefined],
    ["linux", "ia32", gnu, undefined],
    ["freebsd", "x64", never, undefined],
  ] as const;
  for (const [platform, arch, libc, target] of rows) assert.equal(targetOf(platform, arch, libc), target);
  assert.deepEqual(
    rows.map(([, , , target]) => target).filter((target) => target !== undefined),
    Object.keys(LIBRARY_FILES),
  );
  assert.deepEqual(packagePlaces("/kvern", undefined), []);
});
