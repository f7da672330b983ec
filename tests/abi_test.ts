/** The two tables agree, and no wrong call through the C ABI crashes, writes or changes anything. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { ContiguousCache, KvError, PagedCache, systemInfo } from "../mod.ts";
import { ABI_VERSION, RECORDS, RESULT, wordsOf } from "../src/ffi/exports.ts";
import { library } from "../src/ffi/library.ts";
import { newRecords, recordAt, type RecordName, recordWords } from "../src/ffi/record.ts";
import { refusal, STATUS } from "../src/ffi/status.ts";
import {
  call,
  CAUSAL,
  ENUMS,
  EXPORTS,
  fieldsOf,
  GEOMETRY,
  goodWords,
  indexOf,
  type Kind,
  kindsOf,
  LAYER,
  type Name,
  names,
  newRecord,
  PAGED,
  POOL,
  recordOf,
  recordsOf,
  VALUES,
  type Values,
  valuesOf,
  type Word as Argument,
  wordsWith,
} from "./abi_calls.ts";

/** What a test cache is made of: 2 layers, 2 sequences, 2 heads of 4, room for 8 rows; sequence 1 has 3 of them. */
function makeCache(): ContiguousCache {
  const cache = new ContiguousCache({ layerCount: 2, kvHeadCount: 2, headDim: 4, maxSeqLen: 8, sequenceCount: 2 });
  for (const layer of [0, 1]) cache.append(layer, 1, new Float32Array(24).fill(1), new Float32Array(24).fill(2));
  cache.sequence(1).commit(3);
  return cache;
}

/** A pool for the paged cache below. */
const SMALL_POOL: Values<"pool"> = { ...POOL, headDim: 4, blockSize: 4, dtypeK: 0, dtypeV: 0 };

/** Good arguments for calls without a handle, some of them replaced. */
function goodWith(name: Name, changes: Readonly<Record<string, Argument>>): Argument[] {
  return wordsWith(goodWords(name), name, changes);
}

/** A paged cache as full as that one, on a pool, with handles of every kind. */
interface Paged {
  readonly cache: PagedCache;
  /** Handles: the cache, an empty sequence, one with 3 rows, the pool; a pool of buffers, and one of 256 elements. */
  readonly paged: number;
  readonly empty: number;
  readonly full: number;
  readonly pool: number;
  readonly bufferPool: number;
  readonly buffer: number;
}

function makePaged(): Paged {
  const pool = call("kv_pool_create", goodWith("kv_pool_create", { options: recordOf("pool", SMALL_POOL) }));
  const paged = call("kv_paged_create", goodWords("kv_paged_create")); // with a prefix index, which takes its own pools
  const empty = call("kv_sequence_create", [paged]), full = call("kv_sequence_create", [paged]);
  assert.ok(pool > 0 && paged > 0 && empty > 0 && full > 0);
  const k = new Float32Array(24).fill(1), v = new Float32Array(24).fill(2);
  for (const layer of [0, 1]) {
    const words = goodWords("kv_sequence_append", { sequence: full }, "sequence");
    assert.equal(call("kv_sequence_append", wordsWith(words, "kv_sequence_append", { layer, k, v })), 0);
  }
  assert.equal(call("kv_sequence_commit", [full, 0, 3]), 0);
  const limits = recordOf("bufferPool", { buffersPerClass: 4, maxBytes: 2 ** 20 });
  const bufferPool = call("kv_buffer_pool_create", [limits, limits.byteLength]);
  const buffer = call("kv_buffer_acquire", [bufferPool, 1000]);
  assert.equal(call("kv_buffer_extend", [buffer, k, 24]), 24);
  return { cache: PagedCache.attach(paged), paged, empty, full, pool, bufferPool, buffer };
}

function freePaged({ paged, pool, bufferPool, buffer }: Paged): void {
  library().kv_buffer_free(buffer);
  library().kv_buffer_pool_free(bufferPool);
  library().kv_paged_free(paged);
  library().kv_pool_free(pool);
}

/** All that a refused call must leave alone. */
function snapshot(cache: ContiguousCache, { cache: paged, empty, full, bufferPool, buffer }: Paged): unknown {
  const gathered = [empty, full].flatMap((handle) =>
    [0, 1].map((layer) => {
      const k = new Float32Array(24), v = new Float32Array(24);
      return [call("kv_sequence_gather", [handle, 0, layer, 0, VALUES.allRows, k, 24, v, 24, 0, 0, 0]), k, v];
    })
  );
  const rows = [0, 1].map((i) => [cache.getSeqLen(i), [0, 1].map((layer) => cache.sequence(i).gather(layer))]);
  const kept = newRecord("bufferPoolStats"), info = newRecord("buffer");
  assert.equal(call("kv_buffer_pool_stats", [bufferPool, kept, kept.byteLength]), 0);
  assert.equal(call("kv_buffer_info", [buffer, info, info.byteLength]), 0);
  return [rows, gathered, paged.stats(), paged.poolStats(), kept, info];
}

/** Handles of every kind. */
function handlesOf(
  cache: ContiguousCache,
  { paged, full, empty, pool, bufferPool, buffer }: Paged,
): Record<Kind | "empty", number> {
  return { contiguous: cache.handle, paged, sequence: full, empty, pool, buffer_pool: bufferPool, buffer };
}

/** Exports that take a handle, once for each kind it may be of. */
const takers: readonly (readonly [Name, Kind])[] = names.flatMap((name) =>
  kindsOf(name).map((kind) => [name, kind] as const)
);

function copiesOf(args: readonly Argument[]): Argument[] {
  return args.map((arg) => typeof arg === "number" ? arg : structuredClone(arg));
}

/** The library's own name of what has another spelling here: `max_bytes` for `maxBytes`. */
function nativeName(name: string): string {
  return name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
}

/** The line of the manifest about a record. */
function recordLine(record: RecordName): string {
  const places: Readonly<Record<string, number>> = fieldsOf(record);
  const fields = Object.entries(RECORDS[record])
    .map(([field, kind]) => `${nativeName(field)} ${kind} @${places[field]! * 4}`);
  return `record ${nativeName(record)} ${recordWords(record) * 4}: ${["size_bytes u32 @0", ...fields].join(", ")}`;
}

test("EXPORTS, RECORDS, ENUMS and VALUES equal the library's own manifest, line by line", () => {
  const bytes = library().kv_abi_manifest(new Uint8Array(0), 0);
  assert.ok(bytes > 0);
  const text = new Uint8Array(bytes);
  assert.equal(library().kv_abi_manifest(text, bytes - 1), bytes);
  assert.deepEqual(text, new Uint8Array(bytes)); // too short: not touched
  assert.equal(library().kv_abi_manifest(text, bytes), bytes);
  const lines = [
    ...names.map((name) => `${name}(${wordsOf(EXPORTS[name]).join(", ")}) ${RESULT}`),
    ...(Object.keys(RECORDS) as RecordName[]).map(recordLine),
    ...Object.entries(ENUMS).map(([name, numbers]) => {
      const members = Object.entries(numbers).map(([member, number]) => `${nativeName(member)} ${number}`);
      return `enum ${nativeName(name)}: ${members.join(", ")}`;
    }),
    ...Object.entries(VALUES).map(([name, value]) => `value ${nativeName(name)} ${[value].flat().join(" ")}`),
  ];
  assert.deepEqual(new TextDecoder().decode(text).trimEnd().split("\n"), lines);
});

test("the version is the one this module speaks", () => {
  assert.equal(library().kv_abi_version(), ABI_VERSION);
});

test("statuses are a closed list with a code and a text each", () => {
  const statuses = Object.entries(STATUS);
  assert.deepEqual(statuses.map(([, status]) => status), Array.from({ length: 19 }, (_, i) => -1 - i));
  for (const [code, status] of statuses) {
    const error = refusal(status, "test");
    assert.ok(error instanceof KvError);
    assert.equal(error.code, code);
    assert.match(error.message, /^Cannot test as [a-z].*[^.]$/);
  }
  for (const status of [0, 1, -20, -2147483648]) assert.throws(() => refusal(status, "test"), /unknown status/);
  const rules = { cache_full: () => "it is full: 3", layer_out_of_range: () => assert.fail("not this one") };
  assert.equal(refusal(STATUS.cache_full, "test", rules).message, "Cannot test as it is full: 3");
});

test("the library writes records of the sizes this module knows, and no more than it is given", () => {
  const cache = makeCache();
  const paged = makePaged();
  const row = new Float32Array(8);
  // Appending again and again: what was written is taken back.
  const append = (handle: number, index: number, record: Uint32Array, bytes: number) => {
    const status = library().kv_sequence_append(handle, index, 0, row, 8, row, 8, 0, 0, 0, record, bytes);
    if (status >= 0) assert.equal(library().kv_sequence_truncate(handle, index, 3), 0);
    return status;
  };
  const none = new Uint32Array(0);
  const writers: [RecordName, (record: Uint32Array, bytes: number) => number, varies?: string][] = [
    ["system", (record, bytes) => library().kv_system_info(record, bytes)],
    ["contiguous", (record, bytes) => library().kv_contiguous_config(cache.handle, record, bytes)],
    ["contiguousStats", (record, bytes) => library().kv_contiguous_stats(cache.handle, record, bytes)],
    ["append", (record, bytes) => append(cache.handle, 1, record, bytes), "generation"],
    ["append", (record, bytes) => append(paged.full, 0, record, bytes), "generation"],
    ["view", (record, bytes) => library().kv_sequence_contiguous_kv(cache.handle, 1, 0, 2, record, bytes)],
    ["view", (record, bytes) => library().kv_sequence_contiguous_kv(paged.full, 0, 0, 2, record, bytes)],
    ["poolStats", (record, bytes) => library().kv_pool_stats(paged.pool, 0, 0, record, bytes)],
    ["poolStats", (record, bytes) => library().kv_paged_pool_stats(paged.paged, 0, 0, 0, record, bytes)],
    ["paged", (record, bytes) => library().kv_paged_config(paged.paged, record, bytes, none, 0)],
    ["pagedStats", (record, bytes) => library().kv_paged_stats(paged.paged, record, bytes)],
    ["bufferPoolStats", (record, bytes) => library().kv_buffer_pool_stats(paged.bufferPool, record, bytes)],
    ["buffer", (record, bytes) => library().kv_buffer_info(paged.buffer, record, bytes)],
  ];
  for (const [kind, write, varies] of writers) {
    const words = recordWords(kind);
    const places: Readonly<Record<string, number>> = fieldsOf(kind);
    const record = new Uint32Array(words + 4).fill(0xabababab);
    record[0] = record.byteLength; // a caller of a later version
    assert.ok(write(record, record.byteLength) >= 0, kind);
    assert.equal(record[0], words * 4, kind);
    assert.deepEqual([...record.subarray(words)], [0xabababab, 0xabababab, 0xabababab, 0xabababab]);
    const isSame = (word: number) => varies === undefined || places[varies] !== word + 1;
    const whole = record.slice(1, words).filter((_, word) => isSame(word));
    const short = new Uint32Array(words).fill(0xabababab);
    short[0] = (words - 1) * 4; // a caller of an earlier one
    assert.ok(write(short, short.byteLength) >= 0, kind);
    assert.equal(short[0], (words - 1) * 4);
    const known = short.slice(1, words - 1).filter((_, word) => isSame(word));
    assert.deepEqual(known, whole.subarray(0, known.length));
    assert.equal(short[words - 1], 0xabababab);
    for (const [size, bytes] of [[words * 4, words * 4 - 4], [0, words * 4], [3, words * 4], [5, words * 4], [4, 0]]) {
      if (kind === "append" && bytes === 0) continue; // its answer is not wanted
      const wrong = new Uint32Array(words).fill(0xabababab);
      wrong[0] = size!;
      assert.equal(write(wrong, bytes!), STATUS.invalid_size, `${kind} ${size} ${bytes}`);
      assert.deepEqual([...wrong.subarray(1)], new Array(words - 1).fill(0xabababab));
    }
  }
  cache.free();
  freePaged(paged);
});

test("a list of views is written as far as there is room, and counted to the end", () => {
  const paged = makePaged();
  const row = new Float32Array(40).fill(3);
  const append = goodWords("kv_sequence_append", { sequence: paged.full }, "sequence");
  assert.equal(call("kv_sequence_append", wordsWith(append, "kv_sequence_append", { layer: 0, k: row, v: row })), 3);
  const list = newRecords("view", 3), [first, second, third] = [0, 1, 2].map((i) => recordAt("view", list, i));
  const bytes = first!.byteLength, view = fieldsOf("view");
  const look = (start: number, viewFirst: number, bytes: number) => {
    list.fill(0xabababab);
    list[0] = first!.byteLength;
    const count = call("kv_sequence_views", [paged.full, 0, 0, start, viewFirst, list, bytes]);
    return [count, ...[first!, second!].flatMap((one) => [one[view.start], one[view.length]]), third![0]];
  };
  assert.deepEqual(look(0, 0, bytes * 3), [2, 0, 4, 4, 4, 0xabababab]);
  assert.deepEqual(look(3, 0, bytes * 3), [2, 3, 1, 4, 4, 0xabababab]);
  assert.deepEqual(look(0, 1, bytes * 3), [2, 4, 4, 0xabababab, 0xabababab, 0xabababab]);
  assert.deepEqual(look(0, 0, bytes * 2 - 1), [2, 0, 4, 0xabababab, 0xabababab, 0xabababab]);
  assert.deepEqual(look(8, 0, bytes * 3)[0], 0);
  assert.deepEqual(look(0xffffffff, 0, bytes * 3)[0], 0);
  assert.deepEqual(look(0, 0xffffffff, bytes * 3).slice(0, 2), [2, 0xabababab]);
  freePaged(paged);
});

/** The first words of a record, its size as many: what a caller of an earlier version gives; or more, of a later one. */
function resized(record: Uint32Array, words: number, ...more: readonly number[]): Uint32Array {
  const other = Uint32Array.from([...record.subarray(0, words), ...more]);
  other[0] = other.byteLength;
  return other;
}

test("records that are read may be shorter or longer, but may not ask for what is not known", () => {
  const bytes = new Float64Array(1);
  const plan = (words: Uint32Array, size = words.byteLength) => library().kv_memory_bytes(words, size, bytes, 1);
  const geometry = { ...GEOMETRY, sequenceCount: 1 };
  const record = recordOf("contiguous", geometry), place = fieldsOf("contiguous");
  assert.equal(plan(resized(record, place.maxBytes)), 0); // without maxBytes
  assert.equal(bytes[0], 2 * 2 * 8 * 2 * 4 * 4);
  assert.equal(plan(resized(record, record.length, 0)), 0);
  assert.equal(plan(resized(record, record.length, 7)), STATUS.unsupported);
  assert.equal(plan(resized(record, place.maxSeqLen)), STATUS.invalid_config); // maxSeqLen is missing, and so 0
  for (const dtype of [3, 0xffffffff]) {
    assert.equal(plan(recordOf("contiguous", { ...geometry, dtypeK: dtype })), STATUS.invalid_config);
    assert.equal(plan(recordOf("contiguous", { ...geometry, dtypeV: dtype })), STATUS.invalid_config);
  }
  const first = resized(record, place.maxBytes);
  assert.equal(plan(first, first.byteLength - 4), STATUS.invalid_size);
  assert.equal(library().kv_memory_bytes(first, first.byteLength, bytes, 0), STATUS.invalid_size);
  using cache = makeCache();
  const output = new Float32Array(8).fill(9);
  const { window } = ENUMS.attendFlag;
  const attends = [
    ["no query", {}, { query_counts: Uint32Array.of(0, 0) }, "invalid_size"],
    ["a flag", { flags: 2 * window }, {}, "unsupported"],
    ["a window without causal", { flags: window }, {}, "invalid_config"],
  ] as const;
  for (const [what, change, more, status] of attends) {
    const words = goodWords("kv_attend", { contiguous: cache.handle });
    const options = recordOf("attend", { ...CAUSAL, ...change });
    const result = call("kv_attend", wordsWith(words, "kv_attend", { options, output, ...more }));
    assert.equal(result, STATUS[status], what);
  }
  assert.deepEqual(output, new Float32Array(8).fill(9));
});

test("paged caches and pools refuse what they cannot be, and hold nothing then", () => {
  const live = systemInfo();
  const one: Values<"paged"> = { ...PAGED, layerCount: 1, measuresFidelity: 0, rewindTokens: 0 };
  const createOf = (options: Uint32Array, layers: Uint32Array, bytes = layers.byteLength) =>
    call("kv_paged_create", [options, options.byteLength, layers, bytes]);
  const create = (values: Values<"paged">, ...layers: Values<"layer">[]) =>
    createOf(recordOf("paged", values), recordsOf("layer", layers.length === 0 ? [LAYER] : layers));
  const changes: [Partial<Values<"paged">>, keyof typeof STATUS][] = [
    [{ layerCount: 0 }, "invalid_size"],
    [{ layerCount: 2 }, "invalid_size"],
    [{ layerCount: 0xffffffff }, "invalid_size"],
    [{ blockSize: 0 }, "invalid_config"],
    [{ blockSize: 3 }, "invalid_config"],
    [{ blockSize: 512 }, "invalid_config"],
    [{ blockSize: 0xffffffff }, "invalid_config"],
    [{ maxSeqLen: 0 }, "invalid_config"],
    [{ maxSeqLen: 0x80000000 }, "invalid_config"],
    [{ dtypeK: 3 }, "invalid_config"],
    [{ dtypeV: 0xffffffff }, "invalid_config"],
    [{ retentionSinkTokens: 1 }, "invalid_config"],
    [{ maxBytes: 8 }, "block_too_large"],
    [{ rewindTokens: 0x80000000 }, "invalid_config"],
    [{ pool: 1 }, "stale_handle"],
    [{ pool: 0xffffffff }, "stale_handle"],
  ];
  for (const [change, status] of changes) {
    assert.equal(create({ ...one, ...change }), STATUS[status], JSON.stringify(change));
  }
  assert.equal(create({ ...one, retentionTokens: 4, retentionSinkTokens: 4 }), STATUS.invalid_config); // all are sinks
  const record = recordOf("paged", one), layers = recordsOf("layer", [LAYER]);
  assert.equal(createOf(resized(record, record.length, 7), layers), STATUS.unsupported);
  // A record of a caller who knows no rewinding.
  library().kv_paged_free(createOf(resized(record, fieldsOf("paged").rewindTokens), layers));
  assert.equal(create(one, { ...LAYER, kvHeadCount: 0 }), STATUS.invalid_config);
  assert.equal(create(one, { ...LAYER, headDim: 0 }), STATUS.invalid_config);
  assert.equal(create(one, { ...LAYER, headDim: 257 }), STATUS.invalid_config);
  assert.equal(create(one, { ...LAYER, storeK: 1 }), STATUS.invalid_config); // a store of keys alone
  assert.equal(create(one, { ...LAYER, storeK: 9, storeV: 9 }), STATUS.invalid_config);
  assert.ok(create(one, { ...LAYER, kvHeadCount: 0xffffffff, headDim: 256 }) < 0);
  // f32 rows become f16 and bf16
  const tiered = { ...one, policyKind: ENUMS.policyKind.tiered, policyStoreK: 2, policyStoreV: 3 };
  const fine = create({ ...tiered, policyTailTokens: 4 });
  assert.ok(fine > 0);
  library().kv_paged_free(fine);
  const wrong: Partial<Values<"paged">>[] = [
    { policyKind: 2 },
    { policyStoreK: 0 },
    { policyStoreK: 9 },
    { policyStoreV: 0 },
    { policyStoreV: 0xffffffff },
    { policyTailTokens: 2 },
    { policyStoreK: 5 },
    { policyStoreV: 8 },
  ];
  for (const change of wrong) {
    assert.equal(create({ ...tiered, ...change }), STATUS.invalid_config, JSON.stringify(change));
  }
  assert.equal(create({ ...tiered, retentionTokens: 2, policyTailTokens: 4 }), STATUS.invalid_config); // more tail than rows
  assert.equal(createOf(record, new Uint32Array(0)), STATUS.invalid_size);
  const createPool = (values: Values<"pool">) => {
    const options = recordOf("pool", values);
    return call("kv_pool_create", [options, options.byteLength]);
  };
  const noPools: Partial<Values<"pool">>[] = [
    { layerCount: 0 },
    { kvHeadCount: 0 },
    { headDim: 257 },
    { blockSize: 3 },
    { dtypeK: 3 },
    { dtypeV: 0xffffffff },
    { maxBytes: 8 },
  ];
  for (const change of noPools) assert.ok(createPool({ ...SMALL_POOL, ...change }) < 0, JSON.stringify(change));
  const kept = createPool(SMALL_POOL);
  const on = (values: Values<"paged">, second = LAYER) =>
    create({ ...values, layerCount: 2, pool: kept, prefixMode: ENUMS.prefixMode.none }, LAYER, second);
  assert.equal(on(one, { ...LAYER, windowTokens: 1 }), STATUS.invalid_config); // two groups
  assert.equal(on({ ...one, blockSize: 8 }), STATUS.invalid_config); // other blocks
  assert.equal(on({ ...one, maxBytes: 1e6 }), STATUS.invalid_config); // its own limit
  const good = on(one);
  assert.ok(good > 0);
  library().kv_pool_free(kept);
  assert.equal(on(one), STATUS.stale_handle);
  assert.ok(call("kv_sequence_create", [good]) > 0); // the cache keeps its pool
  library().kv_paged_free(good);
  const after = systemInfo();
  assert.deepEqual([after.liveCaches, after.reservedBytes], [live.liveCaches, live.reservedBytes]);
});

test("zero, stale, invented and other kinds' handles are stale_handle at every export", () => {
  const cache = makeCache(), paged = makePaged();
  const freed = makeCache(), freedPaged = makePaged();
  const stale = handlesOf(freed, freedPaged);
  freed.free();
  freePaged(freedPaged);
  const before = snapshot(cache, paged);
  const live = handlesOf(cache, paged);
  for (const [name, kind] of takers) {
    const own = live[kind]!;
    // What else is right where it stands, which is no refusal.
    const right = kindsOf(name).map((kind) => live[kind]).concat(
      kindsOf(name).includes("sequence") ? [live.empty] : [],
    );
    const kinds = Object.values(live).filter((handle) => !right.includes(handle));
    const inventions = [own ^ 0x00010000, own ^ 0x00008000, (own & 0x0fffffff) | 0x70000000];
    for (const wrong of [0, stale[kind]!, ...kinds, ...inventions, 0x7fffffff, 0x80000000, 0xffffffff]) {
      const args = goodWords(name, { ...live, [kind]: wrong }, kind);
      const copies = copiesOf(args);
      assert.equal(call(name, args), STATUS.stale_handle, `${name} with ${wrong}`);
      assert.deepEqual(args, copies, `${name} wrote something`);
    }
  }
  assert.deepEqual(snapshot(cache, paged), before);
  cache.free();
  freePaged(paged);
});

test("a batch with a wrong sequence, or one twice, is refused as a whole", () => {
  const cache = makeCache(), paged = makePaged(), other = makePaged();
  const before = snapshot(cache, paged);
  const handles = handlesOf(cache, paged);
  for (const name of ["kv_paged_append", "kv_attend", "kv_paged_reorder"] as const) {
    const good = () => goodWords(name, handles, "paged");
    for (const wrong of [0, other.full, paged.paged, paged.pool, paged.full ^ 0x00010000, 0xffffffff]) {
      const args = wordsWith(good(), name, { sequences: Uint32Array.of(paged.full, wrong) });
      const copies = copiesOf(args);
      assert.equal(call(name, args), STATUS.stale_handle, `${name} with ${wrong}`);
      assert.deepEqual(args, copies, `${name} wrote something`);
    }
    if (name === "kv_attend") continue;
    const twice = wordsWith(good(), name, { sequences: Uint32Array.of(paged.full, paged.full) });
    assert.equal(call(name, twice), STATUS.invalid_config, name);
  }
  for (const wrong of [2, 0x7fffffff, 0xffffffff]) {
    const args = wordsWith(goodWords("kv_attend", handles, "contiguous"), "kv_attend", {
      sequences: Uint32Array.of(1, wrong),
    });
    const copies = copiesOf(args);
    assert.equal(call("kv_attend", args), STATUS.sequence_out_of_range, `kv_attend with ${wrong}`);
    assert.deepEqual(args, copies, "kv_attend wrote something");
  }
  const parents = wordsWith(goodWords("kv_paged_reorder", handles), "kv_paged_reorder", {
    parents: Uint32Array.of(0, 2),
  });
  assert.equal(call("kv_paged_reorder", parents), STATUS.invalid_config);
  assert.deepEqual(snapshot(cache, paged), before);
  cache.free();
  freePaged(paged);
  freePaged(other);
});

test("every export that takes a handle works with the arguments the other tests break", () => {
  for (const [name, kind] of takers) {
    const cache = makeCache(), paged = makePaged();
    // One pending row in each layer, for advance().
    if (name === "kv_contiguous_advance") {
      for (const layer of [0, 1]) cache.store(layer, 0, new Float32Array(8), new Float32Array(8));
    }
    const result = call(name, goodWords(name, handlesOf(cache, paged), kind));
    assert.ok(result >= 0, `${name} with a handle of ${kind}: ${result}`);
    if (/_(acquire|clone)$/.test(name)) assert.equal(library().kv_buffer_free(result), 0); // it would outlive its pool
    cache.free();
    freePaged(paged);
  }
});

test("absurd numbers at every place give a status, change nothing and write nothing", () => {
  const cache = makeCache(), paged = makePaged();
  const before = snapshot(cache, paged);
  const live = systemInfo().liveCaches;
  // Indices, counts and codes; a count is only ever raised where a buffer stands before it, which is checked apart.
  const places: Partial<Record<Name, string>> = {
    kv_contiguous_store: "layer sequence_index k_count v_count dtype",
    kv_contiguous_offset: "layer sequence_index position kv_head dim",
    kv_attend: "layer",
    kv_paged_append: "layer dtype layout head_stride",
    kv_pool_prewarm: "dtype_k dtype_v",
    kv_pool_stats: "dtype_k dtype_v",
    kv_paged_pool_stats: "group dtype_k dtype_v",
    kv_sequence_append: "index layer dtype layout head_stride",
    kv_sequence_commit: "index token_count",
    kv_sequence_truncate: "index seq_len",
    kv_sequence_seq_len: "index",
    kv_sequence_rewindable_to: "index",
    kv_sequence_row_count: "index layer",
    kv_sequence_resident_count: "index layer",
    kv_sequence_generation: "index layer",
    kv_sequence_views: "index layer",
    kv_sequence_contiguous_kv: "index layer row_count",
    kv_sequence_gather: "index layer start dtype layout head_stride",
    kv_sequence_layer_device: "index layer",
    kv_sequence_block_table: "layer",
    kv_sequence_block_references: "layer",
    kv_sequence_block_tiers: "layer",
    kv_buffer_pool_prewarm: "class_bytes buffer_count",
    kv_buffer_pool_prewarm_all: "buffer_count",
  };
  for (const [name, kind] of takers) {
    for (const parameter of places[name]?.split(" ") ?? []) {
      for (const value of [9, 0x7fffffff, 0x80000000, 0xffffffff]) {
        const args = goodWords(name, handlesOf(cache, paged), kind);
        const copies = copiesOf(args);
        args[indexOf(name, parameter)] = value;
        assert.ok(call(name, args) < 0, `${name} ${parameter} = ${value}`);
        copies[indexOf(name, parameter)] = value;
        assert.deepEqual(args, copies, `${name} wrote something`);
      }
    }
  }
  // Counts of rows and queries, in buffers.
  for (
    const [name, kind, parameter] of [
      ["kv_paged_append", "paged", "token_counts"],
      ["kv_attend", "paged", "query_counts"],
      ["kv_attend", "contiguous", "query_counts"],
    ] as const
  ) {
    for (const counts of [[9, 9], [0xffffffff, 1], [0xffffffff, 0xffffffff], [0x80000000, 0x80000001]]) {
      const args = goodWords(name, handlesOf(cache, paged), kind);
      assert.ok(
        call(name, wordsWith(args, name, { [parameter]: Uint32Array.from(counts) })) < 0,
        `${name} with ${counts}`,
      );
    }
  }
  for (const [handle, index] of [[paged.full, 0], [cache.handle, 1]] as const) {
    for (const kept of [[0], [0xffffffff], [1, 0], [0, 0]]) {
      const args: Argument[] = [handle, index, Uint32Array.from(kept), kept.length];
      assert.equal(call("kv_sequence_commit_kept", args), STATUS.invalid_size);
    }
  }
  for (const kind of ["paged", "contiguous"] as const) {
    const none = new Float32Array(0);
    const tree = (...parents: number[]) =>
      call(
        "kv_attend",
        wordsWith(goodWords("kv_attend", handlesOf(cache, paged), kind), "kv_attend", {
          alibi_slopes: none,
          sink_logits: none,
          tree_parents: Int32Array.from(parents),
        }),
      );
    assert.equal(tree(-1), 0);
    for (const parents of [[2], [0], [-1, 0], [0x7fffffff]]) assert.ok(tree(...parents) < 0, `parents ${parents}`);
  }
  for (const [handle, index] of [[paged.full, 0], [cache.handle, 1]] as const) {
    const words = goodWords("kv_sequence_gather", { sequence: handle }, "sequence");
    const gather = (start: number, row_count: number) =>
      call("kv_sequence_gather", wordsWith(words, "kv_sequence_gather", { index, start, row_count }));
    for (const [start, count] of [[0, 9], [3, 1], [0, 0x7fffffff], [2, 0x80000000], [3, 0xfffffffe], [4, 0xffffffff]]) {
      assert.equal(gather(start!, count!), STATUS.position_out_of_range, `rows from ${start} on, ${count}`);
    }
    for (const name of ["k", "v"]) assert.deepEqual(words[indexOf("kv_sequence_gather", name)], new Float32Array(24));
  }
  for (const level of [7, 31, 32, 0xffffffff]) assert.ok(library().kv_level_set(level) < 0, `level ${level}`);
  const create = newRecord("contiguous").fill(0xffffffff, 1);
  assert.ok(library().kv_contiguous_create(create, create.byteLength) < 0);
  assert.deepEqual(snapshot(cache, paged), before);
  assert.equal(systemInfo().liveCaches, live);
  cache.free();
  freePaged(paged);
});

test("a count shorter than the need is refused untouched, an empty one is no memory at all", () => {
  const cache = makeCache(), paged = makePaged();
  const before = snapshot(cache, paged);
  const counts: Partial<Record<Name, string>> = {
    kv_contiguous_config: "options_bytes",
    kv_contiguous_store: "k_count v_count",
    kv_contiguous_memory_bytes: "bytes_count",
    kv_contiguous_stats: "stats_bytes",
    kv_contiguous_offset: "offset_count",
    kv_attend: "options_bytes q_count alibi_slope_count sink_logit_count output_count lse_count",
    kv_pool_stats: "stats_bytes",
    kv_paged_config: "options_bytes layers_bytes",
    kv_paged_append: "k_count v_count",
    kv_paged_stats: "stats_bytes",
    kv_paged_pool_stats: "stats_bytes",
    kv_sequence_append: "k_count v_count appended_bytes",
    kv_sequence_contiguous_kv: "view_bytes",
    kv_sequence_gather: "k_count v_count",
    kv_buffer_pool_stats: "stats_bytes",
    kv_buffer_info: "info_bytes",
  };
  // Slopes, logits, lse, the layers of a config and the answer of an append may be absent; everything else may not.
  const optional = ["alibi_slope_count", "sink_logit_count", "lse_count", "layers_bytes", "appended_bytes"];
  for (const [name, kind] of takers) {
    for (const parameter of counts[name]?.split(" ") ?? []) {
      const index = indexOf(name, parameter);
      const good = () => goodWords(name, handlesOf(cache, paged), kind);
      const full = good()[index] as number;
      for (const count of [0, 1, full - 1]) {
        if (count === full || (count === 0 && optional.includes(parameter))) continue;
        const args = good();
        args[index] = count;
        if (count === 0) args[index - 1] = new Float32Array(0);
        const copies = copiesOf(args);
        assert.equal(call(name, args), STATUS.invalid_size, `${name} ${parameter} = ${count}`);
        assert.deepEqual(args, copies, `${name} wrote something`);
      }
    }
  }
  for (
    const name of [
      "kv_contiguous_create",
      "kv_memory_bytes",
      "kv_system_info",
      "kv_pool_create",
      "kv_buffer_pool_create",
    ] as const
  ) {
    const args = name === "kv_memory_bytes" ? [new Uint8Array(0), 0, new Float64Array(1), 1] : [new Uint8Array(0), 0];
    assert.equal(call(name, args), STATUS.invalid_size, name);
  }
  assert.deepEqual(snapshot(cache, paged), before);
  cache.free();
  freePaged(paged);
});

test("a buffer is 64-byte aligned whatever its size, and refuses absurd sizes and counts", () => {
  const limits = recordOf("bufferPool", { buffersPerClass: 2, maxBytes: 2 ** 26 });
  const pool = call("kv_buffer_pool_create", [limits, limits.byteLength]);
  const record = newRecord("buffer");
  for (const [bytes, capacity] of [[0, 256], [1025, 1024], [2 ** 18, 2 ** 16], [2 ** 24 + 1, 2 ** 22 + 1]] as const) {
    const buffer = call("kv_buffer_acquire", [pool, bytes]);
    assert.equal(call("kv_buffer_info", [buffer, record, record.byteLength]), 0);
    const info = valuesOf("buffer", record);
    assert.deepEqual([info.address % 64, info.capacity, info.length], [0, capacity, 0], `${bytes} bytes`);
    assert.ok(info.address > 0);
    const values = new Float32Array(1);
    for (const count of [capacity + 1, 0x7fffffff, 0xffffffff]) {
      assert.equal(call("kv_buffer_extend", [buffer, values, count]), STATUS.invalid_size); // nothing is read
    }
    assert.equal(call("kv_buffer_length", [buffer]), 0);
    assert.equal(call("kv_buffer_free", [buffer]), 0);
  }
  for (const bytes of [NaN, -1, -Infinity, Infinity, 2 ** 33, Number.MAX_VALUE]) {
    assert.equal(call("kv_buffer_acquire", [pool, bytes]), STATUS.invalid_size, `${bytes} bytes`);
  }
  for (const bytes of [2 ** 26 + 1, 2 ** 33 - 4]) {
    assert.equal(call("kv_buffer_acquire", [pool, bytes]), STATUS.out_of_memory, `${bytes} bytes`);
  }
  assert.equal(call("kv_buffer_pool_free", [pool]), 0);
});

test("kv_read_rate refuses absurd sizes and thread counts untouched", () => {
  const rate = Float64Array.of(7);
  const refused = [[NaN, 1], [-1, 1], [Infinity, 1], [2 ** 41, 1], [0, 1], [2 ** 20, 0], [2 ** 20, 0xffffffff]];
  for (const [bytes, threads] of refused as [number, number][]) {
    assert.ok(library().kv_read_rate(bytes, threads, rate, 1) < 0, `${bytes} bytes, ${threads} threads`);
  }
  assert.equal(library().kv_read_rate(2 ** 20, 1, rate, 0), STATUS.invalid_size);
  assert.equal(rate[0], 7);
});

test("handles are 31 bits, never 0, and none comes back in many frees", () => {
  const options = { layerCount: 1, kvHeadCount: 1, headDim: 1, maxSeqLen: 1 };
  const old = new ContiguousCache(options);
  const seen = new Set<number>([old.handle]);
  old.free();
  // An entry has 4096 generations: were it used again at once, `old` would be the handle of a stranger in the end.
  for (let i = 0; i < 3 * 4096; i++) {
    const cache = new ContiguousCache(options);
    assert.ok(cache.handle > 0 && cache.handle < 2 ** 31);
    seen.add(cache.handle);
    cache.free();
  }
  assert.equal(seen.size, 1 + 3 * 4096);
});

test("a caller that knows fewer words of a layer gives and gets those", () => {
  const record = recordOf("paged", { ...PAGED, measuresFidelity: 0, rewindTokens: 0 });
  const known = fieldsOf("layer").qHeadCount; // the last of its words
  const first = { ...LAYER, qHeadCount: 6 },
    second = { ...LAYER, kvHeadCount: 3, headDim: 8, windowTokens: 5, qHeadCount: 6 };
  const whole = [first, second].map((layer) => [...recordOf("layer", layer)]);
  const short = [first, second].map((layer) => [...resized(recordOf("layer", layer), known)]);
  for (const given of [short, whole]) {
    const layers = Uint32Array.from(given.flat());
    const handle = library().kv_paged_create(record, record.byteLength, layers, layers.byteLength);
    assert.ok(handle > 0, `${handle}`);
    for (const wanted of [short, whole]) {
      const got = new Uint32Array(wanted.flat().length);
      got[0] = got.byteLength / 2;
      assert.equal(library().kv_paged_config(handle, record.slice(), record.byteLength, got, got.byteLength), 0);
      const expected = wanted === short || given === whole ? wanted : wanted.map((words) => words.with(known, 0));
      assert.deepEqual([...got], expected.flat());
    }
    library().kv_paged_free(handle);
  }
  const words = Uint32Array.from([...short.flat(), 0]);
  assert.equal(library().kv_paged_create(record, record.byteLength, words, words.byteLength), STATUS.invalid_size);
});
