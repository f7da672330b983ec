/**
 * Calls nobody should make. Each ends in a typed error and changes nothing, or does what it says, and the process goes
 * on: through the C ABI with buffers in odd places, and through the public API with arrays and options that lie, change
 * their minds, or pull the ground away in the middle of a call.
 */

import assert from "node:assert/strict";
import { test } from "node:test";
import { runInNewContext } from "node:vm";
import { Worker } from "node:worker_threads";
import {
  type AttendOptions,
  ContiguousCache,
  type KvCache,
  KvError,
  type KvErrorCode,
  PagedCache,
  type Policy,
  readRate,
  type Rows,
  systemInfo,
} from "../mod.ts";
import { STATUS } from "../src/ffi/status.ts";
import { call, GEOMETRY, goodWords, kindsOf, type Name, names, recordOf, rolesOf, type Word } from "./abi_calls.ts";
import { assertCode } from "./cache_cases.ts";
import { runtime } from "./child.ts";
import { Random } from "./oracle.ts";
import type { Scribble } from "./scribble_worker.ts";

const { layerCount, sequenceCount, kvHeadCount, headDim, maxSeqLen } = GEOMETRY;
const KV_DIM = kvHeadCount * headDim;

/** A cache of `GEOMETRY` whose sequence 1 has 3 rows. */
function makeCache(): ContiguousCache {
  const cache = new ContiguousCache({ layerCount, sequenceCount, kvHeadCount, headDim, maxSeqLen });
  const random = new Random(1);
  for (const layer of [0, 1]) cache.append(layer, 1, random.floats(3 * KV_DIM), random.floats(3 * KV_DIM));
  cache.sequence(1).commit(3);
  return cache;
}

/** All rows and lengths. */
function snapshot(cache: ContiguousCache): unknown {
  return [0, 1].map((sequence) => [
    cache.getSeqLen(sequence),
    [0, 1].map((layer) => cache.sequence(sequence).gather(layer)),
  ]);
}

/** The call must throw a plain error of that class, not a KvError. */
function assertThrows(type: typeof TypeError | typeof RangeError, body: () => unknown, text?: RegExp): void {
  assert.throws(body, (error: unknown) => {
    assert.ok(error instanceof type && !(error instanceof KvError), `${error}`);
    if (text !== undefined) assert.match(error.message, text);
    return true;
  });
}

// deno-lint-ignore no-explicit-any
function anything(value: unknown): any {
  return value;
}

// The C ABI.

/** Exports whose effect a second call on the same cache would see. */
const CHANGES = /_(store|append|advance|reset|free|create)$/;

/** A cache for one call; `advance` needs a new row in each layer. */
function cacheFor(name: Name): ContiguousCache {
  const cache = makeCache();
  const row = new Float32Array(KV_DIM);
  if (name === "kv_contiguous_advance") { for (const layer of [0, 1]) cache.store(layer, 0, row, row); }
  return cache;
}

function bytesOf(words: readonly Word[]): number[][] {
  return words.filter((word) => typeof word !== "number")
    .map((buffer) => [...new Uint8Array(buffer.buffer, buffer.byteOffset, buffer.byteLength)]);
}

function freeCreated(name: Name, result: number): void {
  if (name.endsWith("_create") && result > 0) call("kv_contiguous_free", [result]);
}

test("a good call of every export is known, word by word", () => {
  for (const name of names) {
    for (const kind of kindsOf(name).length === 0 ? [undefined] : kindsOf(name)) {
      goodWords(name, {}, kind).forEach((word, i) => {
        const { is, name: parameter } = rolesOf(name)[i]!;
        assert.equal(typeof word === "number", is !== "buffer", `${name} ${parameter}`);
      });
    }
  }
});

/** The exports that take no handle but that of a contiguous cache; the others share their bodies' checks of buffers. */
const callable = names.filter((name) =>
  /^kv_(contiguous|abi|system|level|read|memory|rows|block)_/.test(name) ||
  (kindsOf(name).includes("contiguous") && !name.startsWith("kv_contiguous_"))
);

test("a buffer may begin at any address", () => {
  for (const name of callable) {
    for (const shift of [1, 2, 3]) {
      using first = cacheFor(name);
      using second = cacheFor(name);
      const words = goodWords(name, { contiguous: first.handle });
      const shifted = goodWords(name, { contiguous: (CHANGES.test(name) ? second : first).handle }).map((word) => {
        if (typeof word === "number") return word;
        const bytes = new Uint8Array(word.byteLength + shift).subarray(shift);
        bytes.set(new Uint8Array(word.buffer, word.byteOffset, word.byteLength));
        return bytes;
      });
      const expected = call(name, words), result = call(name, shifted);
      assert.ok(expected >= 0, `${name}: ${expected}`);
      freeCreated(name, expected);
      freeCreated(name, result);
      if (name.endsWith("_create")) continue; // two handles
      assert.equal(result, expected, name);
      if (name !== "kv_read_rate") assert.deepEqual(bytesOf(shifted), bytesOf(words), name);
      if (CHANGES.test(name) && !name.endsWith("_free")) assert.deepEqual(snapshot(second), snapshot(first), name);
    }
  }
});

test("any kind of buffer will do: views, shared, resizable and growable memory", () => {
  const memories = [
    (bytes: number) => new SharedArrayBuffer(bytes),
    (bytes: number) => new ArrayBuffer(bytes, { maxByteLength: bytes * 2 + 64 }),
    (bytes: number) => new SharedArrayBuffer(bytes, { maxByteLength: bytes * 2 + 64 }),
  ];
  for (const name of callable) {
    for (const memory of memories) {
      using cache = cacheFor(name);
      const words = goodWords(name, { contiguous: cache.handle }).map((word) => {
        if (typeof word === "number") return word;
        const bytes = new Uint8Array(memory(word.byteLength));
        bytes.set(new Uint8Array(word.buffer, word.byteOffset, word.byteLength));
        return word.byteLength % 4 === 0 && word.byteLength > 0 ? new DataView(bytes.buffer) : bytes;
      });
      const result = call(name, words);
      assert.ok(result >= 0, `${name}: ${result}`);
      freeCreated(name, result);
    }
  }
});

test("a detached buffer with a count is invalid_size, whichever it is, and no other is written", () => {
  using cache = makeCache();
  const before = snapshot(cache);
  for (const name of callable.filter((name) => name !== "kv_abi_manifest")) {
    rolesOf(name).forEach((role, index) => {
      if (role.is !== "buffer") return;
      const words = goodWords(name, { contiguous: cache.handle });
      const buffer = words[index] as Float32Array<ArrayBuffer>;
      if (buffer.byteLength === 0) return;
      const others = words.filter((_, i) => i !== index);
      const copies = bytesOf(others);
      buffer.buffer.transfer();
      assert.equal(call(name, words), STATUS.invalid_size, `${name} argument ${index}`);
      assert.deepEqual(bytesOf(others), copies, `${name} wrote something`);
    });
  }
  // The manifest tells its length to whoever has no room for it.
  const text = new Uint8Array(10_000);
  text.buffer.transfer();
  assert.ok(call("kv_abi_manifest", [text, 10_000]) > 0);
  assert.deepEqual(snapshot(cache), before);
});

test("what is no word is a TypeError or taken for a word, and ends nothing", () => {
  // Counts stay as they are: the ABI believes them. Deno refuses what Bun, and hot code in Deno, turn into a u32.
  const wrong = [NaN, -1, 2 ** 32, 1.5, -0, Infinity, undefined, null, "1", 5n, {}, [], true, Symbol.iterator];
  for (const name of callable.filter((name) => name !== "kv_read_rate")) {
    rolesOf(name).forEach((role, index) => {
      if (role.is === "count") return;
      for (const value of wrong) {
        // A number is a pointer to Bun and a string to Node, so neither is ever given for a buffer: TypeScript checks
        // what they are.
        if (role.is === "buffer" && /^(number|bigint|string)$/.test(typeof value)) continue;
        using cache = cacheFor(name);
        const words: unknown[] = goodWords(name, { contiguous: cache.handle });
        words[index] = value;
        let result: number;
        try {
          result = call(name, words);
        } catch (error) {
          assert.ok(error instanceof TypeError || error instanceof RangeError, `${name}: ${error}`);
          continue;
        }
        assert.ok(Number.isInteger(result) && result >= -19, `${name} argument ${index} ${String(value)}: ${result}`);
        freeCreated(name, result);
      }
    });
  }
});

// Arrays that are not what they seem.

/** Each takes an honest array and returns something with the same elements that lies about its length. */
const liars: readonly [name: string, (array: Float32Array) => Float32Array][] = [
  ["an own length", (array) => Object.defineProperty(array, "length", { value: 2 ** 30 })],
  ["a subclass with a length", (array) => {
    class Long extends Float32Array {
      override get length(): number {
        return 2 ** 30;
      }
    }
    return new Long(array);
  }],
  ["a length that grows with each look", (array) => {
    let length = 8;
    return Object.defineProperty(array, "length", { get: () => length *= 16 });
  }],
  ["own bytes and buffer", (array) =>
    Object.defineProperties(array, {
      byteLength: { value: 2 ** 30 },
      byteOffset: { value: 2 ** 20 },
      buffer: { value: new ArrayBuffer(0) },
      constructor: { value: Uint16Array },
    })],
];

for (const [name, lie] of liars) {
  test(`an array with ${name} counts for what it is`, () => {
    using cache = makeCache();
    const honest = makeCache();
    const random = new Random(2);
    const k = random.floats(KV_DIM), v = random.floats(KV_DIM), q = random.floats(KV_DIM);
    const [slopes, logits] = [random.floats(2), random.floats(2)];
    for (const layer of [0, 1]) {
      cache.store(layer, 0, lie(k.slice()), lie(v.slice()));
      honest.store(layer, 0, k, v);
    }
    cache.advance();
    honest.advance();
    const sequence = cache.sequence(1), truth = honest.sequence(1);
    for (const layer of [0, 1]) {
      assert.equal(sequence.append(layer, lie(k.slice()), lie(v.slice())).start, 3);
      truth.append(layer, k, v);
    }
    const tokens = Object.defineProperty(Uint32Array.of(1, 2), "length", { value: 1 });
    assertCode("invalid_size", () => sequence.commit(1, { tokens }));
    sequence.commit(1, { tokens: Object.defineProperty(Uint32Array.of(1), "length", { value: 2 }) });
    truth.commit(1);
    assert.deepEqual(snapshot(cache), snapshot(honest));
    const into = lie(new Float32Array(KV_DIM)), lse = lie(new Float32Array(2));
    sequence.attend(0, lie(q.slice()), {
      into,
      lse,
      alibiSlopes: lie(slopes.slice()),
      sinkLogits: lie(logits.slice()),
    });
    const expected = truth.attend(0, q, { alibiSlopes: slopes, sinkLogits: logits });
    assert.deepEqual(Float32Array.from(expected, (_, i) => into[i]!), expected);
    const side = () => lie(new Float32Array(4 * KV_DIM));
    sequence.gather(0, { into: { k: side(), v: side() } });
    assertCode("invalid_size", () => sequence.gather(0, { into: { k: lie(new Float32Array(1)), v: side() } }));
    assertCode("invalid_size", () => sequence.attend(0, q, { into: lie(new Float32Array(1)) }));
    assertCode("invalid_size", () => sequence.attend(0, q, { lse: lie(new Float32Array(1)) }));
    assertCode("invalid_size", () => sequence.append(0, lie(new Float32Array(3)), lie(new Float32Array(3))));
    honest.free();
  });
}

test("what only looks like a typed array is a TypeError", () => {
  using cache = makeCache();
  const sequence = cache.sequence(1);
  const row = new Float32Array(KV_DIM);
  const before = snapshot(cache);
  const loud = { get: () => assert.fail("asked"), getPrototypeOf: () => Float32Array.prototype };
  const fakes = [
    new Proxy(row, {}),
    new Proxy(row, loud),
    new Proxy({}, { getPrototypeOf: () => Float32Array.prototype }),
    Object.create(Float32Array.prototype),
    Object.create(row),
    Object.setPrototypeOf(new Float64Array(KV_DIM), Float32Array.prototype),
    Object.setPrototypeOf(new DataView(new ArrayBuffer(4 * KV_DIM)), Float32Array.prototype),
    { length: KV_DIM, [Symbol.toStringTag]: "Float32Array", buffer: row.buffer },
    Array.from(row),
    row.buffer,
    "0".repeat(KV_DIM),
    16,
    null,
  ];
  for (const fake of fakes) {
    const calls: (() => unknown)[] = [
      () => cache.store(0, 0, anything(fake), row),
      () => cache.store(0, 0, row, anything(fake)),
      () => cache.append(0, 0, anything(fake), anything(fake)),
      () => sequence.append(0, anything(fake), row),
      () => sequence.append(0, row, anything(fake)),
      () => sequence.attend(0, anything(fake)),
      () => sequence.attend(0, row, { into: anything(fake) }),
      () => sequence.attend(0, row, { lse: anything(fake) }),
      () => sequence.attend(0, row, { alibiSlopes: anything(fake) }),
      () => sequence.attend(0, row, { sinkLogits: anything(fake) }),
      () => sequence.gather(0, { into: { k: anything(fake), v: new Float32Array(3 * KV_DIM) } }),
      () => sequence.gather(0, { into: { k: new Float32Array(3 * KV_DIM), v: anything(fake) } }),
      () => sequence.commit(0, { tokens: anything(fake) }),
    ];
    for (const body of calls) assertThrows(TypeError, body);
  }
  assert.deepEqual(snapshot(cache), before);
});

test("an array of another realm is an array", () => {
  using cache = makeCache();
  const foreign = runInNewContext(`new Float32Array(${KV_DIM}).fill(2)`) as Float32Array;
  assert.ok(!(foreign instanceof Float32Array));
  cache.append(0, 0, foreign, foreign);
  assert.deepEqual([...cache.sequence(0).attend(0, foreign)], new Array(KV_DIM).fill(2));
});

test("an array whose buffer shrank is refused, one that grew counts whole", () => {
  using cache = makeCache();
  const sequence = cache.sequence(0);
  const buffer = new ArrayBuffer(4 * KV_DIM, { maxByteLength: 2 ** 20 });
  const fixed = new Float32Array(buffer, 0, KV_DIM), tracking = new Float32Array(buffer);
  const row = new Float32Array(KV_DIM);
  buffer.resize(2 ** 20);
  assertCode("cache_full", () => sequence.append(0, tracking, tracking));
  sequence.append(0, fixed, fixed);
  buffer.resize(4 * KV_DIM - 4);
  const before = snapshot(cache);
  assertThrows(TypeError, () => sequence.append(0, fixed, fixed), /k must not be detached/);
  assertThrows(TypeError, () => sequence.append(0, row, fixed), /v must not be detached/);
  assertThrows(TypeError, () => sequence.attend(0, fixed), /q must not be detached/);
  assertThrows(TypeError, () => sequence.attend(0, row, { into: fixed }), /into must not be detached/);
  assertThrows(TypeError, () => sequence.attend(0, row, { lse: fixed }), /lse must not be detached/);
  assertThrows(TypeError, () => sequence.gather(0, { into: { k: row, v: fixed } }), /into.v must not be detached/);
  assertCode("invalid_size", () => sequence.append(0, tracking, tracking));
  assert.deepEqual(snapshot(cache), before);
});

// Options that act.

/** What a getter among the options may do something to: a cache, one sequence of it with 3 rows, and the arguments. */
interface Scene {
  /** A contiguous cache, where it is one. */
  readonly cache?: ContiguousCache;
  readonly sequence: KvCache;
  /** Every array of the call, over memory that can be taken away or shrink. */
  readonly arrays: Float32Array[];
  /** Ends the cache. */
  readonly free: () => void;
  /** All lengths and rows. */
  readonly held: () => unknown;
}

/** One method with options: how it is called, and values for each option that it accepts. */
interface Method {
  readonly name: string;
  readonly call: (scene: Scene, options: unknown) => unknown;
  readonly options: Record<string, (scene: Scene) => unknown>;
}

const attendOptions: Record<keyof AttendOptions, (scene: Scene) => unknown> = {
  queryCount: () => 1,
  softmaxScale: () => 0.5,
  causal: () => true,
  windowTokens: () => 2,
  sinkTokens: () => 1,
  softcap: () => 10,
  alibiSlopes: () => new Float32Array(2),
  sinkLogits: () => new Float32Array(2),
  treeParents: () => undefined, // takes neither a window nor slopes beside it
  into: ({ arrays }) => arrays[2],
  lse: () => new Float32Array(2),
};

const append: Method = {
  name: "append",
  call: ({ sequence, arrays: [k, v] }, options) => sequence.append(0, k!, v!, anything(options)),
  options: { dtype: () => "f32", layout: () => "token_major" },
};

const gather: Method = {
  name: "gather",
  call: ({ sequence }, options) => sequence.gather(0, anything(options)),
  options: { dtype: () => "f32", into: ({ arrays: [, , k, v] }) => ({ k, v }) },
};

const gatherInto: Method = {
  name: "gather into",
  call: ({ sequence }, into) => sequence.gather(0, { into: anything(into) }),
  options: { k: ({ arrays }) => arrays[2], v: ({ arrays }) => arrays[3] },
};

const attend: Method = {
  name: "attend",
  call: ({ sequence, arrays: [q] }, options) => sequence.attend(0, q!, anything(options)),
  options: attendOptions,
};

const commit: Method = {
  name: "commit",
  call: ({ sequence }, options) => sequence.commit(0, anything(options)),
  options: { tokens: () => new Uint32Array(0) },
};

const store: Method = {
  name: "store",
  call: ({ cache, arrays: [k, v] }, options) => cache!.store(0, 1, k!, v!, anything(options)),
  options: { dtype: () => "f32" },
};

const keep: Method = {
  name: "commit kept",
  call: ({ sequence }, options) => sequence.commit(0, anything(options)),
  options: { tokens: () => new Uint32Array(0), kept: () => new Uint32Array(0) },
};

const batchAppend: Method = {
  name: "batch append",
  call: (scene, options) => batchOf(scene).append(0, scene.arrays[0]!, scene.arrays[1]!, anything(options)),
  options: {
    sequences: ({ sequence }) => [sequence],
    tokenCounts: () => [1],
    dtype: () => "f32",
    layout: () => "head_major",
  },
};

const batchAttend: Method = {
  name: "batch attend",
  call: (scene, options) => batchOf(scene).attend(0, scene.arrays[0]!, anything(options)),
  options: { ...attendOptions, sequences: ({ sequence }) => [sequence], queryCounts: () => [1] },
};
// A batch has its counts instead.
delete batchAttend.options.queryCount;
delete batchAttend.options.treeParents;

const batches = new WeakMap<Scene, PagedCache>();

function batchOf(scene: Scene): PagedCache {
  return batches.get(scene)!;
}

function heldBy(sequence: KvCache): unknown {
  return [sequence.seqLen, sequence.gather(0), sequence.gather(1)];
}

/** Two inputs of fixed length and two outputs that follow their buffers. */
function makeArrays(): Float32Array[] {
  const memory = (length: number) => new ArrayBuffer(4 * length, { maxByteLength: 2 ** 16 });
  const inputs = [0, 1].map(() => new Float32Array(memory(KV_DIM), 0, KV_DIM));
  const outputs = [0, 1].map(() => new Float32Array(memory(3 * KV_DIM)));
  return [...inputs, ...outputs];
}

function contiguousScene(): Scene {
  const cache = makeCache();
  return {
    cache,
    sequence: cache.sequence(1),
    arrays: makeArrays(),
    free: () => cache.free(),
    held: () => snapshot(cache),
  };
}

function pagedScene(options: { readonly blockSize?: number; readonly store?: "f16" } = {}): Scene {
  const shape = { layerCount, kvHeadCount, headDim, maxSeqLen, blockSize: 2, dtype: "f32" } as const;
  const cache = new PagedCache({ ...shape, ...options });
  const sequence = cache.sequence(), random = new Random(1);
  for (const layer of [0, 1]) sequence.append(layer, random.floats(3 * KV_DIM), random.floats(3 * KV_DIM));
  sequence.commit(3);
  const scene: Scene = {
    sequence,
    arrays: makeArrays(),
    free: () => cache.free(),
    held: () => heldBy(sequence),
  };
  batches.set(scene, cache);
  return scene;
}

/** All rows but pending ones have left the tail. */
function tieredScene(): Scene {
  return pagedScene({ blockSize: 1, store: "f16" });
}

/** Good options of a method, of which reading `acting` does `act` first; counts how often each is read. */
function actingOptions(method: Method, scene: Scene, acting: string, act: () => void): [object, Map<string, number>] {
  const reads = new Map<string, number>();
  const options = {};
  for (const [name, value] of Object.entries(method.options)) {
    const good = value(scene);
    Object.defineProperty(options, name, {
      enumerable: true,
      get() {
        reads.set(name, (reads.get(name) ?? 0) + 1);
        if (name === acting) act();
        return good;
      },
    });
  }
  return [options, reads];
}

function plainOptions(method: Method, scene: Scene): Record<string, unknown> {
  return Object.fromEntries(Object.entries(method.options).map(([name, value]) => [name, value(scene)]));
}

/** What another method does while an option is read: the same calls with other options. */
const inners: Record<string, (scene: Scene) => void> = {
  append: ({ sequence, arrays: [k, v] }) => void sequence.append(0, k!, v!),
  gather: ({ sequence }) => void sequence.gather(0),
  attend: ({ sequence, arrays: [q] }) => void sequence.attend(0, q!, { softmaxScale: 3, sinkTokens: 2 }),
  views: ({ sequence }) => void sequence.views(0).forEach((view) => view.k),
  truncate: ({ sequence }) => sequence.truncate(3),
  commit: ({ sequence }) => sequence.commit(0),
};

for (
  const [kind, makeScene, methods] of [
    ["contiguous", contiguousScene, [append, gather, gatherInto, attend, commit, store]],
    ["paged", () => pagedScene(), [append, gather, gatherInto, attend, commit, keep, batchAppend, batchAttend]],
    ["tiered", tieredScene, [append, gather, gatherInto, attend, commit, keep, batchAppend, batchAttend]],
  ] as const
) {
  for (const method of methods) {
    const name = `${kind} ${method.name}`;
    const each = (act: (scene: Scene) => void, check: (scene: Scene, body: () => unknown, option: string) => void) => {
      for (const option of Object.keys(method.options)) {
        const scene = makeScene();
        const [options] = actingOptions(method, scene, option, () => act(scene));
        check(scene, () => method.call(scene, options), option);
        scene.free();
      }
    };

    test(`${name}: each option is read once`, () => {
      const scene = makeScene();
      const [options, reads] = actingOptions(method, scene, "", () => {});
      method.call(scene, options);
      for (const option of Object.keys(method.options)) assert.equal(reads.get(option), 1, option);
      scene.free();
    });

    test(`${name}: an option that frees the cache makes the call stale`, () => {
      each(({ free }) => free(), (_, body) => assertCode("stale_handle", body));
    });

    if (method !== store) {
      test(`${name}: an option that frees the sequence makes the call stale`, () => {
        each(({ sequence }) => sequence.free(), ({ cache }, body) => {
          assertCode("stale_handle", body);
          if (cache) assert.deepEqual([cache.getSeqLen(1), cache.sequence(1).gather(0).k.length], [0, 0]);
        });
      });
    }

    if (method !== commit && method !== keep) {
      for (
        const [title, take] of [
          ["detaches", (buffer: ArrayBuffer) => buffer.transfer()],
          ["empties", (buffer: ArrayBuffer) => buffer.resize(0)],
          ["shrinks", (buffer: ArrayBuffer) => buffer.resize(8)],
        ] as const
      ) {
        test(`${name}: an option that ${title} the arrays of the call is an error`, () => {
          each(({ arrays }) => arrays.forEach((array) => take(array.buffer as ArrayBuffer)), (scene, body, option) => {
            const before = scene.held();
            assert.throws(body, (error: unknown) => {
              const isSize = error instanceof KvError && error.code === "invalid_size";
              assert.ok(error instanceof TypeError || (title !== "detaches" && isSize), `${option}: ${error}`);
              return true;
            });
            assert.deepEqual(scene.held(), before);
          });
        });
      }
    }

    test(`${name}: an option that calls the same method again, or another, disturbs nothing`, () => {
      for (const [inner, act] of Object.entries(inners)) {
        // The row that the inner call appends may be one too many for the outer one.
        const refusals = new Map<Method, KvErrorCode>([
          [gather, "invalid_size"],
          [gatherInto, "invalid_size"],
          [store, "commit_mismatch"],
          [keep, "commit_mismatch"],
        ]);
        const code = inner === "append" ? refusals.get(method) : undefined;
        each(act, (scene, body, option) => {
          const twin = makeScene();
          act(twin); // the same calls, one after the other
          if (code !== undefined) assertCode(code, body);
          else {
            const result = body(), expected = method.call(twin, plainOptions(method, twin));
            const values = (given: unknown) =>
              given instanceof Float32Array ? [...given.subarray(0, KV_DIM)] : undefined;
            assert.deepEqual(values(result), values(expected), `${option}, ${inner}`);
          }
          assert.deepEqual(scene.held(), twin.held(), `${option}, ${inner}`);
          twin.free();
        });
      }
    });

    test(`${name}: what an option throws comes out, and nothing has changed`, () => {
      const thrown = new Error("thrown by a getter");
      each(() => {
        throw thrown;
      }, (scene, body) => {
        const before = scene.held();
        assert.throws(body, (error: unknown) => error === thrown);
        assert.deepEqual(scene.held(), before);
      });
    });

    test(`${name}: options that are no object, or of the wrong types, are refused`, () => {
      const scene = makeScene();
      const before = scene.held();
      assertThrows(TypeError, () => method.call(scene, null));
      const numeric = { valueOf: () => assert.fail("asked"), toString: () => assert.fail("asked") };
      for (const option of Object.keys(method.options)) {
        for (const value of [null, numeric, Symbol("x"), () => 1, 5n, [numeric]]) {
          const options = { ...plainOptions(method, scene), [option]: value };
          assert.throws(() => method.call(scene, options), (error: unknown) => {
            // What has no length is no list of as many numbers as there are sequences.
            const isList = /^(token|query)Counts$/.test(option);
            const hasUnknownNames = option === "into" && value === numeric;
            const mayBeKvError = (isList || hasUnknownNames) && error instanceof KvError;
            assert.ok(error instanceof TypeError || mayBeKvError, `${option}: ${error}`);
            return true;
          });
        }
      }
      assert.deepEqual(scene.held(), before);
      scene.free();
    });
  }
}

test("options of a new cache are read once, whatever they do meanwhile", () => {
  using other = makeCache();
  const before = systemInfo().liveCaches;
  const good = { layerCount: 1, kvHeadCount: 1, headDim: 4, maxSeqLen: 4, sequenceCount: 2, maxBytes: 2 ** 20 };
  for (const acting of [...Object.keys(good), "dtype", "k"]) {
    const reads = new Map<string, number>();
    const spy = <T extends object>(target: T): T =>
      new Proxy(target, {
        get(from, name) {
          reads.set(String(name), (reads.get(String(name)) ?? 0) + 1);
          if (name === acting) other.reset();
          return Reflect.get(from, name);
        },
      });
    using cache = new ContiguousCache(spy({ ...good, dtype: spy({ k: "f16", v: "f32" } as const) }));
    assert.deepEqual([...reads.values()], new Array(10).fill(1));
    assert.deepEqual([cache.dtypeK, cache.dtypeV, cache.sequenceCount], ["f16", "f32", 2]);
  }
  assert.equal(systemInfo().liveCaches, before);
  const numeric = { valueOf: () => assert.fail("asked") };
  for (const name of Object.keys(good)) {
    assertThrows(TypeError, () => new ContiguousCache({ ...good, [name]: anything(numeric) }));
  }
});

test("limits of scores are read once, whatever they do meanwhile", () => {
  const shape = { layerCount: 1, kvHeadCount: 1, headDim: 32, maxSeqLen: 64 } as const;
  const good = { store: "q4_0", measureFidelity: true, maxLogitError: 0.5, queryNorm: 2 } as const;
  const policy: Policy = {
    kind: "store-only",
    store: { k: "q4_0", v: "q4_0" },
    sinkTokens: 0,
    maxLogitError: 0.5,
    queryNorm: 2,
  };
  const before = systemInfo().liveCaches;
  for (const acting of Object.keys(good)) {
    const reads = new Map<string, number>();
    const spy = <T extends object>(target: T, act: () => void): T =>
      new Proxy(target, {
        get(from, name) {
          reads.set(String(name), (reads.get(String(name)) ?? 0) + 1);
          if (name === acting) act();
          return Reflect.get(from, name);
        },
      });
    const other = new PagedCache({ ...shape, ...good });
    using cache = new PagedCache(spy({ ...shape, ...good }, () => other.free()));
    for (const name of Object.keys(good)) assert.equal(reads.get(name), 1, name);
    assert.deepEqual(cache.policy, policy);
    assertCode("stale_handle", () => other.fidelity(0));
    if (acting === "measureFidelity") continue; // no property of a policy
    reads.clear();
    cache.updatePolicy(spy(policy, () => cache.updatePolicy({ kind: "tail-only" })));
    assert.deepEqual([cache.policy, [...new Set(reads.values())]], [policy, [1]]);
    const thrown = new Error("thrown by a getter");
    const throws = () => {
      throw thrown;
    };
    for (
      const body of [
        () => new PagedCache(spy({ ...shape, ...good }, throws)),
        () => cache.updatePolicy(spy(policy, throws)),
      ]
    ) assert.throws(body, (error: unknown) => error === thrown);
    assertCode("stale_handle", () => cache.updatePolicy(spy(policy, () => cache.free())));
  }
  assert.equal(systemInfo().liveCaches, before);
});

test("a number that is no count is refused everywhere, -0 too", () => {
  using cache = makeCache();
  using paged = new PagedCache({ layerCount, kvHeadCount, headDim, maxSeqLen, measureFidelity: true });
  const sequence = cache.sequence(1);
  const row = new Float32Array(KV_DIM);
  const before = snapshot(cache);
  const calls: ((value: never) => unknown)[] = [
    (value) => cache.store(value, 0, row, row),
    (value) => cache.store(0, value, row, row),
    (value) => cache.append(value, 0, row, row),
    (value) => cache.append(0, value, row, row),
    (value) => cache.sequence(value),
    (value) => cache.getKeys(value, 0),
    (value) => cache.getValues(0, value),
    (value) => cache.getSeqLen(value),
    (value) => cache.offset(value, 0, 0, 0, 0),
    (value) => cache.offset(0, value, 0, 0, 0),
    (value) => cache.offset(0, 0, value, 0, 0),
    (value) => cache.offset(0, 0, 0, value, 0),
    (value) => cache.offset(0, 0, 0, 0, value),
    (value) => ContiguousCache.attach(value),
    (value) => sequence.append(value, row, row),
    (value) => sequence.commit(value),
    (value) => sequence.contiguousKv(value),
    (value) => sequence.gather(value),
    (value) => sequence.views(value),
    (value) => sequence.truncate(value),
    (value) => sequence.layerDevice(value),
    (value) => sequence.attend(value, row),
    (value) => sequence.attend(0, row, { queryCount: value }),
    (value) => sequence.attend(0, row, { windowTokens: value }),
    (value) => sequence.attend(0, row, { sinkTokens: value }),
    (value) => readRate({ bytes: 4096, threads: value }),
    (value) => paged.fidelity(value),
  ];
  const counter = { valueOf: () => assert.fail("asked") };
  for (const body of calls) {
    for (const value of [NaN, -1, 1.5, 2 ** 32, -0, Infinity, -Infinity, 2 ** 53]) {
      assertThrows(RangeError, () => body(value as never), /must be a whole number/);
    }
    for (const value of ["0", 0n, null, true, {}, [0], counter, Symbol("0")]) {
      assertThrows(TypeError, () => body(value as never));
    }
  }
  for (const value of [4096, 0.5, -1, NaN, "x", null]) {
    assert.throws(() => readRate({ bytes: anything(value), threads: 0 }));
  }
  assert.deepEqual(snapshot(cache), before);
});

test("attach() opens what is alive and nothing else, and an attached cache frees nothing", () => {
  const owner = makeCache();
  const { handle } = owner;
  const attached = ContiguousCache.attach(handle), second = ContiguousCache.attach(handle);
  attached.free();
  attached.free();
  assertCode("stale_handle", () => attached.getSeqLen(0));
  assert.equal(second.getSeqLen(1), 3);
  for (const wrong of [0, 1, handle + 1, handle ^ 0x00010000, handle | 0x80000000, 2 ** 32 - 1]) {
    assertCode("stale_handle", () => ContiguousCache.attach(wrong >>> 0));
  }
  owner.free();
  const calls: (() => unknown)[] = [
    () => second.getSeqLen(1),
    () => second.sequence(1),
    () => second.append(0, 1, new Float32Array(KV_DIM), new Float32Array(KV_DIM)),
    () => second.stats(),
    () => second.reset(),
    () => second.advance(),
    () => ContiguousCache.attach(handle),
  ];
  for (const body of calls) assertCode("stale_handle", body);
  second.free();
});

// Memory that is looked at, shared or written by others.

test("freeing in the middle of looking at views ends the looking", () => {
  for (const end of ["cache", "sequence"] as const) {
    const cache = makeCache();
    const sequence = cache.sequence(1);
    const held: (Float32Array | Uint16Array | Uint8Array)[] = [];
    let seen = 0;
    for (const view of [...sequence.views(0), ...sequence.views(1)]) {
      if (seen === 0) {
        held.push(view.k!, view.v!, cache.getKeys(1, 1));
        seen += 1;
        (end === "cache" ? cache : sequence).free();
      }
      for (const property of ["k", "v", "start", "length", "tier", "delta", "dtypeK", "headStride"] as const) {
        assertCode("stale_view", () => view[property]);
      }
    }
    for (const array of held) {
      assert.deepEqual([array.length, array.byteLength, array[0]], [0, 0, undefined]);
      assertThrows(TypeError, () => sequence.attend(0, array as Float32Array));
    }
    cache.free();
  }
});

test("a buffer with a transfer, detached and byteLength of its own is detached all the same", () => {
  const cache = makeCache();
  const keys = cache.getKeys(0, 1), values = cache.getValues(0, 1);
  for (const array of [keys, values]) {
    Object.defineProperties(array.buffer, {
      transfer: { value: () => assert.fail("asked") },
      detached: { value: array === keys },
      byteLength: { value: 0 },
    });
  }
  assert.equal(cache.getKeys(0, 1).buffer, keys.buffer);
  cache.free();
  assert.deepEqual([keys.length, values.length], [0, 0]);
});

test("NaN, infinities and any bits written through an array are attended and copied, and end nothing", () => {
  for (const dtype of ["f32", "f16", "bf16"] as const) {
    using cache = new ContiguousCache({ layerCount: 1, kvHeadCount: 2, headDim: 40, maxSeqLen: 200, dtype });
    const sequence = cache.sequence(0);
    const random = new Random(7);
    const rows = random.floats(130 * cache.kvDim);
    sequence.append(0, rows, rows);
    const arrays = [cache.getKeys(0, 0), cache.getValues(0, 0)];
    const q = random.floats(2 * cache.kvDim);
    for (let round = 0; round < 200; round++) {
      const array = arrays[round % 2]!;
      const bits = new Uint16Array(array.buffer, array.byteOffset, array.byteLength / 2);
      for (let i = 0; i < 100; i++) bits[random.below(bits.length)] = random.below(65536);
      const output = sequence.attend(0, q, {
        windowTokens: 1 + random.below(200),
        softcap: random.next() + 0.01,
        alibiSlopes: Float32Array.of(1, 2, 3, 4),
        lse: new Float32Array(4),
      });
      assert.equal(output.length, q.length);
      for (const copy of ["f32", "f16", "bf16"] as const) sequence.gather(0, { dtype: copy });
    }
    sequence.truncate(0);
    sequence.append(0, rows, rows);
    assert.ok(sequence.attend(0, q).every(Number.isFinite)); // nothing stuck
  }
});

test("a cache may read from its own arrays, overlapping ones too, and writes to none of them", () => {
  using cache = new ContiguousCache({ layerCount: 2, kvHeadCount: 1, headDim: 8, maxSeqLen: 64, dtype: "f32" });
  const sequence = cache.sequence(0);
  const random = new Random(8);
  const rows = random.floats(16 * 8);
  sequence.append(0, rows, rows);
  const keys = cache.getKeys(0, 0) as Float32Array, values = cache.getValues(0, 0) as Float32Array;
  sequence.append(0, keys, values); // behind themselves
  assert.deepEqual(sequence.gather(0).k, Float32Array.of(...rows, ...rows));
  const whole = new Float32Array(keys.buffer); // rows not yet written, too
  sequence.append(0, whole.subarray(4, 4 + 32 * 8), whole.subarray(4, 4 + 32 * 8)); // the source runs into its copy
  assert.deepEqual(sequence.gather(0).k.subarray(0, 32 * 8), Float32Array.of(...rows, ...rows));
  assertCode("cache_full", () => sequence.append(0, whole, whole));
  sequence.truncate(0);
  sequence.append(0, rows, rows);
  const run = { k: new Float32Array(keys.buffer), v: new Float32Array(values.buffer) };
  const elsewhere = new Float32Array(rows.length);
  for (
    const into of [run, { ...run, k: elsewhere }, { ...run, v: elsewhere }, { k: run.k.subarray(3), v: elsewhere }]
  ) {
    assertCode("invalid_config", () => sequence.gather(0, { into }));
  }
  assert.deepEqual(sequence.gather(0), { k: rows, v: rows });
  const q = random.floats(4 * 8);
  const expected = sequence.attend(0, q, { queryCount: 4 });
  const same = q.slice();
  assert.equal(sequence.attend(0, same, { queryCount: 4, into: same }), same);
  assert.deepEqual(same, expected);
  for (const shift of [1, 4, 7]) {
    const shared = new Float32Array(q.length + 8);
    shared.set(q);
    const options = { queryCount: 4, into: shared.subarray(shift), lse: shared.subarray(0, 4) };
    assertCode("invalid_config", () => sequence.attend(0, shared.subarray(0, q.length), options));
  }
  assertCode("invalid_config", () => sequence.attend(0, keys.subarray(0, 8), { into: values.subarray(0, 8) }));
  sequence.attend(0, keys.subarray(0, 8));
  assert.deepEqual(sequence.gather(0), { k: rows, v: rows });
});

/** Runs `body` while a Worker writes into `memory`. */
async function whileScribbling(
  memory: SharedArrayBuffer,
  words: number[] | undefined,
  body: () => void,
): Promise<void> {
  const stop = new SharedArrayBuffer(4);
  const workerData: Scribble = words === undefined ? { memory, stop } : { memory, stop, words };
  const worker = new Worker(new URL("./scribble_worker.ts", import.meta.url), { workerData });
  try {
    await new Promise((resolve, reject) => {
      worker.once("message", resolve);
      worker.once("error", reject);
    });
    body();
  } finally {
    Atomics.store(new Int32Array(stop), 0, 1);
    await worker.terminate();
  }
}

/**
 * Makes the calls again and again; refusals with `codes` are right. Calls are counted, not seconds: on a busy core the
 * other thread writes late, and the calls go on until it has been seen both ways.
 */
function callAgainAndAgain(codes: KvErrorCode[], calls: (() => void)[]): void {
  const counts = { ok: 0, refused: 0 };
  for (let round = 0; round < 2_000 || (round < 2_000_000 && !(counts.ok > 100 && counts.refused > 10)); round++) {
    for (const body of calls) {
      try {
        body();
        counts.ok += 1;
      } catch (error) {
        assert.ok(error instanceof KvError && codes.includes(error.code), `${error}`);
        counts.refused += 1;
      }
    }
  }
  assert.ok(counts.ok > 100 && counts.refused > 10, JSON.stringify(counts));
}

test("memory that another thread writes meanwhile is read as it comes", { timeout: 60_000 }, async () => {
  const memory = new SharedArrayBuffer(4 * 3 * 16 * 64);
  await whileScribbling(memory, undefined, () => {
    using cache = new ContiguousCache({ layerCount: 1, kvHeadCount: 2, headDim: 32, maxSeqLen: 256, dtype: "f16" });
    const sequence = cache.sequence(0);
    const rows = new Float32Array(memory), part = rows.length / 3;
    const [k, v, into] = [rows.subarray(0, part), rows.subarray(part, 2 * part), rows.subarray(2 * part)];
    callAgainAndAgain(["not_finite", "cache_full", "commit_mismatch", "invalid_config", "invalid_size"], [
      () => sequence.append(0, k.subarray(0, 64), v.subarray(0, 64)),
      () => void sequence.attend(0, k.subarray(0, 128), { into, lse: v, alibiSlopes: v.subarray(0, 4) }),
      () => void sequence.gather(0, { into: { k: rows, v: rows } }),
      () => cache.getSeqLen(0) > 200 ? sequence.truncate(0) : sequence.commit(1),
    ]);
  });
});

test("indices that another thread writes meanwhile are those that were checked", { timeout: 60_000 }, async () => {
  const memory = new SharedArrayBuffer(4 * 3);
  const words = [-1, -1, 0, 0, 0, 1, 1, 2, 2, 3, 63, 64, 1000, 2 ** 31 - 1];
  await whileScribbling(memory, words, () => {
    using cache = new PagedCache({ layerCount: 2, kvHeadCount: 2, headDim: 4, maxSeqLen: 4096, blockSize: 2 });
    const sequence = cache.sequence();
    const rows = new Float32Array(4 * KV_DIM).fill(1), q = new Float32Array(3 * KV_DIM).fill(0.5);
    const treeParents = new Int32Array(memory), kept = new Uint32Array(memory, 0, 2);
    callAgainAndAgain(["invalid_config", "invalid_size"], [
      () => {
        sequence.truncate(0);
        for (const layer of [0, 1]) sequence.append(layer, rows, rows);
        for (let i = 0; i < 20; i++) {
          try {
            sequence.attend(0, q, { queryCount: 3, treeParents });
          } catch { /* counted below */ }
        }
      },
      () => void sequence.attend(0, q, { queryCount: 3, treeParents }),
      () => sequence.commit(2, { kept }),
    ]);
  });
});

// More than there is.

const bigEnough = runtime !== "bun" && systemInfo().memoryLimitBytes >= 2 ** 34;
const unlessBig = bigEnough ? "" : " (skipped: it takes an array of 8 GiB, which Bun does not make)";

test(`an array of 2^32 elements and more does not pass for a short one${unlessBig}`, { skip: !bigEnough }, () => {
  using cache = new ContiguousCache({ layerCount: 1, kvHeadCount: 1, headDim: 1, maxSeqLen: 8, dtype: "f16" });
  const sequence = cache.sequence(0);
  const long = new Uint16Array(2 ** 32 + 4); // zero pages, never touched
  assertCode("invalid_size", () => sequence.append(0, long, long, { dtype: "f16" }), /less than 2\^32 elements/);
  assertCode("invalid_size", () => cache.store(0, 0, long, long, { dtype: "f16" }));
  const row = Uint16Array.of(0x3c00);
  sequence.append(0, row, row, { dtype: "f16" });
  sequence.gather(0, { dtype: "f16", into: { k: long, v: new Uint16Array(1) } });
  assert.equal(long[0], 0x3c00);
});

test("a cache past its limit changes nothing", () => {
  const before = systemInfo();
  const options = { layerCount: 4, kvHeadCount: 2, headDim: 64, maxSeqLen: 128 };
  for (const maxBytes of [1, 2 ** 19 - 1]) {
    assertCode("out_of_memory", () => new ContiguousCache({ ...options, maxBytes }), /limit of \d+ bytes/);
  }
  const after = systemInfo();
  assert.deepEqual([after.liveCaches, after.reservedBytes], [before.liveCaches, before.reservedBytes]);
  new ContiguousCache({ ...options, maxBytes: 2 ** 19 }).free();
});

test("a cache whose lengths alone would fill the machine is refused", () => {
  // Two bytes a row, and 8 bytes of lengths for each: they are written at once, so the system would end the process.
  const runs = Math.ceil(Math.sqrt(systemInfo().memoryLimitBytes / 40));
  const options = { kvHeadCount: 1, headDim: 1, maxSeqLen: 1, dtype: "f16", maxBytes: 2 ** 50 } as const;
  assertCode("out_of_memory", () => new ContiguousCache({ ...options, layerCount: runs, sequenceCount: runs }));
});

test("a rate over more memory than there is is refused", () => {
  const { memoryLimitBytes } = systemInfo();
  for (const bytes of [memoryLimitBytes + 1, 2 ** 40]) assertCode("out_of_memory", () => readRate({ bytes }));
  for (const bytes of [2 ** 40 + 1, 2 ** 53 - 1]) assertCode("invalid_config", () => readRate({ bytes }));
});

test("more caches than there are handles are out of memory, and all come back", { timeout: 60_000 }, () => {
  const before = systemInfo();
  const one = { layerCount: 1, sequenceCount: 1, kvHeadCount: 1, headDim: 1, maxSeqLen: 1 };
  const geometry = recordOf("contiguous", { ...GEOMETRY, ...one });
  const handles: number[] = [];
  let status = 0;
  while ((status = call("kv_contiguous_create", [geometry, geometry.byteLength])) > 0) handles.push(status);
  assert.equal(status, STATUS.out_of_memory);
  assertCode("out_of_memory", () => new ContiguousCache({ layerCount: 1, kvHeadCount: 1, headDim: 1, maxSeqLen: 1 }));
  // Every other one first: the memory between them is now in many pieces.
  for (const first of [0, 1]) {
    for (let i = first; i < handles.length; i += 2) assert.equal(call("kv_contiguous_free", [handles[i]!]), 0);
  }
  const after = systemInfo();
  // Sequences and pools of the tests before have handles, too. All are given back before anything is said of them.
  assert.ok(handles.length > 60_000 && handles.length <= 65535 - before.liveCaches, `${handles.length}`);
  assert.deepEqual([after.liveCaches, after.reservedBytes], [before.liveCaches, before.reservedBytes]);
});

test("more large caches than the system maps are out of memory, and the runtime lives", { timeout: 60_000 }, () => {
  const before = systemInfo();
  const options = { layerCount: 1, kvHeadCount: 1, headDim: 64, maxSeqLen: 8193 } as const; // 2 MiB and a bit a side
  const caches: ContiguousCache[] = [];
  const make = () => {
    for (;;) caches.push(new ContiguousCache(options));
  };
  assertCode("out_of_memory", make);
  assert.ok(caches.length > 4000 && caches.length <= 8192, `${caches.length}`);
  for (const first of [0, 1]) {
    for (let i = first; i < caches.length; i += 2) caches[i]!.free();
  }
  const row: Rows = new Float32Array(64);
  using cache = new ContiguousCache(options);
  cache.append(0, 0, row, row);
  assert.equal(systemInfo().liveCaches, before.liveCaches + 1);
});
