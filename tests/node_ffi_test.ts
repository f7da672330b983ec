/** What is Node's alone: its permissions, and the flag that takes `node:ffi` away. */

import assert from "node:assert/strict";
import { copyFileSync, mkdtempSync, realpathSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { systemInfo } from "../mod.ts";
import { type ChildOptions, MOD, runCode, runtime } from "./child.ts";

const inNode = runtime === "node";
const skip = !inNode;
const nodeOnly = inNode ? "" : " (skipped: it is about Node)";
const { libraryPath } = systemInfo();

interface Refusal {
  readonly code: string;
  readonly message: string;
}

/** What the first use of kvern gives in a process of its own. */
function ask(body: string, options: ChildOptions): unknown {
  const { code, stdout, stderr } = runCode(
    `
    import { ContiguousCache, KvError, systemInfo } from "${MOD}";
    function attempt(call) {
      try {
        return call();
      } catch (error) {
        if (!(error instanceof KvError)) throw error;
        return { code: error.code, message: error.message };
      }
    }
    console.log(JSON.stringify(attempt(() => {
      ${body}
    })));
    `,
    options,
  );
  assert.equal(code, 0, stderr);
  return JSON.parse(stdout);
}

test(`with --permission the text names the flag that is missing${nodeOnly}`, { skip }, () => {
  for (const others of [[], ["--allow-addons", "--allow-worker"]]) {
    assert.deepEqual(ask("return systemInfo();", { nodeFlags: ["--permission", "--allow-fs-read=*", ...others] }), {
      code: "needs_permission",
      message: "Cannot open the native library as Node needs a permission for it: run with --allow-ffi",
    });
  }
});

test(`with --allow-ffi all works, zero-copy arrays and a library that may not be read${nodeOnly}`, { skip }, () => {
  const folder = realpathSync(mkdtempSync(join(tmpdir(), "kvern-node-")));
  try {
    const elsewhere = join(folder, basename(libraryPath));
    copyFileSync(libraryPath, elsewhere);
    const body = `
      const cache = new ContiguousCache({ layerCount: 1, kvHeadCount: 1, headDim: 2, maxSeqLen: 4 });
      cache.append(0, 0, Float32Array.of(1, 2), Float32Array.of(3, 4));
      cache.sequence(0).commit(1);
      const { libraryPath } = systemInfo();
      return [libraryPath, ...cache.getKeys(0, 0), ...cache.sequence(0).attend(0, new Float32Array(2))];`;
    const root = fileURLToPath(new URL("../", import.meta.url));
    const nodeFlags = ["--permission", "--allow-ffi", `--allow-fs-read=${root}`];
    assert.deepEqual(ask(body, { nodeFlags, env: { KVERN_LIB: elsewhere } }), [elsewhere, 1, 2, 3, 4]);
    const { code, message } = ask(body, { nodeFlags, env: { KVERN_LIB: join(folder, "none") } }) as Refusal;
    assert.equal(code, "library_unavailable");
    assert.match(message, /: tried \S+none \(dlopen failed: .*\);/);
  } finally {
    rmSync(folder, { recursive: true });
  }
});

test(`where node:ffi was taken away the text says so${nodeOnly}`, { skip }, () => {
  const { code, message } = ask("return systemInfo();", { nodeFlags: ["--no-experimental-ffi"] }) as Refusal;
  assert.equal(code, "library_unavailable");
  assert.match(message, /Node calls native code through node:ffi, which is off here: leave out --no-experimental-ffi/);
});
