/**
 * The library of a module that came over the network: downloaded once from beside the module, compared with the manifest,
 * and kept in the user's cache directory, from where it is opened after it was compared again.
 *
 * @module
 */

import { lstatSync, mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { dirname, isAbsolute, join, relative, sep } from "node:path";
import process from "node:process";
import { KvError } from "../error.ts";
import { download } from "./download.ts";
import { mismatchOf } from "./integrity.ts";
import { LIBRARIES, type ReleasedLibrary, VERSION } from "./manifest.ts";
import { flagsOf, type Permission } from "./permission.ts";
import { LIBRARY_FILES, releasedPlace, type Target } from "./places.ts";
import { adapter } from "./runtime.ts";

/** What is downloaded, and where it is kept. */
interface RemoteLibrary {
  readonly url: URL;
  readonly released: ReleasedLibrary;
  /** The folder of all that kvern keeps. */
  readonly folder: string;
  readonly path: string;
}

/** The same, once it was looked at. */
interface LocatedLibrary extends RemoteLibrary {
  /** Why the kept copy cannot be opened; undefined where it can. */
  readonly missing: string | undefined;
}

/** Said of a copy that nobody may look at; what Deno denies is said instead. */
const NOT_LOOKED_AT = "it may not be read";

/** How to do without the network. */
const BY_HAND = "or take lib/<target> from the release and name its library in KVERN_LIB or with setLibraryPath()";

/** The path of a verified copy of the library that belongs to the package at `root`; the caller waits for a download. */
export function remoteLibrary(root: URL, target: Target | undefined): string {
  const remote = locate(root, target);
  if (remote.missing === undefined) return remote.path;
  try {
    return keep(remote, download(remote.url, remote.released.bytes).blocking());
  } catch (error) {
    throw unavailable(remote, error);
  }
}

/** The same, while the caller's other work goes on. */
export async function downloadLibrary(root: URL, target: Target | undefined): Promise<string> {
  const remote = locate(root, target);
  if (remote.missing === undefined) return remote.path;
  try {
    return keep(remote, await download(remote.url, remote.released.bytes).promise());
  } catch (error) {
    throw unavailable(remote, error);
  }
}

/** Where it comes from and where it goes, once everything that takes is allowed. */
function locate(root: URL, target: Target | undefined): LocatedLibrary {
  const released = target && LIBRARIES[target];
  if (released === undefined) {
    const found = Object.keys(LIBRARIES).join(", ") || "none";
    throw new KvError(
      "library_unavailable",
      `Cannot open the native library as the package at ${root.href} must have one for ` +
        `${target ?? `${process.platform} ${process.arch}`}: it has ${found}`,
    );
  }
  const url = new URL(releasedPlace(target!), root);
  const variables = cacheVariables();
  const unreadable = variables.map((variable) => ({ name: "env", variable }) as const).filter((one) =>
    !adapter.ask(one)
  );
  const cache = unreadable.length === 0 ? cacheFolder(variables) : undefined;
  const folder = cache === undefined ? unreadFolder() : join(cache, "kvern");
  const path = join(folder, VERSION, released.sha256, LIBRARY_FILES[target!]);
  const denied: Permission[] = [
    ...unreadable,
    ...([{ name: "read", path: folder }, { name: "ffi", path: folder }] as const).filter((one) => !adapter.ask(one)),
  ];
  const remote = { url, released, folder, path };
  // What is kept already takes neither the network nor a place to write to.
  const missing = denied.length > 0 ? NOT_LOOKED_AT : whyNotKept(remote);
  if (missing !== undefined) {
    const more = [{ name: "net", host: url.host }, { name: "write", path: folder }] as const;
    denied.push(...more.filter((one) => !adapter.ask(one)));
  }
  if (denied.length === 0) return { ...remote, missing };
  throw new KvError(
    "needs_permission",
    `Cannot open the native library as Deno needs permissions to fetch it from ${url.href} once and to keep it: ` +
      `run with ${flagsOf(denied)}, ${BY_HAND}`,
  );
}

/** The variables that tell where the user's caches lie. */
function cacheVariables(): readonly string[] {
  if (process.platform === "win32") return ["LOCALAPPDATA"];
  return process.platform === "darwin" ? ["HOME"] : ["XDG_CACHE_HOME", "HOME"];
}

/** The folder of the user's caches. */
function cacheFolder(variables: readonly string[]): string {
  const [first, home] = variables.length === 1 ? [undefined, ...variables] : variables;
  const named = first && adapter.env(first);
  if (named && isAbsolute(named)) return named; // a relative one is to be ignored, says the standard
  const parent = adapter.env(home!);
  if (parent && isAbsolute(parent)) {
    if (process.platform === "win32") return parent;
    return process.platform === "darwin" ? join(parent, "Library", "Caches") : join(parent, ".cache");
  }
  throw new KvError(
    "library_unavailable",
    `Cannot open the native library as ${variables.join(" or ")} must name a folder to keep it in: ` +
      `${home} is ${parent || "not set"}; set it, ${BY_HAND}`,
  );
}

/** The folder of the library in a flag, where the variables may not be read: the shell reads them. */
function unreadFolder(): string {
  if (process.platform === "win32") return "%LOCALAPPDATA%\\kvern";
  return process.platform === "darwin" ? "$HOME/Library/Caches/kvern" : "${XDG_CACHE_HOME:-$HOME/.cache}/kvern";
}

/**
 * Why the kept copy cannot be opened, or undefined where it can.
 *
 * @throws {KvError} `library_unavailable` where others could change it between the look and the opening
 */
function whyNotKept({ folder, path, released }: RemoteLibrary): string | undefined {
  if (!adapter.grants({ name: "read", path })) return NOT_LOOKED_AT;
  checkOwner(folder, dirname(path));
  try {
    return lstatSync(path).isFile() ? mismatchOf(readFileSync(path), released) : "it is no file";
  } catch (error) {
    return (error as { code?: string }).code === "ENOENT" ? "no such file" : textOf(error);
  }
}

/** Writes the file beside its place and renames it: another process sees all of it or nothing. */
function keep({ folder, path, released }: RemoteLibrary, bytes: Uint8Array): string {
  const mismatch = mismatchOf(bytes, released);
  if (mismatch !== undefined) throw new Error(mismatch);
  const temporary = `${path}.${crypto.randomUUID()}`;
  try {
    mkdirSync(dirname(path), { recursive: true, mode: 0o700 });
    checkOwner(folder, dirname(path));
    place(bytes, temporary, path, released);
  } catch (error) {
    if (error instanceof KvError) throw error;
    throw new Error(`it cannot be kept in ${dirname(path)}: ${textOf(error)}`);
  }
  return path;
}

function place(bytes: Uint8Array, temporary: string, path: string, released: ReleasedLibrary): void {
  try {
    writeFileSync(temporary, bytes, { flag: "wx", mode: 0o600 });
    renameSync(temporary, path);
  } catch (error) {
    rmSync(temporary, { force: true });
    // Windows does not replace a file that another process has opened: it is the same one.
    if (mismatchOf(readFileSync(path), released) !== undefined) throw error;
  }
}

/**
 * Refuses what another user could change: from `folder` down to `path`, whatever is there must be the user's own and closed
 * to others. Where Deno does not tell who the user is, a folder that is closed to others and can be read is the user's own,
 * root's excepted. Windows has no modes, and the folder is below the user's own there.
 */
function checkOwner(folder: string, path: string): void {
  if (process.platform === "win32") return;
  const user = adapter.grants({ name: "sys", kind: "uid" }) ? process.getuid?.() : undefined;
  const below = relative(folder, path).split(sep);
  for (const at of ["", ...below].map((_, i) => join(folder, ...below.slice(0, i)))) {
    let facts: { mode: number; uid: number };
    try {
      facts = lstatSync(at);
    } catch {
      return; // nothing is there yet
    }
    const { mode, uid } = facts;
    const found = user !== undefined && uid !== user
      ? `its owner is user ${uid}, not ${user}`
      : (mode & 0o077) !== 0
      ? `its mode is ${(mode & 0o777).toString(8)}`
      : undefined;
    if (found !== undefined) {
      throw new KvError(
        "library_unavailable",
        "Cannot open the native library as what is kept must be its user's own and closed to others: " +
          `${at} is not, ${found}; remove it, ${BY_HAND}`,
      );
    }
  }
}

/** What is said when there is no copy and none can be had. */
function unavailable({ url, path, missing }: LocatedLibrary, error: unknown): KvError {
  if (error instanceof KvError) return error;
  return new KvError(
    "library_unavailable",
    `Cannot open the native library as no copy is kept and it cannot be fetched: ` +
      `tried ${path} (${missing}), ${url.href} (${textOf(error)}); connect to the network once, ${BY_HAND}`,
    { cause: error },
  );
}

function textOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
