/**
 * Writes what is attached to a release: `deno task release:files <folder>`.
 *
 *     notes.md                             what the changelog says of the version
 *     files/kvern-0.1.0-<target>.tar.gz    a library, for those who name one in KVERN_LIB
 *     files/kvern-zig-0.1.0.tar.gz         the Zig package, for `zig fetch --save`
 *     files/SHA256SUMS                     the hashes of all of them, as `sha256sum --check` reads them
 *
 * @module
 */
import { createHash } from "node:crypto";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { LIBRARY_FILES, releaseLibraries, type Target } from "./package.ts";
import { newestEntry } from "./release_version.ts";
import { packTarball } from "./tarball.ts";
import { ROOT, say, ToolchainError } from "./toolchain.ts";
import { zigPackage } from "./zig_package.ts";

/** The files of a release by name, without the notes. */
export function releaseFiles(version: string, libraries: Readonly<Record<Target, string>>): Map<string, Uint8Array> {
  const license = readFileSync(join(ROOT, "LICENSE"));
  const files = new Map<string, Uint8Array>();
  for (const [target, path] of Object.entries(libraries)) {
    const folder = `kvern-${version}-${target}`;
    const library = readFileSync(path);
    const packed = packTarball(
      new Map([[`${folder}/LICENSE`, license], [`${folder}/${LIBRARY_FILES[target as Target]}`, library]]),
    );
    files.set(`${folder}.tar.gz`, packed);
  }
  files.set(`kvern-zig-${version}.tar.gz`, zigPackage());
  const sums = [...files].map(([name, bytes]) => `${createHash("sha256").update(bytes).digest("hex")}  ${name}\n`);
  files.set("SHA256SUMS", new TextEncoder().encode(sums.join("")));
  return files;
}

function main(folder: string | undefined): void {
  if (folder === undefined) throw new ToolchainError("Usage: deno task release:files <folder>");
  const entry = newestEntry(readFileSync(join(ROOT, "CHANGELOG.md"), "utf8"));
  if (entry === undefined) throw new ToolchainError("Cannot make a release as CHANGELOG.md must have an entry for it");
  const files = releaseFiles(entry.version, releaseLibraries(join(ROOT, "lib")));
  mkdirSync(join(folder, "files"), { recursive: true });
  writeFileSync(join(folder, "notes.md"), `${entry.notes}\n`);
  for (const [name, bytes] of files) {
    writeFileSync(join(folder, "files", name), bytes);
    say(`${(bytes.length / 1e3).toFixed(1).padStart(8)} kB  ${name}`);
  }
}

if (import.meta.main) {
  try {
    main(process.argv[2]);
  } catch (error) {
    if (!(error instanceof ToolchainError)) throw error;
    say(error.message);
    process.exitCode = 1;
  }
}
