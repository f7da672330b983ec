/**
 * The package as a Bun or Node project gets it: JSR serves every package to npm's clients, too, in another layout.
 *
 *     package.json    named @jsr/kvern__kvern, with the exports below
 *     mod.js          transpiled, beside mod.js.map and a mod.ts that imports .js
 *     _dist/mod.d.ts  the declarations
 *     lib/…           every other file as it was published
 *
 * `deno pack` has the transpiler and the declarations of the registry, and lays them out its own way; here they are
 * moved to the registry's places (jsr-io/jsr, `api/src/npm/tarball.rs`). Maps of declarations are left out: they serve
 * an editor's way to the source and nothing else.
 *
 * @module
 */
import { Buffer } from "node:buffer";
import { spawnSync } from "node:child_process";
import { cpSync, existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import process from "node:process";
import { findOnPath } from "../zig/toolchain.ts";

/** The layout's number in the registry. */
const REVISION = 11;

/** A source map as `deno pack` puts it at the end of a file. */
interface SourceMap {
  readonly version: number;
  readonly names: readonly string[];
  readonly mappings: string;
  /** The source, whose imports are those of the transpiled file already. */
  readonly sourcesContent: readonly [string];
}

const deno = process.versions.deno ? process.execPath : findOnPath("deno")[0];
const tar = findOnPath("tar")[0];

/** The program that is missing here to lay a package out, for the name of a skipped test. */
export const missingForNpmLayer: string | undefined = deno === undefined
  ? "deno"
  : tar === undefined
  ? "tar"
  : undefined;

/**
 * Writes what a project has of the package at `folder` after an install, to `into`.
 *
 * `bunx jsr add @kvern/kvern` puts it at `node_modules/@kvern/kvern`, under that name and not under its own.
 */
export function layNpmPackage(folder: string, into: string): void {
  const work = mkdtempSync(join(tmpdir(), "kvern-npm-"));
  try {
    const tarball = join(work, "package.tgz");
    run(deno!, ["pack", "--quiet", "--allow-dirty", "--output", tarball], folder);
    run(tar!, ["-xzf", "package.tgz"], work);
    const packed = join(work, "package");
    cpSync(folder, into, { recursive: true });
    for (const file of readdirSync(packed, { recursive: true, encoding: "utf8" })) {
      if (file.endsWith(".js")) layModule(readFileSync(join(packed, file), "utf8"), into, file);
      if (file.endsWith(".d.ts")) write(join(into, "_dist", file), readFileSync(join(packed, file), "utf8"));
    }
    write(join(into, "package.json"), JSON.stringify(packageJson(into), null, 2));
  } finally {
    rmSync(work, { recursive: true });
  }
}

/** Writes a transpiled file, its map, and its source. */
function layModule(text: string, into: string, file: string): void {
  const [, code, encoded] = /^([\s\S]*)\/\/# sourceMappingURL=data:application\/json;base64,(\S+)\s*$/.exec(text) ?? [];
  if (code === undefined) throw new Error(`Cannot lay out ${file} as deno pack must have given it a source map`);
  const name = file.split(/[\\/]/).at(-1)!;
  const { sourcesContent: [source], version, names, mappings }: SourceMap = JSON.parse(
    Buffer.from(encoded!, "base64").toString(),
  );
  const sources = [`./${name.replace(/\.js$/, ".ts")}`];
  write(join(into, file), `${code}//# sourceMappingURL=${name}.map`);
  write(join(into, `${file}.map`), JSON.stringify({ version, file: name, sources, names, mappings }));
  write(join(into, file.replace(/\.js$/, ".ts")), source);
}

/** What npm's clients read. */
function packageJson(into: string): Record<string, unknown> {
  const config = JSON.parse(readFileSync(join(into, "deno.json"), "utf8"));
  const [, scope, name] = /^@([^/]+)\/(.+)$/.exec(config.name)!;
  const entries: Record<string, string> = typeof config.exports === "string" ? { ".": config.exports } : config.exports;
  const exports = Object.entries(entries).map(([entry, path]) => {
    const bare = path.replace(/^\.\//, "").replace(/\.ts$/, "");
    const types = existsSync(join(into, `_dist/${bare}.d.ts`)) ? { types: `./_dist/${bare}.d.ts` } : {};
    return [entry, { ...types, default: `./${bare}.js` }];
  });
  return {
    name: `@jsr/${scope}__${name}`,
    version: config.version,
    homepage: `https://jsr.io/${config.name}`,
    type: "module",
    dependencies: {},
    exports: Object.fromEntries(exports),
    _jsr_revision: REVISION,
  };
}

function write(path: string, text: string): void {
  mkdirSync(dirname(path), { recursive: true });
  writeFileSync(path, text);
}

function run(command: string, args: readonly string[], cwd: string): void {
  const { status, stdout, stderr, error } = spawnSync(command, args, { cwd, encoding: "utf8" });
  if (status !== 0) throw new Error(`Cannot run ${command} ${args.join(" ")}: ${error ?? stdout + stderr}`);
}
