/**
 * kvern as its users have it: installed in a Bun project, compiled into a program, bundled, in a Worker, in a folder that
 * nobody may write to, and with a library that is not the one of the release.
 *
 * @module
 */

import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import {
  chmodSync,
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  realpathSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { after, test } from "node:test";
import { releasedPlace } from "../zig/package.ts";
import { packTarball } from "../zig/tarball.ts";
import { findTool, ToolchainError, type ToolName } from "../zig/toolchain.ts";
import { inDeno } from "./child.ts";
import { layNpmPackage, missingForNpmLayer } from "./npm_layer.ts";
import { stageOwnPackage, TARGET } from "./own_package.ts";

/** The path of a tool, or undefined where there is none; the reason then stands in the names of tests. */
function toolOrNone(name: ToolName): string | undefined {
  try {
    return findTool(name);
  } catch (error) {
    if (error instanceof ToolchainError) return undefined;
    throw error;
  }
}

const bun = toolOrNone("bun"), node = toolOrNone("node");
const missing = bun === undefined ? "Bun" : missingForNpmLayer;
const reason = !inDeno
  ? " (skipped: it starts the runtimes itself, and runs under Deno)"
  : missing
  ? ` (skipped: no ${missing})`
  : "";

/** What every program below does: attends to one row, and tells where the library is. */
const USE = `
  const cache = new ContiguousCache({ layerCount: 1, kvHeadCount: 1, headDim: 2, maxSeqLen: 4 });
  const sequence = cache.sequence(0), row = Float32Array.of(1, 2);
  sequence.append(0, row, row);
  sequence.commit(1);
  const attended = [...sequence.attend(0, row)].join();
`;
const PROGRAM = `
  import { ContiguousCache, systemInfo } from "@kvern/kvern";
  let said;
  try {
    ${USE}
    said = { attended, libraryPath: systemInfo().libraryPath };
  } catch (error) {
    said = { code: error.code, message: error.message };
  }
  console.log(JSON.stringify(said));
`;

interface Said {
  readonly attended?: string;
  readonly libraryPath?: string;
  readonly code?: string;
  readonly message?: string;
}

/** A Bun project with kvern in its node_modules, made once and copied. */
const installed: string = reason === "" ? realpathSync(mkdtempSync(join(tmpdir(), "kvern-installed-"))) : "";
if (reason === "") {
  after(() => rmSync(installed, { recursive: true }));
  stageOwnPackage(join(installed, "staged"));
  layNpmPackage(join(installed, "staged"), join(installed, "project/node_modules/@kvern/kvern"));
  writeFileSync(join(installed, "project/package.json"), '{ "type": "module" }');
}

/** Declares a test in a project of its own; `why` is the reason to skip it, if there is one. */
function projectTest(name: string, body: (project: string) => void, why: string = reason): void {
  test(name + why, { skip: why !== "", timeout: 120_000 }, () => {
    const folder = realpathSync(mkdtempSync(join(tmpdir(), "kvern-project-")));
    try {
      cpSync(join(installed, "project"), folder, { recursive: true });
      body(folder);
    } finally {
      rmSync(folder, { recursive: true });
    }
  });
}

/** Runs a command in the project, with a home of its own, and gives what it printed. */
function output(folder: string, command: string, args: readonly string[]): string {
  const home = join(folder, "home");
  mkdirSync(home, { recursive: true });
  const { KVERN_LIB: _, ...env } = process.env;
  const options = { cwd: folder, env: { ...env, HOME: home, NO_COLOR: "1" }, encoding: "utf8" } as const;
  const { status, stdout, stderr } = spawnSync(command, args, options);
  assert.equal(status, 0, stdout + stderr);
  return stdout;
}

/** Runs a program that prints JSON. */
function said(folder: string, command: string, ...args: string[]): Said {
  return JSON.parse(output(folder, command, args));
}

function write(folder: string, file: string, text: string): string {
  writeFileSync(join(folder, file), text);
  return join(folder, file);
}

/** The library in the project's node_modules. */
function libraryIn(project: string): string {
  return join(project, "node_modules/@kvern/kvern", releasedPlace(TARGET));
}

projectTest(
  "a Bun project imports the package from a folder that may not be written to, and leaves it alone",
  (project) => {
    const main = write(project, "main.ts", PROGRAM);
    const folder = join(project, "node_modules");
    const entries = () => readdirSync(folder, { recursive: true, encoding: "utf8" }).sort();
    const before = entries();
    const folders = [
      folder,
      ...before.map((entry) => join(folder, entry)).filter((path) => statSync(path).isDirectory()),
    ];
    for (const path of folders) chmodSync(path, 0o555);
    try {
      assert.deepEqual(said(project, bun!, main), { attended: "1,2", libraryPath: libraryIn(project) });
      assert.deepEqual(entries(), before);
    } finally {
      for (const path of folders) chmodSync(path, 0o755);
    }
  },
);

projectTest("a Deno project imports the package from node_modules as well", (project) => {
  const main = write(project, "main.ts", PROGRAM);
  write(project, "deno.json", '{ "nodeModulesDir": "manual" }');
  const flags = ["run", "--no-prompt", "--no-lock", `--allow-ffi=${libraryIn(project)}`];
  assert.deepEqual(said(project, process.execPath, ...flags, main), {
    attended: "1,2",
    libraryPath: libraryIn(project),
  });
});

projectTest(
  "a Node project imports the package from node_modules, and so does a Worker of it",
  (project) => {
    const expected = { attended: "1,2", libraryPath: libraryIn(project) };
    const main = write(project, "main.mjs", PROGRAM);
    assert.deepEqual(said(project, node!, main), expected);
    const starter = `import { Worker } from "node:worker_threads"; new Worker(new URL("./main.mjs", import.meta.url));`;
    assert.deepEqual(said(project, node!, write(project, "starter.mjs", starter)), expected);
  },
  reason || (node === undefined ? " (skipped: no Node 26.10)" : ""),
);

projectTest("the packed tarball holds a package that works in Deno", (project) => {
  const staged = join(installed, "staged"), folder = join(project, "unpacked");
  const paths = readdirSync(staged, { recursive: true, encoding: "utf8" }).filter((path) =>
    statSync(join(staged, path)).isFile()
  );
  const files = paths.map((path) => [path.replaceAll("\\", "/"), readFileSync(join(staged, path))] as const);
  writeFileSync(join(project, "package.tgz"), packTarball(new Map(files)));
  mkdirSync(folder);
  output(project, "tar", ["-xzf", "package.tgz", "-C", "unpacked"]);
  const main = write(project, "main.ts", PROGRAM.replace("@kvern/kvern", "./unpacked/mod.ts"));
  const library = join(folder, releasedPlace(TARGET));
  const flags = ["run", "--no-prompt", "--no-lock", "--no-config", `--allow-ffi=${library}`];
  assert.deepEqual(said(project, process.execPath, ...flags, main), { attended: "1,2", libraryPath: library });
});

projectTest("a Worker of a Bun project uses the package first", (project) => {
  write(project, "worker.ts", PROGRAM.replace("console.log(JSON.stringify(said))", "postMessage(said)"));
  const main = write(
    project,
    "main.ts",
    `const worker = new Worker(new URL("./worker.ts", import.meta.url));
     worker.onmessage = ({ data }) => {
       console.log(JSON.stringify(data));
       worker.terminate();
     };`,
  );
  assert.deepEqual(said(project, bun!, main), { attended: "1,2", libraryPath: libraryIn(project) });
});

projectTest(
  "a library that is not the one of the release is refused: cut short, changed, of somebody else",
  (project) => {
    const main = write(project, "main.ts", PROGRAM);
    const bytes = readFileSync(libraryIn(project)), changed = Uint8Array.from(bytes);
    changed[bytes.length >> 1]! ^= 1;
    const rows: [given: Uint8Array, reason: RegExp][] = [
      [bytes.subarray(0, 5000), /it has 5000 bytes, the released one has \d+/],
      [changed, /its SHA-256 is \w{64}, that of the released one \w{64}/],
      [new TextEncoder().encode("not a library"), /it has 13 bytes, the released one has \d+/],
    ];
    for (const [given, reason] of rows) {
      writeFileSync(libraryIn(project), given);
      const { code, message } = said(project, bun!, main);
      assert.equal(code, "library_unavailable");
      assert.ok(message!.includes(`tried ${libraryIn(project)} (`), message);
      assert.match(message!, reason);
    }
  },
);

projectTest("a program that Bun compiles carries the library and runs alone", (project) => {
  const main = write(project, "main.ts", `import "@kvern/kvern/embed";\n${PROGRAM}`);
  const alone = join(project, "alone");
  mkdirSync(alone);
  output(project, bun!, ["build", "--compile", main, `--outfile=${join(alone, "program")}`]);
  rmSync(join(project, "node_modules"), { recursive: true });
  const { attended, libraryPath: path } = said(alone, join(alone, "program"));
  assert.equal(attended, "1,2");
  assert.match(path!, /\$bunfs|~BUN/);
});

projectTest("a bundle of Bun has the library beside it", (project) => {
  const main = write(project, "main.ts", `import "@kvern/kvern/embed";\n${PROGRAM}`);
  output(project, bun!, ["build", main, "--target=bun", `--outdir=${join(project, "dist")}`]);
  rmSync(join(project, "node_modules"), { recursive: true });
  const { attended, libraryPath: path } = said(project, bun!, join(project, "dist/main.js"));
  assert.equal(attended, "1,2");
  assert.ok(path!.startsWith(join(project, "dist")) && existsSync(path!), path);
});

projectTest("a program compiled from a package that lacks the library says so when it is used", (project) => {
  rmSync(join(project, "node_modules/@kvern/kvern/lib"), { recursive: true });
  const main = write(project, "main.ts", `import "@kvern/kvern/embed";\n${PROGRAM}`);
  output(project, bun!, ["build", "--compile", main, `--outfile=${join(project, "program")}`]);
  const { code, message } = said(project, join(project, "program"));
  assert.equal(code, "library_unavailable");
  assert.match(message!, /a bundler must find lib\/<target> in the package to take it along: there was none for /);
});

projectTest("a bundle without the library says what to do, and takes a path that is set", (project) => {
  const main = write(
    project,
    "main.ts",
    PROGRAM.replace("systemInfo }", "setLibraryPath, systemInfo }").replace("try {", "try { setPath();") +
      `function setPath() {
         if (process.argv[2]) setLibraryPath(process.argv[2] === "beside" ? new URL("./own.so", import.meta.url) : process.argv[2]);
       }`,
  );
  output(project, bun!, ["build", main, "--target=bun", `--outfile=${join(project, "dist/main.js")}`]);
  cpSync(libraryIn(project), join(project, "dist/own.so"));
  const bundle = join(project, "dist/main.js");
  const { code, message } = said(project, bun!, bundle);
  assert.equal(code, "library_unavailable");
  assert.match(
    message!,
    /import "@kvern\/kvern\/embed" where Bun bundles or compiles, or name one with setLibraryPath\(\)/,
  );
  const own = { attended: "1,2", libraryPath: join(project, "dist/own.so") };
  for (const given of ["beside", join(project, "dist/own.so"), "dist/own.so"]) {
    assert.deepEqual(said(project, bun!, bundle, given), own);
  }
});

/** Whether `deno compile` has the program it puts in front: it downloads it where it is not kept. */
function canDenoCompile(folder: string): boolean {
  writeFileSync(join(folder, "probe.ts"), "");
  const args = ["compile", "--quiet", "--no-config", "--output", join(folder, "probe"), join(folder, "probe.ts")];
  return spawnSync(process.execPath, args, { timeout: 60_000 }).status === 0;
}

const uncompiled = reason ||
  (canDenoCompile(installed) ? "" : " (skipped: deno compile cannot download its base program)");
test(
  `a program that Deno compiles carries the library${uncompiled}`,
  { skip: uncompiled !== "", timeout: 120_000 },
  () => {
    const folder = join(installed, "staged");
    const main = write(folder, "main.ts", PROGRAM.replace("@kvern/kvern", "./mod.ts"));
    const program = join(installed, "compiled");
    const flags = ["--no-config", "--allow-ffi", "--allow-read", "--include", join(folder, releasedPlace(TARGET))];
    output(installed, process.execPath, ["compile", ...flags, "--output", program, main]);
    assert.equal(said(installed, program).attended, "1,2");
  },
);
