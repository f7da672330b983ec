/**
 * onnxruntime for the tests: the package onnxruntime-node, of one version, in Deno, Bun and Node.
 *
 *     deno run -A tests/onnx_runtime.ts      fetches it, where it is not there
 *
 * It is kept in `zig/.toolchain`, as the tools are, and fetched from npm by the first test that wants it: by Deno, which
 * Bun and Node look for on PATH. No script of the package is run. Where it cannot be had, `onnxRuntime` is undefined and
 * `withoutOnnx` says why, for the names of the tests that are skipped.
 *
 * @module
 */
import { readdirSync, rmSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import process from "node:process";
// Loaded before Float16Array is out of sight, as the package needs it and its making needs Float16Array in Bun.
import "node:worker_threads";
import { say } from "../zig/toolchain.ts";
import { folderOf, type PackageSet, providePackages, reasonOf } from "./npm_packages.ts";

const VERSION = "1.30.0";

const SET: PackageSet = {
  title: `onnxruntime-node ${VERSION}`,
  folder: `onnxruntime-node-${VERSION}-${process.platform}-${process.arch}`,
  bytes: "about 100 MB",
  packages: [{
    name: "onnxruntime-node",
    version: VERSION,
    integrity: "sha512-twhs1C2C/BFkz1yc5OY0KIU2GUq6DURO7hD4bx5Q2Qy3nAMJwRXW8xU3NVczE29VA9lolLOYepoD8fjTGOfIqw==",
  }],
  prune: removeOtherPlatforms,
  module: import.meta.url,
};

/** Elements of a tensor; f16 are the bits in a Uint16Array. */
export type Elements = Float32Array | Uint16Array | Int32Array | BigInt64Array | Uint8Array;

/** A tensor of the package. */
export interface OnnxTensor {
  readonly type: string;
  readonly data: Elements;
  readonly dims: readonly number[];
}

/** Tensors by name. */
export type OnnxTensors = Readonly<Record<string, OnnxTensor>>;

/** A model that is loaded. */
export interface OnnxSession {
  readonly inputNames: readonly string[];
  readonly outputNames: readonly string[];
  run(feeds: OnnxTensors, fetches?: OnnxTensors): Promise<OnnxTensors>;
  release(): Promise<void>;
}

/** The part of the package that tests use. */
export interface OnnxRuntime {
  readonly Tensor: new (type: string, data: Elements, dims: readonly number[]) => OnnxTensor;
  readonly InferenceSession: {
    create(model: Uint8Array | string, options?: Readonly<Record<string, unknown>>): Promise<OnnxSession>;
  };
}

/** The entry of the package, for a process that is to load it as its users do. */
export const ONNX_PATH: string = join(folderOf(SET), "node_modules", "onnxruntime-node");

/** Deletes the libraries that cannot run here: two thirds of the package. */
function removeOtherPlatforms(ready: string): void {
  const root = join(ready, "node_modules", "onnxruntime-node", "bin");
  for (const kind of readdirSync(root)) {
    for (const platform of readdirSync(join(root, kind))) {
      for (const arch of readdirSync(join(root, kind, platform))) {
        if (platform === process.platform && arch === process.arch) continue;
        rmSync(join(root, kind, platform, arch), { recursive: true });
      }
    }
  }
}

/** Loads the package in such a way that its f16 tensors work. */
function load(): OnnxRuntime {
  // The package takes f16 as a Float16Array where there is one, which neither Deno nor Bun hands on to native code.
  const hidden = globalThis.Float16Array;
  try {
    Reflect.deleteProperty(globalThis, "Float16Array");
    const found: OnnxRuntime = createRequire(import.meta.url)(ONNX_PATH);
    new found.Tensor("float16", new Uint16Array(1), [1]); // at its first tensor it looks for Float16Array
    return found;
  } finally {
    globalThis.Float16Array = hidden;
  }
}

/** The package, or why it cannot be had. */
async function find(): Promise<OnnxRuntime | string> {
  try {
    await providePackages(SET);
    return load();
  } catch (error) {
    return reasonOf(SET, error);
  }
}

const found = await find();

/** onnxruntime; undefined where it cannot be had. */
export const onnxRuntime: OnnxRuntime | undefined = typeof found === "string" ? undefined : found;

/** Why tests with onnxruntime are skipped, to be put behind their names; empty where they run. */
export const withoutOnnx: string = typeof found === "string" ? ` (skipped: ${found})` : "";

if (import.meta.main && typeof found === "string") {
  say(found);
  process.exitCode = 1;
}
