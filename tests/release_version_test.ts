/** One version in every place that has one, and the changelog's notes of it. */

import assert from "node:assert/strict";
import { globSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { newestEntry, versionComplaints } from "../zig/release_version.ts";
import { ROOT } from "../zig/toolchain.ts";

const CHANGELOG = `# Changelog

Text with a ## in it.

## 1.3.0, unreleased

New.

- One.

## 1.2.3, 2026-12-31

Old.
`;

test("newestEntry() reads the first version, with or without its day, and no further", () => {
  assert.deepEqual(newestEntry(CHANGELOG), { version: "1.3.0", date: undefined, notes: "New.\n\n- One." });
  const older = CHANGELOG.slice(CHANGELOG.indexOf("## 1.2.3")).replaceAll("\n", "\r\n");
  assert.deepEqual(newestEntry(older), { version: "1.2.3", date: "2026-12-31", notes: "Old." });
  assert.equal(newestEntry("# Changelog\n\n## 1.2.3\n\n## Next, unreleased\n"), undefined);
});

test("a version that differs from deno.json, a foreign tag and a release without a day are refused", () => {
  const places = {
    denoJson: '{ "version": "1.3.0" }',
    buildZigZon: '.{\n    .name = .kvern,\n    .version = "1.3.0",\n    .minimum_zig_version = "0.16.0",\n}\n',
    changelog: CHANGELOG.replace("unreleased", "2027-01-01"),
    tag: "v1.3.0",
  };
  assert.deepEqual(versionComplaints(places), []);
  assert.deepEqual(versionComplaints({ ...places, changelog: CHANGELOG, tag: undefined }), []);
  assert.deepEqual(versionComplaints({ ...places, changelog: CHANGELOG }), [
    "CHANGELOG.md must have the day of 1.3.0 before it is tagged: it says unreleased",
  ]);
  assert.deepEqual(versionComplaints({ ...places, denoJson: '{ "version": "1.4.0" }', changelog: "", tag: "1.4.0" }), [
    "build.zig.zon must be of version 1.4.0, as deno.json is: it is of 1.3.0",
    "the newest entry of CHANGELOG.md must be of version 1.4.0, as deno.json is: it is of none",
    "the tag without its v must be of version 1.4.0, as deno.json is: it is of none",
  ]);
});

test("deno.json, build.zig.zon and the changelog are of one version, and the changelog tells of it", () => {
  const read = (path: string) => readFileSync(join(ROOT, path), "utf8");
  const changelog = read("CHANGELOG.md");
  const places = { denoJson: read("deno.json"), buildZigZon: read("zig/build.zig.zon"), changelog, tag: undefined };
  assert.deepEqual(versionComplaints(places), []);
  assert.ok(newestEntry(changelog)!.notes.length > 100);
});

test("what the pages name with a version has that of deno.json", () => {
  const version: string = JSON.parse(readFileSync(join(ROOT, "deno.json"), "utf8")).version;
  const mention = /\bkvern(?:-zig-|-|@\^?)(\d+\.\d+\.\d+)/g;
  assert.deepEqual([..."kvern-zig-1.2.3.tar.gz, jsr:@kvern/kvern@1.2.4".matchAll(mention)].map(([, found]) => found), [
    "1.2.3",
    "1.2.4",
  ]);
  const pages = ["README.md", ...globSync("docs/*.md", { cwd: ROOT })];
  const mentions = pages.flatMap((page) => [...readFileSync(join(ROOT, page), "utf8").matchAll(mention)]);
  assert.ok(mentions.length > 0, "the page of Zig names the tarball");
  for (const [text, found] of mentions) assert.equal(found, version, text);
});
