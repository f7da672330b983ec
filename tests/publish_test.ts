/** The package as the registry gets it: what is in it, what is not, and that its hashes are those of its files. */

import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, sep } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { pathToFileURL } from "node:url";
import { LIBRARY_FILES, releasedPlace, stagePackage, type Target } from "../zig/package.ts";
import { ROOT, ToolchainError } from "../zig/toolchain.ts";
import { inDeno } from "./child.ts";

const TARGETS = Object.keys(LIBRARY_FILES) as Target[];

/** Runs a test in a folder of its own. */
function inFolder(body: (folder: string) => void | Promise<void>): () => Promise<void> {
  return async () => {
    const folder = mkdtempSync(join(tmpdir(), "kvern-publish-"));
    try {
      await body(folder);
    } finally {
      rmSync(folder, { recursive: true });
    }
  };
}

/** A file for each target that stands for its library, each of other bytes; the last has none. */
function standIns(folder: string): Record<Target, string> {
  const rows = TARGETS.map((target, i) => {
    const path = join(folder, `${target}.bin`);
    writeFileSync(path, new Uint8Array(1000 - 1000 * i / 6).fill(i));
    return [target, path] as const;
  });
  return Object.fromEntries(rows) as Record<Target, string>;
}

/** Every file below that folder. */
function filesOf(folder: string): string[] {
  return readdirSync(folder, { recursive: true, encoding: "utf8" })
    .filter((path) => statSync(join(folder, path)).isFile())
    .map((path) => path.replaceAll(sep, "/"))
    .sort();
}

function assertRefused(call: () => unknown, text: RegExp): void {
  assert.throws(call, (error) => error instanceof ToolchainError && text.test(error.message));
}

test(
  "a package has what its users need, seven libraries and nothing else",
  inFolder((folder) => {
    const files = stagePackage(join(folder, "package"), standIns(folder));
    assert.deepEqual(files, filesOf(join(folder, "package")));
    const allowed =
      /^(deno\.json|mod\.ts|src\/[a-z0-9_/]+\.ts|docs\/[a-z]+\.(md|svg)|README\.md|CHANGELOG\.md|LICENSE|lib\/[\w-]+\/(libkvern\.(so|dylib)|kvern\.dll))$/;
    assert.deepEqual(files.filter((file) => !allowed.test(file)), []);
    for (const target of TARGETS) assert.ok(files.includes(releasedPlace(target)), target);
    const sources = filesOf(join(ROOT, "src")).map((file) => `src/${file}`);
    assert.deepEqual(files.filter((file) => file.startsWith("src/")), sources);
    for (const file of sources) {
      if (file === "src/ffi/manifest.ts") continue;
      assert.deepEqual(readFileSync(join(folder, "package", file)), readFileSync(join(ROOT, file)), file);
    }
  }),
);

test(
  "the manifest of a package has the length and the hash of each library, and that of the checkout is empty",
  inFolder(async (folder) => {
    const libraries = standIns(folder);
    stagePackage(join(folder, "package"), libraries);
    const url = pathToFileURL(join(folder, "package/src/ffi/manifest.ts")).href;
    const { LIBRARIES } = await import(url);
    assert.deepEqual(Object.keys(LIBRARIES), TARGETS);
    for (const target of TARGETS) {
      const bytes = readFileSync(join(folder, "package", releasedPlace(target)));
      assert.deepEqual(bytes, readFileSync(libraries[target]));
      const sha256 = createHash("sha256").update(bytes).digest("hex");
      assert.deepEqual(LIBRARIES[target], { bytes: bytes.length, sha256 });
    }
    const { LIBRARIES: none } = await import(pathToFileURL(join(ROOT, "src/ffi/manifest.ts")).href);
    assert.deepEqual(none, {});
  }),
);

test(
  "no file of a package tells where it was made",
  inFolder((folder) => {
    for (const file of stagePackage(join(folder, "package"), standIns(folder))) {
      const text = readFileSync(join(folder, "package", file), "latin1");
      for (const path of [ROOT, folder]) assert.ok(!text.includes(path), `${file} has ${path}`);
    }
  }),
);

test(
  "a package of one library has one, and its own deno.json",
  inFolder((folder) => {
    const target: Target = "x86_64-windows";
    const files = stagePackage(join(folder, "package"), { [target]: standIns(folder)[target] });
    assert.deepEqual(files.filter((file) => file.startsWith("lib/")), ["lib/x86_64-windows/kvern.dll"]);
    const read = (path: string) => JSON.parse(readFileSync(path, "utf8"));
    const { name, version, license, exports, compilerOptions } = read(join(ROOT, "deno.json"));
    const own = read(join(folder, "package/deno.json"));
    assert.deepEqual(own, { name, version, license, exports, compilerOptions });
    assert.match(name, /^@\w+\/\w+$/);
    for (const entry of Object.values<string>(exports)) assert.ok(files.includes(entry.slice("./".length)), entry);
  }),
);

test(
  "a package is refused for a folder with something in it, a missing library and an unknown target",
  inFolder((folder) => {
    const libraries = standIns(folder);
    assertRefused(() => stagePackage(folder, libraries), /as the folder must be empty or absent: .* has 7 entries$/);
    const into = join(folder, "package");
    const missing = join(folder, "none.so");
    assertRefused(
      () => stagePackage(into, { ...libraries, "aarch64-macos": missing }),
      /as the library of aarch64-macos must be a file: .*none\.so is none$/,
    );
    assertRefused(() => stagePackage(into, { "aarch64-macos": folder }), /must be a file/);
    assertRefused(
      () => stagePackage(into, { "riscv64-linux-gnu": libraries["x86_64-macos"] } as Record<string, string>),
      /as a target must be one of x86_64-linux-gnu, .*, x86_64-windows: there is riscv64-linux-gnu$/,
    );
    assert.throws(() => readdirSync(into), "nothing was written");
    mkdirSync(into);
    assert.ok(stagePackage(into, libraries).length > 7, "an empty folder will do");
  }),
);

test("the targets of a package are those that build.zig builds", () => {
  const build = readFileSync(join(ROOT, "zig/build.zig"), "utf8");
  const built = [...build.matchAll(/\.\{ \.name = "([\w-]+)", \.query = /g)].map(([, name]) => name);
  assert.deepEqual(built, TARGETS);
});

const reason = inDeno ? "" : " (skipped: it runs Deno's own command, and is run under Deno)";

test(`a checkout is not published by mistake${reason}`, { skip: !inDeno, timeout: 120_000 }, () => {
  const { status, stdout, stderr } = spawnSync(process.execPath, ["publish", "--dry-run", "--allow-dirty"], {
    cwd: ROOT,
    encoding: "utf8",
    env: { ...process.env, DENO_NO_UPDATE_CHECK: "1", NO_COLOR: "1" },
  });
  assert.notEqual(status, 0, stdout);
  assert.match(stderr, /error\[excluded-module\].*\n --> .*manifest\.ts\n/);
  assert.match(stderr, /^error: Found 1 problem$/m);
});
