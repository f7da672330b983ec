/**
 * Random calls of the public API on paged caches: sequences that share blocks, blocks that come and go, and arrays over
 * them that are looked at long after.
 *
 * @module
 */

import {
  BlockPool,
  type DType,
  type KvErrorCode,
  type KvFormat,
  type LogitErrorOptions,
  PagedCache,
  type PagedCacheOptions,
  type Policy,
  type Sequence,
} from "../mod.ts";
import { ABSURD, type Dice, NO_COUNTS } from "./fuzz_dice.ts";

const DTYPES = ["f32", "f16", "bf16"] as const;
const FORMATS: readonly DType[] = [...DTYPES, "q8_0", "q4_0", "i8", "i4", "i2"];

/** A sequence and what it should say of itself. */
interface Stream {
  readonly sequence: Sequence;
  seqLen: number;
  /** [layer] */
  readonly pending: number[];
}

/** A cache with its sequences. */
interface Subject {
  readonly cache: PagedCache;
  readonly layerCount: number;
  readonly maxSeqLen: number;
  readonly evicts: boolean;
  /** Rows are appended in multiples of it: blocks that can be quantized are large. */
  readonly stride: number;
  readonly streams: Stream[];
}

/** An array that was handed out. Its subject is undefined once that was dropped. */
interface Held {
  readonly array: Float32Array | Uint16Array | Uint8Array;
  subject: Subject | undefined;
}

/** What any call on a sequence may be refused with. */
const CODES = "layer_out_of_range RangeError stale_handle";

/** Paged caches, and what was taken out of them. */
export class PagedFuzzer {
  /** Caches that were forgotten without being freed. */
  dropped = 0;
  readonly #dice: Dice;
  readonly #floats: Float32Array;
  readonly #subjects: Subject[] = [];
  readonly #held: Held[] = [];
  #pool: BlockPool;

  constructor(dice: Dice) {
    this.#dice = dice;
    this.#floats = dice.random.floats(8192);
    this.#pool = this.#makePool();
  }

  /** Is that the handle of a cache in use? Those of sequences are nobody's business. */
  owns(handle: number): boolean {
    return this.#subjects.some(({ cache }) => cache.handle === handle);
  }

  #makePool(): BlockPool {
    return new BlockPool({ layerCount: 2, kvHeadCount: 2, headDim: 4, blockSize: 4, dtype: "f32", maxBytes: 2 ** 16 });
  }

  /** One random call. */
  step(): void {
    const dice = this.#dice;
    const subject = this.#subjects.length > 0 ? dice.pick(this.#subjects) : undefined;
    const choice = dice.below(60);
    if (subject === undefined || choice < 2) return this.#create();
    const stream = subject.streams.length > 0 ? dice.pick(subject.streams) : undefined;
    if (stream === undefined || choice < 5) this.#branch(subject, stream);
    else if (choice < 20) this.#append(subject, stream);
    else if (choice < 26) this.#commit(subject, stream);
    else if (choice < 30) this.#truncate(subject, stream);
    else if (choice < 34) this.#attend(subject, stream);
    else if (choice < 36) dice.oneIn(2) ? this.#reorder(subject) : this.#updatePolicy(subject);
    else if (choice < 46) this.#hold(subject, stream);
    else if (choice < 52) this.#look();
    else if (choice < 55) this.#facts(subject, stream);
    else this.#give(subject, stream);
    if (this.#subjects.includes(subject)) this.#checkLengths(subject);
    if (this.#subjects.length > 3) this.#free(this.#subjects[0]!);
  }

  #create(): void {
    const dice = this.#dice;
    if (dice.oneIn(8)) {
      const pool = this.#pool;
      const codes = "pool_empty stale_handle invalid_config block_too_large RangeError";
      dice.attempt("pool.prewarm", codes, () => pool.prewarm(dice.index(40), dice.oneIn(2) ? this.#format() : "f32"));
      if (dice.oneIn(4)) {
        dice.attempt("pool.free", "", () => pool.free());
        dice.check(dice.attempt("pool after free", "stale_handle", () => pool.stats()) === undefined, "a freed pool");
        this.#pool = this.#makePool();
      }
    }
    const onPool = dice.oneIn(3), isQuantized = !onPool && dice.oneIn(2), isTiered = isQuantized || dice.oneIn(2);
    const blockSize = onPool ? 4 : isQuantized ? 64 : 1 << dice.below(4);
    const shape = onPool
      ? { layerCount: 2, kvHeadCount: 2, headDim: 4, blockSize, dtype: "f32" as const, pool: this.#pool }
      : {
        layerCount: 1 + dice.below(isQuantized ? 2 : 3),
        kvHeadCount: 1 + dice.below(isQuantized ? 2 : 3),
        headDim: isQuantized ? 32 : 1 + dice.below(12),
        blockSize,
        dtype: dice.pick(DTYPES),
        maxBytes: dice.oneIn(4) ? 4096 * (isQuantized ? 256 : 1) : dice.pick([2 ** 20, 2 ** 24]),
      };
    const stride = isQuantized ? 48 : 1;
    const tail = { tokens: blockSize * dice.below(3), sinkTokens: dice.oneIn(3) ? dice.below(2 * blockSize) : 0 };
    const store = isQuantized ? this.#format() : dice.pick(DTYPES);
    const options = {
      ...shape,
      ...(isTiered ? { tail, store } : {}),
      ...this.#measures(isTiered),
      maxSeqLen: (1 + dice.below(60)) * stride,
      ...(dice.oneIn(3)
        ? { retention: { keep: "newest" as const, tokens: (3 + dice.below(9)) * stride, sinkTokens: dice.below(3) } }
        : {}),
      ...(dice.oneIn(4) ? { windowTokens: 1 + dice.below(12 * stride) } : {}),
      ...(dice.oneIn(2) ? { rewindTokens: dice.below(10 * stride) } : {}),
    };
    if (dice.oneIn(10)) options[dice.pick(["layerCount", "headDim", "maxSeqLen"] as const)] = dice.pick(ABSURD);
    else if (dice.oneIn(20)) options[dice.pick(["kvHeadCount", "blockSize"] as const)] = dice.pick(NO_COUNTS);
    const codes = "invalid_config out_of_memory block_too_large stale_handle RangeError";
    const cache = dice.attempt("new paged", codes, () => new PagedCache(options));
    if (cache === undefined) return;
    if (cache.layerCount > 8 || cache.kvDim > 512) return cache.free(); // slow to keep books on
    const evicts = options.retention !== undefined || options.windowTokens !== undefined;
    const { layerCount, maxSeqLen } = cache;
    const subject: Subject = { cache, layerCount, maxSeqLen, evicts, stride, streams: [] };
    this.#subjects.push(subject);
    if (isTiered) this.#fill(subject);
  }

  /** Options of a cache that compares rows, or that should have. */
  #measures(isTiered: boolean): Partial<PagedCacheOptions> {
    const dice = this.#dice;
    if (dice.oneIn(2)) return dice.oneIn(20) ? { maxLogitError: 1 } : {};
    return { measureFidelity: true, ...(isTiered || dice.oneIn(20) ? this.#limits() : {}) };
  }

  /** Limits of a policy, some of which are none. */
  #limits(): LogitErrorOptions {
    const dice = this.#dice;
    if (dice.oneIn(2)) return dice.oneIn(20) ? { queryNorm: 1 } : {};
    const limit = () => dice.oneIn(20) ? dice.pick(ABSURD) : 10 ** (dice.below(9) - 5);
    return { maxLogitError: limit(), ...(dice.oneIn(2) ? { queryNorm: limit() } : {}) };
  }

  /** A sequence with rows enough for some of them to have left the tail. */
  #fill(subject: Subject): void {
    const { cache, layerCount, maxSeqLen, streams, stride } = subject;
    this.#branch(subject, undefined);
    const [stream] = streams;
    if (stream === undefined) return;
    const n = Math.min(maxSeqLen, 8 * stride), rows = this.#rows(n * cache.kvDim);
    for (let layer = 0; layer < layerCount; layer++) {
      const codes = "pool_empty out_of_memory";
      const done = this.#dice.attempt("paged append", codes, () => stream.sequence.append(layer, rows, rows));
      if (done === undefined) return;
      stream.pending[layer] = n;
    }
    this.#commit(subject, stream);
  }

  /** A new sequence, or a fork of one. */
  #branch(subject: Subject, parent: Stream | undefined): void {
    const dice = this.#dice;
    const isFork = parent !== undefined && dice.oneIn(2);
    const sequence = dice.attempt(
      isFork ? "fork" : "sequence",
      "out_of_memory",
      () => isFork ? parent.sequence.fork() : subject.cache.sequence(),
    );
    if (sequence === undefined) return;
    const seqLen = isFork ? parent.seqLen : 0;
    subject.streams.push({ sequence, seqLen, pending: new Array(subject.layerCount).fill(0) });
    if (subject.streams.length > 6) this.#end(subject, subject.streams[0]!);
  }

  #rows(length: number): Float32Array {
    const start = this.#dice.below(4096);
    return length <= 4096 ? this.#floats.subarray(start, start + length) : new Float32Array(length);
  }

  #layer(subject: Subject): number {
    return this.#dice.index(subject.layerCount);
  }

  #append(subject: Subject, stream: Stream): void {
    const dice = this.#dice;
    const { cache } = subject;
    const layer = this.#layer(subject);
    const codes = `${CODES} cache_full invalid_size pool_empty out_of_memory invalid_config`;
    if (dice.oneIn(4)) {
      const batch = subject.streams.filter(() => dice.oneIn(2));
      if (dice.oneIn(16) && batch.length > 0) batch.push(batch[0]!); // one of them twice
      const tokenCounts = batch.map(() => dice.below(5) * subject.stride);
      const n = tokenCounts.reduce((sum, count) => sum + count, 0);
      const k = this.#rows(n * cache.kvDim), v = this.#rows(n * cache.kvDim);
      const sequences = batch.map(({ sequence }) => sequence);
      const layout = dice.pick(["token_major", "head_major"] as const);
      const done = dice.attempt("batch append", codes, () => {
        cache.append(layer, k, v, { sequences, tokenCounts, layout });
        return true;
      });
      if (done) batch.forEach(({ pending }, i) => pending[layer]! += tokenCounts[i]!);
      return;
    }
    const n = dice.below(dice.oneIn(6) ? 16 : 4) * subject.stride;
    const length = n * cache.kvDim + (dice.oneIn(30) ? 1 : 0);
    const layout = dice.pick(["token_major", "head_major"] as const);
    const result = dice.attempt(
      "paged append",
      codes,
      () => stream.sequence.append(layer, this.#rows(length), this.#rows(length), { layout }),
    );
    if (result === undefined) return;
    dice.check(result.start === stream.seqLen + stream.pending[layer]!, "rows go behind those there are");
    stream.pending[layer]! += length / cache.kvDim;
    if (!dice.oneIn(8)) return;
    const views = dice.attempt("paged appended.views", "stale_view", () => result.views);
    for (const view of views ?? []) this.#keep(subject, dice.pick([view.k!, view.v!]));
  }

  #commit(subject: Subject, stream: Stream): void {
    const dice = this.#dice;
    const { pending, sequence } = stream;
    const most = Math.max(...pending);
    // The layers are made even, most of the time.
    if (!dice.oneIn(4)) {
      for (let layer = 0; layer < subject.layerCount; layer++) {
        const missing = (most - pending[layer]!) * subject.cache.kvDim;
        const rows = this.#rows(missing);
        const done = dice.attempt(
          "paged append",
          "pool_empty out_of_memory cache_full",
          () => sequence.append(layer, rows, rows),
        );
        if (done === undefined) return;
        pending[layer] = most;
      }
    }
    const isKept = dice.oneIn(4) && most > 0;
    const kept = Uint32Array.from({ length: most }, (_, i) => i).filter(() => dice.oneIn(2));
    const n = isKept ? kept.length : dice.oneIn(6) ? dice.index(5) : pending[0]!;
    const done = dice.attempt("paged commit", "commit_mismatch invalid_size RangeError", () => {
      sequence.commit(n, isKept ? { kept } : {});
      return true;
    });
    if (done === undefined || (n === 0 && !isKept)) return;
    const isEven = pending.every((rows) => rows === pending[0]);
    dice.check(isEven && (isKept || n === pending[0]), "a commit needs the rows in every layer");
    stream.seqLen += n;
    pending.fill(0);
  }

  #truncate(subject: Subject, stream: Stream): void {
    const dice = this.#dice;
    const n = dice.oneIn(6) ? dice.index(10) : dice.below(stream.seqLen + 1);
    const done = dice.attempt("paged truncate", "position_out_of_range RangeError", () => {
      stream.sequence.truncate(n);
      return true;
    });
    const { rewindableTo } = stream.sequence;
    dice.check(rewindableTo <= stream.sequence.seqLen, "a sequence may be as long as it is");
    if (done === undefined) {
      const isCount = Number.isInteger(n) && !Object.is(n, -0);
      dice.check(!isCount || n < rewindableTo || n > stream.seqLen, "a truncate to what is there is taken");
      return;
    }
    dice.check(n <= stream.seqLen, "truncate never adds rows");
    stream.seqLen = n;
    stream.pending.fill(0);
    if (dice.oneIn(16)) {
      dice.attempt("paged reset", "", () => subject.cache.reset());
      for (const each of subject.streams) {
        each.seqLen = 0;
        each.pending.fill(0);
      }
    }
  }

  #attend(subject: Subject, stream: Stream): void {
    const dice = this.#dice;
    const { cache } = subject;
    const layer = this.#layer(subject);
    const codes = `${CODES} invalid_size invalid_config not_finite unsupported position_out_of_range`;
    const into = dice.oneIn(2) ? { into: new Float32Array(dice.below(600)) } : {};
    const window = dice.oneIn(4) ? { windowTokens: dice.index(20) } : {};
    if (dice.oneIn(3)) {
      const batch = subject.streams.filter(() => dice.oneIn(2));
      const queryCounts = batch.map(() => dice.below(3));
      const n = queryCounts.reduce((sum, count) => sum + count, 0);
      const q = this.#rows(n * 2 * cache.kvDim);
      const sequences = batch.map(({ sequence }) => sequence);
      dice.attempt("batch attend", codes, () => cache.attend(layer, q, { sequences, queryCounts, ...into, ...window }));
      return;
    }
    const queryCount = 1 + dice.below(3);
    const tree = dice.oneIn(4)
      ? { treeParents: Int32Array.from({ length: queryCount }, (_, i) => dice.below(i + 2) - 1) }
      : {};
    const q = this.#rows(queryCount * 2 * cache.kvDim);
    dice.attempt(
      "paged attend",
      codes,
      () => stream.sequence.attend(layer, q, { queryCount, ...tree, ...into, ...window }),
    );
  }

  #reorder(subject: Subject): void {
    const dice = this.#dice;
    const beams = subject.streams.filter(() => dice.oneIn(2));
    const parents = beams.map(() => dice.oneIn(16) ? dice.pick(ABSURD) : dice.below(beams.length));
    const done = dice.attempt("reorder", "commit_mismatch invalid_config invalid_size", () => {
      subject.cache.reorder(beams.map(({ sequence }) => sequence), parents);
      return true;
    });
    if (done === undefined) return;
    const lengths = beams.map(({ seqLen }) => seqLen);
    beams.forEach((beam, i) => beam.seqLen = lengths[parents[i]!]!);
  }

  #format(): KvFormat {
    const dice = this.#dice;
    return dice.oneIn(2) ? dice.pick(FORMATS) : { k: dice.pick(FORMATS), v: dice.pick(FORMATS) };
  }

  #updatePolicy({ cache }: Subject): void {
    const dice = this.#dice;
    const store = cache.blockSize < 64 && dice.oneIn(2) ? dice.pick(DTYPES) : this.#format();
    const sinkTokens = dice.oneIn(2) ? 0 : dice.index(100);
    const policy = dice.pick<Policy>([
      { kind: "tail-only" },
      { kind: "store-only", store, sinkTokens, ...this.#limits() },
      {
        kind: "hybrid",
        tail: { tokens: dice.oneIn(8) ? dice.index(200) : cache.blockSize * dice.below(4), sinkTokens },
        store,
        ...this.#limits(),
      },
      { kind: "store-only" },
    ]);
    dice.attempt("updatePolicy", "invalid_config block_too_large out_of_memory RangeError", () => {
      cache.updatePolicy(policy);
      dice.check(cache.policy.kind === policy.kind || policy.kind === "hybrid", "a policy is what it was set to");
    });
  }

  #hold(subject: Subject, stream: Stream): void {
    const dice = this.#dice;
    const layer = this.#layer(subject);
    const { sequence } = stream;
    switch (dice.below(4)) {
      case 0: {
        const run = dice.attempt("paged contiguousKv", `${CODES} position_out_of_range`, () => {
          return sequence.contiguousKv(layer, dice.oneIn(2) ? dice.below(6) : undefined);
        });
        if (run?.ok) this.#keep(subject, run.k);
        return;
      }
      case 1: {
        const views = dice.attempt("packedViews", CODES, () => sequence.packedViews(layer));
        for (const view of views ?? []) this.#keep(subject, dice.pick([view.k, view.v]));
        return;
      }
      case 2: {
        const part = dice.oneIn(2) ? dice.partOfRows() : undefined;
        const codes = part === undefined ? CODES : `${CODES} position_out_of_range invalid_size RangeError`;
        const copy = dice.attempt(
          "paged gather",
          codes,
          () => sequence.gather(layer, { dtype: dice.pick(DTYPES), ...part }),
        );
        if (copy === undefined) return;
        dice.check(copy.v.length === copy.k.length, "both sides have equally many rows");
        const rows = part === undefined ? sequence.residentTokens(layer) : part.count;
        if (rows === undefined || part?.headStride !== undefined) return;
        dice.check(copy.k.length === rows * subject.cache.kvDim, "a copy has all rows");
        return;
      }
      default: {
        const views = dice.attempt("paged views", CODES, () => sequence.views(layer));
        if (views === undefined) return;
        const rows = views.reduce((sum, view) => sum + view.length, 0);
        dice.check(rows === sequence.residentTokens(layer), "views are all rows");
        for (const view of views) this.#keep(subject, dice.pick([view.k!, view.v!]));
        // Looked at again after something else happened to the sequence.
        if (!dice.oneIn(3)) return;
        dice.pick([
          () => this.#append(subject, stream),
          () => this.#truncate(subject, stream),
          () => this.#free(subject),
        ])();
        for (const view of views) {
          const array = dice.attempt("paged view", "stale_view", () => dice.pick([view.k!, view.v!]));
          if (array !== undefined) this.#read(array);
        }
      }
    }
  }

  #keep(subject: Subject, array: Float32Array | Uint16Array | Uint8Array): void {
    this.#held.push({ array, subject });
    if (this.#held.length > 48) this.#held.splice(this.#dice.below(48), 1);
  }

  /** Every element: one that is in memory that was given back ends the process. */
  #read(array: Float32Array | Uint16Array | Uint8Array): void {
    let sum = 0;
    for (let i = 0; i < array.length; i++) sum += array[i]!;
    this.#dice.check(typeof sum === "number", "an array has numbers");
  }

  #look(): void {
    if (this.#held.length === 0) return;
    const { array, subject } = this.#dice.pick(this.#held);
    if (subject !== undefined && subject.cache.handle === 0) {
      this.#dice.check(array.length === 0, "a freed cache's arrays are empty");
    }
    this.#read(array);
    if (array.length > 0 && this.#dice.oneIn(4)) array[this.#dice.below(array.length)] = NaN;
  }

  #facts(subject: Subject, stream: Stream): void {
    const dice = this.#dice;
    const { cache } = subject;
    dice.attempt("paged facts", "", () => {
      const { totalTokens, sequenceCount, usedBytes, reservedBytes, slackBytes, warmTokens, storeTokens } = cache
        .stats();
      dice.check(usedBytes <= reservedBytes && sequenceCount >= subject.streams.length, "stats add up");
      dice.check(slackBytes >= 0 && warmTokens <= storeTokens, "rows are in blocks");
      dice.check(cache.stats().compressionRatio > 0, "a ratio is a number");
      const tokens = subject.streams.reduce((sum, { seqLen }) => sum + seqLen, 0);
      if (!subject.evicts && sequenceCount === subject.streams.length) dice.check(totalTokens === tokens, "all tokens");
    });
    const layer = this.#layer(subject);
    const { sequence } = stream;
    const table = dice.attempt("blockTable", CODES, () => sequence.blockTable(layer));
    if (table !== undefined) {
      const references = sequence.blockReferences(layer);
      dice.check(references.every((count, i) => (count === 0) === (table[i] === -1)), "a block has references");
      const tiers = sequence.blockTiers(layer);
      dice.check(tiers.every((tier, i) => (tier === null) === (table[i] === -1)), "a block has a tier");
    }
    const format = dice.oneIn(2) ? this.#format() : undefined;
    const heads = dice.attempt("fidelity", `${CODES} unsupported`, () => cache.fidelity(layer));
    for (const { k, v, logitErrorBound, scaledQueryNormMax } of heads ?? []) {
      // NaN that was written through an array makes the mean NaN, too.
      dice.check(k.rows === v.rows && k.rows % cache.blockSize === 0, "blocks are compared whole");
      const isCosine = [k, v].every(({ cosineMin }) => Math.abs(cosineMin) <= 1 + 1e-9);
      const isError = [k.errorMax, v.errorMax, logitErrorBound, scaledQueryNormMax].every((error) => error >= 0);
      dice.check(isCosine && isError, "cosines and errors are in range");
    }
    if (heads !== undefined) dice.check(heads.length === cache.layerShape(layer).kvHeadCount, "every head is told of");
    dice.attempt("poolStats", `${CODES} invalid_config block_too_large`, () => cache.poolStats(layer, format));
    if (!dice.oneIn(4)) return;
    const attached = dice.attempt("attach paged", "", () => PagedCache.attach(cache.handle))!;
    const own = attached.sequence();
    dice.attempt("attached append", "pool_empty out_of_memory", () => {
      own.append(0, this.#rows(cache.kvDim), this.#rows(cache.kvDim));
      dice.check(
        dice.attempt("attached views", "unsupported", () => own.views(0)) === undefined,
        "no arrays for guests",
      );
    });
    dice.pick([() => attached.free(), () => own.free(), () => {}])();
  }

  /** Ends a cache or a sequence in one of the ways there are. */
  #give(subject: Subject, stream: Stream): void {
    const dice = this.#dice;
    const choice = dice.below(10);
    if (choice === 0) return this.#free(subject);
    if (choice === 1) {
      dice.attempt("drop paged", "", () => {});
      this.dropped += 1;
      this.#subjects.splice(this.#subjects.indexOf(subject), 1);
      for (const held of this.#held) if (held.subject === subject) held.subject = undefined;
      return;
    }
    if (choice < 4) {
      dice.attempt("drop sequence", "", () => {});
      subject.streams.splice(subject.streams.indexOf(stream), 1);
      return;
    }
    this.#end(subject, stream);
  }

  #end(subject: Subject, stream: Stream): void {
    const dice = this.#dice;
    const { sequence } = stream;
    subject.streams.splice(subject.streams.indexOf(stream), 1);
    dice.attempt("free sequence", "", () => sequence.free());
    this.#checkStale(sequence);
    sequence.free();
  }

  #checkStale(sequence: Sequence): void {
    const row = this.#rows(sequence.kvDim);
    const calls: (() => unknown)[] = [
      () => sequence.append(0, row, row),
      () => sequence.commit(0),
      () => sequence.truncate(0),
      () => sequence.gather(0),
      () => sequence.views(0),
      () => sequence.packedViews(0),
      () => sequence.contiguousKv(0),
      () => sequence.attend(0, row),
      () => sequence.fork(),
      () => sequence.blockTable(0),
      () => sequence.residentTokens(),
      () => sequence.seqLen,
    ];
    const code: KvErrorCode = "stale_handle";
    const done = this.#dice.attempt("paged after free", code, () => {
      this.#dice.pick(calls)();
      return true;
    });
    this.#dice.check(done === undefined, "a freed sequence does nothing");
  }

  #free(subject: Subject): void {
    if (!this.#subjects.includes(subject)) return;
    this.#dice.attempt("free paged", "", () => subject.cache.free());
    this.#subjects.splice(this.#subjects.indexOf(subject), 1);
    for (const { sequence } of subject.streams) this.#checkStale(sequence);
    const done = this.#dice.attempt("paged after free", "stale_handle", () => {
      this.#dice.pick([
        () => subject.cache.sequence(),
        () => subject.cache.stats(),
        () => subject.cache.fidelity(0),
        () => subject.cache.reset(),
      ])();
      return true;
    });
    this.#dice.check(done === undefined, "a freed cache does nothing");
  }

  #checkLengths({ streams, layerCount, maxSeqLen, evicts }: Subject): void {
    for (const { sequence, seqLen, pending } of streams) {
      this.#dice.check(sequence.seqLen === seqLen, `a sequence has ${sequence.seqLen} rows, not ${seqLen}`);
      const layer = this.#dice.below(layerCount);
      const rows = seqLen + pending[layer]!, resident = sequence.residentTokens(layer);
      const isRight = rows <= maxSeqLen && resident <= rows && (evicts || resident === rows);
      this.#dice.check(isRight, `layer ${layer} has ${resident} of ${rows} rows, and room for ${maxSeqLen}`);
    }
  }

  /** Gives everything up. */
  end(): void {
    for (const subject of [...this.#subjects]) this.#free(subject);
    this.#held.length = 0;
    this.#pool.free();
  }
}
