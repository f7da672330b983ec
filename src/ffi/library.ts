/**
 * Finds the native library, opens it once, checks its version and sets the CPU level: nothing happens before first use.
 *
 * Searched in this order: the file `KVERN_LIB` names, and then no other; the library this checkout built
 * (`zig/zig-out`); the one the package carries (`lib/<target>`). It is never closed: closing a library whose threads
 * are alive crashes both runtimes. This is the only file that asks which runtime it is in.
 *
 * @module
 */

import { closeSync, openSync, readSync, statSync } from "node:fs";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { KvError } from "../error.ts";
import * as bun from "./bun.ts";
import * as deno from "./deno.ts";
import { ABI_VERSION, type Library } from "./exports.ts";

/** What both adapters offer. */
interface Adapter {
  readonly name: "deno" | "bun";
  readonly viewBytesMax: number;
  open(path: string): Library;
  env(variable: string): string | undefined;
  permission(path: string): "granted" | "prompt" | "denied";
  mayExist(path: string): boolean;
  mayRead(path: string): boolean;
  isDenial(error: unknown): boolean;
  view(addressLow: number, addressHigh: number, byteLength: number): ArrayBuffer;
}

/** The opened library, and where it was found. */
interface Opened {
  readonly library: Library;
  readonly path: string;
}

/** CPU levels by name; the numbers are those of the ABI. */
export const LEVELS = { v2: 1, v3: 2, avx512: 3, amx: 4, neon: 5, dotprod: 6 } as const;

/** A CPU level: which instructions the kernels may use. */
export type LevelName = keyof typeof LEVELS;

/** Words of the SystemRecord; `record.ts` reads the others. */
const SYSTEM_WORDS = 10;

let opened: Opened | undefined;

/** The adapter of the runtime this runs in. */
export const adapter: Adapter = "Deno" in globalThis ? deno : bun;

/** The library; the first call opens it. */
export function library(): Library {
  return (opened ??= find()).library;
}

/** The file the library was opened from; opens it if need be. */
export function libraryPath(): string {
  return (opened ??= find()).path;
}

/** The names of the levels whose bits, `1 << level`, are set in `mask`, lowest first. */
export function levelNames(mask: number): LevelName[] {
  return (Object.keys(LEVELS) as LevelName[]).filter((level) => (mask >>> LEVELS[level] & 1) === 1);
}

/** Tries what may be opened without asking first, then what the user may yet allow. */
function find(): Opened {
  if (!("Deno" in globalThis || "Bun" in globalThis)) {
    throw new KvError("library_unavailable", "Cannot open the native library as kvern runs in Deno and Bun only");
  }
  const failures: string[] = [];
  const denied: string[] = [];
  const paths = candidates().map((path) => ({ path, permission: adapter.permission(path) }));
  for (const state of ["granted", "prompt"] as const) {
    for (const { path } of paths.filter(({ path, permission }) => permission === state && adapter.mayExist(path))) {
      try {
        if (adapter.mayRead(path)) checkWhole(path);
        return { library: prepare(adapter.open(path)), path };
      } catch (error) {
        if (error instanceof KvError) throw error;
        if (adapter.isDenial(error)) denied.push(path);
        else failures.push(`${path} (${error instanceof Error ? error.message : error})`);
      }
    }
  }
  denied.push(
    ...paths.filter((row) => row.permission === "denied" && adapter.mayExist(row.path)).map((row) => row.path),
  );
  const others = failures.length > 0 ? `; tried ${failures.join(", ")}` : "";
  if (denied.length > 0) {
    throw new KvError(
      "needs_permission",
      `Cannot open the native library as Deno needs a permission for it: run with --allow-ffi=${denied[0]}${others}`,
    );
  }
  const tried = failures.length > 0 ? failures : paths.map(({ path }) => `${path} (no such file)`);
  throw new KvError(
    "library_unavailable",
    "Cannot open the native library as none of its places has one that works: " +
      `tried ${tried.join(", ") || "nothing, as this module was not loaded from a file"}; ` +
      "build it with `deno task build` or `cd zig && zig build`, or name one in KVERN_LIB " +
      "(which Deno reads with --allow-env=KVERN_LIB)",
  );
}

/** The places of the library, best first. */
function candidates(): string[] {
  const named = adapter.env("KVERN_LIB");
  if (named) return [named.startsWith("file:") ? fileURLToPath(named) : named];
  const root = new URL("../../", import.meta.url);
  if (root.protocol !== "file:") return [];
  const arch = process.arch === "arm64" ? "aarch64" : "x86_64";
  const places: Record<string, string[]> = {
    // Of the two a machine can load one, and opening the other fails harmlessly.
    linux: ["zig/zig-out/lib", `lib/${arch}-linux-gnu`, `lib/${arch}-linux-musl`].map((at) => `${at}/libkvern.so`),
    darwin: ["zig/zig-out/lib", `lib/${arch}-macos`].map((at) => `${at}/libkvern.dylib`),
    win32: ["zig/zig-out/bin", `lib/${arch}-windows`].map((at) => `${at}/kvern.dll`),
  };
  return (places[process.platform] ?? []).map((place) => fileURLToPath(new URL(place, root)));
}

/**
 * Refuses an ELF library that was cut short: the system maps it, and ends the process where the missing part is needed.
 *
 * Section headers stand at the end, so a whole file reaches behind them. Other formats and other files are left to the
 * attempt to open them, as are those that Deno may not read.
 */
function checkWhole(path: string): void {
  const facts = statSync(path, { throwIfNoEntry: false });
  if (!facts?.isFile()) return; // or a bare name that the system searches for
  const file = openSync(path, "r");
  try {
    const header = new Uint32Array(16);
    if (readSync(file, header) < header.byteLength) return;
    const halves = new Uint16Array(header.buffer);
    if (header[0] !== 0x464c457f || halves[2] !== 0x0102) return; // "\x7fELF", 64 bits, little endian
    const end = header[10]! + header[11]! * 2 ** 32 + halves[29]! * halves[30]!;
    if (facts.size < end) throw new Error(`it was cut short: it has ${facts.size} of its ${end} bytes`);
  } finally {
    closeSync(file);
  }
}

/** Checks the version, then does what the environment says: native getenv would not see Bun's changes to it. */
function prepare(library: Library): Library {
  const version = library.kv_abi_version();
  if (version !== ABI_VERSION) throw new Error(`its ABI version is ${version}, this module speaks ${ABI_VERSION}`);
  setLevel(library, adapter.env("KVERN_LEVEL"));
  setThreads(library, adapter.env("KVERN_THREADS"));
  return library;
}

/** The level that `KVERN_LEVEL` names. */
function setLevel(library: Library, level: string | undefined): void {
  if (!level) return;
  const system = new Uint32Array(new ArrayBuffer(SYSTEM_WORDS * 4));
  system[0] = system.byteLength;
  library.kv_system_info(system, system.byteLength);
  const available = levelNames(system[2]!);
  const wanted = available.find((name) => name === level);
  if (wanted === undefined || library.kv_level_set(LEVELS[wanted]) < 0) {
    throw new KvError(
      "invalid_config",
      `Cannot use the level KVERN_LEVEL names as this CPU has ${available.join(", ")}: KVERN_LEVEL is ${level}`,
    );
  }
}

/** As many threads as `KVERN_THREADS` says. */
function setThreads(library: Library, threads: string | undefined): void {
  if (!threads) return;
  if (!/^[0-9]{1,9}$/.test(threads) || library.kv_thread_count_set(Number(threads)) < 0) {
    throw new KvError("invalid_config", `Cannot use KVERN_THREADS as it must be 1 to 256: KVERN_THREADS is ${threads}`);
  }
}
