/**
 * Checks the package that the registry would get, with the seven libraries of `lib/` or of the folder that is named:
 * `deno task publish:check`.
 *
 * It is made in a folder that is gone afterwards, and everything the registry counts that stands in the package itself
 * is looked at there: its own dry run with the types and the documentation of every entry, and the example of the
 * README. Nothing is published.
 *
 * @module
 */
import { mkdtempSync, readFileSync, realpathSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { pathToFileURL } from "node:url";
import { libraryComplaints } from "./library_check.ts";
import { releaseLibraries, stagePackage, type Target } from "./package.ts";
import { packTarball } from "./tarball.ts";
import { ROOT, run, say, ToolchainError } from "./toolchain.ts";

/** The most bytes that a user is to download. */
const PACKED_BYTES_MAX = 6e6;
/** The registry takes 20 MiB of files. */
const FILE_BYTES_MAX = 20 * 2 ** 20;

/** Files that no user needs, by rules of their own: `publish.include` says what is in, and may be wrong. */
export function unneededFiles(files: readonly string[]): string[] {
  const folder = /^(tests?|benches|examples|zig|node_modules)\/|(^|\/)\./;
  const file = /[._]test\.|\.(zig|zon|map|orig|rej|bak|log|tgz|lock|safetensors)$|~$/;
  return files.filter((path) => folder.test(path) || file.test(path));
}

/** Entries without an example in their module documentation, and a README without one. */
export function exampleComplaints(read: (path: string) => string): string[] {
  const { exports } = JSON.parse(read("deno.json"));
  const entries = Object.values(typeof exports === "string" ? { ".": exports } : exports) as string[];
  const complaints = entries.flatMap((entry) => {
    const documentation = /^\/\*\*[\s\S]*?\*\//.exec(read(entry))?.[0] ?? "";
    const isWhole = documentation.includes("@module") && documentation.includes("```ts\n");
    return isWhole ? [] : [`${entry} must begin with a module documentation that has an example`];
  });
  return read("README.md").includes("```ts\n") ? complaints : [...complaints, "README.md must have an example"];
}

/** Complaints about the sizes of a package: of its files together, and packed. */
export function sizeComplaints(fileBytes: number, packedBytes: number): string[] {
  const rows: [what: string, bytes: number, max: number][] = [
    ["all files together", fileBytes, FILE_BYTES_MAX],
    ["the packed package", packedBytes, PACKED_BYTES_MAX],
  ];
  return rows.filter(([, bytes, max]) => bytes > max)
    .map(([what, bytes, max]) => `${what} must have at most ${max} bytes: ${bytes}`);
}

/** Runs Deno in the folder of the package; what it says is the complaint when it fails. */
async function deno(args: string[], cwd: string): Promise<{ output: string; complaints: string[] }> {
  const { code, output } = await run(`at deno ${args.join(" ")}`, process.execPath, args, {
    cwd,
    env: { ...process.env, DENO_NO_UPDATE_CHECK: "1", NO_COLOR: "1" },
    output: "captured",
  });
  return { output, complaints: code === 0 ? [] : [`deno ${args.join(" ")} must pass:\n${output.trim()}`] };
}

/** Says the sizes of the package with these libraries, and returns all that is wrong with it. */
async function check(libraries: Readonly<Record<Target, string>>): Promise<string[]> {
  const work = realpathSync(mkdtempSync(join(tmpdir(), "kvern-package-")));
  try {
    const folder = join(work, "package");
    const files = stagePackage(folder, libraries);
    const read = (path: string) => readFileSync(join(folder, path), "utf8");
    const { name, version, exports } = JSON.parse(read("deno.json"));
    const entries: string[] = Object.values(typeof exports === "string" ? [exports] : exports);

    const documentation = await deno(["doc", "--lint", ...entries], folder);
    const dryRun = await deno(["publish", "--dry-run"], folder);
    const sent = [...dryRun.output.matchAll(/^ +(file:\S+) \([\d.]+[KM]?B\)$/gm)]
      .map(([, url]) => url!.slice(pathToFileURL(folder).href.length + 1)).sort();

    const contents = new Map(files.map((file) => [file, readFileSync(join(folder, file))]));
    const fileBytes = [...contents.values()].reduce((sum, { length }) => sum + length, 0);
    const packedBytes = packTarball(contents).length;
    for (const [file, { length }] of contents) if (file.startsWith("lib/")) say(`${kilobytes(length)}  ${file}`);
    const ofPacked = `${kilobytes(packedBytes)} packed, of at most ${kilobytes(PACKED_BYTES_MAX).trim()}`;
    say(`${kilobytes(fileBytes)}  ${name} ${version}, ${files.length} files; ${ofPacked.trim()}`);

    return [
      ...Object.entries(libraries).flatMap(([target, path]) => libraryComplaints(target as Target, readFileSync(path))),
      ...unneededFiles(files).map((file) => `${file} is nothing that a user needs`),
      ...exampleComplaints(read),
      ...documentation.complaints,
      ...dryRun.complaints,
      ...(sent.join() === files.join() ? [] : [`the registry must get what was made: it would get ${sent.join(", ")}`]),
      ...sizeComplaints(fileBytes, packedBytes),
    ];
  } finally {
    rmSync(work, { recursive: true, force: true });
  }
}

function kilobytes(bytes: number): string {
  return `${(bytes / 1e3).toFixed(1)} kB`.padStart(10);
}

if (import.meta.main) {
  try {
    const complaints = await check(releaseLibraries(process.argv[2] ?? join(ROOT, "lib")));
    for (const complaint of complaints) say(complaint);
    if (complaints.length > 0) throw new ToolchainError("Cannot publish the package as it is");
  } catch (error) {
    if (!(error instanceof ToolchainError)) throw error;
    say(error.message);
    process.exitCode = 1;
  }
}
