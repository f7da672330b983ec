/**
 * Where the native library may lie: the file a person names, one of a few places inside the package, or beside a module
 * that came over the network. Nothing outside of these is ever looked at: native code found there is somebody else's.
 *
 * @module
 */

import { isAbsolute, resolve } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { KvError } from "../error.ts";

/** The targets a release has a library for, and the name of its file in `lib/<target>/`. */
export const LIBRARY_FILES = {
  "x86_64-linux-gnu": "libkvern.so",
  "aarch64-linux-gnu": "libkvern.so",
  "x86_64-linux-musl": "libkvern.so",
  "aarch64-linux-musl": "libkvern.so",
  "x86_64-macos": "libkvern.dylib",
  "aarch64-macos": "libkvern.dylib",
  "x86_64-windows": "kvern.dll",
} as const;

/** One of them. */
export type Target = keyof typeof LIBRARY_FILES;

/** What this process can load; `libc` is asked on Linux alone. Undefined where there is no library for it. */
export function targetOf(platform: string, arch: string, libc: () => "gnu" | "musl"): Target | undefined {
  const cpu = { x64: "x86_64", arm64: "aarch64" }[arch];
  const system = { linux: () => `linux-${libc()}`, darwin: () => "macos", win32: () => "windows" }[platform];
  const name = `${cpu}-${system?.()}`;
  return name in LIBRARY_FILES ? name as Target : undefined;
}

/** The path that `by` names; a relative one begins at the current directory, whatever the runtime takes it for. */
export function namedPlace(named: string, by: string): string {
  const scheme = /^([a-z][a-z0-9+.-]+):/i.exec(named)?.[1]; // a single letter is a drive of Windows
  if (scheme === undefined && named !== "" && !named.includes("\0")) return isAbsolute(named) ? named : resolve(named);
  try {
    // `file:name` would be read as `/name`, which nobody means.
    if (!/^file:\//i.test(named)) throw new TypeError("no path");
    const path = fileURLToPath(named);
    if (path.includes("\0")) throw new TypeError("no path");
    return path;
  } catch (cause) {
    throw new KvError(
      "library_unavailable",
      `Cannot open the native library as ${by} must be a path, or a file: URL of one on this machine: ` +
        `${by} is ${named}`,
      { cause },
    );
  }
}

/** The root of the package, where `moduleUrl` is that of `src/ffi/library.ts` within it. */
function rootOf(moduleUrl: string | undefined, protocols: readonly string[]): URL | undefined {
  if (moduleUrl === undefined || !URL.canParse(moduleUrl)) return undefined;
  const url = new URL(moduleUrl);
  const path = /^(.*\/)src\/ffi\/library\.[jt]s$/.exec(url.pathname)?.[1];
  return protocols.includes(url.protocol) && path !== undefined ? new URL(path, url) : undefined;
}

/**
 * The root of the package, without a slash at its end, where `moduleUrl` is that of `src/ffi/library.ts` within it.
 *
 * Undefined in a bundle, which knows nothing of the package it was made from, and for what did not come from a file.
 */
export function packageRoot(moduleUrl: string | undefined): string | undefined {
  const root = rootOf(moduleUrl, ["file:"]);
  return root && resolve(fileURLToPath(root));
}

/** The root of a package whose modules are loaded over the network; its path ends in a slash. */
export function remoteRoot(moduleUrl: string | undefined): URL | undefined {
  return rootOf(moduleUrl, ["https:", "http:"]);
}

/** The place of a release's library, from the root of the package. */
export function releasedPlace(target: Target): string {
  return `lib/${target}/${LIBRARY_FILES[target]}`;
}

/** The places of the library in the package at `root`, best first: what a checkout built, then what a release carries. */
export function packagePlaces(root: string, target: Target | undefined): string[] {
  if (target === undefined) return [];
  const built = `zig/zig-out/${process.platform === "win32" ? "bin" : "lib"}/${LIBRARY_FILES[target]}`;
  return [built, releasedPlace(target)].map((place) => resolve(root, place));
}
