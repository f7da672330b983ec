/**
 * A Worker of hostile_free_test.ts: calls every verb of what another thread resets and frees meanwhile, until it is gone,
 * and says how each verb ended.
 */

import { parentPort, workerData } from "node:worker_threads";
import { ContiguousCache, type KvCache, KvError, PagedCache, Sequence } from "../mod.ts";
import { call, goodWords, names } from "./abi_calls.ts";

/** What is to be used, by its handles; `isOnly` where no other Worker uses the cache, which may then be reset. */
export type Target =
  | { readonly kind: "contiguous"; readonly cache: number }
  | { readonly kind: "paged"; readonly cache: number; readonly sequence: number; readonly isOnly: boolean }
  | { readonly kind: "block pool" | "buffer pool" | "buffer"; readonly handle: number };

/** How often each verb ended how: `ok`, the code of a KvError, a status, or the text of what must not come. */
export type Endings = Record<string, Record<string, number>>;

const KV_DIM = 64;
const row = new Float32Array(KV_DIM).fill(0.5), rows = new Float32Array(3 * KV_DIM).fill(0.25);
const q = new Float32Array(2 * KV_DIM).fill(1);

type Verbs = Record<string, () => unknown>;

/** What every sequence can do. */
function sequenceVerbs(sequence: KvCache): Verbs {
  return {
    "sequence.append": () => sequence.append(0, rows, rows),
    "sequence.commit": () => sequence.commit(3),
    "sequence.attend": () => sequence.attend(0, q),
    "sequence.gather": () => sequence.gather(0),
    "sequence.seqLen": () => sequence.seqLen,
    "sequence.rewindableTo": () => sequence.rewindableTo,
    "sequence.isOnGpu": () => sequence.isOnGpu,
    "sequence.layerDevice": () => sequence.layerDevice(0),
    "sequence.contiguousKv": () => sequence.contiguousKv(0),
    "sequence.views": () => sequence.views(0).map(({ start, length }) => [start, length]),
    "sequence.truncate": () => sequence.truncate(Math.max(0, sequence.seqLen - 40)),
  };
}

function contiguousVerbs(handle: number): Verbs {
  const cache = ContiguousCache.attach(handle);
  return {
    ...sequenceVerbs(cache.sequence(1)),
    store: () => cache.store(0, 0, row, row),
    advance: () => cache.advance(),
    append: () => cache.append(0, 0, row, row),
    sequence: () => cache.sequence(0).truncate(0),
    getKeys: () => cache.getKeys(0, 1),
    getValues: () => cache.getValues(0, 1),
    getSeqLen: () => cache.getSeqLen(1),
    currentPos: () => cache.currentPos,
    memoryBytes: () => cache.memoryBytes,
    offset: () => cache.offset(0, 0, 0, 0, 0),
    reset: () => cache.reset(),
    attach: () => ContiguousCache.attach(handle).free(),
    stats: () => cache.stats(),
  };
}

/** What a Worker does with a cache of another thread, a sequence of it, and sequences of its own. */
function pagedVerbs({ cache: handle, sequence, isOnly }: Extract<Target, { kind: "paged" }>): Verbs {
  const cache = PagedCache.attach(handle), theirs = Sequence.attach(sequence);
  const own = cache.sequence(), beams = [cache.sequence(), cache.sequence()];
  const policies = [{ kind: "tail-only" }, { kind: "hybrid", tail: { tokens: 64 }, store: "q8_0" }] as const;
  let turn = 0;
  return {
    ...sequenceVerbs(own),
    "sequence.packedViews": () => own.packedViews(0),
    "sequence.kept": () => {
      own.append(0, rows, rows);
      own.commit(2, { kept: Uint32Array.of(0, 2) });
    },
    "sequence.fork": () => {
      const fork = (turn++ % 2 === 0 ? own : theirs).fork();
      fork.append(0, row, row);
      fork.free();
    },
    "sequence.tables": () => [own.blockTable(0), own.blockReferences(0), own.blockTiers(0), own.residentTokens(0)],
    "their seqLen": () => [theirs.seqLen, theirs.rewindableTo, theirs.residentTokens(0)],
    "their attend": () => theirs.attend(0, q),
    "their gather": () => theirs.gather(0),
    "their tables": () => [theirs.blockTable(0), theirs.blockReferences(0), theirs.blockTiers(0)],
    "Sequence.attach": () => Sequence.attach(sequence),
    sequence: () => cache.sequence().free(),
    append: () => cache.append(0, rows, rows, { sequences: [...beams, own] }),
    commit: () => beams.forEach((beam) => beam.commit(1)),
    attend: () => cache.attend(0, new Float32Array(4 * KV_DIM), { sequences: [theirs, beams[0]!] }),
    reorder: () => cache.reorder(beams, [1, 1]),
    "beam.truncate": () => beams.forEach((beam) => beam.truncate(0)),
    poolStats: () => cache.poolStats(),
    fidelity: () => cache.fidelity(0),
    policy: () => cache.policy,
    updatePolicy: () => cache.updatePolicy(policies[turn++ % 2]!),
    ...(isOnly ? { reset: () => cache.reset() } : {}),
    attach: () => PagedCache.attach(handle).free(),
    stats: () => cache.stats(),
  };
}

/** The C ABI on what no other thread can attach: every export but those that make and free it. */
function nativeVerbs({ kind, handle }: Extract<Target, { handle: number }>): Verbs {
  const kinds = {
    "block pool": /^kv_pool_(prewarm|stats)$/,
    "buffer pool": /^kv_buffer_(acquire|pool_(?!create|free).+)$/,
    buffer: /^kv_buffer_(?!pool_|acquire|free).+$/,
  };
  const verbs = names.filter((name) => kinds[kind].test(name));
  return Object.fromEntries(verbs.map((name) => [name, () => {
    const result = call(name, [handle, ...goodWords(name).slice(1)]);
    if (result >= 0 && /_(acquire|clone)$/.test(name)) call("kv_buffer_free", [result]);
    if (result < 0) throw result;
  }]));
}

function verbsOf(target: Target): Verbs {
  if (target.kind === "contiguous") return contiguousVerbs(target.cache);
  return target.kind === "paged" ? pagedVerbs(target) : nativeVerbs(target);
}

/** How an error is told. */
function endingOf(error: unknown): string {
  return error instanceof KvError ? error.code : String(error);
}

/** Rounds after which a verb that has not gone through never will. */
const ROUNDS_MAX = 300;

/** Calls the verbs round after round, and ends once all of a round say that the handle is stale. */
function hammer(verbs: Verbs): Endings {
  const endings: Endings = {};
  let isStarted = false;
  for (let round = 0, alive = true; alive; round++) {
    alive = false;
    for (const [name, verb] of Object.entries(verbs)) {
      let ending = "ok";
      try {
        verb();
      } catch (error) {
        ending = endingOf(error);
      }
      const counts = endings[name] ??= {};
      counts[ending] = (counts[ending] ?? 0) + 1;
      alive ||= ending !== "stale_handle" && ending !== "-12";
    }
    if (isStarted || (round < ROUNDS_MAX && !Object.values(endings).every((counts) => "ok" in counts))) continue;
    isStarted = true;
    parentPort!.postMessage("started");
  }
  return endings;
}

parentPort!.postMessage(hammer(verbsOf(workerData as Target)));
