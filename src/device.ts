/**
 * What this machine has, and what the library makes of it.
 *
 * @module
 */

import { VALUES } from "./ffi/exports.ts";
import { library, libraryPath, unreadableVariables } from "./ffi/library.ts";
import { nameOf, newRecord, valuesOf } from "./ffi/record.ts";
import { adapter } from "./ffi/runtime.ts";
import { type LevelName, levelNames } from "./ffi/settings.ts";
import { refusal } from "./ffi/status.ts";
import { finalizedCaches } from "./memory/finalization.ts";
import { checkBytes, checkCount } from "./options/counts.ts";
import { givenOptions, type OptionNames, optionNames } from "./options/option_names.ts";

/** A CPU level: which instructions the kernels may use. */
export type Level = LevelName;

/** Facts of the process. */
export interface SystemInfo {
  /** The level in force; equal stored bytes give equal bits on one level. */
  readonly level: Level;
  /**
   * The levels that this CPU and the library have, lowest first. `KVERN_LEVEL` picks one at the first use of kvern in the
   * process, and whoever names another one later, in a Worker say, is refused with `invalid_config`.
   */
  readonly levels: Level[];
  /** CPUs this process may use. */
  readonly cpuCount: number;
  /**
   * Threads that attention may use when this thread calls it, its own included: by default the physical cores this
   * process may use, `KVERN_THREADS` or {@linkcode setThreadCount} say otherwise. No result depends on it.
   */
  readonly threadCount: number;
  /** Most bytes caches may reserve by default: physical memory or the cgroup's limit. */
  readonly memoryLimitBytes: number;
  /** Caches alive in the process. */
  readonly liveCaches: number;
  /** Caches this thread has freed because they were dropped without `free`. */
  readonly finalizedCaches: number;
  /** Bytes all caches, pools and buffers of the process have reserved. */
  readonly reservedBytes: number;
  /**
   * The most they may reserve together, `Infinity` where nobody said: what `KVERN_MAX_BYTES` is at the first use of kvern in
   * the process. Past it, making, growing and filling of caches, pools and buffers is refused with `out_of_memory`.
   *
   * A contiguous cache reserves all of its rows when it is made; blocks are reserved as they are needed, some at a time.
   */
  readonly maxBytes: number;
  /** The file the library was opened from. */
  readonly libraryPath: string;
  /**
   * Variables of the environment that kvern may not read and therefore did not heed, `KVERN_LEVEL` say: in Deno each
   * takes `--allow-env=<name>`. Empty in Bun and Node.
   */
  readonly unreadableVariables: string[];
  /** The runtime this runs in. */
  readonly runtime: "deno" | "bun" | "node";
}

/**
 * What this machine has, and what the library makes of it; opens the library.
 *
 * @example Which instructions are used
 * ```ts
 * import assert from "node:assert/strict";
 * import { systemInfo } from "@kvern/kvern";
 *
 * const { level, levels } = systemInfo();
 * assert.ok(levels.includes(level));
 * ```
 *
 * @throws {KvError} `library_unavailable`, `needs_permission`, `invalid_config` if `KVERN_LEVEL` names no level
 */
export function systemInfo(): SystemInfo {
  const record = newRecord("system");
  const status = library().kv_system_info(record, record.byteLength);
  if (status < 0) throw refusal(status, "read the facts of the system");
  const { level, levels, cpuCount, threadCount, memoryLimitBytes, liveHandles, reservedBytes, maxBytes } = valuesOf(
    "system",
    record,
  );
  return {
    level: nameOf("level", level),
    levels: levelNames(levels),
    cpuCount,
    threadCount,
    memoryLimitBytes,
    liveCaches: liveHandles,
    finalizedCaches: finalizedCaches(),
    reservedBytes,
    maxBytes: maxBytes || Infinity,
    libraryPath: libraryPath(),
    unreadableVariables: unreadableVariables(),
    runtime: adapter.name,
  };
}

/**
 * Threads that attention may use from the next call on, the caller's included.
 *
 * It is for the calls of this thread alone: the main one or a Worker. The library starts as many threads as a call can
 * use, and they sleep between calls. Equal stored bytes give equal bits by any
 * number of threads.
 *
 * @example By the calling thread alone
 * ```ts
 * import assert from "node:assert/strict";
 * import { setThreadCount, systemInfo } from "@kvern/kvern";
 *
 * const before = systemInfo().threadCount;
 * setThreadCount(1);
 * assert.equal(systemInfo().threadCount, 1);
 * setThreadCount(before);
 * ```
 *
 * @throws {TypeError} a count of the wrong type
 * @throws {RangeError} what is no count
 * @throws {KvError} `invalid_config` for 0 or more than 256; `library_unavailable`, `needs_permission`
 */
export function setThreadCount(count: number): void {
  checkCount("count", count);
  const status = library().kv_thread_count_set(count);
  if (status < 0) {
    throw refusal(status, "set the thread count", {
      invalid_config: () => `it must be 1 to ${VALUES.threadCountMax}: count is ${count}`,
    });
  }
}

/** What to measure. */
export interface ReadRateOptions {
  /** Bytes to read through, taken twice one after the other; more than the last cache level holds. Default 1 GiB. */
  readonly bytes?: number;
  /** Threads that read. Default 1. */
  readonly threads?: number;
}

const READ_RATE_NAMES: OptionNames = optionNames<ReadRateOptions>({
  bytes: true,
  threads: true,
});

/**
 * How fast this machine reads memory, in bytes a second: what the speed of attention is to be compared with.
 *
 * The best of plain and prefetched reading, with huge pages and without. Takes about a second a GiB.
 *
 * @example The share of it that a step reached
 * ```ts
 * import assert from "node:assert/strict";
 * import { readRate } from "@kvern/kvern";
 *
 * assert.ok(readRate({ bytes: 2 ** 24 }) > 0);
 * ```
 *
 * @throws {TypeError} an option of the wrong type
 * @throws {RangeError} an option that is no count
 * @throws {KvError} `invalid_config` below 512 bytes a thread or past 1024 threads; `out_of_memory`;
 * `library_unavailable`, `needs_permission`
 */
export function readRate(options?: ReadRateOptions): number {
  const action = "measure the read rate";
  const { bytes = 2 ** 30, threads = 1 } = givenOptions(options, READ_RATE_NAMES, action);
  checkBytes("bytes", bytes, action);
  checkCount("threads", threads);
  const rate = new Float64Array(1);
  const status = library().kv_read_rate(bytes, threads, rate, rate.length);
  if (status < 0) {
    throw refusal(status, action, {
      invalid_config: () =>
        `it takes 1 to 1024 threads, 512 bytes or more each and 2^40 in all: bytes is ${bytes}, threads is ${threads}`,
      out_of_memory: () => `the system refused, or this process may use less: bytes is ${bytes}`,
    });
  }
  return rate[0]!;
}
