/** What `publish:check` finds wrong with a package; `deno task test` runs it on the real one. */

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { spawnSync } from "node:child_process";
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { libraryComplaints } from "../zig/library_check.ts";
import { LIBRARY_FILES, releaseLibraries, type Target } from "../zig/package.ts";
import { exampleComplaints, sizeComplaints, unneededFiles } from "../zig/publish_check.ts";
import { ROOT, ToolchainError } from "../zig/toolchain.ts";
import { inDeno } from "./child.ts";

/** The head of a library for that target, with what it loads and other texts behind it. */
function libraryOf(target: Target, ...texts: string[]): Buffer {
  const [cpu, system] = target.split("-");
  const isArm = cpu === "aarch64";
  const head = Buffer.alloc(128);
  if (system === "linux") {
    head.write("\x7fELF", "latin1");
    head.writeUInt16LE(isArm ? 183 : 62, 18);
  } else if (system === "macos") {
    head.writeUInt32LE(0xfeedfacf, 0);
    head.writeUInt32LE(isArm ? 0x100000c : 0x1000007, 4);
  } else {
    head.write("MZ", "latin1");
    head.writeUInt32LE(100, 60);
    head.writeUInt16LE(0x8664, 104);
  }
  return Buffer.concat([head, Buffer.from(`\0${texts.join("\0")}\0`)]);
}

test("a library is refused that is another target's, loads another C library or a newer one, has debug information or a path", () => {
  const good: [Target, Buffer][] = [
    ["x86_64-linux-gnu", libraryOf("x86_64-linux-gnu", "libc.so.6")],
    ["aarch64-linux-gnu", libraryOf("aarch64-linux-gnu", "libc.so.6")],
    ["x86_64-linux-musl", libraryOf("x86_64-linux-musl", "libc.so")],
    ["aarch64-linux-musl", libraryOf("aarch64-linux-musl", "libc.so")],
    ["x86_64-macos", libraryOf("x86_64-macos")],
    ["aarch64-macos", libraryOf("aarch64-macos")],
    ["x86_64-windows", libraryOf("x86_64-windows")],
  ];
  assert.deepEqual(good.map(([target]) => target), Object.keys(LIBRARY_FILES));
  for (const [target] of good) {
    for (const [other, library] of good) {
      const complaints = libraryComplaints(target, library);
      assert.equal(complaints.length, target === other ? 0 : 1, `${other} as ${target}: ${complaints}`);
    }
  }
  assert.deepEqual(libraryComplaints("aarch64-macos", libraryOf("x86_64-macos")), [
    "lib/aarch64-macos/libkvern.dylib must be a library for aarch64-macos: it is one for x86_64-macos",
  ]);
  for (const bytes of [new Uint8Array(0), Buffer.from("<!DOCTYPE html>".repeat(20))]) {
    assert.deepEqual(libraryComplaints("x86_64-windows", bytes), [
      "lib/x86_64-windows/kvern.dll must be a library for x86_64-windows: it is one for nothing that is known",
    ]);
  }
  assert.deepEqual(libraryComplaints("x86_64-linux-musl", libraryOf("x86_64-linux-musl", "libc.so.6")), [
    "lib/x86_64-linux-musl/libkvern.so must load the C library of musl: it loads that of gnu",
  ]);
  const versions = ["libc.so.6", "GLIBC_2.2.5", "GLIBC_2.34", "GLIBC_2.17"];
  assert.deepEqual(libraryComplaints("x86_64-linux-gnu", libraryOf("x86_64-linux-gnu", ...versions)), [
    "lib/x86_64-linux-gnu/libkvern.so must load with glibc 2.17: it needs 2.34",
  ]);
  assert.deepEqual(libraryComplaints("aarch64-macos", libraryOf("aarch64-macos", ".debug_info", `${ROOT}/zig/src`)), [
    "lib/aarch64-macos/libkvern.dylib must be stripped: it has debug information",
    `lib/aarch64-macos/libkvern.dylib must not tell where it was built: it has ${ROOT}`,
  ]);
});

test("every library of a release must be there, and those that are not are named", () => {
  const folder = mkdtempSync(join(tmpdir(), "kvern-lib-"));
  try {
    const targets = Object.keys(LIBRARY_FILES) as Target[];
    for (const target of targets.slice(0, -2)) {
      mkdirSync(join(folder, target));
      writeFileSync(join(folder, target, LIBRARY_FILES[target]), "");
    }
    const refused = (error: unknown) =>
      error instanceof ToolchainError &&
      /`deno task build:targets` builds: there is none of aarch64-macos, x86_64-windows$/.test(error.message);
    assert.throws(() => releaseLibraries(folder), refused);
    for (const target of targets.slice(-2)) {
      mkdirSync(join(folder, target));
      writeFileSync(join(folder, target, LIBRARY_FILES[target]), "");
    }
    assert.deepEqual(Object.keys(releaseLibraries(folder)), targets);
  } finally {
    rmSync(folder, { recursive: true });
  }
});

test("publish:check fails where a library is missing, and where one is something else", { timeout: 120_000 }, () => {
  const folder = mkdtempSync(join(tmpdir(), "kvern-lib-"));
  const run = () => {
    const file = join(ROOT, "zig/publish_check.ts");
    return spawnSync(process.execPath, [...(inDeno ? ["run", "-A"] : []), file, folder], { encoding: "utf8" });
  };
  try {
    const empty = run();
    assert.equal(empty.status, 1);
    assert.match(empty.stderr, /must have the library of every target.*: there is none of x86_64-linux-gnu, /);
    if (!inDeno) return; // what follows takes Deno's own commands
    for (const [target, file] of Object.entries(LIBRARY_FILES)) {
      mkdirSync(join(folder, target));
      writeFileSync(join(folder, target, file), libraryOf("x86_64-linux-gnu", "libc.so.6"));
    }
    const wrong = run();
    assert.equal(wrong.status, 1);
    const refused = [...wrong.stderr.matchAll(/lib\/([\w-]+)\/\S+ must /g)].map(([, target]) => target);
    assert.deepEqual(refused, Object.keys(LIBRARY_FILES).filter((target) => target !== "x86_64-linux-gnu"));
    const lines = wrong.stderr.split("\n").filter((line) => !line.startsWith("kvern: still at ")); // a busy machine
    assert.equal(lines.length, 7 + 1 + 6 + 2, `sizes, complaints and nothing else:\n${wrong.stderr}`);
  } finally {
    rmSync(folder, { recursive: true });
  }
});

test("files that no user needs are found, and no others", () => {
  const needed = ["deno.json", "mod.ts", "src/ffi/deno.ts", "docs/attend.svg", "lib/x86_64-windows/kvern.dll"];
  const unneeded = [
    "tests/all.ts",
    "zig/src/kvern.zig",
    "examples/ziglet/model.safetensors",
    ".github/workflows/ci.yml",
    "src/.cache_test.ts.swp",
    "src/cache_test.ts",
    "src/cache.ts.orig",
    "lib/x86_64-linux-gnu/libkvern.so~",
    "docs/build.zig",
  ];
  assert.deepEqual(unneededFiles([...needed, ...unneeded]), unneeded);
});

test("an entry without an example is found, and a README without one", () => {
  const documented = "/**\n * A.\n *\n * ```ts\n * a;\n * ```\n *\n * @module\n */\nexport {};";
  const read = (texts: Record<string, string>) => (path: string) => texts[path]!;
  const good = { "deno.json": '{ "exports": "./mod.ts" }', "README.md": "```ts\na;\n```", "./mod.ts": documented };
  assert.deepEqual(exampleComplaints(read(good)), []);
  assert.deepEqual(
    exampleComplaints(read({
      "deno.json": '{ "exports": { ".": "./mod.ts", "./one": "./one.ts", "./two": "./two.ts" } }',
      "./mod.ts": documented,
      "./one.ts": documented.replace("ts\n * a", "js\n * a"),
      "./two.ts": `import "x";\n${documented}`,
      "README.md": "a",
    })),
    [
      "./one.ts must begin with a module documentation that has an example",
      "./two.ts must begin with a module documentation that has an example",
      "README.md must have an example",
    ],
  );
});

test("a package that is too large is refused", () => {
  assert.deepEqual(sizeComplaints(20 * 2 ** 20, 6e6), []);
  assert.deepEqual(sizeComplaints(20 * 2 ** 20 + 1, 6e6 + 1), [
    "all files together must have at most 20971520 bytes: 20971521",
    "the packed package must have at most 6000000 bytes: 6000001",
  ]);
});
