/** Names of options: an unknown one is refused by every call, with the nearest known one. */

import assert from "node:assert/strict";
import { test } from "node:test";
import {
  BlockPool,
  BufferPool,
  ContiguousCache,
  dequantizeBlock,
  dequantizeRows,
  memoryBytes,
  packBlock,
  PagedCache,
  type Policy,
  quantizeBlock,
  quantizeRows,
  readRate,
  unpackBlock,
} from "../mod.ts";
import { assertCode } from "./cache_cases.ts";

// Callers write JavaScript, too: the type checker would refuse most of what follows.
// deno-lint-ignore no-explicit-any
type Any = any;

const shape = { layerCount: 1, kvHeadCount: 1, headDim: 32, maxSeqLen: 256 };
const plane = { dtype: "q8_0", side: "k", blockSize: 64, headDim: 32 } as const;
const row = new Float32Array(32).fill(0.5);
const block = new Float32Array(64 * 32).fill(0.5);
const bytes = quantizeBlock(block, plane);
const records = quantizeRows(row, { dtype: "q8_0" });
const packed = quantizeRows(block, { dtype: "q8_0" });

const contiguous = new ContiguousCache(shape);
const paged = new PagedCache({ ...shape, store: "i4" });
const pool = new BlockPool({ layerCount: 1, kvHeadCount: 1, headDim: 32 });
const sequences = [paged.sequence()];
const options = { ...shape, blockSize: 64 };
const hybrid = { kind: "hybrid", tail: { tokens: 64 }, store: "i4" } as Policy;

/** Every object of options there is: what takes it, the action of a refusal, where it stands, and one that works. */
const CALLS: readonly (readonly [call: (given: Any) => unknown, action: string, path: string, good: object])[] = [
  [(given) => new ContiguousCache(given).free(), "create a cache", "", shape],
  [(dtype) => new ContiguousCache({ ...shape, dtype }).free(), "create a cache", "dtype", { k: "f16", v: "f32" }],
  [memoryBytes, "plan a cache", "", shape],
  [(given) => new PagedCache(given).free(), "create a cache", "", options],
  [(dtype) => new PagedCache({ ...shape, dtype }).free(), "create a cache", "dtype", { k: "f16", v: "f32" }],
  [(tail) => new PagedCache({ ...shape, store: "i4", tail }).free(), "create a cache", "tail", { tokens: 64 }],
  [(store) => new PagedCache({ ...shape, store }).free(), "create a cache", "store", { k: "i4", v: "i8" }],
  [(retention) => new PagedCache({ ...shape, retention }).free(), "create a cache", "retention", {
    keep: "newest",
    tokens: 64,
  }],
  [
    (layer) => new PagedCache({ maxSeqLen: 8, layers: [{ kvHeadCount: 1, headDim: 4 }, layer] }).free(),
    "create a cache",
    "layers[1]",
    {
      kvHeadCount: 1,
      headDim: 4,
    },
  ],
  [(given) => new BlockPool(given).free(), "create a pool", "", { layerCount: 1, kvHeadCount: 1, headDim: 4 }],
  [(format) => pool.prewarm(0, format), "prewarm blocks", "format", { k: "i4", v: "i8" }],
  [(format) => pool.stats(format), "count the blocks of a pool", "format", { k: "i4", v: "i8" }],
  [(given) => new BufferPool(given).free(), "create a buffer pool", "", { buffersPerClass: 2 }],
  [(given) => contiguous.append(0, 0, row, row, given), "append", "", { dtype: "f32" }],
  [(given) => contiguous.sequence(0).append(0, row, row, given), "append", "", { layout: "token_major" }],
  [(given) => contiguous.sequence(0).commit(0, given), "commit", "", { tokens: new Uint32Array(0) }],
  [(given) => contiguous.sequence(0).gather(0, given), "gather", "", { dtype: "f16" }],
  [(given) => contiguous.sequence(0).attend(0, row, given), "attend", "", { queryCount: 1, causal: true }],
  [(given) => sequences[0]!.append(0, row, row, given), "append", "", { dtype: "f32" }],
  [(given) => sequences[0]!.commit(0, given), "commit", "", { tokens: new Uint32Array(0) }],
  [(given) => sequences[0]!.gather(0, given), "gather", "", { dtype: "f16" }],
  [(into) => sequences[0]!.gather(0, { into }), "gather", "into", {
    k: new Float32Array(32 * 256),
    v: new Float32Array(32 * 256),
  }],
  [(given) => sequences[0]!.attend(0, row, given), "attend", "", { softcap: 1 }],
  [(given) => paged.append(0, row, row, given), "append", "", { sequences }],
  [(given) => paged.attend(0, row, given), "attend", "", { sequences }],
  [(format) => paged.poolStats(0, format), "count the blocks of layer 0", "format", { k: "i4", v: "i8" }],
  [(policy) => paged.updatePolicy(policy), "update the policy of a cache", "policy", hybrid],
  [(tail) => paged.updatePolicy({ kind: "hybrid", tail, store: "i4" }), "update the policy of a cache", "policy.tail", {
    tokens: 64,
  }],
  [(store) => paged.updatePolicy({ kind: "store-only", store }), "update the policy of a cache", "store", {
    k: "i4",
    v: "i4",
  }],
  [(given) => quantizeRows(row, given), "quantize rows", "", { dtype: "q8_0" }],
  [(given) => dequantizeRows(records, given), "dequantize rows", "", { dtype: "q8_0" }],
  [(given) => quantizeBlock(block, given), "quantize a block", "", plane],
  [(given) => dequantizeBlock(bytes, given), "dequantize a block", "", plane],
  [(given) => packBlock(packed, given), "pack a block", "", plane],
  [(given) => unpackBlock(bytes, given), "unpack a block", "", plane],
  [(given) => readRate(given), "measure the read rate", "", { bytes: 2 ** 20 }],
];

test("every call refuses an unknown name among its options, whatever the value, and changes nothing", () => {
  for (const [call, action, path, good] of CALLS) {
    call(good);
    const place = path === "" ? "" : `${path}.`;
    for (const value of [undefined, null, 1, {}]) {
      const rule = `Cannot ${action} as there is no option ${place}retrieval: known are `;
      assert.throws(() => call({ ...good, retrieval: value }), (error: Any) => {
        assert.equal(error.code, "invalid_config");
        assert.equal(error.message.slice(0, rule.length), rule);
        return true;
      });
    }
  }
});

test("every call refuses options that are no object", () => {
  for (const [call, action, path] of CALLS) {
    const place = path || "its options";
    const wrong = [[null, "null"], [[], "Array"], [new Float32Array(1), "Float32Array"]] as const;
    for (const [given, kind] of path === "dtype" || path === "store" || path === "format" ? wrong.slice(1) : wrong) {
      const message = `Cannot ${action} as ${place} must be an object: it is ${kind}`;
      assert.throws(() => call(given), { name: "TypeError", message });
    }
  }
});

test("the nearest known name is part of the text", () => {
  const message = (call: () => unknown) => {
    try {
      call();
    } catch (error) {
      return (error as Error).message;
    }
    throw new Error("not refused");
  };
  const sequence = sequences[0]!;
  assert.equal(
    message(() => new PagedCache({ ...shape, blocksize: 16 } as Any)),
    "Cannot create a cache as there is no option blocksize: did you mean blockSize?",
  );
  assert.equal(
    message(() => new PagedCache({ ...shape, store: "i4", tail: { token: 64 } } as Any)),
    "Cannot create a cache as there is no option tail.token: did you mean tail.tokens?",
  );
  assert.equal(
    message(() => sequence.attend(0, row, { windowToken: 1 } as Any)),
    "Cannot attend as there is no option windowToken: did you mean windowTokens?",
  );
  assert.equal(
    message(() => sequence.attend(0, row, { scale: 1 } as Any)),
    "Cannot attend as there is no option scale: did you mean softmaxScale?",
  );
  assert.equal(
    message(() => sequence.gather(0, { queryNorms: 3 } as Any)),
    "Cannot gather as there is no option queryNorms: known are layout, headStride, start, count, dtype, into",
  );
  assert.equal(
    message(() => memoryBytes({ ...shape, sequencecount: 3 } as Any)),
    "Cannot plan a cache as there is no option sequencecount: did you mean sequenceCount?",
  );
  assert.equal(
    message(() => sequence.append(0, row, row, { "lay\nout": 1 } as Any)),
    'Cannot append as there is no option "lay\\nout": did you mean layout?',
  );
  assert.equal(
    message(() => sequence.append(0, row, row, { ["x".repeat(1e6)]: 1 } as Any)),
    `Cannot append as there is no option ${"x".repeat(64)}...: known are dtype, layout, headStride`,
  );
});

test("names are alike by letters and by pairs of letters", () => {
  const expected = {
    layer: "layers",
    head_dim: "headDim",
    dytpe: "dtype",
    maxLen: "maxSeqLen",
    block_len: "blockSize",
    TAIL: "tail",
    maxByte: "maxBytes",
    rope: undefined,
    prefixes: "prefix",
    select: undefined,
    "": undefined,
    constructor: undefined,
  };
  for (const [name, nearest] of Object.entries(expected)) {
    const advice = nearest === undefined ? /: known are layerCount, / : new RegExp(`: did you mean ${nearest}\\?$`);
    assertCode("invalid_config", () => new PagedCache({ ...shape, [name]: 1 }), advice);
  }
});

test("inherited names count, those of every object and symbols do not, and no value is read before the names", () => {
  const sequence = sequences[0]!;
  assertCode("invalid_config", () => sequence.attend(0, row, Object.create({ windowToken: 1 })), /windowToken:/);
  assert.equal(sequence.gather(0, Object.create({ dtype: "f16" })).k.constructor, Uint16Array);
  sequence.attend(0, row, { [Symbol("mine")]: 1 } as Any);
  sequence.attend(0, row, Object.freeze(Object.assign(Object.create(null), { causal: true })));

  const everywhere = Object.prototype as Any;
  everywhere.extension = 1; // what some old libraries do
  try {
    sequence.attend(0, row, { causal: true });
    assertCode("invalid_config", () => sequence.attend(0, row, { extension: 1 } as Any), /extension:/);
  } finally {
    delete everywhere.extension;
  }

  let reads = 0;
  const read = () => ++reads;
  const watched = {
    get softcap() {
      return read();
    },
    get soft() {
      return read();
    },
  };
  assertCode("invalid_config", () => sequence.attend(0, row, watched as Any), /soft: did you mean softcap\?$/);
  assert.equal(reads, 0);
  sequence.attend(0, row, {
    get softcap() {
      return read();
    },
  } as Any);
  assert.equal(reads, 1);
  const trap = new Proxy({}, {
    ownKeys: () => {
      throw new Error("mine");
    },
  });
  assert.throws(() => sequence.attend(0, row, trap), { message: "mine" });
});
