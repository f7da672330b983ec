/**
 * Finds the native library, opens it once, checks its version and sets the CPU level: nothing happens before first use.
 *
 * Searched in this order: the file `KVERN_LIB` names, and then no other; the library this checkout built
 * (`zig/zig-out`); the one the package carries (`lib/<target>`). It is never closed: closing a library whose threads
 * are alive crashes both runtimes.
 *
 * A program that `bun build --compile` makes may carry the library, and names it before the first use:
 *
 *     import path from "./libkvern.so" with { type: "file" };
 *     process.env.KVERN_LIB = path;
 *
 * @module
 */

import { closeSync, openSync, readSync, statSync } from "node:fs";
import process from "node:process";
import { KvError } from "../error.ts";
import { ABI_VERSION, ENUMS, type Library, VALUES } from "./exports.ts";
import { namedPlace, packagePlaces, packageRoot } from "./places.ts";
import { nameOf, newRecord, type Values, valuesOf } from "./record.ts";
import { adapter, isKnown, VARIABLES } from "./runtime.ts";
import { nameMemoryLimit } from "./status.ts";

/** The opened library, and where it was found. */
interface Opened {
  readonly library: Library;
  readonly path: string;
  readonly unreadableVariables: string[];
}

/** What helps wherever the library is not found. */
const NAME_IT = "name one in KVERN_LIB (which Deno reads with --allow-env=KVERN_LIB)";

/** A CPU level: which instructions the kernels may use. */
export type LevelName = keyof typeof ENUMS.level;

/** A number of no level. */
const NO_LEVEL = 2 ** 32 - 1;

let opened: Opened | undefined;

/** The library; the first call opens it. */
export function library(): Library {
  return (opened ??= find()).library;
}

/** The file the library was opened from; opens it if need be. */
export function libraryPath(): string {
  return (opened ??= find()).path;
}

/** The variables that were not read, as the runtime did not allow it; opens the library if need be. */
export function unreadableVariables(): string[] {
  return [...(opened ??= find()).unreadableVariables];
}

/** The names of the levels whose bits, `1 << level`, are set in `mask`, lowest first. */
export function levelNames(mask: number): LevelName[] {
  return (Object.keys(ENUMS.level) as LevelName[]).filter((level) => (mask >>> ENUMS.level[level] & 1) === 1);
}

/** Tries what may be opened without asking first, then what the user may yet allow. */
function find(): Opened {
  if (!isKnown()) {
    throw new KvError("library_unavailable", "Cannot open the native library as kvern runs in Deno and Bun only");
  }
  const { paths, folder } = candidates();
  const failures: string[] = [];
  let denied: string | undefined; // what to allow, a path that is there
  const there = paths.filter((path) => adapter.mayExist(path));
  for (const path of [...there.filter(adapter.mayOpen), ...there.filter((path) => !adapter.mayOpen(path))]) {
    // Without the permission to look, nobody knows which of several files is there; the folder of all of them is.
    const wanted = adapter.mayRead(path) ? path : folder;
    if (!adapter.mayOpen(path) && (denied !== undefined || !adapter.ask(wanted))) {
      denied ??= wanted;
      continue;
    }
    try {
      if (adapter.mayRead(path)) checkWhole(path);
      const library = prepare(adapter.open(path));
      return { library, path, unreadableVariables: VARIABLES.filter((variable) => !adapter.mayReadEnv(variable)) };
    } catch (error) {
      if (error instanceof KvError) throw error;
      if (adapter.isDenial(error)) denied ??= path;
      else failures.push(`${path} (${error instanceof Error ? error.message : error})`);
    }
  }
  throw unopened(paths, failures, denied);
}

/** What is said when no place has a library that opens. */
function unopened(paths: string[], failures: string[], denied: string | undefined): KvError {
  if (denied !== undefined) {
    const others = failures.length > 0 ? `; tried ${failures.join(", ")}` : "";
    return new KvError(
      "needs_permission",
      `Cannot open the native library as Deno needs a permission for it: run with --allow-ffi=${denied}${others}`,
    );
  }
  const tried = failures.length > 0 ? failures : paths.map((path) => `${path} (no such file)`);
  return new KvError(
    "library_unavailable",
    "Cannot open the native library as none of its places has one that works: " +
      `tried ${tried.join(", ") || `nothing, as there is none for ${process.platform}`}; ` +
      "build it with `deno task build` or `cd zig && zig build`, " +
      `or ${NAME_IT}`,
  );
}

/** The places of the library, best first, and the folder of them all. */
function candidates(): { paths: string[]; folder: string } {
  const named = adapter.env("KVERN_LIB");
  if (named) {
    const path = namedPlace(named);
    return { paths: [path], folder: path };
  }
  const folder = packageRoot(import.meta.url);
  if (folder !== undefined) return { paths: packagePlaces(folder), folder };
  throw new KvError(
    "library_unavailable",
    "Cannot open the native library as this module is not a file of its package, where the library lies, but bundled " +
      `or loaded over the network: ${NAME_IT}`,
  );
}

/**
 * Refuses an ELF library that was cut short: the system maps it, and ends the process where the missing part is needed.
 *
 * Section headers stand at the end, so a whole file reaches behind them. Other formats and other files are left to the
 * attempt to open them, as are those that Deno may not read.
 */
function checkWhole(path: string): void {
  const facts = statSync(path, { throwIfNoEntry: false });
  if (!facts?.isFile()) return;
  let file: number;
  try {
    file = openSync(path, "r");
  } catch {
    return; // a file within a program that Bun compiled can be loaded, not opened
  }
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
  setMaxBytes(library, adapter.env("KVERN_MAX_BYTES"));
  setThreads(library, adapter.env("KVERN_THREADS"));
  return library;
}

/**
 * Chooses the level that `KVERN_LEVEL` names, or the highest there is. It holds for the life of the process: whoever
 * comes later, in a Worker say, may say the same or nothing.
 */
function setLevel(library: Library, level: string | undefined): void {
  const known = Object.keys(ENUMS.level).find((name) => name === level) as LevelName | undefined;
  const wanted = known !== undefined ? ENUMS.level[known] : level ? NO_LEVEL : 0;
  if (library.kv_level_set(wanted) >= 0) return;
  const system = systemOf(library);
  const available = levelNames(system.levels);
  const rule = available.some((name) => name === level)
    ? `the process uses ${nameOf("level", system.level)} since its first use of kvern`
    : `this CPU has ${available.join(", ")}`;
  throw new KvError("invalid_config", `Cannot use the level KVERN_LEVEL names as ${rule}: KVERN_LEVEL is ${level}`);
}

/** The facts of the process. */
function systemOf(library: Library): Values<"system"> {
  const record = newRecord("system");
  library.kv_system_info(record, record.byteLength);
  return valuesOf("system", record);
}

/** Limits what the process reserves to what `KVERN_MAX_BYTES` says, which holds for its life as the level does. */
function setMaxBytes(library: Library, bytes: string | undefined): void {
  const wanted = bytes ? Number(bytes) : 0;
  const isCount = !bytes || (/^[0-9]+$/.test(bytes) && wanted > 0 && Number.isSafeInteger(wanted));
  const settled = isCount && library.kv_max_bytes_set(wanted) >= 0;
  const inForce = systemOf(library).maxBytes;
  if (!settled) {
    const rule = isCount
      ? `the process may reserve ${inForce === 0 ? "any number of bytes" : inForce} since its first use of kvern`
      : `it must be a whole number of bytes, 1 to ${Number.MAX_SAFE_INTEGER}`;
    throw new KvError("invalid_config", `Cannot use KVERN_MAX_BYTES as ${rule}: KVERN_MAX_BYTES is ${bytes}`);
  }
  if (inForce !== 0) nameMemoryLimit(inForce);
}

/** Sets how many threads the calls of this thread may use to what `KVERN_THREADS` says. */
function setThreads(library: Library, threads: string | undefined): void {
  if (!threads) return;
  if (!/^[0-9]{1,9}$/.test(threads) || library.kv_thread_count_set(Number(threads)) < 0) {
    throw new KvError(
      "invalid_config",
      `Cannot use KVERN_THREADS as it must be 1 to ${VALUES.threadCountMax}: KVERN_THREADS is ${threads}`,
    );
  }
}
