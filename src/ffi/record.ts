/**
 * Records by the names of their fields, and numbers by what they stand for.
 *
 * A record is an array of 4-byte words whose first says its size in bytes, so that either side may know more fields
 * than the other. Where a field stands follows from the table in `exports.ts`; nobody else counts words. What the numbers
 * mean is said by the files that ask.
 *
 * @module
 */

import { ENUMS, type Field, RECORDS } from "./exports.ts";

/** Words of every platform there is a library for. */
const LITTLE_ENDIAN = true;

/** The name of a record. */
export type RecordName = keyof typeof RECORDS;

/** What a record says: a number for each field, exact up to 2^53, and several for an array. */
export type Values<Name extends RecordName> = {
  readonly [F in keyof typeof RECORDS[Name]]: typeof RECORDS[Name][F] extends `u32[${number}]` ? readonly number[]
    : number;
};

/** The word where each field of a record begins. */
export type FieldWords<Name extends RecordName> = { readonly [F in keyof typeof RECORDS[Name]]: number };

/** Words of a field. */
function wordsIn(field: Field): number {
  if (field === "u64" || field === "f64") return 2;
  return field.startsWith("u32[") ? Number(field.slice(4, -1)) : 1;
}

/** A field of a record, and the word where it begins. */
interface FieldWord {
  readonly name: string;
  readonly kind: Field;
  readonly word: number;
}

/** The fields of a record in order, and how many words it has. */
interface RecordShape {
  readonly fields: readonly FieldWord[];
  readonly wordCount: number;
}

const shapes: ReadonlyMap<string, RecordShape> = new Map(
  Object.entries(RECORDS).map(([record, kinds]) => {
    let wordCount = 1; // the size
    const fields = Object.entries(kinds).map(([name, kind]: [string, Field]) => {
      const word = wordCount;
      wordCount += wordsIn(kind);
      return { name, kind, word };
    });
    return [record, { fields, wordCount }];
  }),
);

function shapeOf(name: RecordName): RecordShape {
  return shapes.get(name)!;
}

/** The word where each field of a record begins, for those who read or write one of them at a time. */
export function fieldsOf<Name extends RecordName>(name: Name): FieldWords<Name> {
  return Object.fromEntries(shapeOf(name).fields.map(({ name, word }) => [name, word])) as FieldWords<Name>;
}

/** Words of a record, as this module knows it. */
export function recordWords(name: RecordName): number {
  return shapeOf(name).wordCount;
}

/** A fresh record with its size filled in; over an own ArrayBuffer, which Bun never moves. */
export function newRecord(name: RecordName): Uint32Array {
  return newRecords(name, 1);
}

/** Room for `count` records, one after the other; the first word is the size of each. */
export function newRecords(name: RecordName, count: number): Uint32Array {
  const words = recordWords(name);
  const records = new Uint32Array(new ArrayBuffer(words * count * 4));
  if (count > 0) records[0] = words * 4;
  return records;
}

/** The record number `index` of several. */
export function recordAt(name: RecordName, records: Uint32Array, index: number): Uint32Array {
  const words = recordWords(name);
  return records.subarray(index * words, (index + 1) * words);
}

/** The record that says `values`. */
export function recordOf<Name extends RecordName>(name: Name, values: Values<Name>): Uint32Array {
  const record = newRecord(name);
  write(name, record, values);
  return record;
}

/** The records that say `values`, one after the other. */
export function recordsOf<Name extends RecordName>(name: Name, values: readonly Values<Name>[]): Uint32Array {
  const records = newRecords(name, values.length);
  values.forEach((each, i) => {
    const record = recordAt(name, records, i);
    record[0] = record.byteLength;
    write(name, record, each);
  });
  return records;
}

function write<Name extends RecordName>(name: Name, record: Uint32Array, values: Values<Name>): void {
  const view = new DataView(record.buffer, record.byteOffset, record.byteLength);
  const numbers = new Map<string, number | readonly number[]>(Object.entries(values));
  for (const { name: field, kind, word } of shapeOf(name).fields) {
    const value = numbers.get(field)!;
    if (typeof value !== "number") record.set(value, word);
    else if (kind === "u64") record.set(uint64Words(value), word);
    else if (kind === "f64") view.setFloat64(word * 4, value, LITTLE_ENDIAN);
    else if (kind === "f32") view.setFloat32(word * 4, value, LITTLE_ENDIAN);
    else record[word] = value;
  }
}

/** What a record says. */
export function valuesOf<Name extends RecordName>(name: Name, record: Uint32Array): Values<Name> {
  const view = new DataView(record.buffer, record.byteOffset, record.byteLength);
  const values = shapeOf(name).fields.map(({ name: field, kind, word }) => [field, read(kind, word)] as const);
  return Object.fromEntries(values) as Values<Name>;

  function read(kind: Field, word: number): number | readonly number[] {
    switch (kind) {
      case "u32":
        return record[word]!;
      case "i32":
        return view.getInt32(word * 4, LITTLE_ENDIAN);
      case "f32":
        return view.getFloat32(word * 4, LITTLE_ENDIAN);
      case "u64":
        return uint64At(record, word);
      case "f64":
        return view.getFloat64(word * 4, LITTLE_ENDIAN);
      default:
        return [...record.subarray(word, word + wordsIn(kind))];
    }
  }
}

/** The 64-bit value at `word`; exact up to 2^53. */
export function uint64At(record: Uint32Array, word: number): number {
  return record[word + 1]! * 2 ** 32 + record[word]!;
}

/** The two words of a 64-bit value, low first. */
export function uint64Words(value: number): [low: number, high: number] {
  return [value % 2 ** 32, Math.floor(value / 2 ** 32)];
}

/** The name that a number stands for. */
export function nameOf<Kind extends keyof typeof ENUMS>(kind: Kind, code: number): keyof typeof ENUMS[Kind] & string {
  for (const name in ENUMS[kind]) if (ENUMS[kind][name] === code) return name;
  throw new Error(`Cannot read a ${kind} as the library gave an unknown number: ${code}`);
}
