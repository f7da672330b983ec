/**
 * The libraries of a release: how long each is, and its hash.
 *
 * A checkout has none. `zig/package.ts` writes the version and the table when it makes a package, into that package alone.
 *
 * @module
 */

/** What a downloaded library is compared with. */
export interface ReleasedLibrary {
  /** Its length. */
  readonly bytes: number;
  /** Its SHA-256 in lower-case hexadecimal digits. */
  readonly sha256: string;
}

/** The version of the release. */
export const VERSION: string = "checkout";

/** The libraries by target, such as `x86_64-linux-gnu`. */
export const LIBRARIES: Readonly<Record<string, ReleasedLibrary>> = {};
