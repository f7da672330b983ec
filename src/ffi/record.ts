/**
 * Options and facts as the words of a record.
 *
 * A record is an array of 4-byte words whose first says its size in bytes, so that either side may know more fields
 * than the other. A 64-bit value is two words, low first. Only plain numbers here: what they mean is said by the files
 * that ask.
 *
 * @module
 */

/** Words in each record, as this module knows them. */
export const RECORD_WORDS = {
  contiguous: 11,
  system: 12,
  stats: 12,
  rows: 8,
  view: 18,
  attend: 7,
  pool: 9,
  poolStats: 22,
  paged: 21,
  policy: 8,
  pagedStats: 26,
  bufferPool: 4,
  bufferPoolStats: 21,
  buffer: 5,
} as const;

/** Flags of the AttendRecord: which of its fields count. */
export const ATTEND_FLAGS = { causal: 1, softmaxScale: 2, softcap: 4, window: 8 } as const;

/** Words of the ViewRecord. */
export const VIEW = {
  keys: 1,
  values: 3,
  start: 5,
  length: 6,
  dtypeK: 7,
  dtypeV: 8,
  tokenStride: 9,
  headStride: 10,
  tier: 11,
  delta: 12,
  generation: 13,
  blockSize: 14,
  reason: 15,
  bytesK: 16,
  bytesV: 17,
} as const;

/** The numbers of a ContiguousRecord. */
export interface ContiguousWords {
  readonly layerCount: number;
  readonly sequenceCount: number;
  readonly kvHeadCount: number;
  readonly headDim: number;
  readonly maxSeqLen: number;
  readonly dtypeK: number;
  readonly dtypeV: number;
  /** 0 is the default limit. */
  readonly maxBytes: number;
  /** 0 where the length of the queries tells. */
  readonly qHeadCount: number;
}

/** An AttendRecord: one memory, seen as words and as floats. */
export interface AttendRecord {
  readonly words: Uint32Array;
  readonly floats: Float32Array;
}

/** A fresh record with its size filled in; over an own ArrayBuffer, which Bun never moves. */
export function newRecord(kind: keyof typeof RECORD_WORDS): Uint32Array {
  const words = new Uint32Array(new ArrayBuffer(RECORD_WORDS[kind] * 4));
  words[0] = words.byteLength;
  return words;
}

/** A fresh AttendRecord. */
export function newAttendRecord(): AttendRecord {
  const words = newRecord("attend");
  return { words, floats: new Float32Array(words.buffer) };
}

/** The 64-bit value at `word`; exact up to 2^53. */
export function uint64At(record: Uint32Array, word: number): number {
  return record[word + 1]! * 2 ** 32 + record[word]!;
}

/** The two words of a 64-bit value, low first. */
function uint64Words(value: number): [low: number, high: number] {
  return [value % 2 ** 32, Math.floor(value / 2 ** 32)];
}

/** The f32 at `word`. */
function f32At(record: Uint32Array, word: number): number {
  return new Float32Array(record.buffer, record.byteOffset, record.length)[word]!;
}

/** The words of numbers that cross as f32. */
function f32Words(values: readonly number[]): Uint32Array {
  return new Uint32Array(Float32Array.from(values).buffer);
}

/** The numbers of a PoolRecord. */
export interface PoolWords {
  readonly layerCount: number;
  readonly kvHeadCount: number;
  readonly headDim: number;
  readonly blockSize: number;
  readonly dtypeK: number;
  readonly dtypeV: number;
  /** 0 is the default limit. */
  readonly maxBytes: number;
}

/** The numbers of a PagedRecord. */
export interface PagedWords {
  readonly layerCount: number;
  readonly blockSize: number;
  readonly maxSeqLen: number;
  readonly dtypeK: number;
  readonly dtypeV: number;
  /** 0 keeps all rows. */
  readonly retentionTokens: number;
  readonly retentionSinkTokens: number;
  /** 0 is the default limit. */
  readonly maxBytes: number;
  /** Handle of a pool; 0 for pools of its own. */
  readonly pool: number;
  readonly policy: PolicyWords;
  readonly measuresFidelity: boolean;
  readonly rewindTokens: number;
}

/** The numbers of a policy. */
export interface PolicyWords {
  /** 0 where nothing leaves the tail, 1 where old rows do. */
  readonly kind: number;
  /** One more than the number of a dtype; 0 for both where layers say their own. */
  readonly storeK: number;
  readonly storeV: number;
  readonly tailTokens: number;
  readonly sinkTokens: number;
  /** An f32; 0 for none. */
  readonly maxLogitError: number;
  /** An f32; 0 for the largest seen. */
  readonly queryNorm: number;
}

/** The BufferPoolRecord that says these; a limit of 0 is the default one. */
export function bufferPoolRecord(buffersPerClass: number, maxBytes: number): Uint32Array {
  const record = newRecord("bufferPool");
  record.set([buffersPerClass, ...uint64Words(maxBytes)], 1);
  return record;
}

/** The PoolRecord that says `pool`. */
export function poolRecord(pool: PoolWords): Uint32Array {
  const record = newRecord("pool");
  const { layerCount, kvHeadCount, headDim, blockSize, dtypeK, dtypeV, maxBytes } = pool;
  record.set([layerCount, kvHeadCount, headDim, blockSize, dtypeK, dtypeV, ...uint64Words(maxBytes)], 1);
  return record;
}

/** The PagedRecord that says `cache`. */
export function pagedRecord(cache: PagedWords): Uint32Array {
  const record = newRecord("paged");
  const { layerCount, blockSize, maxSeqLen, dtypeK, dtypeV, retentionTokens, retentionSinkTokens } = cache;
  const words = [layerCount, blockSize, maxSeqLen, dtypeK, dtypeV, retentionTokens, retentionSinkTokens];
  const rest = [cache.pool, 0, ...policyList(cache.policy), Number(cache.measuresFidelity), cache.rewindTokens];
  record.set([...words, ...uint64Words(cache.maxBytes), ...rest], 1);
  return record;
}

/** The PolicyRecord that says `policy`. */
export function policyRecord(policy: PolicyWords): Uint32Array {
  const record = newRecord("policy");
  record.set(policyList(policy), 1);
  return record;
}

function policyList(policy: PolicyWords): number[] {
  const { kind, storeK, storeV, tailTokens, sinkTokens, maxLogitError, queryNorm } = policy;
  return [kind, storeK, storeV, tailTokens, sinkTokens, ...f32Words([maxLogitError, queryNorm])];
}

/** What a PagedRecord says. */
export function pagedWords(record: Uint32Array): PagedWords {
  return {
    layerCount: record[1]!,
    blockSize: record[2]!,
    maxSeqLen: record[3]!,
    dtypeK: record[4]!,
    dtypeV: record[5]!,
    retentionTokens: record[6]!,
    retentionSinkTokens: record[7]!,
    maxBytes: uint64At(record, 8),
    pool: record[10]!,
    policy: {
      kind: record[12]!,
      storeK: record[13]!,
      storeV: record[14]!,
      tailTokens: record[15]!,
      sinkTokens: record[16]!,
      maxLogitError: f32At(record, 17),
      queryNorm: f32At(record, 18),
    },
    measuresFidelity: record[19] !== 0,
    rewindTokens: record[20]!,
  };
}

/** The ContiguousRecord that says `shape`. */
export function contiguousRecord(shape: ContiguousWords): Uint32Array {
  const record = newRecord("contiguous");
  record.set([
    record.byteLength,
    shape.layerCount,
    shape.sequenceCount,
    shape.kvHeadCount,
    shape.headDim,
    shape.maxSeqLen,
    shape.dtypeK,
    shape.dtypeV,
    ...uint64Words(shape.maxBytes),
    shape.qHeadCount,
  ]);
  return record;
}

/** What a ContiguousRecord says. */
export function contiguousWords(record: Uint32Array): ContiguousWords {
  return {
    layerCount: record[1]!,
    sequenceCount: record[2]!,
    kvHeadCount: record[3]!,
    headDim: record[4]!,
    maxSeqLen: record[5]!,
    dtypeK: record[6]!,
    dtypeV: record[7]!,
    maxBytes: uint64At(record, 8),
    qHeadCount: record[10]!,
  };
}
