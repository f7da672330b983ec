/**
 * transformers.js for the tests: the package @huggingface/transformers, of one version, in Deno, Bun and Node.
 *
 *     deno run -A tests/transformers_runtime.ts      fetches it, where it is not there
 *
 * It is kept in `zig/.toolchain`, and takes the onnxruntime that is there. Of what else it depends on, 300 MB, nothing is
 * needed for text: packages of a few KB stand in their places. Where it cannot be had, `transformers` is undefined and
 * `withoutTransformers` says why, for the names of the tests that are skipped.
 *
 * @module
 */
import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, renameSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { download, findOnPath, say, seconds, ToolchainError, ZIG_FOLDER } from "../zig/toolchain.ts";
import { ONNX_PATH, withoutOnnx } from "./onnx_runtime.ts";

const PACKAGE = {
  name: "@huggingface/transformers",
  version: "4.3.2",
  integrity: "sha512-V3+dqf3iWlRYJ9I9GreM3zGQd0lAXnnoPeddmkOQYWAEE4l/+Fi6p7tx/qVUJlKQgLXGim2W76rTOzz+eC0i7g==",
} as const;
const TITLE = `${PACKAGE.name} ${PACKAGE.version}`;

/** Stands for what is not needed: the package has that one anyway. */
const STAND_IN = "npm:onnxruntime-common@1.30.0";

/** A tensor of the package. */
export interface TransformersTensor {
  readonly type: string;
  readonly dims: number[];
  readonly data: Float32Array | BigInt64Array;
}

/** Its cache: tensors by name, and a length. */
export type DynamicCache = Record<string, TransformersTensor> & { get_seq_length(): number };

/** What a call of `generate` takes. */
export interface GenerateOptions {
  readonly inputs: TransformersTensor;
  readonly attention_mask?: TransformersTensor;
  readonly max_new_tokens: number;
  readonly past_key_values?: DynamicCache;
}

/** A model of the package. */
export interface TransformersModel {
  generate(options: GenerateOptions): Promise<TransformersTensor>;
  dispose(): Promise<unknown>;
}

/** The part of the package that tests use. */
export interface Transformers {
  readonly env: { allowRemoteModels: boolean; localModelPath: string };
  readonly AutoModelForCausalLM: {
    from_pretrained(name: string, options: Readonly<Record<string, unknown>>): Promise<TransformersModel>;
  };
  readonly DynamicCache: new (entries?: Record<string, TransformersTensor>) => DynamicCache;
  readonly Tensor: new (type: string, data: unknown, dims: number[]) => TransformersTensor;
}

const INSTALLED = join(ZIG_FOLDER, ".toolchain", `transformers-${PACKAGE.version}`);
const PATH = join(INSTALLED, "node_modules", PACKAGE.name);

/** Fetches the package, where it is not there. An install is renamed at its end, so it is there whole or not at all. */
async function provide(): Promise<void> {
  if (existsSync(join(PATH, "package.json"))) return;
  if (!process.versions.deno) return provideByDeno();
  say(`installing ${TITLE} from npm into zig/.toolchain (about 5 MB, once)`);
  const started = performance.now();
  const folder = mkdtempSync(join(ZIG_FOLDER, ".toolchain", "install-"));
  try {
    const overrides = { "onnxruntime-node": STAND_IN, "onnxruntime-web": STAND_IN, sharp: STAND_IN };
    writeFileSync(join(folder, "package.json"), JSON.stringify({ overrides }));
    const wanted = { title: TITLE, advice: "Check the network", packages: [PACKAGE] };
    await download(folder, wanted, new AbortController().signal);
    const ready = join(folder, "ready");
    mkdirSync(ready);
    renameSync(join(folder, "node_modules"), join(ready, "node_modules"));
    const store = join(ready, "node_modules", ".deno");
    const beside = join(store, `${PACKAGE.name.replace("/", "+")}@${PACKAGE.version}`, "node_modules");
    rmSync(join(beside, "onnxruntime-node"), { recursive: true });
    symlinkSync(ONNX_PATH, join(beside, "onnxruntime-node"), "junction");
    renameSync(ready, INSTALLED);
  } catch (error) {
    if (!existsSync(PATH)) throw error; // else another install was first, and stays
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
  say(`installed ${TITLE} in ${seconds(started)}`);
}

function provideByDeno(): void {
  const deno = findOnPath("deno")[0];
  if (deno === undefined) throw new ToolchainError(`Cannot install ${TITLE} as there is no deno on PATH`);
  const { status, stderr, error } = spawnSync(deno, ["run", "-A", fileURLToPath(import.meta.url)], {
    encoding: "utf8",
    env: { ...process.env, NO_COLOR: "1" },
  });
  if (status === 0) return;
  throw new ToolchainError(error?.message ?? stderr.trim().split("\n").at(-1)!.replace(/^kvern: /, ""));
}

/** The package, or why it cannot be had. */
async function find(): Promise<Transformers | string> {
  if (withoutOnnx !== "") return withoutOnnx.slice(" (skipped: ".length, -1);
  try {
    await provide();
    return createRequire(import.meta.url)(PATH);
  } catch (error) {
    return `${TITLE} cannot be had: ${error instanceof Error ? error.message : error}`.replaceAll("\n", " ");
  }
}

const found = await find();

/** transformers.js; undefined where it cannot be had. */
export const transformers: Transformers | undefined = typeof found === "string" ? undefined : found;

/** Why tests with transformers.js are skipped, to be put behind their names; empty where they run. */
export const withoutTransformers: string = typeof found === "string" ? ` (skipped: ${found})` : "";

if (import.meta.main && typeof found === "string") {
  say(found);
  process.exitCode = 1;
}
