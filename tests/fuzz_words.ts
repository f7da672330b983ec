/**
 * Random words for every export of the library, many of them wrong, none of them a count larger than its buffer.
 *
 * @module
 */

import { call, GEOMETRY, type Name, names, rolesOf, unitOf, type Word } from "./abi_calls.ts";
import { ABSURD, type Dice } from "./fuzz_dice.ts";

/** A handle, and the export that ends it. */
interface Live {
  readonly handle: number;
  readonly free: Name;
}

/** Handles that are kept alive at once. */
const LIVE_MAX = 16;

/** Handles of its own, and every export. */
export class WordFuzzer {
  readonly #dice: Dice;
  readonly #isOwned: (handle: number) => boolean;
  readonly #floats: Float32Array;
  readonly #live: Live[] = [];
  /** The last ones that are not. */
  readonly #stale: number[] = [0];
  /** Reading memory for its rate is no call to make a million times. */
  readonly #names: readonly Name[] = names.filter((name) => name !== "kv_read_rate");

  /** `isOwned` tells the handles that belong to objects, and are left alone. */
  constructor(dice: Dice, isOwned: (handle: number) => boolean) {
    this.#dice = dice;
    this.#isOwned = isOwned;
    this.#floats = dice.random.floats(16384);
  }

  /** Any export with any words; counts are never larger than their buffers. */
  step(): void {
    const name = this.#dice.pick(this.#names);
    const roles = rolesOf(name);
    const words: Word[] = [];
    const isGood = !this.#dice.oneIn(4);
    if (name.endsWith("_free") && !this.#dice.oneIn(4)) return; // or there would be nothing to call
    // One size for all buffers of a good call: keys are as long as values, and the output as the queries.
    const bytes = 16 << this.#dice.below(5);
    let honest = Infinity;
    for (const role of roles) {
      if (role === "count") {
        words.push(this.#dice.oneIn(isGood ? 20 : 4) ? this.#dice.below(honest + 1) : honest);
        honest = Infinity;
      } else if (role.includes(":")) {
        const buffer = this.#buffer(role.split(":")[0]!, isGood ? bytes : undefined);
        honest = Math.min(honest, Math.floor(buffer.byteLength / unitOf(role)));
        if (this.#dice.oneIn(64) && buffer.buffer instanceof ArrayBuffer) buffer.buffer.transfer(); // no memory is safe
        words.push(buffer);
      } else {
        words.push(this.#word(role, isGood));
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
    const isGone = ({ handle, free }: Live) => free === "kv_sequence_free" && call("kv_sequence_seq_len", [handle]) < 0;
    this.#stale.push(...this.#live.filter(isGone).map(({ handle }) => handle));
    this.#live.splice(0, this.#live.length, ...this.#live.filter((live) => !isGone(live)));
    this.#stale.splice(0, this.#stale.length - 16);
  }

  #word(role: string, isGood: boolean): number {
    if (!isGood && this.#dice.oneIn(3)) {
      return this.#dice.oneIn(2) ? this.#dice.pick(ABSURD) : this.#dice.below(2 ** 24) * 256 + this.#dice.below(256);
    }
    if (role.startsWith("@")) return this.#handle(role.slice(1), isGood);
    switch (role) {
      case "level":
        return this.#dice.below(8);
      case "tokens":
        return this.#dice.below(4);
      case "format":
        return 3 + this.#dice.below(isGood ? 2 : 6);
      case "block_size":
        return isGood ? 64 : 64 * this.#dice.below(6);
      case "head_dim":
        return isGood ? 32 : 16 * this.#dice.below(20);
      case "class":
        return 1024 << 2 * this.#dice.below(5);
      case "bytes":
        return this.#dice.below(2 ** 17);
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

  /** A buffer for one role; of `goodBytes` and with sensible contents, or of any size with any. */
  #buffer(role: string, goodBytes: number | undefined): ArrayBufferView {
    const isGood = goodBytes !== undefined;
    const sure = true;
    const words = (list: readonly number[]) => Uint32Array.from([list.length * 4 + 4, ...list]);
    if (isGood && role === "geometry") {
      const [layers, sequences, heads, dim, rows] = GEOMETRY;
      const dtypes = [this.#dice.below(3), this.#dice.below(3)];
      return words([layers, sequences, 1 + this.#dice.below(heads), dim, rows, ...dtypes, 2 ** 24, 0]);
    }
    if (isGood && role === "pool_record") return words([2, 2, 4, 4, this.#dice.below(3), 0, 2 ** 20, 0]);
    if (isGood && role === "buffer_pool_record") return words([this.#dice.below(4), 2 ** 20, 0]);
    if (isGood && role === "paged_record") {
      const retention = this.#dice.oneIn(2) ? [0, 0] : [4, this.#dice.below(5)];
      const dtypes = [this.#dice.below(3), this.#dice.below(3)];
      const pool = this.#dice.oneIn(2) ? this.#handle("pool", sure) : 0;
      const limit = pool === 0 ? 2 ** 20 : 0, measures = this.#dice.below(2);
      return words([
        2,
        4,
        40,
        ...dtypes,
        ...retention,
        limit,
        0,
        pool,
        0,
        ...this.#policy(),
        measures,
        this.#dice.below(8),
      ]);
    }
    if (isGood && role === "policy") return words(this.#policy());
    if (isGood && role === "layers") {
      const layer = () => [2, 4, this.#dice.oneIn(4) ? 5 : 0, ...(this.#dice.oneIn(4) ? this.#store() : [0, 0])];
      return Uint32Array.from([...layer(), ...layer()]);
    }
    if (role === "handles") {
      return Uint32Array.from({ length: this.#dice.below(4) }, () => this.#handle("sequence", isGood));
    }
    if (isGood && role === "numbers") return Uint32Array.from({ length: 3 }, () => this.#dice.below(3));
    if (isGood && role === "options") {
      const flags = this.#dice.oneIn(4) ? this.#dice.below(64) : 1;
      return words([
        1 + this.#dice.below(2),
        flags,
        0x3f000000,
        1 + this.#dice.below(5),
        this.#dice.below(3),
        0x3f800000,
      ]);
    }
    if (isGood && role === "record") return words(new Array(this.#dice.below(40)).fill(0));
    if (isGood && /^(slopes|logits|parents)$/.test(role)) return new Uint8Array(this.#dice.oneIn(4) ? goodBytes : 0);
    if (isGood && role === "plane_rows") {
      return new Float32Array(this.#floats.buffer, 4 * this.#dice.below(8192), 2048).slice();
    }
    if (isGood && role === "plane") return new Uint8Array(64 * this.#dice.pick([18, 34])).fill(this.#dice.below(0x7c));
    if (isGood && role === "record_rows") {
      return new Float32Array(this.#floats.buffer, 4 * this.#dice.below(8192), 64).slice();
    }
    if (isGood && role === "records") return new Uint8Array(2 * this.#dice.pick([18, 34])).fill(this.#dice.below(0x7c));
    const bytes = goodBytes ?? (this.#dice.oneIn(8) ? 0 : this.#dice.below(257));
    const shift = this.#dice.oneIn(2) ? this.#dice.below(8) : 0;
    const buffer = this.#dice.oneIn(8) ? new SharedArrayBuffer(bytes + shift) : new ArrayBuffer(bytes + shift);
    const array = new Uint8Array(buffer, shift);
    if (/geometry|_record$/.test(role)) {
      // Never without a limit: a cache may be as large as the machine, and then takes long to make.
      for (let i = 0; i < bytes; i++) {
        array[i] = this.#dice.oneIn(3) ? this.#dice.below(256) : i % 4 === 0 ? this.#dice.below(48) : 0;
      }
      if (bytes >= 4 && this.#dice.oneIn(2)) array.set([bytes & 252, 0, 0, 0]);
      const limitAt = role === "pool_record" ? 28 : role === "buffer_pool_record" ? 8 : 32;
      if (bytes > limitAt) array.set([0, 0, 0, 1, 0, 0, 0, 0].slice(0, bytes - limitAt), limitAt);
    } else if (isGood) {
      array.set(new Uint8Array(this.#floats.buffer, 4 * this.#dice.below(8192), bytes));
    } else {
      for (let i = 0; i < bytes; i++) array[i] = this.#dice.below(256);
      if (bytes >= 4 && this.#dice.oneIn(2)) array.set([bytes & 252, 0, 0, 0]); // a record of any words
    }
    return this.#dice.oneIn(4) ? new DataView(buffer, shift) : array;
  }

  /** The words of a policy for blocks of 4: floats in the store. */
  #policy(): number[] {
    return [this.#dice.below(2), ...this.#store(), 4 * this.#dice.below(3), this.#dice.below(9), 0, 0];
  }

  #store(): number[] {
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
