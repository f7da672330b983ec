/**
 * What the environment says about the process: the level of the CPU, the most bytes, the threads. TypeScript reads it and
 * tells the library, as native getenv would not see Bun's changes to it.
 *
 * @module
 */

import { KvError } from "../error.ts";
import { ENUMS, type Library, VALUES } from "./exports.ts";
import { nameOf, newRecord, type Values, valuesOf } from "./record.ts";
import { adapter } from "./runtime.ts";
import { nameMemoryLimit } from "./status.ts";

/** The variables that count once, when the library is opened. */
export const SETTINGS = ["KVERN_LEVEL", "KVERN_MAX_BYTES", "KVERN_THREADS"] as const;

/** A CPU level: which instructions the kernels may use. */
export type LevelName = keyof typeof ENUMS.level;

/** A number of no level. */
const NO_LEVEL = 2 ** 32 - 1;

/** The names of the levels whose bits, `1 << level`, are set in `mask`, lowest first. */
export function levelNames(mask: number): LevelName[] {
  return (Object.keys(ENUMS.level) as LevelName[]).filter((level) => (mask >>> ENUMS.level[level] & 1) === 1);
}

/** Does what the environment says. */
export function applySettings(library: Library): void {
  setLevel(library, adapter.env("KVERN_LEVEL"));
  setMaxBytes(library, adapter.env("KVERN_MAX_BYTES"));
  setThreads(library, adapter.env("KVERN_THREADS"));
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
  const built = levelNames(system.builtLevels);
  const allBuilt = built.join(", ") || "no level";
  // Another place may have a library with more levels, so this one is passed over.
  if (wanted === 0) throw new Error(`it was built for ${allBuilt} alone, which this CPU does not have`);
  let rule = `this CPU has ${available.join(", ")}`;
  if (known !== undefined && !built.includes(known)) rule = `the library was built for ${allBuilt} alone`;
  if (known !== undefined && available.includes(known)) {
    rule = `the process uses ${nameOf("level", system.level)} since its first use of kvern`;
  }
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
