/**
 * A library with some of its levels left out, as `zig build -Dlevels` makes it: the demo's has the kernels of this CPU
 * alone. It says what it lacks, and is refused where it has nothing for the CPU.
 *
 * @module
 */
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { systemInfo } from "../mod.ts";
import { findToolOrNone, ZIG_FOLDER, zigEnvironment } from "../zig/toolchain.ts";
import { ENUMS } from "./abi_calls.ts";
import { inDeno, MOD, runCode } from "./child.ts";

const zig = findToolOrNone("zig");
const reason = !inDeno ? " (skipped: it tests the library alone, under Deno)" : zig ? "" : " (skipped: no Zig 0.16)";
const skip = reason !== "";

/** Builds the library with those levels and gives its path to `body`. */
function withLevels(levels: string, body: (library: string) => void): void {
  const prefix = mkdtempSync(join(tmpdir(), "kvern-levels-"));
  try {
    const args = ["build", `-Dlevels=${levels}`, "-Dstrip", "--prefix", prefix];
    const { status, stderr } = spawnSync(zig!, args, { cwd: ZIG_FOLDER, env: zigEnvironment(), encoding: "utf8" });
    assert.equal(status, 0, stderr);
    const folder = process.platform === "win32" ? "bin" : "lib";
    const suffix = ({ win32: "kvern.dll", darwin: "libkvern.dylib" } as Record<string, string>)[process.platform];
    body(join(prefix, folder, suffix ?? "libkvern.so"));
  } finally {
    rmSync(prefix, { recursive: true });
  }
}

/** What `systemInfo()` gives with that library, or the code and text of its error. */
function infoOf(library: string, level?: string): Partial<Record<"level" | "code" | "message", string>> & {
  levels?: string[];
} {
  const { code, stdout, stderr } = runCode(
    `
    import { KvError, systemInfo } from "${MOD}";
    try {
      console.log(JSON.stringify(systemInfo()));
    } catch (error) {
      if (!(error instanceof KvError)) throw error;
      console.log(JSON.stringify({ code: error.code, message: error.message }));
    }
    `,
    { env: { KVERN_LIB: library, KVERN_LEVEL: level } },
  );
  assert.equal(code, 0, stderr);
  return JSON.parse(stdout);
}

test(`-Dlevels=native builds the highest level of this CPU${reason}`, { skip, timeout: 600_000 }, () => {
  const { levels: all } = systemInfo();
  withLevels("native", (library) => {
    const { level, levels } = infoOf(library);
    assert.equal(level, all.at(-1));
    // Linux refuses AMX to some processes, so the level below is built with it.
    assert.deepEqual(levels, all.slice(level === "amx" ? -2 : -1));
    const missing = all.find((name) => !levels!.includes(name));
    if (missing === undefined) return; // a CPU of the lowest level lacks none
    const { code, message } = infoOf(library, missing);
    assert.equal(code, "invalid_config");
    const built = levels!.join(", ");
    assert.ok(message!.endsWith(`the library was built for ${built} alone: KVERN_LEVEL is ${missing}`), message);
  });
});

const UNSUPPORTED = ENUMS.status.unsupported;

/** Calls every export well but for its handles, in a library that TypeScript would refuse; prints the results. */
const CALLS = `
  import { EXPORTS, goodWords, names } from "${new URL("abi_calls.ts", import.meta.url)}";
  import { wordsOf } from "${new URL("../src/ffi/exports.ts", import.meta.url)}";
  const symbols = Object.fromEntries(
    names.map((name) => [name, { parameters: wordsOf(EXPORTS[name]), result: "i32" }]),
  );
  const library = Deno.dlopen(Deno.env.get("WITHOUT_LEVELS"), symbols).symbols;
  console.log(JSON.stringify(names.map((name) => [name, library[name](...goodWords(name))])));
`;

test(`a library without a level of this CPU is refused, and never crashes${reason}`, { skip, timeout: 600_000 }, () => {
  withLevels("", (library) => {
    const { code, message } = infoOf(library);
    assert.equal(code, "library_unavailable");
    assert.match(message!, /\(it was built for no level alone, which this CPU does not have\)/);

    const child = runCode(CALLS, { env: { WITHOUT_LEVELS: library } });
    assert.equal(child.code, 0, child.stderr);
    const results: [name: string, result: number][] = JSON.parse(child.stdout);
    assert.deepEqual(results.filter(([, result]) => result === UNSUPPORTED).map(([name]) => name).sort(), [
      "kv_block_dequantize",
      "kv_block_quantize",
      "kv_contiguous_create",
      "kv_level_set",
      "kv_paged_create",
      "kv_read_rate",
      "kv_rows_dequantize",
      "kv_rows_quantize",
    ]);
  });
});
