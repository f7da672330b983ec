/**
 * Packs this folder for other Zig projects: `deno task zig:package <file>.tar.gz`. They fetch that file from a release
 * with `zig fetch --save`.
 *
 * @module
 */
import { globSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { join, sep } from "node:path";
import process from "node:process";
import { packTarball } from "./tarball.ts";
import { ROOT, say, ToolchainError, ZIG_FOLDER } from "./toolchain.ts";

/** The tarball: the files that `build.zig.zon` lists, and the license, in one folder named `kvern-zig-<version>`. */
export function zigPackage(): Uint8Array {
  const manifest = readFileSync(join(ZIG_FOLDER, "build.zig.zon"), "utf8");
  const version = /^ *\.version = "([^"]+)",$/m.exec(manifest)?.[1];
  const paths = [...(/\.paths = \.\{([^}]*)\}/.exec(manifest)?.[1] ?? "").matchAll(/"([^"]+)"/g)].map(([, path]) =>
    path!
  );
  const files = new Map([["LICENSE", readFileSync(join(ROOT, "LICENSE"))]]);
  for (const path of paths) {
    const found = [path, ...globSync(`${path}/**/*`, { cwd: ZIG_FOLDER })]
      .filter((file) => statSync(join(ZIG_FOLDER, file), { throwIfNoEntry: false })?.isFile());
    if (found.length === 0) {
      throw new ToolchainError(`Cannot pack the Zig package as each of its paths must have a file: ${path} has none`);
    }
    for (const file of found) files.set(file.replaceAll(sep, "/"), readFileSync(join(ZIG_FOLDER, file)));
  }
  return packTarball(new Map([...files].map(([file, bytes]) => [`kvern-zig-${version}/${file}`, bytes])));
}

if (import.meta.main) {
  try {
    const path = process.argv[2];
    if (path === undefined) throw new ToolchainError("Usage: deno task zig:package <file>.tar.gz");
    const tarball = zigPackage();
    writeFileSync(path, tarball);
    say(`wrote the Zig package, ${tarball.length} bytes, to ${path}`);
  } catch (error) {
    if (!(error instanceof ToolchainError)) throw error;
    say(error.message);
    process.exitCode = 1;
  }
}
