/**
 * Where the native library may lie: the file a person names, or one of a few places inside the package. Nothing
 * outside of it is ever looked at, since native code found there would be somebody else's.
 *
 * @module
 */

import { isAbsolute, resolve } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { KvError } from "../error.ts";

/** The path that `KVERN_LIB` names; a relative one begins at the current directory, whatever the runtime takes it for. */
export function namedPlace(named: string): string {
  const scheme = /^([a-z][a-z0-9+.-]+):/i.exec(named)?.[1]; // a single letter is a drive of Windows
  if (scheme === undefined) return isAbsolute(named) ? named : resolve(named);
  try {
    // `file:name` would be read as `/name`, which nobody means.
    if (!/^file:\//i.test(named)) throw new TypeError("no path");
    const path = fileURLToPath(named);
    if (path.includes("\0")) throw new TypeError("no path");
    return path;
  } catch (cause) {
    throw new KvError(
      "library_unavailable",
      "Cannot open the native library as KVERN_LIB must be a path, or a file: URL of one on this machine: " +
        `KVERN_LIB is ${named}`,
      { cause },
    );
  }
}

/**
 * The root of the package, without a slash at its end, where `moduleUrl` is that of `src/ffi/library.ts` within it.
 *
 * Undefined in a bundle, which knows nothing of the package it was made from, and for what did not come from a file.
 */
export function packageRoot(moduleUrl: string | undefined): string | undefined {
  if (moduleUrl === undefined || !URL.canParse(moduleUrl)) return undefined;
  const url = new URL(moduleUrl);
  const root = /^(.*)\/src\/ffi\/library\.[jt]s$/.exec(url.pathname)?.[1];
  if (url.protocol !== "file:" || root === undefined) return undefined;
  return fileURLToPath(new URL(`file://${root || "/"}`));
}

/** The places of the library in the package at `root`, best first: what a checkout built, then what a release carries. */
export function packagePlaces(root: string): string[] {
  const arch = process.arch === "arm64" ? "aarch64" : "x86_64";
  const places: Record<string, string[]> = {
    // Of the two a machine can load one, and opening the other fails harmlessly.
    linux: ["zig/zig-out/lib", `lib/${arch}-linux-gnu`, `lib/${arch}-linux-musl`].map((at) => `${at}/libkvern.so`),
    darwin: ["zig/zig-out/lib", `lib/${arch}-macos`].map((at) => `${at}/libkvern.dylib`),
    win32: ["zig/zig-out/bin", `lib/${arch}-windows`].map((at) => `${at}/kvern.dll`),
  };
  return (places[process.platform] ?? []).map((place) => resolve(root, place));
}
