/**
 * Makes the package as the registry gets it, in a folder of its own: what `publish.include` of `deno.json` lists, the
 * native libraries, and the table of their hashes. The checkout stays as it is. All of `docs/` is in, since the README
 * links it. `publish.exclude` names the manifest of the checkout: without it `deno publish` refuses to publish from
 * there, where a package would have no library.
 *
 * Only `node:` modules, as in `toolchain.ts`: the tests import this file in every runtime.
 *
 * @module
 */
import { createHash } from "node:crypto";
import {
  copyFileSync,
  existsSync,
  globSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { dirname, join, sep } from "node:path";
import process from "node:process";
import { LIBRARY_FILES, releasedPlace, type Target } from "../src/ffi/places.ts";
import { ROOT, say, ToolchainError } from "./toolchain.ts";

export { LIBRARY_FILES, releasedPlace, type Target };

/** Where the hashes of the libraries stand, and what a checkout says in place of the version and of them. */
const MANIFEST = "src/ffi/manifest.ts";
const NO_VERSION = `VERSION: string = "checkout";\n`;
const EMPTY_TABLE = "> = {};\n";

/**
 * Copies the package into `folder`, with the libraries at the given paths; returns the files, relative to `folder`.
 *
 * The folder may not be there yet, or be empty. A release has a library for each target; a test may have fewer.
 */
export function stagePackage(folder: string, libraries: Readonly<Partial<Record<Target, string>>>): string[] {
  const held = existsSync(folder) ? readdirSync(folder).length : 0;
  if (held > 0) throw refusal(`the folder must be empty or absent: ${folder} has ${held} entries`);
  const entries = Object.entries(libraries) as [Target, string][];
  for (const [target, path] of entries) {
    if (!Object.hasOwn(LIBRARY_FILES, target)) {
      throw refusal(`a target must be one of ${Object.keys(LIBRARY_FILES).join(", ")}: there is ${target}`);
    }
    if (!statSync(path, { throwIfNoEntry: false })?.isFile()) {
      throw refusal(`the library of ${target} must be a file: ${path} is none`);
    }
  }

  const config = JSON.parse(readFileSync(join(ROOT, "deno.json"), "utf8"));
  const files = includedFiles(config.publish.include);
  for (const file of files) copy(join(ROOT, file), join(folder, file));

  const rows = entries.map(([target, path]) => {
    const file = releasedPlace(target);
    copy(path, join(folder, file));
    files.push(file);
    const bytes = readFileSync(join(folder, file));
    const sha256 = createHash("sha256").update(bytes).digest("hex");
    return `  "${target}": {\n    bytes: ${bytes.length},\n    sha256: "${sha256}",\n  },\n`;
  });
  const manifest = readFileSync(join(ROOT, MANIFEST), "utf8").replaceAll("\r\n", "\n");
  if (!manifest.includes(NO_VERSION) || !manifest.endsWith(EMPTY_TABLE)) {
    throw refusal(`${MANIFEST} must name no version and end with an empty table`);
  }
  const written = manifest.replace(NO_VERSION, `VERSION: string = "${config.version}";\n`)
    .slice(0, -EMPTY_TABLE.length) + `> = {\n${rows.join("")}};\n`;
  writeFileSync(join(folder, MANIFEST), written);

  writeFileSync(join(folder, "deno.json"), packageConfig(config));
  return [...files, "deno.json"].sort();
}

/** The libraries that `build:targets` wrote into that folder; one that is missing is an error. */
export function releaseLibraries(folder: string): Record<Target, string> {
  const paths = Object.entries(LIBRARY_FILES).map(([target, file]) => [target, join(folder, target, file)] as const);
  const missing = paths.filter(([, path]) => !existsSync(path)).map(([target]) => target);
  if (missing.length > 0) {
    const rule = `${folder} must have the library of every target, which \`deno task build:targets\` builds`;
    throw refusal(`${rule}: there is none of ${missing.join(", ")}`);
  }
  return Object.fromEntries(paths) as Record<Target, string>;
}

/** The files of the checkout that those patterns match; each pattern must match one, or it is a mistake. */
function includedFiles(patterns: readonly string[]): string[] {
  return patterns.flatMap((pattern) => {
    const found = globSync(pattern, { cwd: ROOT });
    if (found.length === 0) throw refusal(`each pattern of publish.include must match a file: ${pattern} matches none`);
    return found.map((file) => file.replaceAll(sep, "/"));
  });
}

/** The package's own `deno.json`: the tasks and the rules of the checkout are of no use without it. */
function packageConfig({ name, version, license, exports, compilerOptions }: Record<string, unknown>): string {
  return JSON.stringify({ name, version, license, exports, compilerOptions }, null, 2) + "\n";
}

function copy(from: string, to: string): void {
  mkdirSync(dirname(to), { recursive: true });
  copyFileSync(from, to);
}

function refusal(rule: string): ToolchainError {
  return new ToolchainError(`Cannot make the package as ${rule}`);
}

if (import.meta.main) {
  try {
    const folder = process.argv[2];
    if (folder === undefined) throw new ToolchainError("Usage: deno task package <folder>");
    const files = stagePackage(folder, releaseLibraries(join(ROOT, "lib")));
    say(`made the package in ${folder}: ${files.length} files`);
  } catch (error) {
    if (!(error instanceof ToolchainError)) throw error;
    say(error.message);
    process.exitCode = 1;
  }
}
