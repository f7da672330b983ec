/** The layout of the package for npm's clients: that it is the registry's, and that ours is whole. */

import assert from "node:assert/strict";
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, sep } from "node:path";
import { test } from "node:test";
import { LIBRARY_FILES, stagePackage, type Target } from "../zig/package.ts";
import { layNpmPackage, missingForNpmLayer } from "./npm_layer.ts";

/**
 * An input of the registry's own tests, and what it makes of it (jsr-io/jsr, `transpile_with_imports.txt`). Maps are
 * left out: theirs come of the source before its imports were rewritten, and differ in their columns.
 */
const INPUT = {
  "foo.ts": 'export { add } from "./bar.ts";\n',
  "bar.ts": "export function add(a: number, b: number): number {\n  return a + b;\n}\n",
  "deno.json": '{\n  "name": "@scope/foo",\n  "version": "0.0.1",\n  "exports": {\n    ".": "./foo.ts"\n  }\n}\n',
};
const OUTPUT = {
  "_dist/bar.d.ts": "export declare function add(a: number, b: number): number;\n",
  "_dist/foo.d.ts": 'export { add } from "./bar.js";\n',
  "bar.js": "export function add(a, b) {\n  return a + b;\n}\n//# sourceMappingURL=bar.js.map",
  "bar.ts": INPUT["bar.ts"],
  "deno.json": INPUT["deno.json"],
  "foo.js": 'export { add } from "./bar.js";\n//# sourceMappingURL=foo.js.map',
  "foo.ts": 'export { add } from "./bar.js";\n',
  "package.json": `{
  "name": "@jsr/scope__foo",
  "version": "0.0.1",
  "homepage": "https://jsr.io/@scope/foo",
  "type": "module",
  "dependencies": {},
  "exports": {
    ".": {
      "types": "./_dist/foo.d.ts",
      "default": "./foo.js"
    }
  },
  "_jsr_revision": 11
}`,
};

const reason = missingForNpmLayer === undefined ? "" : ` (skipped: no ${missingForNpmLayer})`;
const options = { skip: reason !== "", timeout: 120_000 };

/** Every file below that folder. */
function filesOf(folder: string): string[] {
  return readdirSync(folder, { recursive: true, encoding: "utf8" })
    .filter((path) => statSync(join(folder, path)).isFile())
    .map((path) => path.replaceAll(sep, "/"))
    .sort();
}

/** Lays out what `make` writes, and gives the texts of the result by path. */
function laidOut(make: (folder: string) => void): Map<string, string> {
  const work = mkdtempSync(join(tmpdir(), "kvern-layer-"));
  try {
    make(join(work, "package"));
    layNpmPackage(join(work, "package"), join(work, "laid"));
    return new Map(filesOf(join(work, "laid")).map((file) => [file, readFileSync(join(work, "laid", file), "latin1")]));
  } finally {
    rmSync(work, { recursive: true });
  }
}

test(`the layout is that of the registry's own example${reason}`, options, () => {
  const files = laidOut((folder) => {
    mkdirSync(folder);
    for (const [file, text] of Object.entries(INPUT)) writeFileSync(join(folder, file), text);
  });
  assert.deepEqual(Object.fromEntries([...files].filter(([file]) => file in OUTPUT)), OUTPUT);
  assert.deepEqual([...files.keys()].filter((file) => !(file in OUTPUT)), ["bar.js.map", "foo.js.map"]);
  assert.deepEqual(JSON.parse(files.get("foo.js.map")!).sources, ["./foo.ts"]);
});

test(
  `every module of kvern is there as JavaScript, with its library, and imports no TypeScript${reason}`,
  options,
  () => {
    const target: Target = "aarch64-macos";
    const file = `lib/${target}/${LIBRARY_FILES[target]}`;
    let staged: string[] = [];
    const files = laidOut((folder) => {
      writeFileSync(`${folder}.bin`, "a library");
      staged = stagePackage(folder, { [target]: `${folder}.bin` });
    });
    assert.equal(files.get(file), "a library");
    assert.deepEqual(staged.filter((path) => !files.has(path)), [], "nothing that was published is missing");
    assert.ok(files.has("mod.js") && files.has("_dist/mod.d.ts") && files.has("src/ffi/library.js"));
    for (const [path, text] of files) {
      if (!/\.(js|d\.ts)$/.test(path)) continue;
      assert.doesNotMatch(text, /^(import|export)\b[^;]*from "\.[^"]*\.ts"/m, path);
    }
  },
);
