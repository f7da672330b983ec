/**
 * The options of attend: what a query sees, and how scores become weights.
 *
 * For query head `h` with KV head `g = floor(h / (q heads / kv heads))`, a row `j` that the query at position `p` sees
 * has the score `softmaxScale * q . k[j][g]`, then softcap, then ALiBi; one softmax over the rows seen, maximum
 * subtracted, weighs the rows of `v`.
 *
 * @module
 */

import { KvError, type KvErrorCode } from "../error.ts";
import { ENUMS, VALUES } from "../ffi/exports.ts";
import { fieldsOf, type FieldWords, newRecord } from "../ffi/record.ts";
import { refusal } from "../ffi/status.ts";
import { checkCount } from "./counts.ts";
import { notFiniteRule, queryPlace } from "./not_finite.ts";
import { type OptionNames, optionNames } from "./option_names.ts";
import { checkFloats, inputCount, overlapRule } from "./rows.ts";
import { arrayKind, checkAttached, kindOf, lengthOf } from "./typed_array.ts";

/** What a query sees, how its scores become weights, and where the result goes. */
export interface AttendOptions {
  /**
   * Query rows in `q`, 1 by default. The query heads are `q.length / (queryCount * headDim)`: with the `qHeadCount` of
   * the cache given, a forgotten `queryCount` is refused, and without it, taken for more heads.
   */
  readonly queryCount?: number;
  /** Factor of `q . k`; `1 / sqrt(headDim)` by default. */
  readonly softmaxScale?: number;
  /**
   * Query `i` of `m` sees rows 0 to `total - m + i`; true by default.
   *
   * `total` counts committed and pending rows of the layer. False: every query sees all of them.
   */
  readonly causal?: boolean;
  /** Newest rows a query sees, its own position included, at least 1; all by default. Needs `causal`. */
  readonly windowTokens?: number;
  /**
   * First rows of the sequence that no window hides, neither `windowTokens` nor that of the layer; 0 by default. What has
   * no window sees them anyway.
   */
  readonly sinkTokens?: number;
  /** Replaces a score `s` by `softcap * tanh(s / softcap)`; above 0. */
  readonly softcap?: number;
  /** ALiBi slopes `[q_head]`: `slope * (query position - key position)` is taken off a score. */
  readonly alibiSlopes?: Float32Array;
  /** Learned sink logits `[q_head]`: `exp(logit)` joins the denominator and the lse, and adds no value. */
  readonly sinkLogits?: Float32Array;
  /**
   * Parents `[query]` of a tree of drafted tokens, whose rows are the newest of the layer in the same order: query `i`
   * sees the rows before the tree, its ancestors and itself. `treeParents[i]` is below `i`, and below 0 for a root. At
   * most 64 queries, with neither `windowTokens` nor `alibiSlopes`.
   */
  readonly treeParents?: Int32Array;
  /**
   * Where the output goes, `[query][q_head][head_dim]`, and what the call returns; a new array by default. It may begin
   * exactly where `q` does, and shares no memory with any other array of the call, nor with the rows.
   */
  readonly into?: Float32Array;
  /**
   * Filled when given, `[query][q_head]`: the natural log of the sum of exp of the scores, which merges the outputs of
   * several calls. `-Infinity` where no row is seen and no sink logit given, and nowhere else: one past the range of f32
   * is its largest number, or that below 0.
   */
  readonly lse?: Float32Array;
}

/** The names of {@linkcode AttendOptions}. */
export const ATTEND_NAMES: OptionNames = optionNames<AttendOptions>({
  queryCount: true,
  softmaxScale: true,
  causal: true,
  windowTokens: true,
  sinkTokens: true,
  softcap: true,
  alibiSlopes: true,
  sinkLogits: true,
  treeParents: true,
  into: true,
  lse: true,
});

/** The options of one call as they were when it began. */
export type GivenAttend = { readonly [Name in keyof AttendOptions]-?: AttendOptions[Name] | undefined } & {
  readonly causal: boolean;
  readonly sinkTokens: number;
};

/** Where the options of an attend lie while the library reads them; one for each cache. */
export interface AttendBuffers {
  /** An AttendRecord: one memory, seen as words and as floats. */
  readonly words: Uint32Array;
  readonly floats: Float32Array;
  /** A batch of one. */
  readonly sequence: Uint32Array;
  readonly queryCount: Uint32Array;
  /** An array that is not there crosses as an empty one, because Bun refuses null. */
  readonly none: Float32Array;
  readonly noParents: Int32Array;
}

const ATTEND: FieldWords<"attend"> = fieldsOf("attend");

const { attendFlag: FLAG } = ENUMS;

/** Fresh buffers; each over an own ArrayBuffer, which Bun never moves. */
export function newAttendBuffers(): AttendBuffers {
  const words = newRecord("attend");
  return {
    words,
    floats: new Float32Array(words.buffer),
    sequence: new Uint32Array(new ArrayBuffer(4)),
    queryCount: new Uint32Array(new ArrayBuffer(4)),
    none: new Float32Array(0),
    noParents: new Int32Array(0),
  };
}

/**
 * Reads each option once. A getter among them may give something else the second time, free the cache, or attend
 * itself, so this comes before every check and before the record is written.
 */
export function readAttend(options: AttendOptions): GivenAttend {
  const { queryCount, softmaxScale, causal = true, windowTokens, sinkTokens = 0, softcap } = options;
  const { alibiSlopes, sinkLogits, treeParents, into, lse } = options;
  return {
    queryCount,
    softmaxScale,
    causal,
    windowTokens,
    sinkTokens,
    softcap,
    alibiSlopes,
    sinkLogits,
    treeParents,
    into,
    lse,
  };
}

/** Checks `q` and the options and gives the record of them; allocates nothing. */
export function writeAttend({ words, floats }: AttendBuffers, q: Float32Array, given: GivenAttend): Uint32Array {
  const { queryCount = 1, softmaxScale, causal, windowTokens, sinkTokens, softcap } = given;
  checkFloats("q", q);
  checkCount("queryCount", queryCount);
  if (queryCount === 0) throw invalid("queryCount must be at least 1: queryCount is 0");
  if (typeof causal !== "boolean") throw new TypeError(`causal must be a boolean: ${typeof causal}`);
  checkCount("sinkTokens", sinkTokens);

  let flags: number = causal ? FLAG.causal : 0;
  if (softmaxScale !== undefined) {
    checkFinite("softmaxScale", softmaxScale);
    flags |= FLAG.softmaxScale;
  }
  if (softcap !== undefined) {
    checkFinite("softcap", softcap);
    if (!(Math.fround(softcap) > 0)) throw invalid(`softcap must be above 0 as an f32: softcap is ${softcap}`);
    flags |= FLAG.softcap;
  }
  if (windowTokens !== undefined) {
    checkCount("windowTokens", windowTokens);
    if (windowTokens === 0) throw invalid("windowTokens must be at least 1: windowTokens is 0");
    if (!causal) throw invalid(`windowTokens needs causal: windowTokens is ${windowTokens}, causal is false`);
    flags |= FLAG.window;
  }
  if (given.alibiSlopes !== undefined) checkGiven("alibiSlopes", given.alibiSlopes);
  if (given.sinkLogits !== undefined) checkGiven("sinkLogits", given.sinkLogits);
  if (given.treeParents !== undefined) checkParents(given.treeParents);
  if (given.lse !== undefined) checkGiven("lse", given.lse);
  if (given.into !== undefined) checkFloats("into", given.into);

  words[ATTEND.flags] = flags;
  floats[ATTEND.softmaxScale] = softmaxScale ?? 0;
  words[ATTEND.windowTokens] = windowTokens ?? 0;
  words[ATTEND.sinkTokens] = sinkTokens;
  floats[ATTEND.softcap] = softcap ?? 0;
  return words;
}

/** The elements of an optional input of attend: none where it is absent. */
export function givenCount(name: string, array: Float32Array | Int32Array | undefined): number {
  return array === undefined ? 0 : inputCount(name, array, "attend");
}

/** The refusal of an attend; `queryCount` is that of all sequences together. */
export function attendRefusal(
  status: number,
  layer: number,
  q: Float32Array,
  given: GivenAttend,
  queryCount: number,
  { kvHeadCount, headDim, qHeadCount }: {
    readonly kvHeadCount: number;
    readonly headDim: number;
    readonly qHeadCount?: number | undefined;
  },
  rules: Partial<Record<KvErrorCode, () => string>>,
): KvError {
  return refusal(status, `attend in layer ${layer}`, {
    ...rules,
    invalid_config: () => valueRule(given) ?? memoryRule(q, given),
    not_finite: () => queriesRule(q, queryCount, headDim),
    unsupported: () =>
      "a tree of drafted tokens goes with neither windowTokens, be it the layer's, nor alibiSlopes: treeParents is given",
    invalid_size: () => {
      if (queryCount === 0) return `there must be a query: q has ${lengthOf(q)} elements for none`;
      const qHeads = lengthOf(q) / (queryCount * headDim);
      if (qHeadCount !== undefined && qHeads !== qHeadCount) {
        return `q must be [queryCount][qHeadCount][headDim], ${queryCount} * ${qHeadCount} * ${headDim} elements: ` +
          `q has ${lengthOf(q)}`;
      }
      if (qHeads === 0 || qHeads % kvHeadCount !== 0) {
        return `q must be [queryCount][q heads][headDim], ${queryCount} * a multiple of ${kvHeadCount} * ${headDim} ` +
          `elements: q has ${lengthOf(q)}`;
      }
      return lengthRule(q, given, queryCount, qHeads);
    },
  });
}

/** The rule about lengths that an array beside the queries breaks. */
function lengthRule(q: Float32Array, given: GivenAttend, queryCount: number, qHeads: number): string {
  const { alibiSlopes, sinkLogits, treeParents, into, lse } = given;
  if (into !== undefined && lengthOf(into) < lengthOf(q)) {
    return `into must have at least as many elements as q, ${lengthOf(q)}: into has ${lengthOf(into)}`;
  }
  if (lse !== undefined && lengthOf(lse) < queryCount * qHeads) {
    return `lse must have one for each query and head, ${queryCount} * ${qHeads}: lse has ${lengthOf(lse)}`;
  }
  for (const [name, array] of Object.entries({ alibiSlopes, sinkLogits })) {
    if (array === undefined || lengthOf(array) === qHeads) continue;
    return `${name} must have one for each of ${qHeads} query heads: ${name} has ${lengthOf(array)}`;
  }
  if (treeParents === undefined) return `the arrays are too long for one call: q has ${lengthOf(q)}`;
  return `treeParents must have one for each of ${queryCount} queries, at most ${VALUES.treeNodeCountMax} for a sequence ` +
    `and no more than it has rows: treeParents has ${lengthOf(treeParents)}`;
}

/** The rule that a number among the queries breaks. */
function queriesRule(q: Float32Array, queryCount: number, headDim: number): string {
  const place = queryPlace(lengthOf(q) / (queryCount * headDim), headDim);
  return notFiniteRule([{ name: "q", array: q, storedAs: ["f32"], place }]);
}

/** The rule that an element of an array breaks, if one does. */
function valueRule({ alibiSlopes, sinkLogits, treeParents, causal }: GivenAttend): string | undefined {
  for (const [name, array] of Object.entries({ alibiSlopes, sinkLogits })) {
    const index = array?.findIndex((value) => !Number.isFinite(value)) ?? -1;
    if (index >= 0) return `${name} must be finite: ${name}[${index}] is ${array![index]}`;
  }
  if (treeParents === undefined) return undefined;
  if (!causal) return "treeParents needs causal: causal is false";
  const index = treeParents.findIndex((parent, node) => parent >= node);
  return index < 0 ? undefined : `treeParents[${index}] must be below ${index}: it is ${treeParents[index]}`;
}

/** The rule about memory; an output exactly where the queries are breaks none. */
function memoryRule(q: Float32Array, given: GivenAttend): string {
  const { alibiSlopes, sinkLogits, treeParents, into, lse } = given;
  const isInPlace = into !== undefined && into.buffer === q.buffer && into.byteOffset === q.byteOffset;
  const rule = overlapRule({ into, lse }, { ...(isInPlace ? {} : { q }), alibiSlopes, sinkLogits, treeParents });
  if (treeParents === undefined) return rule;
  return `${rule}, and each of treeParents must be below its index among the queries of its sequence`;
}

/** An array that is given but empty must not pass for an absent one. */
function checkGiven(name: string, array: Float32Array): void {
  checkFloats(name, array);
  checkAttached(name, array);
  if (lengthOf(array) === 0) {
    throw new KvError("invalid_size", `Cannot attend as ${name} must have an element for each query head: it is empty`);
  }
}

/** Parents that are given but empty must not pass for absent ones. */
function checkParents(array: Int32Array): void {
  if (arrayKind(array) !== "Int32Array") throw new TypeError(`treeParents must be an Int32Array: ${kindOf(array)}`);
  checkAttached("treeParents", array);
  if (lengthOf(array) === 0) {
    throw new KvError("invalid_size", "Cannot attend as treeParents must have an element for each query: it is empty");
  }
}

/** The value crosses as an f32, so it must be finite as one. */
function checkFinite(name: string, value: number): void {
  if (typeof value !== "number") throw new TypeError(`${name} must be a number: ${typeof value}`);
  if (!Number.isFinite(Math.fround(value))) throw invalid(`${name} must be finite as an f32: ${name} is ${value}`);
}

function invalid(rule: string): KvError {
  return new KvError("invalid_config", `Cannot attend as ${rule}`);
}
