/**
 * Packages of npm, for what needs them and only then: everything else here runs without any.
 *
 * One that is installed where the program was started is taken; otherwise Deno and Bun fetch the version named here, and
 * Node has to be given it.
 */
import { createRequire } from "node:module";
import { join } from "node:path";
import process from "node:process";
import { UsageError } from "./arguments.ts";

/** The packages and the versions that were tried. */
const VERSIONS = {
  "onnxruntime-node": "1.30.0",
  "@huggingface/tokenizers": "0.2.0",
  "@huggingface/jinja": "0.5.11",
} as const;

/** A package of npm that an example may want. */
export type PackageName = keyof typeof VERSIONS;

/** Loads a package. */
export async function loadPackage(name: PackageName): Promise<unknown> {
  const require = createRequire(join(process.cwd(), "here.js"));
  try {
    return require(name);
  } catch (error) {
    if ((error as { code?: string }).code !== "MODULE_NOT_FOUND") throw error;
  }
  const versioned = `${name}@${VERSIONS[name]}`;
  try {
    if ("Deno" in globalThis) return await import(`npm:${versioned}`);
    if ("Bun" in globalThis) return await import(versioned);
  } catch (error) {
    throw new UsageError(`${versioned} cannot be had from npm: ${error instanceof Error ? error.message : error}`);
  }
  const all = Object.entries(VERSIONS).map(([name, version]) => `${name}@${version}`);
  throw new UsageError(`${name} is not installed: npm install ${all.join(" ")}`);
}
