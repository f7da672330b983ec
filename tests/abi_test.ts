/** The two tables agree, and no wrong call through the C ABI crashes, writes or changes anything. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { ContiguousCache, KvError, systemInfo } from "../mod.ts";
import { ABI_VERSION, EXPORTS, type Library } from "../src/ffi/exports.ts";
import { library } from "../src/ffi/library.ts";
import { newRecord, RECORD_WORDS } from "../src/ffi/record.ts";
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

function snapshot(cache: ContiguousCache): unknown {
  return [0, 1].map((
    sequence,
  ) => [cache.getSeqLen(sequence), [0, 1].map((layer) => cache.sequence(sequence).gather(layer))]);
}

/** Arguments with which every export that takes a handle succeeds on a test cache. */
function goodArguments(handle: number): Partial<Record<Name, Argument[]>> {
  const row = () => new Float32Array(8).fill(0.5);
  const view = () => newRecord("view"), rows = () => newRecord("rows");
  const attend = newRecord("attend");
  attend[1] = 1;
  return {
    kv_contiguous_config: [handle, newRecord("contiguous"), 40],
    kv_contiguous_store: [handle, 0, 0, row(), 8, row(), 8, 0],
    kv_contiguous_append: [handle, 0, 0, row(), 8, row(), 8, 0, 0],
    kv_contiguous_advance: [handle],
    kv_contiguous_reset: [handle],
    kv_contiguous_commit: [handle, 0, 0],
    kv_contiguous_truncate: [handle, 0, 0],
    kv_contiguous_seq_len: [handle, 1],
    kv_contiguous_row_count: [handle, 1, 1],
    kv_contiguous_generation: [handle, 1, 1],
    kv_contiguous_memory_bytes: [handle, new Float64Array(1), 1],
    kv_contiguous_stats: [handle, newRecord("stats"), 48],
    kv_contiguous_offset: [handle, 1, 1, 2, 1, 3, new Float64Array(1), 1],
    kv_contiguous_keys: [handle, 1, 1, rows(), 32],
    kv_contiguous_values: [handle, 1, 1, rows(), 32],
    kv_contiguous_views: [handle, 1, 1, view(), 56],
    kv_contiguous_contiguous_kv: [handle, 1, 1, 2, view(), 56],
    kv_contiguous_gather: [handle, 1, 1, new Float32Array(24), 24, new Float32Array(24), 24, 0],
    kv_contiguous_layer_device: [handle, 1],
    kv_contiguous_attend: [
      ...[handle, 1, 1, row(), 8, attend, 28, new Float32Array(2), 2, new Float32Array(2), 2],
      ...[new Float32Array(8), 8, new Float32Array(2), 2],
    ],
    kv_contiguous_free: [handle],
  };
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
  const writers: [keyof typeof RECORD_WORDS, (record: Uint32Array, bytes: number) => number][] = [
    ["system", (record, bytes) => library().kv_system_info(record, bytes)],
    ["contiguous", (record, bytes) => library().kv_contiguous_config(cache.handle, record, bytes)],
    ["stats", (record, bytes) => library().kv_contiguous_stats(cache.handle, record, bytes)],
    ["rows", (record, bytes) => library().kv_contiguous_keys(cache.handle, 0, 1, record, bytes)],
    ["rows", (record, bytes) => library().kv_contiguous_values(cache.handle, 0, 1, record, bytes)],
    ["view", (record, bytes) => library().kv_contiguous_views(cache.handle, 0, 1, record, bytes)],
    ["view", (record, bytes) => library().kv_contiguous_contiguous_kv(cache.handle, 0, 1, 2, record, bytes)],
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
      ...[cache.handle, 0, 1, q, 8, options, 28, none, 0, none, 0, output, 8, none, 0],
    ]);
    assert.equal(result, STATUS[status], `word ${word}`);
  }
  assert.deepEqual(output, new Float32Array(8).fill(9));
});

test("zero, stale, invented and other kinds' handles are stale_handle at every export", () => {
  const cache = makeCache();
  const freed = makeCache();
  const stale = freed.handle;
  freed.free();
  const before = snapshot(cache);
  const otherKind = (cache.handle & 0x0fffffff) | 0x20000000;
  const otherGeneration = cache.handle ^ 0x00010000;
  const otherEntry = cache.handle ^ 0x00008000;
  for (const wrong of [0, stale, otherKind, otherGeneration, otherEntry, 0x7fffffff, 0x80000000, 0xffffffff]) {
    for (const [name, args] of Object.entries(goodArguments(wrong)) as [Name, Argument[]][]) {
      const copies = args.map((arg) => typeof arg === "number" ? arg : structuredClone(arg));
      assert.equal(call(name, args), STATUS.stale_handle, `${name} with ${wrong}`);
      assert.deepEqual(args, copies, `${name} wrote something`);
    }
  }
  assert.deepEqual(snapshot(cache), before);
  cache.free();
});

test("every export that takes a handle works with the arguments the other tests break", () => {
  const covered = Object.keys(goodArguments(0));
  assert.deepEqual(covered.toSorted(), names.filter((name) => /^kv_contiguous_(?!create)/.test(name)).toSorted());
  for (const name of covered as Name[]) {
    const cache = makeCache();
    // One pending row in each layer, for advance().
    if (name === "kv_contiguous_advance") {
      for (const layer of [0, 1]) cache.store(layer, 0, new Float32Array(8), new Float32Array(8));
    }
    assert.ok(call(name, goodArguments(cache.handle)[name]!) >= 0, name);
    cache.free();
  }
});

test("absurd numbers at every place give a status, change nothing and write nothing", () => {
  const cache = makeCache();
  const before = snapshot(cache);
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
  };
  for (const [name, indices] of Object.entries(places) as [Name, number[]][]) {
    for (const index of indices) {
      for (const value of [9, 0x7fffffff, 0x80000000, 0xffffffff]) {
        const args = goodArguments(cache.handle)[name]!;
        const copies = args.map((arg) => typeof arg === "number" ? arg : structuredClone(arg));
        args[index] = value;
        assert.ok(call(name, args) < 0, `${name} argument ${index} = ${value}`);
        copies[index] = value;
        assert.deepEqual(args, copies, `${name} wrote something`);
      }
    }
  }
  for (const level of [0, 7, 31, 32, 0xffffffff]) assert.ok(library().kv_level_set(level) < 0, `level ${level}`);
  const create = new Uint32Array(10).fill(0xffffffff);
  create[0] = 40;
  assert.ok(library().kv_contiguous_create(create, 40) < 0);
  assert.deepEqual(snapshot(cache), before);
  assert.equal(systemInfo().liveCaches, live);
  cache.free();
});

test("a count shorter than the need is refused untouched, an empty one is no memory at all", () => {
  const cache = makeCache();
  const before = snapshot(cache);
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
    kv_contiguous_attend: [4, 6, 8, 10, 12, 14],
  };
  for (const [name, indices] of Object.entries(counts) as [Name, number[]][]) {
    for (const index of indices) {
      const full = goodArguments(cache.handle)[name]![index] as number;
      for (const count of [0, 1, full - 1]) {
        // Slopes, logits and lse may be absent; everything else may not.
        if (count === 0 && name === "kv_contiguous_attend" && index >= 8 && index !== 12) continue;
        if (count === full) continue;
        const args = goodArguments(cache.handle)[name]!;
        args[index] = count;
        if (count === 0) args[index - 1] = new Float32Array(0);
        const copies = args.map((arg) => typeof arg === "number" ? arg : structuredClone(arg));
        assert.equal(call(name, args), STATUS.invalid_size, `${name} argument ${index} = ${count}`);
        assert.deepEqual(args, copies, `${name} wrote something`);
      }
    }
  }
  for (const name of ["kv_contiguous_create", "kv_memory_bytes", "kv_system_info"] as const) {
    const args = name === "kv_memory_bytes" ? [new Uint8Array(0), 0, new Float64Array(1), 1] : [new Uint8Array(0), 0];
    assert.equal(call(name, args), STATUS.invalid_size, name);
  }
  assert.deepEqual(snapshot(cache), before);
  cache.free();
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

test("handles are 31 bits, never 0, and an entry comes back as late as can be", () => {
  const options = { layerCount: 1, kvHeadCount: 1, headDim: 1, maxSeqLen: 1 };
  const seen = new Set<number>();
  const caches = Array.from({ length: 20 }, () => new ContiguousCache(options));
  for (const cache of caches) {
    assert.ok(cache.handle > 0 && cache.handle < 2 ** 31);
    seen.add(cache.handle);
  }
  assert.equal(seen.size, 20);
  const handles = caches.map((cache) => cache.handle);
  for (const cache of caches) cache.free();
  // Twenty entries are free: the next cache takes the one freed first, with another generation.
  for (let i = 0; i < 1000; i++) {
    const cache = new ContiguousCache(options);
    assert.ok(!handles.includes(cache.handle), `handle ${cache.handle} came back after ${i}`);
    cache.free();
  }
});
