/** How the native library is found and opened, and what is said when it cannot be. */

import assert from "node:assert/strict";
import { copyFileSync, mkdtempSync, readFileSync, realpathSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { pathToFileURL } from "node:url";
import { KvError, loadLibrary, setLibraryPath, systemInfo } from "../mod.ts";
import { type ChildOptions, denoOnly, inDeno, MOD, runCode, runtime } from "./child.ts";

const { libraryPath } = systemInfo();

/** Runs a child that prints JSON; `attempt(call)` in it gives what a call returns, or the code and text of its error. */
function ask(body: string, options: ChildOptions): unknown {
  const { code, stdout, stderr } = runCode(
    `
    import { ContiguousCache, KvError, loadLibrary, setLibraryPath, systemInfo } from "${MOD}";
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

test("a relative KVERN_LIB begins at the current directory, a bare name too", () => {
  withFolder((folder) => {
    const copy = join(folder, basename(libraryPath));
    copyFileSync(libraryPath, copy);
    for (const named of [basename(copy), `./${basename(copy)}`, `../${basename(folder)}/${basename(copy)}`]) {
      const body = `process.chdir(${JSON.stringify(folder)}); ${INFO}`;
      const result = ask(`import process from "node:process"; ${body}`, { env: { KVERN_LIB: named } });
      assert.equal((result as { libraryPath: string }).libraryPath, join(realpathSync(folder), basename(copy)), named);
    }
  });
});

test("KVERN_LIB that is neither a path nor a URL of a file on this machine is refused, and said", () => {
  const wrong = ["file://host/libkvern.so", "file:///a%2Fb.so", "file:///a%00b", "file:libkvern.so", "https://a/b.so"];
  for (const named of wrong) {
    const { code, message } = ask(INFO, { env: { KVERN_LIB: named } }) as { code: string; message: string };
    assert.equal(code, "library_unavailable", named);
    assert.equal(
      message,
      "Cannot open the native library as KVERN_LIB must be a path, or a file: URL of one on this machine: " +
        `KVERN_LIB is ${named}`,
    );
  }
});

test("setLibraryPath() names the file for the first use, as a path or a URL", () => {
  withFolder((folder) => {
    const copy = join(folder, basename(libraryPath));
    copyFileSync(libraryPath, copy);
    const set = (path: string) => `attempt(() => setLibraryPath(${path})); ${INFO}`;
    for (const path of [JSON.stringify(copy), `new URL(${JSON.stringify(pathToFileURL(copy).href)})`]) {
      assert.equal((ask(set(path), { env: { KVERN_LIB: undefined } }) as { libraryPath: string }).libraryPath, copy);
    }
    // Whoever starts the program has the last word.
    const overruled = ask(set('"/nonexistent/libkvern.so"'), { env: { KVERN_LIB: copy } });
    assert.equal((overruled as { libraryPath: string }).libraryPath, copy);
  });
});

test("a path that is set and wrong is named, and no other library is tried", () => {
  const body = `setLibraryPath("/nonexistent/libkvern.so"); ${INFO}`;
  const { code, message } = ask(body, { env: { KVERN_LIB: undefined } }) as { code: string; message: string };
  assert.equal(code, "library_unavailable");
  assert.match(message, /: tried \/nonexistent\/libkvern\.so \(.+\); /);
});

test("setLibraryPath() after the first use is refused, unless it is that file", () => {
  setLibraryPath(libraryPath);
  setLibraryPath(pathToFileURL(libraryPath));
  assert.throws(() => setLibraryPath("/elsewhere/libkvern.so"), (error) => {
    assert.ok(error instanceof KvError);
    assert.equal(error.code, "invalid_config");
    assert.equal(
      error.message,
      "Cannot set the path of the native library as it was opened before: " +
        `from ${libraryPath}, path is /elsewhere/libkvern.so`,
    );
    return true;
  });
});

test("setLibraryPath() takes a string or a URL of a file on this machine", () => {
  for (const wrong of [undefined, null, 5, {}, ["/a"]] as unknown as string[]) {
    assert.throws(() => setLibraryPath(wrong), {
      name: "TypeError",
      message: /path must be a string or a URL: path is/,
    });
  }
  for (const wrong of ["", "https://a/b.so", "file:libkvern.so", "/a\0b", new URL("https://a/b.so")]) {
    assert.throws(() => setLibraryPath(wrong), (error) => {
      assert.ok(error instanceof KvError);
      assert.match(error.message, /as path must be a path, or a file: URL of one on this machine: path is /);
      return error.code === "library_unavailable";
    }, String(wrong));
  }
});

test("loadLibrary() opens it, and rejects with what the first use would throw", async () => {
  await loadLibrary();
  const body =
    `await loadLibrary().then(() => "done", ({ code }) => code).then((said) => console.log(JSON.stringify(said)));`;
  assert.equal(ask(body, {}), "done");
  assert.equal(ask(body, { env: { KVERN_LIB: "/nonexistent/libkvern.so" } }), "library_unavailable");
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

/** What opening `path` is refused with. */
function refusalOf(path: string): string {
  const { code, message } = ask(INFO, { env: { KVERN_LIB: path } }) as { code: string; message: string };
  assert.equal(code, "library_unavailable", path);
  assert.ok(message.includes(`tried ${path} (`), message);
  return message;
}

test("a directory, an empty file, and the library's own name elsewhere are refused, and name what was tried", () => {
  withFolder((folder) => {
    refusalOf(folder);
    refusalOf(join(folder, basename(libraryPath)));
    const empty = join(folder, "empty.so");
    writeFileSync(empty, "");
    refusalOf(empty);
    refusalOf(join(empty, "below.so")); // no directory
    refusalOf(join(folder, "a\nb \u{1f5dd} 'c'.so"));
  });
});

test("a library that was cut short is refused and ends nothing", { timeout: 60_000 }, () => {
  const bytes = readFileSync(libraryPath);
  withFolder((folder) => {
    for (const length of [1, 63, 64, 100, 4096, 65536, bytes.length >> 1, bytes.length - 1]) {
      const cut = join(folder, `cut${length}.so`);
      writeFileSync(cut, bytes.subarray(0, length));
      const message = refusalOf(cut);
      // Opened, such a file ends the process at the first byte that is not there. Other systems look for themselves.
      if (process.platform === "linux" && length >= 64) {
        assert.ok(message.includes(`it was cut short: it has ${length} of its ${bytes.length} bytes`), message);
      }
    }
  });
});

test("a library of somebody else is refused by the symbol it lacks", () => {
  const places: Partial<Record<string, () => string | undefined>> = {
    linux: () => /\/\S*\/(?:libc|ld-musl)[^/\s]*$/m.exec(readFileSync("/proc/self/maps", "utf8"))?.[0],
    darwin: () => "/usr/lib/libSystem.B.dylib",
    win32: () => join(process.env.SystemRoot ?? "C:\\Windows", "System32", "kernel32.dll"),
  };
  const other = places[process.platform]?.();
  assert.ok(other !== undefined, "every system has a library that is not ours");
  assert.match(refusalOf(other), /\bkv_\w+/);
});

/** A copy of an ELF library whose `kv_abi_version` does nothing but answer 42. */
function withVersion42(library: Uint8Array): Uint8Array {
  const bytes = new Uint8Array(library), view = new DataView(bytes.buffer);
  const u16 = (at: number) => view.getUint16(at, LITTLE), u32 = (at: number) => view.getUint32(at, LITTLE);
  const u64 = (at: number) => Number(view.getBigUint64(at, LITTLE));
  const table = (start: number, size: number, count: number) =>
    Array.from({ length: count }, (_, i) => start + i * size);
  const programs = table(u64(32), u16(54), u16(56)), sections = table(u64(40), u16(58), u16(60));
  const symbols = sections.find((at) => u32(at + 4) === 11)!; // SHT_DYNSYM
  const names = u64(sections[u32(symbols + 40)]! + 24);
  const nameOf = (symbol: number) => {
    const start = names + u32(symbol);
    return new TextDecoder().decode(bytes.subarray(start, bytes.indexOf(0, start)));
  };
  const symbol = table(u64(symbols + 24), 24, u64(symbols + 32) / 24).find((at) => nameOf(at) === "kv_abi_version")!;
  const address = u64(symbol + 8);
  const isLoaded = (at: number) => u32(at) === 1 && address >= u64(at + 16) && address < u64(at + 16) + u64(at + 32);
  const segment = programs.find(isLoaded)!;
  const code = process.arch === "arm64"
    ? [0x40, 0x05, 0x80, 0x52, 0xc0, 0x03, 0x5f, 0xd6] // mov w0, #42; ret
    : [0xb8, 42, 0, 0, 0, 0xc3]; // mov eax, 42; ret
  bytes.set(code, address - u64(segment + 16) + u64(segment + 8));
  return bytes;
}

const LITTLE = true;
const patches = process.platform === "linux";
const unlessPatched = patches ? "" : " (skipped: only Linux opens a library whose code was changed)";

test(`a library of another version is refused with both versions${unlessPatched}`, { skip: !patches }, () => {
  withFolder((folder) => {
    const other = join(folder, "libkvern.so");
    writeFileSync(other, withVersion42(readFileSync(libraryPath)));
    assert.match(refusalOf(other), /\(its ABI version is 42, this module speaks \d+\)/);
  });
});

test("a failure is not remembered: the next use tries again", () => {
  const body = `
    import process from "node:process";
    const make = () => new ContiguousCache({ layerCount: 1, kvHeadCount: 1, headDim: 1, maxSeqLen: 1 }).memoryBytes;
    const first = [attempt(systemInfo), attempt(make), attempt(make)].map(({ code }) => code);
    process.env.KVERN_LIB = ${JSON.stringify(libraryPath)};
    console.log(JSON.stringify([...first, attempt(make)]));
  `;
  const unavailable = new Array(3).fill("library_unavailable");
  assert.deepEqual(ask(body, { env: { KVERN_LIB: "/nonexistent/libkvern.so" } }), [...unavailable, 12]);
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

test(`the library is found without any permission but its own${denoOnly}`, { skip: !inDeno }, () => {
  const env = { KVERN_LIB: "/nonexistent/libkvern.so", KVERN_LEVEL: "v9" }; // neither may be read, so neither counts
  const result = ask(INFO, { env, denoFlags: [`--allow-ffi=${libraryPath}`] }) as { libraryPath: string };
  assert.equal(result.libraryPath, libraryPath);
});

test("systemInfo() names the variables it may not read, and only those", () => {
  const unreadable = (...denoFlags: string[]) =>
    (ask(INFO, { env: { KVERN_LEVEL: undefined }, denoFlags }) as { unreadableVariables: string[] })
      .unreadableVariables;
  const all = inDeno ? unreadable("--allow-ffi") : [];
  if (inDeno) {
    assert.deepEqual(all, ["KVERN_LIB", "KVERN_LEVEL", "KVERN_MAX_BYTES", "KVERN_THREADS"]);
    const others = all.filter((name) => name !== "KVERN_LEVEL");
    assert.deepEqual(unreadable("--allow-ffi", "--allow-env=KVERN_LEVEL"), others);
  }
  assert.deepEqual(unreadable("-A"), []);
});

test(`without --allow-ffi the text names the exact flag${denoOnly}`, { skip: !inDeno }, () => {
  for (const denoFlags of [["--allow-read"], ["--allow-read", "--allow-ffi=/elsewhere"], ["-A", "--deny-ffi"]]) {
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

const bunOnly = runtime === "bun" ? "" : " (skipped: the others work without their JIT)";

test(`without the JIT the text says that Bun needs it${bunOnly}`, { skip: bunOnly !== "" }, () => {
  const { code, message } = ask(INFO, { env: { BUN_JSC_useJIT: "0" } }) as { code: string; message: string };
  assert.equal(code, "library_unavailable");
  assert.match(message, /Bun calls native code through its JIT, which is off here: unset BUN_JSC_useJIT/);
});
