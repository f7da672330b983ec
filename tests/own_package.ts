/** The package with the library of this machine alone: what the tests of an installed kvern need of a release. */

import process from "node:process";
import { systemInfo } from "../mod.ts";
import { stagePackage, type Target } from "../zig/package.ts";

/** The target of the library that these tests run with. */
export const TARGET: Target = (() => {
  const arch = process.arch === "arm64" ? "aarch64" : "x86_64";
  const rest: Record<string, string> = { darwin: "macos", win32: "windows" };
  return `${arch}-${rest[process.platform] ?? "linux-gnu"}` as Target;
})();

/** Makes the package in `folder`, with that library or another file in its place. */
export function stageOwnPackage(folder: string, library: string = systemInfo().libraryPath): void {
  stagePackage(folder, { [TARGET]: library });
}
