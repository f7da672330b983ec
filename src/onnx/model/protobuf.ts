/**
 * The wire format of protobuf, read without a copy and written without a schema.
 *
 *     message = field*      field = key content      key = varint of number * 8 + wire type
 *
 * | wire type | content |
 * | --- | --- |
 * | 0 | a varint: 7 bits a byte, lowest first, the high bit of all but the last set |
 * | 1, 5 | 8 or 4 bytes |
 * | 2 | the number of bytes, and the bytes: text, an array, or a message |
 *
 * @module
 */

import type { Bytes } from "./bytes.ts";
import { damaged } from "./refusal.ts";

/** Numbers of several bytes begin with the lowest, as in every file of ONNX. */
export const LITTLE_ENDIAN = true;

/** A field, and where its content is. */
export interface Field {
  readonly number: number;
  readonly wire: 0 | 1 | 2 | 5;
  /** The varint, or 0. */
  readonly value: bigint;
  /** The content: nothing where it is a varint. */
  readonly start: number;
  readonly end: number;
}

/** The fields of the message from `start` to `end`, in order. */
export function* fieldsOf(bytes: Bytes, start = 0, end: number = bytes.length): Generator<Field> {
  let position = start;
  while (position < end) {
    const key = varint();
    const number = Number(key >> 3n);
    const wire = Number(key & 7n);
    if (number === 0 || number >= 2 ** 29) throw damaged(`the field at byte ${position} has the number ${number}`);
    switch (wire) {
      case 0: {
        const value = varint();
        yield { number, wire, value, start: position, end: position };
        break;
      }
      case 1:
        yield content(number, wire, 8n);
        break;
      case 2:
        yield content(number, wire, varint());
        break;
      case 5:
        yield content(number, wire, 4n);
        break;
      default:
        throw damaged(`a field has one of the wire types 0, 1, 2 and 5: that before byte ${position} has ${wire}`);
    }
  }

  function varint(): bigint {
    const window = bytes.window(position, Math.min(end, position + 10));
    let value = 0n;
    for (const [i, byte] of window.entries()) {
      value |= BigInt(byte & 127) << BigInt(7 * i);
      if (byte < 128) {
        position += i + 1;
        return BigInt.asUintN(64, value);
      }
    }
    throw damaged(`the varint at byte ${position} does not end within ${window.length} bytes`);
  }

  function content(number: number, wire: 1 | 2 | 5, length: bigint): Field {
    const from = position;
    if (length > BigInt(end - from)) {
      throw damaged(`field ${number} at byte ${from} has ${length} bytes: there are ${end - from}`);
    }
    position += Number(length);
    return { number, wire, value: 0n, start: from, end: position };
  }
}

const decoder = new TextDecoder();
const encoder = new TextEncoder();

/** The text that a field is. */
export function textOf(bytes: Bytes, { start, end }: Field): string {
  return decoder.decode(bytes.window(start, end));
}

/** The number that a field is, as a signed one of 64 bits. */
export function intOf(field: Field): number {
  const value = Number(BigInt.asIntN(64, field.value));
  if (!Number.isSafeInteger(value)) throw damaged(`field ${field.number} must be at most 2^53 - 1: it is ${value}`);
  return value;
}

/** The number of 4 bytes that a field is. */
export function floatOf(bytes: Bytes, field: Field): number {
  if (field.end - field.start !== 4) {
    throw damaged(`field ${field.number} must have 4 bytes: it is of wire type ${field.wire}`);
  }
  const window = bytes.window(field.start, field.end);
  return new DataView(window.buffer, window.byteOffset, 4).getFloat32(0, LITTLE_ENDIAN);
}

/** The varints of a repeated field: one, or as many as are packed in its content. */
export function* varintsOf(bytes: Bytes, field: Field): Generator<bigint> {
  if (field.wire === 0) return yield BigInt.asIntN(64, field.value);
  const window = bytes.window(field.start, field.end);
  let value = 0n;
  let shift = 0n;
  for (const byte of window) {
    value |= BigInt(byte & 127) << shift;
    shift += 7n;
    if (byte < 128) {
      yield BigInt.asIntN(64, value);
      value = 0n;
      shift = 0n;
    } else if (shift > 63n) throw damaged(`a varint of field ${field.number} has more than 10 bytes`);
  }
  if (shift > 0n) throw damaged(`the last varint of field ${field.number} does not end`);
}

/** A message that is being written; its bytes are put together once, at the end. */
export class Message {
  readonly #parts: Uint8Array[] = [];
  #length = 0;

  /** A number: negative ones take 10 bytes. */
  int(number: number, value: number | bigint): this {
    return this.#add(varintBytes(BigInt(number) * 8n)).#add(varintBytes(BigInt.asUintN(64, BigInt(value))));
  }

  /** A number of 4 bytes. */
  float(number: number, value: number): this {
    return this.#add(varintBytes(BigInt(number) * 8n + 5n)).#add(new Uint8Array(Float32Array.of(value).buffer));
  }

  /** Text. */
  text(number: number, value: string): this {
    return this.bytes(number, encoder.encode(value));
  }

  /** Bytes as they are: an array, or a message that was read or is written. */
  bytes(number: number, value: Uint8Array | Message): this {
    const length = value instanceof Message ? value.#length : value.length;
    this.#add(varintBytes(BigInt(number) * 8n + 2n)).#add(varintBytes(BigInt(length)));
    if (!(value instanceof Message)) return this.#add(value);
    for (const part of value.#parts) this.#add(part);
    return this;
  }

  /** The bytes of the message. */
  toBytes(): Uint8Array {
    const bytes = new Uint8Array(this.#length);
    let position = 0;
    for (const part of this.#parts) {
      bytes.set(part, position);
      position += part.length;
    }
    return bytes;
  }

  #add(part: Uint8Array): this {
    this.#parts.push(part);
    this.#length += part.length;
    return this;
  }
}

function varintBytes(value: bigint): Uint8Array {
  const bytes: number[] = [];
  for (; value >= 128n; value >>= 7n) bytes.push(Number(value & 127n) | 128);
  return Uint8Array.of(...bytes, Number(value));
}
