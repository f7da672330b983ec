/** The two tables agree, and no wrong call through the C ABI crashes, writes or changes anything. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { ContiguousCache, KvError, PagedCache, systemInfo } from "../mod.ts";
import { ABI_VERSION, EXPORTS, type Library } from "../src/ffi/exports.ts";
import { library } from "../src/ffi/library.ts";
import { newRecord, pagedRecord, RECORD_WORDS } from "../src/ffi/record.ts";
import { refusal, STATUS } from "../src/ffi/status.ts";

type Name = keyof Library;
type Argument = number | ArrayBufferView;

const names = Object.keys(EXPORTS) as Name[];

/** Any export with any arguments. */
function call(name: Name, args: readonly Argument[]): number {
  assert.equal(args.length, EXPORTS[name].parameters.length, name);
  return (library()[name] as (...args: Argument[]) => number)(...args);
}

/** What a test cache is made of: 2 layers, 2 sequences, 2 heads of 4, room for 8 rows; sequence 1 has 3 of them. */
function makeCache(): ContiguousCache {
  const cache = new ContiguousCache({ layerCount: 2, kvHeadCount: 2, headDim: 4, maxSeqLen: 8, sequenceCount: 2 });
  for (const layer of [0, 1]) cache.append(layer, 1, new Float32Array(24).fill(1), new Float32Array(24).fill(2));
  cache.sequence(1).commit(3);
  return cache;
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
  const pool = call("kv_pool_create", [Uint32Array.of(36, 2, 2, 4, 4, 0, 0, 0, 0), 36]);
  const layers = Uint32Array.of(2, 4, 0, 0, 0, 2, 4, 0, 0, 0);
  const record = Uint32Array.of(84, 2, 4, 8, 0, 0, 0, 0, 0, 0, pool, ...new Array(8).fill(0), 1, 4); // measures fidelity
  const paged = call("kv_paged_create", [record, 84, layers, 10]);
  const empty = call("kv_sequence_create", [paged]), full = call("kv_sequence_create", [paged]);
  assert.ok(pool > 0 && paged > 0 && empty > 0 && full > 0);
  const k = new Float32Array(24).fill(1), v = new Float32Array(24).fill(2);
  for (const layer of [0, 1]) assert.equal(call("kv_sequence_append", [full, layer, k, 24, v, 24, 0, 0]), 0);
  assert.equal(call("kv_sequence_commit", [full, 3]), 0);
  const bufferPool = call("kv_buffer_pool_create", [Uint32Array.of(16, 4, 2 ** 20, 0), 16]);
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
      return [call("kv_sequence_gather", [handle, layer, k, 24, v, 24, 0]), k, v];
    })
  );
  const rows = [0, 1].map((i) => [cache.getSeqLen(i), [0, 1].map((layer) => cache.sequence(i).gather(layer))]);
  const kept = newRecord("bufferPoolStats"), info = newRecord("buffer");
  assert.equal(call("kv_buffer_pool_stats", [bufferPool, kept, kept.byteLength]), 0);
  assert.equal(call("kv_buffer_info", [buffer, info, info.byteLength]), 0);
  return [rows, gathered, paged.stats(), paged.poolStats(), kept, info];
}

/** The handle each export takes, by the noun of its name. */
function handlesOf(cache: ContiguousCache, { paged, full, pool, bufferPool, buffer }: Paged): Record<string, number> {
  return { contiguous: cache.handle, paged, sequence: full, pool, buffer_pool: bufferPool, buffer };
}

/** Exports that take a handle; the noun says of which kind. */
const takers = names.filter((name) =>
  /^kv_(contiguous|paged|sequence|pool|buffer)_/.test(name) && !/_create$/.test(name)
)
  .concat("kv_sequence_create");

/** The kind of handle an export takes. */
function nounOf(name: Name): string {
  if (name === "kv_sequence_create") return "paged";
  return name === "kv_buffer_acquire" || name.startsWith("kv_buffer_pool") ? "buffer_pool" : name.split("_")[1]!;
}

/** Arguments with which every export that takes a handle succeeds on a test cache. */
function goodArguments(
  handles: Record<string, number>,
  others: { empty: number; full: number },
): Record<Name, Argument[]> {
  const { contiguous, paged, sequence, pool, buffer_pool: bufferPool, buffer } = handles as Record<string, number>;
  const row = () => new Float32Array(8).fill(0.5);
  const floats = (length: number) => new Float32Array(length);
  const view = () => newRecord("view"), rows = () => newRecord("rows");
  const attend = newRecord("attend");
  attend[1] = 1;
  attend[2] = 1; // causal, which a tree needs
  const attention = () => [attend, 28, floats(2), 2, floats(2), 2];
  const output = () => [floats(8), 8, floats(2), 2];
  const both = () => Uint32Array.of(others.empty, others.full);
  const good: Partial<Record<Name, Argument[]>> = {
    kv_contiguous_config: [contiguous!, newRecord("contiguous"), 44],
    kv_contiguous_store: [contiguous!, 0, 0, row(), 8, row(), 8, 0],
    kv_contiguous_append: [contiguous!, 0, 0, row(), 8, row(), 8, 0, 0],
    kv_contiguous_advance: [contiguous!],
    kv_contiguous_reset: [contiguous!],
    kv_contiguous_commit: [contiguous!, 0, 0],
    kv_contiguous_truncate: [contiguous!, 0, 0],
    kv_contiguous_seq_len: [contiguous!, 1],
    kv_contiguous_row_count: [contiguous!, 1, 1],
    kv_contiguous_generation: [contiguous!, 1, 1],
    kv_contiguous_memory_bytes: [contiguous!, new Float64Array(1), 1],
    kv_contiguous_stats: [contiguous!, newRecord("stats"), 48],
    kv_contiguous_offset: [contiguous!, 1, 1, 2, 1, 3, new Float64Array(1), 1],
    kv_contiguous_keys: [contiguous!, 1, 1, rows(), 32],
    kv_contiguous_values: [contiguous!, 1, 1, rows(), 32],
    kv_contiguous_views: [contiguous!, 1, 1, view(), 72],
    kv_contiguous_contiguous_kv: [contiguous!, 1, 1, 2, view(), 72],
    kv_contiguous_gather: [contiguous!, 1, 1, floats(24), 24, floats(24), 24, 0],
    kv_contiguous_layer_device: [contiguous!, 1],
    kv_contiguous_attend: [contiguous!, 1, 1, row(), 8, ...attention(), new Int32Array(0), 0, ...output()],
    kv_contiguous_free: [contiguous!],

    kv_pool_prewarm: [pool!, 2, 0, 0],
    kv_pool_stats: [pool!, 0, 0, newRecord("poolStats"), 88],
    kv_pool_free: [pool!],

    kv_paged_config: [paged!, newRecord("paged"), 84, new Uint32Array(12), 12],
    kv_paged_append: [paged!, 0, both(), Uint32Array.of(1, 1), 2, floats(16), 16, floats(16), 16, 0, 0],
    kv_paged_attend: [
      ...[paged!, 1, both(), Uint32Array.of(0, 1), 2, row(), 8],
      ...attention(),
      ...[new Int32Array(0), 0],
      ...output(),
    ],
    kv_paged_reorder: [paged!, both(), Uint32Array.of(1, 1), 2],
    kv_paged_reset: [paged!, both(), 2],
    kv_paged_update_policy: [paged!, newRecord("policy"), 32],
    kv_paged_fidelity: [paged!, 1, new Float64Array(20), 20],
    kv_paged_stats: [paged!, newRecord("pagedStats"), 104],
    kv_paged_pool_stats: [paged!, 0, 0, 0, newRecord("poolStats"), 88],
    kv_paged_free: [paged!],

    kv_sequence_create: [paged!],
    kv_sequence_cache: [sequence!],
    kv_sequence_fork: [sequence!],
    kv_sequence_append: [sequence!, 0, row(), 8, row(), 8, 0, 0],
    kv_sequence_commit: [sequence!, 0],
    kv_sequence_commit_kept: [sequence!, new Uint32Array(0), 0],
    kv_sequence_truncate: [sequence!, 2],
    kv_sequence_seq_len: [sequence!],
    kv_sequence_rewindable_to: [sequence!],
    kv_sequence_row_count: [sequence!, 1],
    kv_sequence_resident_count: [sequence!, 1],
    kv_sequence_generation: [sequence!, 1],
    kv_sequence_views: [sequence!, 1, 0, 0, view(), 72],
    kv_sequence_contiguous_kv: [sequence!, 1, 2, view(), 72],
    kv_sequence_gather: [sequence!, 1, floats(24), 24, floats(24), 24, 0],
    kv_sequence_layer_device: [sequence!, 1],
    kv_sequence_block_table: [sequence!, 1, new Int32Array(1), 1],
    kv_sequence_block_references: [sequence!, 1, new Int32Array(1), 1],
    kv_sequence_block_tiers: [sequence!, 1, new Int32Array(1), 1],
    kv_sequence_attend: [sequence!, 1, row(), 8, ...attention(), new Int32Array(0), 0, ...output()],
    kv_sequence_free: [sequence!],

    kv_buffer_pool_prewarm: [bufferPool!, 1024, 2],
    kv_buffer_pool_prewarm_all: [bufferPool!, 0],
    kv_buffer_pool_clear: [bufferPool!],
    kv_buffer_pool_stats: [bufferPool!, newRecord("bufferPoolStats"), 84],
    kv_buffer_pool_free: [bufferPool!],
    kv_buffer_acquire: [bufferPool!, 5000],
    kv_buffer_clone: [buffer!],
    kv_buffer_info: [buffer!, newRecord("buffer"), 20],
    kv_buffer_length: [buffer!],
    kv_buffer_extend: [buffer!, row(), 8],
    kv_buffer_clear: [buffer!],
    kv_buffer_free: [buffer!],
  };
  return good as Record<Name, Argument[]>;
}

function copiesOf(args: readonly Argument[]): Argument[] {
  return args.map((arg) => typeof arg === "number" ? arg : structuredClone(arg));
}

test("EXPORTS equals the library's own manifest, line by line", () => {
  const bytes = library().kv_abi_manifest(new Uint8Array(0), 0);
  assert.ok(bytes > 0);
  const text = new Uint8Array(bytes);
  assert.equal(library().kv_abi_manifest(text, bytes - 1), bytes);
  assert.deepEqual(text, new Uint8Array(bytes)); // too short: not touched
  assert.equal(library().kv_abi_manifest(text, bytes), bytes);
  const lines = names.map((name) => `${name}(${EXPORTS[name].parameters.join(", ")}) ${EXPORTS[name].result}`);
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
  const writers: [keyof typeof RECORD_WORDS, (record: Uint32Array, bytes: number) => number][] = [
    ["system", (record, bytes) => library().kv_system_info(record, bytes)],
    ["contiguous", (record, bytes) => library().kv_contiguous_config(cache.handle, record, bytes)],
    ["stats", (record, bytes) => library().kv_contiguous_stats(cache.handle, record, bytes)],
    ["rows", (record, bytes) => library().kv_contiguous_keys(cache.handle, 0, 1, record, bytes)],
    ["rows", (record, bytes) => library().kv_contiguous_values(cache.handle, 0, 1, record, bytes)],
    ["view", (record, bytes) => library().kv_contiguous_views(cache.handle, 0, 1, record, bytes)],
    ["view", (record, bytes) => library().kv_contiguous_contiguous_kv(cache.handle, 0, 1, 2, record, bytes)],
    ["poolStats", (record, bytes) => library().kv_pool_stats(paged.pool, 0, 0, record, bytes)],
    ["poolStats", (record, bytes) => library().kv_paged_pool_stats(paged.paged, 0, 0, 0, record, bytes)],
    ["paged", (record, bytes) => library().kv_paged_config(paged.paged, record, bytes, new Uint32Array(0), 0)],
    ["pagedStats", (record, bytes) => library().kv_paged_stats(paged.paged, record, bytes)],
    ["view", (record, bytes) => library().kv_sequence_contiguous_kv(paged.full, 0, 2, record, bytes)],
    ["bufferPoolStats", (record, bytes) => library().kv_buffer_pool_stats(paged.bufferPool, record, bytes)],
    ["buffer", (record, bytes) => library().kv_buffer_info(paged.buffer, record, bytes)],
  ];
  for (const [kind, write] of writers) {
    const words = RECORD_WORDS[kind];
    const record = new Uint32Array(words + 4).fill(0xabababab);
    record[0] = record.byteLength; // a caller of a later version
    assert.ok(write(record, record.byteLength) >= 0, kind);
    assert.equal(record[0], words * 4, kind);
    assert.deepEqual([...record.subarray(words)], [0xabababab, 0xabababab, 0xabababab, 0xabababab]);
    const whole = record.slice(1, words);
    const short = new Uint32Array(words).fill(0xabababab);
    short[0] = (words - 1) * 4; // a caller of an earlier one
    assert.ok(write(short, short.byteLength) >= 0, kind);
    assert.equal(short[0], (words - 1) * 4);
    assert.deepEqual(short.slice(1, words - 1), whole.subarray(0, words - 2));
    assert.equal(short[words - 1], 0xabababab);
    for (const [size, bytes] of [[words * 4, words * 4 - 4], [0, words * 4], [3, words * 4], [5, words * 4], [4, 0]]) {
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
  assert.equal(call("kv_sequence_append", [paged.full, 0, row, 40, row, 40, 0, 0]), 3);
  const words = RECORD_WORDS.view;
  const list = new Uint32Array(words * 3);
  const look = (start: number, first: number, bytes: number) => {
    list.fill(0xabababab);
    list[0] = words * 4;
    const count = call("kv_sequence_views", [paged.full, 0, start, first, list, bytes]);
    return [count, list[5], list[6], list[words + 5], list[words + 6], list[2 * words]];
  };
  assert.deepEqual(look(0, 0, words * 12), [2, 0, 4, 4, 4, 0xabababab]);
  assert.deepEqual(look(3, 0, words * 12), [2, 3, 1, 4, 4, 0xabababab]);
  assert.deepEqual(look(0, 1, words * 12), [2, 4, 4, 0xabababab, 0xabababab, 0xabababab]);
  assert.deepEqual(look(0, 0, words * 8 - 1), [2, 0, 4, 0xabababab, 0xabababab, 0xabababab]);
  assert.deepEqual(look(8, 0, words * 12)[0], 0);
  assert.deepEqual(look(0xffffffff, 0, words * 12)[0], 0);
  assert.deepEqual(look(0, 0xffffffff, words * 12).slice(0, 2), [2, 0xabababab]);
  freePaged(paged);
});

test("records that are read may be shorter or longer, but may not ask for what is not known", () => {
  const record = (words: number[]) => Uint32Array.from([words.length * 4 + 4, ...words]);
  const bytes = new Float64Array(1);
  const plan = (words: Uint32Array, size = words.byteLength) => library().kv_memory_bytes(words, size, bytes, 1);
  const geometry = [2, 1, 2, 4, 8, 0, 0];
  assert.equal(plan(record(geometry)), 0); // without maxBytes
  assert.equal(bytes[0], 2 * 2 * 8 * 2 * 4 * 4);
  assert.equal(plan(record([...geometry, 0, 0, 0, 0])), 0);
  assert.equal(plan(record([...geometry, 0, 0, 0, 7])), STATUS.unsupported);
  assert.equal(plan(record([2, 1, 2, 4])), STATUS.invalid_config); // maxSeqLen is missing, and so 0
  for (const dtype of [3, 0xffffffff]) {
    assert.equal(plan(record([2, 1, 2, 4, 8, dtype, 0])), STATUS.invalid_config);
    assert.equal(plan(record([2, 1, 2, 4, 8, 0, dtype])), STATUS.invalid_config);
  }
  assert.equal(plan(record(geometry), 28), STATUS.invalid_size);
  assert.equal(library().kv_memory_bytes(record(geometry), 32, bytes, 0), STATUS.invalid_size);
  const options = newRecord("attend");
  using cache = makeCache();
  const q = new Float32Array(8), output = new Float32Array(8).fill(9), none = new Float32Array(0);
  for (
    const [word, value, status] of [[1, 0, "invalid_config"], [2, 16, "unsupported"], [2, 8, "invalid_config"]] as const
  ) {
    options.fill(0, 1);
    options[1] = 1;
    options[word] = value;
    const result = call("kv_contiguous_attend", [
      ...[cache.handle, 0, 1, q, 8, options, 28, none, 0, none, 0, none, 0, output, 8, none, 0],
    ]);
    assert.equal(result, STATUS[status], `word ${word}`);
  }
  assert.deepEqual(output, new Float32Array(8).fill(9));
});

test("paged caches and pools refuse what they cannot be, and hold nothing then", () => {
  const live = systemInfo();
  const layers = Uint32Array.of(2, 4, 0, 0, 0);
  const paged = [84, 1, 4, 8, ...new Array(17).fill(0)];
  const create = (words: number[], list: Uint32Array = layers, count = list.length) =>
    call("kv_paged_create", [Uint32Array.from(words), words.length * 4, list, count]);
  const changes: [number, number, keyof typeof STATUS][] = [
    [1, 0, "invalid_size"],
    [1, 2, "invalid_size"],
    [1, 0xffffffff, "invalid_size"],
    [2, 0, "invalid_config"],
    [2, 3, "invalid_config"],
    [2, 512, "invalid_config"],
    [2, 0xffffffff, "invalid_config"],
    [3, 0, "invalid_config"],
    [3, 0x80000000, "invalid_config"],
    [4, 3, "invalid_config"],
    [5, 0xffffffff, "invalid_config"],
    [7, 1, "invalid_config"],
    [8, 8, "block_too_large"],
    [20, 0x80000000, "invalid_config"],
    [10, 1, "stale_handle"],
    [10, 0xffffffff, "stale_handle"],
  ];
  for (const [word, value, status] of changes) {
    assert.equal(create(paged.with(word, value)), STATUS[status], `word ${word} = ${value}`);
  }
  assert.equal(create(paged.with(6, 4).with(7, 4)), STATUS.invalid_config); // all of the rows are sinks
  assert.equal(create([...paged, 7].with(0, 88)), STATUS.unsupported);
  library().kv_paged_free(create(paged.slice(0, 20).with(0, 80))); // a record of a caller who knows no rewinding
  assert.equal(create(paged, Uint32Array.of(0, 4, 0, 0, 0)), STATUS.invalid_config);
  assert.equal(create(paged, Uint32Array.of(2, 0, 0, 0, 0)), STATUS.invalid_config);
  assert.equal(create(paged, Uint32Array.of(2, 257, 0, 0, 0)), STATUS.invalid_config);
  assert.equal(create(paged, Uint32Array.of(2, 4, 0, 1, 0)), STATUS.invalid_config); // a store of keys alone
  assert.equal(create(paged, Uint32Array.of(2, 4, 0, 9, 9)), STATUS.invalid_config);
  assert.ok(create(paged, Uint32Array.of(0xffffffff, 256, 0, 0, 0)) < 0);
  const tiered = paged.with(12, 1).with(13, 2).with(14, 3); // f32 rows become f16 and bf16
  const fine = create(tiered.with(15, 4));
  assert.ok(fine > 0);
  library().kv_paged_free(fine);
  for (
    const [word, value] of [[12, 2], [13, 0], [13, 9], [14, 0], [14, 0xffffffff], [15, 2], [13, 5], [14, 8]] as const
  ) {
    assert.equal(create(tiered.with(word, value)), STATUS.invalid_config, `word ${word} = ${value}`);
  }
  assert.equal(create(tiered.with(6, 2).with(15, 4)), STATUS.invalid_config); // more tail than rows
  assert.equal(create(paged, new Uint32Array(0)), STATUS.invalid_size);
  const pool = [36, 2, 2, 4, 4, 0, 0, 0, 0];
  for (const [word, value] of [[1, 0], [2, 0], [3, 257], [4, 3], [5, 3], [6, 0xffffffff], [7, 8]] as const) {
    assert.ok(call("kv_pool_create", [Uint32Array.from(pool.with(word, value)), 36]) < 0, `word ${word} = ${value}`);
  }
  const kept = call("kv_pool_create", [Uint32Array.from(pool), 36]);
  const on = (words: number[], list = Uint32Array.of(2, 4, 0, 0, 0, 2, 4, 0, 0, 0)) =>
    create(words.with(1, 2).with(10, kept), list);
  assert.equal(on(paged, Uint32Array.of(2, 4, 0, 0, 0, 2, 4, 1, 0, 0)), STATUS.invalid_config); // two groups
  assert.equal(on(paged.with(2, 8)), STATUS.invalid_config); // other blocks
  assert.equal(on(paged.with(8, 1e6)), STATUS.invalid_config); // its own limit
  const good = on(paged);
  assert.ok(good > 0);
  library().kv_pool_free(kept);
  assert.equal(on(paged), STATUS.stale_handle);
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
  for (const name of takers) {
    const noun = nounOf(name);
    const own = live[noun]!;
    const kinds = Object.values(live).filter((handle) => handle !== own);
    const inventions = [own ^ 0x00010000, own ^ 0x00008000, (own & 0x0fffffff) | 0x70000000];
    for (const wrong of [0, stale[noun]!, ...kinds, ...inventions, 0x7fffffff, 0x80000000, 0xffffffff]) {
      const args = goodArguments({ ...live, [noun]: wrong }, paged)[name];
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
  for (const name of ["kv_paged_append", "kv_paged_attend", "kv_paged_reorder"] as const) {
    const at = name === "kv_paged_reorder" ? 1 : 2;
    for (const wrong of [0, other.full, paged.paged, paged.pool, paged.full ^ 0x00010000, 0xffffffff]) {
      const args = goodArguments(handlesOf(cache, paged), paged)[name];
      args[at] = Uint32Array.of(paged.full, wrong);
      const copies = copiesOf(args);
      assert.equal(call(name, args), STATUS.stale_handle, `${name} with ${wrong}`);
      assert.deepEqual(args, copies, `${name} wrote something`);
    }
    if (name === "kv_paged_attend") continue;
    const args = goodArguments(handlesOf(cache, paged), paged)[name];
    args[at] = Uint32Array.of(paged.full, paged.full);
    assert.equal(call(name, args), STATUS.invalid_config, name);
  }
  const parents = goodArguments(handlesOf(cache, paged), paged).kv_paged_reorder;
  parents[2] = Uint32Array.of(0, 2);
  assert.equal(call("kv_paged_reorder", parents), STATUS.invalid_config);
  assert.deepEqual(snapshot(cache, paged), before);
  cache.free();
  freePaged(paged);
  freePaged(other);
});

test("every export that takes a handle works with the arguments the other tests break", () => {
  for (const name of takers) {
    const cache = makeCache(), paged = makePaged();
    // One pending row in each layer, for advance().
    if (name === "kv_contiguous_advance") {
      for (const layer of [0, 1]) cache.store(layer, 0, new Float32Array(8), new Float32Array(8));
    }
    const result = call(name, goodArguments(handlesOf(cache, paged), paged)[name]);
    assert.ok(result >= 0, name);
    if (/_(acquire|clone)$/.test(name)) assert.equal(library().kv_buffer_free(result), 0); // it would outlive its pool
    cache.free();
    freePaged(paged);
  }
  assert.equal(Object.keys(goodArguments({}, { empty: 0, full: 0 })).length, takers.length);
});

test("absurd numbers at every place give a status, change nothing and write nothing", () => {
  const cache = makeCache(), paged = makePaged();
  const before = snapshot(cache, paged);
  const live = systemInfo().liveCaches;
  // Indices, counts and codes; a count is only ever raised where a buffer stands before it, which is checked apart.
  const places: Partial<Record<Name, number[]>> = {
    kv_contiguous_store: [1, 2, 4, 6, 7],
    kv_contiguous_append: [1, 2, 7, 8],
    kv_contiguous_commit: [1, 2],
    kv_contiguous_truncate: [1, 2],
    kv_contiguous_seq_len: [1],
    kv_contiguous_row_count: [1, 2],
    kv_contiguous_generation: [1, 2],
    kv_contiguous_offset: [1, 2, 3, 4, 5],
    kv_contiguous_keys: [1, 2],
    kv_contiguous_values: [1, 2],
    kv_contiguous_views: [1, 2],
    kv_contiguous_contiguous_kv: [1, 2, 3],
    kv_contiguous_gather: [1, 2, 7],
    kv_contiguous_layer_device: [1],
    kv_contiguous_attend: [1, 2],
    kv_paged_append: [1, 9, 10],
    kv_paged_attend: [1],
    kv_pool_prewarm: [2, 3],
    kv_pool_stats: [1, 2],
    kv_paged_pool_stats: [1, 2, 3],
    kv_sequence_append: [1, 6, 7],
    kv_sequence_commit: [1],
    kv_sequence_truncate: [1],
    kv_sequence_row_count: [1],
    kv_sequence_resident_count: [1],
    kv_sequence_generation: [1],
    kv_sequence_views: [1],
    kv_sequence_contiguous_kv: [1, 2],
    kv_sequence_gather: [1, 6],
    kv_sequence_layer_device: [1],
    kv_sequence_block_table: [1],
    kv_sequence_block_references: [1],
    kv_sequence_block_tiers: [1],
    kv_sequence_attend: [1],
    kv_buffer_pool_prewarm: [1, 2],
    kv_buffer_pool_prewarm_all: [1],
  };
  for (const [name, indices] of Object.entries(places) as [Name, number[]][]) {
    for (const index of indices) {
      for (const value of [9, 0x7fffffff, 0x80000000, 0xffffffff]) {
        const args = goodArguments(handlesOf(cache, paged), paged)[name];
        const copies = copiesOf(args);
        args[index] = value;
        assert.ok(call(name, args) < 0, `${name} argument ${index} = ${value}`);
        copies[index] = value;
        assert.deepEqual(args, copies, `${name} wrote something`);
      }
    }
  }
  // Counts of rows and queries, in buffers.
  for (const name of ["kv_paged_append", "kv_paged_attend"] as const) {
    for (const counts of [[9, 9], [0xffffffff, 1], [0xffffffff, 0xffffffff], [0x80000000, 0x80000001]]) {
      const args = goodArguments(handlesOf(cache, paged), paged)[name];
      args[3] = Uint32Array.from(counts);
      assert.ok(call(name, args) < 0, `${name} with ${counts}`);
    }
  }
  for (const kept of [[0], [0xffffffff], [1, 0], [0, 0]]) {
    const args: Argument[] = [paged.full, Uint32Array.from(kept), kept.length];
    assert.equal(call("kv_sequence_commit_kept", args), STATUS.invalid_size);
  }
  const tree = goodArguments(handlesOf(cache, paged), paged).kv_sequence_attend;
  tree.splice(6, 6, new Float32Array(0), 0, new Float32Array(0), 0, Int32Array.of(-1), 1);
  assert.equal(call("kv_sequence_attend", tree), 0);
  for (const parents of [[2], [0], [-1, 0], [0x7fffffff]]) {
    const args = goodArguments(handlesOf(cache, paged), paged).kv_sequence_attend;
    args.splice(6, 6, new Float32Array(0), 0, new Float32Array(0), 0, Int32Array.from(parents), parents.length);
    assert.ok(call("kv_sequence_attend", args) < 0, `parents ${parents}`);
  }
  for (const level of [7, 31, 32, 0xffffffff]) assert.ok(library().kv_level_set(level) < 0, `level ${level}`);
  const create = new Uint32Array(10).fill(0xffffffff);
  create[0] = 40;
  assert.ok(library().kv_contiguous_create(create, 40) < 0);
  assert.deepEqual(snapshot(cache, paged), before);
  assert.equal(systemInfo().liveCaches, live);
  cache.free();
  freePaged(paged);
});

test("a count shorter than the need is refused untouched, an empty one is no memory at all", () => {
  const cache = makeCache(), paged = makePaged();
  const before = snapshot(cache, paged);
  const counts: Partial<Record<Name, number[]>> = {
    kv_contiguous_config: [2],
    kv_contiguous_store: [4, 6],
    kv_contiguous_append: [4, 6],
    kv_contiguous_memory_bytes: [2],
    kv_contiguous_stats: [2],
    kv_contiguous_offset: [7],
    kv_contiguous_keys: [4],
    kv_contiguous_values: [4],
    kv_contiguous_views: [4],
    kv_contiguous_contiguous_kv: [5],
    kv_contiguous_gather: [4, 6],
    kv_contiguous_attend: [4, 6, 8, 10, 14, 16],
    kv_pool_stats: [4],
    kv_paged_config: [2, 4],
    kv_paged_append: [6, 8],
    kv_paged_attend: [6, 8, 10, 12, 16, 18],
    kv_paged_stats: [2],
    kv_paged_pool_stats: [5],
    kv_sequence_append: [3, 5],
    kv_sequence_contiguous_kv: [4],
    kv_sequence_gather: [3, 5],
    kv_sequence_attend: [3, 5, 7, 9, 13, 15],
    kv_buffer_pool_stats: [2],
    kv_buffer_info: [2],
  };
  for (const [name, indices] of Object.entries(counts) as [Name, number[]][]) {
    const optional = new Set(indices.slice(2));
    if (name.endsWith("_attend")) optional.delete(indices.at(-2)!); // the output
    for (const index of indices) {
      const full = goodArguments(handlesOf(cache, paged), paged)[name][index] as number;
      for (const count of [0, 1, full - 1]) {
        // Slopes, logits, lse and the layers of a config may be absent; everything else may not.
        const mayLack = (name.endsWith("_attend") && optional.has(index)) ||
          (name === "kv_paged_config" && index === 4);
        if (count === 0 && mayLack) continue;
        if (count === full) continue;
        const args = goodArguments(handlesOf(cache, paged), paged)[name];
        args[index] = count;
        if (count === 0) args[index - 1] = new Float32Array(0);
        const copies = copiesOf(args);
        assert.equal(call(name, args), STATUS.invalid_size, `${name} argument ${index} = ${count}`);
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
  const pool = call("kv_buffer_pool_create", [Uint32Array.of(16, 2, 2 ** 26, 0), 16]);
  const info = newRecord("buffer");
  for (const [bytes, capacity] of [[0, 256], [1025, 1024], [2 ** 18, 2 ** 16], [2 ** 24 + 1, 2 ** 22 + 1]] as const) {
    const buffer = call("kv_buffer_acquire", [pool, bytes]);
    assert.equal(call("kv_buffer_info", [buffer, info, 20]), 0);
    assert.deepEqual([info[1]! % 64, info[3], info[4]], [0, capacity, 0], `${bytes} bytes`);
    assert.ok(info[1]! + info[2]! > 0);
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
  const record = pagedRecord({
    layerCount: 2,
    blockSize: 4,
    maxSeqLen: 8,
    dtypeK: 0,
    dtypeV: 0,
    retentionTokens: 0,
    retentionSinkTokens: 0,
    maxBytes: 0,
    pool: 0,
    policy: { kind: 0, storeK: 0, storeV: 0, tailTokens: 0, sinkTokens: 0, maxLogitError: 0, queryNorm: 0 },
    measuresFidelity: false,
    rewindTokens: 0,
  });
  const first = [2, 4, 0, 0, 0], second = [3, 8, 5, 0, 0];
  for (const heads of [[], [6]]) {
    const words = Uint32Array.from([...first, ...heads, ...second, ...heads]);
    const handle = library().kv_paged_create(record, record.byteLength, words, words.length);
    assert.ok(handle > 0, `${handle}`);
    for (const length of [10, 12]) {
      const got = new Uint32Array(length);
      assert.equal(library().kv_paged_config(handle, record.slice(), record.byteLength, got, length), 0);
      const [known] = length === 10 ? [[]] : heads.length === 0 ? [[0]] : [heads];
      assert.deepEqual([...got], [...first, ...known!, ...second, ...known!]);
    }
    library().kv_paged_free(handle);
  }
  const words = Uint32Array.from([...first, ...second, 0]);
  assert.equal(library().kv_paged_create(record, record.byteLength, words, 11), STATUS.invalid_size);
});
