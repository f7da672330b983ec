/**
 * Has Bun take the native library into a program that it compiles, or lay it beside a bundle.
 *
 * Bun's bundler follows a `require` of a kind of file it does not know: it takes the file along, and the call gives its
 * path. Compiling a program, it knows `process.platform` and `process.arch` and leaves the other branches out, but only
 * where they are written like that, of the global `process`. What is missing it takes for an error at run time, as the
 * calls stand in a `try`. Deno and Node see no import in these lines.
 *
 * @module
 */

import { isAbsolute } from "node:path";
import { fileURLToPath } from "node:url";
import { KvError } from "../error.ts";
import { adapter } from "./runtime.ts";

declare const require: (path: string) => string;
declare const process: { readonly platform: string; readonly arch: string };

/** The path of the library that was taken along: asked for in a bundle alone. */
export function embeddedLibrary(): string {
  const path = required();
  return isAbsolute(path) ? path : fileURLToPath(new URL(path, import.meta.url));
}

function required(): string {
  try {
    if (process.platform === "linux" && process.arch === "x64") {
      return adapter.libc() === "gnu"
        ? require("../../lib/x86_64-linux-gnu/libkvern.so")
        : require("../../lib/x86_64-linux-musl/libkvern.so");
    }
    if (process.platform === "linux" && process.arch === "arm64") {
      return adapter.libc() === "gnu"
        ? require("../../lib/aarch64-linux-gnu/libkvern.so")
        : require("../../lib/aarch64-linux-musl/libkvern.so");
    }
    if (process.platform === "darwin" && process.arch === "x64") {
      return require("../../lib/x86_64-macos/libkvern.dylib");
    }
    if (process.platform === "darwin" && process.arch === "arm64") {
      return require("../../lib/aarch64-macos/libkvern.dylib");
    }
    if (process.platform === "win32" && process.arch === "x64") {
      return require("../../lib/x86_64-windows/kvern.dll");
    }
  } catch (cause) {
    throw new KvError(
      "library_unavailable",
      "Cannot open the native library as a bundler must find lib/<target> in the package to take it along: " +
        `there was none for ${process.platform} ${process.arch}`,
      { cause },
    );
  }
  throw new KvError(
    "library_unavailable",
    `Cannot open the native library as there is none for ${process.platform} ${process.arch}`,
  );
}
