/**
 * Tensors of a model: where their elements lie, and those few that the cut itself has to know.
 *
 * @module
 */

import type { Bytes } from "./bytes.ts";
import { type Field, fieldsOf, intOf, LITTLE_ENDIAN, Message, textOf, varintsOf } from "./protobuf.ts";
import { cannotCut, damaged } from "./refusal.ts";

/** Element types by the numbers ONNX has for them. */
export const ELEMENT = {
  float32: 1,
  uint8: 2,
  int8: 3,
  int32: 6,
  int64: 7,
  string: 8,
  bool: 9,
  float16: 10,
  float64: 11,
  bfloat16: 16,
} as const;

/** Where elements lie that are in a file of their own, or in that of the model. */
export interface Place {
  /** Path relative to the folder of the model, with `/`. */
  readonly file: string;
  readonly offset: number;
  readonly length?: number;
}

/** A tensor, its elements left where they are. */
export interface Tensor {
  readonly name: string;
  /** One of {@linkcode ELEMENT}, or another that onnxruntime knows. */
  readonly type: number;
  readonly dims: readonly number[];
  /** The message, elements included. */
  readonly start: number;
  readonly end: number;
  /** The elements as bytes, where they lie so in the message. */
  readonly raw?: Field;
  /** The elements in fields of their type, where they lie so. */
  readonly typed: readonly Field[];
  /** Where the elements are, if not in the message. */
  readonly place?: Place;
}

/** The tensor that the message from `start` to `end` is. */
export function readTensor(bytes: Bytes, start: number, end: number): Tensor {
  let name = "";
  let type = 0;
  let raw: Field | undefined;
  let isExternal = false;
  const dims: number[] = [];
  const typed: Field[] = [];
  const external = new Map<string, string>();
  for (const field of fieldsOf(bytes, start, end)) {
    switch (field.number) {
      case 1:
        for (const dim of varintsOf(bytes, field)) dims.push(Number(dim));
        break;
      case 2:
        type = intOf(field);
        break;
      case 4:
      case 5:
      case 7:
      case 10:
      case 11:
        typed.push(field);
        break;
      case 8:
        name = textOf(bytes, field);
        break;
      case 9:
        raw = field;
        break;
      case 13: {
        const [key, value] = entryOf(bytes, field);
        external.set(key, value);
        break;
      }
      case 14:
        isExternal = intOf(field) === 1;
        break;
    }
  }
  if (dims.some((dim) => !Number.isSafeInteger(dim) || dim < 0)) {
    throw damaged(`the dimensions of a tensor must be 0 or more: those of ${name} are ${dims.join(", ")}`);
  }
  return {
    name,
    type,
    dims,
    start,
    end,
    typed,
    ...(raw === undefined ? {} : { raw }),
    ...(isExternal ? { place: placeOf(name, external) } : {}),
  };
}

function entryOf(bytes: Bytes, { start, end }: Field): [key: string, value: string] {
  let key = "";
  let value = "";
  for (const field of fieldsOf(bytes, start, end)) {
    if (field.number === 1) key = textOf(bytes, field);
    if (field.number === 2) value = textOf(bytes, field);
  }
  return [key, value];
}

/** Files of weights lie beside the model: a path that leads elsewhere is no part of it. */
function placeOf(name: string, external: ReadonlyMap<string, string>): Place {
  const file = (external.get("location") ?? "").replaceAll("\\", "/");
  if (file === "" || /^\/|^[a-z]:|(^|\/)\.\.(\/|$)|\0/i.test(file)) {
    throw damaged(`weights must lie in the folder of the model: those of ${name} are in ${JSON.stringify(file)}`);
  }
  const offset = Number(external.get("offset") ?? 0);
  const length = external.has("length") ? Number(external.get("length")) : undefined;
  for (const number of [offset, length ?? 0]) {
    if (!Number.isSafeInteger(number) || number < 0) {
      throw damaged(`the place of weights must be numbers of bytes: that of ${name} has ${JSON.stringify(number)}`);
    }
  }
  return { file, offset, ...(length === undefined ? {} : { length }) };
}

/** Bytes of elements above which a tensor of a model that is a file stays there. */
const INLINE_BYTES = 1024;

/** Where weights lie, by the names that the model has for files; that of the model itself is `model`. */
export interface WeightFiles {
  readonly model: string;
  readonly weights: ReadonlyMap<string, string>;
}

/** The message of a tensor for a piece: large weights stay in the file they lie in, be it that of the model. */
export function tensorMessage(bytes: Bytes, tensor: Tensor, files: WeightFiles | undefined): Uint8Array | Message {
  const { name, type, dims, start, end, raw, place } = tensor;
  const isLarge = raw !== undefined && raw.end - raw.start > INLINE_BYTES;
  if (files === undefined || (place === undefined && !isLarge)) return bytes.window(start, end);
  const { file, offset, length } = place === undefined
    ? { file: files.model, offset: raw!.start, length: raw!.end - raw!.start }
    : { ...place, length: place.length, file: files.weights.get(place.file)! };
  const message = new Message();
  for (const dim of dims) message.int(1, dim);
  message.int(2, type).text(8, name);
  const entries = { location: file, offset: `${offset}`, ...(length === undefined ? {} : { length: `${length}` }) };
  for (const [key, value] of Object.entries(entries)) message.bytes(13, new Message().text(1, key).text(2, value));
  return message.int(14, 1);
}

/** Elements of a tensor, and what they were. */
export interface Elements {
  readonly type: number;
  readonly dims: readonly number[];
  readonly values: readonly number[];
}

/** Most elements that the cut reads of a tensor: the mask of 2048 positions is the largest that matters. */
const ELEMENTS_MAX = 1 << 22;

/** The elements of a small tensor as numbers; `outside` gives the bytes of those in a file of their own. */
export function elementsOf(bytes: Bytes, tensor: Tensor, outside: (place: Place) => Uint8Array): Elements {
  const { name, type, dims, raw, typed, place } = tensor;
  const count = dims.reduce((product, dim) => product * dim, 1);
  if (count > ELEMENTS_MAX) {
    throw cannotCut(`tensor ${name} must have at most ${ELEMENTS_MAX} elements: it has ${count}`);
  }
  const values = place !== undefined
    ? rawElements(name, type, outside({ length: count * bytesIn(name, type), ...place }))
    : raw !== undefined
    ? rawElements(name, type, bytes.window(raw.start, raw.end))
    : typed.flatMap((field) => typedElements(bytes, type, field));
  if (values.length !== count) {
    throw damaged(`tensor ${name} must have ${count} elements, as its dimensions say: it has ${values.length}`);
  }
  return { type, dims, values };
}

function bytesIn(name: string, type: number): number {
  switch (type) {
    case ELEMENT.int64:
    case ELEMENT.float64:
      return 8;
    case ELEMENT.float32:
    case ELEMENT.int32:
      return 4;
    case ELEMENT.float16:
    case ELEMENT.bfloat16:
      return 2;
    case ELEMENT.bool:
    case ELEMENT.int8:
    case ELEMENT.uint8:
      return 1;
    default:
      throw cannotCut(`the elements of tensor ${name} must be numbers of a known type: it has type ${type}`);
  }
}

function rawElements(name: string, type: number, window: Uint8Array): number[] {
  const view = new DataView(window.buffer, window.byteOffset, window.byteLength);
  const stride = bytesIn(name, type);
  const at = (i: number): number => {
    switch (type) {
      case ELEMENT.int64:
        return Number(view.getBigInt64(i, LITTLE_ENDIAN));
      case ELEMENT.float64:
        return view.getFloat64(i, LITTLE_ENDIAN);
      case ELEMENT.float32:
        return view.getFloat32(i, LITTLE_ENDIAN);
      case ELEMENT.int32:
        return view.getInt32(i, LITTLE_ENDIAN);
      case ELEMENT.float16:
        return float16(view.getUint16(i, LITTLE_ENDIAN));
      case ELEMENT.bfloat16:
        return bfloat16(view.getUint16(i, LITTLE_ENDIAN));
      case ELEMENT.int8:
        return view.getInt8(i);
      default:
        return view.getUint8(i);
    }
  };
  return Array.from({ length: Math.floor(window.length / stride) }, (_, i) => at(i * stride));
}

/** Elements that lie in a field of their type: f16 and small integers as the bits in `int32_data`. */
function typedElements(bytes: Bytes, type: number, field: Field): number[] {
  if (field.number === 4) return rawElements("", ELEMENT.float32, bytes.window(field.start, field.end));
  if (field.number === 10) return rawElements("", ELEMENT.float64, bytes.window(field.start, field.end));
  const values = [...varintsOf(bytes, field)].map(Number);
  if (type === ELEMENT.float16) return values.map(float16);
  return type === ELEMENT.bfloat16 ? values.map(bfloat16) : values;
}

function float16(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 31) return fraction === 0 ? sign * Infinity : NaN;
  return exponent === 0 ? sign * fraction * 2 ** -24 : sign * (1024 + fraction) * 2 ** (exponent - 25);
}

const words = new DataView(new ArrayBuffer(4));

function bfloat16(bits: number): number {
  words.setUint32(0, (bits & 0xffff) * 65536);
  return words.getFloat32(0);
}
