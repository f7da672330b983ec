/** How the native library is found and opened, and what is said when it cannot be. */

import assert from "node:assert/strict";
import { copyFileSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import { test } from "node:test";
import { pathToFileURL } from "node:url";
import { systemInfo } from "../mod.ts";
import { type ChildOptions, inDeno, MOD, runCode } from "./child.ts";

const { libraryPath } = systemInfo();

/** Runs a child that prints JSON; `attempt(call)` in it gives what a call returns, or the code and text of its error. */
function ask(body: string, options: ChildOptions): unknown {
  const { code, stdout, stderr } = runCode(
    `
    import { ContiguousCache, KvError, systemInfo } from "${MOD}";
    function attempt(call) {
      try {
        return call() ?? "done";
      } catch (error) {
        if (!(error instanceof KvError)) throw error;
        return { code: error.code, message: error.message };
      }
    }
    ${body}
    `,
    options,
  );
  assert.equal(code, 0, stderr);
  return JSON.parse(stdout);
}

const INFO = "console.log(JSON.stringify(attempt(systemInfo)));";

function withFolder(body: (folder: string) => void): void {
  const folder = mkdtempSync(join(tmpdir(), "kvern-"));
  try {
    body(folder);
  } finally {
    rmSync(folder, { recursive: true });
  }
}

test("importing opens nothing; the first use names each path tried and what to do", () => {
  const result = ask('console.log(JSON.stringify(["imported", attempt(systemInfo), attempt(systemInfo)]));', {
    env: { KVERN_LIB: "/nonexistent/libkvern.so" },
  }) as [string, ...{ code: string; message: string }[]];
  assert.equal(result[0], "imported");
  for (const { code, message } of result.slice(1) as { code: string; message: string }[]) {
    assert.equal(code, "library_unavailable");
    assert.match(message, /^Cannot open the native library as .*: tried \/nonexistent\/libkvern\.so \(.+\);/);
    assert.match(message, /deno task build/);
    assert.match(message, /cd zig && zig build/);
    assert.match(message, /KVERN_LIB/);
  }
});

test("KVERN_LIB names a path or a file: URL, and no other library is tried", () => {
  withFolder((folder) => {
    const copy = join(folder, basename(libraryPath));
    copyFileSync(libraryPath, copy);
    for (const named of [copy, pathToFileURL(copy).href]) {
      assert.equal((ask(INFO, { env: { KVERN_LIB: named } }) as { libraryPath: string }).libraryPath, copy);
    }
  });
});

test("a file that is no library is named with the reason", () => {
  withFolder((folder) => {
    const text = join(folder, "libkvern.so");
    writeFileSync(text, "not a library");
    const { code, message } = ask(INFO, { env: { KVERN_LIB: text } }) as { code: string; message: string };
    assert.equal(code, "library_unavailable");
    assert.ok(message.includes(`tried ${text} (`), message);
  });
});

test("KVERN_LEVEL that names no level of this CPU is refused with those it has", () => {
  for (const level of ["v9", "avx", "V2", "2", "toString"]) {
    const { code, message } = ask(INFO, { env: { KVERN_LEVEL: level } }) as { code: string; message: string };
    assert.equal(code, "invalid_config");
    assert.ok(message.endsWith(`as this CPU has ${systemInfo().levels.join(", ")}: KVERN_LEVEL is ${level}`), message);
  }
  const free = ask(INFO, { env: { KVERN_LEVEL: "" } }) as { level: string };
  assert.equal(free.level, (ask(INFO, { env: { KVERN_LEVEL: undefined } }) as { level: string }).level);
});

const denoOnly = inDeno ? "" : " (skipped: Bun has no permissions)";

test(`the library is found without any permission but its own${denoOnly}`, { skip: !inDeno }, () => {
  const env = { KVERN_LIB: "/nonexistent/libkvern.so", KVERN_LEVEL: "v9" }; // neither may be read, so neither counts
  const result = ask(INFO, { env, denoFlags: [`--allow-ffi=${libraryPath}`] }) as { libraryPath: string };
  assert.equal(result.libraryPath, libraryPath);
});

test(`without --allow-ffi the text names the exact flag${denoOnly}`, { skip: !inDeno }, () => {
  // Never no flag at all: Deno's child_process then adds -A for Node's sake.
  for (const denoFlags of [["--allow-sys"], ["--allow-read"], ["--allow-ffi=/elsewhere"], ["-A", "--deny-ffi"]]) {
    const result = ask(`console.log(JSON.stringify(attempt(systemInfo)));`, {
      denoFlags,
      env: { KVERN_LIB: undefined },
    }) as { code: string; message: string };
    assert.equal(result.code, "needs_permission", `with ${denoFlags}`);
    assert.ok(result.message.includes(`run with --allow-ffi=${libraryPath}`), result.message);
  }
});

test(`with a path-scoped --allow-ffi all works but zero-copy arrays${denoOnly}`, { skip: !inDeno }, () => {
  const result = ask(
    `
    const cache = new ContiguousCache({ layerCount: 1, kvHeadCount: 1, headDim: 2, maxSeqLen: 4 });
    const sequence = cache.sequence(0);
    const row = Float32Array.of(1, 2);
    cache.store(0, 0, row, row);
    cache.advance();
    const appended = sequence.append(0, row, row);
    sequence.commit(1);
    const views = [
      () => appended.views.length,
      () => sequence.views(0).length,
      () => cache.getKeys(0, 0).length,
      () => cache.getValues(0, 0).length,
      () => sequence.contiguousKv(0).ok,
    ].map(attempt);
    const works = [
      sequence.seqLen,
      [...sequence.gather(0).k],
      [...sequence.attend(0, row)],
      appended.start,
      cache.memoryBytes,
      cache.stats().slabCount,
      cache.offset(0, 0, 1, 0, 1),
      sequence.layerDevice(0).device,
      sequence.isOnGpu,
      attempt(() => sequence.truncate(0)),
      attempt(() => cache.reset()),
      attempt(() => sequence.free()),
      attempt(() => cache.free()),
    ];
    console.log(JSON.stringify({ views, works }));
    `,
    { denoFlags: [`--allow-ffi=${libraryPath}`] },
  ) as { views: { code: string; message: string }[]; works: unknown[] };
  for (const { code, message } of result.views) {
    assert.equal(code, "needs_permission");
    assert.match(message, /run with --allow-ffi, or use gather\(\)/);
  }
  assert.equal(result.views.length, 5);
  const expected = [2, [1, 2, 1, 2], [1, 2], 1, 68, 2, 3, "cpu", false, "done", "done", "done", "done"];
  assert.deepEqual(result.works, expected);
});

const bunOnly = inDeno ? " (skipped: Deno works without its JIT)" : "";

test(`without the JIT the text says that Bun needs it${bunOnly}`, { skip: inDeno }, () => {
  const { code, message } = ask(INFO, { env: { BUN_JSC_useJIT: "0" } }) as { code: string; message: string };
  assert.equal(code, "library_unavailable");
  assert.match(message, /Bun calls native code through its JIT, which is off here: unset BUN_JSC_useJIT/);
});
