/**
 * What the parameters of each export are: enough to call every one of them well, and to call it badly on purpose.
 *
 * Names and words stand in `EXPORTS`. The ABI is told how long a buffer is and cannot check it, so whoever calls it badly
 * must still never say more than there is.
 */

import { ENUMS, EXPORTS, type Library, type Parameter, VALUES, wordsOf } from "../src/ffi/exports.ts";
import { library } from "../src/ffi/library.ts";
import { fieldsOf, newRecord, newRecords, recordOf, recordsOf, type Values, valuesOf } from "../src/ffi/record.ts";
import { runtime } from "./child.ts";

export { ENUMS, EXPORTS, fieldsOf, newRecord, recordOf, recordsOf, VALUES, type Values, valuesOf };

/** The name of an export. */
export type Name = keyof Library;

/** What crosses: a number, or a buffer. */
export type Word = number | ArrayBufferView;

/** All exports. */
export const names = Object.keys(EXPORTS) as Name[];

/** What a handle is of. */
export type Kind = "contiguous" | "paged" | "sequence" | "pool" | "buffer_pool" | "buffer";

/**
 * Handles to make good calls with: a contiguous cache of `GEOMETRY` whose sequence 1 has 3 rows; a paged one of the same
 * shape, with a sequence of 3 rows and an empty one; pools, and a buffer of a pool.
 */
export type Handles = Partial<Record<Kind | "empty", number>>;

/** A parameter of an export: a handle, the element count of the buffers before it, or what its word says. */
export interface Role {
  readonly name: string;
  readonly is: "handle" | "count" | "buffer" | "number";
  /** Bytes of the largest element of a buffer. */
  readonly unit: number;
}

const HANDLES = ["cache", "sequence", "pool", "buffer"];
const DOUBLES = ["rate", "bytes", "offset"];

/** The parameters of an export. */
export function rolesOf(name: Name): Role[] {
  const parameters: readonly Parameter[] = EXPORTS[name];
  const words = wordsOf(parameters), all = parameters.map((parameter) => parameter.split(" ")[0]!);
  return all.map((parameter, i) => {
    if (words[i] === "buffer") {
      const count = all.find((_, j) => j > i && words[j] !== "buffer")!;
      return {
        name: parameter,
        is: "buffer",
        unit: count.endsWith("_bytes") ? 1 : DOUBLES.includes(parameter) ? 8 : 4,
      };
    }
    if (words[i - 1] === "buffer") return { name: parameter, is: "count", unit: 0 };
    return { name: parameter, is: words[i] === "u32" && HANDLES.includes(parameter) ? "handle" : "number", unit: 0 };
  });
}

/** Where a parameter stands. */
export function indexOf(name: Name, parameter: string): number {
  const index = rolesOf(name).findIndex((role) => role.name === parameter);
  if (index < 0) throw new Error(`${name} has no parameter ${parameter}`);
  return index;
}

/** What the handle an export begins with may be of; nothing where it takes none. */
export function kindsOf(name: Name): readonly Kind[] {
  if (rolesOf(name)[0]?.is !== "handle") return [];
  if (name === "kv_attend") return ["contiguous", "paged"];
  if (name.startsWith("kv_sequence_create") || name.startsWith("kv_paged_")) return ["paged"];
  if (name.startsWith("kv_sequence_")) {
    return rolesOf(name)[1]?.name === "index" ? ["contiguous", "sequence"] : ["sequence"];
  }
  if (name === "kv_buffer_acquire" || name.startsWith("kv_buffer_pool_")) return ["buffer_pool"];
  if (name.startsWith("kv_buffer_")) return ["buffer"];
  return [name.startsWith("kv_pool_") ? "pool" : "contiguous"];
}

/**
 * Any export with any arguments. A detached buffer crosses as null: Deno and Bun do that by themselves, and Node would
 * refuse it before the ABI could.
 */
export function call(name: Name, words: readonly unknown[]): number {
  const crossing = runtime === "node" ? words.map((word) => isDetached(word) ? null : word) : words;
  return (library()[name] as (...words: unknown[]) => number)(...crossing);
}

function isDetached(word: unknown): boolean {
  return ArrayBuffer.isView(word) && word.buffer instanceof ArrayBuffer && word.buffer.detached;
}

/** What the contiguous cache is made of. */
export const GEOMETRY: Values<"contiguous"> = {
  layerCount: 2,
  sequenceCount: 2,
  kvHeadCount: 2,
  headDim: 4,
  maxSeqLen: 8,
  dtypeK: 0,
  dtypeV: 0,
  maxBytes: 0,
  qHeadCount: 0,
};

/** A layer of such heads. */
export const LAYER: Values<"layer"> = {
  kvHeadCount: GEOMETRY.kvHeadCount,
  headDim: GEOMETRY.headDim,
  windowTokens: 0,
  storeK: 0,
  storeV: 0,
  qHeadCount: 0,
};

/** A policy under which nothing migrates. */
export const TAIL_ONLY: Values<"policy"> = {
  policyKind: ENUMS.policyKind.tailOnly,
  policyStoreK: 0,
  policyStoreV: 0,
  policyTailTokens: 0,
  policySinkTokens: 0,
  policyMaxLogitError: 0,
  policyQueryNorm: 0,
};

/** What the paged cache is made of, but for its pool. */
export const PAGED: Values<"paged"> = {
  layerCount: GEOMETRY.layerCount,
  blockSize: 4,
  maxSeqLen: GEOMETRY.maxSeqLen,
  dtypeK: 0,
  dtypeV: 0,
  retentionTokens: 0,
  retentionSinkTokens: 0,
  maxBytes: 0,
  pool: 0,
  groupCount: 0,
  ...TAIL_ONLY,
  measuresFidelity: 1,
  rewindTokens: 4,
  prefixMode: ENUMS.prefixMode.kept,
  prefixTiers: ENUMS.prefixTiers.any,
  prefixMaxBytes: 0,
  prefixMaxBytesPerSalt: 0,
  prefixHasEvents: 1,
};

/** A pool for quantized blocks. */
export const POOL: Values<"pool"> = {
  layerCount: 2,
  kvHeadCount: 2,
  headDim: 32,
  blockSize: 64,
  dtypeK: ENUMS.dtype.f16,
  dtypeV: ENUMS.dtype.f16,
  maxBytes: 0,
};

/** An attend of causal queries. */
export const CAUSAL: Values<"attend"> = {
  flags: ENUMS.attendFlag.causal,
  softmaxScale: 0,
  windowTokens: 0,
  sinkTokens: 0,
  softcap: 0,
};

/** Room for a record that is longer than any: a caller of a later version. */
function later(): Uint32Array {
  return Uint32Array.from({ length: 32 }, (_, i) => i === 0 ? 128 : 0);
}

const row = () => Float32Array.from({ length: 8 }, (_, i) => i / 8 - 0.25);

/** Fresh good arguments by the name of a parameter; one that an export takes differently has the export before its name. */
const GOOD: Readonly<Record<string, (handles: Handles, kind: Kind | undefined) => Word>> = {
  index: (_, kind) => kind === "contiguous" ? 1 : 0,
  sequence_index: () => 1,
  layer: () => 1,
  position: () => 2,
  kv_head: () => 1,
  dim: () => 3,
  token_count: () => 0,
  seq_len: () => 2,
  has_salt: () => 1,
  priority: () => 35,
  ttl_ms: () => 1000,
  row_count: () => 2,
  start: () => 0,
  view_first: () => 0,
  group: () => 0,
  dtype: () => ENUMS.dtype.f32,
  "kv_rows_quantize dtype": () => ENUMS.dtype.q8_0,
  "kv_rows_dequantize dtype": () => ENUMS.dtype.q8_0,
  "kv_block_quantize dtype": () => ENUMS.dtype.q8_0,
  "kv_block_dequantize dtype": () => ENUMS.dtype.q8_0,
  "kv_block_pack dtype": () => ENUMS.dtype.q8_0,
  "kv_block_unpack dtype": () => ENUMS.dtype.q8_0,
  dtype_k: () => ENUMS.dtype.f32,
  dtype_v: () => ENUMS.dtype.f32,
  layout: () => ENUMS.layout.token_major,
  head_stride: () => 0,
  "kv_sequence_gather row_count": () => VALUES.allRows,
  side: () => ENUMS.side.values,
  block_size: () => 64,
  head_dim: () => 32,
  level: () => valuesOf("system", systemRecord()).level,
  bytes: () => 4096,
  "kv_max_bytes_set bytes": () => 0,
  thread_count: () => 1,
  block_count: () => 2,
  class_bytes: () => 4096,
  buffer_count: () => 2,
  "kv_buffer_pool_prewarm_all buffer_count": () => 0, // two of the largest are past the limit of a small pool

  text: () => new Uint8Array(library().kv_abi_manifest(new Uint8Array(0), 0)),
  system: later,
  stats: later,
  info: later,
  view: later,
  views: later,
  appended: later,
  explanation: later,
  events: () => new Uint32Array(64),
  options: later,
  "kv_memory_bytes options": () => recordOf("contiguous", GEOMETRY),
  "kv_contiguous_create options": () => recordOf("contiguous", GEOMETRY),
  "kv_pool_create options": () => recordOf("pool", POOL),
  "kv_paged_create options": () => recordOf("paged", PAGED),
  "kv_buffer_pool_create options": () => recordOf("bufferPool", { buffersPerClass: 4, maxBytes: 0 }),
  "kv_attend options": () => recordOf("attend", CAUSAL),
  layers: () => newRecords("layer", 2),
  "kv_paged_create layers": () => recordsOf("layer", [LAYER, LAYER]),
  policy: () => recordOf("policy", TAIL_ONLY),
  heads: () => newRecords("headFidelity", GEOMETRY.kvHeadCount),

  sequences: ({ empty = 0, sequence = 0 }) => Uint32Array.of(empty, sequence),
  "kv_attend sequences": ({ empty = 0, sequence = 0 }, kind) =>
    kind === "contiguous" ? Uint32Array.of(0, 1) : Uint32Array.of(empty, sequence),
  "kv_paged_reset kept": ({ empty = 0, sequence = 0 }) => Uint32Array.of(empty, sequence),
  kept: () => new Uint32Array(0),
  tokens: () => Uint32Array.of(1, 2, 3),
  "kv_sequence_commit_tokens tokens": () => new Uint32Array(0),
  "kv_sequence_commit_kept_tokens tokens": () => new Uint32Array(0),
  salt: () => Uint8Array.of(1),
  fingerprint: () => Uint8Array.of(2),
  token_counts: () => Uint32Array.of(1, 1),
  query_counts: () => Uint32Array.of(0, 1),
  parents: () => Uint32Array.of(1, 1),
  entries: () => new Int32Array(1),
  rate: () => new Float64Array(1),
  "kv_memory_bytes bytes": () => new Float64Array(1),
  "kv_contiguous_memory_bytes bytes": () => new Float64Array(1),
  offset: () => new Float64Array(1),

  k: row,
  v: row,
  "kv_paged_append k": () => new Float32Array(16),
  "kv_paged_append v": () => new Float32Array(16),
  "kv_sequence_gather k": () => new Float32Array(24),
  "kv_sequence_gather v": () => new Float32Array(24),
  values: row,
  q: () => Float32Array.from({ length: 8 }, (_, i) => i / 4 - 1),
  alibi_slopes: () => Float32Array.of(0.5, 0.25),
  sink_logits: () => Float32Array.of(0.5, -1),
  tree_parents: () => new Int32Array(0),
  output: () => new Float32Array(8),
  lse: () => new Float32Array(2),
  rows: () => Float32Array.from({ length: 64 * 32 }, (_, i) => i % 64 - 31),
  "kv_rows_quantize rows": () => Float32Array.from({ length: 64 }, (_, i) => i / 64),
  "kv_rows_dequantize rows": () => new Float32Array(64),
  records: () => new Uint8Array(64 * 34).fill(1),
  "kv_rows_quantize records": () => new Uint8Array(2 * 34).fill(1),
  "kv_rows_dequantize records": () => new Uint8Array(2 * 34).fill(1),
  plane: () => new Uint8Array(64 * 34).fill(1),
};

/** Arguments with which an export succeeds; `kind` is that of the handle it begins with. */
export function goodWords(name: Name, handles: Handles = {}, kind: Kind | undefined = kindsOf(name)[0]): Word[] {
  const words: Word[] = [];
  for (const role of rolesOf(name)) {
    if (role.is === "handle") words.push(handles[kind!] ?? 0);
    else if (role.is === "count") {
      const { byteLength } = words.at(-1) as ArrayBufferView;
      words.push(byteLength / rolesOf(name)[words.length - 1]!.unit);
    } else {
      const good = GOOD[`${name} ${role.name}`] ?? GOOD[role.name];
      if (good === undefined) throw new Error(`nothing good is known for ${role.name} of ${name}`);
      words.push(good(handles, kind));
    }
  }
  return words;
}

/** The same with some of them replaced, by the name of the parameter; the count of a new buffer is its own. */
export function wordsWith(words: readonly Word[], name: Name, changes: Readonly<Record<string, Word>>): Word[] {
  const changed = [...words];
  for (const [parameter, word] of Object.entries(changes)) {
    const index = indexOf(name, parameter);
    changed[index] = word;
    const { is, unit } = rolesOf(name)[index]!;
    const isCounted = rolesOf(name)[index + 1]?.is === "count" && !(`${rolesOf(name)[index + 1]!.name}` in changes);
    if (is === "buffer" && isCounted) changed[index + 1] = (word as ArrayBufferView).byteLength / unit;
  }
  return changed;
}

function systemRecord(): Uint32Array {
  const record = newRecord("system");
  library().kv_system_info(record, record.byteLength);
  return record;
}
