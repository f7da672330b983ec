/**
 * kvern where it is not a checkout: a package without sources of the library, a bundle, a program that Bun compiled,
 * and runtimes it does not know. What stands outside its package is never opened.
 */

import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { copyFileSync, mkdirSync, mkdtempSync, realpathSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { fileURLToPath, pathToFileURL } from "node:url";
import { systemInfo } from "../mod.ts";
import { accepts, findOnPath, findTool, ToolchainError } from "../zig/toolchain.ts";
import { denoOnly, inDeno, MOD, runCode, runFile, runtime } from "./child.ts";
import { stageOwnPackage, TARGET } from "./own_package.ts";

const { libraryPath } = systemInfo();
const LIBRARY = basename(libraryPath);

/** Prints what `systemInfo()` gives, or its error. */
const PRINT = `
  let said;
  try {
    said = systemInfo();
  } catch (error) {
    said = { name: error.name, code: error.code, message: error.message };
  }
  console.log(JSON.stringify(said));
`;

interface Said {
  libraryPath?: string;
  name?: string;
  code?: string;
  message?: string;
}

function withFolder(body: (folder: string) => void): void {
  const folder = realpathSync(mkdtempSync(join(tmpdir(), "kvern-bundle-")));
  try {
    body(folder);
  } finally {
    rmSync(folder, { recursive: true });
  }
}

/** Runs a program that prints JSON. */
function said(result: { code: number | null; stdout: string; stderr: string }): Said {
  assert.equal(result.code, 0, result.stderr);
  return JSON.parse(result.stdout);
}

/** Bun's path, or undefined where there is none; the reason then stands in the names of tests. */
const bun = ((): string | undefined => {
  try {
    return findTool("bun");
  } catch (error) {
    if (error instanceof ToolchainError) return undefined;
    throw error;
  }
})();
const needsBun = bun === undefined ? " (skipped: no Bun to bundle with)" : "";

/** Lets Bun bundle a program that prints, into `file`. */
function bundle(folder: string, file: string, ...args: string[]): void {
  const source = join(folder, "main.ts");
  writeFileSync(source, `import { systemInfo } from "${fileURLToPath(MOD)}";\n${PRINT}`);
  build(folder, [source, `--outfile=${file}`, ...args]);
}

function build(folder: string, args: string[]): void {
  // In a folder without a configuration, and with a HOME of its own.
  const home = join(folder, "home");
  mkdirSync(home, { recursive: true });
  const env = { ...process.env, HOME: home };
  const { status, stdout, stderr } = spawnSync(bun!, ["build", ...args], { cwd: folder, env, encoding: "utf8" });
  assert.equal(status, 0, stdout + stderr);
}

/** The package as the registry gives it, with a library in `lib/<target>`; gives that file. */
function copyPackage(folder: string): string {
  stageOwnPackage(join(folder, "package"));
  return join(folder, "package", "lib", TARGET, LIBRARY);
}

test("a package with nothing but lib/ works, and its errors name the file that is there", () => {
  withFolder((folder) => {
    const library = copyPackage(folder);
    const code = `import { systemInfo } from "${pathToFileURL(join(folder, "package", "mod.ts"))}";\n${PRINT}`;
    assert.equal(said(runCode(code, { env: { KVERN_LIB: undefined } })).libraryPath, library);

    writeFileSync(library, "not a library");
    const { code: refusal, message } = said(runCode(code, { env: { KVERN_LIB: undefined } }));
    assert.equal(refusal, "library_unavailable");
    assert.ok(message!.includes(`tried ${library} (`), message);
    assert.ok(!message!.includes("zig-out"), message);
  });
});

test(`a flag that is asked for names what is there, and is enough${denoOnly}`, { skip: !inDeno }, () => {
  withFolder((folder) => {
    const library = copyPackage(folder);
    const code = `import { systemInfo } from "${pathToFileURL(join(folder, "package", "mod.ts"))}";\n${PRINT}`;
    // Deno may look at the files, or at none of them and at the folder of the package alone.
    for (const [flag, there] of [["--allow-read", library], ["--allow-sys", join(folder, "package")]] as const) {
      const { code: refusal, message } = said(runCode(code, { denoFlags: [flag] }));
      assert.equal(refusal, "needs_permission");
      const wanted = `--allow-ffi=${there}`;
      assert.equal(
        message,
        `Cannot open the native library as Deno needs a permission for it: run with ${wanted}`,
      );
      assert.equal(said(runCode(code, { denoFlags: [flag, wanted] })).libraryPath, library);
    }
  });
});

test(
  `a bundle opens nothing above its folder, and the library that KVERN_LIB names${needsBun}`,
  { skip: needsBun !== "", timeout: 60_000 },
  () => {
    withFolder((folder) => {
      // Where a bundle would look if it took itself for a file of the package.
      for (const place of ["zig/zig-out/lib", `lib/${TARGET}`]) {
        mkdirSync(join(folder, place), { recursive: true });
        copyFileSync(libraryPath, join(folder, place, LIBRARY));
      }
      const file = join(folder, "app", "dist", "bundle.js");
      bundle(folder, file, "--target=bun");
      const { code, message } = said(runFile(pathToFileURL(file), { KVERN_LIB: "" }));
      assert.equal(code, "library_unavailable");
      assert.match(message!, /as this module is not a file of its package, .*: import "@kvern\/kvern\/embed"/);
      assert.ok(!message!.includes(folder), message);
      assert.equal(said(runFile(pathToFileURL(file), { KVERN_LIB: libraryPath })).libraryPath, libraryPath);
    });
  },
);

const compiles = runtime === "bun" ? "" : " (skipped: a compiled program runs by itself, and is tested in Bun)";

test(
  `a program that Bun compiled opens the library embedded in it${compiles}`,
  { skip: compiles !== "", timeout: 120_000 },
  () => {
    withFolder((folder) => {
      const program = join(folder, "program");
      writeFileSync(
        join(folder, "compiled.ts"),
        `import path from ${JSON.stringify(libraryPath)} with { type: "file" };
         import { ContiguousCache, systemInfo } from "${fileURLToPath(MOD)}";
         process.env.KVERN_LIB = process.argv[2] === "embedded" ? path : "";
         ${PRINT}
         if (process.argv[2] === "embedded") {
           const cache = new ContiguousCache({ layerCount: 1, kvHeadCount: 1, headDim: 2, maxSeqLen: 4 });
           const sequence = cache.sequence(0), row = Float32Array.of(1, 2);
           sequence.append(0, row, row);
           sequence.commit(1);
           console.error([...sequence.attend(0, row)].join());
         }`,
      );
      build(folder, ["--compile", join(folder, "compiled.ts"), `--outfile=${program}`]);
      const run = (arg: string) => {
        const { status, stdout, stderr } = spawnSync(program, [arg], { cwd: folder, encoding: "utf8" });
        return { code: status, stdout, stderr };
      };
      const embedded = run("embedded");
      const { libraryPath: opened } = said(embedded);
      assert.match(opened!, /\$bunfs|~BUN/);
      assert.equal(embedded.stderr.trim(), "1,2");
      const { code, message } = said(run("alone"));
      assert.equal(code, "library_unavailable");
      assert.match(message!, /name one with setLibraryPath\(\) or in KVERN_LIB/);
    });
  },
);

const SENTENCE = "Cannot open the native library as kvern runs in Deno, in Bun, and in Node 26.10 or later only";

test("an engine that lacks what Node 20 lacks can import kvern", () => {
  const code = `
    for (const name of ["detached", "transfer", "transferToFixedLength", "resize"]) delete ArrayBuffer.prototype[name];
    delete globalThis.Float16Array;
    Object.defineProperty(globalThis.process, "versions", { value: { node: "20.20.2" } });
    delete globalThis.Deno; // Bun's name cannot be taken away
    const { systemInfo } = await import(${JSON.stringify(MOD)});
    ${PRINT}
  `;
  const result = said(runCode(code));
  if (runtime === "bun") assert.equal(result.libraryPath, libraryPath);
  else assert.deepEqual(result, { name: "KvError", code: "library_unavailable", message: SENTENCE });
});

const oldNode = findOnPath("node").find((path) => {
  const { stdout } = spawnSync(path, ["--version"], { encoding: "utf8" });
  return !accepts("node", stdout.trim().replace("v", ""));
});
const needsNode = needsBun || (oldNode === undefined ? " (skipped: no Node before 26.10 on PATH)" : "");

test(`an older Node is told in which runtimes kvern runs${needsNode}`, { skip: needsNode !== "" }, () => {
  withFolder((folder) => {
    const file = join(folder, "bundle.mjs");
    bundle(folder, file, "--target=node");
    const { status, stdout, stderr } = spawnSync(oldNode!, [file], { cwd: folder, encoding: "utf8" });
    const expected = { name: "KvError", code: "library_unavailable", message: SENTENCE };
    assert.deepEqual(said({ code: status, stdout, stderr }), expected);
  });
});
