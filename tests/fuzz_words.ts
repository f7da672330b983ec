/**
 * Random words for every export of the library, many of them wrong, none of them a count larger than its buffer.
 *
 * @module
 */

import {
  call,
  CAUSAL,
  ENUMS,
  fieldsOf,
  GEOMETRY,
  type Kind,
  kindsOf,
  LAYER,
  type Name,
  names,
  PAGED,
  POOL,
  recordOf,
  recordsOf,
  rolesOf,
  type Values,
  type Word,
} from "./abi_calls.ts";
import { ABSURD, type Dice } from "./fuzz_dice.ts";

/** A handle, and the export that ends it. */
interface Live {
  readonly handle: number;
  readonly free: Name;
}

/** Handles that are kept alive at once. */
const LIVE_MAX = 16;

/** Records that say how much may be reserved. */
type Limited = "contiguous" | "pool" | "paged" | "bufferPool";

/** The exports that take one. */
const LIMITED: Partial<Record<Name, Limited>> = {
  kv_memory_bytes: "contiguous",
  kv_contiguous_create: "contiguous",
  kv_pool_create: "pool",
  kv_paged_create: "paged",
  kv_buffer_pool_create: "bufferPool",
};

/** Handles of its own, and every export. */
export class WordFuzzer {
  readonly #dice: Dice;
  readonly #isOwned: (handle: number) => boolean;
  readonly #floats: Float32Array;
  readonly #live: Live[] = [];
  /** The last ones that are not. */
  readonly #stale: number[] = [0];
  /** Reading memory for its rate is no call to make a million times. */
  readonly #names: readonly Name[] = names.filter((name) => name !== "kv_read_rate")
    .concat(["kv_attend", "kv_attend", "kv_sequence_append"]); // they serve both layouts, any number of sequences

  /** `isOwned` tells the handles that belong to objects, and are left alone. */
  constructor(dice: Dice, isOwned: (handle: number) => boolean) {
    this.#dice = dice;
    this.#isOwned = isOwned;
    this.#floats = dice.random.floats(16384);
  }

  /** Any export with any words; counts are never larger than their buffers. */
  step(): void {
    const name = this.#dice.pick(this.#names);
    const kinds = kindsOf(name);
    const alive = kinds.filter((kind) => this.#live.some(({ free }) => free === `kv_${kind}_free`));
    const kind = kinds.length === 0 ? undefined : this.#dice.pick(alive.length === 0 ? kinds : alive);
    const words: Word[] = [];
    const isGood = !this.#dice.oneIn(4);
    if (name.endsWith("_free") && !this.#dice.oneIn(4)) return; // or there would be nothing to call
    // One size for all buffers of a good call: keys are as long as values, and the output as the queries.
    const bytes = 16 << this.#dice.below(5);
    let honest = Infinity;
    for (const { name: parameter, is, unit } of rolesOf(name)) {
      if (is === "count") {
        words.push(this.#dice.oneIn(isGood ? 20 : 4) ? this.#dice.below(honest + 1) : honest);
        honest = Infinity;
      } else if (is === "buffer") {
        const buffer = this.#buffer(name, parameter, kind, isGood ? bytes : undefined);
        honest = Math.min(honest, Math.floor(buffer.byteLength / unit));
        if (this.#dice.oneIn(64) && buffer.buffer instanceof ArrayBuffer) buffer.buffer.transfer(); // no memory is safe
        words.push(buffer);
      } else {
        words.push(this.#word(name, parameter, is === "handle" ? kind : undefined, isGood));
      }
    }
    // `fuzz.ts` says why. A handle changed at random may name a cache that was dropped and not yet finalized.
    const handle = words[0] as number;
    if (this.#isOwned(handle)) return;
    const isKnown = this.#live.some((live) => live.handle === handle) || this.#stale.includes(handle);
    if (name.endsWith("_free") && !isKnown && !ABSURD.includes(handle)) return;
    this.#dice.trace(`${name} ${words.map((word) => typeof word === "number" ? word : "buffer")}`);
    const result = call(name, words);
    this.#dice.check(Number.isInteger(result) && result >= -19 && result < 2 ** 31, `${name} gave ${result}`);
    this.#dice.note(name, result < 0 ? `${result}` : "ok");
    if (result > 0 && /_(create|fork|acquire|clone)$/.test(name)) {
      this.#live.push({
        handle: result,
        free: name.replace(/_\w+$/, (verb) => verb.replace(/(create|fork|acquire|clone)$/, "free")) as Name,
      });
      if (this.#live.length > LIVE_MAX) this.#free(this.#dice.below(LIVE_MAX));
    }
    if (result === 0 && name.endsWith("_free")) {
      const index = this.#live.findIndex((live) => live.handle === handle);
      this.#dice.check(index !== -1, `${name} freed what was not alive`);
      this.#retire(index);
    }
  }

  /** Forgets a handle that was freed, and those of the sequences that went with it. */
  #retire(index: number): void {
    this.#stale.push(...this.#live.splice(index, 1).map(({ handle }) => handle));
    const isGone = ({ handle, free }: Live) =>
      free === "kv_sequence_free" && call("kv_sequence_seq_len", [handle, 0]) < 0;
    this.#stale.push(...this.#live.filter(isGone).map(({ handle }) => handle));
    this.#live.splice(0, this.#live.length, ...this.#live.filter((live) => !isGone(live)));
    this.#stale.splice(0, this.#stale.length - 16);
  }

  #word(name: Name, parameter: string, kind: Kind | undefined, isGood: boolean): number {
    if (!isGood && this.#dice.oneIn(3)) {
      return this.#dice.oneIn(2) ? this.#dice.pick(ABSURD) : this.#dice.below(2 ** 24) * 256 + this.#dice.below(256);
    }
    if (kind !== undefined) return this.#handle(kind, isGood);
    if (name === "kv_max_bytes_set") return this.#dice.below(isGood ? 2 : 4);
    switch (parameter) {
      case "level":
        return this.#dice.below(8);
      case "token_count":
      case "seq_len":
      case "row_count":
      case "start":
      case "view_first":
      case "block_count":
      case "buffer_count":
        return this.#dice.below(4);
      case "dtype":
        if (/^kv_(rows|block)_/.test(name)) return ENUMS.dtype.q8_0 + this.#dice.below(isGood ? 2 : 6);
        return this.#dice.below(isGood ? 2 : 4);
      case "block_size":
        return isGood ? 64 : 64 * this.#dice.below(6);
      case "head_dim":
        return isGood ? 32 : 16 * this.#dice.below(20);
      case "class_bytes":
        return 1024 << 2 * this.#dice.below(5);
      case "bytes":
        return this.#dice.below(2 ** 17);
      case "index": // a sequence with a handle of its own has none
        return isGood && this.#dice.oneIn(2) ? 0 : this.#dice.below(isGood ? 2 : 4);
      default:
        return this.#dice.below(isGood ? 2 : 4);
    }
  }

  /** A handle of that kind if there is one; or of another, or of none. */
  #handle(kind: string, isGood: boolean): number {
    const those = this.#live.filter(({ free }) => free === `kv_${kind}_free`);
    if (those.length > 0 && (isGood || this.#dice.oneIn(2))) return this.#dice.pick(those).handle;
    const any = [...this.#live.map(({ handle }) => handle), ...this.#stale];
    return this.#dice.oneIn(2) ? this.#dice.pick(any) : (this.#dice.pick(any) ^ 1 << this.#dice.below(32)) >>> 0;
  }

  /** A buffer for one parameter; of `goodBytes` and with sensible contents, or of any size with any. */
  #buffer(name: Name, parameter: string, kind: Kind | undefined, goodBytes: number | undefined): ArrayBufferView {
    const isGood = goodBytes !== undefined;
    const record = LIMITED[name];
    if (isGood && parameter === "options") {
      if (record !== undefined) return this.#options(record);
      if (name === "kv_attend") return this.#attend();
    }
    if (isGood && parameter === "policy") return recordOf("policy", this.#policy());
    if (isGood && name === "kv_paged_create" && parameter === "layers") {
      return recordsOf("layer", [this.#layer(), this.#layer()]);
    }
    if (parameter === "sequences" || name === "kv_paged_reset") {
      const one = () => kind === "contiguous" ? this.#dice.below(isGood ? 2 : 4) : this.#handle("sequence", isGood);
      const length = isGood && name === "kv_attend" && !this.#dice.oneIn(4) ? 1 : this.#dice.below(4);
      return Uint32Array.from({ length }, one);
    }
    // One query or a few, which is what a good call has room for.
    if (isGood && parameter === "query_counts") return Uint32Array.of(1 + this.#dice.below(2), this.#dice.below(2));
    if (isGood && /^(token_counts|parents|kept)$/.test(parameter)) {
      return Uint32Array.from({ length: 3 }, () => this.#dice.below(3));
    }
    if (isGood && /^(system|stats|info|views?|appended|options)$/.test(parameter)) {
      const bytes = 4 * (1 + this.#dice.below(40));
      return Uint32Array.from({ length: bytes / 4 }, (_, i) => i === 0 ? bytes : 0);
    }
    if (isGood && /^(alibi_slopes|sink_logits|tree_parents)$/.test(parameter)) {
      return new Uint8Array(this.#dice.oneIn(8) ? goodBytes : 0);
    }
    const isBlock = name.startsWith("kv_block_");
    if (isGood && parameter === "rows") {
      return new Float32Array(this.#floats.buffer, 4 * this.#dice.below(8192), isBlock ? 2048 : 64).slice();
    }
    if (isGood && (parameter === "plane" || parameter === "records")) {
      return new Uint8Array((isBlock ? 64 : 2) * this.#dice.pick([18, 34])).fill(this.#dice.below(0x7c));
    }
    const bytes = goodBytes ?? (this.#dice.oneIn(8) ? 0 : this.#dice.below(257));
    const shift = this.#dice.oneIn(2) ? this.#dice.below(8) : 0;
    const buffer = this.#dice.oneIn(8) ? new SharedArrayBuffer(bytes + shift) : new ArrayBuffer(bytes + shift);
    const array = new Uint8Array(buffer, shift);
    if (record !== undefined && parameter === "options") {
      // Never without a limit: a cache may be as large as the machine, and then takes long to make.
      for (let i = 0; i < bytes; i++) {
        array[i] = this.#dice.oneIn(3) ? this.#dice.below(256) : i % 4 === 0 ? this.#dice.below(48) : 0;
      }
      if (bytes >= 4 && this.#dice.oneIn(2)) array.set([bytes & 252, 0, 0, 0]);
      const limitAt = fieldsOf(record).maxBytes * 4;
      if (bytes > limitAt) array.set([0, 0, 0, 1, 0, 0, 0, 0].slice(0, bytes - limitAt), limitAt);
    } else if (isGood) {
      array.set(new Uint8Array(this.#floats.buffer, 4 * this.#dice.below(8192), bytes));
    } else {
      for (let i = 0; i < bytes; i++) array[i] = this.#dice.below(256);
      if (bytes >= 4 && this.#dice.oneIn(2)) array.set([bytes & 252, 0, 0, 0]); // a record of any words
    }
    return this.#dice.oneIn(4) ? new DataView(buffer, shift) : array;
  }

  /** What a cache or a pool is made of, never without a limit. */
  #options(record: Limited): Uint32Array {
    const dtypes = { dtypeK: this.#dice.below(3), dtypeV: this.#dice.below(3) };
    switch (record) {
      case "contiguous": {
        const kvHeadCount = 1 + this.#dice.below(GEOMETRY.kvHeadCount);
        return recordOf(record, { ...GEOMETRY, ...dtypes, kvHeadCount, maxBytes: 2 ** 24 });
      }
      case "pool":
        return recordOf(record, { ...POOL, headDim: 4, blockSize: 4, ...dtypes, dtypeV: 0, maxBytes: 2 ** 20 });
      case "bufferPool":
        return recordOf(record, { buffersPerClass: this.#dice.below(4), maxBytes: 2 ** 20 });
      case "paged": {
        const isOnPool = this.#dice.oneIn(2), sure = true;
        const retention = this.#dice.oneIn(2) ? {} : { retentionTokens: 4, retentionSinkTokens: this.#dice.below(5) };
        const pool = isOnPool ? this.#handle("pool", sure) : 0;
        return recordOf(record, {
          ...PAGED,
          maxSeqLen: 40,
          ...dtypes,
          ...retention,
          maxBytes: pool === 0 ? 2 ** 20 : 0,
          pool,
          ...this.#policy(),
          measuresFidelity: this.#dice.below(2),
          rewindTokens: this.#dice.below(8),
        });
      }
    }
  }

  #attend(): Uint32Array {
    return recordOf("attend", {
      flags: this.#dice.oneIn(4) ? this.#dice.below(64) : CAUSAL.flags,
      softmaxScale: 0.5,
      windowTokens: 1 + this.#dice.below(5),
      sinkTokens: this.#dice.below(3),
      softcap: 1,
    });
  }

  #layer(): Values<"layer"> {
    const window = { windowTokens: this.#dice.oneIn(4) ? 5 : 0 };
    if (!this.#dice.oneIn(4)) return { ...LAYER, ...window };
    const [storeK, storeV] = this.#store();
    return { ...LAYER, ...window, storeK, storeV };
  }

  /** A policy for blocks of 4: floats in the store. */
  #policy(): Values<"policy"> {
    const [policyStoreK, policyStoreV] = this.#store();
    return {
      policyKind: this.#dice.below(2),
      policyStoreK,
      policyStoreV,
      policyTailTokens: 4 * this.#dice.below(3),
      policySinkTokens: this.#dice.below(9),
      policyMaxLogitError: 0,
      policyQueryNorm: 0,
    };
  }

  #store(): [k: number, v: number] {
    return [1 + this.#dice.below(3), 1 + this.#dice.below(3)];
  }

  #free(index: number): boolean {
    const { handle, free } = this.#live[index]!;
    const isFreed = call(free, [handle]) === 0;
    if (isFreed) this.#retire(index);
    return isFreed;
  }

  /** Gives everything up. */
  end(): void {
    // What others still use is refused, and goes after them.
    for (let progress = true; progress;) {
      progress = false;
      for (let i = this.#live.length - 1; i >= 0; i--) progress = (i < this.#live.length && this.#free(i)) || progress;
    }
    this.#dice.check(this.#live.length === 0, "every handle can be freed");
  }
}
