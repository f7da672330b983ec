/**
 * Random calls of the public API, on up to eight caches at a time, beside a small model of their lengths.
 *
 * @module
 */

import {
  type AttendOptions,
  ContiguousCache,
  type FloatDType,
  type KvCache,
  KvError,
  type Rows,
  systemInfo,
} from "../mod.ts";
import { call } from "./abi_calls.ts";
import { ABSURD, type Dice, NO_COUNTS } from "./fuzz_dice.ts";

const DTYPES = ["f32", "f16", "bf16"] as const;

/** A cache and what it should say of itself. */
interface Subject {
  readonly cache: ContiguousCache;
  readonly layerCount: number;
  readonly sequenceCount: number;
  readonly kvDim: number;
  readonly maxSeqLen: number;
  /** [sequence] */
  readonly seqLens: number[];
  /** [layer][sequence] */
  readonly pending: number[][];
  /** Sequence objects that were handed out, and may have been freed since. */
  readonly sequences: KvCache[];
  /** Other objects on the same native cache. */
  readonly attached: ContiguousCache[];
}

/** Something that was handed out and kept. `subject` is undefined once its cache was dropped: then it keeps the memory. */
interface Held {
  readonly look: () => void;
  readonly array: Float32Array | Uint16Array | Uint8Array | undefined;
  subject: Subject | undefined;
}

/** Caches, and what was taken out of them. */
export class CacheFuzzer {
  /** Caches that were forgotten without being freed. */
  dropped = 0;
  readonly #dice: Dice;
  readonly #floats: Float32Array;
  readonly #halves: Float16Array;
  readonly #bits: Uint16Array;
  readonly #outputs = [new Float32Array(8192), new Float32Array(8192)] as const;
  readonly #subjects: Subject[] = [];
  readonly #freed: Subject[] = [];
  readonly #held: Held[] = [];

  constructor(dice: Dice) {
    this.#dice = dice;
    this.#floats = dice.random.floats(16384);
    this.#halves = Float16Array.from(this.#floats);
    this.#bits = Uint16Array.from(this.#floats, (value) => 0x3c00 + Math.floor(value * 512)); // finite as f16 and bf16
  }

  /** Is that the handle of a cache in use? */
  owns(handle: number): boolean {
    return this.#subjects.some(({ cache }) => cache.handle === handle);
  }

  /** One random call. */
  step(): void {
    const subject = this.#subjects.length > 0 ? this.#dice.pick(this.#subjects) : undefined;
    const choice = this.#dice.below(70);
    if (subject === undefined || choice < 3) return this.create();
    if (choice < 20) this.append(subject);
    else if (choice < 30) this.attend(subject);
    else if (choice < 35) this.store(subject);
    else if (choice < 38) this.advance(subject);
    else if (choice < 44) this.commit(subject);
    else if (choice < 47) this.truncate(subject);
    else if (choice < 50) this.gather(subject);
    else if (choice < 58) this.hold(subject);
    else if (choice < 64) this.lookAtHeld();
    else if (choice < 66) this.facts(subject);
    else if (choice < 67) this.attach(subject);
    else if (choice < 68) this.meddle(subject);
    else this.give(subject);
    if (this.#subjects.includes(subject)) this.checkLengths(subject);
    if (this.#subjects.length > 8) this.free(this.#subjects[0]!);
  }

  checkLengths(subject: Subject): void {
    const sequence = this.#dice.below(subject.sequenceCount), layer = this.#dice.below(subject.layerCount);
    const seqLen = subject.seqLens[sequence]!;
    this.#dice.check(subject.cache.getSeqLen(sequence) === seqLen, `sequence ${sequence} has ${seqLen} rows`);
    const rows = call("kv_sequence_row_count", [subject.cache.handle, sequence, layer]);
    const expected = seqLen + subject.pending[layer]![sequence]!;
    this.#dice.check(rows === expected, `layer ${layer} of sequence ${sequence} has ${rows} rows, not ${expected}`);
    this.#dice.check(expected <= subject.maxSeqLen, "more rows than there is room for");
  }

  create(): void {
    const options = {
      layerCount: 1 + this.#dice.below(3),
      kvHeadCount: 1 + this.#dice.below(3),
      headDim: this.#dice.oneIn(8) ? 1 + this.#dice.below(256) : 1 + this.#dice.below(12),
      maxSeqLen: 1 + this.#dice.below(this.#dice.oneIn(16) ? 5000 : 40),
      sequenceCount: 1 + this.#dice.below(3),
      dtype: this.#dice.oneIn(2) ? this.#dice.pick(DTYPES) : { k: this.#dice.pick(DTYPES), v: this.#dice.pick(DTYPES) },
      maxBytes: this.#dice.oneIn(8) ? 1 + this.#dice.below(4096) : 2 ** 26,
    };
    const name = this.#dice.pick(["layerCount", "kvHeadCount", "headDim", "maxSeqLen", "sequenceCount"] as const);
    if (this.#dice.oneIn(6)) options[name] = this.#dice.pick(ABSURD);
    else if (this.#dice.oneIn(20)) options[name] = this.#dice.pick(NO_COUNTS);
    const cache = this.#dice.attempt(
      "new",
      "invalid_config out_of_memory RangeError",
      () => new ContiguousCache(options),
    );
    if (cache === undefined) return;
    const { layerCount, sequenceCount, kvDim, maxSeqLen } = cache;
    this.#dice.check(
      cache.handle > 0 && kvDim === options.kvHeadCount * options.headDim,
      "a cache has the shape it was given",
    );
    // A large one is nothing but a reservation here; it would be slow to keep books on.
    if (layerCount * sequenceCount > 64 || kvDim > 1024) return cache.free();
    this.#subjects.push({
      cache,
      layerCount,
      sequenceCount,
      kvDim,
      maxSeqLen,
      seqLens: new Array(sequenceCount).fill(0),
      pending: Array.from({ length: layerCount }, () => new Array(sequenceCount).fill(0)),
      sequences: [],
      attached: [],
    });
  }

  isIndex(value: number, end: number): boolean {
    return Number.isInteger(value) && !Object.is(value, -0) && value >= 0 && value < end;
  }

  /** `length` elements of one of the kinds that carry rows, and the dtype that goes with them. */
  rows(length: number, kind: number): Rows {
    const start = this.#dice.below(8192);
    if (length > 8192) return new Float32Array(length);
    if (kind === 0) return this.#floats.subarray(start, start + length);
    if (kind === 1) return this.#halves.subarray(start, start + length);
    return this.#bits.subarray(start, start + length);
  }

  /** The same elements in a place of another kind; `take` loses the memory, or shrinks it. */
  place(rows: Rows): Rows {
    if (!(rows instanceof Float32Array)) return rows;
    switch (this.#dice.below(6)) {
      case 0: {
        const copy = new Float32Array(new SharedArrayBuffer(rows.byteLength));
        copy.set(rows);
        return copy;
      }
      case 1: {
        const copy = new Float32Array(new ArrayBuffer(rows.byteLength, { maxByteLength: rows.byteLength + 64 }));
        copy.set(rows);
        return copy;
      }
      case 2: {
        const copy = rows.slice();
        copy[this.#dice.below(copy.length + 1)] = this.#dice.pick([NaN, Infinity, -Infinity, 1e38, 65520, -0, 1e-45]);
        return copy;
      }
      case 3: {
        const copy = rows.slice();
        if (this.#dice.oneIn(3)) copy.buffer.transfer();
        return copy;
      }
      default:
        return rows;
    }
  }

  append(subject: Subject): void {
    const { cache, kvDim, maxSeqLen } = subject;
    const layer = this.#dice.index(subject.layerCount), sequence = this.#dice.index(subject.sequenceCount);
    const n = this.#dice.below(this.#dice.oneIn(8) ? 20 : 4);
    const kind = this.#dice.oneIn(2) ? 0 : this.#dice.below(3);
    let k = this.rows(n * kvDim + (this.#dice.oneIn(20) ? this.#dice.below(3) : 0), kind),
      v = this.rows(k.length, kind);
    if (this.#dice.oneIn(4)) [k, v] = [this.place(k), this.place(v)];
    if (this.#dice.oneIn(40)) v = this.rows(n * kvDim, this.#dice.below(3));
    const options = {
      ...(kind === 2 && !this.#dice.oneIn(20) ? { dtype: this.#dice.pick(["f16", "bf16"] as const) } : {}),
      ...(this.#dice.oneIn(20)
        ? { dtype: this.#dice.pick(["f16", "bf16", "f32", "q8_0" as FloatDType] as const) }
        : {}),
      ...(this.#dice.oneIn(3) ? { layout: this.#dice.pick(["token_major", "head_major"] as const) } : {}),
    };
    const codes = "layer_out_of_range sequence_out_of_range cache_full invalid_size not_finite invalid_config " +
      "RangeError TypeError";
    const target = this.#dice.oneIn(4) ? this.sequenceOf(subject) : undefined;
    const through = this.#dice.oneIn(8) && subject.attached.length > 0 ? this.#dice.pick(subject.attached) : cache;
    if (target !== undefined) {
      const result = this.#dice.attempt(
        "sequence.append",
        `${codes} stale_handle`,
        () => target.append(layer, k, v, options),
      );
      if (result !== undefined) {
        this.appended(subject, layer, subject.sequences.indexOf(target), k.length / kvDim, result);
      }
      return;
    }
    const result = this.#dice.attempt(
      "append",
      `${codes} stale_handle`,
      () => through.append(layer, sequence, k, v, options),
    );
    if (result === undefined) return;
    this.#dice.check(
      this.isIndex(layer, subject.layerCount) && this.isIndex(sequence, subject.sequenceCount),
      "out of range",
    );
    this.#dice.check(result.start <= maxSeqLen, "start is in the cache");
    this.note(subject, layer, sequence, k.length / kvDim, result.start);
    if (this.#dice.oneIn(16) && through === cache) {
      this.keep({
        subject,
        array: undefined,
        look: () => {
          this.#dice.attempt("appended.views", "stale_view stale_handle", () => result.views.length);
        },
      });
    }
  }

  /** A sequence object; it remembers which it is by its place among those of the subject. */
  sequenceOf(subject: Subject): KvCache | undefined {
    if (subject.sequences.length < subject.sequenceCount) {
      subject.sequences.push(subject.cache.sequence(subject.sequences.length));
    }
    return this.#dice.pick(subject.sequences);
  }

  appended(subject: Subject, layer: number, sequence: number, n: number, { start }: { start: number }): void {
    this.note(subject, layer, sequence, n, start);
  }

  note(subject: Subject, layer: number, sequence: number, n: number, start: number): void {
    const pending = subject.pending[layer]!;
    this.#dice.check(start === subject.seqLens[sequence]! + pending[sequence]!, `start is ${start}`);
    pending[sequence]! += n;
  }

  store(subject: Subject): void {
    const { cache, kvDim } = subject;
    const layer = this.#dice.index(subject.layerCount), sequence = this.#dice.index(subject.sequenceCount);
    const length = this.#dice.oneIn(16) ? this.#dice.below(2 * kvDim) : kvDim;
    let k = this.rows(length, 0), v = this.rows(length, 0);
    if (this.#dice.oneIn(4)) [k, v] = [this.place(k), this.place(v)];
    const codes = "layer_out_of_range sequence_out_of_range cache_full invalid_size commit_mismatch not_finite " +
      "RangeError TypeError";
    const done = this.#dice.attempt("store", codes, () => {
      cache.store(layer, sequence, k, v);
      return true;
    });
    if (done === undefined) return;
    const pending = subject.pending[layer]!;
    this.#dice.check(pending[sequence] === 0 && subject.seqLens[sequence]! < subject.maxSeqLen, "one row at a time");
    pending[sequence] = 1;
  }

  advance(subject: Subject): void {
    const { seqLens, pending, maxSeqLen } = subject;
    // A whole step in one sequence, or what there happens to be.
    if (this.#dice.oneIn(2)) {
      const sequence = this.#dice.below(subject.sequenceCount);
      const row = this.rows(subject.kvDim, 0);
      for (let layer = 0; layer < subject.layerCount; layer++) {
        if (pending[layer]![sequence] !== 0 || seqLens[sequence] === maxSeqLen) continue;
        subject.cache.store(layer, sequence, row, row);
        pending[layer]![sequence] = 1;
      }
    }
    const perSequence = seqLens.map((_, sequence) => {
      const rows = pending.map((layer) => layer[sequence]!);
      return rows.every((n) => n === rows[0]) ? rows[0]! : -1;
    });
    const isValid = perSequence.every((n) => n === 0 || n === 1) && perSequence.includes(1);
    let full = false;
    const done = this.#dice.attempt("advance", "cache_full commit_mismatch", () => {
      try {
        subject.cache.advance();
      } catch (error) {
        full = error instanceof KvError && error.code === "cache_full";
        if (!(full && isValid)) throw error; // full after committing is an answer, too
      }
      return true;
    });
    this.#dice.check((done === true) === isValid, "advance commits one row of each");
    if (done === undefined) return;
    perSequence.forEach((n, sequence) => {
      seqLens[sequence]! += n;
      for (const layer of pending) layer[sequence] = 0;
    });
    this.#dice.check(
      full === seqLens.some((length, i) => length === maxSeqLen && perSequence[i] === 1),
      "full is said when it is",
    );
  }

  commit(subject: Subject): void {
    const index = this.#dice.below(subject.sequenceCount);
    const { seqLens, pending } = subject;
    const first = pending[0]![index]!;
    const isEven = pending.every((layer) => layer[index] === first);
    // Mostly what is there; now and then the layers are made even first.
    if (!isEven && this.#dice.oneIn(2)) {
      const most = Math.max(...pending.map((layer) => layer[index]!));
      for (const [layer, rows] of pending.entries()) {
        const missing = this.rows((most - rows[index]!) * subject.kvDim, 0);
        subject.cache.append(layer, index, missing, missing);
        rows[index] = most;
      }
    }
    const n = this.#dice.oneIn(4) ? this.#dice.index(5) : pending[0]![index]!;
    const sequence = subject.cache.sequence(index);
    const tokens = this.#dice.oneIn(8)
      ? new Uint32Array(this.#dice.oneIn(2) ? this.#dice.below(5) : n >>> 0 & 63)
      : undefined;
    const done = this.#dice.attempt("commit", "commit_mismatch invalid_size RangeError", () => {
      sequence.commit(n, tokens === undefined ? {} : { tokens });
      return true;
    });
    if (done === undefined || n === 0) return;
    this.#dice.check(pending.every((layer) => layer[index] === n), "commit needs the rows in every layer");
    seqLens[index]! += n;
    for (const layer of pending) layer[index] = 0;
  }

  truncate(subject: Subject): void {
    if (this.#dice.oneIn(8)) {
      this.#dice.attempt("reset", "", () => subject.cache.reset());
      subject.seqLens.fill(0);
      for (const layer of subject.pending) layer.fill(0);
      return;
    }
    const index = this.#dice.below(subject.sequenceCount);
    const n = this.#dice.oneIn(4) ? this.#dice.index(10) : this.#dice.below(subject.seqLens[index]! + 1);
    const done = this.#dice.attempt("truncate", "position_out_of_range RangeError", () => {
      subject.cache.sequence(index).truncate(n);
      return true;
    });
    if (done === undefined) return;
    this.#dice.check(n <= subject.seqLens[index]!, "truncate never adds rows");
    this.emptied(subject, index, n);
  }

  emptied(subject: Subject, index: number, n: number): void {
    subject.seqLens[index] = n;
    for (const layer of subject.pending) layer[index] = 0;
  }

  gather(subject: Subject): void {
    const index = this.#dice.below(subject.sequenceCount), layer = this.#dice.index(subject.layerCount);
    const dtype = this.#dice.pick(DTYPES);
    const length = this.#dice.below(this.#dice.oneIn(2) ? 1000 : 8192);
    const side = () => dtype === "f32" ? this.#dice.pick(this.#outputs).subarray(0, length) : new Uint16Array(length);
    const into = this.#dice.oneIn(2)
      ? { k: side(), v: this.#dice.oneIn(20) ? new Float32Array(length) : side() }
      : undefined;
    const part = this.#dice.oneIn(2) ? this.#dice.partOfRows() : undefined;
    const codes = "layer_out_of_range invalid_size invalid_config RangeError TypeError stale_handle" +
      (part === undefined ? "" : " position_out_of_range");
    const from = this.#dice.oneIn(4) ? this.sequenceOf(subject)! : subject.cache.sequence(index);
    const which = subject.sequences.includes(from) ? subject.sequences.indexOf(from) : index;
    const copy = this.#dice.attempt(
      "gather",
      codes,
      () => from.gather(layer, { dtype, ...part, ...(into === undefined ? {} : { into }) }),
    );
    if (copy === undefined) return;
    const rowCount = subject.seqLens[which]! + subject.pending[layer]![which]!;
    this.#dice.check((part?.start ?? 0) + (part?.count ?? 0) <= rowCount, "a copy has rows that are there");
    const rows = part?.count ?? rowCount - (part?.start ?? 0);
    const { kvHeadCount, headDim } = subject.cache;
    const elements = part?.headStride === undefined || rows === 0
      ? rows * subject.kvDim
      : (kvHeadCount - 1) * part.headStride + rows * headDim;
    if (into === undefined) {
      this.#dice.check(copy.k.length === elements && copy.v.length === elements, "a copy has all rows");
    } else {this.#dice.check(
        copy.k === into.k && copy.v === into.v && length >= elements,
        "a copy goes where it should",
      );}
  }

  attend(subject: Subject): void {
    const { cache } = subject;
    const layer = this.#dice.index(subject.layerCount), index = this.#dice.below(subject.sequenceCount);
    const queryCount = this.#dice.oneIn(8) ? this.#dice.index(40) : 1 + this.#dice.below(3);
    const ratio = 1 + this.#dice.below(4);
    const heads = cache.kvHeadCount * ratio;
    const wanted = Math.min(8192, (queryCount >>> 0 || 1) * heads * cache.headDim);
    let q = this.rows(this.#dice.oneIn(16) ? this.#dice.below(200) : wanted, 0) as Float32Array;
    const per = () => this.rows(this.#dice.oneIn(16) ? this.#dice.below(20) : heads, 0) as Float32Array;
    const options: { -readonly [Key in keyof AttendOptions]: AttendOptions[Key] } = { queryCount };
    if (this.#dice.oneIn(8)) q = this.place(q) as Float32Array;
    else if (this.#dice.oneIn(4)) q = q.slice();
    if (this.#dice.oneIn(3)) options.causal = !this.#dice.oneIn(3);
    if (this.#dice.oneIn(3)) options.windowTokens = this.#dice.index(20);
    if (this.#dice.oneIn(4)) options.sinkTokens = this.#dice.index(20);
    if (this.#dice.oneIn(4)) options.softcap = this.#dice.pick([0.5, 10, 1e30, 0, -1, NaN, Infinity, 1e-40]);
    if (this.#dice.oneIn(4)) options.softmaxScale = this.#dice.pick([0, 1, -3, 1e38, NaN, 1e39]);
    if (this.#dice.oneIn(3)) options.alibiSlopes = per();
    if (this.#dice.oneIn(3)) options.sinkLogits = per();
    if (this.#dice.oneIn(2)) options.into = this.#outputs[0].subarray(0, this.#dice.below(8192));
    if (this.#dice.oneIn(3)) {
      options.lse = this.#outputs[1].subarray(0, this.#dice.oneIn(8) ? this.#dice.below(20) : 500);
    }
    if (this.#dice.oneIn(16) && q.buffer !== this.#floats.buffer) options.into = q; // in place
    const codes = "layer_out_of_range invalid_size invalid_config not_finite RangeError TypeError stale_handle";
    const from = this.#dice.oneIn(4) ? this.sequenceOf(subject)! : cache.sequence(index);
    const output = this.#dice.attempt("attend", codes, () => from.attend(layer, q, options));
    if (output === undefined) return;
    this.#dice.check(output === options.into || output.length === q.length, "an output is as long as its queries");
  }

  /** Takes something out of a cache and keeps it for later. */
  hold(subject: Subject): void {
    const { cache } = subject;
    const layer = this.#dice.index(subject.layerCount), index = this.#dice.below(subject.sequenceCount);
    const ranges = "layer_out_of_range RangeError";
    const rows = () => subject.seqLens[index]! + subject.pending[layer]![index]!;
    switch (this.#dice.below(4)) {
      case 0: {
        const keys = this.#dice.attempt("getKeys", ranges, () => cache.getKeys(layer, index));
        if (keys === undefined) return;
        this.#dice.check(keys.length === rows() * subject.kvDim, "keys are all rows");
        return this.keepArray(subject, keys);
      }
      case 1: {
        const kvLen = this.#dice.oneIn(2) ? this.#dice.index(10) : undefined;
        const codes = `${ranges} position_out_of_range`;
        const run = this.#dice.attempt("contiguousKv", codes, () => cache.sequence(index).contiguousKv(layer, kvLen));
        if (run === undefined) return;
        this.#dice.check(
          run.ok && run.length === (kvLen ?? rows()) && run.v.length === run.length * subject.kvDim,
          "a run",
        );
        if (run.ok) this.keepArray(subject, run.v);
        return;
      }
      default: {
        const views = this.#dice.attempt("views", ranges, () => cache.sequence(index).views(layer));
        if (views === undefined) return;
        this.#dice.check(views.reduce((sum, view) => sum + view.length, 0) === rows(), "views are all rows");
        for (const view of views) {
          this.keep({
            subject,
            array: undefined,
            look: () => {
              this.#dice.attempt("view", "stale_view", () => {
                const { start, length, tokenStride, k, v } = view;
                this.#dice.check(
                  start === 0 && k!.length === length * tokenStride && v!.length === k!.length,
                  "a view",
                );
              });
            },
          });
          this.keepArray(subject, view.k!);
        }
      }
    }
  }

  keepArray(subject: Subject, array: Float32Array | Uint16Array | Uint8Array): void {
    this.keep({
      subject,
      array,
      look: () => {
        const at = this.#dice.below(array.length + 1);
        if (this.#dice.oneIn(4)) {
          array[at] = this.#dice.pick([NaN, Infinity, 1e38, 65535, 0x7c01, this.#dice.random.next()]);
        }
        const value = array[at];
        this.#dice.check(
          value === undefined ? at >= array.length : typeof value === "number",
          "an array has what it has",
        );
      },
    });
  }

  keep(held: Held): void {
    this.#held.push(held);
    if (this.#held.length > 64) this.#held.splice(this.#dice.below(64), 1);
  }

  lookAtHeld(): void {
    if (this.#held.length === 0) return;
    const held = this.#dice.pick(this.#held);
    const isFreed = held.subject !== undefined && held.subject.cache.handle === 0;
    if (isFreed && held.array !== undefined) {
      this.#dice.check(held.array.length === 0, "a freed cache's arrays are empty");
    }
    held.look();
  }

  facts(subject: Subject): void {
    const { cache } = subject;
    this.#dice.attempt("facts", "", () => {
      const { kvBytes, reservedBytes, paddingBytes } = cache.stats();
      this.#dice.check(reservedBytes - paddingBytes === kvBytes && cache.memoryBytes > kvBytes, "stats add up");
      this.#dice.check(cache.currentPos === Math.max(...subject.seqLens), "the longest sequence");
      this.#dice.check(!cache.sequence(0).isOnGpu && cache.sequence(0).layerDevice(0).gpu === -1, "no GPU");
      this.#dice.check(systemInfo().liveCaches >= this.#subjects.length, "what is alive is counted");
    });
    const at = [subject.layerCount, subject.sequenceCount, subject.maxSeqLen, cache.kvHeadCount, cache.headDim]
      .map((end) => this.#dice.index(end)) as [number, number, number, number, number];
    const codes = "layer_out_of_range sequence_out_of_range position_out_of_range RangeError";
    this.#dice.attempt("offset", codes, () => cache.offset(...at));
    this.#dice.attempt("getSeqLen", codes, () => cache.getSeqLen(this.#dice.index(subject.sequenceCount)));
    this.#dice.attempt("layerDevice", codes, () => cache.sequence(0).layerDevice(this.#dice.index(subject.layerCount)));
  }

  attach(subject: Subject): void {
    const wrong = this.#dice.pick([0, ...ABSURD, ...NO_COUNTS, subject.cache.handle ^ 0x10000]);
    if (this.#dice.oneIn(2)) {
      const cache = this.#dice.attempt("attach", "", () => ContiguousCache.attach(subject.cache.handle))!;
      this.#dice.check(
        cache.maxSeqLen === subject.maxSeqLen && cache.kvDim === subject.kvDim,
        "an attached cache is the same",
      );
      subject.attached.push(cache);
      if (subject.attached.length > 3) subject.attached.shift()!.free();
      this.#dice.attempt("attached.getKeys", "unsupported", () => cache.getKeys(0, 0));
    } else if (![...this.#subjects].some(({ cache }) => cache.handle === wrong)) {
      this.#dice.attempt("attach", "stale_handle RangeError", () => ContiguousCache.attach(wrong).free());
    }
    if (this.#freed.length > 0) this.useAfterFree(this.#dice.pick(this.#freed));
  }

  /** Everything a freed cache and what belonged to it can be asked. */
  useAfterFree({ cache, sequences, attached }: Subject): void {
    const row = this.rows(cache.kvDim, 0);
    const sequence = sequences.length > 0 ? this.#dice.pick(sequences) : undefined;
    const other = attached.length > 0 ? this.#dice.pick(attached) : cache;
    const calls: (() => unknown)[] = [
      () => cache.append(0, 0, row, row),
      () => cache.store(0, 0, row, row),
      () => cache.advance(),
      () => cache.reset(),
      () => cache.getKeys(0, 0),
      () => cache.sequence(0),
      () => cache.stats(),
      () => cache.memoryBytes,
      () => other.getSeqLen(0),
      () => other.append(0, 0, row, row),
      ...(sequence === undefined ? [] : [
        () => sequence.append(0, row, row),
        () => sequence.attend(0, row as Float32Array),
        () => sequence.gather(0),
        () => sequence.views(0),
        () => sequence.commit(0),
        () => sequence.truncate(0),
        () => sequence.contiguousKv(0),
        () => sequence.seqLen,
      ]),
    ];
    const done = this.#dice.attempt("after free", "stale_handle", () => {
      this.#dice.pick(calls)();
      return true;
    });
    this.#dice.check(done === undefined, "a freed cache does nothing");
    cache.free();
    sequence?.free();
  }

  /** Options that act while they are read. */
  meddle(subject: Subject): void {
    const { cache } = subject;
    const index = this.#dice.below(subject.sequenceCount);
    const sequence = cache.sequence(index);
    const row = this.rows(subject.kvDim, 0).slice() as Float32Array<ArrayBuffer>;
    const act = this.#dice.pick([
      () => this.free(subject),
      () => void row.buffer.transfer(),
      () => cache.reset(),
      () => this.give(subject),
    ]);
    let read = 0;
    const getter = <T>(value: T) => ({
      get: () => {
        if (read++ === 0) act();
        return value;
      },
    });
    const codes = "stale_handle TypeError not_finite cache_full invalid_size invalid_config";
    switch (this.#dice.below(3)) {
      case 0: {
        const options = Object.defineProperty({}, "layout", getter("token_major"));
        this.#dice.attempt("meddled append", codes, () => sequence.append(0, row, row, options));
        break;
      }
      case 1: {
        const options = Object.defineProperty({}, this.#dice.pick(["lse", "into", "alibiSlopes"]), getter(undefined));
        this.#dice.attempt("meddled attend", codes, () => sequence.attend(0, row, options));
        break;
      }
      default: {
        const into = Object.defineProperty({ k: row }, "v", getter(row)) as { k: Rows; v: Rows };
        this.#dice.attempt("meddled gather", codes, () => sequence.gather(0, { into }));
      }
    }
    this.#dice.check(read <= 1, "an option is read once");
    if (this.#subjects.includes(subject)) { // whatever it was, start again
      cache.reset();
      subject.seqLens.fill(0);
      for (const layer of subject.pending) layer.fill(0);
    }
  }

  /** Ends a cache or a sequence in one of the ways there are. */
  give(subject: Subject): void {
    const index = this.#dice.below(subject.sequenceCount);
    switch (this.#dice.below(6)) {
      case 0:
        return this.free(subject);
      case 1:
        return this.drop(subject);
      case 2: {
        // In the middle of looking at its views.
        const views = subject.cache.sequence(index).views(this.#dice.below(subject.layerCount));
        this.free(subject);
        for (const view of views) {
          const seen = this.#dice.attempt(
            "view after free",
            "stale_view",
            () => this.#dice.pick([view.k, view.v, view.length]),
          );
          this.#dice.check(seen === undefined, "a freed cache shows nothing");
        }
        return;
      }
      default: {
        const sequence = this.sequenceOf(subject)!;
        const which = subject.sequences.indexOf(sequence);
        const wasFreed = this.#dice.attempt("seqLen", "stale_handle", () => sequence.seqLen) === undefined;
        this.#dice.attempt("sequence.free", "", () => sequence.free());
        const isStale = this.#dice.attempt("sequence after free", "stale_handle", () => sequence.seqLen) === undefined;
        this.#dice.check(isStale, "a freed sequence is stale");
        sequence.free();
        if (!wasFreed) this.emptied(subject, which, 0); // else the rows of its successor stay
        if (!this.#dice.oneIn(4)) subject.sequences[which] = subject.cache.sequence(which);
      }
    }
  }

  free(subject: Subject): void {
    if (!this.#subjects.includes(subject)) return;
    this.#dice.attempt("free", "", () => subject.cache.free());
    this.#subjects.splice(this.#subjects.indexOf(subject), 1);
    this.#freed.push(subject);
    if (this.#freed.length > 8) this.#freed.shift();
    if (this.#dice.oneIn(4)) subject.cache[Symbol.dispose]();
  }

  /** Forgets a cache: what was kept of it keeps it, and some day it is finalized. */
  drop(subject: Subject): void {
    this.#dice.attempt("drop", "", () => {});
    this.dropped += 1;
    this.#subjects.splice(this.#subjects.indexOf(subject), 1);
    for (const held of this.#held) if (held.subject === subject) held.subject = undefined;
  }

  /** Gives everything up. */
  end(): void {
    for (const subject of [...this.#subjects]) this.free(subject);
    this.#held.length = 0;
    this.#freed.length = 0;
  }
}
