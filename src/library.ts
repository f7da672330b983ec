/**
 * Where the native library comes from, for those who want to say so, and when it is opened.
 *
 * @module
 */

import { chooseLibrary, openLibrary } from "./ffi/library.ts";

/**
 * Opens the native library now, and not at the first use of kvern.
 *
 * It matters to modules that Deno loads over the network: their library is downloaded at the first start, about 1.5 MB,
 * and the first use would wait for it without giving way to anything else. Anywhere else it is done at once.
 *
 * @example Before the first cache
 * ```ts
 * import { loadLibrary, systemInfo } from "@kvern/kvern";
 *
 * await loadLibrary();
 * console.log(systemInfo().libraryPath);
 * ```
 *
 * @throws {KvError} (rejects) `library_unavailable`, `needs_permission`, `invalid_config` for a variable of the environment
 */
export async function loadLibrary(): Promise<void> {
  await openLibrary();
}

/**
 * Has the native library opened from this file and from nowhere else: for programs that bring their own, in a bundle say.
 *
 * It must come before the first use of kvern, in each Worker anew. `KVERN_LIB` in the environment overrules it: whoever
 * starts a program has the last word. `systemInfo().libraryPath` tells which file was opened.
 *
 * @example Beside the bundle
 * ```ts
 * import { setLibraryPath, systemInfo } from "@kvern/kvern";
 *
 * const { libraryPath } = systemInfo();
 * setLibraryPath(libraryPath); // in a program, `new URL("./libkvern.so", import.meta.url)` say
 * ```
 *
 * @param path a path, from the current directory where it is relative, or a `file:` URL
 * @throws {TypeError} what is neither a string nor a URL
 * @throws {KvError} `library_unavailable` for a URL of no file; `invalid_config` once another file was opened
 */
export function setLibraryPath(path: string | URL): void {
  if (typeof path !== "string" && !(path instanceof URL)) {
    throw new TypeError(`Cannot set the path of the native library as path must be a string or a URL: path is ${path}`);
  }
  chooseLibrary(String(path));
}
