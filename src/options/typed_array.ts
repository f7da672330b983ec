/**
 * What a typed array really is, whatever was made of it.
 *
 * Native code reads and writes as many elements as it is told. An array may carry a `length` of its own, be a `Proxy`,
 * or only inherit from `Float32Array.prototype`, and a buffer may carry a `transfer` of its own. So what native code is
 * told comes from the getters of the language, taken when this module is loaded, and never from the object.
 *
 * Lengths change, too: a getter among somebody's options can detach an array or shrink its buffer. Options are read
 * before anything is checked, and a length is asked for where the call is made; in between runs no code but ours.
 *
 * @module
 */

// What an engine lacks is missed where it is used: importing kvern fails nowhere, and its first use says where it runs.
const getter = (object: object, name: PropertyKey) => Object.getOwnPropertyDescriptor(object, name)?.get;

const typedArray: object = Object.getPrototypeOf(Uint8Array.prototype);
const getTag = getter(typedArray, Symbol.toStringTag) as (this: unknown) => string | undefined;
const getLength = getter(typedArray, "length") as (this: unknown) => number;
const getBuffer = getter(typedArray, "buffer") as (this: unknown) => ArrayBufferLike;
const getByteOffset = getter(typedArray, "byteOffset") as (this: unknown) => number;
const getViewBytes = getter(typedArray, "byteLength") as (this: unknown) => number;
const { at } = typedArray as Uint8Array;
const getByteLength = getter(ArrayBuffer.prototype, "byteLength") as (this: unknown) => number;
const getDetached = getter(ArrayBuffer.prototype, "detached") as (this: unknown) => boolean;
// Not every `lib` of a program that imports this knows it.
const { transfer } = ArrayBuffer.prototype as unknown as { transfer(this: ArrayBuffer, byteLength: number): unknown };

/** The class an array was made by, `"Float32Array"` say; undefined for what is no typed array. */
export function arrayKind(value: unknown): string | undefined {
  return getTag.call(value);
}

/** Elements an array has now; 0 once its memory is gone. Throws TypeError for what is no typed array. */
export function lengthOf(array: ArrayBufferView): number {
  return getLength.call(array);
}

/** Detached memory, or a buffer that shrank, would reach native code as no elements at all. */
export function checkAttached(name: string, array: ArrayBufferView): void {
  try {
    at.call(array as Uint8Array, 0);
  } catch (cause) {
    throw new TypeError(`${name} must not be detached: its buffer was transferred or shrank`, { cause });
  }
}

/** Do two arrays have bytes in common, by their buffers? Two buffers over the same shared memory are not told. */
export function overlaps(one: ArrayBufferView, other: ArrayBufferView): boolean {
  const [a, b] = [one, other].map((array) => {
    const first = getByteOffset.call(array);
    return { buffer: getBuffer.call(array), first, end: first + getViewBytes.call(array) };
  }) as [ByteRange, ByteRange];
  return a.buffer === b.buffer && a.first < b.end && b.first < a.end;
}

/** Where an array lies on its buffer. */
interface ByteRange {
  readonly buffer: ArrayBufferLike;
  readonly first: number;
  readonly end: number;
}

/** Bytes of a buffer. */
export function byteLengthOf(buffer: ArrayBuffer): number {
  return getByteLength.call(buffer);
}

/** Was the buffer taken from the arrays over it? */
export function isDetached(buffer: ArrayBuffer): boolean {
  return getDetached.call(buffer);
}

/** Takes the memory from every array over `buffer`; they have length 0 from then on. */
export function detach(buffer: ArrayBuffer): void {
  if (!isDetached(buffer)) transfer.call(buffer, 0);
}

/** What a wrong argument is, for the text of an error. */
export function kindOf(value: unknown): string {
  return arrayKind(value) ?? (Array.isArray(value) ? "Array" : value === null ? "null" : typeof value);
}
