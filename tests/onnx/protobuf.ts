/**
 * Writes the protobuf encoding: a message is a row of numbered fields, a field a number or bytes.
 *
 *     [ varint: field * 8 + kind ][ varint, 4 bytes of a float, or length and bytes ]
 *
 * Bytes are kept as they were given and joined at the end, so that weights are copied once.
 */

const VARINT = 0, BYTES = 2, FLOAT = 5;

/** A message that is being written; each method adds a field and gives the message. */
export class Message {
  readonly #parts: Uint8Array[] = [];
  /** Bytes so far. */
  size = 0;

  /** A whole number; negative ones take ten bytes, as protobuf's int64 do. */
  number(field: number, value: number | bigint): this {
    return this.#add(varint(BigInt(field * 8 + VARINT)), varint(BigInt.asUintN(64, BigInt(value))));
  }

  float(field: number, value: number): this {
    return this.#add(varint(BigInt(field * 8 + FLOAT)), new Uint8Array(Float32Array.of(value).buffer));
  }

  bytes(field: number, value: Uint8Array): this {
    return this.#add(varint(BigInt(field * 8 + BYTES)), varint(BigInt(value.length)), value);
  }

  text(field: number, value: string): this {
    return this.bytes(field, new TextEncoder().encode(value));
  }

  message(field: number, value: Message): this {
    return this.#add(varint(BigInt(field * 8 + BYTES)), varint(BigInt(value.size)), ...value.#parts);
  }

  toBytes(): Uint8Array {
    const bytes = new Uint8Array(this.size);
    let end = 0;
    for (const part of this.#parts) {
      bytes.set(part, end);
      end += part.length;
    }
    return bytes;
  }

  #add(...parts: Uint8Array[]): this {
    for (const part of parts) {
      this.#parts.push(part);
      this.size += part.length;
    }
    return this;
  }
}

/** Seven bits a byte, lowest first; the eighth says that more follow. */
function varint(value: bigint): Uint8Array {
  const bytes: number[] = [];
  for (; value >= 128n; value >>= 7n) bytes.push(Number(value & 127n) | 128);
  return Uint8Array.of(...bytes, Number(value));
}
