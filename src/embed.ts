/**
 * Takes the native library into a program that `bun build --compile` makes, or beside a bundle of `bun build --outdir`:
 * one more import is all there is to do. Where nothing is bundled it does nothing, as the library lies in the package.
 *
 * @example A program that is one file
 * ```ts
 * import "@kvern/kvern/embed"; // in the file that `bun build --compile` is given
 * import { systemInfo } from "@kvern/kvern";
 *
 * console.log(systemInfo().libraryPath);
 * ```
 *
 * @module
 */

import { embeddedLibrary } from "./ffi/embedded.ts";
import { embedLibrary } from "./ffi/library.ts";

embedLibrary(embeddedLibrary);
