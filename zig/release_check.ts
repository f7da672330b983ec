/**
 * Makes and checks all of a release that one machine can: `deno task release:check`.
 *
 * The versions agree, nothing is uncommitted, the libraries are built from these sources and one of them twice, the
 * package passes, and the files that are attached can be made. Under a tag in GitHub's workflow, or with one as
 * argument, the tag has to fit, too.
 *
 * @module
 */
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { releaseLibraries } from "./package.ts";
import { releaseFiles } from "./release_files.ts";
import { newestEntry, versionComplaints } from "./release_version.ts";
import { ROOT, run, type RunResult, say, ToolchainError } from "./toolchain.ts";

/** The tag that is released: the argument, or what GitHub says of a workflow that a tag started. */
export function releasedTag(
  args: readonly string[],
  env: Readonly<Record<string, string | undefined>>,
): string | undefined {
  return args[0] ?? (env.GITHUB_REF_TYPE === "tag" ? env.GITHUB_REF_NAME : undefined);
}

async function check(tag: string | undefined): Promise<string[]> {
  const read = (path: string) => readFileSync(join(ROOT, path), "utf8");
  const places = {
    denoJson: read("deno.json"),
    buildZigZon: read("zig/build.zig.zon"),
    changelog: read("CHANGELOG.md"),
  };
  const version: string = JSON.parse(places.denoJson).version;
  const day = newestEntry(places.changelog)?.date ?? "without a day in the changelog yet";
  say(`version ${version}, ${day}, ${tag === undefined ? "no tag" : `tag ${tag}`}`);

  const git = await run("at git status", "git", ["status", "--porcelain"], {
    cwd: ROOT,
    env: process.env,
    output: "captured",
  });
  const changes = git.output.trimEnd();
  const isClean = git.code === 0 && changes === "";

  const built = await deno("task", "build:targets"); // a second where lib/ is what these sources give
  if (built.code !== 0) return ["deno task build:targets must pass"];
  const libraries = releaseLibraries(join(ROOT, "lib"));
  for (const [target, path] of Object.entries(libraries)) {
    say(`${createHash("sha256").update(readFileSync(path)).digest("hex")}  ${target}`);
  }
  const reproduced = await deno("test", "-A", "tests/reproducible_test.ts");
  const packaged = await deno("task", "publish:check");
  for (const [name, { length }] of releaseFiles(version, libraries)) say(`${length} bytes  ${name}`);

  return [
    ...versionComplaints({ ...places, tag }),
    ...(isClean ? [] : [`all that is released must be committed: git status says\n${changes}`]),
    ...(reproduced.code === 0 ? [] : ["the test of two builds must pass"]),
    ...(packaged.code === 0 ? [] : ["deno task publish:check must pass"]),
  ];
}

/** Runs Deno in the root, and shows what it says. */
function deno(...args: string[]): Promise<RunResult> {
  return run(`at deno ${args.join(" ")}`, process.execPath, args, {
    cwd: ROOT,
    env: process.env,
    output: "forwarded",
  });
}

if (import.meta.main) {
  try {
    const complaints = await check(releasedTag(process.argv.slice(2), process.env));
    for (const complaint of complaints) say(complaint);
    if (complaints.length > 0) throw new ToolchainError("Cannot release this");
    say("ready for a release");
  } catch (error) {
    if (!(error instanceof ToolchainError)) throw error;
    say(error.message);
    process.exitCode = 1;
  }
}
