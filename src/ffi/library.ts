/**
 * Finds the native library, opens it once and checks its version: nothing happens before first use.
 *
 * Searched in this order, and where one of them applies the later ones do not: the file `KVERN_LIB` names; the file a
 * program set; in the package, what this checkout built (`zig/zig-out`, with kernels for this CPU alone where `deno task
 * demo` built it), then what the release carries (`lib/<target>`); the file that Bun embedded; for a module from the
 * network, the file beside it (`remote.ts`). It is never closed: closing a library whose threads are alive crashes every
 * runtime.
 *
 * @module
 */

import { existsSync } from "node:fs";
import process from "node:process";
import { KvError } from "../error.ts";
import { ABI_VERSION, type Library } from "./exports.ts";
import { checkFile } from "./integrity.ts";
import { LIBRARIES, type ReleasedLibrary } from "./manifest.ts";
import { flagsOf } from "./permission.ts";
import { namedPlace, packagePlaces, packageRoot, remoteRoot, targetOf } from "./places.ts";
import { downloadLibrary, remoteLibrary } from "./remote.ts";
import { adapter, isKnown } from "./runtime.ts";
import { applySettings, SETTINGS } from "./settings.ts";

/** The opened library, and where it was found. */
interface Opened {
  readonly library: Library;
  readonly path: string;
  readonly unreadableVariables: string[];
}

/** Files to try, best first. */
interface Candidates {
  readonly paths: readonly string[];
  /** What to allow where nobody may look which of them are there. */
  readonly folder: string;
  /** What the last of them must be, where that is known: the others are somebody's own. */
  readonly released?: ReleasedLibrary | undefined;
}

/** What helps wherever the library is not found. */
const NAME_IT = "name one with setLibraryPath() or in KVERN_LIB (which Deno reads with --allow-env=KVERN_LIB)";

let opened: Opened | undefined;
let chosen: string | undefined;
let embedded: (() => string) | undefined;

/** The library; the first call opens it. */
export function library(): Library {
  return (opened ??= find()).library;
}

/** Opens the library; where it is to be downloaded first, other work goes on meanwhile. */
export async function openLibrary(): Promise<void> {
  if (opened !== undefined) return;
  const root = remoteRoot(import.meta.url);
  if (isKnown() && root !== undefined && namedLibrary() === undefined) await downloadLibrary(root, target());
  library();
}

/** The file the library was opened from; opens it if need be. */
export function libraryPath(): string {
  return (opened ??= find()).path;
}

/** The variables that were not read, as the runtime did not allow it; opens the library if need be. */
export function unreadableVariables(): string[] {
  return [...(opened ??= find()).unreadableVariables];
}

/** Has the library opened from there and nowhere else, unless `KVERN_LIB` names another file. */
export function chooseLibrary(named: string): void {
  const path = namedPlace(named, "path");
  if (opened !== undefined && opened.path !== path) {
    throw new KvError(
      "invalid_config",
      `Cannot set the path of the native library as it was opened before: from ${opened.path}, path is ${named}`,
    );
  }
  chosen = path;
}

/** Tells how to reach the file that a bundler embedded: it is asked for only where this module is in no package. */
export function embedLibrary(path: () => string): void {
  embedded = path;
}

/** Tries what may be opened without asking first, then what the user may yet allow. */
function find(): Opened {
  if (!isKnown()) {
    throw new KvError(
      "library_unavailable",
      "Cannot open the native library as kvern runs in Deno, in Bun, and in Node 26.10 or later only",
    );
  }
  const { paths, folder, released } = candidates();
  const failures: string[] = [];
  let denied: string | undefined; // what to allow, a path that is there
  const mayRead = (path: string) => adapter.grants({ name: "read", path });
  const mayOpen = (path: string) => adapter.grants({ name: "ffi", path });
  const there = paths.filter((path) => !mayRead(path) || existsSync(path));
  for (const path of [...there.filter(mayOpen), ...there.filter((path) => !mayOpen(path))]) {
    // Without the permission to look, nobody knows which of several files is there; the folder of all of them is.
    const wanted = mayRead(path) ? path : folder;
    if (!mayOpen(path) && (denied !== undefined || !adapter.ask({ name: "ffi", path: wanted }))) {
      denied ??= wanted;
      continue;
    }
    try {
      if (mayRead(path)) checkFile(path, path === paths.at(-1) ? released : undefined);
      return open(path);
    } catch (error) {
      if (error instanceof KvError) throw error;
      if (adapter.isDenial(error)) denied ??= path;
      else failures.push(`${path} (${error instanceof Error ? error.message : error})`);
    }
  }
  throw unopened(paths, failures, denied);
}

/** Opens that file, checks the version, and does what the environment says. */
function open(path: string): Opened {
  const library = adapter.open(path);
  const version = library.kv_abi_version();
  if (version !== ABI_VERSION) throw new Error(`its ABI version is ${version}, this module speaks ${ABI_VERSION}`);
  applySettings(library);
  const variables = ["KVERN_LIB", ...SETTINGS].filter((variable) => !adapter.grants({ name: "env", variable }));
  return { library, path, unreadableVariables: variables };
}

/** What is said when no place has a library that opens. */
function unopened(paths: readonly string[], failures: string[], denied: string | undefined): KvError {
  if (denied !== undefined) {
    const others = failures.length > 0 ? `; tried ${failures.join(", ")}` : "";
    return new KvError(
      "needs_permission",
      "Cannot open the native library as Deno needs a permission for it: " +
        `run with ${flagsOf([{ name: "ffi", path: denied }])}${others}`,
    );
  }
  const tried = failures.length > 0 ? failures : paths.map((path) => `${path} (no such file)`);
  return new KvError(
    "library_unavailable",
    "Cannot open the native library as none of its places has one that works: " +
      `tried ${tried.join(", ") || `nothing, as there is none for ${process.platform} ${process.arch}`}; ` +
      "build it with `deno task build` or `cd zig && zig build`, " +
      `or ${NAME_IT}`,
  );
}

/** The file that a person or the program named. */
function namedLibrary(): string | undefined {
  const named = adapter.env("KVERN_LIB");
  return named ? namedPlace(named, "KVERN_LIB") : chosen;
}

function target() {
  return targetOf(process.platform, process.arch, adapter.libc);
}

/** The places of the library. */
function candidates(): Candidates {
  const named = namedLibrary();
  if (named !== undefined) return { paths: [named], folder: named };
  const folder = packageRoot(import.meta.url);
  if (folder !== undefined) {
    const released = LIBRARIES[target() ?? ""];
    return { paths: packagePlaces(folder, target()), folder, released };
  }
  const root = remoteRoot(import.meta.url);
  if (root !== undefined) {
    const path = remoteLibrary(root, target());
    return { paths: [path], folder: path };
  }
  if (embedded !== undefined) {
    const path = embedded();
    return { paths: [path], folder: path };
  }
  throw new KvError(
    "library_unavailable",
    "Cannot open the native library as this module is not a file of its package, where the library lies, but was " +
      `bundled: import "@kvern/kvern/embed" where Bun bundles or compiles, or ${NAME_IT}`,
  );
}
